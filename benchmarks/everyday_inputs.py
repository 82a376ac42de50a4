"""What the inputs of `python -m benchmarks everyday` are drawn from, with NumPy.

JAX would compile programs for each input of each size, which takes longer than most of
the calls that are timed on them.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

__all__ = ["Draws", "softmax"]


class Draws:
    """Random arrays, the same from run to run: each place has numbers of its own."""

    def __init__(self, seed: int):
        """Takes what all places depend on."""
        self._seed = seed

    def _generator(self, place: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, place))

    def normal(
        self, place: int, shape: tuple[int, ...], dtype: Any = "float32"
    ) -> np.ndarray:
        """Returns normal numbers, drawn in float32."""
        drawn = self._generator(place).standard_normal(shape, np.float32)
        return drawn.astype(jnp.dtype(dtype), copy=False)

    def uniform(
        self, place: int, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0
    ) -> np.ndarray:
        """Returns float32 numbers between two."""
        drawn = self._generator(place).random(shape, np.float32)
        return drawn * np.float32(high - low) + np.float32(low)

    def integers(
        self,
        place: int,
        shape: tuple[int, ...],
        low: int,
        high: int,
        dtype: Any = np.int32,
    ) -> np.ndarray:
        """Returns integers from `low` to `high` - 1."""
        return self._generator(place).integers(low, high, shape, dtype)

    def gumbel(self, place: int, shape: tuple[int, ...]) -> np.ndarray:
        """Returns Gumbel noise, float32."""
        drawn = self._generator(place).standard_exponential(shape, np.float32)
        return -np.log(np.maximum(drawn, np.finfo(np.float32).tiny))

    def classes(self, place: int, logits: np.ndarray, temperature: float) -> np.ndarray:
        """Returns [N] classes that logits [N, V] give at a temperature, int32."""
        scores = logits / np.float32(temperature) + self.gumbel(place, logits.shape)
        return scores.argmax(axis=-1).astype(np.int32)

    def candidates(self, place: int, rows: int, classes: int, count: int) -> np.ndarray:
        """Returns [N, count] classes of which none comes twice in a row."""
        first = self.integers(place, (rows, 1), 0, classes)
        return (first + np.arange(count, dtype=np.int32) * (classes // count)) % classes

    def listed(self, place: int, rows: int, count: int) -> np.ndarray:
        """Returns [N, count] log-probabilities that leave some to other classes."""
        return np.log(softmax(self.normal(place, (rows, count + 1))))[:, :-1]


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Returns probabilities of float32 logits."""
    p = np.exp((logits - logits.max(axis=-1, keepdims=True)) / np.float32(temperature))
    return p / p.sum(axis=-1, keepdims=True)
