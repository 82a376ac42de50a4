"""The statistics of a softmax over the classes of a layer, and all their derivatives.

Each statistic is a class that says how it merges a tile, what its cotangent becomes by
the logits, and nothing else; one stream computes all that are wanted and one backward
pass serves them all. A new one is a class here, its place in `_STATISTICS`, and a field
of `Fields` and of `LogitStatistics`.

With u the logits of a row, m their maximum, τ the temperature and c = (u - m) / τ, the
derivative by the logits has the form

    p (of_p + c·of_pc) + the statistics' own terms

with coefficients of each row. That by τ is -Σ (derivative by u) c.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxsoft._core import mesh_axes, numerics, registry
from jaxsoft._core.divergence import difference
from jaxsoft._core.exporting import exportable_dataclass
from jaxsoft._core.numerics import (
    divide_by_temperature,
    finite,
    finite_peak,
    inverse,
    largest_finite,
    over_temperature,
    times,
)
from jaxsoft.linear import reference
from jaxsoft.linear.arguments import Axes, Call, Operands, fold_rows
from jaxsoft.linear.fold import Fold, stream
from jaxsoft.linear.gradients import Into, Share, Wanted, accumulate
from jaxsoft.linear.kept import Keep, Keeping, Kept, KeptTile
from jaxsoft.linear.plans import Tiling
from jaxsoft.linear.tiles import Tile, turned

__all__ = [
    "Columns",
    "Fields",
    "LogitStatistics",
    "Rows",
    "Saved",
    "Statistics",
    "of_fields",
    "run",
    "statistics",
]

# Numbers of R rows by name, [R, 1] each but `label`, [R, K].
Columns = dict[str, jax.Array]


class Fields(NamedTuple):
    """The centred statistics of each row; None where not wanted. All but label are [N].

    Attributes:
      max: m; -inf in a row without any kept class. No gradient flows through it.
      log_sum: ℓ = log Σ exp(c); 0 in a row without any kept class.
      label: the centred logits of the labels, [N, K].
      mean: the mean of c over kept classes, of the row's group if there are groups; 0
        without any.
      expected: Σ p c.
      argmax: int32, the lowest class that reaches m.
      rest: log Σ exp(c) over the classes that are no labels of the row.
      raw_label: the logits of the labels themselves, [N, K].
      growth: the mean of τ (exp(c) - 1) over kept classes, that of u - m at τ = ∞.
      rank: int32, how many kept classes beat the one label; V without one that is kept.
      top_log_probs: log-probabilities of the best classes, [N, T].
      top_ids: int32, those classes, [N, T].
    """

    max: Annotated[jax.Array, Axes("n")]
    log_sum: Annotated[jax.Array, Axes("n")]
    label: Annotated[jax.Array | None, Axes("nk")] = None
    mean: Annotated[jax.Array | None, Axes("n")] = None
    expected: Annotated[jax.Array | None, Axes("n")] = None
    argmax: Annotated[jax.Array | None, Axes("n")] = None
    rest: Annotated[jax.Array | None, Axes("n")] = None
    raw_label: Annotated[jax.Array | None, Axes("nk")] = None
    growth: Annotated[jax.Array | None, Axes("n")] = None
    rank: Annotated[jax.Array | None, Axes("n")] = None
    top_log_probs: Annotated[jax.Array | None, Axes("nt")] = None
    top_ids: Annotated[jax.Array | None, Axes("nt")] = None


class Saved(NamedTuple):
    """What the derivative needs of the forward pass.

    Attributes:
      fields: the statistics.
      total: Σ exp(c), whose logarithm has fewer digits.
      number: how many classes are kept; None where no mean is wanted.
      rest: Σ exp(c) over classes that are no labels; None where not wanted.
    """

    fields: Fields
    total: Annotated[jax.Array, Axes("n")]
    number: Annotated[jax.Array | None, Axes("n")] = None
    rest: Annotated[jax.Array | None, Axes("n")] = None


class Rows(NamedTuple):
    """What the derivative by a tile's logits needs of each row; None stands for 0.

    Attributes:
      max: m.
      inverse_total: 1 / Σ exp(c).
      of_p: the coefficient of p.
      of_pc: the coefficient of p c.
      label: that of 1[v = label], [N, K].
      mean: that of 1, for kept classes.
      rest: that of exp(c), for classes that are no labels.
      label_prob: p of the one label, [N, 1], where weights are kept.
    """

    max: Annotated[jax.Array, Axes("n")]
    inverse_total: Annotated[jax.Array, Axes("n")]
    of_p: Annotated[jax.Array | None, Axes("n")] = None
    of_pc: Annotated[jax.Array | None, Axes("n")] = None
    label: Annotated[jax.Array | None, Axes("nk")] = None
    mean: Annotated[jax.Array | None, Axes("n")] = None
    rest: Annotated[jax.Array | None, Axes("n")] = None
    label_prob: Annotated[jax.Array | None, Axes("nk")] = None

    def columns(self) -> "Rows":
        """The same with [N, 1] in place of [N]."""
        wide = {"label": self.label, "label_prob": self.label_prob}
        others = self._replace(**dict.fromkeys(wide))
        return jax.tree.map(lambda a: a[:, None], others)._replace(**wide)

    def by_weights(self, saved: Saved) -> "Rows":
        """The same for tiles of which weights are kept."""
        label = saved.fields.label
        if label is None or self.label is None:
            return self
        prob = jnp.exp(label) * self.inverse_total[:, None]
        kept = jnp.where(label == -jnp.inf, 0, self.label)
        return self._replace(label=kept, label_prob=prob)


class _Move(NamedTuple):
    """A row's largest logit moves, and with it the centre of what was summed.

    Attributes:
      old: the largest logit before, [R, 1], or of P parts [P, R, 1].
      new: the largest logit now.
      peak: that, or 0 in a row without any kept class so far, whose c are all -inf.
      back: (old - peak) / τ.
      rescale: exp(back).
      tau: τ.
    """

    old: jax.Array
    new: jax.Array
    peak: jax.Array
    back: jax.Array
    rescale: jax.Array
    tau: float | jax.Array

    @classmethod
    def of(cls, old: jax.Array, new: jax.Array, tau: float | jax.Array) -> "_Move":
        """Returns the move from one largest logit to another."""
        peak = finite_peak(new)
        back = divide_by_temperature(old, peak, tau)
        # Of the first tile XLA knows that, and leaves out what was summed before.
        rescale = jnp.where(old == -jnp.inf, 0, jnp.exp(back))
        return cls(old, new, peak, back, rescale, tau)

    @classmethod
    def none(cls, largest: jax.Array, tau: float | jax.Array) -> "_Move":
        """Returns a move from the largest logit to itself."""
        zero = jnp.zeros((), largest.dtype)
        return cls(largest, largest, finite_peak(largest), zero, zero + 1, tau)


class _Parts(NamedTuple):
    """Parts of the classes whose columns are joined.

    Attributes:
      axis: of the parts, 0 in columns [P, R, 1], 1 in columns [R, P].
    """

    axis: int

    def reduce(
        self, reduction: Callable[..., jax.Array], column: jax.Array
    ) -> jax.Array:
        """Returns a reduction of a column over the parts, [R, 1]."""
        return reduction(column, axis=self.axis, keepdims=self.axis == 1)

    def spread(self, column: jax.Array) -> jax.Array:
        """Returns a column [R, 1] as it broadcasts against the parts."""
        return column[None] if self.axis == 0 else column


class _Merged(NamedTuple):
    """A tile as it is merged.

    Attributes:
      tile: the tile.
      c: its centred logits, [R, B].
      weights: exp(c).
      move: of the rows' largest logit.
    """

    tile: Tile
    c: jax.Array
    weights: jax.Array
    move: _Move


class _Statistic(abc.ABC):
    """One statistic; `name` is its field, or where it lacks one its column."""

    name: ClassVar[str]

    @abc.abstractmethod
    def start(self, rows: int, labels: int, dtype: DTypeLike) -> Columns:
        """Returns its columns before the first tile; `labels` is K."""

    @abc.abstractmethod
    def moved(self, columns: Columns, move: _Move) -> Columns:
        """Returns its columns about another centre."""

    @abc.abstractmethod
    def merge(self, columns: Columns, new: _Merged) -> Columns:
        """Returns its columns, moved already but for `max` and `sum`, with a tile."""

    def join(self, columns: Columns, move: _Move, parts: _Parts) -> Columns:
        """Returns its columns of all parts that were moved already."""
        del move
        return {name: parts.reduce(jnp.sum, columns[name]) for name in columns}

    def sums(self, columns: Columns, move: _Move, finish: "_Finish") -> Columns:
        """Returns what adds up over shards, of columns that were moved already."""
        del move, finish
        return columns

    @abc.abstractmethod
    def field(self, sums: Columns, total: jax.Array, finish: "_Finish") -> jax.Array:
        """Returns the field, [N] or [N, K], from sums of all shards."""

    def saved(self, sums: Columns) -> Columns:
        """Returns fields of `Saved` beside the statistic."""
        del sums
        return {}

    def coefficients(self, cotangent: jax.Array, saved: Saved) -> Columns:
        """Returns coefficients by the fields of `Rows`, before they are over τ."""
        del cotangent, saved
        return {}

    def added(
        self, slopes: jax.Array, rows: Rows, tile: Tile, weights: jax.Array
    ) -> jax.Array:
        """Returns slopes [R, B] with the statistic's own term of the derivative."""
        del rows, tile, weights
        return slopes


class _Finish(NamedTuple):
    """What the statistics need when they are finished.

    Attributes:
      operands: of the call, class ids those of this shard.
      columns: all of them.
      tau: the temperature.
      classes: V.
      shard: the number of classes of this shard.
      axes: the mesh axes of the classes.
      largest: the largest logit of all shards, [N, 1].
    """

    operands: Operands
    columns: Columns
    tau: float | jax.Array
    classes: int
    shard: int
    axes: tuple[str, ...]
    largest: jax.Array

    def of_shard(self, label: jax.Array) -> jax.Array:
        """Returns numbers of labels [N, K], 0 where another shard has the class."""
        labels = self.operands.labels
        if not self.axes or labels is None:
            return label
        return jnp.where(labels >= 0, label, 0)


class _Label(_Statistic):
    """The centred logits of K labels; their raw logits until it is finished."""

    name = "label"

    def start(self, rows, labels, dtype):
        return {"label": jnp.full((rows, labels), -jnp.inf, dtype)}

    def moved(self, columns, move):
        return {"label": columns["label"]}

    def merge(self, columns, new):
        return {"label": jnp.maximum(columns["label"], new.tile.pick())}

    def join(self, columns, move, parts):
        return {"label": parts.reduce(jnp.max, columns["label"])}

    def sums(self, columns, move, finish):
        label = divide_by_temperature(columns["label"], move.peak, finish.tau)
        return {"label": finish.of_shard(label)}

    def field(self, sums, total, finish):
        return sums["label"]

    def coefficients(self, cotangent, saved):
        return {"label": cotangent}

    def added(self, slopes, rows, tile, weights):
        if rows.label is None or tile.labels is None:
            return slopes
        return tile.with_added(slopes, rows.label)


class _RawLabel(_Label):
    """The logits of K labels, for a temperature of 1: what centres them comes later."""

    name = "raw_label"

    def sums(self, columns, move, finish):
        return {"raw_label": finish.of_shard(columns["label"])}

    def field(self, sums, total, finish):
        return sums["raw_label"]


class _MeanOfKept(_Statistic):
    """A mean over the kept classes, where there are groups over those of the row's.

    Attributes:
      total: the column of the sum.
      count: the column of the number of classes.
    """

    total: ClassVar[str]
    count: ClassVar[str]

    @abc.abstractmethod
    def terms(self, new: _Merged) -> jax.Array:
        """Returns what is summed, [R, B]."""

    def start(self, rows, labels, dtype):
        return {
            self.total: jnp.zeros((rows, 1), dtype),
            self.count: jnp.zeros((rows, 1), jnp.int32),
        }

    def merge(self, columns, new):
        tile, terms = new.tile, self.terms(new)
        number = tile.logits.shape[tile.axis]
        kept = tile.kept()
        if kept is not None:
            terms = jnp.where(kept, terms, 0)
            number = tile.sum(kept, jnp.int32)
        return {
            self.total: columns[self.total] + tile.sum(terms),
            self.count: columns[self.count] + number,
        }

    def saved(self, sums):
        return {"number": jnp.maximum(sums[self.count], 1)[:, 0]}


class _Mean(_MeanOfKept):
    """The mean of c: `gap` is Σ (u - m), not over τ, of `number` kept classes."""

    name = "mean"
    total = "gap"
    count = "number"

    def terms(self, new):
        return new.tile.logits - new.move.peak

    def moved(self, columns, move):
        number, gap = columns["number"], columns["gap"]
        by = jnp.where(number == 0, 0, move.old - move.peak)
        return {"gap": gap + number.astype(gap.dtype) * by, "number": number}

    def sums(self, columns, move, finish):
        gap = columns["gap"]
        # Divided by V first: the sum itself may be too large to divide by τ.
        return {
            "number": columns["number"].astype(gap.dtype),
            "gap": over_temperature(gap / finish.classes, finish.tau),
        }

    def field(self, sums, total, finish):
        return sums["gap"][:, 0] * (finish.classes / self.saved(sums)["number"])

    def coefficients(self, cotangent, saved):
        assert saved.number is not None
        return {"mean": cotangent / saved.number}

    def added(self, slopes, rows, tile, weights):
        if rows.mean is None:
            return slopes
        kept = tile.kept()
        mean = rows.mean if kept is None else jnp.where(kept, rows.mean, 0)
        return slopes + mean


class _Growth(_MeanOfKept):
    """The mean of τ (exp(c) - 1): `growth` is its sum over `kept` classes.

    Where τ is large it has the digits that Σ exp(c), close to the number, lacks.
    """

    name = "growth"
    total = "growth"
    count = "kept"

    def terms(self, new):
        gap = new.tile.logits - new.move.peak
        return _scaled_growth(new.c, new.weights, gap, new.move.tau)

    def moved(self, columns, move):
        kept, growth = columns["kept"], columns["growth"]
        by = _scaled_growth(move.back, move.rescale, move.old - move.peak, move.tau)
        moved = move.rescale * growth + kept.astype(growth.dtype) * by
        return {"growth": jnp.where(kept == 0, 0, moved), "kept": kept}

    def sums(self, columns, move, finish):
        growth = columns["growth"]
        return {"growth": growth, "kept": columns["kept"].astype(growth.dtype)}

    def field(self, sums, total, finish):
        return sums["growth"][:, 0] / self.saved(sums)["number"]


def _scaled_growth(
    c: jax.Array, weights: jax.Array, gap: jax.Array, tau: float | jax.Array
) -> jax.Array:
    """Returns τ (exp(c) - 1), from c, exp(c) and gap = τ c."""
    tau = largest_finite(tau, c.dtype)
    return difference(jnp.ones_like(c), weights, c, gap, tau)


class _Expected(_Statistic):
    """Σ p c, from `weighted` = Σ exp(c) c."""

    name = "expected"

    def start(self, rows, labels, dtype):
        return {"weighted": jnp.zeros((rows, 1), dtype)}

    def moved(self, columns, move):
        by = jnp.where(move.rescale == 0, 0, move.back)
        return {"weighted": move.rescale * (columns["weighted"] + columns["sum"] * by)}

    def merge(self, columns, new):
        terms = times(new.weights, new.c)
        return {"weighted": columns["weighted"] + new.tile.sum(terms)}

    def field(self, sums, total, finish):
        return (sums["weighted"] / total)[:, 0]

    def coefficients(self, cotangent, saved):
        assert saved.fields.expected is not None
        of_p = cotangent * (1 - saved.fields.expected)
        return {"of_p": of_p, "of_pc": cotangent}


class _Argmax(_Statistic):
    """The lowest class with the largest logit, counted from this shard's first."""

    name = "argmax"

    def start(self, rows, labels, dtype):
        return {"argmax": jnp.zeros((rows, 1), jnp.int32)}

    def moved(self, columns, move):
        return {"argmax": columns["argmax"]}

    def merge(self, columns, new):
        is_new = new.move.new > new.move.old
        return {"argmax": jnp.where(is_new, new.tile.argmax(), columns["argmax"])}

    def join(self, columns, move, parts):
        none = jnp.iinfo(jnp.int32).max
        reached = move.old == move.new
        argmax = parts.reduce(jnp.min, jnp.where(reached, columns["argmax"], none))
        # NaN logits equal no maximum.
        return {"argmax": jnp.where(argmax == none, 0, argmax)}

    def sums(self, columns, move, finish):
        return {}

    def field(self, sums, total, finish):
        reached = finish.columns["max"] == finish.largest
        argmax = finish.columns["argmax"]
        return mesh_axes.lowest_argmax(argmax, reached, finish.shard, finish.axes)[:, 0]


class _Rest(_Statistic):
    """Log Σ exp(c) over the classes that are no labels of the row."""

    name = "rest"

    def start(self, rows, labels, dtype):
        return {"rest": jnp.zeros((rows, 1), dtype)}

    def moved(self, columns, move):
        return {"rest": move.rescale * columns["rest"]}

    def merge(self, columns, new):
        others = new.tile.without_labels(new.weights)
        return {"rest": columns["rest"] + new.tile.sum(others)}

    def field(self, sums, total, finish):
        return jnp.log(self.saved(sums)["rest"])

    def saved(self, sums):
        return {"rest": sums["rest"][:, 0]}

    def coefficients(self, cotangent, saved):
        assert saved.rest is not None
        return {"rest": cotangent / jnp.where(saved.rest == 0, 1, saved.rest)}

    def added(self, slopes, rows, tile, weights):
        if rows.rest is None:
            return slopes
        return slopes + tile.without_labels(weights) * rows.rest


_STATISTICS: tuple[_Statistic, ...] = (
    _Label(),
    _RawLabel(),
    _Mean(),
    _Growth(),
    _Expected(),
    _Argmax(),
    _Rest(),
)


@dataclasses.dataclass(frozen=True)
class Statistics(Fold[Operands, Columns, Saved, Fields]):
    """The statistics of each row.

    Attributes:
      config: of the layer.
      wanted: the names of those beside `max` and `log_sum`.
    """

    wanted: frozenset[str] = frozenset()
    kernel_step: ClassVar[str | None] = "statistics"
    gradient_step: ClassVar[str | None] = "statistics_gradient"

    @property
    def statistics(self) -> tuple[_Statistic, ...]:
        """Those that are wanted, in their order."""
        return tuple(s for s in _STATISTICS if s.name in self.wanted)

    def operands(self, arrays: Operands) -> Operands:
        return arrays

    def local(self, arrays: Operands) -> Operands:
        return arrays.local(self.config)

    def start(self, rows: int, arrays: Operands) -> Columns:
        labels = 0 if arrays.labels is None else arrays.labels.shape[1]
        return self.empty(rows, labels, numerics.compute_dtype(*arrays[:2]))

    def empty(self, rows: int, labels: int, dtype: DTypeLike) -> Columns:
        """Returns the columns of R rows with K labels before their first tile."""
        columns = {
            "max": jnp.full((rows, 1), -jnp.inf, dtype),
            "sum": jnp.zeros((rows, 1), dtype),
        }
        for statistic in self.statistics:
            columns |= statistic.start(rows, labels, dtype)
        return columns

    def step(self, carry: Columns, tile: Tile, part: Operands) -> Columns:
        return self.merge(carry, tile, part.temperature(self.config))

    def merge(self, columns: Columns, tile: Tile, tau: float | jax.Array) -> Columns:
        """Returns the columns with one more tile; `tau` is a float or [R, 1].

        For a tile by lanes columns are [1, R, L], and `tau` is a float or [1, R, 1].
        """
        # Any centre gives the same statistics but for itself: it counts as fixed, in
        # their tangents as in their gradients.
        largest = lax.stop_gradient(tile.largest())
        move = _Move.of(columns["max"], jnp.maximum(columns["max"], largest), tau)
        c = divide_by_temperature(tile.logits, move.peak, tau)
        new = _Merged(tile, c, jnp.exp(c), move)
        merged = {
            "max": move.new,
            "sum": move.rescale * columns["sum"] + tile.sum(new.weights),
        }
        for statistic in self.statistics:
            merged |= statistic.merge(statistic.moved(columns, move), new)
        return merged

    def tile(
        self,
        part: Operands,
        tiles: Tiling,
        index: jax.Array | int,
        kept: KeptTile | None = None,
    ) -> Any:
        # It is known to pay where nothing is kept of tiles; what JAX itself
        # differentiates stays plain.
        if self.config.keeps and self.config.blocks is None:
            part = turned(self.config, part, tiles)
        return super().tile(part, tiles, index, kept)

    def join(self, columns: Columns, tau: float | jax.Array) -> Columns:
        """Merges P parts of the classes, [P, R, 1] each, in the order of classes."""
        tau = tau[None] if isinstance(tau, jax.Array) else tau
        return self._join(columns, tau, _Parts(0))

    def join_lanes(self, columns: Columns, tau: float | jax.Array) -> Columns:
        """Merges the columns [R, L] of tiles by lanes; `tau` is a float or [R, 1]."""
        return self._join(columns, tau, _Parts(1))

    def _join(self, columns: Columns, tau: float | jax.Array, parts: _Parts) -> Columns:
        largest = parts.reduce(jnp.max, columns["max"])
        move = _Move.of(columns["max"], parts.spread(largest), tau)
        joined = {
            "max": largest,
            "sum": parts.reduce(jnp.sum, move.rescale * columns["sum"]),
        }
        for statistic in self.statistics:
            joined |= statistic.join(statistic.moved(columns, move), move, parts)
        return joined

    def finish(self, carry: Columns, arrays: Operands) -> Saved:
        axes = self.config.vocab_axes
        tau = arrays.temperature(self.config)
        largest = mesh_axes.maximum(carry["max"], axes)
        move = _Move.none(largest, tau)
        if axes:
            move = _Move.of(carry["max"], largest, tau)
        finish = _Finish(
            arrays,
            carry,
            tau,
            arrays.all_classes(self.config),
            arrays.num_classes(self.config),
            axes,
            largest,
        )
        sums = {"total": move.rescale * carry["sum"]}
        for statistic in self.statistics:
            sums |= statistic.sums(statistic.moved(carry, move), move, finish)
        sums = mesh_axes.add(sums, axes)
        total = jnp.where(largest == -jnp.inf, 1, sums["total"])
        fields, saved = {}, {}
        for statistic in self.statistics:
            fields[statistic.name] = statistic.field(sums, total, finish)
            saved |= statistic.saved(sums)
        total = total[:, 0]
        return Saved(Fields(largest[:, 0], jnp.log(total), **fields), total, **saved)

    def result(self, saved: Saved) -> Fields:
        return saved.fields

    def of_no_rows(self, operands: Operands) -> Fields:
        """Returns the result of operands without a row."""
        return self.result(self.finish(self.start(0, operands), operands))

    def compute(self, arrays: Operands) -> Fields:
        if self.config.implementation == "reference":
            return Fields(**reference.statistics(self.config, arrays, self.wanted))
        return super().compute(arrays)

    def differentiable(self, moving: Operands) -> Callable[[Operands], Fields]:
        if self.config.implementation == "reference":
            return self.compute
        return super().differentiable(moving)

    def can_keep(self, arrays: Operands, moving: Operands) -> Keeping | None:
        """Returns "weights" where the slope is a multiple of them but at one label."""
        if not self.config.can_keep:
            return None
        labels = 0 if arrays.labels is None else arrays.labels.shape[1]
        needs_logits = (
            self.config.softcap is not None
            or moving.tau
            or moving.kernel_scale
            or not self.wanted.isdisjoint({"expected", "mean"})
            or labels > 1
            # The range of float16 is too small, and others are no shorter.
            or arrays.matmul_dtype() != jnp.bfloat16
        )
        return "products" if needs_logits else "weights"

    def kept_of(
        self, tile: Tile, keep: Keep, carry: Columns, part: Operands
    ) -> tuple[KeptTile, ...]:
        if keep.what == "products":
            return super().kept_of(tile, keep, carry, part)
        largest, tau = carry["max"], part.temperature(self.config)
        c = divide_by_temperature(tile.logits, finite_peak(largest), tau)
        # A row without any kept class so far is -inf: it weighs 0 about every peak.
        return (KeptTile(jnp.exp(c), largest),)

    def gradients(
        self,
        arrays: Operands,
        saved: Saved,
        cotangents: Fields,
        moving: Operands,
        kept: tuple[Kept, ...] = (),
        into: Into | None = None,
    ) -> Operands:
        operands, wanted = self.local(arrays), Wanted.of(moving)
        rows = self.rows(operands, saved, cotangents)
        if kept and kept[0].peaks is not None:
            rows = rows.by_weights(saved)
        kernel = registry.kernel("statistics_gradient", self.config.implementation)
        if kernel is not None:
            gradients, moments = kernel(self, operands, wanted, rows)
        else:

            def share(part, part_rows, tile, *_):
                tau = part.temperature(self.config)
                return Share(*self.slope(tau, part_rows.columns(), tile, wanted.tau))

            gradients, moments = accumulate(
                self.config,
                operands,
                wanted,
                share,
                rows,
                kept=kept,
                into=None if into is None else into.of(into.sums),
            )
        return gradients.with_tau(moments).of_operands()

    def rows(self, operands: Operands, saved: Saved, cotangents: Fields) -> Rows:
        """Returns the coefficients of the derivative, over τ."""
        coefficients: Columns = {}
        if cotangents.log_sum is not None:
            coefficients["of_p"] = cotangents.log_sum
        for statistic in self.statistics:
            cotangent = getattr(cotangents, statistic.name)
            if cotangent is None:
                continue
            for name, value in statistic.coefficients(cotangent, saved).items():
                before = coefficients.get(name)
                coefficients[name] = value if before is None else before + value
        scale = inverse(operands.temperature(self.config), saved.total.dtype)
        scale = jnp.broadcast_to(scale, (operands.hidden.shape[0], 1))
        scaled = {
            name: value * (scale if value.ndim == 2 else scale[:, 0])
            for name, value in coefficients.items()
        }
        return Rows(saved.fields.max, 1 / saved.total, **scaled)

    def slope(
        self, tau: float | jax.Array, rows: Rows, tile: Tile, moments: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns what a tile contributes to the derivative.

        Args:
          tau: the temperature, a float or [R, 1].
          rows: the columns of the rows' coefficients.
          tile: the tile.
          moments: whether the temperature's gradient is wanted.

        Returns:
          The derivative by the logits [R, B], and Σ of it times c [R, 1], or None.
        """
        u, peak = tile.logits, finite_peak(rows.max)
        if tile.peak is None:
            c = divide_by_temperature(u, peak, tau)
            weights = jnp.exp(c)
        else:
            c = None
            weights = u * jnp.exp(divide_by_temperature(tile.peak, peak, tau))
        p = weights * rows.inverse_total
        if c is None and rows.label_prob is not None:
            # The kept weight is rounded, and p - 1 would be nothing but that.
            p = tile.at_label(rows.label_prob, p)
        d = jnp.zeros_like(u)
        if rows.of_p is not None:
            d = p * rows.of_p
        if rows.of_pc is not None and c is not None:
            d = d + times(p, c) * rows.of_pc
        for statistic in self.statistics:
            d = statistic.added(d, rows, tile, weights)
        if not moments or c is None:
            return d, None
        return d, jnp.sum(times(d, finite(c)), axis=1, keepdims=True)


@exportable_dataclass()
@dataclasses.dataclass(frozen=True)
class LogitStatistics:
    """Statistics of the softmax over classes, one number a row; a pytree.

    With u the logits, m their maximum, τ the temperature and c = (u - m) / τ, the
    fields are the centred quantities that losses are made of. No gradient flows
    through `max`, so gradients of single fields mean little; the properties, in which
    the centre cancels, have exact gradients.

    Attributes:
      max: m [...]; -inf in a row without any kept class.
      log_sum: ℓ = log Σ exp(c) [...], >= 0.
      label: the centred logit of the label [...], <= 0; NaN for a label outside
        [0, V); None without labels.
      mean: the mean of c over the kept classes [...]; None where not computed.
      expected: Σ p c [...]; None where not computed.
      argmax: the lowest class with the largest logit [...], int32; None where not
        asked for.
      temperature: τ, a scalar or [...].
      rest: log Σ exp(c) over the classes that are not among K labels; None where not
        computed.
      rank: how many kept classes beat the label [...], int32: those with a larger
        logit, or the same and a lower id, before the soft-cap. 0 is the best; V for a
        label that is no kept class, and where `log_prob` is NaN. None where not asked
        for.
      top_log_probs: log-probabilities of the best classes [..., k], descending, as of
        `linear_top_k`; None where not asked for.
      top_ids: their ids [..., k], int32, -1 where fewer than k classes are kept; None
        where not asked for.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsoft import linear_statistics
      >>> statistics = linear_statistics(jnp.ones((1, 1)), jnp.zeros((1, 4)))
      >>> print(f"{statistics.lse[0]:.4f} {statistics.entropy[0]:.4f}")
      1.3863 1.3863
    """

    max: jax.Array
    log_sum: jax.Array
    label: jax.Array | None
    mean: jax.Array | None
    expected: jax.Array | None
    argmax: jax.Array | None
    temperature: jax.Array
    rest: jax.Array | None = None
    rank: jax.Array | None = None
    top_log_probs: jax.Array | None = None
    top_ids: jax.Array | None = None

    @property
    def lse(self) -> jax.Array:
        """Log Σ exp(u / τ) [...]; -inf in a row without any kept class."""
        lse = self._peak() + self.log_sum
        return jnp.where(self.max == -jnp.inf, -jnp.inf, lse)

    @property
    def label_logit(self) -> jax.Array:
        """The tempered logit of the label, u_label / τ [...]."""
        return self._peak() + self._need("label")

    @property
    def log_prob(self) -> jax.Array:
        """The log-probability of the label [...], never above 0."""
        return self._need("label") - self.log_sum

    @property
    def entropy(self) -> jax.Array:
        """The entropy in nats [...], in [0, log V]."""
        return self.log_sum - self._need("expected")

    def with_one_label(self) -> "LogitStatistics":
        """Returns the statistics with `label` [...] in place of [..., 1]."""
        if self.label is None:
            return self
        return dataclasses.replace(self, label=self.label[..., 0])

    def _peak(self) -> jax.Array:
        tau = self.temperature
        if not tau.ndim:
            # A broadcast scalar would be sharded as no row is.
            tau = tau.reshape((1,) * self.max.ndim)
        peak = numerics.finite_peak(jax.lax.stop_gradient(self.max))
        return over_temperature(peak, tau)

    def _need(self, name: str) -> jax.Array:
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"`{name}` must have been computed, got None. Pass labels, or ask "
                "for the statistics with linear_statistics."
            )
        return value


def statistics(call: Call, wanted: tuple[str, ...] = ()) -> LogitStatistics:
    """Computes the statistics of a call.

    Args:
      call: the checked call.
      wanted: which of "mean", "expected", "argmax" and "rest" to compute; "raw_label"
        for labels that are not centred.

    Returns:
      The statistics; `label`, where there are labels, is [..., K].
    """
    has_label = call.arrays.labels is not None and "raw_label" not in wanted
    names = ("label", *wanted) if has_label else wanted
    return run(Statistics(call.config, frozenset(names)), call.arrays)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def run(fold: Statistics, arrays: Operands) -> LogitStatistics:
    """Folds leading axes into rows, computes, and unfolds.

    Args:
      fold: which statistics.
      arrays: those of a checked call.
    """
    rows = arrays.hidden.shape[:-1]
    operands = fold_rows(fold.config, arrays)
    if math.prod(rows):
        fields = stream(fold, operands)
    else:
        fields = fold.of_no_rows(operands)
    fields = jax.tree.map(lambda a: a.reshape(rows + a.shape[1:]), fields)
    valid = None
    if operands.labels is not None:
        valid = operands.labels.reshape(*rows, operands.labels.shape[1]) >= 0
    return of_fields(fields, valid, arrays.tau, fold.config.static_tau)


def of_fields(
    fields: Fields,
    valid: jax.Array | None,
    tau: jax.Array | None,
    static_tau: float | None,
) -> LogitStatistics:
    """Returns the statistics of fields.

    Args:
      fields: [...] each, and the label's [..., K].
      valid: [..., K] whether each label is a class; None without labels.
      tau: [...] or a scalar; None for a static temperature.
      static_tau: that one.
    """
    label = fields.label if fields.raw_label is None else fields.raw_label
    if label is not None and valid is not None:
        label = numerics.nan_where(~valid, label)
    temperature = jnp.asarray(static_tau, fields.max.dtype) if tau is None else tau
    known = fields._replace(label=label)._asdict()
    del known["raw_label"], known["growth"]
    return LogitStatistics(**known, temperature=temperature)
