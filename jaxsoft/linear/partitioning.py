"""How a function of this room is cut when jit compiles it for several devices.

XLA's partitioner gathers whatever a loop slices along a sharded axis: the kernel, and
hidden states. Rows are independent and classes merge, so both can stay where they
are: the function is compiled for one shard of rows and classes, with the collectives
of `sharding.py` inside, as in `jax.shard_map`.
"""

from typing import Any

from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ["shared"]


def shared(foldable: Any, tree: Any, roles: list[str], out_roles: list[str]) -> Any:
    """Returns a function of flat arrays that devices share.

    Args:
      foldable: the function, see `folding.py`.
      tree: the structure of its arguments.
      roles: the roles of its flat arguments.
      out_roles: the roles of its flat results.

    Returns:
      A function that returns a list of arrays; for one device, and inside shard_map, it
      is the given function.
    """

    def partition(mesh, arg_shapes, result_shapes):
        del result_shapes
        shardings = [shape.sharding for shape in arg_shapes]
        if not all(isinstance(s, NamedSharding) for s in shardings):
            # Without a mesh there are no axes to name: every device does it all.
            kind = type(shardings[0])
            whole = kind.get_replicated(tuple(shardings[0]._device_assignment))
            results, arguments = [whole] * len(out_roles), (whole,) * len(roles)
            return mesh, foldable.flat(tree), results, arguments
        shapes = [shape.shape for shape in arg_shapes]
        axes = _axes(mesh, roles, shapes, [s.spec for s in shardings])
        local = foldable.over(axes["v"]).flat(tree)

        def lower(*flat):
            out = local(*flat)
            if not foldable.partial:
                return out
            summed = [_missing(role, axes) for role in out_roles]
            return [
                lax.psum(a, over) if over else a
                for a, over in zip(out, summed, strict=True)
            ]

        def place(names):
            return [_named(mesh, role, axes) for role in names]

        return mesh, lower, place(out_roles), tuple(place(roles))

    function = custom_partitioning(foldable.flat(tree))
    # In the order in which the rule meets them.
    letters = list(dict.fromkeys("".join(roles + out_roles)))
    summed = [f for f in "nv" if f in letters and f not in "".join(out_roles)]
    function.def_partition(
        partition,
        sharding_rule=f"{_rule(roles)} -> {_rule(out_roles)}",
        reduction_factors=tuple(summed),
        need_replication_factors=tuple(f for f in letters if f not in "nv"),
    )
    return function


def _rule(roles: list[str]) -> str:
    return ", ".join(" ".join(role) for role in roles)


def _axes(
    mesh: Mesh, roles: list[str], shapes: list[tuple[int, ...]], specs: list[Any]
) -> dict[str, tuple[str, ...]]:
    """Returns the mesh axes of rows and classes: those that the first array has.

    Rows come first: an axis that shards both shards the rows. What does not divide
    evenly is not sharded.
    """
    axes: dict[str, tuple[str, ...]] = {"n": (), "v": ()}
    taken: set[str] = set()
    for letter in "nv":
        for role, shape, spec in zip(roles, shapes, specs, strict=True):
            if axes[letter] or letter not in role:
                continue
            dim = role.index(letter)
            names = spec[dim] if dim < len(spec) else None
            names = (names,) if isinstance(names, str) else tuple(names or ())
            names = tuple(name for name in names if name not in taken)
            shards = 1
            for name in names:
                shards *= mesh.shape[name]
            if shape[dim] % shards == 0:
                axes[letter] = names
        taken.update(axes[letter])
    return axes


def _missing(role: str, axes: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Returns the mesh axes of what a result does not have."""
    return sum((names for letter, names in axes.items() if letter not in role), ())


def _named(mesh: Mesh, role: str, axes: dict[str, tuple[str, ...]]) -> NamedSharding:
    return NamedSharding(
        mesh, PartitionSpec(*(axes.get(letter) or None for letter in role))
    )
