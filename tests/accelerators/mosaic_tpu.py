"""The Mosaic TPU kernels of the linear room, to compile for a TPU that is not here.

The target of `compiling.py` is v6e, whose package compiles for every TPU; the argument
is the slice: v5e:2x2, v6e:2x2 or tpu7x:2x2x1. By hand:

    python -m tests.accelerators.compiling mosaic_tpu v6e v5e:2x2
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from tests.accelerators.compiling import compile_for, report, topology
from tests.accelerators.linear import collectives

__all__ = ["HEADS", "KERNELS", "ROWS", "main"]

ROWS = 4096
# Features, classes, layout and options of the heads of three models; 151936 is no
# multiple of a block.
HEADS: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "llama3": (4096, 128256, "hv", {}),
    "gemma3": (2560, 262144, "vh", {"logit_softcap": 30.0}),
    "qwen3": (4096, 151936, "hv", {"label_smoothing": 0.1, "z_loss": 1e-4}),
}
KERNELS = ("jaxsoft_statistics_forward", "jaxsoft_statistics_backward")
# Every option at once, in float32, with sizes that no block divides.
UNALIGNED = (1003, 203, 1501)


def main(target, slice_of_tpus):
    """Compiles the loss of every head, of an odd one and of one over four chips."""
    platform, devices = topology(target, slice_of_tpus)
    place = SingleDeviceSharding(devices[0])
    for name, (features, classes, layout, options) in HEADS.items():
        loss = functools.partial(
            jaxsoft.linear_cross_entropy,
            kernel_layout=layout,
            implementation="mosaic_tpu",
            **options,
        )
        shape = (features, classes) if layout == "hv" else (classes, features)
        args = (
            jax.ShapeDtypeStruct((ROWS, features), jnp.bfloat16, sharding=place),
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place),
            jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=place),
        )
        whats = {"value_and_grad": jax.value_and_grad(loss, (0, 1))}
        if name == "llama3":
            whats["value"] = loss
        for what, call in whats.items():
            _report(platform, name, what, call, args)
    _report(platform, "unaligned", "value_and_grad", *_unaligned(place))
    if slice_of_tpus.startswith("v6e"):
        _report(platform, "mesh", "value_and_grad", *_over_mesh(devices))


def _report(platform, name, what, call, args):
    """Compiles a program; reports its kernels and the dtypes of their products."""
    _, compiled = compile_for(platform, call, args)
    text = compiled.as_text() or ""
    found = products(jax.make_jaxpr(call)(*args).jaxpr)
    report(
        name,
        what,
        compiled,
        kernels=[kernel for kernel in KERNELS if kernel in text],
        products=len(found),
        wide=sum(types != ["bfloat16", "bfloat16"] for types in found),
        collectives=collectives(text),
    )


def _unaligned(place):
    """Returns the gradient of an odd layer by all its arrays, and their shapes."""
    rows, features, classes = UNALIGNED

    def loss(hidden, kernel, bias, temperature, labels, mask):
        each = jaxsoft.linear_cross_entropy(
            hidden,
            kernel,
            labels,
            bias=bias,
            temperature=temperature,
            logit_softcap=30.0,
            class_mask=mask,
            label_smoothing=0.1,
            z_loss=0.1,
            kernel_layout="vh",
            implementation="mosaic_tpu",
        )
        statistics = jaxsoft.linear_statistics(
            hidden,
            kernel,
            return_argmax=True,
            kernel_layout="vh",
            implementation="mosaic_tpu",
        )
        return each + statistics.entropy.sum(), statistics.argmax

    shapes = (
        ((rows, features), jnp.float32),
        ((classes, features), jnp.float32),
        ((classes,), jnp.float32),
        ((rows,), jnp.float32),
        ((rows,), jnp.int32),
        ((classes,), jnp.bool),
    )

    call = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
    return call, [jax.ShapeDtypeStruct(*s, sharding=place) for s in shapes]


def _over_mesh(devices):
    """Returns the gradient of a loss with tokens and classes over four chips."""
    mesh = Mesh(np.array(devices[:4]).reshape(2, 2), ("data", "vocab"))
    features, classes, _, _ = HEADS["llama3"]
    loss = jaxsoft.over_mesh(
        functools.partial(jaxsoft.linear_cross_entropy, implementation="mosaic_tpu"),
        mesh,
        vocab_axis="vocab",
        token_axes=("data",),
    )
    shapes = (
        ((ROWS, features), jnp.bfloat16, P("data")),
        ((features, classes), jnp.bfloat16, P(None, "vocab")),
        ((ROWS,), jnp.int32, P("data")),
    )
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in shapes
    ]
    return jax.value_and_grad(loss, (0, 1)), args


def products(jaxpr):
    """Returns the dtypes of the operands of every matrix product of a program.

    What is for CPUs alone is not compiled here and does not count.
    """
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append([str(v.aval.dtype) for v in equation.invars])
        params = dict(equation.params)
        platforms = params.get("branches_platforms")
        if platforms:
            pairs = zip(params["branches"], platforms, strict=True)
            params["branches"] = [b for b, names in pairs if names != ("cpu",)]
        for value in jax.tree.leaves(list(params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += products(inner)
    return found
