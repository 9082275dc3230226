"""Prefill once, then decode step by step with the hybrid cache, all in one compiled call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from mmjax.cache import HybridCache
from mmjax.engine.sampling import SamplingParams, sample
from mmjax.model import Decoder


class Completions(NamedTuple):
    """What each row generated.

    tokens [B, N] int32, zero past the end; logprobs [B, N] float32 of those tokens at the
    sampling temperature; length [B] int32, the end token included; finished [B] bool, whether
    the row ended by itself rather than at the limit.
    """

    tokens: Int32[Array, "B N"]
    logprobs: Float32[Array, "B N"]
    length: Int32[Array, " B"]
    finished: Bool[Array, " B"]


class PromptError(ValueError):
    """A prompt that cannot be run; the message names its length and the limit."""


def pad_prompts(
    prompts: Sequence[Sequence[int]], length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads prompts with zeros.

    Args:
      prompts: Ids of each row.
      length: P, to pad to; None for the longest prompt.

    Returns:
      tokens [B, P] int32 and lengths [B] int32.

    Raises:
      PromptError: there is no prompt, or one is empty or longer than `length`.
    """
    if not prompts:
        raise PromptError("no prompts to complete")
    lengths = np.array([len(p) for p in prompts], np.int32)
    width = int(lengths.max()) if length is None else length
    for row, n in enumerate(lengths):
        if not 1 <= n <= width:
            raise PromptError(f"prompt {row} has {n} tokens; it must have 1 to {width}")
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, lengths


def generate(
    model: Decoder,
    prompts: Int32[Array, "B P"] | np.ndarray,
    lengths: Int32[Array, " B"] | np.ndarray,
    params: SamplingParams,
    key: jax.Array,
    *,
    samples: int = 1,
) -> Completions:
    """Completes each prompt `samples` times; samples of one prompt share its prefill.

    Args:
      model: The decoder.
      prompts: [B, P] int32, padded on the right.
      lengths: [B] real tokens of each prompt, at least 1.
      params: How to sample.
      key: PRNG key. Row r draws from fold_in(key, r), whatever the other rows do.
      samples: G, completions a prompt.

    Returns:
      Completions of B·G rows, those of one prompt side by side.

    Raises:
      PromptError: prompt and completion exceed the model's max_position_embeddings.
    """
    limit = model.cfg.max_position_embeddings
    longest = prompts.shape[1] + params.max_tokens
    if longest > limit:
        raise PromptError(
            f"a prompt of {prompts.shape[1]} tokens and max_tokens={params.max_tokens} make "
            f"{longest}, beyond the model's {limit} positions; shorten one of them"
        )
    return _generate(model, jnp.asarray(prompts), jnp.asarray(lengths), params, key, samples)


class _Step(NamedTuple):
    place: jax.Array
    cache: HybridCache
    token: jax.Array
    done: jax.Array
    out: Completions


@partial(jax.jit, static_argnames=("params", "samples"))
def _generate(
    model: Decoder,
    prompts: jax.Array,
    lengths: jax.Array,
    params: SamplingParams,
    key: jax.Array,
    samples: int,
) -> Completions:
    batch, width = prompts.shape
    real = jnp.arange(width, dtype=jnp.int32)[None] < lengths[:, None]
    cache = HybridCache.create(model.cfg, batch, width + params.max_tokens)
    prefill = model(prompts, segment_ids=real.astype(jnp.int32), cache=cache, compute_logits=False)
    last = jnp.take_along_axis(prefill.hidden, lengths[:, None, None] - 1, axis=1)
    logits = jnp.repeat(model.logits(last)[:, 0], samples, axis=0)
    assert prefill.cache is not None
    rows = batch * samples
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows, dtype=jnp.uint32))

    def emit(state: _Step, logits: jax.Array) -> _Step:
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, state.place)
        token, logp = sample(logits, keys, params)
        token = jnp.where(state.done, 0, token)
        ended = jnp.zeros(rows, bool) if params.eos_id is None else token == params.eos_id
        out = Completions(
            state.out.tokens.at[:, state.place].set(token),
            state.out.logprobs.at[:, state.place].set(jnp.where(state.done, 0, logp)),
            state.out.length + (~state.done).astype(jnp.int32),
            state.out.finished | (ended & ~state.done),
        )
        return _Step(state.place + 1, state.cache, token, state.done | ended, out)

    def step(state: _Step) -> _Step:
        out = model(
            state.token[:, None],
            segment_ids=(~state.done).astype(jnp.int32)[:, None],
            cache=state.cache,
        )
        assert out.cache is not None
        assert out.logits is not None
        return emit(state._replace(cache=out.cache), out.logits[:, 0])

    nothing = Completions(
        jnp.zeros((rows, params.max_tokens), jnp.int32),
        jnp.zeros((rows, params.max_tokens), jnp.float32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
    )
    start = _Step(
        jnp.zeros((), jnp.int32),
        prefill.cache.repeat(samples),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, bool),
        nothing,
    )
    end = jax.lax.while_loop(
        lambda s: (s.place < params.max_tokens) & ~jnp.all(s.done), step, emit(start, logits)
    )
    return end.out
