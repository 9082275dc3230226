"""Sequences shared over `context`, and every attention call on a mesh, against one device."""

import functools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch, lightning_attention
from kernels_pallas.lightning_attention.clock import number_segments
from mmjax.cache import HybridCache
from mmjax.convert.params import by_name
from mmjax.layers import softmax as softmax_layer
from mmjax.layers.attention import SoftmaxAttention
from mmjax.layers.lightning import LightningAttention, decay_rates
from mmjax.layers.moe import MoE, RouterStats
from mmjax.layers.softmax import softmax_attention
from mmjax.model import Decoder
from mmjax.parallel import sequence
from mmjax.sharding import MESH_AXES, ShardingError, make_mesh, param_shardings
from tests.mmjax.programs import empty_cache, forward, random_model, small_config, tokens
from train.losses import cross_entropy, token_logprobs

BOTH = ("data", "expert")
# XLA's CPU compiler optimises for minutes what runs here for milliseconds.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def mesh_of(**shape):
    return make_mesh(shape, jax.devices()[: math.prod(shape.values())])


def run(f, *args):
    return jax.jit(f).lower(*args).compile(QUICK)(*args)


def relative(actual, expected):
    """Norm of the difference over the norm of what is expected."""
    difference = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
    return np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-30)


# One op at a time.

# Rows of 32 tokens in four stretches: what can happen at a border, and between two.
ROWS = [
    "1111 1111|1111 1111|1111 1111|1111 1111",  # One document.
    "1111 1122|2222 2222|2222 2333|3344 4444",  # Documents cross, one fills a stretch.
    "1111 1111|2222 2222|1111 1111|1111 1111",  # Cuts at borders; an id that comes again.
    "1111 1100|0000 0000|0000 0011|1111 2222",  # Padding in the middle lets the state through.
    "1111 1100|0000 0000|0000 0022|2222 2222",  # And does not hide a new document.
    "0000 0000|0000 5555|5555 5555|5550 0000",  # Padding first and last.
    "1112 2211|1111 1111|1221 1221|1111 1111",  # Stretches that end in the id they began with.
    "0000 0000|0000 0000|0000 0000|0000 0000",  # No token at all.
    "3333 3333|3300 0033|1111 1111|0000 0000",  # Padding inside a document; a row that ends early.
]
IDS = np.array([[int(c) for c in row if c.isdigit()] for row in ROWS], np.int32)
# No decay, a rate that rounds away in exp(-s), ordinary ones, one that forgets at once.
DECAY = np.array([0, 1e-8, 0.1, 0.9], np.float32)


def arrays(*names, batch=9, length=32, heads=4, dim=8):
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(("q", "k", "v", "d_out"), (batch, length, heads, dim))
    shapes |= dict.fromkeys(("state", "d_state"), (batch, heads, dim, dim))
    return [rng.standard_normal(shapes[name]).astype(np.float32) for name in names]


@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "from a state"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
def test_lightning_over_context(packed, given):
    """Outputs, the rows' last states, and all gradients."""
    ids = jnp.asarray(IDS) if packed else None
    inputs = arrays("q", "k", "v", *["state"] * given)
    d_out, d_state = arrays("d_out", "d_state")
    decay = jnp.asarray(DECAY)

    def outputs_and_gradients(attend):
        def f(inputs, d_out, d_state):
            out, pull = jax.vjp(attend, *inputs)
            return *out, *pull((d_out, d_state))

        return f

    def whole(q, k, v, state=None):
        kwargs = {"segment_ids": ids, "initial_state": state, "implementation": "reference"}
        return lightning_attention(q, k, v, decay, **kwargs)

    def shared(q, k, v, state=None):
        return sequence.lightning(q, k, v, decay, segment_ids=ids, state=state)

    expected = run(outputs_and_gradients(whole), inputs, d_out, d_state)
    with jax.set_mesh(mesh_of(context=4)):
        actual = run(outputs_and_gradients(shared), inputs, d_out, d_state)
    names = ("out", "last state", "d_q", "d_k", "d_v", "d_state")
    for name, got, want in zip(names, actual, expected, strict=False):
        assert relative(got, want) < 2e-6, name
    if packed:
        assert not np.asarray(actual[0])[IDS == 0].any()


@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
def test_softmax_over_context(packed, monkeypatch):
    """In the blocked form, outputs and all gradients."""
    monkeypatch.setattr(softmax_layer, "DENSE_SCORES", 0)
    monkeypatch.setattr(softmax_layer, "BLOCK", 4)
    ids = jnp.asarray(IDS) if packed else None
    place = jnp.tile(jnp.arange(IDS.shape[1], dtype=jnp.int32), (len(ROWS), 1))
    index = jnp.where(IDS != 0, place, -1) if packed else place
    q, k, v, d_out = arrays("q", "k", "v", "d_out")

    def outputs_and_gradients(attend):
        def f(q, k, v, d_out):
            out, pull = jax.vjp(attend, q, k[:, :, ::2], v[:, :, ::2])
            return out, *pull(d_out)

        return f

    def whole(q, k, v):
        return softmax_attention(q, k, v, index, query_segments=ids, key_segments=ids)

    def shared(q, k, v):
        return sequence.softmax(q, k, v, index, ids)

    expected = run(outputs_and_gradients(whole), q, k, v, d_out)
    with jax.set_mesh(mesh_of(context=4, model=2)):
        actual = run(outputs_and_gradients(shared), q, k, v, d_out)
    for name, got, want in zip(("out", "d_q", "d_k", "d_v"), actual, expected, strict=True):
        assert relative(got, want) < 2e-6, name


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_balance(ranks):
    """Every rank attends for queries that see equally many keys, and each query comes back."""
    length = 4 * ranks
    row = jnp.arange(length, dtype=jnp.int32)[None]

    def body(mine, whole):
        moved = sequence._balance(mine, "context")
        cut = sequence._balanced_part(whole, "context")
        work = jnp.sum(moved + 1)[None]
        return sequence._unbalance(moved, "context"), moved - cut, work

    split = P(None, "context")
    with jax.set_mesh(mesh_of(context=ranks)):
        run_all = jax.shard_map(
            body, in_specs=(split, P()), out_specs=(split, split, P("context")), check_vma=False
        )
        back, difference, work = jax.jit(run_all)(row, row)
    np.testing.assert_array_equal(back, row)
    assert not difference.any()
    assert set(np.asarray(work).tolist()) == {length * (length + 1) // 2 // ranks}


def test_keys_after_the_queries_are_not_read(monkeypatch):
    """A late block of queries stops at its diagonal as an early one does."""
    monkeypatch.setattr(softmax_layer, "DENSE_SCORES", 0)
    monkeypatch.setattr(softmax_layer, "BLOCK", 4)
    q, k, v = arrays("q", "k", "v", batch=1)
    k[:, 24:], v[:, 24:] = np.nan, np.nan
    index = jnp.asarray([[4, 5, 6, 7, 20, 21, 22, 23]], jnp.int32)
    grads = jax.grad(lambda *x: softmax_attention(*x, index).sum(), (0, 1, 2))(q[:, :8], k, v)
    assert all(np.isfinite(g).all() for g in grads)


# Kernels: inside, arrays are local, so that the platform's own can be taken.


@pytest.mark.parametrize("length", [1, 16])
def test_kernels_see_local_arrays(length, monkeypatch):
    seen = []

    def spy(attend):
        def attend_and_tell(q, *args, **kwargs):
            seen.append((q.shape, dispatch.target(q).spread))
            return attend(q, *args, **kwargs)

        return attend_and_tell

    for name in ("lightning_attention", "lightning_attention_step"):
        monkeypatch.setattr(sequence, name, spy(getattr(sequence, name)))
    q, k, v, state = arrays("q", "k", "v", "state", batch=2, length=length)

    def attend(q, k, v, state):
        return sequence.lightning(q, k, v, jnp.asarray(DECAY), segment_ids=None, state=state)

    with jax.set_mesh(mesh_of(data=2, context=2, model=2)):
        jax.eval_shape(attend, q, k, v, state)
    assert seen == [((1, 8, 2, 8) if length > 1 else (1, 2, 8), False)]


def test_kernels_for_tpu_are_in_the_program():
    device = AbstractDevice("TPU v5p", 1, "tpu")
    sizes = {"data": 1, "context": 2, "expert": 1, "model": 2}
    mesh = AbstractMesh(
        tuple(sizes.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(sizes),
        abstract_device=device,
    )
    split = NamedSharding(mesh, P(None, "context", "model", None))
    x = jax.ShapeDtypeStruct((1, 1024, 4, 128), jnp.bfloat16, sharding=split)

    def attend(q, k, v):
        return sequence.lightning(q, k, v, jnp.asarray(DECAY), segment_ids=None, state=None)

    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(attend).trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text


# What goes over the wires.

BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}


def collectives(text):
    """[(kind, [type and shape of each result])] of compiled HLO; those of one device left out."""
    found = []
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for match in re.finditer(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        found.append((match[2], re.findall(r"(\w+\[[\d,]*\])", match[1])))
    return found


def size(shape):
    kind, dims = re.fullmatch(r"(\w+)\[([\d,]*)\]", shape).groups()
    return BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d)


def compiled_layer(kind, batch, length):
    """HLO of one attention layer's gradient with respect to parameters and input, context=4."""
    cfg = small_config()
    structure, state = nnx.split(nnx.eval_shape(lambda: kind(cfg, nnx.Rngs(0))))
    mesh = mesh_of(context=4)
    rows = NamedSharding(mesh, P(None, "context"))
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())), state
    )
    x = jax.ShapeDtypeStruct((batch, length, cfg.hidden_size), jnp.float32, sharding=rows)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=rows)

    def loss(params, x, ids):
        layer = nnx.merge(structure, params)
        if kind is LightningAttention:
            rates = jnp.asarray(decay_rates(cfg.num_heads, 8)[0])
            out, _ = layer(x, rates, segment_ids=ids, state=None)
        else:
            angles = jnp.zeros((batch, length, cfg.rotary_dim // 2))
            out = layer(x, angles, segment_ids=ids)
        return jnp.sum(out**2)

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, (0, 1))).trace(params, x, ids).lower().compile(QUICK)
    return cfg, collectives(program.as_text())


def of_kind(found, *kinds):
    return sorted(shape for kind, shapes in found if kind in kinds for shape in shapes)


def test_a_lightning_layer_gathers_states_and_not_the_sequence():
    batch, length = 2, 512
    cfg, found = compiled_layer(LightningAttention, batch, length)
    h, d = cfg.num_heads, cfg.head_dim
    assert of_kind(found, "all-gather") == [f"f32[4,{batch},{h},{d},{d}]", f"s32[4,4,{batch}]"]
    assert of_kind(found, "reduce-scatter") == [f"f32[1,{batch},{h},{d},{d}]"]
    assert not of_kind(found, "all-to-all", "collective-permute")
    # The gradients of the weights, which each rank has for its tokens; the largest is qkv's.
    largest = max(map(size, of_kind(found, "all-reduce")))
    assert largest == 4 * cfg.hidden_size * 3 * h * d < 4 * batch * length // 4 * cfg.hidden_size


def test_a_softmax_layer_gathers_keys_and_moves_queries_once():
    batch, length = 2, 512
    cfg, found = compiled_layer(SoftmaxAttention, batch, length)
    h, g, d = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    gathered = [x for x in of_kind(found, "all-gather") if x.startswith("f32")]
    assert gathered == [f"f32[{batch},{length},{g},{d}]"] * 2
    # Segment ids and places, whole on every rank.
    whole = 4 * batch * length
    assert all(size(x) <= whole for x in of_kind(found, "all-gather") if x not in gathered)
    assert of_kind(found, "reduce-scatter") == [f"f32[{batch},{length // 4},{g},{d}]"] * 2
    # Two halves of queries, outputs, and of the gradient of each.
    assert of_kind(found, "collective-permute") == [f"f32[{batch},{length // 8},{h},{d}]"] * 8
    assert not of_kind(found, "all-to-all")


# Whole models.


def wide_config(**overrides):
    """Two layers, both kinds, which every mesh of up to eight devices divides."""
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 8,
        "num_experts": 8,
        "num_experts_per_token": 4,
        "layer_types": ("lightning", "softmax"),
    }
    return small_config(**values | overrides)


@functools.cache
def wide_model(remat="none"):
    model = random_model(wide_config())
    model.remat = remat
    return model


def packed_batch(cfg):
    """Eight rows of 16 tokens: the first halves of ROWS and the second, as far as they go."""
    ids = jnp.asarray(IDS[[1, 3, 4, 6]].reshape(8, 16))
    positions, _ = number_segments(ids)
    return {
        "tokens": tokens(cfg, *ids.shape),
        "segment_ids": ids,
        "positions": positions,
        "loss_mask": jnp.ones(ids.shape, jnp.float32),
    }


def loss_and_grads(structure, params, batch):
    """As in training; also the final norm's output, to see how it lies."""

    def loss(params):
        model = nnx.merge(structure, params)
        out = model(
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            compute_logits=False,
        )
        logp = token_logprobs(model, out.hidden, jnp.roll(batch["tokens"], -1, axis=1))
        ce = cross_entropy(logp, (batch["segment_ids"] != 0).astype(jnp.float32))
        return ce + out.aux.load_balancing_loss, out.hidden

    (value, hidden), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, grads, hidden


OPTIMIZER = optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)


@jax.jit
@jax.numpy_dtype_promotion("standard")  # Optax counts in int32 and multiplies by floats.
def updated(params, grads):
    updates, _ = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
    return optax.apply_updates(params, updates)


@functools.cache
def on_one_device():
    structure, params = nnx.split(wide_model())
    value, grads, _ = run(partial(loss_and_grads, structure), params, packed_batch(wide_config()))
    return value, grads, updated(params, grads)


def placed(mesh, model, batch):
    """The model's definition, its parameters and a batch, where they lie on the mesh."""
    structure, params = nnx.split(model)
    rows = NamedSharding(mesh, P(BOTH, "context"))
    params = jax.device_put(params, param_shardings(params, mesh))
    return structure, params, jax.device_put(batch, rows)


def assert_same_tensors(actual, expected, what):
    expected = by_name(expected)
    for name, variable in by_name(actual).items():
        error = relative(variable.get_value(), expected[name].get_value())
        assert error < 1e-5, f"{what} of {name} is off by {error:.3g}"


# Each axis at sizes 2 and 4; alone at size 8 with the slow tests.
SHAPES = [
    {"data": 4, "context": 2},
    {"context": 4, "model": 2},
    {"data": 2, "expert": 4},
    {"expert": 2, "model": 4},
]
ALONE = [{axis: 8} for axis in ("context", "expert", "model")]
SHAPES += [pytest.param(shape, marks=pytest.mark.slow) for shape in ALONE]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: ",".join(f"{a}={n}" for a, n in s.items()))
def test_a_step_on_a_mesh_is_that_of_one_device(shape):
    """Loss, gradient of every tensor, and the parameters after one update of AdamW."""
    value, grads, after = on_one_device()
    mesh = mesh_of(**shape)
    with jax.set_mesh(mesh):
        structure, params, batch = placed(mesh, wide_model(), packed_batch(wide_config()))
        actual, actual_grads, hidden = run(partial(loss_and_grads, structure), params, batch)
    assert relative(actual, value) < 1e-5
    assert_same_tensors(actual_grads, grads, "the gradient")
    local = jax.tree.map(np.asarray, actual_grads)
    assert_same_tensors(updated(nnx.state(wide_model()), local), after, "the update")
    spread = NamedSharding(mesh, P(BOTH, "context", None))
    assert hidden.sharding.is_equivalent_to(spread, hidden.ndim), hidden.sharding


def test_an_update_on_the_mesh():
    """Gradient and update in one program, super-blocks recomputed; everything stays in place."""
    value, _, after = on_one_device()
    mesh = mesh_of(data=2, context=2, model=2)

    def step(structure, params, batch):
        value, grads, _ = loss_and_grads(structure, params, batch)
        return value, updated(params, grads)

    with jax.set_mesh(mesh):
        inputs = placed(mesh, wide_model("super_block"), packed_batch(wide_config()))
        actual, params = run(partial(step, inputs[0]), *inputs[1:])
    assert relative(actual, value) < 1e-5
    assert_same_tensors(params, after, "the update")
    before = by_name(inputs[1])
    for name, variable in by_name(params).items():
        x, old = variable.get_value(), before[name].get_value()
        assert x.sharding.is_equivalent_to(old.sharding, x.ndim), (name, x.sharding)


def test_a_model_moves_weights_keys_and_states_alone(monkeypatch):
    """Around the experts, which have collectives of their own, no activation is gathered."""

    def no_experts(self, x, real, **_):
        zeros, zero = jnp.zeros(self.w1.shape[0]), jnp.zeros(())
        return x, RouterStats(zeros, zeros, zero, zero, jnp.zeros((*x.shape[:2], 1)))

    monkeypatch.setattr(MoE, "__call__", no_experts)
    cfg, batch, length = wide_config(num_kv_heads=2), 4, 256
    mesh = mesh_of(data=2, context=2, model=2)
    rows = jnp.ones((batch, length), jnp.int32)
    with jax.set_mesh(mesh):
        inputs = {"tokens": rows, "segment_ids": rows, "positions": rows}
        structure, params, inputs = placed(mesh, random_model(cfg), inputs)
        program = jax.jit(partial(loss_and_grads, structure)).lower(params, inputs).compile(QUICK)
    found = collectives(program.as_text())
    keys = 4 * batch // 2 * length * cfg.num_kv_heads // 2 * cfg.head_dim
    qkv = 4 * cfg.hidden_size * 3 * cfg.num_heads // 2 * cfg.head_dim
    hidden = 4 * batch // 2 * length // 2 * cfg.hidden_size  # Of one device.
    moved = of_kind(found, "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    assert max(map(size, moved)) == max(keys, qkv) < hidden
    # Sums over `model` of what its ranks add to the residual stream.
    assert max(map(size, of_kind(found, "all-reduce"))) == hidden


# With a cache.


def prefill_and_decode(model, ids, length):
    """Logits of all tokens, the first `length` at once and the others one by one; the cache."""
    cache = HybridCache.create(model.cfg, ids.shape[0], ids.shape[1])
    out = model(ids[:, :length], cache=cache)
    logits = [out.logits]
    for t in range(length, ids.shape[1]):
        out = model(ids[:, t : t + 1], cache=out.cache)
        logits.append(out.logits)
    return jnp.concatenate(logits, axis=1), out.cache


@functools.cache
def prompts():
    """Four rows of nine tokens, and their logits on one device."""
    ids = tokens(wide_config(), 4, 9)
    return ids, forward(wide_model(), ids).logits


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ({"data": 2, "expert": 2, "model": 2}, 4),
        ({"model": 8}, 1),
        ({"context": 2, "model": 4}, 1),
    ],
    ids=str,
)
def test_decoding_on_a_mesh(shape, rows):
    """The same logits; states over batch and heads, keys over batch and KV heads."""
    model = wide_model()
    ids, expected = (x[:rows] for x in prompts())
    mesh = mesh_of(**shape)
    with jax.set_mesh(mesh):
        structure, params, _ = placed(mesh, model, {})
        logits, cache = run(
            lambda params, ids: prefill_and_decode(nnx.merge(structure, params), ids, 8),
            params,
            ids,
        )
    assert relative(logits, expected) < 1e-5
    batch = BOTH if rows > 1 else None
    state, keys = P(None, batch, "model"), P(None, batch, None, "model")
    for x, spec in ((cache.state, state), (cache.keys, keys), (cache.values, keys)):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), x.sharding


def test_an_empty_cache_is_spread():
    mesh = mesh_of(data=2, model=2)
    with jax.set_mesh(mesh):
        cache = empty_cache(wide_model(), 4, 8)
    spec = P(None, BOTH, None, "model")
    assert cache.keys.sharding.is_equivalent_to(NamedSharding(mesh, spec), cache.keys.ndim)


# What does not fit.


def test_a_sequence_that_does_not_split():
    ids = jnp.zeros((1, 12), jnp.int32)
    message = "sequences of 12 tokens cannot be split over context=4: pad them to a multiple of 8"
    with jax.set_mesh(mesh_of(context=4)), pytest.raises(ShardingError, match=message):
        jax.eval_shape(wide_model(), ids)


@pytest.mark.parametrize(
    ("kind", "heads", "message"),
    [("lightning", 4, "4 heads"), ("softmax", 8, "4 kv_heads")],
)
def test_heads_that_do_not_split(kind, heads, message):
    cfg = wide_config(num_heads=heads, num_kv_heads=4, layer_types=(kind,) * 2)
    model = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    message += " cannot be spread over model=8; choose a size of `model` that divides 4"
    with jax.set_mesh(mesh_of(model=8)), pytest.raises(ShardingError, match=message):
        nnx.eval_shape(lambda m: m(jnp.zeros((1, 4), jnp.int32)).logits, model)
