"""Classes drawn from a softmax layer, without the logits."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import block_sampling, mesh_axes, noise
from jaxsoft._core.dtypes import compute_dtype
from jaxsoft._core.registry import Implementation, platform_of
from jaxsoft._core.temperature import divide_by_temperature, is_zero
from jaxsoft.linear import sharding, xla
from jaxsoft.linear.folding import Foldable
from jaxsoft.linear.operands import Config, KernelLayout, Operands
from jaxsoft.linear.statistics import MeshAxes, fold_rows, prepare

__all__ = ["linear_sample"]


def linear_sample(
    key: jax.Array,
    hidden: ArrayLike,
    kernel: ArrayLike,
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
) -> jax.Array:
    """Draws one class for each token from the softmax of a layer's logits.

    Exact: a block of classes is drawn by the Gumbel-max rule over the logarithms of
    the blocks' sums, then a class inside it by inversion. The logits are computed
    once, tile by tile, and some √V random numbers are drawn for a token.

    Args:
      key: a JAX random key.
      hidden: [..., H] floating.
      kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
      bias: [V] floating, added to the logits before the cap; -inf masks a class.
      temperature: τ in [0, ∞], a scalar or [...]. τ = 0 gives the lowest argmax.
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None for no cap.
      class_mask: [V] booleans; False drops a class. None keeps all.
      kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes; see
        `linear_statistics`.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens, which number
        the rows: without them every shard would draw with the same bits.
      tile_bytes: the most bytes that a tile of logits may take; see
        `linear_statistics`.
      implementation: None, "xla", or "mosaic_gpu", not yet measured: a kernel for GPUs,
        as for `linear_statistics`, without sharded classes.

    Returns:
      [...] int32 in [0, V); -1 for a row without any kept class, or with a NaN.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of its range.
      NotImplementedError: for implementations not available.

    Notes:
      The bits of a token depend on the key and the token's place alone, those of a
      block of classes on its number as well: a key draws the same classes for every
      tile size and sharding, but for ties within rounding. Without a derivative; see
      `linear_expected` for one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import linear_sample
      >>> hidden, kernel = jnp.ones((2, 1)), jnp.array([[0.0, 9.0, 0.0]])
      >>> print(linear_sample(jax.random.key(0), hidden, kernel, temperature=0.5))
      [1 1]

    References:
      Gumbel, Statistical Theory of Extreme Values, 1954; Maddison, Tarlow and Minka,
      A* Sampling, arXiv:1411.0030 (Gumbel-max over groups of classes).
    """
    rows_over = sharding.check_axes("token_axes", token_axes)
    call = prepare(
        "linear_sample",
        *lax.stop_gradient((jnp.asarray(hidden), jnp.asarray(kernel))),
        bias=None if bias is None else lax.stop_gradient(jnp.asarray(bias)),
        temperature=_fixed(temperature),
        logit_softcap=logit_softcap,
        class_mask=class_mask,
        kernel_layout=kernel_layout,
        precision=precision,
        vocab_axis=vocab_axis,
        tile_bytes=tile_bytes,
        implementation=implementation,
    )
    return _sample(call.config, rows_over, key, call.arrays)


def _fixed(temperature: ArrayLike) -> ArrayLike:
    """Returns a temperature through which no gradient flows."""
    if isinstance(temperature, jax.Array):
        return lax.stop_gradient(temperature)
    return temperature


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _sample(config: Config, rows_over: tuple[str, ...], key, arrays) -> jax.Array:
    shape = arrays.hidden.shape[:-1]
    count = math.prod(shape)
    if not count:
        return jnp.zeros(shape, jnp.int32)
    operands = fold_rows(config, arrays)
    words = noise.row_words(key, count, sharding.offset(rows_over, count))
    operands, words = mesh_axes.like((operands, words), (operands, words))
    return _Sample(config)(operands, words).reshape(shape)


@dataclasses.dataclass(frozen=True)
class _Sample(Foldable):
    """One class for each row."""

    config: Config

    def call(self, operands: Operands, words: jax.Array) -> jax.Array:
        if self.config.implementation == "mosaic_gpu":
            # Pallas is imported by those who use it.
            from jaxsoft.kernels.layer.mosaic_gpu import sample as mosaic_gpu_sample

            return mosaic_gpu_sample.sample(self.config, operands, words)
        return _sample_rows(self.config, operands, words)

    @property
    def platform(self) -> str | None:
        return platform_of(self.config.implementation)

    def roles(self, operands: Operands, words: jax.Array) -> Any:
        del words
        return operands.roles(self.config), "nj"

    def out_roles(self, *args: Any) -> Any:
        del args
        return "n"


def _sample_rows(config: Config, operands: Operands, words: jax.Array) -> jax.Array:
    """Folds the tiles, aligned with blocks of the whole vocabulary."""
    dtype = compute_dtype(operands.hidden, operands.kernel)
    classes = operands.num_classes(config)
    first = sharding.offset(config.vocab_axes, classes)
    total = sharding.num_classes(config, operands)
    block = block_sampling.block_size(total)
    shift = first % block if config.vocab_axes else 0
    tiles = xla.tiles_of(config, operands, block)
    alone = tiles.class_blocks == 1
    if config.vocab_axes and not alone:
        # The first block may have begun on the shard before.
        tiles = dataclasses.replace(tiles, extra=block - 1)

    def start(rows):
        return block_sampling.Drawn(
            jnp.full(rows, -jnp.inf, dtype),
            jnp.full(rows, -jnp.inf, dtype),
            jnp.full(rows, -1, jnp.int32),
        )

    def step(part, words, index, drawn):
        tile = xla.compute_tile(config, part, tiles, index, 0 if alone else shift)
        tau = part.temperature(config)
        begin = index * tiles.block_classes - shift
        u = tile.logits
        if alone:
            room = u.shape[1] + (block - 1 if config.vocab_axes else 0)
            more = math.ceil(room / block) * block - u.shape[1]
            u = jnp.pad(u, ((0, 0), (0, more)), constant_values=-jnp.inf)
        if config.vocab_axes or tiles.classes_overlap:
            # To the front what belongs there; only the ends of a shard are moved.
            moved = tile.start - begin
            roll = functools.partial(jnp.roll, shift=moved, axis=1)
            u = lax.cond(moved == 0, lambda u: u, roll, u)
        first_block = (first + begin) // block
        whole = None
        if config.vocab_axes:
            numbers = first_block + lax.iota(jnp.int32, u.shape[1] // block)
            ends = jnp.minimum((numbers + 1) * block, total)
            whole = (numbers * block >= first) & (ends <= first + classes)
        new = block_sampling.draw(u, tau, words, first_block, block, whole)
        return block_sampling.later(
            drawn, new, tau if isinstance(tau, float) else tau[:, 0]
        )

    drawn = xla.fold(config, operands, start, step, words, tiles)
    if config.vocab_axes:
        drawn = _meet(config, operands, words, drawn, first, total, block)
    lost = jnp.isnan(drawn.max) | jnp.isnan(drawn.score)
    return jnp.where(lost, -1, drawn.class_id)


def _meet(config, operands, words, drawn, first, total, block) -> block_sampling.Drawn:
    """Returns the best of all shards' draws and of the blocks that shards share.

    The logits of a shard's first and last block, where another shard has the rest,
    are computed again; the shards exchange their sums, and agree on the block's score
    and on whose part of it the drawn class lies in.
    """
    axes = config.vocab_axes
    tau = operands.temperature(config)
    # Of the rows, along the second axis.
    row_tau = tau if isinstance(tau, float) else tau.T
    classes = operands.num_classes(config)
    end = first + classes
    dtype = drawn.max.dtype
    zero = is_zero(tau, dtype)
    at = block_sampling.place(words, zero, dtype)
    size = min(block, classes)
    head, tail = first // block, (end - 1) // block
    cut_head = first % block != 0
    cut_tail = (end % block != 0) & (end < total) & ((tail != head) | ~cut_head)
    numbers = [jnp.where(cut_head, head, -1), jnp.where(cut_tail, tail, -1)]
    edges = [
        _edge(config, operands, begin, size, number * block - first, block)
        for begin, number in zip((0, classes - size), numbers, strict=True)
    ]
    tops = jnp.stack([jnp.max(u, axis=1) for u in edges])
    peaks = jnp.where(tops == -jnp.inf, 0, tops)[..., None]
    weights = [
        jnp.exp(divide_by_temperature(u, peak, tau))
        for u, peak in zip(edges, peaks, strict=True)
    ]
    sums = jnp.stack([jnp.sum(w, axis=1) for w in weights])
    shards = sharding.size(axes)
    # [2·shards, N], in the order of the classes.
    all_numbers = lax.all_gather(jnp.stack(numbers), axes).reshape(2 * shards)
    all_tops, all_sums = (
        lax.all_gather(a, axes).reshape(2 * shards, -1) for a in (tops, sums)
    )
    candidates = [drawn]
    for place, number in enumerate(numbers):
        own = 2 * lax.axis_index(axes) + place
        same = ((all_numbers == number) & (number >= 0))[:, None]
        top = jnp.max(jnp.where(same, all_tops, -jnp.inf), axis=0)
        peak = jnp.where(top == -jnp.inf, 0, top)
        back = jnp.exp(divide_by_temperature(all_tops, peak[None], row_tau))
        parts = jnp.where(same, all_sums * back, 0)
        whole = jnp.sum(parts, axis=0)
        score = block_sampling.scores(whole[:, None], words, number, zero)[:, 0]
        target = at.share * whole
        ordered = at.order(parts.T)
        holder = at.column(block_sampling.invert(ordered, target), 2 * shards)
        ahead = jnp.cumsum(ordered, axis=1) - ordered
        mine = jnp.full(ahead.shape[:1], own, jnp.int32)
        before = jnp.take_along_axis(
            ahead, at.column(mine, 2 * shards)[:, None], axis=1
        )[:, 0]
        scaled = at.order(weights[place] * back[own][:, None])
        found = block_sampling.invert(scaled, jnp.maximum(target - before, 0))
        column = at.column(found, size)
        begin = (0, classes - size)[place]
        class_id = jnp.where(holder == own, first + begin + column, -1)
        score = jnp.where(number >= 0, score, -jnp.inf)
        candidates.append(block_sampling.Drawn(top, score, class_id))
    tops, scores, ids = (jnp.stack(field) for field in zip(*candidates, strict=True))
    top = sharding.maximum(jnp.max(tops, axis=0), axes)
    peak = jnp.where(top == -jnp.inf, 0, top)
    scores = scores + divide_by_temperature(tops, peak[None], row_tau)
    best = sharding.maximum(jnp.max(scores, axis=0), axes)
    none = jnp.iinfo(jnp.int32).max
    here = (scores == best[None]) & (ids >= 0)
    class_id = sharding.lowest(jnp.min(jnp.where(here, ids, none), axis=0), axes)
    return block_sampling.Drawn(top, best, jnp.where(class_id == none, -1, class_id))


def _edge(config, operands, begin: int, size: int, first, block: int) -> jax.Array:
    """Returns [N, size] logits from class `begin`, -inf outside the block."""
    rows = operands.hidden.shape[0]
    classes = operands.num_classes(config)
    tiles = xla.tiling.Tiling(rows, classes, rows, size)
    tile = xla.compute_tile(config, operands, tiles, 0, -begin)
    ids = begin + lax.iota(jnp.int32, size)
    return jnp.where((ids >= first) & (ids < first + block), tile.logits, -jnp.inf)
