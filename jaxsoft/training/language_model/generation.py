"""Text drawn from a language model: one compiled step a token, over a cache.

The cache has the keys and values of a window of `T` positions, as many as the model was
trained with. A prompt goes in at once, by a second program; a longer one counts by its
end. When the window is full, the older half of it goes, and what is left goes in anew:
so each token is drawn from the hidden state that the model has after the window, within
rounding, and no position is ever further than training went.

Shapes: `B` texts at a time, `T` positions, `H` features, `V` tokens.
"""

import codecs
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from jaxsoft.training.language_model.tokens import DOCUMENT_START_ID
from jaxsoft.training.mesh import replicated

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Drawn", "Generator", "Sampling", "TokenText", "encode_prompt"]

# The options of a head's `sample` that leave classes out.
_FILTERS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: in [0, ∞]; 0 takes the likeliest token. Several are one a text.
      top_k: so many tokens may be drawn, the likeliest; None or 0 for all.
      top_p: of these, those that have this probability together; None for all.
      min_p: of these, those that have this share of the largest probability; None for
        all.
    """

    temperature: float | tuple[float, ...] = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Checks all values; raises `ValueError`."""
        for value in np.atleast_1d(self.temperature).tolist():
            if not value >= 0:
                raise ValueError(f"`temperature` must be in [0, inf], got {value}.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"`top_k` must be at least 0, got {self.top_k}.")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {value}.")

    @property
    def filters(self) -> dict[str, int | float]:
        """The filters that are asked for, by name."""
        values = {name: getattr(self, name) for name in _FILTERS}
        return {name: value for name, value in values.items() if value is not None}

    def check_head(self, head: Any) -> None:
        """Raises `ValueError` at a filter that a head's `sample` does not take."""
        known = inspect.signature(head.sample).parameters
        for name, value in self.filters.items():
            if name not in known:
                raise ValueError(
                    f"`{name}` must be left out with this model's head, "
                    f"{type(head).__name__}, which has no filters, got {value}."
                )


class Drawn(NamedTuple):
    """A token of each text.

    Attributes:
      token_ids: `[B]` int32.
      log_probs: `[B]` float32, under the temperature, before filters; None where they
        were not asked for.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray | None


class _Window(NamedTuple):
    """What a step takes from the one before.

    Attributes:
      token: `[B]` int32, the newest, which is not in the cache yet.
      position: int32 scalar, its place in the window.
      number: int32 scalar, how many tokens were drawn.
    """

    token: Array
    position: Array
    number: Array


class Generator:
    """Draws texts from a model; a program is compiled when it is first needed.

    The token of a text depends on the seed, on the text's place among the `B`, and on
    how many were drawn before it; not on how many texts there are.
    """

    def __init__(self, model: Any, length: int, *, mesh: Mesh | None = None):
        """Takes the model apart.

        Args:
          model: a module with a `trunk` and a head of `jaxsoft.nn`, `head`. A trunk
            without `extend` and `empty_cache` reads the window anew for each token.
          length: `T`.
          mesh: the devices that the parameters are on; None is one.
        """
        self._length, self._head = length, model.head
        self._graph, state = nnx.split(model)
        # A list of arrays takes less time to hand over, token by token, than a model.
        self._arrays, self._structure = jax.tree.flatten(state)
        everywhere = None if mesh is None else replicated(mesh)
        self._read = jax.jit(self._read_texts, out_shardings=everywhere)
        self._step = jax.jit(
            self._draw_token,
            donate_argnames="cache",
            static_argnames=("top_k", "log_probs"),
            out_shardings=everywhere,
        )

    def stream(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        sampling: Sampling,
        *,
        seed: int,
        rows: int = 1,
        log_probs: bool = False,
    ) -> Iterator[Drawn]:
        """Continues a prompt.

        Args:
          prompt: token ids, at least one; the last `T` count.
          num_tokens: how many to draw.
          sampling: how they are drawn; `B` temperatures, or one.
          seed: of the draws.
          rows: `B`, how many texts.
          log_probs: whether to compute log-probabilities.

        Returns:
          What gives the next token of each text, until there are so many.

        Raises:
          ValueError: the model's head lacks a filter.
        """
        sampling.check_head(self._head)
        temperature = np.broadcast_to(np.asarray(sampling.temperature), [rows])
        filters = sampling.filters
        static = {"top_k": filters.pop("top_k", None), "log_probs": log_probs}
        options = {"temperature": temperature} | filters
        step = functools.partial(
            self._step,
            key=jax.random.key(seed),
            options={
                name: jax.device_put(np.asarray(value, np.float32))
                for name, value in options.items()
            },
            **static,
        )
        texts = np.tile(np.asarray(prompt, np.int32)[-self._length :], (rows, 1))
        return self._continued(texts, num_tokens, step)

    def _continued(
        self, texts: np.ndarray, num_tokens: int, step: Callable[..., Any]
    ) -> Iterator[Drawn]:
        """Yields tokens after texts `[B, n]`, where `n` is at most `T`."""
        length, number = self._length, 0
        while number < num_tokens:
            filled = texts.shape[1]
            cache = self._read(
                self._arrays, np.pad(texts, ((0, 0), (0, length - filled)))
            )
            window = _Window(
                jnp.asarray(texts[:, -1]), jnp.int32(filled - 1), jnp.int32(number)
            )
            count = min(num_tokens - number, length - filled + 1)
            added = []
            for drawn in self._drawn(cache, window, count, step):
                added.append(drawn.token_ids)
                yield drawn
            number += count
            texts = np.concatenate([texts, np.stack(added, axis=1)], axis=1)
            texts = texts[:, -max(1, length // 2) :]

    def _drawn(
        self, cache: Any, window: _Window, count: int, step: Callable[..., Any]
    ) -> Iterator[Drawn]:
        """Yields so many tokens; the next is on its way while one is looked at."""
        ahead: tuple[Array, Array | None] | None = None
        for place in range(count + 1):
            done = ahead
            if place < count:
                cache, window, log_probs = step(self._arrays, cache, window)
                ahead = window.token, log_probs
            if done is not None:
                token, log_probs = done
                log_probs = None if log_probs is None else np.asarray(log_probs)
                yield Drawn(np.asarray(token), log_probs)

    def _model(self, arrays: list[Array]) -> Any:
        return nnx.merge(self._graph, jax.tree.unflatten(self._structure, arrays))

    def _read_texts(self, arrays: list[Array], tokens: Array) -> Any:
        """Returns the cache of texts `[B, T]`; what is after them does not matter."""
        trunk = _cached(self._model(arrays).trunk)
        cache = trunk.empty_cache(*tokens.shape)
        return trunk.extend(tokens, cache, jnp.int32(0))[1]

    def _draw_token(
        self,
        arrays: list[Array],
        cache: Any,
        window: _Window,
        key: Array,
        options: dict[str, Array],
        *,
        top_k: int | None,
        log_probs: bool,
    ) -> tuple[Any, _Window, Array | None]:
        """Adds the newest token to the cache, and draws the next one."""
        model = self._model(arrays)
        token = window.token[:, None]
        hidden, cache = _cached(model.trunk).extend(token, cache, window.position)
        hidden = hidden[:, 0]
        key = jax.random.fold_in(key, window.number)
        filters = options if top_k is None else options | {"top_k": top_k}
        draw = functools.partial(model.head.sample, key, hidden, **filters)
        of_tokens = None
        if not log_probs:
            token = draw()
        elif "return_log_prob" in inspect.signature(model.head.sample).parameters:
            token, of_tokens, _ = draw(return_log_prob=True)
        else:
            token = draw()
            of_tokens = model.head.log_prob(hidden, token, **options)
        return cache, _Window(token, window.position + 1, window.number + 1), of_tokens


def _cached(trunk: Any) -> Any:
    """Returns a trunk that goes on from a cache."""
    has_cache = hasattr(trunk, "extend") and hasattr(trunk, "empty_cache")
    return trunk if has_cache else _Whole(trunk)


class _Whole:
    """A trunk without a cache of its own: what is kept are the tokens themselves."""

    def __init__(self, trunk: Any):
        self._trunk = trunk

    def empty_cache(self, batch: int, capacity: int) -> Array:
        return jnp.zeros([batch, capacity], jnp.int32)

    def extend(self, tokens: Array, cache: Array, first: Array) -> tuple[Array, Array]:
        cache = jax.lax.dynamic_update_slice_in_dim(cache, tokens, first, 1)
        hidden = self._trunk(cache)
        length = tokens.shape[1]
        return jax.lax.dynamic_slice_in_dim(hidden, first, length, 1), cache


def _bytes_of_letters() -> dict[str, int]:
    """The byte of each letter by which byte-level tokenizers spell it.

    A byte that is a visible character of Latin-1 is that character; the others are
    those from U+0100 on.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _bytes_of_letters()


class TokenText:
    """The text of tokens as they come: a character appears when it is whole.

    What is no UTF-8 becomes U+FFFD, and tokens that are no text, such as the mark
    before a text, nothing: all pieces together are what the tokenizer decodes.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        """Starts a text.

        Args:
          tokenizer: a byte-level one.
        """
        self._tokenizer = tokenizer
        self._special = {
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """Returns the text that is whole with one more token."""
        if token_id in self._special:
            return ""
        letters = self._tokenizer.id_to_token(token_id) or ""
        return self._decoder.decode(bytes(_BYTES[letter] for letter in letters))

    def end(self) -> str:
        """Returns what was held back, and ends the text."""
        return self._decoder.decode(b"", final=True)


def encode_prompt(tokenizer: "Tokenizer", text: str) -> list[int]:
    """The tokens of a text from its start, the mark before it first.

    Args:
      tokenizer: the tokenizer.
      text: may be empty.
    """
    # As in training, a text that spells out the document mark does not end there.
    tokenizer.encode_special_tokens = True
    return [DOCUMENT_START_ID, *tokenizer.encode(text).ids]
