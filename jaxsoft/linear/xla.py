"""Statistics of `hidden @ kernel` and their derivative, tile by tile, in plain XLA.

Two nested loops run over blocks of rows and of classes. A tile of the kernel is a
slice in place; its logits live in one buffer of the tile's size. The forward pass
merges each tile into running statistics of its rows (2·N·H·V flops). The backward
pass computes the tiles again, turns them into the derivative by the logits in the
dtype of the operands, and multiplies twice (6·N·H·V flops): into a float32 sum for
the rows, and into a tile of dkernel, which is written once, in its own dtype.

Where the last block would stick out it starts earlier instead, and what it covers a
second time is left out: no operand is padded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft.dtypes import compute_dtype
from jaxsoft.linear import tiling
from jaxsoft.linear.operands import Config, Fields, Operands
from jaxsoft.temperature import divide_by_temperature, inverse, over_temperature

__all__ = ["Cotangents", "backward", "forward"]


class Cotangents(NamedTuple):
    """Cotangents of the fields that have one, [N] each; None where they vanish."""

    log_sum: jax.Array | None
    label: jax.Array | None
    mean: jax.Array | None
    expected: jax.Array | None


class _Tile(NamedTuple):
    """One tile of logits.

    Attributes:
      kernel: the slice of the kernel, in the dtype of the matrix products.
      logits: [R, B] u, with -inf at masked classes and at those covered before.
      capped: whether -inf can occur, i.e. whether there is anything to keep from.
      fresh: [B] whether the class was not covered before; None where all are.
      is_label: [R, B] whether the class is the row's label; None without labels.
    """

    kernel: jax.Array
    logits: jax.Array
    masked: bool
    fresh: jax.Array | None
    is_label: jax.Array | None


class _Running(NamedTuple):
    """Running statistics of R rows, [R, 1] each.

    Attributes:
      max: m so far, -inf before the first kept class.
      sum: Σ exp(c).
      label: the logit of the label, not centred; -inf before it was met.
      gap: Σ (u - m) over kept classes, not divided.
      number: how many classes were kept, int32.
      weighted: Σ exp(c) c.
      argmax: int32.
    """

    max: jax.Array
    sum: jax.Array
    label: jax.Array | None
    gap: jax.Array | None
    number: jax.Array | None
    weighted: jax.Array | None
    argmax: jax.Array | None


def _tiling(config: Config, operands: Operands) -> tiling.Tiling:
    dtype = compute_dtype(operands.hidden, operands.kernel)
    return tiling.choose(
        operands.hidden.shape[0],
        operands.num_classes(config),
        dtype.itemsize,
        config.tile_bytes,
    )


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], config, dtype):
    """Contracts one axis of each matrix, accumulating in `dtype`."""
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=config.precision,
        preferred_element_type=dtype,
    )


def _slice_rows(operands: Operands, start: jax.Array, rows: int) -> Operands:
    """Returns the operands of `rows` rows from `start`."""
    return operands._replace(
        hidden=lax.dynamic_slice_in_dim(operands.hidden, start, rows),
        tau=_slice(operands.tau, start, rows),
        labels=_slice(operands.labels, start, rows),
    )


def _slice(array: jax.Array | None, start: jax.Array, size: int) -> jax.Array | None:
    return None if array is None else lax.dynamic_slice_in_dim(array, start, size)


def _softcap(logits: jax.Array, cap: float | None) -> jax.Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _tile(config: Config, operands: Operands, tiles: tiling.Tiling, index) -> _Tile:
    """Computes tile `index` of the classes for the rows in `operands`."""
    dtype = compute_dtype(operands.hidden, operands.kernel)
    size = tiles.block_classes
    first = index * size
    start = jnp.minimum(first, tiles.classes - size)
    kernel = lax.dynamic_slice_in_dim(operands.kernel, start, size, config.class_axis)
    operand_dtype = operands.matmul_dtype()
    kernel = kernel.astype(operand_dtype)
    hidden = operands.hidden.astype(operand_dtype)
    u = _dot(hidden, kernel, (1, 1 - config.class_axis), config, dtype)
    if operands.bias is not None:
        u = u + _slice(operands.bias, start, size).astype(dtype)
    u = _softcap(u, config.softcap)
    masked = operands.bias is not None
    if operands.class_mask is not None:
        u = jnp.where(_slice(operands.class_mask, start, size), u, -jnp.inf)
        masked = True
    classes = start + lax.iota(jnp.int32, size)
    fresh = None
    if tiles.classes_overlap:
        fresh = classes >= first
        u = jnp.where(fresh, u, -jnp.inf)
        masked = True
    is_label = None
    if operands.labels is not None:
        labels = operands.labels
        if fresh is not None:
            labels = jnp.where(labels >= first, labels, -1)
        is_label = classes == labels[:, None]
    return _Tile(kernel, u, masked, fresh, is_label)


def forward(config: Config, operands: Operands) -> Fields:
    """Returns the statistics of every row.

    Args:
      config: what is known at trace time.
      operands: the arrays.

    Returns:
      The wanted fields, [N] each.
    """
    tiles = _tiling(config, operands)
    if tiles.row_blocks == 1:
        return _forward_rows(config, operands, tiles)

    def block(index):
        start = jnp.minimum(index * tiles.block_rows, tiles.rows - tiles.block_rows)
        part = _slice_rows(operands, start, tiles.block_rows)
        return _forward_rows(config, part, tiles)

    blocks = lax.map(block, jnp.arange(tiles.row_blocks))
    return jax.tree.map(lambda field: _join_rows(field, tiles), blocks)


def _join_rows(blocks: jax.Array, tiles: tiling.Tiling) -> jax.Array:
    """Returns [N] from [blocks, R], leaving out what the last block repeats."""
    again = tiles.row_blocks * tiles.block_rows - tiles.rows
    return jnp.concatenate([blocks[:-1].reshape(-1), blocks[-1, again:]])


def _forward_rows(config: Config, operands: Operands, tiles: tiling.Tiling) -> Fields:
    """Returns the statistics of one block of rows."""
    rows = operands.hidden.shape[0]
    dtype = compute_dtype(operands.hidden, operands.kernel)
    column = (rows, 1)
    start = _Running(
        max=jnp.full(column, -jnp.inf, dtype),
        sum=jnp.zeros(column, dtype),
        label=None if operands.labels is None else jnp.full(column, -jnp.inf, dtype),
        gap=jnp.zeros(column, dtype) if config.mean else None,
        number=jnp.zeros(column, jnp.int32) if config.mean else None,
        weighted=jnp.zeros(column, dtype) if config.expected else None,
        argmax=jnp.zeros(column, jnp.int32) if config.argmax else None,
    )

    def step(index, running):
        tile = _tile(config, operands, tiles, index)
        return _merge(config, operands, tiles, running, tile, index)

    running = lax.fori_loop(0, tiles.class_blocks, step, _vary_like(start, operands))
    return _finish(config, operands, running)


def _vary_like(start, operands: Operands):
    """Gives constants the varying mesh axes of the operands, inside shard_map."""
    axes = frozenset().union(
        *(getattr(jax.typeof(a), "vma", ()) for a in jax.tree.leaves(operands))
    )
    if not axes:
        return start
    return jax.tree.map(lambda a: lax.pcast(a, tuple(axes), to="varying"), start)


def _merge(config, operands, tiles, running: _Running, tile: _Tile, index) -> _Running:
    """Merges a tile of logits into the running statistics."""
    u, tau = tile.logits, operands.temperature(config)
    new = jnp.maximum(running.max, jnp.max(u, axis=1, keepdims=True))
    # A row without any kept class so far is centred on 0: all its c are -inf.
    peak = jnp.where(new == -jnp.inf, 0, new)
    c = divide_by_temperature(u, peak, tau)
    weights = jnp.exp(c)
    back = divide_by_temperature(running.max, peak, tau)
    rescale = jnp.exp(back)
    label, gap, number, weighted, argmax = running[2:]
    if tile.is_label is not None:
        here = jnp.max(jnp.where(tile.is_label, u, -jnp.inf), axis=1, keepdims=True)
        label = jnp.maximum(label, here)
    if config.mean:
        kept = u != -jnp.inf
        moved = jnp.where(number == 0, 0, running.max - peak)
        gap = gap + number.astype(u.dtype) * moved
        gap += jnp.sum(jnp.where(kept, u - peak, 0), axis=1, keepdims=True)
        number += jnp.sum(kept, axis=1, keepdims=True, dtype=jnp.int32)
    if config.expected:
        moved = jnp.where(rescale == 0, 0, back)
        weighted = rescale * (weighted + running.sum * moved)
        weighted += _sum_times(weights, c)
    if config.argmax:
        start = jnp.minimum(
            index * tiles.block_classes, tiles.classes - tiles.block_classes
        )
        best = start + lax.argmax(u, 1, jnp.int32)[:, None]
        argmax = jnp.where(new > running.max, best, argmax)
    total = rescale * running.sum + jnp.sum(weights, axis=1, keepdims=True)
    return _Running(new, total, label, gap, number, weighted, argmax)


def _sum_times(weights: jax.Array, c: jax.Array) -> jax.Array:
    """Returns Σ w c over classes, with 0·(-inf) = 0."""
    return jnp.sum(jnp.where(weights == 0, 0, weights * c), axis=1, keepdims=True)


def _finish(config: Config, operands: Operands, running: _Running) -> Fields:
    """Turns running statistics into fields."""
    tau = operands.temperature(config)
    empty = running.max == -jnp.inf
    total = jnp.where(empty, 1, running.sum)
    label = mean = expected = argmax = None
    peak = jnp.where(empty, 0, running.max)
    if running.label is not None:
        label = divide_by_temperature(running.label, peak, tau)[:, 0]
    if config.mean:
        number = jnp.maximum(running.number, 1).astype(running.gap.dtype)
        mean = over_temperature(running.gap / number, tau)[:, 0]
    if config.expected:
        expected = (running.weighted / total)[:, 0]
    if config.argmax:
        argmax = running.argmax[:, 0]
    return Fields(
        running.max[:, 0], jnp.log(total)[:, 0], label, mean, expected, argmax
    )


class Gradients(NamedTuple):
    """Cotangents of the operands; None where not wanted.

    Attributes:
      hidden: [N, H] in the dtype of `hidden`.
      kernel: in the shape and dtype of `kernel`.
      bias: [V] in the dtype of `bias`.
      tau: [N].
    """

    hidden: jax.Array | None
    kernel: jax.Array | None
    bias: jax.Array | None
    tau: jax.Array | None


class _Coefficients(NamedTuple):
    """dlogits = p (c₀ + c₃ c) + c₁ 1[v = label] + c₂, [R, 1] each, or None for 0."""

    p: jax.Array | None
    label: jax.Array | None
    kept: jax.Array | None
    pc: jax.Array | None


def backward(
    config: Config,
    operands: Operands,
    fields: Fields,
    cotangents: Cotangents,
    wanted: Gradients,
) -> Gradients:
    """Returns the cotangents of the operands from those of the fields.

    Args:
      config: what is known at trace time.
      operands: the arrays of the forward pass.
      fields: its results.
      cotangents: the cotangents of the fields, [N] each.
      wanted: booleans, which gradients to compute.

    Returns:
      The wanted gradients; a gradient that is not wanted costs nothing.
    """
    tiles = _tiling(config, operands)
    dtype = compute_dtype(operands.hidden, operands.kernel)
    rows, features = operands.hidden.shape
    sums = (
        jnp.zeros((rows, features), dtype) if wanted.hidden else None,
        jnp.zeros(operands.kernel.shape, operands.kernel.dtype)
        if wanted.kernel
        else None,
        jnp.zeros(operands.bias.shape, operands.bias.dtype) if wanted.bias else None,
        jnp.zeros((rows, 2), dtype) if wanted.tau else None,
    )
    coefficients = _coefficients(config, operands, fields, cotangents)

    def step(index, sums):
        return _backward_classes(
            config, operands, fields, coefficients, tiles, index, sums
        )

    dhidden, dkernel, dbias, moments = lax.fori_loop(
        0, tiles.class_blocks, step, _vary_like(sums, operands)
    )
    if dhidden is not None:
        dhidden = dhidden.astype(operands.hidden.dtype)
    dtau = None
    if moments is not None:
        dtau = _tau_cotangent(config, operands, fields, cotangents, moments)
    return Gradients(dhidden, dkernel, dbias, dtau)


def _coefficients(config, operands, fields, cotangents) -> _Coefficients:
    """Returns the per-row coefficients of dlogits, [N, 1] each."""
    tau = operands.temperature(config)
    scale = inverse(tau, fields.log_sum.dtype)
    log_sum, label, mean, expected = cotangents
    p, kept = log_sum, None
    if expected is not None:
        share = expected * (1 - fields.expected)
        p = share if p is None else p + share
    if mean is not None:
        kept = mean / _number_kept(config, operands)
    return _Coefficients(
        *(None if a is None else a[:, None] * scale for a in (p, label, kept, expected))
    )


def _number_kept(config: Config, operands: Operands) -> jax.Array | int:
    """Returns how many classes count, at least 1."""
    kept = jnp.ones(operands.num_classes(config), jnp.bool_)
    if operands.class_mask is not None:
        kept = kept & operands.class_mask
    if operands.bias is not None:
        kept = kept & (operands.bias != -jnp.inf)
    return jnp.maximum(jnp.sum(kept), 1).astype(
        compute_dtype(operands.hidden, operands.kernel)
    )


def _backward_classes(config, operands, fields, coefficients, tiles, index, sums):
    """Adds the tile `index` of classes, of every block of rows, to the gradients."""
    dhidden, dkernel, dbias, moments = sums
    size, axis = tiles.block_classes, config.class_axis
    first = index * size
    start = jnp.minimum(first, tiles.classes - size)
    dtype = fields.log_sum.dtype
    features = operands.hidden.shape[1]
    shape = (features, size) if axis == 1 else (size, features)
    kernel_tile = jnp.zeros(shape, dtype) if dkernel is not None else None
    bias_tile = jnp.zeros(size, dtype) if dbias is not None else None

    def rows_step(block, carry):
        dhidden, kernel_tile, bias_tile, moments = carry
        row = block * tiles.block_rows
        row_start = jnp.minimum(row, tiles.rows - tiles.block_rows)
        part, part_fields, part_coefficients = (operands, fields, coefficients)
        if tiles.row_blocks > 1:
            part = _slice_rows(operands, row_start, tiles.block_rows)
            part_fields, part_coefficients = jax.tree.map(
                lambda a: _slice(a, row_start, tiles.block_rows),
                (fields, coefficients),
            )
        fresh_rows = None
        if tiles.rows_overlap:
            fresh_rows = row_start + lax.iota(jnp.int32, tiles.block_rows) >= row
        tile = _tile(config, part, tiles, index)
        d, part_moments = _dlogits(
            config, part, part_fields, part_coefficients, tile, moments is not None
        )
        if fresh_rows is not None:
            d = jnp.where(fresh_rows[:, None], d, 0)
        if bias_tile is not None:
            bias_tile = bias_tile + jnp.sum(d, axis=0)
        d = d.astype(operands.matmul_dtype())
        if dhidden is not None:
            new = _dot(d, tile.kernel, (1, axis), config, dtype)
            dhidden = _add_rows(dhidden, new, row_start, tiles)
        if kernel_tile is not None:
            hidden = part.hidden.astype(operands.matmul_dtype())
            pair = (hidden, d) if axis == 1 else (d, hidden)
            new = _dot(*pair, (0, 0), config, dtype)
            kernel_tile = new if tiles.row_blocks == 1 else kernel_tile + new
        if moments is not None:
            if fresh_rows is not None:
                part_moments = jnp.where(fresh_rows[:, None], part_moments, 0)
            moments = _add_rows(moments, part_moments, row_start, tiles)
        return dhidden, kernel_tile, bias_tile, moments

    carry = (dhidden, kernel_tile, bias_tile, moments)
    if tiles.row_blocks == 1:
        carry = rows_step(0, carry)
    else:
        carry = lax.fori_loop(
            0, tiles.row_blocks, rows_step, _vary_like(carry, operands)
        )
    dhidden, kernel_tile, bias_tile, moments = carry
    fresh = start + lax.iota(jnp.int32, size) >= first
    if dkernel is not None:
        dkernel = _write(dkernel, kernel_tile, start, axis, fresh, tiles)
    if dbias is not None:
        dbias = _write(dbias, bias_tile, start, 0, fresh, tiles)
    return dhidden, dkernel, dbias, moments


def _add_rows(total: jax.Array, new: jax.Array, start, tiles: tiling.Tiling):
    """Adds a block of rows to a sum over tiles."""
    if tiles.row_blocks == 1:
        return total + new
    old = lax.dynamic_slice_in_dim(total, start, new.shape[0])
    return lax.dynamic_update_slice_in_dim(total, old + new, start, 0)


def _write(total, tile, start, axis: int, fresh, tiles: tiling.Tiling):
    """Writes a tile of classes, except where it covers classes again."""
    tile = tile.astype(total.dtype)
    if tiles.classes_overlap:
        old = lax.dynamic_slice_in_dim(total, start, tile.shape[axis], axis)
        shape = [1] * tile.ndim
        shape[axis] = tile.shape[axis]
        tile = jnp.where(fresh.reshape(shape), tile, old)
    return lax.dynamic_update_slice_in_dim(total, tile, start, axis)


def _dlogits(config, operands, fields, coefficients, tile: _Tile, moments: bool):
    """Returns the derivative by the logits before the cap, and Σ p c and Σ p c²."""
    tau = operands.temperature(config)
    peak = jnp.where(fields.max == -jnp.inf, 0, fields.max)[:, None]
    u = tile.logits
    c = divide_by_temperature(u, peak, tau)
    p = jnp.exp(c - fields.log_sum[:, None])
    d = jnp.zeros_like(u)
    if coefficients.p is not None:
        d = p * coefficients.p
    if coefficients.pc is not None:
        d = d + jnp.where(p == 0, 0, p * c) * coefficients.pc
    if coefficients.label is not None:
        picked = tile.is_label
        if tile.masked:
            picked = picked & (u != -jnp.inf)
        d = d + jnp.where(picked, coefficients.label, 0)
    if coefficients.kept is not None:
        kept = coefficients.kept
        d = d + (jnp.where(u == -jnp.inf, 0, kept) if tile.masked else kept)
    if config.softcap is not None:
        slope = 1 - (u / config.softcap) ** 2
        d = jnp.where(u == -jnp.inf, 0, d * slope) if tile.masked else d * slope
    if not moments:
        return d, None
    pc = jnp.where(p == 0, 0, p * c)
    pcc = jnp.where(p == 0, 0, pc * c)
    return d, jnp.stack([pc.sum(axis=1), pcc.sum(axis=1)], axis=1)


def _tau_cotangent(config, operands, fields, cotangents, moments) -> jax.Array:
    """Returns the cotangent of the temperature, [N]."""
    scale = inverse(operands.temperature(config), moments.dtype)[:, 0]
    log_sum, label, mean, expected = cotangents
    first, second = moments[:, 0], moments[:, 1]
    total = jnp.zeros_like(first)
    if log_sum is not None:
        total += log_sum * first
    if label is not None:
        total += label * _finite(fields.label)
    if mean is not None:
        total += mean * _finite(fields.mean)
    if expected is not None:
        total += expected * (second - first * first + first)
    return -total * scale


def _finite(values: jax.Array) -> jax.Array:
    bound = jnp.finfo(values.dtype).max
    return jnp.clip(values, -bound, bound)
