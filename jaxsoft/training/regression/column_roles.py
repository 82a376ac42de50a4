"""Which column of a table is what: features, labels, weights, names of the rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from jaxsoft.training.errors import TableError
from jaxsoft.training.regression.columns import Column, listed

__all__ = [
    "ColumnNames",
    "ColumnRoles",
    "known_names",
    "roles_to_predict",
    "roles_to_train",
]


@dataclass(frozen=True)
class ColumnNames:
    """Columns by name, or by index from 0 (from -1 backwards) as a number in digits.

    Attributes:
      label: of the classes; None is the last that is nothing else, or the model's.
      drop: left out.
      weights: of the rows' weights, or None.
      id: of the rows' names, or None.
    """

    label: str | None = None
    drop: tuple[str, ...] = ()
    weights: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class ColumnRoles:
    """Indices of the columns by what they are.

    Attributes:
      features: in the model's order.
      label: of the classes, or None.
      weights: of the rows' weights, or None.
      id: of the rows' names, or None.
      notes: what a user should know of the choice.
    """

    features: tuple[int, ...]
    label: int | None = None
    weights: int | None = None
    id: int | None = None
    notes: tuple[str, ...] = ()


def roles_to_train(
    frame: pl.DataFrame,
    names: Sequence[str] | None,
    wanted: ColumnNames,
    source: str,
) -> ColumnRoles:
    """Says what the columns of a table to train on are.

    Args:
      frame: the columns.
      names: of the columns, or None.
      wanted: what a user said of them.
      source: what the table is called.

    Returns:
      The roles; there is a label. A column without a name is none of the features where
      it counts the rows, as pandas and R write it, or where it is empty.

    Raises:
      TableError: a column is not there, or has two roles.
    """
    roles, dropped = _named(frame, names, wanted, source)
    used = {*dropped, roles.weights, roles.id}
    unnamed = _unnamed(frame, names) - used - {roles.label}
    notes = []
    index = [i for i in unnamed if frame.to_series(i).null_count() < len(frame)]
    if index:
        places = listed(sorted(index))
        notes.append(f"taken for names of rows, and left out: columns at {places}")
    rest = [i for i in range(frame.width) if i not in used and i not in unnamed]
    label = roles.label
    if label is None:
        if not rest:
            raise TableError(f"{source} has no column for labels.")
        label = rest[-1]
    features = tuple(index for index in rest if index != label)
    return replace(roles, features=features, label=label, notes=tuple(notes))


def roles_to_predict(
    frame: pl.DataFrame,
    names: Sequence[str] | None,
    wanted: ColumnNames,
    columns: Sequence[Column],
    trained: ColumnNames,
    source: str,
) -> ColumnRoles:
    """Says what the columns of a table to predict are.

    Where table and model have names, features are found by them, whatever else is
    there. Otherwise they are all columns that are nothing else, in the table's order.

    Args:
      frame: the columns.
      names: of the columns, or None.
      wanted: what a user said of them.
      columns: the model's.
      trained: what they were in the table that the model was trained on; what is there
        counts where a user said nothing.
      source: what the table is called.

    Returns:
      The roles.

    Raises:
      TableError: a feature is not there, or nothing says which column is the label.
    """
    by_name = names is not None and all(isinstance(c.name, str) for c in columns)
    # As many columns as features are nothing but features, unless one has the very
    # name of something else.
    exact = frame.width == len(columns)

    def present(name: str | None) -> bool:
        if name is None or exact:
            return names is not None and name in names
        return _index(name, frame.width, names) is not None

    known = ColumnNames(
        next((n for n in (wanted.label, trained.label) if present(n)), None),
        tuple(name for name in trained.drop if present(name)),
        id=next((n for n in (wanted.id, trained.id) if present(n)), None),
    )
    if not exact:
        known = replace(known, label=wanted.label or known.label)
    known = replace(known, id=wanted.id or known.id)
    roles, dropped = _named(frame, names, known, source)
    used = {*dropped, roles.label, roles.id}
    if by_name:
        assert names is not None
        return replace(roles, **_by_name(names, columns, trained, used, source))
    unnamed = _unnamed(frame, names)
    rest = [i for i in range(frame.width) if i not in used and i not in unnamed]
    if len(rest) == len(columns):
        return replace(roles, features=tuple(rest))
    if len(rest) == len(columns) + 1 and roles.label is None:
        raise TableError(
            f"{source} has {frame.width} columns, one more than the model has "
            "features, and nothing says which one has the labels; name it by `label`."
        )
    raise TableError(
        f"{source} has {frame.width} columns, the model has {len(columns)} features; "
        "give it the columns that the model was trained on."
    )


def _by_name(
    names: Sequence[str],
    columns: Sequence[Column],
    trained: ColumnNames,
    used: Collection[int | None],
    source: str,
) -> dict[str, Any]:
    """Finds the model's columns, and lists those that are not the model's."""
    places = {name: index for index, name in enumerate(known_names(names))}
    absent = [column.name for column in columns if column.name not in places]
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise TableError(
            f"{source} has no column {absent[0]!r}, which the model needs{more}; it "
            f"has {listed(names)}."
        )
    features = tuple(places[str(column.name)] for column in columns)
    known = {*features, *used}
    others = [
        name
        for index, name in enumerate(names)
        if index not in known and name not in ("", trained.weights)
    ]
    notes = () if not others else (f"columns not of the model: {listed(others)}",)
    return {"features": features, "notes": notes}


def _named(
    frame: pl.DataFrame, names: Sequence[str] | None, wanted: ColumnNames, source: str
) -> tuple[ColumnRoles, set[int]]:
    """Finds the columns that have a name of their own; none may have two roles."""
    given = [("label", wanted.label), ("weights", wanted.weights), ("id", wanted.id)]
    given += [("drop", name) for name in wanted.drop]
    found: dict[int, str] = {}
    places: dict[str, Any] = {}
    dropped = set()
    for role, name in given:
        if name is None:
            continue
        index = _index(name, frame.width, names)
        if index is None:
            there = (
                f"columns 0 to {frame.width - 1}" if names is None else listed(names)
            )
            raise TableError(f"{source} has no column {name!r}; it has {there}.")
        if found.setdefault(index, role) != role:
            raise TableError(
                f"`{role}` must be another column than `{found[index]}`, got {name!r} "
                f"for both in {source}."
            )
        if role == "drop":
            dropped.add(index)
        else:
            places[role] = index
    return ColumnRoles((), **places), dropped


def _index(name: str, width: int, names: Sequence[str] | None) -> int | None:
    """Finds a column by its name, else by its index."""
    if names is not None and name in names:
        return names.index(name)
    try:
        index = int(name)
    except ValueError:
        return None
    return index % width if -width <= index < width else None


def known_names(names: Sequence[str]) -> list[str]:
    """Names of columns, those without one called by their place."""
    return [name or f"column {place}" for place, name in enumerate(names)]


def _unnamed(frame: pl.DataFrame, names: Sequence[str] | None) -> set[int]:
    """Finds columns that are none: empty ones at the end, and names of rows."""
    empty = {
        i for i in range(frame.width) if frame.to_series(i).null_count() == len(frame)
    }
    if names is None:
        return {frame.width - 1} & empty if len(frame) else set()
    without = {i for i, name in enumerate(names) if not name}
    index = {i for i, name in enumerate(names) if _INDEX.fullmatch(name)}
    index |= {0} & without
    return without & empty | {i for i in index if _differ(frame.to_series(i))}


# What pandas calls an index that has no name.
_INDEX = re.compile(r"__index_level_\d+__|Unnamed: \d+")


def _differ(cells: pl.Series) -> bool:
    """Whether cells are whole numbers or texts that all differ, as names of rows do."""
    if cells.dtype.is_float() and not (cells.drop_nulls() % 1 == 0).all():
        return False
    return len(cells) > 1 and cells.n_unique() == len(cells)
