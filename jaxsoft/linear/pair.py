"""The divergence of two softmax layers over their tiles, and its derivative.

Two streams: the first gives the statistics of student and teacher, the second, over
both layers' tiles at once, the divergence class by class, in terms that do not
cancel (`divergence_terms.py`).
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxsoft._core import mesh_axes
from jaxsoft._core.divergence_terms import difference, excess, half_scaled, half_step
from jaxsoft._core.temperature import (
    Temperature,
    divide_by_temperature,
    finite,
    inverse,
    is_zero,
)
from jaxsoft.linear import derivative, sharding, tiling, xla, xla_backward
from jaxsoft.linear.folding import Foldable
from jaxsoft.linear.operands import Config, Operands

__all__ = ["Divergence", "Pair", "distillation"]

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """What is known of two layers and their divergence at trace time.

    Attributes:
      divergence: which one.
      student: the student's configuration.
      teacher: the teacher's.
    """

    divergence: Divergence
    student: Config
    teacher: Config

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """The mesh axes that the classes are sharded over."""
        return self.student.vocab_axes

    def over(self, vocab_axes: tuple[str, ...]) -> "Pair":
        """Returns the same pair with its classes sharded."""
        return dataclasses.replace(
            self,
            student=self.student.over(vocab_axes),
            teacher=self.teacher.over(vocab_axes),
        )

    def roles(self, student: Operands, teacher: Operands) -> Any:
        """The roles of the arrays; the two layers' features are not the same."""
        other = teacher.roles(self.teacher)
        other = jax.tree.map(lambda role: role.replace("h", "g"), other)
        return student.roles(self.student), other

    def tiles(self, student: Operands) -> tiling.Tiling:
        """The tiles of the second stream: two of them share the budget."""
        budget = max(self.student.tile_bytes // 2, 1)
        config = dataclasses.replace(self.student, tile_bytes=budget)
        return xla.tiles_of(config, student)


def distillation(pair: Pair, student: Operands, teacher: Operands) -> jax.Array:
    """Returns τ² times the divergence of every row, [N].

    Args:
      pair: what is known at trace time.
      student: the student's arrays, all rows in one axis.
      teacher: the teacher's; its `tau` is the student's, and has no gradient here.

    Returns:
      The losses, differentiable in both layers' float arrays and the student's `tau`.
    """
    return _Distillation(pair)(student, teacher)


class _Rows(NamedTuple):
    """What the first stream gives of each row, [N] each."""

    student_max: jax.Array
    student_total: jax.Array
    teacher_max: jax.Array
    teacher_total: jax.Array


class _Sums(NamedTuple):
    """What the second stream gives of each row, [N] each.

    Attributes:
      loss: τ² times the divergence.
      student: the mean of the student's log-ratios; see `_Side`.
      teacher: that of the teacher's.
    """

    loss: jax.Array
    student: jax.Array
    teacher: jax.Array


@dataclasses.dataclass(frozen=True)
class _Distillation(Foldable):
    """The loss of each row."""

    pair: Pair

    def call(self, student: Operands, teacher: Operands) -> jax.Array:
        return _forward(self.pair, student, teacher)[0].loss

    def roles(self, student: Operands, teacher: Operands) -> Any:
        return self.pair.roles(student, teacher)

    def out_roles(self, *args: Any) -> Any:
        del args
        return "n"

    def differentiable(self, student: Operands, teacher: Operands) -> Any:
        wanted = xla_backward.Wanted.of
        return functools.partial(
            _differentiable,
            self.pair,
            wanted(student),
            wanted(teacher)._replace(tau=False),
        )


@dataclasses.dataclass(frozen=True)
class _Forward(_Distillation):
    """The loss and what its derivative needs."""

    def call(self, student: Operands, teacher: Operands) -> Any:
        return _forward(self.pair, student, teacher)

    def out_roles(self, *args: Any) -> Any:
        del args
        return _Sums._make(["n"] * 3), _Rows._make(["n"] * 4)


@dataclasses.dataclass(frozen=True)
class _Backward(Foldable):
    """The gradients of one of the two layers."""

    pair: Pair
    wanted: xla_backward.Wanted
    of_teacher: bool

    @property
    def partial(self) -> bool:
        return True

    def call(self, student, teacher, sums, rows, cotangent) -> Any:
        return _backward(self, student, teacher, sums, rows, cotangent)

    def roles(self, student, teacher, sums, rows, cotangent) -> Any:
        del sums, rows, cotangent
        pair = self.pair.roles(student, teacher)
        return *pair, _Sums._make(["n"] * 3), _Rows._make(["n"] * 4), "n"

    def out_roles(self, *args: Any) -> Any:
        del args
        config = self.pair.teacher if self.of_teacher else self.pair.student
        roles = self.wanted.roles(config)
        if not self.of_teacher:
            return roles
        return jax.tree.map(lambda role: role.replace("h", "g"), roles)


class _Side(NamedTuple):
    """A layer's part in a tile of the divergence, [R, B] each.

    The derivative by the layer's logits is -weight · p (s - Σ p s) or, where `slope` is
    known, that.

    Attributes:
      prob: p, the layer's probabilities.
      ratio: s, τ times a log-ratio of probabilities.
      weight: a factor.
      slope: the derivative, or None.
    """

    prob: jax.Array
    ratio: jax.Array
    weight: float
    slope: jax.Array | None = None

    def derivative(self, mean: jax.Array) -> jax.Array:
        """Returns the derivative by the logits, from Σ p s [R, 1]."""
        if self.slope is not None:
            return self.slope
        return -self.weight * self.prob * (self.ratio - mean)

    def total(self) -> jax.Array:
        """Returns Σ p s over the tile, [R, 1]; 0 where it is not needed."""
        if self.slope is not None:
            return jnp.zeros((self.prob.shape[0], 1), self.prob.dtype)
        return jnp.sum(self.prob * self.ratio, axis=1, keepdims=True)


def _terms(
    divergence: Divergence, tau: float | jax.Array, u_s, u_t, rows: _Rows
) -> tuple[jax.Array, _Side, _Side]:
    """Returns the divergence class by class, τ² included, and each layer's side.

    Args:
      divergence: which one.
      tau: a float or [R, 1].
      u_s: [R, B] the student's logits.
      u_t: [R, B] the teacher's.
      rows: the statistics of the rows.

    Returns:
      The terms, the student's side and the teacher's.
    """
    rows = _Rows._make(field[:, None] for field in rows)
    value = Temperature.prepare(tau, u_s.dtype).value
    peak_s = jnp.where(rows.student_max == -jnp.inf, 0, rows.student_max)
    peak_t = jnp.where(rows.teacher_max == -jnp.inf, 0, rows.teacher_max)
    c_s = divide_by_temperature(u_s, peak_s, tau)
    c_t = divide_by_temperature(u_t, peak_t, tau)
    q, p = jnp.exp(c_s) / rows.student_total, jnp.exp(c_t) / rows.teacher_total
    kept_s, kept_t = u_s != -jnp.inf, u_t != -jnp.inf
    both, some = kept_s & kept_t, kept_s | kept_t
    gap = jnp.where(both, (u_s - peak_s) - (u_t - peak_t), 0)
    # XLA may contract the difference of the quotients: equal logits keep 0.
    delta = jnp.where(both & (gap != 0), c_s - c_t, 0)
    delta = jnp.where(jnp.isnan(delta), 0, delta)
    # From the ratio of the sums: the difference of their logarithms has fewer digits.
    shift = jnp.log(rows.student_total / rows.teacher_total)
    d = jnp.where(both, delta - shift, jnp.where(kept_s, jnp.inf, -jnp.inf))
    d = jnp.where(some, d, 0)
    scaled = finite(d) * value
    student_ratio = jnp.where(q == 0, 0, -finite(scaled))
    teacher_ratio = jnp.where(p == 0, 0, finite(scaled))
    if divergence == "forward_kl":
        loss = excess(p, q, d, scaled, value)
        slope = difference(p, q, d, scaled, value)
        student = _Side(q, student_ratio, 1.0, slope)
        return loss, student, _Side(p, teacher_ratio, 1.0)
    if divergence == "reverse_kl":
        loss = excess(q, p, -d, -scaled, value)
        slope = difference(q, p, -d, -scaled, value)
        teacher = _Side(p, teacher_ratio, 1.0, slope)
        return loss, _Side(q, student_ratio, 1.0), teacher
    # log(r / p) and log(r / q) for the mixture r.
    r = (p + q) / 2
    scaled_p, scaled_q = half_scaled(d, scaled), half_scaled(-d, -scaled)
    loss = excess(p, r, half_step(d), scaled_p, value)
    loss += excess(q, r, half_step(-d), scaled_q, value)
    student = _Side(q, jnp.where(q == 0, 0, finite(scaled_q)), 0.5)
    return loss / 2, student, _Side(p, jnp.where(p == 0, 0, finite(scaled_p)), 0.5)


def _forward(pair: Pair, student: Operands, teacher: Operands):
    """Returns the sums of each row, and the statistics of the first stream."""
    of_student = xla.forward(pair.student, student)
    of_teacher = xla.forward(pair.teacher, teacher)
    total_s = of_student.total
    rows = _Rows(
        of_student.fields.max, total_s, of_teacher.fields.max, of_teacher.total
    )
    tiles = pair.tiles(student)

    def start(count):
        return _Sums._make([jnp.zeros((count, 1), total_s.dtype)] * 3)

    def step(part, more, index, sums):
        teacher, rows = more
        u_s = xla.compute_tile(pair.student, part, tiles, index).logits
        u_t = xla.compute_tile(pair.teacher, teacher, tiles, index).logits
        tau = part.temperature(pair.student)
        loss, of_student, of_teacher = _terms(pair.divergence, tau, u_s, u_t, rows)
        return _Sums(
            sums.loss + jnp.sum(loss, axis=1, keepdims=True),
            sums.student + of_student.total(),
            sums.teacher + of_teacher.total(),
        )

    more = mesh_axes.like((teacher, rows), student)
    sums = xla.fold(pair.student, student, start, step, more, tiles)
    # Before the shards meet: their temperatures are equal, but not known to be.
    tau = student.temperature(pair.student)
    zero = is_zero(tau, total_s.dtype)
    sums = jax.tree.map(lambda a: jnp.where(zero, 0, a), sums)
    total = sharding.add(sums._asdict(), pair.vocab_axes)
    return _Sums._make(total[name][:, 0] for name in _Sums._fields), rows


def _backward(call: _Backward, student, teacher, sums, rows, cotangent) -> Any:
    """Returns the gradients of one layer and, with the student's, of τ."""
    pair, wanted = call.pair, call.wanted
    tiles = pair.tiles(student)
    dtype = sums.loss.dtype
    configs, layers = [pair.student, pair.teacher], [student, teacher]
    if call.of_teacher:
        configs.reverse()
        layers.reverse()
    tau = student.temperature(pair.student)
    # The limit has no gradient.
    zero = is_zero(tau, dtype)
    cotangent = jnp.where(zero, 0, cotangent[:, None])[:, 0]

    def share(part, more, tile, index):
        other, rows, sums, cotangent = more
        logits = [tile.logits, xla.compute_tile(configs[1], other, tiles, index).logits]
        if call.of_teacher:
            logits.reverse()
        tau = part.temperature(configs[0])
        u_s, u_t = logits
        _, *sides = _terms(pair.divergence, tau, u_s, u_t, rows)
        means = (sums.student[:, None], sums.teacher[:, None])
        slopes = [side.derivative(m) for side, m in zip(sides, means, strict=True)]
        moments = None
        if wanted.tau:
            # Euler: the loss is homogeneous of degree 2 in logits and temperature.
            peaks = (rows.student_max, rows.teacher_max)
            first, second = map(_product, slopes, logits, peaks)
            moments = first + second
        slope = slopes[1 if call.of_teacher else 0]
        return xla_backward.Share(slope * cotangent[:, None], moments)

    more = mesh_axes.like((layers[1], rows, sums, cotangent), layers[0])
    gradients, moments = xla_backward.accumulate(
        configs[0], layers[0], wanted, share, more, tiles=tiles
    )
    if moments is not None:
        first = sharding.once(2 * sums.loss, pair.vocab_axes)
        change = finite((first - moments[:, 0])[:, None]) * inverse(tau, dtype)
        gradients = gradients._replace(tau=change[:, 0] * cotangent)
    return gradients


def _product(slope: jax.Array, logits: jax.Array, peak: jax.Array) -> jax.Array:
    """Returns the sum of a tile's slopes times centred logits, [R, 1]."""
    peak = jnp.where(peak == -jnp.inf, 0, peak)[:, None]
    terms = jnp.where(slope == 0, 0, slope * (logits - peak))
    return jnp.sum(terms, axis=1, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(pair, of_student, of_teacher, student, teacher) -> jax.Array:
    del of_student, of_teacher
    return _Forward(pair)(student, teacher)[0].loss


def _fwd(pair, of_student, of_teacher, student, teacher):
    del of_student, of_teacher
    student, teacher = derivative.values((student, teacher))
    sums, rows = _Forward(pair)(student, teacher)
    return sums.loss, (student, teacher, sums, rows)


def _bwd(pair, of_student, of_teacher, residuals, cotangent):
    student, teacher, sums, rows = residuals
    cotangent = derivative.nonzero(cotangent)
    none = Operands._make([None] * len(student))
    if cotangent is None:
        return none, none
    saved = mesh_axes.like((sums, rows, cotangent), student)

    def gradients(wanted, is_teacher):
        if not any(wanted):
            return none
        return _Backward(pair, wanted, is_teacher)(
            student, teacher, *saved
        ).of_operands()

    return gradients(of_student, False), gradients(of_teacher, True)


_differentiable.defvjp(_fwd, _bwd, symbolic_zeros=True)
