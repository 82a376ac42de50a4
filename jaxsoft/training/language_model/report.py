"""What a finished training run of a language model measured."""

import dataclasses
import math
from dataclasses import dataclass

from jaxsoft.training.errors import RunDirectoryError
from jaxsoft.training.heads import HeadKind
from jaxsoft.training.language_model.steps import MemoryReport
from jaxsoft.training.reporting import Record
from jaxsoft.training.schemas import convert

__all__ = ["FinalReport", "Sample", "perplexity"]


def perplexity(loss: float) -> float:
    """exp(loss), or infinity."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class Sample:
    """Text drawn from the trained model.

    Attributes:
      temperature: 0 is greedy.
      text: the continuation, without the prompt.
    """

    temperature: float
    text: str


@dataclass(frozen=True)
class FinalReport:
    """What a finished run measured; also the last line of its metrics.

    Attributes:
      step: updates made.
      loss: validation loss in nats a token, by full normalised probabilities.
      tokens_evaluated: validation tokens behind `loss`.
      unigram_entropy: entropy of the token frequencies of the whole corpus.
      unigram_cross_entropy: loss of the training frequencies on the validation
        tokens: what a model without context reaches.
      vocab_size: `V` in use.
      memory: stored logits against the compiled step.
      prompt: what the samples continue.
      samples: one a temperature.
      compile_seconds: time spent compiling, in the last process of the run.
      seconds: time spent on steps, in all processes of the run.
      head: what was trained: "full", "hierarchical", "adaptive" or "sampled".
    """

    step: int
    loss: float
    tokens_evaluated: int
    unigram_entropy: float
    unigram_cross_entropy: float
    vocab_size: int
    memory: MemoryReport
    prompt: str
    samples: tuple[Sample, ...]
    compile_seconds: float
    seconds: float
    head: HeadKind = "full"

    @property
    def perplexity(self) -> float:
        """Perplexity, exp(loss)."""
        return perplexity(self.loss)

    def record(self) -> Record:
        """The metrics line."""
        return {"event": "final", **dataclasses.asdict(self)}

    @classmethod
    def from_record(
        cls, record: Record, where: str = "the final line"
    ) -> "FinalReport":
        """Reads a metrics line back; `where` it is begins the message of an error."""
        fields = {name: value for name, value in record.items() if name != "event"}
        return convert(fields, cls, where, RunDirectoryError)
