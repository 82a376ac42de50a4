"""Checkpoints of a training run, by Orbax: training state and position in the data.

Saving is synchronous on purpose. The training state is donated to the next step, and
on CPU a host copy may share memory with it, so a save in the background could read
what the next step already overwrites.
"""

import contextlib
import dataclasses
import errno
import gc
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax

from jaxsoft.training.errors import CheckpointError
from jaxsoft.training.schemas import convert, one_line

__all__ = ["Checkpoints", "Progress"]

# How long the threads that read a damaged checkpoint may go on, in seconds.
_AFTERMATH = 0.2

# A pytree of arrays, or of their shapes.
State = TypeVar("State")

# What the operating system says where a file may be whole.
_THE_MACHINES = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step.

    Attributes:
      step: number of updates made.
      next_batch: index of the batch that the next step reads. The data order is a
        function of the seed and this index, so it is all there is to keep.
      seconds: time spent on steps so far, in all processes of the run.
    """

    step: int
    next_batch: int
    seconds: float

    def __post_init__(self) -> None:
        """Raises `ValueError` where a number is negative or not finite."""
        if min(self.step, self.next_batch) < 0 or not 0 <= self.seconds < math.inf:
            raise ValueError(f"a run cannot stand at {self}")


class Checkpoints:
    """The checkpoints of one run; a context manager.

    Orbax writes each under a temporary name and renames it when complete: a process
    killed while saving leaves the one before. One that turns out to be damaged counts
    no more, and goes when the next is saved.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        note: Callable[[str], None] = lambda text: None,
    ):
        """Opens the folder, which is made where it is missing.

        Args:
          directory: where the checkpoints are.
          keep: how many to keep, the newest.
          note: told of a damaged checkpoint, and which takes its place.

        Raises:
          CheckpointError: it cannot be opened.
        """
        import orbax.checkpoint as ocp

        # Orbax logs each save, and what it cannot read, by way of absl: what matters is
        # raised, too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._directory, self._note = directory.absolute(), note
        self._damaged: set[int] = set()
        try:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    enable_async_checkpointing=False,
                    cleanup_tmp_directories=True,
                ),
            )
        except Exception as error:  # Orbax and TensorStore raise what they like.
            raise CheckpointError(
                f"the checkpoints in {self._directory} cannot be opened: "
                f"{one_line(error)}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the manager."""
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return max(self._steps(), default=None)

    def save(self, state: object, progress: Progress) -> None:
        """Saves; returns when the checkpoint is complete on disk.

        Args:
          state: a pytree of arrays.
          progress: where the run stands; its `step` names the checkpoint.

        Raises:
          CheckpointError: the disk refuses.
        """
        import orbax.checkpoint as ocp

        if self.latest_step() == progress.step:
            return
        try:
            while self._damaged:
                self._manager.delete(self._damaged.pop())
            self._manager.save(
                progress.step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
                ),
                force=True,
            )
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {progress.step} cannot be written to {self._directory}: "
                f"{one_line(error)}"
            ) from error

    def restore(self, abstract_state: State) -> tuple[State, Progress]:
        """Reads the newest checkpoint that is not damaged.

        Args:
          abstract_state: the state's structure, as `jax.eval_shape` gives it. A
            leaf with a sharding is read into it, on whatever devices it was
            saved; one without is read onto the first device.

        Returns:
          The state, bit for bit as saved, and where the run stood.

        Raises:
          CheckpointError: there is none, or it does not fit `abstract_state`.
        """
        failures: dict[int, str] = {}
        for step in sorted(self._steps(), reverse=True):
            try:
                with _without_tracebacks():
                    restored = self._read(step, abstract_state)
            except CheckpointError as error:
                failures[step] = str(error)
                continue
            for damaged, reason in failures.items():
                self._note(
                    f"checkpoint {damaged} is damaged ({reason}); going on from {step}"
                )
            self._damaged |= set(failures)
            return restored
        for step, reason in failures.items():
            raise CheckpointError(
                f"checkpoint {step} in {self._directory} cannot be read: {reason}"
            )
        raise CheckpointError(f"{self._directory} holds no complete checkpoint.")

    def _steps(self) -> set[int]:
        """The steps of the complete checkpoints that are not known to be damaged."""
        return set(self._manager.all_steps()) - self._damaged

    def _read(self, step: int, abstract_state: State) -> tuple[State, Progress]:
        """Reads one checkpoint; raises whatever Orbax does."""
        import orbax.checkpoint as ocp

        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding or first
            ),
            abstract_state,
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target),
                progress=ocp.args.JsonRestore(),
            ),
        )
        progress = convert(restored["progress"], Progress, "its progress", ValueError)
        if progress.step != step:
            raise ValueError(f"it says that it is of step {progress.step}")
        return restored["state"], progress


def _is_the_machines(error: Exception) -> bool:
    """Whether an error tells of the machine, and not of what is on the disk."""
    numbers = {getattr(each, "errno", None) for each in (error, error.__cause__)}
    return (
        isinstance(error, MemoryError)
        or bool(numbers & _THE_MACHINES)
        or "RESOURCE_EXHAUSTED" in str(error)
    )


class _ButOrbax:
    """A hook for what cannot be raised, but of Orbax's coroutines.

    TensorStore may hold one that read a damaged checkpoint until long after.
    """

    def __init__(self, hook: Callable[[Any], Any]):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        if "orbax" not in getattr(code, "co_filename", ""):
            self._hook(unraisable)


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Makes whatever is raised a `CheckpointError` of one line, and all that is said.

    TensorStore's threads print a traceback where the event loop that waited for them
    is closed, and Python does where their coroutines are left to it. Both happens
    here, before the error is passed on.
    """
    hooks = sys.excepthook, sys.unraisablehook
    reason = None
    sys.excepthook = sys.unraisablehook = lambda *_: None
    try:
        try:
            yield
        except Exception as error:
            if _is_the_machines(error):
                raise
            reason = one_line(error)
        if reason is not None:
            time.sleep(_AFTERMATH)
            gc.collect()
    finally:
        sys.excepthook, sys.unraisablehook = hooks
        if reason is not None and not isinstance(hooks[1], _ButOrbax):
            sys.unraisablehook = _ButOrbax(hooks[1])
    if reason is not None:
        raise CheckpointError(reason)
