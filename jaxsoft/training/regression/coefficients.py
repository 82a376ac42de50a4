"""A fitted linear classifier: scikit-learn's `coef_` and `intercept_`."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from scipy.sparse import csr_array
from sklearn.utils.extmath import safe_sparse_dot

from jaxsoft.training.regression.inputs import Columns, Csr
from jaxsoft.training.regression.objective import Parameters
from jaxsoft.training.regression.padding import rows_within
from jaxsoft.training.regression.sources import RowSource, SparseRows

__all__ = ["Coefficients"]

# Bytes of the features, or logits, that exist at a time where neither is wanted.
_CHUNK_BYTES = 2**26


class Coefficients(NamedTuple):
    """A linear classifier in scikit-learn's form.

    Attributes:
      coef: [V, d], or [1, d] the second class's of two minus the first's.
      intercept: [V] or [1].
    """

    coef: np.ndarray
    intercept: np.ndarray

    @classmethod
    def of_parameters(cls, parameters: Parameters, order: np.ndarray) -> "Coefficients":
        """Returns [V, d] and [V] of a solver's parameters.

        Args:
          parameters: of the solver, whose reference class, if any, has no row.
          order: [V] the classes in the order of the parameters' rows.
        """
        kernel, bias = parameters
        order_of_rows = order[: kernel.shape[0]]
        coef = np.zeros((len(order), kernel.shape[1]), kernel.dtype)
        intercept = np.zeros(len(order), kernel.dtype)
        coef[order_of_rows] = kernel
        if bias is not None:
            intercept[order_of_rows] = bias
        return cls(coef, intercept)

    def of_columns(self, columns: Columns | None) -> "Coefficients":
        """Returns the coefficients of some columns; None are all of them."""
        if columns is None:
            return self
        return self._replace(coef=self.coef[:, columns.index])

    def spread(self, columns: Columns | None) -> "Coefficients":
        """Returns those of all columns, 0 where they are not of some."""
        return (
            self if columns is None else self._replace(coef=columns.spread(self.coef))
        )

    def astype(self, dtype: np.dtype) -> "Coefficients":
        """Returns the same in a dtype."""
        return Coefficients(self.coef.astype(dtype), self.intercept.astype(dtype))

    def of_least_norm(self) -> "Coefficients":
        """Returns, of all classifiers with these probabilities, the least one."""
        return Coefficients(
            self.coef - self.coef.mean(0), self.intercept - self.intercept.mean()
        )

    def of_second_class(self) -> "Coefficients":
        """Returns the second class's of two minus the first's."""
        return Coefficients(
            self.coef[1:] - self.coef[:1], self.intercept[1:] - self.intercept[:1]
        )

    def by_class(self, reference: int | None) -> "Coefficients":
        """Returns a row a class, of which a reference class's is 0."""
        coef, intercept = self
        if len(coef) == 1:
            coef = np.concatenate([np.zeros_like(coef), coef])
            intercept = np.concatenate([np.zeros_like(intercept), intercept])
        if reference is not None:
            coef = coef - coef[reference]
            intercept = intercept - intercept[reference]
        return Coefficients(coef, intercept)

    def parameters(self, order: np.ndarray, *, bias: bool) -> Parameters:
        """Returns a solver's parameters.

        Args:
          order: [R] the classes that have a row in them, in their order.
          bias: whether there is a bias.
        """
        return Parameters(self.coef[order], self.intercept[order] if bias else None)

    def logits(self, features: np.ndarray | Csr | RowSource) -> np.ndarray:
        """Returns the logits of rows, [n, V]; of two classes [n], their difference."""
        if isinstance(features, RowSource):
            return np.concatenate([self.logits(part) for part in self._parts(features)])
        scores = safe_sparse_dot(features, self.coef.T, dense_output=True)
        scores = np.asarray(scores + self.intercept, self.coef.dtype)
        if scores.shape[1] == 1:
            return scores[:, 0]
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def best(self, features: np.ndarray | Csr | RowSource) -> np.ndarray:
        """Returns [n] the index of each row's most probable class."""
        scores = map(self.logits, self._parts(features))
        return np.concatenate(
            [part > 0 if part.ndim == 1 else part.argmax(1) for part in scores]
        ).astype(np.intp)

    def _parts(
        self, features: np.ndarray | Csr | RowSource
    ) -> Iterator[np.ndarray | Csr]:
        """Yields rows whose features or logits exist at a time; one part at least."""
        count = len(features) if isinstance(features, RowSource) else features.shape[0]
        dtype = self.coef.dtype
        # The features of sparse rows take no room.
        dense = isinstance(features, np.ndarray | RowSource)
        sparse = isinstance(features, SparseRows) or not dense
        classes, width = self.coef.shape
        step = rows_within(_CHUNK_BYTES, max(2, classes, 0 if sparse else width), dtype)
        for start in range(0, max(count, 1), step):
            stop = min(start + step, count)
            if isinstance(features, SparseRows):
                yield _part(features, start, stop, dtype)
            elif isinstance(features, RowSource):
                yield features.read(np.arange(start, stop), dtype)
            else:
                yield features[start:stop]


def _part(source: SparseRows, start: int, stop: int, dtype: DTypeLike) -> Csr:
    """Returns some rows of a source as SciPy's, without making them dense."""
    bounds = np.asarray(source.indptr[start : stop + 1], np.int64)
    entries = slice(bounds[0], bounds[-1])
    parts = (
        np.asarray(source.data[entries], dtype),
        np.asarray(source.indices[entries]),
        bounds - bounds[0],
    )
    return csr_array(parts, shape=(stop - start, source.num_features))
