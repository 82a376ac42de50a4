"""The divergence of two softmax layers over their tiles, and its derivative.

Two streams: the first gives the statistics of student and teacher, the second, over
both layers' tiles at once, the divergence class by class, in terms that do not
cancel (`_core/divergence.py`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from jaxsoft._core import mesh_axes
from jaxsoft._core.divergence import (
    HALVES,
    Kind,
    Mixture,
    difference,
    excess,
    mixture_terms,
)
from jaxsoft._core.numerics import (
    divide_by_temperature,
    finite,
    finite_peak,
    inverse,
    is_zero,
    largest_finite,
)
from jaxsoft.linear.arguments import Axes, Config, Operands, axes_of
from jaxsoft.linear.fold import Fold
from jaxsoft.linear.folds.statistics import Fields, Rows, Saved, Statistics
from jaxsoft.linear.folds.two_temperatures import TwoTemperatures
from jaxsoft.linear.gradients import Into, Share, Wanted, accumulate
from jaxsoft.linear.kept import Keep, Kept, KeptTile, Place
from jaxsoft.linear.plans import Layer, Plan, Tiling
from jaxsoft.linear.tiles import (
    Tile,
    compute_tile,
    fold_tiles,
    layer_of,
    map_rows,
    tiles_of_layer,
)

__all__ = ["Layers", "Losses", "TwoLayers"]

# Up to this temperature the rounding of a ratio of two sums, times τ, is no more than
# that of a logit of this size.
_WARM = 16.0


class Layers(NamedTuple):
    """The arrays of a call.

    Attributes:
      student: the student's.
      teacher: the teacher's; its `tau` is the student's, and has no gradient here.
    """

    student: Operands
    teacher: Operands


class _Rows(NamedTuple):
    """What the first stream gives of each row, [N] each.

    Attributes:
      student_max: the student's largest logit.
      student_total: its Σ exp(c).
      teacher_max: the teacher's largest logit.
      teacher_total: its Σ exp(c).
      shift: the logarithm of the student's sum over the teacher's.
      scaled_shift: τ times that.
      common: of that what the logits make, and not the numbers of classes.
    """

    student_max: Annotated[jax.Array, Axes("n")]
    student_total: Annotated[jax.Array, Axes("n")]
    teacher_max: Annotated[jax.Array, Axes("n")]
    teacher_total: Annotated[jax.Array, Axes("n")]
    shift: Annotated[jax.Array, Axes("n")]
    scaled_shift: Annotated[jax.Array, Axes("n")]
    common: Annotated[jax.Array, Axes("n")]

    @classmethod
    def of(cls, student: Saved, teacher: Saved, tau: float | jax.Array) -> "_Rows":
        """Returns them, of both layers' statistics and a float or [N] temperatures."""
        totals = student.total, teacher.total
        # From the ratio of the sums: the difference of their logarithms has fewer
        # digits.
        shift = jnp.log(totals[0] / totals[1])
        value = largest_finite(tau, shift.dtype)
        shifts = _Shifts(shift, value * shift, value * shift)
        if student.fields.growth is not None:
            shifts = _shifts_of_growth(tau, value, student, teacher, shifts)
        peaks = student.fields.max, teacher.fields.max
        return cls(peaks[0], totals[0], peaks[1], totals[1], *shifts)


class _Shifts(NamedTuple):
    """The last three of `_Rows`."""

    shift: jax.Array
    scaled_shift: jax.Array
    common: jax.Array


def _shifts_of_growth(
    tau: float | jax.Array,
    value: jax.Array,
    student: Saved,
    teacher: Saved,
    of_sums: _Shifts,
) -> _Shifts:
    """Returns the shifts, by the growths where both sums are near n.

    With g the mean of τ (exp(c) - 1) over n classes, Σ exp(c) is n (1 + g / τ): neither
    its logarithm nor τ times that loses a digit, at any temperature.

    Args:
      tau: τ.
      value: τ, the largest finite number at τ = ∞.
      student: the student's statistics.
      teacher: the teacher's.
      of_sums: the shifts, from the sums.
    """
    over = inverse(tau, of_sums.shift.dtype)

    def of_mean(saved: Saved) -> tuple[jax.Array, jax.Array, jax.Array]:
        assert saved.fields.growth is not None
        growth = finite(saved.fields.growth)
        step = growth * over
        is_near = step >= -0.5
        step = jnp.where(is_near, step, 0)
        log, safe = jnp.log1p(step), jnp.where(step == 0, 1, step)
        return is_near, log, growth * jnp.where(step == 0, 1, log / safe)

    near_s, log_s, scaled_s = of_mean(student)
    near_t, log_t, scaled_t = of_mean(teacher)
    assert student.number is not None and teacher.number is not None
    log_numbers = jnp.log1p((student.number - teacher.number) / teacher.number)
    near = near_s & near_t
    # XLA may contract the differences: equal layers keep 0.
    is_same = student.fields.growth == teacher.fields.growth
    near_shift = jnp.where(is_same, 0, log_s - log_t) + log_numbers
    common = jnp.where(is_same, 0, scaled_s - scaled_t)
    of_growth = _Shifts(near_shift, common + value * log_numbers, common)
    return jax.tree.map(functools.partial(jnp.where, near), of_growth, of_sums)


class _Sums(NamedTuple):
    """What the second stream gives of each row, [N] each.

    Attributes:
      loss: τ² times the divergence.
      student: the total of the student's side; see `_Side`.
      teacher: that of the teacher's.
    """

    loss: Annotated[jax.Array, Axes("n")]
    student: Annotated[jax.Array, Axes("n")]
    teacher: Annotated[jax.Array, Axes("n")]


class _Saved(NamedTuple):
    """What the derivative needs of each row."""

    sums: _Sums
    rows: _Rows
    hard: Saved | None = None


class Losses(NamedTuple):
    """What is lost of every row.

    Attributes:
      loss: [N] τ² times the divergence.
      hard: the student's statistics at temperature 1, of labels; None without them.
    """

    loss: Annotated[jax.Array, Axes("n")]
    hard: Fields | None = None


class _Second(NamedTuple):
    """The arrays of the second stream."""

    layers: Layers
    rows: _Rows


# The tile's logits of the student, and of the teacher.
_Logits = tuple[jax.Array, jax.Array]


class _Other(NamedTuple):
    """What the derivative by one layer needs beside that layer."""

    layer: Operands
    rows: _Rows
    sums: _Sums
    cotangent: Annotated[jax.Array, Axes("n")]
    hard: Rows | None


@dataclasses.dataclass(frozen=True)
class TwoLayers(Fold[Layers, _Sums, _Saved, Losses]):
    """The divergence of two layers' distributions, of each row.

    Attributes:
      config: the student's configuration.
      teacher: the teacher's.
      divergence: which one.
    """

    teacher: Config
    divergence: Kind

    def configured(self, change: Callable[[Config], Config]) -> Self:
        config, teacher = change(self.config), change(self.teacher)
        return dataclasses.replace(self, config=config, teacher=teacher)

    def axes(self, arrays: Layers) -> Layers:
        """Returns the axes; the two layers' features are not the same."""
        teacher = axes_of(arrays.teacher, self.teacher.kernel_layout)
        teacher = jax.tree.map(lambda letters: letters.replace("h", "g"), teacher)
        return Layers(axes_of(arrays.student, self.config.kernel_layout), teacher)

    def operands(self, arrays: Layers) -> Operands:
        return arrays.student

    def layer(self, arrays: Layers | _Second) -> Layer:
        """Returns the larger layer's sizes: two of them share the workspace."""
        layers = arrays.layers if isinstance(arrays, _Second) else arrays
        configs = (self.config, self.teacher)
        sizes = [layer_of(c, a, 2) for c, a in zip(configs, layers, strict=True)]
        return max(sizes, key=lambda layer: (layer.features, layer.logit_bytes))

    def tiles(self, arrays: Layers | _Second) -> Tiling:
        return tiles_of_layer(self.config, self.layer(arrays))

    def plan(self, arrays: Layers, moving: Layers, reduced: bool = False) -> Plan:
        """Returns the plan of the derivative.

        Both streams and the derivative need the logits. Where less than half of them
        can be kept for all three, those of a few rows at once are, for the streams.
        """
        plan = super().plan(arrays, moving, reduced)
        is_less = plan.kind == "keep" and 2 * plan.kept_classes < plan.tiles.classes
        if is_less and self._stored_rows(arrays) is not None:
            return Plan("recompute", plan.tiles)
        return plan

    def _stored_rows(self, arrays: Layers) -> tuple[int, Tiling] | None:
        """Returns of how many rows the streams store all logits; None for none."""
        if not self.config.can_keep:
            return None
        return self.layer(arrays).rows_read_twice(self.config.workspace_bytes)

    def room(
        self, arrays: Layers, keep: Keep | None, shards: int = 1
    ) -> tuple[Kept, ...]:
        if keep is None:
            return ()
        configs = (self.config, self.teacher)
        local = zip(configs, self.local(arrays), strict=True)
        return tuple(keep.room(config, layer, shards) for config, layer in local)

    def forward(
        self,
        arrays: Layers,
        keep: Keep | None = None,
        room: tuple[Kept, ...] = (),
    ) -> tuple[_Saved, tuple[Kept, ...]]:
        """Runs both streams, on as many rows at once as have room for all logits."""
        stored = self._stored_rows(arrays) if keep is None else None
        if stored is None:
            return self._streams(arrays, keep, room)
        rows, tiles = stored
        keep = Keep("products", None, (tiles.block_rows, tiles.block_classes))
        fold = self.keeping(keep)

        def saved(part: Layers) -> _Saved:
            return fold._streams(part, keep, fold.room(part, keep))[0]

        return map_rows(saved, arrays, self.layer(arrays).rows, rows), ()

    def _streams(
        self, arrays: Layers, keep: Keep | None, room: tuple[Kept, ...]
    ) -> tuple[_Saved, tuple[Kept, ...]]:
        """Runs the first stream, of each layer, and the second, of both."""
        first, kept, hard = [], (), None
        static_tau = self.config.static_tau
        is_cold = static_tau is not None and static_tau <= _WARM
        wanted = frozenset(() if is_cold else ("growth",))
        rooms = [(each,) for each in room] or [(), ()]
        for config, layer, own in zip(
            (self.config, self.teacher), arrays, rooms, strict=True
        ):
            if layer.labels is None:
                saved, of_layer = Statistics(config, wanted).forward(layer, keep, own)
            else:
                both = TwoTemperatures(config, wanted)
                (saved, hard), of_layer = both.forward(layer, keep, own)
            first.append(saved)
            kept += of_layer
        tau = arrays.student.tau if static_tau is None else static_tau
        assert tau is not None
        rows = _Rows.of(first[0], first[1], tau)
        second = mesh_axes.like(_Second(arrays, rows), arrays.student)
        tiles = self.tiles(second)

        def step(carry: _Sums, part: _Second, place: Place, read: Any) -> Any:
            logits = self._logits(part, tiles, place.index, read)
            return self.step(carry, logits, part), ()

        start = functools.partial(self.start, arrays=second)
        carry, _ = fold_tiles(second, tiles, start, step, kept=kept)
        return self.finish(carry, second)._replace(hard=hard), kept

    def _logits(
        self,
        part: _Second,
        tiles: Tiling,
        index: jax.Array | int,
        kept: tuple[KeptTile, ...],
    ) -> _Logits:
        """Returns the logits of the student and of the teacher."""
        student, teacher = kept or (None, None)
        layers = part.layers
        return (
            compute_tile(
                self.config, layers.student, tiles, index, kept=student
            ).logits,
            compute_tile(
                self.teacher, layers.teacher, tiles, index, kept=teacher
            ).logits,
        )

    def start(self, rows: int, arrays: _Second) -> _Sums:
        dtype = arrays.rows.student_total.dtype
        return _Sums._make([jnp.zeros((rows, 1), dtype)] * 3)

    def step(self, carry: _Sums, tile: _Logits, part: _Second) -> _Sums:
        tau = part.layers.student.temperature(self.config)
        u_s, u_t = tile
        loss, student, teacher = _terms(self.divergence, tau, u_s, u_t, part.rows)
        return _Sums(
            carry.loss + jnp.sum(loss, axis=1, keepdims=True),
            carry.student + student.total(),
            carry.teacher + teacher.total(),
        )

    def finish(self, carry: _Sums, arrays: _Second) -> _Saved:
        # Before the shards meet: their temperatures are equal, but not known to be.
        none = self._have_none(arrays.layers, arrays.rows)
        sums = jax.tree.map(lambda a: jnp.where(none, 0, a), carry)
        total = mesh_axes.add(sums._asdict(), self.config.vocab_axes)
        sums = _Sums._make(total[name][:, 0] for name in _Sums._fields)
        return _Saved(sums, arrays.rows)

    def _have_none(self, layers: Layers, rows: _Rows) -> jax.Array:
        """Tells which rows have neither loss nor gradient, [N, 1].

        They are those of temperature 0, and a row without a distribution teaches
        nothing.
        """
        tau = layers.student.temperature(self.config)
        lacks = rows.teacher_max == -jnp.inf
        if self.divergence != "forward_kl":
            lacks = lacks | (rows.student_max == -jnp.inf)
        return is_zero(tau, rows.student_total.dtype) | lacks[:, None]

    def result(self, saved: _Saved) -> Losses:
        return Losses(saved.sums.loss, saved.hard and saved.hard.fields)

    def gradients(
        self,
        arrays: Layers,
        saved: _Saved,
        cotangents: Losses,
        moving: Layers,
        kept: tuple[Kept, ...] = (),
        into: Into | None = None,
    ) -> Layers:
        of_student, of_teacher = map(Wanted.of, moving)
        # The gradient of both layers' temperature is that of the student's.
        of_teacher = of_teacher._replace(tau=False)

        def of(is_teacher: bool, wanted: Wanted) -> Operands:
            sums = None if into is None else into.of(into.sums[is_teacher])
            return self._gradients(
                arrays, saved, cotangents, wanted, is_teacher, kept, sums
            )

        return Layers(of(False, of_student), of(True, of_teacher))

    def _gradients(
        self,
        arrays: Layers,
        saved: _Saved,
        cotangents: Losses,
        wanted: Wanted,
        is_teacher: bool,
        kept: tuple[Kept, ...],
        into: Into | None,
    ) -> Operands:
        """Returns the gradients of one layer and, with the student's, of τ."""
        if not any(wanted):
            return Operands.gradients()
        configs, layers = [self.config, self.teacher], list(arrays)
        if is_teacher:
            configs.reverse()
            layers.reverse()
            kept = kept[::-1]
        tiles, sums = self.tiles(arrays), saved.sums
        dtype = sums.loss.dtype
        tau = arrays.student.temperature(self.config)
        none = self._have_none(arrays, saved.rows)[:, 0]
        cotangent = cotangents.loss
        if cotangent is None:
            cotangent = jnp.zeros_like(sums.loss)
        cotangent = jnp.where(none, 0, cotangent)
        of_labels, hard = TwoTemperatures(self.config).hard, None
        if not is_teacher and saved.hard is not None and cotangents.hard is not None:
            layers[0] = layers[0].local(self.config)
            hard = of_labels.rows(
                layers[0]._replace(tau=None), saved.hard, cotangents.hard
            )

        def share(
            part: Operands,
            other: _Other,
            tile: Tile,
            index: jax.Array,
            read: tuple[KeptTile, ...],
        ) -> Share:
            second = compute_tile(
                configs[1], other.layer, tiles, index, kept=read[1] if read else None
            )
            logits = [tile.logits, second.logits]
            if is_teacher:
                logits.reverse()
            u_s, u_t = logits
            tau = part.temperature(configs[0])
            _, *sides = _terms(self.divergence, tau, u_s, u_t, other.rows)
            totals = (other.sums.student[:, None], other.sums.teacher[:, None])
            slopes = [s.derivative(t) for s, t in zip(sides, totals, strict=True)]
            moments = None
            if wanted.tau:
                # Euler: the loss is homogeneous of degree 2 in logits and temperature.
                peaks = (other.rows.student_max, other.rows.teacher_max)
                first, second = map(_product, slopes, logits, peaks)
                moments = first + second
            slope = slopes[1 if is_teacher else 0]
            slope = slope * other.cotangent[:, None]
            if other.hard is not None:
                rows = other.hard.columns()
                slope = slope + of_labels.slope(1.0, rows, tile, False)[0]
            return Share(slope, moments)

        other = _Other(layers[1], saved.rows, sums, cotangent, hard)
        gradients, moments = accumulate(
            configs[0],
            layers[0],
            wanted,
            share,
            mesh_axes.like(other, layers[0]),
            kept=kept,
            into=into,
            tiles=tiles,
        )
        if moments is not None:
            first = mesh_axes.once(2 * sums.loss, self.config.vocab_axes)
            change = first - moments[:, 0]
            # Where the loss or its slope overflows there is no gradient in τ.
            is_known = jnp.isfinite(change) | jnp.isnan(sums.loss)
            change = jnp.where(is_known, change, 0)[:, None] * inverse(tau, dtype)
            gradients = gradients._replace(tau=change[:, 0] * cotangent)
        return gradients.of_operands()


def _product(slope: jax.Array, logits: jax.Array, peak: jax.Array) -> jax.Array:
    """Returns the sum of a tile's slopes times centred logits, [R, 1]."""
    centred = logits - finite_peak(peak)[:, None]
    terms = jnp.where(slope == 0, 0, slope * centred)
    return jnp.sum(terms, axis=1, keepdims=True)


class _Side(NamedTuple):
    """A layer's part in a tile of the divergence, [R, B] each.

    The derivative by the layer's logits is -p (s - Σ p s) or, where `slope` is known,
    that. An error of all log-ratios together, as that of a ratio of sums, cancels.

    Attributes:
      prob: p, the layer's probabilities.
      ratio: s, τ times a log-ratio of probabilities, or what else it is made of.
      slope: the derivative, whose sum is 0 but for rounding, or None.
    """

    prob: jax.Array
    ratio: jax.Array
    slope: jax.Array | None = None

    def derivative(self, total: jax.Array) -> jax.Array:
        """Returns the derivative by the logits, from the total of a row [R, 1]."""
        if self.slope is None:
            return -self.prob * (self.ratio - total)
        # The sum overflows before the slopes do.
        return self.slope - self.prob * jnp.where(jnp.isfinite(total), total, 0)

    def total(self) -> jax.Array:
        """Returns the sum over the tile of p s or of the known slope, [R, 1]."""
        terms = self.prob * self.ratio if self.slope is None else self.slope
        return jnp.sum(terms, axis=1, keepdims=True)


def _terms(
    divergence: Kind, tau: float | jax.Array, u_s, u_t, rows: _Rows
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
    value, over = largest_finite(tau, u_s.dtype), inverse(tau, u_s.dtype)
    peak_s, peak_t = finite_peak(rows.student_max), finite_peak(rows.teacher_max)
    c_s = divide_by_temperature(u_s, peak_s, tau)
    c_t = divide_by_temperature(u_t, peak_t, tau)
    q, p = jnp.exp(c_s) / rows.student_total, jnp.exp(c_t) / rows.teacher_total
    kept_s, kept_t = u_s != -jnp.inf, u_t != -jnp.inf
    both, some = kept_s & kept_t, kept_s | kept_t
    # Finite, so that dropped classes make no NaN of it.
    lowest = jnp.finfo(u_s.dtype).min
    gap = jnp.maximum(u_s - peak_s, lowest) - jnp.maximum(u_t - peak_t, lowest)
    d = jnp.where(both, gap * over - rows.shift, jnp.where(kept_s, jnp.inf, -jnp.inf))
    d = jnp.where(some, d, 0)
    scaled = jnp.where(both, gap - rows.scaled_shift, finite(d) * value)
    scaled = finite(scaled)
    # What the numbers of classes add to all of them is in no derivative, and would take
    # digits of it. The rest is taken: the totals would be large, and so their rounding.
    ratio = finite(jnp.where(both, gap - rows.common, scaled))
    student_ratio = jnp.where(q == 0, 0, -ratio)
    teacher_ratio = jnp.where(p == 0, 0, ratio)
    if divergence == "forward_kl":
        loss = excess(p, q, d, scaled, value)
        slope = difference(p, q, d, scaled, value)
        student = _Side(q, student_ratio, slope)
        return loss, student, _Side(p, teacher_ratio)
    if divergence == "reverse_kl":
        loss = excess(q, p, -d, -scaled, value)
        slope = difference(q, p, -d, -scaled, value)
        teacher = _Side(p, teacher_ratio, slope)
        return loss, _Side(q, student_ratio), teacher
    mixture = divergence if isinstance(divergence, Mixture) else HALVES
    loss, teacher, student = mixture_terms(mixture, p, q, d, scaled, value)
    return loss, _Side(q, student), _Side(p, teacher)
