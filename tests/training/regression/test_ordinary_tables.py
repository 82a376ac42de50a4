"""Tables as people have them, through `jaxsoft regress` and `predict` as they are."""

import bz2
import csv
import gzip
import io
import zipfile
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from backports import zstd

from jaxsoft.cli import main as cli
from jaxsoft.training import SoftmaxRegression
from jaxsoft.training.memory import MemoryBudget
from jaxsoft.training.regression.columns import Column
from jaxsoft.training.regression.saving import load_table_model
from jaxsoft.training.regression.tables import read_table

ROWS = 120
RNG = np.random.default_rng(0)
CLASSES = RNG.integers(0, 3, ROWS)
NUMBERS = RNG.normal(size=(ROWS, 3)).round(3) + 3 * np.eye(3)[CLASSES]
KINDS = np.array(["ant", "bee", "cat"])[CLASSES]
COLOURS = np.array(["red", "green", "blue"])[(CLASSES + (RNG.random(ROWS) < 0.2)) % 3]
FRAME = pd.DataFrame(NUMBERS, columns=["a", "b", "c"]).assign(kind=KINDS)


def titanic() -> str:
    """Names, missing ages, texts, flags: nothing is only a number."""
    names = [f'"Row, Mr. {index}"' for index in range(ROWS)]
    lines = ["id,name,a,colour,member,b,c,ticket,kind"]
    for index in range(ROWS):
        a, b, c = NUMBERS[index]
        age = "" if index % 7 == 0 else a
        ticket = f"A/{index % 9}" if index % 3 else index
        lines.append(
            f"{index},{names[index]},{age},{COLOURS[index]},{index % 2 == 0},{b},{c},"
            f"{ticket},{KINDS[index]}"
        )
    return "\n".join(lines) + "\n"


def text(separator=",", number: Any = str, header=True, **columns) -> str:
    frame = FRAME.assign(**columns).map(
        lambda cell: number(cell) if isinstance(cell, float) else cell
    )
    return frame.to_csv(sep=separator, index=False, header=header)


def first(data: str, line: str) -> str:
    return line + "\n" + data


def comma(number: float) -> str:
    return str(number).replace(".", ",")


def qid() -> bytes:
    lines = (
        f"{kind} qid:{index % 5} " + " ".join(f"{i + 1}:{v}" for i, v in enumerate(row))
        for index, (kind, row) in enumerate(zip(CLASSES, NUMBERS, strict=True))
    )
    return ("\n".join(lines) + "\n").encode()


def frame_bytes(kind: str, tmp_path: Any) -> bytes:
    frame = pl.from_pandas(FRAME.assign(day=pd.Timestamp("2024-01-01")))
    frame = frame.with_columns(pl.col("kind").cast(pl.Categorical))
    path = tmp_path / "made"
    if kind == "ndjson":
        frame.drop("day").write_ndjson(path)
    else:
        getattr(frame, f"write_{kind}")(path)
    return path.read_bytes()


# Name of the file, what it holds, and options of `regress`.
TABLES: dict[str, tuple[str, Any, list[str]]] = {
    "titanic": ("a.csv", titanic, ["--id", "id"]),
    "semicolons": ("a.csv", lambda: text(";"), []),
    "decimal commas": ("a.csv", lambda: text(";", comma), []),
    "utf-16": (
        "a.csv",
        lambda: text("\t", größe=1.0).encode("utf-16"),
        ["--label", "kind"],
    ),
    "cp1252": ("a.csv", lambda: text(größe=1.0).encode("cp1252"), ["--label", "kind"]),
    "parquet": ("a.parquet", "parquet", ["--drop", "day", "--label", "kind"]),
    "feather": ("a.feather", "ipc", ["--label", "kind"]),
    "ndjson": ("a.ndjson", "ndjson", []),
    "gz": ("A.CSV.GZ", lambda: gzip.compress(text().encode()), []),
    "bz2": ("a.tsv.bz2", lambda: bz2.compress(text("\t").encode()), []),
    "zst": ("a.csv.zst", lambda: zstd.compress(text().encode()), []),
    "index column": ("a.csv", lambda: FRAME.to_csv(), []),
    "row names": ("a.txt", lambda: FRAME.to_csv(sep=" ").replace(" ", "", 1), []),
    "dates dropped": (
        "a.csv",
        lambda: text(day="2024-01-01", y=KINDS),
        ["--drop", "day", "--drop", "kind"],
    ),
    "class in the middle": (
        "a.csv",
        lambda: FRAME[["a", "kind", "b", "c"]].to_csv(index=False),
        ["--label", "kind"],
    ),
    "libsvm": ("a9a.t", qid, []),
    "sep first": ("a.csv", lambda: first(text(";"), "sep=;"), []),
    "spaces": (
        "a.data",
        lambda: text(header=False).replace(",", ", "),
        [],
    ),
    "weights": (
        "a.csv",
        lambda: text(w=1.5, y=KINDS),
        ["--weights", "w", "--drop", "kind"],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_they_are(name, tmp_path, monkeypatch, capsys):
    """They are learnt, and the same file is predicted as well."""
    monkeypatch.chdir(tmp_path)
    file, content, options = TABLES[name]
    data = frame_bytes(content, tmp_path) if isinstance(content, str) else content()
    (tmp_path / file).write_bytes(data.encode() if isinstance(data, str) else data)
    arguments = ["regress", file, "--out", "run", "--max-iter", "30", *options]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert cli.main(["predict", "run", file, "--out", "out.csv"]) == 0, (
        capsys.readouterr().err
    )
    with open("out.csv") as lines:
        predicted = [row["prediction"] for row in csv.DictReader(lines)]
    truth = CLASSES.astype(str) if name == "libsvm" else KINDS
    assert np.mean(np.array(predicted) == truth) > 0.9


def write(path: Any, content: Any) -> Any:
    path.write_text(content, encoding="utf-8")
    return path


def test_texts_and_missing_cells(tmp_path):
    """Texts that come twice are features; missing numbers wait for the fit."""
    rows = [
        "red,1,True,x1,a",
        "blue,,False,x2,b",
        "red,3,,x3,a",
        "?,4,TRUE,x4,b",
        "blue,5,false,x5,a",
        "green,6,True,x6,b",
    ]
    table = read_table(write(tmp_path / "t.csv", "c,n,f,u,k\n" + "\n".join(rows)))
    assert table.feature_names == ("c=blue", "c=red", "n", "f")
    nan = np.nan
    expected = [
        [0, 1, 1, 1],
        [1, 0, nan, 0],
        [0, 1, 3, nan],
        [0, 0, 4, 1],
        [1, 0, 5, 0],
        [0, 0, 6, 1],
    ]
    np.testing.assert_array_equal(table.features, expected)
    assert table.columns == (
        Column("c", ("blue", "red")),
        Column("n"),
        Column("f"),
        Column("u", ()),
    )
    assert table.notes == ("columns left out, as each text comes once: 'u'",)


def test_predictions_are_by_name(tmp_path, capsys, monkeypatch):
    """Other columns are listed, an id is carried, and half of the labels suffice."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.csv", titanic())
    options = ["--id", "id", "--drop", "name", "--drop", "ticket"]
    assert cli.main(["regress", "t.csv", "--out", "run", *options]) == 0
    said = capsys.readouterr().out
    assert "18 missing numbers are taken as their columns' means" in said
    _, form = load_table_model("run/model.safetensors", SoftmaxRegression)
    assert form.names.id == "id" and form.names.drop == ("name", "ticket")
    frame = pd.read_csv("t.csv")
    frame["colour"] = frame["colour"].where(frame.index % 5 > 0, "mauve")
    half = frame["kind"].where(frame.index % 2 > 0, "")
    frame = frame.drop(columns=["name"]).assign(kind=half, more=1, other="x")
    frame[frame.columns[::-1]].to_csv("next.csv", index=False)
    assert cli.main(["predict", "run", "next.csv", "--out", "out.csv"]) == 0
    said = capsys.readouterr().out
    assert "columns not of the model: 'other', 'more'\n" in said
    assert "60 other rows have no label" in said
    out = pd.read_csv("out.csv")
    assert out.columns.tolist() == ["id", "prediction"]
    assert out["id"].tolist() == list(range(ROWS))
    assert np.mean(out["prediction"].to_numpy() == KINDS) > 0.9
    frame.drop(columns=["a", "b"]).to_csv("less.csv", index=False)
    assert cli.main(["predict", "run", "less.csv"]) == 2
    said = capsys.readouterr().err
    assert "has no column 'a', which the model needs (and 1 more)" in said


def test_an_id_is_never_the_label(tmp_path, capsys, monkeypatch):
    """A model of a, b, c meets a table of id, a, b, c: the id is no label."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.csv", text())
    assert cli.main(["regress", "t.csv", "--out", "run"]) == 0
    FRAME[["a", "b", "c"]].to_csv("next.csv", index_label="id")
    capsys.readouterr()
    assert cli.main(["predict", "run", "next.csv", "--id", "id", "--out", "o.csv"]) == 0
    assert f"{ROWS} rows, without labels" in capsys.readouterr().out
    assert pd.read_csv("o.csv")["id"].tolist() == list(range(ROWS))


def test_weights_count_as_copies_of_rows(tmp_path):
    """A weight of 2 is a row that comes twice; of 0, a row that is not there."""
    weights = RNG.integers(0, 3, ROWS)
    path = write(tmp_path / "t.csv", FRAME.assign(w=weights).to_csv(index=False))
    table = read_table(path, "kind", weights="w")
    np.testing.assert_array_equal(table.weights, weights)
    assert table.feature_names == ("a", "b", "c")
    for wrong in ("-1", "heavy", ""):
        rows = path.read_text().splitlines()
        rows[3] = rows[3].rpartition(",")[0] + f",{wrong}"
        path.write_text("\n".join(rows))
        with pytest.raises(ValueError, match="line 4 has the weight .* in column 'w'"):
            read_table(path, "kind", weights="w")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drop", "z"], "a.csv has no column 'z'; it has 'a', 'b', 'c', 'kind'."),
        (
            ["--drop", "kind", "--label", "kind"],
            "--drop must be another column than --",
        ),
        (["--sep", "ab"], "--sep must be one character, got 'ab'."),
        (["--encoding", "klingon"], "--encoding must be a name that Python knows, got"),
        (["--encoding", "utf-16"], "a.csv is not utf-16"),
        (["--memory", "much"], "--memory must be a size such as 4G, got 'much'."),
        (["--memory", "1K"], "more than the 1 KB of --memory; allow it more, or give"),
        (["--memory", "9K"], "with 4 columns would take"),
    ],
)
def test_options_that_do_not_fit(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.csv", text())
    assert cli.main(["regress", "a.csv", "--out", "run", *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_sizes_that_files_declare(tmp_path):
    """None is made before it is held against the budget."""
    (tmp_path / "wide.csv.gz").write_bytes(gzip.compress(b"1," * 10_000_000))
    for name, kind, shape in (
        ("huge.npz", "<f8", (10**9, 10**9)),
        ("more.npz", "<f8", (9, 9)),
        ("text.npz", "<U100000000", (2,)),
        ("objects.npz", "|O", (2,)),
    ):
        header = {"descr": kind, "fortran_order": False, "shape": shape}
        data = io.BytesIO()
        np.lib.format.write_array_header_1_0(data, header)
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("X.npy", data.getvalue() + b"cos\nsystem\n(S'ls'\ntR.")
            archive.writestr("y.npy", data.getvalue() + bytes(32))
    for name, said in (
        ("wide.csv.gz", "with 10,000,001 columns would take .* more than the 1 GB"),
        ("huge.npz", "'y' of .* would take .* more than the 1 GB"),
        ("more.npz", "'y' has .* bytes, not the 648 that it declares"),
        ("text.npz", "'y' .* bytes, not the|'y' of .* would take 800 MB"),
        ("objects.npz", "'y' holds objects that are not texts"),
    ):
        with pytest.raises(ValueError, match=said):
            read_table(tmp_path / name, memory=MemoryBudget(10**9))
