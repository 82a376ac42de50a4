"""The statistics of `hidden @ kernel` in one kernel for Hopper GPUs, by Mosaic GPU.

A block of threads owns a tile of rows and every class of one split of the classes. Its
third warpgroup streams tiles of `hidden` and of the kernel through a ring in shared
memory (TMA), the other two multiply them (wgmma), each for half of the rows, and merge
every tile of logits from the accumulator's registers into running statistics of their
rows: 2·N·H·V flops, the kernel is read once from HBM for all row tiles that run side by
side, and of the logits nothing is ever written. What is written are the statistics of
each row in each split; `mosaic_gpu.py` merges those.

Not yet measured: nothing here has run on a GPU. It was compiled for one, read as
machine code, and interpreted.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxsoft.linear.running import Running

__all__ = ["KERNEL_NAME", "Blocks", "Inputs", "Partials", "Plan", "choose", "run"]

KERNEL_NAME = "jaxsoft_statistics_hopper"

# An H100 and an H200 have as many multiprocessors, and a block may take so much of
# their shared memory.
MULTIPROCESSORS = 132
SHARED_MEMORY = 232448

# Warpgroups that multiply; one more copies.
_COMPUTING = 2
# 128 · (2 · 232 + 40) registers are the 64,512 that the hardware can hand out.
_COMPUTE_REGISTERS = 232
_COPY_REGISTERS = 40
# Columns that are merged at a time: 4 registers a thread for 64 rows.
_CHUNK = 8
_LOG2_E = math.log2(math.e)
# Stands for -inf in products with 0; 2 to it is 0.
_LOWEST = -1e4
# Above every column, and safe to add one to.
_NO_COLUMN = 2**30


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The tiles of the kernel.

    Attributes:
      rows: rows of a computing warpgroup; a block of threads has twice as many.
      classes: classes of a tile of logits.
      features: features that one step multiplies.
      stages: tiles in flight.
      cluster: how many row tiles share each tile of the kernel, by TMA multicast.
      swizzle: bytes of a row of shared memory that are permuted together.
    """

    rows: int = 64
    classes: int = 256
    features: int = 64
    stages: int = 4
    cluster: int = 1
    swizzle: int = 128

    def __post_init__(self):
        """Requires what wgmma, the registers and the shared memory can hold."""
        if self.rows % 64 or self.classes % 64 or not 64 <= self.classes <= 256:
            raise ValueError(
                "`rows` must be a multiple of 64, and `classes` one up to 256, got "
                f"{self}."
            )
        if self.rows * self.classes > 64 * 256:
            raise ValueError(
                f"`rows · classes` must be at most 64 · 256 registers, got {self}."
            )
        if self.swizzle not in (32, 64, 128) or self.features * 2 % self.swizzle:
            raise ValueError(
                "`swizzle` must be 32, 64 or 128 bytes and divide those of `features`, "
                f"got {self}."
            )
        if self.cluster not in (1, 2) or self.stages < 2:
            raise ValueError(
                f"`cluster` must be 1 or 2, `stages` at least 2, got {self}."
            )
        if self.ring_bytes > SHARED_MEMORY - 8192:
            raise ValueError(
                f"`stages` must fit {SHARED_MEMORY - 8192} bytes of shared memory, got "
                f"{self.ring_bytes} in {self}."
            )

    @property
    def block_rows(self) -> int:
        """The rows of a block of threads."""
        return _COMPUTING * self.rows

    @property
    def ring_bytes(self) -> int:
        """The bytes of the tiles in flight, of 2 bytes an element."""
        return self.stages * self.features * (self.block_rows + self.classes) * 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known when the kernel is traced.

    Attributes:
      rows: N, of the rows of results: a multiple of those of a block, or of a cluster.
      classes: V.
      features: H.
      transposed: whether the kernel is [V, H].
      blocks: the tiles.
      splits: into how many parts the classes are split.
      softcap: the soft-cap, or None.
      scale: by what logits are multiplied before they are centred; see `Inputs`.
      factor: by what they are multiplied then, in base 2; None if a row has its own.
      labels: whether there are labels.
      mean: whether the mean is wanted.
      expected: whether Σ p c is wanted.
      argmax: whether the argmax is wanted.
    """

    rows: int
    classes: int
    features: int
    transposed: bool
    blocks: Blocks
    splits: int
    softcap: float | None
    scale: float
    factor: float | None
    labels: bool
    mean: bool
    expected: bool
    argmax: bool

    @property
    def tiles(self) -> int:
        """The number of tiles of classes."""
        return math.ceil(self.classes / self.blocks.classes)

    @property
    def steps(self) -> int:
        """The number of steps that a tile of logits takes."""
        return self.features // self.blocks.features

    @property
    def floats(self) -> tuple[str, ...]:
        """The fields of `Running` that are float32, in the order of the results."""
        wanted = [("label", self.labels), ("gap", self.mean)]
        wanted += [("weighted", self.expected)]
        return ("max", "sum", *(name for name, w in wanted if w))

    @property
    def integers(self) -> tuple[str, ...]:
        """The fields of `Running` that are int32, in the order of the results."""
        wanted = [("number", self.mean), ("argmax", self.argmax)]
        return tuple(name for name, w in wanted if w)


class Inputs(NamedTuple):
    """The arrays that the kernel reads.

    Attributes:
      hidden: [M, H] bfloat16 or float16, M a multiple of 8 and at least N.
      kernel: [H, V] or [V, H] in the same dtype.
      bias: [tiles · classes of a tile] float32, -inf at dropped classes and beyond V;
        or None.
      labels: [rows of results] int32, or None.
      temper: [3, rows of results] float32; a logit u and the row's maximum m count as
        ((u·a - m·a)·b)·c in base 2, with a, b and c the three of the row. Or None.
    """

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    labels: jax.Array | None
    temper: jax.Array | None


class Partials(NamedTuple):
    """What the kernel writes: the fields of `Running`, of each split and row.

    Attributes:
      floats: [fields, splits, rows of results], in the order of `Plan.floats`; the sums
        of exponentials are in base 2, as is c in `weighted`.
      integers: likewise, in the order of `Plan.integers`; None if there are none.
    """

    floats: jax.Array
    integers: jax.Array | None


def choose(
    rows: int, classes: int, swizzle: int, multiprocessors: int = MULTIPROCESSORS
) -> tuple[Blocks, int]:
    """Returns the tiles of a problem, and into how many parts its classes are split.

    Args:
      rows: N >= 1.
      classes: V >= 1.
      swizzle: what the alignment of the kernel allows.
      multiprocessors: of the device.

    Returns:
      The blocks, and the smallest number of splits that takes the least time, by the
      tiles that the busiest multiprocessor computes.
    """
    width = 256 if classes > 256 * multiprocessors // 2 else 128
    blocks = Blocks(classes=width, swizzle=swizzle)
    row_tiles = math.ceil(rows / blocks.block_rows)
    if row_tiles % 2 == 0:
        blocks = dataclasses.replace(blocks, cluster=2)
    tiles = math.ceil(classes / width)

    def time(splits):
        waves = math.ceil(row_tiles * splits / multiprocessors)
        # Filling the ring and merging the splits cost about a quarter of a tile.
        return waves * (math.ceil(tiles / splits) + 0.25)

    splits = min(range(1, min(tiles, multiprocessors) + 1), key=time)
    return blocks, splits


def run(plan: Plan, inputs: Inputs) -> Partials:
    """Returns the statistics of every row in every split, from one launch."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks, dtype = plan.blocks, inputs.hidden.dtype
    ring = (blocks.stages, blocks.block_rows, blocks.features)
    tile = (blocks.features, blocks.classes)
    transforms = (
        plgpu.TilingTransform((8, blocks.swizzle // 2)),
        plgpu.SwizzleTransform(blocks.swizzle),
    )
    shared = (blocks.rows,)
    barrier = plgpu.Barrier
    empty: Any = barrier(num_arrivals=_COMPUTING, num_barriers=blocks.stages)
    if blocks.cluster > 1:
        empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",),
            num_arrivals=_COMPUTING,
            num_barriers=blocks.stages,
        )
    scratch: dict[str, Any] = {
        "hidden_tiles": plgpu.SMEM(ring, dtype, transforms=transforms),
        "kernel_tiles": plgpu.SMEM(
            (blocks.stages, *(tile[::-1] if plan.transposed else tile)),
            dtype,
            transforms=transforms,
        ),
        "full": barrier(num_arrivals=2, num_barriers=blocks.stages),
        "empty": empty,
        "floats_out": plgpu.SMEM((_COMPUTING, len(plan.floats), *shared), jnp.float32),
    }
    if plan.integers:
        shape = (_COMPUTING, len(plan.integers), *shared)
        scratch["integers_out"] = plgpu.SMEM(shape, jnp.int32)
    if inputs.bias is not None:
        scratch["bias_tiles"] = plgpu.SMEM((2, blocks.classes), jnp.float32)
        scratch["bias_full"] = barrier(num_barriers=2)
        scratch["bias_empty"] = barrier(num_arrivals=_COMPUTING, num_barriers=2)
    if inputs.labels is not None:
        scratch["labels_in"] = plgpu.SMEM((_COMPUTING, *shared), jnp.int32)
        scratch["labels_full"] = barrier(num_barriers=_COMPUTING)
    if inputs.temper is not None:
        scratch["temper_in"] = plgpu.SMEM((_COMPUTING, 3, *shared), jnp.float32)
        scratch["temper_full"] = barrier(num_arrivals=3, num_barriers=_COMPUTING)
    row_tiles = plan.rows // (blocks.block_rows * blocks.cluster)
    result = (plan.splits, plan.rows)
    floats = jax.ShapeDtypeStruct((len(plan.floats), *result), jnp.float32)
    integers = None
    if plan.integers:
        integers = jax.ShapeDtypeStruct((len(plan.integers), *result), jnp.int32)
    cluster = {"cluster": (2,), "cluster_names": ("cluster",)}
    return plgpu.kernel(
        functools.partial(_statistics_kernel, plan),
        out_type=Partials(floats, integers),
        scratch_types=scratch,
        grid=(row_tiles, plan.splits),
        grid_names=("row", "split"),
        num_threads=_COMPUTING + 1,
        thread_name="warpgroup",
        kernel_name=KERNEL_NAME,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **(cluster if blocks.cluster > 1 else {}),
    )(*inputs)


def _statistics_kernel(plan: Plan, *refs, **scratch) -> None:
    """Streams the classes of one split past one tile of rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    inputs, results = Inputs(*refs[:5]), Partials(*refs[5:])
    blocks = plan.blocks
    warpgroup = lax.axis_index("warpgroup")
    row_tile = lax.axis_index("row")
    if blocks.cluster > 1:
        row_tile = row_tile * blocks.cluster + lax.axis_index("cluster")
    split = lax.axis_index("split")
    part = math.ceil(plan.tiles / plan.splits)
    first = split * part
    place = _Place(
        split=split,
        row=row_tile * blocks.block_rows,
        first=first,
        tiles=jnp.clip(plan.tiles - first, 0, part),
    )

    @pl.when(warpgroup == _COMPUTING)
    def _():
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
        _copy_tiles(plan, place, inputs, **scratch)

    @pl.when(warpgroup < _COMPUTING)
    def _():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        _fold_tiles(plan, place, warpgroup, inputs, results, **scratch)


class _Place(NamedTuple):
    """Where a block of threads works; int32 scalars.

    Attributes:
      split: the index of its split of the classes.
      row: its first row.
      first: its first tile of classes.
      tiles: how many it has.
    """

    split: Any
    row: Any
    first: Any
    tiles: Any


def _copy_tiles(plan: Plan, place: _Place, inputs: Inputs, **scratch) -> None:
    """Keeps the ring full, until all that was copied was used."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    full, empty = scratch["full"], scratch["empty"]
    total = place.tiles * plan.steps
    multicast = "cluster" if blocks.cluster > 1 else None

    def copy(step, slot):
        tile, part = lax.div(step, plan.steps), lax.rem(step, plan.steps)
        if inputs.bias is not None:

            @pl.when(part == 0)
            def _():
                _copy_bias(plan, place, tile, inputs.bias, **scratch)

        features = pl.ds(part * blocks.features, blocks.features)
        classes = pl.ds((place.first + tile) * blocks.classes, blocks.classes)
        rows = pl.ds(place.row, blocks.block_rows)
        window = (classes, features) if plan.transposed else (features, classes)
        plgpu.copy_gmem_to_smem(
            inputs.hidden.at[rows, features],
            scratch["hidden_tiles"].at[slot],
            full.at[slot],
        )
        plgpu.copy_gmem_to_smem(
            inputs.kernel.at[window],
            scratch["kernel_tiles"].at[slot],
            full.at[slot],
            collective_axes=multicast,
        )

    def fill(step, _):
        copy(step, step)

    def refill(step, _):
        slot = lax.rem(step, blocks.stages)
        plgpu.barrier_wait(empty.at[slot])
        copy(step, slot)

    def drain(step, _):
        plgpu.barrier_wait(empty.at[lax.rem(step, blocks.stages)])

    ahead = jnp.minimum(total, blocks.stages)
    lax.fori_loop(0, ahead, fill, None)
    lax.fori_loop(ahead, total, refill, None)
    lax.fori_loop(jnp.maximum(total - blocks.stages, 0), total, drain, None)


def _copy_bias(plan: Plan, place: _Place, tile, bias, **scratch) -> None:
    """Copies the bias of a tile of classes; two are in flight at most."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = plan.blocks.classes
    slot = lax.rem(tile, 2)

    @pl.when(tile >= 2)
    def _():
        plgpu.barrier_wait(scratch["bias_empty"].at[slot])

    plgpu.copy_gmem_to_smem(
        bias.at[pl.ds((place.first + tile) * size, size)],
        scratch["bias_tiles"].at[slot],
        scratch["bias_full"].at[slot],
    )


class _Row(NamedTuple):
    """What a computing warpgroup knows of its rows; None where there is none.

    Attributes:
      label: [R] int32.
      temper: a, b and c of `Inputs`, [R] or floats each.
    """

    label: Any
    temper: tuple[Any, Any, Any]

    def centred(self, u: jax.Array, peak: jax.Array) -> jax.Array:
        """Returns (u - peak) / τ in base 2, of [R, B] or of [R]."""
        before, factor, again = (_columns(a, u.shape) for a in self.temper)
        peak = _columns(peak, u.shape)
        c = u - peak if before is None else u * before - peak * before
        c = c * factor
        return c if again is None else c * again


def _fold_tiles(plan, place: _Place, warpgroup, inputs, results, **scratch) -> None:
    """Merges the tiles of one warpgroup's rows, and writes their statistics."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    first_row = place.row + warpgroup * blocks.rows
    rows = pl.ds(first_row, blocks.rows)
    row = _row(plan, warpgroup, rows, inputs, **scratch)

    def step(tile, running):
        logits = _product(plan, tile * plan.steps, warpgroup, **scratch)
        start = (place.first + tile) * blocks.classes
        chunks = _chunks(plan, tile, start, logits, **scratch)
        running = _merge(plan, start, chunks, running, row)
        if inputs.bias is not None:
            plgpu.barrier_arrive(scratch["bias_empty"].at[lax.rem(tile, 2)])
        return running

    running = lax.fori_loop(0, place.tiles, step, _start(plan))
    floats, integers = scratch["floats_out"], scratch.get("integers_out")
    outputs = [(floats, results.floats, plan.floats)]
    if integers is not None:
        outputs.append((integers, results.integers, plan.integers))
    for shared, _, names in outputs:
        for index, name in enumerate(names):
            shared[warpgroup, index] = getattr(running, name)
    plgpu.commit_smem()
    for shared, result, names in outputs:
        for index in range(len(names)):
            plgpu.copy_smem_to_gmem(
                shared.at[warpgroup, index], result.at[index, place.split, rows]
            )
    plgpu.wait_smem_to_gmem(0)


def _row(plan: Plan, warpgroup, rows, inputs: Inputs, **scratch) -> _Row:
    """Returns what is known of the rows, read through shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    label, temper = None, (plan.scale if plan.scale != 1 else None, plan.factor, None)
    if inputs.labels is not None:
        shared, full = scratch["labels_in"].at[warpgroup], scratch["labels_full"]
        plgpu.copy_gmem_to_smem(inputs.labels.at[rows], shared, full.at[warpgroup])
        plgpu.barrier_wait(full.at[warpgroup])
        label = _load(shared, _layout(1))
    if inputs.temper is not None:
        shared, full = scratch["temper_in"].at[warpgroup], scratch["temper_full"]
        for index in range(3):
            plgpu.copy_gmem_to_smem(
                inputs.temper.at[index, rows], shared.at[index], full.at[warpgroup]
            )
        plgpu.barrier_wait(full.at[warpgroup])
        temper = tuple(_load(shared.at[index], _layout(1)) for index in range(3))
    return _Row(label, temper)


def _product(plan: Plan, first_step, warpgroup, **scratch) -> jax.Array:
    """Returns the tile of products [R, B] that starts with a step of the ring.

    A slot is released one step late, when its wgmma is known to have ended.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks = plan.blocks
    full, empty = scratch["full"], scratch["empty"]
    rows = pl.ds(warpgroup * blocks.rows, blocks.rows)

    def multiply(accumulator):
        def body(part, _):
            slot = lax.rem(first_step + part, blocks.stages)
            plgpu.barrier_wait(full.at[slot])
            kernel = scratch["kernel_tiles"].at[slot]
            if plan.transposed:
                kernel = _transposed(kernel)
            plgpu.wgmma(accumulator, scratch["hidden_tiles"].at[slot, rows], kernel)
            plgpu.wgmma_wait(1)

            @pl.when(part > 0)
            def _():
                before = lax.rem(first_step + part - 1, blocks.stages)
                plgpu.barrier_arrive(empty.at[before])

        lax.fori_loop(0, plan.steps, body, None)
        return accumulator[...]

    shape = (blocks.rows, blocks.classes)
    products = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
    last = lax.rem(first_step + plan.steps - 1, blocks.stages)
    plgpu.barrier_arrive(empty.at[last])
    return products


def _chunks(plan: Plan, tile, start, products, **scratch) -> list[jax.Array]:
    """Returns the logits of a tile, `_CHUNK` columns each, -inf at dropped classes."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    blocks, masked = plan.blocks, "bias_tiles" in scratch
    slot = lax.rem(tile, 2)
    if masked:
        plgpu.barrier_wait(scratch["bias_full"].at[slot])
    chunks = []
    for column in range(0, blocks.classes, _CHUNK):
        u = products[:, column : column + _CHUNK]
        if masked:
            place = scratch["bias_tiles"].at[slot, pl.ds(column, _CHUNK)]
            bias = lax.broadcast_in_dim(_load(place, _layout(0)), u.shape, [1])
            u = u + bias
        if plan.softcap is not None:
            u = plan.softcap * _tanh(u * (1 / plan.softcap))
        if masked:
            u = jnp.where(bias == -jnp.inf, -jnp.inf, u)
        elif plan.classes % blocks.classes:
            beyond = _iota(u.shape) + column >= plan.classes - start
            u = jnp.where(beyond, -jnp.inf, u)
        chunks.append(u)
    return chunks


def _start(plan: Plan) -> Running:
    """Returns the statistics of rows before their first tile, [R] each."""

    def full(value, dtype: Any = jnp.float32):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        shape = (plan.blocks.rows,)
        return plgpu.layout_cast(jnp.full(shape, value, dtype), _layout(1))

    return Running(
        max=full(-jnp.inf),
        sum=full(0),
        label=full(-jnp.inf) if plan.labels else None,
        gap=full(0) if plan.mean else None,
        number=full(0, jnp.int32) if plan.mean else None,
        weighted=full(0) if plan.expected else None,
        argmax=full(0, jnp.int32) if plan.argmax else None,
        rest=None,
    )


def _merge(plan: Plan, start, chunks, running: Running, row: _Row) -> Running:
    """Merges a tile of logits into the running statistics.

    As `running.merge` does, but that a tile's columns are first folded into chunks,
    which need nothing of other threads.
    """
    tile_max = functools.reduce(jnp.maximum, chunks).max(axis=1)
    new = jnp.maximum(running.max, tile_max)
    # A row without any kept class so far is centred on 0: all its c are -inf.
    peak = jnp.where(new == -jnp.inf, 0.0, new)
    back = row.centred(running.max, peak)
    rescale = jnp.exp2(back)
    _, total, label, gap, number, weighted, argmax, _ = running
    if argmax is not None:
        lowest = _lowest(chunks, tile_max) + start
        argmax = jnp.where(tile_max > running.max, lowest, argmax)
    if label is not None:
        label = jnp.maximum(label, _pick(chunks, row.label - start))
    if gap is not None and number is not None:
        moved = jnp.where(number == 0, 0.0, running.max - peak)
        gap = gap + number.astype(jnp.float32) * moved
        gaps, counted = _gaps(chunks, peak)
        gap, number = gap + gaps, number + counted
    sums, terms = _sums_of_exponentials(chunks, peak, row, weighted is not None)
    if weighted is not None:
        moved = weighted + total * jnp.maximum(back, _LOWEST)
        weighted = rescale * moved + terms.sum(axis=1)
    total = rescale * total + sums.sum(axis=1)
    return Running(new, total, label, gap, number, weighted, argmax, None)


def _sums_of_exponentials(chunks, peak, row: _Row, expected: bool) -> tuple[Any, Any]:
    """Returns Σ 2^c, and Σ 2^c c where it is wanted, of each chunk's column."""
    sums = terms = None
    for u in chunks:
        c = row.centred(u, peak)
        weights = jnp.exp2(c)
        sums = weights if sums is None else sums + weights
        if expected:
            term = weights * jnp.maximum(c, _LOWEST)
            terms = term if terms is None else terms + term
    return sums, terms


def _pick(chunks, column) -> jax.Array:
    """Returns the logits [R] in the given columns of a tile; -inf outside it."""
    picked = None
    for index, u in enumerate(chunks):
        # Not iota + constant: all those columns would be kept in registers.
        here = _iota(u.shape) == _columns(column - index * _CHUNK, u.shape)
        u = jnp.where(here, u, -jnp.inf)
        picked = u if picked is None else jnp.maximum(picked, u)
    assert picked is not None
    return picked.max(axis=1)


def _gaps(chunks, peak) -> tuple[jax.Array, jax.Array]:
    """Returns Σ (u - peak) over the kept classes of a tile, and their number."""
    gaps = counts = 0.0
    for u in chunks:
        kept = u != -jnp.inf
        gaps = gaps + jnp.where(kept, u - _columns(peak, u.shape), 0.0)
        counts = counts + jnp.where(kept, 1.0, 0.0)
    assert isinstance(gaps, jax.Array) and isinstance(counts, jax.Array)
    return gaps.sum(axis=1), counts.sum(axis=1).astype(jnp.int32)


def _lowest(chunks, tile_max) -> jax.Array:
    """Returns the lowest column of a tile that reaches its maximum."""
    first = None
    for index, u in enumerate(chunks):
        best = u == _columns(tile_max, u.shape)
        found = jnp.where(best, index * _CHUNK, _NO_COLUMN)
        first = found if first is None else jnp.minimum(first, found)
    assert first is not None
    return (first + _iota(first.shape)).min(axis=1)


def _tanh(x: jax.Array) -> jax.Array:
    """Returns tanh(x) to 3e-7 of itself; the hardware's has 11 bits."""
    size = jnp.maximum(x, -x)
    power = jnp.exp2(size * (-2 * _LOG2_E))
    large = (1.0 - power) / (1.0 + power)
    square = x * x
    series = jnp.full(x.shape, _TANH[-1], x.dtype)
    for coefficient in _TANH[-2::-1]:
        series = series * square + coefficient
    small = x + x * square * series
    large = jnp.where(x < 0, -large, large)
    return jnp.where(size < _SMALL, small, large)


# tanh(x) = x + x³ P(x²) below _SMALL; from a least-squares fit of relative errors.
_SMALL = 0.55
_TANH = (-0.333333147, 0.133324806, -0.0538405286, 0.021020595, -0.00619878127)


def _columns(row: Any, shape: tuple[int, ...]) -> Any:
    """Returns [R] repeated for the columns of [R, B]; floats and None as they are."""
    if not isinstance(row, jax.Array) or row.ndim == len(shape):
        return row
    return lax.broadcast_in_dim(row, shape, [0])


def _layout(without: int | None = None) -> Any:
    """Returns how threads share an accumulator, or what is left without an axis."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = plgpu.Layout.WGMMA
    return layout if without is None else layout.reduce(without)


def _iota(shape: tuple[int, ...]) -> jax.Array:
    """Returns the column of every element."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_layout())


def _load(ref: Any, layout: Any) -> jax.Array:
    """Loads shared memory; JAX 0.10 takes another argument."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, (), layout=layout)  # pyright: ignore
    return plgpu.load(ref, layout=layout)


def _transposed(ref: Any) -> Any:
    """Returns a view [b, a] of [a, b]; JAX 0.10 has it elsewhere."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 11):
        return plgpu.transpose_ref(ref, (1, 0))  # pyright: ignore
    return ref.transpose((1, 0))
