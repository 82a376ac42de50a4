"""Heads of serving and post-training, and of layers that are not two plain arrays."""

import jax
import jax.numpy as jnp

import jaxsoft
from benchmarks import heads_truth
from benchmarks.heads_cases import Head, Inputs, Outputs, by_rows, sampling
from benchmarks.masks import WORD, masked
from benchmarks.passes import STORED, cross_entropy
from benchmarks.peers import OURS
from benchmarks.workloads import LinearWorkload

__all__ = ["IN_BATCH", "OPERANDS", "SERVING"]

_BEST, _LISTED, _TOP_P, _RANK = 50, 8, 0.9, 16
_LABELLED = ("hidden", "labels")


def _logits(x: Inputs) -> jax.Array:
    return (x["hidden"] @ x["kernel"]).astype(jnp.float32)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> Outputs:
    log_p = jax.nn.log_softmax(logits)
    return {"loss": -jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]}


def _our_ranks(x: Inputs) -> Outputs:
    found = jaxsoft.linear_statistics(
        x["hidden"], x["kernel"], x["labels"], return_rank=True, return_top_k=_BEST
    )
    rank = jnp.asarray(found.rank)
    return {"log_prob": jnp.asarray(found.top_log_probs), "better": _share(rank, x)}


def _plain_ranks(x: Inputs) -> Outputs:
    logits = _logits(x)
    own = jnp.take_along_axis(logits, x["labels"][:, None], axis=1)
    before = jnp.arange(logits.shape[1])[None] < x["labels"][:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & before), axis=1)
    best = jax.lax.top_k(logits, _BEST)[0]
    lse = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    return {"log_prob": best - lse, "better": _share(rank, x)}


def _share(rank: jax.Array, x: Inputs) -> jax.Array:
    """Returns ranks over the classes: those of two roundings differ by little."""
    return rank / x["kernel"].shape[1]


def _our_top_k_sample(x: Inputs) -> Outputs:
    ids = jaxsoft.linear_sample(x["key"], x["hidden"], x["kernel"], top_k=_BEST)
    return {"class_ids": ids}


def _plain_top_k_sample(x: Inputs) -> Outputs:
    best, ids = jax.lax.top_k(_logits(x), _BEST)
    chosen = jax.random.categorical(x["key"], best)
    return {"class_ids": jnp.take_along_axis(ids, chosen[:, None], axis=1)[:, 0]}


def _our_top_p_sample(x: Inputs) -> Outputs:
    ids = jaxsoft.linear_sample(x["key"], x["hidden"], x["kernel"], top_p=_TOP_P)
    return {"class_ids": ids}


def _plain_top_p_sample(x: Inputs) -> Outputs:
    logits = _logits(x)
    ordered = jnp.sort(logits, descending=True)
    p = jax.nn.softmax(ordered)
    kept = jnp.cumsum(p, axis=1) - p < _TOP_P
    least = jnp.min(ordered, axis=1, keepdims=True, where=kept, initial=jnp.inf)
    kept_logits = jnp.where(logits >= least, logits, -jnp.inf)
    return {"class_ids": jax.random.categorical(x["key"], kept_logits)}


def _our_kept(x: Inputs) -> Outputs:
    log_prob, entropy = jaxsoft.linear_log_prob_at(
        x["hidden"], x["kernel"], x["class_ids"], normalize=True
    )
    return {"log_prob": log_prob, "entropy": entropy}


def _plain_kept(x: Inputs) -> Outputs:
    log_p = jax.nn.log_softmax(jnp.take_along_axis(_logits(x), x["class_ids"], axis=1))
    return {"log_prob": log_p, "entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=1)}


def _class_ids(workload: LinearWorkload, key: jax.Array) -> Inputs:
    """Classes of which none comes twice in a row."""
    first = jax.random.randint(key, (workload.tokens, 1), 0, workload.classes)
    steps = jnp.arange(_LISTED) * (workload.classes // _LISTED)
    return {"class_ids": (first + steps[None]) % workload.classes}


def _our_scaled(x: Inputs) -> Outputs:
    losses = jaxsoft.linear_cross_entropy(
        x["hidden"],
        x["short_kernel"],
        x["labels"],
        kernel_scale=x["scale"],
        reduction="none",
    )
    return {"loss": losses}


def _plain_scaled(x: Inputs) -> Outputs:
    logits = x["hidden"] @ x["short_kernel"].astype(x["hidden"].dtype)
    return _cross_entropy(logits.astype(jnp.float32) * x["scale"][None], x["labels"])


def _short_kernel(workload: LinearWorkload, key: jax.Array) -> Inputs:
    keys = jax.random.split(key)
    shape = (workload.features, workload.classes)
    scale = jax.random.uniform(keys[1], shape[1:], minval=0.5, maxval=1.0)
    return {
        "short_kernel": jax.random.randint(keys[0], shape, -127, 128, jnp.int8),
        "scale": scale / (74 * workload.features**0.5),
    }


def _our_adapted(x: Inputs) -> Outputs:
    losses = jaxsoft.linear_cross_entropy(
        x["hidden"],
        x["kernel"],
        x["labels"],
        lora=jaxsoft.LoRA(x["a"], x["b"]),
        reduction="none",
    )
    return {"loss": losses}


def _plain_adapted(x: Inputs) -> Outputs:
    added = (x["hidden"] @ x["a"]) @ x["b"]
    return _cross_entropy(_logits(x) + added.astype(jnp.float32), x["labels"])


def _adapter(workload: LinearWorkload, key: jax.Array) -> Inputs:
    keys, dtype = jax.random.split(key), workload.dtype
    a = jax.random.normal(keys[0], (workload.features, _RANK), dtype)
    b = jax.random.normal(keys[1], (_RANK, workload.classes), dtype)
    size = jnp.asarray((workload.features * _RANK) ** -0.5, dtype)
    return {"a": a * size, "b": b}


def _our_masked(x: Inputs) -> Outputs:
    losses = jaxsoft.linear_cross_entropy(
        x["hidden"], x["kernel"], x["labels"], class_bits=x["bits"], reduction="none"
    )
    return {"loss": losses}


def _plain_masked(x: Inputs) -> Outputs:
    return _cross_entropy(masked(_logits(x), x["bits"]), x["labels"])


def _bits(workload: LinearWorkload, key: jax.Array) -> Inputs:
    """Half of the classes, and the token's own."""
    labels = workload.inputs("hv")[2]
    shape = (workload.tokens, -(-workload.classes // WORD))
    rows, own = jnp.arange(shape[0]), jnp.uint32(1) << (labels % WORD).astype("uint32")
    words = jax.random.bits(key, shape, jnp.uint32)
    mine = words[rows, labels // WORD] | own
    return {"bits": words.at[rows, labels // WORD].set(mine)}


def _our_in_batch(x: Inputs) -> Outputs:
    return {"loss": jaxsoft.in_batch_cross_entropy(x["image"], x["text"], x["log_q"])}


def _plain_in_batch(x: Inputs) -> Outputs:
    logits = (x["image"] @ x["text"].T).astype(jnp.float32) - x["log_q"][None]
    return {"loss": -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits)))}


def _queries(workload: LinearWorkload, key: jax.Array) -> Inputs:
    """Two towers whose logits have unit scale, and frequencies of the candidates."""
    keys = jax.random.split(key)
    shape = (workload.tokens, workload.features)
    image, text = jax.random.normal(keys[0], (2, *shape), workload.dtype)
    log_q = jax.nn.log_softmax(jax.random.normal(keys[1], shape[:1]))
    return {
        "image": image * jnp.asarray(shape[1] ** -0.5, workload.dtype),
        "text": text,
        "log_q": log_q,
    }


def _frozen(workload: LinearWorkload) -> float:
    """Returns the passes of ours where the kernel has no gradient."""
    return cross_entropy(workload) - 1


SERVING = (
    Head(
        f"rank of the label and the best {_BEST}",
        _our_ranks,
        _plain_ranks,
        by_rows(heads_truth.ranked(_BEST)),
    ),
    sampling(
        f"sample, top_k = {_BEST}",
        _our_top_k_sample,
        _plain_top_k_sample,
        heads_truth.best(_BEST),
    ),
    sampling(
        f"sample, top_p = {_TOP_P:g}",
        _our_top_p_sample,
        _plain_top_p_sample,
        heads_truth.most_probable(_TOP_P),
    ),
    Head(
        f"log_prob_at, among {_LISTED} classes: value and gradient",
        _our_kept,
        _plain_kept,
        by_rows(heads_truth.among, (*_LABELLED, "class_ids")),
        passes={OURS: STORED, "jax.nn": STORED},
        draws=_class_ids,
        per_token=(*_LABELLED, "class_ids"),
        moving=("hidden", "kernel"),
    ),
)
OPERANDS = (
    Head(
        "cross-entropy, a kernel of int8: value and gradient",
        _our_scaled,
        _plain_scaled,
        heads_truth.with_kernel(heads_truth.scaled_kernel),
        passes={OURS: _frozen, "jax.nn": STORED - 1},
        draws=_short_kernel,
        moving=("hidden",),
    ),
    Head(
        f"cross-entropy, an adapter of rank {_RANK}: value and gradient",
        _our_adapted,
        _plain_adapted,
        heads_truth.with_kernel(heads_truth.adapted_kernel),
        passes={OURS: _frozen, "jax.nn": STORED - 1},
        draws=_adapter,
        moving=("hidden", "b"),
    ),
    Head(
        "cross-entropy, a mask of each token: value and gradient",
        _our_masked,
        _plain_masked,
        by_rows(heads_truth.masked_cross_entropy, (*_LABELLED, "bits")),
        passes={OURS: cross_entropy, "jax.nn": STORED},
        draws=_bits,
        per_token=(*_LABELLED, "bits"),
        moving=("hidden", "kernel"),
    ),
)
IN_BATCH = Head(
    "in-batch cross-entropy: value and gradient",
    _our_in_batch,
    _plain_in_batch,
    heads_truth.in_batch,
    passes={OURS: cross_entropy, "jax.nn": STORED},
    draws=_queries,
    per_token=("image", "text", "log_q"),
    moving=("image", "text"),
)
