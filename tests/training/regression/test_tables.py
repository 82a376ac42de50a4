import gzip
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.sparse import csr_matrix, issparse, save_npz
from sklearn.datasets import dump_svmlight_file, load_digits

from jaxsoft.training.errors import TableError
from jaxsoft.training.regression.scaling import choose_scaling
from jaxsoft.training.regression.tables import check_range, read_rows, read_table

IRIS = "width,height,kind\n1,2.5,a\n3,4,b\n\n-1e3,0,a\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the working folder; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(name, content):
        if isinstance(content, dict):
            np.savez(tmp_path / name, **content)
        else:
            (tmp_path / name).write_bytes(content.encode())
        return name

    return write_file


def test_digits_are_the_default():
    truth: Any = load_digits()
    table = read_table()
    np.testing.assert_array_equal(table.features, truth.data)
    np.testing.assert_array_equal(table.labels, truth.target)
    assert table.image_shape == (8, 8) and table.feature_names[1] == "pixel_0_1"
    assert table.digest == read_table().digest and table.label_column is None


@pytest.mark.parametrize("label", [None, "kind", "2", -1])
def test_csv_with_a_header(write, label):
    table = read_table(write("a.csv", IRIS), label)
    np.testing.assert_array_equal(table.features, [[1, 2.5], [3, 4], [-1000, 0]])
    assert table.labels.tolist() == ["a", "b", "a"]
    assert table.feature_names == ("width", "height")
    assert table.image_shape is None and table.source == "a.csv"
    assert table.label_column == "kind"


def test_csv_without_a_header(write):
    table = read_table(write("a.csv", "7,1,2\n8,3,4\n"), "0")
    np.testing.assert_array_equal(table.features, [[1, 2], [3, 4]])
    assert table.labels.tolist() == [7, 8] and table.labels.dtype == np.int64
    assert table.label_column == 0
    assert table.feature_names is None


def test_csv_header_of_numbers_is_known_by_the_label(write):
    table = read_table(write("a.csv", "0,1,kind\n5,6,x\n7,8,y\n"), "kind")
    assert table.feature_names == ("0", "1") and table.features.shape == (2, 2)


def test_csv_header_that_counts_the_columns(write):
    """As pandas writes a frame without names."""
    table = read_table(write("a.csv", "0,1,2\n5,6,1\n7,8,2\n"))
    np.testing.assert_array_equal(table.features, [[5, 6], [7, 8]])
    assert table.feature_names == ("0", "1") and table.label_column == "2"


@pytest.mark.parametrize("delimiter", [";", "\t", ", "])
def test_other_delimiters_quotes_and_marks(write, delimiter):
    text = '\ufeff"a, b"|c|d\r\n1|2|"x;y"\r\n3|4|z\r\n'.replace("|", delimiter)
    table = read_table(write("a.tsv", text))
    assert table.feature_names == ("a, b", "c")
    assert table.labels.tolist() == ["x;y", "z"]


def test_many_rows_and_compression(tmp_path):
    features = np.random.default_rng(0).normal(size=(9_000, 2))
    lines = [f"{a!r},{b!r},{a > 0}\n" for a, b in features.tolist()]
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.writelines(lines)
    table = read_table(tmp_path / "a.csv.gz")
    np.testing.assert_array_equal(table.features, features)
    np.testing.assert_array_equal(table.labels == "True", features[:, 0] > 0)


@pytest.mark.parametrize("keys", [("X", "y"), ("x", "y"), ("data", "target")])
def test_npz(write, keys):
    features = np.arange(6, dtype=np.float32).reshape(3, 2)
    path = write(
        "a.npz", dict(zip(keys, (features, np.array([0.0, 2, 2])), strict=True))
    )
    table = read_table(path)
    np.testing.assert_array_equal(table.features, features)
    assert table.features.dtype == np.float32
    assert table.labels.tolist() == [0, 2, 2] and table.labels.dtype == np.int64


def test_npz_of_images_and_odd_labels(write):
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    for labels in ([True, False], ["a", "b"], [b"a", b"b"]):
        table = read_table(write("a.npz", {"x": images, "y": np.array(labels)}))
        assert table.image_shape == (2, 2, 3) and table.features.dtype == np.float64
        np.testing.assert_array_equal(table.features, images.reshape(2, 12))
        assert [str(label) for label in table.labels] in (["True", "False"], ["a", "b"])


def test_npz_with_names_makes_square_images(write):
    names = [f"pixel{index}" for index in range(4)]
    path = write("a.npz", {"X": np.eye(4), "y": [0, 1, 0, 1], "feature_names": names})
    assert read_table(path).feature_names == tuple(names)
    assert read_table(path).image_shape == (2, 2)


@pytest.mark.parametrize("suffix", [".svm", ".svmlight", ".libsvm", ".txt"])
def test_libsvm(tmp_path, suffix):
    features = csr_matrix([[0.0, 1.5, 0], [2, 0, 0]])
    dump_svmlight_file(features, [3, -1], str(tmp_path / f"a{suffix}"))
    table = read_table(tmp_path / f"a{suffix}")
    assert issparse(table.features) and table.labels.tolist() == [3, -1]
    np.testing.assert_array_equal(table.features.toarray(), [[0, 1.5], [2, 0]])
    wider = read_rows(tmp_path / f"a{suffix}", num_features=3)
    np.testing.assert_array_equal(wider.features.toarray(), features.toarray())


def test_libsvm_features_keep_their_numbers(write):
    """A file without feature 0 is no other than one that has it."""
    first = read_table(write("a.svm", "1 0:5 2:6\n2 1:7\n"))
    np.testing.assert_array_equal(first.features.toarray(), [[5, 0, 6], [0, 7, 0]])
    second = read_rows(write("b.svm", "1 1:8\n2 2:9\n"), num_features=3)
    np.testing.assert_array_equal(second.features.toarray(), [[0, 8, 0], [0, 0, 9]])


def test_digest_tells_tables_apart(write):
    digests = {
        read_table(write("a.csv", text)).digest
        for text in (IRIS, IRIS.replace("3", "5"), IRIS.replace("b", "c"))
    }
    assert len(digests) == 3
    assert read_table(write("b.csv", IRIS)).digest in digests
    renamed = write("c.csv", IRIS.replace("width", "depth"))
    assert read_table(renamed).digest not in digests
    values, labels = np.arange(8.0), [0, 1]
    images, rows = (
        read_table(write("a.npz", {"X": values.reshape(shape), "y": labels}))
        for shape in ((2, 2, 2), (2, 4))
    )
    assert images.digest != rows.digest


@pytest.mark.parametrize(
    ("text", "label", "labels"),
    [
        ("width,height\n1,2\n", None, None),
        ("height,width\n2,1\n", None, None),
        ("kind,height,width\nz,2,1\n", None, None),
        ("id,height,kind,width\n7,2,z,1\n", "kind", ["z"]),
        ("id,height,kind,width\n7,2,z,1\n", None, None),
        ("width,height,sort\n1,2,z\n", "kind", ["z"]),
        ("z,1,2\n", "0", ["z"]),
        ("1,2\n", "kind", None),
        ("1,2\n", "0", None),
    ],
)
def test_rows_to_predict_with_or_without_labels(write, text, label, labels):
    if "sort" in text:
        label = "sort"
    path = write("a.csv", text)
    table = read_rows(path, label, num_features=2, feature_names=("width", "height"))
    np.testing.assert_array_equal(table.features, [[1, 2]])
    assert (table.labels if labels is None else table.labels.tolist()) == labels


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("z,1,2\n", 0),
        ("1,2,z\n", 2),
        ("kind,a,b\nz,1,2\n", "kind"),
        ("a,b,kind\n1,2,z\n", 2),
    ],
)
def test_labels_are_where_those_of_the_model_were(write, text, known):
    table = read_rows(write("a.csv", text), num_features=2, label_column=known)
    np.testing.assert_array_equal(table.features, [[1, 2]])
    assert table.labels.tolist() == ["z"]
    bare = read_rows(write("b.csv", "1,2\n"), num_features=2, label_column=known)
    assert bare.labels is None
    arrays = {"X": np.eye(2), "y": [1, 2], "kind": ["a", "b"]}
    found = read_rows(write("a.npz", arrays), num_features=2, label_column=known)
    assert found.labels.tolist() == (["a", "b"] if known == "kind" else [1, 2])


@pytest.mark.parametrize("known", [None, "kind"])
def test_labels_are_not_guessed(write, known):
    names = None if known is None else ("a", "b")
    with pytest.raises(TableError) as error:
        read_rows(
            write("a.csv", "1,2,z\n"),
            num_features=2,
            feature_names=names,
            label_column=known,
        )
    assert str(error.value) == (
        "a.csv has 3 columns, one more than the model has features, and nothing says "
        "which one has the labels; name it by `label`."
    )


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ("7", "-12", [7, -12]),
        ("7.0", "-12", [7, -12]),
        (str(2**63 - 1), "1", [2**63 - 1, 1]),
        ("7", "007", ["7", "007"]),
        ("012", "013", ["012", "013"]),
        ("7", "7.00", ["7", "7.00"]),
        ("1e3", "1_0", ["1e3", "1_0"]),
        (str(2**63), "1", [str(2**63), "1"]),
        (f"{2**53}.0", "1.0", [f"{2**53}.0", "1.0"]),
    ],
)
def test_labels_are_numbers_only_as_they_are_written(write, first, second, labels):
    table = read_table(write("a.csv", f"5,{first}\n6,{second}\n"))
    assert table.labels.tolist() == labels


@pytest.mark.parametrize("kind", ["csr", "csc", "bsr", "coo", "dia"])
def test_sparse_rows_to_predict(tmp_path, kind):
    matrix = csr_matrix([[0, 1.5, 0], [2, 0, 0]])
    save_npz(tmp_path / "a.npz", matrix.asformat(kind))
    table = read_rows(tmp_path / "a.npz", num_features=3)
    assert table.features.format == "csr" and table.labels is None
    np.testing.assert_array_equal(table.features.toarray(), matrix.toarray())


def test_a_long_cell_takes_no_memory_in_other_rows(write):
    text = "1,2,3,4,a\n" * 2000 + f"1.{'0' * 6000},2,3,4,b\n"
    path = write("a.csv", text)
    tracemalloc.start()
    table = read_table(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(table.features, np.tile([1, 2, 3, 4], (2001, 1)))
    assert most < 30e6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv is empty."),
        ("a.csv", "\n \n", "a.csv is empty."),
        ("a.csv", '""\n', "a.csv is empty."),
        ("a.csv", "x,x,k\n1,2,a\n3,4,b\n", "a.csv has more than one column 'x'."),
        (
            "a.csv",
            "x,k\n1,a\n2,NaN\n",
            "a.csv: line 3 has no label in column 'k', where",
        ),
        (
            "a.csv",
            f"x,k\n{'a' * 60_000},a\n",
            "a.csv has no features: each of its texts comes once.",
        ),
        (
            "a.csv",
            f"x,k\n1,a\n2,b\n{'a' * 60_000},a\n",
            f"a.csv: column 'x' has numbers, but line 4 has '{'a' * 40}'...; mend it",
        ),
        (
            "a.csv",
            f"x,k\n1,{'a' * 2000}\n",
            "a.csv: line 2 has a label of 2,000 characters in column 'k', which is no",
        ),
        ("a.csv", "x,kind\n", "a.csv has no rows."),
        ("a.csv", "kind\na\nb\n", "a.csv has no features."),
        ("a.csv", "x,y,k\n1,2,a\n1,b\n", "a.csv: line 3 has 2 cells, not 3 as the"),
        (
            "a.csv",
            "x,colour,k\n1,2,a\n\n3,red,b\n",
            "a.csv: column 'colour' has numbers, but line 4 has 'red'; mend it",
        ),
        (
            "a.csv",
            "1,red,a\n2,3,b\n",
            "a.csv: column 1 has numbers, but line 1 has 'red'",
        ),
        ("a.csv", "1,-inf,a\n1,2,b\n", "a.csv: line 1, column 1 is -inf; give a"),
        ("a.csv", "1,2,a\n1,1e999,b\n", "a.csv: line 2, column 1 is inf; give a"),
        ("a.csv", "x,k\n1,a\n2,a\n", "a.csv has one class only, 'a'; training needs"),
        ("a.csv", "x,k\n1,a\n2,\n", "a.csv: line 3 has no label in column 'k', where"),
        ("a.csv", "x,k\n1,0.5\n2,1\n", "a.csv: line 2 has the label 0.5, which is no"),
        ("a.csv", 'x,k\n1,"a\n', "a.csv cannot be read (could not parse"),
        ("a.npz", "nonsense", "a.npz cannot be read as an NPZ file ("),
        ("a.npz", {"y": [1]}, "a.npz has no array `X`, `x` or `data`; it has 'y'."),
        ("a.npz", {"X": [[1.0]]}, "a.npz has no labels `y` or `Y` or `target` or"),
        ("a.npz", {"X": [["a"]], "y": [1]}, "a.npz: the features are <U1, not numbers"),
        ("a.npz", {"X": [1.0], "y": [1]}, "a.npz: the features must have 2 axes, or 3"),
        (
            "a.npz",
            {"X": [[1.0]], "y": [[1, 2]]},
            "a.npz: the labels must be one a row, got",
        ),
        ("a.npz", {"X": [[1.0]], "y": [1j]}, "a.npz: the labels are complex128, not"),
        ("a.npz", {"X": [[1.0]], "y": [0.5]}, "a.npz: row 0 has the label 0.5, which"),
        ("a.npz", {"X": [[1.0]], "y": [1, 2]}, "a.npz has 1 rows of features but 2"),
        (
            "a.npz",
            {"X": [[1, np.inf]], "y": [1]},
            "a.npz: row 0, column 1 is inf; give",
        ),
        (
            "a.npz",
            {"X": [[1.0]], "y": [1], "feature_names": ["a", "b"]},
            "a.npz has 1 features but 2 names.",
        ),
        (
            "a.npz",
            {"X": [[1.0]], "y": [1], "feature_names": "a"},
            "a.npz cannot be read as an NPZ file (",
        ),
        (
            "a.npz",
            {"X": np.eye(2), "y": np.array([1, 2**63], np.uint64)},
            "a.npz: row 1 has the label 9223372036854775808, which is no class",
        ),
        (
            "a.npz",
            {"X": np.eye(2), "y": [1e19, 1]},
            "a.npz: row 0 has the label 1e+19, which is no class",
        ),
        ("a.npz", {"X": np.eye(2), "y": ["a", ""]}, "a.npz: row 1 has no label; leave"),
        ("a.npz", {"X": np.eye(2), "y": [b"a", b"\xff"]}, "a.npz: the labels are no"),
        ("a.svm", "1 a:b\n", "a.svm, line 1: invalid literal for int()"),
        ("a.svm", "1 1:2\n2 3:4 5:nan\n", "a.svm, line 2: a feature is not finite."),
        ("a.svm", "1 1:2\n2 3:inf 5:1\n", "a.svm, line 2: a feature is not finite."),
        ("a.svm", "1 -2:1\n2 3:1\n", "a.svm, line 1: "),
        ("a.xls", "1", "a.xls is of no known format; save it as .csv, .parquet"),
    ],
)
def test_bad_files_are_one_line(write, name, content, message):
    path = write(name, content)
    with pytest.raises(TableError) as error:
        read_table(path)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_bad_paths(tmp_path):
    with pytest.raises(TableError, match="the table nowhere.csv does not exist."):
        read_table("nowhere.csv")
    with pytest.raises(TableError, match="is not a file."):
        read_table(tmp_path)
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableError, match="a.csv is not utf-16: line 1 has the byte"):
        read_table(tmp_path / "a.csv")
    np.savez(tmp_path / "a.npz", X=np.array([{}], object), y=[1])
    with pytest.raises(TableError, match="'X' holds objects that are not texts"):
        read_table(tmp_path / "a.npz")


def test_damaged_npz_files(tmp_path):
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, np.eye(2))
    with pytest.raises(TableError, match="cannot be read as an NPZ file"):
        read_table(path)
    np.savez_compressed(path, X=np.eye(2), y=[0, 1])
    content = bytearray(path.read_bytes())
    content[50:70] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(TableError, match="cannot be read as an NPZ file"):
        read_table(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X", "text")
        archive.writestr("y", "text")
    with pytest.raises(TableError, match="'y' is not an array"):
        read_table(path)


def test_absent_label_column_lists_those_there(write):
    with pytest.raises(TableError) as error:
        read_table(write("a.csv", IRIS), "sort")
    assert str(error.value) == (
        "a.csv has no column 'sort'; it has 'width', 'height', 'kind'."
    )
    with pytest.raises(TableError, match="no column '3'; it has columns 0 to 1."):
        read_table(write("a.csv", "1,2\n3,4\n"), 3)
    with pytest.raises(TableError, match="no labels `z`; it has 'X', 'y'."):
        read_table(write("a.npz", {"X": [[1.0]], "y": [1]}), "z")
    with pytest.raises(TableError, match="more than one column 'k'"):
        read_table(write("a.csv", "k,k\n1,2\n"), "k")
    save_npz("b.npz", csr_matrix(np.eye(2)))
    with pytest.raises(TableError, match="b.npz has no labels; training needs them."):
        read_table("b.npz")


def test_rows_of_another_model(write):
    path = write("a.csv", IRIS)
    for count in (1, 4):
        with pytest.raises(TableError, match=f"3 columns, the model has {count} feat"):
            read_rows(path, num_features=count)
    path = write("a.npz", {"X": np.eye(2)})
    with pytest.raises(TableError, match="2 features, the model has 3; give it"):
        read_rows(path, num_features=3)
    path = write("a.csv", IRIS)
    names = ("width", "depth", "area")
    with pytest.raises(TableError, match=r"no column 'depth', which .* \(and 1 more\)"):
        read_rows(path, num_features=3, feature_names=names)


def test_integers_that_numpy_does_not_have_are_no_labels(write):
    rows = "".join(f'{{"a": {i}, "kind": {10**20 + i}}}\n' for i in range(3))
    with pytest.raises(TableError, match="the labels are Int128, not classes"):
        read_table(write("a.ndjson", rows))
    with pytest.raises(TableError, match="the labels are Int128, not classes"):
        read_rows("a.ndjson", "kind", num_features=1)


def test_decimals_are_labels_where_they_are_whole(tmp_path):
    labels = pl.Series([1, 2, 1]).cast(pl.Decimal(9, 2))
    pl.DataFrame({"a": [1.0, 2, 3], "kind": labels}).write_parquet(tmp_path / "a.pq")
    assert read_table(tmp_path / "a.pq").labels.tolist() == [1, 2, 1]


def test_nans_of_any_bits_are_missing_numbers(write):
    """Sums of some of them give warnings, which are errors here."""
    features = np.ones((4, 2))
    features.view(np.int64)[1, 1] = 0x7FF0000000000001
    table = read_table(write("a.npz", {"X": features, "y": [0, 1, 0, 1]}))
    assert np.isnan(table.features).sum() == 1
    table.features.sum()
    sparse = csr_matrix(features)
    save_npz("s.npz", sparse)
    with pytest.raises(TableError, match="row 1, column 1 is nan; give a finite"):
        read_rows("s.npz", num_features=2)


def test_numbers_too_large_to_scale_are_named(write):
    features = np.array([[1e300, 1], [-1e300, 2], [3, 4], [5, 6]])
    table = read_table(write("a.npz", {"X": features, "y": [0, 1, 0, 1]}))
    scaling = choose_scaling(table, np.arange(4), None)
    with pytest.raises(TableError, match="row 0, column 0 is 1e.300, too large"):
        check_range(table, scaling.apply(table.features, "float32"))


@pytest.mark.parametrize("offset", [np.nan, 2**40, 2**62, -4, 3, 0.5])
def test_diagonals_out_of_bounds(tmp_path, offset):
    np.savez(
        tmp_path / "a.npz",
        format=b"dia",
        shape=[4, 3],
        data=np.ones((1, 3)),
        offsets=np.array([offset]),
    )
    with pytest.raises(TableError, match="diagonal that is out of bounds"):
        read_rows(tmp_path / "a.npz", num_features=3)
