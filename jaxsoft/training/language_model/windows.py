"""Windows of a long token array, shuffled into batches by Grain."""

from collections.abc import Callable

import numpy as np

__all__ = ["Windows"]


class Windows:
    """Windows of `T + 1` tokens, one label further than inputs; a Grain source.

    Window `i` starts at token `i·T`: every token but the first is a label once.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        """Keeps the tokens, which stay on disk.

        Args:
          tokens: `[num_tokens]`, memory-mapped or not.
          length: `T`, labels a window.
        """
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        """Number of whole windows."""
        return max(0, (len(self._tokens) - 1) // self._length)

    def __getitem__(self, index: int) -> np.ndarray:
        """Reads a window, `[T + 1]` int32."""
        start = index * self._length
        return self._tokens[start : start + self._length + 1].astype(np.int32)

    def spread(self, count: int) -> np.ndarray:
        """Reads `count` windows at even distances (all, if there are fewer)."""
        count = min(count, len(self))
        indices = np.linspace(0, len(self) - 1, count).round().astype(int)
        return np.stack([self[index] for index in indices])

    def batches(self, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
        """Shuffles the windows anew each epoch, without end.

        Args:
          batch_size: `B`.
          seed: seed of the order.

        Returns:
          A function of an index that reads a batch, `[B, T + 1]`; it depends on
          `seed` and the index alone.
        """
        import grain

        dataset = grain.MapDataset.source(self).shuffle(seed=seed).repeat()
        batches = dataset.batch(batch_size)
        return lambda index: np.asarray(batches[index])
