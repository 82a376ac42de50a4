"""What is timed of a tree's layer and, beside it, of a layer over all classes.

Each is a step `f(state, inputs) -> (state, outputs)` that `timing.compile_chain` takes.
A state counts its calls, and every call has labels, a key or hidden states of its own:
the rows that it reads are not those that the last one left in a cache.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxsoft
from benchmarks import timing
from benchmarks.peers import Contender
from benchmarks.workloads import TreeWorkload

# Of a sum over the tokens: small enough that no weight runs away, large enough that
# what a step adds to a row is well above the rounding of the row.
RATES = {"row_sgd": 2e-3, "row_adagrad": 1e-2, "row_adam": 2e-3, "sgd": 2e-3}
# Batches that differ, before the first comes again.
BATCHES = 256

State = dict[str, Any]
Outputs = dict[str, Any]
Step = Callable[[State, dict[str, Any]], tuple[State, Outputs]]


def row_training(name: str, workload: TreeWorkload, classes: int) -> Contender:
    """Value, row gradients and the update of the rows on the batch's paths.

    Args:
      name: of jaxsoft's optimizer of rows.
      workload: the layer.
      classes: V; labels of more classes are taken modulo V.

    Returns:
      A contender that carries the kernel and the optimizer's memory.
    """
    tree = jaxsoft.ClassTree.balanced(classes)
    optimizer = getattr(jaxsoft, name)(RATES[name])

    def init() -> State:
        kernel = workload.kernel(tree.num_rows, "vh")
        return _counted(kernel=kernel, slots=optimizer.init(kernel))

    def step(state: State, inputs: dict[str, Any]) -> tuple[State, Outputs]:
        labels = _turn(inputs["labels"], state) % classes
        loss, dhidden, gradient = jaxsoft.hierarchical_value_and_row_grad(
            inputs["hidden"], state["kernel"], labels, tree, reduction="sum"
        )
        kernel, slots = optimizer.update(state["kernel"], gradient, state["slots"])
        outputs = {"loss": loss, "dhidden": dhidden}
        return _next(state, kernel=kernel, slots=slots), outputs

    return _contender(name, step, init, ours=True)


def full_training(
    name: str, workload: TreeWorkload, classes: int, *, absent: str = ""
) -> Contender:
    """Value, gradients and SGD's update of a kernel with a column for each class.

    Args:
      name: `"linear_cross_entropy"`, of jaxsoft, or `"optax"`, on stored logits.
      workload: the layer.
      classes: V.
      absent: why it cannot take part.

    Returns:
      A contender that carries the kernel.
    """
    if absent:
        return Contender(name, absent=absent)

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        if name == "optax":
            losses = optax.softmax_cross_entropy_with_integer_labels(
                hidden @ kernel, labels
            )
            return losses.sum()
        return jaxsoft.linear_cross_entropy(hidden, kernel, labels, reduction="sum")

    def step(state: State, inputs: dict[str, Any]) -> tuple[State, Outputs]:
        labels = _turn(inputs["labels"], state)
        value, (dhidden, dkernel) = jax.value_and_grad(loss, argnums=(0, 1))(
            inputs["hidden"], state["kernel"], labels
        )
        kernel = state["kernel"] - RATES["sgd"] * dkernel
        return _next(state, kernel=kernel), {"loss": value, "dhidden": dhidden}

    def init() -> State:
        return _counted(kernel=workload.kernel(classes, "hv"))

    return _contender(name, step, init, ours=name != "optax")


def stored_training(
    optimizer: optax.GradientTransformation, workload: TreeWorkload, classes: int
) -> Contender:
    """Value, gradients and an update of all columns, from stored logits.

    Args:
      optimizer: of Optax.
      workload: the layer.
      classes: V.

    Returns:
      A contender that carries the kernel and the optimizer's memory.
    """

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(
            hidden @ kernel, labels
        )
        return losses.sum()

    def init() -> State:
        kernel = workload.kernel(classes, "hv")
        return _counted(kernel=kernel, slots=optimizer.init(kernel))

    def step(state: State, inputs: dict[str, Any]) -> tuple[State, Outputs]:
        labels = _turn(inputs["labels"], state)
        value, (dhidden, dkernel) = jax.value_and_grad(loss, argnums=(0, 1))(
            inputs["hidden"], state["kernel"], labels
        )
        updates, slots = optimizer.update(dkernel, state["slots"], state["kernel"])
        kernel = optax.apply_updates(state["kernel"], updates)
        outputs = {"loss": value, "dhidden": dhidden}
        return _next(state, kernel=kernel, slots=slots), outputs

    return _contender("optax", step, init, ours=False)


def tree_sampling(classes: int) -> Contender:
    """`hierarchical_sample`, with a new key for every call."""
    tree = jaxsoft.ClassTree.balanced(classes)

    def step(state: State, inputs: dict[str, Any]) -> tuple[State, Outputs]:
        key = jax.random.fold_in(inputs["key"], state["turn"])
        ids = jaxsoft.hierarchical_sample(
            key, inputs["hidden"], inputs["node_kernel"], tree
        )
        return _next(state), {"class_ids": ids}

    return _contender("hierarchical_sample", step, _counted, ours=True)


def full_sampling(*, absent: str = "") -> Contender:
    """`linear_sample`, likewise."""
    if absent:
        return Contender("linear_sample", absent=absent)

    def step(state: State, inputs: dict[str, Any]) -> tuple[State, Outputs]:
        key = jax.random.fold_in(inputs["key"], state["turn"])
        ids = jaxsoft.linear_sample(key, inputs["hidden"], inputs["kernel"])
        return _next(state), {"class_ids": ids}

    return _contender("linear_sample", step, _counted, ours=True)


def tree_top_k(classes: int, k: int) -> Contender:
    """`hierarchical_top_k`, with new hidden states for every call."""
    tree = jaxsoft.ClassTree.balanced(classes)

    def step(state: State, inputs: dict[str, Any]) -> tuple[State, Outputs]:
        hidden = _turn(inputs["hidden"], state)
        values, ids, exact = jaxsoft.hierarchical_top_k(
            hidden, inputs["node_kernel"], k, tree
        )
        return _next(state), {"log_prob": values, "class_ids": ids, "exact": exact}

    return _contender("hierarchical_top_k", step, _counted, ours=True)


def full_top_k(classes: int, k: int) -> Contender:
    """All log-probabilities of the tree, stored, and the best of them."""
    tree = jaxsoft.ClassTree.balanced(classes)

    def step(state: State, inputs: dict[str, Any]) -> tuple[State, Outputs]:
        hidden = _turn(inputs["hidden"], state)
        every = jaxsoft.hierarchical_log_probs(hidden, inputs["node_kernel"], tree)
        values, ids = jax.lax.top_k(every, k)
        return _next(state), {"log_prob": values, "class_ids": ids}

    return _contender("log_probs + lax.top_k", step, _counted, ours=True)


def _contender(
    name: str, step: Step, init: Callable[[], State], *, ours: bool
) -> Contender:
    def program(arguments: tuple[Any, ...]) -> timing.Program:
        return timing.compile_chain(name, step, init, arguments)

    return Contender(name, program=program, ours=ours)


def _counted(**state: Any) -> State:
    return state | {"turn": jnp.zeros((), jnp.int32)}


def _next(state: State, **changed: Any) -> State:
    return state | changed | {"turn": state["turn"] + 1}


def _turn(batches: jax.Array, state: State) -> jax.Array:
    return batches[state["turn"] % len(batches)]
