"""The passes over the logits of a cross-entropy, to compile for a target not here."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import jaxsoft
from jaxsoft.devices.hlo import work_of
from tests.accelerators.compiling import compile_for, report, topology

__all__ = ["CLASSES", "FEATURES", "MEANS", "ROWS", "SCALED", "main"]

# Llama 3's head.
ROWS, FEATURES, CLASSES = 8192, 4096, 128256
# What the reduced losses are called here, by their workspace.
SCALED = "mean, scaled"
MEANS = {"mean": None, "mean within 128 MiB": 2**27, SCALED: None}
# Room for everything that the loss of each token may keep: bfloat16 logits.
ROOMY = 2_200_000_000
OF_TOKENS = {"none": None, "none with room": ROOMY}


def main(target, *names):
    """Compiles value and gradient of every loss, or of those named, and reports it."""
    platform, devices = topology(target)
    place = SingleDeviceSharding(devices[0])
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for shape, dtype in (
            ((ROWS, FEATURES), jnp.bfloat16),
            ((FEATURES, CLASSES), jnp.bfloat16),
            ((ROWS,), jnp.int32),
        )
    ]
    weights = jax.ShapeDtypeStruct((ROWS,), jnp.float32, sharding=place)
    for name, workspace in (MEANS | OF_TOKENS).items():
        if names and name not in names:
            continue
        loss = functools.partial(
            jaxsoft.linear_cross_entropy, workspace_bytes=workspace
        )

        def of_tokens(hidden, kernel, labels, cotangent, loss=loss):
            def call(hidden, kernel):
                return loss(hidden, kernel, labels, reduction="none")

            value, pull = jax.vjp(call, hidden, kernel)
            return value, pull(cotangent)

        def scaled(hidden, kernel, labels, cotangents, loss=loss):
            return cotangents[0] * loss(hidden, kernel, labels)

        if name in MEANS:
            both = jax.value_and_grad(scaled if name == SCALED else loss, (0, 1))
            given = (*arrays, weights) if name == SCALED else arrays
            _, compiled = compile_for(platform, both, given)
        else:
            _, compiled = compile_for(platform, of_tokens, (*arrays, weights))
        work = work_of(compiled.as_text() or "")
        assert work is not None
        passes = work.dot_flops / (ROWS * FEATURES * CLASSES)
        report(
            name,
            "value_and_grad",
            compiled,
            passes=passes,
            moved=work.accessed,
            least=work.is_least,
        )
