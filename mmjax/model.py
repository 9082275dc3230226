"""The hybrid decoder: embedding, a scan over super-blocks, final norm, LM head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from kernels_pallas.lightning_attention.clock import number_segments
from kernels_pallas.numerics import PRODUCT
from mmjax.config import LIGHTNING, SOFTMAX, ModelConfig
from mmjax.layers.block import Block, Cache, Context, LayerIndex, empty_stats
from mmjax.layers.embed import Embed, Head, tied_logits
from mmjax.layers.fused_softmax import PRIMITIVE as FUSED_ATTENTION
from mmjax.layers.lightning import decay_rates
from mmjax.layers.moe import MoE, RouterStats, load_balancing_loss
from mmjax.layers.norm import RMSNorm
from mmjax.layers.rope import rope_angles
from mmjax.sharding import constrain
from mmjax.vision.config import VisionConfig
from mmjax.vision.tower import Vision

REMAT = ("super_block", "layer", "products", "none")


class Aux(NamedTuple):
    """What the routers did with the real tokens.

    load_balancing_loss []: differentiable, not yet multiplied by its coefficient, of the whole
    model or the mean of its layers', see `ModelConfig.router_aux_loss_over`;
    tokens_per_expert [L, E]; router_probability [L, E], mean; router_entropy [L], mean, nats;
    dropped_share [L]: of the token-slots, those beyond their expert's capacity.
    """

    load_balancing_loss: jax.Array
    tokens_per_expert: jax.Array
    router_probability: jax.Array
    router_entropy: jax.Array
    dropped_share: jax.Array


class Intermediates(NamedTuple):
    """hidden_states [L + 1, B, T, D]: the input of each layer, and last the final norm's output;
    router_logits [L, B, T, E].
    """

    hidden_states: jax.Array
    router_logits: jax.Array


class Output(NamedTuple):
    """logits [B, T, vocab] float32 (None if not asked for); hidden [B, T, D] after the final
    norm; the updated cache, of the kind that was given, if any; aux; intermediates, if asked for.
    """

    logits: jax.Array | None
    hidden: jax.Array
    cache: Any
    aux: Aux
    intermediates: Intermediates | None


class ImageTokens(NamedTuple):
    """features [B, R, D]: what the images of each row are made of, see `Vision.features`;
    rows [B, T] int32: the feature that stands at a token, negative for the token's own embedding.
    """

    features: jax.Array
    rows: jax.Array


class SuperBlock(nnx.Module):
    """The repeating pattern of layers, as runs of one kind with stacked parameters."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
        self.runs = nnx.List(
            [_stack(partial(Block, cfg, kind), count, rngs) for kind, count in pattern_runs(cfg)]
        )


class Decoder(nnx.Module):
    """A MiniMax-01 / M1 decoder.

    Parameters of the layers are stacked [super-blocks, layers of the run, ...]. Super-blocks are
    scanned; a pattern without a period is one super-block whose runs are looped over.

    Args:
      cfg: The architecture.
      rngs: Source of the initial parameters.
      remat: What the backward pass finds stored: "super_block" (the input of each super-block,
        for large models), "layer" (the input of each layer), "products" (also the results of matrix
        products and of attention, so that none is computed twice), or "none" (all that JAX keeps).
        Where layers' inputs fit, their runs are unrolled as well.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, remat: str = "super_block") -> None:
        if remat not in REMAT:
            raise ValueError(f"remat {remat!r} is unknown; known: {', '.join(REMAT)}")
        self.cfg = cfg
        self.remat = remat
        self.embed = Embed(cfg, rngs)
        self.blocks: SuperBlock | nnx.List[Block] = _stack(
            partial(SuperBlock, cfg), cfg.num_layers // cfg.period, rngs
        )
        self.norm = RMSNorm(cfg.hidden_size, "norm", cfg.norm_eps, cfg.param_dtype)
        self.head = None if cfg.tie_embeddings else Head(cfg, rngs)
        self.vision = None if cfg.vision is None else _vision(cfg, cfg.vision, rngs)

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        *,
        positions: Int32[Array, "B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        lengths: Int32[Array, " B"] | None = None,
        cache: Cache | None = None,
        images: ImageTokens | None = None,
        compute_logits: bool = True,
        return_intermediates: bool = False,
    ) -> Output:
        """Runs the decoder.

        Args:
          tokens: [B, T] int32.
          positions: RoPE positions [B, T]; None for the place of a token in its segment, or in
            its row's sequence so far with a cache.
          segment_ids: [B, T]; 0 is padding, on any side. Documents packed in a row carry ids of
            their own and do not see each other. With a cache a row is one sequence, and ids only
            tell padding from tokens.
          lengths: Instead of segment_ids, where every row is one document padded on the right: its
            real tokens [B]. Attention needs no masks then, since padding follows all that is real;
            the outputs of padding mean nothing. Not with a cache.
          cache: What the rows have seen so far; the result holds it updated. The caller sees to
            it that no row outgrows the capacity: tokens past it are not remembered.
          images: What stands at image tokens in place of their embedding.
          compute_logits: False leaves `logits` None, for callers that need a few positions.
          return_intermediates: Also return hidden states and router logits layer by layer.

        Raises:
          ValueError: T exceeds the capacity of the cache; lengths beside segment_ids or a cache.
        """
        if lengths is not None and not (segment_ids is None and cache is None):
            raise ValueError("lengths are for rows without segment_ids and without a cache")
        if cache is not None and tokens.shape[1] > cache.capacity:
            raise ValueError(
                f"{tokens.shape[1]} tokens do not fit a cache of capacity {cache.capacity}; "
                "create it larger"
            )
        positions, slots, segment_ids = _places(tokens, positions, segment_ids, cache)
        real = None if segment_ids is None else segment_ids != 0
        if lengths is not None:
            real = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        ctx = Context(
            rope_angles(positions, self.cfg.rotary_dim, self.cfg.rope_theta),
            segment_ids,
            real,
            slots,
        )
        h = constrain(self.embed(tokens), "batch", "sequence", None)
        if images is not None:
            h = constrain(_with_images(h, images), "batch", "sequence", None)
        h, cache, stats, inputs = self._layers(h, cache, ctx, return_intermediates)
        if cache is not None:
            cache = cache._replace(length=cache.length + _real_counts(tokens, real))
        hidden = self.norm(h)
        logits = self.logits(hidden) if compute_logits else None
        seen = None
        if return_intermediates:
            seen = Intermediates(jnp.concatenate([inputs, hidden[None]]), stats.logits)
        aux = _aux(stats, _real_counts(tokens, real), self.cfg.router_aux_loss_over)
        return Output(logits, hidden, cache, aux, seen)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T vocab"]:
        """LM head on the final norm's output, in float32."""
        if self.head is None:
            return tied_logits(hidden, self.embed.embedding[...])
        return self.head(hidden)

    def unstacked(self) -> Decoder:
        """The same model with parameters of its own for every layer, in order, and no scan.

        Cut out of a stack for a kernel or a matmul, a layer's weights are copied first, which a
        decode step, all of whose time is reading weights, pays for more than once. Programs grow
        with the layers in return.
        """
        if isinstance(self.blocks, nnx.List):
            return self
        layers = [
            jax.tree.map(lambda x, s=s, i=i: x[s, i], run)
            for s in range(self.cfg.num_layers // self.cfg.period)
            for run, (_, count) in zip(self.blocks.runs, pattern_runs(self.cfg), strict=True)
            for i in range(count)
        ]
        model = nnx.merge(*nnx.split(self))
        model.blocks = nnx.List(layers)
        return model

    def with_int8_experts(self) -> Decoder:
        """The same model, to serve, with the experts' matrices rounded to int8."""
        return self._with_each(MoE, MoE.round_experts)

    def with_fused_projections(self) -> Decoder:
        """The same model, to serve on one device, with one matrix for what reads a layer's input.

        Of an `unstacked` one: a decode step on a Hopper GPU then runs on kernels of its own.
        """
        return self._with_each(Block, lambda block: block.attention.fuse_projections())

    def _with_each[M: nnx.Module](self, kind: type[M], change: Callable[[M], None]) -> Decoder:
        """A copy with every module of a kind changed."""
        model = nnx.merge(*nnx.split(self))
        for _, node in nnx.iter_graph(model):
            if isinstance(node, kind):
                change(node)
        return model

    def _layers(
        self, h: jax.Array, cache: Cache | None, ctx: Context, keep: bool
    ) -> tuple[jax.Array, Cache | None, RouterStats, jax.Array]:
        """All layers; statistics and (if `keep`) layer inputs come back [L, ...]."""
        indices = _layer_indices(self.cfg)

        def layer(carry: _Carry, x: tuple[Block, LayerIndex]) -> tuple[_Carry, _LayerOut]:
            h, cache = carry
            block, index = x
            out, cache, stats = block(h, cache, index, ctx)
            out = constrain(out, "batch", "sequence", None)
            if not keep:
                return (out, cache), (empty_stats(stats), jnp.zeros(()))
            return (out, cache), (stats, h)

        def super_block(
            carry: _Carry, x: tuple[SuperBlock, list[LayerIndex]]
        ) -> tuple[_Carry, _LayerOut]:
            block, indices = x
            outs = []
            for run, index in zip(block.runs, indices, strict=True):
                carry, out = _scan(layer, carry, (run, index), unroll=self.remat != "super_block")
                outs.append(out)
            return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)

        if cache is None and self.remat != "none":
            layer = jax.checkpoint(layer, policy=_POLICIES.get(self.remat))
        if isinstance(self.blocks, nnx.List):
            carry, each = (h, cache), []
            for block, index in zip(self.blocks, _in_order(indices), strict=True):
                carry, out = layer(carry, (block, index))
                each.append(out)
            return *carry, *jax.tree.map(lambda *layers: jnp.stack(layers), *each)
        body = super_block
        if cache is None and self.remat == "super_block":
            body = jax.checkpoint(super_block)
        carry, outs = _scan(body, (h, cache), (self.blocks, indices))
        stats, inputs = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outs)
        return *carry, stats, inputs


def _keep_products(primitive: Any, *args: Any, **params: Any) -> bool:
    named = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    # A sort is no product, but small results of a slow one are worth as much.
    kept = str(primitive).startswith((FUSED_ATTENTION, "top_k"))
    return kept or bool(named(primitive, *args, **params))


_POLICIES = {"products": _keep_products}


def _with_images(h: jax.Array, images: ImageTokens) -> jax.Array:
    """Embeddings [B, T, D] with features in the places that `images.rows` gives them."""
    place = jnp.maximum(images.rows, 0)[..., None]
    found = jnp.take_along_axis(images.features.astype(h.dtype), place, axis=1)
    return jnp.where((images.rows >= 0)[..., None], found, h)


def _vision(cfg: ModelConfig, vision: VisionConfig, rngs: nnx.Rngs) -> Vision:
    return Vision(vision, cfg.hidden_size, cfg.dtype, cfg.param_dtype, rngs)


type _Carry = tuple[jax.Array, Cache | None]
type _LayerOut = tuple[RouterStats, jax.Array]


def pattern_runs(cfg: ModelConfig) -> list[tuple[str, int]]:
    """The repeating pattern as runs of one kind, [("lightning", 7), ("softmax", 1)] as released."""
    pattern = cfg.kinds[: cfg.period]
    return [(kind, len(list(group))) for kind, group in groupby(pattern)]


def _layer_indices(cfg: ModelConfig) -> list[LayerIndex]:
    """For each run, decay rates and places stacked [super-blocks, layers of the run, ...]."""
    rates = decay_rates(cfg.num_heads, cfg.num_layers)
    kinds = np.array(cfg.kinds)
    place = np.zeros(cfg.num_layers, np.int32)
    for kind in (LIGHTNING, SOFTMAX):
        place[kinds == kind] = np.arange((kinds == kind).sum())
    indices, first = [], 0
    for _, count in pattern_runs(cfg):
        layers = np.arange(cfg.num_layers).reshape(-1, cfg.period)[:, first : first + count]
        indices.append(LayerIndex(jnp.asarray(rates[layers]), jnp.asarray(place[layers])))
        first += count
    return indices


def _in_order(indices: list[LayerIndex]) -> list[LayerIndex]:
    """The constants of each layer, of all layers in order."""
    super_blocks = indices[0].place.shape[0]
    return [
        LayerIndex(run.decay[s, i], run.place[s, i])
        for s in range(super_blocks)
        for run in indices
        for i in range(run.place.shape[1])
    ]


def _stack[M: nnx.Module](make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """`count` modules with their parameters stacked on a new leading axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make_all(each: nnx.Rngs) -> M:
        return make(each)

    return make_all(rngs)


def _scan(
    body: Callable[..., Any], carry: _Carry, xs: Any, *, unroll: bool = False
) -> tuple[_Carry, Any]:
    """`jax.lax.scan`, without a loop for a single step or where it is not wanted."""
    leading = jax.tree.leaves(xs)[0].shape[0]
    if leading > 1 and not unroll:
        return jax.lax.scan(body, carry, xs)
    # The transpose of a split is one concatenation, that of many slices is as many paddings.
    leaves, structure = jax.tree.flatten(xs)
    parts = [jax.lax.split(x, (1,) * leading) for x in leaves]
    outs = []
    for i in range(leading):
        step = jax.tree.unflatten(structure, [part[i][0] for part in parts])
        carry, out = body(carry, step)
        outs.append(out)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outs)


def _places(
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: Cache | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """RoPE positions, cache slots and the segment ids that the layers are to see."""
    batch, length = tokens.shape
    if cache is not None and segment_ids is not None:
        segment_ids = (segment_ids != 0).astype(jnp.int32)
    if segment_ids is None or length == 1:
        place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    else:
        place, segment_ids = number_segments(segment_ids)
    if cache is None:
        return place if positions is None else positions, None, segment_ids
    slots = cache.length[:, None] + place
    if segment_ids is not None:
        slots = jnp.where(segment_ids != 0, slots, cache.capacity)
    return slots if positions is None else positions, slots, segment_ids


def _real_counts(tokens: jax.Array, real: jax.Array | None) -> jax.Array:
    """Real tokens of each row [B]."""
    if real is None:
        return jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    return jnp.sum(real, axis=1, dtype=jnp.int32)


def _aux(stats: RouterStats, tokens: jax.Array, over: str) -> Aux:
    """What the routers did with rows of so many real tokens [B]."""
    count = jnp.sum(tokens).astype(jnp.float32)
    mean = 1 / jnp.maximum(count, 1)
    visits, probability = stats.tokens_per_expert, stats.probability_sum
    if over == "layers":
        # Of each layer, as if the model had no other.
        visits, probability = visits[:, None], probability[:, None]
        balance = jax.vmap(load_balancing_loss, (0, 0, None))(visits, probability, count).mean()
    else:
        balance = load_balancing_loss(visits, probability, count)
    return Aux(
        balance,
        stats.tokens_per_expert,
        stats.probability_sum * mean,
        stats.entropy_sum * mean,
        stats.dropped / jnp.maximum(stats.tokens_per_expert.sum(1), 1),
    )
