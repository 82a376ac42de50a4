"""What every run checks: its packages, its losses, and the run that it resumes."""

import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from jaxsoft.training.errors import (
    MissingExtraError,
    NonFiniteLossError,
    RunDirectoryError,
)
from jaxsoft.training.reporting import Listener, Record
from jaxsoft.training.run_directory import RunDirectory
from jaxsoft.training.schemas import decode_file

__all__ = [
    "check_finite",
    "check_same",
    "check_same_surroundings",
    "check_same_trunk",
    "read_config",
    "require_train_extra",
    "trunk_name",
]

_EXTRA_PACKAGES = (
    "grain",
    "matplotlib",
    "msgspec",
    "orbax",
    "polars",
    "psutil",
    "rich",
    "safetensors",
    "sklearn",
    "tokenizers",
)


class _RunConfig(Protocol):
    """A dataclass that says what a run is."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def out(self) -> str:
        """Folder of the run."""
        ...


Config = TypeVar("Config", bound=_RunConfig)
Contents = TypeVar("Contents")


@dataclass(frozen=True)
class _Description(Generic[Contents]):
    """Contents of `config.json`, of a run of any kind."""

    config: Contents
    versions: dict[str, str]
    device: str
    mesh: dict[str, int] | None = None
    corpus: dict[str, Any] | None = None
    tokens: dict[str, Any] | None = None
    unigram: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    trunk: str | None = None


def require_train_extra() -> None:
    """Raises `MissingExtraError` unless the extra `train` is installed."""
    missing = [
        name for name in _EXTRA_PACKAGES if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise MissingExtraError(
            f"training needs {', '.join(missing)}, which the extra `train` installs: "
            'pip install "jaxsoft[train]"'
        )


def check_finite(measured: Mapping[str, float], where: str, advice: str) -> None:
    """Raises `NonFiniteLossError` before anything of a bad step is written."""
    if not all(math.isfinite(value) for value in measured.values()):
        values = ", ".join(f"{name} {value}" for name, value in measured.items())
        raise NonFiniteLossError(f"{where}: {values}; {advice}")


def read_config(out: str | os.PathLike[str], kind: type[Config]) -> Config:
    """Reads the configuration of the run in a folder.

    Args:
      out: the folder.
      kind: the class of the configuration.

    Returns:
      The configuration that the run was started with.

    Raises:
      RunDirectoryError: there is none.
    """
    return _read_description(RunDirectory(out), kind).config


def _read_description(
    directory: RunDirectory, kind: type[Contents]
) -> _Description[Contents]:
    """Reads `config.json`, whose configuration is of some class."""
    directory.check_resumable()
    return decode_file(
        directory.config,
        _Description[kind],
        RunDirectoryError,
        what="the configuration",
    )


def check_same(config: Config, stored: Config, free: Set[str]) -> None:
    """Compares the configuration asked for with that of the run to resume.

    Args:
      config: asked for.
      stored: the run's, of the same class.
      free: fields that may differ.

    Raises:
      RunDirectoryError: a field that matters differs.
    """
    for field in dataclasses.fields(config):
        asked, had = getattr(config, field.name), getattr(stored, field.name)
        if field.name not in free and asked != had:
            raise RunDirectoryError(
                f"the run in {config.out} has `{field.name}` {had!r}, not {asked!r}; "
                "resume it with the same, or start another run."
            )


def check_same_surroundings(
    directory: RunDirectory,
    description: Record,
    listener: Listener,
    digested: Sequence[str],
) -> None:
    """Raises if what has a digest changed; notes if versions, device or mesh did."""
    stored = _read_description(directory, dict[str, Any])
    for part in digested:
        if (getattr(stored, part) or {}).get("digest") != description[part]["digest"]:
            raise RunDirectoryError(
                f"the {part} of the run in {directory.path} changed since it started; "
                "start another run."
            )
    for part in ("versions", "device", "mesh"):
        if getattr(stored, part) != description.get(part):
            listener.note(
                f"{part} changed since the run started: it goes on, but not bit for bit"
            )


def trunk_name(trunk: Callable[..., Any] | None) -> str | None:
    """The name of what makes a run's trunk; None of the default one."""
    if trunk is None:
        return None
    # A `repr` may hold an address, which another process does not have.
    while isinstance(trunk, functools.partial):
        trunk = trunk.func
    return getattr(trunk, "__qualname__", type(trunk).__qualname__)


def check_same_trunk(directory: RunDirectory, trunk: Callable[..., Any] | None) -> None:
    """Raises `RunDirectoryError` unless a trunk has the name of the run's own.

    Args:
      directory: of the run.
      trunk: what makes the trunk, or None.
    """
    stored, given = (
        _read_description(directory, dict[str, Any]).trunk,
        trunk_name(trunk),
    )
    if stored != given:
        raise RunDirectoryError(
            f"the run in {directory.path} has "
            + (f"the `trunk` {stored}" if stored else "no `trunk` of its own")
            + f", got {given}."
        )
