"""An order of classes in which those with similar embeddings share paths."""

from collections.abc import Callable

import numpy as np

__all__ = ["order_by_similarity"]

# Members that a cluster's direction is estimated from, and steps of the estimate.
_MEMBERS = 256
_STEPS = 6


def order_by_similarity(
    embeddings: np.ndarray,
    cuts: list[np.ndarray],
    seed: int,
    progress: Callable[[float], None],
) -> np.ndarray:
    """Sorts classes so that every cluster of every level is alike.

    Level by level, the members of each cluster are sorted along the direction in which
    they differ most, their first principal component, and cut at the given places.

    Args:
      embeddings: [V, H] finite float32.
      cuts: of each level, the first member of each of its clusters, from [0] for the
        root down; each level's cuts are among those of the next.
      seed: of the directions that the estimates start from.
      progress: told the share of the work that is done.

    Returns:
      [V] int64, the classes from left to right.
    """
    start = np.random.default_rng(seed).standard_normal(embeddings.shape[1])
    order = np.arange(len(embeddings))
    work = len(cuts) * len(embeddings)
    done = 0
    for firsts in cuts:
        sizes = np.diff(np.append(firsts, len(order)))
        # One after another where there are few, all at once where they are small.
        for first, size in zip(firsts, sizes, strict=True) if len(firsts) < 256 else ():
            part = slice(first, first + size)
            members = embeddings[order[part]]
            axis = _direction(members[:: -(-size // (4 * _MEMBERS))], start)
            order[part] = order[part][np.argsort(members @ axis, kind="stable")]
        if len(firsts) >= 256:
            _sort_small(embeddings, order, firsts, sizes, start, progress, done / work)
        done += len(order)
        progress(done / work)
    return order


def _direction(members: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Returns the first principal component of members [M, H], about."""
    centred = members - members.mean(axis=0)
    axis = start.astype(members.dtype)
    for _ in range(_STEPS):
        axis = centred.T @ (centred @ axis)
        axis /= max(float(np.linalg.norm(axis)), np.finfo(axis.dtype).tiny)
    return axis


def _sort_small(embeddings, order, firsts, sizes, start, progress, share) -> None:
    """Sorts the members of many clusters, in batches of clusters of about a size."""
    width = embeddings.shape[1]
    batch = max(1, 2**24 // (int(sizes.max()) * width))
    for begin in range(0, len(firsts), batch):
        chosen, counts = firsts[begin : begin + batch], sizes[begin : begin + batch]
        most = int(counts.max())
        places = chosen[:, None] + np.minimum(
            np.arange(most)[None], counts[:, None] - 1
        )
        live = np.arange(most)[None] < counts[:, None]
        ids = order[places]
        members = embeddings[ids]
        every = max(1, -(-most // _MEMBERS))
        sampled, kept = members[:, ::every], live[:, ::every, None]
        mean = (sampled * kept).sum(axis=1, keepdims=True) / kept.sum(
            axis=1, keepdims=True
        )
        centred = np.where(kept, sampled - mean, 0)
        axis = np.broadcast_to(
            start.astype(members.dtype)[None, :, None], (len(chosen), width, 1)
        )
        for _ in range(_STEPS):
            axis = centred.transpose(0, 2, 1) @ (centred @ axis)
            norm = np.linalg.norm(axis, axis=1, keepdims=True)
            axis = axis / np.maximum(norm, np.finfo(axis.dtype).tiny)
        along = np.where(live, (members @ axis)[..., 0], np.inf)
        ranked = np.take_along_axis(ids, np.argsort(along, axis=1, kind="stable"), 1)
        order[places[live]] = ranked[live]
        progress(share)
