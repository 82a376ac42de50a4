"""Value, gradient and curvature of the objective against NumPy, tiles and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from jaxsoft.training.regression.objective import (
    Data,
    Parameters,
    Plan,
    hessian,
    objective,
)
from jaxsoft.training.regression.sparse_tiles import sparse_tiles, tile_rows
from tests.training.regression.problems import losses, problem

ROWS, FEATURES, CLASSES = 37, 5, 4
STRENGTH = 0.3


def data_of(given, kind="labels", features=None):
    labels = jnp.asarray(given.labels, jnp.int32) if "labels" in kind else None
    targets = jnp.asarray(given.targets) if "targets" in kind else None
    weights = jnp.asarray(given.weights / given.weights.sum())
    if features is None:
        features = jnp.asarray(given.features)
    return Data(features, labels, targets, weights)


def parameters_of(rows, intercept=True):
    random = np.random.default_rng(1)
    kernel, bias = random.normal(size=(rows, FEATURES)), random.normal(size=rows)
    return Parameters(jnp.asarray(kernel), jnp.asarray(bias) if intercept else None)


def truth(plan, parameters, given, kind):
    """The objective of flat parameters, in NumPy."""
    kernel = np.asarray(parameters.kernel)
    scores = given.features @ kernel.T
    if parameters.bias is not None:
        scores = scores + np.asarray(parameters.bias)
    if plan.reference:
        scores = np.pad(scores, [(0, 0), (0, 1)])
    smoothing, share = plan.label_smoothing, 0.0
    loss = 0.0
    if "targets" in kind:
        share = plan.target_weight if "labels" in kind else 1.0
        loss = share * losses(
            scores,
            targets=given.targets,
            smoothing=smoothing,
            temperature=plan.temperature,
        )
    if "labels" in kind:
        loss = loss + (1 - share) * losses(scores, given.labels, smoothing=smoothing)
    weights = given.weights / given.weights.sum()
    return (weights * loss).sum() + 0.5 * STRENGTH * (kernel**2).sum()


def slopes(function, parameters):
    """Central differences of a function of parameters."""
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, parameters))
    found = []
    for place, leaf in enumerate(leaves):
        slope = np.zeros_like(leaf)
        for index in np.ndindex(leaf.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [each.copy() for each in leaves]
                moved[place][index] += step
                ends.append(function(jax.tree.unflatten(tree, moved)))
            slope[index] = (ends[0] - ends[1]) / 2e-5
        found.append(slope)
    return jax.tree.unflatten(tree, found)


CASES = {
    "plain": ("labels", Plan(CLASSES, False, True, ROWS)),
    "tiles": ("labels", Plan(CLASSES, False, True, 10)),
    "reference, smoothing": (
        "labels",
        Plan(CLASSES, True, True, 8, label_smoothing=0.2),
    ),
    "no intercept": ("labels", Plan(CLASSES, False, False, 36)),
    "targets": ("targets", Plan(CLASSES, False, True, ROWS, temperature=3.0)),
    "both": (
        "labels targets",
        Plan(
            CLASSES,
            True,
            True,
            16,
            label_smoothing=0.1,
            temperature=2.0,
            target_weight=0.3,
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.many_cases
def test_value_gradient_and_hessian(name):
    kind, plan = CASES[name]
    given = problem(ROWS, FEATURES, CLASSES)
    with jax.enable_x64(True):
        parameters = parameters_of(plan.num_rows, plan.intercept)
        data, strength = data_of(given, kind), jnp.float64(STRENGTH)
        value, gradient = jax.jit(
            jax.value_and_grad(objective, argnums=1), static_argnums=0
        )(plan, parameters, data, strength)
        np.testing.assert_allclose(
            value, truth(plan, parameters, given, kind), rtol=1e-12
        )
        expected = slopes(lambda p: truth(plan, p, given, kind), parameters)
        for leaf, slope in zip(
            jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(leaf, slope, rtol=1e-6, atol=1e-9)
        # The Hessian times a direction, by the gradient's change along it.
        curved = np.asarray(jax.jit(hessian, static_argnums=0)(plan, parameters, data))
        along = jax.tree.map(
            lambda a: np.cos(np.arange(a.size)).reshape(a.shape), gradient
        )
        step = 1e-5

        def slope_at(sign):
            moved = jax.tree.map(lambda a, d: a + sign * step * d, parameters, along)
            return jax.grad(objective, argnums=1)(plan, moved, data, jnp.float64(0))

        change = jax.tree.map(
            lambda a, b: (a - b) / (2 * step), slope_at(1), slope_at(-1)
        )
        flat = [along, change]
        if plan.intercept:
            flat = [np.column_stack([each.kernel, each.bias]) for each in flat]
        else:
            flat = [np.asarray(each.kernel) for each in flat]
        product = np.einsum("aibj,bj->ai", curved, flat[0])
        np.testing.assert_allclose(product, flat[1], rtol=1e-5, atol=1e-8)


def test_sparse_rows_are_those_of_the_dense_matrix():
    given = problem(ROWS, FEATURES, CLASSES)
    dense = np.where(np.abs(given.features) > 1, given.features, 0)
    dense[3] = 0
    matrix = scipy.sparse.csr_matrix(dense)
    plan, rows = Plan(CLASSES, False, True, ROWS), 8
    tiles = sparse_tiles(matrix, rows, devices=3)
    assert tiles.num_tiles == 6
    missing = tiles.num_tiles * rows - ROWS
    with jax.enable_x64(True):
        parameters = parameters_of(CLASSES)
        whole = data_of(given, features=jnp.asarray(dense))
        padded = [jnp.pad(a, (0, missing)) for a in (whole.labels, whole.weights)]
        sparse = Data(jax.tree.map(jnp.asarray, tiles), padded[0], None, padded[1])
        program = jax.jit(jax.value_and_grad(objective, argnums=1), static_argnums=0)
        for leaf, expected in zip(
            jax.tree.leaves(program(plan, parameters, sparse, jnp.float64(0))),
            jax.tree.leaves(program(plan, parameters, whole, jnp.float64(0))),
            strict=True,
        ):
            np.testing.assert_allclose(leaf, expected, rtol=1e-11, atol=1e-14)


def test_tiles_of_sparse_rows_hold_their_bytes():
    matrix = scipy.sparse.csr_matrix(np.eye(1000, 50, dtype=np.float32))
    assert tile_rows(matrix, 3, 1) == 1000
    assert tile_rows(matrix, 3, 3) == 334
    rows = tile_rows(matrix, 10**6, 1)
    assert rows == 2**25 // (4 * 10**6)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_rows_of_weight_0_count_nothing(weight):
    given = problem(ROWS, FEATURES, CLASSES)
    features = given.features.copy()
    features[5] = np.nan if weight == 0 else features[5]
    weights = given.weights.copy()
    weights[5] *= weight
    plan = Plan(CLASSES, False, True, 10)
    with jax.enable_x64(True):
        data = data_of(given._replace(features=features, weights=weights))
        value = objective(plan, parameters_of(CLASSES), data, jnp.float64(0))
        assert np.isfinite(value)
