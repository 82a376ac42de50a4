"""Temperatures of every public function that takes one."""

import functools
import inspect
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxsoft

ROWS, FEATURES, CLASSES = 2, 3, 21
NAMES = [
    name
    for name in jaxsoft.__all__
    if inspect.isfunction(getattr(jaxsoft, name))
    and "temperature" in inspect.signature(getattr(jaxsoft, name)).parameters
]


@functools.cache
def arguments():
    """Returns the arguments that the functions take, by their names."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype("float32")

    hidden, kernel, logits = (
        normal(ROWS, FEATURES),
        normal(FEATURES, CLASSES),
        normal(ROWS, CLASSES),
    )
    labels = np.arange(ROWS)
    ids = labels[:, None]
    tail = jaxsoft.AdaptiveTail(normal(FEATURES, 2), normal(2, CLASSES - 15))
    names = "hidden student_hidden teacher_hidden image text anchors positives"
    named = dict.fromkeys(f"{names} embeddings queries candidates".split(), hidden)
    named |= dict.fromkeys(("kernel", "student_kernel", "teacher_kernel"), kernel)
    names = "logits student_logits teacher_logits target_logits draft_logits values"
    named |= dict.fromkeys(f"{names} relaxed".split(), logits)
    named |= dict.fromkeys(("draft_ids", "labels"), labels)
    named |= dict.fromkeys(("class_ids", "teacher_ids"), ids)
    return named | {
        "key": jax.random.key(0),
        "k": 1,
        "num_samples": 4,
        "teacher_log_probs": -np.ones((ROWS, 1), "float32"),
        "node_kernel": normal(CLASSES - 1, FEATURES),
        "tree": jaxsoft.ClassTree.balanced(CLASSES),
        "bands": jaxsoft.ClassBands.in_order(CLASSES, (15,)),
        "head_kernel": normal(FEATURES, 16),
        "tails": [tail],
        "sampler": jaxsoft.ClassSampler.uniform(CLASSES),
    }


def call(name, temperature, wrap=None, option="temperature", **more):
    """Calls a function; a temperature that is known stays so under jit."""
    function = getattr(jaxsoft, name)
    parameters = inspect.signature(function).parameters
    given = {
        argument: arguments()[argument]
        for argument, parameter in parameters.items()
        if parameter.default is parameter.empty and argument != "temperature"
    }
    if name == "softmax_cross_entropy":
        given["labels"] = arguments()["labels"]
    if name == "linear_expected":
        given["values"] = arguments()["kernel"].T
    if name == "distillation_loss_top_k":
        given["student_logits"] = arguments()["logits"]
    function = function if wrap is None else wrap(function)
    given |= {"temperature": 1.0, option: temperature, **more}
    return jax.eval_shape(lambda: function(**given))


@pytest.mark.parametrize("name", NAMES)
def test_a_known_temperature_that_is_none_raises_under_jit(name):
    parameters = inspect.signature(getattr(jaxsoft, name)).parameters
    options = [option for option in parameters if option.endswith("temperature")]
    for option in options:
        call(name, np.asarray(0.7, "float32"), option=option)
        for bad in (-1.0, np.nan):
            with pytest.raises(
                ValueError, match=f"`{option}` must not be negative or NaN, got {bad}"
            ):
                call(name, np.asarray(bad, "float32"), option=option)
    if "weights" not in parameters or name == "in_batch_cross_entropy":
        return
    # One number a row, of which some do not count; a batch has one for all.
    weights: dict[str, Any] = {"weights": np.asarray([0.5, 0], "float32")}
    call(name, np.asarray([0.5, 2], "float32"), **weights)
    with pytest.raises(ValueError, match="`temperature` must not be negative or NaN"):
        call(name, np.asarray([-1, 2], "float32"), **weights)


@pytest.mark.parametrize("name", ["linear_sample", "linear_cross_entropy"])
@pytest.mark.parametrize("bad", [-1, [0.5, np.nan]])
def test_a_known_temperature_that_is_none_raises_over_a_mesh(name, bad):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    wrap = functools.partial(jaxsoft.over_mesh, mesh=mesh, token_axes="data")
    call(name, np.asarray([0.5, 2], "float32"), wrap)
    with pytest.raises(ValueError, match="`temperature` must not be negative or NaN"):
        call(name, np.asarray(bad, "float32"), wrap)


def test_a_known_filter_out_of_range_raises_over_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    wrap = functools.partial(jaxsoft.over_mesh, mesh=mesh, token_axes="data")
    with pytest.raises(ValueError, match="`top_k` must be at least 0, got -1"):
        call("linear_sample", 1.0, wrap, top_k=np.asarray([3, -1]))
    with pytest.raises(ValueError, match="`top_p` must lie in"):
        call("linear_sample", 1.0, wrap, top_p=np.asarray([0.5, 2], "float32"))
