"""Training of a small causal language model whose logits are never stored.

The run is a function of its configuration, its corpus and its machine: stopped at any
moment and resumed, it goes on bit for bit, and on another mesh within rounding. Every
piece of state is in the checkpoint (parameters, optimizer, step), and the data order is
a function of seed and step.
"""

import dataclasses
import importlib.metadata
import math
import time
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsoft.training.checkpoints import Checkpoints, Progress
from jaxsoft.training.errors import TrainingInterrupted
from jaxsoft.training.interruption import StopRequest
from jaxsoft.training.language_model.config import (
    FREE_FIELDS,
    LanguageModelConfig,
    load_config,
)
from jaxsoft.training.language_model.corpus import Corpus
from jaxsoft.training.language_model.generation import (
    Generator,
    Sampling,
    encode_prompt,
)
from jaxsoft.training.language_model.model_plan import TrainState, head_plan
from jaxsoft.training.language_model.optimizer import OptimizerConfig
from jaxsoft.training.language_model.preparation import check_vocabulary, prepare
from jaxsoft.training.language_model.report import FinalReport, Sample
from jaxsoft.training.language_model.steps import compiled_programs
from jaxsoft.training.language_model.tokens import TokenCache
from jaxsoft.training.language_model.transformer import TrunkBuilder
from jaxsoft.training.language_model.windows import Windows
from jaxsoft.training.mesh import usable_mesh
from jaxsoft.training.reporting import Listener, Record
from jaxsoft.training.run_directory import RunDirectory, write_atomically
from jaxsoft.training.running import (
    check_finite,
    check_same,
    check_same_surroundings,
    check_same_trunk,
    require_train_extra,
    trunk_name,
)
from jaxsoft.training.unigram import unigram_cross_entropy, unigram_entropy

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["FINAL_EVALUATION", "train_language_model"]

SAMPLE_TEMPERATURES = (0.0, 0.7, 1.0)

# The last validation reads this many times the tokens of those on the way.
FINAL_EVALUATION = 4
# Length of the prompt that the samples get from the validation text.
_PROMPT_TOKENS = 24


def train_language_model(
    config: LanguageModelConfig,
    *,
    resume: bool = False,
    mesh: Mesh | None = None,
    trunk: TrunkBuilder | None = None,
    listener: Listener | None = None,
    stop: StopRequest | None = None,
) -> FinalReport:
    """Trains a language model, or goes on with one.

    Loss is that of a head of `jaxsoft.nn`: the `[N, V]` logits of a step exist only a
    tile at a time, or never. `config.out` receives `config.json`, `metrics.jsonl`,
    `loss.png`, `tokenizer.json`, `counts.npy` and `checkpoints/`, and at its end
    `model.safetensors` and `model-card.md`.

    Args:
      config: what to train.
      resume: go on with the run in `config.out`, from its last checkpoint, bit for
        bit as if it had not been stopped; from the start if it has none. Of a
        finished run the report comes back.
      mesh: the devices, with the axes `data` for sequences, `vocab` for the head's
        classes, or one of them; None takes one device. Losses are the same within
        rounding, and a run may be resumed on another mesh.
      trunk: called with the sizes, a `TransformerConfig`, and `rngs=`, it makes the
        Flax module under the head: one that is called with tokens `[B, T]` and returns
        hidden states `[B, T, H]`, each of its own and earlier tokens alone. All else,
        from the data to the samples, is as with None, which is a transformer. A run
        with a trunk of its own is resumed and loaded with the same.
      listener: told of progress: its methods are called with a line before training and
        after it, with the first step and with each step's and validation's record; see
        `Listener`. What it raises ends the run, which can be resumed.
      stop: asked between steps whether to stop; a stop saves first.

    Returns:
      The final measurements.

    Raises:
      MissingExtraError: the extra `train` is not installed.
      MeshError: the mesh has other axes, does not divide batch or vocabulary, or is
        not for this head.
      CorpusError: the corpus is missing, empty or too small.
      RunDirectoryError: `config.out` holds another run or, to resume, not this one.
      CheckpointError: a checkpoint cannot be written or read.
      NonFiniteLossError: the loss or its gradient is no longer finite.
      TrainingInterrupted: `stop` received a signal; the run can be resumed.

    Example:
      A trunk of your own, and a listener that collects losses::

        class Losses(Listener):
            def __init__(self):
                self.values = []

            def step(self, record):
                self.values.append(record["loss"])

        losses = Losses()
        config = LanguageModelConfig(corpus="texts", out="run", steps=500)
        report = train_language_model(config, trunk=MyTrunk, listener=losses)

      `jaxsoft.examples.own_trunk` is a whole one.
    """
    require_train_extra()
    listener, stop = listener or Listener(), stop or StopRequest()
    mesh, directory = usable_mesh(mesh, config.batch_size), RunDirectory(config.out)
    if resume:
        check_same(config, load_config(config.out), FREE_FIELDS)
        finished = directory.final_record()
        if finished is not None:
            report = FinalReport.from_record(finished, str(directory.metrics))
            listener.note(f"the run in {config.out} finished at step {report.step}")
            return report
    else:
        directory.check_vacant()
    corpus, tokens = prepare(config, listener, stop)
    check_vocabulary(mesh, tokens.facts.vocab_size, config.head)
    description = _description(config, corpus, tokens, mesh, trunk)
    if resume:
        check_same_trunk(directory, trunk)
        check_same_surroundings(directory, description, listener, ("corpus", "tokens"))
    run = _Run(config, description, directory, tokens, mesh, trunk, listener, stop)
    stop.check()
    if not resume:
        directory.start(description)
    directory.keep_tokens(tokens.tokenizer_file, tokens.counts("train"))
    return run.run(resume=resume)


class _Run:
    """The moving parts of one process's share of a run."""

    def __init__(
        self,
        config: LanguageModelConfig,
        description: Record,
        directory: RunDirectory,
        tokens: TokenCache,
        mesh: Mesh,
        trunk: TrunkBuilder | None,
        listener: Listener,
        stop: StopRequest,
    ):
        self.config, self.directory, self.tokens = config, directory, tokens
        self.description = description
        self.listener, self.stop = listener, stop
        length = config.sequence_length
        self.read_batch = Windows(tokens.train, length).batches(
            config.batch_size, config.seed
        )
        self.validation = Windows(tokens.validation, length)
        self.optimizer = OptimizerConfig(config.steps, config.learning_rate)
        self.programs = compiled_programs(
            config.transformer(tokens.facts.vocab_size),
            self.optimizer,
            (config.batch_size, length),
            head=head_plan(config, tokens.counts("train")),
            seed=config.seed,
            mesh=mesh,
            trunk=trunk,
        )
        listener.note(f"compiled in {self.programs.compile_seconds:.1f} s")

    def run(self, *, resume: bool) -> FinalReport:
        """Trains to the end and reports."""
        folder, note = self.directory.checkpoints, self.listener.note
        with Checkpoints(folder, note=note) as checkpoints:
            state, progress = self._first_state(checkpoints, resume=resume)
            self.listener.start(progress.step, self.config.steps)
            try:
                state, progress = self._train(state, progress, checkpoints)
            finally:
                self.stop.patient = False
                self.listener.stop()
        self.stop.check(progress.step)
        return self._finish(state, progress)

    def _first_state(
        self, checkpoints: Checkpoints, *, resume: bool
    ) -> tuple[TrainState, Progress]:
        """Restores the last checkpoint, or makes the initial state."""
        if resume and checkpoints.latest_step() is not None:
            state, progress = checkpoints.restore(self.programs.abstract_state)
            self.listener.note(f"resumed after step {progress.step}")
        else:
            state = self.programs.init()
            progress = Progress(step=0, next_batch=0, seconds=0.0)
            if resume:
                self.listener.note("no checkpoint yet: starting again at step 1")
        self.directory.truncate_metrics(progress.step)
        return state, progress

    def _train(
        self, state: TrainState, progress: Progress, checkpoints: Checkpoints
    ) -> tuple[TrainState, Progress]:
        """Makes the remaining steps, saving now and then and at the end."""
        config = self.config
        written = {(each["step"], each["event"]) for each in self.directory.records()}
        if (progress.step, "validation") not in written:
            self._validate(state, progress)  # A signal may have ended it there.
        while progress.step < config.steps:
            state, progress = self._step(state, progress, checkpoints)
            self.stop.patient = True
            last = progress.step == config.steps
            self._validate(state, progress)
            stopped = self.stop.received is not None
            if last or stopped or progress.step % config.checkpoint_every == 0:
                checkpoints.save(state, progress)
            if stopped:
                self.stop.check(progress.step)
        return state, progress

    def _step(
        self, state: TrainState, progress: Progress, checkpoints: Checkpoints
    ) -> tuple[TrainState, Progress]:
        """Makes one step and writes its metrics line."""
        started = time.perf_counter()
        batch = self.read_batch(progress.next_batch)
        step = progress.step + 1
        rate = self.optimizer.rate(step)
        state, result = self.programs.step(state, batch, rate, step)
        measured = {name: float(value) for name, value in result._asdict().items()}
        took = time.perf_counter() - started
        kept = checkpoints.latest_step()
        check_finite(
            measured,
            f"step {step}",
            (f"checkpoint {kept} is kept" if kept else "no checkpoint yet")
            + f" in {self.directory.checkpoints}; try a lower `learning_rate`.",
        )
        progress = Progress(step, progress.next_batch + 1, progress.seconds + took)
        tokens = self.config.batch_size * self.config.sequence_length
        record: Record = {
            "event": "train",
            "step": step,
            "loss": measured["loss"],
            "gradient_norm": measured["gradient_norm"],
            "parameter_norm": measured["parameter_norm"],
            "learning_rate": rate,
            "tokens": step * tokens,
            "seconds": progress.seconds,
            "tokens_per_second": tokens / took,
        }
        self.directory.append(record)
        self.listener.step(record)
        return state, progress

    def _validate(self, state: TrainState, progress: Progress) -> None:
        """Writes a validation's metrics line where one is due, if no signal comes."""
        step, config = progress.step, self.config
        if step in (0, config.steps) or step % config.evaluate_every:
            return
        try:
            loss = self._validation_loss(state, config.evaluation_tokens)
        except TrainingInterrupted:
            return  # What follows saves, and leaves the line to whoever resumes.
        record: Record = {"event": "validation", "step": step, "loss": loss}
        self.directory.append(record)
        self.listener.validation(record)

    def _validation_loss(self, state: TrainState, num_tokens: int) -> float:
        """Mean loss over windows spread evenly over the validation tokens."""
        count = math.ceil(num_tokens / self.config.sequence_length)
        windows = self.validation.spread(count)
        return self.programs.evaluate(state.params, windows, self.stop.check)

    def _finish(self, state: TrainState, progress: Progress) -> FinalReport:
        """Evaluates, samples, draws the curve and writes the last metrics line."""
        config = self.config
        length = config.sequence_length
        self.listener.note("evaluating and sampling")
        num_tokens = FINAL_EVALUATION * config.evaluation_tokens
        windows = min(math.ceil(num_tokens / length), len(self.validation))
        train, validation = (
            self.tokens.counts(split) for split in ("train", "validation")
        )
        tokenizer = self.tokens.load_tokenizer()
        prompt = self._prompt(tokenizer)
        report = FinalReport(
            step=progress.step,
            head=config.head,
            loss=self._validation_loss(state, num_tokens),
            tokens_evaluated=windows * length,
            unigram_entropy=unigram_entropy(train + validation),
            unigram_cross_entropy=unigram_cross_entropy(train, validation),
            vocab_size=self.tokens.facts.vocab_size,
            memory=self.programs.memory(),
            prompt=tokenizer.decode(prompt),
            samples=self._samples(state, tokenizer, prompt),
            compile_seconds=self.programs.compile_seconds,
            seconds=progress.seconds,
        )
        self.stop.check(progress.step)
        record = report.record()
        self.directory.plot(report.unigram_entropy, record)
        self._publish(state, report)
        self.directory.append(record)
        return report

    def _publish(self, state: TrainState, report: FinalReport) -> None:
        """Writes the weights by name, and the model card."""
        from jaxsoft.training.language_model.model_card import model_card, weights_file

        weights = weights_file(state.params, self.config, report.step)
        write_atomically(self.directory.weights, weights)
        number = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        card = model_card(self.config, self.description, report, number)
        write_atomically(self.directory.card, card.encode())

    def _samples(
        self, state: TrainState, tokenizer: "Tokenizer", prompt: list[int]
    ) -> tuple[Sample, ...]:
        """Continues the prompt at each temperature."""
        config = self.config
        generator = Generator(
            self.programs.model(state.params),
            config.sequence_length,
            mesh=self.programs.mesh,
        )
        drawn = generator.stream(
            prompt,
            config.sample_tokens,
            Sampling(temperature=SAMPLE_TEMPERATURES),
            seed=config.seed,
            rows=len(SAMPLE_TEMPERATURES),
        )
        continuations = np.stack([each.token_ids for each in drawn], axis=1)
        return tuple(
            Sample(temperature, tokenizer.decode(ids.tolist()))
            for temperature, ids in zip(SAMPLE_TEMPERATURES, continuations, strict=True)
        )

    def _prompt(self, tokenizer: "Tokenizer") -> list[int]:
        """Tokens of the prompt: the one asked for, or one from the validation text."""
        if self.config.prompt is not None:
            return encode_prompt(tokenizer, self.config.prompt)
        middle = self.validation[len(self.validation) // 2]
        return middle[: min(_PROMPT_TOKENS, len(middle) - 1)].tolist()


def _description(
    config: LanguageModelConfig,
    corpus: Corpus,
    tokens: TokenCache,
    mesh: Mesh,
    trunk: TrunkBuilder | None,
) -> Record:
    """Contents of `config.json`."""
    train, validation = (tokens.counts(split) for split in ("train", "validation"))
    return {
        "config": dataclasses.asdict(config),
        "corpus": {
            "source": corpus.source,
            "digest": corpus.digest,
            "bytes": corpus.num_bytes,
            "train_texts": len(corpus.train),
            "validation_texts": len(corpus.validation),
            "skipped": corpus.skipped,
            "duplicates": corpus.duplicates,
        },
        "tokens": dataclasses.asdict(tokens.facts),
        "unigram": {
            "entropy": unigram_entropy(train + validation),
            "cross_entropy": unigram_cross_entropy(train, validation),
        },
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", "flax", "optax")
        },
        "device": jax.devices()[0].device_kind,
        "mesh": dict(mesh.shape),
        "trunk": trunk_name(trunk),
    }
