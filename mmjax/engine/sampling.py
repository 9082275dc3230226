"""How the next token is chosen."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to sample one batch.

    Attributes:
      max_tokens: Most new tokens a row.
      temperature: Of the softmax; 0 takes the likeliest token.
      top_p: Keep the likeliest tokens that together reach this probability; 1 keeps all.
      top_k: Keep this many likeliest tokens; 0 keeps all.
      eos_id: Token that ends a row, itself part of the completion; None for none.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eos_id: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")


def sample(
    logits: Float32[Array, "B vocab"], keys: jax.Array, params: SamplingParams
) -> tuple[Int32[Array, " B"], Float32[Array, " B"]]:
    """Draws one token a row.

    Args:
      logits: [B, vocab] float32.
      keys: One PRNG key a row [B], so that a row's draw does not depend on its neighbours.
      params: How to draw.

    Returns:
      The tokens, and their log-probability under softmax(logits / temperature), before top-p
      and top-k: the distribution that a trainer can compute again. At temperature 0, under
      softmax(logits).
    """
    logp = jax.nn.log_softmax(logits / (params.temperature or 1.0), axis=-1)
    if params.temperature == 0:
        token = jnp.argmax(logits, axis=-1)
    else:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logp.shape[1:]))(keys)
        # Fused into the search for the largest, XLA draws the noise one number at a time on CPUs.
        token = jnp.argmax(_filtered(logp, params) + jax.lax.optimization_barrier(noise), axis=-1)
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]


def _filtered(logp: jax.Array, params: SamplingParams) -> jax.Array:
    if params.top_k:
        least = jax.lax.top_k(logp, min(params.top_k, logp.shape[-1]))[0][:, -1:]
        logp = jnp.where(logp >= least, logp, -jnp.inf)
    if params.top_p < 1:
        ordered = jnp.sort(logp, axis=-1, descending=True)
        probability = jnp.exp(jax.nn.log_softmax(ordered, axis=-1))
        # Keep a token while those likelier than it have not yet reached top_p.
        kept = jnp.cumsum(probability, axis=-1) - probability < params.top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logp = jnp.where(logp >= least, logp, -jnp.inf)
    return logp
