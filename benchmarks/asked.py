"""What is asked of layers on a CPU, of the time of stored logits, and its findings."""

import dataclasses
from collections.abc import Iterator

from benchmarks import peers, workloads
from benchmarks.session import Finding, Result, Session
from benchmarks.workloads import MIB

__all__ = ["findings"]


@dataclasses.dataclass(frozen=True)
class _Bound:
    """What is asked of some results.

    Attributes:
      suite: of the results.
      workloads: their names.
      case: how the titles of their cases start; those of values alone are not meant.
      name: the contender's.
      ratio: the most time, of the baseline's.
      temporaries: the most temporary memory, of the baseline's; None for any.
    """

    suite: str
    workloads: tuple[str, ...]
    case: str
    name: str
    ratio: float
    temporaries: float | None = None

    def is_of(self, result: Result) -> bool:
        """Whether it is asked of a result."""
        return (
            self.suite == result.suite
            and self.name == result.name
            and result.workload in self.workloads
            and result.case.startswith(self.case)
            and result.case.endswith("value and gradient")
        )


_MAIN = (workloads.LINEAR[0].name,)
_LAYERS = tuple(workload.name for workload in workloads.LAYERS)
_TRAINING = tuple(w.name for w in (*workloads.HEADS, *workloads.CONTRASTIVE))
_BOUNDS = (
    *(
        bound
        for case in ("mean, [H, V]:", "mean, [V, H]:")
        for bound in (
            _Bound("linear", _MAIN, case, peers.OURS, 0.95, 1 / 8),
            _Bound("linear", _MAIN, case, peers.with_workspace(16 * MIB), 1.12),
            _Bound("linear", _MAIN, case, peers.with_workspace(512 * MIB), 0.92),
            _Bound("linear", _LAYERS, case, peers.OURS, 1.0),
        )
    ),
    _Bound("heads", _MAIN, "log_prob and", peers.with_workspace(256 * MIB), 1.0),
    *(
        _Bound("heads", _TRAINING, case, peers.OURS, 1.05)
        for case in ("expected values", "distillation", "clip_loss", "nt_xent")
    ),
)


def findings(session: Session, suite: str) -> Iterator[Finding]:
    """Holds what was measured on a CPU against what is asked of it.

    Args:
      session: with the results.
      suite: whose are read.

    Yields:
      A finding for each bound of each result; one of a quick run asks for nothing.
    """
    if session.platform != "cpu":
        return
    results = {(*result.key, result.name): result for result in session.results}
    for result in results.values():
        for bound in _BOUNDS:
            if result.suite != suite or not bound.is_of(result) or not result.ratio:
                continue
            what = f"{result.workload}, {result.case}: {result.name}, "
            most = None if session.quick else bound.ratio
            yield Finding(
                suite, what + "time over that of stored logits", result.ratio, most
            )
            share = _temporaries(result, results.get((*result.key, result.baseline)))
            if bound.temporaries is not None and share is not None:
                most = None if session.quick else bound.temporaries
                yield Finding(suite, what + "temporaries over theirs", share, most)


def _temporaries(ours: Result, theirs: Result | None) -> float | None:
    """Returns the temporaries of a result over those of another, where known."""
    mine, other = (
        result.program.temporary_bytes if result and result.program else None
        for result in (ours, theirs)
    )
    return mine / other if mine is not None and other else None
