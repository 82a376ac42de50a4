"""What holds for a process that is `jaxsoft`: its signals, and its output.

A call into a library may keep the main thread for minutes, where no handler of Python's
is run and an exception of one may be swallowed. So signals wake a thread, which ends
the process there and then, wherever the main thread is: what it was writing is removed,
and a run is resumed from its last checkpoint as after a kill. Only a run that has
something to save is asked to stop instead, which it does after the step in hand; the
second signal does not wait for that either.
"""

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from jaxsoft.training.errors import TrainingInterrupted
from jaxsoft.training.interruption import SIGNALS, StopRequest, ignored
from jaxsoft.training.panics import Stderr
from jaxsoft.training.unfinished import discard_all

__all__ = ["BROKEN_PIPE", "Signals", "close_output", "leave", "prepare_output"]

# The exit code of a process that writes into a pipe which nobody reads.
BROKEN_PIPE = 141


class Signals:
    """Heeds the signals of this process.

    Attributes:
      farewell: what to say on the way out.
      stop: of the run that may be asked to stop, if there is one.
    """

    farewell: Callable[[TrainingInterrupted], str] = str
    stop: StopRequest | None = None
    _watching = False

    @classmethod
    def watch(cls) -> None:
        """Starts the thread; only the main thread may call it."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        for number in SIGNALS:
            if not ignored(number):
                signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=cls._heed, args=(reader, writer), daemon=True).start()
        cls._watching = True

    @classmethod
    def request(cls) -> StopRequest:
        """Returns what a run asks whether to stop, to be entered."""
        return _Request() if cls._watching else StopRequest()

    @classmethod
    def _heed(cls, reader: socket.socket, writer: socket.socket) -> None:
        """Waits for signals; the writer is handed over only to be kept open."""
        while True:
            number = reader.recv(1)[0]
            if number not in SIGNALS:
                continue
            stop = cls.stop
            if stop is not None and stop.patient and stop.received is None:
                stop.received = number
            else:
                cls._end(TrainingInterrupted(number))

    @classmethod
    def _end(cls, interruption: TrainingInterrupted) -> None:
        """Ends the process without waiting for any lock of the main thread's."""
        try:
            discard_all()
            if os.isatty(1):
                os.write(1, b"\x1b[?25h\n")  # a progress bar hid the cursor
            said = f"{cls.farewell(interruption)}\n"
            os.write(Stderr.descriptor, said.encode(errors="backslashreplace"))
        finally:
            os._exit(128 + interruption.signal_number)


class _Request(StopRequest):
    """A request that the thread makes."""

    def __enter__(self) -> "_Request":
        Signals.stop = self
        return self

    def __exit__(self, *error: object) -> None:
        Signals.stop = None


def prepare_output() -> None:
    """Spells out what a stream cannot encode; a line is out when it is ended."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace", line_buffering=True)


def close_output(code: int) -> int:
    """Writes what is still to be written; returns the exit code.

    Args:
      code: the exit code if all is written.
    """
    stream = sys.stdout
    if stream is None:
        return code
    try:
        stream.flush()
    except OSError as error:
        # Python would try again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            return BROKEN_PIPE
        print(f"jaxsoft: output cannot be written ({error})", file=sys.stderr)
        return code or 1
    return code


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code, after what was to be done at its end.

    Python would take a second or two more to clear up, in which it heeds no signal.
    """
    atexit._run_exitfuncs()
    os._exit(code)
