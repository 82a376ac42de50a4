"""Heads over class trees and class bands, as tensors and a form that JSON holds."""

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsoft.adaptive.class_bands import ClassBands
from jaxsoft.hierarchical.class_tree import ClassTree
from jaxsoft.hierarchical.consistency import check_bands, check_tree
from jaxsoft.hierarchical.levels import Canonical, Tables
from jaxsoft.nn import AdaptiveSoftmaxHead, HierarchicalSoftmaxHead
from jaxsoft.training.heads import Head
from jaxsoft.training.schemas import convert

__all__ = ["pack_head", "unpack_head"]

_PREFIX = "head_."
# The most levels of a tree, or bands, each of which is compiled on its own. A model's
# own tree has four more than a balanced one.
_MOST_LEVELS = 64

_Dtype: TypeAlias = Literal["float16", "bfloat16", "float32", "float64"]


@dataclass(frozen=True)
class _Tensor:
    tensor: str


@dataclass(frozen=True)
class _LevelFields:
    arity: int
    leaves: tuple[int, ...]
    nodes: tuple[int, ...]
    rank_slots: _Tensor | None = None
    node_slots: _Tensor | None = None
    slot_nodes: _Tensor | None = None
    node_firsts: _Tensor | None = None
    slot_children: _Tensor | None = None


@dataclass(frozen=True)
class _Levels:
    kind: Literal["Canonical", "Tables"]
    fields: _LevelFields


@dataclass(frozen=True)
class _TreeFields:
    levels: _Levels
    order: _Tensor | None = None
    ranks: _Tensor | None = None


@dataclass(frozen=True)
class _Tree:
    kind: Literal["ClassTree"]
    fields: _TreeFields


@dataclass(frozen=True)
class _BandFields:
    cutoffs: tuple[int, ...]
    order: _Tensor | None = None
    ranks: _Tensor | None = None


@dataclass(frozen=True)
class _Bands:
    kind: Literal["ClassBands"]
    fields: _BandFields


@dataclass(frozen=True, kw_only=True)
class _Form:
    """What `pack_head` returns, of heads of both kinds."""

    in_features: int
    use_bias: bool
    temperature: float
    dtype: _Dtype | None
    param_dtype: _Dtype


@dataclass(frozen=True, kw_only=True)
class _TreeForm(_Form):
    kind: Literal["HierarchicalSoftmaxHead"]
    classes: _Tree


@dataclass(frozen=True, kw_only=True)
class _AdaptiveForm(_Form):
    kind: Literal["AdaptiveSoftmaxHead"]
    classes: _Bands
    tail_features: tuple[int, ...]


def pack_head(head: Head, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Takes a head apart.

    Args:
      head: a `HierarchicalSoftmaxHead` or an `AdaptiveSoftmaxHead`, at a temperature
        that is a number.
      tensors: receives its parameters and tables, under names from `head_.` on.

    Returns:
      The rest, for JSON.

    Raises:
      TypeError: the head is of another kind.
    """
    if isinstance(head, HierarchicalSoftmaxHead):
        classes, kernel, bias = head.tree, head.node_kernel, head.node_bias
    elif isinstance(head, AdaptiveSoftmaxHead):
        classes, kernel, bias = head.bands, head.kernel, head.bias
    else:
        raise TypeError(
            "`head_` must be a HierarchicalSoftmaxHead or an AdaptiveSoftmaxHead, got "
            f"{type(head).__name__}."
        )
    if not isinstance(head.temperature, int | float):
        raise TypeError(
            "`head_` must have a temperature that is a number, got "
            f"{type(head.temperature).__name__}."
        )
    form = {
        "kind": type(head).__name__,
        "in_features": head.in_features,
        "use_bias": bias is not None,
        "temperature": float(head.temperature),
        "dtype": None if head.dtype is None else jnp.dtype(head.dtype).name,
        "param_dtype": kernel[...].dtype.name,
        "classes": _packed(classes.get_value(), "classes", tensors),
    }
    if isinstance(head, AdaptiveSoftmaxHead):
        form["tail_features"] = [p[...].shape[1] for p in head.projections]
    for name, parameter in _parameters(head).items():
        tensors[name] = np.ascontiguousarray(parameter[...])
    return form


def unpack_head(form: object, tensors: Mapping[str, np.ndarray]) -> Head:
    """Puts a head together again.

    Nothing is made of a size that the form alone declares.

    Args:
      form: what `pack_head` returned, or JSON had of it.
      tensors: what it filled; others have no names from `head_.` on.

    Returns:
      The head.

    Raises:
      ValueError: form and tensors are not those of one head.
    """
    kind = form.get("kind") if isinstance(form, dict) else None
    schema = _AdaptiveForm if kind == AdaptiveSoftmaxHead.__name__ else _TreeForm
    given = convert(form, schema, "its head", ValueError)
    left = {name: each for name, each in tensors.items() if name.startswith(_PREFIX)}
    if not given.temperature >= 0:
        raise ValueError("the head's temperature must not be negative")
    options: dict[str, Any] = {
        "use_bias": given.use_bias,
        "temperature": given.temperature,
        "dtype": given.dtype,
        "param_dtype": jnp.dtype(given.param_dtype),
        "kernel_init": nnx.initializers.zeros,
    }
    made: Any
    if isinstance(given, _TreeForm):
        made, classes = HierarchicalSoftmaxHead, _tree(given.classes.fields, left)
    else:
        made, classes = AdaptiveSoftmaxHead, _bands(given.classes.fields, left)
        options["projection_init"] = nnx.initializers.zeros
        options["tail_features"] = given.tail_features

    def make() -> Any:
        return made(given.in_features, classes, rngs=nnx.Rngs(0), **options)

    wide = given.param_dtype == "float64"
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        # The shapes alone, before there is anything of them.
        for name, parameter in _parameters(nnx.eval_shape(make)).items():
            wanted, got = parameter.get_value(), left.get(name)
            if got is None or (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
                there = "missing" if got is None else f"{got.dtype} of {got.shape}"
                raise ValueError(
                    f"{name} must be {wanted.dtype} of {wanted.shape}, and is {there}"
                )
        head = make()
        for name, parameter in _parameters(head).items():
            parameter[...] = jnp.asarray(left.pop(name))
    if left:
        raise ValueError(f"{min(left)} is none of the head's tensors")
    return head


def _tree(fields: _TreeFields, left: dict[str, np.ndarray]) -> ClassTree:
    """Makes a tree; its tables are taken out of the tensors that are left."""
    levels = fields.levels
    given = {
        name: value if isinstance(value, int | tuple) else _taken(value, left)
        for name, value in vars(levels.fields).items()
        if value is not None
    }
    kind = {"Canonical": Canonical, "Tables": Tables}[levels.kind]
    tree = ClassTree(
        kind(**given), _taken(fields.order, left), _taken(fields.ranks, left)
    )
    check_tree(tree)
    if tree.max_depth > _MOST_LEVELS or tree.arity > max(2, tree.num_classes):
        raise ValueError(
            f"a tree of {tree.num_classes} classes has depth {tree.max_depth} and "
            f"arity {tree.arity}"
        )
    return tree


def _bands(fields: _BandFields, left: dict[str, np.ndarray]) -> ClassBands:
    """Makes bands; their tables are taken out of the tensors that are left."""
    if len(fields.cutoffs) > _MOST_LEVELS:
        raise ValueError(f"bands have {len(fields.cutoffs)} cutoffs")
    order, ranks = (_taken(each, left) for each in (fields.order, fields.ranks))
    bands = ClassBands(fields.cutoffs, order, ranks)
    check_bands(bands)
    return bands


def _taken(name: _Tensor | None, left: dict[str, np.ndarray]) -> Any:
    """Takes a table out of the tensors that are left."""
    if name is None:
        return None
    if name.tensor not in left:
        raise ValueError(f"{name.tensor} is missing")
    return left.pop(name.tensor)


def _parameters(head: nnx.Module) -> dict[str, Any]:
    """A head's parameters by the names of their tensors."""
    flat = nnx.to_flat_state(nnx.state(head, nnx.Param))
    return {_PREFIX + ".".join(map(str, path)): value for path, value in flat}


def _packed(value: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """Takes a dataclass of tables apart."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, tuple):
        return [_packed(item, name, tensors) for item in value]
    if dataclasses.is_dataclass(value):
        fields = {
            field.name: _packed(
                getattr(value, field.name), f"{name}.{field.name}", tensors
            )
            for field in dataclasses.fields(value)
        }
        return {"kind": type(value).__name__, "fields": fields}
    tensors[_PREFIX + name] = np.ascontiguousarray(value)
    return {"tensor": _PREFIX + name}
