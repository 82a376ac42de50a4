import dataclasses
import io
from pathlib import Path

from rich.console import Console

from jaxsoft.training.console import ConsoleListener
from jaxsoft.training.language_model.report import FinalReport, Sample
from jaxsoft.training.language_model.steps import MemoryReport
from jaxsoft.training.language_model.summary import summarise, summary_lines
from jaxsoft.training.reporting import printable

REPORT = FinalReport(
    step=150,
    loss=5.0,
    tokens_evaluated=32_768,
    unigram_entropy=6.5,
    unigram_cross_entropy=6.75,
    vocab_size=65_536,
    memory=MemoryReport(256 * 2**20, 512 * 2**20, 128 * 2**20),
    prompt="import [os]",
    samples=(Sample(0.0, "def [bold]f():"), Sample(0.7, "a\x1b[31mb")),
    compile_seconds=4.25,
    seconds=95.0,
)


def record(step):
    return {"step": step, "loss": 5.4321, "tokens_per_second": 1234.5}


def run(console):
    listener = ConsoleListener(console)
    listener.start(10, 13)
    for step in (11, 12):
        listener.step(record(step))
    listener.validation({"step": 12, "loss": 6.0})
    listener.step(record(13))
    listener.stop()


def test_log_has_first_and_last_step_and_validations():
    stream = io.StringIO()
    run(Console(file=stream, width=40))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 11/13  loss 5.432  1,234 tokens/s  0:00 left")
    assert lines[1] == "step 12  validation loss 6.000"
    assert lines[2].startswith("step 13/13  loss 5.432")
    assert len(lines) == 3


def test_terminal_has_a_bar_with_loss_rate_and_time():
    stream = io.StringIO()
    run(Console(file=stream, width=120, force_terminal=True, color_system=None))
    last = stream.getvalue().split("\r")[-1]
    for part in ("step 13/13", "loss 5.432", "1,234 tokens/s", "0:00:00", "left"):
        assert part in last
    assert "step 12  validation loss 6.000" in stream.getvalue()


def test_progress_of_another_job_has_its_words():
    stream = io.StringIO()
    listener = ConsoleListener(
        Console(file=stream),
        "iteration",
        things="rows",
        measure="objective",
        digits=6,
        remaining=False,
    )
    listener.start(0, 20)
    listener.step({"step": 20, "loss": 0.25, "rows_per_second": 1e6})
    said = "iteration 20/20  objective 0.250000  1,000,000 rows/s\n"
    assert stream.getvalue() == said


def test_log_has_the_last_step_of_a_run_that_ends_early():
    stream = io.StringIO()
    listener = ConsoleListener(Console(file=stream))
    listener.start(0, 100)
    for step in (1, 2, 3):
        listener.step(record(step))
    listener.stop()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("step 1/100")
    assert lines[1] == "step 3/100  loss 5.432  1,234 tokens/s"


def test_stop_without_start_is_no_error():
    ConsoleListener(Console(file=io.StringIO())).stop()


def test_summary_shows_text_as_it_is_and_harmless():
    stream = io.StringIO()
    console = Console(file=stream, width=40, force_terminal=True)
    summarise(console, REPORT, [Path("run/loss.png")])
    text = stream.getvalue()
    assert "--- prompt ---\nimport [os]\n" in text
    assert "def [bold]f():" in text
    assert "a\\x1b[31mb" in text and "\x1b[31m" not in text
    assert "files: run/loss.png" in text


def test_summary_figures():
    lines = "\n".join(summary_lines(REPORT))
    assert "steps: 150 in 1:35, after 4.2 s of compilation" in lines
    assert "5.000 nats a token, perplexity 148.4 (32,768 tokens)" in lines
    assert "6.500 nats; the validation loss is 1.500 nats below it" in lines
    assert "training frequencies on the validation tokens: 6.750 nats" in lines
    assert "256.0 MiB a step, 512.0 MiB with their gradient" in lines
    assert "temporaries take 128.0 MiB in all" in lines


def test_summary_says_what_is_worse_or_unknown():
    worse = dataclasses.replace(
        REPORT, loss=7.0, memory=MemoryReport(1, 2, None), samples=()
    )
    lines = "\n".join(summary_lines(worse))
    assert "0.500 nats above it" in lines
    assert "not reported on this platform" in lines


def test_printable_keeps_text():
    assert printable("naïve\tλ\n") == "naïve\tλ\n"
    assert printable("\x00\x1b\r") == "\\x00\\x1b\\r"
