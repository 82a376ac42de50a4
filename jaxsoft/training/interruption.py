"""Ctrl-C and SIGTERM as a request to stop between two steps."""

import signal
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped the run.

    Attributes:
        signal_number: Which signal.
        step: The step whose checkpoint was saved on the way out; None where the
            signal came before the first step, or for the second time.
    """

    def __init__(self, signal_number: int, step: int | None = None):
        """Keeps what happened.

        Args:
            signal_number: Which signal.
            step: The step saved on the way out, if any.
        """
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number
        self.step = step


class StopRequest:
    """Catches SIGINT and SIGTERM while it is entered; a context manager.

    The first signal is only remembered: the run looks at it where it can stop cleanly.
    (An exception out of a signal handler may come up in any library's code, and be
    swallowed there.) The second signal raises `TrainingInterrupted` at once. Not
    entered, it never asks to stop. Only the main thread may enter it, as Python
    delivers signals there.

    Attributes:
        received: The signal, or None.
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
            step: The step that is saved, if any.
        """
        if self.received is not None:
            raise TrainingInterrupted(self.received, step)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise TrainingInterrupted(number)
        self.received = number
