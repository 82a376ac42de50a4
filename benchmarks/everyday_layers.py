"""Every function of hidden states and a kernel beside the formula on stored logits."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxsoft
from benchmarks.everyday_case import Case, Room, Size, at_most
from benchmarks.everyday_draws import sample_top_p
from benchmarks.everyday_inputs import Draws
from benchmarks.everyday_logits import newton_temperature
from benchmarks.masks import WORD, masked

_SOFT, _TAU, _CAP, _SMOOTHING, _Z_LOSS = 2.0, 0.7, 30.0, 0.1, 1e-4
_BEST, _CANDIDATES, _TOP_P = 10, 8, 0.9
_RANK, _ADAPTERS = 8, 4
_SIMCLR, _CLIP, _SUPERVISED, _GROUPS = 0.5, 0.07, 0.1, 10
_RETRIEVAL = 4.0
# Of 2**25 logits a call takes seconds: only what most people call is timed there.
_FEWER = at_most(2**22)


def _logits(hidden: Any, kernel: Any) -> jax.Array:
    return (hidden @ kernel).astype(jnp.float32)


def _cross_entropy(logits: Any, labels: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _stored_loss(hidden: Any, kernel: Any, labels: Any) -> jax.Array:
    return _cross_entropy(_logits(hidden, kernel), labels).mean()


def _options(
    hidden: Any, kernel: Any, labels: Any, bias: Any, weights: Any
) -> jax.Array:
    return jaxsoft.linear_cross_entropy(
        hidden,
        kernel,
        labels,
        bias=bias,
        logit_softcap=_CAP,
        label_smoothing=_SMOOTHING,
        z_loss=_Z_LOSS,
        weights=weights,
    )


def _stored_options(
    hidden: Any, kernel: Any, labels: Any, bias: Any, weights: Any
) -> jax.Array:
    x = _CAP * jnp.tanh((_logits(hidden, kernel) + bias) / _CAP)
    lse = jax.nn.logsumexp(x, axis=-1)
    losses = (1 - _SMOOTHING) * _cross_entropy(x, labels)
    losses += _SMOOTHING * (lse - x.mean(axis=-1)) + _Z_LOSS * lse**2
    return jnp.sum(losses * weights) / jnp.sum(weights)


def _our_scaled(hidden: Any, short_kernel: Any, scale: Any, labels: Any) -> jax.Array:
    return jaxsoft.linear_cross_entropy(
        hidden, short_kernel, labels, kernel_scale=scale
    )


def _scaled(hidden: Any, short_kernel: Any, scale: Any, labels: Any) -> jax.Array:
    x = _logits(hidden, short_kernel.astype(hidden.dtype)) * scale
    return _cross_entropy(x, labels).mean()


def _our_adapted(
    hidden: Any, a: Any, b: Any, kernel: Any, labels: Any, adapters: Any
) -> jax.Array:
    lora = jaxsoft.LoRA(a, b, adapters)
    return jaxsoft.linear_cross_entropy(hidden, kernel, labels, lora=lora)


def _adapted(
    hidden: Any, a: Any, b: Any, kernel: Any, labels: Any, adapters: Any
) -> jax.Array:
    added = jnp.einsum("nh,nhr->nr", hidden, a[adapters])
    own = jax.nn.one_hot(adapters, _ADAPTERS, dtype=hidden.dtype)
    added = jnp.einsum("nr,na,arv->nv", added, own, b)
    x = _logits(hidden, kernel) + added.astype(jnp.float32)
    return _cross_entropy(x, labels).mean()


def _our_masked(hidden: Any, kernel: Any, bits: Any, labels: Any) -> jax.Array:
    return jaxsoft.linear_cross_entropy(hidden, kernel, labels, class_bits=bits)


def _masked(hidden: Any, kernel: Any, bits: Any, labels: Any) -> jax.Array:
    return _cross_entropy(masked(_logits(hidden, kernel), bits), labels).mean()


def _sample_with_log_prob(key: Any, hidden: Any, kernel: Any) -> tuple[jax.Array, ...]:
    logits = _logits(hidden, kernel)
    drawn = jax.random.categorical(key, logits)
    log_p = jax.nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_p, drawn[:, None], axis=-1)[:, 0]
    return drawn, log_prob, log_prob


def _sample_top_k_with_log_prob(
    key: Any, hidden: Any, kernel: Any
) -> tuple[jax.Array, ...]:
    logits = _logits(hidden, kernel)
    best, ids = jax.lax.top_k(logits, min(_BEST, logits.shape[-1]))
    drawn = jax.random.categorical(key, best)[:, None]
    class_id, logit = (jnp.take_along_axis(a, drawn, -1)[:, 0] for a in (ids, best))
    sums = (jax.nn.logsumexp(x, axis=-1) for x in (logits, best))
    return class_id, *(logit - lse for lse in sums)


def _our_statistics(hidden: Any, kernel: Any, labels: Any) -> tuple[jax.Array, ...]:
    found = jaxsoft.linear_statistics(hidden, kernel, labels)
    return found.log_prob, found.entropy, found.lse


def _statistics(hidden: Any, kernel: Any, labels: Any) -> tuple[jax.Array, ...]:
    x = _logits(hidden, kernel)
    return *_of_labels(x, labels), jax.nn.logsumexp(x, axis=-1)


def _of_labels(x: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities of labels, and entropies."""
    log_p = jax.nn.log_softmax(x)
    own = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return own, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _log_prob_at(hidden: Any, kernel: Any, ids: Any) -> jax.Array:
    log_p = jax.nn.log_softmax(_logits(hidden, kernel))
    return jnp.take_along_axis(log_p, ids, axis=-1)


def _kept_log_prob_at(hidden: Any, kernel: Any, ids: Any) -> tuple[Any, Any]:
    picked = jnp.take_along_axis(_logits(hidden, kernel), ids, axis=-1)
    log_p = jax.nn.log_softmax(picked)
    return log_p, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def _top_k(hidden: Any, kernel: Any) -> tuple[jax.Array, jax.Array]:
    x = _logits(hidden, kernel)
    best, ids = jax.lax.top_k(x, _BEST)
    return best - jax.nn.logsumexp(x, axis=-1, keepdims=True), ids


def _distillation(
    hidden: Any, kernel: Any, teacher_hidden: Any, teacher_kernel: Any
) -> jax.Array:
    log_q = jax.nn.log_softmax(_logits(hidden, kernel) / _SOFT)
    log_p = jax.nn.log_softmax(_logits(teacher_hidden, teacher_kernel) / _SOFT)
    return _SOFT**2 * optax.losses.kl_divergence_with_log_targets(log_q, log_p).mean()


def _of_labels_too(
    hidden: Any, kernel: Any, teacher_hidden: Any, teacher_kernel: Any, labels: Any
) -> jax.Array:
    soft = _distillation(hidden, kernel, teacher_hidden, teacher_kernel)
    return (soft + _stored_loss(hidden, kernel, labels)) / 2


def _distillation_top_k(hidden: Any, kernel: Any, ids: Any, log_p: Any) -> jax.Array:
    log_q = _log_prob_at(hidden, kernel, ids)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    rest_p, rest_q = 1 - p.sum(axis=-1), 1 - q.sum(axis=-1)
    listed = jnp.sum(p * (log_p - log_q), axis=-1)
    return jnp.mean(listed + rest_p * jnp.log(rest_p / rest_q))


def _listed_with_labels(
    hidden: Any, kernel: Any, ids: Any, log_p: Any, labels: Any
) -> jax.Array:
    soft = _distillation_top_k(hidden, kernel, ids, log_p)
    return (soft + _stored_loss(hidden, kernel, labels)) / 2


def _kept_distillation(hidden: Any, kernel: Any, ids: Any, log_p: Any) -> jax.Array:
    picked = jnp.take_along_axis(_logits(hidden, kernel), ids, axis=-1)
    log_q, log_p = jax.nn.log_softmax(picked), jax.nn.log_softmax(log_p)
    return jnp.mean(jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1))


def _expected(hidden: Any, kernel: Any, values: Any) -> jax.Array:
    p = jax.nn.softmax(_logits(hidden, kernel))
    return p.astype(values.dtype) @ values


def _relaxed(hidden: Any, kernel: Any, values: Any, key: Any) -> jax.Array:
    x = _logits(hidden, kernel)
    p = jax.nn.softmax((x + jax.random.gumbel(key, x.shape)) / _TAU)
    return p.astype(values.dtype) @ values


# Contrastive losses.


def _unit(rows: Any) -> jax.Array:
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def _similarities(z: jax.Array, temperature: float) -> jax.Array:
    """Returns logits of all others for each, the own one dropped."""
    own = jnp.eye(len(z), dtype=bool)
    return jnp.where(own, -jnp.inf, _logits(z, z.T) / temperature)


def _nt_xent(anchors: Any, positives: Any) -> jax.Array:
    z = jnp.concatenate([_unit(anchors), _unit(positives)])
    partners = jnp.roll(jnp.arange(len(z)), len(anchors))
    return _cross_entropy(_similarities(z, _SIMCLR), partners).mean()


def _clip_loss(image: Any, text: Any) -> jax.Array:
    x = _logits(_unit(image), _unit(text).T) / _CLIP
    own = jnp.arange(len(x))
    return (_cross_entropy(x, own).mean() + _cross_entropy(x.T, own).mean()) / 2


def _in_batch(image: Any, text: Any, log_q: Any, ids: Any) -> jax.Array:
    own = jnp.arange(len(image))
    x = _logits(image, text.T) / _RETRIEVAL - log_q
    hits = (ids[:, None] == ids) & (own[:, None] != own)
    return _cross_entropy(jnp.where(hits, -1e30, x), own).mean()


def _our_ranks(hidden: Any, kernel: Any, labels: Any) -> tuple[jax.Array, ...]:
    found = jaxsoft.linear_statistics(
        hidden, kernel, labels, return_rank=True, return_top_k=_BEST
    )
    assert found.rank is not None
    assert found.top_log_probs is not None and found.top_ids is not None
    return found.log_prob, found.rank, found.top_log_probs, found.top_ids


def _ranks(hidden: Any, kernel: Any, labels: Any) -> tuple[jax.Array, ...]:
    x = _logits(hidden, kernel)
    own = jnp.take_along_axis(x, labels[:, None], axis=-1)
    rank = jnp.sum(x > own, axis=-1)
    log_p = jax.nn.log_softmax(x)
    best, ids = jax.lax.top_k(log_p, _BEST)
    return jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0], rank, best, ids


def _supervised(embeddings: Any, groups: Any) -> jax.Array:
    x = _similarities(_unit(embeddings), _SUPERVISED)
    others = ~jnp.eye(len(x), dtype=bool)
    same = (groups[:, None] == groups) & others
    total = jnp.sum(x, axis=-1, where=same) / same.sum(axis=-1)
    return jnp.mean(jax.nn.logsumexp(x, axis=-1) - total)


_CASES = (
    Case(
        "linear_cross_entropy",
        "[H, V]",
        jaxsoft.linear_cross_entropy,
        _stored_loss,
        "hidden kernel labels",
        "hidden kernel",
    ),
    Case(
        "linear_cross_entropy",
        "[V, H]",
        lambda hidden, table, labels: jaxsoft.linear_cross_entropy(
            hidden, table, labels, kernel_layout="vh"
        ),
        lambda hidden, table, labels: _stored_loss(hidden, table.T, labels),
        "hidden table labels",
        "hidden table",
    ),
    Case(
        "linear_cross_entropy",
        "bias, cap, smoothing, z-loss, weights",
        _options,
        _stored_options,
        "hidden kernel labels bias weights",
        "hidden kernel bias",
        value=False,
        at=_FEWER,
    ),
    Case(
        "linear_cross_entropy",
        "a kernel of int8, a scale a class",
        _our_scaled,
        _scaled,
        "hidden short_kernel scale labels",
        "hidden scale",
        value=False,
        at=_FEWER,
    ),
    Case(
        "linear_cross_entropy",
        f"{_ADAPTERS} adapters of rank {_RANK}",
        _our_adapted,
        _adapted,
        "hidden a b kernel labels adapters",
        "hidden a b",
        value=False,
        at=_FEWER,
    ),
    Case(
        "linear_cross_entropy",
        "a mask of each token, in bits",
        _our_masked,
        _masked,
        "hidden kernel bits labels",
        "hidden kernel",
        value=False,
        at=_FEWER,
    ),
    Case(
        "linear_statistics",
        "log_prob, entropy, lse",
        _our_statistics,
        _statistics,
        "hidden kernel labels",
        "hidden kernel",
        at=_FEWER,
    ),
    Case(
        "linear_statistics",
        f"rank, k = {_BEST}",
        _our_ranks,
        _ranks,
        "hidden kernel labels",
        at=_FEWER,
    ),
    Case(
        "linear_log_prob",
        "with entropy",
        jaxsoft.linear_log_prob,
        lambda hidden, kernel, labels: _of_labels(_logits(hidden, kernel), labels),
        "hidden kernel labels",
        "hidden kernel",
    ),
    Case(
        "linear_log_prob_at",
        f"{_CANDIDATES} classes",
        jaxsoft.linear_log_prob_at,
        _log_prob_at,
        "hidden kernel candidates",
        "hidden kernel",
        at=_FEWER,
    ),
    Case(
        "linear_log_prob_at",
        f"among {_CANDIDATES} classes",
        lambda hidden, kernel, ids: jaxsoft.linear_log_prob_at(
            hidden, kernel, ids, normalize=True
        ),
        _kept_log_prob_at,
        "hidden kernel candidates",
        "hidden kernel",
        at=_FEWER,
    ),
    Case(
        "linear_sample",
        "",
        jaxsoft.linear_sample,
        lambda key, hidden, kernel: jax.random.categorical(
            key, _logits(hidden, kernel)
        ),
        "key hidden kernel",
        alike=False,
    ),
    Case(
        "linear_sample",
        "log-probabilities",
        lambda *arrays: tuple(jaxsoft.linear_sample(*arrays, return_log_prob=True)),
        _sample_with_log_prob,
        "key hidden kernel",
        alike=False,
    ),
    Case(
        "linear_sample",
        f"top_p={_TOP_P}",
        lambda *arrays: jaxsoft.linear_sample(*arrays, top_p=_TOP_P),
        lambda key, hidden, kernel: sample_top_p(key, _logits(hidden, kernel), _TOP_P),
        "key hidden kernel",
        alike=False,
        at=_FEWER,
    ),
    Case(
        "linear_sample",
        f"top_k={_BEST}, log-probabilities",
        lambda *arrays: tuple(
            jaxsoft.linear_sample(*arrays, top_k=_BEST, return_log_prob=True)
        ),
        _sample_top_k_with_log_prob,
        "key hidden kernel",
        alike=False,
    ),
    Case(
        "linear_top_k",
        f"k = {_BEST}",
        lambda hidden, kernel: jaxsoft.linear_top_k(hidden, kernel, _BEST),
        _top_k,
        "hidden kernel",
    ),
    Case(
        "linear_distillation",
        f"T = {_SOFT:g}",
        lambda *layers: jaxsoft.linear_distillation(*layers, temperature=_SOFT),
        _distillation,
        "hidden kernel teacher_hidden teacher_kernel",
        "hidden kernel",
        value=False,
        at=lambda size: size.dtype == "float32" or _FEWER(size),
    ),
    Case(
        "linear_distillation_top_k",
        f"k = {_CANDIDATES}",
        jaxsoft.linear_distillation_top_k,
        _distillation_top_k,
        "hidden kernel candidates listed",
        "hidden kernel",
        value=False,
        at=_FEWER,
    ),
    Case(
        "linear_distillation",
        f"T = {_SOFT:g}, labels",
        lambda *arrays: jaxsoft.linear_distillation(
            *arrays[:4], labels=arrays[4], temperature=_SOFT
        ),
        _of_labels_too,
        "hidden kernel teacher_hidden teacher_kernel labels",
        "hidden kernel",
        value=False,
        at=lambda size: size.dtype == "float32" or _FEWER(size),
    ),
    Case(
        "linear_distillation_top_k",
        f"k = {_CANDIDATES}, labels",
        lambda *arrays: jaxsoft.linear_distillation_top_k(
            *arrays[:4], labels=arrays[4]
        ),
        _listed_with_labels,
        "hidden kernel candidates listed labels",
        "hidden kernel",
        value=False,
        at=_FEWER,
    ),
    Case(
        "linear_distillation_top_k",
        "drop, reverse_kl",
        lambda *arrays: jaxsoft.linear_distillation_top_k(
            *arrays, remaining="drop", divergence="reverse_kl"
        ),
        _kept_distillation,
        "hidden kernel candidates listed",
        "hidden kernel",
        value=False,
        at=_FEWER,
    ),
    Case(
        "linear_expected",
        "",
        jaxsoft.linear_expected,
        _expected,
        "hidden kernel values",
        "hidden kernel values",
        at=_FEWER,
    ),
    Case(
        "linear_expected",
        "relaxed sample",
        lambda hidden, kernel, values, key: jaxsoft.linear_expected(
            hidden, kernel, values, key=key, temperature=_TAU
        ),
        _relaxed,
        "hidden kernel values key",
        "hidden kernel values",
        value=False,
        alike=False,
        at=_FEWER,
    ),
    Case(
        "linear_fit_temperature",
        "",
        lambda *arrays: jaxsoft.linear_fit_temperature(*arrays)[:2],
        lambda hidden, kernel, labels: newton_temperature(
            _logits(hidden, kernel), labels
        ),
        "hidden kernel drawn_labels",
        at=_FEWER,
    ),
)
_CONTRASTIVE = (
    Case(
        "nt_xent",
        "",
        lambda anchors, positives: jaxsoft.nt_xent(anchors, positives, _SIMCLR),
        _nt_xent,
        "image text",
        "image text",
        value=False,
    ),
    Case(
        "clip_loss",
        "",
        lambda image, text: jaxsoft.clip_loss(image, text, _CLIP),
        _clip_loss,
        "image text",
        "image text",
        value=False,
    ),
    Case(
        "supervised_contrastive",
        f"{_GROUPS} labels",
        lambda rows, groups: jaxsoft.supervised_contrastive(rows, groups, _SUPERVISED),
        _supervised,
        "image groups",
        "image",
        value=False,
    ),
    Case(
        "in_batch_cross_entropy",
        "log_q, ids",
        lambda *arrays: jaxsoft.in_batch_cross_entropy(*arrays, temperature=_RETRIEVAL),
        _in_batch,
        "image text log_q items",
        "image text",
        value=False,
    ),
)


def _arrays(size: Size) -> Mapping[str, Callable[[], Any]]:
    """Returns what draws the inputs of a layer."""
    rows, features, classes, dtype = size.rows, size.features, size.classes, size.dtype
    drawn = Draws(1)

    def normal(place: int, shape: tuple[int, ...], scale: float) -> np.ndarray:
        return (drawn.normal(place, shape) * np.float32(scale)).astype(jnp.dtype(dtype))

    def states(place: int) -> np.ndarray:
        return drawn.normal(place, (rows, features), dtype)

    def kernel(place: int) -> np.ndarray:
        return normal(place, (features, classes), features**-0.5)

    def labels() -> np.ndarray:
        return drawn.integers(6, (rows,), 0, classes)

    def adapter(shape: tuple[int, ...], place: int) -> np.ndarray:
        return normal(place, (_ADAPTERS, *shape), shape[0] ** -0.5)

    def bits() -> np.ndarray:
        """Returns masks that keep most classes, the label of each token among them."""
        words = -(-classes // WORD)
        some = drawn.integers(3, (2, rows, words), 0, 2**WORD, np.uint32)
        kept, own = some[0] | some[1], labels().astype(np.uint32)
        kept[np.arange(rows), own // WORD] |= np.uint32(1) << own % WORD
        return kept

    def drawn_labels() -> np.ndarray:
        logits = states(0).astype(np.float32) @ kernel(1).astype(np.float32)
        return drawn.classes(7, logits, 1.5)

    return {
        "key": lambda: jax.random.key(2),
        "hidden": lambda: states(0),
        "kernel": lambda: kernel(1),
        "table": lambda: np.ascontiguousarray(kernel(1).T),
        "labels": labels,
        "drawn_labels": drawn_labels,
        "bias": lambda: drawn.normal(4, (classes,), dtype),
        "weights": lambda: drawn.uniform(5, (rows,)) < 0.9,
        "teacher_hidden": lambda: states(2),
        "teacher_kernel": lambda: kernel(3),
        "candidates": lambda: drawn.candidates(4, rows, classes, _CANDIDATES),
        "listed": lambda: drawn.listed(5, rows, _CANDIDATES),
        "short_kernel": lambda: drawn.integers(
            1, (features, classes), -127, 128, np.int8
        ),
        "scale": lambda: drawn.uniform(3, (classes,), 0.5) * features**-0.5 / 64,
        "a": lambda: adapter((features, _RANK), 2),
        "b": lambda: adapter((_RANK, classes), 3),
        "adapters": lambda: np.arange(rows, dtype=np.int32) % _ADAPTERS,
        "bits": bits,
        "values": lambda: drawn.normal(3, (classes, features), dtype),
    }


def _pairs(size: Size) -> Mapping[str, Callable[[], Any]]:
    """Returns what draws pairs of embeddings."""
    shape, drawn = (size.rows, size.features), Draws(1)
    return {
        "image": lambda: drawn.normal(0, shape, size.dtype),
        "text": lambda: drawn.normal(1, shape, size.dtype),
        "groups": lambda: np.arange(size.rows, dtype=np.int32) % _GROUPS,
        "log_q": lambda: np.log(drawn.uniform(2, shape[:1], 1e-3)),
        "items": lambda: np.arange(size.rows, dtype=np.int32) // 2,
    }


_DTYPES = ("float32", "bfloat16")
ROOMS = (
    Room(
        "layers",
        tuple(
            Size(rows, classes, features, dtype)
            for rows, features, classes in (
                (64, 64, 10),
                (256, 256, 1000),
                (512, 256, 8192),
                (1024, 512, 32768),
            )
            for dtype in _DTYPES
        ),
        _CASES,
        _arrays,
    ),
    Room(
        "pairs of embeddings",
        tuple(
            Size(rows, 0, features, dtype)
            for rows, features in ((64, 64), (256, 128), (1024, 256))
            for dtype in _DTYPES
        ),
        _CONTRASTIVE,
        _pairs,
    ),
)
