"""All heads on one corpus, each trained for the same wall time, and compared."""

import dataclasses
import json
import math
import statistics
import time
from dataclasses import dataclass

import numpy as np

from jaxsoft.training.heads import HEADS, HeadKind, Params
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.language_model.config import LanguageModelConfig
from jaxsoft.training.language_model.head_cost import HeadCost, measure_head
from jaxsoft.training.language_model.model_plan import TrainState, head_plan
from jaxsoft.training.language_model.optimizer import OptimizerConfig
from jaxsoft.training.language_model.preparation import prepare
from jaxsoft.training.language_model.report import perplexity
from jaxsoft.training.language_model.steps import Programs
from jaxsoft.training.language_model.tokens import TokenCache
from jaxsoft.training.language_model.trainer import FINAL_EVALUATION
from jaxsoft.training.language_model.windows import Windows
from jaxsoft.training.reporting import Listener
from jaxsoft.training.run_directory import RunDirectory
from jaxsoft.training.running import check_finite, require_train_extra
from jaxsoft.training.unigram import unigram_cross_entropy, unigram_entropy

__all__ = ["ComparisonReport", "HeadReport", "compare_heads"]

# Validations of each head, evenly over its time; the last is the larger one.
_VALIDATIONS = 5
# The schedule of learning rates is cut so fine.
_RESOLUTION = 1000


@dataclass(frozen=True)
class HeadReport:
    """What became of one head.

    Attributes:
      head: its kind.
      steps: updates that the time allowed.
      seconds: time spent on them.
      step_seconds: of a step of the whole model; the median.
      loss: validation loss in nats a token, by full normalised probabilities.
      curve: seconds and validation losses on the way; the last one is of more
        tokens.
      cost: of the head alone.
      compile_seconds: of the model's programs; no part of `seconds`.
    """

    head: HeadKind
    steps: int
    seconds: float
    step_seconds: float
    loss: float
    curve: tuple[tuple[float, float], ...]
    cost: HeadCost
    compile_seconds: float

    @property
    def perplexity(self) -> float:
        """Perplexity, exp(loss)."""
        return perplexity(self.loss)


@dataclass(frozen=True)
class ComparisonReport:
    """All heads, and what they were measured with.

    Attributes:
      seconds: time of training that each head was given.
      vocab_size: `V` in use.
      features: `H`.
      tokens_per_step: `N`.
      tokens_evaluated: validation tokens behind each head's `loss`.
      unigram_entropy: entropy of the token frequencies of the whole corpus.
      unigram_cross_entropy: loss of the training frequencies on validation tokens.
      heads: one report each.
    """

    seconds: float
    vocab_size: int
    features: int
    tokens_per_step: int
    tokens_evaluated: int
    unigram_entropy: float
    unigram_cross_entropy: float
    heads: tuple[HeadReport, ...]


def compare_heads(
    config: LanguageModelConfig,
    seconds: float,
    *,
    listener: Listener | None = None,
    stop: StopRequest | None = None,
) -> ComparisonReport:
    """Trains a model with each head for the same wall time.

    The models differ in nothing but the head; they see the same batches in the same
    order, as many as their time allows. The learning rate warms up and decays over
    that time. `config.out` receives `comparison.json` and `comparison.png`.

    Args:
      config: what to train on; its head, steps, checkpoints and samples are unused.
      seconds: time of training steps that each head is given: compilation and
        validation are not counted.
      listener: told of progress, in seconds.
      stop: asked between steps whether to stop.

    Returns:
      The measurements.

    Raises:
      MissingExtraError: the extra `train` is not installed.
      ValueError: `seconds` is not positive.
      CorpusError: the corpus is missing, empty or too small.
      RunDirectoryError: `config.out` holds a run already, or cannot be written.
      NonFiniteLossError: a loss is no longer finite.
      TrainingInterrupted: `stop` received a signal; nothing was written.
    """
    require_train_extra()
    if not 0 < seconds < math.inf:
        raise ValueError(f"`compare_heads` must be positive, got {seconds:g}.")
    listener, stop = listener or Listener(), stop or StopRequest()
    directory = RunDirectory(config.out)
    directory.check_vacant()
    _, tokens = prepare(config, listener, stop)
    reports = []
    for head in HEADS:
        stop.check()
        contender = _Contender(
            dataclasses.replace(config, head=head), tokens, listener, stop
        )
        reports.append(contender.run(seconds))
    train, validation = (tokens.counts(split) for split in ("train", "validation"))
    report = ComparisonReport(
        seconds=seconds,
        vocab_size=tokens.facts.vocab_size,
        features=config.features,
        tokens_per_step=config.batch_size * config.sequence_length,
        tokens_evaluated=len(contender.windows(FINAL_EVALUATION))
        * config.sequence_length,
        unigram_entropy=unigram_entropy(train + validation),
        unigram_cross_entropy=unigram_cross_entropy(train, validation),
        heads=tuple(reports),
    )
    record = {"config": dataclasses.asdict(config), **dataclasses.asdict(report)}
    directory.write_comparison(json.dumps(record, indent=2) + "\n")
    directory.plot_comparison(
        {head.head: head.curve for head in reports}, report.unigram_entropy
    )
    return report


class _Contender:
    """One head's model, its data and its clock."""

    def __init__(
        self,
        config: LanguageModelConfig,
        tokens: TokenCache,
        listener: Listener,
        stop: StopRequest,
    ):
        self.config, self.listener, self.stop = config, listener, stop
        length = config.sequence_length
        self.read_batch = Windows(tokens.train, length).batches(
            config.batch_size, config.seed
        )
        self.validation = Windows(tokens.validation, length)
        self.programs = Programs(
            config.transformer(tokens.facts.vocab_size),
            OptimizerConfig(_RESOLUTION, config.learning_rate),
            (config.batch_size, length),
            head=head_plan(config, tokens.counts("train")),
            seed=config.seed,
        )
        listener.note(
            f"{config.head} head: compiled in {self.programs.compile_seconds:.1f} s"
        )

    def run(self, seconds: float) -> HeadReport:
        """Trains until the time is up, then validates and measures."""
        state, took = self.programs.init(), []
        curve, elapsed = [], 0.0
        self.listener.start(0, math.ceil(seconds))
        try:
            while elapsed < seconds:
                state = self._step(state, elapsed, seconds, took)
                elapsed = sum(took)
                due = (len(curve) + 1) * seconds / _VALIDATIONS
                if due <= elapsed < seconds:
                    curve.append((elapsed, self._loss(state.params)))
                self.stop.check()
        finally:
            self.listener.stop()
        loss = self._loss(state.params, FINAL_EVALUATION)
        curve.append((elapsed, loss))
        self.listener.note(
            f"{self.config.head} head: {len(took):,} steps, validation loss {loss:.3f}"
        )
        return HeadReport(
            head=self.config.head,
            steps=len(took),
            seconds=elapsed,
            step_seconds=statistics.median(took),
            loss=loss,
            curve=tuple(curve),
            cost=measure_head(self.programs, state.params, self.read_batch(0)),
            compile_seconds=self.programs.compile_seconds,
        )

    def windows(self, times: int = 1) -> np.ndarray:
        """Windows of validation tokens, as many times those of a validation."""
        length = self.config.sequence_length
        return self.validation.spread(
            math.ceil(times * self.config.evaluation_tokens / length)
        )

    def _loss(self, params: Params, times: int = 1) -> float:
        return self.programs.evaluate(params, self.windows(times), self.stop.check)

    def _step(
        self, state: TrainState, elapsed: float, seconds: float, took: list[float]
    ) -> TrainState:
        """Makes a step, and notes how long it took."""
        started = time.perf_counter()
        index = len(took)
        place = 1 + int(elapsed / seconds * (_RESOLUTION - 1))
        state, result = self.programs.step(
            state,
            self.read_batch(index),
            self.programs.optimizer.rate(place),
            index + 1,
        )
        measured = {name: float(value) for name, value in result._asdict().items()}
        took.append(time.perf_counter() - started)
        where = f"{self.config.head} head, step {index + 1}"
        check_finite(measured, where, "try a lower `learning_rate`.")
        tokens = self.config.batch_size * self.config.sequence_length
        elapsed += took[-1]
        self.listener.step(
            {
                "step": int(elapsed) if elapsed < seconds else math.ceil(seconds),
                "loss": measured["loss"],
                "tokens_per_second": tokens / took[-1],
            }
        )
        return state
