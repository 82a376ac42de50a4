"""What kernels know of the chips that they run on, and how GPUs divide by τ.

Kernels for GPUs do not divide: they multiply each difference of logits by factors that
plain XLA makes of a row's temperature, once.
"""

import math
from collections.abc import Collection

import jax
import jax.numpy as jnp

from jaxsoft._core.numerics import Temperature, is_ordinary
from jaxsoft._core.registry import Gpu, gpus, tpu

__all__ = [
    "MULTIPROCESSORS",
    "SMALLEST_VMEM",
    "VMEM_SHARE",
    "check_mosaic_gpu",
    "static_tau_factors",
    "supported_gpu",
    "tau_factors",
    "vmem_bytes",
]

# The smallest VMEM of a TPU core since v5e: v5e and v6e have 128 MiB, v5p and 7x have
# this.
SMALLEST_VMEM = 64 * 2**20
# The share of a core's VMEM that a kernel takes: the compiler keeps some for itself.
VMEM_SHARE = 3 / 4

# The multiprocessors that an H100 and an H200 have.
MULTIPROCESSORS = 132
_NAMES = {"9.0": "Hopper", "10.0": "Blackwell"}

_LOG2_E = math.log2(math.e)


def vmem_bytes() -> int:
    """Returns the VMEM of a core of the TPU; of the smallest where none is known."""
    from jax.experimental.pallas import tpu as pltpu

    if (chip := tpu()) is not None:
        return chip.vmem_bytes
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return SMALLEST_VMEM


def check_mosaic_gpu() -> None:
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


def supported_gpu(capabilities: Collection[str]) -> Gpu:
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


def static_tau_factors(
    tau: float | None, natural: bool = False
) -> tuple[float, float | None]:
    """Returns a and b of `tau_factors` as floats, for a temperature that is static.

    Args:
      tau: the temperature if it is static.
      natural: whether to divide in base e, not in base 2.

    Returns:
      Both for an ordinary temperature, whose c is 1; 1 and None for all others.
    """
    if tau is None or not is_ordinary(tau):
        return 1.0, None
    # As in numerics.py: a difference of logits must not overflow before τ divides.
    scale = 0.25 if tau > 1 else 1.0
    return scale, _unit(natural) / (tau * scale)


def tau_factors(tau: float | jax.Array, rows: int, natural: bool = False) -> jax.Array:
    """Returns the factors a, b and c of every row's differences of logits.

    `(x a - m a) b c` is (x - m) / τ in base 2. The third factor c differs from 1 only
    at τ = 0 and τ = ∞. There b and c are the largest or the smallest float: their
    product with any difference but 0 and -inf overflows or vanishes, and these two stay
    what they are. So the limits need no case of their own in the kernel.

    Args:
      tau: the temperature, a float or [N, 1].
      rows: N.
      natural: whether to divide in base e, not in base 2.

    Returns:
      [3, N] float32.
    """
    info = jnp.finfo(jnp.float32)
    if isinstance(tau, float):
        tau = jnp.full((rows, 1), tau, jnp.float32)
    parts = Temperature.prepare(tau, jnp.dtype(jnp.float32))
    is_infinite = jnp.isinf(parts.value)
    limit = jnp.where(parts.is_zero, info.max, info.tiny)
    at_limit = parts.is_zero | is_infinite
    divisor = jnp.where(is_infinite, 1, parts.divisor)
    b = jnp.where(at_limit, limit, _unit(natural) / divisor)
    # A negative temperature is NaN, and so is everything computed from it.
    b = jnp.where(jnp.isnan(parts.value), jnp.nan, b)
    c = jnp.where(at_limit, limit, 1)
    return jnp.stack([parts.scale[:, 0], b[:, 0], c[:, 0]])


def _unit(natural: bool) -> float:
    """Returns 1 in the base of logarithms that differences of logits have."""
    return 1.0 if natural else _LOG2_E
