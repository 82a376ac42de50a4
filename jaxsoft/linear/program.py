"""The primitive that folds are run by: vmap, derivatives, devices that share the work.

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
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsoft._core import mesh_axes, registry
from jaxsoft._core.defaults import Default
from jaxsoft.linear.arguments import axes_of
from jaxsoft.linear.kept import stored_dtype
from jaxsoft.linear.plans import Plan

__all__ = ["Program", "by_moving", "bind", "defaults_in", "plans_in"]

# The letters of axes that lie along the classes: those themselves, and what is kept of
# some of them and of their tiles.
_OF_CLASSES = "vwp"

_GPUS = ("cuda", "rocm")


@dataclasses.dataclass(frozen=True)
class Program(abc.ABC):
    """One of the functions that a fold consists of.

    Attributes:
      fold: the fold.
      shards: how many shards of the classes devices share, where the program was made
        for all of them.
      is_guarded: whether the devices may lie otherwise than for an earlier program.
    """

    fold: Any
    shards: int = dataclasses.field(default=1, kw_only=True)
    is_guarded: bool = dataclasses.field(default=False, kw_only=True)

    @abc.abstractmethod
    def call(self, arrays: Any, *others: Any) -> Any:
        """Computes the function."""

    def is_partial(self, result: Any) -> Any:
        """Returns, in the structure of a result, what shards still have to add up."""
        return jax.tree.map(lambda _: False, result)

    def axes(self, arrays: Any, *others: Any) -> Any:
        """Returns the axes of the arguments, in their structure."""
        return (self.fold.axes(arrays), *axes_of(others))

    def result_axes(self, arrays: Any, result: Any) -> Any:
        """Returns the axes of the result, in its structure."""
        del arrays
        return axes_of(result)

    @property
    def platform(self) -> str | None:
        """The one platform that the function has a kernel for; None for any."""
        return registry.platform_of(self.fold.config.implementation)

    @property
    def has_shards_of_classes(self) -> bool:
        """Whether it can run for one shard of the classes; stored logits cannot."""
        return self.fold.config.implementation != "reference"

    def over(self, vocab_axes: tuple[str, ...], shards: int) -> Self:
        """Returns the same function with its classes sharded over mesh axes."""
        fold = self.fold.over(vocab_axes)
        return dataclasses.replace(self, fold=fold, shards=shards)

    def differentiable(self, moving: Any, *others: Any) -> Callable[..., Any]:
        """Returns the function to differentiate, given which arguments move."""
        del moving, others
        # Inside a derivative it is XLA's loops that JAX differentiates.
        return dataclasses.replace(self, fold=self.fold.plain()).call

    def batched(self, args: tuple[Any, ...], are: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the arguments to take under vmap.

        Args:
          args: the arguments.
          are: in their structure, whether each is batched.
        """
        del are
        return args

    def on_gpu(self) -> Self:
        """Returns the same function for GPUs."""
        return self

    def default(self, arrays: Any, *others: Any) -> Default | None:
        """Returns the kernel that a TPU takes unasked; None where XLA's loops run."""
        del arrays, others
        return None

    def without(self, used: Sequence[bool]) -> "Program | None":
        """Returns a program of the first results alone; None if there is none cheaper.

        Args:
          used: which of the flat results are used.
        """
        del used
        return None

    def plan(self, arrays: Any, *others: Any) -> Plan | None:
        """Returns the plan that a derivative follows; None where there is none."""
        del arrays, others
        return None


def bind(program: Program, *args: Any) -> Any:
    """Calls a function of a fold through the primitive."""
    flat, tree = jax.tree.flatten(args)
    params, result = _prepare(program, flat, tree)
    out = _primitive.bind(*flat, **params)
    return jax.tree.unflatten(jax.tree.structure(result), out)


def plans_in(jaxpr: Any, platform: str) -> Iterator[Plan]:
    """Yields the plans of the derivatives in a program that JAX has traced.

    Args:
      jaxpr: a `Jaxpr`.
      platform: where it runs, as `jax.lax.platform_dependent` has it.
    """
    for program, args in _programs_in(jaxpr):
        program = program.on_gpu() if platform in _GPUS else program
        plan = program.plan(*args)
        yield from () if plan is None else (plan,)


def defaults_in(jaxpr: Any) -> Iterator[Default]:
    """Yields the kernels that a program takes unasked on the TPU it is compiled for.

    Args:
      jaxpr: a `Jaxpr`.
    """
    for program, args in _programs_in(jaxpr):
        default = program.default(*args)
        yield from () if default is None else (default,)


def _programs_in(jaxpr: Any) -> Iterator[tuple[Program, Any]]:
    """Yields the programs of a `Jaxpr`, and the types of their arguments."""
    for equation in jaxpr.eqns:
        if equation.primitive is _primitive:
            avals = [var.aval for var in equation.invars]
            args = jax.tree.unflatten(equation.params["tree"], avals)
            yield equation.params["program"], args
            continue
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from _programs_in(inner)


def _prepare(program: Program, flat: Sequence[Any], tree: Any) -> tuple[dict, Any]:
    """Returns the primitive's parameters, and the result's shapes."""
    args = jax.tree.unflatten(tree, flat)

    def call(*flat):
        return program.call(*jax.tree.unflatten(tree, flat))

    jaxpr, result = jax.make_jaxpr(call, return_shape=True)(*flat)
    axes = jax.tree.leaves(program.axes(*args))
    result_axes = tuple(jax.tree.leaves(program.result_axes(args[0], result)))
    # A kernel in an interpreter has effects: one device runs it, and in order.
    interpreted = program.platform is not None and jaxpr.effects
    shards = program.fold.config.shards
    if shards is not None:
        with jax.sharding.use_abstract_mesh(shards.mesh):
            shapes = [leaf.shape for leaf in jax.tree.leaves(result)]
            mapped = _mapped(program, shards, tree, axes, result_axes, shapes)
            jaxpr = jax.make_jaxpr(mapped)(*flat)
    elif not interpreted and not any(map(mesh_axes.varying_axes, flat)):
        # Outside shard_map XLA may have to share the function among devices.
        shared = _shared(program, jaxpr_as_fun(jaxpr), tree, axes, result_axes)
        jaxpr = jax.make_jaxpr(shared)(*flat)
    params = {
        "jaxpr": jaxpr,
        "program": program,
        "tree": tree,
        "result_axes": result_axes,
    }
    return params, result


def _flat(program: Program, tree: Any) -> Callable[..., list[jax.Array]]:
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
    of_moving, those = by_moving(function, tree, primals, moving)
    return jax.jvp(
        of_moving, those, [t for t in tangents if not isinstance(t, ad.Zero)]
    )


def by_moving(
    function: Callable[..., Any],
    tree: Any,
    flat: Sequence[jax.Array],
    moving: Sequence[bool],
) -> tuple[Callable[..., list[jax.Array]], list[jax.Array]]:
    """Returns a function of those arguments alone that move, and those.

    Args:
      function: of arguments whose structure is `tree`.
      tree: that structure.
      flat: the flat arguments.
      moving: which of them move.

    Returns:
      A function that returns flat results, and its arguments.
    """

    def of_moving(*those: jax.Array) -> list[jax.Array]:
        remaining = iter(those)
        args = [next(remaining) if m else a for a, m in zip(flat, moving, strict=True)]
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, args)))

    return of_moving, [a for a, m in zip(flat, moving, strict=True) if m]


def _batch(args, dims, *, jaxpr, program, tree, result_axes):
    """Folds the batch into the rows, or runs its elements one after another."""
    del jaxpr
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    batched = [d is not None for d in dims]
    args = [
        jnp.moveaxis(a, d, 0) if m else a
        for a, d, m in zip(args, dims, batched, strict=True)
    ]
    chosen = program.batched(
        jax.tree.unflatten(tree, args), jax.tree.unflatten(tree, batched)
    )
    of_args = {id(a): m for a, m in zip(args, batched, strict=True)}
    args, tree = jax.tree.flatten(chosen)
    batched = [of_args[id(a)] for a in args]
    axes = jax.tree.leaves(program.axes(*jax.tree.unflatten(tree, args)))
    has_rows = [letters[0] == "n" for letters in axes]
    # A batch becomes rows unless something has no rows, such as one dkernel an example.
    all_have_rows = all(r for r, m in zip(has_rows, batched, strict=True) if m)
    if all_have_rows and all(letters[0] == "n" for letters in result_axes):
        args = [
            _fold_batch(a, m, size) if r else a
            for a, m, r in zip(args, batched, has_rows, strict=True)
        ]
        out = jax.tree.leaves(bind(program, *jax.tree.unflatten(tree, args)))
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
        return jax.tree.leaves(bind(program, *jax.tree.unflatten(tree, full)))

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


def _evaluate_by_bits(*args, jaxpr, program, tree, result_axes):
    """Computes the function for CPUs, which convert all of what they slice."""
    is_kernel = program.platform is not None
    if is_kernel or all(stored_dtype(a.dtype) == a.dtype for a in args):
        return _evaluate(
            *args, jaxpr=jaxpr, program=program, tree=tree, result_axes=result_axes
        )
    program = dataclasses.replace(program, fold=program.fold.moving_bits())
    params, _ = _prepare(program, args, tree)
    return _evaluate(*args, **params)


def _evaluate_on_gpu(*args, jaxpr, program, tree, result_axes):
    """Computes the function for GPUs."""
    del result_axes
    on_gpu = program.on_gpu()
    if on_gpu is program:
        return jaxpr_as_fun(jaxpr)(*args)
    params, _ = _prepare(on_gpu, args, tree)
    return _evaluate(*args, **params)


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


def _lower_on_tpu(ctx, *args, program, tree, **params):
    """Lowers for TPUs, with the kernel for which there is evidence, if there is one."""
    if _runs_whole(ctx.module_context):
        default = program.default(*jax.tree.unflatten(tree, ctx.avals_in))
        if default is not None:
            fold = program.fold.by(default.implementation)
            program = dataclasses.replace(program, fold=fold)
    return _on_tpu(ctx, *args, program=program, tree=tree, **params)


def _runs_whole(context: mlir.ModuleContext) -> bool:
    """Whether one device runs all that is lowered: nobody can take a kernel apart."""
    axes = context.axis_context
    if tuple(context.platforms) != ("tpu",):
        return False
    if isinstance(axes, mlir.ShardingContext):
        return axes.num_devices == 1
    return isinstance(axes, mlir.SPMDAxisContext) and axes.manual_axes == frozenset(
        axes.mesh.axis_names
    )


def _without_unused(used: list[bool], *others):
    """Drops what nothing uses: all of it, or all but what is cheap alone."""
    # Newer versions of JAX tell in between which inputs are alive.
    *_, equation = others
    if not any(used) and not equation.effects:
        return [False] * len(equation.invars), None
    whole = [True] * len(equation.invars)
    params = equation.params
    program = params["program"].without(used)
    if program is None:
        return whole, equation
    avals = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, manual_axis_type=a.manual_axis_type)
        for a in (var.aval for var in equation.invars)
    ]
    params, _ = _prepare(program, avals, params["tree"])
    kept = equation.outvars[: len(params["result_axes"])]
    return whole, equation.replace(outvars=kept, params=params)


pe.dce_rules[_primitive] = _without_unused
_primitive.def_impl(_evaluate)
_primitive.def_effectful_abstract_eval(
    lambda *args, jaxpr, **params: (jaxpr.out_avals, jaxpr.effects)
)
mlir.register_lowering(_primitive, _lowering(_evaluate))
_on_tpu = _lowering(_evaluate_whole)
mlir.register_lowering(_primitive, _lower_on_tpu, platform="tpu")
mlir.register_lowering(_primitive, _lowering(_evaluate_by_bits), platform="cpu")
for _gpu in _GPUS:
    mlir.register_lowering(_primitive, _lowering(_evaluate_on_gpu), platform=_gpu)
ad.primitive_jvps[_primitive] = _jvp
batching.primitive_batchers[_primitive] = _batch


def _shared(
    program: Program,
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
        every = [*zip(axes, shapes, strict=True)]
        every += zip(result_axes, (r.shape for r in result_shapes), strict=True)
        mesh_axes_of = _that_divide(mesh.shape, mesh_axes_of, every)
        guarded = dataclasses.replace(program, is_guarded=True)
        local = _of_shards(guarded, tree, result_axes, mesh_axes_of, mesh.shape)

        def place(names):
            return [NamedSharding(mesh, _named(a, mesh_axes_of)) for a in names]

        return mesh, local, place(result_axes), tuple(place(axes))

    shared = custom_partitioning(function)
    # In the order in which the rule meets them.
    letters = list(dict.fromkeys("".join([*axes, *result_axes])))
    shareable = "n" + _OF_CLASSES
    summed = [f for f in shareable if f in letters and f not in "".join(result_axes)]
    shared.def_partition(
        partition,
        sharding_rule=f"{_rule(axes)} -> {_rule(result_axes)}",
        reduction_factors=tuple(summed),
        need_replication_factors=tuple(f for f in letters if f not in shareable),
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


def _that_divide(
    sizes: Mapping[str, int],
    axes: dict[str, tuple[str, ...]],
    arrays: list[tuple[str, tuple[int, ...]]],
) -> dict[str, tuple[str, ...]]:
    """Returns the mesh axes of all letters, without those that do not divide evenly.

    Args:
      sizes: of the mesh's axes.
      axes: the mesh axes of rows and classes.
      arrays: the letters and the shape of every array.
    """
    chosen = {"n": axes["n"]} | dict.fromkeys(_OF_CLASSES, axes["v"])
    for letter in chosen:
        shards = math.prod(sizes[name] for name in chosen[letter])
        for letters, shape in arrays:
            if letter in letters and shape[letters.index(letter)] % shards:
                alike = "n" if letter == "n" else _OF_CLASSES
                chosen |= dict.fromkeys(alike, ())
    return chosen


def _missing(letters: str, axes: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Returns the mesh axes of what a result does not have."""
    return sum((axes[letter] for letter in "nv" if letter not in letters), ())


def _named(letters: str, axes: dict[str, tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(axes.get(letter) or None for letter in letters))


def _of_shards(
    program: Program,
    tree: Any,
    result_axes: tuple[str, ...],
    axes: dict[str, tuple[str, ...]],
    sizes: Mapping[str, int],
) -> Callable[..., list[jax.Array]]:
    """Returns the function of one shard's flat arrays, partial sums added up."""
    shards = math.prod(sizes[name] for name in axes["v"])
    program = program.over(axes["v"], shards)

    def call(*flat):
        result = program.call(*jax.tree.unflatten(tree, flat))
        partial = jax.tree.leaves(program.is_partial(result))
        found = []
        for array, sums, letters in zip(
            jax.tree.leaves(result), partial, result_axes, strict=True
        ):
            over = _missing(letters, axes) if sums else ()
            found.append(_added(program, array, over) if over else array)
        return found

    return call


def _added(program: Program, array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Returns the sum of the shards' arrays over mesh axes.

    XLA for CPUs adds short floats up in float32. It ends the process where it finds
    more than a sum to rewrite: JAX writes a sharding beside it where another axis of
    the mesh is left to the compiler.
    """
    dtype = array.dtype
    if program.fold.config.moves_bits and stored_dtype(dtype) != dtype:
        array = array.astype(jnp.float32)
    return lax.psum(array, axes).astype(dtype)


def _mapped(
    program: Program,
    shards: mesh_axes.Shards,
    tree: Any,
    axes: list[str],
    result_axes: tuple[str, ...],
    result_shapes: list[tuple[int, ...]],
) -> Callable[..., list[jax.Array]]:
    """Returns a function of flat arrays that devices share by shard_map.

    That is the way wherever the sharding is known when the function is traced; it
    serves every platform.
    """

    def mapped(*flat):
        names = {"n": shards.rows, "v": ()}
        if program.has_shards_of_classes:
            names["v"] = shards.classes
        every = [(name, a.shape) for name, a in zip(axes, flat, strict=True)]
        every += zip(result_axes, result_shapes, strict=True)
        names = _that_divide(shards.mesh.shape, names, every)
        function = _of_shards(program, tree, result_axes, names, shards.mesh.shape)
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
