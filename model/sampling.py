"""Texts that a model goes on with: prompts in, drawn tokens out, one compiled loop for each shape.

Legend: B rows, T prompt positions, M new tokens, V logits of the vocabulary, C candidates,
S stop ids, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from model.cache import Cache, empty_cache
from model.config import ModelConfig
from model.execution import DEFAULT, Execution
from model.transformer import Params, continue_texts, unembed


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature first, then top-k, then top-p (arXiv 1904.09751).

    The defaults draw from the model's own distribution; temperature 0 takes the likeliest token.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} divides the logits: give 0 (always the likeliest "
                "token) or a number above"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} leaves no token: give at least 1, or none at all")
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} is the probability to keep: give a number above 0 and up to 1"
            )


class Generated(NamedTuple):
    """New tokens of each row, a stop id among them; what follows after `lengths_B` is 0."""

    tokens_BM: Int[Array, "B M"]
    lengths_B: Int[Array, " B"]


def generate(
    params: Params,
    config: ModelConfig,
    prompts_BT: Int[np.ndarray, "B T"],
    lengths_B: Int[np.ndarray, " B"],
    *,
    max_new_tokens: int,
    seed: int = 0,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    rows_B: Int[np.ndarray, " B"] | None = None,
    how: Execution = DEFAULT,
) -> Generated:
    """Continue each prompt until a stop id, the end of the context, or `max_new_tokens`.

    A token's draw depends on `seed`, the number of its row and its position alone, so in the same
    shape [B, T] a row's text is the same whatever its neighbours; in another shape, up to
    rounding. Another temperature, top_p, seed or stop id compiles nothing anew.

    Args:
        prompts_BT: token ids; what lies beyond a row's length is neither seen nor remembered.
        lengths_B: tokens of each prompt, 1 to `config.context_length`. The last one is followed
            by at most `context_length - length + 1` new tokens.
        sampling: by default the model's own distribution.
        rows_B: numbers that tell rows apart; by default their places from 0.

    Raises:
        ValueError: a prompt is empty or too long, or no new token is asked for.
    """
    sampling = sampling or Sampling()
    _check_lengths(lengths_B, prompts_BT.shape[1], config)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: ask for at least 1")
    return _generate(
        params,
        jnp.asarray(prompts_BT, jnp.int32),
        jnp.asarray(lengths_B, jnp.int32),
        # The generator is named, since the default one can be changed by configuration.
        jax.random.key(seed, impl="threefry2x32"),
        jnp.arange(len(lengths_B)) if rows_B is None else jnp.asarray(rows_B),
        jnp.float32(sampling.temperature),
        jnp.float32(sampling.top_p),
        jnp.asarray(stop_ids, jnp.int32),
        config=config,
        max_new_tokens=max_new_tokens,
        top_k=sampling.top_k,
        how=how,
    )


def complete(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int = 0,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    rows_per_batch: int = 16,
    how: Execution = DEFAULT,
) -> Iterator[list[int]]:
    """New tokens of each prompt in turn, as `generate` gives them.

    Prompts go in batches of `rows_per_batch`, padded to a power of two of tokens (at most to the
    context), so that few shapes are compiled.

    Raises: as `generate`, before anything is computed.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    _check_lengths(lengths, config.context_length, config)
    for start in range(0, len(prompts), rows_per_batch):
        lengths_B = lengths[start : start + rows_per_batch]
        prompts_BT = np.zeros((len(lengths_B), _padded(int(lengths_B.max()), config)), np.int32)
        for row, length in enumerate(lengths_B):
            prompts_BT[row, :length] = prompts[start + row]
        new = generate(
            params,
            config,
            prompts_BT,
            lengths_B,
            max_new_tokens=max_new_tokens,
            seed=seed,
            sampling=sampling,
            stop_ids=stop_ids,
            rows_B=np.arange(start, start + len(lengths_B)),
            how=how,
        )
        tokens_BM, new_lengths_B = np.asarray(new.tokens_BM), np.asarray(new.lengths_B)
        for tokens_M, length in zip(tokens_BM, new_lengths_B, strict=True):
            yield tokens_M[:length].tolist()


def candidates(
    logits_BV: Float[Array, "B V"],
    temperature: float | Float[Array, ""],
    top_k: int | None,
    top_p: float | Float[Array, ""],
) -> tuple[Int[Array, "B C"], Float[Array, "B C"]]:
    """Ids of the C = top_k likeliest tokens (all without it) in order, and their logits.

    Softmax of these logits is what tokens are drawn from. It is zero for tokens outside the
    nucleus, the smallest set of the likeliest whose probability reaches `top_p`; of equally likely
    tokens the lower id comes first. The temperature is above 0.
    """
    V = logits_BV.shape[-1]
    logits_BC, ids_BC = jax.lax.top_k(logits_BV, V if top_k is None else min(top_k, V))
    # From the largest one down, so that no temperature overflows. It is the first one, but for a
    # slice of what top_k gives XLA would sort all the logits.
    logits_BC = (logits_BC - logits_BC.max(axis=1, keepdims=True)) / temperature
    probs_BC = jax.nn.softmax(logits_BC, axis=-1)
    mass_before_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC
    # The rounding of a sum must not cost a token where all are wanted.
    kept_BC = (mass_before_BC < top_p) | (jnp.asarray(top_p) >= 1)
    return ids_BC, jnp.where(kept_BC, logits_BC, -jnp.inf)


class _Texts(NamedTuple):
    """What has been drawn so far."""

    tokens_BM: Int[Array, "B M"]
    lengths_B: Int[Array, " B"]
    ended_B: Bool[Array, " B"]
    num_new: Int[Array, ""]


@partial(jax.jit, static_argnames=("config", "max_new_tokens", "top_k", "how"))
def _generate(
    params: Params,
    prompts_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    key: Key[Array, ""],
    rows_B: Int[Array, " B"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    stop_ids_S: Int[Array, " S"],
    *,
    config: ModelConfig,
    max_new_tokens: int,
    top_k: int | None,
    how: Execution,
) -> Generated:
    row_keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)

    def append(texts: _Texts, x_B1D: Float[Array, "B 1 D"]) -> _Texts:
        """One more token for each row that has not ended, from the hidden states before it."""
        positions_B = lengths_B + texts.num_new
        # Surplus embedding rows are no tokens.
        logits_BV = unembed(params, config, x_B1D)[:, 0, : config.vocab_size]
        keys_B = jax.vmap(jax.random.fold_in)(row_keys_B, positions_B)
        token_B = _next_token(logits_BV, keys_B, temperature, top_k, top_p)
        token_B = jnp.where(texts.ended_B, 0, token_B)
        stops_B = (token_B[:, None] == stop_ids_S).any(axis=1)
        return _Texts(
            texts.tokens_BM.at[:, texts.num_new].set(token_B),
            texts.lengths_B + ~texts.ended_B,
            texts.ended_B | stops_B | (positions_B >= config.context_length),
            texts.num_new + 1,
        )

    def step(state: tuple[_Texts, Cache]) -> tuple[_Texts, Cache]:
        texts, cache = state
        newest = texts.num_new - 1
        x_B1D, cache = continue_texts(
            params,
            config,
            cache,
            texts.tokens_BM[:, newest, None],
            (lengths_B + newest)[:, None],
            (~texts.ended_B).astype(jnp.int32)[:, None],
            how,
        )
        return append(texts, x_B1D), cache

    def goes_on(state: tuple[_Texts, Cache]) -> Bool[Array, ""]:
        return (state[0].num_new < max_new_tokens) & ~state[0].ended_B.all()

    x_B1D, cache = _read_prompts(params, config, prompts_BT, lengths_B, max_new_tokens, how)
    B = len(lengths_B)
    nothing = _Texts(
        jnp.zeros((B, max_new_tokens), jnp.int32),
        jnp.zeros(B, jnp.int32),
        jnp.zeros(B, bool),
        jnp.int32(0),
    )
    texts, _ = jax.lax.while_loop(goes_on, step, (append(nothing, x_B1D), cache))
    return Generated(texts.tokens_BM, texts.lengths_B)


def _read_prompts(
    params: Params,
    config: ModelConfig,
    prompts_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    max_new_tokens: int,
    how: Execution,
) -> tuple[Float[Array, "B 1 D"], Cache]:
    """Hidden states of the prompts' last tokens, and a cache with room for the new ones."""
    B, T = prompts_BT.shape
    num_positions = min(T + max_new_tokens, config.context_length)
    cache = empty_cache(config, B, num_positions, how.dtype)
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    valid_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
    x_BTD, cache = continue_texts(params, config, cache, prompts_BT, positions_BT, valid_BT, how)
    return jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1), cache


def _next_token(
    logits_BV: Float[Array, "B V"],
    keys_B: Key[Array, " B"],
    temperature: Float[Array, ""],
    top_k: int | None,
    top_p: Float[Array, ""],
) -> Int[Array, " B"]:
    def draw() -> Int[Array, " B"]:
        ids_BC, logits_BC = candidates(logits_BV, temperature, top_k, top_p)
        # "high" keeps tokens of a probability below 1e-7 as likely as they are.
        ranks_B = jax.vmap(partial(jax.random.categorical, mode="high"))(keys_B, logits_BC)
        return jnp.take_along_axis(ids_BC, ranks_B[:, None], axis=1)[:, 0]

    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits_BV, axis=-1))


def _padded(length: int, config: ModelConfig) -> int:
    return min(1 << (length - 1).bit_length(), config.context_length)


def _check_lengths(lengths: Int[np.ndarray, " B"], longest: int, config: ModelConfig) -> None:
    for number, length in enumerate(lengths.tolist(), start=1):
        if length < 1:
            raise ValueError(f"prompt {number} is empty: begin it with <bos>")
        if length > config.context_length:
            raise ValueError(
                f"prompt {number} has {length} tokens, but the model's context_length is "
                f"{config.context_length}: shorten the prompt"
            )
        assert length <= longest, "a prompt cannot be longer than its row"
