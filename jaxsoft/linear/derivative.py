"""The derivative of the statistics: one backward pass over the tiles for all losses."""

import dataclasses
import functools
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from jaxsoft.linear import reference, varying, xla, xla_backward
from jaxsoft.linear.folding import Foldable
from jaxsoft.linear.operands import Config, Fields, Operands

__all__ = ["statistics"]

# Which operands have one row for each token, in the order of their fields.
_ROWS = (True, False, False, True, True, False)


def _shared(operands: Operands) -> tuple[Any, ...]:
    """Returns what all rows share."""
    return (operands.kernel, operands.bias, operands.class_mask)


def _rows(operands: Operands) -> Operands:
    """Returns `_ROWS` with None where an operand is missing."""
    pairs = zip(_ROWS, operands, strict=True)
    return Operands._make(None if o is None else f for f, o in pairs)


@dataclasses.dataclass(frozen=True)
class _Statistics(Foldable):
    """The statistics, whose first derivative is the one backward pass below."""

    config: Config

    def call(self, operands: Operands) -> Fields:
        if self.config.implementation == "reference":
            return reference.statistics(self.config, operands)
        return xla.forward(self.config, operands)[0]

    def rows(self, operands: Operands) -> Operands:
        return _rows(operands)

    def folds(self, batched: Operands) -> bool:
        return not any(_shared(batched))

    def differentiable(self, moving: Operands):
        if self.config.implementation == "reference":
            return self.call
        wanted = xla_backward.Wanted(
            hidden=bool(moving.hidden),
            kernel=bool(moving.kernel),
            bias=bool(moving.bias),
            tau=bool(moving.tau),
        )
        return functools.partial(_differentiable, self.config, wanted)


@dataclasses.dataclass(frozen=True)
class _Forward(_Statistics):
    """The statistics inside their own derivative: JAX differentiates the loops."""

    def call(self, operands: Operands) -> tuple[Fields, jax.Array]:
        return xla.forward(self.config, operands)

    def differentiable(self, moving: Operands):
        del moving
        return self.call


@dataclasses.dataclass(frozen=True)
class _Backward(Foldable):
    """The cotangents of the operands that `wanted` names."""

    config: Config
    wanted: xla_backward.Wanted

    def call(self, operands, fields, total, cotangents) -> xla_backward.Gradients:
        return xla_backward.backward(
            self.config, operands, fields, total, cotangents, self.wanted
        )

    def rows(self, operands, *rest) -> Any:
        return _rows(operands), *jax.tree.map(lambda _: True, rest)

    def folds(self, operands: Operands, *rest) -> bool:
        del rest
        # One dkernel an example cannot come from folded rows.
        return not (any(_shared(operands)) or self.wanted.kernel or self.wanted.bias)


def statistics(config: Config, operands: Operands) -> Fields:
    """Returns the statistics of every row, differentiable in the float operands.

    Args:
      config: what is known at trace time.
      operands: the arrays; all rows are in one axis.

    Returns:
      The wanted fields, [N] each.
    """
    return _Statistics(config)(varying.like(operands, operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(
    config: Config, wanted: xla_backward.Wanted, operands: Operands
) -> Fields:
    del wanted
    return _Forward(config)(operands)[0]


def _fwd(config: Config, wanted: xla_backward.Wanted, primals):
    operands = jax.tree.map(
        lambda a: a.value, primals, is_leaf=lambda a: hasattr(a, "perturbed")
    )
    del wanted
    fields, total = _Forward(config)(operands)
    return fields, (operands, fields, total)


def _bwd(config: Config, wanted: xla_backward.Wanted, residuals, cotangents: Fields):
    """Runs the one backward pass, for the cotangents that do not vanish."""
    operands, fields, total = residuals
    given = xla_backward.Cotangents(
        *(
            _nonzero(getattr(cotangents, name))
            for name in xla_backward.Cotangents._fields
        )
    )
    if all(g is None for g in given):
        return (Operands._make([None] * len(operands)),)
    out = _Backward(config, wanted)(operands, fields, total, given)
    gradients = (out.hidden, out.kernel, out.bias, out.tau, None, None)
    return (Operands._make(gradients),)


def _nonzero(cotangent: Any) -> jax.Array | None:
    return None if isinstance(cotangent, SymbolicZero) else cotangent


_differentiable.defvjp(_fwd, _bwd, symbolic_zeros=True)
