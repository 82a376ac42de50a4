"""README: every snippet and every command runs."""

import pathlib
import re
import shlex
import subprocess
import sys

from jaxsoft._core import registry
from jaxsoft.cli import commands
from jaxsoft.devices.operations import operations
from jaxsoft.devices.target import TARGETS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_snippets_run_in_order():
    """In a process of its own: users do not run JAX as strictly as the tests."""
    code = "\n".join(_blocks("python"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = (line.split() for line in done.stdout.splitlines())
    assert (before[0], after[0]) == ("before", "after")
    assert abs(float(before[1]) - float(after[1])) < 1e-4
    assert float(after[2]) < float(before[2]) / 4


def test_set_up_commands_name_what_exists():
    """`.ci/run` runs the test command whole; here its parts are checked."""
    commands = [shlex.split(line) for block in _blocks("bash") for line in [block]]
    assert len(commands) == 2
    train, tests = commands
    assert ".[train]" in train and train[-2:] == [".venv/bin/jaxsoft", "train"]
    assert ".[test]" in tests and tests[-1] == ".venv/bin/pytest"


def test_options_that_the_text_names_exist():
    done = subprocess.run(
        [sys.executable, "-m", "jaxsoft", "train", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    named = set(re.findall(r"`jaxsoft train (--[a-z-]+)", README)) - {"--help"}
    assert named == {
        "--compare-heads",
        "--corpus",
        "--head",
        "--mesh",
        "--resume",
        "--workspace",
    }
    assert all(option in done.stdout for option in named)


def test_commands_on_tables_are_ones_that_exist():
    lines = re.findall(r"`jaxsoft ((?:regress|predict)[^`]*)`", README)
    parsed = [commands.parser().parse_args(shlex.split(line)) for line in lines]
    named = set(re.findall(r"--[a-z-]+", " ".join(lines)))
    assert len(parsed) >= 6
    assert named >= {"--label", "--out", "--resume", "--calibrate", "--probabilities"}


def test_commands_on_trained_models_are_ones_that_exist():
    lines = re.findall(r"`jaxsoft ((?:generate|evaluate)[^`]*)`", README)
    assert len(lines) == 2
    for line in lines:
        commands.parser().parse_args(shlex.split(line))


def test_commands_on_devices_are_ones_that_exist():
    lines = re.findall(r"^\$ jaxsoft (devices(?:.*\\\n)*.*)$", README, re.M)
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.replace("\\\n", " "))
        parsed = commands.parser().parse_args(words)
        assert set(parsed.target) <= set(TARGETS)
        assert set(parsed.op or ()) <= set(operations())


def test_the_table_of_accelerators_names_every_function_with_a_kernel():
    rows = {
        name: set(re.findall(r"`(\w+)`", line))
        for name in ("mosaic_tpu", "mosaic_gpu")
        for line in re.findall(rf'^\|.*`implementation="{name}"`.*$', README, re.M)
    }
    # The row of GPUs has those of TPUs by reference.
    rows["mosaic_gpu"] |= rows["mosaic_tpu"]
    for kernel, named in rows.items():
        every = {
            one.name
            for one in operations().values()
            if one.chooses and kernel in registry.implementations(one.name)
        }
        assert every and named == every, kernel


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_table_names_every_public_function():
    import jaxsoft

    for name in jaxsoft.__all__:
        if name[0].islower():
            assert f"`{name}`" in README, name
