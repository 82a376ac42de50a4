"""Ctrl-C and SIGTERM as a request to stop between two steps."""

import signal
from types import FrameType, TracebackType

from jaxsoft.training.errors import TrainingInterrupted

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Catches SIGINT and SIGTERM while it is entered; a context manager.

    The first signal is only remembered: the run looks at it where it can stop cleanly.
    (An exception out of a signal handler may come up in any library's code, and be
    swallowed there.) The second signal raises `TrainingInterrupted` at once. Not
    entered, it never asks to stop. Only the main thread may enter it, as Python
    delivers signals there.

    Attributes:
      received: the signal, or None.
    """

    def __init__(self) -> None:
        """Starts with no signal received."""
        self.received: int | None = None
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        """Installs the handlers."""
        self._previous = {
            number: signal.signal(number, self._handle) for number in _SIGNALS
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Puts the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self, step: int | None = None) -> None:
        """Raises `TrainingInterrupted` if a signal was received.

        Args:
          step: the step that is saved, if any.
        """
        if self.received is not None:
            raise TrainingInterrupted(self.received, step)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise TrainingInterrupted(number)
        self.received = number
