"""The surface of lightning attention: checks, dispatch, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas import dispatch, tuning
from kernels_pallas.dispatch import Candidate
from kernels_pallas.lightning_attention import (
    mosaic_gpu,
    mosaic_tpu,
    step_mosaic_gpu,
)
from kernels_pallas.lightning_attention.chunked import lightning_attention_chunked
from kernels_pallas.lightning_attention.reference import lightning_attention_reference
from kernels_pallas.lightning_attention.step import (
    gated_step_through,
    lightning_attention_step_xla,
)
from kernels_pallas.lightning_attention.step_mosaic_tpu import lightning_attention_step_mosaic_tpu

type _Attend = Callable[..., tuple[jax.Array, jax.Array]]
type _Shaped = jax.Array | jax.ShapeDtypeStruct


def lightning_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    decay: Float32[Array, " H"],
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    initial_state: Float32[Array, "B H K V"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float32[Array, "B H K V"]]:
    """Causal linear attention with a constant decay for each head.

        S_t = exp(-s) S_{t-1} + k_t v_tᵀ,    o_t = q_t S_t

    with no 1/sqrt(K) and no normaliser. Differentiable in q, k, v and initial_state, the
    returned state included. Any T >= 1.

    Args:
      q: Queries [B, T, H, K].
      k: Keys [B, T, H, K].
      v: Values [B, T, H, V].
      decay: s [H] float32, the decay rate of each head per token, s >= 0.
      segment_ids: [B, T] int32. 0 is padding, which neither reads, writes nor decays the
        state; a change of id from one real token to the next restarts the state at zero.
      initial_state: [B, H, K, V] float32, belongs to the row's first segment.
      implementation: None for the best one on the arrays' platform, or "reference" | "chunked" |
        "mosaic_tpu" | "mosaic_gpu".

    Returns:
      out [B, T, H, V] in v.dtype, and the state [B, H, K, V] float32 after the last real token
      of each row.

    Raises:
      kernels_pallas.dispatch.UnavailableError: the named implementation cannot run.
      ValueError: shapes that do not fit together.

    Source: MiniMax-01 (arXiv 2501.08313), section 2.2, lightning attention.
    """
    _check_shapes(q, k, v, decay, segment_ids, initial_state)
    if initial_state is None:
        batch, _, heads, key_dim = q.shape
        initial_state = jnp.zeros((batch, heads, key_dim, v.shape[-1]), jnp.float32)
    target = dispatch.target(q, k, v)

    def on_gpu(*args: Any) -> tuple[jax.Array, jax.Array]:
        blocks = tuned_blocks(q, v, target) or mosaic_gpu.default_blocks(q, v, target.cores)
        return mosaic_gpu.lightning_attention_mosaic_gpu(*args, blocks)

    candidates: dict[str, Candidate[_Attend]] = {
        "mosaic_tpu": Candidate(
            mosaic_tpu.lightning_attention_mosaic_tpu,
            target.why_not_tpu() or mosaic_tpu.why_not(q, v),
        ),
        "mosaic_gpu": Candidate(
            on_gpu,
            target.why_not_hopper() or mosaic_gpu.why_not(q, v),
        ),
        "chunked": Candidate(lightning_attention_chunked),
        "reference": Candidate(lightning_attention_reference),
    }
    run = dispatch.resolve("lightning_attention", implementation, candidates)
    return run(q, k, v, decay, segment_ids, initial_state)


def shape_key(q: _Shaped, v: _Shaped) -> str:
    """The name of this shape in the files of tuned block sizes."""
    batch, length, heads, key_dim = q.shape
    return tuning.shape_key(
        B=batch, T=length, H=heads, K=key_dim, V=v.shape[-1], dtype=str(v.dtype)
    )


def tuned_blocks(q: jax.Array, v: jax.Array, target: dispatch.Target) -> mosaic_gpu.Blocks | None:
    """Block sizes that were tuned for this shape on this GPU."""
    fields = tuning.tuned(target.kind, "lightning_attention", "mosaic_gpu", shape_key(q, v))
    return None if fields is None else mosaic_gpu.Blocks(**fields)


def lightning_attention_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    decay: Float32[Array, " H"],
    state: Float32[Array, "N H K V"],
    *,
    slots: Int32[Array, " B"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B H V"], Float32[Array, "N H K V"]]:
    """One token of `lightning_attention`, for decoding.

    Donate the state (`jax.jit(..., donate_argnames=...)`, or carry it through a loop) and the
    kernels update it in place.

    Args:
      q: Queries [B, H, K].
      k: Keys [B, H, K].
      v: Values [B, H, V].
      decay: s [H] float32.
      state: [N, H, K, V] float32, the states before this token.
      slots: [B] int32, which state each row advances, no two rows the same one; negative for an
        idle row, whose output is zero and which touches no state. None: row b has state b, N = B.
      implementation: None for the best one on the arrays' platform, or "chunked" (plain XLA) |
        "mosaic_tpu" | "mosaic_gpu".

    Returns:
      out [B, H, V] in v.dtype, and the states after this token.

    Raises:
      kernels_pallas.dispatch.UnavailableError: the named implementation cannot run.
      ValueError: shapes that do not fit together.

    Source: MiniMax-01 (arXiv 2501.08313), section 2.2.
    """
    rows, heads, key_dim = q.shape
    pool = state.shape[0] if slots is not None else rows
    _check(
        q.shape,
        k=(k, q.shape),
        v=(v, (rows, heads, v.shape[-1])),
        decay=(decay, (heads,)),
        state=(state, (pool, heads, key_dim, v.shape[-1])),
        slots=(slots, (rows,)),
    )
    target = dispatch.target(q, k, v, state)
    candidates: dict[str, Candidate[_Attend]] = {
        "mosaic_tpu": Candidate(lightning_attention_step_mosaic_tpu, target.why_not_tpu()),
        "mosaic_gpu": Candidate(
            step_mosaic_gpu.lightning_attention_step_mosaic_gpu,
            target.why_not_hopper() or step_mosaic_gpu.why_not(key_dim, v.shape[-1]),
        ),
        "chunked": Candidate(lightning_attention_step_xla),
    }
    run = dispatch.resolve("lightning_attention_step", implementation, candidates)
    if slots is None and run is not lightning_attention_step_xla:
        slots = jnp.arange(rows, dtype=jnp.int32)  # The kernels take a table in any case.
    return run(q, k, v, decay, state, slots)


def gated_lightning_step(
    projected: Float[Array, "Q P"],
    decay: Float32[Array, " H"],
    scale: Float[Array, " HK"],
    state: Float32[Array, "M N H K K"],
    slots: Int32[Array, " B"],
    layer: Int32[Array, ""],
    *,
    eps: float,
    row_align: int = 1,
    implementation: str | None = None,
) -> tuple[Float[Array, "R HK"], Float32[Array, "M N H K K"]]:
    """What a lightning layer does with one token between its two projections.

    sigmoid(gate) · RMSNorm(`lightning_attention_step`(silu(q), silu(k), silu(v))), without a
    gradient. Donate the state, and the kernels update it in place.

    Args:
      projected: [Q, 4 H K]: q, k and v of each head side by side, head after head, then the
        gates; rows past the first B are not read.
      decay: s [H] float32.
      scale: Of the norm, over all heads together [H K].
      state: [M, N, H, K, K] float32, the states of all layers before this token.
      slots: [B] int32, which state of the layer each row advances, no two rows the same one;
        negative for an idle row, whose output is zero and which touches no state.
      layer: [] int32, which of the M layers.
      eps: Of the norm.
      row_align: Rows of zeros fill the result up to a multiple of so many.
      implementation: As for `lightning_attention_step`.

    Returns:
      [R, H K] in projected.dtype, and the states after this token.

    Raises:
      kernels_pallas.dispatch.UnavailableError: the named implementation cannot run.
      ValueError: shapes that do not fit together.

    Source: MiniMax-01 (arXiv 2501.08313), section 2.2, and the released modeling_minimax_m1.py.
    """
    heads, key_dim, value_dim = state.shape[2:]
    _check(
        projected.shape,
        projected=(projected, (projected.shape[0], 4 * heads * key_dim)),
        decay=(decay, (heads,)),
        scale=(scale, (heads * key_dim,)),
        state=(state, (*state.shape[:3], key_dim, key_dim)),
    )
    target = dispatch.target(projected, state)
    candidates: dict[str, Candidate[_Attend]] = {
        "mosaic_tpu": Candidate(
            gated_step_through(lightning_attention_step_mosaic_tpu), target.why_not_tpu()
        ),
        "mosaic_gpu": Candidate(
            step_mosaic_gpu.gated_lightning_step_mosaic_gpu,
            target.why_not_hopper() or step_mosaic_gpu.why_not(key_dim, value_dim),
        ),
        "chunked": Candidate(gated_step_through(lightning_attention_step_xla)),
    }
    run = dispatch.resolve("gated_lightning_step", implementation, candidates)
    return run(projected, decay, scale, state, slots, layer, eps=eps, row_align=row_align)


def _check_shapes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    decay: jax.Array,
    segment_ids: jax.Array | None,
    initial_state: jax.Array | None,
) -> None:
    batch, length, heads, key_dim = q.shape
    if length < 1:
        raise ValueError("lightning_attention needs at least one token; got T = 0")
    _check(
        q.shape,
        k=(k, q.shape),
        v=(v, (batch, length, heads, v.shape[-1])),
        decay=(decay, (heads,)),
        segment_ids=(segment_ids, (batch, length)),
        initial_state=(initial_state, (batch, heads, key_dim, v.shape[-1])),
    )


def _check(queries: tuple[int, ...], **expected: tuple[jax.Array | None, tuple[int, ...]]) -> None:
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"lightning_attention: {name} has shape {array.shape}, expected {shape} "
                f"for q of shape {queries}"
            )
