import json
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
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
    estimator = fitted()
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
    estimator.extra_ = np.random.default_rng(0)
    with pytest.raises(
        TypeError, match="`extra_` must be a number, .* got a Generator;"
    ):
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
        ({"format": 2}, "has format 2, this version of jaxsoft reads 1; read it with"),
        ({"parameters": {"D": 1}}, "is damaged ("),
        ({"attributes": {}, "head_": {}}, "is damaged ("),
    ):
        whole = {"estimator": "LogisticRegression", "format": 1, "parameters": {}}
        whole = {**whole, "attributes": {}, **contents}
        save_file({"coef_": FEATURES}, path, {"jaxsoft": json.dumps(whole)})
        assert message in refused()


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
