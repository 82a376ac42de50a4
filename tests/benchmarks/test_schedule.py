"""The record of least times: what it holds, where it goes on, what it shows."""

import json

import pytest

from benchmarks import __main__ as command
from benchmarks import schedule
from jaxsoft.devices.bundles import UNITS
from jaxsoft.devices.hlo import Work
from jaxsoft.devices.measuring import Found, Ran
from jaxsoft.devices.schedule import Loop, Part, Schedule
from jaxsoft.devices.surveying import DeviceError

BUSY: dict[str, float] = {unit: 0.5 for unit in UNITS}
CYCLES = 3_502_000


def found(name, cycles=CYCLES):
    part = Part("fusion", 1, cycles, False, (Loop(10, 5, cycles, BUSY),))
    ran = Ran(
        "xla",
        {"value": 0},
        work={"value": Work(918 * 10**9, 1638 * 10**6)},
        schedules={"value": Schedule(cycles, True, BUSY, (part,))},
    )
    kernel = Ran("mosaic_tpu", refused="too wide")
    return Found(
        name, "xla", (ran, kernel, Ran("mosaic_gpu", refused="it is for cuda"))
    )


@pytest.fixture
def surveyed(monkeypatch):
    """Finds all functions but `entropy`, which takes the compiler with it."""
    asked = []

    def survey(target, names, shapes, *, schedule):
        assert schedule
        asked.append((target, tuple(names), shapes.hidden))
        for name in names:
            if name == "entropy":
                raise DeviceError("no memory left")
            yield found(name)

    monkeypatch.setattr(schedule, "survey", survey)
    return asked


def run(path, *arguments):
    return command.main(["schedule", "--out", str(path), *arguments])


def test_a_record_goes_on_where_it_ends(tmp_path, surveyed, capsys):
    path = tmp_path / "record.json"
    only = ("softmax", "entropy", "log_softmax")
    options = ["--targets", "v6e", "--models", "gemma3", "--only", *only]
    assert run(path, *options) == 1
    # The function behind the one that failed is asked for again, alone.
    assert surveyed == [("v6e", only, 2560), ("v6e", ("log_softmax",), 2560)]
    cells = json.loads(path.read_text())["cells"]
    assert [cell["function"] for cell in cells] == [
        *["softmax"] * 2,
        "entropy",
        *["log_softmax"] * 2,
    ]
    assert cells[2]["error"] == "no memory left"
    assert cells[1]["refused"] == "too wide"
    cell = cells[0]
    assert (cell["target"], cell["model"], cell["tokens"]) == ("v6e", "gemma3", 4096)
    assert cell["least_seconds"] == pytest.approx(2e-3, rel=1e-3)
    assert cell["seconds"] == {"memory": 1e-3, "products": 1e-3, "issue": 2e-3}
    assert cell["is_least"] and cell["is_default"] and cell["bundles"] == CYCLES
    assert cell["main_loop"] == {"part": "fusion", "share": 1.0, "busy": BUSY}
    said = capsys.readouterr().out
    assert "v6e, gemma3, 4,096 tokens: least ms" in said
    assert "| `softmax` | value | ≥ 2 | issue |" in said
    assert "entropy: no memory left" in said
    assert run(path, *options) == 1 and len(surveyed) == 2
    assert run(path, *options, "--tokens", "8", "--show") == 1 and len(surveyed) == 2


def test_the_picture(tmp_path, surveyed):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "record.json", tmp_path / "record.png"
    options = ["--targets", "v6e", "7x", "--models", "gemma3", "--only", "softmax"]
    assert run(path, *options, "--plot", str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--targets", "v4"], "no 'v4'; there are h100"),
        (["--only", "softmx"], "no 'softmx'"),
        (["--plot", "/nowhere/at/all.png"], "there is no folder"),
    ],
)
def test_bad_input_is_answered_in_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "record.json", *arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "Expecting property name"),
        ('{"schema": "another"}', "no record of schedules"),
        (json.dumps({"schema": schedule.SCHEMA, "versions": {}}), "other compilers"),
    ],
)
def test_another_file_is_refused(tmp_path, capsys, text, message):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(SystemExit):
        run(path)
    assert message in capsys.readouterr().err


def test_a_compiler_that_fails_behind_the_last_function(tmp_path, monkeypatch):
    def survey(target, names, shapes, *, schedule):
        yield from map(found, names)
        raise DeviceError("exit code -6")

    monkeypatch.setattr(schedule, "survey", survey)
    path = tmp_path / "record.json"
    options = ["--targets", "v6e", "--models", "gemma3", "--only", "softmax"]
    assert run(path, *options) == 0
    (cell,) = [c for c in json.loads(path.read_text())["cells"] if "what" in c]
    assert cell["function"] == "softmax"
