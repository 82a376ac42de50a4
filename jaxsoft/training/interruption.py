"""Ctrl-C, SIGTERM and SIGHUP as a request to stop between two steps."""

import signal
from types import FrameType, TracebackType

from jaxsoft.training.errors import TrainingInterrupted

__all__ = ["SIGNALS", "StopRequest", "ignored"]

# Windows has no SIGHUP.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)
)


def ignored(number: int) -> bool:
    """Whether the caller of this process wants it to outlive a signal, as nohup does.

    Args:
      number: of the signal. A shell ignores SIGINT for all that it starts in the
        background, which is no wish of that kind.
    """
    return number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN


class StopRequest:
    """Catches SIGINT, SIGTERM and SIGHUP while it is entered; a context manager.

    The first signal is only remembered: the run looks at it where it can stop cleanly.
    (An exception out of a signal handler may come up in any library's code, and be
    swallowed there.) The second signal raises `TrainingInterrupted` at once. Not
    entered, it never asks to stop. Only the main thread may enter it, as Python
    delivers signals there.

    Attributes:
      received: the signal, or None.
      patient: whether the run has something to save, and stops soon; set by the run.
        The command line ends a run at the first signal where it has not.
    """

    def __init__(self) -> None:
        """Starts with no signal received."""
        self.received: int | None = None
        self.patient = False
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        """Installs the handlers."""
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in SIGNALS
            if not ignored(number)
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
