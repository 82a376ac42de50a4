"""The best classes of a softmax layer, without the logits."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes
from jaxsoft._core.dtypes import compute_dtype
from jaxsoft._core.registry import Implementation
from jaxsoft._core.temperature import divide_by_temperature
from jaxsoft.linear import derivative, sharding, xla
from jaxsoft.linear.folding import Foldable
from jaxsoft.linear.operands import Config, KernelLayout, Operands
from jaxsoft.linear.statistics import MeshAxes, fold_rows, prepare

__all__ = ["linear_top_k"]


def linear_top_k(
    hidden: ArrayLike,
    kernel: ArrayLike,
    k: int,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    kernel_layout: KernelLayout = "hv",
    precision: Any = None,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
    tile_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The k most probable classes of each token, exactly, and their log-probabilities.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
      k: how many classes, in [1, V].
      bias: [V] floating, added to the logits before the cap; -inf masks a class.
      temperature: τ in [0, ∞], a scalar or [...]; the classes do not depend on it.
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None for no cap.
      class_mask: [V] booleans; False drops a class. None keeps all.
      kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes; see
        `linear_statistics`.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens.
      tile_bytes: the most bytes that a tile of logits may take; see
        `linear_statistics`.
      implementation: None or "xla".

    Returns:
      A pair: log-probabilities [..., k], descending, float32 (float64 if an input is),
      and class ids [..., k], int32; equal logits are ordered by id. Where fewer than k
      classes are kept the rest has log-probability -inf and id -1.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      The log-probabilities are normalised over all kept classes, and differentiable as
      those of `linear_log_prob_at`, which the derivative computes anew. They are what
      `linear_distillation_top_k` takes from a teacher.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import linear_top_k
      >>> hidden, kernel = jnp.ones((1, 1)), jnp.array([[0.0, 2.0, 1.0, 2.0]])
      >>> log_probs, class_ids = linear_top_k(hidden, kernel, 3)
      >>> print(class_ids, np.asarray(log_probs).round(2))
      [[1 3 2]] [[-0.92 -0.92 -1.92]]

    References:
      Milakov and Gimelshein, Online normalizer calculation for softmax,
      arXiv:1805.02867 (softmax fused with top-k).
    """
    sharding.check_axes("token_axes", token_axes)
    call = prepare(
        "linear_top_k",
        hidden,
        kernel,
        bias=bias,
        temperature=temperature,
        logit_softcap=logit_softcap,
        class_mask=class_mask,
        kernel_layout=kernel_layout,
        precision=precision,
        vocab_axis=vocab_axis,
        tile_bytes=tile_bytes,
        implementation=implementation,
    )
    k = checks.positive_integer("k", k)
    if k > call.num_classes():
        raise ValueError(f"`k` must be at most V = {call.num_classes()}, got {k}.")
    return _top_k(call.config, k, call.arrays)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _top_k(config: Config, k: int, arrays: Operands) -> tuple[jax.Array, jax.Array]:
    rows = arrays.hidden.shape[:-1]
    if not math.prod(rows):
        dtype = compute_dtype(arrays.hidden, arrays.kernel)
        return jnp.zeros((*rows, k), dtype), jnp.zeros((*rows, k), jnp.int32)
    operands = fold_rows(config, arrays)
    operands = mesh_axes.like(operands, operands)
    log_probs, ids = _TopK(config, k)(operands)
    return log_probs.reshape(*rows, k), ids.reshape(*rows, k)


@dataclasses.dataclass(frozen=True)
class _TopK(Foldable):
    """Log-probabilities and ids of the best classes of each row."""

    config: Config
    k: int

    def call(self, operands: Operands) -> tuple[jax.Array, jax.Array]:
        return _top_k_rows(self.config, self.k, operands)

    def roles(self, operands: Operands) -> Any:
        return (operands.roles(self.config),)

    def out_roles(self, *args: Any) -> Any:
        del args
        return "nk", "nk"

    def differentiable(self, moving: Operands) -> Any:
        del moving

        def log_probs_at_best(operands):
            _, ids = self(jax.tree.map(lax.stop_gradient, operands))
            fields = derivative.statistics(self.config, operands._replace(labels=ids))
            assert fields.label is not None
            log_probs = fields.label - fields.log_sum[:, None]
            return jnp.where(ids < 0, -jnp.inf, log_probs), ids

        return log_probs_at_best


def _top_k_rows(config: Config, k: int, operands: Operands):
    """Folds the tiles into the best logits so far and the sum of exponentials."""
    dtype = compute_dtype(operands.hidden, operands.kernel)
    tiles = xla.tiles_of(config, operands)
    first = sharding.offset(config.vocab_axes, tiles.classes)

    def start(rows):
        return (
            jnp.full((rows, k), -jnp.inf, dtype),
            jnp.full((rows, k), -1, jnp.int32),
            jnp.zeros(rows, dtype),
        )

    def step(part, _, index, carry):
        best, ids, total = carry
        tile = xla.compute_tile(config, part, tiles, index)
        values, columns = lax.top_k(tile.logits, min(k, tiles.block_classes))
        columns = jnp.where(values == -jnp.inf, -1, first + tile.start + columns)
        before = best[:, 0]
        best, ids = _best((best, values), (ids, columns), k)
        tau = part.temperature(config)
        peak = jnp.where(best[:, :1] == -jnp.inf, 0, best[:, :1])
        new = jnp.sum(jnp.exp(divide_by_temperature(tile.logits, peak, tau)), axis=1)
        back = jnp.exp(divide_by_temperature(before[:, None], peak, tau))[:, 0]
        return best, ids, total * back + new

    best, ids, total = xla.fold(config, operands, start, step, tiles=tiles)
    tau = operands.temperature(config)
    axes = config.vocab_axes
    if axes:
        own = best[:, :1]
        gathered = [
            jnp.moveaxis(lax.all_gather(a, axes), 0, 1).reshape(a.shape[0], -1)
            for a in (best, ids)
        ]
        best, ids = _best((gathered[0],), (gathered[1],), k)
        # The same on every shard, and now known to be.
        best, ids = sharding.maximum(best, axes), sharding.maximum(ids, axes)
        peak = jnp.where(best[:, :1] == -jnp.inf, 0, best[:, :1])
        back = jnp.exp(divide_by_temperature(own, peak, tau))[:, 0]
        total = lax.psum(total * back, axes)
        # Temperatures are the same on every shard, too.
        if isinstance(tau, jax.Array):
            tau = sharding.maximum(tau, axes)
    peak = jnp.where(best[:, :1] == -jnp.inf, 0, best[:, :1])
    c = divide_by_temperature(best, peak, tau)
    log_sum = jnp.log(jnp.where(total == 0, 1, total))[:, None]
    return c - log_sum, ids


def _best(values: tuple, ids: tuple, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest values and their ids; equal ones in the order given."""
    best, places = lax.top_k(jnp.concatenate(values, axis=1), k)
    return best, jnp.take_along_axis(jnp.concatenate(ids, axis=1), places, axis=1)
