"""A fitted estimator as one safetensors file: arrays as tensors, all else as JSON.

The file has one string of metadata, `jaxsoft`, a JSON object: the format's version, the
estimator's class, its parameters, its fitted attributes, and the form of its head.
Names of tensors are those of the attributes. Nothing in a file is ever executed, and
equal estimators give equal files.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from jaxsoft.training.errors import ModelFileError
from jaxsoft.training.regression.head_files import pack_head, unpack_head
from jaxsoft.training.regression.table_form import TableForm
from jaxsoft.training.reporting import Record
from jaxsoft.training.run_directory import replacing
from jaxsoft.training.schemas import convert

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

__all__ = ["FORMAT", "load_model", "save_model"]

Estimator = TypeVar("Estimator")

FORMAT = 1
_KEY = "jaxsoft"
_HEAD = "head_"


def save_model(
    estimator: "BaseEstimator",
    path: str | os.PathLike[str],
    table: TableForm | None = None,
) -> Path:
    """Writes a fitted estimator to a file.

    Args:
      estimator: a fitted estimator with scikit-learn's `get_params`. Its fitted
        attributes are those whose names end in an underscore and do not begin with
        one: numbers, strings, arrays of either, and `head_`.
      path: the file to write; what is there is replaced, whole or not at all. Its
        folder must exist.
      table: the form of the table that it was fitted to, or None.

    Returns:
      The path of the file.

    Raises:
      NotFittedError: the estimator is not fitted; scikit-learn's class.
      TypeError: an attribute is of another type.
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


def load_model(path: str | os.PathLike[str], cls: type[Estimator]) -> Estimator:
    """Reads an estimator back.

    Args:
      path: the file that `save_model` wrote.
      cls: the estimator's class.

    Returns:
      An estimator that predicts, bit for bit, what the saved one does.

    Raises:
      ModelFileError: the file is missing, damaged, or something else.
    """
    path = Path(path)
    contents, tensors = _read(path)
    kind = contents.get("estimator")
    if kind != cls.__name__:
        raise ModelFileError(f"{path} holds a {kind}, not a {cls.__name__}.")
    if contents.get("format") != FORMAT:
        raise ModelFileError(
            f"{path} has format {contents.get('format')}, this version of jaxsoft "
            f"reads {FORMAT}; read it with the version that wrote it."
        )
    try:
        parameters = contents["parameters"].items()
        estimator = cls(**{name: _decoded(value) for name, value in parameters})
        for name, value in contents["attributes"].items():
            setattr(estimator, name, _decoded(value))
        if _HEAD in contents:
            setattr(estimator, _HEAD, unpack_head(contents[_HEAD], tensors))
        for name, value in tensors.items():
            if "." not in name:
                setattr(estimator, name, value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path} is damaged ({error}).") from error
    return estimator


def load_form(path: str | os.PathLike[str]) -> TableForm:
    """Reads the form of the table that a model was fitted to.

    Args:
      path: the file that `save_model` wrote.

    Returns:
      The form; that of any table where the file has none.

    Raises:
      ModelFileError: the file is missing, damaged, or something else.
    """
    contents, _ = _read(Path(path))
    if "table" not in contents:
        return TableForm()
    return convert(contents["table"], TableForm, f"the table of {path}", ModelFileError)


def _read(path: Path) -> tuple[Record, dict[str, np.ndarray]]:
    """Reads the metadata and all tensors."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise ModelFileError(f"the model {path} does not exist.")
    if not path.is_file():
        raise ModelFileError(f"the model {path} is not a file.")
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise ModelFileError(f"{path} is not a model of jaxsoft.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        contents = json.loads(text)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ModelFileError(f"{path} is not a model of jaxsoft ({error}).") from error
    if not isinstance(contents, dict):
        raise ModelFileError(f"{path} is not a model of jaxsoft.")
    return contents, tensors


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
    return np.array(_decoded(value["array"]), dtype=value["dtype"])
