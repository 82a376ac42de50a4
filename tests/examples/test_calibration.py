"""The calibration example: better measures, both files, and errors in one line."""

import importlib.util
import re

import jax
import pytest

from jaxsoft.examples import calibration


def test_calibrates_a_classifier(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        code = calibration.main(["--out", str(out), "--steps", "150", "--seed", "1"])
    text = capsys.readouterr().out
    assert code == 0
    number = r"([\d.]+)"
    rows = re.findall(rf"(before|after)\W+{number}%\W+{number}\W+{number}", text)
    (before, *first), (after, *second) = rows
    assert (before, after) == ("before", "after")
    assert first[0] == second[0] and float(first[0]) > 85
    assert float(second[1]) < float(first[1])
    assert float(second[2]) < float(first[2])
    assert "300 digits to train on, 748 to calibrate, 749 to test" in text
    names = ["reliability-after.png", "reliability-before.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert name in text


def test_help_and_errors(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        calibration.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--out", "--seed", "--steps"))
    assert "reliability-before.png" in shown
    with pytest.raises(SystemExit):
        calibration.main(["--steps", "0"])
    assert "--steps must be at least 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert calibration.main(["--out", str(tmp_path / "file")]) == 1
    assert "cannot write to" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert calibration.main(["--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "scikit-learn" in message and '"jaxsoft[train]"' in message
