"""Options of samples of stored float32 logits, to compile for a target not here.

`functions.py` has the functions without options, of bfloat16 logits.
"""

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
    "threefry13": functools.partial(
        jaxsoft.gumbel_softmax, KEY, generator="threefry13"
    ),
    "hard": functools.partial(jaxsoft.gumbel_softmax, KEY, hard=True),
}
DRAWN = {
    "filtered": functools.partial(jaxsoft.sample, KEY, top_k=50, top_p=0.9, min_p=0.05),
}


def main(target):
    """Compiles every option, value and gradient, and reports it."""
    platform, devices = topology(target)
    place = SingleDeviceSharding(devices[0])
    logits = jax.ShapeDtypeStruct((ROWS, CLASSES), jnp.float32, sharding=place)
    for what, function in (DRAWN | RELAXED).items():
        _, compiled = compile_for(platform, function, (logits,))
        report(what, "value", compiled)
    for what, function in RELAXED.items():

        def both(logits, cotangent, function=function):
            value, pull = jax.vjp(lambda x: function(x, 0.7), logits)
            return value, pull(cotangent)[0]

        _, compiled = compile_for(platform, both, (logits, logits))
        report(what, "gradient", compiled)
