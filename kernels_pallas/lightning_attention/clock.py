"""Where each token stands in its segment, and the decay weights that follow from it.

Every weight of the chunk form is exp(-s (a - b)) for two token counts a >= b of one run, so no
exponent is ever positive, whatever the length.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Clock(NamedTuple):
    """Per token: real [B, T] bool, tally [B, T] of real tokens so far, run [B, T] of the segment.

    A padding token carries the tally and the run of the last real token before it.
    """

    real: jax.Array
    tally: jax.Array
    run: jax.Array


class Weights(NamedTuple):
    """Decay weights of one chunk of C tokens; B may be 1 where all rows agree.

    within [B, H, C, C]: token j to token i; entering [B, H, C]: the state before the chunk to
    token i; leaving [B, H, C]: token j to the state after the chunk; keep [B, H]: the state
    across the chunk.
    """

    within: jax.Array
    entering: jax.Array
    leaving: jax.Array
    keep: jax.Array


def read_clock(segment_ids: jax.Array) -> Clock:
    """Reads the clock of packed rows [B, T]; 0 is padding."""
    real = segment_ids != 0
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    last_real = jax.lax.cummax(jnp.where(real, index, -1), axis=1)
    before = jnp.pad(last_real[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    restart = real & (before >= 0) & (segment_ids != id_before)
    return Clock(
        real=real,
        tally=jnp.cumsum(real, axis=1, dtype=jnp.int32),
        run=jnp.cumsum(restart, axis=1, dtype=jnp.int32),
    )


def number_segments(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Place of each token in its segment [B, T] from 0, padding not counted; and segments
    numbered from 1 within each row, 0 for padding, so that an id used twice is two segments.
    """
    real, count, run = read_clock(segment_ids)
    run_before = jnp.pad(run[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    count_before = jnp.where(run != run_before, count - real.astype(jnp.int32), 0)
    place = jnp.maximum(count - jax.lax.cummax(count_before, axis=1) - 1, 0)
    return place, jnp.where(real, run + 1, 0)


def chunk_weights(
    decay: jax.Array, clock: Clock, count_before: jax.Array, run_before: jax.Array
) -> Weights:
    """Decay weights of one chunk.

    Args:
      decay: s [H] float32.
      clock: Of the chunk's tokens [B, C].
      count_before: [B] count of the last token before the chunk.
      run_before: [B] run of the last token before the chunk.
    """
    real, count, run = clock
    size = count.shape[1]
    rate = decay[None, :, None]  # [1, H, 1]
    causal = jnp.tril(jnp.ones((size, size), bool))[None]
    same = (run[:, :, None] == run[:, None, :]) & real[:, :, None] & real[:, None, :] & causal

    def weight(steps: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask[:, None], jnp.exp(-rate * steps[:, None].astype(decay.dtype)), 0)

    # Masked pairs can have negative distances; clamped, their exponent stays <= 0.
    distance = jnp.maximum(count[:, :, None] - count[:, None, :], 0).reshape(-1, size * size)
    # Behind the barrier XLA would work out the distances again for every head.
    distance, same = jax.lax.optimization_barrier((distance, same.reshape(-1, size * size)))
    within = weight(distance, same)
    return Weights(
        within=within.reshape(*within.shape[:2], size, size),
        entering=weight(count - count_before[:, None], real & (run == run_before[:, None])),
        leaving=weight(count[:, -1:] - count, real & (run == run[:, -1:])),
        keep=weight(count[:, -1:] - count_before[:, None], (run[:, -1:] == run_before[:, None]))[
            ..., 0
        ],
    )


def unpacked_weights(decay: jax.Array, size: int) -> Weights:
    """Weights of a chunk of `size` tokens without padding or segments, B = 1."""
    count = jnp.arange(1, size + 1, dtype=jnp.int32)[None]
    zero = jnp.zeros((1,), jnp.int32)
    clock = Clock(jnp.ones((1, size), bool), count, jnp.zeros((1, size), jnp.int32))
    return chunk_weights(decay, clock, zero, zero)
