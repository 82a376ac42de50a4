"""Temperature scaling: one number between a trained model and its probabilities."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core import checks
from jaxsoft._core.temperature_fit import DEFAULT_BOUNDS, TemperatureFit
from jaxsoft.linear.calibration import linear_fit_temperature
from jaxsoft.logits.calibration import fit_temperature
from jaxsoft.logits.scaling import scaled_logits

__all__ = ["TemperatureScaling"]


class TemperatureScaling(nnx.Module):
    """A temperature that is fitted on held-out examples, then divides logits.

    Calling it gives `logits / τ`; `fit` sets τ. The temperature is no parameter: no
    optimizer touches it (`LearnableTemperature` is one that is trained).

    Attributes:
      temperature: τ, an `nnx.Variable` with a scalar.

    Args:
      temperature: τ in [0, ∞], a Python number or a scalar array.
      dtype: the dtype that the temperature is stored in.

    Raises:
      TypeError: if the temperature is no real number.
      ValueError: if the temperature is negative, NaN or no scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxsoft.nn import TemperatureScaling
      >>> logits = 2 * jax.random.normal(jax.random.key(0), (1000, 10))
      >>> labels = jax.random.categorical(jax.random.key(1), logits)
      >>> scaling = TemperatureScaling()
      >>> fit = scaling.fit(5 * logits, labels)
      >>> print(f"{scaling.temperature[...]:.1f} {fit.at_bound}")
      4.9 0
      >>> probabilities = jax.nn.softmax(scaling(5 * logits))
    """

    def __init__(self, temperature: ArrayLike = 1.0, *, dtype: DTypeLike = jnp.float32):
        """Keeps the temperature; see the class for the arguments."""
        value = jnp.asarray(checks.temperature(temperature, jnp.dtype(dtype)), dtype)
        checks.shape("temperature", value, (), "()")
        self.temperature = nnx.Variable(value)

    def __call__(self, logits: ArrayLike) -> jax.Array:
        """Returns logits divided by the temperature.

        Args:
          logits: [..., V], any floating dtype.

        Returns:
          [..., V] float32 (float64 for float64 logits): x / τ, but (x - max x) / τ in
          rows where |x| / τ exceeds 1024, infinite quotients included: these have the
          same softmax, and lose no digits. At τ = 0 the largest logits become 0 and all
          others -inf; a logit of -inf stays -inf.
        """
        return scaled_logits(logits, self.temperature[...])

    def fit(
        self,
        logits: ArrayLike,
        labels: ArrayLike,
        *,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        bounds: tuple[float, float] = DEFAULT_BOUNDS,
    ) -> TemperatureFit:
        """Sets the temperature to the one that fits labels best.

        Args:
          logits: [..., V] of held-out examples, as the module will be called with.
          labels: [...] integers in [0, V).
          where: booleans that broadcast to `logits`; False drops a class.
          weights: [...] booleans or reals >= 0, one weight a row.
          bounds: the lowest and the highest temperature.

        Returns:
          The fit, as `jaxsoft.fit_temperature`: it says whether a bound was reached.
          Where it is NaN, so is the temperature from now on.
        """
        return self._set(
            fit_temperature(logits, labels, where=where, weights=weights, bounds=bounds)
        )

    def fit_linear(
        self, hidden: ArrayLike, kernel: ArrayLike, labels: ArrayLike, **options: Any
    ) -> TemperatureFit:
        """Sets the temperature to the one that fits a layer's labels best.

        The logits `hidden @ kernel` are streamed, never stored.

        Args:
          hidden: [..., H] floating, of held-out examples.
          kernel: [H, V] floating, or [V, H] with `kernel_layout="vh"`.
          labels: [...] integers in [0, V).
          **options: of `jaxsoft.linear_fit_temperature`: bias, logit_softcap,
            class_mask, weights, bounds and more.

        Returns:
          The fit, as `jaxsoft.linear_fit_temperature`.
        """
        return self._set(linear_fit_temperature(hidden, kernel, labels, **options))

    def _set(self, fit: TemperatureFit) -> TemperatureFit:
        dtype = self.temperature[...].dtype
        self.temperature[...] = fit.temperature.astype(dtype)
        return fit
