import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Literal, NotRequired, TypedDict

import pytest

from jaxsoft.training.errors import RunDirectoryError
from jaxsoft.training.language_model.config import LanguageModelConfig, load_config
from jaxsoft.training.language_model.report import FinalReport, Sample
from jaxsoft.training.language_model.steps import MemoryReport
from jaxsoft.training.regression.measures import Measures
from jaxsoft.training.regression.report import RegressionReport
from jaxsoft.training.regression.run_files import RegressionDirectory
from jaxsoft.training.regression.settings import RegressConfig
from jaxsoft.training.run_directory import RunDirectory
from jaxsoft.training.running import read_config
from jaxsoft.training.schemas import decode, decode_file


class Line(TypedDict):
    loss: float
    norm: NotRequired[float]


@dataclass(frozen=True)
class Part:
    name: str
    kind: Literal["a", "b"] = "a"
    lines: tuple[Line, ...] = ()

    def __post_init__(self):
        if not self.name:
            raise ValueError("`name` must not be empty.")


@dataclass(frozen=True)
class Whole:
    count: int
    rate: float
    parts: tuple[Part, ...]
    most: int | None = None


GOOD = {"count": 1, "rate": 2, "parts": [{"name": "x", "lines": [{"loss": 1.5}]}]}


def refused(text, kind=Whole, **options):
    with pytest.raises(RunDirectoryError) as error:
        decode(text, kind, "here.json", RunDirectoryError, **options)
    said = str(error.value)
    assert said.startswith("here.json cannot be read (") and "\n" not in said
    assert len(said) < 400
    return said


def test_what_fits_is_decoded():
    whole = decode(json.dumps(GOOD), Whole, "here", ValueError)
    assert whole == Whole(1, 2.0, (Part("x", "a", ({"loss": 1.5},)),))
    assert isinstance(whole.rate, float)


def test_what_does_not_fit_is_refused_in_a_line_that_names_the_field():
    part = GOOD["parts"][0]
    for changes, place in (
        ({"count": "1"}, "$.count"),
        ({"count": 1.0}, "$.count"),
        ({"count": True}, "$.count"),
        ({"count": None}, "$.count"),
        ({"rate": "2"}, "$.rate"),
        ({"rate": [2]}, "$.rate"),
        ({"most": []}, "$.most"),
        ({"other": 1}, "unknown field `other` - at `$`"),
        ({"parts": {}}, "$.parts"),
        ({"parts": [part, {**part, "name": 3}]}, "$.parts[1].name"),
        ({"parts": [part, {**part, "name": ""}]}, "`name` must not be empty"),
        ({"parts": [part, {**part, "kind": "c\nd" * 999}]}, "Invalid enum"),
        ({"parts": [part, {**part, "old": 3}]}, "unknown field `old` - at `$.parts[1]"),
        ({"parts": [{**part, "lines": [{}]}]}, "missing required field `loss`"),
        ({"parts": [{**part, "lines": [{"loss": 1, "x": 1}]}]}, "$.parts[0].lines[0]"),
    ):
        assert place in refused(json.dumps({**GOOD, **changes}))
    for name in GOOD:
        rest = {key: value for key, value in GOOD.items() if key != name}
        assert f"`{name}`" in refused(json.dumps(rest))
    for text in ("null", "[]", "1", '"a"', "true"):
        assert "Expected `object`" in refused(text)


def test_what_is_no_json_is_refused():
    for text in (b"\xff", "", "{", "{}}", "[" * 10**5, '{"a":' * 10**5, b"\0" * 9, "'"):
        refused(text)


def test_numbers_are_of_64_bits_and_finite():
    for number in ("9" * 5000, "-" + "9" * 30):
        text = json.dumps(GOOD).replace('"count": 1', f'"count": {number}')
        assert "HugeNumber` - at `$.count`" in refused(text)
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        text = json.dumps(GOOD).replace('"rate": 2', f'"rate": {number}')
        assert "NonFiniteNumber` - at `$.rate`" in refused(text)
        whole = decode(text, Whole, "here", ValueError, finite=False)
        assert not math.isfinite(whole.rate)


def test_files_are_regular_and_bounded(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(10**8)
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    for name, message in (
        ("pipe", "is not a file"),
        ("large", "is longer than 64 MB"),
        ("none", "does not exist"),
    ):
        with pytest.raises(RunDirectoryError, match=message):
            decode_file(tmp_path / f"{name}.json", Whole, RunDirectoryError)
    assert decode_file(tmp_path / "good.json", Whole, ValueError).count == 1


def description(config):
    return {"config": asdict(config), "versions": {"jax": "1"}, "device": "cpu"}


def test_configurations_of_runs_are_held_against_their_schema(tmp_path):
    directory = RunDirectory(tmp_path)
    # A folder whose name is no UTF-8 comes back, too.
    for config in (
        LanguageModelConfig(out="a\udcff", steps=3, learning_rate=1),
        RegressConfig(out="a\udcff", C=3),
    ):
        directory.config.unlink(missing_ok=True)
        directory.start(description(config))
        assert read_config(tmp_path, type(config)) == config
    whole = description(LanguageModelConfig())
    # A field that a run of an older version did not have is at its default.
    older = {k: v for k, v in whole["config"].items() if k != "workspace"}
    directory.config.write_text(json.dumps({**whole, "config": older}))
    assert load_config(tmp_path) == LanguageModelConfig()
    for text in (
        *("[]", '{"config": 1}', "1" * 5000, "[" * 9999),
        json.dumps({**whole, "config": {**whole["config"], "steps": 1.5}}),
        json.dumps({**whole, "config": {**whole["config"], "corpus": ["a"]}}),
        json.dumps({**whole, "config": {**whole["config"], "learning_rate": math.nan}}),
        json.dumps({**whole, "config": {**whole["config"], "head": {}}}),
        json.dumps({**whole, "config": {**whole["config"], "more": 1}}),
        json.dumps({**whole, "versions": {"jax": 1}}),
        json.dumps({**whole, "device": None}),
        json.dumps({**whole, "mesh": 3}),
        json.dumps({**whole, "data": [3]}),
    ):
        directory.config.write_text(text)
        with pytest.raises(RunDirectoryError, match=r"config.json cannot be read \("):
            load_config(tmp_path)


TRAIN = {"event": "train", "step": 1, "loss": 2.0, "gradient_norm": 1.0, "seconds": 1.0}
VALIDATION = {"event": "validation", "step": 1, "loss": 2.0}


def test_metrics_lines_are_held_against_their_schema(tmp_path):
    directory = RunDirectory(tmp_path)
    lines = [TRAIN, {**TRAIN, "step": 2, "gradient_norm": math.nan}, VALIDATION]
    for line in lines:
        directory.append(line)
    assert str(list(directory.records())) == str(lines)
    good = directory.metrics.read_text()
    directory.metrics.write_text(good + '{"event": "tr')
    assert len(list(directory.records())) == 3
    for bad in (
        *("", "{", "[]", "null", "{}", "\xff", "9" * 5000, "[" * 9999),
        *(json.dumps({**TRAIN, "event": event}) for event in ("other", None, [])),
        json.dumps({**TRAIN, "step": "1"}),
        json.dumps({**TRAIN, "loss": None}),
        json.dumps({**TRAIN, "more": 1}),
        json.dumps({**VALIDATION, "seconds": 1}),
        json.dumps({"event": "final", "step": []}),
        json.dumps({"event": "final"}),
    ):
        directory.metrics.write_bytes(f"{good}{bad}\n{good}".encode("latin-1"))
        with pytest.raises(RunDirectoryError, match=r"jsonl, line 4, cannot be read"):
            directory.truncate_metrics(2)
    directory.metrics.unlink()
    os.mkfifo(directory.metrics)
    with pytest.raises(RunDirectoryError, match="is not a file"):
        directory.final_record()


def test_reports_come_back_whatever_was_measured(tmp_path):
    """Python's JSON has NaN and infinities, which a loss may be."""
    memory = MemoryReport(1, 2, None)
    samples = (Sample(0.0, "a\udcff"),)
    final = FinalReport(
        *(1, math.inf, 2, 1.0, 2.0, 300, memory, "p", samples, 1.0, 2.0, "adaptive")
    )
    directory = RegressionDirectory(tmp_path)
    directory.append(final.record())
    record = directory.final_record()
    assert record is not None and FinalReport.from_record(record) == final
    for changes in ({"memory": {}}, {"samples": [1]}, {"head": "x"}, {"more": 1}):
        with pytest.raises(RunDirectoryError, match="the final line cannot be read"):
            FinalReport.from_record({**record, **changes})
    measures = Measures(3, 0.5, math.inf, 0.1)
    classes = (True, 2, 0.5, "c")
    report = RegressionReport(
        *(measures, measures, classes, 2, (None, 0.5, 1.0, 1.0), ((1,) * 4,) * 4),
        *(-math.inf, 3, True, "gradient", "lbfgs", 1.0, "none", 0.5),
    )
    directory.write_report(report.record())
    assert directory.read_report() == report
    for changes in (
        {"recall": [1.0]},
        {"confusion": [[1] * 3] * 4},
        {"classes": []},
        {"classes": [None] * 4},
        {"recall": [None] * 4},
        {"train": {**asdict(measures), "rows": "3"}},
        {"converged": 1},
    ):
        directory.report.write_text(json.dumps({**report.record(), **changes}))
        with pytest.raises(RunDirectoryError, match=r"metrics.json cannot be read \("):
            directory.read_report()
