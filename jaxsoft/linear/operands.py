"""What the implementations of the linear room take and return.

Shapes: N rows, H features, V classes, K class ids a row. All leading axes of the public
arguments are folded into N before they come here, and a temperature that is not a
Python float is one number a row.

Roles: a string per array names what each axis runs over, one letter an axis: "n" rows,
"v" classes, anything else neither. vmap folds into "n"; devices share "n" and "v".
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft._core.dtypes import operand_dtype

__all__ = ["Config", "Fields", "KernelLayout", "Operands", "roles_like"]

KernelLayout = Literal["hv", "vh"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything about a call that is known when it is traced.

    Attributes:
      kernel_layout: "hv" for a kernel [H, V], "vh" for [V, H].
      static_tau: the temperature, if it is a Python float; else None.
      softcap: the logit soft-cap, or None.
      precision: the precision of the matrix products, as in `jnp.matmul`.
      tile_bytes: the most bytes that one tile of float32 logits may take.
      mean: whether the mean centred logit is wanted.
      expected: whether the expected centred logit is wanted.
      argmax: whether the argmax is wanted.
      rest: whether the sum over classes that are no labels is wanted.
      implementation: its name, such as "xla".
      vocab_axes: the mesh axes that the classes are sharded over; () for none.
      total_classes: V where the last shards have masked padding; else None.
    """

    kernel_layout: KernelLayout
    static_tau: float | None
    softcap: float | None
    precision: Any
    tile_bytes: int
    mean: bool
    expected: bool
    argmax: bool
    rest: bool
    implementation: str
    vocab_axes: tuple[str, ...] = ()
    total_classes: int | None = None

    def over(self, vocab_axes: tuple[str, ...]) -> "Config":
        """Returns the same configuration with its classes sharded over mesh axes."""
        return dataclasses.replace(self, vocab_axes=vocab_axes)

    @property
    def class_axis(self) -> int:
        """The axis of the kernel that runs over classes."""
        return 1 if self.kernel_layout == "hv" else 0


class Operands(NamedTuple):
    """The arrays of a call.

    Attributes:
      hidden: [N, H] floating.
      kernel: [H, V] or [V, H] floating.
      bias: [V] floating, or None.
      tau: [N] in the dtype of the statistics, or None if it is static.
      labels: [N, K] int32 classes whose logits are wanted, or None. -1 for none.
      class_mask: [V] booleans, True keeps, or None.
      excluded: [N, K] int32 classes that a row drops, or None. -1 for none.
    """

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    tau: jax.Array | None
    labels: jax.Array | None
    class_mask: jax.Array | None
    excluded: jax.Array | None = None

    def num_classes(self, config: Config) -> int:
        """V."""
        return self.kernel.shape[config.class_axis]

    def roles(self, config: Config) -> Any:
        """The roles of the arrays' axes; see the module."""
        return roles_like(self, ("nh", config.kernel_layout, "v", "n", "nk", "v", "ne"))

    def matmul_dtype(self) -> jnp.dtype:
        """The dtype of the operands of the matrix products."""
        return operand_dtype(self.hidden, self.kernel)

    def temperature(self, config: Config) -> float | jax.Array:
        """The temperature as a float or as [N, 1]."""
        if self.tau is None:
            assert config.static_tau is not None
            return config.static_tau
        return self.tau[:, None]


class Fields(NamedTuple):
    """The centred statistics of each row; None where not wanted. All but label are [N].

    With u the logits, m their maximum, τ the temperature and c = (u - m) / τ:

    Attributes:
      max: m; -inf in a row without any kept class. No gradient flows through it.
      log_sum: ℓ = log Σ exp(c); 0 in a row without any kept class.
      label: the centred logits of the labels, [N, K].
      mean: the mean of c over kept classes.
      expected: Σ p c.
      argmax: int32, the lowest class that reaches m.
      rest: log Σ exp(c) over the classes that are no labels of the row.
    """

    max: jax.Array
    log_sum: jax.Array
    label: jax.Array | None
    mean: jax.Array | None
    expected: jax.Array | None
    argmax: jax.Array | None
    rest: jax.Array | None = None


def roles_like(tree: Any, roles: Any) -> Any:
    """Returns `roles` with None wherever `tree`, of the same type, has None."""
    pairs = zip(tree, roles, strict=True)
    return type(tree)._make(None if a is None else role for a, role in pairs)
