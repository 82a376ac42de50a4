"""Checkpoints of a training run, by Orbax: training state and position in the data.

Saving is synchronous on purpose. The training state is donated to the next step, and
on CPU a host copy may share memory with it, so a save in the background could read
what the next step already overwrites.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import jax

from jaxsoft.training.errors import CheckpointError, first_line

__all__ = ["Checkpoints", "Progress"]

# A pytree of arrays, or of their shapes.
State = TypeVar("State")


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


class Checkpoints:
    """The checkpoints of one run; a context manager.

    Orbax writes each under a temporary name and renames it when complete: a process
    killed while saving leaves the one before.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        """Opens the folder, which is made where it is missing.

        Args:
          directory: where the checkpoints are.
          keep: how many to keep, the newest.
        """
        import orbax.checkpoint as ocp

        # Orbax logs each save by way of absl; nobody asked for that here.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
        )

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
        return self._manager.latest_step()

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
            self._manager.save(
                progress.step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
                ),
                force=True,
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {progress.step} cannot be written to {self._directory}: "
                f"{first_line(error)}"
            ) from error

    def restore(self, abstract_state: State) -> tuple[State, Progress]:
        """Reads the newest checkpoint.

        Args:
          abstract_state: the state's structure, as `jax.eval_shape` gives it. A
            leaf with a sharding is read into it, on whatever devices it was
            saved; one without is read onto the first device.

        Returns:
          The state, bit for bit as saved, and where the run stood.

        Raises:
          CheckpointError: there is none, or it does not fit `abstract_state`.
        """
        import orbax.checkpoint as ocp

        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"{self._directory} holds no complete checkpoint.")
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding or first
            ),
            abstract_state,
        )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target),
                    progress=ocp.args.JsonRestore(),
                ),
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {step} in {self._directory} cannot be read: "
                f"{first_line(error)}"
            ) from error
        return restored["state"], Progress(**restored["progress"])
