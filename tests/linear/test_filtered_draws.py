"""Samples of a layer with filters: those of its stored logits, however computed.

One shape serves most tests, since a sampler of another is another program.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

import jaxsoft
from jaxsoft import linear_sample
from jaxsoft.linear import plans
from jaxsoft.nn import SampledSoftmaxHead, SoftmaxHead
from tests import truth
from tests.hierarchical.test_export import check_round_trip
from tests.linear import cases

KEY = jax.random.key(2)
ROWS, FEATURES, CLASSES = 40, 8, 700
HIDDEN, KERNEL = map(np.asarray, cases.layer(ROWS, FEATURES, CLASSES)[:2])
FILTERS = {
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "top_n_sigma": {"top_n_sigma": 1.5},
    "all": {"top_k": 200, "top_p": 0.9, "min_p": 0.02, "top_n_sigma": 2.5},
}


def by_row(rows=ROWS):
    """Returns other filters for each row."""
    rng = np.random.default_rng(3)
    return {
        "top_k": rng.choice([0, 1, 9, 300], rows).astype("int32"),
        "top_p": rng.uniform(0.3, 1, rows).astype("float32"),
        "min_p": rng.choice([0.0, 0.05], rows).astype("float32"),
        "top_n_sigma": rng.choice([2.0, np.inf], rows).astype("float32"),
    }


def columns(given):
    """Returns filters as `sample` takes them."""
    return {n: a[..., None] if np.ndim(a) else a for n, a in given.items()}


def draw(hidden: ArrayLike = HIDDEN, kernel: ArrayLike = KERNEL, **options):
    return linear_sample(KEY, hidden, kernel, **options)


def exact(x):
    """Returns a layer whose logits are x, without any rounding."""
    return np.eye(len(x), dtype=x.dtype), x


@pytest.mark.many_cases
@pytest.mark.parametrize("given", FILTERS.values(), ids=FILTERS)
def test_the_classes_and_log_probabilities_of_stored_logits(given):
    x = 2 * truth.logits("unit", (ROWS, CLASSES))
    options: dict[str, Any] = {"temperature": 0.8, "return_log_prob": True} | given
    expected = jaxsoft.sample(KEY, x, **options)
    # In one block of rows, and in some of eight.
    for workspace in (None, 1):
        found = draw(*exact(x), workspace_bytes=workspace, **options)
        np.testing.assert_array_equal(found.class_id, expected.class_id)
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        alone = draw(*exact(x), workspace_bytes=workspace, temperature=0.8, **given)
        np.testing.assert_array_equal(alone, expected.class_id)


@pytest.mark.parametrize("kind", [*truth.DISTRIBUTIONS, "minus 20"])
@pytest.mark.parametrize(
    ("rows", "classes"),
    [(40, 3), (40, 1000), pytest.param(9, 50_257, marks=pytest.mark.slow)],
)
@pytest.mark.many_cases
def test_filters_of_each_token(rows, classes, kind):
    x = truth.logits("unit" if kind == "minus 20" else kind, (rows, classes))
    x = x - np.float32(20 * (kind == "minus 20"))
    given = by_row(rows)
    tau = np.tile(np.asarray([0.0, 0.7, 1.0, np.inf], "float32"), rows)[:rows]
    options: dict[str, Any] = {"return_log_prob": True}
    expected = jaxsoft.sample(KEY, x, tau, **columns(given), **options)
    found = draw(*exact(x), temperature=tau, workspace_bytes=1, **given, **options)
    np.testing.assert_array_equal(found.class_id, expected.class_id)
    assert (found.class_id >= 0).all()
    p = truth.log_softmax(x, np.where(tau == 0, 1, tau)[:, None])
    for row in np.flatnonzero((tau > 0) & np.isfinite(tau)):
        of_row = p[row, found.class_id[row]]
        np.testing.assert_allclose(found.log_prob[row], of_row, rtol=1e-5, atol=2e-5)
    assert (found.filtered_log_prob >= found.log_prob - 1e-6).all()


@pytest.mark.parametrize("workspace", [None, 1])
def test_log_probabilities_without_filters(workspace):
    """In one tile of classes, and in several."""
    x = 2 * truth.logits("unit", (ROWS, CLASSES))
    hidden, kernel = exact(x)
    hidden[3] = np.nan
    options: dict[str, Any] = {"temperature": 0.8, "workspace_bytes": workspace}
    found = draw(hidden, kernel, return_log_prob=True, **options)
    assert (found.class_id == draw(hidden, kernel, **options)).all()
    rows = np.delete(np.arange(ROWS), 3)
    p = truth.log_softmax(x[rows], 0.8)
    of_class = p[np.arange(ROWS - 1), np.asarray(found.class_id)[rows]]
    for log_prob in found[1:]:
        assert log_prob[3] == -np.inf and log_prob.dtype == jnp.float32
        np.testing.assert_allclose(log_prob[rows], of_class, rtol=1e-5, atol=2e-5)
    assert found.class_id[3] == -1
    empty = draw(HIDDEN[:0], return_log_prob=True)
    assert [a.shape for a in empty] == [(0,)] * 3


@pytest.mark.parametrize("kind", [*truth.DISTRIBUTIONS, "minus 20"])
@pytest.mark.parametrize(
    ("rows", "classes"),
    [(40, 3), (40, 1000), pytest.param(9, 50_257, marks=pytest.mark.slow)],
)
@pytest.mark.many_cases
def test_log_probabilities_of_the_draws_own_sums(rows, classes, kind):
    """As exact as those of stored logits, at every temperature of a token."""
    x = truth.logits("unit" if kind == "minus 20" else kind, (rows, classes))
    x = x - np.float32(20 * (kind == "minus 20"))
    tau = np.tile(np.asarray([0.0, 0.7, 1.0, np.inf], "float32"), rows)[:rows]
    options: dict[str, Any] = {"temperature": tau, "workspace_bytes": 1}
    found = draw(*exact(x), return_log_prob=True, **options)
    np.testing.assert_array_equal(found.class_id, draw(*exact(x), **options))
    stored = jaxsoft.log_softmax(x, temperature=tau[:, None])
    of_class = np.take_along_axis(
        np.asarray(stored), np.asarray(found.class_id)[:, None], axis=1
    )[:, 0]
    np.testing.assert_array_equal(found.log_prob, found.filtered_log_prob)
    np.testing.assert_allclose(found.log_prob, of_class, rtol=2e-6, atol=2e-6)
    assert (found.log_prob <= 0).all()
    p = truth.log_softmax(x, np.where(tau == 0, 1, tau)[:, None])
    for row in np.flatnonzero((tau > 0) & np.isfinite(tau)):
        of_row = p[row, found.class_id[row]]
        np.testing.assert_allclose(found.log_prob[row], of_row, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("classes", [696, 104])
def test_log_probabilities_over_a_mesh(classes):
    """Blocks of classes that shards share, and rows without a class."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "vocab"))
    over = jaxsoft.over_mesh(linear_sample, mesh, token_axes="data", vocab_axis="vocab")
    hidden = HIDDEN.copy()
    hidden[3] = np.nan
    tau = np.tile(np.asarray([0.0, 0.7, 1.0, np.inf], "float32"), ROWS)[:ROWS]
    options = {"temperature": tau, "return_log_prob": True}
    expected = draw(hidden, KERNEL[:, :classes], **options)
    found = jax.jit(lambda: over(KEY, hidden, KERNEL[:, :classes], **options))()
    assert found.class_id[3] == -1 and found.log_prob[3] == -np.inf
    assert (found.class_id != expected.class_id).sum() <= 1
    same = found.class_id == expected.class_id
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours[same], theirs[same], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtypes", [("bfloat16",) * 2, ("float16",) * 2, ("float32", "bfloat16")]
)
@pytest.mark.parametrize("layout", ["hv", "vh"])
@pytest.mark.many_cases
def test_every_option_and_dtype(dtypes, layout):
    """By tiles of the classes, since a CPU converts the kernel, and without."""
    hidden, kernel = (
        jnp.asarray(a, d) for a, d in zip((HIDDEN, KERNEL), dtypes, strict=True)
    )
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(CLASSES).astype("float32")
    mask = rng.random(CLASSES) < 0.5
    u = np.asarray(hidden, "float32") @ np.asarray(kernel, "float32") + bias
    u = np.where(mask, 5 * np.tanh(u / 5), -np.inf).astype("float32")
    given = {"top_k": 100, "top_p": 0.8}
    tau = rng.uniform(0.5, 2, ROWS).astype("float32")
    expected = jaxsoft.sample(KEY, u, tau, **given)
    for workspace in (1, 2**20):
        found = draw(
            hidden,
            kernel if layout == "hv" else kernel.T,
            bias=bias,
            class_mask=mask,
            logit_softcap=5.0,
            temperature=tau,
            kernel_layout=layout,
            workspace_bytes=workspace,
            **given,
        )
        assert (found != expected).sum() <= 1


def test_float64(x64):
    x = np.random.default_rng(0).standard_normal((12, 300))
    expected = jaxsoft.sample(KEY, x, top_p=0.8, return_log_prob=True)
    found = draw(*exact(x), top_p=0.8, return_log_prob=True)
    np.testing.assert_array_equal(found.class_id, expected.class_id)
    assert found.log_prob.dtype == jnp.float64


def test_a_row_depends_on_its_place_alone():
    given = by_row()
    drawn = draw(**given)
    part = {name: a[:5] for name, a in given.items()}
    np.testing.assert_array_equal(draw(HIDDEN[:5], **part), drawn[:5])
    folded = {name: a.reshape(5, 8, 1) for name, a in given.items()}
    found = draw(HIDDEN.reshape(5, 8, FEATURES), **folded)
    np.testing.assert_array_equal(found.reshape(-1), drawn)
    with pytest.raises(ValueError, match=r"`top_p` must have shape \(\), hidden"):
        draw(top_p=np.ones(3, "float32"))


def test_vmap_over_keys_rows_and_filters():
    keys = jax.random.split(KEY, 3)
    hidden = HIDDEN[:15].reshape(3, 5, FEATURES)
    top_p = np.asarray([0.3, 0.7, 1.0], "float32")
    mapped = jax.vmap(
        lambda key, rows, p: linear_sample(
            key, rows, KERNEL, top_p=p, top_k=9, return_log_prob=True
        )
    )(keys, hidden, top_p)
    for i in range(3):
        one = linear_sample(
            keys[i], hidden[i], KERNEL, top_p=top_p[i], top_k=9, return_log_prob=True
        )
        np.testing.assert_array_equal(mapped.class_id[i], one.class_id)
        np.testing.assert_allclose(mapped.log_prob[i], one.log_prob, rtol=1e-5)


def test_limits_and_rows_without_a_sample():
    u = HIDDEN @ KERNEL
    cold = draw(temperature=0.0, top_p=0.9)
    np.testing.assert_array_equal(cold, u.argmax(1))
    np.testing.assert_array_equal(draw(top_k=1), u.argmax(1))
    none = draw(class_mask=np.zeros(CLASSES, bool), top_k=5, return_log_prob=True)
    np.testing.assert_array_equal(none.class_id, -1)
    np.testing.assert_array_equal(none.filtered_log_prob, -np.inf)
    hidden = HIDDEN.copy()
    hidden[3] = np.nan
    plain, lost = draw(min_p=0.1), draw(hidden, min_p=0.1)
    assert lost[3] == -1
    np.testing.assert_array_equal(np.delete(lost, 3), np.delete(plain, 3))
    wrong = np.full(ROWS, 0.5, "float32")
    wrong[5] = -1
    traced = jax.jit(lambda p: draw(top_p=p))(wrong)
    assert traced[5] == -1 and (np.delete(traced, 5) >= 0).all()
    assert draw(HIDDEN[:0], top_k=5).shape == (0,)


def test_samples_have_no_derivative():
    @jax.jit
    def gradients(hidden, top_p):
        def drawn(hidden, top_p):
            found = draw(hidden, top_p=top_p, return_log_prob=True)
            return hidden[:, 0].sum() + found.log_prob.sum()

        return jax.grad(drawn, (0, 1))(hidden, top_p)

    by_hidden, by_top_p = gradients(HIDDEN, np.float32(0.8))
    np.testing.assert_array_equal(by_hidden[:, 1:], 0)
    assert by_top_p == 0


GIVEN = by_row()
RETURNS = {"temperature": 0.7, "return_log_prob": True}


@pytest.mark.parametrize("spec", [("n", None), (None, "n"), ("m", "k")])
def test_shards_of_tokens_and_of_classes(spec):
    """Under plain jit, where the sharding of the arguments is all that is said."""
    devices = np.array(jax.devices()[:8])
    axes, shape = (("n",), (8,)) if "n" in spec else (("m", "k"), (2, 4))
    mesh = Mesh(devices.reshape(shape), axes)
    expected = draw(**GIVEN, **RETURNS)

    def put(array, *names):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*names)))

    given = {name: put(a, spec[0]) for name, a in GIVEN.items()}
    hidden, kernel = put(HIDDEN, spec[0]), put(KERNEL[:, :696], None, spec[1])
    expected = draw(HIDDEN, KERNEL[:, :696], **GIVEN, **RETURNS)
    found = jax.jit(lambda h, w, g: draw(h, w, **g, **RETURNS))(hidden, kernel, given)
    assert (found.class_id != expected.class_id).sum() <= 1
    same = found.class_id == expected.class_id
    np.testing.assert_allclose(
        found.log_prob[same], expected.log_prob[same], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize("classes", [700, 100])
@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.many_cases
def test_over_a_mesh(shape, classes, workspace):
    """Nothing divides evenly: rows and classes have padding."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(shape), ("data", "vocab"))
    over = jaxsoft.over_mesh(linear_sample, mesh, token_axes="data", vocab_axis="vocab")
    rows = 37
    layer = HIDDEN[:rows], KERNEL[:, :classes]
    given = {name: a[:rows] for name, a in GIVEN.items() if name != "top_k"}
    options = given | RETURNS | {"top_k": 40, "workspace_bytes": workspace}
    expected = draw(*layer, **options)
    found = jax.jit(lambda: over(KEY, *layer, **options))()
    assert (found.class_id != expected.class_id).sum() <= 1
    same = found.class_id == expected.class_id
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(ours[same], theirs[same], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("numbers", [[3, 8, 5], [3, 0, 5]])
def test_a_known_top_k_of_each_token_draws_the_same_over_a_mesh(numbers):
    """Known above 0 it is looked for in groups of classes, and draws others."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "vocab"))
    over = jaxsoft.over_mesh(linear_sample, mesh, token_axes="data", vocab_axis="vocab")
    layer = HIDDEN[:37], np.tile(KERNEL, 8) + np.arange(8 * CLASSES) * np.float32(1e-5)
    top_k = np.resize(numbers, 37).astype("int32")
    expected = draw(*layer, top_k=top_k)
    found = jax.jit(lambda: over(KEY, *layer, top_k=top_k))()
    assert (found != expected).sum() <= 1
    traced = jax.jit(lambda k: linear_sample(KEY, *layer, top_k=k))(top_k)
    differ = (np.asarray(traced) != np.asarray(expected)).sum()
    assert differ > 9 if min(numbers) else differ <= 1


def test_a_top_k_beyond_int32_keeps_all_over_a_mesh():
    over = jaxsoft.over_mesh(linear_sample, jax.make_mesh((8,), ("d",)), token_axes="d")
    layer, top_k = (HIDDEN[:8], KERNEL), np.full(8, 10**12)
    np.testing.assert_array_equal(over(KEY, *layer, top_k=top_k), draw(*layer))


def test_a_top_k_that_is_no_integer_has_its_message_over_a_mesh():
    over = jaxsoft.over_mesh(linear_sample, jax.make_mesh((8,), ("d",)), token_axes="d")
    with pytest.raises(TypeError, match="`top_k` must be an int, got nan"):
        over(KEY, HIDDEN[:8], KERNEL, top_k=float("nan"))


def test_explicit_axes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    expected = draw(**GIVEN)
    with jax.set_mesh(mesh):
        hidden = jax.device_put(HIDDEN, NamedSharding(mesh, PartitionSpec("data")))
        found = jax.jit(lambda h: draw(h, **GIVEN))(hidden)
        assert jax.typeof(found).sharding.spec == PartitionSpec("data")
    assert (np.asarray(found) != np.asarray(expected)).sum() <= 1


def test_heads():
    rngs = nnx.Rngs(0)
    head = SoftmaxHead(FEATURES, CLASSES, rngs=rngs, temperature=0.5)
    assert head.kernel is not None
    expected = draw(
        HIDDEN, head.kernel[...], temperature=0.5, **GIVEN, return_log_prob=True
    )
    found = head.sample(KEY, HIDDEN, **GIVEN, return_log_prob=True)
    assert isinstance(found, jaxsoft.SampledClasses)
    np.testing.assert_array_equal(found.class_id, expected.class_id)
    np.testing.assert_allclose(found.log_prob, expected.log_prob, rtol=1e-5)
    sampler = jaxsoft.ClassSampler.uniform(CLASSES)
    sampled = SampledSoftmaxHead(
        FEATURES, CLASSES, num_samples=5, sampler=sampler, rngs=rngs
    )
    found = sampled.sample(KEY, HIDDEN, top_k=1)
    assert sampled.full.kernel is not None
    np.testing.assert_array_equal(found, (HIDDEN @ sampled.full.kernel[...]).argmax(1))


def test_export():
    def drawn(key, hidden, kernel, top_p):
        return linear_sample(key, hidden, kernel, top_p=top_p, return_log_prob=True)

    check_round_trip(drawn, KEY, HIDDEN, KERNEL, np.float32(0.8))


def test_as_many_rows_as_the_workspace_holds():
    layer = plans.Layer(4096, 2304, 256_000, operand_bytes=2, kernel_bytes=2)
    assert layer.stored_rows(None, whole=True) == plans.Tiling(
        4096, 256_000, 112, 256_000
    )
    some = layer.stored_rows(None, whole=False)
    assert some.block_rows == 112 and some.block_classes < 8192
    assert layer.stored_rows(1, whole=True).block_rows == 8
    assert layer.stored_rows(2**40, whole=True).block_rows == 4096
    few = plans.Layer(3, 8, 1000)
    assert few.stored_rows(1, whole=True) == plans.Tiling(3, 1000, 3, 1000)


def test_memory():
    """At V = 131072, 1024 rows: 512 MiB of logits."""
    hidden = jax.ShapeDtypeStruct((1024, 64), jnp.float32)
    kernel = jax.ShapeDtypeStruct((64, 131_072), jnp.float32)
    call = jax.jit(lambda h, w: draw(h, w, top_k=50, top_p=0.9))
    analysis = call.lower(hidden, kernel).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes <= 144 * 2**20


def test_only_one_implementation():
    with pytest.raises(NotImplementedError, match="`implementation` must be None or"):
        draw(top_k=5, implementation="mosaic_gpu")


WRONG = [
    ({"top_k": 2.0}, TypeError, "`top_k` must be an int, got 2.0"),
    ({"top_k": -1}, ValueError, "`top_k` must be at least 0, got -1"),
    ({"top_p": 1.5}, ValueError, r"`top_p` must lie in \[0, 1\], got 1.5"),
    ({"min_p": np.ones(1, int)}, TypeError, "`min_p` must have a floating-point"),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG)
def test_messages(given, error, message):
    with pytest.raises(error, match=message):
        draw(**given)
