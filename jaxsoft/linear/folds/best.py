"""The classes with the largest logits, and their log-probabilities."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import mesh_axes
from jaxsoft._core.numerics import compute_dtype, divide_by_temperature, finite_peak
from jaxsoft.linear.arguments import Axes, Operands
from jaxsoft.linear.fold import Fold, stream
from jaxsoft.linear.folds.statistics import Statistics
from jaxsoft.linear.tiles import Tile

__all__ = ["Best"]


class _Result(NamedTuple):
    """The best classes of every row, [N, K] each, the best first.

    Attributes:
      log_probs: log-probabilities, -inf where there are no more classes.
      ids: int32, -1 there.
    """

    log_probs: Annotated[jax.Array, Axes("nk")]
    ids: Annotated[jax.Array, Axes("nk")]


class _Carry(NamedTuple):
    """The best classes so far.

    Attributes:
      logits: [R, K], descending.
      ids: [R, K].
      total: [R] Σ exp(c) about the best logit.
    """

    logits: jax.Array
    ids: jax.Array
    total: jax.Array


@dataclasses.dataclass(frozen=True)
class Best(Fold[Operands, _Carry, _Result, _Result]):
    """The best classes of each row; equal logits are ordered by id.

    Attributes:
      config: of the layer.
      k: how many classes.
    """

    k: int

    def operands(self, arrays: Operands) -> Operands:
        return arrays

    def start(self, rows: int, arrays: Operands) -> _Carry:
        dtype = compute_dtype(arrays.hidden, arrays.kernel)
        return _Carry(
            jnp.full((rows, self.k), -jnp.inf, dtype),
            jnp.full((rows, self.k), -1, jnp.int32),
            jnp.zeros(rows, dtype),
        )

    def step(self, carry: _Carry, tile: Tile, part: Operands) -> _Carry:
        u, tau = tile.logits, part.temperature(self.config)
        first = mesh_axes.offset(self.config.vocab_axes, part.num_classes(self.config))
        logits, columns = lax.top_k(u, min(self.k, u.shape[1]))
        columns = jnp.where(logits == -jnp.inf, -1, first + tile.start + columns)
        logits, ids = self._best((carry.logits, logits), (carry.ids, columns))
        peak = finite_peak(logits[:, :1])
        new = jnp.sum(jnp.exp(divide_by_temperature(u, peak, tau)), axis=1)
        rescale = jnp.exp(divide_by_temperature(carry.logits[:, :1], peak, tau))
        return _Carry(logits, ids, carry.total * rescale[:, 0] + new)

    def finish(self, carry: _Carry, arrays: Operands) -> _Result:
        logits, ids, total = carry
        tau, axes = arrays.temperature(self.config), self.config.vocab_axes
        if axes:
            gathered = [
                jnp.moveaxis(lax.all_gather(a, axes), 0, 1).reshape(a.shape[0], -1)
                for a in (logits, ids)
            ]
            logits, ids = self._best((gathered[0],), (gathered[1],))
            # They are the same on every shard, and now known to be.
            logits, ids = mesh_axes.maximum(logits, axes), mesh_axes.maximum(ids, axes)
            peak = finite_peak(logits[:, :1])
            rescale = jnp.exp(divide_by_temperature(carry.logits[:, :1], peak, tau))
            total = lax.psum(total * rescale[:, 0], axes)
            # So are temperatures.
            if isinstance(tau, jax.Array):
                tau = mesh_axes.maximum(tau, axes)
        c = divide_by_temperature(logits, finite_peak(logits[:, :1]), tau)
        log_sum = jnp.log(jnp.where(total == 0, 1, total))[:, None]
        return _Result(c - log_sum, ids)

    def result(self, saved: _Result) -> _Result:
        return saved

    def _best(self, logits: tuple, ids: tuple) -> tuple[jax.Array, jax.Array]:
        """Returns the largest logits and their ids; equal ones in the order given."""
        best, places = lax.top_k(jnp.concatenate(logits, axis=1), self.k)
        ids_of_all = jnp.concatenate(ids, axis=1)
        return best, jnp.take_along_axis(ids_of_all, places, axis=1)

    def differentiable(self, moving: Operands) -> Callable[[Operands], _Result]:
        """Returns the log-probabilities of the best classes, computed anew."""
        del moving
        fold = Statistics(self.config, frozenset({"label"}))

        def log_probs_at_best(operands):
            ids = stream(self, jax.tree.map(lax.stop_gradient, operands)).ids
            fields = stream(fold, operands._replace(labels=ids))
            assert fields.label is not None
            log_probs = fields.label - fields.log_sum[:, None]
            return _Result(jnp.where(ids < 0, -jnp.inf, log_probs), ids)

        return log_probs_at_best
