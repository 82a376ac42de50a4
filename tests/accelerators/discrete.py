"""Samples and relaxed samples of stored logits, to compile for a target not here."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

import jaxsoft
from tests.accelerators.compiling import compile_for, report, topology

# Llama 3's vocabulary.
ROWS, CLASSES = 2048, 128256
KEY = jax.random.key(0)

RELAXED = {
    "gumbel_softmax": functools.partial(jaxsoft.gumbel_softmax, KEY),
    "threefry13": functools.partial(
        jaxsoft.gumbel_softmax, KEY, generator="threefry13"
    ),
    "hard": functools.partial(jaxsoft.gumbel_softmax, KEY, hard=True),
    "reinmax": functools.partial(jaxsoft.reinmax, KEY),
    "gumbel_rao": functools.partial(jaxsoft.gumbel_rao, KEY, num_samples=10),
}
DRAWN = {
    "sample": functools.partial(jaxsoft.sample, KEY),
    "filtered": functools.partial(jaxsoft.sample, KEY, top_k=50, top_p=0.9, min_p=0.05),
    "gumbel_top_k": functools.partial(jaxsoft.gumbel_top_k, KEY, k=16),
}


def main(target):
    """Compiles every function, value and gradient, and reports it."""
    platform, devices = topology(target)
    place = SingleDeviceSharding(devices[0])
    for dtype in (jnp.float32, jnp.bfloat16):
        logits = jax.ShapeDtypeStruct((ROWS, CLASSES), dtype, sharding=place)
        name = jnp.dtype(dtype).name
        for what, function in (DRAWN | RELAXED).items():
            _, compiled = compile_for(platform, function, (logits,))
            report(what, f"value {name}", compiled)
        for what, function in RELAXED.items():

            def both(logits, cotangent, function=function):
                value, pull = jax.vjp(lambda x: function(x, 0.7), logits)
                return value, pull(cotangent)[0]

            _, compiled = compile_for(platform, both, (logits, logits))
            report(what, f"gradient {name}", compiled)
