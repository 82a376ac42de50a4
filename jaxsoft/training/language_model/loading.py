"""A trained language model, read back from its run and put to use."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsoft.training.checkpoints import Checkpoints
from jaxsoft.training.errors import RunDirectoryError, first_line
from jaxsoft.training.files import map_array
from jaxsoft.training.language_model.config import LanguageModelConfig, load_config
from jaxsoft.training.language_model.generation import (
    Drawn,
    Generator,
    Sampling,
    TokenText,
    encode_prompt,
)
from jaxsoft.training.language_model.model_plan import ModelPlan, head_plan
from jaxsoft.training.language_model.optimizer import OptimizerConfig
from jaxsoft.training.language_model.tokens import DOCUMENT_START_ID
from jaxsoft.training.language_model.transformer import LanguageModel, TrunkBuilder
from jaxsoft.training.mesh import usable_mesh
from jaxsoft.training.panics import panics_as_errors
from jaxsoft.training.run_directory import RunDirectory
from jaxsoft.training.running import check_same_trunk, require_train_extra

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Continuation", "Piece", "TrainedLanguageModel", "load_language_model"]


@dataclass(frozen=True)
class Piece:
    """What one more token adds to a text.

    Attributes:
      text: the characters that are whole by now; may be empty.
      token_id: the token; that of the mark before a text ends this one.
      log_prob: under the temperature, before filters; None if not asked for.
    """

    text: str
    token_id: int
    log_prob: float | None = None


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt.

    Attributes:
      text: without the prompt.
      token_ids: the tokens drawn; where the text ended before `max_tokens`, the last is
        that of the mark before another.
      log_probs: of each token under the temperature, before filters; None if not asked
        for.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False)
class TrainedLanguageModel:
    """A language model with all that it takes to use it.

    Attributes:
      model: the Flax module: `model.trunk(tokens)` has hidden states `[B, T, H]`, and
        `model.head` is a head of `jaxsoft.nn`.
      tokenizer: of the `tokenizers` library. Each text of the training started with
        token 0, the mark before a text.
      config: what was trained, and on what.
      step: updates made.
    """

    model: LanguageModel
    tokenizer: "Tokenizer"
    config: LanguageModelConfig
    step: int

    def generate(
        self,
        prompt: str = "",
        *,
        number: int = 1,
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        log_probs: bool = False,
    ) -> tuple[Continuation, ...]:
        """Continues a prompt.

        Args:
          prompt: the start of a text; empty starts a new one. Of a long one the last
            `config.sequence_length` tokens count.
          number: how many texts; the first is the same however many follow.
          max_tokens: the longest, in tokens.
          temperature: in [0, ∞]; 0 takes the likeliest token.
          top_k: so many tokens may be drawn, the likeliest; None or 0 for all.
          top_p: of these, those that have this probability together; None for all.
          min_p: of these, those that have this share of the largest probability; None
            for all.
          seed: the same one gives the same texts.
          log_probs: whether to compute log-probabilities.

        Returns:
          The texts. Where the context is longer than `config.sequence_length`, its
          older half is forgotten.

        Raises:
          ValueError: an option is out of its range, or a filter is not the head's:
            those of hierarchical and adaptive heads have none.
        """
        pieces: list[list[Piece]] = [[] for _ in range(number)]
        for step in self.stream(
            prompt,
            number=number,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            log_probs=log_probs,
        ):
            for row, piece in zip(pieces, step, strict=True):
                row += [] if piece is None else [piece]
        return tuple(
            Continuation(
                "".join(piece.text for piece in row),
                tuple(piece.token_id for piece in row),
                # The log-probability of every piece is None, or that of none.
                tuple(p.log_prob for p in row if p.log_prob is not None) or None,
            )
            for row in pieces
        )

    def stream(
        self,
        prompt: str = "",
        *,
        number: int = 1,
        max_tokens: int = 128,
        seed: int = 0,
        log_probs: bool = False,
        **sampling: Any,
    ) -> Iterator[tuple[Piece | None, ...]]:
        """Continues a prompt, and gives each token when it is drawn.

        Args:
          prompt: as in `generate`, like all others.
          number: how many texts.
          max_tokens: the longest, in tokens.
          seed: of the draws.
          log_probs: whether to compute log-probabilities.
          **sampling: `temperature` and filters.

        Returns:
          What gives the next piece of each text, None of one that has ended.

        Raises:
          ValueError: as in `generate`.
        """
        for name, value in (("number", number), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if not 0 <= seed < 2**31:
            raise ValueError(f"`seed` must be in [0, 2**31), got {seed}.")
        tokens = self._generator.stream(
            encode_prompt(self.tokenizer, prompt),
            max_tokens,
            Sampling(**sampling),
            seed=seed,
            rows=number,
            log_probs=log_probs,
        )
        return self._pieces(tokens, number, max_tokens)

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self.model, self.config.sequence_length)

    def _pieces(
        self, tokens: Iterator[Drawn], number: int, max_tokens: int
    ) -> Iterator[tuple[Piece | None, ...]]:
        """Yields what tokens add to each text, until the last has ended."""
        texts: dict[int, TokenText] = {
            row: TokenText(self.tokenizer) for row in range(number)
        }
        for place, drawn in enumerate(tokens):
            pieces: list[Piece | None] = [None] * number
            for row, text in tuple(texts.items()):
                token_id = int(drawn.token_ids[row])
                added = text.add(token_id)
                if token_id == DOCUMENT_START_ID or place == max_tokens - 1:
                    added += text.end()
                    del texts[row]
                log_probs = drawn.log_probs
                log_prob = None if log_probs is None else float(log_probs[row])
                pieces[row] = Piece(added, token_id, log_prob)
            yield tuple(pieces)
            if not texts:
                return


def load_language_model(
    run: str | os.PathLike[str], *, trunk: TrunkBuilder | None = None
) -> TrainedLanguageModel:
    """Loads what a finished run of `train_language_model` has trained.

    Args:
      run: the run's folder.
      trunk: what made the trunk, if the run was given one.

    Returns:
      The model as of the last step, on the first device, with tokenizer and
      configuration.

    Raises:
      MissingExtraError: the extra `train` is not installed.
      RunDirectoryError: the folder holds no run of a language model, or one that is
        not finished.
      CheckpointError: its last checkpoint cannot be read.

    Example:
      After `jaxsoft train --out run`::

        from jaxsoft.training import load_language_model

        trained = load_language_model("run")
        (drawn,) = trained.generate("def main(", temperature=0.7)
        print(drawn.text)
        hidden = trained.model.trunk(jnp.array([drawn.token_ids]))
        log_probs, ids = trained.model.head.top_k(hidden[0, -1], 5)
    """
    require_train_extra()
    directory = RunDirectory(run)
    directory.check_finished()
    check_same_trunk(directory, trunk)
    config = load_config(run)
    tokenizer = _load_tokenizer(directory)
    if not directory.counts.exists():
        raise RunDirectoryError(
            f"the file {directory.counts} does not exist, from which the head is "
            "made: an older version made this run."
        )
    counts = map_array(directory.counts, RunDirectoryError)
    size = tokenizer.get_vocab_size()
    if counts.shape != (size,) or not np.issubdtype(counts.dtype, np.integer):
        raise RunDirectoryError(
            f"the counts {directory.counts} must be {size} integers, one a token of "
            f"{directory.tokenizer.name}, got {counts.dtype} of shape {counts.shape}."
        )
    plan = ModelPlan(
        config.transformer(size),
        OptimizerConfig(config.steps, config.learning_rate),
        head=head_plan(config, counts),
        seed=config.seed,
        mesh=usable_mesh(None, config.batch_size),
        trunk=trunk,
    )
    with Checkpoints(directory.checkpoints) as checkpoints:
        state, progress = checkpoints.restore(plan.abstract_state)
    model = plan.model(state.params, plan.make_tables())
    return TrainedLanguageModel(model, tokenizer, config, progress.step)


def _load_tokenizer(directory: RunDirectory) -> "Tokenizer":
    """Reads the run's tokenizer."""
    from tokenizers import Tokenizer

    try:
        with panics_as_errors():
            return Tokenizer.from_file(str(directory.tokenizer))
    except Exception as error:  # The library has no class of its own.
        raise RunDirectoryError(
            f"the tokenizer {directory.tokenizer} cannot be read ({first_line(error)})."
        ) from error
