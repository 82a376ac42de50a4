"""The mean of values under a softmax layer's probabilities, which are never stored."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, noise
from jaxsoft._core.dtypes import compute_dtype
from jaxsoft._core.registry import Implementation
from jaxsoft._core.temperature import divide_by_temperature, inverse, times
from jaxsoft.linear import derivative, sharding, xla, xla_backward
from jaxsoft.linear.folding import Foldable
from jaxsoft.linear.operands import Config, KernelLayout, Operands, roles_like
from jaxsoft.linear.statistics import MeshAxes, fold_rows, prepare

__all__ = ["linear_expected"]


def linear_expected(
    hidden: ArrayLike,
    kernel: ArrayLike,
    values: ArrayLike,
    *,
    key: jax.Array | None = None,
    hard: bool = False,
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
) -> jax.Array:
    """The expected value, or a relaxed sample of it, under a softmax layer.

    `Σ_v p_v values_v` with `p = softmax(u / τ)` and
    `u = softcap(hidden @ kernel + bias)`: a differentiable mixture of embeddings over
    a whole vocabulary. With a key, `p = softmax((u + g) / τ)` with standard Gumbel
    noise g of its own for every token and class: the Gumbel-softmax mixture.

    Args:
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
      values: [V, D] floating, such as an embedding table.
      key: a JAX random key for Gumbel noise, or None for none.
      hard: whether the result is `values` at the largest logit (with its noise), and
        the gradient that of the mixture: the straight-through estimator.
      bias: [V] floating, added to the logits before the cap; -inf masks a class.
      temperature: τ in [0, ∞], a scalar or [...].
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None for no cap.
      class_mask: [V] booleans; False drops a class. None keeps all.
      kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes, `values`
        included; see `linear_statistics`.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens, which number
        the rows that noise is drawn for.
      tile_bytes: the most bytes that a tile of logits may take; see
        `linear_statistics`.
      implementation: None or "xla".

    Returns:
      [..., D] in the dtype of `values`; 0 for a row without any kept class.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      Weights are rounded to the dtype of `values` for the product, which accumulates
      in float32. Differentiable in reverse mode, to first order, in `hidden`,
      `kernel`, `values`, `bias` and `temperature`; noise is drawn again for the
      gradient, not stored. Its bits depend on the key, the token's place and the class
      alone.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import numpy as np
      >>> from jaxsoft import linear_expected
      >>> hidden, kernel = jnp.ones((1, 1)), jnp.array([[0.0, 1.0]])
      >>> values = jnp.array([[0.0], [1.0]])
      >>> print(np.asarray(linear_expected(hidden, kernel, values)).round(4))
      [[0.7311]]
      >>> key = jax.random.key(1)
      >>> print(linear_expected(hidden, kernel, values, key=key, hard=True).shape)
      (1, 1)

    References:
      Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax,
      arXiv:1611.01144; Bengio et al., arXiv:1308.3432 (straight-through).
    """
    rows_over = sharding.check_axes("token_axes", token_axes)
    call = prepare(
        "linear_expected",
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
    values = checks.floating("values", values)
    number = call.arrays.num_classes(call.config)
    if values.ndim != 2 or values.shape[0] != number:
        raise ValueError(
            f"`values` must have shape [V, D] with V = {number}, got {values.shape}."
        )
    return _expected(call.config, bool(hard), rows_over, key, call.arrays, values)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _expected(config: Config, hard: bool, rows_over, key, arrays, values) -> jax.Array:
    shape = (*arrays.hidden.shape[:-1], values.shape[1])
    count = math.prod(arrays.hidden.shape[:-1])
    if not count or not values.shape[1]:
        return jnp.zeros(shape, values.dtype)
    words = None
    if key is not None:
        words = noise.row_words(key, count, sharding.offset(rows_over, count))
    mixed = _Mixed(fold_rows(config, arrays), values, words)
    return _Expected(config, hard)(mesh_axes.like(mixed, mixed)).reshape(shape)


class _Mixed(NamedTuple):
    """The arrays of a call.

    Attributes:
      operands: those of the logits.
      values: [V, D].
      words: [N, 2], see `noise.row_words`; None without noise.
    """

    operands: Operands
    values: jax.Array
    words: jax.Array | None

    def roles(self, config: Config) -> Any:
        """The roles of the arrays; see `operands.py`."""
        return roles_like(self, (self.operands.roles(config), "vd", "nj"))


class _Saved(NamedTuple):
    """What the derivative needs of each row.

    Attributes:
      max: [N] the largest logit, with its noise.
      total: [N] Σ exp(c).
      mixture: [N, D] Σ p values, the soft one, in the dtype of the statistics.
    """

    max: jax.Array
    total: jax.Array
    mixture: jax.Array


@dataclasses.dataclass(frozen=True)
class _Expected(Foldable):
    """The mixture of each row."""

    config: Config
    hard: bool

    def call(self, mixed: _Mixed) -> jax.Array:
        return _forward(self.config, self.hard, mixed)[0]

    def roles(self, mixed: _Mixed) -> Any:
        return (mixed.roles(self.config),)

    def out_roles(self, *args: Any) -> Any:
        del args
        return "nd"

    def differentiable(self, moving: _Mixed) -> Any:
        wanted = xla_backward.Wanted.of(moving.operands, moving.values)
        return functools.partial(_differentiable, self.config, self.hard, wanted)


@dataclasses.dataclass(frozen=True)
class _Forward(_Expected):
    """The mixture and what its derivative needs."""

    def call(self, mixed: _Mixed) -> Any:
        return _forward(self.config, self.hard, mixed)

    def out_roles(self, *args: Any) -> Any:
        del args
        return "nd", _Saved("n", "n", "nd")  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class _Backward(Foldable):
    """The cotangents that `wanted` names."""

    config: Config
    wanted: xla_backward.Wanted

    @property
    def partial(self) -> bool:
        return True

    def call(self, mixed: _Mixed, saved: _Saved, cotangent: jax.Array) -> Any:
        return _backward(self.config, mixed, saved, cotangent, self.wanted)

    def roles(self, mixed: _Mixed, saved: _Saved, cotangent: jax.Array) -> Any:
        del cotangent
        return mixed.roles(self.config), roles_like(saved, ("n", "n", "nd")), "nd"

    def out_roles(self, *args: Any) -> Any:
        del args
        return self.wanted.roles(self.config)


def _perturbed(config, tile: xla.Tile, words, first: Any) -> jax.Array:
    """Returns a tile's logits with their noise."""
    if words is None:
        return tile.logits
    ids = first + tile.start + lax.iota(jnp.int32, tile.logits.shape[1])
    return tile.logits + noise.paired_gumbel(
        words, noise.CLASSES, ids, tile.logits.dtype
    )


def _forward(config: Config, hard: bool, mixed: _Mixed) -> tuple[jax.Array, _Saved]:
    """Folds the tiles into running sums of weights and of weighted values."""
    operands, values, words = mixed
    dtype = compute_dtype(operands.hidden, operands.kernel)
    tiles = xla.tiles_of(config, operands)
    axes = config.vocab_axes
    offset = sharding.offset(axes, tiles.classes)

    def start(rows):
        return (
            jnp.full((rows, 1), -jnp.inf, dtype),
            jnp.zeros((rows, 1), dtype),
            jnp.zeros((rows, values.shape[1]), dtype),
            jnp.zeros(rows, jnp.int32),
        )

    def step(part, words, index, carry):
        largest, total, mixture, best = carry
        tile = xla.compute_tile(config, part, tiles, index)
        u = _perturbed(config, tile, words, offset)
        tau = part.temperature(config)
        new = jnp.maximum(largest, jnp.max(u, axis=1, keepdims=True))
        peak = jnp.where(new == -jnp.inf, 0, new)
        weights = jnp.exp(divide_by_temperature(u, peak, tau))
        back = jnp.exp(divide_by_temperature(largest, peak, tau))
        rows = lax.dynamic_slice_in_dim(values, tile.start, u.shape[1])
        more = xla.dot(
            weights.astype(values.dtype), rows, (1, 0), config.precision, dtype
        )
        top = tile.start + lax.argmax(u, 1, jnp.int32)
        best = jnp.where((new > largest)[:, 0], top, best)
        total = total * back + jnp.sum(weights, axis=1, keepdims=True)
        return new, total, mixture * back + more, best

    carry = xla.fold(config, operands, start, step, words, tiles)
    largest, total, mixture, best = carry
    tau = operands.temperature(config)
    top = sharding.maximum(largest, axes)
    peak = jnp.where(top == -jnp.inf, 0, top)
    back = jnp.exp(divide_by_temperature(largest, peak, tau))
    sums = {"total": total * back, "mixture": mixture * back}
    if hard:
        # One class a row: the lowest of those that reach the maximum.
        reached = (largest == top)[:, 0]
        none = jnp.iinfo(jnp.int32).max
        first = sharding.lowest(jnp.where(reached, offset + best, none), axes)
        ours = reached & (offset + best == first) & (largest[:, 0] > -jnp.inf)
        picked = jnp.take(values, best, axis=0, mode="clip").astype(dtype)
        sums["picked"] = jnp.where(ours[:, None], picked, 0)
    sums = sharding.add(sums, axes)
    total = jnp.where(sums["total"] == 0, 1, sums["total"])
    mixture = sums["mixture"] / total
    out = sums["picked"] if hard else mixture
    return out.astype(values.dtype), _Saved(top[:, 0], total[:, 0], mixture)


def _backward(config, mixed: _Mixed, saved: _Saved, cotangent, wanted) -> Any:
    """Returns gradients: `d u_v = p_v (g·values_v - g·mixture) / τ`."""
    operands, values, words = mixed
    dtype = saved.max.dtype
    axes = config.vocab_axes
    offset = sharding.offset(axes, operands.num_classes(config))
    mean = jnp.sum(cotangent.astype(dtype) * saved.mixture, axis=1)
    rows = (words, saved.max, saved.total, mean, cotangent.astype(values.dtype))

    def share(part, part_rows, tile, _):
        words, largest, total, mean, cotangent = part_rows
        u = _perturbed(config, tile, words, offset)
        tau = part.temperature(config)
        peak = jnp.where(largest == -jnp.inf, 0, largest)[:, None]
        c = divide_by_temperature(u, peak, tau)
        p = jnp.exp(c) / total[:, None]
        rows = lax.dynamic_slice_in_dim(values, tile.start, u.shape[1])
        gain = xla.dot(cotangent, rows, (1, 1), config.precision, dtype)
        d = p * (gain - mean[:, None])
        moments = jnp.sum(times(d, c), axis=1, keepdims=True) if wanted.tau else None
        mix = (p, cotangent) if wanted.values else None
        return xla_backward.Share(d * inverse(tau, dtype), moments, mix)

    gradients, moments = xla_backward.accumulate(
        config, operands, wanted, share, rows, values=values
    )
    if moments is not None:
        scale = inverse(operands.temperature(config), dtype)
        gradients = gradients._replace(tau=-(moments * scale)[:, 0])
    return gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(config, hard, wanted, mixed: _Mixed) -> jax.Array:
    del wanted
    return _Forward(config, hard)(mixed)[0]


def _fwd(config, hard, wanted, primals):
    del wanted
    mixed = derivative.values(primals)
    out, saved = _Forward(config, hard)(mixed)
    return out, (mixed, saved)


def _bwd(config, hard, wanted, residuals, cotangent):
    del hard
    mixed, saved = residuals
    cotangent = derivative.nonzero(cotangent)
    if cotangent is None:
        none = Operands._make([None] * len(mixed.operands))
        return (_Mixed(none, None, None),)  # pyright: ignore[reportArgumentType]
    saved, cotangent = mesh_axes.like((saved, cotangent), mixed)
    out = _Backward(config, wanted)(mixed, saved, cotangent)
    return (_Mixed(out.of_operands(), out.values, None),)


_differentiable.defvjp(_fwd, _bwd, symbolic_zeros=True)
