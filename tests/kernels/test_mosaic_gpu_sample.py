"""Samples by the Mosaic GPU kernels: those of XLA's loops, from what groups come to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsoft import linear_sample
from jaxsoft._core import noise
from jaxsoft.kernels.layer.mosaic_gpu import hopper, sample
from jaxsoft.kernels.layer.mosaic_gpu import plan as planning
from jaxsoft.linear.arguments import Config, Operands
from jaxsoft.linear.folds.draw import Draw, Drawing
from tests.kernels.interpreters import gpu_interpreter
from tests.kernels.layers import TAUS, layer


def test_kernels_draw_what_loops_draw(small_tiles, chip):
    """V = 211: two splits, a last tile that is cut, a tail of 3 and two blocks."""
    small_tiles()
    classes = 211
    hidden, kernel, _ = layer(13, 64, classes, "vh")
    key = jax.random.key(3)
    bias = jnp.linspace(-1, 1, classes, dtype=jnp.bfloat16)
    options = {"class_mask": jnp.arange(classes) % 5 != 3, "logit_softcap": 1.5}

    def draw(implementation, tau):
        return linear_sample(
            key,
            hidden * 3,
            kernel,
            temperature=tau,
            bias=bias,
            kernel_layout="vh",
            implementation=implementation,
            **options,
        )

    draw = jax.jit(draw, static_argnums=0)
    tau = jnp.asarray(TAUS, jnp.float32)
    expected = draw("xla", tau)
    with gpu_interpreter():
        drawn = draw("mosaic_gpu", tau)
    np.testing.assert_array_equal(drawn, expected)
    assert (np.asarray(drawn) == -1).sum() == 1 and len(set(np.asarray(drawn))) > 8


def logits_of(plan: planning.GpuPlan, inputs: planning.GpuInputs) -> tuple[Any, Any]:
    """Returns stored logits of the rows of results, and what they count by."""
    kernel = inputs.kernel.T if plan.transposed else inputs.kernel
    u = jnp.matmul(inputs.hidden, kernel, preferred_element_type=jnp.float32)
    u = jnp.pad(u, ((0, plan.rows - u.shape[0]), (0, 0)))
    if inputs.bias is not None:
        u = u + inputs.bias[None, : plan.classes]
    if plan.softcap is not None:
        capped = plan.softcap * jnp.tanh(u / plan.softcap)
        u = jnp.where(u == -jnp.inf, u, capped)
    if inputs.tau_factors is None:
        return u, (plan.scale, plan.factor, 1.0)
    return u, tuple(inputs.tau_factors[:, :, None])


# This stands for `hopper.run` at sizes that give it some hundred blocks of threads: the
# interpreter compiles each of them anew. The test above has the kernel itself.
def groups_as_promised(
    plan: planning.GpuPlan, inputs: planning.GpuInputs
) -> planning.Partials:
    """What `hopper.run` promises of groups, from stored logits."""
    assert plan.groups and not plan.integers
    u, row = logits_of(plan, inputs)
    size = planning.GROUP
    groups = plan.tiles * plan.blocks.classes // size
    u = jnp.pad(
        u, ((0, 0), (0, groups * size - u.shape[1])), constant_values=-jnp.inf
    ).reshape(plan.rows, groups, size)
    top = u.max(2)
    peak = jnp.where(top == -jnp.inf, 0, top)[:, :, None]
    a, b, c = (r[:, :, None] if isinstance(r, jax.Array) else r for r in row)
    sums = jnp.exp2((u * a - peak * a) * b * c).sum(2)
    return planning.Partials(jnp.stack([top.T, sums.T]), None)


@pytest.mark.parametrize(
    "layout, classes, tau",
    [("vh", 1, 1.0), ("vh", 20011, None), ("hv", 752, 0.0)],
)
def test_what_surrounds_the_kernel(monkeypatch, layout, classes, tau):
    """Blocks of 128 and of 256, rows that are gathered in two parts."""
    monkeypatch.setattr(hopper, "run", groups_as_promised)
    rows = 150
    hidden, kernel, _ = layer(rows, 64, classes, layout)
    taus = jnp.resize(jnp.asarray(TAUS, jnp.float32), (rows,))
    config = Config(
        kernel_layout=layout,
        static_tau=tau,
        softcap=4.0,
        precision=None,
        workspace_bytes=2**20,
        implementation="mosaic_gpu",
    )
    mask = (jnp.arange(classes) % 5 != 3) if classes > 16 else None
    bias = jnp.linspace(-1, 1, classes, dtype=jnp.bfloat16)
    operands = Operands(
        hidden.at[7].set(jnp.nan),
        kernel,
        bias,
        taus if tau is None else None,
        None,
        mask,
    )
    words = noise.row_words(jax.random.key(1), rows)
    drawing, fold = Drawing(operands, words), Draw(config)
    drawn = jax.jit(sample.sample, static_argnums=0)(fold, drawing)
    expected = jax.jit(lambda d: fold.by("xla").compute(d))(drawing)
    drawn, expected = np.asarray(drawn.class_id), np.asarray(expected.class_id)
    # Two ways to round a sum may tell a row's classes apart in a tie.
    assert (drawn != expected).sum() <= 1
    assert drawn[7] == -1 and (tau is None or (drawn >= 0).sum() == rows - 1)
    assert classes == 1 or len(set(drawn)) > rows // 4


def test_messages():
    hidden, key = jnp.zeros((16, 64), jnp.bfloat16), jax.random.key(0)
    with pytest.raises(NotImplementedError, match='be None or "xla" on cpu'):
        linear_sample(key, hidden, hidden.T, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="bfloat16 or both float16"):
        linear_sample(key, hidden.astype("f"), hidden.T, implementation="mosaic_gpu")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("v",))
    sharded = jax.shard_map(
        lambda kernel: linear_sample(
            key, hidden, kernel, vocab_axis="v", implementation="mosaic_gpu"
        ),
        mesh=mesh,
        in_specs=jax.P(None, "v"),
        out_specs=jax.P(),
    )
    with pytest.raises(NotImplementedError, match="with sharded classes"):
        sharded(jnp.zeros((64, 32), jnp.bfloat16))
