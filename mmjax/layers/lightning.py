"""The lightning attention layer around the kernel: projections, decay rates, norm and gate."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas import dispatch, gated_lightning_step
from mmjax.cache import PagedCache
from mmjax.config import ModelConfig
from mmjax.layers import weights
from mmjax.layers.norm import rms_norm
from mmjax.parallel import sequence

# The released code leaves the inner norm at its class default, whatever rms_norm_eps says.
INNER_NORM_EPS = 1e-6


def decay_rates(num_heads: int, num_layers: int) -> np.ndarray:
    """Decay rate of each layer and head [L, H] float32; softmax layers are counted, unused.

    s = 2^(-8 h / H) · (1 - l / (L - 1) + 1e-5) with h = 1..H and l = 0..L-1; for H not a power
    of two, ALiBi's interpolation.

    Source: MiniMax-01, section 2.2.2, and `_build_slope_tensor` of the released code.
    """
    slopes = np.array(_alibi_slopes(num_heads), np.float32)
    layer = np.arange(num_layers, dtype=np.float64)
    factor = 1 - layer / max(num_layers - 1, 1) + 1e-5
    return slopes[None, :] * factor.astype(np.float32)[:, None]


def _alibi_slopes(heads: int) -> list[float]:
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return _alibi_slopes(below) + _alibi_slopes(2 * below)[0::2][: heads - below]


class LightningAttention(nnx.Module):
    """out_proj(sigmoid(gate(x)) · RMSNorm(lightning(silu(qkv(x))))).

    Source: MiniMax-01 (arXiv 2501.08313), section 2.2, and the released modeling_minimax_m1.py.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        d, h, k, dtype = cfg.hidden_size, cfg.num_heads, cfg.head_dim, cfg.param_dtype
        # Head-major: each head holds its q, k and v side by side, as the checkpoints do.
        self.qkv = weights.weight(
            rngs,
            (d, h, 3, k),
            ("d_model", "heads", None, None),
            dtype,
            fan_in=d,
            fan_out=3 * h * k,
        )
        self.gate = weights.weight(
            rngs, (d, h, k), ("d_model", "heads", None), dtype, fan_in=d, fan_out=h * k
        )
        self.norm = weights.ones((h, k), ("heads", None), dtype)
        self.out = weights.weight(
            rngs, (h, k, d), ("heads", None, "d_model"), dtype, fan_in=h * k, fan_out=d
        )
        self.shape = h, k
        # qkv and gate side by side [D, 4 H K], once they are fused.
        self.fused: nnx.Param[jax.Array] | None = nnx.data(None)

    def fuse_projections(self) -> None:
        """Keeps qkv and gate as one matrix from here on, to serve: one product reads both."""
        self.fused = weights.side_by_side(self.qkv, self.gate)
        del self.qkv, self.gate

    def __call__(
        self,
        x: Float[Array, "B T D"],
        decay: Float32[Array, " H"],
        *,
        segment_ids: Int32[Array, "B T"] | None,
        state: Float32[Array, "B H K V"] | None,
    ) -> tuple[Float[Array, "B T D"], Float32[Array, "B H K V"]]:
        """Attends causally within segments.

        Args:
          x: Layer input [B, T, D].
          decay: Rates of this layer [H].
          segment_ids: [B, T], 0 is padding; None where every token is real and of one document.
          state: State before the first token, None for zeros.

        Returns:
          Output [B, T, D] and the state after the last real token.
        """
        q, k, v, gate = self._project(x)
        out, state = sequence.lightning(q, k, v, decay, segment_ids=segment_ids, state=state)
        return self._output(x, out, gate), state

    def extend(
        self,
        x: Float[Array, "B T D"],
        decay: Float32[Array, " H"],
        segment_ids: Int32[Array, "B T"] | None,
        cache: PagedCache,
        layer: Int32[Array, ""],
    ) -> tuple[Float[Array, "B T D"], PagedCache]:
        """Attends on the rows' states in layer `layer` of the pool, and advances them there."""
        q, k, v, gate = self._project(x)
        out, state = sequence.lightning_on_pool(q, k, v, decay, segment_ids, cache, layer)
        return self._output(x, out, gate), cache._replace(state=state)

    def step(
        self,
        x: Float[Array, "Q D"],
        decay: Float32[Array, " H"],
        cache: PagedCache,
        layer: Int32[Array, ""],
    ) -> tuple[Float32[Array, "P Y D"], PagedCache]:
        """`extend` by one token of the cache's B rows on one device, with fused projections; the
        output in parts to sum. Rows of x past them are ignored.
        """
        assert self.fused is not None
        mixed, state = gated_lightning_step(
            weights.project(x, self.fused[...]),
            decay,
            self.norm[...].reshape(-1),
            cache.state,
            cache.slots,
            layer,
            eps=INNER_NORM_EPS,
            row_align=weights.ROW_ALIGN,
        )
        return weights.project_in_parts(mixed, self.out[...]), cache._replace(state=state)

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """q, k, v [B, T, H, K], and the gates where they come with them."""
        heads, dim = self.shape
        if self.fused is None:
            qkv, gate = weights.project(x, self.qkv[...]), None
        else:
            qkv, gate = jnp.split(weights.project(x, self.fused[...]), [3 * heads * dim], axis=2)
        qkv = jax.nn.silu(qkv).reshape(*x.shape[:2], heads, 3, dim)
        if x.shape[1] == 1 and dispatch.target().platform == "gpu":
            # One kernel lays them out one after another; a slice of each would be three.
            q, k, v = jax.lax.optimization_barrier(jnp.moveaxis(qkv, 3, 0))
            return q, k, v, gate
        # The transpose of a split is one concatenation, that of three slices is three paddings.
        q, k, v = (part[:, :, :, 0] for part in jax.lax.split(qkv, (1, 1, 1), axis=3))
        return q, k, v, gate

    def _output(self, x: jax.Array, out: jax.Array, gate: jax.Array | None) -> jax.Array:
        flat = out.reshape(*x.shape[:2], -1)
        normed = rms_norm(flat, self.norm[...].reshape(-1), INNER_NORM_EPS)
        gate = jax.nn.sigmoid(weights.project(x, self.gate[...]) if gate is None else gate)
        return weights.project(gate * normed, self.out[...])
