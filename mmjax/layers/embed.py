"""Token embedding and LM head."""

from __future__ import annotations

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
    """LM head, always in float32: rounding here costs sampler and trainer their agreement.

    Source: MiniMax-M1 report, section 3.2, "fp32 LM head".
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        shape = (cfg.hidden_size, cfg.vocab_size)
        self.kernel = weights.weight(
            rngs, shape, ("d_model", "vocab"), cfg.param_dtype, fan_in=shape[0], fan_out=shape[1]
        )

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T vocab"]:
        """Logits [B, T, vocab] in float32."""
        return einsum32("btd,dv->btv", hidden, self.kernel[...], jnp.dtype("float32"))


def tied_logits(
    hidden: Float[Array, "B T D"], embedding: Float[Array, "vocab D"]
) -> Float32[Array, "B T vocab"]:
    """Logits by the embedding itself, in float32."""
    return einsum32("btd,vd->btv", hidden, embedding, jnp.dtype("float32"))
