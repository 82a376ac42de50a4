"""Low-rank additions to a layer's logits, one for all tokens or one of several each."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core import checks
from jaxsoft._core.numerics import operand_dtype

__all__ = ["LoRA", "adapted"]


class LoRA(NamedTuple):
    """A low-rank addition `(hidden @ a) @ b` to a layer's logits; a pytree.

    Of several adapters each token takes the one of its id. A factor such as alpha / r
    is the caller's, who may multiply `a` with it.

    Attributes:
      a: [H, r] floating, or [A, H, r] of A adapters.
      b: [r, V] or [A, r, V] floating, whatever the layout of the kernel.
      ids: [...] integers, the adapter of each token; any outside [0, A) is none. None
        with one adapter, which all tokens then take.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import LoRA, linear_top_k
      >>> hidden, kernel = jnp.ones((2, 1)), jnp.array([[2.0, 1.0, 0.0]])
      >>> a, b = jnp.ones((1, 1, 1)), jnp.array([[[0.0, 0.0, 9.0]]])
      >>> lora = LoRA(a, b, ids=jnp.array([0, -1]))
      >>> print(linear_top_k(hidden, kernel, 1, lora=lora)[1][:, 0])
      [2 0]

    References:
      Hu et al., LoRA, arXiv:2106.09685; Chen et al., Punica, arXiv:2310.18547 (several
      adapters in a batch).
    """

    a: ArrayLike
    b: ArrayLike
    ids: ArrayLike | None = None


def adapted(
    hidden: jax.Array,
    lora: LoRA,
    classes: int,
    dtype: DTypeLike,
    precision: jax.lax.PrecisionLike,
    prefix: str = "",
) -> tuple[jax.Array, jax.Array]:
    """Returns the states that adapters make, and what those are multiplied by.

    Args:
      hidden: [..., H] floating.
      lora: the adapters.
      classes: V, of this shard.
      dtype: of the statistics.
      precision: of the matrix product.
      prefix: what the names of arguments start with.

    Returns:
      [..., Q] and [Q, V], of which Q columns are those of one adapter after another; a
      token's states are 0 for all adapters but its own.
    """
    if not isinstance(lora, LoRA):
        kind = type(lora).__name__
        raise TypeError(f"`{prefix}lora` must be a jaxsoft.LoRA, got {kind}.")
    a, b = (
        checks.floating(f"{prefix}lora.{name}", array)
        for name, array in (("a", lora.a), ("b", lora.b))
    )
    one = lora.ids is None
    legend = "[H, r]" if one else "[A, H, r]"
    if a.ndim != 3 - one or a.shape[-2] != hidden.shape[-1]:
        raise ValueError(
            f"`{prefix}lora.a` must have shape {legend} with H = {hidden.shape[-1]}, "
            f"got {a.shape}. Several adapters need `ids`."
        )
    shape = (*a.shape[:-2], a.shape[-1], classes)
    legend = "[r, V]" if one else "[A, r, V]"
    checks.shape(f"{prefix}lora.b", b, shape, legend)
    narrow = dtype == jnp.float32
    a, b = (x.astype(dtype) if narrow and x.dtype == jnp.float64 else x for x in (a, b))
    wide = operand_dtype(hidden, a)
    columns = a if one else jnp.moveaxis(a, 0, 1).reshape(hidden.shape[-1], -1)
    states = lax.dot_general(
        hidden.astype(wide),
        columns.astype(wide),
        (((hidden.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
    )
    if lora.ids is not None:
        ids = checks.integer(f"{prefix}lora.ids", lora.ids)
        legend = f"{prefix}hidden.shape[:-1]"
        checks.shape(f"{prefix}lora.ids", ids, hidden.shape[:-1], legend)
        count, rank = a.shape[0], a.shape[2]
        owner = jnp.repeat(jnp.arange(count, dtype=ids.dtype), rank)
        own = ids[..., None] == jnp.expand_dims(owner, range(ids.ndim))
        states = jnp.where(own, states, 0)
        b = b.reshape(count * rank, classes)
    return states.astype(operand_dtype(hidden, b)), b
