"""Times compiled programs against each other on the same inputs.

What a program is given are always its arguments, never constants that a compiler
could fold or hoist. A donated argument is copied anew before every call, outside the
measured span. The contenders of a case take turns, in an order that rotates from
round to round, so that what else the machine does falls on all of them alike.
"""

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# A sample lasts at least this long where nothing is donated: shorter calls are
# enqueued back to back, as a training loop does.
_SAMPLE_SECONDS = 0.005
_MAX_CALLS = 64
_FEWEST_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Program:
    """A function compiled for the shapes and dtypes of its arguments.

    Attributes:
      name: the contender's.
      executable: what `jax.jit(...).lower(...).compile()` returned.
      compile_seconds: time to trace, lower and compile it.
      temporary_bytes: peak memory besides arguments and outputs; None where the
        backend does not say.
      output_bytes: memory of the outputs that alias no argument, likewise.
      donated: positions of the arguments whose memory the outputs may take over.
    """

    name: str
    executable: Callable[..., Any]
    compile_seconds: float
    temporary_bytes: int | None
    output_bytes: int | None
    donated: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call, over the rounds.

    Attributes:
      median: of the rounds.
      low: first quartile.
      high: third quartile.
      best: the fastest round.
      samples: one number a round, in order.
    """

    median: float
    low: float
    high: float
    best: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Summarises the samples of one contender."""
        if len(samples) > 1:
            low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        else:
            low = high = samples[0]
        return cls(statistics.median(samples), low, high, min(samples), tuple(samples))


def compile_program(
    name: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    donated: tuple[int, ...] = (),
) -> Program:
    """Compiles a function and reads off what memory it will take.

    Args:
      name: the contender's.
      function: any function that `jax.jit` takes.
      arguments: arrays or `jax.ShapeDtypeStruct`s.
      donated: positions of the arguments that the outputs may overwrite.

    Returns:
      The program, ready to be timed.
    """
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
    executable = lowered.compile()
    seconds = time.perf_counter() - start
    memory = executable.memory_analysis()
    if memory is None:
        return Program(name, executable, seconds, None, None, donated)
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        name, executable, seconds, memory.temp_size_in_bytes, outputs, donated
    )


def call(program: Program, arguments: tuple[Any, ...]) -> tuple[Any, float]:
    """Runs a program once.

    Args:
      program: what to run.
      arguments: arrays; those that the program donates are copied first.

    Returns:
      Its outputs, ready, and the seconds that the call took.
    """
    arguments = tuple(
        jnp.copy(argument) if position in program.donated else argument
        for position, argument in enumerate(arguments)
    )
    jax.block_until_ready(arguments)
    start = time.perf_counter()
    outputs = jax.block_until_ready(program.executable(*arguments))
    return outputs, time.perf_counter() - start


def interleave(
    programs: Sequence[Program],
    arguments: tuple[Any, ...],
    rounds: int,
    seconds: float = math.inf,
) -> dict[str, Timing]:
    """Times programs by turns.

    Each is called once before, untimed. The garbage collector is off meanwhile.

    Args:
      programs: the contenders of one case, which take the same arguments.
      arguments: arrays.
      rounds: samples of each.
      seconds: after which no round begins, once there were five.

    Returns:
      The timing of each, by name.
    """
    calls = {}
    for program in programs:
        _, once = call(program, arguments)
        calls[program.name] = 1 if program.donated else _calls_per_sample(once)
    samples: dict[str, list[float]] = {program.name: [] for program in programs}
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        for turn in range(rounds):
            if turn >= _FEWEST_ROUNDS and time.perf_counter() - start > seconds:
                break
            first = turn % len(programs)
            for program in (*programs[first:], *programs[:first]):
                count = calls[program.name]
                samples[program.name].append(_sample(program, arguments, count))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(measured) for name, measured in samples.items()}


def paired_ratio(ours: Timing, theirs: Timing) -> float:
    """The median over the rounds of our time over theirs in the same round."""
    pairs = zip(ours.samples, theirs.samples, strict=True)
    return statistics.median(a / b for a, b in pairs)


def _calls_per_sample(seconds: float) -> int:
    return max(1, min(_MAX_CALLS, math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-7))))


def _sample(program: Program, arguments: tuple[Any, ...], count: int) -> float:
    if count == 1:
        return call(program, arguments)[1]
    start = time.perf_counter()
    outputs = None
    for _ in range(count):
        outputs = program.executable(*arguments)
    jax.block_until_ready(outputs)
    return (time.perf_counter() - start) / count
