"""What may stand on top of the trunk: the heads of `jaxsoft.nn`, made from counts.

Every head starts at the training tokens' frequencies: its kernels are zero and its
biases give each token its unigram probability. Training spends its steps on what
context adds.
"""

import functools
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsoft import ClassBands, ClassSampler, ClassTree
from jaxsoft import nn as softnn
from jaxsoft.training.head_kinds import HEADS, HeadKind
from jaxsoft.training.mesh import VOCAB
from jaxsoft.training.unigram import unigram_log_probs

__all__ = [
    "HEADS",
    "Head",
    "HeadKind",
    "HeadPlan",
    "Params",
    "head_rows",
    "with_head_rows",
]

# Parameters as Flax has them, an `nnx.State`, whose items it does not type.
Params: TypeAlias = Any
Head: TypeAlias = (
    softnn.SoftmaxHead
    | softnn.HierarchicalSoftmaxHead
    | softnn.AdaptiveSoftmaxHead
    | softnn.SampledSoftmaxHead
)


@dataclass(frozen=True)
class HeadPlan:
    """A head, and the counts of the classes that it is made from.

    Attributes:
      kind: "full" is `SoftmaxHead`; "hierarchical" goes down the Huffman tree of the
        counts; "adaptive" has two tails, cut where they cost least; "sampled" is
        trained on classes drawn by their counts.
      counts: `[V]`, how often each class comes in training.
      num_samples: classes that the sampled head draws a step.
      workspace_bytes: the temporary memory that the full head's loss may take; None
        is as in `jaxsoft.linear_cross_entropy`.
    """

    kind: HeadKind
    counts: tuple[int, ...]
    num_samples: int = 1024
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` for a workspace that the head would not heed."""
        if self.workspace_bytes is not None and self.kind != "full":
            raise ValueError(
                f"`workspace_bytes` must be None with `kind` {self.kind!r}, got "
                f"{self.workspace_bytes}."
            )

    @property
    def num_classes(self) -> int:
        """`V`."""
        return len(self.counts)

    @property
    def has_row_gradients(self) -> bool:
        """Whether a step reads and writes some rows of the head alone."""
        return self.kind == "hierarchical"

    @functools.cached_property
    def log_probs(self) -> np.ndarray:
        """`[V]` float64, the unigram log-probabilities that training starts at."""
        return unigram_log_probs(np.asarray(self.counts))

    @functools.cached_property
    def structure(self) -> ClassTree | ClassBands | ClassSampler | None:
        """The tree, bands or sampler of the head."""
        probabilities = np.exp(self.log_probs)
        match self.kind:
            case "hierarchical":
                return ClassTree.huffman(probabilities)
            case "adaptive":
                return ClassBands.from_counts(probabilities)
            case "sampled":
                return ClassSampler.unigram(probabilities)
        return None

    @functools.cached_property
    def _node_biases(self) -> np.ndarray:
        """Of the tree: kept, as each program traces the building of its model."""
        assert isinstance(self.structure, ClassTree)
        return self.structure.biases(np.exp(self.log_probs))

    def build(self, features: int, *, rngs: nnx.Rngs) -> Head:
        """Makes the head.

        Args:
          features: `H`.
          rngs: source of the initial parameters.

        Returns:
          A module of `jaxsoft.nn`.
        """
        options: dict[str, Any] = {
            "use_bias": True,
            "kernel_init": nnx.initializers.zeros,
            "rngs": rngs,
        }
        structure = self.structure
        if isinstance(structure, ClassTree):
            head = softnn.HierarchicalSoftmaxHead(features, structure, **options)
            _set(head.node_bias, self._node_biases)
        elif isinstance(structure, ClassBands):
            # A narrow trunk leaves each tail one feature at least.
            widths = [max(1, features // 4**place) for place in (1, 2)]
            head = softnn.AdaptiveSoftmaxHead(
                features,
                structure,
                tail_features=widths[: len(structure.tails)],
                **options,
            )
            first, *others = _adaptive_biases(structure, self.log_probs)
            _set(head.bias, first)
            for bias, values in zip(head.tail_biases, others, strict=True):
                _set(bias, values)
        elif isinstance(structure, ClassSampler):
            head = softnn.SampledSoftmaxHead(
                features, self.num_classes, self.num_samples, structure, **options
            )
            _set(head.full.bias, self.log_probs)
        else:
            head = softnn.SoftmaxHead(
                features,
                self.num_classes,
                kernel_metadata={"out_sharding": (None, VOCAB), **_LATER},
                bias_metadata={"out_sharding": (VOCAB,), **_LATER},
                workspace_bytes=self.workspace_bytes,
                **options,
            )
            _set(head.bias, self.log_probs)
        return head

    def loss_options(self, key: Array) -> dict[str, Any]:
        """Options of the head's `loss` in training: the key of the samples, if any."""
        return {"key": key} if self.kind == "sampled" else {}


# Parameters are placed on the mesh when all of them are there.
_LATER = {"eager_sharding": False}


def _set(bias: nnx.Param | None, values: np.ndarray) -> None:
    assert bias is not None
    bias[...] = jnp.asarray(values, bias[...].dtype)


def _adaptive_biases(bands: ClassBands, log_probs: np.ndarray) -> list[np.ndarray]:
    """Log-probabilities of the head's entries, and within each tail."""
    by_rank = log_probs[np.asarray(bands.order)]
    shortlist, *tails = np.split(by_rank, bands.cutoffs[:-1])
    masses = [np.logaddexp.reduce(tail) for tail in tails]
    within = [tail - mass for tail, mass in zip(tails, masses, strict=True)]
    return [np.concatenate([shortlist, masses]), *within]


_ROWS = ("node_kernel", "node_bias")


def head_rows(params: Params) -> tuple[Array, ...]:
    """The arrays with row gradients, of the parameters of a model or of its head."""
    head = params["head"] if "head" in params else params
    return tuple(head[name][...] for name in _ROWS)


def with_head_rows(params: Params, rows: tuple[Array, ...]) -> Params:
    """Puts such arrays in the place of those of the parameters."""
    by_name = dict(zip(_ROWS, rows, strict=True))

    def replaced(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
        return next(by_name[entry.key] for entry in path if entry.key in by_name)

    return jax.tree_util.tree_map_with_path(replaced, params)
