"""Experts over the mesh against one device: outputs, statistics, gradients, what travels."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.config import ConfigError
from mmjax.layers.moe import MoE, load_balancing_loss
from mmjax.parallel import experts
from mmjax.sharding import ShardingError, make_mesh, param_shardings
from tests.mmjax.programs import (
    empty_cache,
    extend,
    random_model,
    small_config,
    tokens,
    with_config,
)
from train.step import router_metrics

BATCH, LENGTH, EXPERTS, D, F = 8, 6, 8, 16, 12
# Compiles in half the time.
QUICK = {"xla_backend_optimization_level": 0}
ROUTINGS = ("even", "one expert takes all", "an expert takes none")


@functools.cache
def layer(**overrides):
    sizes = {"num_experts": EXPERTS, "hidden_size": D, "intermediate_size": F}
    return nnx.split(MoE(small_config(**sizes | overrides), nnx.Rngs(0)))


def inputs(batch=BATCH, length=LENGTH):
    """x, the output's cotangent, and which tokens are real; x[..., 0] is one."""
    rng = np.random.default_rng(1)
    x, d_out = rng.standard_normal((2, batch, length, D)).astype(np.float32)
    x[..., 0] = 1
    return jnp.asarray(x), jnp.asarray(d_out), jnp.asarray(rng.random((batch, length)) < 0.8)


def with_routing(params, kind):
    """The router's parameters with a bias, on the input that is one."""
    bias = np.zeros(EXPERTS, np.float32)
    if kind == "one expert takes all":
        bias[[5, 2]] = 9, 7
    elif kind == "an expert takes none":
        bias[3] = -9
    router = params["router"].get_value().at[0].set(bias)
    return nnx.State({**params, "router": params["router"].replace(router)})


def program(structure):
    """(output, statistics), and gradients in the parameters and x."""

    def loss(params, x, d_out, real):
        out, stats = nnx.merge(structure, params)(x, real, training=True)
        visits, probability = stats.tokens_per_expert[None], stats.probability_sum[None]
        aux = load_balancing_loss(visits, probability, real.sum().astype(jnp.float32))
        return (out * d_out).sum() + aux, (out, stats, aux)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)


def on_mesh(structure, params, args, shape):
    """The compiled program on the first devices, and what runs it."""
    mesh = make_mesh(shape, jax.devices()[: math.prod(shape.values())])
    whole = NamedSharding(mesh, P())

    def place(params, *args):
        return jax.device_put(params, param_shardings(params, mesh)), *jax.device_put(args, whole)

    with jax.set_mesh(mesh):
        compiled = jax.jit(program(structure)).lower(*place(params, *args)).compile(QUICK)
    return compiled, lambda *args: compiled(*place(*args))


@functools.cache
def on_one_device(**overrides):
    return jax.jit(program(layer(**overrides)[0]), compiler_options=QUICK)


def assert_same(actual, expected, tolerance=1e-5):
    """Each tensor within 1e-5 of the other's norm."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
    for (path, want), got in pairs:
        want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
        error = np.linalg.norm(got - want)
        assert error <= tolerance * np.linalg.norm(want), (jax.tree_util.keystr(path), error)


@pytest.fixture
def always_exchange(monkeypatch):
    monkeypatch.setattr(experts, "FEW_TOKENS", 0)


@pytest.fixture
def one_part(monkeypatch):
    """Compiles faster."""
    monkeypatch.setattr(experts, "PARTS", 1)


# Two, four and eight devices exchange, in so many parts.
MESHES = [
    ({"expert": 8}, 1),
    ({"data": 2, "expert": 2, "model": 2}, 2),
    ({"context": 2, "expert": 4}, 1),
]


@pytest.mark.parametrize(("shape", "parts"), MESHES, ids=str)
@pytest.mark.usefixtures("always_exchange")
def test_like_one_device(monkeypatch, shape, parts):
    monkeypatch.setattr(experts, "PARTS", parts)
    structure, params = layer()
    args = inputs()
    _, run = on_mesh(structure, params, args, shape)
    for kind in ROUTINGS:
        biased = with_routing(params, kind)
        expected = on_one_device()(biased, *args)
        visits = expected[1][1].tokens_per_expert
        assert (int(visits[5]) == int(args[2].sum())) == (kind == "one expert takes all")
        assert int(visits[3]) == 0 or kind != "an expert takes none"
        assert_same(run(biased, *args), expected)


@pytest.mark.usefixtures("always_exchange", "one_part")
def test_ragged_exchange(monkeypatch):
    """What TPUs run, with the collective's documented meaning in its place."""
    plan = experts._plan
    monkeypatch.setattr(experts, "_plan", lambda *args: plan(*args)._replace(ragged=True))
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    structure, params = layer()
    args = inputs()
    _, run = on_mesh(structure, params, args, {"expert": 4})
    for kind in ROUTINGS[:2]:
        biased = with_routing(params, kind)
        assert_same(run(biased, *args), on_one_device()(biased, *args))


def ragged_all_to_all(
    operand, output, *, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name
):
    """Receiver r's rows at output_offsets[r] are the sender's at input_offsets[r]."""
    here = jax.lax.axis_index(axis_name)
    sent = (operand, input_offsets, send_sizes, output_offsets)
    rows, starts, sizes, places = (jax.lax.all_gather(a, axis_name) for a in sent)
    row = jnp.arange(operand.shape[0], dtype=jnp.int32)
    for sender in range(send_sizes.size):
        part = row < sizes[sender, here]
        to = jnp.where(part, row + places[sender, here], output.shape[0])
        moved = rows[sender][jnp.minimum(row + starts[sender, here], row.size - 1)]
        output = output.at[to].set(moved, mode="drop")
    return jnp.where(jnp.all(sizes[:, here] == recv_sizes), output, jnp.nan)


@pytest.mark.usefixtures("always_exchange")
def test_uneven_parts(monkeypatch):
    monkeypatch.setattr(experts, "PARTS", 3)
    structure, params = layer()
    args = inputs(4, 7)  # 7 tokens a device
    mesh = make_mesh({"expert": 4}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        out = forward(structure)(params, *args)
    assert_same(out, forward(structure)(params, *args))


def forward(structure):
    call = lambda params, x, _, real: nnx.merge(structure, params)(x, real, training=True)  # noqa: E731
    return jax.jit(call, compiler_options=QUICK)


@pytest.mark.parametrize(
    ("shape", "batch", "length"),
    [
        ({"data": 2, "expert": 2, "model": 2}, 4, 3),  # gathered over `expert`
        ({"data": 2, "expert": 4}, 2, 3),  # rows divide over `data` alone
        ({"context": 2, "expert": 2, "model": 2}, 1, 1),  # one token on every device
    ],
    ids=["gathered", "over data", "everywhere"],
)
def test_few_tokens(shape, batch, length):
    structure, params = layer()
    args = inputs(batch, length)
    compiled, run = on_mesh(structure, params, args, shape)
    assert not collectives(compiled, "all-to-all")
    assert_same(run(params, *args), on_one_device()(params, *args))


def collectives(compiled, name):
    """Elements that each of a program's collectives of one kind yields, by dtype."""
    found = []
    for result in re.findall(rf" = (.*?) {name}(?:-start)?\(", compiled.as_text()):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        sizes = [math.prod(map(int, dims.split(","))) if dims else 1 for _, dims in arrays]
        found.append((arrays[0][0], sum(sizes)))
    return found


@pytest.mark.usefixtures("one_part")
def test_what_travels():
    """Room for the token-slots, this device's experts, the router; nothing of all devices'."""
    structure, params = layer()
    args = inputs(8, 72)  # 72 tokens a device
    compiled, _ = on_mesh(structure, params, args, {"data": 2, "expert": 4})
    own_experts, router = EXPERTS // 4 * D * F, EXPERTS * D
    room = math.ceil(experts.HEADROOM * 72 / experts.PARTS * 2 / 4)
    exchanged = set(collectives(compiled, "all-to-all"))
    assert exchanged == {("f32", 4 * room * D), ("s32", 4 * room)}
    gathered = collectives(compiled, "all-gather")
    assert {n for _, n in gathered} == {own_experts, router}
    scattered = collectives(compiled, "reduce-scatter")
    assert {n for _, n in scattered} == {own_experts // 2}


def numpy_dropped(params, x, real, capacity):
    """Token after token, in float64: each of its experts takes it while it has room."""
    w = {n: np.asarray(v.get_value(), np.float64) for n, v in params.items()}
    x = np.asarray(x, np.float64).reshape(-1, D)
    taken, dropped, out = np.zeros(EXPERTS, int), 0, np.zeros_like(x)
    for n in np.flatnonzero(np.asarray(real).reshape(-1)):
        logits = x[n] @ w["router"]
        chosen = np.argsort(-logits)[:2]
        share = np.exp(logits[chosen] - logits.max())
        for e, weight in zip(chosen, share / share.sum(), strict=True):
            if taken[e] == capacity:
                dropped += 1
                continue
            taken[e] += 1
            gate, up = x[n] @ w["w1"][e], x[n] @ w["w3"][e]
            out[n] += weight * (gate / (1 + np.exp(-gate)) * up) @ w["w2"][e]
    return out.reshape(*real.shape, D), dropped


@pytest.mark.usefixtures("always_exchange", "one_part")
def test_capacity():
    """The same visits are dropped on one device, on any mesh, and in a plain loop."""
    structure, params = layer(expert_capacity_factor=0.75)
    params = with_routing(params, "an expert takes none")
    args = inputs()
    expected, dropped = numpy_dropped(params, args[0], args[2], capacity=9)  # 0.75 · 48 · 2 / 8
    assert dropped > 5
    one = jax.jit(program(structure), compiler_options=QUICK)(params, *args)
    out, stats, _ = one[1]
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
    assert stats.dropped == dropped
    _, run = on_mesh(structure, params, args, {"data": 2, "context": 2, "expert": 2})
    assert_same(run(params, *args), one)
    for shape in ({"expert": 8}, {"data": 4, "context": 2}):
        with jax.set_mesh(make_mesh(shape)):
            assert_same(forward(structure)(params, *args), (out, stats))


def test_capacity_is_for_training():
    """Metrics report what is dropped; with a cache nothing is, whatever the batch."""
    model = random_model(small_config(num_layers=1, layer_types=("lightning",)))
    tight = with_config(model, expert_capacity_factor=0.5)
    ids = tokens(model.cfg, 2, 12)
    aux = nnx.jit(lambda model: model(ids).aux)(tight)
    load = np.asarray(aux.tokens_per_expert)
    share = np.maximum(load - 6, 0).sum(1) / load.sum(1)  # 0.5 · 24 · 2 / 4
    np.testing.assert_allclose(aux.dropped_share, share, rtol=1e-6)
    np.testing.assert_allclose(router_metrics(aux)["router/dropped"], share.mean(), rtol=1e-6)
    cached = [extend(m, ids, empty_cache(m, 2, 12))[0] for m in (model, tight)]
    np.testing.assert_array_equal(*cached)


def test_negative_capacity():
    with pytest.raises(ConfigError, match=r"expert_capacity_factor must be 0 .* got -1"):
        small_config(expert_capacity_factor=-1.0)


def test_mesh_that_does_not_divide_the_experts():
    cfg = small_config(num_experts=6)
    mesh = make_mesh({"expert": 4, "model": 2})
    message = "experts: num_experts 6 over expert=4; choose"
    with jax.set_mesh(mesh), pytest.raises(ShardingError, match=message):
        jax.eval_shape(lambda: MoE(cfg, nnx.Rngs(0))(jnp.zeros((8, 2, cfg.hidden_size)), None))
