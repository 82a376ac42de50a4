"""The draft head: the target accepts more, and never more than the draft has words."""

import re

import jax
import pytest

from jaxsoft.examples import draft_head


def test_more_drafts_are_accepted(capsys):
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        assert draft_head.main(["--steps", "60"]) == 0
    text = capsys.readouterr().out
    (share,) = re.findall(r"128 of 1024 words, (\d+)%", text)
    ((before, after),) = re.findall(r"accepted: (\S+) -> (\S+)", text)
    assert float(before) + 0.1 < float(after) < int(share) / 100 + 0.05


@pytest.mark.parametrize(
    "options, message",
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--classes", "1025"], "--classes must be in [1, 1024]"),
    ],
)
def test_bad_options_are_told(options, message, capsys):
    with pytest.raises(SystemExit):
        draft_head.main(options)
    assert message in capsys.readouterr().err
