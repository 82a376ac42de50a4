"""Row gradients against dense ones, and row optimizers against Optax's."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsoft import (
    ClassTree,
    RowGradient,
    hierarchical_log_prob,
    hierarchical_value_and_row_grad,
    row_adagrad,
    row_adam,
    row_sgd,
)
from tests.hierarchical import cases

PAIRS = {
    "sgd": (row_sgd, optax.sgd),
    "adagrad": (row_adagrad, optax.adagrad),
    "adam": (row_adam, optax.adam),
}


def row_gradient(*fields: Any) -> RowGradient:
    """Returns a gradient of NumPy's arrays."""
    return RowGradient(*fields)


@functools.cache
def compiled(optimizer):
    """Returns the update of Optax's optimizer, with the step that it makes."""

    @jax.jit
    def update(params, gradient, state):
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    return update


def by_optax(optimizer, params, gradient, state=None) -> Any:
    """Returns the new parameters and state."""
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        state = optimizer.init(params) if state is None else state
        return compiled(optimizer)(params, gradient, state)


def dense(
    hidden, kernel, labels, tree, bias=None, weights=None, mean=True, tau: Any = 1.0
):
    """Returns the loss and its gradients by automatic differentiation."""
    weights = np.ones(np.shape(labels)) if weights is None else weights

    def loss(hidden, parameters):
        kernel, bias = parameters
        found = hierarchical_log_prob(
            hidden, kernel, labels, tree, node_bias=bias, temperature=tau
        )
        return -jnp.sum(found * weights) / (jnp.sum(weights) if mean else 1)

    return jax.value_and_grad(loss, (0, 1))(hidden, (kernel, bias))


@jax.jit
def by_rows_and_dense(layer, labels, tree):
    """Returns loss and gradients by rows, made dense, and those of the dense loss."""
    hidden, kernel, bias = layer
    loss, dhidden, gradient = hierarchical_value_and_row_grad(
        hidden, kernel, labels, tree, node_bias=bias
    )
    by_rows = loss, (dhidden, gradient.dense(tree.num_rows))
    return gradient, by_rows, dense(hidden, kernel, labels, tree, bias)


@pytest.mark.parametrize("num_classes", [1, 2, 13, 40])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.many_cases
def test_equals_automatic_differentiation(kind, num_classes, x64):
    tree = cases.tree(kind, num_classes)
    hidden, kernel, bias = cases.layer(tree, rows=12)
    random = np.random.default_rng(2)
    tau, weights = random.uniform(0.4, 2, 12), random.uniform(0, 2, 12)
    # Some come more than once.
    labels = random.integers(0, num_classes, 12) // 2

    @jax.jit
    def results(hidden, kernel, bias, labels, tree):
        options = {"temperature": tau, "weights": weights, "reduction": "sum"}
        full = hierarchical_value_and_row_grad(
            hidden, kernel, labels, tree, node_bias=bias, **options
        )
        plain = hierarchical_value_and_row_grad(hidden, kernel, labels, tree)
        by_rows = [
            (loss, dhidden, gradient.dense(tree.num_rows))
            for loss, dhidden, gradient in (full, plain)
        ]
        return (
            *by_rows,
            dense(hidden, kernel, labels, tree, bias, weights, False, tau),
            dense(hidden, kernel, labels, tree, jnp.zeros_like(bias)),
        )

    full, plain, expected, expected_plain = results(hidden, kernel, bias, labels, tree)
    np.testing.assert_allclose(full[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(full[1], expected[1][0], rtol=1e-11, atol=1e-13)
    for own, whole in zip(full[2], expected[1][1], strict=True):
        np.testing.assert_allclose(own, whole, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(plain[0], expected_plain[0], rtol=1e-12)
    np.testing.assert_allclose(
        plain[2], expected_plain[1][1][0], rtol=1e-11, atol=1e-13
    )


@jax.jit
def rows_on_paths(hidden, kernel, labels, tree):
    return hierarchical_value_and_row_grad(hidden, kernel, labels, tree)[2].rows


@pytest.mark.parametrize("kind", cases.KINDS)
def test_groups_share_no_row_and_hold_only_rows_on_paths(kind):
    tree = cases.tree(kind, 40)
    hidden, kernel, _ = cases.layer(tree, rows=30, dtype="float32")
    labels = np.random.default_rng(3).integers(0, 40, 30)
    rows = np.asarray(rows_on_paths(hidden, kernel, labels, tree))
    groups = [set(own.tolist()) - {tree.num_rows} for own in rows]
    assert len(groups) == tree.max_depth * (tree.arity - 1)
    assert sum(map(len, groups)) == len(set().union(*groups))
    first_rows, num_rows, _ = cases.paths(tree)[:, labels]
    wanted = set()
    for first, number in zip(first_rows.ravel(), num_rows.ravel(), strict=True):
        wanted |= set(range(first, first + number))
    assert set().union(*groups) == wanted


@pytest.mark.parametrize("kind", ["balanced", "huffman of 4"])
def test_one_label_many_times(kind, x64):
    tree = cases.tree(kind, 50)
    hidden, kernel, bias = cases.layer(tree, rows=64)
    labels = np.full(64, 17)
    gradient, found, expected = jax.device_get(
        by_rows_and_dense((hidden, kernel, bias), labels, tree)
    )
    for own, whole in zip(found[1][1], expected[1][1], strict=True):
        np.testing.assert_allclose(own, whole, rtol=1e-11, atol=1e-14)

    @jax.jit
    def moved_by_rows(params, gradient):
        optimizers = [ours(0.1) for ours, _ in PAIRS.values()]
        return [o.update(params, gradient, o.init(params))[0] for o in optimizers]

    @jax.jit
    def moved_by_optax(params, gradient):
        optimizers = [theirs(0.1) for _, theirs in PAIRS.values()]
        updates = [o.update(gradient, o.init(params))[0] for o in optimizers]
        return [optax.apply_updates(params, update) for update in updates]

    moved = moved_by_rows((kernel, bias), gradient)
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        whole = moved_by_optax((kernel, bias), expected[1][1])
    for own, other in zip(*map(jax.tree.leaves, (moved, whole)), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("logit", [50.0, -50.0, 1000.0, -1000.0])
def test_saturated_nodes(logit, x64):
    tree = ClassTree.balanced(2)
    layer = np.ones((2, 1)), np.full((1, 1), logit), np.zeros(1)
    for label in (0, 1):
        _, found, expected = by_rows_and_dense(layer, np.full(2, label), tree)
        for own, whole in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(own, whole, rtol=1e-12)
        odds = -logit if label else logit
        exact = (1 if label == 0 else -1) * (1.0 if odds > 40 else np.exp(odds))
        np.testing.assert_allclose(found[1][1][0], [[exact]], rtol=1e-12)


def test_masked_tokens_and_labels_that_are_no_class():
    tree = ClassTree.huffman([5, 4, 3, 2, 1])
    hidden, kernel, _ = cases.layer(tree, dtype="float32")
    labels = np.array([0, -1, 5, 3, 4, 2])
    keep = np.array([True, False, False, False, True, False])

    def call(hidden, labels, weights=None):
        loss, dhidden, gradient = hierarchical_value_and_row_grad(
            hidden, kernel, labels, tree, weights=weights
        )
        return loss, dhidden, gradient.dense(4), gradient.rows

    @jax.jit
    def results(hidden, labels, weights):
        return (
            call(hidden, labels, weights),
            call(hidden[keep], labels[keep]),
            call(hidden[:0], labels[:0]),
            call(hidden, labels)[0],
        )

    assert np.isnan(results(hidden, labels, keep)[3])
    hidden[3], hidden[5] = np.inf, np.nan
    masked, alone, empty, _ = jax.device_get(results(hidden, labels, keep))
    np.testing.assert_allclose(masked[0], alone[0], rtol=1e-6)
    np.testing.assert_allclose(masked[1][keep], alone[1], rtol=1e-6)
    assert (np.asarray(masked[1])[~keep] == 0).all()
    np.testing.assert_allclose(masked[2], alone[2], rtol=1e-5, atol=1e-7)
    # A masked token's rows are not visited: an optimizer that is lazy leaves them.
    assert (np.asarray(masked[3])[:, ~keep] == tree.num_rows).all()
    none = jax.device_get(results(hidden, labels, keep & False)[0])
    assert none[0] == 0 and (np.asarray(none[1]) == 0).all()
    assert (np.asarray(none[2]) == 0).all()
    assert empty[0] == 0 and (np.asarray(empty[2]) == 0).all()


def test_leading_axes_and_vmap():
    tree = cases.tree("ternary", 11)
    hidden, kernel, bias = cases.layer(tree, dtype="float32")
    labels = np.array([0, 10, 3, 3, 7, 9])

    def call(hidden, labels):
        loss, dhidden, gradient = hierarchical_value_and_row_grad(
            hidden, kernel, labels, tree, node_bias=bias, reduction="sum"
        )
        return loss, dhidden, gradient.dense(tree.num_rows)

    @jax.jit
    def results(hidden, labels):
        plain = call(hidden, labels)
        folded = call(hidden.reshape(2, 3, -1), labels.reshape(2, 3))
        return plain, folded, jax.vmap(call)(hidden[:, None], labels[:, None])

    found = map(jax.tree.leaves, jax.device_get(results(hidden, labels)))
    for own, other, each in zip(*found, strict=True):
        np.testing.assert_allclose(other.reshape(own.shape), own, rtol=2e-6, atol=1e-6)
        total = each[:, 0] if each.shape[1:] == (1, 4) else each.sum(0)
        np.testing.assert_allclose(total, own, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("count", [20, 400])
@pytest.mark.parametrize("layout", ["plain", "scaled"])
@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_optimizers_that_equal_the_dense_ones(name, layout, count, x64):
    """Where the visits are more than the rows, and where they are fewer."""
    rows_of, dense_of = PAIRS[name]
    schedule = optax.linear_schedule(0.5, 0.1, 4)
    ours, theirs = rows_of(schedule), dense_of(schedule)
    random = np.random.default_rng(4)
    params = {"kernel": np.ones((count, 3)), "bias": np.zeros(count)}
    whole, state, dense_state = params, ours.init(params), None

    @jax.jit
    def step(params, gradient, state):
        return gradient.dense(count), ours.update(params, gradient, state)

    for _ in range(5):
        # Some rows are none, two on either side: nothing must wrap or clamp them.
        values = {
            "kernel": random.standard_normal((30, 3)),
            "bias": random.standard_normal(30),
        }
        if layout == "plain":
            rows = np.resize(random.integers(-2, count + 2, 20), 30)
            gradient = row_gradient(rows.astype("int32"), values)
        else:
            half = count // 2
            lower = np.resize(random.integers(-2, half, 20), 30)
            rows = np.stack([lower, random.integers(half, count + 2, 30)])
            scales = random.standard_normal((2, 30))
            gradient = row_gradient(rows.astype("int32"), values, scales)
        total = {"kernel": np.zeros((count, 3)), "bias": np.zeros(count)}
        for place in np.ndindex(rows.shape):
            if 0 <= rows[place] < count:
                scale = 1 if layout == "plain" else scales[place]
                for key, sums in total.items():
                    sums[rows[place]] += scale * values[key][place[-1]]
        gathered, (params, state) = step(params, gradient, state)
        for own, other in zip(
            jax.tree.leaves(gathered), jax.tree.leaves(total), strict=True
        ):
            np.testing.assert_allclose(own, other, rtol=1e-12, atol=1e-13)
        whole, dense_state = by_optax(theirs, whole, total, dense_state)
        for own, other in zip(
            jax.tree.leaves(params), jax.tree.leaves(whole), strict=True
        ):
            np.testing.assert_allclose(own, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("left_out", [0, 5])
def test_lazy_adam_is_adam_of_each_row_alone(left_out, x64):
    """With more visits than rows, too, where what is no row counts as a visit."""
    random = np.random.default_rng(5)
    ours, theirs = row_adam(0.1), optax.adam(0.1)
    params = np.zeros((6, 2))
    state, update_rows = ours.init(params), jax.jit(ours.update)
    whole, dense_state = params, None
    alone: list[Any] = [(params[row], None) for row in range(6)]
    for update in range(6):
        # Row 0 in each, rows 1 to 4 in one or two, row 5 in none.
        rows = np.array([0, 1 + update % 4, 0], "int32")
        values = random.standard_normal((3, 2))
        given = (
            np.concatenate([rows, np.full(left_out, (-1) ** update * 6, "int32")]),
            np.concatenate([values, np.full((left_out, 2), np.nan)]),
        )
        params, state = update_rows(params, row_gradient(*given), state)
        total = np.zeros((6, 2))
        np.add.at(total, rows, values)
        whole, dense_state = by_optax(theirs, whole, total, dense_state)
        for row in set(rows.tolist()):
            before, own = alone[row]
            alone[row] = by_optax(theirs, before, total[row], own)
    np.testing.assert_allclose(params, [p for p, _ in alone], rtol=1e-11)
    # What is visited each time is as in dense Adam; what is not moved there too.
    np.testing.assert_allclose(params[0], whole[0], rtol=1e-11)
    assert (np.abs(np.asarray(params - whole)[1:5]) > 1e-3).all()
    assert (np.asarray(params[5]) == 0).all()


def test_every_row_visited_is_dense_adam(x64):
    random = np.random.default_rng(6)
    ours, theirs = row_adam(0.1, b1=0.8, b2=0.9), optax.adam(0.1, b1=0.8, b2=0.9)
    params = whole = np.ones((7, 2))
    state, dense_state = ours.init(params), None
    update = jax.jit(ours.update)
    for _ in range(5):
        rows = np.asarray(random.permutation(7), "int32")
        values = random.standard_normal((7, 2))
        params, state = update(params, row_gradient(rows, values), state)
        total = np.zeros((7, 2))
        total[rows] = values
        whole, dense_state = by_optax(theirs, whole, total, dense_state)
    np.testing.assert_allclose(params, whole, rtol=1e-12)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.many_cases
def test_a_step_is_in_place_and_no_temporary_has_all_rows(name):
    tree = ClassTree.balanced(2**16, 4)
    optimizer = PAIRS[name][0](0.1)

    def step(kernel, state, hidden, labels):
        loss, dhidden, gradient = hierarchical_value_and_row_grad(
            hidden, kernel, labels, tree
        )
        return (*optimizer.update(kernel, gradient, state), loss, dhidden)

    kernel = jax.ShapeDtypeStruct((tree.num_rows, 32), "float32")
    state = jax.eval_shape(optimizer.init, kernel)
    hidden, labels = np.ones((64, 32), "float32"), np.arange(64, dtype="int32")
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(kernel, state, hidden, labels)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    sizes = jax.tree.map(lambda a: a.size * a.dtype.itemsize, (kernel, state))
    held, kernel_bytes = sum(jax.tree.leaves(sizes)), sizes[0]
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < kernel_bytes / 16
    assert memory.output_size_in_bytes < held + 2**20


@pytest.mark.parametrize("count", [3, 300])
@pytest.mark.parametrize("name", PAIRS)
def test_bfloat16_parameters_take_the_sum_of_their_gradients(name, count):
    # Each alone would be lost: 1 - 2^-10 rounds to 1.
    optimizer = PAIRS[name][0](2.0**-10 if name == "sgd" else 0.25)
    params = np.ones((count, 2), jnp.bfloat16)
    gradient = row_gradient(np.full(64, 1, "int32"), np.ones((64, 2), jnp.bfloat16))
    state = optimizer.init(params)
    params, state = jax.jit(optimizer.update)(params, gradient, state)
    assert params.dtype == "bfloat16"
    moved = 1 - 64 / 1024 if name == "sgd" else 0.75
    first = np.asarray(params[:, 0], float)
    np.testing.assert_array_equal(first, np.where(np.arange(count) == 1, moved, 1))
    assert state.count == 1


def test_gradients_in_the_dtypes_of_their_arguments():
    tree = cases.tree("balanced", 300)
    hidden, kernel, bias = cases.layer(tree, dtype="float32")
    hidden, kernel = (np.asarray(a, jnp.bfloat16) for a in (hidden, kernel))
    wide = hidden.astype("float32"), kernel.astype("float32")

    @jax.jit
    def results(hidden, kernel, bias, wide):
        loss, dhidden, gradient = hierarchical_value_and_row_grad(
            hidden, kernel, np.arange(6), tree, node_bias=bias
        )
        expected = dense(wide[0], wide[1], np.arange(6), tree, bias)
        return loss, dhidden, gradient.dense(tree.num_rows), expected

    loss, dhidden, whole, expected = results(hidden, kernel, bias, wide)
    assert loss.dtype == "float32" and dhidden.dtype == "bfloat16"
    assert [leaf.dtype for leaf in whole] == ["bfloat16", "float32"]
    np.testing.assert_allclose(
        np.asarray(whole[0], "float32"), expected[1][1][0], rtol=4e-3, atol=1e-6
    )
    np.testing.assert_allclose(whole[1], expected[1][1][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "`learning_rate` must", lambda: row_sgd(-1.0)),
        (TypeError, "`learning_rate` must", lambda: row_sgd(cast(Any, "fast"))),
        (ValueError, "`b1` must", lambda: row_adam(0.1, b1=1.5)),
        (ValueError, "`b2` must", lambda: row_adam(0.1, b2=-0.5)),
        (ValueError, "`eps` must", lambda: row_adagrad(0.1, eps=-1.0)),
        (
            ValueError,
            "`initial_accumulator_value` must",
            lambda: row_adagrad(0.1, initial_accumulator_value=-1.0),
        ),
    ],
)
def test_errors_of_optimizers(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("message", "params", "gradient"),
    [
        ("`values` must have shape", np.ones((4, 2)), ((3,), (3, 3), None)),
        ("`values` must have shape", np.ones((4, 2)), ((3,), (2, 2), None)),
        ("`values` must have shape", np.ones((4, 2)), ((5, 3), (5, 3, 2), (5, 3))),
        ("`scales` must have shape", np.ones((4, 2)), ((5, 3), (3, 2), (3,))),
        ("`params` must hold", np.ones(()), ((3,), (3,), None)),
    ],
)
def test_errors_of_gradients_that_do_not_fit(message, params, gradient):
    optimizer, params = row_sgd(0.1), jnp.asarray(params, "float32")
    rows, values, scales = gradient
    gradient = RowGradient(
        jnp.zeros(rows, "int32"),
        jnp.ones(values),
        None if scales is None else jnp.ones(scales),
    )
    with pytest.raises(ValueError, match=message):
        optimizer.update(params, gradient, optimizer.init(params))


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"reduction": "none"}, "`reduction` must"),
        (ValueError, {"weights": np.ones(5)}, "`weights` must have shape"),
        (TypeError, {"labels": np.zeros(6)}, "`labels` must have an integer dtype"),
        (ValueError, {"labels": np.zeros(5, int)}, "`labels` must have shape"),
        (
            NotImplementedError,
            {"implementation": "mosaic_gpu"},
            "for hierarchical_value_and_row_grad",
        ),
    ],
)
def test_errors(error, options, message):
    arguments = {
        "hidden": np.zeros((6, 4), "float32"),
        "node_kernel": np.zeros((4, 4), "float32"),
        "labels": np.zeros(6, int),
        "tree": ClassTree.balanced(5),
    }
    with pytest.raises(error, match=message):
        hierarchical_value_and_row_grad(**(arguments | options))
