import re
import signal
import subprocess
import sys

import pytest

from jaxsoft import __version__
from jaxsoft.cli.main import main
from jaxsoft.training import TrainingInterrupted
from jaxsoft.training.heads import HEADS
from jaxsoft.training.language_model import comparison, trainer

TEXT = "".join(f"line {index} of a little text\n" for index in range(2000))


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Flags of a run that takes a second; the working folder is a fresh one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return """--corpus text.txt --cache-dir cache --out run --vocab-size 270 --steps 4
        --batch-size 4 --sequence-length 16 --features 16 --layers 1 --heads 2
        --evaluation-tokens 64 --sample-tokens 8""".split()


def fails(capsys, arguments, code=2):
    """Runs the command; returns the one line that it says on stderr."""
    try:
        assert main(arguments) == code
    except SystemExit as stop:
        assert stop.code == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_train_prints_its_measurements_and_files(options, capsys, tmp_path, one_device):
    assert main(["train", *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for pattern in (
        r"corpus: text.txt, 0.1 MB; 1|2 texts",
        r"step 4/4  loss \d\.\d{3}  [\d,]+ tokens/s  0:00 left",
        r"--- sampled at temperature 0 ---",
        r"--- sampled at temperature 0.7 ---",
        r"--- sampled at temperature 1 ---",
        r"validation loss: \d\.\d{3} nats a token, perplexity [\d.]+",
        r"unigram entropy of the corpus: \d\.\d{3} nats; the validation loss is",
        r"stored logits would take 0\.1 MiB a step, 0\.1 MiB with their gradient",
        r"temporaries take [\d.]+ MiB in all",
        r"files: run/config.json, run/metrics.jsonl, run/loss.png",
    ):
        assert re.search(pattern, captured.out), pattern
    assert main(["train", "--out", "run", "--resume", "--mesh", "data=1"]) == 0
    captured = capsys.readouterr()
    assert "the run in run finished at step 4" in captured.out
    said = fails(capsys, ["train", *options])
    assert "already holds a run (config.json)" in said and "--resume" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--corpus", "nowhere"], "the corpus nowhere does not exist."),
        (["--corpus", "empty.txt"], "the corpus empty.txt holds no text."),
        (["--corpus", "short.txt"], "is too small"),
        (["--batch-size", "99999"], "smaller --batch-size or --sequence-length"),
        (["--vocab-size", "100"], "--vocab-size must be at least 257"),
        (["--steps", "0"], "--steps must be positive, got 0."),
        (["--batch-size", "-3"], "--batch-size must be positive, got -3."),
        (["--sequence-length", "0"], "--sequence-length must be positive, got 0."),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--out", "text.txt"], "--out text.txt is a file, not a folder."),
        (
            ["--out", "text.txt/run"],
            "--out text.txt/run cannot be written (Not a directory).",
        ),
        (["--cache-dir", "text.txt"], "name another folder by --cache-dir."),
        (["--resume"], "--out run holds no run to resume (no config.json)."),
        (["--head", "tree"], "--head must be one of 'full', 'hierarchical', "),
        (["--num-samples", "0"], "--num-samples must be positive, got 0."),
        (["--compare-heads", "0"], "--compare-heads: must be positive, got 0"),
        (["--compare-heads", "soon"], "--compare-heads: invalid _seconds value"),
        (["--compare-heads"], "--steps must be left out with --compare-heads, got 4."),
        (
            ["--compare-heads", "--head", "full"],
            "--head must be left out with --compare-heads, got 'full'.",
        ),
        (["--workspace", "much"], "--workspace must be a size such as 4G, got 'much'."),
        (
            ["--workspace", "1MiB", "--head", "adaptive"],
            "--workspace must be left out with --head 'adaptive', whose loss takes",
        ),
        (["--mesh", "data"], "--mesh must be axes with their sizes, such as data=2,"),
        (["--mesh", "rows=1"], "--mesh must have the axes data and vocab, each once"),
        (["--mesh", "vocab=99"], "the sizes in --mesh must multiply to the number of"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    options, capsys, tmp_path, changes, message
):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a few words\n")
    said = fails(capsys, ["train", *options, *changes])
    assert message in said and said.startswith("jaxsoft")
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "text.txt").read_text() == TEXT


@pytest.mark.process
def test_compare_heads_prints_a_table(options, capsys, tmp_path):
    place = options.index("--steps")
    del options[place : place + 2]
    assert main(["train", *options, "--compare-heads", "0.2"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    rows = re.findall(r"^\| (\w+) +\|(.*)\|$", captured.out, re.MULTILINE)
    assert [head for head, _ in rows][-4:] == [*HEADS]
    for _, cells in rows[-4:]:
        assert all(float(cell.replace(",", "")) >= 0 for cell in cells.split("|"))
    assert "each head was trained for 0.2 s on 64 tokens a step" in captured.out
    assert "files: run/comparison.json, run/comparison.png" in captured.out
    said = fails(capsys, ["train", *options, "--compare-heads", "0.2"])
    assert "already holds a run (comparison.json)" in said


def test_compare_heads_interrupted(options, capsys, monkeypatch):
    def stopped(*args, **rest):
        raise TrainingInterrupted(signal.SIGINT)

    monkeypatch.setattr(comparison, "compare_heads", stopped)
    place = options.index("--steps")
    del options[place : place + 2]
    said = fails(capsys, ["train", *options, "--compare-heads"], code=130)
    assert said == "stopped by SIGINT; nothing was written to run"


@pytest.mark.parametrize("head", ["hierarchical", "sampled"])
def test_another_head_trains_and_resumes(options, capsys, head):
    assert main(["train", *options, "--head", head]) == 0
    assert f"head: {head}\n" in capsys.readouterr().out
    said = fails(capsys, ["train", "--out", "run", "--resume", "--head", "full"])
    assert f"the run in run has --head '{head}', not 'full'" in said


def test_comparisons_take_no_workspace(options, capsys):
    place = options.index("--steps")
    del options[place : place + 2]
    words = ["train", *options, "--compare-heads", "--workspace", "1MiB"]
    said = fails(capsys, words)
    assert "--workspace must be left out with --compare-heads, got '1MiB'." in said


def test_resume_of_another_configuration(options, capsys, tmp_path):
    assert main(["train", *options]) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").glob("*.json*")}
    capsys.readouterr()
    said = fails(capsys, ["train", "--out", "run", "--resume", "--steps", "9"])
    assert "the run in run has --steps 4, not 9" in said
    assert {file: file.read_bytes() for file in before} == before


def test_resume_of_a_damaged_configuration(options, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    for contents in ("", "{}", '{"config": {"nonsense": 1}}'):
        (tmp_path / "run" / "config.json").write_text(contents)
        assert "run/config.json" in fails(capsys, ["train", *options, "--resume"])


def test_diverging_run_names_its_step(options, capsys):
    said = fails(capsys, ["train", *options, "--learning-rate", "1e38"], code=1)
    assert re.match(r"jaxsoft train: step \d: loss", said)
    assert "--learning-rate" in said


def test_missing_extra_is_one_line(options, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    said = fails(capsys, ["train", *options])
    assert said.endswith('pip install "jaxsoft[train]"')


def test_farewell_repeats_the_mesh(options, capsys, monkeypatch, one_device):
    def stopped(config, *, mesh, **rest):
        assert dict(mesh.shape) == {"data": 1, "vocab": 1}
        raise TrainingInterrupted(signal.SIGTERM, 3)

    monkeypatch.setattr(trainer, "train_language_model", stopped)
    said = fails(capsys, ["train", *options, "--mesh", "vocab=1"], code=143)
    assert said.endswith("jaxsoft train --out run --resume --mesh vocab=1")


def test_no_command_is_an_error(capsys):
    assert "COMMAND" in fails(capsys, [])


def test_version_and_help(capsys):
    for arguments in (["--version"], ["train", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    captured = capsys.readouterr()
    assert f"jaxsoft {__version__}" in captured.out
    assert "--mesh AXES" in captured.out and "data=2,vocab=4" in captured.out
    assert "--vocab-size SIZE" in captured.out and "(default: 65536)" in captured.out


def test_import_takes_no_optional_package():
    """Flax itself imports rich; whatever else is loaded, jaxsoft loaded."""
    script = """if True:
        import sys
        import flax.nnx, optax
        before = set(sys.modules)
        import jaxsoft.cli
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        optional = "grain matplotlib orbax rich safetensors sklearn tokenizers"
        print(sorted(new & set(optional.split())))
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
