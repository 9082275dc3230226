"""Token log-probabilities and cross-entropy."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

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
