"""The objective of softmax regression, its gradient and its curvature, tile by tile.

    f(W, b) = Σ_i w_i loss(x_i Wᵀ + b) + ½ Σ λ_j W_kj²      with Σ_i w_i = 1

scikit-learn's, per unit of sample weight, where all λ_j are
(1 - l1_ratio) / (C · sum of weights); columns that were scaled have their own.
Value and gradient come out of one pass over the rows; the logits of a tile of rows
exist at a time. A mesh with the axis `data` cuts the rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxsoft._core import mesh_axes
from jaxsoft.logits.losses import softmax_cross_entropy
from jaxsoft.logits.softmax import softmax
from jaxsoft.training.mesh import DATA
from jaxsoft.training.regression.sparse_tiles import SparseTiles

__all__ = [
    "Array",
    "Data",
    "Drift",
    "Parameters",
    "Plan",
    "drift",
    "fold",
    "hessian",
    "logits",
    "objective",
    "on_mesh",
    "value_and_gradient",
]

# NumPy's on the host and JAX's in a program, whose functions take no union of both.
Array: TypeAlias = Any
Sums = TypeVar("Sums")
_HIGHEST = jax.lax.Precision.HIGHEST


class Parameters(NamedTuple):
    """A linear classifier.

    Attributes:
      kernel: [R, d], a row a class; the reference class, if any, has none.
      bias: [R], or None.
    """

    kernel: Array
    bias: Array


class Data(NamedTuple):
    """The rows that a classifier is fitted to.

    Attributes:
      features: [n, d], dense, or sparse in tiles.
      labels: [n] int32 in [0, V), or None. A reference class is the last one.
      targets: [n, V] distributions over the classes, or None.
      weights: [n], of sum 1.
    """

    features: Array
    labels: Array
    targets: Array
    weights: Array


@dataclass(frozen=True)
class Plan:
    """What a compiled program of the objective depends on.

    Attributes:
      num_classes: V.
      reference: whether the last class has logit 0, and no parameters.
      intercept: whether there is a bias.
      tile_rows: rows whose logits exist at a time, of dense features.
      label_smoothing: ε, for labels and targets alike.
      temperature: at which `targets` are compared; their loss is scaled by its square.
      target_weight: share of the targets' loss where there are labels too.
      mesh: devices with the axis `data`, or None.
    """

    num_classes: int
    reference: bool
    intercept: bool
    tile_rows: int
    label_smoothing: float = 0.0
    temperature: float = 1.0
    target_weight: float = 1.0
    mesh: Mesh | None = None

    @property
    def num_rows(self) -> int:
        """R, the number of rows of the kernel."""
        return self.num_classes - self.reference

    def share(self, data: Data) -> float:
        """Returns the share of the targets' loss in the whole."""
        if data.targets is None:
            return 0.0
        return 1.0 if data.labels is None else self.target_weight


def logits(plan: Plan, parameters: Parameters, features: Array) -> jax.Array:
    """Returns [V, n] logits of a tile of rows.

    Classes come first: with few of them a CPU multiplies [V, d] by [d, n] faster than
    the transposes, and adds up over classes faster too.

    Args:
      plan: of which `reference` counts.
      parameters: the classifier.
      features: [n, d], or one tile of sparse rows.
    """
    kernel, bias = parameters
    if isinstance(features, SparseTiles):
        z = features.matmul(kernel)
    else:
        # Without a request, an accelerator multiplies float32 in fewer bits.
        z = jax.lax.dot_general(
            kernel, features, (((1,), (1,)), ((), ())), precision=_HIGHEST
        )
    if bias is not None:
        z = z + bias[:, None]
    return jnp.pad(z, ((0, 1), (0, 0))) if plan.reference else z


def _tile_loss(plan: Plan, parameters: Parameters, data: Data) -> jax.Array:
    """Returns the weighted sum of a tile's losses."""
    z = logits(plan, parameters, data.features)
    share = plan.share(data)
    loss = jnp.zeros(z.shape[1], z.dtype)
    if data.targets is not None:
        softened = softmax_cross_entropy(
            z,
            None,
            plan.temperature,
            targets=data.targets.T,
            axis=0,
            label_smoothing=plan.label_smoothing,
        )
        loss = loss + share * plan.temperature**2 * softened
    if data.labels is not None:
        hard = softmax_cross_entropy(
            z, data.labels, axis=0, label_smoothing=plan.label_smoothing
        )
        loss = loss + (1.0 - share) * hard
    return jnp.sum(jnp.where(data.weights > 0, data.weights * loss, 0))


def fold(plan: Plan, data: Data, function: Callable[[Data], Sums]) -> Sums:
    """Returns the sum of a function over tiles of rows, and over the mesh's devices.

    Args:
      plan: of which `tile_rows` and `mesh` count; called inside `on_mesh`.
      data: this device's rows.
      function: from a tile to a pytree of arrays.
    """
    rows, count = plan.tile_rows, data.weights.shape[0]
    sparse = isinstance(data.features, SparseTiles)
    tiles = data.features.num_tiles if sparse else -(-count // rows)
    if sparse:
        rows = data.features.tile_rows

    def tile(index: jax.Array) -> Data:
        # The last tile starts early enough to be whole; rows of both count once.
        start = jnp.minimum(index * rows, count - rows)
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=rows
        )
        weights = cut(data.weights)
        fresh = start + jnp.arange(rows, dtype=start.dtype) >= index * rows
        return Data(
            data.features.tile(index) if sparse else cut(data.features),
            None if data.labels is None else cut(data.labels),
            None if data.targets is None else cut(data.targets),
            jnp.where(fresh, weights, 0),
        )

    if tiles == 1:
        whole = data
        if sparse:
            whole = data._replace(features=data.features.tile(jnp.int32(0)))
        return function(whole)

    def add(total: Sums, index: jax.Array) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, function(tile(index))), None

    first = function(tile(jnp.int32(0)))
    total, _ = jax.lax.scan(add, first, jnp.arange(1, tiles, dtype=jnp.int32))
    return total


def on_mesh(plan: Plan, function: Callable[..., Sums]) -> Callable[..., Sums]:
    """Runs `function(data, *replicated)` on each device's rows, and sums the results.

    Args:
      plan: of which `mesh` counts.
      function: of `Data` first; everything else is the same on all devices.
    """
    if plan.mesh is None:
        return function

    def summed(data: Data, *replicated: Any) -> Sums:
        # Derivatives inside are of this device's rows alone, and are summed here.
        return jax.lax.psum(function(data, *mesh_axes.like(replicated, data)), DATA)

    def call(data: Data, *replicated: Any) -> Sums:
        specs = (P(DATA), *(P() for _ in replicated))
        mapped = jax.shard_map(summed, mesh=plan.mesh, in_specs=specs, out_specs=P())
        return mapped(data, *replicated)

    return call


def value_and_gradient(
    plan: Plan, parameters: Parameters, data: Data
) -> tuple[jax.Array, Parameters]:
    """Returns the weighted mean loss, without penalty, and its gradient."""

    def rows(data: Data, parameters: Parameters) -> tuple[jax.Array, Parameters]:
        def tile(part: Data) -> tuple[jax.Array, Parameters]:
            return jax.value_and_grad(
                lambda parameters: _tile_loss(plan, parameters, part)
            )(parameters)

        return fold(plan, data, tile)

    return on_mesh(plan, rows)(data, parameters)


def objective(
    plan: Plan, parameters: Parameters, data: Data, strength: jax.Array
) -> jax.Array:
    """Returns the weighted mean loss and the penalty ½ Σ λ_j W_kj²; the bias is free.

    The gradient is made with the value: `jax.value_and_grad` reads the rows once.

    Args:
      plan: what is compiled.
      parameters: the classifier.
      data: the rows.
      strength: [d] λ of each column, or one of all.
    """
    penalty = jnp.sum(strength * jnp.sum(jnp.square(parameters.kernel), 0))
    mean: Array = _loss(plan, parameters, data)
    return mean + 0.5 * penalty


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan: Plan, parameters: Parameters, data: Data) -> jax.Array:
    return value_and_gradient(plan, parameters, data)[0]


def _loss_fwd(
    plan: Plan, parameters: Parameters, data: Data
) -> tuple[jax.Array, Parameters]:
    return value_and_gradient(plan, parameters, data)


def _loss_bwd(
    plan: Plan, gradient: Parameters, cotangent: jax.Array
) -> tuple[Parameters, None]:
    return jax.tree.map(lambda leaf: cotangent * leaf, gradient), None


_loss.defvjp(_loss_fwd, _loss_bwd)


def hessian(plan: Plan, parameters: Parameters, data: Data) -> jax.Array:
    """Returns the Hessian of the weighted mean loss.

    `Σ_i w_i (diag p - p pᵀ) ⊗ x xᵀ` with p a row's probabilities of the classes that
    have a row in the kernel; of targets at temperature τ, p is at τ too.

    Args:
      plan: what is compiled.
      parameters: where.
      data: the rows, dense.

    Returns:
      [R, e, R, e], with e = d + 1 where there is a bias, whose column is the last.
    """
    share = plan.share(data)

    def rows(data: Data, parameters: Parameters) -> jax.Array:
        def tile(part: Data) -> jax.Array:
            z, x = logits(plan, parameters, part.features), part.features
            if plan.intercept:
                x = jnp.pad(x, ((0, 0), (0, 1)), constant_values=1)
            total = jnp.zeros((), z.dtype)
            if share < 1:
                p = softmax(z, axis=0)[: plan.num_rows]
                total = _outer(p, x, (1 - share) * part.weights)
            if part.targets is not None:
                p = softmax(z, temperature=plan.temperature, axis=0)[: plan.num_rows]
                # Curvature is by the mass of the targets, which need not be 1.
                mass = (1 - plan.label_smoothing) * jnp.sum(part.targets, 1)
                mass = share * part.weights * (mass + plan.label_smoothing)
                total = total + _outer(p, x, mass)
            return total

        return fold(plan, data, tile)

    return on_mesh(plan, rows)(data, parameters)


def _outer(p: jax.Array, x: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns Σ w (diag p - p pᵀ) ⊗ x xᵀ, [R, e, R, e], of p [R, n] and x [n, e]."""
    count, width = p.shape[0], x.shape[1]
    flat = (p * jnp.sqrt(weights)[None]).T[:, :, None] * x[:, None, :]
    flat = flat.reshape(-1, count * width)
    crossed = -jnp.einsum("na,nb->ab", flat, flat, precision=_HIGHEST)
    crossed = crossed.reshape(count, width, count, width)
    weighted = (p * weights[None])[:, :, None] * x[None]
    blocks = jnp.einsum("kna,nb->kab", weighted, x, precision=_HIGHEST)
    classes = jnp.arange(count)
    return crossed.at[classes, :, classes, :].add(blocks)


class Drift(NamedTuple):
    """What a direction does to the logits of the rows that have weight.

    Attributes:
      reach: the sum over rows of the squared range of their changes.
      against: the sum over rows of the squared part of it that is against the labels:
        by which a class that is not the label's rises above it.
      undecided: the number of rows whose label does not rise above all other classes.
    """

    reach: jax.Array
    against: jax.Array
    undecided: jax.Array


def drift(plan: Plan, direction: Parameters, data: Data) -> Drift:
    """Follows a direction in the parameters.

    Along one that has no part against the labels, but some reach, the loss falls for
    ever: it has no minimum (Albert and Anderson, On the Existence of Maximum Likelihood
    Estimates in Logistic Regression Models, Biometrika 71, 1984). Of a row that several
    classes share, by targets or by smoothing, their logits must stay equal.

    Args:
      plan: what is compiled.
      direction: of the parameters.
      data: the rows.
    """
    share = plan.share(data)

    def rows(data: Data, direction: Parameters) -> Drift:
        def tile(part: Data) -> Drift:
            z = logits(plan, direction, part.features)
            own = jnp.full(z.shape, plan.label_smoothing > 0)
            if share < 1:
                own = own | (
                    jnp.arange(z.shape[0], dtype=jnp.int32)[:, None]
                    == part.labels[None]
                )
            if share > 0:
                own = own | (part.targets.T > 0)
            low = jnp.min(jnp.where(own, z, jnp.inf), axis=0)
            high = jnp.max(jnp.where(own, z, -jnp.inf), axis=0)
            other = jnp.max(jnp.where(own, -jnp.inf, z), axis=0)
            against = jnp.maximum(other - low, 0) + (high - low)
            decided = (other < low) & (high == low) & ~jnp.all(own, axis=0)
            squares = jnp.square(jnp.max(z, 0) - jnp.min(z, 0)), jnp.square(against)
            terms = *squares, jnp.where(decided, 0.0, 1.0).astype(z.dtype)
            return Drift(*(jnp.sum(jnp.where(part.weights > 0, t, 0)) for t in terms))

        return fold(plan, data, tile)

    return on_mesh(plan, rows)(data, direction)
