"""The full softmax layer: logits when asked for, losses without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jaxsoft._core import checks
from jaxsoft._core.registry import Implementation
from jaxsoft.linear import reference
from jaxsoft.linear.arguments import KernelLayout, MeshAxes, prepare
from jaxsoft.nn import arguments, calling
from jaxsoft.nn.linear_methods import LinearMethods

__all__ = ["SoftmaxHead"]

# Flax keeps metadata of any type.
_Metadata = Mapping[str, Any]

_NO_METADATA: _Metadata = MappingProxyType({})


class SoftmaxHead(LinearMethods):
    """A softmax over many classes on top of hidden states.

    Logits are `u = softcap(hidden @ kernel + bias)`, probabilities `softmax(u / τ)`.
    All methods stream over the classes and never store [N, V] logits, but for the call
    of the module itself. `call` takes any other function of hidden states and a kernel.

    On many devices, place the parameters and jit: no method gathers `hidden` or the
    kernel. `kernel_metadata` and `bias_metadata` say where a parameter belongs, and
    `nnx.get_named_sharding` reads it. Inside `jax.shard_map`, where the parameters are
    one shard's, `vocab_axis` and `token_axes` name the axes in place of that.

    Attributes:
      kernel: the parameter [H, V], [V, H] with `kernel_layout="vh"`, or None with a
        tied embedding.
      bias: the parameter [V], or None.
      embedding: the tied embedding, whose table [V, H] serves as the kernel in place;
        or None.
      tied: whether the kernel is that of an embedding.
      kernel_layout: "hv" or "vh", always "vh" with a tied embedding.
      temperature: τ, where a method is not given another.

    Args:
      in_features: H.
      num_classes: V.
      use_bias: whether the logits have a bias.
      embedding: an `nnx.Embed` with V rows and H features to tie the head to. The
        two share one parameter: gradients of both uses add up, and its metadata is
        the embedding's. A model that holds both is a graph, which Flax's tree mode
        refuses; see `tied`.
      tied: True makes a head without a kernel or an embedding, which `tied_to` gives
        it for a call: models in Flax's tree mode are tied so.
      kernel_layout: "vh" keeps the kernel as [V, H], so that the weight of a Hugging
        Face `lm_head` or of an `equinox.nn.Linear` is the parameter as it is: see the
        example. An embedding has that layout whatever is said.
      temperature: τ in [0, ∞], a Python float or an array, both constants and no
        parameters; or a module that gives it, such as `LearnableTemperature`.
      logit_softcap: cap > 0 in `cap · tanh(u / cap)`, or None.
      dtype: dtype of hidden states and kernel in matrix products; None takes theirs.
      param_dtype: dtype of new parameters.
      precision: of the matrix products, as in `jnp.matmul`.
      kernel_init: initialiser of the kernel, of shape (H, V), which "vh" transposes.
      bias_init: initialiser of the bias.
      kernel_metadata: metadata of the kernel's `nnx.Param`, as in `nnx.Linear`:
        `{"out_sharding": (None, "vocab")}` shards the classes over that mesh axis, in
        the layout "vh" ("vocab", None).
        Flax places the new parameter at once, and needs `jax.set_mesh` for it, unless
        `"eager_sharding": False` is there too.
      bias_metadata: metadata of the bias's `nnx.Param`.
      workspace_bytes: the temporary memory, in bytes, that logits and what is kept of
        them may take in a method, or in a function that `call` is given: with more,
        less is computed twice for a gradient. None: see `jaxsoft.linear_cross_entropy`.
      vocab_axis: inside `jax.shard_map`, the mesh axis (or axes) that the classes are
        sharded over; None: the classes are all here, or placed by plain jit.
      token_axes: inside `jax.shard_map`, the mesh axes of the tokens: losses are those
        of all shards, and every token is drawn with bits of its own.
      implementation: as in `jaxsoft.linear_cross_entropy`.
      rngs: source of the parameters' keys; None where there are none, in a tied head
        without a bias.

    Raises:
      TypeError: if a parameter needs a key and there is no source, or a kernel to be
        transposed is no array.
      ValueError: if the embedding's shape is not [num_classes, in_features], or an
        argument is out of its range or does nothing with an embedding.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxsoft.nn import SoftmaxHead
      >>> zeros = nnx.initializers.zeros
      >>> head = SoftmaxHead(16, 1000, kernel_init=zeros, rngs=nnx.Rngs(0))
      >>> hidden, labels = jnp.ones((2, 5, 16)), jnp.zeros((2, 5), jnp.int32)
      >>> print(f"{head.loss(hidden, labels):.4f}", head(hidden).shape)
      6.9078 (2, 5, 1000)

      Decoding, with a kernel that prefers class 7:

      >>> import jax
      >>> prefers_7 = lambda key, shape, dtype: jnp.zeros(shape, dtype).at[:, 7].set(9)
      >>> head = SoftmaxHead(16, 1000, kernel_init=prefers_7, rngs=nnx.Rngs(0))
      >>> print(head.sample(jax.random.key(0), hidden[0], temperature=0.5))
      [7 7 7 7 7]
      >>> log_probs, class_ids = head.top_k(hidden[0, 0], 3)
      >>> print(class_ids)
      [7 0 1]

      Any function of hidden states and a kernel, with the head's options:

      >>> import jaxsoft
      >>> values = jnp.ones((1000, 3))
      >>> print(head.call(jaxsoft.linear_expected, hidden, values).shape)
      (2, 5, 3)

      The loss of GRPO (arXiv:2402.03300) for a group of two answers to one prompt:

      >>> def grpo_loss(head, hidden, tokens, old_log_prob, advantages):
      ...     ratio = jnp.exp(head.log_prob(hidden, tokens) - old_log_prob)
      ...     clipped = jnp.clip(ratio, 0.8, 1.2)
      ...     advantages = advantages[:, None]
      ...     return -jnp.minimum(ratio * advantages, clipped * advantages).mean()
      >>> old_log_prob = head.log_prob(hidden, labels)
      >>> rewards = jnp.array([3.0, 1.0])
      >>> advantages = (rewards - rewards.mean()) / rewards.std()
      >>> loss, gradients = nnx.value_and_grad(grpo_loss)(
      ...     head, hidden, labels, old_log_prob, advantages
      ... )
      >>> print(gradients["kernel"].shape)
      (16, 1000)

      The weight [V, H] of a model that was made elsewhere, in place:

      >>> weight = jnp.zeros((1000, 16))
      >>> head = SoftmaxHead(16, 1000, kernel_layout="vh", rngs=nnx.Rngs(0))
      >>> head.kernel[...] = weight
      >>> print(f"{head.loss(hidden, labels):.4f}")
      6.9078

      A tied head in Flax's tree mode, where no part of a model may be in two places:

      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.embedding = nnx.Embed(1000, 16, rngs=rngs)
      ...         self.head = SoftmaxHead(16, 1000, tied=True)
      ...     def loss(self, tokens, labels):
      ...         head = self.head.tied_to(self.embedding)
      ...         return head.loss(self.embedding(tokens), labels)
      >>> model = Model(nnx.Rngs(0))
      >>> _, state = nnx.split(model, graph=False)
      >>> print(jax.tree.map(jnp.shape, nnx.to_pure_dict(state)))
      {'embedding': {'embedding': (1000, 16)}}

      In Linen, partitioned as by `flax.linen.with_logical_partitioning`:

      >>> import flax.linen as nn
      >>> partitioned = {
      ...     "out_sharding": ("embed", "vocab"), "sharding_rules": None,
      ...     "eager_sharding": False, "linen_meta_type": nn.LogicallyPartitioned,
      ... }
      >>> class LinenModel(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, hidden, labels):
      ...         options = {"kernel_metadata": partitioned}
      ...         head = nnx.bridge.ToLinen(
      ...             SoftmaxHead, args=(16, 1000), kwargs=options, name="head"
      ...         )
      ...         return head(hidden, labels, nnx_method="loss")
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> linen, key = LinenModel(), jax.random.key(0)
      >>> names = nn.get_partition_spec(jax.eval_shape(linen.init, key, hidden, labels))
      >>> rules = (("embed", None), ("vocab", "model"))
      >>> shardings = nn.logical_to_mesh_sharding(names, mesh, rules)
      >>> print(shardings["params"]["head"]["kernel"].spec == jax.P(None, "model"))
      True
      >>> variables = jax.jit(linen.init, out_shardings=shardings)(key, hidden, labels)
      >>> loss = jax.jit(linen.apply)(variables, hidden, labels)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        use_bias: bool = False,
        embedding: nnx.Embed | None = None,
        tied: bool = False,
        kernel_layout: KernelLayout = "hv",
        temperature: arguments.Temperature = 1.0,
        logit_softcap: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        kernel_init: nnx.Initializer = arguments.KERNEL_INIT,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        kernel_metadata: _Metadata = _NO_METADATA,
        bias_metadata: _Metadata = _NO_METADATA,
        vocab_axis: MeshAxes = None,
        token_axes: MeshAxes = (),
        workspace_bytes: int | None = None,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Makes the parameters; see the class for the arguments."""
        self.in_features = checks.positive_integer("in_features", in_features)
        self.num_classes = checks.positive_integer("num_classes", num_classes)
        shape = (self.num_classes, self.in_features)
        if tied and embedding is not None:
            raise ValueError(
                "`embedding` must be None with tied=True, and be given to `tied_to`."
            )
        self.tied = tied or embedding is not None
        checks.one_of("kernel_layout", kernel_layout, ("hv", "vh"))
        self.kernel_layout: KernelLayout = "vh" if self.tied else kernel_layout
        if self.tied and kernel_metadata:
            raise ValueError(
                "`kernel_metadata` must be empty with a tied embedding, got "
                f"{dict(kernel_metadata)}. Give nnx.Embed `embedding_metadata`."
            )

        def parameter(init, shape, metadata):
            key = arguments.stream(rngs).params()
            return nnx.Param(init(key, shape, param_dtype), **metadata)

        def kernel(key, shape, dtype):
            made = kernel_init(key, shape, dtype)
            if self.kernel_layout == "hv":
                return made
            if not hasattr(made, "T"):
                raise TypeError(
                    "`kernel_init` must return an array with kernel_layout='vh', got "
                    f"{type(made).__name__}. Give `kernel_metadata` in its place."
                )
            return made.T

        # One assignment each: Flax fixes an attribute's kind by its first value.
        self.kernel = (
            None if self.tied else parameter(kernel, shape[::-1], kernel_metadata)
        )
        self.embedding: nnx.Embed | None = embedding if not tied else nnx.data(None)
        if embedding is not None:
            _check_embedding(embedding, shape)
        self.bias = parameter(bias_init, shape[:1], bias_metadata) if use_bias else None
        self.temperature: arguments.StoredTemperature = arguments.stored(temperature)
        self.logit_softcap = logit_softcap
        self.dtype = dtype
        self.precision = precision
        # Flax takes tuples, but no lists, for constants.
        self.vocab_axis = _axes(vocab_axis) or None
        self.token_axes = _axes(token_axes) or ()
        self.workspace_bytes = workspace_bytes
        self.implementation: Implementation | None = implementation

    def tied_to(self, embedding: nnx.Embed) -> SoftmaxHead:
        """Returns this head with an embedding's table as its kernel, for a call.

        Args:
          embedding: an `nnx.Embed` with V rows and H features.

        Returns:
          A `SoftmaxHead` that shares all other parts with this one, without what a
          subclass adds. To keep it makes the embedding a part of two modules.

        Raises:
          ValueError: if this head is not one with `tied=True`, or the embedding's
            shape is not [num_classes, in_features].
        """
        if not self.tied:
            raise ValueError("`tied` must be True in a head for `tied_to`, got False.")
        _check_embedding(embedding, (self.num_classes, self.in_features))
        return _TiedHead(self, embedding)

    def __call__(self, hidden: ArrayLike) -> jax.Array:
        """Returns all logits, soft-capped and not divided by the temperature.

        Args:
          hidden: [..., H] floating.

        Returns:
          [..., V] float32 (float64 if an input is): these are stored. With a
          `vocab_axis`, the logits of this shard's classes.
        """
        hidden, kernel = self._promoted(hidden)
        options = self._options()
        names = ("bias", "logit_softcap", "kernel_layout", "precision")
        chosen = {name: options[name] for name in names}
        call = prepare("linear_statistics", hidden, kernel, **chosen)
        return reference.logits(call.config, call.arrays)

    def call(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """Calls a function of hidden states and a kernel with this head's.

        The function gets the kernel, bias, temperature, soft-cap, layout, precision,
        mesh axes, workspace and implementation of the head, and hidden states in its
        dtype. It may be any `linear_*` function of jaxsoft, one that `over_mesh`
        returned, `sampled_softmax_loss`, or one of your own.

        Args:
          function: takes `hidden` and `kernel`, or `student_hidden` and
            `student_kernel`: then the head is the student.
          *args: its positional arguments, without the kernel.
          **options: its other arguments, by name. They come before the head's own: a
            temperature of None is that of the module.

        Returns:
          What the function returns.

        Raises:
          TypeError: if the function takes no kernel, or other arguments.
          ValueError: if it does not take what the head has: a bias, a soft-cap, a tied
            embedding or mesh axes. A temperature alone is left out.
        """
        call = calling.bind(function, args, options)
        hidden, kernel = self._promoted(call.given[f"{call.prefix}hidden"])
        return call.run(hidden, kernel, self._options())

    def _promoted(self, hidden: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Returns hidden states and kernel in the dtype of matrix products."""
        hidden = checks.floating("hidden", hidden)
        param = self.kernel if self.embedding is None else self.embedding.embedding
        if param is None:
            raise ValueError(
                "`embedding` must be given to a head with tied=True, got None. Call "
                "the method of `head.tied_to(embedding)`."
            )
        hidden, kernel = arguments.promoted(self.dtype, hidden, param[...])
        return hidden, kernel

    def _options(self) -> dict[str, Any]:
        """Returns the options of functions that the head knows."""
        return {
            "bias": None if self.bias is None else self.bias[...],
            "temperature": arguments.current(self.temperature, None),
            "logit_softcap": self.logit_softcap,
            "kernel_layout": self.kernel_layout,
            "precision": self.precision,
            "vocab_axis": self.vocab_axis,
            "token_axes": self.token_axes,
            "workspace_bytes": self.workspace_bytes,
            "implementation": self.implementation,
        }


class _TiedHead(SoftmaxHead):
    """A head with the parts of another, and an embedding.

    It is made anew: Flax refuses to change a module, or its copy, in a transformation
    that the module was not made in.
    """

    def __init__(self, head: SoftmaxHead, embedding: nnx.Embed):
        """Takes the parts."""
        self.embedding = embedding
        for name in _PARTS:
            setattr(self, name, getattr(head, name))


_PARTS = (
    "in_features",
    "num_classes",
    "tied",
    "kernel_layout",
    "kernel",
    "bias",
    "temperature",
    "logit_softcap",
    "dtype",
    "precision",
    "vocab_axis",
    "token_axes",
    "workspace_bytes",
    "implementation",
)


def _axes(value: MeshAxes) -> str | tuple[str, ...] | None:
    """Returns mesh axes without a list."""
    return value if value is None or isinstance(value, str) else tuple(value)


def _check_embedding(embedding: nnx.Embed, shape: tuple[int, int]) -> None:
    """Raises unless a tied embedding is a kernel [V, H]."""
    table = embedding.embedding[...]
    checks.shape("embedding", table, shape, "[num_classes, in_features]")
