"""Panics of Rust's, of which a command of ours says one line."""

import os
import tempfile

import pytest

from jaxsoft.training.panics import Stderr, panics_as_errors


class PanicException(BaseException):
    """As that of pyo3, of which each library has its own."""


PRINTED = "\nthread 'x' (7) panicked at lib.rs:1:1:\nout of range\nstack backtrace:\n"


def fail(error):
    os.write(2, PRINTED.encode())
    if error is not None:
        raise error


@pytest.fixture(params=[True, False])
def ours(monkeypatch, request):
    monkeypatch.setattr(Stderr, "ours", request.param)
    return request.param


def test_a_panic_is_an_error_that_says_it(ours, capfd):
    with pytest.raises(ValueError, match="^out of range$"), panics_as_errors():
        fail(PanicException("out of range\nand more"))
    with pytest.raises(OSError), panics_as_errors():
        fail(OSError("a thread panicked"))
    assert Stderr.descriptor == 2
    assert capfd.readouterr().err == ("" if ours else PRINTED * 2)


def test_all_else_is_printed(ours, capfd):
    with panics_as_errors(), panics_as_errors():
        os.write(2, b"held, ")
        os.write(Stderr.descriptor, b"at once, ")
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        os.write(2, b"too")
        raise KeyboardInterrupt
    with panics_as_errors():
        fail(None)
    said = "at once, held, " if ours else "held, at once, "
    assert capfd.readouterr().err == said + "too" + PRINTED


def test_without_a_temporary_file_nothing_is_held_back(capfd, monkeypatch):
    def refuse(**options):
        raise OSError("no space")

    monkeypatch.setattr(Stderr, "ours", True)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match="x"), panics_as_errors():
        fail(PanicException("x"))
    assert capfd.readouterr().err == PRINTED
