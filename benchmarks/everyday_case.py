"""What `python -m benchmarks everyday` compares: functions, sizes and their inputs.

A `Case` is a function of ours beside the formula that a user would write, a `Room` the
cases of one kind of input with the sizes that they have. Another case is another `Case`
in the `CASES` of `everyday_logits`, `everyday_layers` or `everyday_trees`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import checks, timing

OURS, PLAIN = "jaxsoft", "plain"
VALUE, GRADIENT, STEP = "value", "gradient", "step"

_CHECKED_ROWS = 48


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a cell's inputs.

    Attributes:
      rows: N.
      classes: V; 0 where the rows are their own classes.
      features: H; 0 for stored logits.
      dtype: of logits, or of hidden states and kernels.
    """

    rows: int
    classes: int = 0
    features: int = 0
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The sizes, as a command line names them."""
        sizes = (self.rows, self.features, self.classes)
        return "x".join(str(size) for size in sizes if size)

    @property
    def logits(self) -> int:
        """How many logits there are."""
        return self.rows * (self.classes or self.rows)


def several_rows(size: Size) -> bool:
    """Whether a size is one that every function has, and not of decoding alone."""
    return size.rows > 1


def every_size(size: Size) -> bool:
    """Whether a size is one that samplers have, which is all of them."""
    del size
    return True


def at_most(
    logits: int, among: Callable[[Size], bool] = several_rows
) -> Callable[[Size], bool]:
    """Returns what tells the sizes of so many logits, where more take too long."""
    return lambda size: among(size) and size.logits <= logits


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of ours, and the formula that a user would write.

    Attributes:
      function: its public name.
      title: its options, in words.
      ours: a call of it.
      plain: the strongest formula of jax.nn, jax.lax and Optax that is as short.
      inputs: names of the arrays that both take, in order.
      moving: names of those that the gradient of ours is by; empty if there is none.
      plain_moving: likewise of the formula, where its parameters are others.
      value: whether there is a cell of the value alone beside the gradient's.
      alike: whether the two give the same numbers; what is drawn, or is of another
        model, is compared by shapes, dtypes and ranges.
      compared: how many of the outputs are compared; None compares all.
      at: tells whether it has a cell at a size.
      allowed: gives the time, over the formula's, that the work itself has at a size.
      chained: whether `ours` and `plain` take the size and return a `peers.Contender`
        whose program carries its state from call to call.
    """

    function: str
    title: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: str
    moving: str = ""
    plain_moving: str = ""
    value: bool = True
    alike: bool = True
    compared: int | None = None
    at: Callable[[Size], bool] = several_rows
    allowed: Callable[[Size], float] = lambda size: 1.0
    chained: bool = False

    @property
    def name(self) -> str:
        """The function and its options."""
        return f"{self.function}, {self.title}" if self.title else self.function

    @property
    def whats(self) -> tuple[str, ...]:
        """What it has cells of; the gradient's has the value too."""
        if self.chained:
            return (STEP,)
        gradient = (GRADIENT,) if self.moving else ()
        return (VALUE, *gradient) if self.value or not gradient else gradient


@dataclasses.dataclass(frozen=True)
class Room:
    """Cases that share their inputs and sizes.

    Attributes:
      name: of the inputs.
      sizes: small ones first.
      cases: of every function.
      arrays: makes, of a size, what draws each input, with NumPy where it can: JAX
        would compile programs for each size.
    """

    name: str
    sizes: tuple[Size, ...]
    cases: tuple[Case, ...]
    arrays: Callable[[Size], Mapping[str, Callable[[], Any]]]


class Inputs:
    """The inputs of one size, each drawn when it is first asked for."""

    def __init__(self, room: Room, size: Size):
        self._drawn: dict[str, Any] = {}
        self._weights: dict[tuple[int, ...], jax.Array] = {}
        self._draws = room.arrays(size)

    def __getitem__(self, name: str) -> Any:
        if name not in self._drawn:
            drawn = jax.device_put(self._draws[name]())
            self._drawn[name] = jax.block_until_ready(drawn)
        return self._drawn[name]

    def weights(self, shape: tuple[int, ...]) -> jax.Array:
        """Returns positive numbers: a sum of probabilities does not cancel."""
        if shape not in self._weights:
            drawn = np.random.default_rng(3).random(shape, np.float32)
            self._weights[shape] = jax.device_put(drawn)
        return self._weights[shape]


def compiled(draws: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Returns what draws inputs with JAX, each as one program."""
    return {name: jax.jit(draw) for name, draw in draws.items()}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both programs of a cell, of the same arguments.

    Attributes:
      plain: the formula's program, which is compiled first.
      ours: our program.
      arguments: of both.
    """

    plain: timing.Program
    ours: timing.Program
    arguments: tuple[Any, ...]


def compile_pair(case: Case, what: str, size: Size, inputs: Inputs) -> Pair:
    """Compiles both functions of a cell.

    What was traced before is forgotten: the time to compile does not depend on which
    cells came first.

    Args:
      case: the functions.
      what: `VALUE`, `GRADIENT` or `STEP`.
      size: of the inputs.
      inputs: of that size.

    Returns:
      The programs and what they take.
    """
    names = case.inputs.split()
    if case.chained:
        arguments = ({name: inputs[name] for name in names},)
        programs = {}
        for name, make in ((PLAIN, case.plain), (OURS, case.ours)):
            contender = make(size)
            jax.clear_caches()
            program = contender.program(arguments)
            programs[name] = dataclasses.replace(program, name=name)
        return Pair(programs[PLAIN], programs[OURS], arguments)
    both, arguments = functions(case, what, tuple(inputs[name] for name in names))
    if what == GRADIENT:
        weights = jax.tree.map(lambda each: inputs.weights(each.shape), arguments[0])
        arguments = (weights, *arguments[1:])
    programs = {}
    for name, function in both.items():
        jax.clear_caches()
        programs[name] = timing.compile_program(name, function, arguments)
    return Pair(programs[PLAIN], programs[OURS], arguments)


def functions(
    case: Case, what: str, arrays: tuple[Any, ...]
) -> tuple[dict[str, Callable[..., Any]], tuple[Any, ...]]:
    """Returns what is compiled of a cell whose programs carry no state.

    Args:
      case: the functions.
      what: `VALUE` or `GRADIENT`.
      arrays: the inputs, which need not be there.

    Returns:
      The formula and ours by name, and the arguments of both: of gradients the first
      are weights, which are not there either.
    """
    both = {PLAIN: case.plain, OURS: case.ours}
    if what == VALUE:
        return both, arrays
    names = case.inputs.split()
    moving = {OURS: case.moving, PLAIN: case.plain_moving or case.moving}
    outputs = jax.tree.leaves(jax.eval_shape(case.plain, *arrays))
    for name, function in both.items():
        places = tuple(1 + names.index(each) for each in moving[name].split())
        both[name] = jax.value_and_grad(_total(function), places)
    return both, (tuple(map(_weight, outputs)), *arrays)


def _weight(output: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | None:
    """Returns weights of what has classes; of a loss for each row the mean is taken."""
    several = output.ndim > 1
    return jax.ShapeDtypeStruct(output.shape, jnp.float32) if several else None


def _total(function: Callable[..., Any]) -> Callable[..., jax.Array]:
    """Returns a scalar function of weights and arrays, to take the gradient of."""

    def total(weights: tuple[jax.Array | None, ...], *arrays: Any) -> jax.Array:
        parts = [
            jnp.mean(leaf)
            if weight is None
            else jnp.sum(leaf.astype(jnp.float32) * weight)
            for leaf, weight in zip(
                jax.tree.leaves(function(*arrays)), weights, strict=True
            )
        ]
        return functools.reduce(jnp.add, parts)

    return total


def compare(
    case: Case, what: str, size: Size, plain: Any, ours: Any
) -> tuple[dict[str, float], list[str]]:
    """Compares what both programs returned, on rows spread over the whole outputs.

    Args:
      case: the functions.
      what: `VALUE`, `GRADIENT` or `STEP`.
      size: of the inputs.
      plain: what the formula's program gave.
      ours: what our program gave.

    Returns:
      Errors relative to the size of each output, and what is wrong, in words.
    """
    if case.chained:
        plain, ours = plain[1], ours[1]
    # The gradients of another model have other shapes than ours.
    count = case.compared if case.alike or what != GRADIENT else 1
    mine, theirs = (jax.tree.leaves(outputs)[:count] for outputs in (ours, plain))
    errors, faults = {}, []
    if len(mine) != len(theirs):
        return {}, [f"{len(mine)} outputs, where the formula has {len(theirs)}"]
    limit = checks.limit(
        size.dtype, matmul=bool(size.features), platform=jax.default_backend()
    )
    for place, (found, known) in enumerate(zip(mine, theirs, strict=True)):
        name = f"output {place}"
        if found.shape != known.shape:
            faults.append(f"{name} has shape {found.shape}, not {known.shape}")
            continue
        rows = checks.Subset.of(len(found) if found.ndim else 1, 1, _CHECKED_ROWS).rows
        picked, true = (np.asarray(x)[rows] if x.ndim else x for x in (found, known))
        if not jnp.issubdtype(found.dtype, jnp.floating):
            # Rounding alone may choose the other of two classes that are nearly alike.
            classes = size.classes or size.rows
            if found.dtype != bool and not ((picked >= 0) & (picked < classes)).all():
                faults.append(f"{name} has a class that is none of {classes}")
        elif not case.alike:
            if not np.isfinite(np.asarray(picked, np.float32)).all():
                faults.append(f"{name} is not finite")
        else:
            error = checks.relative_error(picked, np.asarray(true, np.float64))
            errors[name] = error
            if not error <= limit:
                faults.append(f"{name} is off by {error:.1e}, allowed is {limit:.1e}")
    return errors, faults
