"""What else a user of JAX would reach for, called as its documentation says.

A peer that is not installed, or that lacks what a case asks for, is reported with
that reason and never left out in silence.
"""

import dataclasses
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import jaxsoft
from benchmarks.workloads import Layout

OURS = "jaxsoft"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute what a case asks for.

    Attributes:
      name: whose it is.
      function: what to call; None where it cannot take part.
      absent: why it cannot take part.
      gradient_matmuls: how many passes over the logits its value and gradient take,
        the recomputation of logits that were not stored included.
    """

    name: str
    function: Callable[..., Any] | None = None
    absent: str = ""
    gradient_matmuls: int = 3


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """What is asked of a linear cross-entropy.

    Attributes:
      layout: of the kernel, `"hv"` or `"vh"`.
      reduction: `"mean"` or `"none"`.
      temperature: whether logits are divided by a traced scalar.
      gradient: whether the gradients of hidden and kernel are wanted too.
    """

    layout: Layout = "hv"
    reduction: Literal["mean", "none"] = "mean"
    temperature: bool = False
    gradient: bool = False

    @property
    def title(self) -> str:
        """The case in words."""
        shape = "[H, V]" if self.layout == "hv" else "[V, H]"
        temperature = ", temperature" if self.temperature else ""
        wanted = "value and gradient" if self.gradient else "value"
        return f"{self.reduction}, {shape}{temperature}: {wanted}"


def linear_contenders(case: LinearCase) -> list[Contender]:
    """Everyone's linear cross-entropy, as `f(hidden, kernel, labels, temperature)`.

    Args:
      case: what it must compute; `temperature` is None where the case has none.

    Returns:
      Ours, then stored logits, then the packages of the field.
    """

    def ours(hidden: Any, kernel: Any, labels: Any, temperature: Any) -> jax.Array:
        return jaxsoft.linear_cross_entropy(
            hidden,
            kernel,
            labels,
            temperature=1.0 if temperature is None else temperature,
            reduction=case.reduction,
            kernel_layout=case.layout,
        )

    def stored(hidden: Any, kernel: Any, labels: Any, temperature: Any) -> jax.Array:
        logits = hidden @ (kernel if case.layout == "hv" else kernel.T)
        if temperature is not None:
            logits = logits / temperature.astype(logits.dtype)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean() if case.reduction == "mean" else losses

    return [
        Contender(OURS, ours, gradient_matmuls=4),
        Contender("optax", stored),
        _jax_cce(case),
        _tokamax(case),
    ]


def _jax_cce(case: LinearCase) -> Contender:
    name = "jax-cce"
    module, absent = _import("jax_cce")
    if module is None:
        return Contender(name, absent=absent)
    absent = _mean_only(case)
    if case.layout != "vh":
        absent = "takes a [V, H] kernel only"
    if absent:
        return Contender(name, absent=absent)

    def loss(hidden: Any, kernel: Any, labels: Any, temperature: Any) -> jax.Array:
        del temperature
        return module.linear_cross_entropy(hidden, kernel, labels)

    return Contender(name, loss, gradient_matmuls=4)


def _tokamax(case: LinearCase) -> Contender:
    name = "tokamax"
    module, absent = _import("tokamax")
    if module is None:
        return Contender(name, absent=absent)
    absent = _mean_only(case)
    if case.layout != "hv":
        absent = "takes an [H, V] kernel only"
    if not hasattr(module, "linear_softmax_cross_entropy_loss"):
        absent = "this release has no linear cross-entropy"
    if absent:
        return Contender(name, absent=absent)
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():  # Or it would read this command's own arguments.
        flags(["benchmarks"])

    def loss(hidden: Any, kernel: Any, labels: Any, temperature: Any) -> jax.Array:
        del temperature
        return module.linear_softmax_cross_entropy_loss(
            hidden, labels, kernel, reduction="mean"
        )

    return Contender(name, loss)


def _mean_only(case: LinearCase) -> str:
    if case.reduction != "mean":
        return "has no loss per token"
    if case.temperature:
        return "has no temperature"
    return ""


def _import(name: str) -> tuple[ModuleType | None, str]:
    """Imports a package that may be missing, or broken on this machine."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, "not installed"
        return None, f"does not import: {error}"
    except Exception as error:  # What a peer does at import is its own affair.
        return None, f"does not import: {type(error).__name__}: {error}"


def softmax_contenders(operation: str) -> list[Contender]:
    """Ours and the plain formula, as `f(logits, labels, temperature)`.

    Args:
      operation: `"softmax"`, `"log_softmax"` or `"cross_entropy"`.

    Returns:
      Ours, then what JAX or Optax has.
    """
    plain = "optax" if operation == "cross_entropy" else "jax.nn"
    return [
        Contender(OURS, _OUR_SOFTMAX[operation]),
        Contender(plain, _PLAIN_SOFTMAX[operation]),
    ]


_OUR_SOFTMAX: dict[str, Callable[..., jax.Array]] = {
    "softmax": lambda x, y, t: jaxsoft.softmax(x, t),
    "log_softmax": lambda x, y, t: jaxsoft.log_softmax(x, t),
    "cross_entropy": lambda x, y, t: jaxsoft.softmax_cross_entropy(x, y, t),
}

_PLAIN_SOFTMAX: dict[str, Callable[..., jax.Array]] = {
    "softmax": lambda x, y, t: jax.nn.softmax(x / jnp.asarray(t, x.dtype)),
    "log_softmax": lambda x, y, t: jax.nn.log_softmax(x / jnp.asarray(t, x.dtype)),
    "cross_entropy": lambda x, y, t: optax.softmax_cross_entropy_with_integer_labels(
        x / t, y
    ),
}
