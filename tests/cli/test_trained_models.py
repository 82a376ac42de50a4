import io
import json
import re
import shutil
import sys

import pytest

from jaxsoft.cli.main import main
from jaxsoft.training import load_language_model

from .test_main import TEXT, fails

# One worker: its run serves all tests.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    options = f"""--corpus {folder}/text.txt --cache-dir {folder}/cache
        --out {folder}/run --vocab-size 270 --steps 4 --batch-size 4
        --sequence-length 16 --features 16 --layers 1 --heads 2
        --evaluation-tokens 64 --sample-tokens 8"""
    assert main(["train", *options.split()]) == 0
    return folder / "run"


def says(capsys, *arguments):
    """Runs the command; returns what it prints."""
    assert main(["generate", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_a_prompt_is_continued(run, capsys):
    said = says(capsys, run, "--prompt", "line 7", "--max-tokens", 30, "--seed", 4)
    (text,) = load_language_model(run).generate("line 7", max_tokens=30, seed=4)
    assert said == f"line 7{text.text}\n"
    options = ["--top-k", 5, "--top-p", 0.9, "--min-p", 0.01, "--temperature", 0.5]
    said = says(capsys, run, "--prompt", "line 7", "--max-tokens", 9, *options)
    assert said.startswith("line 7") and len(said) > 8


def test_prompts_are_lines_of_standard_input(run, capsys, monkeypatch):
    def given(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))

    given("line é\r\n\nline 3".encode())
    said = says(capsys, run, "--max-tokens", 5, "--number", 2)
    headers = re.findall(r"^--- (\d) ---\n(.*)", said, re.M)
    assert [number for number, _ in headers] == [*"123456"]
    assert headers[0][1].startswith("line é") and headers[4][1].startswith("line 3")
    given(b"line \xff\n")
    assert "standard input must be UTF-8" in fails(capsys, ["generate", str(run)])


def test_log_probs_are_a_line_a_token(run, capsys):
    options = ["--prompt", "", "--max-tokens", 6, "--seed", 2]
    said = says(capsys, run, *options, "--log-probs")
    lines = [re.fullmatch(r" +(-?\d+\.\d{4}) (['\"].*)", x) for x in said.splitlines()]
    assert 1 <= len(lines) <= 6 and all(lines)
    (text,) = load_language_model(run).generate(max_tokens=6, seed=2, log_probs=True)
    found = [float(line[1]) for line in lines if line is not None]
    assert found == [round(value, 4) for value in text.log_probs or ()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--number", "0"], "--number must be positive, got 0."),
        (["--max-tokens", "-1"], "--max-tokens must be positive, got -1."),
        (["--temperature", "-1"], "--temperature must be in [0, inf], got -1.0."),
        (["--top-k", "-1"], "--top-k must be at least 0, got -1."),
        (["--top-p", "2"], "--top-p must be in [0, 1], got 2.0."),
        (["--seed", "-1"], "--seed must be in [0, 2**31), got -1."),
        (["--prompt", "\udcff"], "--prompt must be UTF-8, got"),
        (["--top-k", "x"], "argument --top-k: invalid int value: 'x'"),
    ],
)
def test_bad_input_is_one_line(run, capsys, changes, message):
    words = ["generate", str(run), "--prompt", "a", *changes]
    assert message in fails(capsys, words)


def test_folders_that_cannot_be_used(run, capsys, tmp_path):
    words = ["generate", str(tmp_path / "nowhere"), "--prompt", "a"]
    assert "nowhere holds no run (no config.json)." in fails(capsys, words)
    shutil.copytree(run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:-1]))
    words[1] = str(tmp_path / "run")
    assert "is not finished; `jaxsoft train --resume` goes on" in fails(capsys, words)


def test_evaluate_prints_its_measurements(run, capsys, tmp_path):
    words = ["evaluate", str(run), "--corpus", str(tmp_path / "text.txt")]
    (tmp_path / "text.txt").write_text(TEXT[:3000])
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for pattern in (
        r"^corpus: .*text.txt, 0.0 MB; 1 texts$",
        r"^batch \d+/\d+  loss \d\.\d{3}  [\d,]+ tokens/s",
        r"^loss: \d\.\d{3} nats a token, perplexity [\d,.]+ \([\d,]+ tokens\)$",
        r"^bits per byte: \d+\.\d{3}$",
        r"^the likeliest token is right: [\d.]+ %, calibration error \(ECE\) 0\.\d{4}$",
        r"^files: .*reliability.png$",
    ):
        assert re.search(pattern, captured.out, re.M), pattern
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["texts"] == 1 and document["bytes"] == 3000
    assert document["step"] == 4 and document["tokens"] > 100
    words[-1] = str(tmp_path / "nowhere")
    assert "the corpus " in fails(capsys, words)
    said = fails(capsys, [*words, "--memory", "much"])
    assert "--memory must be a size such as 4G, got 'much'." in said
