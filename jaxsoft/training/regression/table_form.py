"""What a model knows of the table that it was trained on, and needs of the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxsoft.training.regression.column_roles import ColumnNames
from jaxsoft.training.regression.columns import Column

__all__ = ["TableForm", "fill", "learn_fills"]


@dataclass(frozen=True)
class TableForm:
    """The form of a table; a model's file has it beside the model.

    Attributes:
      names: which column was what.
      columns: what the features were made from; None for arrays.
      fills: [d] what stands for a number that is missing; None for sparse features.
    """

    names: ColumnNames = ColumnNames()
    columns: tuple[Column, ...] | None = None
    fills: tuple[float, ...] | None = None

    def check(self, num_features: int) -> None:
        """Raises `ValueError` unless it is the form of so many features."""
        if self.columns is not None:
            texts = [column.categories for column in self.columns]
            if any(
                each is not None and list(each) != sorted({*each}) for each in texts
            ):
                raise ValueError("the categories of a column must be sorted")
            if sum(1 if each is None else len(each) for each in texts) != num_features:
                raise ValueError(f"its columns must have {num_features} features")
        if self.fills is not None and len(self.fills) != num_features:
            raise ValueError(f"its fills must be {num_features} numbers")


def learn_fills(features: Any) -> tuple[float, ...] | None:
    """Finds what stands for missing numbers: the mean of a column's others.

    Args:
      features: [n, d] the rows to train on, NaN where a number is missing; or CSR.

    Returns:
      [d], 0 for a column without numbers; None for sparse features.
    """
    from scipy.sparse import issparse
    from sklearn.impute import SimpleImputer

    if issparse(features):
        return None
    if not np.isnan(features).any():
        # The same, without a copy.
        return tuple(features.mean(axis=0, dtype=np.float64).tolist())
    imputer = SimpleImputer(keep_empty_features=True).fit(features)
    return tuple(np.asarray(imputer.statistics_, np.float64).tolist())


def fill(features: Any, fills: tuple[float, ...] | None) -> Any:
    """Fills in missing numbers.

    Args:
      features: [n, d], or CSR.
      fills: what `learn_fills` returned; with None they stay as they are.

    Returns:
      The features, themselves where none is missing.
    """
    from scipy.sparse import issparse
    from sklearn.impute import SimpleImputer

    if fills is None or issparse(features) or not np.isnan(features).any():
        return features
    imputer = SimpleImputer(keep_empty_features=True)
    return imputer.fit(np.asarray([fills], features.dtype)).transform(features)
