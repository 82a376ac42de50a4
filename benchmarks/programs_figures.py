"""What `python -m benchmarks programs` counts in a program that it does not run.

The figures of a program; one that is absent is 0:

- `temporaries`, `arguments`, `results`, `aliased`: bytes on one device, as the
  compiler's `memory_analysis()` gives them.
- `dots`: matrix products in StableHLO, which JAX hands to the compiler, counted once
  for each place that calls them. `dot flops`: 2·M·N·K of each, times the iterations of
  the loops around it; `dot flops bf16`: those of operands of that type.
- `transcendentals`: elements of which StableHLO takes exponentials, logarithms,
  powers, tangents or roots, times the iterations. `all_reduce` and its like, and
  their `bytes` of results: collectives that StableHLO asks for, likewise.
- `open loops`: loops whose number of iterations is not written there; what is in them
  counts once. Of branches the one with the most of a figure counts.
- `machine dots`: `dot`, `convolution`, which is what TPUs make of products, and calls
  of libraries' products in the optimized HLO, each once. `all-reduce` and its like,
  and their `bytes` of results: collectives of the optimized HLO, each once.
- `moved`: bytes that instructions of the optimized HLO read and write in the device's
  memory, those of a loop as often as it runs; `jaxsoft devices` counts the same.
- `bundles`, `open bundles`: of a TPU whose compiler writes its code to a folder, those
  that run, and 1 if they may be more: `jaxsoft devices --schedule` counts the same.
- `flops`, `accessed`: operations and bytes by the compiler's `cost_analysis()`, which
  takes a loop's body once; compilers for GPUs that are not here do not tell.

A program over a mesh is that of one of four devices, in two rows of tokens and two
columns of classes. What `jax.jit` alone divides is hidden from StableHLO, so that such
programs have no `dots`, but have `machine dots`.
"""

import collections
import functools
import math
import operator
import re
from pathlib import Path
from typing import Any

import jax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from benchmarks import programs_cases as cases
from jaxsoft.devices.hlo import work_of
from jaxsoft.devices.schedule import forget, schedule_of

__all__ = ["COLLECTIVES", "measure"]

COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_COLLECTIVE = re.compile(rf" = (.*?) ({COLLECTIVES})(?:-done)?\(")
_PRODUCT = re.compile(
    r" (?:dot|convolution)\(|custom_call_target=\"[^\"]*(?:gemm|matmul|__cudnn)"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_TRANSCENDENTAL = (
    "cbrt exponential exponential_minus_one log log_plus_one logistic power rsqrt "
    "sqrt tan tanh cosine sine"
)
_ELEMENTWISE = {f"stablehlo.{name}" for name in _TRANSCENDENTAL.split()}
_ASKED = {f"stablehlo.{name}" for name in COLLECTIVES.replace("-", "_").split("|")}
# Not multiplied by iterations.
_ONCE = ("dots", "open loops")


def measure(
    program: cases.Program,
    mesh: Mesh,
    platform: str,
    dumps: Path | None = None,
    delay: int = 0,
) -> dict[str, int]:
    """Returns the figures of a program.

    Args:
      program: what to compile.
      mesh: of devices, perhaps abstract ones; the first is what a program runs on
        that runs on one.
      platform: of the devices, by JAX's name.
      dumps: where a TPU's compiler writes code, see `surveying.dumping_to`, or None.
      delay: the TPU's `Chip.branch_delay`.
    """
    arrays = []
    for tree, spec in zip(program.arrays, program.specs, strict=True):
        place = NamedSharding(mesh, spec)
        if program.place == cases.ONE:
            place = SingleDeviceSharding(mesh.devices[0, 0])
        put = functools.partial(_placed, place)
        arrays.append(jax.tree.map(put, tree))
    jitted = jax.jit(program.function, donate_argnums=program.donated)
    lowered = jitted.trace(*arrays).lower(lowering_platforms=(platform,))
    if dumps is not None:
        forget(dumps)
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    figures = collections.Counter(
        temporaries=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        flops=int(costs.get("flops", 0)),
        accessed=int(costs.get("bytes accessed", 0)),
    )
    figures += _of_stablehlo(lowered.compiler_ir("stablehlo"))
    text = compiled.as_text() or ""
    work = work_of(text)
    figures += collections.Counter(moved=work.accessed if work else 0)
    figures += _of_machine(text)
    if dumps is not None:
        schedule = schedule_of(dumps, text, delay)
        figures["bundles"] = schedule.cycles
        figures["open bundles"] = int(schedule.is_least)
    return dict(figures)


def _placed(place: Any, array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def _of_machine(text: str) -> collections.Counter[str]:
    """Counts products and collectives of optimized HLO."""
    found: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        found["machine dots"] += bool(_PRODUCT.search(line))
        if collective := _COLLECTIVE.search(line):
            found[collective[2]] += 1
            for _, bits, shape in _ARRAY.findall(collective[1]):
                sizes = [int(size) for size in shape.split(",") if size]
                found[f"{collective[2]} bytes"] += (
                    math.prod(sizes) * int(bits or 8) // 8
                )
    return found


def _of_stablehlo(module: Any) -> collections.Counter[str]:
    """Counts products, transcendental functions and collectives of StableHLO."""
    functions = {
        op.attributes["sym_name"].value: op
        for op in module.body.operations
        if op.operation.name == "func.func"
    }

    @functools.cache
    def of_function(name: str) -> collections.Counter[str]:
        return of_region(functions[name].regions[0])

    def of_region(region: Any) -> collections.Counter[str]:
        found: collections.Counter[str] = collections.Counter()
        for block in region.blocks:
            for op in block.operations:
                found.update(of_operation(op))
        return found

    def of_operation(op: Any) -> collections.Counter[str]:
        name = op.operation.name
        if name == "func.call":
            return of_function(op.attributes["callee"].value)
        if name == "stablehlo.composite":
            return of_function(op.attributes["decomposition"].value)
        inner = [of_region(region) for region in op.regions]
        if name in ("stablehlo.case", "stablehlo.if"):
            return functools.reduce(operator.or_, inner)
        found = sum(inner, _of_one(op))
        iterations = _iterations(op) if name == "stablehlo.while" else 1
        if iterations is None:
            found["open loops"] += 1
        return collections.Counter(
            {k: n * (1 if k in _ONCE else iterations or 1) for k, n in found.items()}
        )

    return of_function("main")


def _of_one(op: Any) -> collections.Counter[str]:
    """Counts an operation without what is inside."""
    found: collections.Counter[str] = collections.Counter()
    name = op.operation.name
    if name == "stablehlo.dot_general":
        numbers = stablehlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
        left, right = (ir.RankedTensorType(value.type) for value in op.operands)
        summed = [left.shape[axis] for axis in numbers.lhs_contracting_dimensions]
        flops = 2 * math.prod(summed) * math.prod(_shape(op.results[0]))
        types = sorted({str(left.element_type), str(right.element_type)})
        found["dots"] = 1
        found["dot flops"] = found[f"dot flops {' '.join(types)}"] = flops
    elif name in _ELEMENTWISE:
        found["transcendentals"] = math.prod(_shape(op.results[0]))
    elif name in _ASKED:
        name = name.removeprefix("stablehlo.")
        found[name] = 1
        for value in op.results:
            bits: Any = ir.RankedTensorType(value.type).element_type
            found[f"{name} bytes"] += math.prod(_shape(value)) * max(bits.width, 8) // 8
    return found


def _shape(value: Any) -> list[int]:
    return ir.RankedTensorType(value.type).shape


def _iterations(loop: Any) -> int | None:
    """Returns how often a loop runs that counts up by 1 to a number; None if unknown.

    JAX writes no other loops that compare a counter with a number.
    """
    block = loop.regions[0].blocks[0]
    compare = list(block.operations)[-1].operands[0].owner
    if isinstance(compare, ir.Block) or compare.name != "stablehlo.compare":
        return None
    start, end = (_number(loop, value) for value in compare.operands)
    direction = stablehlo.ComparisonDirectionAttr(
        compare.attributes["comparison_direction"]
    )
    if start is None or end is None or direction.value != "LT":
        return None
    return max(end - start, 0)


def _number(loop: Any, value: Any) -> int | None:
    """Returns what a value of a loop's condition is at first, if that is written."""
    if isinstance(value.owner, ir.Block):
        value = loop.operands[ir.BlockArgument(value).arg_number]
    if isinstance(value.owner, ir.Block) or value.owner.name != "stablehlo.constant":
        return None
    return int(ir.DenseIntElementsAttr(value.owner.attributes["value"])[0])
