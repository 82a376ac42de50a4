"""The recipe of on-policy distillation: the divergence falls by either's words."""

import re

import jax
import pytest

from jaxsoft.examples import on_policy_distillation


def test_students_near_the_teacher(capsys):
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        assert on_policy_distillation.main(["--steps", "40"]) == 0
    text = capsys.readouterr().out
    rows = re.findall(r"likeliest of the (\w+): (\S+) -> (\S+)", text)
    assert [name for name, *_ in rows] == ["student", "teacher"]
    for _, before, after in rows:
        assert 0 < float(after) < 0.8 * float(before)
    curves = re.findall(r"fifth of the steps: (.+)", text)
    losses = [[float(loss) for loss in curve.split()] for curve in curves]
    assert [len(curve) for curve in losses] == [5, 5]
    assert all(0 < curve[-1] < 0.95 * curve[0] for curve in losses)


def test_a_bad_option_is_told(capsys):
    with pytest.raises(SystemExit):
        on_policy_distillation.main(["--steps", "4"])
    assert "--steps must be at least 5" in capsys.readouterr().err
