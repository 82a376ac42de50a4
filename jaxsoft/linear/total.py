"""Losses that are summed over the rows inside the call, and their gradient by chunks.

The sum's cotangent is one number, so the forward pass can take the gradient already: of
one chunk of rows after another, whose logits are all kept until their slopes have been
multiplied. That is `total`: under vmap it is a stream and a sum, and a derivative for
which chunks are not the plan is theirs.
"""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike

from jaxsoft._core import mesh_axes
from jaxsoft._core.defaults import Default
from jaxsoft._core.numerics import compute_dtype
from jaxsoft.linear.arguments import Axes, axes_of
from jaxsoft.linear.fold import Fold, stream, unwrapped
from jaxsoft.linear.gradients import Into
from jaxsoft.linear.kept import Keep, Kept
from jaxsoft.linear.plans import Plan
from jaxsoft.linear.program import Program, bind, by_moving
from jaxsoft.linear.tiles import slice_rows

__all__ = ["RowLoss", "total"]

# Numbers of a tile of a gradient that is scaled, and the last axis of a TPU's tiles.
_SCALED, _LANES = 2**22, 128


@dataclasses.dataclass(frozen=True)
class RowLoss(abc.ABC):
    """The loss of a row, made of a fold's result."""

    @abc.abstractmethod
    def of_rows(self, result: Any, rows: Any) -> jax.Array:
        """Returns the losses [N] as they are summed, weights included.

        Args:
          result: of the fold.
          rows: further arrays of the rows, in a named tuple whose fields say their
            axes.
        """


def total(fold: Fold, loss: RowLoss, arrays: Any, rows: Any) -> jax.Array:
    """Returns the sum of the rows' losses, differentiable in all arrays.

    Args:
      fold: what is streamed.
      loss: made of its result.
      arrays: what the fold is computed from, at least one row.
      rows: further arrays of the rows, in a named tuple whose fields say their axes.
    """
    if fold.config.implementation != "xla":
        return _streamed(fold, loss, arrays, rows)
    over = set().union(*map(mesh_axes.varying_axes, jax.tree.leaves((arrays, rows))))
    # Shards of classes have met in what rows hold.
    over -= set(fold.config.vocab_axes)
    rows = jax.tree.map(lambda a: mesh_axes.vary(a, over), rows)
    flat, tree = jax.tree.flatten((mesh_axes.like(arrays, arrays), rows))

    def call(*flat):
        return _streamed(fold, loss, *jax.tree.unflatten(tree, flat))

    jaxpr = jax.make_jaxpr(call)(*flat)
    return _primitive.bind(*flat, jaxpr=jaxpr, fold=fold, loss=loss, tree=tree)[0]


def _streamed(fold: Fold, loss: RowLoss, arrays: Any, rows: Any) -> jax.Array:
    return jnp.sum(loss.of_rows(stream(fold, arrays), rows))


_primitive = Primitive("jaxsoft_total")
_primitive.multiple_results = True


def _evaluate(*flat, jaxpr, fold, loss, tree):
    del fold, loss, tree
    return jaxpr_as_fun(jaxpr)(*flat)


def _jvp(primals, tangents, *, jaxpr, fold, loss, tree):
    """Differentiates by the arguments that have a tangent, as the plan says."""
    del jaxpr
    are = [not isinstance(t, ad.Zero) for t in tangents]
    moving = jax.tree.unflatten(tree, are)

    def by_plan(arrays, rows):
        if fold.plan(arrays, moving[0], reduced=True).kind == "chunks":
            return _by_chunks(fold, loss, moving, arrays, rows)
        return _streamed(fold, loss, arrays, rows)

    of_moving, those = by_moving(by_plan, tree, primals, are)
    return jax.jvp(
        of_moving, those, [t for t in tangents if not isinstance(t, ad.Zero)]
    )


def _batch(args, dims, *, jaxpr, fold, loss, tree):
    """Streams the rows of all examples; their sums' cotangents are not one number."""
    del jaxpr

    def call(*flat):
        return [_streamed(fold, loss, *jax.tree.unflatten(tree, flat))]

    return jax.vmap(call, in_axes=tuple(dims))(*args), [0]


_primitive.def_impl(_evaluate)
_primitive.def_effectful_abstract_eval(
    lambda *args, jaxpr, **params: (jaxpr.out_avals, jaxpr.effects)
)
mlir.register_lowering(_primitive, mlir.lower_fun(_evaluate, multiple_results=True))
ad.primitive_jvps[_primitive] = _jvp
batching.primitive_batchers[_primitive] = _batch


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _by_chunks(fold: Fold, loss: RowLoss, moving: Any, arrays: Any, rows: Any):
    del moving
    return _streamed(fold, loss, arrays, rows)


def _by_chunks_forward(fold: Fold, loss: RowLoss, moving: Any, arrays: Any, rows: Any):
    arrays, rows = unwrapped((arrays, rows))
    losses, gradients = bind(_Chunks(fold, loss, moving), arrays, rows)
    # The dtypes that the cotangents must have, of arrays without a number.
    like = jax.tree.map(lambda a: jnp.zeros(0, a.dtype), (arrays, rows))
    return jnp.sum(losses), (gradients, like)


def _by_chunks_backward(fold: Fold, loss: RowLoss, moving: Any, residuals, cotangent):
    """Scales the gradients, and rounds them once."""
    del loss
    gradients, like = residuals
    if isinstance(cotangent, SymbolicZero):
        return jax.tree.map(lambda _: None, like)
    remaining = iter(jax.tree.leaves(gradients))
    of_arrays, of_rows = like
    letters = iter(jax.tree.leaves((fold.axes(of_arrays), axes_of(of_rows))))

    def scaled(moves, like):
        axes = next(letters)
        if not moves:
            return None
        gradient = next(remaining)
        factor = cotangent.astype(gradient.dtype)
        if axes[1:] == "v" and not _may_be_shared(fold, gradient):
            return _scaled_columns(gradient, factor, like.dtype)
        return _scaled(gradient, factor, like.dtype)

    return jax.tree.map(scaled, moving, like)


def _may_be_shared(fold: Fold, gradient: jax.Array) -> bool:
    """Tells whether devices may share an array outside `jax.shard_map`.

    XLA gathers whatever a loop slices along an axis that they share.
    """
    config = fold.config
    if mesh_axes.varying_axes(gradient) or config.vocab_axes:
        return False
    return config.shards is not None or jax.device_count() > 1


def _scaled_columns(sums: jax.Array, factor: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns sums [H, V] times a factor, rounded once."""
    return lax.platform_dependent(
        sums,
        factor,
        tpu=functools.partial(_scaled_by_tiles, dtype=dtype),
        default=functools.partial(_scaled, dtype=dtype),
    )


def _scaled(sums: jax.Array, factor: jax.Array, dtype: DTypeLike) -> jax.Array:
    return (factor * sums).astype(dtype)


def _scaled_by_tiles(sums: jax.Array, factor: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns `_scaled`, of one tile of classes after another.

    The sums lie class by class on a TPU, and XLA would lay out all of them as the
    result is before it rounds them, in two more arrays of float32.
    """
    features, classes = sums.shape
    size = max(_SCALED // (features * _LANES), 1) * _LANES
    if size >= classes:
        return _scaled(sums, factor, dtype)
    # If XLA knew that the factor is 1, it would round all sums before the loop.
    factor = lax.optimization_barrier(factor)

    def tile(index, found):
        start = jnp.minimum(index * size, classes - size)
        part = lax.dynamic_slice_in_dim(sums, start, size, 1)
        part = _scaled(part, factor, dtype)
        return lax.dynamic_update_slice_in_dim(found, part, start, 1)

    found = mesh_axes.like(jnp.zeros(sums.shape, dtype), (sums, factor))
    return lax.fori_loop(0, -(-classes // size), tile, found)


_by_chunks.defvjp(_by_chunks_forward, _by_chunks_backward, symbolic_zeros=True)


class _Losses(NamedTuple):
    """The losses of the rows, [N]."""

    losses: Annotated[jax.Array, Axes("n")]


class _Both(NamedTuple):
    """The losses of the rows, and the gradients of their sum.

    Attributes:
      losses: [N].
      gradients: of the arrays that move, and of the further arrays of rows, in the
        dtype of the statistics.
    """

    losses: jax.Array
    gradients: Any


@dataclasses.dataclass(frozen=True)
class _LossesAlone(Program):
    """The losses of the rows."""

    loss: RowLoss

    def default(self, arrays: Any, *others: Any) -> Default | None:
        """Returns the kernel of the forward pass."""
        return self.fold.default(arrays, self.fold.kernel_step)

    def call(self, arrays: Any, rows: Any) -> _Losses:
        return _Losses(self.loss.of_rows(self.fold.compute(arrays), rows))


@dataclasses.dataclass(frozen=True)
class _Chunks(Program):
    """The losses of the rows, and the gradients of their sum.

    Attributes:
      loss: of a row.
      moving: which of the arrays, and of the rows', have a tangent.
    """

    loss: RowLoss
    moving: Any

    def is_partial(self, result: Any) -> Any:
        of_arrays, of_rows = result.gradients
        # Every shard of the classes has the whole of a row's loss.
        whole = jax.tree.map(lambda _: False, of_rows)
        partial = jax.tree.map(lambda _: True, of_arrays)
        return result._replace(losses=False, gradients=(partial, whole))

    def result_axes(self, arrays: Any, result: Any) -> list[str]:
        _, rows = self.moving
        axes = jax.tree.leaves((self.fold.axes(arrays), axes_of(rows)))
        moving = jax.tree.leaves(self.moving)
        return ["n", *(a for a, m in zip(axes, moving, strict=True) if m)]

    def without(self, used: Sequence[bool]) -> Program | None:
        """Returns the losses alone: whoever needs no gradient pays for none."""
        return None if any(used[1:]) else _LossesAlone(self.fold, self.loss)

    def plan(self, arrays: Any, *others: Any) -> Plan:
        """Returns the plan of the chunks."""
        del others
        return self.fold.plan(arrays, self.moving[0], reduced=True)

    def call(self, arrays: Any, rows: Any) -> _Both:
        plan = self.plan(arrays)
        count = self.fold.layer(arrays).rows
        size = plan.chunk_rows or count
        keep = self.fold.keep(arrays, self.moving[0], plan)
        start = self._start(arrays, rows)
        if size == count:
            return self._chunk(arrays, rows, keep, start, ())[0]
        # Room for all chunks waits for its memory once on a CPU; on a GPU it waits for
        # none, and slopes take the place of what was kept. The plan may keep but a part
        # of a chunk there: tiles have other sizes.
        first = slice_rows(arrays, 0, size)
        shared = () if self.fold.config.for_gpu else self._room(first, keep)

        def chunk(index, state):
            sums, room = state
            place = (index * size, size)
            sums, kept = self._chunk(arrays, rows, keep, sums, room, place)
            return sums, kept if room else ()

        return lax.fori_loop(0, -(-count // size), chunk, (start, shared))[0]

    def on_gpu(self) -> Self:
        return dataclasses.replace(self, fold=self.fold.for_gpu())

    def _room(self, part: Any, keep: Keep | None) -> tuple[Kept, ...]:
        """Returns room for what is kept of a chunk."""
        return self.fold.keeping(keep).room(part, keep)

    def _dtype(self, arrays: Any) -> jnp.dtype:
        """Returns the dtype of the statistics."""
        operands = self.fold.operands(arrays)
        return compute_dtype(operands.hidden, operands.kernel)

    def _start(self, arrays: Any, rows: Any) -> _Both:
        """Returns losses and gradients of 0, where something moves."""
        dtype, operands = self._dtype(arrays), self.fold.operands(arrays)
        # Shards of classes have met in a row's loss.
        over = set().union(
            *map(mesh_axes.varying_axes, jax.tree.leaves((arrays, rows)))
        )
        over -= set(self.fold.config.vocab_axes)
        losses = mesh_axes.vary(jnp.zeros(operands.hidden.shape[0], dtype), over)

        def zeros(moves, array):
            if not moves:
                return None
            zero = jnp.zeros(array.shape, dtype)
            return mesh_axes.vary(zero, mesh_axes.varying_axes(array))

        return _Both(losses, jax.tree.map(zeros, self.moving, (arrays, rows)))

    def _chunk(
        self,
        arrays: Any,
        rows: Any,
        keep: Keep | None,
        sums: _Both,
        room: tuple[Kept, ...],
        place: tuple[jax.Array, int] | None = None,
    ) -> tuple[_Both, tuple[Kept, ...]]:
        """Adds a chunk of rows.

        Args:
          arrays: of all rows.
          rows: the further arrays of all rows.
          keep: what to keep of the chunk's tiles.
          sums: of the chunks before.
          room: where to keep it; () makes it.
          place: the first row and the number of rows; None for all.

        Returns:
          The sums, and what was kept.
        """
        part, part_rows, written = arrays, rows, None
        fresh = None
        if place is not None:
            begin, size = place
            first = jnp.minimum(begin, sums.losses.shape[0] - size)
            part, part_rows = (slice_rows(x, first, size) for x in (arrays, rows))
            fresh = first + lax.iota(jnp.int32, size) >= begin
            written = (first, fresh)
        fold, (moving, moving_rows) = self.fold.keeping(keep), self.moving
        saved, kept = fold.forward(part, keep, room or self._room(part, keep))
        result = fold.result(saved)
        flat, tree = jax.tree.flatten(part_rows)
        are = jax.tree.leaves(moving_rows)

        def losses_of(result, those):
            remaining = iter(those)
            flat_rows = [
                next(remaining) if m else a for a, m in zip(flat, are, strict=True)
            ]
            return self.loss.of_rows(result, jax.tree.unflatten(tree, flat_rows))

        those = [a for a, m in zip(flat, are, strict=True) if m]
        losses, pull = jax.vjp(losses_of, result, those)
        ones = jnp.ones_like(losses)
        ones = ones if fresh is None else jnp.where(fresh, ones, 0)
        cotangents, of_rows = pull(mesh_axes.like(ones, losses))
        saved, kept, cotangents = mesh_axes.like((saved, kept, cotangents), part)
        into = Into(self._of_classes(sums.gradients[0], arrays), place is not None)
        found = fold.gradients(
            part, fold.residuals(saved), cotangents, moving, kept, into
        )
        losses = mesh_axes.vary(losses, mesh_axes.varying_axes(sums.losses))
        new = _Both(losses, (found, of_rows))
        return self._written(arrays, sums, new, written), kept

    def _of_classes(self, sums: Any, arrays: Any) -> Any:
        """Returns the sums by arrays of classes, None in the place of others."""
        axes = jax.tree.leaves(self.fold.axes(arrays))
        moving = jax.tree.leaves(self.moving[0])
        letters = iter([a for a, m in zip(axes, moving, strict=True) if m])
        return jax.tree.map(lambda a: None if next(letters)[0] == "n" else a, sums)

    def _written(
        self,
        arrays: Any,
        sums: _Both,
        new: _Both,
        place: tuple[jax.Array, jax.Array] | None,
    ) -> _Both:
        """Returns the sums with those of a chunk.

        Args:
          arrays: of all rows.
          sums: of the chunks before.
          new: of the chunk; gradients by arrays of classes are sums already.
          place: its first row, and [R] whether a row is new; None for all rows.
        """
        leaves, tree = jax.tree.flatten(sums)
        found = jax.tree.leaves(new)
        if place is None:
            found = [a.astype(b.dtype) for a, b in zip(found, leaves, strict=True)]
            return jax.tree.unflatten(tree, found)
        first, fresh = place

        def written(letters, old, new):
            if letters[0] != "n":
                return new
            before = lax.dynamic_slice_in_dim(old, first, fresh.shape[0])
            is_new = fresh.reshape((-1,) + (1,) * (old.ndim - 1))
            new = jnp.where(is_new, new.astype(old.dtype), before)
            return lax.dynamic_update_slice_in_dim(old, new, first, 0)

        letters = self.result_axes(arrays, None)
        written_leaves = map(written, letters, leaves, found)
        return jax.tree.unflatten(tree, list(written_leaves))
