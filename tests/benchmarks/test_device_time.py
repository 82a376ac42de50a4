"""Times by a device's own clock: what is counted, and what falls back to the host."""

import contextlib
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import device_time, timing
from benchmarks.device_time import Span, busy_seconds


def test_a_sample_is_the_time_in_which_something_ran():
    windows = [Span(0, 10e9), Span(20e9, 30e9), Span(40e9, 41e9)]
    spans = [
        Span(1e9, 3e9),
        # On another stream meanwhile, and one behind the other.
        Span(2e9, 4e9),
        Span(2.5e9, 3e9),
        Span(6e9, 7e9),
        # The clocks of host and device differ.
        Span(19.9e9, 22e9),
        # Between samples: a copy of what the next one donates.
        Span(12e9, 18e9),
    ]
    assert busy_seconds(windows, spans) == pytest.approx([4.0, 2.1, 0.0])
    assert busy_seconds(windows, []) == [0, 0, 0]


def test_marks_are_found_in_a_trace_and_none_of_a_device_is_said(tmp_path):
    """A CPU's trace has the marks, and no line of a device."""
    assert device_time._start(str(tmp_path))
    recorder = device_time.Recorder(traces=True)
    for _ in range(3):
        with recorder.sample():
            jax.block_until_ready(jnp.ones(8) + 1)
    jax.profiler.stop_trace()
    marks = [
        event.name
        for path in tmp_path.rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        for line in plane.lines
        for event in line.events
        if event.name.startswith("jaxsoft sample")
    ]
    assert sorted(marks) == [f"jaxsoft sample {place}" for place in range(3)]
    assert device_time._read(tmp_path, 3) is None


def event(name, start, end):
    return types.SimpleNamespace(name=name, start_ns=start, end_ns=end)


def plane(name, **lines):
    found = [
        types.SimpleNamespace(name=line.replace("_", " "), events=events)
        for line, events in lines.items()
    ]
    return types.SimpleNamespace(name=name, lines=found)


@pytest.mark.parametrize("missing", ["nothing", "a mark", "a kernel"])
def test_times_are_the_devices_where_all_samples_are_there(
    monkeypatch, tmp_path, missing
):
    (tmp_path / "one.xplane.pb").touch()
    marks = [event(f"jaxsoft sample {i}", 100 * i, 100 * i + 90) for i in range(2)]
    kernels = [event("fusion", 100 * i + 10, 100 * i + 30) for i in range(2)]
    planes = [
        plane("/host:CPU", python=marks[missing == "a mark" :]),
        plane(
            "/device:GPU:0",
            Stream_7=kernels[missing == "a kernel" :],
            # What repeats the whole of it counts once.
            Steps=[event("0", 0, 1000)],
        ),
    ]
    data = types.SimpleNamespace(planes=planes)
    monkeypatch.setattr(
        jax.profiler, "ProfileData", types.SimpleNamespace(from_file=lambda _: data)
    )
    found = device_time._read(pathlib.Path(tmp_path), 2)
    assert found == (pytest.approx([2e-8] * 2) if missing == "nothing" else None)


def test_samples_by_the_device_are_of_one_call_each(monkeypatch):
    class Fake(device_time.Recorder):
        def sample(self):
            self.seconds = [*(self.seconds or []), 8.0]
            return contextlib.nullcontext()

    programs = [
        timing.compile_program(name, lambda x: x + 1, (jnp.ones(8),)) for name in "ab"
    ]
    fake = Fake(traces=True)
    for clock, recorder in (("device", fake), ("host", device_time.Recorder())):
        monkeypatch.setattr(
            device_time, "record", lambda r=recorder: contextlib.nullcontext(r)
        )
        found = timing.interleave(
            programs, (jnp.ones(8),), rounds=3, called={"a": 1.0, "b": 0.0025}
        )
        assert {measured.clock for measured in found.values()} == {clock}
        if clock == "device":
            assert found["a"].samples == (8.0,) * 3
            assert found["b"].samples == (4.0,) * 3
