"""Layers for the Mosaic GPU kernels."""

import numpy as np

from tests.linear import cases

__all__ = ["TAUS", "layer"]

# One of each kind: limits, both sides of 1, where a difference overflows, NaN.
TAUS = [0.0, np.inf, 1e-40, 1.2e-38, 1e-3, 0.7, 1.0, 3.0, 1e38, -1.0, 0.3, 2.0, 5.0]


def layer(rows, features, classes, layout, dtype="bfloat16"):
    hidden, kernel, labels = cases.layer(rows, features, classes, dtype=dtype)
    return hidden, kernel if layout == "hv" else kernel.T, labels.astype("int32")
