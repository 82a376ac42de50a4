"""The time that a device works, by its own clock: not that in which a host waits.

`jax.profiler` has CUPTI, or the runtime of a TPU, write down when each kernel and copy
began and ended, whoever launched it. Samples are marked in the same trace. A sample's
time is the time in which something ran that belongs to it, the gaps left out in which
the device waited for the host.
"""

import bisect
import contextlib
import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

__all__ = ["Recorder", "Span", "busy_seconds", "record"]

_MARK = "jaxsoft sample "
# Of what a trace has of a device, that which runs: streams of a GPU; of a TPU programs,
# which its other lines say again in steps and in operations.
_STREAM, _PROGRAMS = "Stream", "XLA Modules"


class Span(NamedTuple):
    """A stretch of time, in nanoseconds of the trace."""

    start: float
    end: float


@dataclasses.dataclass
class Recorder:
    """Marks samples, and says what the device took for each.

    Attributes:
      seconds: of each sample, in order, once the trace has ended; None where there is
        no trace of a device, or none of some sample.
      traces: whether what runs now is traced.
    """

    seconds: list[float] | None = None
    traces: bool = False
    _marked: int = 0

    def sample(self) -> contextlib.AbstractContextManager[Any]:
        """Marks the sample that runs in this context, which ends when it is there."""
        if not self.traces:
            return contextlib.nullcontext()
        self._marked += 1
        return jax.profiler.TraceAnnotation(f"{_MARK}{self._marked - 1}")


@contextlib.contextmanager
def record() -> Iterator[Recorder]:
    """Traces what the device does; on a CPU, or where nothing can be traced, nothing.

    Yields:
      What marks the samples; it knows their seconds after the context.
    """
    recorder = Recorder()
    if jax.default_backend() == "cpu":
        yield recorder
        return
    with tempfile.TemporaryDirectory(prefix="jaxsoft-trace-") as folder:
        recorder.traces = _start(folder)
        try:
            yield recorder
        finally:
            if recorder.traces:
                jax.profiler.stop_trace()
        if recorder.traces:
            recorder.seconds = _read(pathlib.Path(folder), recorder._marked)


def _start(folder: str) -> bool:
    """Starts a trace of devices and marks alone; says whether there is one."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    try:
        jax.profiler.start_trace(folder, profiler_options=options)
    except RuntimeError:  # Another trace runs, or nobody may ask the driver.
        return False
    return True


def _read(folder: pathlib.Path, count: int) -> list[float] | None:
    """Returns the seconds of the marked samples of a trace, None if it lacks some."""
    marks: dict[int, Span] = {}
    spans: list[Span] = []
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for name, events in _lines(plane):
                if plane.name.startswith("/device:") and name.startswith(
                    (_STREAM, _PROGRAMS)
                ):
                    spans += [Span(event.start_ns, event.end_ns) for event in events]
                for event in events:
                    if event.name.startswith(_MARK):
                        place = int(event.name.removeprefix(_MARK))
                        marks[place] = Span(event.start_ns, event.end_ns)
    if sorted(marks) != list(range(count)):
        return None
    seconds = busy_seconds([marks[place] for place in range(count)], spans)
    return seconds if all(seconds) else None


def _lines(plane: Any) -> Iterator[tuple[str, list[Any]]]:
    """Yields the lines of a plane, and their events."""
    for line in plane.lines:
        yield line.name, list(line.events)


def busy_seconds(windows: Sequence[Span], spans: Sequence[Span]) -> list[float]:
    """Returns the seconds of each window in which something ran.

    Args:
      windows: of the samples, one after another.
      spans: of what ran, on any stream; the window of its middle is its own, since the
        clocks of host and device may be some microseconds apart.
    """
    found = []
    ordered = sorted(spans, key=sum)
    middles = [sum(span) / 2 for span in ordered]
    for window in windows:
        first = bisect.bisect_left(middles, window.start)
        end = bisect.bisect_right(middles, window.end)
        busy, until = 0.0, -math.inf
        for span in sorted(ordered[first:end]):
            busy += max(span.end - max(span.start, until), 0)
            until = max(until, span.end)
        found.append(busy / 1e9)
    return found
