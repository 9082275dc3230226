"""FLOPs, HBM bytes and collective bytes of one step on one device.

Letters as elsewhere: D model, H query heads, G KV heads, K head dim, F ffn, E experts, k experts a
token, L layers, T tokens of a row. A device has R = new tokens / (data · context · expert) tokens,
1/model of heads, ffn and vocabulary, and 1/expert of the experts; routing is taken as even.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

from mmjax.config import LIGHTNING, SOFTMAX, ModelConfig
from mmjax.model import Decoder
from mmjax.plan.chips import Chip, Number
from mmjax.plan.job import Job
from mmjax.sharding import MESH_AXES, SERVING_RULES, ShardingRules, param_shardings

# Keys that softmax attention takes up at once; up to one block the scores are stored, not redone.
SOFTMAX_BLOCK = 512
# Tokens that a lightning kernel takes up at once.
LIGHTNING_CHUNK = {True: 256, False: 64}  # TPU, GPU

type MeshSizes = Mapping[str, int]


class Work(NamedTuple):
    """One kind of operation of a step, on one device.

    Attributes:
      name: What it is.
      model: FLOPs that one forward pass needs.
      forward: FLOPs that one forward pass spends.
      backward: FLOPs of the backward pass, recomputing aside.
      forward_bytes: HBM bytes of one forward pass.
      backward_bytes: HBM bytes of the backward pass.
      exact: In true float32.
      passes: Forward passes of a train step, recomputing included.
    """

    name: str
    model: Number
    forward: Number
    backward: Number
    forward_bytes: Number
    backward_bytes: Number
    exact: bool = False
    passes: int = 1


class Parameter(NamedTuple):
    """One parameter of the model: bytes in all, and of each device; the mesh axes that d_model
    is spread over, which a step gathers; whether it is an expert's.
    """

    name: str
    total: int
    local: int
    gathered_over: tuple[str, ...]


class Collective(NamedTuple):
    """One kind of collective of a step: `size` bytes is what one device ends up with (gather),
    starts from (scatter, reduce) or sends (exchange), over all its calls together.
    """

    name: str
    kind: str
    axes: tuple[str, ...]
    size: Number


@functools.lru_cache(maxsize=8)
def abstract_params(model: ModelConfig) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """The decoder's definition and its parameters as shapes."""
    split: tuple[nnx.GraphDef[Decoder], nnx.State] = nnx.split(
        nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)))
    )
    return split


def rules_of(job: Job) -> ShardingRules:
    """How a job's parameters lie on the mesh."""
    return job.sharding if job.kind == "train" else SERVING_RULES


def parameters(job: Job, mesh: MeshSizes) -> list[Parameter]:
    """Every parameter and its share of one device.

    Raises:
      ShardingError: the mesh does not divide the model.
    """
    abstract = AbstractMesh(tuple(mesh[axis] for axis in MESH_AXES), MESH_AXES)
    _, params = abstract_params(job.model)
    rules = rules_of(job)
    shardings = dict(nnx.to_flat_state(param_shardings(params, abstract, rules)))
    found = []
    for path, variable in nnx.to_flat_state(params):
        shape, axes = variable.get_value().shape, variable.get_metadata("axes")
        sharding: NamedSharding = shardings[path].get_value()
        spec = [(e,) if isinstance(e, str) else e or () for e in sharding.spec]
        total = math.prod(shape) * variable.get_value().dtype.itemsize
        parts = math.prod(mesh[m] for entry in spec for m in entry)
        stacked = len(shape) - len(axes)
        over = spec[stacked + axes.index("d_model")] if "d_model" in axes else ()
        name = ".".join(map(str, path))
        found.append(Parameter(name, total, total // parts, tuple(m for m in over if mesh[m] > 1)))
    return found


def forward_passes(job: Job) -> int:
    """Times that a step runs the layers forward.

    "layer" redoes each layer for its backward. "super_block" redoes the super-block for the inputs
    of its layers, then each layer.
    """
    return (
        {"none": 1, "products": 1, "layer": 2, "super_block": 3}[job.remat]
        if job.kind == "train"
        else 1
    )


def device_work(job: Job, mesh: MeshSizes, chip: Chip) -> list[Work]:
    """What one device computes in one step.

    A product [rows, inner] x [inner, cols] is 2 · rows · inner · cols FLOPs forward and twice that
    backward; it reads both operands and writes its result once a pass. Element-wise work counts
    its bytes alone.
    """
    cfg = job.model
    rows = job.new_tokens / (mesh["data"] * mesh["context"] * mesh["expert"])
    works = [*_attention(job, mesh, chip, rows), *_experts(job, mesh, rows)]
    works.append(_head(job, mesh, rows))
    works.append(_elementwise(cfg, mesh, rows))
    passes = forward_passes(job)
    return [w if w.name == "head" else w._replace(passes=passes) for w in works]


def _product(
    cfg: ModelConfig,
    name: str,
    layers: int,
    rows: Number,
    inner: Number,
    cols: Number,
    *,
    copies: Number = 1,
    exact: bool = False,
) -> Work:
    """`layers` products; `copies` weight matrices are read for the rows of one."""
    flops = layers * 2 * rows * inner * cols
    item, weight = itemsize(cfg.dtype), 4 if name == "router" else itemsize(cfg.param_dtype)
    out = 4 if name in ("router", "head") else item
    moved = layers * (rows * inner * item + rows * cols * out + copies * inner * cols * weight)
    return Work(name, flops, flops, 2 * flops, moved, 2 * moved, exact)


def _attention(job: Job, mesh: MeshSizes, chip: Chip, rows: Number) -> list[Work]:
    cfg, model = job.model, mesh["model"]
    lightning, softmax = cfg.kinds.count(LIGHTNING), cfg.kinds.count(SOFTMAX)
    d = cfg.hidden_size
    wide, narrow = cfg.num_heads * cfg.head_dim / model, cfg.num_kv_heads * cfg.head_dim / model
    return [
        _product(cfg, "lightning projections", lightning, rows, d, 5 * wide),
        _lightning_core(job, chip, lightning, rows, wide),
        _product(cfg, "softmax projections", softmax, rows, d, 2 * (wide + narrow)),
        _softmax_core(job, mesh, softmax, rows, wide, narrow),
    ]


def _lightning_core(job: Job, chip: Chip, layers: int, rows: Number, wide: Number) -> Work:
    """Needs 4 K a channel: the state's update and its product with q. In chunks of C tokens the
    full diagonal blocks add 4 C forward; backward 12 C + 10 K, in two passes over the chunks.

    Source of the chunked counts: MiniMax-01's own, with C = 2 K, is 12 K a channel (table of
    section 2.2, term 1 / 2h).
    """
    cfg = job.model
    k, item = cfg.head_dim, itemsize(cfg.dtype)
    scale = layers * rows * wide
    if job.kind == "decode":
        state = layers * rows * wide * k * 4 * 2
        return Work("lightning core", 4 * k * scale, 4 * k * scale, 0, state, 0)
    c = min(LIGHTNING_CHUNK[chip.is_tpu], job.length)
    return Work(
        "lightning core",
        model=4 * k * scale,
        forward=(4 * c + 4 * k) * scale,
        backward=(12 * c + 10 * k) * scale,
        forward_bytes=4 * scale * item,
        backward_bytes=10 * scale * item,
    )


def _softmax_core(
    job: Job, mesh: MeshSizes, layers: int, rows: Number, wide: Number, narrow: Number
) -> Work:
    """4 FLOPs a key and channel; a causal query sees (T + 1) / 2 keys of its row on average, and
    is multiplied with half a block more. Backward: four products like the forward's two, and the
    scores once more where they were not kept.
    """
    item = itemsize(job.model.dtype)
    scale = layers * rows * wide * 4
    if job.kind == "decode":
        keys = job.length / mesh["context"]
        cache = layers * rows * keys * 2 * narrow * item
        return Work("softmax core", scale * keys, scale * keys, 0, cache, 0)
    block = min(job.length, SOFTMAX_BLOCK)
    forward = scale * (job.length + block) / 2
    moved = layers * rows * item * 2 * (wide + narrow)
    return Work(
        "softmax core",
        model=scale * (job.length + 1) / 2,
        forward=forward,
        backward=forward * (2 if job.length <= SOFTMAX_BLOCK else 2.5),
        forward_bytes=moved,
        backward_bytes=2.5 * moved,
    )


def _experts(job: Job, mesh: MeshSizes, rows: Number) -> list[Work]:
    cfg = job.model
    d, f, e, k = (
        cfg.hidden_size,
        cfg.intermediate_size / mesh["model"],
        cfg.num_experts,
        cfg.num_experts_per_token,
    )
    # Of the device's experts, those that any token of the expert group visits.
    visited = e / mesh["expert"] * (1 - (1 - k / e) ** (rows * mesh["expert"]))
    layers = cfg.num_layers
    works = [
        _product(cfg, "router", layers, rows, d, e, exact=True),
        _product(cfg, "experts up", layers, rows * k, d, 2 * f, copies=visited),
        _product(cfg, "experts down", layers, rows * k, f, d, copies=visited),
    ]
    if cfg.shared_intermediate_size:
        works.append(_product(cfg, "shared expert", layers, rows, d, 3 * f))
    return works


def _head(job: Job, mesh: MeshSizes, rows: Number) -> Work:
    """The LM head: every token in training, the last of each row in serving.

    Logits are float32; bfloat16 operands are multiplied as such, whose products are exact. A train
    step computes the logits in chunks, and again for the backward.
    """
    cfg = job.model
    if job.kind == "prefill":
        rows /= job.length / mesh["context"]
    cols = cfg.vocab_size / mesh["model"]
    exact = {cfg.dtype, cfg.param_dtype} != {"bfloat16"}
    work = _product(cfg, "head", 1, rows, cfg.hidden_size, cols, exact=exact)
    return work._replace(passes=2 if job.kind == "train" else 1)


def _elementwise(cfg: ModelConfig, mesh: MeshSizes, rows: Number) -> Work:
    """Norms and residuals read and write the stream four times a layer; SiLU, gate and inner norm
    touch ten values a channel of a lightning layer, SwiGLU three a channel of an expert.
    """
    f = cfg.num_experts_per_token * cfg.intermediate_size / mesh["model"]
    wide = cfg.num_heads * cfg.head_dim / mesh["model"]
    values = cfg.num_layers * (8 * cfg.hidden_size + 3 * f)
    values += cfg.kinds.count(LIGHTNING) * 10 * wide
    moved = rows * values * itemsize(cfg.dtype)
    return Work("element-wise", 0, 0, 0, moved, 2 * moved)


def optimizer_bytes(job: Job, local: Number) -> Number:
    """HBM bytes of the update: gradients read twice (norm, update), parameters and both moments
    read and written.

    Args:
      job: For the dtypes.
      local: Bytes of parameters on the device.
    """
    if job.kind != "train":
        return 0
    moments = itemsize(job.moments_dtype) / itemsize(job.model.param_dtype)
    return local * (2 + 2 + 4 * moments)


def collectives(job: Job, mesh: MeshSizes, params: list[Parameter]) -> list[Collective]:
    """What one device sends and receives in one step.

    - weights: gathered over the axes that hold d_model, once a forward pass and at least once more
      for the backward; their gradients scattered once over the same axes, and reduced over
      `context` where they are whole there.
    - experts (`expert`): k · R · D out and back, each forward pass and the backward.
    - heads and ffn (`model`): two reductions of R · D a layer, each forward pass and the backward.
    - sequence (`context`): the states of all parts, H · K · K in float32 a row and lightning
      layer; keys and values of the whole row a softmax layer; each pass.
    """
    cfg, train = job.model, job.kind == "train"
    passes = forward_passes(job)
    both = passes + train  # forward passes and the backward
    item = itemsize(cfg.dtype)
    rows = job.new_tokens / (mesh["data"] * mesh["context"] * mesh["expert"])
    stream = rows * cfg.hidden_size * item
    found: list[Collective] = []
    for axes in sorted({p.gathered_over for p in params if p.gathered_over}):
        whole = sum(
            p.local * math.prod(mesh[a] for a in axes) for p in params if p.gathered_over == axes
        )
        found.append(Collective("weights", "gather", axes, whole * max(passes, 2 if train else 1)))
        if train:
            found.append(Collective("gradients", "scatter", axes, whole))
    if train:
        whole_rows = sum(p.local for p in params if "context" not in p.gathered_over)
        found.append(Collective("gradients", "reduce", ("context",), whole_rows))
    sent = cfg.num_layers * cfg.num_experts_per_token * stream * 2
    found.append(Collective("tokens to experts", "exchange", ("expert",), sent * both))
    halves = cfg.num_layers * 2 * stream
    found.append(Collective("partial sums", "reduce", ("model",), halves * both))
    if job.kind != "decode":
        found.append(
            Collective("states, keys", "gather", ("context",), _row_parts(job, mesh) * both)
        )
    return [c for c in found if math.prod(mesh[a] for a in c.axes) > 1]


def _row_parts(job: Job, mesh: MeshSizes) -> Number:
    """Bytes of states and of keys and values that one device gathers over `context`, one pass."""
    cfg = job.model
    batch = job.batch / (mesh["data"] * mesh["expert"])
    state = cfg.num_heads / mesh["model"] * cfg.head_dim**2 * 4
    keys = job.length * 2 * cfg.num_kv_heads / mesh["model"] * cfg.head_dim * itemsize(cfg.dtype)
    return batch * (
        cfg.kinds.count(LIGHTNING) * mesh["context"] * state + cfg.kinds.count(SOFTMAX) * keys
    )


def memory(job: Job, mesh: MeshSizes, params: list[Parameter]) -> dict[str, Number]:
    """Bytes of HBM that one device holds at the worst moment of a step, by what they are.

    Train: parameters, gradients, two moments; what remat keeps (the stream at each super-block and
    at the layers of one, at each layer, with the products of all layers, or all their values); the
    values and the gradients of one layer, recomputed; one layer's gathered weights, the next one's,
    and its gradients.
    Serving: parameters, the cache, the values of one layer.
    """
    local = sum(p.local for p in params)
    found: dict[str, Number] = {"parameters": local}
    layer = _layer_values(job, mesh)
    if job.kind == "train":
        moments = itemsize(job.moments_dtype) / itemsize(job.model.param_dtype)
        found |= {"gradients": local, "optimizer": 2 * moments * local}
        found |= {"kept activations": _kept(job, mesh), "one layer's values": 2 * layer}
        gathered = 3 * _largest_layer(job.model, mesh, params)
        found["gathered weights"] = gathered + _logits(job, mesh, params)
    else:
        found |= {"cache": _cache(job, mesh), "one layer's values": layer}
    return found


def _layer_values(job: Job, mesh: MeshSizes) -> Number:
    """All values that a lightning layer's backward reads: norms 2 D, q, k, v before and after SiLU,
    out, gate and their product 9 H·K, the result D, and k · (2 D + 3 F) of the experts; a token.
    """
    cfg = job.model
    rows = job.new_tokens / (mesh["data"] * mesh["context"] * mesh["expert"])
    wide = cfg.num_heads * cfg.head_dim / mesh["model"]
    experts = 2 * cfg.hidden_size + 3 * cfg.intermediate_size / mesh["model"]
    values = 3 * cfg.hidden_size + 9 * wide + cfg.num_experts_per_token * experts
    return rows * values * itemsize(cfg.dtype)


def _product_values(job: Job, mesh: MeshSizes) -> Number:
    """What a lightning layer's products are, a token: its input D, q, k, v and gate 4 H·K, the
    result D, and k · (2 F + D) of the experts.
    """
    cfg = job.model
    wide = cfg.num_heads * cfg.head_dim / mesh["model"]
    experts = 2 * cfg.intermediate_size / mesh["model"] + cfg.hidden_size
    return 2 * cfg.hidden_size + 4 * wide + cfg.num_experts_per_token * experts


def _kept(job: Job, mesh: MeshSizes) -> Number:
    cfg = job.model
    rows = job.new_tokens / (mesh["data"] * mesh["context"] * mesh["expert"])
    stream = rows * cfg.hidden_size * itemsize(cfg.dtype)
    if job.remat == "none":
        return cfg.num_layers * _layer_values(job, mesh)
    if job.remat == "products":
        return cfg.num_layers * rows * _product_values(job, mesh) * itemsize(cfg.dtype)
    if job.remat == "layer":
        return cfg.num_layers * stream
    return (cfg.num_layers // cfg.period + cfg.period) * stream


def _largest_layer(cfg: ModelConfig, mesh: MeshSizes, params: list[Parameter]) -> Number:
    """Bytes of one layer's weights, gathered for use; an average over the layers."""
    blocks = [p for p in params if p.name.startswith("blocks")]
    return sum(p.local * math.prod(mesh[a] for a in p.gathered_over) for p in blocks) / (
        cfg.num_layers
    )


def _logits(job: Job, mesh: MeshSizes, params: list[Parameter]) -> Number:
    """The head's weights gathered, in their dtype and in float32, and its gradient in float32."""
    heads = [p for p in params if p.name.startswith(("head", "embed"))]
    whole = max(p.local * math.prod(mesh[a] for a in p.gathered_over) for p in heads)
    return whole * (1 + 2 * 4 / itemsize(job.model.param_dtype))


def _cache(job: Job, mesh: MeshSizes) -> Number:
    """KV of `length` tokens and one float32 state a lightning layer, for the device's rows."""
    cfg = job.model
    rows = job.batch / (mesh["data"] * mesh["expert"])
    keys = job.length / mesh["context"] * 2 * cfg.num_kv_heads * cfg.head_dim * itemsize(cfg.dtype)
    state = cfg.num_heads * cfg.head_dim**2 * 4
    layers = cfg.kinds.count(SOFTMAX) * keys + cfg.kinds.count(LIGHTNING) * state
    return rows * layers / mesh["model"]


def itemsize(dtype: str) -> int:
    """Bytes of one value."""
    return jnp.dtype(dtype).itemsize


def active_parameters(cfg: ModelConfig) -> tuple[int, int, int]:
    """Parameters in all, those that a token meets, and those without embedding and head.

    MiniMax-01: 456B, and 45.9B without embedding and head (section 2).
    """
    _, params = abstract_params(cfg)
    total = active = ends = 0
    for path, variable in nnx.to_flat_state(params):
        size = math.prod(variable.get_value().shape)
        total += size
        if "experts" in variable.get_metadata("axes"):
            size = size * cfg.num_experts_per_token // cfg.num_experts
        active += size
        if path[0] in ("embed", "head"):
            ends += size
    return total, active, active - ends
