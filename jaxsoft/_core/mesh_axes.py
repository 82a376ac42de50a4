"""Mesh axes: inside `jax.shard_map`, and those that are part of an array's type.

Inside `jax.shard_map` this says what values vary over, and how shards agree. Every
shard of the classes holds as many; those of shard i follow those of shard i - 1. With
no axes every function of shards here is the identity.

Axes of a mesh are Auto, Manual (inside shard_map) or Explicit. Over Explicit axes an
array's sharding is part of its type, and every operation says how its result is
sharded. `accepts_explicit` makes a function of arrays of such types from one that is
written for Auto axes, where the compiler shares the work.
"""

import contextlib
import contextvars
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

__all__ = [
    "Classes",
    "Shards",
    "accepts_explicit",
    "add",
    "check_axes",
    "check_token_axes",
    "explicit_shards",
    "like",
    "lowest",
    "lowest_argmax",
    "maximum",
    "may_be_shared",
    "names",
    "offset",
    "once",
    "size",
    "type_of",
    "varying_axes",
    "within",
]

Axes = tuple[str, ...]
Tree = TypeVar("Tree")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


def varying_axes(array: Any) -> frozenset[str]:
    """Returns the mesh axes that an array, or one of its type, varies over.

    Outside shard_map there are none.
    """
    aval = array if hasattr(array, "manual_axis_type") else jax.typeof(array)
    return frozenset(aval.manual_axis_type.varying)


def may_be_shared(*arrays: Any) -> bool:
    """Tells whether devices may share arrays in a way that nobody knows while tracing.

    That is plain `jax.jit` in a process of several devices, outside `jax.shard_map`:
    XLA gathers whatever a loop slices along an axis that they share.
    """
    return jax.device_count() > 1 and not any(map(varying_axes, arrays))


def like(tree: Tree, reference: object) -> Tree:
    """Makes every array of `tree` vary over all axes that any of `reference` does.

    A loop's carry must start with the type that it ends with. For an argument the
    transpose of this is a sum over the mesh axes: what shared parameters need.

    Args:
      tree: a pytree of arrays.
      reference: a pytree of arrays.

    Returns:
      `tree`, the same object outside shard_map.
    """
    wanted = frozenset().union(*map(varying_axes, jax.tree.leaves(reference)))
    if not wanted:
        return tree
    return jax.tree.map(lambda array: vary(array, wanted), tree)


def vary(array: jax.Array, over: Collection[str]) -> jax.Array:
    """Makes an array vary over mesh axes."""
    missing = tuple(sorted(set(over) - varying_axes(array)))
    return lax.pcast(array, missing, to="varying") if missing else array


def type_of(
    reference: jax.Array, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.ShapeDtypeStruct:
    """Returns the type of a result that varies over the mesh axes of an array."""
    axes = jax.typeof(reference).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


class Classes(NamedTuple):
    """Mesh axes of classes whose last shards have padding; see `over_mesh`.

    Attributes:
      axes: the mesh axes.
      number: V, without the padding.
    """

    axes: Axes
    number: int


def names(value: "str | Sequence[str] | Classes | None") -> Axes:
    """Returns mesh axes, given as one or several, as a tuple."""
    if isinstance(value, Classes):
        return value.axes
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def check_axes(name: str, value: "str | Sequence[str] | Classes | None") -> Axes:
    """Returns mesh axes as a tuple, which must be those of an enclosing shard_map."""
    axes = names(value)
    for axis in axes:
        try:
            index = lax.axis_index(axis)
        except NameError:
            raise ValueError(
                f"`{name}` must name axes of an enclosing jax.shard_map, got "
                f"{axis!r}. Under plain jit leave it out: sharded arguments are "
                "enough."
            ) from None
        if axis not in varying_axes(index):
            raise ValueError(
                f"`{name}` must be used with shard_map's check_vma=True, got "
                f"{axis!r} without it: gradients would be scaled or left unsummed. "
                "Use jaxsoft.over_mesh, or leave check_vma at its default."
            )
    return axes


def check_token_axes(
    token_axes: "str | Sequence[str] | None",
    vocab_axis: "str | Sequence[str] | Classes | None",
) -> Axes:
    """Returns the mesh axes of tokens, which must not be axes of classes too."""
    both = [name for name in names(token_axes) if name in names(vocab_axis)]
    if both:
        raise ValueError(
            "`token_axes` must not share a mesh axis with `vocab_axis`, got "
            f"{both[0]!r} in both: a device would have its own tokens' logits of its "
            "own classes alone. jaxsoft.over_mesh takes both, and gathers the classes."
        )
    return check_axes("token_axes", token_axes)


def size(axes: Axes) -> int:
    """Returns the number of shards."""
    return math.prod(lax.axis_size(axis) for axis in axes)


def offset(axes: Axes, number: int) -> jax.Array | int:
    """Returns the first of this shard's things, if each shard has `number` of them."""
    return lax.axis_index(axes) * number if axes else 0


def maximum(values: jax.Array, axes: Axes) -> jax.Array:
    """Returns the largest of the shards' values, NaN where any shard's is NaN.

    No gradient flows through it.
    """
    if not axes:
        return values
    values = lax.stop_gradient(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return lax.pmax(values, axes)
    # XLA's own maximum of devices' values may leave NaN out.
    is_nan = jnp.isnan(values)
    both = jnp.stack([jnp.where(is_nan, -jnp.inf, values), is_nan.astype(values.dtype)])
    largest, any_nan = lax.pmax(both, axes)
    return jnp.where(any_nan > 0, jnp.nan, largest)


def lowest(values: jax.Array, axes: Axes) -> jax.Array:
    """Returns the smallest of the shards' values."""
    return lax.pmin(values, axes) if axes else values


def add(sums: dict[str, jax.Array], axes: Axes) -> dict[str, jax.Array]:
    """Returns the sums of [N, K] arrays over the shards, in one collective."""
    if not axes:
        return sums
    total = lax.psum(jnp.concatenate(list(sums.values()), axis=1), axes)
    widths = [a.shape[1] for a in sums.values()]
    starts = [sum(widths[:i]) for i in range(1, len(widths))]
    return dict(zip(sums, jnp.split(total, starts, axis=1), strict=True))


def once(values: jax.Array, axes: Axes) -> jax.Array:
    """Returns what every shard has on the first shard, and 0 on the others."""
    if not axes:
        return values
    return jnp.where(lax.axis_index(axes) == 0, values, 0)


def lowest_argmax(
    argmax: jax.Array, reached: jax.Array, number: int, axes: Axes
) -> jax.Array:
    """Returns the lowest class, of all shards, whose logit is the largest.

    Args:
      argmax: the class of this shard with its largest logit, counted from its first.
      reached: whether that is the largest logit of all shards.
      number: of the classes of a shard.
      axes: the mesh axes of the classes.
    """
    if not axes:
        return argmax
    none = jnp.iinfo(jnp.int32).max
    best = lowest(jnp.where(reached, argmax + offset(axes, number), none), axes)
    # NaN logits equal no maximum.
    return jnp.where(best == none, 0, best)


class Shards(NamedTuple):
    """How arrays are sharded, where their types said so.

    Attributes:
      mesh: its Explicit axes are Auto here.
      rows: the mesh axes of the rows.
      classes: the mesh axes of the classes, none of them one of the rows.
    """

    mesh: AbstractMesh
    rows: Axes
    classes: Axes

    def count(self, axes: Axes) -> int:
        """Returns how many shards some mesh axes make."""
        return math.prod(self.mesh.shape[name] for name in axes)


_shards: contextvars.ContextVar[Shards | None] = contextvars.ContextVar(
    "shards", default=None
)


def explicit_shards() -> Shards | None:
    """Returns how the arrays of the public function that is running are sharded."""
    return _shards.get()


def accepts_explicit(
    rows: str,
    *,
    kernel: str | None = None,
    axis: int | str | None = None,
    has_features: bool = True,
    whole: int | None = None,
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Lets a public function take arrays that are sharded over Explicit mesh axes.

    The function runs with these axes Auto; then its results get the sharding of the
    rows that they have. Without Explicit axes it is called as it is.

    Args:
      rows: the name of the argument that has all rows.
      kernel: the name of the [H, V] argument that the last axis of `rows` is
        contracted with, or None.
      axis: the class axis of `rows` or the name of the argument that gives it; None
        where its last axis holds features.
      has_features: whether, without a class axis, the last axis of `rows` holds
        features; False where all its axes are rows.
      whole: the place in the result of what is not sharded, whatever its shape.

    Returns:
      A decorator.

    Raises:
      ValueError: by the decorated function, if both contracted axes are sharded, since
        JAX's own products refuse that too.
    """

    def decorate(function: Callable[Parameters, Result]):
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            leaves, tree = jax.tree.flatten((args, kwargs))
            mesh = _explicit_mesh(leaves)
            if mesh is None:
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            options = given.arguments
            shape, spec = jnp.shape(options[rows]), _spec(options[rows])
            class_axis = options[axis] if isinstance(axis, str) else axis
            shards = _shards_of(mesh, options, rows, kernel, class_axis)
            # Inside someone's shard_map shards meet as its caller says.
            known = None if mesh.manual_axes else shards
            with jax.sharding.use_abstract_mesh(shards.mesh), _sharded(known):
                leaves = [_reshard(leaf, shards.mesh, ()) for leaf in leaves]
                args, kwargs = jax.tree.unflatten(tree, leaves)
                result = function(*args, **kwargs)

            def typed(leaf):
                of_leaf = _result_spec(
                    jnp.shape(leaf), shape, spec, class_axis, has_features
                )
                return _reshard(leaf, mesh, of_leaf)

            if whole is None:
                return jax.tree.map(typed, result)
            parts: list[Any] = list(cast("tuple", result))
            replicated = functools.partial(_reshard, mesh=mesh, spec=())
            for place, part in enumerate(parts):
                to = replicated if place == whole else typed
                parts[place] = jax.tree.map(to, part)
            return cast("Result", tuple(parts))

        return wrapped

    return decorate


def _explicit_mesh(leaves: Sequence[object]) -> AbstractMesh | None:
    """Returns the mesh whose Explicit axes are part of types here, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh if mesh.explicit_axes else None
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if not mesh.empty and mesh.explicit_axes:
                return mesh
    return None


def _shards_of(mesh, options, rows, kernel, class_axis) -> Shards:
    """Returns how rows and classes are sharded; see `accepts_explicit`."""
    spec = _spec(options[rows])
    features = spec[-1] if spec else None
    classes = ()
    if kernel is not None:
        kernel_spec = _spec(options[kernel])
        # The kernel's layout has the prefix of its name.
        layout = options.get(f"{kernel}_layout", "hv")
        if len(kernel_spec) == 2:
            if layout != "hv":
                kernel_spec = kernel_spec[::-1]
            contracted, over_classes = kernel_spec
            if features is not None and contracted is not None:
                raise ValueError(
                    f"`{rows}` and `{kernel}` must not both be sharded over the "
                    f"features that their product sums, got {features!r} and "
                    f"{contracted!r}: jax.reshard one of them, or call "
                    "jaxsoft.over_mesh(...), which does."
                )
            classes = names(over_classes)
    other = (-1 if class_axis is None else class_axis) % max(len(spec), 1)
    over_rows = [
        name for i, entry in enumerate(spec) if i != other for name in names(entry)
    ]
    auto = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
    remaining = tuple(name for name in classes if name not in over_rows)
    return Shards(auto, tuple(over_rows), remaining)


def _spec(array: ArrayLike) -> tuple[str | Axes | None, ...]:
    """Returns the mesh axes of each axis of an array, by its type."""
    if not isinstance(array, jax.Array):
        return (None,) * jnp.ndim(array)
    spec = jax.typeof(array).sharding.spec
    return tuple(spec) + (None,) * (array.ndim - len(spec))


def _result_spec(
    shape, rows_shape, spec, class_axis, has_features
) -> tuple[str | Axes | None, ...]:
    """Returns the sharding of a result: that of the rows which it has."""
    if class_axis is None:
        leading = len(rows_shape) - has_features
        if leading > 0 and shape[:leading] == rows_shape[:leading]:
            return (*spec[:leading], *(None,) * (len(shape) - leading))
        return (None,) * len(shape)
    if shape == rows_shape:
        return spec
    class_axis %= len(rows_shape)
    before, after = spec[:class_axis], spec[class_axis + 1 :]
    wanted = (*rows_shape[:class_axis], *rows_shape[class_axis + 1 :])
    if shape == wanted:
        return (*before, *after)
    if len(shape) == len(rows_shape):
        without = (*shape[:class_axis], *shape[class_axis + 1 :])
        if without == wanted:
            return (*before, None, *after)
    return (None,) * len(shape)


def _reshard(leaf: object, mesh: AbstractMesh, spec: tuple) -> object:
    """Returns an array with a sharding in its type; anything else as it is."""
    if not isinstance(leaf, jax.Array):
        return leaf
    entries = spec if spec else (None,) * leaf.ndim
    return jax.reshard(leaf, NamedSharding(mesh, PartitionSpec(*entries)))


@contextlib.contextmanager
def within(shards: Shards | None) -> Iterator[None]:
    """Goes on with a public function's work, as in a rule of its derivative.

    Args:
      shards: what `explicit_shards` returned when the function was called.
    """
    if shards is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(shards.mesh), _sharded(shards):
        yield


@contextlib.contextmanager
def _sharded(shards: Shards | None) -> Iterator[None]:
    token = _shards.set(shards)
    try:
        yield
    finally:
        _shards.reset(token)
