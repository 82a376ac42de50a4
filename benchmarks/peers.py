"""What else a user of JAX would reach for, called as its documentation says.

A peer that is not installed, or that lacks what a case asks for, is reported with
that reason and never left out in silence.
"""

import dataclasses
import functools
import importlib
import operator
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxsoft
from benchmarks import passes, timing, torch_peer
from benchmarks.workloads import MIB, Layout, LinearCase, LinearWorkload
from jaxsoft._core import defaults, registry
from jaxsoft._core.registry import Implementation

OURS = "jaxsoft"
_OF_PLATFORM: dict[str, Implementation] = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
# PyTorch's packages that need a GPU: what is imported, called, and the reductions.
_OF_TORCH: dict[str, tuple[str, torch_peer.Loss, tuple[str, ...]]] = {
    "liger": ("liger_kernel.transformers", torch_peer.liger_loss, ("mean",)),
    "cce": ("cut_cross_entropy", torch_peer.cce_loss, ("mean", "none")),
    "quack": ("quack.linear_cross_entropy", torch_peer.quack_loss, ("mean",)),
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute what a case asks for.

    Attributes:
      name: whose it is.
      function: what to call, which JAX compiles; None where there is none.
      program: makes a program of the case's arguments, gradients included, where JAX
        does not compile it.
      absent: why it cannot take part; empty where it can.
      gradient_matmuls: how many passes over the logits its value and gradient take,
        the recomputation of logits that were not stored included.
      ours: whether a fault of it is jaxsoft's, under whatever name.
      observe: picks its checked outputs, where those of the case's contenders differ.
    """

    name: str
    function: Callable[..., Any] | None = None
    program: Callable[[tuple[Any, ...]], timing.Program] | None = None
    absent: str = ""
    gradient_matmuls: float = passes.STORED
    ours: bool = False
    observe: Callable[[Any], Mapping[str, Any]] | None = None


def implementations() -> dict[str, Implementation | None]:
    """Ours by name: the default, then each that it is not, of those that could run."""
    found: dict[str, Implementation | None] = {OURS: None}
    if defaults.on_chip() and defaults.allowed():
        # Elsewhere no pass of the default is that of a kernel.
        found[f"{OURS} xla"] = "xla"
    kernel = _OF_PLATFORM.get(jax.default_backend())
    if kernel in registry.implementations("linear_cross_entropy"):
        found[f"{OURS} {kernel}"] = kernel
    return found


def by_implementation(
    ours: Callable[[Implementation | None], Callable[..., Any]],
    *,
    xla: bool = True,
    gradient_matmuls: Callable[[Implementation | None], float] | None = None,
) -> list[Contender]:
    """Ours by every implementation that the platform has.

    Args:
      ours: makes the function of an implementation.
      xla: whether "xla" takes part beside a default that has passes of kernels.
      gradient_matmuls: gives that field of an implementation's contender.
    """
    return [
        Contender(
            name,
            ours(implementation),
            gradient_matmuls=(
                gradient_matmuls(implementation) if gradient_matmuls else passes.STORED
            ),
            ours=True,
        )
        for name, implementation in implementations().items()
        if xla or implementation != "xla"
    ]


def with_workspace(workspace: int) -> str:
    """Returns the name of ours where it is given so many bytes."""
    return f"{OURS}, {workspace / MIB:.4g} MiB"


def linear_contenders(case: LinearCase, workload: LinearWorkload) -> list[Contender]:
    """Everyone's linear cross-entropy, as `f(hidden, kernel, labels, temperature)`.

    Args:
      case: what it must compute; `temperature` is None where the case has none.
      workload: the shape, by which ours makes its plan.

    Returns:
      Ours, by every workspace, then stored logits, then the packages of the field.
    """

    def ours(workspace: int | None) -> Contender:
        def loss(hidden: Any, kernel: Any, labels: Any, temperature: Any) -> jax.Array:
            return jaxsoft.linear_cross_entropy(
                hidden,
                kernel,
                labels,
                temperature=1.0 if temperature is None else temperature,
                reduction=case.reduction,
                kernel_layout=case.layout,
                workspace_bytes=workspace,
            )

        reduced = case.reduction != "none"
        return Contender(
            OURS if workspace is None else with_workspace(workspace),
            loss,
            gradient_matmuls=passes.cross_entropy(
                workload, workspace=workspace, reduced=reduced
            ),
            ours=True,
        )

    def stored(hidden: Any, kernel: Any, labels: Any, temperature: Any) -> jax.Array:
        logits = hidden @ (kernel if case.layout == "hv" else kernel.T)
        if temperature is not None:
            logits = logits / temperature.astype(logits.dtype)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean() if case.reduction == "mean" else losses

    return [
        *(ours(workspace) for workspace in (None, *case.workspaces)),
        Contender("optax", stored),
        _jax_cce(case),
        _tokamax(case),
        *torch_contenders(case),
    ]


def _jax_cce(case: LinearCase) -> Contender:
    module, absent = _package("jax-cce", "linear_cross_entropy", case, ("vh",))
    if module is None:
        return Contender("jax-cce", absent=absent)

    def loss(hidden: Any, kernel: Any, labels: Any, temperature: Any) -> jax.Array:
        del temperature
        return module.linear_cross_entropy(hidden, kernel, labels)

    return Contender("jax-cce", loss, gradient_matmuls=4)


def _tokamax(case: LinearCase) -> Contender:
    name = "linear_softmax_cross_entropy_loss"
    module, absent = _package("tokamax", name, case, ("hv",))
    if module is None:
        return Contender("tokamax", absent=absent)
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():  # Or it would read this command's own arguments.
        flags(["benchmarks"])

    def loss(hidden: Any, kernel: Any, labels: Any, temperature: Any) -> jax.Array:
        del temperature
        return module.linear_softmax_cross_entropy_loss(
            hidden, labels, kernel, reduction="mean"
        )

    return Contender("tokamax", loss)


def torch_contenders(case: LinearCase) -> list[Contender]:
    """PyTorch's own linear cross-entropy, and those of its packages."""
    found = [_torch(case)]
    for name, (package, loss, reductions) in _OF_TORCH.items():
        torch, absent = import_package("torch")
        if torch is None:
            absent = f"needs torch: {absent}"
        elif jax.default_backend() != "gpu":
            absent = "takes part on a GPU only"
        else:
            absent = torch_peer.absent(torch) or import_package(package)[1]
        absent = absent or _lacks(case, ("vh",), reductions)
        if torch is None or absent:
            found.append(Contender(name, absent=absent))
            continue
        program = functools.partial(
            torch_peer.program, torch, case, name=name, loss=loss
        )
        found.append(Contender(name, program=program, gradient_matmuls=4))
    return found


def _torch(case: LinearCase) -> Contender:
    name = "nn.functional.linear_cross_entropy"
    module, absent = _package("torch", name, case, reductions=("mean", "none"))
    if module is not None:
        absent = torch_peer.absent(module)
    if module is None or absent:
        return Contender("torch", absent=absent)
    # Gradients of the mean are made with the value; those per token, from logits that
    # are computed again.
    return Contender(
        "torch",
        program=functools.partial(torch_peer.program, module, case),
        gradient_matmuls=3 if case.reduction == "mean" else 4,
    )


def _package(
    name: str,
    function: str,
    case: LinearCase,
    layouts: tuple[Layout, ...] = ("hv", "vh"),
    reductions: tuple[str, ...] = ("mean",),
) -> tuple[ModuleType | None, str]:
    """Imports a package that can do what a case asks for.

    Args:
      name: of the package.
      function: its linear cross-entropy, by its dotted name in the package.
      case: what is asked.
      layouts: of the kernel, that the function takes.
      reductions: that it has.

    Returns:
      The package, or None and the reason why it cannot take part.
    """
    module, absent = import_package(name.replace("-", "_"))
    if module is None:
        return None, absent
    absent = _lacks(case, layouts, reductions)
    if not absent:
        try:
            operator.attrgetter(function)(module)
        except AttributeError:
            absent = "this release has no linear cross-entropy"
    return (None, absent) if absent else (module, "")


def _lacks(
    case: LinearCase, layouts: tuple[Layout, ...], reductions: tuple[str, ...]
) -> str:
    """What a case asks for that a package lacks; empty where it has everything."""
    if case.layout not in layouts:
        shape = {"hv": "an [H, V]", "vh": "a [V, H]"}[layouts[0]]
        return f"takes {shape} kernel only"
    if case.reduction not in reductions:
        return "has no loss per token"
    return "has no temperature" if case.temperature else ""


def import_package(name: str) -> tuple[ModuleType | None, str]:
    """Imports a package that may be missing, or broken on this machine.

    Args:
      name: of the package.

    Returns:
      The package, or None and why there is none.
    """
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name in (name, name.partition(".")[0]):
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


def softmax_implementations(without: frozenset[str]) -> list[Contender]:
    """Ours by every implementation, as `softmax_contenders` calls it.

    Args:
      without: names of those that were found faulty.
    """

    def ours(implementation: Implementation | None) -> Callable[..., jax.Array]:
        return lambda x, y, t: jaxsoft.softmax(
            x, temperature=t, implementation=implementation
        )

    return [
        Contender(name, ours(implementation), ours=True)
        for name, implementation in implementations().items()
        if name not in without
    ]


def softmax_of_torch(
    temperature: float, *, value: bool, gradient: bool
) -> list[Contender]:
    """PyTorch's softmax and QuACK's, which has no temperature: it divides first."""

    def program(
        torch: ModuleType, name: str, softmax: Callable[[Any], Any]
    ) -> Contender:
        return Contender(
            name,
            program=lambda arguments: torch_peer.softmax_program(
                torch,
                softmax,
                arguments,
                name,
                temperature,
                value=value,
                gradient=gradient,
            ),
        )

    torch, absent = import_package("torch")
    if torch is not None and (absent := torch_peer.absent(torch)):
        torch = None
    if torch is None:
        return [Contender(name, absent=absent) for name in ("torch", "quack")]
    found = [program(torch, "torch", functools.partial(torch.softmax, dim=-1))]
    quack, absent = import_package("quack.softmax")
    if quack is None:
        return [*found, Contender("quack", absent=absent)]
    return [*found, program(torch, "quack", quack.softmax)]


_OUR_SOFTMAX: dict[str, Callable[..., jax.Array]] = {
    "softmax": lambda x, y, t: jaxsoft.softmax(x, temperature=t),
    "log_softmax": lambda x, y, t: jaxsoft.log_softmax(x, temperature=t),
    "cross_entropy": lambda x, y, t: jaxsoft.softmax_cross_entropy(x, y, t),
}

_PLAIN_SOFTMAX: dict[str, Callable[..., jax.Array]] = {
    "softmax": lambda x, y, t: jax.nn.softmax(x / jnp.asarray(t, x.dtype)),
    "log_softmax": lambda x, y, t: jax.nn.log_softmax(x / jnp.asarray(t, x.dtype)),
    "cross_entropy": lambda x, y, t: optax.softmax_cross_entropy_with_integer_labels(
        x / t, y
    ),
}
