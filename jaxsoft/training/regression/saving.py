"""A fitted estimator as one safetensors file: arrays as tensors, all else as JSON.

The file has one string of metadata, `jaxsoft`, a JSON object: the format's version, the
estimator's class, its parameters, its fitted attributes, and the form of its head.
Names of tensors are those of the attributes. Nothing in a file is ever executed, and
equal estimators give equal files.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import jax
import numpy as np

from jaxsoft.training.errors import ModelFileError
from jaxsoft.training.files import open_regular
from jaxsoft.training.memory import MemoryBudget
from jaxsoft.training.regression.head_files import pack_head, unpack_head
from jaxsoft.training.regression.table_form import TableForm
from jaxsoft.training.reporting import Record
from jaxsoft.training.run_directory import replacing
from jaxsoft.training.schemas import convert, decode, one_line

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

__all__ = ["FORMAT", "load_model", "load_table_model", "save_model"]

Estimator = TypeVar("Estimator")

FORMAT = 1
_KEY = "jaxsoft"
_HEAD = "head_"
_HINTS = "__annotations__"
# Where NumPy's strings are wider than those that there are, so many bytes at most.
_PADDING = 1 << 26
_PARSED = 20
# What safetensors calls the dtypes that NumPy has, and JAX's bfloat16.
_DTYPES = {f"{kind}{bits}" for kind in "IU" for bits in (8, 16, 32, 64)}
_DTYPES |= {"BOOL", "BF16", "F16", "F32", "F64"}
_ARRAY_DTYPE = re.compile(r"[<>|=]?(?:O|U(\d{1,9}))")

_Scalar: TypeAlias = bool | int | float | str


@dataclass(frozen=True)
class _Array:
    """A one-dimensional array of strings or objects."""

    array: tuple[_Scalar, ...]
    dtype: str


@dataclass(frozen=True)
class _Attributes:
    """The fitted attributes that are no tensors; None are not there."""

    n_features_in_: int
    classes_: _Array | None = None
    feature_names_in_: _Array | None = None
    converged_: bool | None = None
    stopping_reason_: str | None = None
    objective_: float | None = None
    temperature_: float | None = None
    solver_: str | None = None


@dataclass(frozen=True)
class _Header:
    """What the file says beside its tensors."""

    format: int
    estimator: str
    parameters: dict[str, Any]
    attributes: _Attributes
    head_: dict[str, Any] | None = None
    table: TableForm | None = None


_TENSORS = {"classes_", "coef_", "intercept_", "n_iter_"}
_FITTED = {_HEAD, *_TENSORS, *(field.name for field in fields(_Attributes))}
# What a class that has it predicts with; the rest tells of the fit.
_NEEDED = {"temperature_"}


def save_model(
    estimator: "BaseEstimator",
    path: str | os.PathLike[str],
    table: TableForm | None = None,
) -> Path:
    """Writes a fitted estimator to a file.

    Args:
      estimator: a fitted estimator with scikit-learn's `get_params`. Its fitted
        attributes, whose names end in an underscore and do not begin with one, are
        those of `SoftmaxRegression`, or some of them.
      path: the file to write; what is there is replaced, whole or not at all. Its
        folder must exist.
      table: the form of the table that it was fitted to, or None.

    Returns:
      The path of the file.

    Raises:
      NotFittedError: the estimator is not fitted; scikit-learn's class.
      TypeError: an attribute is of another type or name.
      ModelFileError: the file cannot be written.

    Notes:
      Parameters that JSON cannot hold (a mesh, an optimizer, a `RandomState`) are not
      saved: the loaded estimator has their defaults. The same goes for
      `checkpoint_dir`, which belongs to one run.
    """
    from safetensors.numpy import save
    from sklearn.utils.validation import check_is_fitted

    check_is_fitted(estimator)
    tensors: dict[str, np.ndarray] = {}
    attributes: dict[str, object] = {}
    contents: dict[str, object] = {
        "format": FORMAT,
        "estimator": type(estimator).__name__,
        "parameters": _parameters(estimator),
        "attributes": attributes,
    }
    if table is not None:
        contents["table"] = dataclasses.asdict(table)
    for name, value in sorted(vars(estimator).items()):
        if name.startswith("_") or not name.endswith("_"):
            continue
        if name not in _FITTED:
            raise TypeError(f"`{name}` must not be set; a file cannot hold it.")
        if name == _HEAD:
            if value is not None:
                contents[_HEAD] = pack_head(value, tensors)
        elif isinstance(value, np.ndarray | jax.Array) and value.dtype.kind in "biuf":
            tensors[name] = np.ascontiguousarray(value)
        else:
            try:
                attributes[name] = _encoded(value)
            except TypeError as error:
                raise TypeError(
                    f"`{name}` must be a number, a string or an array of them, got "
                    f"{error}; a file cannot hold it."
                ) from None
    metadata = {_KEY: json.dumps(contents)}
    return _write(Path(path), save(tensors, metadata))


def load_model(
    path: str | os.PathLike[str],
    cls: type[Estimator],
    *,
    memory: MemoryBudget | None = None,
) -> Estimator:
    """Reads an estimator back.

    Args:
      path: the file that `save_model` wrote.
      cls: the estimator's class.
      memory: what the file's contents must not exceed; None is half of what is free.

    Returns:
      An estimator that predicts, bit for bit, what the saved one does.

    Raises:
      ModelFileError: the file is missing, damaged, too large, or something else.
    """
    return load_table_model(path, cls, memory=memory)[0]


def load_table_model(
    path: str | os.PathLike[str],
    cls: type[Estimator],
    *,
    memory: MemoryBudget | None = None,
) -> tuple[Estimator, TableForm]:
    """Reads an estimator, and the form of the table that it was fitted to.

    Args:
      path: as for `load_model`.
      cls: likewise.
      memory: likewise.

    Returns:
      The estimator and the form, that of any table where the file has none.

    Raises:
      ModelFileError: as `load_model`.
    """
    path = Path(path)
    contents, tensors = _read(path, memory or MemoryBudget.of_machine())
    kind = contents.get("estimator")
    if kind != cls.__name__:
        raise ModelFileError(f"{path} holds a {one_line(kind)}, not a {cls.__name__}.")
    number = contents.get("format")
    if number != FORMAT:
        raise ModelFileError(
            f"{path} has format {one_line(number)}, this version of jaxsoft reads "
            f"{FORMAT}; read it with the version that wrote it."
        )
    try:
        header = convert(contents, _Header, "its header", ValueError)
        estimator = _unfitted(cls, header.parameters)
        for name, value in _checked_state(header, tensors, cls).items():
            setattr(estimator, name, value)
        if getattr(estimator, "head", "full") == "full":
            _require(hasattr(estimator, "coef_"), "coef_ is missing")
        else:
            _require(hasattr(estimator, _HEAD), "head_ is missing")
        form = header.table or TableForm()
        form.check(header.attributes.n_features_in_)
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as why:
        reason = one_line(why).rstrip(".")
        raise ModelFileError(f"{path} is damaged ({reason}).") from why
    return estimator, form


def _unfitted(cls: type[Estimator], parameters: Mapping[str, Any]) -> Estimator:
    """Makes an estimator that is not fitted yet, of parameters as JSON has them."""
    _require("checkpoint_dir" not in parameters, "it must have no checkpoint_dir")
    estimator = cls(**{name: _decoded(value) for name, value in parameters.items()})
    # `SoftmaxRegression` checks its own; another class does so when it is fitted.
    check = getattr(estimator, "_parameters", None)
    if check is not None:
        check()
    return estimator


def _checked_state(
    header: _Header, tensors: dict[str, np.ndarray], cls: type
) -> dict[str, Any]:
    """Returns the fitted attributes, which fit each other.

    Raises:
      ValueError: they do not.
    """
    state: dict[str, Any] = {
        name: _array(value) if isinstance(value, _Array) else value
        for name, value in vars(header.attributes).items()
        if value is not None
    }
    for name, value in tensors.items():
        if not name.startswith(f"{_HEAD}."):
            known = name in _TENSORS and name not in state
            _require(known, f"{name} is no tensor of a model")
            state[name] = value
        _require(np.isfinite(value).all(), f"{name} must be finite")
    hints = {name for each in cls.__mro__ for name in getattr(each, _HINTS, ())}
    missing = ({"classes_"} | (_NEEDED & hints)) - set(state)
    _require(not missing, f"{min(missing, default='')} is missing")
    classes, features = state["classes_"], state["n_features_in_"]
    _require(
        classes.ndim == 1
        and classes.dtype.kind in "biufUO"
        and len(classes) >= 2
        and np.array_equal(np.unique(classes), classes),
        "classes_ must be two or more, sorted",
    )
    _require(features > 0, "n_features_in_ must be positive")
    names = state.get("feature_names_in_")
    if names is not None:
        text = all(isinstance(name, str) for name in names)
        _require(text and len(names) == features, "feature_names_in_ must be all names")
    temperature = state.get("temperature_", 1.0)
    _require(0 < temperature < math.inf, "temperature_ must be positive and finite")
    steps = state.get("n_iter_", np.ones(1, np.int32))
    _require(
        steps.dtype.kind == "i" and steps.shape in ((1,), classes.shape),
        "n_iter_ must be an integer, or one a class",
    )
    if "coef_" in state or "intercept_" in state:
        rows = 1 if len(classes) == 2 and len(state["coef_"]) == 1 else len(classes)
        for name, shape in (("coef_", (rows, features)), ("intercept_", (rows,))):
            array = state.get(name, np.empty(()))
            _require(
                array.dtype.name in ("float32", "float64") and array.shape == shape,
                f"{name} must be float32 or float64 of {shape}, and is {array.dtype} "
                f"of {array.shape}",
            )
    if header.head_ is None:
        _require(not set(tensors) - _TENSORS, "head_ is missing")
    else:
        head: Any = unpack_head(header.head_, tensors)
        wanted, got = (features, len(classes)), (head.in_features, head.num_classes)
        _require(got == wanted, f"head_ must be of {wanted}, and is of {got}")
        state[_HEAD] = head
    return state


def _read(path: Path, memory: MemoryBudget) -> tuple[Record, dict[str, np.ndarray]]:
    """Reads the metadata and all tensors."""
    from safetensors import SafetensorError, safe_open

    with open_regular(path, ModelFileError, "the model") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = os.fstat(opened.fileno()).st_size
    # What JSON is parsed to is that much larger at most, as of empty lists.
    need = size + _PARSED * min(length, size)
    memory.require(need, f"the model {path}", ModelFileError)
    other = f"{path} is not a model of jaxsoft"
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise ModelFileError(f"{other}.")
            names = list(file.keys())
            for name in names:
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _DTYPES:
                    raise ModelFileError(f"{other}: it has a tensor of {dtype}.")
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{other} ({one_line(error)}).") from error
    header = decode(
        text, dict[str, Any], f"{other}: its header", ModelFileError, finite=False
    )
    return header, tensors


def _write(path: Path, data: bytes) -> Path:
    """Replaces a file, whole or not at all."""
    try:
        with replacing(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ModelFileError(f"{path} cannot be written ({error}).") from error
    return path


def _parameters(estimator: "BaseEstimator") -> dict[str, object]:
    """The constructor's arguments that a file can hold."""
    kept = {}
    for name, value in estimator.get_params(deep=False).items():
        if name == "dtype" and value is not None:
            value = np.dtype(value).name
        if name == "checkpoint_dir":
            continue
        try:
            kept[name] = _encoded(value)
        except TypeError:
            continue
    return kept


def _encoded(value: object) -> object:
    """A value as JSON has it, anything but a scalar or a list under its type's name."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encoded(item) for item in value]}
    if isinstance(value, dict):
        pairs = value.items()
        return {"dict": [[_encoded(key), _encoded(item)] for key, item in pairs]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "UO" and value.ndim == 1:
        return {"array": [_encoded(item) for item in value], "dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__}")


def _decoded(value: Any) -> Any:
    """The inverse of `_encoded`."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_decoded(item) for item in value["tuple"])
    if "dict" in value:
        return {_decoded(key): _decoded(item) for key, item in value["dict"]}
    return _array(convert(value, _Array, "an array", ValueError))


def _array(value: _Array) -> np.ndarray:
    """Makes an array, no larger than its entries need or little more."""
    found = _ARRAY_DTYPE.fullmatch(value.dtype)
    if found is None:
        raise ValueError(f"an array has dtype {value.dtype[:20]!r}")
    # Names that are no text cannot be written anywhere.
    "".join(each for each in value.array if isinstance(each, str)).encode()
    if found[1] is None:
        return np.array(value.array, object)
    longest = max((len(str(each)) for each in value.array), default=0)
    width, padding = int(found[1]), 4 * (int(found[1]) - longest) * len(value.array)
    _require(
        all(isinstance(each, str) for each in value.array)
        and longest <= width
        and padding <= _PADDING,
        f"an array of strings of {longest} at most has dtype {value.dtype}",
    )
    return np.array(value.array, value.dtype)


def _require(holds: bool | np.bool_, rule: str) -> None:
    if not holds:
        raise ValueError(rule)
