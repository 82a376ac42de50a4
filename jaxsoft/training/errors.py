"""The errors of training, in one module that imports nothing of jaxsoft."""

import signal

__all__ = [
    "CheckpointError",
    "CorpusError",
    "MeshError",
    "MissingExtraError",
    "ModelFileError",
    "NonFiniteLossError",
    "PredictionError",
    "RunDirectoryError",
    "SvmlightError",
    "TableError",
    "TrainingInterrupted",
    "first_line",
]


class MissingExtraError(ImportError):
    """A package of the extra `train` is not installed."""


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient became infinite or NaN; the message names the step."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read back; the message says which."""


class RunDirectoryError(ValueError):
    """The run's folder cannot be used as asked; the message says why."""


class MeshError(ValueError):
    """The mesh does not fit devices, batch or vocabulary; the message says how."""


class CorpusError(ValueError):
    """The corpus cannot be used; the message says why."""


class TableError(ValueError):
    """A table cannot be used; the message names the file and the place in it."""


class SvmlightError(ValueError):
    """A libsvm file, or the folder made from it, cannot be read; says where and why."""


class ModelFileError(ValueError):
    """A model's file cannot be read or written; the message says why."""


class PredictionError(ValueError):
    """Predictions cannot be written as asked; the message says why."""


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped the run.

    Attributes:
      signal_number: which signal.
      step: the step whose checkpoint was saved on the way out; None where the signal
        came before the first step, or for the second time.
    """

    def __init__(self, signal_number: int, step: int | None = None):
        """Keeps what happened.

        Args:
          signal_number: which signal.
          step: the step saved on the way out, if any.
        """
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number
        self.step = step


def first_line(error: BaseException) -> str:
    """The first line of an error's text; other libraries' go on for many."""
    return str(error).strip().partition("\n")[0]
