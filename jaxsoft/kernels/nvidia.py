"""What kernels for NVIDIA GPUs share: the package, the device, and temperatures."""

import math
from collections.abc import Collection

import jax
import jax.numpy as jnp

from jaxsoft._core.registry import Gpu, gpus
from jaxsoft._core.temperature import Temperature, is_ordinary

__all__ = [
    "MULTIPROCESSORS",
    "check_pallas",
    "chip",
    "static_temper",
    "temper",
]

# Of an H100 and of an H200.
MULTIPROCESSORS = 132
_NAMES = {"9.0": "Hopper", "10.0": "Blackwell"}

_LOG2_E = math.log2(math.e)


def check_pallas() -> None:
    """Requires what Pallas imports and JAX does not install."""
    try:
        import jax.experimental.pallas.mosaic_gpu  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("absl"):
            raise
        raise ModuleNotFoundError(
            'implementation "mosaic_gpu" needs absl-py, which JAX does not install: '
            "pip install absl-py",
            name=error.name,
        ) from error


def chip(capabilities: Collection[str]) -> Gpu:
    """Returns what the GPUs that a program will run on are; they must be alike.

    Without a GPU, as where a program is compiled for one that is elsewhere, it is an
    H100.

    Args:
      capabilities: the compute capabilities that there is a kernel for.

    Raises:
      NotImplementedError: if there is none for these GPUs.
    """
    devices = gpus()
    if not devices:
        return Gpu("9.0", MULTIPROCESSORS)
    found = {device.compute_capability for device in devices}
    if len(found) > 1 or not found <= set(capabilities):
        allowed = ", or every one ".join(f"{c} ({_NAMES[c]})" for c in capabilities)
        raise NotImplementedError(
            f"Every GPU must have compute capability {allowed} for implementation "
            f'"mosaic_gpu", got {" and ".join(sorted(found))}. Take "xla".'
        )
    return Gpu(found.pop(), min(device.core_count for device in devices))


def static_temper(tau: float | None) -> tuple[float, float | None]:
    """Returns a and b of `temper` as floats, for a temperature that is static.

    Args:
      tau: the temperature if it is static.

    Returns:
      Both for an ordinary temperature, for which c is 1; 1 and None otherwise.
    """
    if tau is None or not is_ordinary(tau):
        return 1.0, None
    # As in temperature.py: a difference of logits must not overflow before τ divides.
    scale = 0.25 if tau > 1 else 1.0
    return scale, _LOG2_E / (tau * scale)


def temper(tau: float | jax.Array, rows: int) -> jax.Array:
    """Returns what each row's logits are multiplied by, [3, N] float32.

    `(x a - m a) b c` is (x - m) / τ in base 2. c is 1 but at the limits.
    At τ = 0 and τ = ∞ the two factors overflow or vanish for every difference but 0 and
    -inf, which stay what they are: no case of its own in the kernel.
    """
    info = jnp.finfo(jnp.float32)
    if isinstance(tau, float):
        tau = jnp.full((rows, 1), tau, jnp.float32)
    parts = Temperature.prepare(tau, jnp.dtype(jnp.float32))
    hot = jnp.isinf(parts.value)
    limit = jnp.where(parts.is_zero, info.max, info.tiny)
    limited = parts.is_zero | hot
    factor = jnp.where(limited, limit, _LOG2_E / jnp.where(hot, 1, parts.divisor))
    # A negative τ is NaN, and so is all that comes of it.
    factor = jnp.where(jnp.isnan(parts.value), jnp.nan, factor)
    again = jnp.where(limited, limit, 1)
    return jnp.stack([parts.scale[:, 0], factor[:, 0], again[:, 0]])
