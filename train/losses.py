"""Losses: token log-probabilities, cross-entropy, CISPO."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from mmjax.model import Decoder
from mmjax.sharding import DEFAULT_RULES, active_mesh

# Positions whose logits a device has at once: [_POSITIONS, vocab] float32 is 1.6 GB at 200K tokens.
_POSITIONS = 2048


def token_logprobs(
    model: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int32[Array, "B T"],
    temperature: float = 1.0,
) -> Float32[Array, "B T"]:
    """log softmax(logits / temperature) of each target, without ever holding all logits.

    Args:
      model: For its LM head.
      hidden: Final-norm outputs [B, T, D].
      targets: Token whose probability each position predicts [B, T].
      temperature: Of the softmax.
    """

    def chunk(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        h, target = x
        logits = model.logits(h) / temperature
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    rows, stretches, size = _spread(*targets.shape)
    h, target = hidden.reshape(rows, -1, hidden.shape[-1]), targets.reshape(rows, -1)
    length = target.shape[1] // stretches
    if length <= size:
        return chunk((h, target)).reshape(targets.shape)

    def cut(x: jax.Array) -> jax.Array:
        """[R, T, *] to chunks [N, R, stretches · size, *]."""
        rest = x.shape[2:]
        x = x.reshape(rows, stretches, length, *rest)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -length % size), *((0, 0) for _ in rest)))
        x = jnp.moveaxis(x.reshape(rows, stretches, -1, size, *rest), 2, 0)
        return x.reshape(-1, rows, stretches * size, *rest)

    # Checkpointed, the backward recomputes a chunk's logits instead of keeping them.
    logp = jax.lax.map(jax.checkpoint(chunk), (cut(h), cut(target)))
    logp = jnp.moveaxis(logp.reshape(-1, rows, stretches, size), 0, 2)
    return logp.reshape(rows, stretches, -1)[:, :, :length].reshape(targets.shape)


def _spread(batch: int, length: int) -> tuple[int, int, int]:
    """How to lay out [batch, length] positions for chunks to which each device adds of its own:
    rows, stretches of a row, and positions of a stretch in a chunk.
    """
    mesh = active_mesh()
    if mesh is None:
        return 1, 1, _POSITIONS
    context = mesh.shape["context"]
    devices = math.prod(mesh.shape[axis] for axis in DEFAULT_RULES.batch)
    size = max(_POSITIONS // -(-batch // devices), 1)
    return batch, context if length % context == 0 else 1, size


def cross_entropy(
    logprobs: Float32[Array, "B T"], mask: Float32[Array, "B T"]
) -> Float32[Array, ""]:
    """Mean negative log-probability of the masked-in targets."""
    return -jnp.sum(logprobs * mask) / jnp.maximum(jnp.sum(mask), 1)


class CispoStats(NamedTuple):
    """ratio_mean, ratio_max: of the importance weights before the cap; capped: share of tokens
    at the cap.
    """

    ratio_mean: jax.Array
    ratio_max: jax.Array
    capped: jax.Array


def cispo_loss(
    logprobs: Float32[Array, "N G T"],
    behaviour: Float32[Array, "N G T"],
    advantages: Float32[Array, "N G"],
    mask: Float32[Array, "N G T"],
    is_weight_cap: float,
) -> tuple[Float32[Array, ""], CispoStats]:
    """Clips the importance weight, never the update.

        J = mean over groups of 1/Σ_i|o_i| · Σ_i Σ_t sg(min(r_it, cap)) Â_i log π_θ(o_it)
        r = π_θ / π_behaviour

    The loss is -J. The weight is a constant to the gradient (sg), which flows through log π
    alone: differentiating through min(r, cap) would make the gradient r (1 + log π) Â ∇log π
    below the cap, with the wrong sign wherever π < 1/e.

    Args:
      logprobs: log π_θ of the sampled tokens, N groups of G samples [N, G, T].
      behaviour: log π of the sampler when it drew them.
      advantages: Â of each sample [N, G].
      mask: 1 for tokens that count. A group without any contributes nothing.
      is_weight_cap: Absolute cap, 1 + ε_high; no lower bound.

    Returns:
      The loss, and statistics of the weights.

    Source: MiniMax-M1 report, section 3.1, eq. 4-5.
    """
    ratio = jnp.exp(jax.lax.stop_gradient(logprobs) - behaviour)
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, is_weight_cap))
    tokens = mask.sum((1, 2))  # [N]
    objective = (weight * advantages[:, :, None] * logprobs * mask).sum((1, 2))
    groups = jnp.maximum(jnp.sum(tokens > 0), 1).astype(jnp.float32)
    loss = -jnp.sum(objective / jnp.maximum(tokens, 1)) / groups
    total = jnp.maximum(mask.sum(), 1)
    return loss, CispoStats(
        (ratio * mask).sum() / total,
        (ratio * mask).max(),
        ((ratio > is_weight_cap).astype(jnp.float32) * mask).sum() / total,
    )


def group_advantages(
    rewards: Float32[Array, "N G"],
) -> tuple[Float32[Array, "N G"], Bool[Array, " N"]]:
    """(R - mean) / std within each group, and which groups say anything.

    A group whose rewards are all equal has no gradient; it is to be dropped.

    Args:
      rewards: Of N groups of G samples.

    Returns:
      Advantages [N, G], zero in a dropped group, and whether each group is kept [N].

    Source: MiniMax-M1 report, eq. 5; DAPO's dropping of groups without variance.
    """
    kept = rewards.max(axis=1) > rewards.min(axis=1)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    std = jnp.sqrt(jnp.mean(centred**2, axis=1, keepdims=True))
    return jnp.where(kept[:, None], centred / jnp.where(kept[:, None], std, 1), 0), kept
