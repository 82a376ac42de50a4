"""Whether draws follow probabilities."""

import numpy as np
from scipy import stats


def chi_square(drawn, probabilities):
    """Returns the p-value of draws, rare classes pooled into groups of 10 expected."""
    expected = probabilities * drawn.size
    order = np.argsort(expected)
    counts = np.bincount(drawn, minlength=probabilities.size)[order]
    groups = np.floor(np.cumsum(expected[order]) / 10).astype(int)
    groups = np.unique(groups, return_inverse=True)[1]
    seen, due = (np.bincount(groups, a) for a in (counts, expected[order]))
    if due[-1] < 5:
        seen[-2], due[-2] = seen[-2:].sum(), due[-2:].sum()
        seen, due = seen[:-1], due[:-1]
    return stats.chisquare(seen, due * seen.sum() / due.sum()).pvalue
