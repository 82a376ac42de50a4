"""`Fold`: what is streamed over the classes, and what makes a function of JAX of it.

A fold is a few numbers a row, merged from one tile of logits after another. Its
subclasses are the statistics, mixtures, best classes, draws and divergences of
`folds/`; each says how a carry starts, takes a step and finishes, and what the
derivative by a tile's logits is. All else is here, once: the loops, the derivative
rule, vmap, and how devices share the work.

`jax.vmap` over a loop batches every operand of the loop: a vocabulary tile for each
example, and a full dkernel for each before they are summed. The rows of a batch that
shares one kernel are just more rows, so a fold is a primitive of its own: under vmap it
folds the batch into the rows, and when differentiated it steps aside for a function
that knows which of its arguments have a tangent.

XLA's partitioner gathers whatever a loop slices along a sharded axis: the kernel, and
hidden states. Rows are independent and classes merge, so both can stay where they are:
compiled for several devices, a fold runs for one shard of rows and classes, with the
collectives of `mesh_axes.py` inside, as in `jax.shard_map`.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsoft._core import mesh_axes, registry
from jaxsoft.linear.arguments import Config, Operands, axes_of
from jaxsoft.linear.tiles import Tiling, compute_tile, fold_tiles, tiles_of

__all__ = ["Fold", "stream"]

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
    # The step's name in the registry of kernels; None where no kernel does it.
    kernel_step: ClassVar[str | None] = None

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

    @abc.abstractmethod
    def finish(self, carry: Carry, arrays: Any) -> Saved:
        """Returns what is saved of every row; here shards of the classes meet."""

    @abc.abstractmethod
    def result(self, saved: Saved) -> Result:
        """Returns what the function gives, made of what is saved."""

    def residuals(self, saved: Saved) -> Saved:
        """Returns what of it the derivative needs."""
        return saved

    def gradients(
        self, arrays: Arrays, saved: Saved, cotangents: Result, moving: Arrays
    ) -> Arrays:
        """Returns the cotangents of the arrays.

        Args:
          arrays: those of the forward pass.
          saved: what `residuals` returned.
          cotangents: of the result, None where they vanish.
          moving: in the place of each array, whether it has a tangent.

        Returns:
          The structure of `arrays`, None where nothing moves. With sharded classes, and
          rows, the gradients that lack that axis are this shard's part of a sum.
        """
        raise NotImplementedError(f"{type(self).__name__} has no derivative")

    @abc.abstractmethod
    def operands(self, arrays: Any) -> Operands:
        """Returns the layer whose rows and classes the tiles cover."""

    def tiles(self, arrays: Any) -> Tiling:
        """Returns the tiles."""
        return tiles_of(self.config, self.operands(arrays))

    def tile(self, part: Any, tiles: Tiling, index: jax.Array) -> Any:
        """Returns one tile of logits, or what else `step` takes."""
        return compute_tile(self.config, self.operands(part), tiles, index)

    def local(self, arrays: Arrays) -> Any:
        """Returns the arrays, class ids counted from this shard's first class."""
        return arrays

    def axes(self, arrays: Arrays) -> Arrays:
        """Returns the axes of each array in its place."""
        return axes_of(arrays, self.config.kernel_layout)

    def over(self, vocab_axes: tuple[str, ...]) -> Self:
        """Returns the same fold with its classes sharded over mesh axes."""
        return dataclasses.replace(self, config=self.config.over(vocab_axes))

    def by(self, implementation: str) -> Self:
        """Returns the same fold by another implementation."""
        config = dataclasses.replace(self.config, implementation=implementation)
        return dataclasses.replace(self, config=config)

    def forward(self, arrays: Arrays) -> Saved:
        """Returns what is saved, by the implementation that was asked for."""
        if self.kernel_step:
            kernel = registry.kernel(self.kernel_step, self.config.implementation)
            if kernel is not None:
                return kernel(self, arrays)
        local = self.local(arrays)
        tiles = self.tiles(local)

        def step(carry: Carry, part: Any, index: jax.Array) -> Carry:
            return self.step(carry, self.tile(part, tiles, index), part)

        start = functools.partial(self.start, arrays=local)
        return self.finish(fold_tiles(local, tiles, start, step), local)

    def compute(self, arrays: Arrays) -> Result:
        """Returns the result."""
        return self.result(self.forward(arrays))

    def differentiable(self, moving: Arrays) -> Callable[[Arrays], Result]:
        """Returns the function to differentiate, given which arrays move."""
        return functools.partial(_differentiable, self, moving)


def stream(fold: Fold[Arrays, Carry, Saved, Result], arrays: Arrays) -> Result:
    """Returns the result of a fold, differentiable where the fold is.

    Args:
      fold: what to compute.
      arrays: what it is computed from; all rows are in one axis, at least one.

    Returns:
      The fold's result.
    """
    return _bind(_Program(fold, "result"), mesh_axes.like(arrays, arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(
    fold: Fold[Arrays, Carry, Saved, Result], moving: Arrays, arrays: Arrays
) -> Result:
    del moving
    return fold.result(_bind(_Program(fold, "saved"), arrays))


def _differentiable_forward(fold: Fold, moving: object, primals: object):
    del moving
    # custom_vjp wraps primals to tell which are perturbed.
    arrays = jax.tree.map(
        lambda a: a.value, primals, is_leaf=lambda a: hasattr(a, "perturbed")
    )
    saved = _bind(_Program(fold, "saved"), arrays)
    return fold.result(saved), (arrays, fold.residuals(saved))


def _differentiable_backward(
    fold: Fold[Arrays, Carry, Saved, Result],
    moving: Arrays,
    residuals: tuple[Arrays, Saved],
    cotangents: Result,
) -> tuple[Arrays]:
    """Runs the one backward pass, for the cotangents that do not vanish."""
    arrays, saved = residuals
    cotangents = jax.tree.map(_nonzero, cotangents)
    if not jax.tree.leaves(cotangents):
        return (jax.tree.map(lambda _: None, arrays),)
    saved, cotangents = mesh_axes.like((saved, cotangents), arrays)
    program = _Program(fold, "gradients", moving)
    return (_bind(program, arrays, saved, cotangents),)


def _nonzero(cotangent: jax.Array | SymbolicZero) -> jax.Array | None:
    """Returns a cotangent, or None if it is known to vanish."""
    if isinstance(cotangent, SymbolicZero) or cotangent.dtype == jax.dtypes.float0:
        return None
    return cotangent


_differentiable.defvjp(
    _differentiable_forward, _differentiable_backward, symbolic_zeros=True
)


@dataclasses.dataclass(frozen=True)
class _Program:
    """One of the functions that a fold consists of.

    Attributes:
      fold: the fold.
      part: "result" of the arrays; what is "saved" of them; or the "gradients" of the
        arrays, of what is saved and of the cotangents.
      moving: of gradients, in the structure of the arrays, which are wanted.
    """

    fold: Fold
    part: Literal["result", "saved", "gradients"]
    moving: object = None

    def call(self, arrays: Any, *others: Any) -> Any:
        """Computes the function."""
        if self.part == "gradients":
            saved, cotangents = others
            return self.fold.gradients(arrays, saved, cotangents, self.moving)
        if self.part == "saved":
            return self.fold.forward(arrays)
        return self.fold.compute(arrays)

    @property
    def is_partial(self) -> bool:
        """Whether shards' results still have to be added up."""
        return self.part == "gradients"

    @property
    def platform(self) -> str | None:
        """The one platform that the function has a kernel for; None for any."""
        return registry.platform_of(self.fold.config.implementation)

    @property
    def has_shards_of_classes(self) -> bool:
        """Whether it can run for one shard of the classes; stored logits cannot."""
        return self.fold.config.implementation != "reference"

    def axes(self, arrays: object, *others: object) -> list[str]:
        """Returns the axes of the flat arguments."""
        return jax.tree.leaves((self.fold.axes(arrays), axes_of(others)))

    def result_axes(self, arrays: object, result: object) -> tuple[str, ...]:
        """Returns the axes of the flat results."""
        if self.part != "gradients":
            return tuple(jax.tree.leaves(axes_of(result)))
        axes = jax.tree.leaves(self.fold.axes(arrays))
        moving = jax.tree.leaves(self.moving)
        return tuple(a for a, moves in zip(axes, moving, strict=True) if moves)

    def over(self, vocab_axes: tuple[str, ...]) -> "_Program":
        """Returns the same function with its classes sharded over mesh axes."""
        return dataclasses.replace(self, fold=self.fold.over(vocab_axes))

    def differentiable(self, moving: object, *others: object) -> Callable[..., Any]:
        """Returns the function to differentiate, given which arguments move."""
        del others
        if self.part == "result":
            return self.fold.differentiable(moving)
        # Inside a derivative it is XLA's loops that JAX differentiates.
        return dataclasses.replace(self, fold=self.fold.by("xla")).call


def _bind(program: _Program, *args: object) -> Any:
    """Calls a function of a fold through the primitive."""
    flat, tree = jax.tree.flatten(args)

    def call(*flat):
        return program.call(*jax.tree.unflatten(tree, flat))

    jaxpr, result = jax.make_jaxpr(call, return_shape=True)(*flat)
    axes, result_axes = program.axes(*args), program.result_axes(args[0], result)
    # A kernel in an interpreter has effects: one device runs it, and in order.
    interpreted = program.platform is not None and jaxpr.effects
    shards = program.fold.config.shards
    if shards is not None:
        with jax.sharding.use_abstract_mesh(shards.mesh):
            mapped = _mapped(program, shards, tree, axes, result_axes)
            jaxpr = jax.make_jaxpr(mapped)(*flat)
    elif not interpreted and not any(map(mesh_axes.varying_axes, flat)):
        # Outside shard_map XLA may have to share the function among devices.
        shared = _shared(program, jaxpr_as_fun(jaxpr), tree, axes, result_axes)
        jaxpr = jax.make_jaxpr(shared)(*flat)
    out = _primitive.bind(
        *flat, jaxpr=jaxpr, program=program, tree=tree, result_axes=result_axes
    )
    return jax.tree.unflatten(jax.tree.structure(result), out)


def _flat(program: _Program, tree: Any) -> Callable[..., list[jax.Array]]:
    """Returns the function of flat arguments, and of flat results."""
    return lambda *flat: jax.tree.leaves(program.call(*jax.tree.unflatten(tree, flat)))


_primitive = Primitive("jaxsoft_fold")
_primitive.multiple_results = True


def _evaluate(*args, jaxpr, program, tree, result_axes):
    del program, tree, result_axes
    return jaxpr_as_fun(jaxpr)(*args)


def _jvp(primals, tangents, *, jaxpr, program, tree, result_axes):
    """Differentiates by the arguments that have a tangent."""
    del jaxpr, result_axes
    moving = [not isinstance(t, ad.Zero) for t in tangents]
    function = program.differentiable(*jax.tree.unflatten(tree, moving))

    def of_moving(*those):
        remaining = iter(those)
        args = [
            next(remaining) if m else p for p, m in zip(primals, moving, strict=True)
        ]
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, args)))

    primals_that_move = [p for p, m in zip(primals, moving, strict=True) if m]
    tangents = [t for t, m in zip(tangents, moving, strict=True) if m]
    return jax.jvp(of_moving, primals_that_move, tangents)


def _batch(args, dims, *, jaxpr, program, tree, result_axes):
    """Folds the batch into the rows, or runs its elements one after another."""
    del jaxpr
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    batched = [d is not None for d in dims]
    args = [
        jnp.moveaxis(a, d, 0) if m else a
        for a, d, m in zip(args, dims, batched, strict=True)
    ]
    axes = program.axes(*jax.tree.unflatten(tree, args))
    has_rows = [letters[0] == "n" for letters in axes]
    # A batch becomes rows unless something has no rows, such as one dkernel an example.
    all_have_rows = all(r for r, m in zip(has_rows, batched, strict=True) if m)
    if all_have_rows and all(letters[0] == "n" for letters in result_axes):
        args = [
            _fold_batch(a, m, size) if r else a
            for a, m, r in zip(args, batched, has_rows, strict=True)
        ]
        out = jax.tree.leaves(_bind(program, *jax.tree.unflatten(tree, args)))
        out = [a.reshape((size, a.shape[0] // size) + a.shape[1:]) for a in out]
    else:
        out = _one_by_one(args, batched, program, tree)
    return out, [0] * len(out)


def _fold_batch(array: jax.Array, batched: bool, size: int) -> jax.Array:
    """Returns [size·N, …] from [size, N, …], or from [N, …] by repetition."""
    if not batched:
        array = jnp.broadcast_to(array, (size, *array.shape))
    return array.reshape((array.shape[0] * array.shape[1],) + array.shape[2:])


def _one_by_one(args, batched, program, tree):
    """Runs the elements of a batch one after another."""

    def function(elements):
        remaining = iter(elements)
        full = [next(remaining) if m else a for a, m in zip(args, batched, strict=True)]
        return jax.tree.leaves(_bind(program, *jax.tree.unflatten(tree, full)))

    return lax.map(function, [a for a, m in zip(args, batched, strict=True) if m])


def _evaluate_whole(*args, jaxpr, program, tree, result_axes):
    """Computes the function where devices cannot be made to share it.

    Compilers for TPU do not know custom partitioning (JAX issue 38196); shard_map is
    the way there, where the sharding is known, and `over_mesh`.
    """
    del result_axes
    if program.fold.config.shards is not None:
        return jaxpr_as_fun(jaxpr)(*args)
    return _flat(program, tree)(*args)


def _lowering(function):
    """Returns how the function lowers where its kernel, if it has one, can run."""
    lower = mlir.lower_fun(function, multiple_results=True)

    def rule(ctx, *args, jaxpr, program, **params):
        # A kernel in an interpreter has effects, and runs anywhere.
        if program.platform is not None and not jaxpr.effects:
            implementation = program.fold.config.implementation
            registry.check_platforms(implementation, ctx.module_context.platforms)
        return lower(ctx, *args, jaxpr=jaxpr, program=program, **params)

    return rule


_primitive.def_impl(_evaluate)
_primitive.def_effectful_abstract_eval(
    lambda *args, jaxpr, **params: (jaxpr.out_avals, jaxpr.effects)
)
mlir.register_lowering(_primitive, _lowering(_evaluate))
mlir.register_lowering(_primitive, _lowering(_evaluate_whole), platform="tpu")
ad.primitive_jvps[_primitive] = _jvp
batching.primitive_batchers[_primitive] = _batch


def _shared(
    program: _Program,
    function: Callable[..., list[jax.Array]],
    tree: Any,
    axes: list[str],
    result_axes: tuple[str, ...],
) -> Callable[..., list[jax.Array]]:
    """Returns a function of flat arrays that devices share.

    Args:
      program: the function of a fold.
      function: the same of flat arguments and of flat results.
      tree: the structure of its arguments.
      axes: the axes of its flat arguments.
      result_axes: the axes of its flat results.

    Returns:
      A function that returns a list of arrays; for one device it is the given one.
    """

    def partition(mesh, arg_shapes, result_shapes):
        del result_shapes
        shardings = [shape.sharding for shape in arg_shapes]
        if not all(isinstance(s, NamedSharding) for s in shardings):
            # Without a mesh there are no axes to name: every device does it all.
            kind = type(shardings[0])
            whole = kind.get_replicated(tuple(shardings[0]._device_assignment))
            results, arguments = [whole] * len(result_axes), (whole,) * len(axes)
            return mesh, _flat(program, tree), results, arguments
        shapes = [shape.shape for shape in arg_shapes]
        mesh_axes_of = _sharded_axes(mesh, axes, shapes, [s.spec for s in shardings])
        if not program.has_shards_of_classes:
            mesh_axes_of["v"] = ()
        local = _of_shards(program, tree, result_axes, mesh_axes_of)

        def place(names):
            return [NamedSharding(mesh, _named(a, mesh_axes_of)) for a in names]

        return mesh, local, place(result_axes), tuple(place(axes))

    shared = custom_partitioning(function)
    # In the order in which the rule meets them.
    letters = list(dict.fromkeys("".join([*axes, *result_axes])))
    summed = [f for f in "nv" if f in letters and f not in "".join(result_axes)]
    shared.def_partition(
        partition,
        sharding_rule=f"{_rule(axes)} -> {_rule(result_axes)}",
        reduction_factors=tuple(summed),
        need_replication_factors=tuple(f for f in letters if f not in "nv"),
    )
    return shared


def _rule(axes: list[str] | tuple[str, ...]) -> str:
    return ", ".join(" ".join(letters) for letters in axes)


def _sharded_axes(
    mesh: Mesh,
    axes: list[str],
    shapes: list[tuple[int, ...]],
    specs: list[PartitionSpec],
) -> dict[str, tuple[str, ...]]:
    """Returns the mesh axes of rows and classes: those that the first array has.

    Rows come first: an axis that shards both shards the rows. What does not divide
    evenly is not sharded.
    """
    chosen: dict[str, tuple[str, ...]] = {"n": (), "v": ()}
    taken: set[str] = set()
    for letter in "nv":
        for letters, shape, spec in zip(axes, shapes, specs, strict=True):
            if chosen[letter] or letter not in letters:
                continue
            dim = letters.index(letter)
            names = spec[dim] if dim < len(spec) else None
            names = (names,) if isinstance(names, str) else tuple(names or ())
            names = tuple(name for name in names if name not in taken)
            shards = 1
            for name in names:
                shards *= mesh.shape[name]
            if shape[dim] % shards == 0:
                chosen[letter] = names
        taken.update(chosen[letter])
    return chosen


def _missing(letters: str, axes: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Returns the mesh axes of what a result does not have."""
    return sum((names for letter, names in axes.items() if letter not in letters), ())


def _named(letters: str, axes: dict[str, tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(axes.get(letter) or None for letter in letters))


def _of_shards(
    program: _Program,
    tree: Any,
    result_axes: tuple[str, ...],
    axes: dict[str, tuple[str, ...]],
) -> Callable[..., list[jax.Array]]:
    """Returns the function of one shard's flat arrays, partial sums added up."""
    local = _flat(program.over(axes["v"]), tree)

    def call(*flat):
        out = local(*flat)
        if not program.is_partial:
            return out
        missing = [_missing(letters, axes) for letters in result_axes]
        return [
            lax.psum(a, over) if over else a
            for a, over in zip(out, missing, strict=True)
        ]

    return call


def _mapped(
    program: _Program,
    shards: mesh_axes.Shards,
    tree: Any,
    axes: list[str],
    result_axes: tuple[str, ...],
) -> Callable[..., list[jax.Array]]:
    """Returns a function of flat arrays that devices share by shard_map.

    That is the way wherever the sharding is known when the function is traced; it
    serves every platform.
    """

    def mapped(*flat):
        sizes = {}
        for letters, array in zip(axes, flat, strict=True):
            sizes.update(zip(letters, array.shape, strict=True))
        names = {"n": shards.rows, "v": ()}
        if program.has_shards_of_classes:
            names["v"] = shards.classes
        for letter, over in names.items():
            count = math.prod(shards.mesh.shape[name] for name in over)
            if sizes.get(letter, 0) % count:
                names[letter] = ()
        function = _of_shards(program, tree, result_axes, names)
        used = frozenset(names["n"] + names["v"])
        if not used:
            return function(*flat)
        return jax.shard_map(
            function,
            mesh=shards.mesh,
            in_specs=tuple(_named(letters, names) for letters in axes),
            out_specs=[_named(letters, names) for letters in result_axes],
            axis_names=used,
            check_vma=False,
        )(*flat)

    # Without jit around it JAX runs a mapped function for all axes of a mesh alone.
    return jax.jit(mapped)
