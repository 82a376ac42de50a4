"""A run in a process of its own, ended where it hangs and started again.

A kernel that was never run may not return, or leave the device's memory in a state
that fails whatever comes after it in the same process. The file that a run writes says
how far it came, and what it was doing: the next process goes on behind that.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

__all__ = ["AGAIN", "CHILD", "Watch", "leave", "supervise"]

# Set in the processes that are watched.
CHILD = "JAXSOFT_BENCHMARKS_WATCHED"
# The exit code of a process that is to be started again.
AGAIN = 75
# To import JAX; with less than three times as long nothing could be measured.
_START_SECONDS = 5.0
# What JAX leaves of the device's memory to PyTorch.
_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}


class Watch:
    """Ends this process where a step takes too long."""

    def __init__(self, seconds: float, end: float, give_up: Callable[[bool], int]):
        """Starts the clock of the first step.

        Args:
          seconds: that a step may take.
          end: when the run must be over, on the monotonic clock.
          give_up: told before the process ends whether the run's time was spent;
            returns the exit code.
        """
        self._seconds = seconds
        self._end = end
        self._give_up = give_up
        self._changed = threading.Condition()
        self._limit = 0.0
        self._stopped = False
        self.step()
        threading.Thread(target=self._wait, daemon=True).start()

    def step(self) -> None:
        """Starts the clock again."""
        with self._changed:
            self._limit = time.monotonic() + self._seconds
            self._changed.notify()

    def stop(self) -> None:
        """Lets the process run."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _wait(self) -> None:
        with self._changed:
            while not self._stopped:
                left = min(self._limit, self._end) - time.monotonic()
                if left <= 0:
                    leave(self._give_up(self._end <= self._limit))
                self._changed.wait(min(left, threading.TIMEOUT_MAX))


def leave(code: int = AGAIN) -> NoReturn:
    """Ends this process at once, whatever its other threads do."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def supervise(
    command: Sequence[str], minutes: float, path: pathlib.Path, maximum: int = 20
) -> int:
    """Runs a command again and again, until it ends by itself or the time is spent.

    Args:
      command: of the process; `--minutes` and what is left of them are added.
      minutes: for all of it.
      path: of the file by which it goes on.
      maximum: processes.

    Returns:
      The exit code of the last process, 1 where it was ended.
    """
    end = time.monotonic() + 60 * minutes
    memory = _MEMORY if importlib.util.find_spec("torch") else {}
    for _ in range(maximum):
        left = end - time.monotonic() - _START_SECONDS
        if left < min(2 * _START_SECONDS, 30 * minutes):
            break
        before = _changed(path)
        code = subprocess.run(
            [*command, "--minutes", str(left / 60)],
            env={**memory, **os.environ, CHILD: "1"},
            check=False,
        ).returncode
        if code in (0, 1, 2):
            return code
        if _changed(path) == before:
            break
    return 1


def _changed(path: pathlib.Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0
