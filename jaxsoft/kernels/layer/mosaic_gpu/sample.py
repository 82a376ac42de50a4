"""Samples of `hidden @ kernel` by the kernels for NVIDIA GPUs.

The canonical draw of `block_sampling.py`, from the maximum and the sum of exponentials
that the kernel writes of every group of 32 classes: a block of classes, of which some
groups are the parts, then a group of it, and a class of the group, whose logits alone
are computed again. The layer's kernel is read once, and 32 of its columns a row once
more; 8 bytes a row and group are written, a sixteenth of float32 logits.

Not yet measured on any GPU, hence not the default.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft._core import block_sampling
from jaxsoft._core.numerics import (
    compute_dtype,
    divide_by_temperature,
    finite_peak,
    is_zero,
)
from jaxsoft.kernels.layer.mosaic_gpu import call
from jaxsoft.kernels.layer.mosaic_gpu.plan import GROUP
from jaxsoft.linear.arguments import Config, Operands
from jaxsoft.linear.folds.draw import Draw, Drawing, Drawn
from jaxsoft.linear.tiles import capped

__all__ = ["sample"]

# Rows whose 32 columns of the kernel are gathered at a time: some 32 MiB.
_ROWS = 128


def sample(fold: Draw, drawing: Drawing) -> Drawn:
    """Draws a class for each row.

    Args:
      fold: what is known of the layer at trace time.
      drawing: the arrays.

    Returns:
      The classes; -1 for a row without any kept class, or with a NaN.

    Raises:
      NotImplementedError: for what the kernels do not have.
      ImportError: without absl-py, which Pallas imports.
    """
    config, (operands, words) = fold.config, drawing
    if config.vocab_axes:
        raise NotImplementedError(
            '`implementation` must be None or "xla" with sharded classes for '
            'linear_sample, got "mosaic_gpu".'
        )
    tau = operands.temperature(config)
    tops, sums = _of_blocks(config, operands)
    of_block = jnp.max(tops, axis=2)
    of_row = tau[:, :, None] if isinstance(tau, jax.Array) else tau
    parts = sums * block_sampling.exponentials(tops, of_block[:, :, None], of_row)
    totals = jnp.sum(parts, axis=2)

    zero = is_zero(tau, totals.dtype)
    largest = jnp.max(of_block, axis=1, keepdims=True)
    peak = finite_peak(largest)
    noise, at = block_sampling.bits(words, totals.shape[1], zero, totals.dtype)
    scores = block_sampling.scores(totals, noise, zero)
    scores += divide_by_temperature(of_block, peak, tau)
    best = jnp.argmax(scores, axis=1, keepdims=True).astype(jnp.int32)
    score = jnp.max(scores, axis=1)

    def of_best(array):
        index = best.reshape(best.shape + (1,) * (array.ndim - 2))
        return jnp.take_along_axis(array, index, axis=1)[:, 0]

    target = at.share * of_best(totals)
    ordered = at.order(of_best(parts))
    found, before = block_sampling.invert_once(ordered, target)
    part = jnp.take_along_axis(ordered, found[:, None], axis=1)[:, 0]
    group = best[:, 0] * parts.shape[2] + at.column(found, parts.shape[2])
    u = _logits(config, operands, group)
    # These may be rounded otherwise than the kernel's: they have a centre of their own,
    # and the place is taken as a share of what they come to.
    weights = block_sampling.exponentials(u, jnp.max(u, axis=1, keepdims=True), tau)
    share = (target - before) / jnp.where(part > 0, part, 1)
    target = share * jnp.sum(weights, axis=1)
    found, _ = block_sampling.invert_once(at.order(weights), target)
    class_id = group * GROUP + at.column(found, GROUP)
    lost = jnp.isnan(largest[:, 0]) | jnp.isnan(score) | (score == -jnp.inf)
    return Drawn(jnp.where(lost, -1, class_id))


def _of_blocks(config: Config, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Returns the maxima and sums of groups, [N, blocks, groups of a block]."""
    classes = operands.num_classes(config)
    groups = block_sampling.block_size(classes) // GROUP
    tops, sums = call.groups(config, operands)
    missing = -tops.shape[1] % groups
    found = []
    for array, empty in ((tops, -jnp.inf), (sums, 0.0)):
        array = jnp.pad(array, ((0, 0), (0, missing)), constant_values=empty)
        found.append(array.reshape(array.shape[0], -1, groups))
    return found[0], found[1]


def _logits(config: Config, operands: Operands, group: jax.Array) -> jax.Array:
    """Returns the logits of one group of each row, [N, GROUP]; -inf beyond V."""
    classes = operands.num_classes(config)
    dtype = compute_dtype(operands.hidden, operands.kernel)

    def of_row(given):
        hidden, group = given
        ids = group * GROUP + lax.iota(jnp.int32, GROUP)
        inside = jnp.minimum(ids, classes - 1)
        kernel = jnp.take(operands.kernel, inside, axis=config.class_axis)
        u = jnp.matmul(
            hidden[None],
            kernel if config.class_axis == 1 else kernel.T,
            precision=config.precision,
            preferred_element_type=dtype,
        )
        bias = None
        if operands.bias is not None:
            bias = operands.bias[inside].astype(dtype)[None]
        u, _ = capped(u, bias, config.softcap)
        kept = ids < classes
        if operands.class_mask is not None:
            kept &= operands.class_mask[inside]
        return jnp.where(kept, u[0], -jnp.inf)

    return lax.map(of_row, (operands.hidden, group), batch_size=_ROWS)
