"""An order of classes in which those with similar embeddings share paths."""

from collections.abc import Callable

import numpy as np

__all__ = ["order_by_similarity"]

# Members that a cluster's direction is estimated from, and steps of the estimate.
_MEMBERS = 512
_STEPS = 6


def order_by_similarity(
    embeddings: np.ndarray,
    cuts: list[np.ndarray],
    seed: int,
    progress: Callable[[float], object] | None,
) -> np.ndarray:
    """Sorts classes so that every cluster of every level is alike.

    Level by level, the members of each cluster are sorted along the direction in which
    they differ most, their first principal component, and cut at the given places.

    Args:
      embeddings: [V, H] finite float32.
      cuts: of each level, the first member of each of its clusters, from [0] for the
        root down; each level's cuts are among those of the next.
      seed: of the directions that the estimates start from.
      progress: told the share of the work that is done, or None.

    Returns:
      [V] int64, the classes from left to right.
    """
    start = np.random.default_rng(seed).standard_normal((embeddings.shape[1], 1))
    order = np.arange(len(embeddings))
    for level, firsts in enumerate(cuts):
        sizes = np.diff(np.append(firsts, len(order)))
        # As many clusters at once as fit a budget.
        batch = max(1, 2**24 // (int(sizes.max()) * embeddings.shape[1]))
        for begin in range(0, len(firsts), batch):
            chosen = slice(begin, begin + batch)
            _sort(embeddings, order, firsts[chosen], sizes[chosen], start)
            if progress is not None:
                progress((level + min(1, (begin + batch) / len(firsts))) / len(cuts))
    return order


def _sort(embeddings, order, firsts, sizes, start) -> None:
    """Sorts the members of clusters, each along its first principal component."""
    most = int(sizes.max())
    member = np.arange(most)[None]
    places = firsts[:, None] + np.minimum(member, sizes[:, None] - 1)
    live = member < sizes[:, None]
    ids = order[places]
    members = embeddings[ids]
    every = -(-most // _MEMBERS)
    sampled, kept = members[:, ::every], live[:, ::every, None]
    count = kept.sum(axis=1, keepdims=True)
    mean = (sampled * kept).sum(axis=1, keepdims=True) / count
    centred = np.where(kept, sampled - mean, 0).astype(members.dtype)
    axis = start.astype(members.dtype)[None]
    for _ in range(_STEPS):
        axis = centred.transpose(0, 2, 1) @ (centred @ axis)
        norm = np.linalg.norm(axis, axis=1, keepdims=True)
        axis = axis / np.maximum(norm, np.finfo(axis.dtype).tiny)
    along = np.where(live, (members @ axis)[..., 0], np.inf)
    ranked = np.take_along_axis(ids, np.argsort(along, axis=1, kind="stable"), axis=1)
    order[places[live]] = ranked[live]
