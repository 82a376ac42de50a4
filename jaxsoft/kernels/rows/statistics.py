"""Log-softmax, log-sum-exp, entropy and losses of rows by hand-written kernels.

One kernel finds a few numbers of each row in one read of the logits: the largest, the
sum of exponentials and, on request, the means of centred logits. Another finds the
first two and writes log-probabilities. All derivatives are plain XLA, of either mode
and any order: given these numbers they are formulas of one class at a time, which XLA
fuses, in reverse mode, into one read of the logits and one write; log-softmax reads its
cotangents twice.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxsoft._core import mesh_axes, numerics, registry
from jaxsoft._core.numerics import divide_stored, finite, inverse, over_temperature
from jaxsoft.kernels.rows.binding import RowPlan, RowPrimitive, prepare
from jaxsoft.logits.arguments import has_no_tangent, pick_temperature
from jaxsoft.logits.rows import Rows, to_rows
from jaxsoft.logits.softmax import nonzero, over_temperatures, visible

__all__ = ["cross_entropy_statistics", "entropy", "log_softmax", "logsumexp"]


class _Numbers(NamedTuple):
    """What is known of rows, [R, 1] float32 each; c is (x - m) / τ.

    Attributes:
      peak: the largest logit m, the lowest finite number if there is none; it has no
        derivative.
      total: Σ exp(c), 0 if no class is kept.
      lse: log Σ exp(x / τ).
      entropy: of the row, or None.
      expected: Σ p c, or None.
      mean: the mean of c over the kept classes, or None.
      number: how many these are, at least 1, or None.
      label: c of the row's label, NaN where there is no such class, or None. Such a
        label has no slope.
    """

    peak: jax.Array
    total: jax.Array
    lse: jax.Array
    entropy: jax.Array | None
    expected: jax.Array | None
    mean: jax.Array | None
    number: jax.Array | None
    label: jax.Array | None

    def log_total(self) -> jax.Array:
        """Returns log Σ exp(c), 0 if no class is kept."""
        return jnp.log(nonzero(self.total))


def log_softmax(
    implementation: str,
    logits: ArrayLike,
    temperature: ArrayLike,
    axis: int,
    where: ArrayLike | None,
) -> jax.Array:
    """Returns log-probabilities; the arguments are those of `jaxsoft.log_softmax`.

    Raises:
      NotImplementedError: for a dtype that the kernels do not have.
    """
    static_tau, rows, back = to_rows(logits, temperature, axis, where)
    registry.check_dtype("rows_log", implementation, "logits", rows.logits.dtype)
    return back(_log_compiled(RowPlan(implementation, static_tau), rows))


def logsumexp(
    implementation: str,
    logits: ArrayLike,
    temperature: ArrayLike,
    axis: int,
    where: ArrayLike | None,
) -> jax.Array:
    """Returns log-sum-exps; the arguments are those of `jaxsoft.logsumexp`.

    Raises:
      NotImplementedError: for a dtype that the kernels do not have.
    """
    static_tau, rows, back = to_rows(logits, temperature, axis, where)
    found = _compiled(RowPlan(implementation, static_tau), rows, None)
    return back(found.lse[:, 0])


def entropy(
    implementation: str,
    logits: ArrayLike,
    temperature: ArrayLike,
    axis: int,
    where: ArrayLike | None,
) -> jax.Array:
    """Returns entropies; the arguments are those of `jaxsoft.entropy`.

    Raises:
      NotImplementedError: for a dtype that the kernels do not have.
    """
    static_tau, rows, back = to_rows(logits, temperature, axis, where)
    plan = RowPlan(implementation, static_tau, expected=True)
    found = _compiled(plan, rows, None)
    assert found.entropy is not None
    return back(found.entropy[:, 0])


def cross_entropy_statistics(
    implementation: str,
    logits: jax.Array,
    temperature: float | jax.Array,
    axis: int,
    where: jax.Array | None,
    labels: jax.Array,
    has_mean: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what cross-entropies are made of, each 0 in rows without a kept class.

    Args:
      implementation: the kernels.
      logits: [..., V] with the classes on `axis`.
      temperature: as `jaxsoft.softmax_cross_entropy` takes it.
      axis: the class axis.
      where: booleans that broadcast to `logits`, or None.
      labels: [...] integers.
      has_mean: whether the mean is wanted; without it that is 0.

    Returns:
      [...] float32 each: the log-sum-exp; log p of the label, NaN where there is no
      such class; and the mean over kept classes of log p.

    Raises:
      NotImplementedError: for a dtype that the kernels do not have.
    """
    static_tau, rows, back = to_rows(logits, temperature, axis, where)
    plan = RowPlan(implementation, static_tau, mean=has_mean)
    found = _compiled(plan, rows, labels.reshape(-1, 1))
    assert found.label is not None
    mean = jnp.zeros_like(found.lse)
    if found.mean is not None:
        mean = found.mean - found.log_total()
    picked = found.label - found.log_total()
    lse, picked, mean = (
        back(jnp.where(found.total == 0, 0, a)[:, 0]) for a in (found.lse, picked, mean)
    )
    return lse, picked, mean


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _log_compiled(plan: RowPlan, rows: Rows) -> jax.Array:
    """Calls the kernel that writes, where there are rows."""
    if not rows.logits.size:
        return rows.logits
    plan, x, tau = prepare(plan, rows)
    x, tau = mesh_axes.like((x, tau), (x, tau))
    return _log_rows(plan, x, tau)[0]


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _compiled(plan: RowPlan, rows: Rows, labels: jax.Array | None) -> _Numbers:
    """Calls the kernel that finds numbers, where there are rows."""
    dtype = rows.logits.dtype
    registry.check_dtype("rows_statistics", plan.implementation, "logits", dtype)
    plan, x, tau = prepare(plan, rows)
    if not x.size:
        none = jnp.zeros((0, 1), jnp.float32)
        return _Numbers(*(none for _ in _Numbers._fields))
    x, tau, labels = mesh_axes.like((x, tau, labels), (x, tau, labels))
    return _numbers(plan, x, tau, labels)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_rows(plan, x, tau):
    """Returns log p [R, V]; and the peak and the total of `_Numbers`."""
    y, found = _log_primitive(plan, x, tau)
    return y, found[:, :1], found[:, 1:]


def _log_rows_jvp(plan, primals, tangents):
    """Returns u - Σ p u, with u = (dx - c dτ) / τ; logits that are -inf do not move."""
    x, tau = primals
    dx, dtau = tangents
    y, peak, total = _log_rows(plan, *primals)
    known = _Known(plan, x, tau, None, peak, total)
    moved = jnp.zeros_like(known.c)
    if not has_no_tangent(dx):
        moved += jnp.where(x == -jnp.inf, 0, dx.astype(jnp.float32)) * known.inverse_tau
    if not has_no_tangent(dtau):
        c = jnp.where(known.c == -jnp.inf, 0, known.c)
        moved -= c * (dtau * known.inverse_tau)
    of_p = _sum(known.p * moved)
    tangents = (moved - of_p).astype(y.dtype), jnp.zeros_like(peak), total * of_p
    return (y, peak, total), tangents


_log_rows.defjvp(_log_rows_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _numbers(plan, x, tau, labels):
    """Returns `_Numbers` of logits [R, V] and labels [R, 1] or None."""
    (found,) = _statistics_primitive(plan, x, tau)
    peak, total, *others = (found[:, i : i + 1] for i in range(found.shape[1]))
    temperature = pick_temperature(plan.static_tau, tau)
    at_peak = over_temperature(peak, temperature)
    log_total = jnp.log(nonzero(total))
    # About an infinite peak the sum is NaN: inf - inf. It is known without the sum.
    lse = jnp.where(peak == jnp.inf, at_peak, at_peak + log_total)
    lse = jnp.where(total == 0, -jnp.inf, lse)
    entropy = expected = mean = number = label = None
    if plan.expected:
        weighted, *others = others
        expected = weighted / nonzero(total)
        entropy = log_total - expected
    if plan.mean:
        gap, number = others
        number = jnp.maximum(number, 1)
        mean = gap / number
    if labels is not None:
        label = divide_stored(_at_label(x, labels), peak, temperature)
        label = numerics.nan_where(_outside(x, labels), label)
    return _Numbers(peak, total, lse, entropy, expected, mean, number, label)


def _numbers_jvp(plan, primals, tangents):
    """Returns the numbers, and how they move with u = (dx - c dτ) / τ."""
    x, tau, labels = primals
    dx, dtau, _ = tangents
    out = _numbers(plan, *primals)
    known = _Known(plan, x, tau, labels, out.peak, out.total)
    moved = jax.tree.map(jnp.zeros_like, out)
    if not has_no_tangent(dx):
        u = dx.astype(jnp.float32) * known.inverse_tau
        moved = _add(moved, _moved_by_logits(known, out, u))
    if not has_no_tangent(dtau):
        slope = functools.partial(over_temperatures, known.inverse_tau, dtau)
        by = _moved_by_temperature(known, out)
        moved = _add(moved, jax.tree.map(slope, by))
    return out, moved


_numbers.defjvp(_numbers_jvp, symbolic_zeros=True)


class _Known:
    """What derivatives need of rows.

    Attributes:
      x: the logits [R, V].
      labels: [R, 1], or None.
      temperature: τ.
      c: the centred logits [R, V], float32.
      p: the probabilities [R, V].
      inverse_tau: 1/τ, 0 at both limits.
    """

    def __init__(self, plan: RowPlan, x, tau, labels, peak, total):
        """Computes all of it from the row's peak and total."""
        self.x, self.labels = x, labels
        self.temperature = pick_temperature(plan.static_tau, tau)
        self.c = divide_stored(x.astype(jnp.float32), peak, self.temperature)
        self.p = jnp.exp(self.c) * (1 / nonzero(total))
        self.inverse_tau = inverse(self.temperature, jnp.dtype(jnp.float32))


def _moved_by_logits(known: _Known, out: _Numbers, u: jax.Array) -> _Numbers:
    """Returns how numbers move where the logits over τ move by u."""
    of_p = _sum(known.p * u)
    zero = jnp.zeros_like(of_p)
    entropy = expected = mean = number = label = None
    if out.expected is not None:
        of_excess = _sum(known.p * (visible(known.c) - out.expected) * u)
        entropy, expected = -of_excess, of_excess + of_p
    if out.number is not None:
        kept = known.x != -jnp.inf
        mean = _sum(jnp.where(kept, u, 0)) / out.number
        number = zero
    if known.labels is not None:
        # A label of a dropped class has no slope, as if it were none of the classes.
        dropped = _at_label(known.x, known.labels) == -jnp.inf
        ids = jnp.where(dropped, -1, known.labels.astype(jnp.int32))
        picks = jax.lax.broadcasted_iota(jnp.int32, u.shape, 1) == ids
        label = _sum(jnp.where(picks, u, 0))
    return _Numbers(
        zero, out.total * of_p, of_p, entropy, expected, mean, number, label
    )


def _moved_by_temperature(known: _Known, out: _Numbers) -> _Numbers:
    """Returns how numbers move, times τ, where τ does."""
    c = visible(known.c)
    of_c = _sum(known.p * c) if out.expected is None else out.expected
    at_peak = over_temperature(out.peak, known.temperature)
    lse = jnp.where(out.total == 0, 0, -finite(at_peak + of_c))
    zero = jnp.zeros_like(of_c)
    entropy = expected = mean = number = label = None
    if out.expected is not None:
        of_excess = _sum(known.p * (c - of_c) * c)
        entropy, expected = of_excess, -(of_excess + of_c)
    if out.mean is not None:
        mean, number = -finite(out.mean), zero
    if known.labels is not None:
        assert out.label is not None
        outside = _outside(known.x, known.labels)
        label = jnp.where(outside, 0, -finite(out.label))
    return _Numbers(
        zero, -out.total * of_c, lse, entropy, expected, mean, number, label
    )


def _at_label(x: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the logits of labels, [R, 1] float32; of the nearest class beyond V."""
    index = jnp.clip(labels, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, index, 1).astype(jnp.float32)


def _outside(x: jax.Array, labels: jax.Array) -> jax.Array:
    return (labels < 0) | (labels >= x.shape[1])


def _sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values, 1, keepdims=True)


def _add(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


_log_primitive = RowPrimitive("jaxsoft_log_softmax", "rows_log")
_statistics_primitive = RowPrimitive("jaxsoft_row_statistics", "rows_statistics")
