"""`Fold`: what is streamed over the classes, and what makes a function of JAX of it.

A fold is a few numbers a row, merged from one tile of logits after another. Its
subclasses are the statistics, mixtures, best classes, draws and divergences of
`folds/`; each says how a carry starts, takes a step and finishes, and what the
derivative by a tile's logits is. All else is here and in `program.py`, once: the loops,
the derivative rule and what it keeps, vmap, and how devices share the work.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxsoft._core import defaults, mesh_axes, registry
from jaxsoft._core.defaults import Default
from jaxsoft.linear.arguments import Config, Operands, axes_of
from jaxsoft.linear.gradients import Into
from jaxsoft.linear.kept import Keep, Keeping, Kept, KeptTile, Place
from jaxsoft.linear.plans import Layer, Plan, Tiling
from jaxsoft.linear.program import Program, bind
from jaxsoft.linear.tiles import (
    compute_tile,
    fold_tiles,
    layer_of,
    tiles_of,
)

__all__ = ["Fold", "keep_products", "of_products", "stream", "unwrapped"]

Arrays = TypeVar("Arrays")
Carry = TypeVar("Carry")
Saved = TypeVar("Saved")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Fold(abc.ABC, Generic[Arrays, Carry, Saved, Result]):
    """What is streamed over the tiles of a layer's logits, and its derivative.

    A subclass is a frozen dataclass, since it is a parameter of a primitive. Its
    arrays, its saved numbers and its result are named tuples whose fields say their
    axes (`arguments.Axes`): that is what vmap and devices go by.

    Attributes:
      config: what is known of the layer at trace time.
    """

    config: Config
    # The steps' names in the registry of kernels; None where no kernel does them.
    kernel_step: ClassVar[str | None] = None
    gradient_step: ClassVar[str | None] = None

    @abc.abstractmethod
    def start(self, rows: int, arrays: Any) -> Carry:
        """Returns the carry of R rows before their first tile, arrays of R rows."""

    @abc.abstractmethod
    def step(self, carry: Carry, tile: Any, part: Any) -> Carry:
        """Returns the carry with one more tile.

        Args:
          carry: that of the tiles before.
          tile: what `tile` returned.
          part: the arrays that `local` gave, those of R rows where they have rows.
        """

    def close(self, carry: Any, part: Any, tiles: Tiling) -> Any:
        """Returns what is left of the carry of R rows after their last tile.

        Args:
          carry: that of all tiles.
          part: the arrays of its rows.
          tiles: the tiles of the call.
        """
        del part, tiles
        return carry

    @abc.abstractmethod
    def finish(self, carry: Any, arrays: Any) -> Saved:
        """Returns what is saved of every row; here shards of the classes meet."""

    @abc.abstractmethod
    def result(self, saved: Saved) -> Result:
        """Returns what the function gives, made of what is saved."""

    def residuals(self, saved: Saved) -> Saved:
        """Returns what of it the derivative needs."""
        return saved

    def gradients(
        self,
        arrays: Arrays,
        saved: Saved,
        cotangents: Result,
        moving: Arrays,
        kept: tuple[Kept, ...] = (),
        into: Into | None = None,
    ) -> Arrays:
        """Returns the cotangents of the arrays.

        Args:
          arrays: those of the forward pass.
          saved: what `residuals` returned.
          cotangents: of the result, None where they vanish.
          moving: in the place of each array, whether it has a tangent.
          kept: what the forward pass kept of each layer; () for nothing.
          into: where gradients by arrays of classes go; None makes new ones.

        Returns:
          The structure of `arrays`, None where nothing moves. With sharded classes, and
          rows, the gradients that lack that axis are this shard's part of a sum. With
          `into`, all are in the dtype of the statistics.
        """
        raise NotImplementedError(f"{type(self).__name__} has no derivative")

    @abc.abstractmethod
    def operands(self, arrays: Any) -> Operands:
        """Returns the layer whose rows and classes the tiles cover."""

    def tiles(self, arrays: Any) -> Tiling:
        """Returns the tiles."""
        return tiles_of(self.config, self.operands(arrays))

    def tile(
        self,
        part: Any,
        tiles: Tiling,
        index: jax.Array | int,
        kept: KeptTile | None = None,
    ) -> Any:
        """Returns one tile of logits, or what else `step` takes.

        Args:
          part: the arrays of its rows.
          tiles: the tiles.
          index: which one of the classes.
          kept: its products, where an earlier pass kept them.
        """
        return compute_tile(self.config, self.operands(part), tiles, index, kept=kept)

    def layer(self, arrays: Any) -> Layer:
        """Returns the sizes that plans are made of."""
        return layer_of(self.config, self.operands(arrays))

    def can_keep(self, arrays: Arrays, moving: Arrays) -> Keeping | None:
        """Returns what of a tile spares the derivative its product; None for nothing.

        Args:
          arrays: those of the call.
          moving: in the place of each array, whether it has a tangent.

        Returns:
          "products" or "weights", as in `kept.Keep`.
        """
        del arrays, moving
        return "products" if self.config.can_keep else None

    def kept_of(
        self, tile: Any, keep: Keep, carry: Carry, part: Any
    ) -> tuple[KeptTile, ...]:
        """Returns what is kept of a tile, after its step.

        Args:
          tile: what `tile` returned.
          keep: what to keep.
          carry: that with the tile.
          part: the arrays of its rows.
        """
        del keep, carry, part
        return (KeptTile(tile.product),)

    def plan(self, arrays: Arrays, moving: Arrays, reduced: bool = False) -> Plan:
        """Returns the plan of the derivative.

        Args:
          arrays: those of the call.
          moving: in the place of each array, whether it has a tangent.
          reduced: whether the result is reduced over the rows inside the call.
        """
        layer, shards = self.layer(arrays), self.config.shards
        if shards is not None:
            layer = layer.shared(
                shards.count(shards.rows), shards.count(shards.classes)
            )
        what = self.can_keep(arrays, moving)
        size = {
            "products": layer.logit_bytes,
            "weights": layer.operand_bytes,
        }
        leaves = jax.tree.leaves(arrays)
        has_float16 = any(leaf.dtype == jnp.float16 for leaf in leaves)
        axes = jax.tree.leaves(self.axes(arrays))
        by_classes = any(
            moves and letters[0] != "n"
            for moves, letters in zip(jax.tree.leaves(moving), axes, strict=True)
        )
        return layer.plan(
            self.config.workspace_bytes,
            kept_bytes=None if what is None else size[what],
            # In the range of float16 a slope is lost before its cotangent scales it.
            reduced=reduced and not has_float16,
            kernel=by_classes,
            some=self._knows_its_devices(arrays),
        )

    def _knows_its_devices(self, arrays: Arrays) -> bool:
        """Tells whether devices cannot share the classes in a way unknown so far."""
        known = self.config.shards is not None or bool(self.config.vocab_axes)
        return known or not mesh_axes.may_be_shared(*jax.tree.leaves(arrays))

    def keep(self, arrays: Arrays, moving: Arrays, plan: Plan) -> Keep | None:
        """Returns what the forward pass keeps by a plan."""
        what, shards = self.can_keep(arrays, moving), self.config.shards
        if what is None or not plan.kept_classes:
            return None
        count = 1 if shards is None else shards.count(shards.classes)
        tiles = plan.tiles
        blocks = (tiles.block_rows, tiles.block_classes)
        is_all = plan.kept_classes >= tiles.classes
        return Keep(what, None if is_all else plan.kept_classes * count, blocks)

    def keeping(self, keep: Keep | None) -> Self:
        """Returns the same fold with tiles of which something is kept."""
        if keep is None:
            return self
        return self.configured(lambda config: config.tiled(keep.blocks))

    def local(self, arrays: Arrays) -> Any:
        """Returns the arrays, class ids counted from this shard's first class."""
        return arrays

    def axes(self, arrays: Arrays) -> Arrays:
        """Returns the axes of each array in its place."""
        return axes_of(arrays, self.config.kernel_layout)

    def configured(self, change: Callable[[Config], Config]) -> Self:
        """Returns the same fold with the configuration that a function makes of its."""
        return dataclasses.replace(self, config=change(self.config))

    def over(self, vocab_axes: tuple[str, ...]) -> Self:
        """Returns the same fold with its classes sharded over mesh axes."""
        return self.configured(lambda config: config.over(vocab_axes))

    def plain(self) -> Self:
        """Returns the same fold by what JAX differentiates: loops that keep nothing."""
        config = dataclasses.replace(self.config, keeps=False)
        return dataclasses.replace(self, config=config).by("xla")

    def moving_bits(self) -> Self:
        """Returns the same fold that moves 16-bit floats as bits."""
        return self.configured(functools.partial(dataclasses.replace, moves_bits=True))

    def for_gpu(self) -> Self:
        """Returns the same fold with the chunks of GPUs."""
        return self.configured(functools.partial(dataclasses.replace, for_gpu=True))

    def by(self, implementation: str) -> Self:
        """Returns the same fold by another implementation."""
        config = dataclasses.replace(self.config, implementation=implementation)
        return dataclasses.replace(self, config=config)

    def default(self, arrays: Arrays, step: str | None) -> Default | None:
        """Returns the kernel that a pass takes unasked; None for XLA's loops.

        Args:
          arrays: those of the call, of this device alone.
          step: of the pass, or None.
        """
        config = self.config
        if step is None or not config.takes_defaults or config.shards is not None:
            return None
        layer = self.operands(arrays)
        if not layer.are_for_kernels():
            return None
        return defaults.find(
            defaults.Pass(
                step,
                layer.hidden.shape[0],
                layer.hidden.shape[1],
                layer.num_classes(config),
                (layer.hidden.dtype.name, layer.kernel.dtype.name),
                config.kernel_layout,
            )
        )

    def room(
        self, arrays: Arrays, keep: Keep | None, shards: int = 1
    ) -> tuple[Kept, ...]:
        """Returns room for what the forward pass keeps.

        Args:
          arrays: those of the call.
          keep: what to keep of its tiles, or None.
          shards: how many shards of the classes keep that together.
        """
        if keep is None:
            return ()
        operands = self.operands(self.local(arrays))
        return (keep.room(self.config, operands, shards),)

    def forward(
        self,
        arrays: Arrays,
        keep: Keep | None = None,
        room: tuple[Kept, ...] = (),
    ) -> tuple[Saved, tuple[Kept, ...]]:
        """Returns what is saved and kept, by the implementation that was asked for.

        Args:
          arrays: those of the call.
          keep: what to keep of its tiles, or None.
          room: where to keep it; see `room`.
        """
        if self.kernel_step:
            kernel = registry.kernel(self.kernel_step, self.config.implementation)
            if kernel is not None:
                return kernel(self, arrays), ()
        return self._fold(arrays, keep, room)

    def again(self, arrays: Arrays, kept: tuple[Kept, ...]) -> Result:
        """Returns the result by products that an earlier pass kept; () for none."""
        return self.result(self._fold(arrays, kept=kept)[0])

    def _fold(
        self,
        arrays: Arrays,
        keep: Keep | None = None,
        room: tuple[Kept, ...] = (),
        kept: tuple[Kept, ...] = (),
    ) -> tuple[Saved, tuple[Kept, ...]]:
        """Folds all tiles, by XLA's loops."""
        local = self.local(arrays)
        tiles = self.tiles(local)

        def step(carry: Carry, part: Any, place: Place, read: Any) -> Any:
            tile = self.tile(part, tiles, place.index, *read)
            carry = self.step(carry, tile, part)
            return carry, () if keep is None else self.kept_of(tile, keep, carry, part)

        def close(carry: Carry, part: Any) -> Any:
            return self.close(carry, part, tiles)

        start = functools.partial(self.start, arrays=local)
        carry, kept = fold_tiles(local, tiles, start, step, room, kept, close)
        return self.finish(carry, local), kept

    def compute(self, arrays: Arrays) -> Result:
        """Returns the result."""
        return self.result(self.forward(arrays)[0])

    def differentiable(self, moving: Arrays) -> Callable[[Arrays], Result]:
        """Returns the function to differentiate, given which arrays move."""
        return functools.partial(_differentiable, self, moving)


def keep_products(
    fold: Fold[Arrays, Carry, Saved, Result], arrays: Arrays
) -> tuple[Result, Keep, tuple[Kept, ...]] | None:
    """Returns a fold's result, without a derivative, and the products of its tiles.

    Args:
      fold: what to compute.
      arrays: what it is computed from, at least one row.

    Returns:
      The result, and how which products are kept; None where the workspace has no room
      for those of all tiles.
    """
    still = jax.tree.map(lambda _: False, arrays)
    keep = fold.keep(arrays, still, fold.plan(arrays, still))
    if keep is None or keep.what != "products" or keep.classes is not None:
        return None
    fold = fold.keeping(keep)
    saved, kept = bind(_Saved(fold, keep), mesh_axes.like(arrays, arrays))
    return fold.result(saved), keep, kept


def of_products(
    fold: Fold[Arrays, Carry, Saved, Result],
    arrays: Arrays,
    keep: Keep,
    kept: tuple[Kept, ...],
) -> Result:
    """Returns the result of a fold, without a derivative, by products that are kept.

    Args:
      fold: what to compute.
      arrays: what it is computed from.
      keep: how they are kept, by `keep_products`.
      kept: the products.
    """
    return bind(_OfKept(fold.keeping(keep)), *mesh_axes.like((arrays, kept), arrays))


def stream(fold: Fold[Arrays, Carry, Saved, Result], arrays: Arrays) -> Result:
    """Returns the result of a fold, differentiable where the fold is.

    Args:
      fold: what to compute.
      arrays: what it is computed from; all rows are in one axis, at least one.

    Returns:
      The fold's result.
    """
    return bind(_Result(fold), mesh_axes.like(arrays, arrays))


@dataclasses.dataclass(frozen=True)
class _Result(Program):
    """The result of the arrays."""

    def call(self, arrays: Any) -> Any:
        return self.fold.compute(arrays)

    def default(self, arrays: Any) -> Default | None:
        """Returns the kernel of the forward pass."""
        return self.fold.default(arrays, self.fold.kernel_step)

    def differentiable(self, moving: Any) -> Callable[..., Any]:
        return self.fold.differentiable(moving)


class _Forward(NamedTuple):
    """What the forward pass leaves.

    Attributes:
      saved: of every row.
      kept: of the tiles of each layer.
    """

    saved: Any
    kept: tuple[Kept, ...]


@dataclasses.dataclass(frozen=True)
class _Saved(Program):
    """What is saved of the arrays, and kept.

    Attributes:
      keep: what of the tiles; None for nothing.
    """

    keep: Keep | None = None

    def call(self, arrays: Any) -> _Forward:
        room = self.fold.room(arrays, self.keep, self.shards)
        saved, kept = self.fold.forward(arrays, self.keep, room)
        return _Forward(saved, tuple(each.in_floats() for each in kept))

    def default(self, arrays: Any) -> Default | None:
        """Returns the kernel of a forward pass that keeps nothing."""
        if self.keep is not None:
            return None
        return self.fold.default(arrays, self.fold.kernel_step)


@dataclasses.dataclass(frozen=True)
class _OfKept(Program):
    """The result of the arrays, by products that an earlier pass kept."""

    def call(self, arrays: Any, kept: Any) -> Any:
        return self.fold.again(arrays, kept)

    def batched(self, args: tuple[Any, ...], are: tuple[Any, ...]) -> tuple[Any, ...]:
        """Does without what was kept where one of it would serve a whole batch."""
        return args if all(jax.tree.leaves(are[1])) else (args[0], ())


@dataclasses.dataclass(frozen=True)
class _Gradients(Program):
    """The gradients of the arrays, from what is saved, kept, and the cotangents.

    Attributes:
      moving: in the structure of the arrays, which are wanted.
    """

    moving: Any = None

    def call(self, arrays: Any, saved: Any, kept: Any, cotangents: Any) -> Any:
        fold, moving = self.fold, self.moving
        if fold.config.moves_bits:
            kept = tuple(each.in_bits() for each in kept)

        def gradients(kept: tuple[Kept, ...]) -> Any:
            return fold.gradients(arrays, saved, cotangents, moving, kept)

        if not kept or not self.is_guarded:
            return gradients(kept)
        here = fold.operands(arrays)
        same = functools.reduce(
            lambda a, b: a & b, (each.is_of(fold.config, here) for each in kept)
        )
        return lax.cond(same, lambda: gradients(kept), lambda: gradients(()))

    def default(self, arrays: Any, *others: Any) -> Default | None:
        """Returns the kernel of a backward pass for which nothing was kept."""
        _, kept, _ = others
        return None if kept else self.fold.default(arrays, self.fold.gradient_step)

    def is_partial(self, result: Any) -> Any:
        return jax.tree.map(lambda _: True, result)

    def result_axes(self, arrays: Any, result: Any) -> list[str]:
        del result
        axes = jax.tree.leaves(self.fold.axes(arrays))
        moving = jax.tree.leaves(self.moving)
        return [a for a, moves in zip(axes, moving, strict=True) if moves]

    def differentiable(self, moving: Any, *others: Any) -> Callable[..., Any]:
        """Returns the gradients as a function of what nothing was kept of."""
        function = super().differentiable(moving, *others)
        return lambda arrays, saved, kept, cotangents: function(
            arrays, saved, (), cotangents
        )

    def plan(self, arrays: Any, *others: Any) -> Plan:
        """Returns the plan of the fold."""
        del others
        return self.fold.plan(arrays, self.moving)

    def batched(self, args: tuple[Any, ...], are: tuple[Any, ...]) -> tuple[Any, ...]:
        """Does without what was kept where one of it would serve a whole batch."""
        arrays, saved, kept, cotangents = args
        if all(jax.tree.leaves(are[2])):
            return args
        return arrays, saved, (), cotangents


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(
    fold: Fold[Arrays, Carry, Saved, Result], moving: Arrays, arrays: Arrays
) -> Result:
    del moving
    return fold.result(bind(_Saved(fold), arrays).saved)


def _differentiable_forward(fold: Fold, moving: Any, primals: object):
    arrays: Any = unwrapped(primals)
    keep = fold.keep(arrays, moving, fold.plan(arrays, moving))
    fold = fold.keeping(keep)
    saved, kept = bind(_Saved(fold, keep), arrays)
    return fold.result(saved), (arrays, fold.residuals(saved), kept)


def unwrapped(primals: Any) -> Any:
    """Returns arrays that custom_vjp wrapped to tell which are perturbed."""
    return jax.tree.map(
        lambda a: a.value, primals, is_leaf=lambda a: hasattr(a, "perturbed")
    )


def _differentiable_backward(
    fold: Fold[Arrays, Carry, Saved, Result],
    moving: Arrays,
    residuals: tuple[Arrays, Saved, tuple[Kept, ...]],
    cotangents: Result,
) -> tuple[Arrays]:
    """Runs the one backward pass, for the cotangents that do not vanish."""
    arrays, saved, kept = residuals
    cotangents = jax.tree.map(_nonzero, cotangents)
    if not jax.tree.leaves(cotangents):
        return (jax.tree.map(lambda _: None, arrays),)
    if kept:
        keep = fold.keep(arrays, moving, fold.plan(arrays, moving))
        fold = fold.keeping(keep)
    saved, kept, cotangents = mesh_axes.like((saved, kept, cotangents), arrays)
    return (bind(_Gradients(fold, moving), arrays, saved, kept, cotangents),)


def _nonzero(cotangent: jax.Array | SymbolicZero) -> jax.Array | None:
    """Returns a cotangent, or None if it is known to vanish."""
    if isinstance(cotangent, SymbolicZero) or cotangent.dtype == jax.dtypes.float0:
        return None
    return cotangent


_differentiable.defvjp(
    _differentiable_forward, _differentiable_backward, symbolic_zeros=True
)
