"""Times compiled programs against each other on the same inputs.

What a program is given are always its arguments, never constants that a compiler
could fold or hoist. A donated argument is copied anew before every call, outside the
measured span; a chain's calls each take over what the last one returned, as a training
loop's do, and nothing is copied. The contenders of a case take turns, in an order that
rotates from round to round, so that what else the machine does falls on all of them
alike.
"""

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import device_time

# A sample lasts at least this long where nothing is donated: shorter calls are
# enqueued back to back, as a training loop does.
_SAMPLE_SECONDS = 0.005
# A chain's samples are longer: what it works on differs from call to call.
_CHAIN_SECONDS = 0.05
_MAX_CALLS = 64
FEWEST_ROUNDS = 5
_UNMARKED = contextlib.nullcontext()


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
      state_bytes: memory of what a chain carries from call to call.
    """

    name: str
    executable: Callable[..., Any]
    compile_seconds: float
    temporary_bytes: int | None
    output_bytes: int | None
    donated: tuple[int, ...] = ()
    state_bytes: int = 0

    def without_state(self) -> "Program":
        """What was read off a program, when it need not run any more."""
        return dataclasses.replace(self, executable=_released)


def _released(*_: Any) -> Any:
    raise RuntimeError("this program was released")


class Chain:
    """A program each of whose calls goes on where the one before it ended.

    The state is made before the first call, so that programs can be compiled, and
    those that are too large left out, before any takes up memory.
    """

    def __init__(self, executable: Callable[..., Any], init: Callable[[], Any]):
        """Takes `executable(state, *arguments) -> (state, outputs)`, state donated."""
        self._executable = executable
        self._init = init
        self._state: Any = None

    def start(self) -> None:
        """Makes the first state, unless there is a state."""
        if self._state is None:
            self._state = jax.block_until_ready(self._init())

    def __call__(self, *arguments: Any) -> tuple[Any, Any]:
        """Returns the state, which the next call overwrites, and the outputs."""
        self.start()
        # No state is left behind if the call fails: its memory may be gone.
        state, self._state = self._state, None
        self._state, outputs = self._executable(state, *arguments)
        return self._state, outputs


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call, over the rounds.

    Attributes:
      median: of the rounds.
      low: first quartile.
      high: third quartile.
      best: the fastest round.
      samples: one number a round, in order.
      clock: whose: "device", of what ran there, or "host", until it was there.
    """

    median: float
    low: float
    high: float
    best: float
    samples: tuple[float, ...]
    clock: str = "host"

    @classmethod
    def of(cls, samples: Sequence[float], clock: str = "host") -> "Timing":
        """Summarises the samples of one contender."""
        if len(samples) > 1:
            low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        else:
            low = high = samples[0]
        median, every = statistics.median(samples), tuple(samples)
        return cls(median, low, high, min(samples), every, clock)


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


def compile_chain(
    name: str,
    function: Callable[..., tuple[Any, Any]],
    init: Callable[[], Any],
    arguments: tuple[Any, ...],
) -> Program:
    """Compiles a step whose state goes from call to call and never is copied.

    Args:
      name: the contender's.
      function: `function(state, *arguments) -> (state, outputs)`.
      init: makes the first state; called when the program first runs.
      arguments: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A program of the arguments alone, which returns state and outputs.
    """
    state = jax.eval_shape(init)
    program = compile_program(name, function, (state, *arguments), donated=(0,))
    return dataclasses.replace(
        program,
        executable=Chain(program.executable, init),
        donated=(),
        state_bytes=sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
        ),
    )


def call(
    program: Program,
    arguments: tuple[Any, ...],
    mark: contextlib.AbstractContextManager[Any] = _UNMARKED,
) -> tuple[Any, float]:
    """Runs a program once.

    Args:
      program: what to run.
      arguments: arrays; those that the program donates are copied first.
      mark: entered while it runs.

    Returns:
      Its outputs, ready, and the seconds that the call took.
    """
    arguments = tuple(
        jnp.copy(argument) if position in program.donated else argument
        for position, argument in enumerate(arguments)
    )
    jax.block_until_ready(arguments)
    if isinstance(program.executable, Chain):
        program.executable.start()
    with mark:
        start = time.perf_counter()
        outputs = jax.block_until_ready(program.executable(*arguments))
        return outputs, time.perf_counter() - start


def interleave(
    programs: Sequence[Program],
    arguments: tuple[Any, ...],
    rounds: int,
    seconds: float = math.inf,
    before: Callable[[str], None] = lambda name: None,
    called: Mapping[str, float] | None = None,
    enough: Callable[[Mapping[str, Sequence[float]]], bool] = lambda samples: False,
) -> dict[str, Timing]:
    """Times programs by turns.

    Each is called once before, untimed, unless it was just now: that call, if a sample
    is but one call, is its sample of the first round. The garbage collector is off
    meanwhile. Samples are by the device's clock if its trace has all of them, and else
    all by the host's; a call before is in no trace, and then no sample.

    Args:
      programs: the contenders of one case, which take the same arguments.
      arguments: arrays.
      rounds: samples of each.
      seconds: after which no round begins, once there were five.
      before: told whose turn it is.
      called: seconds of a call of those that were called already, by name.
      enough: told the samples of each by the host's clock after every round; no other
        begins once it says so.

    Returns:
      The timing of each, by name.
    """
    calls, called = {}, called or {}
    for program in programs:
        name = program.name
        before(name)
        once = called[name] if name in called else call(program, arguments)[1]
        calls[name] = 1 if program.donated else _calls_per_sample(program, once)
    samples: dict[str, list[float]] = {program.name: [] for program in programs}
    collecting = gc.isenabled()
    gc.disable()
    start, names = time.perf_counter(), []
    try:
        with device_time.record() as recorder:
            for turn in range(rounds):
                if turn >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
                    break
                first = turn % len(programs)
                for program in (*programs[first:], *programs[:first]):
                    name = program.name
                    taken = turn == 0 and calls[name] == 1 and name in called
                    if taken and not recorder.traces:
                        samples[name].append(called[name])
                        continue
                    before(name)
                    names.append(name)
                    samples[name].append(
                        _sample(program, arguments, calls[name], recorder.sample())
                    )
                if enough(samples):
                    break
    finally:
        if collecting:
            gc.enable()
    if recorder.seconds is None:
        return {name: Timing.of(measured) for name, measured in samples.items()}
    by_name: dict[str, list[float]] = {name: [] for name in samples}
    for name, busy in zip(names, recorder.seconds, strict=True):
        by_name[name].append(busy / calls[name])
    return {name: Timing.of(found, "device") for name, found in by_name.items()}


def paired_ratio(ours: Timing, theirs: Timing) -> float:
    """The median over the rounds of our time over theirs in the same round."""
    pairs = zip(ours.samples, theirs.samples, strict=True)
    return statistics.median(a / b for a, b in pairs)


def _calls_per_sample(program: Program, once: float) -> int:
    chained = isinstance(program.executable, Chain)
    seconds = _CHAIN_SECONDS if chained else _SAMPLE_SECONDS
    return max(1, min(_MAX_CALLS, math.ceil(seconds / max(once, 1e-7))))


def _sample(
    program: Program,
    arguments: tuple[Any, ...],
    count: int,
    mark: contextlib.AbstractContextManager[Any],
) -> float:
    if count == 1:
        return call(program, arguments, mark)[1]
    if isinstance(program.executable, Chain):
        # A loop finds its own data in the caches, not those of whoever came before.
        call(program, arguments)
    with mark:
        start = time.perf_counter()
        outputs = None
        for _ in range(count):
            outputs = program.executable(*arguments)
        jax.block_until_ready(outputs)
        return (time.perf_counter() - start) / count
