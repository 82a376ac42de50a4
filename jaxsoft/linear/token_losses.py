"""Losses of tokens that are reduced inside the call."""

import abc
import dataclasses
import functools
import math
from typing import Annotated, Any, NamedTuple

import jax

from jaxsoft._core.numerics import compute_dtype
from jaxsoft._core.tokens import Reduction, reduce_losses, token_shares, weigh_tokens
from jaxsoft.linear.arguments import Axes, Call, fold_rows
from jaxsoft.linear.fold import Fold
from jaxsoft.linear.folds.statistics import (
    Fields,
    LogitStatistics,
    Statistics,
    of_fields,
    statistics,
)
from jaxsoft.linear.total import RowLoss, total

__all__ = ["TokenLoss", "reduced", "statistics_loss"]


class _Rows(NamedTuple):
    """What is summed beside a fold's result.

    Attributes:
      weight: [N] of each row in the sum; None where all have one.
      others: further arrays of the rows, in a named tuple.
    """

    weight: Annotated[jax.Array | None, Axes("n")]
    others: Any


@dataclasses.dataclass(frozen=True)
class _Weighted(RowLoss):
    """The weighted loss of each row.

    Attributes:
      loss: of a row.
      share: what all weights are multiplied by.
    """

    loss: RowLoss
    share: float

    def of_rows(self, result: Any, rows: _Rows) -> jax.Array:
        losses = self.loss.of_rows(result, rows.others)
        weighted = weigh_tokens(rows.weight, losses)
        return weighted if self.share == 1 else weighted * self.share


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6), inline=True)
def reduced(
    fold: Fold,
    loss: RowLoss,
    arrays: Any,
    others: Any,
    weights: jax.Array | None,
    reduction: Reduction,
    token_axes: tuple[str, ...],
) -> jax.Array:
    """Returns the mean or the sum of the rows' losses.

    Args:
      fold: what is streamed.
      loss: made of its result, without weights.
      arrays: what the fold is computed from, at least one row.
      others: further arrays of the rows, in a named tuple whose fields say their axes.
      weights: [...] what `token_weights` returned, of as many tokens as rows.
      reduction: "mean" or "sum".
      token_axes: the mesh axes of the tokens.
    """
    operands = fold.operands(arrays)
    count, dtype = operands.hidden.shape[0], compute_dtype(*operands[:2])
    shares, share = token_shares(weights, reduction, count, dtype, token_axes)
    shares = None if shares is None else shares.reshape(count)
    rows = _Rows(shares, others)
    value = total(fold, _Weighted(loss, share), arrays, rows)
    return jax.lax.psum(value, token_axes) if token_axes else value


@dataclasses.dataclass(frozen=True)
class TokenLoss(abc.ABC):
    """The loss of each token, made of its statistics."""

    @abc.abstractmethod
    def of_tokens(self, statistics: LogitStatistics) -> jax.Array:
        """Returns the losses [...] of tokens; their labels are [..., K]."""


class _Others(NamedTuple):
    """What statistics are made of beside their fields.

    Attributes:
      valid: [N, K] whether each label is a class.
      tau: [N] the temperature; None for a static one.
    """

    valid: Annotated[jax.Array | None, Axes("nk")]
    tau: Annotated[jax.Array | None, Axes("n")]


@dataclasses.dataclass(frozen=True)
class _OfFields(RowLoss):
    """The loss of a row, from its fields.

    Attributes:
      loss: of its statistics.
      static_tau: the temperature, where it is static.
    """

    loss: TokenLoss
    static_tau: float | None

    def of_rows(self, result: Fields, rows: _Others) -> jax.Array:
        found = of_fields(result, rows.valid, rows.tau, self.static_tau)
        return self.loss.of_tokens(found)


def statistics_loss(
    call: Call,
    wanted: tuple[str, ...],
    loss: TokenLoss,
    weights: jax.Array | None,
    reduction: Reduction,
    token_axes: tuple[str, ...] = (),
) -> jax.Array:
    """Computes losses that are made of statistics.

    Args:
      call: the checked call.
      wanted: which of "mean", "expected" and "rest" the loss is made of.
      loss: of a token.
      weights: what `token_weights` returned.
      reduction: "mean", "sum" or "none".
      token_axes: the mesh axes of the tokens.
    """
    if reduction == "none" or not math.prod(call.arrays.hidden.shape[:-1]):
        losses = loss.of_tokens(statistics(call, wanted))
        return reduce_losses(losses, weights, reduction, token_axes)
    names = wanted if call.arrays.labels is None else ("label", *wanted)
    fold = Statistics(call.config, frozenset(names))
    operands = fold_rows(call.config, call.arrays)
    valid = None if operands.labels is None else operands.labels >= 0
    others = _Others(valid, operands.tau)
    of_rows = _OfFields(loss, call.config.static_tau)
    return reduced(fold, of_rows, operands, others, weights, reduction, token_axes)
