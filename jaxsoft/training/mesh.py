"""The devices of a run: batches lie over the axis `data`, the head over `vocab`.

Nothing else is cut: the trunk is replicated, and so are heads other than the full one.
Programs are plain jit; where parameters lie is in their metadata (see `LanguageModel`),
and everything follows from there. A run without a mesh is one on a mesh of one device.
"""

import math
import re
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoft.training.errors import MeshError

__all__ = [
    "AXES",
    "DATA",
    "VOCAB",
    "over_data",
    "parse_mesh",
    "placed",
    "replicated",
    "usable_mesh",
]

State = TypeVar("State")
AXES = DATA, VOCAB = ("data", "vocab")


def parse_mesh(text: str) -> Mesh:
    """Makes a mesh of all devices.

    Args:
      text: axes and their sizes, such as "data=2,vocab=4"; an axis left out has
        size 1.

    Returns:
      The mesh, with the axes `data` and `vocab`.

    Raises:
      MeshError: the text is something else, or the sizes do not multiply to the
        number of devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=([1-9][0-9]{0,8})", part.strip(), re.ASCII)
        if match is None:
            raise MeshError(
                "`mesh` must be axes with their sizes, such as data=2,vocab=4, got "
                f"{text!r}."
            )
        name = match[1]
        if name not in AXES or name in sizes:
            raise MeshError(
                f"`mesh` must have the axes data and vocab, each once, got {text!r}."
            )
        sizes[name] = int(match[2])
    shape = tuple(sizes.get(name, 1) for name in AXES)
    devices = jax.device_count()
    if math.prod(shape) != devices:
        raise MeshError(
            f"the sizes in `mesh` must multiply to the number of devices, {devices}, "
            f"got {text!r}, which takes {math.prod(shape)}."
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def usable_mesh(mesh: Mesh | None, batch_size: int) -> Mesh:
    """Returns a mesh with both axes.

    Args:
      mesh: with the axes `data` and `vocab` or one of them, or None.
      batch_size: sequences a step.

    Returns:
      The same devices, or the first one for None.

    Raises:
      MeshError: the mesh has other axes, or `data` does not divide the batch.
    """
    if mesh is None:
        return Mesh(np.asarray(jax.local_devices()[:1]).reshape(1, 1), AXES)
    unknown = [name for name in mesh.axis_names if name not in AXES]
    if unknown:
        raise MeshError(
            f"`mesh` must have the axes data and vocab, got {unknown[0]!r}."
        )
    order = [mesh.axis_names.index(name) for name in AXES if name in mesh.axis_names]
    shape = [mesh.shape.get(name, 1) for name in AXES]
    mesh = Mesh(mesh.devices.transpose(order).reshape(shape), AXES)
    size = mesh.shape[DATA]
    if batch_size % size:
        raise MeshError(
            f"`batch_size` must be a multiple of the {size} devices along data, got "
            f"{batch_size}; give {-(-batch_size // size) * size}, or another `mesh`."
        )
    return mesh


def placed(mesh: Mesh, abstract: State) -> State:
    """Says where the arrays of a training state lie.

    Args:
      mesh: with both axes.
      abstract: the state's structure; its Flax variables' metadata decides, and
        whatever has none is replicated.

    Returns:
      The structure with a sharding on every leaf.
    """
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        abstract,
        nnx.get_named_sharding(abstract, mesh),
    )


def over_data(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch, its sequences over `data`."""
    return NamedSharding(mesh, P(DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device has."""
    return NamedSharding(mesh, P())
