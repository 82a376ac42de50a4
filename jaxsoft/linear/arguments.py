"""What the functions of the linear room take: checked arguments, arrays with axes.

Shapes: N rows, H features, V classes, K class ids a row, S scales a class, Q columns of
adapters. `fold_rows` folds all leading axes of the public arguments into N, and a
temperature that is not a Python float is one number a row.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxsoft._core import checks, defaults, mesh_axes, numerics, registry
from jaxsoft._core.numerics import operand_dtype
from jaxsoft._core.registry import Implementation
from jaxsoft.linear.lora import LoRA, adapted

__all__ = [
    "Axes",
    "Call",
    "Config",
    "KernelLayout",
    "MeshAxes",
    "Operands",
    "axes_of",
    "check_ids",
    "fold_rows",
    "has_axes",
    "prepare",
]

KernelLayout = Literal["hv", "vh"]

MeshAxes = str | Sequence[str] | None


# So many classes are a word of a packed mask.
_WORD = 32


class Axes(str):
    """What the axes of an array run over, one letter an axis.

    "n" are rows and "v" classes; any other letter is neither. vmap folds a batch into
    "n"; devices share "n" and "v". It annotates the fields of named tuples.
    """


@functools.cache
def _axes_of_fields(kind: type) -> dict[str, Axes]:
    """Returns the axes of a named tuple's fields, of those that are annotated."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        name: axes
        for name, hint in hints.items()
        for axes in getattr(hint, "__metadata__", ())
        if isinstance(axes, Axes)
    }


def has_axes(value: object) -> bool:
    """Tells whether a value is a named tuple whose fields say their axes."""
    return hasattr(value, "_fields") and bool(_axes_of_fields(type(value)))


def axes_of(tree: object, kernel_layout: KernelLayout = "hv") -> Any:
    """Returns the axes of every array of a tree, in its structure.

    Args:
      tree: arrays in named tuples whose fields are annotated with `Axes`, in any
        further tuples.
      kernel_layout: the layout of kernels, whose fields are annotated with "hv".

    Returns:
      A string an array.
    """

    def of_node(node: Any) -> Any:
        if not hasattr(node, "_fields"):
            raise TypeError(f"arrays lie in named tuples with axes, got {type(node)}")
        axes = _axes_of_fields(type(node))

        def of_field(name: str) -> Any:
            value = getattr(node, name)
            if value is None:
                return None
            if name not in axes:
                return axes_of(value, kernel_layout)
            return kernel_layout if axes[name] == "hv" else str(axes[name])

        return type(node)._make(of_field(name) for name in node._fields)

    return jax.tree.map(of_node, tree, is_leaf=lambda node: hasattr(node, "_fields"))


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything about a call that is known when it is traced.

    Attributes:
      kernel_layout: "hv" for a kernel [H, V], "vh" for [V, H].
      static_tau: the temperature, if it is a Python float; else None.
      softcap: the logit soft-cap, or None.
      precision: the precision of the matrix products, as in `jnp.matmul`.
      workspace_bytes: of temporary memory that the call may take; None for as many as
        `plans.Layer.workspace` says.
      implementation: its name, such as "xla".
      vocab_axes: the mesh axes that the classes are sharded over; () for none.
      total_classes: V where the last shards have masked padding; else None.
      shards: how the arrays are sharded, where their types said so; else None.
      keeps: whether a forward pass may keep something of tiles.
      moves_bits: whether parts of large arrays of 16-bit floats are read and written as
        bits, through which no derivative flows; see `kept.stored`.
      for_gpu: whether chunks are those of GPUs: with tiles that may leave a rest, and
        slopes that are multiplied as one matrix where weights are kept.
      blocks: rows and classes of a tile where something is kept of tiles; else None.
      drops_group: whether a row drops the classes of its group but for its label.
      takes_defaults: whether a pass may be that of a kernel in the place of XLA's loops
        where there is evidence for it; see `defaults.py`.
    """

    kernel_layout: KernelLayout
    static_tau: float | None
    softcap: float | None
    precision: jax.lax.PrecisionLike
    workspace_bytes: int | None
    implementation: str
    vocab_axes: tuple[str, ...] = ()
    total_classes: int | None = None
    shards: mesh_axes.Shards | None = None
    keeps: bool = True
    moves_bits: bool = False
    for_gpu: bool = False
    blocks: tuple[int, int] | None = None
    drops_group: bool = False
    takes_defaults: bool = False

    def over(self, vocab_axes: tuple[str, ...]) -> "Config":
        """Returns that of one shard of the classes, which mesh axes share."""
        return dataclasses.replace(self, vocab_axes=vocab_axes, shards=None)

    def tiled(self, blocks: tuple[int, int]) -> "Config":
        """Returns that of tiles of so many rows and classes."""
        return dataclasses.replace(self, blocks=blocks)

    @property
    def can_keep(self) -> bool:
        """Whether a forward pass may keep something of tiles."""
        return self.keeps and self.implementation == "xla"

    @property
    def class_axis(self) -> int:
        """The axis of the kernel that runs over classes."""
        return 1 if self.kernel_layout == "hv" else 0


class Operands(NamedTuple):
    """The arrays that logits are computed from.

    Attributes:
      hidden: [N, H] floating.
      kernel: [H, V] or [V, H] floating.
      bias: [V] floating, or None.
      tau: [N] in the dtype of the statistics, or None if it is static.
      labels: [N, K] int32 classes whose logits are wanted, or None. -1 for none.
      class_mask: [V] booleans, True keeps, or None.
      excluded: [N, K] int32 classes that a row drops, or None. -1 for none.
      group: [N, 1] integers, the group of each row, or None.
      class_groups: [V] integers, the group of each class; None where `group` is. The
        mean of a row's logits is that over its own group, or the row drops that; see
        `Config.drops_group`.
      kernel_scale: [S, V] floating, what the kernel's numbers are multiplied by, those
        of each H / S features of a class with one; or None. The kernel is then
        constant.
      lora_hidden: [N, Q] floating, the states that adapters have made, or None.
      lora_kernel: [Q, V] floating, what they are multiplied by; None where
        `lora_hidden` is.
      class_bits: [N, W] uint32, bit v % 32 of word v // 32 whether a row keeps class v
        of all shards; or None.
    """

    hidden: Annotated[jax.Array, Axes("nh")]
    kernel: Annotated[jax.Array, Axes("hv")]
    bias: Annotated[jax.Array | None, Axes("v")]
    tau: Annotated[jax.Array | None, Axes("n")]
    labels: Annotated[jax.Array | None, Axes("nk")]
    class_mask: Annotated[jax.Array | None, Axes("v")]
    excluded: Annotated[jax.Array | None, Axes("ne")] = None
    group: Annotated[jax.Array | None, Axes("ng")] = None
    class_groups: Annotated[jax.Array | None, Axes("v")] = None
    kernel_scale: Annotated[jax.Array | None, Axes("sv")] = None
    lora_hidden: Annotated[jax.Array | None, Axes("nq")] = None
    lora_kernel: Annotated[jax.Array | None, Axes("qv")] = None
    class_bits: Annotated[jax.Array | None, Axes("nb")] = None

    @classmethod
    def gradients(cls, **arrays: Any) -> "Operands":
        """Returns gradients of some operands, and None for all others."""
        nothing: dict[str, Any] = dict.fromkeys(cls._fields)
        return cls(**(nothing | arrays))

    def num_classes(self, config: Config) -> int:
        """The number of classes here, those of one shard."""
        return self.kernel.shape[config.class_axis]

    def all_classes(self, config: Config) -> int:
        """V, of all shards and without padding."""
        if config.total_classes is not None:
            return config.total_classes
        return self.num_classes(config) * mesh_axes.size(config.vocab_axes)

    def local(self, config: Config) -> "Operands":
        """Returns the same with class ids that count from this shard's first class."""
        if not config.vocab_axes:
            return self
        number = self.num_classes(config)
        start = mesh_axes.offset(config.vocab_axes, number)

        def localize(classes):
            if classes is None:
                return None
            ours = (classes >= start) & (classes < start + number)
            return jnp.where(ours, classes - start, -1)

        labels, excluded = localize(self.labels), localize(self.excluded)
        return self._replace(labels=labels, excluded=excluded)

    def kept_bits(
        self, config: Config, start: jax.Array | int, size: int
    ) -> jax.Array | None:
        """Returns which of `size` classes from `start` of this shard rows keep.

        None without a packed mask, else [..., size].
        """
        bits = self.class_bits
        if bits is None:
            return None
        number, axes, axis = self.num_classes(config), config.vocab_axes, bits.ndim - 1
        first = start + mesh_axes.offset(axes, number)
        words = max(-(-number * mesh_axes.size(axes) // _WORD), bits.shape[-1])
        if words > bits.shape[-1]:
            # The last shards have padding, of which there are no bits.
            rest = [(0, 0)] * axis + [(0, words - bits.shape[-1])]
            bits = jnp.pad(bits, rest)
        count = min((size + 2 * _WORD - 2) // _WORD, words)
        word = jnp.minimum(first // _WORD, words - count)
        bits = lax.dynamic_slice_in_dim(bits, word, count, axis)
        places = jnp.expand_dims(lax.iota(jnp.uint32, _WORD), range(bits.ndim))
        flat = (bits[..., None] >> places).reshape(*bits.shape[:-1], -1)
        flat = lax.dynamic_slice_in_dim(flat, first - word * _WORD, size, axis)
        return flat & 1 != 0

    def matmul_dtype(self) -> jnp.dtype:
        """The dtype of the operands of the matrix products."""
        if self.kernel_scale is not None:
            # A scaled kernel is stored in fewer bits than it is computed with.
            return self.hidden.dtype
        return operand_dtype(self.hidden, self.kernel)

    def are_for_kernels(self) -> bool:
        """Whether kernels read all that there is: one label a row, and few arrays."""
        others = self[self._fields.index("class_mask") + 1 :]
        one_label = self.labels is None or self.labels.shape[1] == 1
        return one_label and all(array is None for array in others)

    def has_scale_of_class(self) -> bool:
        """Whether one scale a class multiplies its products, not the kernel."""
        return self.kernel_scale is not None and self.kernel_scale.shape[0] == 1

    def temperature(self, config: Config) -> float | jax.Array:
        """The temperature as a float or as [N, 1]."""
        if self.tau is None:
            assert config.static_tau is not None
            return config.static_tau
        return self.tau[:, None]


class Call(NamedTuple):
    """A checked call.

    Attributes:
      config: what is known when it is traced.
      arrays: the arrays as given, with leading axes; `labels` [..., K].
    """

    config: Config
    arrays: Operands

    def num_classes(self) -> int:
        """V, of all shards."""
        return self.arrays.all_classes(self.config)


def prepare(
    name: str,
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    class_ids: ArrayLike | None = None,
    excluded: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    logit_softcap: float | None = None,
    class_mask: ArrayLike | None = None,
    class_bits: ArrayLike | None = None,
    kernel_scale: ArrayLike | None = None,
    lora: LoRA | None = None,
    kernel_layout: KernelLayout = "hv",
    precision: jax.lax.PrecisionLike = None,
    vocab_axis: MeshAxes | mesh_axes.Classes = None,
    workspace_bytes: int | None = None,
    implementation: Implementation | None = None,
    prefix: str = "",
) -> Call:
    """Checks the arguments that the functions of this room share.

    Args:
      name: the public function's name, for messages.
      hidden: see `linear_statistics`, as are all other arguments not said here.
      kernel: [H, V] or [V, H].
      labels: [...] integers, or None.
      class_ids: [..., K] integers in place of labels, or None.
      excluded: [..., K] integers, classes that a row drops, or None.
      bias: [V].
      temperature: scalar or [...].
      logit_softcap: the cap.
      class_mask: [V].
      class_bits: [..., ceil(V / 32)].
      kernel_scale: scalar, [V], or one a block of the kernel.
      lora: adapters.
      kernel_layout: "hv" or "vh".
      precision: of the matrix products.
      vocab_axis: the mesh axes of the classes.
      workspace_bytes: of temporary memory, or None.
      implementation: None or a name.
      prefix: what the names of hidden, kernel and their options start with.

    Returns:
      What is known at trace time, and the arrays.
    """
    chosen = registry.resolve(name, implementation)
    axes = mesh_axes.check_axes("vocab_axis", vocab_axis)
    if axes and chosen == "reference":
        raise NotImplementedError(
            '`implementation` must be None or "xla" with a vocab_axis, got "reference".'
        )
    special = {"class_bits": class_bits, "kernel_scale": kernel_scale, "lora": lora}
    given = [name for name, value in special.items() if value is not None]
    if given and chosen not in ("xla", "reference"):
        raise NotImplementedError(
            f'`implementation` must be None, "xla" or "reference" with '
            f"`{prefix}{given[0]}`, got {chosen!r}."
        )
    arrays = _check_arrays(
        hidden, kernel, bias, class_mask, kernel_scale, kernel_layout, prefix
    )
    hidden, kernel = arrays.hidden, arrays.kernel
    for argument, array in (("hidden", hidden), ("kernel", kernel)):
        registry.check_dtype("statistics", chosen, argument, array.dtype)
    if logit_softcap is not None:
        logit_softcap = checks.scalar_in(
            f"{prefix}logit_softcap", logit_softcap, 0, math.inf
        )
        if logit_softcap == 0:
            raise ValueError(f"`{prefix}logit_softcap` must be positive, got 0.")
    dtype = numerics.compute_dtype(hidden, kernel)
    legend = f"{prefix}hidden.shape[:-1]"
    tau = checks.row_temperature(temperature, dtype, hidden.shape[:-1], legend)
    if workspace_bytes is not None:
        workspace_bytes = checks.positive_integer("workspace_bytes", workspace_bytes)
    config = Config(
        kernel_layout=kernel_layout,
        static_tau=None if isinstance(tau, jax.Array) else tau,
        softcap=logit_softcap,
        precision=precision,
        workspace_bytes=workspace_bytes,
        implementation=chosen,
        vocab_axes=axes,
        total_classes=(
            vocab_axis.number if isinstance(vocab_axis, mesh_axes.Classes) else None
        ),
        shards=mesh_axes.explicit_shards(),
        takes_defaults=implementation is None
        and "mosaic_tpu" in registry.implementations(name)
        and defaults.allowed(),
    )
    array_tau = tau if isinstance(tau, jax.Array) else None
    rows = hidden.shape[:-1]
    if labels is not None:
        labels = checks.integer("labels", labels)
        checks.shape("labels", labels, rows, f"{prefix}hidden.shape[:-1]")
        class_ids = labels[..., None]
    elif class_ids is not None:
        class_ids = check_ids("class_ids", class_ids, rows)
    if excluded is not None:
        excluded = check_ids("excluded", excluded, rows)
    arrays = arrays._replace(tau=array_tau, labels=class_ids, excluded=excluded)
    if lora is not None:
        dtype, classes = (
            numerics.compute_dtype(hidden, kernel),
            arrays.num_classes(config),
        )
        states, columns = adapted(hidden, lora, classes, dtype, precision, prefix)
        arrays = arrays._replace(lora_hidden=states, lora_kernel=columns)
    if class_bits is not None:
        bits = _check_bits(class_bits, rows, arrays.all_classes(config), prefix)
        arrays = arrays._replace(class_bits=bits)
    return Call(config, arrays)


def check_ids(name: str, ids: ArrayLike, rows: tuple[int, ...]) -> jax.Array:
    """Returns integers whose shape must be [..., K], K at least 1."""
    ids = checks.integer(name, ids)
    if ids.ndim == 0 or ids.shape[:-1] != rows or ids.shape[-1] == 0:
        raise ValueError(
            f"`{name}` must have shape [..., K] with hidden.shape[:-1] = {rows} and "
            f"K >= 1, got {ids.shape}."
        )
    return ids


def _check_bits(
    bits: ArrayLike, rows: tuple[int, ...], classes: int, prefix: str
) -> jax.Array:
    """Returns a packed mask [..., W] as uint32."""
    bits = jnp.asarray(bits)
    if bits.dtype not in (jnp.uint32, jnp.int32):
        raise TypeError(
            f"`class_bits` must have dtype uint32 or int32, got {bits.dtype}."
        )
    words = -(-classes // _WORD)
    legend = f"{prefix}hidden.shape[:-1] + (ceil(V / {_WORD}),)"
    checks.shape("class_bits", bits, (*rows, words), legend)
    return lax.bitcast_convert_type(bits, jnp.uint32)


def _check_scale(scale: ArrayLike, kernel: jax.Array, class_axis: int, prefix: str):
    """Returns scales [S, V] of a kernel."""
    name = f"{prefix}kernel_scale"
    scale = checks.floating(name, scale)
    features, classes = kernel.shape[1 - class_axis], kernel.shape[class_axis]
    if scale.ndim < 2:
        checks.broadcasts_to(name, scale, (classes,))
        return jnp.broadcast_to(scale, (classes,))[None]
    by_class = scale if class_axis == 1 else scale.T
    divides = scale.ndim == 2 and scale.size > 0
    divides = divides and features % by_class.shape[0] == 0
    if not divides or classes % by_class.shape[1]:
        raise ValueError(
            f"`{name}` must be a scalar, [V], or have axes that divide those of the "
            f"{prefix}kernel, {kernel.shape}, got {scale.shape}."
        )
    return jnp.repeat(by_class, classes // by_class.shape[1], axis=1)


def _check_arrays(
    hidden, kernel, bias, class_mask, kernel_scale, kernel_layout, prefix
) -> Operands:
    """Returns the arrays of a call, their shapes checked."""
    hidden = checks.floating(f"{prefix}hidden", hidden)
    if kernel_scale is None:
        kernel = checks.floating(f"{prefix}kernel", kernel)
    else:
        # No gradient flows to numbers that few bits hold.
        kernel = lax.stop_gradient(jnp.asarray(kernel))
        kinds = (jnp.integer, jnp.floating)
        if not any(jnp.issubdtype(kernel.dtype, kind) for kind in kinds):
            raise TypeError(
                f"`{prefix}kernel` must hold integers or floats, got {kernel.dtype}."
            )
    checks.one_of(f"{prefix}kernel_layout", kernel_layout, ("hv", "vh"))
    if hidden.ndim < 1:
        raise ValueError(f"`{prefix}hidden` must have shape [..., H], got a scalar.")
    features = hidden.shape[-1]
    legend = "[H, V]" if kernel_layout == "hv" else "[V, H]"
    class_axis = 1 if kernel_layout == "hv" else 0
    if kernel.ndim != 2 or kernel.shape[1 - class_axis] != features:
        raise ValueError(
            f"`{prefix}kernel` must have shape {legend} with H = {features}, got "
            f"{kernel.shape}. {prefix}kernel_layout says which axis holds the classes."
        )
    num_classes = kernel.shape[class_axis]
    if num_classes == 0:
        raise ValueError(
            f"`{prefix}kernel` must have a class, got shape {kernel.shape}."
        )
    if bias is not None:
        bias = checks.floating(f"{prefix}bias", bias)
        checks.shape(f"{prefix}bias", bias, (num_classes,), "[V]")
    if class_mask is not None:
        class_mask = checks.boolean("class_mask", class_mask)
        checks.shape("class_mask", class_mask, (num_classes,), "[V]")
    arrays = Operands(hidden, kernel, bias, None, None, class_mask)
    if kernel_scale is None:
        return arrays
    scale = _check_scale(kernel_scale, kernel, class_axis, prefix)
    return arrays._replace(kernel_scale=scale)


def fold_rows(config: Config, arrays: Operands) -> Operands:
    """Folds leading axes into rows; labels that are no class become -1."""
    rows = arrays.hidden.shape[:-1]
    count = math.prod(rows)
    num_classes = arrays.all_classes(config)

    def ids(classes):
        if classes is None:
            return None
        valid = (classes >= 0) & (classes < num_classes)
        classes = jnp.where(valid, classes, -1).astype(jnp.int32)
        return classes.reshape(count, classes.shape[-1])

    def flat(array):
        return None if array is None else array.reshape(count, array.shape[-1])

    tau = arrays.tau
    return arrays._replace(
        hidden=flat(arrays.hidden),
        lora_hidden=flat(arrays.lora_hidden),
        class_bits=flat(arrays.class_bits),
        labels=ids(arrays.labels),
        tau=None if tau is None else jnp.broadcast_to(tau, rows).reshape(count),
        excluded=ids(arrays.excluded),
    )
