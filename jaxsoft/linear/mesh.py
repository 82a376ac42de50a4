"""Functions of this room for arrays that live on a mesh of devices."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsoft._core import checks, mesh_axes
from jaxsoft.linear.arguments import MeshAxes
from jaxsoft.linear.lora import LoRA
from jaxsoft.logits.filters import Filters
from jaxsoft.logits.sampling import BoundedTopK, check_filter, most_of

__all__ = ["over_mesh"]

# What the first axis of an argument runs over; kernels have a layout.
_TOKENS = (
    "hidden",
    "labels",
    "class_ids",
    "class_bits",
    "weights",
    "student_hidden",
    "teacher_hidden",
    "teacher_ids",
    "teacher_log_probs",
)
_CLASSES = ("bias", "student_bias", "teacher_bias", "class_mask", "values")
_KERNELS = ("kernel", "student_kernel", "teacher_kernel")
_SCALES = tuple(f"{name}_scale" for name in _KERNELS)
_LORAS = ("lora", "student_lora", "teacher_lora")
# The parts of adapters, whose names say where they are from.
_PARTS = {f"{name}_{field}": (name, field) for name in _LORAS for field in LoRA._fields}
# Of tokens where they are arrays.
_NUMBERS = ("temperature", *Filters._fields)


def over_mesh(
    function: Callable[..., Any],
    mesh: Mesh,
    *,
    vocab_axis: MeshAxes = None,
    token_axes: MeshAxes = (),
) -> Callable[..., Any]:
    """Wraps a `linear_*` function so that a mesh of devices shares its work.

    The classes of kernels, biases, masks and values are sharded over `vocab_axis`, the
    first axis of hidden states, labels and all that belongs to tokens over
    `token_axes`: by `jax.shard_map`, with each device's own tiles, and collectives of
    a few numbers a token between them.

    Args:
      function: one of jaxsoft's `linear_*` functions.
      mesh: the devices.
      vocab_axis: the mesh axis, or axes, of the classes; None leaves them whole.
      token_axes: the mesh axes of the tokens; () leaves them whole. An axis may be
        both, as where items and users of a batch are sharded alike: the classes are
        then gathered over it.

    Returns:
      A function with the arguments of `function` but the two named here, for whole
      arrays, wherever they live. Its results equal those of one device but for
      rounding; reductions are over all tokens.

    Raises:
      TypeError: if `function` is not one of the linear room's.
      ValueError: if an axis is not the mesh's.

    Notes:
      A number of classes or tokens that the mesh does not divide is padded: padding
      classes are masked, and padding tokens weigh nothing. That copies the kernel; a
      kernel padded once by its owner, with a `class_mask`, is not copied. Under
      `jax.jit` alone, sharded arguments are enough where both divide evenly.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import linear_cross_entropy, over_mesh
      >>> mesh = jax.make_mesh((1,), ("vocab",))
      >>> loss = over_mesh(linear_cross_entropy, mesh, vocab_axis="vocab")
      >>> hidden, kernel = jnp.ones((4, 8)), jnp.zeros((8, 1000))
      >>> print(f"{jax.jit(loss)(hidden, kernel, jnp.arange(4)):.4f}")
      6.9078

    References:
      Shoeybi et al., Megatron-LM, arXiv:1909.08053 (vocabulary-parallel
      cross-entropy).
    """
    parameters = inspect.signature(function).parameters
    has_axes = {"vocab_axis", "token_axes"} <= parameters.keys()
    if not has_axes or "logits" in parameters:
        raise TypeError(
            "`function` must be one of jaxsoft's linear_* functions, which take "
            f"vocab_axis and token_axes, got {function!r}."
        )
    classes, tokens = mesh_axes.names(vocab_axis), mesh_axes.names(token_axes)
    for name, axes in (("vocab_axis", classes), ("token_axes", tokens)):
        for axis in axes:
            if axis not in mesh.axis_names:
                raise ValueError(
                    f"`{name}` must name axes of the mesh, {mesh.axis_names}, "
                    f"got {axis!r}."
                )

    # Over an axis of both, a device needs all classes for its own tokens.
    classes = tuple(axis for axis in classes if axis not in tokens)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(function).bind(*args, **kwargs)
        for name in ("vocab_axis", "token_axes"):
            if name in given.arguments:
                raise TypeError(f"`{name}` must be given to over_mesh, not here.")
        return _call(function, mesh, classes, tokens, given.arguments)

    return wrapped


def _call(function, mesh, classes, tokens, arguments: dict[str, Any]) -> Any:
    """Pads, shards, calls, and cuts the padding off."""
    for name in _LORAS:
        if isinstance(arguments.get(name), LoRA):
            fields = arguments.pop(name)._asdict()
            arguments |= {f"{name}_{field}": value for field, value in fields.items()}
    known = (*_TOKENS, *_CLASSES, *_KERNELS, *_SCALES, *_PARTS)
    arrays = {
        name: jnp.asarray(value)
        for name, value in arguments.items()
        if name in known and value is not None
    }
    if "temperature" in arguments:
        # What is known here is not where the function runs.
        checks.temperature(arguments["temperature"], jnp.dtype(jnp.float32))
    for name in ("key", "temperature"):
        if hasattr(arguments.get(name), "dtype"):
            arrays[name] = jnp.asarray(arguments[name])
    # A filter of all tokens stays as known as it is, and of others what draws go by.
    for name in Filters._fields:
        if np.ndim(arguments.get(name, 0)):
            numbers = check_filter(name, arguments[name], jnp.result_type(float))
            assert numbers is not None
            arrays[name] = numbers
    most = most_of(arguments["top_k"]) if "top_k" in arrays else None
    static = {name: v for name, v in arguments.items() if name not in arrays}
    axes = {
        name: _axis_of_classes(name, array.ndim, static)
        for name, array in arrays.items()
    }

    def call(**options: Any) -> Any:
        parts: dict[str, dict[str, Any]] = {}
        for part, (name, field) in _PARTS.items():
            if part in options:
                parts.setdefault(name, {})[field] = options.pop(part)
        adapters = {name: LoRA(**fields) for name, fields in parts.items()}
        if "top_k" in arrays:
            options["top_k"] = BoundedTopK(options["top_k"], most)
        return function(**options, **adapters)

    hidden = arrays.get("hidden", arrays.get("student_hidden"))
    kernel = "kernel" if "kernel" in arrays else "student_kernel"
    if hidden is None or hidden.ndim < 1 or arrays[kernel].ndim != 2:
        return call(**arguments)
    tau = arrays.get("temperature")
    if tau is not None and tau.ndim:
        rows = checks.row_temperature(tau, tau.dtype, hidden.shape[:-1])
        arrays["temperature"] = jnp.asarray(rows)
    for name in arrays.keys() & Filters._fields:
        arrays[name] = checks.row_numbers(name, arrays[name], hidden.shape[:-1])
    count = hidden.shape[0] if hidden.ndim > 1 else None
    # A token alone is on all devices, which must not add it up.
    tokens = () if count is None else tokens
    number = arrays[kernel].shape[axes[kernel] or 0]
    for name in arrays.keys() & set(_SCALES):
        if (scale := arrays[name]).ndim:
            # A block of classes, or all of them, may lie on several shards.
            axis = axes[name] or 0
            repeats = number // max(scale.shape[axis], 1)
            arrays[name] = jnp.repeat(scale, repeats, axis)
    # A ShapeDtypeStruct has no sharding, whatever the array's type says.
    types = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}
    shapes = jax.eval_shape(lambda a: call(**a, **static), types)
    more = -number % _shards(mesh, classes)
    if more and "class_mask" not in arrays:
        arrays["class_mask"], axes["class_mask"] = jnp.ones(number, jnp.bool_), 0
    rest = -count % _shards(mesh, tokens) if count is not None else 0
    if rest and "weights" not in arrays and _takes(function, "weights"):
        arrays["weights"] = jnp.ones(hidden.shape[:-1], jnp.bool_)
        axes["weights"] = None
    specs = {}
    for name, array in arrays.items():
        spec: list[Any] = [None] * array.ndim
        if (axis := axes[name]) is not None:
            arrays[name] = _pad(array, axis, more)
            spec[axis] = classes or None
        elif count is not None and _is_tokens(name, array):
            # Each as a token's that there is.
            arrays[name] = _pad(array, 0, rest, name in ("temperature", "top_k"))
            spec[0] = tokens or None
        specs[name] = PartitionSpec(*spec)

    def local(arrays):
        return call(
            **arrays,
            **static,
            vocab_axis=mesh_axes.Classes(classes, number) if classes else None,
            token_axes=tokens,
        )

    def out_spec(shape):
        is_tokens = count is not None and shape.ndim > 0
        return PartitionSpec(tokens or None) if is_tokens else PartitionSpec()

    if mesh.abstract_mesh.explicit_axes:
        # There the sharding is part of an array's type, and must match.
        arrays = jax.reshard(arrays, {n: _explicit(mesh, s) for n, s in specs.items()})
    out_specs = jax.tree.map(out_spec, shapes)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out_specs)
    out = mapped(arrays)
    if not rest:
        return out
    if mesh.abstract_mesh.explicit_axes:
        # What these axes do not divide is whole on each device.
        out = jax.reshard(out, NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(lambda a, s: a[:count] if s.ndim else a, out, shapes)


def _axis_of_classes(name: str, rank: int, options: dict[str, Any]) -> int | None:
    """Returns the axis of an argument that runs over classes, if it has one."""
    if name in _CLASSES:
        return 0
    if name in _PARTS:
        return rank - 1 if _PARTS[name][1] == "b" else None
    if name not in (*_KERNELS, *_SCALES) or not rank:
        return None
    if rank == 1:
        return 0
    prefix = name.removesuffix("_scale")
    return 1 if options.get(f"{prefix}_layout", "hv") == "hv" else 0


def _explicit(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """Returns the part of a sharding that an array's type says."""
    explicit = mesh.abstract_mesh.explicit_axes
    entries = [
        tuple(name for name in mesh_axes.names(entry) if name in explicit) or None
        for entry in spec
    ]
    return NamedSharding(mesh, PartitionSpec(*entries))


def _is_tokens(name: str, array: jax.Array) -> bool:
    if name in _PARTS:
        return _PARTS[name][1] == "ids"
    return name in _TOKENS or (name in _NUMBERS and array.ndim > 0)


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _shards(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes], dtype=np.int64))


def _pad(array: jax.Array, axis: int, more: int, value: int = 0) -> jax.Array:
    """Pads the end of an axis."""
    if not more:
        return array
    widths = [(0, more if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, widths, constant_values=value)
