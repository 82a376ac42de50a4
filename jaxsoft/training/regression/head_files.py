"""Heads over class trees and class bands, as tensors and a form that JSON holds."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsoft.adaptive.class_bands import ClassBands
from jaxsoft.hierarchical.class_tree import ClassTree
from jaxsoft.hierarchical.levels import Canonical, Tables
from jaxsoft.nn import AdaptiveSoftmaxHead, HierarchicalSoftmaxHead
from jaxsoft.training.heads import Head

__all__ = ["pack_head", "unpack_head"]

_PREFIX = "head_."
_STRUCTURES = {cls.__name__: cls for cls in (Canonical, ClassBands, ClassTree, Tables)}


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


def unpack_head(form: dict[str, Any], tensors: dict[str, np.ndarray]) -> Head:
    """Puts a head together again.

    Args:
      form: what `pack_head` returned.
      tensors: what it filled.

    Returns:
      The head.
    """
    classes = _unpacked(form["classes"], tensors)
    wide = form["param_dtype"] == "float64"
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        options: dict[str, Any] = {
            name: form[name] for name in ("use_bias", "temperature", "dtype")
        }
        options["param_dtype"] = jnp.dtype(form["param_dtype"])
        options["kernel_init"] = nnx.initializers.zeros
        options["rngs"] = nnx.Rngs(0)
        if form["kind"] == HierarchicalSoftmaxHead.__name__:
            head = HierarchicalSoftmaxHead(form["in_features"], classes, **options)
        else:
            head = AdaptiveSoftmaxHead(
                form["in_features"],
                classes,
                tail_features=form["tail_features"],
                projection_init=nnx.initializers.zeros,
                **options,
            )
        for name, parameter in _parameters(head).items():
            value = tensors[name]
            if value.shape != parameter[...].shape:
                raise ValueError(f"{name} has shape {value.shape}")
            parameter[...] = jnp.asarray(value)
    return head


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


def _unpacked(value: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The inverse of `_packed`."""
    if isinstance(value, list):
        return tuple(_unpacked(item, tensors) for item in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return jnp.asarray(tensors[value["tensor"]])
    fields = value["fields"].items()
    made = {name: _unpacked(item, tensors) for name, item in fields}
    return _STRUCTURES[value["kind"]](**made)
