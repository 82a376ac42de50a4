"""The public names: exported, documented, and importable without any extra."""

import doctest
import importlib
import inspect
import subprocess
import sys

import pytest

import jaxsoft
import jaxsoft.compat
import jaxsoft.nn
import jaxsoft.schedules

OPTIONAL = (
    "grain",
    "tokenizers",
    "matplotlib",
    "safetensors",
    "sklearn",
)  # Flax brings the others
MODULES = (jaxsoft, jaxsoft.compat, jaxsoft.nn, jaxsoft.schedules)
PUBLIC = [
    (module.__name__, name)
    for module in MODULES
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
    or inspect.isclass(getattr(module, name))
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_names_are_sorted_and_exist(module):
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("module, name", PUBLIC)
def test_docstrings_are_complete_and_run(module, name):
    item = getattr(importlib.import_module(module), name)
    text = inspect.getdoc(item) or ""
    if inspect.isfunction(item):
        for section in ("Args:", "Returns:", "Raises:", "Notes:", "Example:"):
            assert section in text, section
        assert "References:" in text
        for parameter in inspect.signature(item).parameters:
            assert f"{parameter}:" in text, parameter
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in finder.find(item, name):
        runner.run(test)
    assert runner.tries > 0 and runner.failures == 0


@pytest.mark.parametrize("module, name", PUBLIC)
def test_signatures_can_be_read(module, name):
    """`help` names types as they are written, not what they are made of."""
    item = getattr(importlib.import_module(module), name)
    functions = [item] if callable(item) else []
    if inspect.isclass(item):
        members = inspect.getmembers(item, inspect.isfunction)
        functions += [f for n, f in members if n in vars(item) and n[0] != "_"]
    for function in functions:
        try:
            text = str(inspect.signature(function))
        except ValueError:
            continue
        assert "Union[" not in text, text


def test_bare_import_takes_no_extra_and_starts_no_device():
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import jaxsoft, jaxsoft.nn, jaxsoft.cli
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend was started"
print(jaxsoft.__version__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == jaxsoft.__version__
