"""The heads that are measured: what is asked, of whom, and what the answer is."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxsoft
from benchmarks import heads_truth
from benchmarks.checks import Subset
from benchmarks.passes import STORED, computed_again, cross_entropy, distillation
from benchmarks.peers import OURS, with_workspace
from benchmarks.workloads import MIB, LinearWorkload

_CANDIDATES = 16
_BEST = 50
# Usual ones of distillation, of CLIP at its start and of SimCLR.
_SOFT, _CLIP, _SIMCLR = 2.0, 0.07, 0.5
# Half of the logits of `train-65k`, and all of them for log_prob with its entropy.
_ROOM = 256 * MIB

Inputs = dict[str, Any]
Outputs = dict[str, Any]
# How many, or how many at a workload.
Passes = float | Callable[[LinearWorkload], float]


@dataclasses.dataclass(frozen=True)
class Head:
    """One thing to do with `hidden` `[N, H]`, `kernel` `[H, V]` and `labels` `[N]`.

    Attributes:
      title: what is asked, in words.
      ours: makes named outputs of named inputs.
      plain: the same with stored logits.
      truth: what checked outputs and gradients should be, of inputs, cotangents by
        output (empty where no gradient is wanted) and the rows and classes compared.
      passes: over the logits that each contender takes at the least, 1 if not named.
      draws: further inputs, of a workload and a key.
      per_token: names of the inputs that have one row a token.
      moving: names of the inputs whose gradients are wanted too.
      plain_name: whose formula `plain` is.
      ways: ours with other options, by name.
      others: what else there is that does the same, by name.
      part: another's function that does only a part of the work, by name.
      observe: makes what is compared with the truth of outputs cut to the rows and
        classes compared, and the truth.
      checked: the most rows, and classes, that are compared.
      limit: the largest error, of the number of rows compared, where figures are
        statistical; None takes that of the dtype.
    """

    title: str
    ours: Callable[[Inputs], Outputs]
    plain: Callable[[Inputs], Outputs]
    truth: heads_truth.Truth
    passes: Mapping[str, Passes] = dataclasses.field(default_factory=dict)
    draws: Callable[[LinearWorkload, jax.Array], Inputs] = lambda workload, key: {}
    per_token: tuple[str, ...] = ("hidden", "labels")
    moving: tuple[str, ...] = ()
    plain_name: str = "jax.nn"
    ways: Mapping[str, Callable[[Inputs], Outputs]] = dataclasses.field(
        default_factory=dict
    )
    others: Mapping[str, Callable[[Inputs], Outputs]] = dataclasses.field(
        default_factory=dict
    )
    part: Mapping[str, Callable[[Inputs], Outputs]] = dataclasses.field(
        default_factory=dict
    )
    observe: Callable[[Outputs, Outputs], Outputs] = lambda found, truth: found
    checked: int = 48
    limit: Callable[[int], float] | None = None

    def with_gradient(
        self, *moving: str, passes: Mapping[str, Passes], **fields: Any
    ) -> "Head":
        """The same head, with the gradients of these inputs, and some other fields."""
        title = f"{self.title.removesuffix(': value')}: value and gradient"
        return dataclasses.replace(
            self, title=title, moving=moving, passes=passes, **fields
        )


def by_rows(
    block_truth: heads_truth.BlockTruth,
    per_token: tuple[str, ...] = ("hidden", "labels"),
) -> heads_truth.Truth:
    """The truth of a head that treats every token by itself."""

    def truth(inputs: Any, cotangents: Any, subset: Subset) -> dict[str, Any]:
        return heads_truth.by_rows(block_truth, inputs, per_token, subset, cotangents)

    return truth


def _logits(x: Inputs) -> jax.Array:
    return x["hidden"] @ x["kernel"]


def _log_probs(x: Inputs) -> jax.Array:
    return jax.nn.log_softmax(_logits(x).astype(jnp.float32))


def _our_log_prob(x: Inputs, workspace: int | None = None) -> Outputs:
    log_prob, entropy = jaxsoft.linear_log_prob(
        x["hidden"], x["kernel"], x["labels"], workspace_bytes=workspace
    )
    return {"log_prob": log_prob, "entropy": entropy}


def _plain_log_prob(x: Inputs) -> Outputs:
    log_probs = _log_probs(x)
    at_label = jnp.take_along_axis(log_probs, x["labels"][:, None], axis=1)[:, 0]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=1)
    return {"log_prob": at_label, "entropy": entropy}


def _our_log_prob_at(x: Inputs) -> Outputs:
    found = jaxsoft.linear_log_prob_at(x["hidden"], x["kernel"], x["class_ids"])
    return {"log_prob": found}


def _plain_log_prob_at(x: Inputs) -> Outputs:
    return {"log_prob": jnp.take_along_axis(_log_probs(x), x["class_ids"], axis=1)}


def _class_ids(workload: LinearWorkload, key: jax.Array) -> Inputs:
    shape = (workload.tokens, _CANDIDATES)
    return {"class_ids": jax.random.randint(key, shape, 0, workload.classes)}


def _our_sample(x: Inputs) -> Outputs:
    return {"class_ids": jaxsoft.linear_sample(x["key"], x["hidden"], x["kernel"])}


def _plain_sample(x: Inputs) -> Outputs:
    # In bfloat16, the noise would be too: its largest values are then all the same.
    logits = _logits(x).astype(jnp.float32)
    return {"class_ids": jax.random.categorical(x["key"], logits)}


def _observe_sample(found: Outputs, truth: Outputs) -> Outputs:
    if "logits" in found:
        return found
    return heads_truth.sample_statistics(truth["every"], found["class_ids"])


def sampling(
    title: str,
    ours: Callable[[Inputs], Outputs],
    plain: Callable[[Inputs], Outputs],
    kept: heads_truth.Filter = lambda log_p: log_p,
) -> Head:
    """Returns a sampler's head, beside the product of which it takes its logits.

    Args:
      title: what is asked.
      ours: makes `class_ids` of `key`, `hidden` and `kernel`.
      plain: the same with stored logits.
      kept: what it filters.
    """

    def truth(inputs: Any, cotangents: Any, subset: Subset) -> dict[str, Any]:
        rows = by_rows(heads_truth.filtered(kept))(inputs, cotangents, subset)
        return rows | heads_truth.uniform_grid(len(subset.rows))

    return Head(
        title,
        ours,
        plain,
        truth,
        draws=lambda workload, key: {"key": key},
        plain_name="jax.random",
        part={"matmul": lambda x: {"logits": _logits(x)}},
        observe=_observe_sample,
        checked=256,
        # Three standard deviations of the mean surprise of logits of unit scale; more
        # than the distance in `place` that one right sampler in a million exceeds.
        limit=lambda rows: 3 * rows**-0.5,
    )


def _our_top_k(x: Inputs) -> Outputs:
    log_prob, ids = jaxsoft.linear_top_k(x["hidden"], x["kernel"], _BEST)
    return {"log_prob": log_prob, "class_ids": ids}


def _plain_top_k(x: Inputs) -> Outputs:
    logits = _logits(x)
    best, ids = jax.lax.top_k(logits, _BEST)
    lse = jax.nn.logsumexp(logits.astype(jnp.float32), axis=1, keepdims=True)
    return {"log_prob": best.astype(jnp.float32) - lse, "class_ids": ids}


def _top_k_alone(x: Inputs) -> Outputs:
    return {"class_ids": jax.lax.top_k(_logits(x), _BEST)[1]}


def _observe_top_k(found: Outputs, truth: Outputs) -> Outputs:
    return {
        **{name: a for name, a in found.items() if name == "log_prob"},
        **heads_truth.top_k_statistics(truth["every"], found["class_ids"]),
    }


def _our_expected(x: Inputs) -> Outputs:
    return {"expected": jaxsoft.linear_expected(x["hidden"], x["kernel"], x["values"])}


def _plain_expected(x: Inputs) -> Outputs:
    return {"expected": jax.nn.softmax(_logits(x)) @ x["values"]}


def _values(workload: LinearWorkload, key: jax.Array) -> Inputs:
    shape = (workload.classes, workload.features)
    return {"values": jax.random.normal(key, shape, workload.dtype)}


def _our_distillation(x: Inputs) -> Outputs:
    layers = (x[n] for n in ("hidden", "kernel", "teacher_hidden", "teacher_kernel"))
    loss = jaxsoft.linear_distillation(*layers, temperature=_SOFT, reduction="none")
    return {"loss": loss}


def _plain_distillation(x: Inputs) -> Outputs:
    teacher = (x["teacher_hidden"] @ x["teacher_kernel"]).astype(jnp.float32)
    log_q = jax.nn.log_softmax(teacher / _SOFT)
    log_p = jax.nn.log_softmax(_logits(x).astype(jnp.float32) / _SOFT)
    return {"loss": _SOFT**2 * jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=1)}


def _teacher(workload: LinearWorkload, key: jax.Array) -> Inputs:
    """A layer of twice the width, as a teacher's is, and no other."""
    keys = jax.random.split(key)
    width, dtype = 2 * workload.features, workload.dtype
    hidden = jax.random.normal(keys[0], (workload.tokens, width), dtype)
    kernel = jax.random.normal(keys[1], (width, workload.classes), dtype)
    kernel = kernel * jnp.asarray(width**-0.5, dtype)
    return {"teacher_hidden": hidden, "teacher_kernel": kernel}


def _our_distillation_top_k(x: Inputs) -> Outputs:
    names = ("hidden", "kernel", "teacher_ids", "teacher_log_probs")
    arrays = (x[name] for name in names)
    return {"loss": jaxsoft.linear_distillation_top_k(*arrays, reduction="none")}


def _plain_distillation_top_k(x: Inputs) -> Outputs:
    log_q, ids = x["teacher_log_probs"], x["teacher_ids"]
    log_p = jnp.take_along_axis(_log_probs(x), ids, axis=1)
    rest_q = 1 - jnp.sum(jnp.exp(log_q), axis=1)
    rest_p = 1 - jnp.sum(jnp.exp(log_p), axis=1)
    listed = jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=1)
    return {"loss": listed + rest_q * jnp.log(rest_q / rest_p)}


def _teacher_top_k(workload: LinearWorkload, key: jax.Array) -> Inputs:
    """Classes of which none comes twice in a row, and a rest that has mass."""
    keys = jax.random.split(key)
    first = jax.random.randint(keys[0], (workload.tokens, 1), 0, workload.classes)
    steps = jnp.arange(_BEST) * (workload.classes // _BEST)
    logits = jax.random.normal(keys[1], (workload.tokens, _BEST + 1))
    return {
        "teacher_ids": (first + steps[None]) % workload.classes,
        "teacher_log_probs": jax.nn.log_softmax(logits)[:, :-1],
    }


_OF_LISTED = ("hidden", "labels", "teacher_ids", "teacher_log_probs")


def _our_clip_loss(x: Inputs) -> Outputs:
    return {"loss": jaxsoft.clip_loss(x["image"], x["text"], _CLIP)}


def _plain_clip_loss(x: Inputs) -> Outputs:
    image, text = (_normalized(x[name]) for name in ("image", "text"))
    logits = (image @ text.T).astype(jnp.float32) / _CLIP
    by_image = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    by_text = jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    return {"loss": -(jnp.mean(by_image) + jnp.mean(by_text)) / 2}


def _our_nt_xent(x: Inputs) -> Outputs:
    return {"loss": jaxsoft.nt_xent(x["image"], x["text"], _SIMCLR)}


def _plain_nt_xent(x: Inputs) -> Outputs:
    z = jnp.concatenate([_normalized(x["image"]), _normalized(x["text"])])
    own = jnp.arange(len(z))
    logits = (z @ z.T).astype(jnp.float32) / _SIMCLR
    log_probs = jax.nn.log_softmax(logits.at[own, own].set(-jnp.inf))
    return {"loss": -jnp.mean(log_probs[own, jnp.roll(own, len(x["image"]))])}


def _optax_nt_xent(x: Inputs) -> Outputs:
    pairs = jnp.tile(jnp.arange(len(x["image"])), 2)
    both = jnp.concatenate([x["image"], x["text"]])
    # Its own promotions are not a caller's to forbid.
    with jax.numpy_dtype_promotion("standard"):
        return {"loss": optax.losses.ntxent(both, pairs, _SIMCLR)}


def _normalized(rows: jax.Array) -> jax.Array:
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def _views(workload: LinearWorkload, key: jax.Array) -> Inputs:
    """Pairs that resemble each other, a cosine of 0.7 apart."""
    shape = (workload.tokens, workload.features)
    image, other = jax.random.normal(key, (2, *shape), workload.dtype)
    return {"image": image, "text": image + other}


def _with(
    fixed: int, again: float = 1, layer: Callable[[Any], Any] = lambda w: w, **how: Any
) -> Callable[[LinearWorkload], float]:
    """Returns what gives the passes of ours by its plan.

    Args:
      fixed: passes that every plan takes.
      again: passes of logits that were there before, where none are kept.
      layer: makes the layer of a workload.
      **how: further arguments of `computed_again`.
    """
    return lambda workload: fixed + again * computed_again(layer(workload), **how)


def _both(workload: LinearWorkload) -> LinearWorkload:
    """Returns the layer of both embeddings of all pairs."""
    count = 2 * workload.tokens
    return dataclasses.replace(workload, tokens=count, classes=count)


LOG_PROB = Head(
    "log_prob and entropy: value",
    _our_log_prob,
    _plain_log_prob,
    by_rows(heads_truth.log_prob),
)
EXPECTED = Head(
    "expected values [V, H]: value",
    _our_expected,
    _plain_expected,
    by_rows(heads_truth.expected),
    passes={OURS: 2, "jax.nn": 2},
    draws=_values,
)
TRAINING = (
    LOG_PROB,
    # With stored logits: them, dhidden and dkernel. Ours computes some logits again.
    LOG_PROB.with_gradient(
        "hidden",
        "kernel",
        passes={
            OURS: _with(STORED),
            with_workspace(_ROOM): _with(STORED, workspace=_ROOM),
            "jax.nn": STORED,
        },
        ways={with_workspace(_ROOM): functools.partial(_our_log_prob, workspace=_ROOM)},
    ),
    EXPECTED,
    # Besides, the mean and two products in its derivative.
    EXPECTED.with_gradient(
        "hidden",
        "kernel",
        "values",
        passes={OURS: _with(2 * STORED), "jax.nn": 2 * STORED},
    ),
    Head(
        f"distillation at T = {_SOFT:g}: value and gradient",
        _our_distillation,
        _plain_distillation,
        by_rows(
            heads_truth.distillation(_SOFT), ("hidden", "labels", "teacher_hidden")
        ),
        passes={OURS: distillation, "jax.nn": 5},
        draws=_teacher,
        per_token=("hidden", "labels", "teacher_hidden"),
        moving=("hidden", "kernel"),
    ),
    Head(
        f"distillation_top_k, k = {_BEST}: value and gradient",
        _our_distillation_top_k,
        _plain_distillation_top_k,
        by_rows(heads_truth.distillation_top_k, _OF_LISTED),
        passes={OURS: _with(STORED), "jax.nn": STORED},
        draws=_teacher_top_k,
        per_token=_OF_LISTED,
        moving=("hidden", "kernel"),
    ),
)
DECODING = (
    Head(
        f"log_prob_at, {_CANDIDATES} classes: value",
        _our_log_prob_at,
        _plain_log_prob_at,
        by_rows(heads_truth.log_prob_at, ("hidden", "labels", "class_ids")),
        draws=_class_ids,
        per_token=("hidden", "labels", "class_ids"),
    ),
    sampling("sample", _our_sample, _plain_sample),
    Head(
        f"top_k, k = {_BEST}",
        _our_top_k,
        _plain_top_k,
        by_rows(heads_truth.top_k(_BEST)),
        part={"jax.lax": _top_k_alone},
        observe=_observe_top_k,
    ),
)
# Of N pairs: their similarities are N², or (2N)², logits.
CONTRASTIVE = (
    Head(
        "clip_loss: value and gradient",
        _our_clip_loss,
        _plain_clip_loss,
        heads_truth.clip_loss(_CLIP),
        # Both directions are of the same logits.
        passes={OURS: cross_entropy, "jax.nn": STORED},
        draws=_views,
        per_token=("image", "text"),
        moving=("image", "text"),
    ),
    Head(
        "nt_xent: value and gradient",
        _our_nt_xent,
        _plain_nt_xent,
        heads_truth.nt_xent(_SIMCLR),
        passes={
            OURS: lambda workload: 4 * cross_entropy(_both(workload)),
            "jax.nn": 4 * STORED,
            "optax": 4 * STORED,
        },
        draws=_views,
        per_token=("image", "text"),
        moving=("image", "text"),
        others={"optax": _optax_nt_xent},
    ),
)
