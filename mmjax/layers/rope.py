"""Rotary position embedding on the leading part of each head."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32


def rope_angles(
    positions: Int32[Array, "B T"], rotary_dim: int, theta: float
) -> Float32[Array, "B T R"]:
    """Angles position · theta^(-2i / rotary_dim) [B, T, rotary_dim / 2] in float32."""
    # On the host, rounded as the released code does: a position of a million turns the last bits
    # of a device's own power function into a tenth of a radian.
    power = (theta ** (np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)
    return positions.astype(jnp.float32)[..., None] * (1 / power)[None, None]


def apply_rope(
    x: Float[Array, "B T H K"], angles: Float32[Array, "B T R"]
) -> Float[Array, "B T H K"]:
    """Turns the first 2R dimensions of each head, halves paired (NeoX), and passes the rest.

    Source: the released modeling_minimax_m1.py; MiniMax-01, section 2.3 (RoPE on half the head).
    """
    half = angles.shape[-1]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = (x[..., i * half : (i + 1) * half].astype(jnp.float32) for i in range(2))
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)
