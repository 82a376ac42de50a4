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
from jaxsoft.training.regression.tables import read_rows, read_table

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


@pytest.mark.many_cases
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
    assert table.notes == (
        "columns of texts with a feature for each: 'c' (2 of 3)",
        "columns left out, as each text comes once: 'u'",
    )


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


def test_rows_of_no_weight_teach_nothing(tmp_path, monkeypatch):
    """No row is taken for a cat where no cat has a weight."""
    monkeypatch.chdir(tmp_path)
    FRAME.assign(w=(KINDS != "cat") * 1.0).to_csv("t.csv", index=False)
    words = ["regress", "t.csv", "--label", "kind", "--weights", "w", "--out", "run"]
    assert cli.main(words) == 0
    assert cli.main(["predict", "run", "t.csv", "--out", "o.csv"]) == 0
    predicted = pd.read_csv("o.csv")["prediction"]
    assert set(predicted) == {"ant", "bee"}


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


# Text, whether its first line has names, and the rows of numbers that it is.
HEADERS = {
    "counted, behind an index": (",0,1,k\n0,5,6,a\n1,7,8,b\n2,9,1,a\n", True),
    "years": ("country,1990,2000,y\nx,1,2,a\nx,3,4,b\nz,5,6,a\nz,7,8,b\n", True),
    "counted, and a name": ("0,1,target\n5,6,0\n7,8,1\n5,6,0\n7,8,1\n", True),
    "texts alone": ("red,yes,a\nblue,no,b\nred,no,a\nblue,yes,b\n", False),
    "texts with names": ("c,d,k\nred,yes,a\nblue,no,b\nred,no,a\nblue,yes,b\n", True),
    "numbers": ("5.1,3.5,a\n4.9,3,b\n4.7,3.2,a\n4.6,3.1,b\n", False),
    "a rare class first": ("5.1,3.5,rare\n4.9,3,b\n4.7,3.2,a\n4.6,3.1,b\n", False),
}


@pytest.mark.parametrize("name", HEADERS)
def test_whether_the_first_line_has_names(tmp_path, name):
    text, header = HEADERS[name]
    path = write(tmp_path / "t.csv", text)
    rows = text.count("\n") - header
    table = read_table(path)
    assert len(table.features) == rows == len(table.labels)
    assert (table.feature_names is not None) == header
    told = read_table(path, header=not header)
    assert len(told.features) == rows + (1 if header else -1)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1.234,56", "-2,5", "7"], [1234.56, -2.5, 7]),
        (['"1,234"', '"56,789"', '"2,345,678.5"'], [1234, 56789, 2345678.5]),
        (['"1,5"', '"2,25"', '"-3"'], [1.5, 2.25, -3]),
        (["1\u00a0500", "2\u202f000", "7"], [1500, 2000, 7]),
        (["\u22121.5", "2", "+3"], [-1.5, 2, 3]),
        (["5%", "10 %", "7"], [5, 10, 7]),
        (["1e3", "2.5E-1", ".5"], [1000, 0.25, 0.5]),
    ],
)
def test_numbers_as_people_write_them(tmp_path, cells, expected):
    """Thousands, decimal commas, percent and a real minus sign are numbers."""
    separator = ";" if "," in "".join(cells) and '"' not in cells[0] else ","
    rows = [separator.join([cell, "ab"[i % 2]]) for i, cell in enumerate(cells)]
    path = write(tmp_path / "t.csv", separator.join("xk") + "\n" + "\n".join(rows))
    table = read_table(path)
    np.testing.assert_allclose(table.features[:, 0], expected)


def test_thousands_beside_decimal_commas(tmp_path):
    """8.726 is 8726 where 0,5 is a half, and 31.12 is a date and no number."""
    text = "a;day;r;k\n0,5;31.12;8.726;x\n1,5;31.12;1.000;y\n2,5;30.11;12.345;x\n"
    table = read_table(write(tmp_path / "t.csv", text))
    assert table.feature_names == ("a", "day=31.12", "r")
    expected = [[0.5, 1, 8726], [1.5, 1, 1000], [2.5, 0, 12345]]
    np.testing.assert_array_equal(table.features, expected)


def test_a_column_of_decimal_commas_to_predict(tmp_path):
    """The model's names say that the comma divides no cells."""
    path = write(tmp_path / "t.csv", "a\n-1,5\n-2,3\n")
    table = read_rows(path, num_features=1, feature_names=("a",))
    np.testing.assert_array_equal(table.features, [[-1.5], [-2.3]])


def test_missing_cells_of_one_column_are_rows(tmp_path):
    path = tmp_path / "t.csv"
    pd.DataFrame({"a": [1.0, None, 3.0]}).to_csv(path, index=False)
    table = read_rows(path, num_features=1, feature_names=("a",))
    np.testing.assert_array_equal(table.features, [[1], [np.nan], [3]])


@pytest.mark.parametrize("kind", ["csv", "again", "txt", "parquet", "feather"])
def test_an_index_of_pandas_is_no_feature(tmp_path, kind):
    """Of a part of the rows, shuffled, in any of pandas's ways to write it."""
    part = FRAME.sample(frac=0.5, random_state=0)
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        part.to_parquet(path)
    elif kind == "feather":
        part.reset_index(names="Unnamed: 0").to_feather(path)
    elif kind == "again":
        part.to_csv(path)
        pd.read_csv(path).to_csv(path, index=False)
    else:
        part.to_csv(path, sep=" " if kind == "txt" else ",")
    table = read_table(path, "kind")
    assert table.feature_names == ("a", "b", "c")
    assert any("names of rows" in note for note in table.notes)
    assert read_table(path).label_column == "kind"
    again = read_rows(
        path, num_features=3, feature_names=("a", "b", "c"), columns=table.columns
    )
    np.testing.assert_array_equal(again.features, table.features)


def test_columns_without_a_name_are_found_again(tmp_path):
    path = write(tmp_path / "t.csv", "a,,k\n1,5,x\n2,5,y\n3,6,x\n")
    table = read_table(path)
    assert table.feature_names == ("a", "column 1")
    again = read_rows(path, num_features=2, columns=table.columns)
    np.testing.assert_array_equal(again.features, table.features)


def test_titles_and_texts_in_quotation_marks(tmp_path):
    """Behind spaces, too; what is within the marks stays as it is."""
    text = 'A report, of, 2024\n\na, b, k\n1, "x, ""z""", u\n2, " y", v\n3, " y", u\n'
    path = write(tmp_path / "t.csv", text.replace("A report, of, 2024", "# a title"))
    table = read_table(path, "b")
    assert table.labels.tolist() == ['x, "z"', "y", "y"]
    assert table.feature_names == ("a", "k=u")
    assert table.notes[0] == "1 lines before the table are left out, of one cell each"


def test_texts_that_the_model_does_not_know_are_told(tmp_path):
    columns = (Column("c", ("blue", "red")), Column("n"))
    path = write(tmp_path / "t.csv", "c,n\nred,1\nRED,2\n,3\nblue,4\n")
    table = read_rows(path, num_features=3, columns=columns)
    assert table.notes == ("texts without a feature: 1 in 'c'",)
    write(path, "c,n\nred,1\n,\n,\n")
    table = read_rows(path, num_features=3, columns=columns)
    assert table.notes == ("rows without any cell, predicted as of means: 2",)


def test_values_of_two_types_in_one_key(tmp_path):
    lines = '{"a": 1, "k": "x"}\n{"a": null, "k": "y"}\n{"a": true, "k": "x"}\n'
    path = write(tmp_path / "t.ndjson", lines)
    with pytest.raises(ValueError, match="line 3 has true in 'a', where other lines"):
        read_table(path)


def test_labels_of_another_type_are_the_same_classes(tmp_path, monkeypatch, capsys):
    """True in a Parquet file is True in a text; a label that is none has its line."""
    monkeypatch.chdir(tmp_path)
    frame = FRAME[["a", "b"]].assign(y=CLASSES > 0)
    frame.to_parquet("t.parquet", index=False)
    frame.assign(y=frame["y"].astype(object).where(frame.index > 1)).to_csv(
        "t.csv", index=False
    )
    assert cli.main(["regress", "t.parquet", "--out", "run"]) == 0
    capsys.readouterr()
    assert cli.main(["predict", "run", "t.csv"]) == 0
    assert "2 other rows have no label" in capsys.readouterr().out
    text = (tmp_path / "t.csv").read_text().replace("True", "7", 1)
    line = text[: text.index(",7\n")].count("\n") + 1
    write(tmp_path / "t.csv", text)
    assert cli.main(["predict", "run", "t.csv"]) == 2
    assert f"the label '7' of line {line} is none of" in capsys.readouterr().err


def test_a_blank_line_shifts_no_label(tmp_path):
    """Labels that are numbers are read again, as they are written."""
    path = write(tmp_path / "t.csv", "x,k\n1,07\n\n2,8\n\n3,07\n")
    table = read_table(path)
    np.testing.assert_array_equal(table.features, [[1], [2], [3]])
    assert table.labels.tolist() == ["07", "8", "07"]


def test_an_id_is_no_feature(tmp_path):
    path = write(tmp_path / "t.csv", "n,x,k\n007,1,a\n008,2,b\n")
    table = read_table(path, id="n")
    assert table.feature_names == ("x",) and table.ids == ("007", "008")
    assert table.id_column == "n"


def test_a_missing_number_is_the_mean_of_the_rows_to_train_on(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    kept = (FRAME.index % 4 > 0).tolist()
    cells = FRAME[["a", "b", "c"]].to_numpy() + np.where(kept, 0, np.nan)[:, None]
    frame = pd.DataFrame(cells, columns=["a", "b", "c"]).assign(kind=KINDS)
    frame.to_csv("t.csv", index=False)
    assert cli.main(["regress", "t.csv", "--out", "run"]) == 0
    assert "90 missing numbers" in capsys.readouterr().out
    _, form = load_table_model("run/model.safetensors", SoftmaxRegression)
    assert form.fills is not None
    write(tmp_path / "a.csv", "a,b,c\n,2,\n")
    write(tmp_path / "b.csv", f"a,b,c\n{form.fills[0]},2,{form.fills[2]}\n")
    probabilities = []
    for name in "ab":
        words = ["predict", "run", f"{name}.csv", "--probabilities", "--out"]
        assert cli.main([*words, f"{name}-out.csv"]) == 0
        probabilities.append((tmp_path / f"{name}-out.csv").read_text())
    assert probabilities[0] == probabilities[1]
    np.testing.assert_allclose(form.fills, np.nanmean(cells, axis=0), atol=0.3)
