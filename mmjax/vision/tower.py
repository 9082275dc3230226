"""The vision tower, the projector, and the features that stand for image tokens."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.numerics import einsum32
from mmjax.layers import weights
from mmjax.vision.config import VisionConfig


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) · scale + bias, with float32 statistics."""

    def __init__(self, size: int, eps: float, dtype: str) -> None:
        self.scale = weights.ones((size,), (None,), dtype)
        self.bias = _zeros((size,), dtype)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B W"]) -> Float[Array, "*B W"]:
        """Norms the last axis."""
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32, axis=-1, keepdims=True)
        centred = x32 - mean
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        normed = (centred * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return _plus(normed * _row(self.scale[...], x), self.bias[...])


class Linear(nnx.Module):
    """x W + b; the weight's leading dimensions are those of the input."""

    def __init__(
        self, rngs: nnx.Rngs, inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: str
    ) -> None:
        self.kernel = _xavier(rngs, inputs, outputs, dtype)
        self.bias = _zeros(outputs, dtype)

    def __call__(self, x: Float[Array, "*B W"]) -> Float[Array, "*B F"]:
        """Of the last axis, the output's dimensions in one."""
        return _plus(weights.project(x, self.kernel[...]), self.bias[...].reshape(-1))


class TowerLayer(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), all tokens of a tile seeing each other."""

    def __init__(self, cfg: VisionConfig, dtype: str, rngs: nnx.Rngs) -> None:
        width, heads = (cfg.hidden_size,), (cfg.num_heads, cfg.hidden_size // cfg.num_heads)
        self.norm1 = LayerNorm(*width, cfg.norm_eps, dtype)
        self.norm2 = LayerNorm(*width, cfg.norm_eps, dtype)
        self.q = Linear(rngs, width, heads, dtype)
        self.k = Linear(rngs, width, heads, dtype)
        self.v = Linear(rngs, width, heads, dtype)
        self.out = Linear(rngs, heads, width, dtype)
        self.fc1 = Linear(rngs, width, (cfg.intermediate_size,), dtype)
        self.fc2 = Linear(rngs, (cfg.intermediate_size,), width, dtype)
        self.heads = heads

    def __call__(self, x: Float[Array, "N S W"]) -> Float[Array, "N S W"]:
        """One layer."""
        x = x + self._attention(self.norm1(x))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))

    def _attention(self, x: jax.Array) -> jax.Array:
        q, k, v = (part(x).reshape(*x.shape[:2], *self.heads) for part in (self.q, self.k, self.v))
        scores = einsum32("nqhk,nshk->nhqs", q, k, x.dtype) * self.heads[1] ** -0.5
        shares = jax.nn.softmax(scores, axis=-1)
        mixed = einsum32("nhqs,nshk->nqhk", shares.astype(x.dtype), v, x.dtype)
        return self.out(mixed.astype(x.dtype).reshape(x.shape))


class Vision(nnx.Module):
    """CLIP's ViT without its last norm, and a two-layer projector into the decoder's width.

    Args:
      cfg: Of the tower.
      width: D, the decoder's.
      dtype: Of the activations.
      param_dtype: Of the parameters.
      rngs: Source of the initial parameters.

    Source: MiniMax-01 (arXiv 2501.08313), section 3; transformers' `CLIPVisionModel`.
    """

    def __init__(
        self, cfg: VisionConfig, width: int, dtype: str, param_dtype: str, rngs: nnx.Rngs
    ) -> None:
        size, patch = cfg.hidden_size, (cfg.patch_size, cfg.patch_size, 3)
        self.class_embedding = weights.normal(rngs, (size,), (None,), param_dtype, 0.02)
        self.patch = _xavier(rngs, patch, (size,), param_dtype)
        shape = (1 + cfg.patches, size)
        self.position = weights.normal(rngs, shape, (None, None), param_dtype, 0.02)
        self.pre_norm = LayerNorm(size, cfg.norm_eps, param_dtype)
        self.layers = _layers(cfg, param_dtype, rngs)
        self.linear_1 = Linear(rngs, (size,), (width,), param_dtype)
        self.linear_2 = Linear(rngs, (width,), (width,), param_dtype)
        # As long as a token's embedding.
        self.newline = weights.normal(rngs, (width,), (None,), param_dtype, 0.02)
        self.dtype, self.width = dtype, width

    def features(self, tiles: Float[Array, "*B N S S 3"]) -> Float[Array, "*B R D"]:
        """What image tokens are made of: row 0 is the newline, then the patches, tile by tile.

        Args:
          tiles: Normalised, see `mmjax.vision.tiles.pixel_values`; of one row, or of a batch.

        Returns:
          [..., 1 + N · patches, D] in the activations' dtype.
        """
        rows, shape = tiles.shape[:-4], tiles.shape[-3:]
        hidden = self.hidden(tiles.reshape(-1, *shape))[:, 1:]
        projected = self.linear_2(jax.nn.gelu(self.linear_1(hidden), approximate=False))
        projected = projected.reshape(*rows, -1, projected.shape[-1])
        newline = jnp.broadcast_to(self.newline[...].astype(self.dtype), (*rows, 1, self.width))
        return jnp.concatenate([newline, projected], axis=-2)

    def hidden(self, tiles: Float[Array, "N S S 3"]) -> Float[Array, "N P W"]:
        """The tower's last layer, the class token first."""
        count, side = tiles.shape[:2]
        patch = self.patch.shape[0]
        cut = tiles.astype(self.dtype).reshape(count, side // patch, patch, side // patch, patch, 3)
        cut = cut.swapaxes(2, 3).reshape(count, -1, patch * patch * 3)
        x = weights.project(cut, self.patch[...])
        first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (count, 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1)
        x = self.pre_norm(x + self.position[...].astype(x.dtype)[None])

        def layer(x: jax.Array, parameters: TowerLayer) -> tuple[jax.Array, None]:
            return parameters(x), None

        return jax.lax.scan(jax.checkpoint(layer), x, self.layers)[0]


def _layers(cfg: VisionConfig, dtype: str, rngs: nnx.Rngs) -> TowerLayer:
    """The tower's layers, stacked."""

    @nnx.split_rngs(splits=cfg.num_layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(each: nnx.Rngs) -> TowerLayer:
        return TowerLayer(cfg, dtype, each)

    return make(rngs)


def _xavier(
    rngs: nnx.Rngs, inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: str
) -> nnx.Param[jax.Array]:
    fan_in, fan_out = math.prod(inputs), math.prod(outputs)
    axes = (None,) * (len(inputs) + len(outputs))
    return weights.weight(rngs, (*inputs, *outputs), axes, dtype, fan_in=fan_in, fan_out=fan_out)


def _zeros(shape: tuple[int, ...], dtype: str) -> nnx.Param[jax.Array]:
    return nnx.Param(jnp.zeros(shape, dtype), axes=(None,) * len(shape))


def _row(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector as the last axis of x, in its dtype."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


def _plus(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + _row(bias, x)
