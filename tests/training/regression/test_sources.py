"""Rows from memory, from disk and from libsvm files, and the order they come in."""

import bz2
import gzip
import os
import re
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from jaxsoft.training.errors import SvmlightError
from jaxsoft.training.regression import sources
from jaxsoft.training.regression.estimator import SoftmaxRegression
from jaxsoft.training.regression.sources import (
    BatchOrder,
    DenseRows,
    RowSource,
    SparseRows,
    as_source,
    check_sparse,
)
from jaxsoft.training.regression.svmlight import (
    load_svmlight_memmap,
    svmlight_to_memmap,
)
from jaxsoft.training.regression.tables import read_table

ROWS = np.array([0, 3, 3, 10])


def sparse(num_rows=11, num_features=7):
    random = np.random.default_rng(0)
    dense = random.normal(size=(num_rows, num_features))
    dense[random.random(dense.shape) > 0.4] = 0
    dense[3] = 0
    return sp.csr_matrix(dense)


@pytest.mark.parametrize("kind", ["csr", "csc", "array", "dense", "list", "integers"])
def test_rows_are_those_of_the_matrix(kind):
    matrix = sparse()
    if kind == "integers":
        matrix = (10 * matrix).astype(np.int32)
    truth = matrix.toarray()
    source = as_source(
        {
            "csr": matrix,
            "csc": matrix.tocsc(),
            "array": sp.csr_array(matrix),
            "dense": truth,
            "list": truth.tolist(),
            "integers": truth,
        }[kind]
    )
    assert isinstance(source, RowSource)
    assert (len(source), source.num_features) == truth.shape
    for dtype in (np.float32, np.float64):
        read = source.read(ROWS, dtype)
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, truth[ROWS].astype(dtype))
        assert source.read(ROWS[:0], dtype).shape == (0, 7)


def test_entries_of_equal_place_add():
    twice = SparseRows(np.array([1.0, 2.0]), np.array([1, 1]), np.array([0, 0, 2]), 3)
    np.testing.assert_array_equal(
        twice.read(np.array([0, 1]), np.float64), [[0, 0, 0], [0, 3, 0]]
    )


def test_a_memory_mapped_array_is_not_copied(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, sparse().toarray())
    mapped = np.load(path, mmap_mode="r+")
    source = as_source(mapped)
    mapped[10, 2] = 42
    read = source.read(ROWS, np.float64)
    assert read[3, 2] == 42 and not isinstance(read, np.memmap)
    assert as_source(source) is source


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: DenseRows(np.array([["a"]])), TypeError, "`array` must hold real"),
        (lambda: DenseRows(np.ones(3)), ValueError, "[N, d], got (3,)."),
        (
            lambda: SparseRows(np.ones(1, complex), np.zeros(1), np.array([0, 1]), 2),
            TypeError,
            "`data` must hold real numbers, got dtype complex128.",
        ),
        (
            lambda: SparseRows(np.ones(3), np.zeros(3, int), np.array([0, 2]), 2),
            ValueError,
            "`indptr` must end with the length of `data` and `indices`, got 2 for 3",
        ),
    ],
)
def test_bad_rows_are_refused(make, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        make()


@pytest.mark.parametrize(("num_rows", "size"), [(10, 5), (11, 4), (3, 8), (1, 1)])
def test_every_row_comes_once_an_epoch(num_rows, size):
    order = BatchOrder(num_rows, size, seed=3)
    epochs = []
    for epoch in range(3):
        first = epoch * order.steps_per_epoch
        steps = range(first, first + order.steps_per_epoch)
        batches = np.stack([order.rows(step) for step in steps])
        assert batches.shape[1] == size
        epochs.append(batches)
        rows = batches[batches >= 0]
        np.testing.assert_array_equal(np.sort(rows), np.arange(num_rows))
        for batch in batches:
            kept = batch[batch >= 0]
            np.testing.assert_array_equal(batch[: len(kept)], np.sort(kept))
    if num_rows == 11:
        assert not np.array_equal(epochs[0], epochs[1])


def test_order_is_a_function_of_seed_and_step():
    one, other = BatchOrder(50, 8, 1), BatchOrder(50, 8, 1)
    steps = [20, 3, 19, 0]
    expected = {step: one.rows(step) for step in sorted(steps)}
    for step in steps:
        np.testing.assert_array_equal(other.rows(step), expected[step])
    assert not np.array_equal(BatchOrder(50, 8, 2).rows(0), one.rows(0))


@pytest.mark.parametrize("zero_based", [False, True])
@pytest.mark.parametrize("suffix", [".svm", ".svm.gz", ".svm.bz2"])
def test_a_libsvm_file_in_small_chunks(tmp_path, zero_based, suffix):
    matrix, labels = sparse(40, 9), np.arange(40) % 3
    plain, path = tmp_path / "plain.svm", tmp_path / f"rows{suffix}"
    dump_svmlight_file(matrix, labels, str(plain), zero_based=zero_based, comment="c")
    text = plain.read_bytes()
    packed = {".gz": gzip.compress, ".bz2": bz2.compress}.get(path.suffix, bytes)(text)
    path.write_bytes(packed)
    truth, truth_labels = load_svmlight_file(str(plain))
    rows, found = svmlight_to_memmap(
        path,
        tmp_path / "deep" / "rows",
        zero_based="auto",
        chunk_bytes=100,
        dtype=np.float64,
    )
    assert isinstance(rows.data, np.memmap) and isinstance(found, np.memmap)
    everything = np.arange(40)
    np.testing.assert_array_equal(rows.read(everything, np.float64), truth.toarray())
    np.testing.assert_array_equal(found, truth_labels)
    again, labels = load_svmlight_memmap(tmp_path / "deep" / "rows")
    assert again.num_features == rows.num_features == 9
    np.testing.assert_array_equal(again.read(ROWS, np.float64), truth.toarray()[ROWS])


def test_features_by_number_and_given_base(tmp_path):
    path = tmp_path / "rows.svm"
    path.write_text("# heading\n1 1:2\n\n0 # nothing\n-3.5 2:1 4:0.25 # end")
    wide, labels = svmlight_to_memmap(
        path, tmp_path / "wide", num_features=6, zero_based=False
    )
    assert wide.num_features == 6 and wide.data.dtype == np.float32
    np.testing.assert_array_equal(labels, [1, 0, -3.5])
    np.testing.assert_array_equal(
        wide.read(np.arange(3), np.float32),
        [[2, 0, 0, 0, 0, 0], [0] * 6, [0, 1, 0, 0.25, 0, 0]],
    )
    based, _ = svmlight_to_memmap(path, tmp_path / "based")
    assert based.num_features == 5
    np.testing.assert_array_equal(
        based.read(np.array([2]), np.float32), [[0, 0, 1, 0, 0.25]]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 1:2\n\n# c\n0 2:x\n1 1:1\n", "rows.svm, line 4: could not convert"),
        ("1 1:2\n" * 30 + "1 3:1 2:1\n", "rows.svm, line 31: Feature indices"),
        ("1 1:2\nlabel 1:1", "rows.svm, line 2: could not convert"),
        ("1 1:2\n0 1:nan\n", "rows.svm, line 2: a feature is not finite."),
        ("inf 1:2\n", "rows.svm, line 1: a label is not finite."),
        ("0 1:1e60\n", "rows.svm, line 1: a feature is not finite."),
        ("1,2 1:2\n", "rows.svm, line 1: could not convert"),
        ("1 5000000000:2\n", "rows.svm, line 1: value too large"),
        ("", "rows.svm must have a row, got none."),
        ("# only a comment\n", "rows.svm must have a row, got none."),
        ("1 0:1\n", "index 0, which `zero_based` False rules out."),
        ("1 4:1\n", "must have at most 3 features, got 4; correct `num_features`."),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, message):
    path, folder = tmp_path / "rows.svm", tmp_path / "rows"
    path.write_text(text)
    with pytest.raises(SvmlightError, match=re.escape(message)):
        svmlight_to_memmap(
            path, folder, chunk_bytes=20, num_features=3, zero_based=False
        )
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SvmlightError, match="missing.svm does not exist"):
        svmlight_to_memmap(tmp_path / "missing.svm", tmp_path / "rows")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"1 1:2\n" * 999)[:20])
    with pytest.raises(SvmlightError, match="cut.gz cannot be read"):
        svmlight_to_memmap(tmp_path / "cut.gz", tmp_path / "rows")
    packed = bytearray(gzip.compress(b"1 1:2\n" * 999))
    packed[10] = 0xFF  # no kind of block
    (tmp_path / "bad.gz").write_bytes(packed)
    with pytest.raises(SvmlightError, match="bad.gz cannot be read"):
        svmlight_to_memmap(tmp_path / "bad.gz", tmp_path / "rows")
    with pytest.raises(SvmlightError, match="holds no rows by svmlight_to_memmap"):
        load_svmlight_memmap(tmp_path)
    with pytest.raises(FileExistsError, match="`folder` must not exist, got"):
        svmlight_to_memmap(tmp_path / "missing.svm", tmp_path)
    with pytest.raises(TypeError, match="`dtype` must be float32 or float64, got"):
        svmlight_to_memmap("rows.svm", tmp_path / "rows", dtype=np.int32)


def test_features_are_those_of_a_table(tmp_path):
    path = tmp_path / "rows.svm"
    path.write_text("1 1:2\n0 2:1 4:0.25\n")
    rows, labels = svmlight_to_memmap(path, tmp_path / "rows")
    table = read_table(path)
    found = rows.read(np.arange(2), np.float64)
    np.testing.assert_array_equal(found, table.features.toarray())
    np.testing.assert_array_equal(labels, table.labels)


def out_of_bounds(data, indices, indptr, columns):
    """Three arrays of a matrix, each time with something wrong."""
    fall = np.concatenate([indptr[:1], indptr[1:-1][::-1], indptr[-1:]])
    yield data, np.where(np.arange(len(data)) == 4, columns, indices), indptr
    yield data, np.where(np.arange(len(data)) == 4, -1, indices), indptr
    yield data, np.full_like(indices, 2**30), indptr
    yield data, indices.astype(np.float64), indptr
    yield data, indices[:-1], indptr
    yield data[:-1], indices, indptr
    yield data, indices, fall
    yield data, indices, np.where(indptr == 0, 1, indptr)
    yield data, indices, np.where(indptr == 0, -9, indptr)
    yield data, indices, indptr + 2**20
    yield data, indices, indptr.astype(np.float64)
    yield data, indices, indptr[:0]
    yield data, indices, indptr[None]


def test_sparse_arrays_out_of_bounds_are_refused(tmp_path, monkeypatch):
    """In parts of a few entries, at whose joints nothing is left out."""
    monkeypatch.setattr(sources, "_PART", 2)
    matrix: Any = sparse()
    arrays = (matrix.data, matrix.indices, matrix.indptr)
    check_sparse(*arrays, (11, 7))
    (tmp_path / "rows.svm").write_text("1 1:2\n0 2:1 4:0.25\n" * 9)
    folder = tmp_path / "rows"
    good, _ = svmlight_to_memmap(tmp_path / "rows.svm", folder)
    stored = (np.array(good.data), np.array(good.indices), np.array(good.indptr))
    for bad in out_of_bounds(*arrays, 7):
        with pytest.raises(ValueError, match="`ind|`data"):
            check_sparse(*bad, (11, 7))
        with pytest.raises(ValueError, match="`ind|`data"):
            SparseRows(*bad, 7)
    for bad in (*out_of_bounds(*stored, 5), (np.zeros((27, 1)), *stored[1:])):
        for name, array in zip(("data", "indices", "indptr"), bad, strict=True):
            np.save(folder / f"{name}.npy", array)
        with pytest.raises(SvmlightError, match=r"`(ind|data).*\. Convert the"):
            load_svmlight_memmap(folder)


@pytest.mark.parametrize("kind", ["csr_array", "csc_matrix", "bsr_array"])
def test_sparse_matrices_of_callers_are_looked_at(kind):
    matrix = getattr(sp, kind)(np.ones((4, 6)))
    as_source(matrix)
    # What is beyond the entries in use is none of the matrix.
    matrix.data = np.concatenate([matrix.data, matrix.data])
    matrix.indices = np.append(matrix.indices, np.full_like(matrix.indices, 99))
    assert as_source(matrix).read(np.array([3]), np.float32).tolist() == [[1] * 6]
    matrix.indices[2] = 99
    for read in (as_source, SoftmaxRegression().fit):
        with pytest.raises(ValueError, match="`indices` must be in .* got one of 99"):
            read(matrix, *([0, 1, 0, 1],)[: read is not as_source])


@pytest.mark.parametrize("damage", ["labels.npy", "about.json"])
def test_a_folder_that_is_not_whole_is_refused(tmp_path, damage):
    (tmp_path / "rows.svm").write_text("1 1:2\n")
    svmlight_to_memmap(tmp_path / "rows.svm", tmp_path / "rows")
    folder = tmp_path / "rows"
    for content in (b'{"format": 0}', b"", b"[]", b'{"format": 1, "num_features": -1}'):
        (folder / damage).write_bytes(content)
        with pytest.raises(SvmlightError, match="Convert the file again"):
            load_svmlight_memmap(folder)
    (folder / damage).unlink()
    os.mkfifo(folder / damage)
    with pytest.raises(SvmlightError, match="is not a file. Convert"):
        load_svmlight_memmap(folder)


def test_labels_of_another_length_are_refused(tmp_path):
    (tmp_path / "rows.svm").write_text("1 1:2\n")
    svmlight_to_memmap(tmp_path / "rows.svm", tmp_path / "rows")
    for labels in (np.ones(2), np.ones(1, np.float32), np.ones((1, 1))):
        np.save(tmp_path / "rows" / "labels.npy", labels)
        with pytest.raises(SvmlightError, match="its labels are"):
            load_svmlight_memmap(tmp_path / "rows")
