"""What the implementations of the linear room take and return.

Shapes: N rows, H features, V classes. All leading axes of the public arguments are
folded into N before they come here, and a temperature that is not a Python float is
one number a row.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft.dtypes import operand_dtype

__all__ = ["Config", "Fields", "KernelLayout", "Operands"]

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
      implementation: "reference" or "xla".
    """

    kernel_layout: KernelLayout
    static_tau: float | None
    softcap: float | None
    precision: Any
    tile_bytes: int
    mean: bool
    expected: bool
    argmax: bool
    implementation: str

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
      labels: [N] integers, or None. -1 in a row without a valid label.
      class_mask: [V] booleans, True keeps, or None.
    """

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    tau: jax.Array | None
    labels: jax.Array | None
    class_mask: jax.Array | None

    def num_classes(self, config: Config) -> int:
        """V."""
        return self.kernel.shape[config.class_axis]

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
    """The centred statistics of each row, [N] each; None where not wanted.

    With u the logits, m their maximum, τ the temperature and c = (u - m) / τ:

    Attributes:
      max: m; -inf in a row without any kept class. No gradient flows through it.
      log_sum: ℓ = log Σ exp(c); 0 in a row without any kept class.
      label: the centred logit of the label.
      mean: the mean of c over kept classes.
      expected: Σ p c.
      argmax: int32, the lowest class that reaches m.
    """

    max: jax.Array
    log_sum: jax.Array
    label: jax.Array | None
    mean: jax.Array | None
    expected: jax.Array | None
    argmax: jax.Array | None
