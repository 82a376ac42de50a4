"""The hierarchical room at 10⁶ classes, to compile for a target that is not here.

Families: trees in tables (`huffman`, and `taxonomy`, one of any form), the `sampled`
softmax, and the `full` one beside them. The arrays that a tree or a sampler holds are
arguments. `functions.py` has balanced trees and the adaptive softmax.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

import jaxsoft
from jaxsoft.hierarchical.levels import Tables
from tests.accelerators.compiling import compile_for, report, topology

CLASSES, ROWS, FEATURES, SAMPLES, BEST = 10**6, 8192, 1024, 8192, 10
KEY = jax.random.key(0)


def array(*shape, dtype=jnp.bfloat16):
    """Returns an array that is not there."""
    return jax.ShapeDtypeStruct(shape, dtype)


HIDDEN, LABELS = array(ROWS, FEATURES), array(ROWS, dtype=jnp.int32)
KERNEL, BY_CLASS = array(FEATURES, CLASSES), array(CLASSES, FEATURES)


def tree_of(family):
    """Returns a tree, its tables perhaps not there."""
    if family == "huffman":
        return jaxsoft.ClassTree.huffman(1 / np.arange(1, CLASSES + 1))
    tree = jaxsoft.ClassTree.balanced(CLASSES)
    table = functools.partial(array, dtype=jnp.int32)
    slots = tree.levels.num_slots
    tables = jax.eval_shape(
        functools.partial(
            Tables, tree.levels.arity, tree.levels.leaves, tree.levels.nodes
        ),
        rank_slots=table(CLASSES),
        node_slots=table(CLASSES - 1),
        slot_nodes=table(slots),
        node_firsts=table(CLASSES),
        slot_children=table(slots),
    )
    return jax.eval_shape(jaxsoft.ClassTree, tables, table(CLASSES), table(CLASSES))


def with_gradients(function, argnums):
    """Returns a function and its value with gradients, by name."""
    return {
        "value": function,
        "value_and_grad": jax.value_and_grad(function, argnums),
    }


def trees(family):
    """Returns for each name a function, its arguments and which it may overwrite."""
    tree, kernel = tree_of(family), array(CLASSES - 1, FEATURES)

    def loss(hidden, kernel, labels, tree):
        return -jnp.mean(jaxsoft.hierarchical_log_prob(hidden, kernel, labels, tree))

    def step(optimizer, kernel, state, hidden, labels, tree):
        loss, dhidden, gradient = jaxsoft.hierarchical_value_and_row_grad(
            hidden, kernel, labels, tree
        )
        return (*optimizer.update(kernel, gradient, state), loss, dhidden)

    def sample(hidden, kernel, tree):
        return jaxsoft.hierarchical_sample(KEY, hidden, kernel, tree)

    def top_k(hidden, kernel, tree):
        return jaxsoft.hierarchical_top_k(hidden, kernel, BEST, tree)

    calls: dict[str, Any] = {
        name: (function, (HIDDEN, kernel, LABELS, tree), ())
        for name, function in with_gradients(loss, (0, 1)).items()
    }
    for name in ("sgd", "adagrad", "adam"):
        optimizer = getattr(jaxsoft, f"row_{name}")(0.1)
        state = jax.eval_shape(optimizer.init, kernel)
        arguments = (kernel, state, HIDDEN, LABELS, tree)
        calls[f"{name} step"] = (functools.partial(step, optimizer), arguments, (0, 1))
    calls["sample"] = (sample, (HIDDEN, kernel, tree), ())
    calls["top_k"] = (top_k, (HIDDEN, kernel, tree), ())
    if family == "taxonomy":
        return {name: calls[name] for name in ("value_and_grad", "sgd step")}
    return calls


def sampled(family):
    """Returns the functions of a sampled softmax, as `trees` does."""
    sampler = jaxsoft.ClassSampler.log_uniform(CLASSES)

    def loss(hidden, kernel, labels, sampler):
        return jaxsoft.sampled_softmax_loss(
            KEY, hidden, kernel, labels, SAMPLES, sampler=sampler, kernel_layout="vh"
        )

    gradients = jax.value_and_grad(loss, (0, 1))
    return {"value_and_grad": (gradients, (HIDDEN, BY_CLASS, LABELS, sampler), ())}


def full(family):
    """Returns the functions of the full softmax, as `trees` does."""
    loss = jaxsoft.linear_cross_entropy

    def stored(hidden, kernel, labels):
        logits = (hidden @ kernel).astype(jnp.float32)
        own = jnp.arange(CLASSES, dtype=jnp.int32)[None] == labels[:, None]
        own = jnp.sum(jnp.where(own, logits, 0), axis=1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - own)

    def step(optimizer, kernel, state, hidden, labels):
        gradients = jax.value_and_grad(loss, (0, 1))
        value, (dhidden, dkernel) = gradients(hidden, kernel, labels)
        moved, state = optimizer.update(dkernel, state, kernel)
        return optax.apply_updates(kernel, moved), state, value, dhidden

    layer = (HIDDEN, KERNEL, LABELS)
    calls = {}
    for prefix, function in (("", loss), ("stored ", stored)):
        for name, call in with_gradients(function, (0, 1)).items():
            calls[prefix + name] = (call, layer, ())
    for name in ("sgd", "adam"):
        optimizer = getattr(optax, name)(0.1)
        state = jax.eval_shape(optimizer.init, KERNEL)
        call = functools.partial(step, optimizer)
        calls[f"{name} step"] = (call, (KERNEL, state, HIDDEN, LABELS), (0, 1))
    sample = functools.partial(jaxsoft.linear_sample, KEY)
    calls["sample"] = (sample, layer[:2], ())
    calls["top_k"] = (lambda h, k: jaxsoft.linear_top_k(h, k, BEST), layer[:2], ())
    return calls


def main(target, family):
    """Compiles every function of a family, and reports it."""
    platform, devices = topology(target)
    place = SingleDeviceSharding(devices[0])
    calls = {"sampled": sampled, "full": full}
    for name, call in calls.get(family, trees)(family).items():
        function, arguments, donated = call
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments
        )
        _, compiled = compile_for(platform, function, arguments, donated)
        held = [leaf for i in donated for leaf in jax.tree.leaves(arguments[i])]
        report(
            family,
            name,
            compiled,
            donated=sum(leaf.size * leaf.dtype.itemsize for leaf in held) / 2**20,
        )
