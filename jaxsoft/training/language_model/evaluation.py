"""How well a trained language model predicts a text, and how well it knows that.

Windows of the model's length follow each other without overlap, as in the validations
of a run: every token but the first is predicted once, from what its window has before
it. All numbers are by full normalised probabilities, whatever the head.
"""

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsoft.logits.calibration import CalibrationBins, calibration_bins
from jaxsoft.training.language_model.corpus import read_texts
from jaxsoft.training.language_model.loading import load_language_model
from jaxsoft.training.language_model.report import perplexity
from jaxsoft.training.language_model.tokens import encode_texts
from jaxsoft.training.language_model.transformer import TrunkBuilder
from jaxsoft.training.memory import MemoryBudget
from jaxsoft.training.reliability import draw_bins
from jaxsoft.training.reporting import Listener, Record, printable
from jaxsoft.training.run_directory import RunDirectory

__all__ = ["EvaluationReport", "evaluate_language_model"]

_BINS = 15


@dataclass(frozen=True)
class EvaluationReport:
    """What a model makes of a corpus.

    Attributes:
      corpus: where the texts come from.
      texts: how many.
      bytes: their size in UTF-8.
      tokens: how many were predicted: all but the first, the marks between texts
        included.
      loss: cross-entropy in nats a token.
      perplexity: exp(loss).
      bits_per_byte: of all tokens, over all bytes: what a compressor with this model
        would take.
      accuracy: share of tokens that were the likeliest.
      expected_calibration_error: of the likeliest token, by 15 bins of its probability.
      step: updates that the model had.
    """

    corpus: str
    texts: int
    bytes: int
    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    expected_calibration_error: float
    step: int

    def record(self) -> Record:
        """The report as JSON has it."""
        return dataclasses.asdict(self)


def evaluate_language_model(
    run: str | os.PathLike[str],
    corpus: str | os.PathLike[str],
    *,
    memory: str | None = None,
    trunk: TrunkBuilder | None = None,
    listener: Listener | None = None,
) -> EvaluationReport:
    """Measures a run's model on a corpus.

    The reliability diagram of the likeliest token goes to `reliability.png` in the
    run's folder, in the place of that of another corpus.

    Args:
      run: the folder of a finished run of `train_language_model`.
      corpus: a text file, compressed or not, or a folder of such.
      memory: the most that the texts may take, such as "4G"; None is half of what is
        free.
      trunk: what made the trunk, if the run was given one.
      listener: told of progress, in batches.

    Returns:
      The measurements.

    Raises:
      MissingExtraError: the extra `train` is not installed.
      RunDirectoryError: the folder holds no run, or one that is not finished.
      CheckpointError: its last checkpoint cannot be read.
      CorpusError: the corpus is missing or holds no text.
    """
    listener = listener or Listener()
    trained = load_language_model(run, trunk=trunk)
    budget = MemoryBudget.parse(memory)
    found = read_texts(corpus, memory=budget)
    tokens = encode_texts(trained.tokenizer, found.texts, np.int32)
    config = trained.config
    sums = _Sums()
    batches = _batches(tokens, config.batch_size, config.sequence_length)
    predict = _predictor(trained.model)
    count = math.ceil((len(tokens) - 1) / (config.batch_size * config.sequence_length))
    listener.start(0, count)
    started = time.perf_counter()
    try:
        for step, (windows, is_label) in enumerate(batches, 1):
            sums.add(predict(windows), windows[:, 1:], is_label)
            rate = sums.tokens / (time.perf_counter() - started)
            listener.step(
                {
                    "event": "evaluation",
                    "step": step,
                    "loss": sums.loss,
                    "tokens_per_second": rate,
                }
            )
    finally:
        listener.stop()
    num_bytes = sum(len(text.encode()) for text in found.texts)
    report = EvaluationReport(
        corpus=found.source,
        texts=len(found.texts),
        bytes=num_bytes,
        tokens=sums.tokens,
        loss=sums.loss,
        perplexity=perplexity(sums.loss),
        bits_per_byte=sums.nats / math.log(2) / num_bytes,
        accuracy=float(sums.bins.correct.sum()) / sums.tokens,
        expected_calibration_error=float(np.abs(sums.bins.gap).sum()) / sums.tokens,
        step=trained.step,
    )
    # Matplotlib takes what is between two dollars for mathematics.
    name = printable(Path(found.source).name).replace("$", r"\$")
    draw_bins(sums.bins, RunDirectory(run).reliability, f"next token of {name}")
    return report


class _Sums:
    """Sums over tokens, in float64.

    Attributes:
      tokens: how many.
      nats: of their losses.
      bins: of calibration.
    """

    def __init__(self) -> None:
        self.tokens, self.nats = 0, 0.0
        self.bins = CalibrationBins(*np.zeros([4, _BINS]))

    @property
    def loss(self) -> float:
        """The mean."""
        return self.nats / self.tokens

    def add(
        self, predicted: tuple[Array, Array, Array], labels: np.ndarray, is_label: Any
    ) -> None:
        """Adds a batch, `[B, T]` each; those that are no label count nothing."""
        log_prob, best, token_ids = map(np.asarray, predicted)
        self.tokens += int(is_label.sum())
        self.nats -= float(log_prob[is_label].sum(dtype=np.float64))
        # Of two classes: the likeliest token, and one that is not it.
        confidence = np.exp(np.minimum(best, 0))
        bins = calibration_bins(
            np.stack([confidence, np.zeros_like(confidence)], axis=-1),
            (token_ids != labels).astype(np.int32),
            _BINS,
            weights=is_label,
        )
        self.bins = CalibrationBins(
            *(old + np.asarray(new) for old, new in zip(self.bins, bins, strict=True))
        )


def _predictor(model: Any) -> Any:
    """Compiles what the model predicts.

    Returns:
      A function of windows `[B, T + 1]`: the log-probability of each next token, that
      of the likeliest one, and which that is, `[B, T]` each.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def predict(state: Any, windows: Array) -> tuple[Array, Array, Array]:
        model = nnx.merge(graph, state)
        hidden = model.trunk(windows[:, :-1])
        best, token_ids = model.head.top_k(hidden, 1)
        log_prob = model.head.log_prob(hidden, windows[:, 1:])
        return log_prob, best[..., 0], token_ids[..., 0]

    return lambda windows: predict(state, jnp.asarray(windows))


def _batches(
    tokens: np.ndarray, batch: int, length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields windows `[B, T + 1]`, and which of their labels `[B, T]` are there."""
    count = len(tokens) - 1
    for start in range(0, count, batch * length):
        places = start + length * np.arange(batch)[:, None] + np.arange(length + 1)
        is_label = places[:, 1:] <= count
        yield tokens[np.minimum(places, count)], is_label
