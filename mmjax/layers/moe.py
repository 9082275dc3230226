"""Mixture of experts: float32 router, dropless top-k or a capacity, optional shared expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32

from kernels_pallas import add_norm_route, dispatch
from kernels_pallas.grouped_matmul import LISTED_ALIGN, LISTED_ROWS
from kernels_pallas.numerics import einsum32
from kernels_pallas.row_norm import Routed, why_not_fused
from mmjax.config import ModelConfig
from mmjax.layers import weights
from mmjax.layers.experts import Weights, apply_experts
from mmjax.layers.int8 import Int8Matrices, to_int8
from mmjax.layers.norm import RMSNorm
from mmjax.layers.router import RouterStats, expert_capacity, route, statistics
from mmjax.parallel.experts import FSDP_AXES, apply_sharded_experts
from mmjax.sharding import active_mesh

# Tokens that visit the experts together on a CPU: their rows stay in its caches.
CPU_TOKENS = 2048


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
        self.capacity_factor = cfg.expert_capacity_factor
        self.shared = SharedExpert(cfg, rngs) if cfg.shared_intermediate_size else None
        # Of the experts' columns, once they are int8.
        self.scales: nnx.Dict[nnx.Param[jax.Array]] | None = nnx.data(None)

    def round_experts(self) -> None:
        """Keeps the experts' matrices as int8 from here on, to serve: they have no gradient."""
        scales = {}
        for name in Weights._fields:
            param: nnx.Param[jax.Array] = getattr(self, name)
            experts, _, columns = param.get_metadata("axes")
            rounded = to_int8(param[...])
            setattr(self, name, param.replace(rounded.values))
            scales[name] = nnx.Param(rounded.scale, axes=(experts, None, columns))
        self.scales = nnx.Dict(scales)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        real: Bool[Array, "B T"] | None,
        *,
        training: bool = False,
        skip: bool = False,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Routes every token; statistics count the real ones.

        On the mesh of `jax.set_mesh` tokens travel to their experts, see `mmjax.parallel.experts`.

        Args:
          x: Layer input [B, T, D].
          real: Which tokens are no padding; None for all.
          training: Experts take no more than their capacity, if the config gives them one; what is
            dropped adds nothing, and padding visits none. On a mesh, the experts' matrices are
            taken to be spread as for training.
          skip: Padding visits no expert, so that idle rows of a decode step read no weights; on
            one device only.
        """
        real = jnp.ones(x.shape[:2], bool) if real is None else real
        capacity = 0
        if training and self.capacity_factor:
            experts = self.w1.shape[0]
            capacity = expert_capacity(self.capacity_factor, real.size, self.top_k, experts)
        if active_mesh() is None:
            out, stats = self._on_one_device(x, real, capacity, skip)
        else:
            kernels, router = self._kernels(), self.router[...]
            out, stats = apply_sharded_experts(
                x,
                real,
                router,
                kernels,
                top_k=self.top_k,
                capacity=capacity,
                spread=FSDP_AXES if training else (),
            )
            out = out.astype(x.dtype)
        if self.shared is not None:
            out = self.shared(x, out)
        return out, stats

    def why_not_routed_with_norm(self, x: Float[Array, "B 1 D"]) -> str | None:
        """Why no kernel routes a decode step's rows together with their norm; None where one does.

        On one device only.
        """
        return why_not_fused(x[:, 0], self.router[...])

    def add_norm_route(
        self,
        x: Float[Array, "X D"],
        out: Float32[Array, "P Y D"],
        norm: RMSNorm,
        scales: tuple[float, float],
        real: Bool[Array, "B 1"],
    ) -> Routed:
        """Where the rows norm(α x + β Σ_p out_p) of a decode step go, idle ones to no expert.

        Of x and out the first B rows count.
        """
        return add_norm_route(
            x,
            out,
            norm.scale[...],
            self.router[...],
            real[:, 0],
            scales=scales,
            eps=norm.eps,
            top_k=self.top_k,
            row_align=LISTED_ALIGN if real.size <= LISTED_ROWS else 1,
        )

    def visit(
        self, routed: Routed, real: Bool[Array, "B 1"]
    ) -> tuple[Float[Array, "B 1 D"], RouterStats]:
        """`__call__` on the normed rows of a decode step that are already routed."""
        rows = routed.total.shape[0]
        out = apply_experts(routed.normed, routed.share, routed.expert, self._kernels())[:, None]
        if self.shared is not None:
            out = self.shared(routed.normed[:rows, None], out)
        stats = statistics(routed.logits, jax.nn.softmax(routed.logits), routed.expert, real[:, 0])
        return out, stats._replace(logits=routed.logits[:, None])

    def _kernels(self) -> Weights:
        matrices = [getattr(self, name)[...] for name in Weights._fields]
        if self.scales is None:
            return Weights(*matrices)
        scales = [self.scales[name][...] for name in Weights._fields]
        return Weights(*map(Int8Matrices, matrices, scales))

    def _on_one_device(
        self, x: jax.Array, real: jax.Array, capacity: int, skip: bool
    ) -> tuple[jax.Array, RouterStats]:
        routing, stats = route(x, real, self.router[...], self.top_k, capacity)
        if skip:
            expert = jnp.where(real.reshape(-1, 1), routing.expert, self.w1.shape[0])
            routing = routing._replace(expert=expert)
        tokens = x.reshape(-1, x.shape[-1])
        return self._in_cache(tokens, routing.share, routing.expert).reshape(x.shape), stats

    def _in_cache(self, tokens: jax.Array, share: jax.Array, expert: jax.Array) -> jax.Array:
        """`apply_experts`, on CPUs over runs of tokens short enough for caches to hold them."""
        kernels, count = self._kernels(), tokens.shape[0]
        if dispatch.target(tokens).platform != "cpu" or count < 2 * CPU_TOKENS:
            return apply_experts(tokens, share, expert, kernels)
        whole = count // CPU_TOKENS * CPU_TOKENS
        runs = (x[:whole].reshape(-1, CPU_TOKENS, x.shape[1]) for x in (tokens, share, expert))
        out = jax.lax.map(lambda run: apply_experts(run[0], run[1], run[2], kernels), tuple(runs))
        out = out.reshape(whole, -1)
        if whole == count:
            return out
        rest = apply_experts(tokens[whole:], share[whole:], expert[whole:], kernels)
        return jnp.concatenate([out, rest])


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
