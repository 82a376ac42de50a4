"""Classes drawn from a softmax layer, without the logits."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, noise
from jaxsoft._core.numerics import compute_dtype
from jaxsoft._core.registry import Implementation
from jaxsoft.linear.arguments import (
    Call,
    KernelLayout,
    MeshAxes,
    Operands,
    fold_rows,
    prepare,
)
from jaxsoft.linear.fold import stream
from jaxsoft.linear.folds.draw import Draw, Drawing, Drawn
from jaxsoft.linear.folds.filtered import FilteredDraw, Filtering
from jaxsoft.linear.lora import LoRA
from jaxsoft.logits.filters import Filters
from jaxsoft.logits.sampling import SampledClasses, check_filter, most_of

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
    top_k: ArrayLike | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
    top_n_sigma: ArrayLike | None = None,
    return_log_prob: bool = False,
    kernel_layout: KernelLayout = "hv",
    precision: jax.lax.PrecisionLike = None,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
) -> Any:
    """Draws one class for each token from the softmax of a layer's logits.

    Exact: a block of classes is drawn by the Gumbel-max rule over the logarithms of
    the blocks' sums, then a class inside it by inversion. The logits are computed
    once, tile by tile, and some √V random numbers are drawn for a token; their sums
    give the log-probabilities, too.

    Filters act one after another, in the order `top_n_sigma`, temperature, `top_k`,
    `top_p`, `min_p`: the logits of as many tokens as the workspace has room for are
    stored at a time, and drawn from as `sample(key, hidden @ kernel, …)` does with the
    same filters.

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
      top_k: an integer >= 0: the k first classes by descending logit stay, equal ones
        by ascending id; 0 keeps all. Like the other filters a scalar, or one number a
        token as `temperature`.
      top_p: p in [0, 1]: a class stays if the probability of those before it is less
        than p, renormalised to the classes that `top_k` left; 1 keeps all.
      min_p: in [0, 1]: a class stays if its probability is at least this share of the
        largest; 0 keeps all.
      top_n_sigma: n in [0, ∞]: a class stays if its logit is at least the largest minus
        n standard deviations of the token's logits, those of kept classes with -inf
        left out, whatever the temperature; ∞ keeps all.
      return_log_prob: whether to return the log-probabilities of the classes as well.
      kernel_layout: "hv" or "vh".
      precision: the precision of the matrix products, as in `jnp.matmul`.
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes; see
        `linear_statistics`.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens, which number
        the rows: without them every shard would draw with the same bits.
      workspace_bytes: the temporary memory that the call may take; see
        `linear_statistics`. With filters None is 256 MiB, and the logits of 8 tokens
        are stored whatever it is.
      implementation: None, "xla", or "mosaic_gpu", not yet measured: a kernel for GPUs,
        as for `linear_statistics`, without sharded classes, filters and
        log-probabilities.

    Returns:
      [...] int32 in [0, V); -1 for a row without any kept class, or with a NaN. With
      `return_log_prob`, a `SampledClasses` of it, the log-probability under the
      temperature alone, and that after the filters, both -inf for such a row.

    Raises:
      TypeError: if a dtype is wrong, or a filter of a wrong type.
      ValueError: if a shape does not fit or an option is out of its range; with a
        traced filter out of its range the token gives -1.
      NotImplementedError: for implementations not available.

    Notes:
      The bits of a token depend on the key and the token's place alone, those of a
      block of classes on its number as well: a key draws the same classes for every
      tile size and sharding, but for ties within rounding. Where `top_k` is known, it
      draws others than with the same `top_k` traced, as in `sample`. Without a
      derivative; see `linear_expected` for one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import linear_sample
      >>> hidden, kernel = jnp.ones((2, 1)), jnp.array([[0.0, 9.0, 0.0]])
      >>> print(linear_sample(jax.random.key(0), hidden, kernel, temperature=0.5))
      [1 1]
      >>> drawn = linear_sample(
      ...     jax.random.key(0), hidden, 0 * kernel, top_k=2, return_log_prob=True
      ... )
      >>> print(f"{drawn.log_prob[0]:.4f} {drawn.filtered_log_prob[0]:.4f}")
      -1.0986 -0.6931

    References:
      Gumbel, Statistical Theory of Extreme Values, 1954; Maddison, Tarlow and Minka,
      A* Sampling, arXiv:1411.0030 (Gumbel-max over groups of classes). Those of the
      filters are in `sample`.
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
    chosen = _filters(
        call, top_k=top_k, top_p=top_p, min_p=min_p, top_n_sigma=top_n_sigma
    )
    has_filters = any(value is not None for value in chosen)
    if call.config.implementation != "xla" and (has_filters or return_log_prob):
        raise NotImplementedError(
            '`implementation` must be None or "xla" with filters or log-probabilities, '
            f'got "{call.config.implementation}".'
        )
    if has_filters:
        fold = FilteredDraw(call.config, most_of(top_k), return_log_prob)
    else:
        fold = Draw(call.config, return_log_prob)
    drawn = _sample(fold, rows_over, key, call.arrays, chosen)
    return SampledClasses(*drawn) if return_log_prob else drawn.class_id


def _filters(call: Call, **given: ArrayLike | None) -> Filters:
    """Returns filters as arrays of the shape of the rows, checked."""
    rows = call.arrays.hidden.shape[:-1]
    dtype = compute_dtype(call.arrays.hidden, call.arrays.kernel)

    def of_rows(name: str, value: ArrayLike | None) -> jax.Array | None:
        array = check_filter(name, value, dtype)
        if array is None:
            return None
        array = checks.row_numbers(name, lax.stop_gradient(array), rows)
        return jnp.broadcast_to(array, rows)

    return Filters(**{name: of_rows(name, value) for name, value in given.items()})


def _fixed(value: Any) -> Any:
    """Returns a value through which no gradient flows."""
    return lax.stop_gradient(value) if isinstance(value, jax.Array) else value


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _sample(
    fold: Draw | FilteredDraw,
    rows_over: tuple[str, ...],
    key: jax.Array,
    arrays: Operands,
    chosen: Filters,
) -> Drawn:
    """Folds leading axes into rows, draws, and unfolds."""
    shape = arrays.hidden.shape[:-1]
    count = math.prod(shape)
    if not count:
        dtype = compute_dtype(arrays.hidden, arrays.kernel)
        return Drawn(jnp.zeros(shape, jnp.int32), *[jnp.zeros(shape, dtype)] * 2)
    words = noise.row_words(key, count, mesh_axes.offset(rows_over, count))
    operands = fold_rows(fold.config, arrays)
    if isinstance(fold, Draw):
        drawn = stream(fold, Drawing(operands, words))
    else:
        chosen = jax.tree.map(lambda a: a.reshape(count), chosen)
        drawn = stream(fold, Filtering(operands, words, *chosen))
    return jax.tree.map(lambda a: a.reshape(shape), drawn)
