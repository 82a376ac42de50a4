"""A layer of relaxed one-hot samples, annealed as it is trained."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxsoft._core import mesh_axes, noise
from jaxsoft.logits.gumbel import gumbel_softmax
from jaxsoft.logits.softmax import softmax
from jaxsoft.nn import arguments

__all__ = ["GumbelSoftmax"]

Schedule = Callable[[jax.Array], ArrayLike]


class GumbelSoftmax(nnx.Module):
    """Draws a relaxed one-hot sample of each row of logits.

    In training it is `jaxsoft.gumbel_softmax`. After `eval()` it draws nothing: it
    gives the one-hot argmax of the logits, the lowest of equals, with a gradient of 0.

    Attributes:
      temperature: τ; None with a schedule.
      schedule: what gives τ for a step; None without.
      step: with a schedule, an int32 variable: how often the layer was called in
        training, which a schedule turns into τ. None without.
      hard: whether samples are exactly one-hot, with the derivative of relaxed ones.
      deterministic: whether nothing is drawn; `train()` and `eval()` set it.
      rngs: the stream of keys.

    Args:
      temperature: τ in [0, ∞]: a number, an array, a module such as
        `LearnableTemperature`, or a schedule `step -> τ` such as those of
        `jaxsoft.schedules` and of Optax.
      hard: as above.
      axis: the class axis.
      generator: where random bits come from; see `jaxsoft.gumbel_softmax`.
      deterministic: as above.
      rngs: source of keys; the stream "gumbel" of it, else its default one. With None
        each call needs a key.

    Raises:
      TypeError: if `rngs` is no `nnx.Rngs`, no stream and not None.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxsoft import schedules
      >>> from jaxsoft.nn import GumbelSoftmax
      >>> anneal = schedules.exponential(1e-2, 0.5)
      >>> layer = GumbelSoftmax(anneal, hard=True, rngs=nnx.Rngs(0))
      >>> logits = jnp.array([[0.0, 40.0, 0.0], [40.0, 0.0, 0.0]])
      >>> print(layer(logits))
      [[0. 1. 0.]
       [1. 0. 0.]]
      >>> print(layer.step[...], f"{layer.current_temperature():.2f}")
      1 0.99
    """

    def __init__(
        self,
        temperature: arguments.Temperature | Schedule = 1.0,
        *,
        hard: bool = False,
        axis: int = -1,
        generator: noise.Generator = "threefry",
        deterministic: bool = False,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ):
        """Stores the arguments; see the class for them."""
        # One assignment each: Flax fixes an attribute's kind by its first value.
        if isinstance(temperature, (int, float, jax.Array, nnx.Module)):
            self.schedule = None
            self.temperature = arguments.stored(temperature)
            self.step = None
        else:
            self.schedule: Schedule | None = temperature
            self.temperature = None
            self.step = nnx.Variable(jnp.zeros((), jnp.int32))
        self.hard = hard
        self.axis = axis
        self.generator: noise.Generator = generator
        self.deterministic = deterministic
        if isinstance(rngs, nnx.Rngs):
            self.rngs = rngs["gumbel"].fork()
        elif isinstance(rngs, nnx.RngStream):
            self.rngs = rngs.fork()
        elif rngs is None:
            self.rngs = nnx.data(None)
        else:
            raise TypeError(
                f"`rngs` must be an nnx.Rngs, an nnx.RngStream or None, got {rngs!r}."
            )

    def current_temperature(self) -> ArrayLike:
        """Returns τ, a number or an array: with a schedule, that of the next call."""
        if self.schedule is None:
            assert self.temperature is not None
            return arguments.current(self.temperature, None)
        assert self.step is not None
        return jnp.asarray(self.schedule(self.step[...]), jnp.float32)

    def __call__(
        self,
        logits: ArrayLike,
        *,
        where: ArrayLike | None = None,
        key: jax.Array | None = None,
        deterministic: bool | None = None,
    ) -> jax.Array:
        """Returns samples; in training, counts a step.

        Args:
          logits: [..., V] with the classes on the layer's axis, floating.
          where: booleans that broadcast to `logits`; False drops a class.
          key: a JAX random key; None takes one from the layer's stream.
          deterministic: overrides the layer's attribute.

        Returns:
          An array of the shape and dtype of `logits`.

        Raises:
          ValueError: if a key is needed and there is neither one nor a stream.
        """
        if self.deterministic if deterministic is None else deterministic:
            return _argmax_one_hot(logits, self.axis, where)
        if key is None:
            if self.rngs is None:
                raise ValueError(
                    "`key` must be given where the layer has no `rngs`, got None."
                )
            key = self.rngs()
        out = gumbel_softmax(
            key,
            logits,
            self.current_temperature(),
            axis=self.axis,
            where=where,
            hard=self.hard,
            generator=self.generator,
        )
        if self.step is not None:
            self.step[...] = self.step[...] + 1
        return out


@mesh_axes.accepts_explicit("logits", axis="axis")
def _argmax_one_hot(logits: ArrayLike, axis: int, where: ArrayLike | None) -> jax.Array:
    """Returns 1 at the lowest of the largest kept logits; 0 in a row without any."""
    ties = softmax(logits, temperature=0.0, axis=axis, where=where)
    classes = ties.shape[axis]
    first = jnp.argmax(ties > 0, axis=axis)
    one_hot = jax.nn.one_hot(first, classes, axis=axis, dtype=ties.dtype)
    return jnp.where(ties > 0, one_hot, ties)
