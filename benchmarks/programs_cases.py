"""The programs of `python -m benchmarks programs`: functions, arrays and places.

Sizes are small enough to compile in seconds and large enough for tiles: a workspace of
1 MiB, of the 16 MiB that the logits take on one device, keeps none of them. `default`,
`kept` and `chunks` have room for all, for a part, and for those of some tokens at a
time; `wide` is a real model's head, whose workspace the functions choose by themselves
where it is not `recomputed`. Nothing is ever run.

Only public functions are used, called as every version of them understands.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxsoft
import jaxsoft.nn

# Where a program runs: on one device, over a mesh by `jaxsoft.over_mesh`, or on the
# same mesh by `jax.jit` alone, which compilers for TPUs do not divide.
ONE, MESH, JIT = "on one", "over a mesh", "jitted on a mesh"
AXES = ("data", "vocab")

_ROWS, _FEATURES, _CLASSES, _RAGGED, _BEST, _SAMPLES = 512, 256, 8192, 8003, 10, 1024
_RANK = 16
_WIDE = (4096, 2304, 256000)
_TILE = {"workspace_bytes": 2**20}
_PART = {"workspace_bytes": 8 * 2**20}
_CHUNKS = {"workspace_bytes": 12 * 2**20}
_NONE = {"reduction": "none"}
_NAMES = ("lse", "log_prob", "entropy")


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled.

    Attributes:
      function: of the arrays.
      arrays: pytrees of arrays that are not there.
      specs: how each is cut over the mesh.
      place: one of `ONE`, `MESH` and `JIT`.
      donated: which arrays may be written over.
    """

    function: Callable[..., Any]
    arrays: tuple[Any, ...]
    specs: tuple[P, ...]
    place: str = ONE
    donated: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a public function, of which programs are made.

    Attributes:
      title: of its programs, which starts with the function's name.
      inputs: names of arrays, in order; `option=array` is given by name.
      moving: names of the arrays that the gradient is by.
      options: further arguments.
      value: whether there is a program of the value alone beside the gradient's.
      places: where it runs.
      pick: names of the result's attributes that count; () takes all of it.
    """

    title: str
    inputs: str
    moving: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    value: bool = False
    places: tuple[str, ...] = (ONE,)
    pick: tuple[str, ...] = ()


_LAYER, _LABELLED = "hidden kernel", "hidden kernel labels"
_WIDE_LAYER = "wide_hidden wide_kernel"
_WIDE_LABELLED = "wide_hidden wide_kernel wide_labels"
_PAIR = "hidden kernel teacher_hidden teacher_kernel"
_CAPPED = "hidden kernel labels bias=bias temperature=temperatures"
_CALLS = (
    _Call("linear_cross_entropy", _LABELLED, _LAYER, _TILE, True, (ONE, MESH, JIT)),
    _Call(
        "linear_cross_entropy capped",
        _CAPPED,
        "hidden kernel bias temperatures",
        _TILE | {"logit_softcap": 30.0},
        places=(ONE, MESH),
    ),
    _Call(
        "linear_cross_entropy weighted",
        "hidden kernel labels weights=weights class_mask=class_mask",
        _LAYER,
        _TILE | {"z_loss": 1e-4, "label_smoothing": 0.1, "ignore_label": -100},
        places=(ONE, MESH),
    ),
    _Call(
        "linear_cross_entropy table",
        "hidden table labels",
        "hidden table",
        _TILE | {"kernel_layout": "vh"},
        places=(ONE, MESH),
    ),
    _Call(
        "linear_cross_entropy ragged",
        "hidden ragged labels",
        "hidden ragged",
        _TILE | _NONE,
        places=(ONE, MESH),
    ),
    _Call("linear_cross_entropy hidden", _LABELLED, "hidden", _TILE),
    _Call("linear_cross_entropy default", _LABELLED, _LAYER, places=(ONE, MESH)),
    _Call(
        "linear_cross_entropy chunks", _LABELLED, _LAYER, _CHUNKS, places=(ONE, MESH)
    ),
    _Call(
        "linear_cross_entropy kept",
        _LABELLED,
        _LAYER,
        _PART | _NONE,
        places=(ONE, MESH),
    ),
    _Call("linear_cross_entropy wide", _WIDE_LABELLED, _WIDE_LAYER, value=True),
    _Call("linear_cross_entropy wide kept", _WIDE_LABELLED, _WIDE_LAYER, _NONE),
    _Call(
        "linear_cross_entropy wide recomputed",
        _WIDE_LABELLED,
        _WIDE_LAYER,
        {"workspace_bytes": 2**24},
    ),
    _Call(
        "linear_cross_entropy scaled",
        "hidden short labels kernel_scale=scales",
        "hidden scales",
        _TILE,
        places=(ONE, MESH),
    ),
    _Call(
        "linear_cross_entropy adapted",
        "hidden kernel labels lora=lora",
        "hidden lora",
        _TILE,
    ),
    _Call(
        "linear_cross_entropy masked",
        "hidden kernel labels class_bits=bits",
        _LAYER,
        _TILE,
        places=(ONE, MESH),
    ),
    _Call("linear_log_prob", _LABELLED, _LAYER, _TILE, places=(ONE, MESH)),
    _Call("linear_log_prob kept", _LABELLED, _LAYER, _PART),
    _Call("linear_log_prob_at", "hidden kernel ids", _LAYER, _TILE),
    _Call(
        "linear_log_prob_at normalized",
        "hidden kernel ids",
        _LAYER,
        _TILE | {"normalize": True},
    ),
    _Call("linear_statistics", _LABELLED, _LAYER, _TILE, pick=_NAMES),
    _Call(
        "linear_statistics argmax",
        _LAYER,
        options=_TILE | {"return_argmax": True},
        places=(ONE, MESH),
        pick=("lse", "argmax"),
    ),
    _Call(
        "linear_statistics ranks",
        _LABELLED,
        options=_TILE | {"return_rank": True, "return_top_k": _BEST},
        places=(ONE, MESH),
        pick=("log_prob", "rank", "top_ids"),
    ),
    _Call(
        "linear_statistics wide ranks",
        _WIDE_LABELLED,
        options={"return_rank": True},
        pick=("log_prob", "rank"),
    ),
    _Call(
        "linear_expected",
        "hidden kernel values",
        "hidden kernel values",
        _TILE,
        places=(ONE, MESH),
    ),
    _Call(
        "linear_expected keyed",
        "hidden kernel values key=key",
        "hidden kernel values",
        _TILE,
    ),
    _Call("linear_top_k", _LAYER, "", _TILE | {"k": _BEST}, places=(ONE, MESH)),
    _Call("linear_sample", "key hidden kernel", "", _TILE, places=(ONE, MESH)),
    _Call(
        "linear_sample filtered",
        "key hidden kernel",
        "",
        _TILE | {"top_k": 50, "top_p": 0.9, "return_log_prob": True},
        places=(ONE, MESH),
    ),
    _Call("linear_distillation", _PAIR, _LAYER, _TILE, True, (ONE, MESH)),
    _Call("linear_distillation default", _PAIR, _LAYER),
    _Call(
        "linear_distillation jensen_shannon",
        _PAIR,
        _LAYER,
        _TILE | {"divergence": "jensen_shannon", "temperature": 2.0},
    ),
    _Call(
        "linear_distillation labelled",
        "hidden kernel teacher_hidden teacher_kernel labels=labels",
        _LAYER,
        _TILE | {"alpha": 0.1, "temperature": 2.0},
    ),
    _Call("linear_distillation_top_k", "hidden kernel ids listed", _LAYER, _TILE),
    _Call(
        "linear_distillation_top_k labelled",
        "hidden kernel ids listed labels=labels",
        _LAYER,
        _TILE | {"divergence": "jensen_shannon", "temperature": 2.0},
    ),
    _Call("linear_fit_temperature", _LABELLED, "", _TILE, places=(ONE, MESH)),
    _Call("nt_xent", "rows others", "rows others", _TILE),
    _Call("clip_loss", "rows others", "rows others", _TILE),
    _Call("supervised_contrastive", "rows rows_labels", "rows", _TILE),
    _Call("in_batch_cross_entropy", "rows others", "rows others", _TILE),
    _Call(
        "in_batch_cross_entropy corrected",
        "rows others rows_numbers rows_labels",
        "rows others",
        _TILE,
    ),
    _Call("softmax", "logits", "logits", {"temperature": 0.7}, True),
    _Call("log_softmax", "logits", "logits", {"temperature": 0.7}, True),
    _Call("logsumexp", "logits", "logits"),
    _Call("entropy", "logits", "logits"),
    _Call("softmax_cross_entropy", "logits labels", "logits", value=True),
    _Call("distillation_loss", "logits other_logits", "logits"),
    _Call("distillation_loss_top_k", "logits ids listed", "logits"),
    _Call("codistillation_loss", "heads", "heads"),
    _Call("gumbel_softmax", "key logits", "logits", {"temperature": 0.7}, True),
    _Call("gumbel_softmax hard", "key logits", "logits", {"hard": True}),
    _Call("reinmax", "key logits", "logits"),
    _Call("sample", "key logits"),
    _Call("sample filtered", "key logits", options={"top_k": 50, "top_p": 0.9}),
    _Call("speculative_sample", "key logits other_logits labels"),
    _Call(
        "hierarchical_log_prob",
        "hidden nodes labels tree",
        "hidden nodes",
        value=True,
    ),
    _Call("hierarchical_sample", "key hidden nodes tree=tree"),
    _Call("hierarchical_top_k", "hidden nodes tree=tree", options={"k": _BEST}),
    _Call("hierarchical_value_and_row_grad", "hidden nodes labels tree"),
    _Call("adaptive_log_prob", "hidden head tails labels bands", "hidden head tails"),
    _Call("adaptive_top_k", "hidden head tails bands=bands", options={"k": _BEST}),
    _Call(
        "sampled_softmax_loss",
        "key hidden kernel labels sampler=sampler",
        _LAYER,
        {"num_samples": _SAMPLES},
    ),
)


def programs(mesh: Mesh, dtype: str) -> dict[str, Program]:
    """Returns the programs by name, to compile for the devices of a mesh.

    Args:
      mesh: two axes, `AXES`.
      dtype: of hidden states, kernels and logits.
    """
    arrays = _arrays(dtype)
    found = dict(pair for call in _CALLS for pair in _programs(call, arrays, mesh))
    found["SoftmaxHead train step"] = _train_step(dtype, arrays)
    return found


def _programs(
    call: _Call, arrays: dict[str, tuple[Any, P]], mesh: Mesh
) -> Iterator[tuple[str, Program]]:
    """Yields the programs of a call."""
    keys = [each.rpartition("=")[::2] for each in call.inputs.split()]
    names = [name for _, name in keys]
    moving, options = tuple(map(names.index, call.moving.split())), call.options
    for place in call.places:
        function = getattr(jaxsoft, call.title.split()[0])
        if place == MESH:
            function = jaxsoft.over_mesh(
                function, mesh, vocab_axis=AXES[1], token_axes=AXES[:1]
            )

        def value(*given, function=function):
            pairs = [(key[0], x) for key, x in zip(keys, given, strict=True)]
            positional = [x for key, x in pairs if not key]
            found = function(*positional, **{k: x for k, x in pairs if k}, **options)
            return tuple(getattr(found, n) for n in call.pick) if call.pick else found

        whats = {"gradient": _gradient(value, moving)} if moving else {"value": value}
        if call.value:
            whats["value"] = value
        for what, whole in whats.items():
            specs = tuple(arrays[name][1] for name in names)
            each = tuple(arrays[name][0] for name in names)
            where = "" if place == ONE else f" {place}"
            yield f"{call.title} {what}{where}", Program(whole, each, specs, place)


def _gradient(
    function: Callable[..., Any], moving: tuple[int, ...]
) -> Callable[..., Any]:
    """Returns the value of a function and its derivative by some arguments.

    That is of the sum of the squares of all that the function gives.
    """

    def total(*arrays):
        leaves = jax.tree.leaves(function(*arrays))
        return functools.reduce(
            jnp.add, (jnp.sum(x.astype("float32") ** 2) for x in leaves)
        )

    return jax.value_and_grad(total, moving)


def _train_step(dtype: str, arrays: dict[str, tuple[Any, P]]) -> Program:
    """Returns a step of stochastic gradient descent of a head, in place."""
    make = functools.partial(
        jaxsoft.nn.SoftmaxHead, _FEATURES, _CLASSES, param_dtype=dtype, **_TILE
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    optimizer = optax.sgd(0.1, momentum=0.9)
    moments = jax.eval_shape(optimizer.init, state)

    def step(state, moments, hidden, labels):
        def loss(state):
            return nnx.merge(graph, state).loss(hidden, labels)

        value, gradient = jax.value_and_grad(loss)(state)
        updates, moments = optimizer.update(gradient, moments, state)
        return optax.apply_updates(state, updates), moments, value

    each = (state, moments, arrays["hidden"][0], arrays["labels"][0])
    return Program(step, each, (P(),) * 4, donated=(0, 1))


def _arrays(dtype: str) -> dict[str, tuple[Any, P]]:
    """Returns pytrees of arrays that are not there, and how a mesh cuts them."""

    def array(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def pair(size: int, width: int) -> jaxsoft.AdaptiveTail:
        return jax.eval_shape(
            jaxsoft.AdaptiveTail, array(_FEATURES, width), array(width, size)
        )

    rows, classes = P(AXES[0]), P(AXES[1])
    starts = array(_CLASSES + 1, dtype="int32")
    columns = P(None, AXES[1])
    tree = jaxsoft.ClassTree.huffman(1 / np.arange(1, _CLASSES + 1))
    bands = jaxsoft.ClassBands.in_order(_CLASSES, (512, 2048))
    bands_head = array(_FEATURES, bands.shortlist + len(bands.tails))
    return {
        "hidden": (array(_ROWS, _FEATURES), rows),
        "kernel": (array(_FEATURES, _CLASSES), columns),
        "table": (array(_CLASSES, _FEATURES), classes),
        "ragged": (array(_FEATURES, _RAGGED), P()),
        "short": (array(_FEATURES, _CLASSES, dtype="int8"), columns),
        "scales": (array(_CLASSES, dtype="float32"), classes),
        "lora": (
            jax.eval_shape(
                jaxsoft.LoRA, array(_FEATURES, _RANK), array(_RANK, _CLASSES)
            ),
            P(),
        ),
        "bits": (array(_ROWS, _CLASSES // 32, dtype="uint32"), rows),
        "labels": (array(_ROWS, dtype="int32"), rows),
        "bias": (array(_CLASSES), classes),
        "temperatures": (array(_ROWS, dtype="float32"), rows),
        "weights": (array(_ROWS, dtype="float32"), rows),
        "class_mask": (array(_CLASSES, dtype="bool"), classes),
        "values": (array(_CLASSES, _FEATURES), classes),
        "ids": (array(_ROWS, _BEST, dtype="int32"), rows),
        "listed": (array(_ROWS, _BEST, dtype="float32"), rows),
        "teacher_hidden": (array(_ROWS, _FEATURES // 2), rows),
        "teacher_kernel": (array(_FEATURES // 2, _CLASSES), columns),
        "wide_hidden": (array(_WIDE[0], _WIDE[1]), rows),
        "wide_kernel": (array(_WIDE[1], _WIDE[2]), columns),
        "wide_labels": (array(_WIDE[0], dtype="int32"), rows),
        "key": (jax.eval_shape(lambda: jax.random.key(0)), P()),
        "rows": (array(4 * _ROWS, _FEATURES), rows),
        "others": (array(4 * _ROWS, _FEATURES), rows),
        "rows_labels": (array(4 * _ROWS, dtype="int32"), rows),
        "rows_numbers": (array(4 * _ROWS, dtype="float32"), rows),
        "logits": (array(_ROWS, _CLASSES), rows),
        "other_logits": (array(_ROWS, _CLASSES), rows),
        "heads": (array(4, _ROWS // 4, _CLASSES), P()),
        "tree": (tree, P()),
        "nodes": (array(tree.num_rows, _FEATURES), P()),
        "bands": (bands, P()),
        "head": (bands_head, P()),
        "tails": ([pair(s, 64 >> 2 * i) for i, s in enumerate(bands.tails)], P()),
        "sampler": (jax.eval_shape(jaxsoft.ClassSampler, starts), P()),
    }
