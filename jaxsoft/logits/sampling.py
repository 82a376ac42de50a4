"""Classes drawn from stored logits."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import block_sampling, checks, mesh_axes, noise, numerics
from jaxsoft._core.by_platform import by_platform
from jaxsoft._core.exporting import exportable_namedtuple
from jaxsoft.logits import filters, groups, kept_sum, rejection
from jaxsoft.logits.arguments import number_of_rows
from jaxsoft.logits.class_shards import WHOLE, ClassShard
from jaxsoft.logits.rows import Rows, in_tiles, tile_rows, to_rows

__all__ = [
    "BoundedTopK",
    "Drawn",
    "SampledClasses",
    "check_filter",
    "draw_rows",
    "draw_with_log_prob",
    "most_of",
    "sample",
    "sharded",
]

_KEEPS_ALL = {"top_k": 0, "top_p": 1, "min_p": 0, "top_n_sigma": math.inf}
_LARGEST = {"top_p": 1, "min_p": 1, "top_n_sigma": math.inf}
# So many classes of a row are one block: filters compare each with each other.
_FEW = 128
# So many first classes of a row are looked for in groups of classes.
_MOST = 128


@exportable_namedtuple
class SampledClasses(NamedTuple):
    """Classes drawn, and how likely they were.

    Attributes:
      class_id: [...] int32 in [0, V); -1 for a row without a class.
      log_prob: [...] the log-probability of the class under the temperature alone, in
        float32 or float64; -inf for a row without a class.
      filtered_log_prob: [...] that among the classes that the filters left, by which it
        was drawn; the same without filters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import sample
      >>> logits = jnp.zeros((1, 8))
      >>> drawn = sample(jax.random.key(0), logits, top_k=2, return_log_prob=True)
      >>> print(f"{drawn.log_prob[0]:.4f} {drawn.filtered_log_prob[0]:.4f}")
      -2.0794 -0.6931
    """

    class_id: jax.Array
    log_prob: jax.Array
    filtered_log_prob: jax.Array


@mesh_axes.accepts_explicit("logits", axis="axis")
def sample(
    key: jax.Array,
    logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
    top_k: ArrayLike | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
    top_n_sigma: ArrayLike | None = None,
    return_log_prob: bool = False,
    vocab_axis: str | Sequence[str] | None = None,
    token_axes: str | Sequence[str] = (),
) -> Any:
    """Draws one class of each row from its tempered softmax.

    Exact: a block of classes is drawn by the Gumbel-max rule over the logarithms of
    the blocks' sums, then a class inside it by inversion. The logits are read once,
    and some √V random numbers are drawn for a row.

    Filters act one after another, each on the classes that the one before it left, in
    the order `top_n_sigma`, temperature, `top_k`, `top_p`, `min_p`. They keep the first
    classes of the order by descending logit, equal ones by ascending id; the first
    always stays.

    Args:
      key: a JAX random key.
      logits: [..., V] with the classes on `axis`, any floating dtype.
      temperature: τ in [0, ∞], a scalar or an array that broadcasts against `logits`
        with size 1 on the class axis, or lacks it. τ = 0 gives the lowest argmax.
      axis: the class axis, which the result lacks.
      where: booleans that broadcast to `logits`; False drops a class. None keeps all.
      top_k: an integer >= 0: the k first classes stay, exactly k where there are as
        many; 0 keeps all. Like the other filters a scalar, or an array as
        `temperature`.
      top_p: p in [0, 1]: a class stays if the probability of those before it is less
        than p, renormalised to the classes that `top_k` left; 1 keeps all.
      min_p: in [0, 1]: a class stays if its probability is at least this share of the
        largest; 0 keeps all.
      top_n_sigma: n in [0, ∞]: a class stays if its logit is at least the largest minus
        n standard deviations of the row's logits, those of kept classes with -inf left
        out, whatever the temperature; ∞ keeps all.
      return_log_prob: whether to return the log-probabilities of the classes as well.
      vocab_axis: inside `jax.shard_map`, the mesh axes of the classes: `logits` and
        `where` have those of this shard, as many as any other. The result has classes
        of all shards, and is the same on each.
      token_axes: inside `jax.shard_map`, the mesh axes of the rows, which number them:
        without them every shard would draw with the same bits. Of several axes of
        rows the first one is sharded.

    Returns:
      [...] int32 in [0, V); -1 for a row without any kept class, or with a NaN or
      +inf. With `return_log_prob`, a `SampledClasses` of it, the log-probability under
      the temperature alone, and that after the filters, both -inf for such a row.

    Raises:
      TypeError: if `logits` or `temperature` is not floating, `where` not boolean, or
        a filter of a wrong type.
      ValueError: if a shape does not fit, or a known temperature or filter is out of
        its range; with a traced one the row gives -1.

    Notes:
      The bits of a row depend on the key and the row's place alone, those of a block
      of classes on its number as well: the same as in `linear_sample`, which draws the
      same classes but for ties within rounding. With filters a row of many classes is
      drawn from until they keep its class, each time from the classes before the last:
      a few passes over a row, and no sort. Where `top_k` is known, more of the classes
      that it drops are left out first, and a key draws other classes than with the same
      `top_k` traced. Without a derivative; see `gumbel_softmax` and `reinmax` for
      one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft import sample
      >>> logits = jnp.array([[0.0, 5.0, 5.0], [60.0, 0.0, 0.0]])
      >>> print(sample(jax.random.key(0), logits, top_k=1))
      [1 0]

    References:
      Gumbel, Statistical Theory of Extreme Values, 1954; Maddison, Tarlow and Minka,
      A* Sampling, arXiv:1411.0030 (Gumbel-max over groups of classes); Holtzman et
      al., arXiv:1904.09751 (top-p); Nguyen et al., arXiv:2407.01082 (min-p); Tang et
      al., arXiv:2411.07641 (top-nσ).
    """
    rows_over = mesh_axes.check_token_axes(token_axes, vocab_axis)
    classes_over = mesh_axes.check_axes("vocab_axis", vocab_axis)
    logits = checks.floating("logits", logits)
    axis = checks.class_axis(axis, logits)
    static_tau, rows, back = to_rows(
        lax.stop_gradient(logits), temperature, axis, where
    )
    chosen = filters.Filters(
        _filter("top_k", top_k, logits, axis),
        _filter("top_p", top_p, logits, axis),
        _filter("min_p", min_p, logits, axis),
        _filter("top_n_sigma", top_n_sigma, logits, axis),
    )
    first = most_of(top_k)
    static = (static_tau, first, rows_over, classes_over)
    if not return_log_prob:
        return back(_sample(*static, key, rows, chosen))
    rows, chosen = lax.stop_gradient((rows, chosen))
    drawn = _sample_with_log_prob(*static, key, rows, chosen)
    return jax.tree.map(back, drawn)


def _filter(
    name: str, value: ArrayLike | None, logits: jax.Array, axis: int
) -> jax.Array | None:
    """Returns a filter as an array [R, 1] or [1, 1], or None; see `check_filter`."""
    array = check_filter(name, value, numerics.compute_dtype(logits))
    if array is None:
        return None
    array = number_of_rows(name, array, logits, axis)
    if array.size == 1:
        return array.reshape(1, 1)
    row_shape = tuple(1 if i == axis else n for i, n in enumerate(logits.shape))
    return jnp.moveaxis(jnp.broadcast_to(array, row_shape), axis, -1).reshape(-1, 1)


def check_filter(
    name: str, value: ArrayLike | BoundedTopK | None, dtype: jnp.dtype
) -> jax.Array | None:
    """Returns a filter as an array; checks what is known of it.

    Args:
      name: one of the fields of `Filters`.
      value: the filter.
      dtype: that of the statistics; `top_k` becomes int32.

    Returns:
      The array, or None for a filter that is known to keep all classes.
    """
    if value is None:
        return None
    if isinstance(value, BoundedTopK):
        value = value.numbers
    whole = name == "top_k"
    dtype = jnp.dtype(jnp.int32) if whole else dtype
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if isinstance(value, numbers.Real):
        kind = numbers.Integral if whole else numbers.Real
        if not isinstance(value, kind):
            raise TypeError(f"`{name}` must be an int, got {value!r}.")
        if value == _KEEPS_ALL[name]:
            return None
        # An int beyond int32 means what the end of int32 does.
        ends = jnp.iinfo(jnp.int32)
        value = min(max(value, ends.min), ends.max) if whole else value
        array = jnp.asarray(value, dtype)
    else:
        check = checks.integer if whole else checks.floating
        array = check(name, value)
    # While JAX traces a function, an array of a known number is a tracer too.
    is_number = isinstance(value, numbers.Real | np.ndarray)
    known = checks.known(value if is_number else array)
    if known is not None:
        largest = _LARGEST.get(name, math.inf)
        bad = ~((known >= 0) & (known <= largest))
        if bad.any():
            rule = "be at least 0" if largest == math.inf else "lie in [0, 1]"
            raise ValueError(f"`{name}` must {rule}, got {known[bad].flat[0]}.")
    return array.astype(dtype)


class BoundedTopK(NamedTuple):
    """A top_k of each row that is traced, and what is known of it nevertheless.

    Attributes:
      numbers: the array.
      most: what `most_of` returned where it was known.
    """

    numbers: jax.Array
    most: int | None


def most_of(top_k: ArrayLike | BoundedTopK | None) -> int | None:
    """Returns a number that no row's top_k is larger than, if one is known.

    It has four binary digits, so that few programs serve many of them.
    """
    if isinstance(top_k, BoundedTopK):
        return top_k.most
    known = None if top_k is None else checks.known(top_k)
    if known is None or known.size == 0 or known.min() < 1:
        return None
    largest = int(known.max())
    return numerics.round_up(largest, 2 ** max(largest.bit_length() - 4, 0))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _sample(
    static_tau: float | None,
    first: int | None,
    rows_over: tuple[str, ...],
    classes_over: tuple[str, ...],
    key: jax.Array,
    rows: Rows,
    chosen: filters.Filters,
) -> jax.Array:
    words = _row_words(key, rows, rows_over)
    rows, shard = sharded(rows, classes_over)
    return draw_rows(static_tau, words, rows, chosen, first, shard)


def _row_words(key: jax.Array, rows: Rows, rows_over: tuple[str, ...]) -> jax.Array:
    count = rows.logits.shape[0]
    return noise.row_words(key, count, mesh_axes.offset(rows_over, count))


def sharded(
    rows: Rows, axes: tuple[str, ...], total: int | None = None
) -> tuple[Rows, ClassShard]:
    """Returns rows and which classes they have: all, where those are few.

    See `ClassShard.of`.
    """
    shard = ClassShard.of(rows.logits, axes, total)
    if not axes or shard.classes(rows.logits) > _FEW:
        return rows, shard
    return Rows(shard.gathered(rows.numbers()), rows.tau, None), WHOLE


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _sample_with_log_prob(
    static_tau: float | None,
    first: int | None,
    rows_over: tuple[str, ...],
    classes_over: tuple[str, ...],
    key: jax.Array,
    rows: Rows,
    chosen: filters.Filters,
) -> SampledClasses:
    count = rows.logits.shape[0]
    if not count:
        none = jnp.zeros(0, numerics.compute_dtype(rows.logits))
        return SampledClasses(jnp.zeros(0, jnp.int32), none, none)
    words = _row_words(key, rows, rows_over)
    rows, shard = sharded(rows, classes_over)
    return draw_with_log_prob(static_tau, words, rows, chosen, first, shard)


def draw_with_log_prob(
    static_tau: float | None,
    words: jax.Array,
    rows: Rows,
    chosen: filters.Filters = filters.NONE,
    first: int | None = None,
    shard: ClassShard = WHOLE,
) -> SampledClasses:
    """Draws a class of each of some rows, at least one; see `draw_rows`."""
    tau, classes = rows.temperature(static_tau), shard.classes(rows.logits)
    if _is_one_pass(chosen, classes, shard):
        block = block_sampling.block_size(classes)
        found = block_sampling.draw(
            rows.logits, tau, words, 0, block, rows.where, with_log_prob=True
        ).without_nan()
        log_prob = found.log_prob(tau[:, 0] if isinstance(tau, jax.Array) else tau)
        return SampledClasses(found.class_id, log_prob, log_prob)
    drawn = _draw(static_tau, words, rows, chosen, first, shard, with_log_prob=True)
    assert drawn.top is not None
    logit = shard.take(rows.logits, jnp.maximum(drawn.class_id, 0)[:, None])
    weight, log_sum = _log_weights(rows, tau, logit, drawn.top, shard)
    lost = drawn.class_id < 0

    def log_prob_of(log_sum: jax.Array) -> jax.Array:
        return jnp.where(lost, -jnp.inf, weight - log_sum)

    of_all = log_prob_of(log_sum)
    if drawn.log_sum is None:
        return SampledClasses(drawn.class_id, of_all, of_all)
    # Neither sum is rounded as the other, but fewer classes weigh no more.
    of_kept = log_prob_of(jnp.clip(drawn.log_sum, weight, log_sum))
    return SampledClasses(drawn.class_id, of_all, of_kept)


def _log_weights(
    rows: Rows,
    tau: float | jax.Array,
    logit: jax.Array,
    top: jax.Array,
    shard: ClassShard,
) -> tuple[jax.Array, jax.Array]:
    """Returns how much classes weigh beside the one of the largest logit.

    Args:
      rows: the logits.
      tau: the temperature, a float or [R, 1] or [1, 1].
      logit: [R, 1] of some classes.
      top: [R, 1] the largest, of all shards.
      shard: which classes these are.

    Returns:
      [R] the logarithms of their weights, and of the sum of the weights of all classes.
    """
    x, peak = rows.numbers(), numerics.finite_peak(top)
    total = jnp.sum(jnp.exp(numerics.divide_by_temperature(x, peak, tau)), axis=1)
    total = shard.add(total)
    weight = numerics.divide_by_temperature(logit.astype(x.dtype), peak, tau)
    return weight[:, 0], jnp.log(total)


class Drawn(NamedTuple):
    """A class of each row, and what the kept ones weigh.

    Attributes:
      class_id: [R] int32; -1 where there is none.
      log_sum: [R] log Σ exp((logit - largest) / τ) over the classes that the filters
        keep; None where it is that of all classes, or not asked for.
      top: [R, 1] the largest logit, of all shards; None where no log-probability is
        asked for.
    """

    class_id: jax.Array
    log_sum: jax.Array | None = None
    top: jax.Array | None = None


def draw_rows(
    static_tau: float | None,
    words: jax.Array,
    rows: Rows,
    chosen: filters.Filters = filters.NONE,
    first: int | None = None,
    shard: ClassShard = WHOLE,
) -> jax.Array:
    """Draws a class of each row.

    Args:
      static_tau: the temperature if it is static.
      words: [R, 2], see `noise.row_words`.
      rows: the logits.
      chosen: the filters.
      first: how many first classes of a row hold all that top_k keeps, if known.
      shard: which classes these are, of more than 128.

    Returns:
      [R] int32; -1 where there is no class, or a NaN, or a filter out of its range.
    """
    if not rows.logits.shape[0]:
        return jnp.zeros(0, jnp.int32)
    return _draw(static_tau, words, rows, chosen, first, shard).class_id


def _draw(
    static_tau: float | None,
    words: jax.Array,
    rows: Rows,
    chosen: filters.Filters,
    first: int | None,
    shard: ClassShard,
    with_log_prob: bool = False,
) -> Drawn:
    """Draws a class of each of some rows; see `draw_rows`."""
    count, classes = rows.logits.shape[0], shard.classes(rows.logits)
    few, keeps_all = classes <= _FEW, _keeps_all(chosen)
    if _is_one_pass(chosen, classes, shard):
        tau = rows.temperature(static_tau)
        block = block_sampling.block_size(classes)
        x, where = rows.logits, rows.where
        if count <= 2 * tile_rows(classes):
            # Sums of whole blocks are one reduction.
            x, where = rejection.whole_blocks(rows.numbers()), None
        return Drawn(block_sampling.draw_row(x, where, tau, words, block))
    size = None
    if first is not None and first <= _MOST and not few:
        size = groups.group_size(classes, first)
    if first is not None and size is not None:
        some, ids = groups.first_classes(rows, first, size, shard)
        if chosen.top_n_sigma is not None:
            some, chosen = _within(rows, some, chosen, shard)
        arrays = (words, Rows(some, rows.tau, None), chosen)
        place, *others = _draw_of_few(static_tau, with_log_prob, True, arrays)
        *_, take = block_sampling.columns(jnp.maximum(place, 0)[:, None], 1, first)
        return Drawn(jnp.where(place < 0, -1, take(ids)[:, 0]), *others)
    arrays = (words, rows, chosen)
    if shard.axes:
        return _draw_of_many(static_tau, first, with_log_prob, False, arrays, shard)
    if few:
        draw = tiled = functools.partial(_draw_of_few, static_tau, with_log_prob, False)
    else:
        draw, tiled = (
            functools.partial(_draw_of_many, static_tau, first, with_log_prob, fill)
            for fill in (False, True)
        )
    # Of few classes all pairs are looked at, of many several passes over a row are
    # made: in cache, and a row for each of a few cores. Two tiles are one, since what a
    # loop slices takes long to compile.
    size = tile_rows(classes * classes if few and not keeps_all else classes, 4)
    size = count if count <= 2 * size else size
    if few and count == size:
        return draw(arrays)
    return by_platform(
        arrays, cpu=lambda arrays: in_tiles(tiled, arrays, count, size), default=draw
    )


def _is_one_pass(chosen: filters.Filters, classes: int, shard: ClassShard) -> bool:
    """Tells whether rows are drawn from by sums of blocks alone."""
    return _keeps_all(chosen) and classes > _FEW and not shard.axes


def _keeps_all(chosen: filters.Filters) -> bool:
    return all(value is None for value in chosen)


def _within(
    rows: Rows, some: jax.Array, chosen: filters.Filters, shard: ClassShard
) -> tuple[jax.Array, filters.Filters]:
    """Returns what top_n_sigma leaves of the first classes, and the other filters."""
    assert chosen.top_n_sigma is not None
    top = jnp.max(some, axis=1, keepdims=True)
    half = filters.reach(rows.numbers(), top, chosen.top_n_sigma, shard)
    return filters.within(some, top, half), chosen._replace(top_n_sigma=None)


def _draw_of_few(
    static_tau: float | None,
    with_log_prob: bool,
    is_sorted: bool,
    arrays: tuple[jax.Array, Rows, filters.Filters],
) -> Drawn:
    words, rows, chosen = arrays
    tau = rows.temperature(static_tau)
    x = rows.numbers()
    x = jnp.where(jnp.isnan(x), jnp.inf, x)
    weights = filters.keep(x, tau, chosen, is_sorted)
    total = jnp.sum(weights, axis=1)
    at = block_sampling.place(words, numerics.is_zero(tau, x.dtype), x.dtype)
    found = block_sampling.invert(at.order(weights), at.share * total)
    lost = ~(total > 0) | filters.out_of_range(chosen)[:, 0]
    class_id = jnp.where(lost, -1, at.column(found, x.shape[1]))
    if not with_log_prob:
        return Drawn(class_id)
    top = x[:, :1] if is_sorted else jnp.max(x, axis=1, keepdims=True)
    return Drawn(class_id, None if _keeps_all(chosen) else jnp.log(total), top)


def _draw_of_many(
    static_tau: float | None,
    first: int | None,
    with_log_prob: bool,
    fill: bool,
    arrays: tuple[jax.Array, Rows, filters.Filters],
    shard: ClassShard = WHOLE,
) -> Drawn:
    words, rows, chosen = arrays
    tau = rows.temperature(static_tau)
    x = rows.numbers()
    # A tile is copied anyway: its last block may as well be whole.
    x = rejection.whole_blocks(x) if fill else x
    x, shard = shard.aligned(x, shard.block(x))
    prepared = rejection.prepare(x, tau, chosen, first, shard)
    class_id = rejection.draw(words, prepared, tau, chosen)
    if not with_log_prob:
        return Drawn(class_id)
    if _keeps_all(chosen):
        return Drawn(class_id, None, prepared.top)
    total = kept_sum.kept_sum(prepared, tau, chosen)
    return Drawn(class_id, jnp.log(total)[:, 0], prepared.top)
