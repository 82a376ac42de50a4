"""The Mosaic TPU kernels in JAX's interpreter of TPUs, which has races and garbage.

What a block holds beyond its array is NaN there, as is all memory before it is written.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxsoft import linear_cross_entropy
from jaxsoft.linear import mosaic_tpu, mosaic_tpu_blocks
from jaxsoft.linear.mosaic_tpu_blocks import Blocks
from tests import truth
from tests.linear import cases

ROWS, FEATURES, CLASSES = 37, 24, 293


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Takes blocks of 32 rows, in strips of 16, and of 128 classes: 2 by 3 blocks."""
    monkeypatch.setattr(mosaic_tpu_blocks, "_STRIP", 16)
    small = lambda *_, **__: Blocks(32, 128, 2**20)  # noqa: E731
    monkeypatch.setattr(mosaic_tpu, "choose_forward", small)


@pytest.fixture
def interpreter():
    """Interprets kernels, and fails where two accesses race."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpret

    assert interpret.races is not None and not interpret.races.races_found


# Options, two at a time so that each is met in both layouts.
OPTIONS = {
    "hv": {"bias": True, "class_mask": True, "temperature": True, "z_loss": 0.1},
    "vh": {"logit_softcap": 0.7, "label_smoothing": 0.2, "temperature": 0.6},
}


@pytest.mark.parametrize("layout", OPTIONS)
def test_statistics_and_losses_match_float64(layout, interpreter):
    hidden, kernel, labels = cases.layer(ROWS, FEATURES, CLASSES)
    options = cases.arrays(OPTIONS[layout], ROWS, CLASSES, labels)

    def loss(hidden, kernel, **options):
        return linear_cross_entropy(
            hidden,
            kernel if layout == "hv" else kernel.T,
            labels,
            kernel_layout=layout,
            reduction="none",
            return_statistics=True,
            **options,
        )

    ours, statistics = loss(hidden, kernel, implementation="mosaic_tpu", **options)
    same, loops = loss(hidden, kernel, implementation="xla", **options)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: a.astype("float64") if a.dtype == "float32" else a,
            {k: jnp.asarray(v) for k, v in options.items() if not isinstance(v, float)},
        )
        exact = cases.plain_loss(
            hidden.astype("float64"),
            kernel.astype("float64"),
            labels,
            **(options | wide),
        )
    truth.assert_as_good(ours, same, exact, slack=6e-7)
    for name in ("max", "log_sum", "label", "mean", "expected"):
        mine, theirs = getattr(statistics, name), getattr(loops, name)
        np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=2e-6)
