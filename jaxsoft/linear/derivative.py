"""The derivative of the statistics: one backward pass over the tiles for all losses."""

import dataclasses
import functools
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from jaxsoft._core import mesh_axes
from jaxsoft._core.registry import platform_of
from jaxsoft.linear import reference, statistics_backward, xla
from jaxsoft.linear.folding import Foldable
from jaxsoft.linear.operands import Config, Fields, Operands, roles_like
from jaxsoft.linear.running import Saved
from jaxsoft.linear.statistics_backward import Cotangents
from jaxsoft.linear.xla_backward import Gradients, Wanted

__all__ = ["nonzero", "statistics", "values"]


@dataclasses.dataclass(frozen=True)
class _Statistics(Foldable):
    """The statistics, whose first derivative is the one backward pass below."""

    config: Config

    def call(self, operands: Operands) -> Fields:
        if self.config.implementation == "reference":
            return reference.statistics(self.config, operands)
        return _forward(self.config, operands).fields

    @property
    def platform(self) -> str | None:
        return platform_of(self.config.implementation)

    def roles(self, operands: Operands) -> tuple[Any, ...]:
        return (operands.roles(self.config),)

    def out_roles(self, operands: Operands) -> Any:
        config = self.config
        labels = None if operands.labels is None else "nk"
        wanted = [config.mean, config.expected, config.argmax, config.rest]
        return Fields._make(["n", "n", labels, *("n" if w else None for w in wanted)])

    def differentiable(self, moving: Operands):
        if self.config.implementation == "reference":
            return self.call
        wanted = Wanted.of(moving)
        return functools.partial(_differentiable, self.config, wanted)


@dataclasses.dataclass(frozen=True)
class _Forward(_Statistics):
    """The statistics inside their own derivative: JAX differentiates XLA's loops."""

    def call(self, operands: Operands) -> Any:
        return _forward(self.config, operands)

    def out_roles(self, operands: Operands) -> Any:
        number = "n" if self.config.mean else None
        rest = "n" if self.config.rest else None
        return Saved(super().out_roles(operands), "n", number, rest)  # pyright: ignore

    def differentiable(self, moving: Operands):
        del moving
        return functools.partial(xla.forward, _of_loops(self.config))


@dataclasses.dataclass(frozen=True)
class _Backward(Foldable):
    """The cotangents of the operands that `wanted` names."""

    config: Config
    wanted: Wanted

    @property
    def partial(self) -> bool:
        return True

    @property
    def platform(self) -> str | None:
        return platform_of(self.config.implementation)

    def differentiable(self, *moving: Any):
        del moving
        loops = dataclasses.replace(self, config=_of_loops(self.config))
        return loops.call

    def call(self, operands, saved, cotangents) -> Gradients:
        return statistics_backward.backward(
            self.config, operands, saved, cotangents, self.wanted
        )

    def roles(self, operands, saved, cotangents) -> Any:
        fields = roles_like(saved.fields, ("n", "n", "nk", "n", "n", "n", "n"))
        return (
            operands.roles(self.config),
            roles_like(saved, (fields, "n", "n", "n")),
            roles_like(cotangents, ("n", "nk", "n", "n", "n")),
        )

    def out_roles(self, *args: Any) -> Any:
        del args
        return self.wanted.roles(self.config)


def _forward(config: Config, operands: Operands) -> Saved:
    """Computes the statistics by the implementation that was asked for."""
    # Pallas is imported by those who use it.
    if config.implementation == "mosaic_tpu":
        from jaxsoft.kernels.layer.mosaic_tpu import forward as mosaic_tpu

        return mosaic_tpu.forward(config, operands)
    if config.implementation == "mosaic_gpu":
        from jaxsoft.kernels.layer.mosaic_gpu import call as mosaic_gpu

        return mosaic_gpu.forward(config, operands)
    return xla.forward(config, operands)


def _of_loops(config: Config) -> Config:
    """Returns the configuration of XLA's loops, which JAX can differentiate."""
    return dataclasses.replace(config, implementation="xla")


def statistics(config: Config, operands: Operands) -> Fields:
    """Returns the statistics of every row, differentiable in the float operands.

    Args:
      config: what is known at trace time.
      operands: the arrays; all rows are in one axis.

    Returns:
      The wanted fields.
    """
    return _Statistics(config)(mesh_axes.like(operands, operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(config: Config, wanted: Wanted, operands: Operands) -> Fields:
    del wanted
    return _Forward(config)(operands).fields


def _fwd(config: Config, wanted: Wanted, primals):
    del wanted
    operands = values(primals)
    saved = _Forward(config)(operands)
    return saved.fields, (operands, saved)


def _bwd(config: Config, wanted: Wanted, residuals, cotangents: Fields):
    """Runs the one backward pass, for the cotangents that do not vanish."""
    operands, saved = residuals
    given = Cotangents(
        *(nonzero(getattr(cotangents, name)) for name in Cotangents._fields)
    )
    if all(g is None for g in given):
        return (Operands._make([None] * len(operands)),)
    saved, given = mesh_axes.like((saved, given), operands)
    return (_Backward(config, wanted)(operands, saved, given).of_operands(),)


def values(primals: Any) -> Any:
    """Returns the values of primals that custom_vjp wrapped for symbolic zeros."""
    return jax.tree.map(
        lambda a: a.value, primals, is_leaf=lambda a: hasattr(a, "perturbed")
    )


def nonzero(cotangent: Any) -> jax.Array | None:
    """Returns a cotangent, or None if it is known to vanish."""
    return None if isinstance(cotangent, SymbolicZero) else cotangent


_differentiable.defvjp(_fwd, _bwd, symbolic_zeros=True)
