"""What kernels for TPUs share: the memory of a core."""

from jax.experimental.pallas import tpu as pltpu

__all__ = ["SMALLEST_VMEM", "VMEM_SHARE", "vmem_bytes"]

# The smallest VMEM of a core since v5e (v5e and v6e have 128 MiB, v5p and 7x this), and
# what a kernel may take of it: the compiler keeps some for itself.
SMALLEST_VMEM = 64 * 2**20
VMEM_SHARE = 3 / 4


def vmem_bytes() -> int:
    """Returns the VMEM of a core of the default TPU; of the smallest without a TPU."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return SMALLEST_VMEM
