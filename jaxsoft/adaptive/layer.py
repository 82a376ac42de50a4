"""The layer that all functions of an adaptive softmax work on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import checks, mesh_axes, registry
from jaxsoft._core.exporting import Leaf, exportable_namedtuple
from jaxsoft._core.numerics import compute_dtype, matmul, operand_dtype
from jaxsoft._core.registry import Implementation
from jaxsoft.adaptive.class_bands import ClassBands
from jaxsoft.adaptive.row_blocks import take

__all__ = ["AdaptiveTail", "Layer", "Options", "TailLayer", "prepare"]


@exportable_namedtuple
class AdaptiveTail(NamedTuple):
    """Parameters of a tail of V_i classes and width D.

    Attributes:
      projection: [H, D] floating, of the hidden state; D is at least 1.
      kernel: [D, V_i] floating.
      bias: [V_i] floating, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import AdaptiveTail
      >>> tail = AdaptiveTail(jnp.ones((8, 2)), jnp.zeros((2, 100)))
      >>> print(tail.kernel.shape, tail.bias)
      (2, 100) None
    """

    projection: Leaf
    kernel: Leaf
    bias: Leaf | None = None


class Options(TypedDict):
    """Options that every `linear_*` function takes.

    Attributes:
      bias: of the classes, or None.
      temperature: a constant, or [N].
      precision: of matrix products.
      implementation: what the caller asked for.
    """

    bias: Leaf | None
    temperature: float | jax.Array
    precision: jax.lax.PrecisionLike
    implementation: Implementation | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "parameters", "row_tau"],
    meta_fields=["constant", "precision", "implementation", "shards"],
)
@dataclasses.dataclass(frozen=True)
class TailLayer:
    """Rows and the tail whose classes they are to choose from.

    Attributes:
      hidden: [N, H].
      parameters: of the tail.
      row_tau: [N], or None with a constant temperature.
      constant: the temperature where `row_tau` is None.
      precision: of matrix products.
      implementation: what the caller asked for.
      shards: how rows are sharded, where their types said so; else None.
    """

    hidden: jax.Array
    parameters: AdaptiveTail
    row_tau: jax.Array | None
    constant: float
    precision: jax.lax.PrecisionLike
    implementation: Implementation | None
    shards: mesh_axes.Shards | None

    @property
    def num_classes(self) -> int:
        """V_i."""
        return self.parameters.kernel.shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of log-probabilities."""
        return compute_dtype(self.hidden, self.parameters.kernel)

    def rows(self, rows: jax.Array) -> TailLayer:
        """Returns the layer of some rows, of zeros where there is none."""
        tau = self.row_tau
        if tau is not None:
            tau = tau.at[rows].get(mode="fill", fill_value=1)
        return dataclasses.replace(self, hidden=take(self.hidden, rows), row_tau=tau)

    def call(self) -> tuple[tuple[jax.Array, jax.Array], Options]:
        """Returns hidden states and kernel, and options, for `linear_*`."""
        projection = jnp.asarray(self.parameters.projection, self.hidden.dtype)
        projected = matmul(self.hidden, projection, self.precision, self.dtype)
        options = _options(self, self.parameters.bias)
        kernel = jnp.asarray(self.parameters.kernel)
        return (projected.astype(self.hidden.dtype), kernel), options


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "kernel", "bias", "tails", "row_tau"],
    meta_fields=["constant", "precision", "implementation", "shards", "shape"],
)
@dataclasses.dataclass(frozen=True)
class Layer:
    """A checked call, its rows folded.

    Attributes:
      hidden: [N, H].
      kernel: [H, S + T] of the head.
      bias: [S + T] of the head, or None.
      tails: T of them.
      row_tau: [N], or None with a constant temperature.
      constant: the temperature where `row_tau` is None.
      precision: of matrix products.
      implementation: what the caller asked for.
      shards: how rows are sharded, where their types said so; else None.
      shape: of the rows, before they were folded.
    """

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    tails: tuple[AdaptiveTail, ...]
    row_tau: jax.Array | None
    constant: float
    precision: jax.lax.PrecisionLike
    implementation: Implementation | None
    shards: mesh_axes.Shards | None
    shape: tuple[int, ...]

    @property
    def shortlist(self) -> int:
        """S."""
        return self.kernel.shape[1] - len(self.tails)

    @property
    def num_classes(self) -> int:
        """V."""
        return self.shortlist + sum(tail.kernel.shape[1] for tail in self.tails)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first rank of each tail."""
        sizes = (self.shortlist, *(tail.kernel.shape[1] for tail in self.tails))
        return tuple(itertools.accumulate(sizes))[:-1]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of log-probabilities."""
        return compute_dtype(self.hidden, self.kernel)

    def repeated(self, times: int) -> Layer:
        """Returns the layer with each row several times."""
        tau = self.row_tau
        return dataclasses.replace(
            self,
            hidden=jnp.repeat(self.hidden, times, axis=0),
            row_tau=None if tau is None else jnp.repeat(tau, times),
        )

    def call(self) -> tuple[tuple[jax.Array, jax.Array], Options]:
        """Returns hidden states and kernel, and options, for `linear_*`."""
        return (self.hidden, self.kernel), _options(self, self.bias)

    def tail(self, index: int) -> TailLayer:
        """Returns the layer of a tail."""
        parameters = self.tails[index]
        return TailLayer(
            self.hidden,
            parameters,
            self.row_tau,
            self.constant,
            self.precision,
            self.implementation,
            self.shards,
        )


def _options(layer: Layer | TailLayer, bias: Leaf | None) -> Options:
    tau = layer.constant if layer.row_tau is None else layer.row_tau
    return {
        "bias": bias,
        "temperature": tau,
        "precision": layer.precision,
        "implementation": layer.implementation,
    }


def prepare(
    name: str,
    hidden: ArrayLike,
    head_kernel: ArrayLike,
    tails: Sequence[AdaptiveTail],
    bands: ClassBands,
    *,
    head_bias: ArrayLike | None,
    temperature: ArrayLike,
    precision: jax.lax.PrecisionLike,
    implementation: Implementation | None,
) -> Layer:
    """Checks arguments that all functions of bands have, and folds their rows."""
    registry.resolve(name, implementation)
    hidden = checks.floating("hidden", hidden)
    kernel = checks.floating("head_kernel", head_kernel)
    if not isinstance(bands, ClassBands):
        raise TypeError(f"`bands` must be a ClassBands, got {type(bands).__name__}.")
    if not hidden.ndim:
        raise ValueError("`hidden` must have shape [..., H], got a scalar.")
    shape, features = hidden.shape[:-1], hidden.shape[-1]
    entries = bands.shortlist + len(bands.tails)
    checks.shape(
        "head_kernel",
        kernel,
        (features, entries),
        "(H, bands.shortlist + len(bands.tails))",
    )
    bias = None
    if head_bias is not None:
        bias = checks.floating("head_bias", head_bias)
        checks.shape(
            "head_bias", bias, (entries,), "(bands.shortlist + len(bands.tails),)"
        )
    if len(tails) != len(bands.tails):
        raise ValueError(
            f"`tails` must be one for each of the {len(bands.tails)} bands below the "
            f"shortlist, got {len(tails)}."
        )
    checked = tuple(
        _checked_tail(f"tails[{index}]", AdaptiveTail(*tail), features, classes)
        for index, (tail, classes) in enumerate(zip(tails, bands.tails, strict=True))
    )
    dtype = compute_dtype(hidden, kernel)
    tau = checks.row_temperature(temperature, dtype, shape)
    constant, row_tau = 1.0, None
    if isinstance(tau, (int, float)):
        constant = float(tau)
    else:
        row_tau = jnp.broadcast_to(tau, shape).reshape(-1)
    folded = hidden.astype(operand_dtype(hidden, kernel))
    folded = folded.reshape(math.prod(shape), features)
    return Layer(
        folded,
        kernel,
        _head_bias(kernel, bias, checked),
        checked,
        row_tau,
        constant,
        precision,
        implementation,
        mesh_axes.explicit_shards(),
        shape,
    )


def _head_bias(
    kernel: jax.Array, bias: jax.Array | None, tails: tuple[AdaptiveTail, ...]
) -> jax.Array | None:
    """Returns the bias of the head, -inf at tails whose classes are all masked.

    What the head gave such a tail would be the probability of no class.
    """
    if all(tail.bias is None for tail in tails):
        return bias
    empty = [
        jnp.full((), False)
        if tail.bias is None
        else jnp.all(jnp.asarray(tail.bias) == -jnp.inf)
        for tail in tails
    ]
    shortlist = kernel.shape[1] - len(tails)
    is_empty = jnp.concatenate([jnp.zeros(shortlist, bool), jnp.stack(empty)])
    bias = jnp.zeros(kernel.shape[1], kernel.dtype) if bias is None else bias
    # Some floats of 8 bits have no infinity.
    return jnp.where(is_empty, -jnp.inf, bias.astype(compute_dtype(bias)))


def _checked_tail(
    name: str, tail: AdaptiveTail, features: int, classes: int
) -> AdaptiveTail:
    projection = checks.floating(f"{name}.projection", tail.projection)
    kernel = checks.floating(f"{name}.kernel", tail.kernel)
    if kernel.ndim != 2 or not kernel.shape[0]:
        raise ValueError(
            f"`{name}.kernel` must have shape [D, V_i] with D >= 1, got {kernel.shape}."
        )
    width = kernel.shape[0]
    checks.shape(f"{name}.kernel", kernel, (width, classes), "(D, V_i)")
    checks.shape(f"{name}.projection", projection, (features, width), "(H, D)")
    bias = None
    if tail.bias is not None:
        bias = checks.floating(f"{name}.bias", tail.bias)
        checks.shape(f"{name}.bias", bias, (classes,), "(V_i,)")
    return AdaptiveTail(projection, kernel, bias)
