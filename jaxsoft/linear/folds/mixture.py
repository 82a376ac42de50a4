"""Values mixed by the probabilities of a softmax over the classes of a layer."""

import dataclasses
from typing import Annotated, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import mesh_axes, noise
from jaxsoft._core.numerics import (
    compute_dtype,
    divide_by_temperature,
    finite_peak,
    inverse,
    times,
)
from jaxsoft.linear.arguments import Axes, Operands
from jaxsoft.linear.fold import Fold
from jaxsoft.linear.gradients import Gradients, Into, Share, Wanted, accumulate
from jaxsoft.linear.kept import Kept, KeptTile
from jaxsoft.linear.plans import Tiling
from jaxsoft.linear.tiles import Tile, dot, slice_of

__all__ = ["Mixed", "Mixture"]


class Mixed(NamedTuple):
    """The arrays of a call.

    Attributes:
      operands: those of the logits.
      values: [V, D].
      words: [N, 2], see `noise.row_words`; None without noise.
    """

    operands: Operands
    values: Annotated[jax.Array, Axes("vd")]
    words: Annotated[jax.Array | None, Axes("nj")]

    @classmethod
    def gradients(cls, gradients: Gradients) -> "Mixed":
        """Returns gradients in the places of their arrays, None for those without."""
        return cls(gradients.of_operands(), cast(jax.Array, gradients.values), None)


class _Result(NamedTuple):
    """The mixture of every row, [N, D], in the dtype of the values."""

    mixture: Annotated[jax.Array, Axes("nd")]


class _Carry(NamedTuple):
    """Sums over the classes so far, of R rows.

    Attributes:
      max: [R, 1] the largest logit, with its noise.
      sum: [R, 1] Σ exp(c).
      mixture: [R, D] Σ exp(c) values.
      argmax: [R] the lowest class that reaches the maximum; None unless the result is
        hard.
    """

    max: jax.Array
    sum: jax.Array
    mixture: jax.Array
    argmax: jax.Array | None


class _Saved(NamedTuple):
    """What is known of every row.

    Attributes:
      max: [N] the largest logit, with its noise.
      total: [N] Σ exp(c).
      mixture: [N, D] Σ p values, the soft one, in the dtype of the statistics.
      picked: [N, D] the values at the largest logit; None unless the result is hard.
    """

    max: Annotated[jax.Array, Axes("n")]
    total: Annotated[jax.Array, Axes("n")]
    mixture: Annotated[jax.Array, Axes("nd")]
    picked: Annotated[jax.Array | None, Axes("nd")]


class _Rows(NamedTuple):
    """What the derivative by a tile's logits needs of each row.

    Attributes:
      words: [N, 2], or None.
      max: [N].
      total: [N].
      mean: [N] the product of the cotangent and the mixture.
      cotangent: [N, D].
    """

    words: Annotated[jax.Array | None, Axes("nj")]
    max: Annotated[jax.Array, Axes("n")]
    total: Annotated[jax.Array, Axes("n")]
    mean: Annotated[jax.Array, Axes("n")]
    cotangent: Annotated[jax.Array, Axes("nd")]


@dataclasses.dataclass(frozen=True)
class Mixture(Fold[Mixed, _Carry, _Saved, _Result]):
    """The mixture of each row.

    Attributes:
      config: of the layer.
      hard: whether the result is the values at the largest logit, with the derivative
        of the mixture.
      dtype: the name of the values' dtype, which the result has.
    """

    hard: bool
    dtype: str

    def operands(self, arrays: Mixed) -> Operands:
        return arrays.operands

    def start(self, rows: int, arrays: Mixed) -> _Carry:
        dtype = compute_dtype(arrays.operands.hidden, arrays.operands.kernel)
        return _Carry(
            jnp.full((rows, 1), -jnp.inf, dtype),
            jnp.zeros((rows, 1), dtype),
            jnp.zeros((rows, arrays.values.shape[1]), dtype),
            # XLA takes the maximum along with it, in a slower pass.
            jnp.zeros(rows, jnp.int32) if self.hard else None,
        )

    def tile(
        self,
        part: Mixed,
        tiles: Tiling,
        index: jax.Array | int,
        kept: KeptTile | None = None,
    ) -> Tile:
        tile = super().tile(part, tiles, index, kept)
        return self._perturbed(tile, part.operands, part.words)

    def _perturbed(
        self, tile: Tile, operands: Operands, words: jax.Array | None
    ) -> Tile:
        """Returns a tile whose logits have their noise."""
        if words is None:
            return tile
        classes = operands.num_classes(self.config)
        first = mesh_axes.offset(self.config.vocab_axes, classes)
        ids = first + tile.start + lax.iota(jnp.int32, tile.logits.shape[1])
        bits = noise.paired_gumbel(words, noise.CLASSES, ids, tile.logits.dtype)
        return tile._replace(logits=tile.logits + bits)

    def step(self, carry: _Carry, tile: Tile, part: Mixed) -> _Carry:
        u, tau = tile.logits, part.operands.temperature(self.config)
        largest = jnp.maximum(carry.max, jnp.max(u, axis=1, keepdims=True))
        peak = finite_peak(largest)
        weights = jnp.exp(divide_by_temperature(u, peak, tau))
        rescale = jnp.exp(divide_by_temperature(carry.max, peak, tau))
        by_bits = self.config.moves_bits
        rows = slice_of(part.values, tile.start, u.shape[1], by_bits=by_bits)
        mixed = dot(
            weights.astype(rows.dtype),
            rows,
            (1, 0),
            self.config.precision,
            u.dtype,
        )
        argmax = carry.argmax
        if argmax is not None:
            best = tile.start + lax.argmax(u, 1, jnp.int32)
            argmax = jnp.where((largest > carry.max)[:, 0], best, argmax)
        return _Carry(
            largest,
            carry.sum * rescale + jnp.sum(weights, axis=1, keepdims=True),
            carry.mixture * rescale + mixed,
            argmax,
        )

    def finish(self, carry: _Carry, arrays: Mixed) -> _Saved:
        axes = self.config.vocab_axes
        tau = arrays.operands.temperature(self.config)
        largest = mesh_axes.maximum(carry.max, axes)
        rescale = jnp.exp(divide_by_temperature(carry.max, finite_peak(largest), tau))
        sums = {"total": carry.sum * rescale, "mixture": carry.mixture * rescale}
        if carry.argmax is not None:
            sums["picked"] = self._picked(carry, carry.argmax, arrays, largest)
        sums = mesh_axes.add(sums, axes)
        total = jnp.where(sums["total"] == 0, 1, sums["total"])
        mixture = sums["mixture"] / total
        return _Saved(largest[:, 0], total[:, 0], mixture, sums.get("picked"))

    def _picked(
        self, carry: _Carry, argmax: jax.Array, arrays: Mixed, largest: jax.Array
    ) -> jax.Array:
        """Returns the values at one class a row: the lowest that reaches the maximum.

        They are 0 on all shards but the one that has the class.
        """
        axes = self.config.vocab_axes
        number = arrays.operands.num_classes(self.config)
        reached = (carry.max == largest)[:, 0]
        first = mesh_axes.lowest_argmax(argmax, reached, number, axes)
        is_first = mesh_axes.offset(axes, number) + argmax == first
        ours = reached & is_first & (carry.max[:, 0] > -jnp.inf)
        picked = jnp.take(arrays.values, argmax, axis=0, mode="clip")
        return jnp.where(ours[:, None], picked.astype(carry.mixture.dtype), 0)

    def result(self, saved: _Saved) -> _Result:
        mixture = saved.mixture if saved.picked is None else saved.picked
        return _Result(mixture.astype(self.dtype))

    def residuals(self, saved: _Saved) -> _Saved:
        return saved._replace(picked=None)

    def gradients(
        self,
        arrays: Mixed,
        saved: _Saved,
        cotangents: _Result,
        moving: Mixed,
        kept: tuple[Kept, ...] = (),
        into: Into | None = None,
    ) -> Mixed:
        """Returns gradients: `d u_v = p_v (g·values_v - g·mixture) / τ`."""
        operands, values, words = arrays
        wanted = Wanted.of(moving.operands, moving.values)
        dtype, cotangent = saved.max.dtype, cotangents.mixture
        mean = jnp.sum(cotangent.astype(dtype) * saved.mixture, axis=1)
        cotangent = cotangent.astype(values.dtype)
        rows = _Rows(words, saved.max, saved.total, mean, cotangent)

        def share(part: Operands, rows: _Rows, tile: Tile, *_: Any) -> Share:
            u = self._perturbed(tile, part, rows.words).logits
            tau = part.temperature(self.config)
            # As the forward pass has it, so that XLA computes one tile's weights once.
            c = divide_by_temperature(u, finite_peak(rows.max[:, None]), tau)
            p = jnp.exp(c) / rows.total[:, None]
            by_bits = self.config.moves_bits
            of_tile = slice_of(values, tile.start, u.shape[1], by_bits=by_bits)
            gain = dot(rows.cotangent, of_tile, (1, 1), self.config.precision, dtype)
            d = p * (gain - rows.mean[:, None])
            moments = None
            if wanted.tau:
                moments = jnp.sum(times(d, c), axis=1, keepdims=True)
            mix = (p, rows.cotangent) if wanted.values else None
            return Share(d * inverse(tau, dtype), moments, mix)

        gradients, moments = accumulate(
            self.config,
            operands,
            wanted,
            share,
            rows,
            kept=kept,
            into=None
            if into is None
            else into.of(into.sums.operands, into.sums.values),
            values=values,
        )
        if moments is not None:
            moments = moments * inverse(operands.temperature(self.config), dtype)
        return Mixed.gradients(gradients.with_tau(moments))
