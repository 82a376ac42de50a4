"""Samples and relaxed samples of stored logits beside what a user would write.

Here are the inputs of all functions of stored logits, too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoft
from benchmarks import everyday_logits
from benchmarks.everyday_case import Case, Room, Size, at_most, every_size
from benchmarks.everyday_inputs import Draws, softmax

_TAU, _TOP_K, _TOP_P, _MIN_P, _TOP_N_SIGMA = 0.7, 50, 0.9, 0.05, 1.5
_PICKS, _NOISES, _HEADS, _CANDIDATES = 8, 10, 4, 4
# XLA on a CPU takes a second to sort 2**22 logits, and ten to sort 2**25.
_SORTED = at_most(2**22, every_size)
# One case is sorted so; others that sort, or draw ten times as much noise, have less.
_SMALL, _FEW = at_most(2**18), at_most(2**18, every_size)


# Relaxed samples and their gradients.


def _gumbel_softmax(key: Any, x: Any) -> jax.Array:
    return jax.nn.softmax((x + jax.random.gumbel(key, x.shape)) / _TAU)


def _through(hard: jax.Array, soft: jax.Array) -> jax.Array:
    """Returns what is hard, with the gradient of what is soft."""
    return hard - jax.lax.stop_gradient(soft) + soft


def _hard_gumbel_softmax(key: Any, x: Any) -> jax.Array:
    soft = _gumbel_softmax(key, x)
    return _through(jax.nn.one_hot(soft.argmax(axis=-1), x.shape[-1]), soft)


def _reinmax(key: Any, x: Any) -> jax.Array:
    """The algorithm of arXiv:2304.08612, as its authors write it."""
    hard = jax.nn.one_hot(jax.random.categorical(key, x), x.shape[-1])
    mean = (hard + jax.nn.softmax(x / _TAU)) / 2
    shifted = jax.nn.softmax(jax.lax.stop_gradient(jnp.log(mean) - x) + x)
    return _through(hard, 2 * shifted - jax.nn.softmax(x) / 2)


def _gumbel_rao(key: Any, x: Any) -> jax.Array:
    """Algorithm 2 of arXiv:2010.04838, with the noise of all draws at once."""
    keys = jax.random.split(key)
    ids = jax.random.categorical(keys[0], x)
    hard = jax.nn.one_hot(ids, x.shape[-1])
    drawn = jax.random.exponential(keys[1], (_NOISES, *x.shape))
    total = jnp.sum(jnp.exp(x), axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(drawn, ids[None, :, None], axis=-1) / total
    given = jnp.where(
        hard == 1, -jnp.log(chosen), -jnp.log(drawn / jnp.exp(x) + chosen)
    )
    noise = jax.lax.stop_gradient(given - x)
    return _through(hard, jax.nn.softmax((x + noise) / _TAU).mean(axis=0))


# Samples.


def _gumbel_top_k(key: Any, x: Any) -> tuple[jax.Array, jax.Array]:
    noisy = x - x.max(axis=-1, keepdims=True) + jax.random.gumbel(key, x.shape)
    values, ids = jax.lax.top_k(noisy, min(_PICKS, x.shape[-1]))
    return values, ids


def _pick(key: Any, scores: Any, ids: Any) -> jax.Array:
    """Draws from scores, and gives the class that each stands for."""
    drawn = jax.random.categorical(key, scores)[:, None]
    return jnp.take_along_axis(ids, drawn, axis=-1)[:, 0]


def _sample_top_k(key: Any, x: Any) -> jax.Array:
    return _pick(key, *jax.lax.top_k(x / _TAU, _fewest(x)))


def _fewest(x: Any) -> int:
    return min(_TOP_K, x.shape[-1] // 2)


def _mass_before(ordered: Any) -> jax.Array:
    """Returns the probability of the classes before each, in descending order."""
    p = jax.nn.softmax(ordered)
    return jnp.cumsum(p, axis=-1) - p


def sample_top_p(key: Any, x: Any, top_p: Any) -> jax.Array:
    x = x / _TAU
    ordered = jnp.sort(x, descending=True)
    kept = _mass_before(ordered) < top_p
    least = jnp.min(ordered, axis=-1, keepdims=True, where=kept, initial=jnp.inf)
    return jax.random.categorical(key, jnp.where(x >= least, x, -jnp.inf))


def _sample_min_p(key: Any, x: Any) -> jax.Array:
    x = x / _TAU
    least = x.max(axis=-1, keepdims=True) + jnp.log(_MIN_P)
    return jax.random.categorical(key, jnp.where(x >= least, x, -jnp.inf))


def _sample_top_n_sigma(key: Any, x: Any) -> jax.Array:
    """The rule of arXiv:2411.07641."""
    least = x.max(axis=-1, keepdims=True)
    least -= _TOP_N_SIGMA * jnp.std(x, axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(x >= least, x / _TAU, -jnp.inf))


def _with_log_prob(key: Any, x: Any, kept: Any = None) -> tuple[jax.Array, ...]:
    """Draws from kept classes, and takes the class's part of each log-softmax."""
    kept = x if kept is None else kept
    drawn = jax.random.categorical(key, kept)
    log_probs = (
        jnp.take_along_axis(jax.nn.log_softmax(some), drawn[:, None], axis=-1)[:, 0]
        for some in (x, kept)
    )
    return (drawn, *log_probs)


def _sample_top_p_with_log_prob(key: Any, x: Any) -> tuple[jax.Array, ...]:
    x = x / _TAU
    ordered = jnp.sort(x, descending=True)
    kept = _mass_before(ordered) < _TOP_P
    least = jnp.min(ordered, axis=-1, keepdims=True, where=kept, initial=jnp.inf)
    return _with_log_prob(key, x, jnp.where(x >= least, x, -jnp.inf))


def _sample_filtered(key: Any, x: Any) -> jax.Array:
    ordered, ids = jax.lax.top_k(x / _TAU, _fewest(x))
    kept = _mass_before(ordered) < _TOP_P
    # With `ordered[:, :1]` XLA on a CPU sorts all classes: 100 times as long.
    kept &= ordered >= ordered.max(axis=-1, keepdims=True) + jnp.log(_MIN_P)
    return _pick(key, jnp.where(kept, ordered, -jnp.inf), ids)


def _sample_filtered_by_row(
    key: Any, x: Any, tau: Any, top_k: Any, top_p: Any, min_p: Any
) -> jax.Array:
    x = x / tau
    ordered = jnp.sort(x, descending=True)
    first = jnp.arange(x.shape[-1]) < top_k
    kept = first & (_mass_before(jnp.where(first, ordered, -jnp.inf)) < top_p)
    kept &= ordered >= ordered[:, :1] + jnp.log(min_p)
    least = jnp.min(ordered, axis=-1, keepdims=True, where=kept, initial=jnp.inf)
    return jax.random.categorical(key, jnp.where(x >= least, x, -jnp.inf))


def _speculative_sample(
    key: Any, x: Any, y: Any, drafts: Any
) -> tuple[jax.Array, jax.Array]:
    """Algorithm 1 of arXiv:2211.17192, for one draft a row."""
    p, q = jax.nn.softmax(x / _TAU), jax.nn.softmax(y / _TAU)
    keys = jax.random.split(key)
    at = drafts[:, None]
    ratio = jnp.take_along_axis(p, at, axis=-1) / jnp.take_along_axis(q, at, axis=-1)
    kept = jax.random.uniform(keys[0], drafts.shape) < ratio[:, 0]
    others = jax.random.categorical(keys[1], jnp.log(jnp.maximum(p - q, 0)))
    return jnp.where(kept, drafts, others), kept


_CASES = (
    Case(
        "gumbel_softmax",
        "",
        lambda key, x: jaxsoft.gumbel_softmax(key, x, _TAU),
        _gumbel_softmax,
        "key logits",
        "logits",
        alike=False,
    ),
    Case(
        "gumbel_softmax",
        "hard",
        lambda key, x: jaxsoft.gumbel_softmax(key, x, _TAU, hard=True),
        _hard_gumbel_softmax,
        "key logits",
        "logits",
        alike=False,
        value=False,
    ),
    Case(
        "reinmax",
        "",
        lambda key, x: jaxsoft.reinmax(key, x, _TAU),
        _reinmax,
        "key logits",
        "logits",
        alike=False,
        value=False,
    ),
    Case(
        "gumbel_rao",
        f"{_NOISES} draws",
        lambda key, x: jaxsoft.gumbel_rao(key, x, _TAU, num_samples=_NOISES),
        _gumbel_rao,
        "key logits",
        "logits",
        alike=False,
        value=False,
        at=_SMALL,
    ),
    Case(
        "gumbel_top_k",
        f"k = {_PICKS}",
        lambda key, x: jaxsoft.gumbel_top_k(key, x, min(_PICKS, x.shape[-1])),
        _gumbel_top_k,
        "key logits",
        alike=False,
        at=every_size,
    ),
    Case(
        "sample",
        "",
        lambda key, x: jaxsoft.sample(key, x, _TAU),
        lambda key, x: jax.random.categorical(key, x / _TAU),
        "key logits",
        alike=False,
        at=every_size,
    ),
    Case(
        "sample",
        "T a row",
        jaxsoft.sample,
        lambda key, x, tau: jax.random.categorical(key, x / tau),
        "key logits temperatures",
        alike=False,
        at=every_size,
    ),
    Case(
        "sample",
        f"top_k={_TOP_K}",
        lambda key, x: jaxsoft.sample(key, x, _TAU, top_k=_fewest(x)),
        _sample_top_k,
        "key logits",
        alike=False,
        at=every_size,
    ),
    Case(
        "sample",
        f"top_p={_TOP_P}",
        lambda key, x: jaxsoft.sample(key, x, _TAU, top_p=_TOP_P),
        lambda key, x: sample_top_p(key, x, _TOP_P),
        "key logits",
        alike=False,
        at=_SORTED,
    ),
    Case(
        "sample",
        "top_p a row",
        lambda key, x, top_p: jaxsoft.sample(key, x, _TAU, top_p=top_p),
        sample_top_p,
        "key logits top_ps",
        alike=False,
        at=_FEW,
    ),
    Case(
        "sample",
        f"min_p={_MIN_P}",
        lambda key, x: jaxsoft.sample(key, x, _TAU, min_p=_MIN_P),
        _sample_min_p,
        "key logits",
        alike=False,
        at=every_size,
    ),
    Case(
        "sample",
        f"top_n_sigma={_TOP_N_SIGMA}",
        lambda key, x: jaxsoft.sample(key, x, _TAU, top_n_sigma=_TOP_N_SIGMA),
        _sample_top_n_sigma,
        "key logits",
        alike=False,
        at=every_size,
    ),
    Case(
        "sample",
        "log_prob",
        lambda key, x: jaxsoft.sample(key, x, _TAU, return_log_prob=True),
        lambda key, x: _with_log_prob(key, x / _TAU),
        "key logits",
        alike=False,
        at=every_size,
    ),
    Case(
        "sample",
        f"log_prob, top_p={_TOP_P}",
        lambda key, x: jaxsoft.sample(key, x, _TAU, top_p=_TOP_P, return_log_prob=True),
        _sample_top_p_with_log_prob,
        "key logits",
        alike=False,
        at=_SORTED,
    ),
    Case(
        "sample",
        "all filters",
        lambda key, x: jaxsoft.sample(
            key, x, _TAU, top_k=_fewest(x), top_p=_TOP_P, min_p=_MIN_P
        ),
        _sample_filtered,
        "key logits",
        alike=False,
        at=every_size,
    ),
    Case(
        "sample",
        "T and all filters a row",
        lambda key, x, tau, top_k, top_p, min_p: jaxsoft.sample(
            key, x, tau, top_k=top_k, top_p=top_p, min_p=min_p
        ),
        _sample_filtered_by_row,
        "key logits temperatures top_ks top_ps min_ps",
        alike=False,
        at=_FEW,
    ),
    Case(
        "speculative_sample",
        "",
        lambda key, x, y, drafts: tuple(
            jaxsoft.speculative_sample(key, x, y, drafts, temperature=_TAU)
        ),
        _speculative_sample,
        "key logits others drafts",
        alike=False,
        at=every_size,
    ),
)


def _arrays(size: Size) -> Mapping[str, Callable[[], Any]]:
    """Returns what draws the inputs of a size."""
    rows, classes = size.rows, size.classes
    drawn = Draws(1)

    def logits() -> np.ndarray:
        return drawn.normal(0, (rows, classes)) * np.float32(2)

    def others() -> np.ndarray:
        return drawn.normal(2, (rows, classes))

    def labels() -> np.ndarray:
        return drawn.integers(1, (rows,), 0, classes)

    def kept_labels() -> np.ndarray:
        return labels() - (labels() % 10 == 9).astype(np.int32)

    def by_row(place: int, low: float, high: float) -> Callable[[], np.ndarray]:
        return lambda: drawn.uniform(place, (rows, 1), low, high)

    return {
        "key": lambda: jax.random.key(2),
        "logits": logits,
        "others": others,
        "drafts": lambda: drawn.classes(4, others(), _TAU),
        "heads": lambda: logits().reshape(_HEADS, rows // _HEADS, classes),
        "relaxed": lambda: softmax((logits() + drawn.gumbel(3, (rows, classes))), _TAU),
        "targets": lambda: softmax(others()),
        "labels": labels,
        "candidates": lambda: drawn.candidates(1, rows, classes, _CANDIDATES),
        "listed": lambda: drawn.listed(2, rows, _CANDIDATES),
        # These are what the logits say, at another temperature than theirs.
        "drawn_labels": lambda: drawn.classes(4, logits(), 1.5),
        "kept": lambda: np.arange(classes) % 10 != 9,
        "kept_labels": kept_labels,
        "weights": lambda: drawn.uniform(5, (rows,)) < 0.9,
        "temperature": lambda: np.float32(_TAU),
        "temperatures": by_row(5, 0.5, 1.5),
        "top_ks": lambda: drawn.integers(6, (rows, 1), 2, 100),
        "top_ps": by_row(6, 0.5, 0.99),
        "min_ps": by_row(7, 0.01, 0.2),
    }


ROOM = Room(
    "stored logits",
    tuple(
        Size(rows, classes)
        for rows, classes in (
            (64, 10),
            (64, 256),
            (256, 1000),
            (512, 8192),
            (1024, 32768),
            (1024, 65536),
            (1, 151936),
        )
    ),
    (*everyday_logits.CASES, *_CASES),
    _arrays,
)
