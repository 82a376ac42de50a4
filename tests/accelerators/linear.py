"""The functions of the linear room, to compile for a target that is not here.

Modes: `vmap` over 8 on one device, `tokens` (hidden states over 4 devices), `mesh`
(hidden states and classes over 4), `explicit` (likewise, by types), `table` (the kernel
of one device laid out by classes, and how many matrix products there are of what),
`operands` (short kernels, adapters and packed masks, on one device, and ranks). What
`functions.py` has is not here again: one device, and the contrastive losses.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from tests.accelerators.compiling import compile_for, report, topology

# Gemma 2's head, a narrower teacher, and an embedding table to mix.
ROWS, FEATURES, CLASSES, TEACHER, WIDTH, LISTED = 8192, 2304, 256000, 1024, 512, 16
# Tokens where a mask of each has a row.
LOW = 4096
SHAPES = {
    "hidden": ((ROWS, FEATURES), jnp.bfloat16, P("data")),
    "kernel": ((FEATURES, CLASSES), jnp.bfloat16, P(None, "vocab")),
    "labels": ((ROWS,), jnp.int32, P("data")),
    "ids": ((ROWS, LISTED), jnp.int32, P("data")),
    "log_probs": ((ROWS, LISTED), jnp.float32, P("data")),
    "teacher_hidden": ((ROWS, TEACHER), jnp.bfloat16, P("data")),
    "teacher_kernel": ((TEACHER, CLASSES), jnp.bfloat16, P(None, "vocab")),
    "values": ((CLASSES, WIDTH), jnp.bfloat16, P("vocab")),
}
KEY = jax.random.key(0)
# A compiler for TPUs takes half a minute for each program of several devices.
ON_TPUS = ("cross_entropy", "sample", "filtered_sample", "expected")


def calls(wrap):
    """Returns functions of named arrays, and which of those are floats."""
    log_prob = wrap(jaxsoft.linear_log_prob)
    expected = wrap(jaxsoft.linear_expected)
    distil = wrap(jaxsoft.linear_distillation)
    listed = wrap(jaxsoft.linear_distillation_top_k)
    layer, pair = ("hidden", "kernel"), ("teacher_hidden", "teacher_kernel")

    def ranked(hidden, kernel, labels):
        found = wrap(jaxsoft.linear_statistics)(
            hidden, kernel, labels, return_rank=True, return_top_k=LISTED
        )
        # A rank has no gradient, and must be there all the same.
        ranks = found.rank.sum().astype("float32") + found.top_ids.sum()
        return found.top_log_probs.sum() + found.log_prob.sum() + ranks

    def mixture(hidden, kernel, values, **options):
        return expected(hidden, kernel, values, **options).astype("float32").sum()

    return {
        "cross_entropy": (wrap(jaxsoft.linear_cross_entropy), layer, ("labels",)),
        "log_prob": (lambda *a: sum(x.sum() for x in log_prob(*a)), layer, ("labels",)),
        "log_prob_at": (
            lambda *a: wrap(jaxsoft.linear_log_prob_at)(*a).sum(),
            layer,
            ("ids",),
        ),
        "ranked": (ranked, layer, ("labels",)),
        "sample": (lambda *a: wrap(jaxsoft.linear_sample)(KEY, *a), (), layer),
        "filtered_sample": (
            lambda *a: wrap(jaxsoft.linear_sample)(KEY, *a, top_p=0.9, min_p=0.1),
            (),
            layer,
        ),
        "top_k": (
            lambda *a: wrap(jaxsoft.linear_top_k)(*a, LISTED)[0].sum(),
            layer,
            (),
        ),
        "expected": (mixture, (*layer, "values"), ()),
        "gumbel": (lambda *a: mixture(*a, key=KEY), (*layer, "values"), ()),
        "forward_kl": (lambda *a: distil(*a, temperature=2.0), layer + pair, ()),
        "jensen_shannon": (
            lambda *a: distil(*a, divergence="jensen_shannon"),
            layer + pair,
            (),
        ),
        "labelled": (
            lambda *a: distil(*a[:4], labels=a[4], temperature=2.0, alpha=0.1),
            layer + pair,
            ("labels",),
        ),
        "distillation_top_k": (listed, layer, ("ids", "log_probs")),
        "labelled_top_k": (
            lambda *a: listed(*a[:4], labels=a[4], temperature=2.0),
            layer,
            ("ids", "log_probs", "labels"),
        ),
    }


def over_batches(function, names):
    """Maps a function over 8 parts of the tokens."""
    axes = [0 if SHAPES[name][2] == P("data") else None for name in names]

    def mapped(*args):
        parts = [
            a.reshape(8, -1, *a.shape[1:]) if axis == 0 else a
            for a, axis in zip(args, axes, strict=True)
        ]
        return jax.vmap(function, axes)(*parts).sum()

    return mapped


def main(target, mode):
    """Compiles every function, and reports it."""
    platform, devices = topology(target)
    if mode == "table":
        return table(platform, devices[0])
    if mode == "operands":
        return operands(platform, devices[0])
    data = len(devices) if mode in ("vmap", "tokens") else int(len(devices) ** 0.5)
    explicit = mode == "explicit"
    mesh = Mesh(
        np.array(devices).reshape(data, -1),
        ("data", "vocab"),
        axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * 2,
    )
    sharded = mode != "vmap"

    def wrap(function):
        # Compilers for TPU do not cut a program by custom partitioning.
        if not sharded or explicit or platform != "tpu":
            return function
        return jaxsoft.over_mesh(
            function, mesh, vocab_axis="vocab", token_axes=("data",)
        )

    for name, (function, floats, others) in calls(wrap).items():
        if platform == "tpu" and name not in ON_TPUS:
            continue
        args = []
        for key in floats + others:
            shape, dtype, spec = SHAPES[key]
            place = SingleDeviceSharding(mesh.devices[0, 0])
            if sharded:
                place = NamedSharding(mesh, spec)
            args.append(jax.ShapeDtypeStruct(shape, dtype, sharding=place))
        if mode == "vmap":
            function = over_batches(function, floats + others)
        whats = {"value": function}
        if floats:
            # The gradient gives the value too.
            if platform == "tpu" and name != "cross_entropy":
                whats = {}
            argnums = tuple(range(len(floats)))
            whats["value_and_grad"] = jax.value_and_grad(function, argnums)
        for what, call in whats.items():
            _, compiled = compile_for(platform, call, args)
            moved = collectives(compiled.as_text() or "")
            report(name, what, compiled, collectives=moved)


def table(platform, device):
    """Compiles the loss of a table of classes; counts the products of wide operands."""
    place = SingleDeviceSharding(device)
    shapes = [SHAPES[key][:2] for key in ("hidden", "kernel", "labels")]
    shapes[1] = (shapes[1][0][::-1], shapes[1][1])
    args = [jax.ShapeDtypeStruct(*s, sharding=place) for s in shapes]
    loss = functools.partial(jaxsoft.linear_cross_entropy, kernel_layout="vh")
    whats = {"value": loss, "value_and_grad": jax.value_and_grad(loss, (0, 1))}
    for what, call in whats.items():
        lowered, compiled = compile_for(platform, call, args)
        lines = lowered.as_text().splitlines()
        products = [line for line in lines if "dot_general" in line]
        operands = [line.split("->")[0].split(":")[-1] for line in products]
        wide = sum("bf16" not in types for types in operands)
        report("table", what, compiled, products=len(products), wide=wide)


def operands(platform, device):
    """Compiles ranks; losses of short kernels, adapters and masks, and gradients."""
    place = SingleDeviceSharding(device)
    rank, adapters = 16, 8

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    rows, labels = ((LOW, FEATURES), jnp.bfloat16), ((LOW,), jnp.int32)
    short = ((FEATURES, CLASSES), jnp.int8)
    of_class = ((CLASSES,), jnp.float32)
    of_block = ((FEATURES // 128, CLASSES // 128), jnp.float32)
    lora = (
        array((adapters, FEATURES, rank), jnp.bfloat16),
        array((adapters, rank, CLASSES), jnp.bfloat16),
        array(*labels),
    )
    bits = array((LOW, CLASSES // 32), jnp.uint32)

    def scaled(hidden, scale, kernel, labels):
        return jaxsoft.linear_cross_entropy(
            hidden, kernel, labels, kernel_scale=scale, workspace_bytes=2**26
        )

    def adapted(hidden, a, b, ids, kernel, labels):
        given = jaxsoft.LoRA(a, b, ids)
        return jaxsoft.linear_cross_entropy(
            hidden, kernel, labels, lora=given, workspace_bytes=2**26
        )

    def ranked(hidden, kernel, labels):
        found = jaxsoft.linear_statistics(hidden, kernel, labels, return_rank=True)
        return found.log_prob, found.rank

    def masked(hidden, bits, kernel, labels):
        return jaxsoft.linear_cross_entropy(
            hidden, kernel, labels, class_bits=bits, workspace_bytes=2**26
        )

    hidden, kernel = array(*rows), array(*SHAPES["kernel"][:2])
    cases = {
        "scale of classes": (
            scaled,
            (0, 1),
            (hidden, array(*of_class), array(*short)),
        ),
        "scale of blocks": (scaled, (0, 1), (hidden, array(*of_block), array(*short))),
        "adapters": (adapted, (0, 1, 2), (hidden, *lora, kernel)),
        "masks": (masked, (0,), (hidden, bits, kernel)),
        "ranks": (ranked, (), (hidden, kernel)),
    }
    for name, (function, moving, arrays) in cases.items():
        arrays = (*arrays, array(*labels))
        whats = {"value": function}
        if moving:
            whats["value_and_grad"] = jax.value_and_grad(function, moving)
        for what, call in whats.items():
            _, compiled = compile_for(platform, call, arrays)
            report(name, what, compiled)


def collectives(text):
    """Returns the collectives of a program: each operation and its result's shape."""
    pattern = (
        r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
        r"(?:-start)?\("
    )
    found = [re.search(pattern, line) for line in text.splitlines()]
    return [(m[2], re.sub(r"\{[^}]*\}", "", m[1])) for m in found if m]
