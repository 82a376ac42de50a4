"""The model without context: token frequencies, the yardstick of a language model."""

import numpy as np

__all__ = ["unigram_cross_entropy", "unigram_entropy", "unigram_log_probs"]


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that counts `[V]` describe.

    Example:
      >>> round(unigram_entropy(np.array([1, 1, 2])), 4)
      1.0397
    """
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def unigram_log_probs(counts: np.ndarray) -> np.ndarray:
    """Log-probabilities `[V]`, float64, with half a count added to every token."""
    smoothed = counts + 0.5
    return np.log(smoothed / smoothed.sum())


def unigram_cross_entropy(train_counts: np.ndarray, counts: np.ndarray) -> float:
    """Nats a token that the training tokens' frequencies need for other tokens.

    The loss of the best model that ignores context: its probabilities are those of
    `unigram_log_probs(train_counts)`.
    """
    return float(-(counts * unigram_log_probs(train_counts)).sum() / counts.sum())
