"""The programs that are compiled ahead: a whole train step, a prefill, a decode step.

The train step stands here and not in `train`, which mmjax may not import: forward, backward,
clipping and AdamW in plain JAX, by the same formulas. A test holds it to `train.step` on numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmjax.cache import HybridCache
from mmjax.model import Decoder
from mmjax.plan.counts import rules_of
from mmjax.plan.job import Job
from mmjax.sharding import DEFAULT_RULES, param_shardings

type Batch = dict[str, jax.Array]

# Tokens of a row whose logits exist at once.
_LOGIT_TOKENS = 512
# `train.config.OptimizerConfig`'s defaults.
RATE, B1, B2, EPS, DECAY, CLIP = 3e-4, 0.9, 0.95, 1e-15, 0.1, 1.0


class State(NamedTuple):
    """params; AdamW's moments, mu and nu, like them; updates [] int32 so far."""

    params: nnx.State
    mu: nnx.State
    nu: nnx.State
    updates: Any


class Program(NamedTuple):
    """A function, its abstract arguments with shardings, how its results lie (None as XLA likes),
    and whether the first argument's memory is its result's.
    """

    run: Callable[..., Any]
    args: tuple[Any, ...]
    out: Any
    donate: bool


def make_program(job: Job, mesh: Mesh) -> Program:
    """One step of a job, ready to be lowered.

    Args:
      job: What a step does.
      mesh: Of real or of described devices.

    Raises:
      ShardingError: the mesh does not divide the model.
    """
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: Decoder(job.model, rngs=nnx.Rngs(0), remat=job.remat))
    )
    placed = _like(params, param_shardings(params, mesh, rules_of(job)))
    if job.kind == "train":
        return _train_program(job, mesh, graphdef, placed)
    return _serving_program(job, mesh, graphdef, placed)


def _train_program(
    job: Job, mesh: Mesh, graphdef: nnx.GraphDef[Decoder], params: nnx.State
) -> Program:
    moments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, _moment(job, x.dtype), sharding=x.sharding), params
    )
    updates = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    state = State(params, moments, moments, updates)
    rows = NamedSharding(mesh, DEFAULT_RULES.spec(("batch", "sequence"), of="batch"))
    shape = (job.batch, job.length)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
        for name, dtype in [
            ("tokens", jnp.int32),
            ("positions", jnp.int32),
            ("segment_ids", jnp.int32),
            ("loss_mask", jnp.float32),
        ]
    }
    out = (jax.tree.map(lambda x: x.sharding, state), None)
    return Program(partial(train_step, graphdef), (state, batch), out, donate=True)


def _moment(job: Job, dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(job.moments) if job.moments else dtype


def train_step(
    graphdef: nnx.GraphDef[Decoder], state: State, batch: Batch
) -> tuple[State, dict[str, jax.Array]]:
    """Forward, backward, clipping by the global norm, AdamW.

    Args:
      graphdef: Of the decoder.
      state: Parameters, moments and number of updates.
      batch: tokens, positions, segment_ids [B, T] int32 and loss_mask [B, T] float32.
    """
    loss, grads = jax.value_and_grad(partial(_loss, graphdef, batch))(state.params)
    norm = jnp.sqrt(sum(jnp.sum(_wide(g) ** 2) for g in jax.tree.leaves(grads)))
    scale = CLIP / jnp.maximum(norm, CLIP)
    updates = state.updates + 1
    update = partial(_adamw, scale=scale, steps=updates.astype(jnp.float32))
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    rest = (jax.tree.leaves(x) for x in (grads, state.mu, state.nu))
    new = [update(path, *values) for (path, *values) in _rows(leaves, *rest)]
    tree = jax.tree.structure(state.params)
    params, mu, nu = (jax.tree.unflatten(tree, part) for part in zip(*new, strict=True))
    return State(params, mu, nu, updates), {"loss": loss, "grad_norm": norm}


def _rows(leaves: list[Any], *rest: list[Any]) -> list[tuple[Any, ...]]:
    return [(path, p, *values) for (path, p), *values in zip(leaves, *rest, strict=True)]


def _adamw(
    path: Any,
    param: jax.Array,
    grad: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    *,
    scale: jax.Array,
    steps: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One parameter's update in float32; norm scales are not decayed."""
    g, p = _wide(grad) * scale, _wide(param)
    m = B1 * _wide(mu) + (1 - B1) * g
    v = B2 * _wide(nu) + (1 - B2) * g * g
    step = m / (1 - B1**steps) / (jnp.sqrt(v / (1 - B2**steps)) + EPS)
    if "norm" not in jax.tree_util.keystr(path):
        step += DECAY * p
    return (p - RATE * step).astype(param.dtype), m.astype(mu.dtype), v.astype(nu.dtype)


def _loss(graphdef: nnx.GraphDef[Decoder], batch: Batch, params: nnx.State) -> jax.Array:
    """Mean cross-entropy of the next tokens within their documents, and the routers' loss."""
    model = nnx.merge(graphdef, params)
    segments = batch["segment_ids"]
    out = model(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=segments,
        compute_logits=False,
    )
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    same = (segments == jnp.roll(segments, -1, axis=1)) & (segments != 0)
    mask = jnp.roll(batch["loss_mask"], -1, axis=1) * same.astype(jnp.float32)
    mask = mask.at[:, -1].set(0)
    total = _summed_logprobs(model, out.hidden, targets, mask)
    entropy = -total / jnp.maximum(mask.sum(), 1)
    return entropy + model.cfg.router_aux_loss_coef * out.aux.load_balancing_loss


def _summed_logprobs(
    model: Decoder, hidden: jax.Array, targets: jax.Array, mask: jax.Array
) -> jax.Array:
    """Σ mask · log softmax(logits)[target], some tokens of every row at a time."""

    def chunk(x: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        h, target, weight = x
        logits = model.logits(h)
        chosen = jnp.take_along_axis(logits, target[:, :, None], axis=-1)[:, :, 0]
        return jnp.sum(weight * (chosen - jax.nn.logsumexp(logits, axis=-1)))

    length = hidden.shape[1]
    if length <= _LOGIT_TOKENS or length % _LOGIT_TOKENS:
        return chunk((hidden, targets, mask))

    def split(x: jax.Array) -> jax.Array:
        parts = x.reshape(x.shape[0], -1, _LOGIT_TOKENS, *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    chunks = jax.tree.map(split, (hidden, targets, mask))
    return jnp.sum(jax.lax.map(jax.checkpoint(chunk), chunks))


def _serving_program(
    job: Job, mesh: Mesh, graphdef: nnx.GraphDef[Decoder], params: nnx.State
) -> Program:
    cache = jax.eval_shape(lambda: HybridCache.create(job.model, job.batch, job.length))
    spec = DEFAULT_RULES.spec
    keys = spec((None, "batch", "sequence", "kv_heads", None), of="cache")
    state = spec((None, "batch", "heads", None, None), of="cache")
    lengths = spec(("batch",), of="cache")
    where = [NamedSharding(mesh, s) for s in (keys, keys, state, lengths)]
    held: Any = [_struct(x, s) for x, s in zip(cache, where, strict=True)]
    placed: Any = where
    tokens = 1 if job.kind == "decode" else job.length
    sequence = "sequence" if job.kind == "prefill" else None
    taken = jax.ShapeDtypeStruct(
        (job.batch, tokens), jnp.int32, sharding=NamedSharding(mesh, spec(("batch", sequence)))
    )
    out = (HybridCache(*placed), None)
    return Program(
        partial(serve_step, graphdef), (HybridCache(*held), params, taken), out, donate=True
    )


def serve_step(
    graphdef: nnx.GraphDef[Decoder], cache: HybridCache, params: nnx.State, tokens: jax.Array
) -> tuple[HybridCache, jax.Array]:
    """Takes tokens [B, T] into the cache; also the logits [B, vocab] of each row's last one."""
    model = nnx.merge(graphdef, params)
    out = model(tokens, cache=cache, compute_logits=False)
    assert out.cache is not None
    return out.cache, model.logits(out.hidden[:, -1:])[:, 0]


def _like(tree: nnx.State, shardings: nnx.State) -> nnx.State:
    """Shapes with shardings, what `trace` takes instead of arrays."""
    made: nnx.State = jax.tree.map(_struct, tree, shardings)
    return made


def _struct(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
