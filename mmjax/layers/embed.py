"""Token embedding and LM head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.numerics import einsum32
from mmjax.config import ModelConfig
from mmjax.layers import weights
from mmjax.sharding import constrain


class Embed(nnx.Module):
    """Token embedding [vocab, D]."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        shape = (cfg.vocab_size, cfg.hidden_size)
        axes = ("vocab", "d_model")
        self.embedding = weights.normal(rngs, shape, axes, cfg.param_dtype, cfg.initializer_range)
        self.dtype = cfg.dtype

    def __call__(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks tokens up, in the activations' dtype."""
        # Looked up in a table whose rows are whole. In rows spread like the batch, every device
        # would look up the whole batch.
        table = constrain(self.embedding[...], "vocab", None)
        return table[tokens].astype(self.dtype)


class Head(nnx.Module):
    """LM head, always as in float32: rounding here costs sampler and trainer their agreement.

    Source: MiniMax-M1 report, section 3.2, "fp32 LM head".
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        shape = (cfg.hidden_size, cfg.vocab_size)
        self.kernel = weights.weight(
            rngs, shape, ("d_model", "vocab"), cfg.param_dtype, fan_in=shape[0], fan_out=shape[1]
        )

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T vocab"]:
        """Logits [B, T, vocab] in float32."""
        return exact_logits(hidden, self.kernel[...])


@jax.custom_vjp
def exact_logits(
    hidden: Float[Array, "*N D"], kernel: Float[Array, "D vocab"]
) -> Float32[Array, "*N vocab"]:
    """hidden times kernel [D, vocab] as in float32.

    Products of bfloat16 numbers are exact in float32, in which they are summed: where both
    operands are bfloat16, tensor cores give what casting them to float32 would, many times faster.
    The gradients' products take their cotangent in the operands' dtype, as every other layer's do.
    """
    return einsum32("...d,dv->...v", hidden, kernel, product_dtype(hidden, kernel))


def _logits_forward(
    hidden: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return exact_logits(hidden, kernel), (hidden, kernel)


def _logits_backward(
    residuals: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    hidden, kernel = residuals
    dtype = product_dtype(hidden, kernel)
    d_hidden = einsum32("...v,dv->...d", d_out, kernel, dtype)
    rows = "abc"[: hidden.ndim - 1]
    d_kernel = einsum32(f"{rows}d,{rows}v->dv", hidden, d_out, dtype)
    return d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype)


exact_logits.defvjp(_logits_forward, _logits_backward)


def product_dtype(hidden: jax.Array, kernel: jax.Array) -> jnp.dtype:
    """In which the head's operands are multiplied: bfloat16 if both are, else float32."""
    both = hidden.dtype == kernel.dtype == jnp.bfloat16
    return jnp.dtype(jnp.bfloat16 if both else jnp.float32)


def tied_logits(
    hidden: Float[Array, "B T D"], embedding: Float[Array, "vocab D"]
) -> Float32[Array, "B T vocab"]:
    """Logits by the embedding itself, in float32."""
    return exact_logits(hidden, embedding.T)
