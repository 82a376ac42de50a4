"""1,000 files changed by chance or by design, through the commands that read them.

None ends in a traceback, in more than one line on stderr, or with a file that is not
the command's own. A failure names its number, which is run alone by `-m slow -k 217`.
"""

import bz2
import gzip
import io
import itertools
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.sparse
from backports import zstd
from sklearn.datasets import dump_svmlight_file

from jaxsoft.cli.main import main
from jaxsoft.training.errors import SvmlightError
from jaxsoft.training.regression.svmlight import (
    load_svmlight_memmap,
    svmlight_to_memmap,
)

from . import file_mutations as change

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
# Another seed makes other files of the same kinds.
SEED = int(os.environ.get("JAXSOFT_FUZZ_SEED", "20"))
# Seconds that a case may take.
LIMIT = 60
ROWS = 32
# What a case may take beside `--memory`: programs of XLA's, and its own copies.
MEMORY, SLACK = 50, 250
# Every so many cases one is a process of its own, whose memory is limited.
PROCESSES = 33
LABELS = np.arange(ROWS) % 4
FEATURES = np.round(np.random.default_rng(0).normal(size=(ROWS, 4)), 3)
TEXT = "".join(f"line {index} of a little text\n" for index in range(300))
TRAIN = f"""train --vocab-size 270 --steps 2 --batch-size 2 --sequence-length 8
    --features 8 --layers 1 --heads 1 --evaluation-tokens 16 --sample-tokens 2
    --memory {MEMORY}M --checkpoint-every 1 --corpus text.txt""".split()
REGRESS = f"regress --max-iter 2 --checkpoint-every 0 --memory {MEMORY}M".split()
PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}
SPARSE = ("csr", "csc", "bsr", "coo", "dia")


def tables():
    """The bytes of one table in every format, by the name of its file."""
    names = dict(zip("abt", FEATURES.T, strict=False))
    frame = pl.DataFrame({**names, "t": ["u", "v"] * (ROWS // 2), "kind": LABELS})
    csv = frame.write_csv().encode()
    made = {"csv": csv, "tsv": csv.replace(b",", b"\t")}
    made["utf16.csv"] = csv.decode().encode("utf-16")
    made |= {f"csv.{name}": pack(csv) for name, pack in PACKERS.items()}
    for name, write in {
        "parquet": frame.write_parquet,
        "feather": frame.write_ipc,
        "ndjson": frame.write_ndjson,
        "svm": lambda file: dump_svmlight_file(FEATURES, LABELS, file),
        "npz": lambda file: np.savez(file, X=FEATURES, y=LABELS),
        "objects.npz": lambda file: np.savez(
            file, X=FEATURES, y=np.array(list(map(str, LABELS)), object)
        ),
        **{
            f"{form}.npz": lambda file, form=form: scipy.sparse.save_npz(
                file, scipy.sparse.csr_matrix(FEATURES).asformat(form)
            )
            for form in SPARSE
        },
    }.items():
        file = io.BytesIO()
        write(file)
        made[name] = file.getvalue()
    return made


# How many cases of each kind there are, and what is changed by design.
MODELS = {"full": 90, "hierarchical": 60, "adaptive": 60}
TABLES = {
    "csv": (40, change.cells),
    "tsv": (20, change.cells),
    "utf16.csv": (20, change.utf16),
    **dict.fromkeys((f"csv.{name}" for name in PACKERS), (10, None)),
    "parquet": (40, change.footer),
    "feather": (50, change.footer),
    "ndjson": (50, change.json_text),
    "svm": (40, change.cells),
    "npz": (50, change.npz),
    "objects.npz": (50, change.pickled),
    **dict.fromkeys((f"{form}.npz" for form in SPARSE), (18, change.npz)),
}
RUNS = {
    "regress config.json": 50,
    "regress metrics.json": 40,
    "regress metrics.jsonl": 30,
    "regress checkpoints": 30,
    "train config.json": 40,
    "train metrics.jsonl": 30,
    "train checkpoints": 30,
}
OTHERS = {"tokens": 20, "corpus": 20, "memmap": 10}
KINDS = [
    *itertools.chain.from_iterable(
        itertools.repeat(f"{group} {name}", count)
        for group, counts in (
            ("model", MODELS),
            ("table", {name: count for name, (count, _) in TABLES.items()}),
            ("run", RUNS),
            ("other", OTHERS),
        )
        for name, count in counts.items()
    )
]


# Of tables, the last three to train alone.
OPTIONS = [[], [], [], ["--label", "kind"], ["--id", "t"], ["--sep", ","]]
OPTIONS += [["--encoding", "latin-1"], ["--weights", "a"], ["--drop", "b"]]
OPTIONS += [["--dtype", "float64"]]


def test_there_are_a_thousand():
    assert len(KINDS) == 1000


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with good files of each kind."""
    folder = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, data in tables().items():
            Path(f"data.{name}").write_bytes(data)
        Path("text.txt").write_text(TEXT)
        for head in MODELS:
            words = ["data.csv", "--out", head, "--head", head]
            assert main([*REGRESS, *words]) == 0
            shutil.copy(f"{head}/model.safetensors", f"{head}.safetensors")
        assert main([*TRAIN, "--out", "trained", "--cache-dir", "cache"]) == 0
        svmlight_to_memmap("data.svm", "memmap")
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A fresh folder to work in, which has the temporary folder, too."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    """All files below a folder, with their times and what they hold."""
    return {
        path.relative_to(folder).as_posix(): (
            (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
        )
        for path in folder.rglob("*")
    }


def peak():
    """The most memory that this process took since it was asked last, in MB."""
    try:
        text = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    (most,) = re.findall(r"VmHWM:\s*(\d+) kB", text)
    return int(most) / 1000


def here(words, capfd):
    """Runs a command in this process; returns its code and what it complained of."""

    def late(*_):
        raise TimeoutError(f"longer than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, late)
    peak()
    start = peak()
    signal.alarm(LIMIT)
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert peak() - start < MEMORY + SLACK
    return code, capfd.readouterr().err


LIMITED = """if True:
    import resource, sys
    for what, most in (("AS", 6 * 10**9), ("FSIZE", 10**8), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))
    from jaxsoft.cli.main import main
    sys.exit(main())
"""


def apart(words, capfd):
    """Runs a command as a user does, with 6 GB of addresses at most."""
    temporary = os.fspath(Path("temporary").absolute())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *words],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": os.fspath(REPOSITORY), "TMPDIR": temporary},
    )
    return done.returncode, done.stderr


def check(words, run, capfd, *, own=()):
    """Runs a command; it may change what is in folders of its own alone."""
    folder = Path.cwd()
    before = contents(folder)
    code, said = run(words, capfd)
    assert code in (0, 1, 2), said
    assert len(said.splitlines()) == (code != 0), said
    assert "nobody expected" not in said, said + "".join(
        path.read_text() for path in folder.rglob("jaxsoft-error-*.log")
    )
    after = contents(folder)
    if code == 2 and "--resume" not in words:
        assert not Path("out").exists()
    for name in before.keys() | after.keys():
        if name.partition("/")[0] not in own:
            assert before.get(name, 0) == after.get(name, 0), name


def changed(data, by_design, rng):
    return (change.blind if rng.random() < 0.3 else by_design)(data, rng)


def change_file(path, rng):
    """Changes one file of a folder, or what is in its place."""
    files = [each for each in sorted(path.rglob("*")) if each.is_file()]
    file = change.pick(rng, files) if path.is_dir() else path
    match rng.integers(10):
        case 0:
            file.unlink()
        case 1:
            file.write_bytes(b"")
        case 2:
            file.unlink()
            file.mkdir()
        case 3 if file.parent != path and path.is_dir():
            shutil.rmtree(file.parent)
        case _:
            data = file.read_bytes()
            try:
                data = changed(data, change.json_text, rng)
            except (ValueError, IndexError):
                data = change.blind(data, rng)
            file.write_bytes(data)


def a_model(head, originals, rng, run, capfd):
    data = Path(originals, f"{head}.safetensors").read_bytes()
    Path("m.safetensors").write_bytes(changed(data, change.safetensors, rng))
    table = change.pick(rng, ["data.csv", "data.npz", "data.csr.npz"])
    shutil.copy(originals / table, table)
    words = ["predict", "m.safetensors", table, "--memory", f"{MEMORY}M", "--out"]
    more = ["--probabilities"] * int(rng.integers(2))
    check([*words, "out", *more], run, capfd, own=["out"])


def a_table(name, originals, rng, run, capfd):
    data = Path(originals, f"data.{name}").read_bytes()
    packer = PACKERS.get(name.rpartition(".")[2])
    if packer is None:
        data = changed(data, TABLES[name][1], rng)
    elif rng.random() < 0.5:
        data = change.blind(data, rng)
    elif name.endswith(("gz", "zst")) and rng.random() < 0.2:
        data = packer(b"1,2\n" * 16_000_000)
    else:
        plain = Path(originals, "data.csv").read_bytes()
        data = packer(changed(plain, change.cells, rng)) + b"more" * int(
            rng.integers(2)
        )
    file = f"d.{name}" if rng.random() < 0.8 else "d"
    Path(file).write_bytes(data)
    if rng.random() < 0.25:
        head = change.pick(rng, ["full", "full", "hierarchical"])
        words = [*REGRESS, file, "--head", head, "--out", "out"]
        words += change.pick(rng, OPTIONS)
    else:
        Path("m.safetensors").write_bytes(
            Path(originals, "full.safetensors").read_bytes()
        )
        words = ["predict", "m.safetensors", file, "--memory", f"{MEMORY}M"]
        words += ["--out", "out", *change.pick(rng, OPTIONS[:-3])]
    check(words, run, capfd, own=["out"])


def a_run(what, originals, rng, run, capfd):
    """Goes on with a run that is finished, or lacks its last step."""
    command, name = what.split()
    own = ["out"]
    if command == "regress":
        shutil.copytree(originals / "full", "out")
        shutil.copy(originals / "data.csv", "data.csv")
        finished = name == "metrics.json" or rng.random() < 0.3
        if not finished:
            Path("out/metrics.json").unlink()
    else:
        shutil.copytree(originals / "trained", "out")
        shutil.copytree(originals / "cache", "cache")
        shutil.copy(originals / "text.txt", "text.txt")
        own.append("cache")
        lines = Path("out/metrics.jsonl").read_text().splitlines(keepends=True)
        if name == "checkpoints" or rng.random() < 0.3:
            Path("out/metrics.jsonl").write_text("".join(lines[:-1]))
    change_file(Path("out", name), rng)
    config = Path("out/config.json").read_bytes() if name != "config.json" else None
    check([command, "--out", "out", "--resume"], run, capfd, own=own)
    if config is not None:
        assert Path("out/config.json").read_bytes() == config


def another(what, originals, rng, run, capfd):
    if what == "memmap":
        shutil.copytree(originals / "memmap", "memmap")
        file = change.pick(rng, sorted(Path("memmap").iterdir()))
        by_design = change.npy if file.suffix == ".npy" else change.json_text
        file.write_bytes(changed(file.read_bytes(), by_design, rng))
        try:
            rows, _ = load_svmlight_memmap("memmap")
        except SvmlightError as error:
            assert len(str(error).splitlines()) == 1
        else:
            if rows.num_features < 10**6:
                rows.read(np.arange(min(len(rows), ROWS)), np.float32)
        return
    file = Path(change.pick(rng, ["text.txt", *(f"text.txt.{end}" for end in PACKERS)]))
    words = [*TRAIN, "--out", "out", "--cache-dir", "cache"]
    shutil.copy(originals / "text.txt", "text.txt")
    shutil.copytree(originals / "cache", "cache")
    if what == "tokens":
        (entry,) = Path("cache/tokens").iterdir()
        file = change.pick(rng, sorted(entry.iterdir()))
        if file.suffix == ".npy" and rng.random() < 0.7:
            file.write_bytes(change.npy(file.read_bytes(), rng))
        else:
            change_file(file, rng)
    else:
        data = changed(TEXT.encode(), change.cells, rng)
        pack = PACKERS.get(file.suffix[1:], bytes)
        data = pack(data)
        file.write_bytes(data if rng.random() < 0.5 else change.blind(data, rng))
        words[words.index("text.txt")] = str(file)
    check(words, run, capfd, own=["out", "cache"])


@pytest.mark.many_cases
@pytest.mark.parametrize(
    "number",
    range(len(KINDS)),
    ids=[f"{kind.replace(' ', '-')}-{n}" for n, kind in enumerate(KINDS)],
)
def test_a_changed_file_is_read_or_refused(number, originals, place, capfd):
    group, _, name = KINDS[number].partition(" ")
    rng = np.random.default_rng([SEED, number])
    run = apart if number % PROCESSES == 0 else here
    case = {"model": a_model, "table": a_table, "run": a_run, "other": another}[group]
    case(name, originals, rng, run, capfd)
