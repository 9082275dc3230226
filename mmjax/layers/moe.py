"""Mixture of experts: float32 router, dropless top-k, optional shared expert."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32

from kernels_pallas import grouped_matmul
from kernels_pallas.grouped_matmul.chunked import block_layout
from kernels_pallas.numerics import einsum32
from mmjax.config import ModelConfig
from mmjax.layers import weights

# Rows that share one expert's matrix in the grouped product, at least and at most.
MIN_BLOCK, MAX_BLOCK = 64, 512
# Tokens that visit the experts together on a CPU: their rows stay in its caches.
CPU_TOKENS = 2048


class RouterStats(NamedTuple):
    """What one layer's router did with its real tokens, and its logits.

    tokens_per_expert [E]: token-slots routed to each expert; probability_sum [E]: of the softmax
    over all experts; entropy_sum []: of that softmax, in nats; logits [B, T, E].
    """

    tokens_per_expert: jax.Array
    probability_sum: jax.Array
    entropy_sum: jax.Array
    logits: jax.Array


class MoE(nnx.Module):
    """Σ_k p_k · w2_e(silu(w1_e x) · w3_e x) over the top-k experts, p renormalised to sum 1.

    Source: MiniMax-01 (arXiv 2501.08313), section 2.1, eq. 1; released modeling_minimax_m1.py.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        d, f, e, dtype = cfg.hidden_size, cfg.intermediate_size, cfg.num_experts, cfg.param_dtype
        into, back = ("experts", "d_model", "ffn"), ("experts", "ffn", "d_model")
        self.router = weights.weight(
            rngs, (d, e), ("d_model", None), "float32", fan_in=d, fan_out=e
        )
        self.w1 = weights.weight(rngs, (e, d, f), into, dtype, fan_in=d, fan_out=f)
        self.w3 = weights.weight(rngs, (e, d, f), into, dtype, fan_in=d, fan_out=f)
        self.w2 = weights.weight(rngs, (e, f, d), back, dtype, fan_in=f, fan_out=d)
        self.top_k = cfg.num_experts_per_token
        self.shared = SharedExpert(cfg, rngs) if cfg.shared_intermediate_size else None

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Routes every token; statistics count the real ones.

        Args:
          x: Layer input [B, T, D].
          real: Which tokens are no padding; None for all.
        """
        batch, length, width = x.shape
        tokens = x.reshape(-1, width)
        logits = einsum32("nd,de->ne", tokens, self.router[...], jnp.dtype("float32"))
        probability = jax.nn.softmax(logits, axis=-1)
        top, expert = jax.lax.top_k(probability, self.top_k)
        share = (top / top.sum(-1, keepdims=True)).astype(x.dtype)
        out = self._in_cache(tokens, share, expert.astype(jnp.int32)).reshape(x.shape)
        if self.shared is not None:
            out = self.shared(x, out)
        mask = jnp.ones(tokens.shape[0], bool) if real is None else real.reshape(-1)
        stats = _router_stats(logits, probability, expert, mask)
        return out, stats._replace(logits=logits.reshape(batch, length, -1))

    def _in_cache(self, tokens: jax.Array, share: jax.Array, expert: jax.Array) -> jax.Array:
        """`_experts`, on CPUs over runs of tokens short enough for what they need to be cached."""
        count = tokens.shape[0]
        if jax.default_backend() != "cpu" or count < 2 * CPU_TOKENS:
            return self._experts(tokens, share, expert)
        whole = count // CPU_TOKENS * CPU_TOKENS
        runs = (x[:whole].reshape(-1, CPU_TOKENS, x.shape[1]) for x in (tokens, share, expert))
        out = jax.lax.map(lambda run: self._experts(*run), tuple(runs)).reshape(whole, -1)
        if whole == count:
            return out
        rest = self._experts(tokens[whole:], share[whole:], expert[whole:])
        return jnp.concatenate([out, rest])

    def _experts(self, tokens: jax.Array, share: jax.Array, expert: jax.Array) -> jax.Array:
        """Applies the chosen experts. tokens [N, D], share and expert [N, k]."""
        count, experts = tokens.shape[0], self.w1.shape[0]
        block = _block_size(count * self.top_k // experts)
        blocks = -(-count * self.top_k // block) + experts
        if count * experts <= blocks * block:
            return self._every_expert(tokens, share, expert)
        rows = _sort_by_expert(expert, experts, blocks, block)
        sorted_tokens = _take_rows(tokens, rows)
        product = partial(grouped_matmul, group_sizes=rows.group_sizes, row_align=block)
        dtype = tokens.dtype
        hidden = jax.nn.silu(product(sorted_tokens, self.w1[...].astype(dtype)))
        hidden *= product(sorted_tokens, self.w3[...].astype(dtype))
        out = _return_rows(product(hidden, self.w2[...].astype(dtype)), rows)  # [N, k, D]
        shared_out = out.astype(jnp.float32) * share.astype(jnp.float32)[:, :, None]
        return shared_out.sum(1).astype(dtype)

    def _every_expert(self, tokens: jax.Array, share: jax.Array, expert: jax.Array) -> jax.Array:
        """All experts on all tokens: no sorting, and each matrix is read where it lies."""
        chosen = jax.nn.one_hot(expert, self.w1.shape[0], dtype=share.dtype)  # [N, k, E]
        weight = (share[:, :, None] * chosen).sum(1)  # [N, E]
        dtype = tokens.dtype

        def up(kernel: jax.Array) -> jax.Array:
            return einsum32("nd,edf->enf", tokens, kernel, dtype).astype(dtype)

        hidden = jax.nn.silu(up(self.w1[...])) * up(self.w3[...])
        out = einsum32("enf,efd->end", hidden, self.w2[...], dtype)
        return jnp.sum(out * weight.T.astype(jnp.float32)[:, :, None], axis=0).astype(dtype)


class SharedExpert(nnx.Module):
    """moe · (1 - c) + shared · c, with c = squash(x · coefficient) in float32.

    No released model has one. As in the original code its width is `intermediate_size`, and the
    "softmax" mode is a softmax over a single logit: c = 1.

    Source: released modeling_minimax_m1.py; vLLM's minimax_text_01.py for the softmax mode.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        d, f, dtype = cfg.hidden_size, cfg.intermediate_size, cfg.param_dtype
        into = ("d_model", "ffn")
        self.gate = weights.weight(rngs, (d, f), into, dtype, fan_in=d, fan_out=f)
        self.up = weights.weight(rngs, (d, f), into, dtype, fan_in=d, fan_out=f)
        self.down = weights.weight(rngs, (f, d), ("ffn", "d_model"), dtype, fan_in=f, fan_out=d)
        self.coefficient = weights.weight(
            rngs, (d, 1), ("d_model", None), "float32", fan_in=d, fan_out=1
        )
        self.mode = cfg.shared_expert_mode

    def __call__(
        self, x: Float[Array, "B T D"], routed: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Mixes the shared expert of x into the routed experts' output."""
        hidden = jax.nn.silu(weights.project(x, self.gate[...]))
        hidden *= weights.project(x, self.up[...])
        shared = weights.project(hidden, self.down[...])
        logit = einsum32("btd,dc->btc", x, self.coefficient[...], jnp.dtype("float32"))
        squash = jax.nn.sigmoid if self.mode == "sigmoid" else jax.nn.softmax
        c = squash(logit).astype(x.dtype)
        return routed * (1 - c) + shared * c


def load_balancing_loss(
    tokens_per_expert: Float32[Array, "L E"],
    probability_sum: Float32[Array, "L E"],
    tokens: Float32[Array, ""],
) -> Float32[Array, ""]:
    """E · Σ_e f_e m_e over the tokens of all layers together.

    f_e is the share of tokens that visit expert e (summing to k), m_e its mean probability.

    Args:
      tokens_per_expert: Token-slots routed [L, E].
      probability_sum: Sum of the router's softmax [L, E].
      tokens: Number of real tokens, one layer's count.

    Source: `load_balancing_loss_func` of the released code. The paper (MiniMax-01, section 2.1)
    divides by E where the code multiplies; the released coefficient 0.001 belongs to the code.
    """
    layers, experts = tokens_per_expert.shape
    total = jnp.maximum(tokens * layers, 1)
    fraction = tokens_per_expert.sum(0) / total
    mean_probability = probability_sum.sum(0) / total
    return experts * jnp.sum(fraction * mean_probability)


def _router_stats(
    logits: jax.Array, probability: jax.Array, expert: jax.Array, real: jax.Array
) -> RouterStats:
    mask = real.astype(jnp.float32)[:, None]
    visits = jax.nn.one_hot(expert, logits.shape[-1], dtype=jnp.float32).sum(1)  # [N, E]
    entropy = -jnp.sum(probability * jax.nn.log_softmax(logits, axis=-1), axis=-1)
    return RouterStats(
        tokens_per_expert=jax.lax.stop_gradient((visits * mask).sum(0)),
        probability_sum=(probability * mask).sum(0),
        entropy_sum=jax.lax.stop_gradient((entropy * mask[:, 0]).sum()),
        logits=logits,
    )


def _block_size(rows_per_expert: int) -> int:
    """A power of two, at most a quarter of an average expert's rows, within bounds."""
    wanted = 1 << max(rows_per_expert // 4, 1).bit_length() - 1
    return min(max(wanted, MIN_BLOCK), MAX_BLOCK)


class _Rows(NamedTuple):
    """Token-slots sorted by expert in whole blocks of rows.

    group_sizes [E] rows of each expert, rounded up; source [R]: the token-slot n·k + j in each
    row, N·k where none; slot [N, k]: the row of each token-slot.
    """

    group_sizes: jax.Array
    source: jax.Array
    slot: jax.Array


def _sort_by_expert(expert: jax.Array, experts: int, blocks: int, block: int) -> _Rows:
    flat = expert.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes = jnp.bincount(flat, length=experts).astype(jnp.int32)
    _, sorted_row = block_layout(sizes, blocks, block)
    sorted_row = sorted_row.reshape(-1)
    source = jnp.where(sorted_row < 0, flat.size, order[jnp.maximum(sorted_row, 0)])
    slot = jnp.zeros(flat.size, jnp.int32)
    row = jnp.arange(source.size, dtype=jnp.int32)
    slot = slot.at[source].set(row, mode="drop", unique_indices=True).reshape(expert.shape)
    rounded = (sizes + block - 1) // block * block
    return _Rows(rounded, source, slot)


# The two moves below are gathers in both directions, because a permutation knows its inverse;
# XLA's transpose of a gather is a scatter-add, serial on CPUs and atomic on GPUs.
@jax.custom_vjp
def _take_rows(tokens: jax.Array, rows: _Rows) -> jax.Array:
    """Tokens [N, D] to rows [R, D]; rows without a token are zero."""
    top_k = rows.slot.shape[1]
    return tokens.at[rows.source // top_k].get(mode="fill", fill_value=0)


def _take_rows_forward(tokens: jax.Array, rows: _Rows) -> tuple[jax.Array, _Rows]:
    return _take_rows(tokens, rows), rows


def _take_rows_backward(rows: _Rows, d_rows: jax.Array) -> tuple[jax.Array, None]:
    return d_rows[rows.slot].sum(1), None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def _return_rows(x: jax.Array, rows: _Rows) -> jax.Array:
    """Rows [R, D] back to token-slots [N, k, D]."""
    return x[rows.slot]


def _return_rows_forward(x: jax.Array, rows: _Rows) -> tuple[jax.Array, _Rows]:
    return _return_rows(x, rows), rows


def _return_rows_backward(rows: _Rows, d_slots: jax.Array) -> tuple[jax.Array, None]:
    flat = d_slots.reshape(-1, d_slots.shape[-1])
    return flat.at[rows.source].get(mode="fill", fill_value=0), None


_return_rows.defvjp(_return_rows_forward, _return_rows_backward)
