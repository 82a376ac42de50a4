"""What a language model's training run is: its configuration."""

import dataclasses
import math
import os
from dataclasses import dataclass

from jaxsoft._core.options import one_of
from jaxsoft.training.head_kinds import HEADS, HeadKind
from jaxsoft.training.language_model.tokens import MIN_VOCAB_SIZE
from jaxsoft.training.memory import MemoryBudget, bytes_in
from jaxsoft.training.running import read_config

__all__ = ["FREE_FIELDS", "LanguageModelConfig", "TransformerConfig", "load_config"]

# A run resumed with other values of these is still the same run; the corpus itself is
# compared by its digest, wherever it lies now.
FREE_FIELDS = frozenset(
    {"corpus", "out", "cache_dir", "memory", "workspace", "checkpoint_every"}
)

# Of what costs more than it says: a tokenizer makes room for all its tokens at once,
# each layer is compiled by itself, and a sample's token takes a pass of the model.
_MOST = {"vocab_size": 2**24, "layers": 1000, "sample_tokens": 2**20}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a `LanguageModel`.

    Attributes:
      num_classes: `V`, the number of tokens.
      features: `H`, the width of the trunk and of the head's input.
      layers: number of attention blocks.
      heads: attention heads; divides `features` into an even head size.
    """

    num_classes: int
    features: int = 128
    layers: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        """Checks all values; raises `ValueError`."""
        for name in ("num_classes", "features", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be positive, got {getattr(self, name)}."
                )
        if self.features % (2 * self.heads):
            raise ValueError(
                "`features` must be a multiple of 2 * `heads`, got "
                f"features={self.features} and heads={self.heads}."
            )


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """What to train, on what, and where to write it.

    Attributes:
      corpus: a text file, a folder of them or a compressed one; None is the standard
        library.
      vocab_size: tokens of the byte-level BPE, at least 257.
      steps: updates to make.
      batch_size: sequences a step.
      sequence_length: tokens a sequence.
      features: width of the model.
      layers: attention blocks.
      heads: attention heads.
      learning_rate: peak of the schedule: warm-up, then cosine decay.
      head: "full", "hierarchical", "adaptive" or "sampled"; see
        `jaxsoft.training.heads`. Validation is by the full normalised
        probabilities of each.
      num_samples: classes that a sampled head draws a step.
      seed: seed of parameters, data order and samples.
      out: folder of the run.
      cache_dir: root of the token cache; None is the user's cache folder.
      memory: the most memory that files and the model may take, such as "4G"; None is
        half of what is free.
      workspace: the temporary memory that a full head's loss may take, such as "1GiB";
        None is as in `jaxsoft.linear_cross_entropy`.
      evaluate_every: steps between validations.
      evaluation_tokens: tokens of a validation; the last one reads four times more.
      checkpoint_every: steps between checkpoints.
      sample_tokens: length of the sampled texts.
      prompt: text that the samples continue: empty starts a new text, None takes a
        few words from the middle of the validation text.
    """

    corpus: str | None = None
    vocab_size: int = 65_536
    steps: int = 120
    batch_size: int = 8
    sequence_length: int = 128
    features: int = 128
    layers: int = 4
    heads: int = 4
    learning_rate: float = 6e-3
    head: HeadKind = "full"
    num_samples: int = 1024
    seed: int = 0
    out: str = "jaxsoft-run"
    cache_dir: str | None = None
    memory: str | None = None
    workspace: str | None = None
    evaluate_every: int = 40
    evaluation_tokens: int = 8_192
    checkpoint_every: int = 40
    sample_tokens: int = 80
    prompt: str | None = None

    def __post_init__(self) -> None:
        """Checks all values; raises `ValueError`."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is not int or field.name == "seed":
                continue
            if value < 1 and field.name != "vocab_size":
                raise ValueError(f"`{field.name}` must be positive, got {value}.")
            most = _MOST.get(field.name, 2**31 - 1)
            if value > most:
                raise ValueError(
                    f"`{field.name}` must be at most {most:,}, got {value}."
                )
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"`vocab_size` must be at least {MIN_VOCAB_SIZE} (256 bytes and the "
                f"document mark), got {self.vocab_size}."
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"`seed` must be in [0, 2**31), got {self.seed}.")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(
                f"`learning_rate` must be positive, got {self.learning_rate}."
            )
        one_of("head", self.head, HEADS)
        if self.memory is not None:
            MemoryBudget.parse(self.memory)
        if self.workspace_bytes is not None and self.head != "full":
            raise ValueError(
                f"`workspace` must be left out with `head` {self.head!r}, whose loss "
                f"takes none, got {self.workspace!r}."
            )
        self.transformer(self.vocab_size)

    @property
    def workspace_bytes(self) -> int | None:
        """The bytes of `workspace`."""
        if self.workspace is None:
            return None
        return bytes_in(self.workspace, "workspace")

    def check_memory(self, budget: MemoryBudget, num_classes: int) -> None:
        """Raises `MemoryError` for a model and a batch that cannot be trained within.

        What is counted is the least that a step takes: parameters, their gradients and
        two moments, and of each layer the hidden states and the attention's weights
        that the way back needs.

        Args:
          budget: what there is.
          num_classes: tokens of the vocabulary.
        """
        model = self.layers * 12 * self.features**2
        model += 2 * num_classes * self.features
        attention = self.heads * self.sequence_length
        rows = self.batch_size * self.sequence_length
        states = rows * self.layers * (self.features + attention)
        budget.require(4 * (4 * model + states), "a step of this model")

    def transformer(self, num_classes: int) -> TransformerConfig:
        """Sizes of the model for the vocabulary that the corpus allows."""
        return TransformerConfig(
            num_classes=num_classes,
            features=self.features,
            layers=self.layers,
            heads=self.heads,
        )


def load_config(out: str | os.PathLike[str]) -> LanguageModelConfig:
    """Reads the configuration of the language model's run in a folder.

    Args:
      out: the folder.

    Returns:
      The configuration that the run was started with.

    Raises:
      RunDirectoryError: there is none.
    """
    return read_config(out, LanguageModelConfig)
