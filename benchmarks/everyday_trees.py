"""Trees, bands and samples of classes beside the softmax over all of them.

A tree is another model than that softmax, which is what a user would take in its place:
the question is from how many classes on a tree is worth it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoft
from benchmarks import trees_steps
from benchmarks.everyday_case import Case, Room, Size, at_most, compiled
from benchmarks.peers import Contender
from benchmarks.workloads import TreeWorkload

_BEST, _SAMPLES = 10, 256
_ROWS, _FEATURES = 256, 128
# Where there are more logits, only what does not compute all of them is timed.
_FEWER = at_most(2**22)
# Growth is measured from so many classes on, with narrower vectors: those of 2**22
# classes and both moments of Adam take 3 GiB.
_GROWS_FROM, _GROWTH_FEATURES = 2**12, 64
_OPTIMIZERS = {
    "row_sgd": optax.sgd,
    "row_adagrad": optax.adagrad,
    "row_adam": optax.adam,
}


def _cross_entropy(x: Any, labels: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(x, labels)


def _power_of_two(size: Size) -> bool:
    return size.classes & (size.classes - 1) == 0


# Trees.


def _log_prob(hidden: Any, nodes: Any, kernel: Any, labels: Any, tree: Any) -> Any:
    return -_cross_entropy(hidden @ kernel, labels)


def _path_log_prob(hidden: Any, nodes: Any, labels: Any, tree: Any) -> jax.Array:
    """Log-probabilities of a complete binary tree: what one writes with logistics."""
    depth = tree.num_classes.bit_length() - 1
    places = (tree.num_classes + labels)[:, None] >> jnp.arange(depth, -1, -1)
    z = jnp.einsum("nh,ndh->nd", hidden, nodes[places[:, :-1] - 1])
    return jax.nn.log_sigmoid(jnp.where(places[:, 1:] & 1, z, -z)).sum(axis=-1)


def _listed_log_prob(
    hidden: Any, nodes: Any, labels: Any, tree: Any, paths: Any
) -> jax.Array:
    """Log-probabilities of a Huffman tree: tables of nodes and codes, as word2vec's."""
    rows, codes = (table[labels] for table in paths)
    z = jnp.einsum("nh,ndh->nd", hidden, nodes[rows])
    log_p = jax.nn.log_sigmoid(jnp.where(codes == 1, z, -z))
    return jnp.sum(jnp.where(codes < 0, 0, log_p), axis=-1)


def _of_huffman(size: Size) -> bool:
    """Tells the size at which trees of other forms than a balanced one are timed."""
    return size.classes == 4096


def _our_log_prob(hidden: Any, nodes: Any, kernel: Any, labels: Any, tree: Any) -> Any:
    return jaxsoft.hierarchical_log_prob(hidden, nodes, labels, tree)


def _full_gradient(hidden: Any, nodes: Any, kernel: Any, labels: Any, tree: Any) -> Any:
    def loss(hidden: Any, kernel: Any) -> jax.Array:
        return _cross_entropy(hidden @ kernel, labels).mean()

    value, gradients = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
    return value, *gradients


def _our_row_gradient(
    hidden: Any, nodes: Any, kernel: Any, labels: Any, tree: Any
) -> Any:
    return jaxsoft.hierarchical_value_and_row_grad(hidden, nodes, labels, tree)


def _our_sample(key: Any, hidden: Any, nodes: Any, kernel: Any, tree: Any) -> jax.Array:
    return jaxsoft.hierarchical_sample(key, hidden, nodes, tree)


def _full_sample(
    key: Any, hidden: Any, nodes: Any, kernel: Any, tree: Any
) -> jax.Array:
    return jax.random.categorical(key, hidden @ kernel)


_TREE_CASES = (
    Case(
        "hierarchical_log_prob",
        "beside the full softmax",
        _our_log_prob,
        _log_prob,
        "hidden nodes kernel labels tree",
        "hidden nodes",
        "hidden kernel",
        alike=False,
    ),
    Case(
        "hierarchical_log_prob",
        "beside a sum of logistics",
        jaxsoft.hierarchical_log_prob,
        _path_log_prob,
        "hidden nodes labels tree",
        "hidden nodes",
        at=_power_of_two,
    ),
    Case(
        "hierarchical_log_prob",
        "Huffman, beside tables of paths",
        lambda hidden, nodes, labels, tree, paths: jaxsoft.hierarchical_log_prob(
            hidden, nodes, labels, tree
        ),
        _listed_log_prob,
        "hidden nodes frequent huffman paths",
        "hidden nodes",
        at=_of_huffman,
    ),
    Case(
        "hierarchical_log_probs",
        "",
        lambda hidden, nodes, kernel, tree: jaxsoft.hierarchical_log_probs(
            hidden, nodes, tree
        ),
        lambda hidden, nodes, kernel, tree: jax.nn.log_softmax(hidden @ kernel),
        "hidden nodes kernel tree",
        "hidden nodes",
        "hidden kernel",
        alike=False,
    ),
    Case(
        "hierarchical_value_and_row_grad",
        "",
        _our_row_gradient,
        _full_gradient,
        "hidden nodes kernel labels tree",
        alike=False,
        compared=2,
    ),
    Case(
        "hierarchical_sample",
        "",
        _our_sample,
        _full_sample,
        "key hidden nodes kernel tree",
        alike=False,
    ),
    Case(
        "hierarchical_sample",
        "Huffman",
        _our_sample,
        _full_sample,
        "key hidden nodes kernel huffman",
        alike=False,
        at=_of_huffman,
    ),
    Case(
        "hierarchical_top_k",
        f"k = {_BEST}",
        lambda hidden, nodes, kernel, tree: jaxsoft.hierarchical_top_k(
            hidden, nodes, _BEST, tree
        )[:2],
        lambda hidden, nodes, kernel, tree: _full_top_k(hidden @ kernel),
        "hidden nodes kernel tree",
        alike=False,
    ),
)


def _full_top_k(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    best, ids = jax.lax.top_k(x, _BEST)
    return best - jax.nn.logsumexp(x, axis=-1, keepdims=True), ids


def _tree_arrays(size: Size) -> Mapping[str, Callable[[], Any]]:
    workload, classes = _workload(size), size.classes

    def frequent() -> jax.Array:
        """Returns classes of a law of Zipf's, as Huffman trees are made for."""
        place = jax.random.uniform(jax.random.key(1), (size.rows,))
        return jnp.int32((classes + 1) ** place) - 1

    def huffman() -> jaxsoft.ClassTree:
        return jaxsoft.ClassTree.huffman(1 / np.arange(1, classes + 1))

    def paths() -> tuple[jax.Array, jax.Array]:
        """Returns the nodes above each class, and which child is taken, -1 for none."""
        path = huffman().paths(jnp.arange(classes))
        return path.first_rows, jnp.where(path.num_rows > 0, path.choices, -1)

    return compiled(
        {
            "key": lambda: jax.random.key(2),
            "hidden": lambda: workload.hidden()[0],
            "nodes": lambda: workload.kernel(classes - 1, "vh"),
            "kernel": lambda: workload.kernel(classes, "hv"),
            "labels": lambda: workload.labels(classes, 1)[0],
            "tree": lambda: jaxsoft.ClassTree.balanced(classes),
            "frequent": frequent,
            "huffman": huffman,
            "paths": paths,
        }
    )


def _workload(size: Size) -> TreeWorkload:
    rows, features, classes = size.rows, size.features, size.classes
    both = (classes, classes)
    return TreeWorkload("everyday", rows, features, (classes,), classes, both)


# Training steps, in place.


def _row_training(name: str, size: Size) -> Contender:
    return trees_steps.row_training(name, _workload(size), size.classes)


def _stored_training(name: str, size: Size) -> Contender:
    optimizer = _OPTIMIZERS[name](trees_steps.RATES[name])
    return trees_steps.stored_training(optimizer, _workload(size), size.classes)


def _smaller_training(size: Size) -> Contender:
    return trees_steps.row_training("row_adam", _workload(size), _GROWS_FROM)


def _trains(size: Size) -> bool:
    return size.features != _GROWTH_FEATURES


def _grows(size: Size) -> bool:
    return size.features == _GROWTH_FEATURES


def _growth(size: Size) -> float:
    """Returns a path's length over that of the smallest, and misses of caches beside.

    It grows with the levels, and is 3.8 from 2¹² classes to 2²².
    """
    return 1 + 0.28 * math.log2(size.classes / _GROWS_FROM)


_TRAINING_CASES = (
    *(
        Case(
            name,
            "beside the full softmax",
            lambda size, name=name: _row_training(name, size),
            lambda size, name=name: _stored_training(name, size),
            "hidden labels",
            alike=False,
            chained=True,
            at=_trains,
        )
        for name in _OPTIMIZERS
    ),
    Case(
        "row_adam",
        f"beside ours of {_GROWS_FROM} classes",
        lambda size: _row_training("row_adam", size),
        _smaller_training,
        "hidden labels",
        alike=False,
        chained=True,
        at=_grows,
        allowed=_growth,
    ),
)


def _training_arrays(size: Size) -> Mapping[str, Callable[[], Any]]:
    workload = _workload(size)
    return compiled(
        {
            "hidden": lambda: workload.hidden()[0],
            "labels": lambda: workload.labels(size.classes, trees_steps.BATCHES),
        }
    )


# Bands, and samples of the classes.


def _band_log_probs(hidden: Any, head: Any, tails: Any, bands: Any) -> jax.Array:
    """Log-probabilities of all classes: every tail for every token."""
    log_p = jax.nn.log_softmax(hidden @ head)
    parts = [log_p[:, : bands.shortlist]]
    for place, tail in enumerate(tails):
        own = jax.nn.log_softmax(hidden @ tail.projection @ tail.kernel)
        parts.append(own + log_p[:, bands.shortlist + place, None])
    return jnp.concatenate(parts, axis=-1)


def _band_log_prob(hidden: Any, head: Any, tails: Any, labels: Any, bands: Any) -> Any:
    every = _band_log_probs(hidden, head, tails, bands)
    return jnp.take_along_axis(every, labels[:, None], axis=-1)[:, 0]


def _sampled_loss(
    key: Any, hidden: Any, table: Any, labels: Any, sampler: Any
) -> jax.Array:
    """The loss with logQ correction, from the rows of a table [V, H]."""
    ids = sampler.sample(key, _SAMPLES)
    others = hidden @ table[ids].T - sampler.log_prob(ids) - math.log(_SAMPLES)
    others = jnp.where(ids == labels[:, None], -jnp.inf, others)
    own = jnp.sum(hidden * table[labels], axis=-1, keepdims=True)
    x = jnp.concatenate([own, others], axis=-1)
    return _cross_entropy(x, jnp.zeros_like(labels)).mean()


_BAND_CASES = (
    Case(
        "adaptive_log_prob",
        "",
        jaxsoft.adaptive_log_prob,
        _band_log_prob,
        "hidden head tails labels bands",
        "hidden head tails",
    ),
    Case(
        "adaptive_log_probs",
        "",
        jaxsoft.adaptive_log_probs,
        _band_log_probs,
        "hidden head tails bands",
        "hidden head tails",
        at=_FEWER,
    ),
    Case(
        "adaptive_sample",
        "",
        jaxsoft.adaptive_sample,
        lambda key, *layer: jax.random.categorical(key, _band_log_probs(*layer)),
        "key hidden head tails bands",
        alike=False,
        at=_FEWER,
    ),
    Case(
        "adaptive_top_k",
        f"k = {_BEST}",
        lambda hidden, head, tails, bands: jaxsoft.adaptive_top_k(
            hidden, head, tails, _BEST, bands
        ),
        lambda *layer: tuple(jax.lax.top_k(_band_log_probs(*layer), _BEST)),
        "hidden head tails bands",
        at=_FEWER,
    ),
    Case(
        "sampled_softmax_loss",
        f"{_SAMPLES} samples, [V, H]",
        lambda key, hidden, table, labels, sampler: jaxsoft.sampled_softmax_loss(
            key, hidden, table, labels, _SAMPLES, sampler=sampler, kernel_layout="vh"
        ),
        _sampled_loss,
        "key hidden table labels sampler",
        "hidden table",
    ),
)


def _band_arrays(size: Size) -> Mapping[str, Callable[[], Any]]:
    rows, features, classes = size.rows, size.features, size.classes
    bands = jaxsoft.ClassBands.in_order(classes, (classes // 16, classes // 4))
    keys = jax.random.split(jax.random.key(1), 4)

    def matrix(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape) * shape[0] ** -0.5

    def tails() -> list[jaxsoft.AdaptiveTail]:
        found = []
        for place, number in enumerate(bands.tails):
            width, (first, second) = (
                features >> 2 * place + 2,
                jax.random.split(keys[0]),
            )
            found.append(
                jaxsoft.AdaptiveTail(
                    matrix(first, features, width), matrix(second, width, number)
                )
            )
        return found

    def labels() -> jax.Array:
        """Returns classes of a law of Zipf's, as bands are made for."""
        place = jax.random.uniform(keys[1], (rows,))
        return jnp.int32((classes + 1) ** place) - 1

    return compiled(
        {
            "key": lambda: jax.random.key(2),
            "hidden": lambda: jax.random.normal(keys[2], (rows, features)),
            "head": lambda: matrix(
                keys[3], features, bands.shortlist + len(bands.tails)
            ),
            "table": lambda: matrix(keys[3], features, classes).T,
            "tails": tails,
            "labels": labels,
            "bands": lambda: bands,
            "sampler": lambda: jaxsoft.ClassSampler.log_uniform(classes),
        }
    )


_SMALL = tuple(
    Size(_ROWS, classes, _FEATURES) for classes in (64, 256, 1000, 4096, 32768)
)
ROOMS = (
    Room("trees", _SMALL, _TREE_CASES, _tree_arrays),
    Room(
        "training of trees",
        (
            *_SMALL,
            *(
                Size(_ROWS, 2**power, _GROWTH_FEATURES)
                for power in (14, 16, 18, 20, 22)
            ),
        ),
        _TRAINING_CASES,
        _training_arrays,
    ),
    Room(
        "bands and samples",
        (Size(256, 1000, 128), Size(512, 8192, 256), Size(1024, 32768, 512)),
        _BAND_CASES,
        _band_arrays,
    ),
)
