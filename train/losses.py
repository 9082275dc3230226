"""Token log-probabilities and cross-entropy, without ever holding the logits of all tokens."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.numerics import einsum32
from mmjax.layers.embed import exact_logits, product_dtype
from mmjax.model import Decoder
from mmjax.sharding import DEFAULT_RULES, active_mesh

# Positions whose logits a device has at once: [_POSITIONS, vocab] float32 is 1.6 GB at 200K tokens.
_POSITIONS = 2048
# Where the vocabulary is small there may be more of them, up to as many bytes; fewer, longer chunks
# add up the gradient of the head fewer times.
_LOGITS = _POSITIONS * 200_064


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

    chunks = _Chunks(targets.shape, model.cfg.vocab_size)
    # Checkpointed, the backward recomputes a chunk's logits instead of keeping them.
    body = jax.checkpoint(chunk) if chunks.many else chunk
    return chunks.join(jax.lax.map(body, (chunks.cut(hidden), chunks.cut(targets))))


def head_loss(
    model: Decoder,
    hidden: Float[Array, "B T D"],
    targets: Int32[Array, "B T"],
    weights: Float32[Array, "B T"],
    z_loss: float = 0.0,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Σ w (ℓ - logit of the target + z ℓ²) with ℓ = logsumexp(logits), and its first part alone.

    The gradient is made in the forward pass, chunk by chunk, while a chunk's logits are there:
    three products with the head instead of four, and that of the head is summed in float32.

    Args:
      model: For its LM head.
      hidden: Final-norm outputs [B, T, D].
      targets: Token that each position predicts [B, T].
      weights: w [B, T], without a gradient: the loss mask over the number of predicted tokens.
      z_loss: z, which keeps ℓ near 0; 0 for none.

    Returns:
      The loss, and the cross-entropy Σ w (ℓ - logit of the target), which has no gradient.

    Source: the z-loss of PaLM (arXiv 2204.02311), section 5, whose z is 1e-4; MiniMax has none.
    """
    kernel = model.embed.embedding[...].T if model.head is None else model.head.kernel[...]
    loss, ce = weighted_loss(z_loss, hidden, kernel, targets, jax.lax.stop_gradient(weights))
    return loss, jax.lax.stop_gradient(ce)


def dpo_loss(
    chosen: Float32[Array, "*pairs"],
    rejected: Float32[Array, "*pairs"],
    beta: float,
    label_smoothing: float = 0.0,
) -> Float32[Array, "*pairs"]:
    """-(1 - ε) log σ(m) - ε log σ(-m) with m = β (chosen - rejected), of each pair.

    Args:
      chosen: log π(y) - log π_ref(y) of the preferred answers y given their questions; over the
        number of their tokens, |y|, where lengths are not to count.
      rejected: The same of the other answers.
      beta: β.
      label_smoothing: ε, the share of preferences that are the wrong way round.

    Source: DPO (arXiv 2305.18290), eq. 7; with ε "A note on DPO with noisy preferences" (E.
    Mitchell, 2023), eq. 3; over |y| Tülu 3 (arXiv 2411.15124), section 5.
    """
    margin = beta * (chosen - rejected)
    right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


type _Sums = tuple[jax.Array, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_loss(
    z: float, hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> _Sums:
    """`head_loss` of a head's matrix [D, vocab]; only its first result has a gradient."""
    chunks = _Chunks(targets.shape, kernel.shape[1])

    def chunk(sums: _Sums, x: tuple[jax.Array, ...]) -> tuple[_Sums, None]:
        h, target, w = x
        added, _ = _chunk_loss(z, exact_logits(h, kernel), target, w)
        return (sums[0] + added[0], sums[1] + added[1]), None

    xs = (chunks.cut(hidden), chunks.cut(targets), chunks.cut(weights))
    return jax.lax.scan(chunk, _zeros(2), xs)[0]


def _weighted_loss_forward(
    z: float, hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[_Sums, Any]:
    chunks = _Chunks(targets.shape, kernel.shape[1])
    dtype = product_dtype(hidden, kernel)

    def chunk(
        carry: tuple[_Sums, jax.Array], x: tuple[jax.Array, ...]
    ) -> tuple[tuple[_Sums, jax.Array], jax.Array]:
        (loss, ce), d_kernel = carry
        h, target, w = x
        logits = exact_logits(h, kernel)
        added, lse = _chunk_loss(z, logits, target, w)
        chosen = jnp.arange(logits.shape[-1], dtype=target.dtype)[None, None] == target[..., None]
        d_lse = (1 + 2 * z * lse)[..., None] * jnp.exp(logits - lse[..., None])
        d_logits = w[..., None] * (d_lse - chosen.astype(jnp.float32))
        d_hidden = einsum32("rcv,dv->rcd", d_logits, kernel, dtype).astype(h.dtype)
        d_kernel += einsum32("rcd,rcv->dv", h, d_logits, dtype)
        return ((loss + added[0], ce + added[1]), d_kernel), d_hidden

    start = (_zeros(2), jnp.zeros(kernel.shape, jnp.float32))
    xs = (chunks.cut(hidden), chunks.cut(targets), chunks.cut(weights))
    (sums, d_kernel), d_hidden = jax.lax.scan(chunk, start, xs)
    # Empty arrays tell the backward the dtypes: those of tracers are no residuals.
    empty = jnp.zeros(0, kernel.dtype)
    return sums, (chunks.join(d_hidden), d_kernel, empty, targets, weights)


def _weighted_loss_backward(
    _: float, residuals: Any, cotangents: _Sums
) -> tuple[jax.Array, jax.Array, np.ndarray, jax.Array]:
    d_hidden, d_kernel, empty, targets, weights = residuals
    d_loss = cotangents[0]
    return (
        (d_hidden.astype(jnp.float32) * d_loss).astype(d_hidden.dtype),
        (d_kernel * d_loss).astype(empty.dtype),
        np.zeros(targets.shape, jax.dtypes.float0),
        jnp.zeros_like(weights),
    )


weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward)


def _zeros(count: int) -> Any:
    return (jnp.zeros((), jnp.float32),) * count


def _chunk_loss(
    z: float, logits: jax.Array, target: jax.Array, w: jax.Array
) -> tuple[_Sums, jax.Array]:
    """Weighted loss and cross-entropy of [R, C, vocab] logits, and each position's logsumexp."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    ce = lse - jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return (jnp.sum(w * (ce + z * lse * lse)), jnp.sum(w * ce)), lse


class _Chunks:
    """[B, T, *] positions as N chunks, to each of which every device adds of its own.

    On one device the positions follow each other; on a mesh rows stay on their devices, and each
    device of `context` gives a stretch of its own part of the row.
    """

    def __init__(self, shape: tuple[int, ...], vocab: int) -> None:
        batch, length = shape
        rows, self.stretches, size = _spread(batch, length, max(_POSITIONS, _LOGITS // vocab))
        self.shape, self.rows = (batch, length), rows
        self.length = batch * length // rows // self.stretches
        # As many chunks as needed, all of one length.
        self.size = -(-self.length // -(-self.length // size))
        self.many = self.length > self.size

    def cut(self, x: jax.Array) -> jax.Array:
        """[B, T, *] to chunks [N, R, stretches · size, *], padded with zeros."""
        rest = x.shape[2:]
        x = x.reshape(self.rows, self.stretches, self.length, *rest)
        pad = -self.length % self.size
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pad), *((0, 0) for _ in rest)))
        x = x.reshape(self.rows, self.stretches, -1, self.size, *rest)
        return jnp.moveaxis(x, 2, 0).reshape(-1, self.rows, self.stretches * self.size, *rest)

    def join(self, x: jax.Array) -> jax.Array:
        """The inverse of `cut`."""
        rest = x.shape[3:]
        x = x.reshape(-1, self.rows, self.stretches, self.size, *rest)
        x = jnp.moveaxis(x, 0, 2).reshape(self.rows, self.stretches, -1, *rest)
        return x[:, :, : self.length].reshape(*self.shape, *rest)


def _spread(batch: int, length: int, positions: int) -> tuple[int, int, int]:
    """How to lay out [batch, length] positions for chunks to which each device adds of its own:
    rows, stretches of a row, and positions of a stretch in a chunk.
    """
    mesh = active_mesh()
    if mesh is None:
        return 1, 1, positions
    context = mesh.shape["context"]
    devices = math.prod(mesh.shape[axis] for axis in DEFAULT_RULES.batch)
    size = max(positions // -(-batch // devices), 1)
    return batch, context if length % context == 0 else 1, size


def cross_entropy(
    logprobs: Float32[Array, "B T"], mask: Float32[Array, "B T"]
) -> Float32[Array, ""]:
    """Mean negative log-probability of the masked-in targets."""
    return -jnp.sum(logprobs * mask) / jnp.maximum(jnp.sum(mask), 1)
