"""The shapes that are measured, each named after the model that has it."""

import dataclasses
import functools
import zlib
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Layout = Literal["hv", "vh"]
MIB = 2**20
# Vectors that are drawn at the most, a prime.
_PERIOD = 65521
_W = TypeVar(
    "_W",
    "LinearWorkload",
    "SoftmaxWorkload",
    "TreeWorkload",
    "RegressionWorkload",
    "ManyClassesWorkload",
)


@dataclasses.dataclass(frozen=True)
class LinearWorkload:
    """A language model's head: `tokens` rows of `features`, over `classes`.

    Attributes:
      name: the model, and the dtype where two differ only in it.
      tokens: N, rows of `hidden`.
      features: H.
      classes: V.
      dtype: of `hidden` and of the kernel.
      on_cpu: whether a CPU is asked to run it when no workload is named.
    """

    name: str
    tokens: int
    features: int
    classes: int
    dtype: str = "bfloat16"
    on_cpu: bool = False

    @property
    def matmul_flops(self) -> int:
        """Operations of one pass over the logits: a multiply and an add each."""
        return 2 * self.tokens * self.features * self.classes

    @property
    def logits_bytes(self) -> int:
        """Size of the logits in float32."""
        return 4 * self.tokens * self.classes

    def quick(self) -> "LinearWorkload":
        """The same workload, cut to sizes that take milliseconds."""
        return dataclasses.replace(
            self,
            tokens=min(self.tokens, 67),
            features=min(self.features, 32),
            classes=min(self.classes, 4099),
        )

    def inputs(self, layout: Layout, seed: int = 0) -> tuple[jax.Array, ...]:
        """Draws `hidden`, the kernel and the labels; logits have unit scale."""
        keys = jax.random.split(_key(self.name, seed), 3)
        kernel_shape = (self.features, self.classes)
        if layout == "vh":
            kernel_shape = kernel_shape[::-1]
        hidden = jax.random.normal(keys[0], (self.tokens, self.features), self.dtype)
        kernel = jax.random.normal(keys[1], kernel_shape, self.dtype)
        kernel = kernel * jnp.asarray(self.features**-0.5, self.dtype)
        labels = jax.random.randint(keys[2], (self.tokens,), 0, self.classes)
        return jax.block_until_ready((hidden, kernel, labels))


@dataclasses.dataclass(frozen=True)
class SoftmaxWorkload:
    """A batch of stored logits: `rows` of `classes`.

    Attributes:
      name: the model whose vocabulary it is.
      rows: N.
      classes: V.
      dtype: of the logits.
      on_cpu: whether a CPU is asked to run it when no workload is named.
    """

    name: str
    rows: int
    classes: int
    dtype: str = "float32"
    on_cpu: bool = False

    @property
    def logits_bytes(self) -> int:
        """Size of the logits."""
        return self.rows * self.classes * jnp.dtype(self.dtype).itemsize

    def quick(self) -> "SoftmaxWorkload":
        """The same workload, cut to sizes that take milliseconds."""
        return dataclasses.replace(
            self, rows=min(self.rows, 67), classes=min(self.classes, 4099)
        )

    def inputs(self, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Draws logits, labels and a cotangent of the logits' shape."""
        keys = jax.random.split(_key(self.name, seed), 3)
        shape = (self.rows, self.classes)
        logits = 4 * jax.random.normal(keys[0], shape, self.dtype)
        labels = jax.random.randint(keys[1], (self.rows,), 0, self.classes)
        cotangent = jax.random.normal(keys[2], shape, self.dtype)
        return jax.block_until_ready((logits, labels, cotangent))


@dataclasses.dataclass(frozen=True)
class TreeWorkload:
    """A layer over a complete binary tree, of more and more classes.

    Attributes:
      name: what is done with it.
      tokens: N, rows of `hidden`.
      features: H.
      classes: each V, a power of two.
      compared: the V at which full and hierarchical softmax are compared.
      growth: the two V between which growth is measured.
      spread: standard deviation of a node's logit.
      dtype: of `hidden` and of the kernel.
      on_cpu: whether a CPU is asked to run it when no workload is named.
    """

    name: str
    tokens: int
    features: int
    classes: tuple[int, ...]
    compared: int
    growth: tuple[int, int]
    spread: float = 1.0
    dtype: str = "float32"
    on_cpu: bool = True

    def quick(self) -> "TreeWorkload":
        """The same workload, cut to sizes that take milliseconds."""
        return dataclasses.replace(
            self,
            tokens=min(self.tokens, 67),
            features=min(self.features, 32),
            classes=(2**5, 2**8),
            compared=2**8,
            growth=(2**5, 2**8),
        )

    def hidden(self, batches: int = 1) -> jax.Array:
        """Draws `[batches, N, H]`, of unit scale."""
        shape = (batches, self.tokens, self.features)
        return jax.random.normal(_key(self.name, 0), shape, self.dtype)

    def labels(self, classes: int, batches: int) -> jax.Array:
        """Draws `[batches, N]` from all classes alike."""
        key = jax.random.fold_in(_key(self.name, 1), classes)
        return jax.random.randint(key, (batches, self.tokens), 0, classes)

    def kernel(self, vectors: int, layout: Layout) -> jax.Array:
        """Draws vectors of classes, or of nodes, whose logits have the spread.

        No two are alike, but only some are drawn anew: random numbers of gigabytes
        would take minutes.

        Args:
          vectors: how many, V or V - 1.
          layout: `"vh"` puts them in rows, `"hv"` in columns.

        Returns:
          `[vectors, H]`, or `[H, vectors]`.
        """
        period = min(vectors, _PERIOD)
        shape = (period, self.features) if layout == "vh" else (self.features, period)
        block = jax.random.normal(_key(self.name, 2), shape, self.dtype)
        scale = jnp.asarray(self.spread * self.features**-0.5, self.dtype)
        return _repeat(scale * block, vectors, axis=0 if layout == "vh" else 1)


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """What is asked of a linear cross-entropy.

    Attributes:
      layout: of the kernel, `"hv"` or `"vh"`.
      reduction: `"mean"` or `"none"`.
      temperature: whether logits are divided by a traced scalar.
      gradient: whether the gradients of hidden and kernel are wanted too.
      workspaces: bytes of temporary memory that ours is given in turn, beside what it
        takes by itself.
    """

    layout: Layout = "hv"
    reduction: Literal["mean", "none"] = "mean"
    temperature: bool = False
    gradient: bool = False
    workspaces: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """The case in words."""
        shape = "[H, V]" if self.layout == "hv" else "[V, H]"
        temperature = ", temperature" if self.temperature else ""
        wanted = "value and gradient" if self.gradient else "value"
        return f"{self.reduction}, {shape}{temperature}: {wanted}"


LINEAR = (
    # The vocabulary of `jaxsoft train`, at a size that two CPU cores can store.
    LinearWorkload("train-65k", 2048, 512, 65536, "float32", on_cpu=True),
    # GPT-2's vocabulary: a prime, under a prime number of tokens.
    LinearWorkload("gpt2-odd", 20011, 64, 50257, "float32", on_cpu=True),
    LinearWorkload("gpt2-odd-bfloat16", 20011, 64, 50257, on_cpu=True),
    LinearWorkload("gemma2-2b", 8192, 2304, 256000),
    LinearWorkload("llama3-8b", 8192, 4096, 128256),
    LinearWorkload("qwen3-8b", 4096, 4096, 151936),
    LinearWorkload("gemma3-4b", 8192, 2560, 262144),
    # The shape of Liger's published figures.
    LinearWorkload("liger-131k", 8192, 4096, 131072),
)

# Layers of many sizes, down to those whose logits anyone can store.
_SIZES = (
    (2048, 512, 65536),
    (1024, 512, 32768),
    (512, 256, 8192),
    (256, 256, 1000),
    (64, 64, 10),
)
LAYERS = tuple(
    LinearWorkload(
        "layer-"
        + "x".join(map(str, sizes))
        + ("-bfloat16" if dtype != "float32" else ""),
        *sizes,
        dtype,
        on_cpu=True,
    )
    for dtype in ("float32", "bfloat16")
    for sizes in _SIZES
    # That one in float32 is the first of `LINEAR`.
    if (sizes, dtype) != (_SIZES[0], "float32")
)

HEADS = (
    # One token of each of 256 answers, over a vocabulary of Llama 3's kind, at a size
    # that two CPU cores can store.
    LinearWorkload("decode-131k", 256, 512, 131072, "float32", on_cpu=True),
    LINEAR[0],
    LinearWorkload("llama3-8b-decode", 256, 4096, 128256),
)

# Pairs of embeddings, each of which is a class to the others.
CONTRASTIVE = (
    # SimCLR's batch and the width of its projections.
    LinearWorkload("simclr-4k", 4096, 128, 4096, "float32", on_cpu=True),
    # CLIP's batch, in its smallest width.
    LinearWorkload("clip-32k", 32768, 512, 32768),
)

SOFTMAX = (
    SoftmaxWorkload("mistral-7b", 2048, 32768, on_cpu=True),
    # The shape of QuACK's published figures.
    SoftmaxWorkload("quack-131k", 16384, 131072),
)

SAMPLING = (
    SoftmaxWorkload("llama3-decode", 256, 131072, on_cpu=True),
    SoftmaxWorkload("mistral-7b", 2048, 32768, on_cpu=True),
)
RELAXATION = (SoftmaxWorkload("mistral-relaxed", 1024, 32768, on_cpu=True),)

# The vocabularies of a balanced tree: from a small one's to more than anyone's.
_GROWING = tuple(2**power for power in range(10, 23, 2))

TREES = (
    TreeWorkload("tree-step", 1024, 128, _GROWING, 2**18, (2**12, 2**22)),
    TreeWorkload("tree-sample", 1024, 128, _GROWING, 2**18, (2**12, 2**22)),
    # Node logits of a spread that leaves most classes possible, and few.
    TreeWorkload(
        "tree-top-k-flat", 64, 128, _GROWING[:5], 2**18, (2**10, 2**18), spread=1.0
    ),
    TreeWorkload(
        "tree-top-k-peaked", 64, 128, _GROWING[:5], 2**18, (2**10, 2**18), spread=4.0
    ),
)


@dataclasses.dataclass(frozen=True)
class RegressionWorkload:
    """A table to fit a softmax regression to: scikit-learn's `make_classification`.

    Attributes:
      name: of the table.
      rows: n.
      features: d.
      classes: V.
      informative: features that tell the classes apart.
      seed: of the table.
      on_cpu: whether a CPU is asked to run it when no workload is named.
    """

    name: str
    rows: int
    features: int
    classes: int
    informative: int = 64
    seed: int = 0
    on_cpu: bool = True

    def quick(self) -> "RegressionWorkload":
        """The same workload, cut to sizes that take milliseconds."""
        return dataclasses.replace(
            self,
            rows=min(self.rows, 300),
            features=min(self.features, 12),
            classes=min(self.classes, 3),
            informative=8,
        )

    def table(self, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """Makes the features, [n, d], and the labels, [n]."""
        from sklearn.datasets import make_classification

        features, labels = make_classification(
            n_samples=self.rows,
            n_features=self.features,
            n_informative=self.informative,
            n_redundant=0,
            n_classes=self.classes,
            n_clusters_per_class=1,
            random_state=self.seed,
        )
        return np.asarray(features).astype(dtype), np.asarray(labels)


# The mission's two tables: few classes with many rows, and many classes.
REGRESSION = (
    RegressionWorkload("regression-60000x784x10", 60_000, 784, 10),
    RegressionWorkload("regression-20000x256x1000", 20_000, 256, 1_000),
)


@dataclasses.dataclass(frozen=True)
class ManyClassesWorkload:
    """A table with about as many classes as rows.

    Attributes:
      name: the table's.
      rows: n, of which V are one a class and the others drawn by Zipf's law.
      features: d, a class's centre and noise of `noise` times its spread.
      classes: V.
      held: rows to measure on, one of each of so many classes drawn likewise.
      noise: standard deviation of a feature around its class's centre.
      seed: of everything.
      on_cpu: whether it runs on a CPU unless another is asked for.
    """

    name: str
    rows: int
    features: int
    classes: int
    held: int = 4096
    noise: float = 1.0
    seed: int = 0
    on_cpu: bool = True

    def quick(self) -> "ManyClassesWorkload":
        """The same workload, cut to sizes that take milliseconds."""
        return dataclasses.replace(self, rows=600, features=8, classes=200, held=64)

    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Makes features and labels, in random order, and those to measure on."""
        random = np.random.default_rng(self.seed)
        shares = 1 / np.arange(1, self.classes + 1)
        shares /= shares.sum()
        labels = np.concatenate(
            [
                random.permutation(self.classes),
                random.choice(self.classes, self.rows - self.classes, p=shares),
            ]
        )
        random.shuffle(labels)
        held = random.choice(self.classes, self.held, p=shares)
        centres = random.normal(size=(self.classes, self.features)).astype(np.float32)
        parts: list[np.ndarray] = []
        for chosen in (labels, held):
            features = random.standard_normal((len(chosen), self.features), np.float32)
            features *= np.float32(self.noise)
            for start in range(0, len(chosen), 4096):
                features[start : start + 4096] += centres[chosen[start : start + 4096]]
            parts += [features, chosen]
        return parts[0], parts[1], parts[2], parts[3]


MANY_CLASSES = (
    ManyClassesWorkload("regression-200000x256x100000", 200_000, 256, 100_000),
)


def select(
    workloads: tuple[_W, ...], names: tuple[str, ...], *, platform: str, quick: bool
) -> tuple[_W, ...]:
    """Picks the workloads to run.

    Args:
      workloads: all of a suite.
      names: those asked for; none means those that suit the platform.
      platform: JAX's name of it.
      quick: whether to cut them to sizes that take milliseconds.

    Returns:
      The chosen workloads, in the suite's order.
    """
    if names:
        chosen = tuple(w for w in workloads if w.name in names)
    else:
        chosen = tuple(w for w in workloads if platform != "cpu" or w.on_cpu)
    return tuple(w.quick() for w in chosen) if quick else chosen


@functools.partial(jax.jit, static_argnames=("count", "axis"))
def _repeat(block: jax.Array, count: int, axis: int) -> jax.Array:
    """Repeats vectors along an axis, scaled by 1 and then by less down to 2/3."""
    place = jnp.arange(count, dtype=jnp.int32)
    turn = place // block.shape[axis]
    scale = 1 / (1 + turn / (2 * (turn[-1] + 1)))
    scale = jnp.expand_dims(scale.astype(block.dtype), 1 - axis)
    return scale * jnp.take(block, place % block.shape[axis], axis=axis)


def _key(name: str, seed: int) -> jax.Array:
    """A key of its own for every workload, the same in every run."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
