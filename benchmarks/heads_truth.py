"""What the functions of a softmax layer should return, in float64 NumPy.

A head's truth is computed row by row, like every other in `truth.py`: a function of a
block of logits gives outputs and, for given cotangents, the gradient of the logits;
the rest is the same for all of them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.checks import Subset
from benchmarks.truth import Array

_BLOCK_BYTES = 2**28

Inputs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Block:
    """What a block of rows comes to.

    Attributes:
      outputs: by name, one row each.
      dlogits: for the cotangents that were given, `[R, V]`; None where the function
        has no gradient.
      values_weights: `[R, V]`, by which the cotangent of a mixture of `values` reaches
        them; None where there is none.
    """

    outputs: dict[str, Array]
    dlogits: Array | None = None
    values_weights: Array | None = None


# Of inputs, cotangents by output, and the rows and classes compared.
Truth = Callable[[Inputs, Mapping[str, Any], Subset], dict[str, Any]]
# Of log-probabilities `[R, V]`, and inputs and cotangents cut to the same rows.
BlockTruth = Callable[[Array, dict[str, Any], dict[str, Array]], Block]


def by_rows(
    block_truth: BlockTruth,
    inputs: Inputs,
    per_token: tuple[str, ...],
    subset: Subset,
    cotangents: Mapping[str, Any],
) -> dict[str, Array]:
    """The truth of a function that treats every token by itself.

    Args:
      block_truth: of a block of rows.
      inputs: `hidden` `[N, H]`, `kernel` `[H, V]` and what else `block_truth` reads.
      per_token: names of the inputs whose first axis is N.
      subset: which rows and classes are wanted.
      cotangents: by output, `[N, …]`; none asks for no gradient, and only the rows of
        the subset are then computed.

    Returns:
      The subset's rows of every output, and the gradients `dhidden`, of the subset's
      rows, `dkernel` and `dvalues`, of its classes.
    """
    exact = {name: _exact(array) for name, array in inputs.items()}
    kernel = exact["kernel"]
    rows = np.arange(len(exact["hidden"])) if cotangents else subset.rows
    upstream = {name: _exact(array) for name, array in cotangents.items()}
    step = max(1, _BLOCK_BYTES // (8 * kernel.shape[1]))
    found: dict[str, list[Array]] = {}
    sums: dict[str, Array] = {}
    for start in range(0, len(rows), step):
        chosen = rows[start : start + step]
        cut = {k: v[chosen] if k in per_token else v for k, v in exact.items()}
        given = {name: array[chosen] for name, array in upstream.items()}
        block = block_truth(log_probs(cut["hidden"] @ kernel), cut, given)
        wanted = np.isin(chosen, subset.rows)
        for name, output in block.outputs.items():
            found.setdefault(name, []).append(output[wanted])
        if block.dlogits is not None:
            dhidden = block.dlogits[wanted] @ kernel.T
            found.setdefault("dhidden", []).append(dhidden)
            share = cut["hidden"].T @ block.dlogits[:, subset.classes]
            sums["dkernel"] = sums.get("dkernel", np.zeros(())) + share
        if block.values_weights is not None:
            share = block.values_weights[:, subset.classes].T @ given["expected"]
            sums["dvalues"] = sums.get("dvalues", np.zeros(())) + share
    return {name: np.concatenate(parts) for name, parts in found.items()} | sums


def log_prob(log_p: Array, inputs: dict[str, Any], given: dict[str, Array]) -> Block:
    """Log-probability of the label, and entropy."""
    rows, labels = np.arange(len(log_p)), inputs["labels"]
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(axis=1)
    outputs = {"log_prob": log_p[rows, labels], "entropy": entropy}
    if not given:
        return Block(outputs)
    dlogits = -p * (log_p + entropy[:, None]) * given["entropy"][:, None]
    dlogits -= p * given["log_prob"][:, None]
    dlogits[rows, labels] += given["log_prob"]
    return Block(outputs, dlogits)


def log_prob_at(log_p: Array, inputs: dict[str, Any], given: dict[str, Array]) -> Block:
    """Log-probabilities of K classes a row."""
    class_ids = inputs["class_ids"]
    outputs = {"log_prob": np.take_along_axis(log_p, class_ids, axis=1)}
    if not given:
        return Block(outputs)
    dlogits = -np.exp(log_p) * given["log_prob"].sum(axis=1, keepdims=True)
    rows = np.arange(len(log_p))[:, None]
    np.add.at(dlogits, (rows, class_ids), given["log_prob"])
    return Block(outputs, dlogits)


def expected(log_p: Array, inputs: dict[str, Any], given: dict[str, Array]) -> Block:
    """The mean of values."""
    values, p = inputs["values"], np.exp(log_p)
    mean = p @ values
    if not given:
        return Block({"expected": mean})
    upstream = given["expected"]
    gain = upstream @ values.T - (upstream * mean).sum(axis=1, keepdims=True)
    return Block({"expected": mean}, p * gain, p)


def distillation(temperature: float) -> BlockTruth:
    """Forward KL from a teacher's layer, times τ²."""

    def block(log_p: Array, inputs: dict[str, Any], given: dict[str, Array]) -> Block:
        log_p = log_probs(log_p / temperature)
        teacher = inputs["teacher_hidden"] @ inputs["teacher_kernel"]
        log_q = log_probs(teacher / temperature)
        q = np.exp(log_q)
        outputs = {"loss": temperature**2 * (q * (log_q - log_p)).sum(axis=1)}
        if not given:
            return Block(outputs)
        return Block(
            outputs, temperature * (np.exp(log_p) - q) * given["loss"][:, None]
        )

    return block


def distillation_top_k(
    log_p: Array, inputs: dict[str, Any], given: dict[str, Array]
) -> Block:
    """KL from K classes of a teacher and one more that has the rest."""
    ids, log_q = inputs["teacher_ids"], inputs["teacher_log_probs"]
    p, q = np.exp(log_p), np.exp(log_q)
    rest_q = 1 - q.sum(axis=1)
    others = p.copy()
    np.put_along_axis(others, ids, 0, axis=1)
    rest_p = others.sum(axis=1)
    listed = q * (log_q - np.take_along_axis(log_p, ids, axis=1))
    loss = listed.sum(axis=1) + rest_q * np.log(rest_q / rest_p)
    if not given:
        return Block({"loss": loss})
    dlogits = p - others * (rest_q / rest_p)[:, None]
    at_ids = np.take_along_axis(p, ids, axis=1) - q
    np.put_along_axis(dlogits, ids, at_ids, axis=1)
    return Block({"loss": loss}, dlogits * given["loss"][:, None])


def among(log_p: Array, inputs: dict[str, Any], given: dict[str, Array]) -> Block:
    """Log-probabilities and entropy of K classes alone, none of them twice."""
    class_ids = inputs["class_ids"]
    listed = log_probs(np.take_along_axis(log_p, class_ids, axis=1))
    p = np.exp(listed)
    entropy = -(p * listed).sum(axis=1)
    outputs = {"log_prob": listed, "entropy": entropy}
    if not given:
        return Block(outputs)
    upstream = given["log_prob"]
    slope = upstream - p * upstream.sum(axis=1, keepdims=True)
    slope -= p * (listed + entropy[:, None]) * given["entropy"][:, None]
    dlogits = np.zeros_like(log_p)
    np.put_along_axis(dlogits, class_ids, slope, axis=1)
    return Block(outputs, dlogits)


def cross_entropy(
    log_p: Array, inputs: dict[str, Any], given: dict[str, Array]
) -> Block:
    """The label's cross-entropy."""
    rows, labels = np.arange(len(log_p)), inputs["labels"]
    loss = -log_p[rows, labels]
    if not given:
        return Block({"loss": loss})
    dlogits = np.exp(log_p)
    dlogits[rows, labels] -= 1
    return Block({"loss": loss}, dlogits * given["loss"][:, None])


def masked_cross_entropy(
    log_p: Array, inputs: dict[str, Any], given: dict[str, Array]
) -> Block:
    """That among the classes whose bits are set, of words of 32 a row."""
    words = inputs["bits"].astype("<u4")
    kept = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    kept = kept[:, : log_p.shape[1]].astype(bool)
    return cross_entropy(log_probs(np.where(kept, log_p, -np.inf)), inputs, given)


def with_kernel(
    kernel_of: Callable[[dict[str, Any]], Array],
    per_token: tuple[str, ...] = ("hidden", "labels"),
) -> Truth:
    """The label's cross-entropy of a layer whose kernel is made of other arrays."""

    def truth(
        inputs: Inputs, cotangents: Mapping[str, Any], subset: Subset
    ) -> dict[str, Array]:
        exact = {name: _exact(array) for name, array in inputs.items()}
        exact["kernel"] = kernel_of(exact)
        found = by_rows(cross_entropy, exact, per_token, subset, cotangents)
        if "b" in exact and cotangents:
            found["db"] = exact["a"].T @ found["dkernel"]
        return found

    return truth


def scaled_kernel(inputs: dict[str, Any]) -> Array:
    """An integer kernel times its scales, one a class."""
    return inputs["short_kernel"] * inputs["scale"]


def adapted_kernel(inputs: dict[str, Any]) -> Array:
    """A kernel and a product of low rank."""
    return inputs["kernel"] + inputs["a"] @ inputs["b"]


def in_batch(
    inputs: Inputs, cotangents: Mapping[str, Any], subset: Subset
) -> dict[str, Array]:
    """The mean cross-entropy of each query's own candidate, logQ taken off."""
    image, text, log_q = (_exact(inputs[n]) for n in ("image", "text", "log_q"))
    log_p = log_probs(image @ text.T - log_q)
    own = np.arange(len(log_p))
    share = np.exp(log_p)
    share[own, own] -= 1
    share *= float(cotangents["loss"]) / len(own)
    return {
        "loss": np.asarray(-log_p[own, own].mean()),
        "dimage": (share @ text)[subset.rows],
        "dtext": (share.T @ image)[subset.rows],
    }


def clip_loss(temperature: float) -> Truth:
    """The mean of two cross-entropies of `image @ text.T / τ`, normalised."""

    def truth(
        inputs: Inputs, cotangents: Mapping[str, Any], subset: Subset
    ) -> dict[str, Array]:
        image, text = (_Unit.of(inputs[name]) for name in ("image", "text"))
        logits = image.unit @ text.unit.T / temperature
        own = np.arange(len(logits))
        by_image, by_text = log_probs(logits.copy()), log_probs(logits.T.copy())
        loss = -(by_image[own, own].mean() + by_text[own, own].mean()) / 2
        share = (np.exp(by_image) + np.exp(by_text).T) / 2
        share[own, own] -= 1
        share *= float(cotangents["loss"]) / (len(own) * temperature)
        return {
            "loss": np.asarray(loss),
            "dimage": image.pull(share @ text.unit)[subset.rows],
            "dtext": text.pull(share.T @ image.unit)[subset.rows],
        }

    return truth


def nt_xent(temperature: float) -> Truth:
    """The mean over all 2N of the cross-entropy of the partner among the others."""

    def truth(
        inputs: Inputs, cotangents: Mapping[str, Any], subset: Subset
    ) -> dict[str, Array]:
        count = len(inputs["image"])
        z = _Unit.of(np.concatenate([_exact(inputs[n]) for n in ("image", "text")]))
        logits = z.unit @ z.unit.T / temperature
        own = np.arange(2 * count)
        logits[own, own] = -np.inf
        partner = np.roll(own, count)
        log_p = log_probs(logits)
        loss = -log_p[own, partner].mean()
        share = np.exp(log_p)
        share[own, partner] -= 1
        share *= float(cotangents["loss"]) / (2 * count * temperature)
        dz = z.pull(share @ z.unit + share.T @ z.unit)
        return {
            "loss": np.asarray(loss),
            "dimage": dz[:count][subset.rows],
            "dtext": dz[count:][subset.rows],
        }

    return truth


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Rows over their Euclidean norms."""

    unit: Array
    norm: Array

    @classmethod
    def of(cls, rows: Any) -> "_Unit":
        exact = _exact(rows)
        norm = np.linalg.norm(exact, axis=1, keepdims=True)
        return cls(exact / norm, norm)

    def pull(self, cotangent: Array) -> Array:
        """The gradient of the rows for that of the unit vectors."""
        along = (cotangent * self.unit).sum(axis=1, keepdims=True)
        return (cotangent - self.unit * along) / self.norm


def top_k(k: int) -> BlockTruth:
    """The k largest log-probabilities; and all of them, to look ids up in."""

    def block(log_p: Array, inputs: dict[str, Any], given: dict[str, Array]) -> Block:
        del inputs, given
        best = np.sort(np.partition(log_p, -k, axis=1)[:, -k:], axis=1)[:, ::-1]
        ones = np.ones(len(log_p))
        return Block(
            {"log_prob": best, "at_ids": best, "distinct": ones, "every": log_p}
        )

    return block


def ranked(k: int) -> BlockTruth:
    """The k largest log-probabilities, and what share of all is above the label's."""

    def block(log_p: Array, inputs: dict[str, Any], given: dict[str, Array]) -> Block:
        own = np.take_along_axis(log_p, inputs["labels"][:, None], axis=1)
        better = (log_p > own).mean(axis=1)
        outputs = top_k(k)(log_p, inputs, given).outputs
        return Block({"log_prob": outputs["log_prob"], "better": better})

    return block


def top_k_statistics(every: Array, class_ids: Any) -> dict[str, Array]:
    """True log-probabilities at ids `[R, K]`, and the share of them that is distinct.

    Args:
      every: `[R, V]` log-probabilities.
      class_ids: `[R, K]`.

    Returns:
      `at_ids`, `[R, K]`, NaN where an id is no class, and `distinct`, `[R]`.
    """
    ids = np.asarray(class_ids)
    inside = (ids >= 0) & (ids < every.shape[1])
    at_ids = np.take_along_axis(every, np.where(inside, ids, 0), axis=1)
    distinct = [len(np.unique(row)) / len(row) for row in ids]
    return {
        "at_ids": np.where(inside, at_ids, np.nan),
        "distinct": np.asarray(distinct),
    }


def sample(log_p: Array, inputs: dict[str, Any], given: dict[str, Array]) -> Block:
    """Every log-probability; what they say of samples, `sample_statistics` does."""
    del given
    return Block({"every": log_p, "logits": inputs["hidden"] @ inputs["kernel"]})


# Of log-probabilities `[R, V]`, those after a filter: -inf for a dropped class.
Filter = Callable[[Array], Array]


def best(k: int) -> Filter:
    """Keeps the k most probable classes."""

    def kept(log_p: Array) -> Array:
        least = np.partition(log_p, -k, axis=1)[:, -k, None]
        return log_probs(np.where(log_p >= least, log_p, -np.inf))

    return kept


def most_probable(mass: float) -> Filter:
    """Keeps the most probable classes, until those before one have the mass."""

    def kept(log_p: Array) -> Array:
        order = np.argsort(-log_p, axis=1, kind="stable")
        p = np.exp(np.take_along_axis(log_p, order, axis=1))
        is_kept = np.empty(log_p.shape, bool)
        np.put_along_axis(is_kept, order, np.cumsum(p, axis=1) - p < mass, axis=1)
        return log_probs(np.where(is_kept, log_p, -np.inf))

    return kept


def filtered(kept: Filter) -> BlockTruth:
    """Every log-probability after a filter."""

    def block(log_p: Array, inputs: dict[str, Any], given: dict[str, Array]) -> Block:
        found = sample(log_p, inputs, given)
        return Block(found.outputs | {"every": kept(log_p)})

    return block


def sample_statistics(every: Array, class_ids: Any) -> dict[str, Array]:
    """Two figures of one sample a row that are known whatever the distribution.

    Where in its row's cumulative distribution a sample lies is uniform over the rows:
    `place` is these numbers, sorted, and `PLACE_TRUTH` a uniform grid, so that the
    error is the Kolmogorov-Smirnov distance. `surprise` is exp of the mean over the
    rows of a sample's log-probability plus the row's entropy, over the row's standard
    deviation of log-probabilities, which is near 1: a sampler that finds the right
    region and a wrong class in it is off by 0.6.

    Args:
      every: `[R, V]` log-probabilities.
      class_ids: `[R]`, one sample a row.

    Returns:
      `place`, `[R]`, and `surprise`, a scalar; NaN where an id is no class.
    """
    ids = np.asarray(class_ids)
    inside = (ids >= 0) & (ids < every.shape[1])
    column = np.where(inside, ids, 0)[:, None]
    p = np.exp(every)
    at = np.take_along_axis(every, column, axis=1)[:, 0]
    until = np.take_along_axis(np.cumsum(p, axis=1), column, axis=1)[:, 0]
    place = np.where(inside, until - np.exp(at) / 2, np.nan)
    finite = np.where(p == 0, 0, every)
    mean = (p * finite).sum(axis=1)
    spread = np.sqrt((p * (finite - mean[:, None]) ** 2).sum(axis=1))
    excess = np.where(inside, at - mean, np.nan) / np.where(spread == 0, 1, spread)
    return {"place": np.sort(place), "surprise": np.exp(excess.mean())}


def uniform_grid(rows: int) -> dict[str, Array]:
    """What `sample_statistics` should be near to."""
    return {"place": (np.arange(rows) + 0.5) / rows, "surprise": np.ones(())}


def log_probs(logits: Array) -> Array:
    """Log-softmax over the last axis, in place."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def _exact(array: Any) -> Any:
    """Integers as they are, all else in float64; a key is of no use to NumPy."""
    if hasattr(array, "dtype") and str(array.dtype).startswith("key<"):
        return array
    found = np.asarray(array)
    return found if found.dtype.kind in "iu" else found.astype(np.float64)
