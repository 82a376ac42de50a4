import json
import math
import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

from jaxsoft import ClassBands, ClassTree
from jaxsoft.nn import (
    AdaptiveSoftmaxHead,
    HierarchicalSoftmaxHead,
    SoftmaxHead,
)
from jaxsoft.training.errors import ModelFileError
from jaxsoft.training.memory import MemoryBudget
from jaxsoft.training.regression.estimator import SoftmaxRegression
from jaxsoft.training.regression.saving import load_model, save_model
from jaxsoft.training.run_directory import replacing

FEATURES = np.random.default_rng(0).normal(size=(40, 3))
LABELS = np.arange(40) % 3


def fitted(labels=LABELS, dtype=np.float64, **parameters) -> Any:
    """scikit-learn's estimator with an attribute of each kind that ours has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator: Any = LogisticRegression(max_iter=5, **parameters)
        estimator.fit(FEATURES.astype(dtype), labels)
    estimator.converged_, estimator.stopping_reason_ = False, "max_iter"
    estimator.objective_, estimator.temperature_ = float("nan"), 1 / 3
    return estimator


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "classes",
    [
        np.array([7, -2, 3]),
        np.array([1, 0, 1], bool),
        np.array([0.0, 2.0, 1.0]),
        np.array(["b", "é c", "a"]),
        np.array(["b", "é c", "a"], object),
    ],
)
def test_loaded_estimator_predicts_the_same_bits(tmp_path, classes, dtype):
    saved = fitted(classes[LABELS], dtype)
    path = save_model(saved, tmp_path / "a.safetensors")
    loaded: Any = load_model(path, LogisticRegression)
    features = FEATURES.astype(dtype)
    np.testing.assert_array_equal(
        loaded.predict_proba(features), saved.predict_proba(features)
    )
    assert loaded.predict(features).tolist() == saved.predict(features).tolist()
    assert loaded.classes_.dtype == saved.classes_.dtype
    assert loaded.coef_.dtype == saved.coef_.dtype == dtype
    assert loaded.get_params() == saved.get_params()
    assert set(vars(loaded)) == set(vars(saved))
    assert (loaded.converged_, loaded.stopping_reason_) == (False, "max_iter")
    assert loaded.temperature_ == 1 / 3 and np.isnan(loaded.objective_)
    np.testing.assert_array_equal(loaded.n_iter_, saved.n_iter_)


def test_loaded_arrays_can_be_changed(tmp_path):
    loaded: Any = load_model(save_model(fitted(), tmp_path / "a"), LogisticRegression)
    loaded.coef_ += 1


def test_feature_names_come_back(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(FEATURES, columns=["a", "b", "ü"])
    saved: Any = LogisticRegression().fit(frame, LABELS)
    loaded: Any = load_model(save_model(saved, tmp_path / "a"), LogisticRegression)
    assert loaded.feature_names_in_.tolist() == ["a", "b", "ü"]
    assert loaded.feature_names_in_.dtype == saved.feature_names_in_.dtype
    np.testing.assert_array_equal(
        loaded.predict_proba(frame), saved.predict_proba(frame)
    )


def test_parameters_come_back_where_a_file_can_hold_them(tmp_path):
    weights = {0: 1.0, np.int64(1): np.float32(0.5), 2: 2}
    saved = fitted(class_weight=weights, C=np.inf)
    saved.set_params(random_state=np.random.RandomState(0))
    loaded: Any = load_model(save_model(saved, tmp_path / "a"), LogisticRegression)
    assert loaded.class_weight == {0: 1.0, 1: 0.5, 2: 2} and loaded.C == np.inf
    assert loaded.random_state is None


def test_files_of_equal_estimators_are_equal_and_replaced(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    first = save_model(fitted(), path).read_bytes()
    assert save_model(fitted(), path).read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    tensors = load_file(path)
    assert {"coef_", "intercept_", "classes_", "n_iter_"} == set(tensors)


def normal(key, shape, dtype):
    """Initial values without a program to compile."""
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


COUNTS = np.arange(11) % 5 + 1
PATHS = [(0,), (1, 0), (1, 1, 0), (1, 1, 1), (2,)]


@pytest.mark.parametrize(
    ("kind", "make", "options"),
    [
        (HierarchicalSoftmaxHead, lambda: ClassTree.balanced(11), {}),
        (HierarchicalSoftmaxHead, lambda: ClassTree.from_paths(PATHS), {}),
        (
            HierarchicalSoftmaxHead,
            lambda: ClassTree.huffman(COUNTS, 3),
            {"use_bias": True, "temperature": 0.5},
        ),
        (
            AdaptiveSoftmaxHead,
            lambda: ClassBands.from_counts(COUNTS, cutoffs=(4, 8)),
            {"tail_features": (2, 1), "use_bias": True, "projection_init": normal},
        ),
        (
            AdaptiveSoftmaxHead,
            lambda: ClassBands.in_order(11, (5,)),
            {"tail_factor": 1.5},
        ),
    ],
)
def test_heads_come_back(tmp_path, kind, make, options):
    options = {"kernel_init": normal, "bias_init": normal, **options}
    head = kind(3, make(), rngs=nnx.Rngs(0), **options)
    loaded = saved_head(head, tmp_path / "a")
    assert type(loaded) is kind and loaded.temperature == head.temperature
    assert loaded.in_features == 3
    wanted, got = (nnx.to_pure_dict(nnx.state(each)) for each in (head, loaded))
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    if "temperature" in options:
        hidden = jnp.asarray(FEATURES, jnp.float32)
        np.testing.assert_array_equal(loaded(hidden), head(hidden))


def saved_head(head, path):
    estimator = fitted(np.arange(40) % head.num_classes)
    estimator.head_ = head
    loaded: Any = load_model(save_model(estimator, path), LogisticRegression)
    return loaded.head_


def test_a_float64_head_comes_back(tmp_path):
    with jax.enable_x64(True):
        head = HierarchicalSoftmaxHead(
            3, ClassTree.balanced(5), param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
    loaded = saved_head(head, tmp_path / "a")
    assert loaded.node_kernel[...].dtype == np.float64
    np.testing.assert_array_equal(loaded.node_kernel[...], head.node_kernel[...])


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(NotFittedError):
        save_model(LogisticRegression(), tmp_path / "a")
    estimator: Any = fitted()
    estimator.solver_ = np.random.default_rng(0)
    with pytest.raises(
        TypeError, match="`solver_` must be a number, .* got a Generator;"
    ):
        save_model(estimator, tmp_path / "a")
    estimator = fitted()
    estimator.extra_ = 1
    with pytest.raises(TypeError, match="`extra_` must not be set; a file cannot"):
        save_model(estimator, tmp_path / "a")
    estimator = fitted()
    estimator.head_ = SoftmaxHead(3, 5, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="`head_` must be a Hier.* got SoftmaxHead."):
        save_model(estimator, tmp_path / "a")
    estimator.head_ = HierarchicalSoftmaxHead(
        3, ClassTree.balanced(5), temperature=jnp.ones(()), rngs=nnx.Rngs(0)
    )
    with pytest.raises(
        TypeError, match="`head_` must have a temperature that is a num"
    ):
        save_model(estimator, tmp_path / "a")
    with pytest.raises(ModelFileError, match="nowhere/a cannot be written"):
        save_model(fitted(), tmp_path / "nowhere" / "a")
    assert not any(tmp_path.iterdir())


def test_other_files_are_refused_in_one_line(tmp_path):
    def refused():
        with pytest.raises(ModelFileError) as error:
            load_model(path, LogisticRegression)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    path = tmp_path
    assert "is not a file" in refused()
    path = tmp_path / "a"
    assert "does not exist" in refused()
    for content in (b"", b"text\n" * 100, b"\0" * 100):
        path.write_bytes(content)
        assert "is not a model of jaxsoft (" in refused()
    save_file({"coef_": FEATURES}, path)
    assert refused().endswith("is not a model of jaxsoft.")
    for content in ("[", "[]"):
        save_file({"coef_": FEATURES}, path, {"jaxsoft": content})
        assert "is not a model of jaxsoft" in refused()
    save_model(fitted(), path)
    cut = path.read_bytes()[:-8]
    path.write_bytes(cut)
    assert "is not a model of jaxsoft (" in refused()
    for contents, message in (
        ({"estimator": "Other"}, "holds a Other, not a LogisticRegression."),
        ({"estimator": "a\nb" * 999}, "holds a a ba ba ba"),
        ({"format": 2}, "has format 2, this version of jaxsoft reads 1; read it with"),
        ({"parameters": {"D": 1}}, "is damaged ("),
        ({"attributes": {}, "head_": {}}, "is damaged ("),
    ):
        whole = {"estimator": "LogisticRegression", "format": 1, "parameters": {}}
        whole = {**whole, "attributes": {}, **contents}
        save_file({"coef_": FEATURES}, path, {"jaxsoft": json.dumps(whole)})
        assert message in refused()


def test_a_file_that_is_none_or_larger_than_memory_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="pipe is not a file"):
        load_model(tmp_path / "pipe", LogisticRegression)
    path = save_model(fitted(), tmp_path / "a")
    with pytest.raises(ModelFileError, match="the model .* would take .* of memory"):
        load_model(path, LogisticRegression, memory=MemoryBudget(1000))


def contents_of(path):
    """The header and the tensors of a model."""
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["jaxsoft"]), load_file(path)


def changed(value, place, new):
    """A copy of nested dictionaries with another value in one place, or none."""
    if not place:
        return new
    first, *rest = place
    copy = value.copy()
    copy[first] = changed(copy[first] if rest else None, rest, new)
    if new is ...:
        copy.pop(first, None) if not rest else None
    return copy


def refused_in_a_line(path, header, tensors, cls: Any = LogisticRegression):
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, {"jaxsoft": text})
    with pytest.raises(ModelFileError) as error:
        load_model(path, cls)
    said = str(error.value)
    assert "\n" not in said and str(path) in said and len(said) < 900
    return said


WRONG: tuple[Any, ...] = (..., None, [], {}, "x", -1, 1.5, True, [[1]], {"a": 1})
ARRAYS = (
    {"array": ["a", "b", "c"], "dtype": "<U100000000"},
    {"array": ["a", "b", "c"], "dtype": "<U0"},
    {"array": ["a", "b", "c"], "dtype": "V9"},
    {"array": ["a", "b", "c"], "dtype": "O,O"},
    {"array": ["a", "b", 3], "dtype": "<U1"},
    {"array": ["a", "b", 3], "dtype": "|O"},
    {"array": ["a", "c", "b"], "dtype": "<U1"},
    {"array": ["a", "b", "b"], "dtype": "<U1"},
    {"array": ["a", "b", "\ud800"], "dtype": "<U1"},
    {"array": ["a", "b", ["c"]], "dtype": "|O"},
    {"array": ["a", "b"], "dtype": "<U1"},
    {"array": ["a"] * 3, "dtype": "<U1", "more": 1},
)


def test_headers_of_other_types_and_fields_are_refused(tmp_path):
    path = save_model(fitted(np.array(["a", "b", "c"])[LABELS]), tmp_path / "a")
    header, tensors = contents_of(path)
    for text in ("[" * 9999, "1" * 5000, "{" * 9, '"a"', "null", "\ud7ff"):
        assert "is not a model of jaxsoft" in refused_in_a_line(path, text, tensors)
    for name in header:
        for wrong in WRONG:
            if (name, wrong) != ("parameters", {}):
                refused_in_a_line(path, changed(header, [name], wrong), tensors)
    # All may be missing but these, and some may be any number.
    for name in header["attributes"]:
        wrong = WRONG[1 + (name not in ("classes_", "n_features_in_")) :]
        for value in [each for each in wrong if each is not None]:
            if (name, value) in (("objective_", 1.5), ("objective_", -1)):
                continue
            if (name, value) in (("temperature_", 1.5), ("converged_", True)):
                continue
            if value == "x" and name in ("stopping_reason_", "solver_"):
                continue
            place = ["attributes", name]
            refused_in_a_line(path, changed(header, place, value), tensors)
    for value in (0.0, math.nan, math.inf, 10**30):
        place = ["attributes", "temperature_"]
        refused_in_a_line(path, changed(header, place, value), tensors)
    for array in ARRAYS:
        place = ["attributes", "classes_"]
        refused_in_a_line(path, changed(header, place, array), tensors)
    for array in (*ARRAYS[:5], ARRAYS[8], ARRAYS[10]):
        place = ["attributes", "feature_names_in_"]
        refused_in_a_line(path, changed(header, place, array), tensors)


FITTED = [name for name in vars(fitted()) if name.endswith("_")]


def test_nothing_but_known_attributes_and_parameters_is_set(tmp_path):
    ours: Any = SoftmaxRegression()
    vars(ours).update({name: vars(fitted())[name] for name in FITTED}, solver_="newton")
    for cls, estimator in ((LogisticRegression, fitted()), (SoftmaxRegression, ours)):
        path = save_model(estimator, tmp_path / "a")
        header, tensors = contents_of(path)
        for name in (
            *("predict_log_proba", "dtype", "head", "__sklearn_tags__", "_state"),
            *("__class__", "coef_", "extra_", "head_", "C"),
        ):
            place = ["attributes", name]
            said = refused_in_a_line(path, changed(header, place, "x"), tensors, cls)
            assert "unknown field" in said
            more = {**tensors, name: FEATURES}
            if name != "coef_":
                refused_in_a_line(path, header, more, cls)
        for name in ("predict", "__init__", "checkpoint_dir", "self", "coef_"):
            place = ["parameters", name]
            refused_in_a_line(path, changed(header, place, "x"), tensors, cls)
    nested: Any = 1
    for _ in range(400):
        nested = {"tuple": [nested]}
    for name, value in (
        *(("C", wrong) for wrong in ("1", None, [], 0, math.nan, {"tuple": [1]})),
        *(("head", wrong) for wrong in ("x", None, 3, ["full"], "adaptive")),
        *(("dtype", wrong) for wrong in ("int8", "V9", 3, "float16", {"dict": []})),
        *(("max_iter", wrong) for wrong in ("1", 1.5, 0, True)),
        *(("tol", wrong) for wrong in ("1", None, -1, nested, {"more": 1})),
        *(("C", wrong) for wrong in ({"array": [1], "dtype": "<U9"}, {"dict": [[]]})),
        *(("C", wrong) for wrong in ({"dict": [[[], 1]]}, {"array": 3})),
        ("mesh", "x"),
    ):
        place = ["parameters", name]
        refused_in_a_line(
            path, changed(header, place, value), tensors, SoftmaxRegression
        )
    for name in ("n_features_in_", "temperature_", "classes_", "coef_", "intercept_"):
        attributes, arrays = dict(header["attributes"]), dict(tensors)
        attributes.pop(name, None)
        arrays.pop(name, None)
        refused_in_a_line(
            path, {**header, "attributes": attributes}, arrays, SoftmaxRegression
        )


def test_tensors_of_other_shapes_and_dtypes_are_refused(tmp_path):
    path = save_model(fitted(), tmp_path / "a")
    header, tensors = contents_of(path)
    coef = tensors["coef_"]
    for name, array in (
        *(("coef_", each) for each in (coef[:2], coef[:, :2], coef[0], coef[None])),
        *(("coef_", coef.astype(dtype)) for dtype in (int, bool, np.float16)),
        ("coef_", np.where(coef == coef.max(), np.nan, coef)),
        ("intercept_", np.full(3, np.inf)),
        ("intercept_", np.ones(2)),
        ("intercept_", np.ones((3, 1))),
        ("classes_", np.array([0, 2, 1])),
        ("classes_", np.array([0, 1, 1])),
        ("classes_", np.arange(4)),
        ("classes_", np.arange(3)[:, None]),
        ("classes_", np.array([0, 1, np.nan])),
        ("n_iter_", np.ones(1)),
        ("n_iter_", np.ones((1, 1), int)),
        ("temperature_", np.ones(())),
    ):
        said = refused_in_a_line(path, header, {**tensors, name: array})
        assert "is damaged (" in said and (name in said or name == "classes_")
    for name in tensors:
        rest = {key: array for key, array in tensors.items() if key != name}
        if name != "n_iter_":
            refused_in_a_line(path, header, rest)
    for dtype, bits in (("F8_E4M3", 8), ("F8_E5M2", 8), ("F4", 4), ("C64", 64)):
        size = 18 * bits // 8
        about = {"dtype": dtype, "shape": [2, 9], "data_offsets": [0, size]}
        names = {"coef_": about, "__metadata__": {"jaxsoft": json.dumps(header)}}
        text = json.dumps(names).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
        with pytest.raises(ModelFileError, match="is not a model of jaxsoft"):
            load_model(path, LogisticRegression)


OPTIONS: Any = {"kernel_init": normal, "rngs": nnx.Rngs(0)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: HierarchicalSoftmaxHead(3, ClassTree.huffman(COUNTS), **OPTIONS),
        lambda: HierarchicalSoftmaxHead(3, ClassTree.from_paths(PATHS), **OPTIONS),
        lambda: AdaptiveSoftmaxHead(
            *(3, ClassBands.from_counts(COUNTS, cutoffs=(4, 8))),
            **(OPTIONS | {"tail_features": (2, 1), "projection_init": normal}),
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(tmp_path, make):
    """Whatever sizes a header declares, nothing is made of them."""
    head = make()
    estimator = fitted(np.arange(40) % head.num_classes)
    estimator.head_ = head
    header, tensors = contents_of(save_model(estimator, tmp_path / "a"))
    form = header["head_"]
    variants = [
        changed(form, [name], wrong)
        for name in form
        for wrong in (*WRONG, 10**9, 10**30, math.nan, "float64")
        if wrong != form[name]
        and (name, wrong) not in (("temperature", 1.5), ("temperature", 10**9))
        and (name != "dtype" or wrong not in (None, "float64"))
    ]
    fields = form["classes"]["fields"]
    huge = [10**9] * 3
    for name in fields:
        for wrong in (*WRONG, 10**9, huge, list(range(1, 2001)), [-1, 12], []):
            if (fields[name], wrong) != (None, None) and wrong is not ...:
                variants.append(changed(form, ["classes", "fields", name], wrong))
    levels = fields.get("levels")
    if levels is not None:
        deep = [[0] * 2000 + [11], [1] * 2000 + [0]]
        numbers = levels["fields"]
        for name in numbers:
            for wrong in (*WRONG, 0, 10**9, huge, *deep, [-1, 12], [0], [0, 11]):
                if wrong != numbers[name]:
                    place = ["classes", "fields", "levels", "fields", name]
                    variants.append(changed(form, place, wrong))
        tall = {**numbers, "leaves": deep[0], "nodes": deep[1]}
        wide = {**numbers, "leaves": [0, 10**9], "nodes": [1, 0], "arity": 10**9}
        for each in (tall, wide):
            place = ["classes", "fields", "levels", "fields"]
            variants.append(changed(form, place, each))
    for variant in variants:
        refused_in_a_line(tmp_path / "a", {**header, "head_": variant}, tensors)
    for name in [each for each in tensors if each.startswith("head_")]:
        array = tensors[name]
        for wrong in (
            array[:-1],
            array[None],
            array.astype(np.float64),
            array.astype(np.int64),
            np.full_like(array, -5 if array.dtype == np.int32 else np.nan),
            np.full_like(array, 2**30 if array.dtype == np.int32 else np.inf),
            array[::-1].copy() if array.dtype == np.int32 else array.T[None],
        ):
            refused_in_a_line(tmp_path / "a", header, {**tensors, name: wrong})
        rest = {key: each for key, each in tensors.items() if key != name}
        refused_in_a_line(tmp_path / "a", header, rest)
    more = {**tensors, "head_.more": np.ones(3)}
    refused_in_a_line(tmp_path / "a", header, more)
    rest = {key: each for key, each in header.items() if key != "head_"}
    refused_in_a_line(tmp_path / "a", rest, tensors)


def test_no_other_file_is_touched(tmp_path):
    neighbour, plain = tmp_path / ".env", tmp_path / "plain"
    neighbour.write_text("mine")
    plain.touch()
    path = save_model(fitted(), tmp_path / "env")
    assert neighbour.read_text() == "mine"
    assert path.stat().st_mode == plain.stat().st_mode
    with pytest.raises(KeyError), replacing(path, "x") as file:
        file.write("half")
        raise KeyError
    assert load_file(path)
    assert {each.name for each in tmp_path.iterdir()} == {".env", "env", "plain"}
