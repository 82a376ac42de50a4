"""Combinations of options at random: 100 programs, each on five drawn arguments.

Values are held against the formulas in float64 NumPy, gradients against their central
differences. The arguments are those where formulas go wrong: one class or two, masks
that leave one or none, dropped and absent labels, temperatures at their limits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft
from tests.truth import DIVERGENCES

ROWS, FEATURES, DRAWS = 3, 2, 5
CLASSES = (1, 2, 3, 6)
TEMPERATURES = (1.0, 0.5, 4.0, 0.0, np.inf)
TREES = {
    "balanced": jaxsoft.ClassTree.balanced,
    "ternary": functools.partial(jaxsoft.ClassTree.balanced, arity=3),
    "huffman": lambda classes: jaxsoft.ClassTree.huffman(2.0 ** np.arange(classes)),
}


def log_probabilities(u, tau):
    """Returns log-probabilities of [N, V] logits at [N] temperatures, -inf dropped."""
    out = np.full(u.shape, -np.inf)
    for row, (x, t) in enumerate(zip(u, tau, strict=True)):
        kept = x > -np.inf
        if not kept.any():
            continue
        if t == 0:
            best = x == x.max()
            out[row, best] = -np.log(best.sum())
        elif t == np.inf:
            out[row, kept] = -np.log(kept.sum())
        else:
            c = (x[kept] - x.max()) / t
            out[row, kept] = c - np.log(np.exp(c).sum())
    return out


def log_sums(u, tau):
    """Returns log Σ exp(u / τ) of each row, with its limits."""
    out = np.full(len(u), -np.inf)
    for row, (x, t) in enumerate(zip(u, tau, strict=True)):
        x = x[x > -np.inf]
        if not len(x):
            continue
        if t == 0:
            ties = np.log((x == x.max()).sum())
            out[row] = ties if x.max() == 0 else np.sign(x.max()) * np.inf
        elif t == np.inf:
            out[row] = np.log(len(x))
        else:
            out[row] = x.max() / t + np.log(np.exp((x - x.max()) / t).sum())
    return out


def times(weight, value):
    """Returns a product in which a weight of 0 leaves out what is infinite."""
    return np.where(weight == 0, 0.0, np.where(weight == 0, 1, weight) * value)


def losses(u, tau, labels, smoothing, z_weight):
    """Returns the cross-entropies of rows."""
    log_p, classes = log_probabilities(u, tau), u.shape[1]
    out = np.zeros(len(u))
    for row, label in enumerate(labels):
        kept = u[row] > -np.inf
        if not 0 <= label < classes:
            out[row] = np.nan
        elif kept.any():
            lse = log_sums(u, tau)[row]
            out[row] = -times(np.float64(1 - smoothing), log_p[row, label])
            out[row] -= times(np.float64(smoothing), log_p[row, kept].mean())
            out[row] += times(np.float64(z_weight), lse**2)
    return out


def divergences(student, teacher, tau, kind):
    """Returns τ² times the divergence of rows; of finite temperatures."""
    log_q, log_p = log_probabilities(student, tau), log_probabilities(teacher, tau)
    if kind == "reverse_kl":
        log_q, log_p = log_p, log_q
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind not in ("forward_kl", "reverse_kl"):
            of_p, of_q, share_p, share_q = DIVERGENCES[kind][1]
            log_m = np.log(share_p * p + share_q * q)
            terms = of_p * times(p, log_p - log_m) + of_q * times(q, log_q - log_m)
        else:
            terms = times(p, log_p - log_q)
    return tau**2 * terms.sum(1)


def of_paths(u, tree, tau):
    """Returns log-probabilities of classes from the logits [N, rows] of a tree."""
    first, number, choices = (
        np.asarray(x) for x in tree.paths(np.arange(tree.num_classes))
    )
    out = np.zeros((len(u), len(first)))
    for label, path in enumerate(zip(first, number, choices, strict=True)):
        for start, rows, choice in zip(*path, strict=True):
            scores = np.concatenate(
                [np.zeros((len(u), 1)), u[:, start : start + rows]], axis=1
            )
            out[:, label] += log_probabilities(scores, tau)[:, choice]
    return out


def slopes(function, arrays):
    """Returns the central differences of a scalar function by each array."""
    out = {}
    for name, array in arrays.items():
        out[name] = np.zeros(array.shape)
        for place in np.ndindex(array.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = array.copy()
                moved[place] += step
                ends.append(function(arrays | {name: moved}))
            out[name][place] = (ends[0] - ends[1]) / 2e-5
    return out


def pick(rng, *values: Any) -> Any:
    """Draws one of some values, of any type."""
    return values[rng.integers(len(values))]


def a_mask(rng, classes):
    """Draws a mask that keeps all classes, some, one, or none."""
    kind = rng.integers(4)
    if kind == 0:
        return np.ones(classes, bool)
    if kind == 1:
        return rng.uniform(size=classes) < 0.6
    return (np.arange(classes) == rng.integers(classes)) & (kind == 2)


def some_temperatures(rng):
    """Draws a temperature for each row."""
    return rng.choice(TEMPERATURES, ROWS)


def masked(u, mask):
    """Returns logits that are -inf at dropped classes."""
    return np.where(mask, u, -np.inf)


def assert_close(found, truth, what):
    """Holds a result against its truth, to float32's rounding of sums."""
    size = np.abs(truth[np.isfinite(truth)]).max(initial=1) if np.ndim(truth) else 1
    np.testing.assert_allclose(found, truth, rtol=3e-5, atol=3e-5 * size, err_msg=what)


def check(function, truth, floats, others, what):
    """Compares the values of rows, then the gradients of the rows that have them."""
    values, gradients = function(floats, others)
    wide = {name: x.astype(np.float64) for name, x in floats.items()}
    right = truth(wide, others)
    assert_close(values, right, what)
    # At the limits gradients are 0; elsewhere they are those of the formula.
    usual = np.isfinite(right) & (others["tau"] > 0) & (others["tau"] < np.inf)
    found = gradients(usual)
    expected = slopes(lambda a: truth(a, others)[usual].sum(), wide)
    for name in floats:
        assert_close(found[name], expected[name], f"{what}: by {name}")
    limits = np.isfinite(right) & ~usual
    for name, gradient in gradients(limits).items():
        np.testing.assert_array_equal(gradient, 0, f"{what}: {name} at a limit")


def program(call):
    """Returns the values of rows, and the gradients of the sum of some of them."""
    values = jax.jit(call)

    @jax.jit
    def gradients(floats, others, rows):
        def total(floats):
            return jnp.where(rows, call(floats, others), 0).sum()

        return jax.grad(total)(floats)

    def run(floats, others):
        return np.asarray(values(floats, others), np.float64), lambda rows: gradients(
            floats, others, rows
        )

    return run


def normal(rng, *shape):
    """Draws numbers that float32 holds."""
    return rng.standard_normal(shape).astype(np.float32)


def stored_losses(rng):
    """Returns a program of stored logits, its truth, and what draws its arguments."""
    classes = int(rng.choice(CLASSES))
    smoothing, z_weight = rng.choice([0.0, 0.1, 1.0]), rng.choice([0.0, 0.1])

    def call(floats, others):
        return jaxsoft.softmax_cross_entropy(
            floats["logits"],
            others["labels"],
            others["tau"],
            where=others["mask"],
            label_smoothing=smoothing,
            z_loss=z_weight,
        )

    def truth(floats, others):
        u = masked(floats["logits"], others["mask"])
        return losses(u, others["tau"], others["labels"], smoothing, z_weight)

    def draw(rng):
        others = {
            "labels": rng.integers(-1, classes + 1, ROWS).astype(np.int32),
            "mask": a_mask(rng, classes),
            "tau": some_temperatures(rng).astype(np.float32),
        }
        return {"logits": normal(rng, ROWS, classes)}, others

    return call, truth, draw, f"stored {classes=} {smoothing=} {z_weight=}"


def streamed_losses(rng):
    """Likewise for hidden states and a kernel, with all their options."""
    classes = int(rng.choice(CLASSES))
    smoothing, z_weight = rng.choice([0.0, 0.1, 1.0]), rng.choice([0.0, 0.1])
    softcap = pick(rng, None, 1.5)
    layout = pick(rng, "hv", "vh")
    ignore = pick(rng, None, -1)

    def call(floats, others):
        kernel = floats["kernel"]
        return jaxsoft.linear_cross_entropy(
            floats["hidden"],
            kernel if layout == "hv" else kernel.T,
            others["labels"],
            bias=floats["bias"],
            temperature=others["tau"],
            logit_softcap=softcap,
            class_mask=others["mask"],
            kernel_layout=layout,
            label_smoothing=smoothing,
            z_loss=z_weight,
            weights=others["weights"],
            ignore_label=ignore,
            reduction="none",
        )

    def truth(floats, others):
        u = floats["hidden"] @ floats["kernel"] + floats["bias"]
        u = u if softcap is None else softcap * np.tanh(u / softcap)
        u = masked(u, others["mask"])
        rows = losses(u, others["tau"], others["labels"], smoothing, z_weight)
        weights = np.where(others["labels"] == ignore, 0, others["weights"])
        return times(weights.astype(np.float64), rows)

    def draw(rng):
        floats = {
            "hidden": normal(rng, ROWS, FEATURES),
            "kernel": normal(rng, FEATURES, classes),
            "bias": normal(rng, classes),
        }
        others = {
            "labels": rng.integers(-1, classes + 1, ROWS).astype(np.int32),
            "mask": a_mask(rng, classes),
            "tau": some_temperatures(rng).astype(np.float32),
            "weights": rng.choice([0.0, 0.5, 2.0], ROWS).astype(np.float32),
        }
        return floats, others

    what = f"streamed {classes=} {smoothing=} {z_weight=} {softcap=} {layout=} {ignore}"
    return call, truth, draw, what


def log_probs(rng):
    """Likewise for log-probabilities, and their entropies."""
    classes, wants_entropy = int(rng.choice(CLASSES)), bool(rng.integers(2))

    def call(floats, others):
        log_prob, entropy = jaxsoft.linear_log_prob(
            floats["hidden"],
            floats["kernel"],
            others["labels"],
            temperature=others["tau"],
            class_mask=others["mask"],
        )
        return entropy if wants_entropy else log_prob

    def truth(floats, others):
        u = masked(floats["hidden"] @ floats["kernel"], others["mask"])
        log_p = log_probabilities(u, others["tau"])
        if wants_entropy:
            return -times(np.exp(log_p), log_p).sum(1)
        return log_p[np.arange(ROWS), others["labels"]]

    def draw(rng):
        mask = a_mask(rng, classes)
        labels = np.flatnonzero(mask) if mask.any() else np.zeros(1)
        floats = {
            "hidden": normal(rng, ROWS, FEATURES),
            "kernel": normal(rng, FEATURES, classes),
        }
        others = {
            "labels": rng.choice(labels, ROWS).astype(np.int32),
            "mask": mask | ~mask.any(),
            "tau": some_temperatures(rng).astype(np.float32),
        }
        return floats, others

    return call, truth, draw, f"log-probabilities {classes=} {wants_entropy=}"


def distillations(rng):
    """Likewise for divergences of two rows of logits."""
    classes = int(rng.choice(CLASSES))
    kind = pick(rng, *DIVERGENCES)

    def call(floats, others):
        return jaxsoft.distillation_loss(
            floats["student"],
            floats["teacher"],
            others["tau"],
            where=others["mask"],
            **DIVERGENCES[kind][0],
        )

    def truth(floats, others):
        student = masked(floats["student"], others["mask"])
        teacher = masked(floats["teacher"], others["mask"])
        return divergences(student, teacher, others["tau"], kind)

    def draw(rng):
        floats = {name: normal(rng, ROWS, classes) for name in ("student", "teacher")}
        others = {
            "mask": a_mask(rng, classes),
            "tau": rng.choice([1.0, 0.5, 4.0], ROWS).astype(np.float32),
        }
        return floats, others

    return call, truth, draw, f"distillation {classes=} {kind=}"


def trees(rng):
    """Likewise for the log-probabilities of a tree's classes."""
    classes, kind = int(rng.choice(CLASSES)), str(rng.choice(list(TREES)))
    tree = TREES[kind](classes)

    def call(floats, others):
        return jaxsoft.hierarchical_log_prob(
            floats["hidden"],
            floats["node_kernel"],
            others["labels"],
            tree,
            temperature=others["tau"],
        )

    def truth(floats, others):
        u = floats["hidden"] @ floats["node_kernel"].T
        log_p = of_paths(u, tree, others["tau"])
        return log_p[np.arange(ROWS), others["labels"]]

    def draw(rng):
        floats = {
            "hidden": normal(rng, ROWS, FEATURES),
            "node_kernel": normal(rng, tree.num_rows, FEATURES),
        }
        others = {
            "labels": rng.integers(0, classes, ROWS).astype(np.int32),
            "tau": some_temperatures(rng).astype(np.float32),
        }
        return floats, others

    return call, truth, draw, f"tree {classes=} {kind=}"


KINDS = (stored_losses, streamed_losses, log_probs, distillations, trees)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(80))
def test_values_and_gradients(seed):
    """Losses, log-probabilities, divergences and trees, by turns."""
    rng = np.random.default_rng(seed)
    call, truth, draw, what = KINDS[seed % len(KINDS)](rng)
    run = program(call)
    for number in range(DRAWS):
        floats, others = draw(rng)
        check(run, truth, floats, others, f"{what}, draw {number}: {others}")


def kept_classes(u, tau, top_k, top_p, min_p, top_n_sigma):
    """Returns the classes that a row's filters keep, one after another."""
    order = [v for v in np.argsort(-u, kind="stable") if u[v] > -np.inf]
    if top_n_sigma is not None and order:
        least = u[order[0]] - top_n_sigma * np.std(u[order]) - 1e-5
        order = [v for v in order if u[v] >= least]
    if top_k is not None:
        order = order[:top_k]
    if top_p is not None and order:
        p = np.exp(log_probabilities(u[None, order], np.array([tau]))[0])
        count = 1 if top_p == 0 else 1 + np.sum(np.cumsum(p) < top_p - 1e-6)
        order = order if top_p == 1 else order[:count]
    if min_p is not None and order:
        c = log_probabilities(u[None, order], np.array([tau]))[0]
        order = [
            v
            for v, at in zip(order, c, strict=True)
            if v == order[0] or at - c[0] >= np.log(max(min_p, 1e-300)) - 1e-5
        ]
    return set(order)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_samplers(seed):
    """A draw is a class that the filters keep; every such class is drawn at times."""
    rng = np.random.default_rng(1000 + seed)
    classes = int(rng.choice(CLASSES))
    filters = {
        "top_k": pick(rng, None, 1, 2, 100),
        "top_p": pick(rng, None, 0.0, 0.5, 1.0),
        "min_p": pick(rng, None, 0.0, 0.3),
        "top_n_sigma": pick(rng, None, 0.0, 1.3),
    }

    @jax.jit
    def draw(keys, logits, tau, mask):
        return jax.vmap(
            lambda key: jaxsoft.sample(key, logits, tau, where=mask, **filters)
        )(keys)

    keys = jax.random.split(jax.random.key(seed), 400)
    for _ in range(DRAWS):
        logits, mask = normal(rng, ROWS, classes), a_mask(rng, classes)
        tau = some_temperatures(rng).astype(np.float32)
        drawn = np.asarray(draw(keys, logits, tau, mask))
        u = masked(logits.astype(np.float64), mask)
        for row in range(ROWS):
            kept = kept_classes(u[row], tau[row], *filters.values()) or {-1}
            found = set(drawn[:, row].tolist())
            what = f"{u[row]} {tau[row]} {filters} {kept}"
            assert found <= kept, what
            p = np.exp(log_probabilities(u[row : row + 1], tau[row : row + 1]))[0]
            likely = {v for v in kept if v >= 0 and p[v] > 0.03}
            assert likely <= found, what
