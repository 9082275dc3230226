"""The plan: its counts beside the compiler's and the papers', its train step beside train's, its
messages."""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from mmjax import cli
from mmjax.cache import HybridCache
from mmjax.config import ModelConfig
from mmjax.model import Decoder
from mmjax.plan import CHIPS, Job, PlanError, best_meshes, counts, curve, estimate, parse_topology
from mmjax.plan.ahead import Compiled, compile_ahead
from mmjax.plan.estimate import Reinforcement, generation
from mmjax.plan.job import read_request
from mmjax.plan.programs import State, make_program, serve_step, train_step
from mmjax.sharding import MESH_AXES, make_mesh, param_shardings
from tests.train.programs import adamw, tiny_model
from train.state import init_state
from train.step import language_step

M1 = ModelConfig.minimax_m1()
ONE = dict.fromkeys(MESH_AXES, 1)
POD = parse_topology("v5p:8x8x8")
# Wide enough that element-wise work is small beside the products, one expert so that each token
# visits all, no loop and no dense-or-blocked choice left to the compiler.
PRODUCTS = ModelConfig.tiny(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    layer_types=("lightning", "softmax"),
    num_heads=4,
    head_dim=64,
    rotary_dim=16,
    num_experts=1,
    num_experts_per_token=1,
)


def xla_flops(f, *args):
    """FLOPs that XLA counts in f."""
    return jax.jit(f).lower(*args).cost_analysis()["flops"]


def counted(job, direction):
    works = counts.device_work(job, ONE, CHIPS["h200"])
    if direction == "forward":
        return sum(w.forward for w in works)
    return sum(w.forward + w.backward for w in works)


def abstract(cfg):
    return nnx.split(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0), remat="none")))


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
def test_flops_are_the_compilers(direction):
    job = Job("train", PRODUCTS, batch=2, length=64, remat="none")
    tokens = jnp.zeros((job.batch, job.length), jnp.int32)
    graphdef, params = abstract(PRODUCTS)

    def loss(params):
        out = nnx.merge(graphdef, params)(tokens)
        return out.logits.sum() + out.aux.load_balancing_loss

    f = loss if direction == "forward" else jax.value_and_grad(loss)
    # XLA adds element-wise work: norms, SiLU and softmax. What it leaves out is the last state of
    # the lightning layer, which nothing reads.
    assert xla_flops(f, params) == pytest.approx(counted(job, direction), rel=0.03)


def test_flops_of_a_decode_step_are_the_compilers():
    job = Job("decode", PRODUCTS, batch=4, length=256)
    graphdef, params = abstract(PRODUCTS)
    cache = jax.eval_shape(lambda: HybridCache.create(PRODUCTS, job.batch, job.length))
    tokens = jnp.zeros((job.batch, 1), jnp.int32)
    found = xla_flops(lambda *a: serve_step(graphdef, *a), cache, params, tokens)
    assert found == pytest.approx(counted(job, "forward"), rel=0.03)


def test_parameters_and_flops_are_the_papers():
    total, _, inner = counts.active_parameters(M1)
    assert total == 456_089_655_296
    assert round(inner / 1e9, 1) == 45.9
    job = Job("train", M1, batch=512, length=8192)
    mesh = {"data": 16, "expert": 32}
    # 6 N D, and what it leaves out: the head, and attention itself.
    ratio = estimate(job, POD, mesh).flops_model / (6 * inner * job.new_tokens)
    assert 1 < ratio < 1.06
    # MiniMax-01 counts 72 b n l d² (attention 1 / 2h a lightning layer) with blocks of 2 K tokens.
    k = M1.head_dim
    work = counts.device_work(Job("train", M1, 1, 2 * k), ONE, CHIPS["v5p"])
    (core,) = [w for w in work if w.name == "lightning core"]
    assert core.forward == pytest.approx(12 * k * k * M1.num_heads * 70 * 2 * k)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_head_multiplies_in_the_dtype_of_its_operands(dtype):
    """As `mmjax.layers.embed.product_dtype` has it; the router is in float32 in any model."""
    model = dataclasses.replace(M1, param_dtype=dtype)
    work = counts.device_work(Job("train", model, 512, 8192), ONE, CHIPS["v5p"])
    exact = {w.name for w in work if w.exact}
    assert exact == ({"router"} if dtype == "bfloat16" else {"router", "head"})


@pytest.mark.parametrize(("remat", "passes"), [("none", 1), ("layer", 2), ("super_block", 3)])
def test_recomputing_costs_forward_passes(remat, passes):
    spent = {}
    for policy in ("none", remat):
        job = Job("train", M1, 512, 8192, policy)
        work = counts.device_work(job, ONE, CHIPS["v5p"])
        spent[policy] = sum(w.forward * w.passes for w in work if w.name != "head")
    assert spent[remat] == pytest.approx(passes * spent["none"])


def test_memory_of_a_mesh():
    job = Job("train", M1, 512, 8192)
    parts = estimate(job, POD, {"data": 16, "expert": 32}).memory
    # Everything but the norms' scales is spread over all 512 chips, in bf16.
    assert parts["parameters"] == pytest.approx(2 * 456.09e9 / 512, rel=0.01)
    assert parts["optimizer"] == 2 * parts["gradients"] == 2 * parts["parameters"]
    wide = Job("train", M1, 512, 8192, moments="float32")
    assert estimate(wide, POD, {"data": 16, "expert": 32}).memory["optimizer"] == (
        2 * parts["optimizer"]
    )
    decode = Job("decode", M1, 32, 1_000_000)
    slice_ = parse_topology("v6e:16x16")
    cache = estimate(decode, slice_, {"expert": 32, "model": 8}).memory["cache"]
    # 40.96 GB of keys and values and 280 MiB of states, over eight chips' heads.
    assert cache == pytest.approx((40.96e9 + 280 * 2**20) / 8)


def test_arguments_are_the_programs():
    """What is counted for parameters, optimizer and cache is what the program takes."""
    mesh = {"data": 2, "context": 1, "expert": 2, "model": 2}
    topology = parse_topology("h200:8")
    for kind in ("train", "decode"):
        job = Job(kind, ModelConfig.tiny(num_layers=16), 8, 64)
        program = make_program(job, make_mesh(mesh))
        held = [x for x in jax.tree.leaves(program.args) if x.size > job.new_tokens]
        found = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in held)
        parts = estimate(job, topology, mesh).memory
        named = sum(parts.get(n, 0) for n in ("parameters", "optimizer", "cache"))
        assert found == pytest.approx(named, rel=0.01)


def test_train_step_is_the_trainers():
    """One update of the step that plan compiles, beside train's own on the same numbers."""
    # The optimizer's defaults are what plan has; at 0 of 10 updates the rate is the peak's.
    optimizer = adamw()
    model = tiny_model(48)
    model.remat = "none"
    graphdef, start = init_state(model, optimizer, 0)
    rng = np.random.default_rng(0)
    batch = {
        "tokens": jnp.asarray(rng.integers(1, 48, (2, 12)), jnp.int32),
        "positions": jnp.tile(jnp.arange(6, dtype=jnp.int32), (2, 2)),
        "segment_ids": jnp.repeat(jnp.array([[1, 2], [1, 0]], jnp.int32), 6, axis=1),
        "loss_mask": jnp.asarray(rng.integers(0, 2, (2, 12)), jnp.float32),
    }
    zeros = jax.tree.map(jnp.zeros_like, start.params)
    state = State(start.params, zeros, zeros, jnp.zeros((), jnp.int32))
    quick = {"xla_backend_optimization_level": 0}
    ours, told = jax.jit(partial(train_step, graphdef), compiler_options=quick)(state, batch)
    step = partial(language_step.__wrapped__, graphdef, optimizer)
    theirs, expected = jax.jit(step, compiler_options=quick)(start, batch)
    np.testing.assert_allclose(told["loss"], expected["total_loss"], rtol=1e-5)
    np.testing.assert_allclose(told["grad_norm"], expected["grad_norm"], rtol=1e-5)
    pairs = zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True)
    for mine, train in pairs:
        # Adam's first update is the gradient's sign: where that is rounding, so is the update.
        assert np.isclose(mine, train, rtol=0, atol=1e-6).mean() > 0.99


def test_full_size_programs_are_traced():
    devices = np.array([jax.devices()[0]]).reshape(1, 1, 1, 1)
    mesh = Mesh(devices, MESH_AXES)
    for job in (
        Job("train", M1, 16, 8192),
        Job("prefill", M1, 4, 8192),
        Job("decode", M1, 16, 8192),
    ):
        program = make_program(job, mesh)
        out, _ = jax.eval_shape(program.run, *program.args)
        assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, program.args[0])


# Meshes.


def test_best_meshes_divide_and_are_sorted():
    found = best_meshes(Job("train", M1, 512, 8192), POD)
    assert len(found) == 5
    assert [e.bound for e in found] == sorted(e.bound for e in found)
    assert dict(found[0].mesh) == {"data": 16, "context": 1, "expert": 32, "model": 1}
    for e in found:
        assert e.fits
        assert math.prod(e.mesh.values()) == 512
    mesh = make_mesh({"data": 2, "expert": 2, "model": 2})
    _, params = counts.abstract_params(ModelConfig.tiny())
    assert param_shardings(params, mesh)


def test_a_step_is_bound_by_what_is_slow():
    train = estimate(Job("train", M1, 512, 8192), POD, {"data": 16, "expert": 32})
    decode = best_meshes(Job("decode", M1, 256, 8192), parse_topology("v6e:16x16"))[0]
    assert (train.binds, decode.binds) == ("compute", "HBM")
    assert train.bound <= train.serial
    assert train.mfu < 1
    assert train.tokens_per_second == pytest.approx(512 * 8192 / train.bound)


def test_collectives_of_each_axis():
    def axes(**mesh):
        found = estimate(Job("train", M1, 64, 8192), parse_topology("h200:64"), mesh).collectives
        return {(c.kind, c.axes) for c, _ in found}

    def weights(*over):
        return {("gather", over), ("scatter", over)}

    assert axes(data=64) == weights("data")
    assert axes(data=32, model=2) == weights("data") | {("reduce", ("model",))}
    assert axes(data=8, expert=8) >= weights("data") | {("exchange", ("expert",))}
    states_and_norms = {("gather", ("context",)), ("reduce", ("context",))}
    assert axes(data=32, context=2) == weights("data", "context") | states_and_norms


def test_wiring():
    """An axis within reach of fast links is fast; rings count both ways around."""
    gpus, slice_, two = map(parse_topology, ("h200:64", "v5p:8x8x8", "2*v5p:8x8x8"))
    mesh = ONE | {"data": 8, "expert": 8}
    assert gpus.gather_rate(mesh, ("expert",)) == 450e9
    assert gpus.gather_rate(mesh, ("data",)) == 50e9  # one adapter a GPU of each group
    assert gpus.gather_rate(ONE | {"data": 64}, ("data",)) == 8 * 50e9
    mesh = ONE | {"data": 64, "expert": 8}
    assert slice_.gather_rate(mesh, ("expert",)) == 2 * 100e9
    assert slice_.gather_rate(mesh, ("data",)) == 4 * 100e9
    assert slice_.gather_rate(mesh, ("data", "expert")) == 6 * 100e9
    assert slice_.gather_rate(ONE | {"data": 128, "expert": 4}, ("expert",)) == 100e9  # a line
    assert two.devices == 1024
    assert two.gather_rate(ONE | {"data": 2, "expert": 512}, ("data",)) == 6.25e9
    # A ring of 8: each link carries size · 8 / 8 in each direction.
    assert slice_.exchange_seconds(mesh, "expert", 100e9) == pytest.approx(1)


def test_budgets():
    budget = Reinforcement(steps=10, completions=1024, tokens=4096)
    decode = generation(M1, budget, POD)
    assert decode.fits
    assert decode.job.length == 2048
    with pytest.raises(PlanError, match="no batch of completions"):
        generation(M1, budget, parse_topology("h100:8"))


# M1 beside R1.


def test_generation_flops():
    """Below half of R1's at 64K, as the report says; its quarter at 100K lies between the share of
    the whole generation and that of its last token.
    """
    at64, at100 = curve.compare(M1, (65536, 100_000))
    assert at64.share < 0.5
    assert at100.share_last_token < 0.25 < at100.share
    assert at100.share_absorbed < at100.share
    assert curve.minimax(M1).per_key == 10 * 4 * 64 * 128
    token_by_token = sum(curve.minimax(M1).token(t) for t in range(1, 101))
    assert curve.minimax(M1).total(100) == pytest.approx(token_by_token)


def test_figure(tmp_path, capsys):
    file = tmp_path / "flops.svg"
    assert cli.main(["plan", "flops", "--out", str(file)]) == 0
    assert "100,000" in capsys.readouterr().out
    assert file.read_text().count("<polyline") == 3
    assert cli.main(["plan", "flops", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(curve.LENGTHS)


# The command line.

PLAN = ["plan", "--no-compile", "--config", "minimax_m1"]


def plan(capsys, *flags):
    """Exit code, stdout, stderr."""
    code = cli.main([*PLAN, *flags])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_json(capsys):
    flags = ["--topology", "v5p:8x8x8", "--mesh", "data=-1,expert=32", "--tokens", "1e12"]
    code, out, err = plan(capsys, *flags, "--price", "2", "--rl", "10x512x1000", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["mesh"] == {"data": 16, "context": 1, "expert": 32, "model": 1}
    assert told["fits"]
    assert told["peak_bytes"] == pytest.approx(sum(told["memory_bytes"].values()))
    bills = list(told["bills"].values())
    assert len(bills) == 3
    hours = 1e12 / told["tokens_per_second_bound"] / 3600
    assert bills[0]["hours"] == pytest.approx(hours)
    assert bills[0]["cost"] == pytest.approx(hours * 512 * 2)


def test_tables(capsys):
    code, out, _ = plan(capsys, "--topology", "h200:64", "--tokens", "1e9")
    assert code == 0
    for said in ("456.09B", "45.94B", "best meshes", "peak, counted", "capacity", "MFU"):
        assert said in out


@pytest.mark.parametrize(("gib", "code"), [(90, 0), (96, 2)])
def test_the_compilers_memory_decides(gib, code, capsys, monkeypatch):
    made = Compiled(gib << 30, 0, 0, 0, {"lightning": 7}, {"trace": 1.0})
    monkeypatch.setattr("mmjax.plan.cli.compile_ahead", lambda *_: made)
    flags = ["--topology", "v5p:8x8x8", "--mesh", "data=16,expert=32", "--compile", "--json"]
    assert cli.main(["plan", "--config", "minimax_m1", *flags]) == code
    told = capsys.readouterr()
    assert json.loads(told.out)["compiled"]["peak_bytes"] == gib << 30
    misfit = "does not fit: 96.00 GiB a device (compiled), v5p has 95.73 GiB"
    assert (misfit in told.err) == (code == 2)


@pytest.mark.parametrize("stage", ["", ":sft"])
def test_config_files(stage):
    request = read_request(f"configs/demo.py{stage}")
    assert (request.batch, request.length, request.remat) == (16, 128, "layer")
    assert request.model.hidden_size == 96
    for name in ("minimax_m1", "minimax_text_01"):
        request = read_request(f"configs/{name}.py")
        assert request.length == 8192
        assert estimate(Job("train", request.model, request.batch, 8192), POD, request.mesh).fits


def test_model_folder(golden):
    assert read_request(str(golden / "text" / "hybrid8")).model.num_layers == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v9:2x2"], "unknown chip 'v9'; known: v4, v5e, v5p, v6e, tpu7x, a100"),
        (["--topology", "v5p:8x8"], "v5p slices have 3 dimensions"),
        (["--topology", "v6e:3x3"], "the first two even"),
        (["--topology", "v6e:32x32"], "has 1024 chips, a v6e pod 256"),
        (["--topology", "v5p:a"], "is no shape of v5p; write v5p:4x4x4"),
        (["--topology", "h200:4x4"], "is no shape of h200; write h200:64"),
        (["--topology", "v5p:8x8x8", "--mesh", "data=3"], "has 3 devices, v5p:8x8x8 has 512"),
        (["--topology", "v5p:8x8x8", "--mesh", "depth=512"], "unknown mesh axis depth; known: dat"),
        (["--topology", "v5p:8x8x8", "--mesh", "data:512"], "is no AXIS=SIZE"),
        (
            ["--topology", "v5p:8x8x8", "--mesh", "data=8,expert=64"],
            "32 experts do not divide over expert=64; choose one of [1, 2, 4, 8, 16, 32]",
        ),
        (
            ["--topology", "v5p:8x8x8", "--mesh", "model=16,expert=32"],
            "the mesh does not divide the model",
        ),
        (
            ["--topology", "v5p:8x8x8", "--mesh", "data=512", "--batch", "100"],
            "a batch of 100 rows does not divide over data·expert = 512",
        ),
        (
            ["--topology", "v5p:8x8x8", "--mesh", "context=512", "--length", "1000"],
            "1000 tokens do not divide over context=512",
        ),
        (["--topology", "h200:8"], "does not fit: "),
        (["--topology", "v5p:8x8x8", "--batch", "3", "--length", "7"], "no mesh of 512 devices"),
        (["--topology", "v5p:8x8x8", "--rl", "10"], "is no STEPSxROWSxTOKENS"),
        (["--topology", "v5p:8x8x8", "--remat", "some"], "remat 'some' is unknown; known: super"),
        (["--topology", "v5p:8x8x8", "--length", "99999999"], "is beyond the model's 10240000"),
        ([], "name a model and chips"),
    ],
)
def test_messages(flags, message, capsys):
    code, _, err = plan(capsys, *flags)
    assert code == 2
    assert err.startswith("mmjax plan: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_like_it", "imports nothing_like_it, which is not installed"),
        ("x = 1", "has no get_config()"),
        ("def get_config(): return {'model': {'preset': 'gpt'}}", "unknown preset 'gpt'; known"),
        (
            "def get_config(): return {'model': {'num_layer': 1}}",
            "unknown key model.num_layer; did you mean model.num_layers?",
        ),
        ("def get_config(): raise ValueError('no such stage')", "no such stage"),
    ],
)
def test_messages_of_configs(text, message, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(text + "\n")
    flags = ["plan", "--config", str(file), "--topology", "v5e:2x4"]
    assert cli.main(flags) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["plan", "--config", "nowhere.py", "--topology", "v5e:2x4"]) == 2
    assert "nowhere.py does not exist" in capsys.readouterr().err
    assert cli.main(["plan", "--config", "gpt", "--topology", "v5e:2x4"]) == 2
    assert "presets: minimax_m1" in capsys.readouterr().err


def test_no_compiler(monkeypatch, capsys):
    job = Job("train", ModelConfig.tiny(), 8, 64)
    with pytest.raises(PlanError, match="compile only where such a GPU is"):
        compile_ahead(job, parse_topology("h200:8"), {"data": 8})
    monkeypatch.setattr("mmjax.plan.ahead.find_compiler", lambda: None)
    monkeypatch.setattr("mmjax.plan.cli.find_compiler", lambda: None)
    with pytest.raises(PlanError, match="needs libtpu: `pip install libtpu`"):
        compile_ahead(job, parse_topology("v5e:2x4"), {"data": 8})
    assert cli.main(["plan", "--config", "tiny", "--topology", "v5e:2x4"]) == 0
    assert "note: no libtpu here" in capsys.readouterr().err
