"""Classes drawn from a softmax layer, without the logits."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import mesh_axes, noise
from jaxsoft._core.registry import Implementation
from jaxsoft.linear.arguments import (
    KernelLayout,
    MeshAxes,
    Operands,
    fold_rows,
    prepare,
)
from jaxsoft.linear.fold import stream
from jaxsoft.linear.folds.draw import Draw, Drawing
from jaxsoft.linear.lora import LoRA

__all__ = ["linear_sample"]


@mesh_axes.accepts_explicit("hidden", kernel="kernel")
def linear_sample(
    key: jax.Array,
    hidden: ArrayLike,
    kernel: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    class_bits: ArrayLike | None = None,
    kernel_scale: ArrayLike | None = None,
    lora: LoRA | None = None,
    kernel_layout: KernelLayout = "hv",
    precision: jax.lax.PrecisionLike = None,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
    workspace_bytes: int | None = None,
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
      temperature: τ in [0, ∞], a scalar, [...] or [..., 1]. τ = 0 gives the lowest
        argmax.
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None for no cap.
      class_mask: [V] booleans; False drops a class. None keeps all.
      class_bits: [..., ceil(V / 32)] uint32 or int32, a mask of each token: bit v % 32
        of word v // 32 is 1 where class v is kept, of all shards' classes. None keeps
        all.
      kernel_scale: floating, for a kernel of int8, float8 or other short numbers, which
        it multiplies: a scalar, [V], or one for each block of the kernel, whose axes
        its own divide. No gradient flows to such a kernel. None for no scale.
      lora: a `LoRA`, whose `(hidden @ a) @ b` is added to the products; or None.
      kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes; see
        `linear_statistics`.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens, which number
        the rows: without them every shard would draw with the same bits.
      workspace_bytes: the temporary memory that the call may take; see
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
    rows_over = mesh_axes.check_token_axes(token_axes, vocab_axis)
    call = prepare(
        "linear_sample",
        *lax.stop_gradient((jnp.asarray(hidden), jnp.asarray(kernel))),
        bias=None if bias is None else lax.stop_gradient(jnp.asarray(bias)),
        temperature=_fixed(temperature),
        logit_softcap=logit_softcap,
        class_mask=class_mask,
        class_bits=class_bits,
        kernel_scale=_fixed(kernel_scale),
        lora=jax.tree.map(_fixed, lora),
        kernel_layout=kernel_layout,
        precision=precision,
        vocab_axis=vocab_axis,
        workspace_bytes=workspace_bytes,
        implementation=implementation,
    )
    return _sample(Draw(call.config), rows_over, key, call.arrays)


def _fixed(value: Any) -> Any:
    """Returns a value through which no gradient flows."""
    return lax.stop_gradient(value) if isinstance(value, jax.Array) else value


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _sample(
    fold: Draw, rows_over: tuple[str, ...], key: jax.Array, arrays: Operands
) -> jax.Array:
    """Folds leading axes into rows, draws, and unfolds."""
    shape = arrays.hidden.shape[:-1]
    count = math.prod(shape)
    if not count:
        return jnp.zeros(shape, jnp.int32)
    words = noise.row_words(key, count, mesh_axes.offset(rows_over, count))
    drawing = Drawing(fold_rows(fold.config, arrays), words)
    return stream(fold, drawing).class_id.reshape(shape)
