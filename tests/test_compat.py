"""Losses under other libraries' names equal the formulas of these libraries."""

import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsoft import compat

N, H, V = 6, 5, 7
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.standard_normal((N, V)).astype("float32") * 3
HIDDEN = RANDOM.standard_normal((N, H)).astype("float32")
KERNEL = RANDOM.standard_normal((H, V)).astype("float32")
LABELS = np.array([0, 6, 3, 3, 1, 5], "int32")
IGNORED = np.array([0, -100, 3, 3, -100, 5], "int32")
TARGETS = RANDOM.dirichlet(np.ones(V), N).astype("float32")
CLASS_WEIGHTS = RANDOM.uniform(0.2, 2, V).astype("float32")


def close(found: Any, expected: Any) -> None:
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def by_standard_promotion(formula):
    """Returns a formula as its library runs it; these tests run jaxsoft without."""

    @functools.wraps(formula)
    def call(*arrays):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return formula(*arrays)

    return call


def both(ours, theirs, *arrays) -> None:
    """Compares values, and gradients of a weighted sum of all results."""
    theirs = by_standard_promotion(theirs)
    close(ours(*arrays), theirs(*arrays))

    def total(function, *arrays):
        leaves = jax.tree.leaves(function(*arrays))
        return sum(
            jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in leaves
        )

    moving = tuple(range(len(arrays)))
    close(
        *(
            jax.grad(functools.partial(total, f), moving)(*arrays)
            for f in (ours, theirs)
        )
    )


def log_p(logits):
    return jax.nn.log_softmax(logits)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_t5x(z_loss):
    def theirs(logits, targets):
        z = z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
        return -jnp.sum(targets * log_p(logits), axis=-1) + z, z

    ours = functools.partial(compat.cross_entropy_with_logits, z_loss=z_loss)
    both(ours, theirs, LOGITS, TARGETS)
    # Targets that sum to something else: a derivative that the host has wrong.
    both(ours, theirs, LOGITS, 2 * TARGETS)
    assert ours(LOGITS.astype("bfloat16"), TARGETS)[0].dtype == jnp.float32
    # A row without any class has no loss.
    none = jnp.full((1, V), -jnp.inf)
    close(ours(none, TARGETS[:1]), (np.zeros(1), np.zeros(1)))


@pytest.mark.parametrize("kind", ["labels", "live", "soft"])
def test_axlearn(kind):
    labels = np.array([0, 6, -1, 3, 7, 5])
    live = np.array([1, 0.5, 0, 2, 0, 0], "float32")
    options: dict[str, Any] = {"z_loss_scale": 0.1}
    counts = live if kind == "live" else ((labels >= 0) & (labels < V)) * 1.0
    q = jax.nn.one_hot(labels, V)
    if kind == "soft":
        options["soft_target_labels"] = q = TARGETS
    else:
        options["label_smoothing"] = 0.2
        q = 0.8 * q + 0.2 / V
    if kind == "live":
        options["live_targets"] = live

    def theirs(logits):
        squared = jax.nn.logsumexp(logits, axis=-1) ** 2
        ce = -jnp.sum(q * log_p(logits), axis=-1)
        each = ce + 0.1 * squared
        number = max(counts.sum(), 1)
        hits = jnp.argmax(logits, axis=-1) == labels
        loss = (each * counts).sum() / number
        return loss, {
            "total_loss": loss,
            "z_loss": (squared * counts).sum() / number,
            "cross_entropy_loss": (ce * counts).sum() / number,
            "per_target_loss": jnp.where(counts != 0, each, 0),
            "accuracy": (hits * counts).sum() / number,
        }

    def ours(logits):
        return compat.axlearn_cross_entropy(logits, labels, **options)

    both(ours, theirs, LOGITS)
    # A row that does not count may hold anything.
    holds = np.where(np.arange(N)[:, None] == 2, np.nan, LOGITS)
    close(ours(holds), ours(LOGITS))
    gradient = jax.grad(lambda x: ours(x)[0])(holds)
    np.testing.assert_array_equal(gradient[2], 0)
    with pytest.raises(ValueError, match="`label_smoothing` must be 0 with"):
        compat.axlearn_cross_entropy(
            LOGITS, labels, label_smoothing=0.1, soft_target_labels=TARGETS
        )


@pytest.mark.parametrize("cap", [None, 2.0])
def test_levanter(cap):
    def logits_of(x, w):
        logits = x @ w
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def theirs(x, w):
        logits = logits_of(x, w)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return lse - logits[jnp.arange(N), LABELS], lse

    def ours(x, w):
        return compat.levanter_cross_entropy(
            x, LABELS, w, block_sizes=3, logit_soft_cap=cap, precision="highest"
        )

    both(ours, theirs, HIDDEN, KERNEL)
    *_, argmax = compat.levanter_cross_entropy(
        HIDDEN, LABELS, KERNEL, logit_soft_cap=cap, return_argmax=True
    )
    np.testing.assert_array_equal(argmax, logits_of(HIDDEN, KERNEL).argmax(1))
    narrow = compat.levanter_cross_entropy(HIDDEN, LABELS, KERNEL, dtype=jnp.bfloat16)
    assert [each.dtype for each in narrow] == [jnp.bfloat16] * 2


def test_reinforcement_learning():
    def theirs(hidden, kernel):
        log_probs = log_p(hidden @ kernel / 0.7)
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return log_probs[jnp.arange(N), LABELS], entropy

    def ours(hidden, kernel):
        return compat.per_token_log_probs(
            hidden,
            LABELS,
            kernel.T,
            temperature=0.7,
            return_entropy=True,
            kernel_layout="vh",
        )

    both(ours, theirs, HIDDEN, KERNEL)
    alone = compat.per_token_log_probs(HIDDEN, LABELS, KERNEL, temperature=0.7)
    close(alone, theirs(HIDDEN, KERNEL)[0])


@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), (2, 0)])
@pytest.mark.parametrize("mask", [None, "classes", "rows"])
def test_optax(axis, mask):
    logits = RANDOM.standard_normal((3, 4, 5)).astype("float32")
    axes = (axis,) if isinstance(axis, int) else axis
    sizes = [logits.shape[each] for each in axes]
    rows = [
        n for i, n in enumerate(logits.shape) if i - 3 not in axes and i not in axes
    ]
    labels = RANDOM.integers(0, np.prod(sizes), rows)
    where: Any = None
    if mask == "classes":
        where = np.ones(logits.shape, bool)
        where[1, 2, 3] = False
        # A label whose class is dropped has another loss there.
        labels = labels * 0
    elif mask == "rows" and isinstance(axis, int):
        where = RANDOM.random(rows) < 0.7
    both(
        lambda x: compat.softmax_cross_entropy_with_integer_labels(
            x, labels, axis, where
        ),
        lambda x: optax.softmax_cross_entropy_with_integer_labels(
            x, labels, axis, where
        ),
        logits,
    )
    targets = np.abs(RANDOM.standard_normal(logits.shape)).astype("float32")
    # The host's derivative by the targets of dropped classes is NaN.
    moving = (logits, targets) if where is None else (logits,)
    both(
        lambda x, q=targets: compat.softmax_cross_entropy(x, q, axis, where),
        lambda x, q=targets: optax.softmax_cross_entropy(x, q, axis, where),
        *moving,
    )


def test_what_optax_takes_for_a_label():
    labels = np.array([-1, 7, 0, 1, 2, 3])
    where = np.arange(V) != 2
    found = compat.softmax_cross_entropy_with_integer_labels(
        LOGITS, labels, where=np.broadcast_to(where, LOGITS.shape)
    )
    np.testing.assert_array_equal(np.isnan(found), (labels < 0) | (labels >= V))
    assert found[4] == np.inf
    with pytest.raises(ValueError, match="`axis` must be in"):
        compat.softmax_cross_entropy(LOGITS, TARGETS, axis=2)


@by_standard_promotion
def of_torch(logits, target, weight, smoothing, reduction):
    """The formula of PyTorch's documentation, classes last."""
    weight = jnp.ones(V) if weight is None else weight
    counts = target != -100
    ids = jnp.where(counts, target, 0)
    nll = -log_p(logits) * weight
    of_label = jnp.take_along_axis(nll, ids[..., None], -1)[..., 0]
    each = (1 - smoothing) * of_label + smoothing * nll.mean(-1)
    each = jnp.where(counts, each, 0)
    if reduction == "none":
        return each
    number = jnp.where(counts, weight[ids], 0).sum() if reduction == "mean" else 1
    return each.sum() / number


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHTS], ids=["", "weights"])
def test_torch(weight, smoothing, reduction):
    options: Any = {"label_smoothing": smoothing, "reduction": reduction}
    both(
        lambda x: compat.torch_cross_entropy(x, IGNORED, weight, **options),
        lambda x: of_torch(x, IGNORED, weight, smoothing, reduction),
        LOGITS,
    )
    # The classes are on axis 1.
    images, labels = LOGITS.reshape(2, 3, V), IGNORED.reshape(2, 3)
    both(
        lambda x: compat.torch_cross_entropy(
            jnp.moveaxis(x, -1, 1), labels, weight, **options
        ),
        lambda x: of_torch(x, labels, weight, smoothing, reduction),
        images,
    )

    def of_probabilities(logits):
        q = (1 - smoothing) * TARGETS + smoothing / V
        w = 1.0 if weight is None else weight
        each = -jnp.sum(q * w * log_p(logits), axis=-1)
        return {"mean": each.mean, "sum": each.sum, "none": lambda: each}[reduction]()

    both(
        lambda x: compat.torch_cross_entropy(x, TARGETS, weight, **options),
        of_probabilities,
        LOGITS,
    )


@pytest.mark.parametrize("weight", [None, CLASS_WEIGHTS], ids=["", "weights"])
def test_labels_that_torch_refuses(weight):
    nothing = np.full(N, -100)
    assert compat.torch_cross_entropy(LOGITS, nothing, weight) == 0
    bad = np.where(np.arange(N) == 2, V, LABELS)
    found = compat.torch_cross_entropy(LOGITS, bad, weight, reduction="none")
    np.testing.assert_array_equal(np.isnan(found), np.arange(N) == 2)
    assert np.isnan(compat.torch_cross_entropy(LOGITS, bad, weight))
    assert np.isnan(compat.torch_cross_entropy(LOGITS[2:3], bad[2:3], weight))
    one = compat.torch_cross_entropy(LOGITS[0], LABELS[0], weight)
    close(one, of_torch(LOGITS[:1], LABELS[:1], weight, 0.0, "mean"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_weights_add_up_in_float32(dtype):
    rows = 70_000
    found = compat.torch_cross_entropy(
        np.zeros((rows, 2), "float32"), np.zeros(rows, "int32"), np.ones(2, dtype)
    )
    np.testing.assert_allclose(found, np.log(2), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_liger(reduction):
    bias = np.linspace(-1, 1, V, dtype="float32")
    counts = IGNORED != -100

    def theirs(hidden, weight, bias):
        logits = 2 * jnp.tanh((hidden @ weight.T + bias) / 2)
        z = 0.1 * jax.nn.logsumexp(logits, axis=-1) ** 2
        each = of_torch(logits, IGNORED, None, 0.3, "none") + z
        pair = (jnp.where(counts, x, 0) for x in (each, z))
        if reduction == "none":
            return tuple(pair)
        number = counts.sum() if reduction == "mean" else 1
        return tuple(x.sum() / number for x in pair)

    def ours(hidden, weight, bias):
        return compat.liger_fused_linear_cross_entropy(
            hidden,
            weight,
            IGNORED,
            bias,
            lse_square_scale=0.1,
            label_smoothing=0.3,
            reduction=reduction,
            softcap=2.0,
            return_z_loss=True,
        )

    both(ours, theirs, HIDDEN, KERNEL.T, bias)
    alone = compat.liger_fused_linear_cross_entropy(
        HIDDEN, KERNEL.T, IGNORED, reduction=reduction
    )
    close(alone, of_torch(HIDDEN @ KERNEL, IGNORED, None, 0.0, reduction))


def test_nothing_else_imports_it():
    code = (
        "import sys, jaxsoft, jaxsoft.nn; jaxsoft.softmax; "
        "assert 'jaxsoft.compat' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
