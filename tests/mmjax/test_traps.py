"""What is easy to get wrong in this architecture, one test each, against plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.config import ConfigError, ModelConfig
from mmjax.convert.params import by_name
from mmjax.layers import moe
from mmjax.layers.attention import SoftmaxAttention
from mmjax.layers.lightning import INNER_NORM_EPS, LightningAttention, decay_rates
from mmjax.layers.moe import MoE
from mmjax.layers.norm import rms_norm
from mmjax.layers.rope import apply_rope, rope_angles
from tests.mmjax.programs import forward, random_model, small_config, tokens, with_config

# Between two float32 computations of the same formula, of the largest element.
CLOSE = 1e-5


def assert_near(actual, expected):
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    assert error < CLOSE, f"off by {error:.3g} of the largest element"


def assert_far(actual, expected):
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    assert error > 100 * CLOSE, f"only {error:.3g} apart: the test could not tell them"


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer(kind, **overrides):
    """One layer module with random parameters in float32, and those as numpy arrays in float64."""
    cfg = small_config(**overrides)
    structure, state = nnx.split(nnx.eval_shape(lambda: kind(cfg, nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.5, jnp.float32), state
    )
    arrays = {n: np.asarray(v.get_value(), np.float64) for n, v in by_name(state).items()}
    return nnx.merge(structure, state), arrays, cfg


def inputs(cfg, batch=2, length=5):
    x = np.random.default_rng(2).standard_normal((batch, length, cfg.hidden_size))
    return x.astype(np.float32)


def lightning_formula(x, w, decay, *, eps=INNER_NORM_EPS, thirds=False):
    """The released layer in numpy, token by token."""
    batch, length, _ = x.shape
    heads, dim = w["norm"].shape
    # The released matrix [3 H K, D]; its rows are head-major: q, k, v of the first head first.
    rows = w["qkv"].transpose(1, 2, 3, 0).reshape(3 * heads * dim, -1)
    qkv = silu(x.astype(np.float64) @ rows.T)
    if thirds:
        q, k, v = (part.reshape(batch, length, heads, dim) for part in np.split(qkv, 3, axis=-1))
    else:
        q, k, v = np.split(qkv.reshape(batch, length, heads, 3 * dim), 3, axis=-1)
    state = np.zeros((batch, heads, dim, dim))
    out = np.zeros((batch, length, heads, dim))
    for t in range(length):
        state = np.exp(-decay)[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state)
    flat = out.reshape(batch, length, -1)
    normed = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + eps) * w["norm"].reshape(-1)
    gate = sigmoid(np.einsum("btd,dhk->bthk", x, w["gate"])).reshape(flat.shape)
    return np.einsum("btn,nd->btd", gate * normed, w["out"].reshape(heads * dim, -1))


def run_lightning(module, x, decay):
    rates = jnp.asarray(decay, jnp.float32)
    return module(jnp.asarray(x), rates, segment_ids=None, state=None)[0]


def test_qkv_is_head_major():
    module, w, cfg = layer(LightningAttention)
    x, decay = inputs(cfg), np.array([0.5, 0.1, 0.02, 0.001])
    out = run_lightning(module, x, decay)
    assert_near(out, lightning_formula(x, w, decay))
    assert_far(out, lightning_formula(x, w, decay, thirds=True))


def test_inner_norm_has_its_own_epsilon():
    assert INNER_NORM_EPS == 1e-6
    module, w, cfg = layer(LightningAttention, norm_eps=1e-5)
    x, decay = inputs(cfg) * 1e-2, np.array([0.5, 0.1, 0.02, 0.001])
    out = run_lightning(module, x, decay)
    assert_near(out, lightning_formula(x, w, decay))
    assert_far(out, lightning_formula(x, w, decay, eps=cfg.norm_eps))


def test_decay_rates_of_the_released_model():
    rates = decay_rates(64, 80)
    assert rates.shape == (80, 64)
    assert rates.dtype == np.float32
    heads = np.arange(1, 65)
    for index, factor in ((0, 1 + 1e-5), (78, 1 - 78 / 79 + 1e-5), (79, 1e-5)):
        np.testing.assert_allclose(rates[index], 2.0 ** (-8 * heads / 64) * factor, rtol=2e-7)
    # The published vectors' ends; layer 79 is a softmax layer, so 78 is the last lightning one.
    np.testing.assert_allclose(rates[0, [0, -1]], [0.9170132132, 0.0039062890625], rtol=1e-7)
    np.testing.assert_allclose(rates[78, [0, -1]], [0.0116168, 4.9485e-5], rtol=1e-5)


def test_decay_rates_of_other_head_counts():
    """ALiBi's rule: for 6 heads those of 4, then every other one of 8."""
    expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    np.testing.assert_allclose(decay_rates(6, 2)[0], np.array(expected) * (1 + 1e-5), rtol=2e-7)
    np.testing.assert_allclose(decay_rates(1, 1), [[2**-8 * (1 + 1e-5)]], rtol=2e-7)


def test_rope_turns_the_leading_dimensions_only():
    rotary, dim = 4, 10
    x = np.random.default_rng(0).standard_normal((1, 6, 2, dim)).astype(np.float32)
    positions = np.array([[0, 1, 2, 5, 100, 9_999_999]], np.int32)
    turned = apply_rope(jnp.asarray(x), rope_angles(jnp.asarray(positions), rotary, 1e4))
    # The released code multiplies the float32 position with a float32 frequency. Far out, any
    # other rounding of the frequency is radians away.
    angle = positions[..., None].astype(np.float32) * np.float32([1, 0.01])
    rotation = np.exp(1j * angle.astype(np.float64))[:, :, None]  # [1, T, 1, 2]
    # NeoX pairing: dimension i goes with dimension i + rotary / 2.
    pairs = (x[..., :2] + 1j * x[..., 2:4]) * rotation
    expected = np.concatenate([pairs.real, pairs.imag, x[..., 4:]], -1)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    assert_near(turned, expected)


def softmax_formula(x, w, rotary, theta):
    """The released softmax layer in numpy."""
    length = x.shape[1]
    q, k, v = (np.einsum("btd,dhk->bthk", x.astype(np.float64), w[n]) for n in "qkv")
    angle = np.arange(length)[:, None] / theta ** (np.arange(0, rotary, 2) / rotary)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    half = rotary // 2

    def turn(y):
        a, b = y[..., :half], y[..., half:rotary]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, y[..., rotary:]], -1)

    repeat = q.shape[2] // k.shape[2]
    q, k, v = turn(q), turn(k).repeat(repeat, 2), v.repeat(repeat, 2)
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshk,hkd->btd", weights, v, w["out"])


def test_softmax_layer_with_partial_rope():
    module, w, cfg = layer(SoftmaxAttention)
    x = inputs(cfg)
    positions = jnp.tile(jnp.arange(5, dtype=jnp.int32), (2, 1))
    angles = rope_angles(positions, cfg.rotary_dim, cfg.rope_theta)
    out = module(jnp.asarray(x), angles, segment_ids=None)
    assert_near(out, softmax_formula(x, w, cfg.rotary_dim, cfg.rope_theta))
    assert_far(out, softmax_formula(x, w, cfg.head_dim, cfg.rope_theta))


def test_released_residual_is_the_normed_tensor():
    """x = norm(h); h = α x + β attn(x), and the un-normed h with postnorm off."""
    model = random_model(small_config())
    ids = tokens(model.cfg, 1, 6)
    weights = by_name(nnx.state(model))
    seen = forward(model, ids).intermediates.hidden_states
    h = np.asarray(seen[0], np.float64)
    np.testing.assert_array_equal(seen[0], weights["embed.embedding"].get_value()[ids])
    expected = {p: block_formula(model.cfg, weights, h, postnorm=p) for p in (True, False)}
    assert_near(seen[1], expected[True])
    other = with_config(model, postnorm=False)
    assert_near(forward(other, ids).intermediates.hidden_states[1], expected[False])
    assert_far(expected[False], expected[True])


def block_formula(cfg, weights, h, *, postnorm):
    """The first layer, a lightning one, in numpy."""
    prefix = "blocks.runs.0."
    w = {
        name.removeprefix(prefix): np.asarray(v.get_value()[0, 0], np.float64)
        for name, v in weights.items()
        if name.startswith(prefix)
    }

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * scale

    attention = {n.split(".")[1]: a for n, a in w.items() if n.startswith("attention.")}
    x = norm(h, w["attention_norm.scale"])
    attended = lightning_formula(x, attention, decay_rates(cfg.num_heads, cfg.num_layers)[0])
    h = cfg.lightning_alpha * (x if postnorm else h) + cfg.lightning_beta * attended
    y = norm(h, w["moe_norm.scale"])
    experts = {n.removeprefix("moe."): a for n, a in w.items() if n.startswith("moe.")}
    return cfg.mlp_alpha * (y if postnorm else h) + cfg.mlp_beta * moe_formula(y, experts, 2)


def moe_formula(x, w, top_k):
    """Every expert on every token, the top k weighted by their renormalised softmax."""
    logits = x @ w["router"]
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    kept = probability >= np.sort(probability, -1)[..., -top_k, None]
    share = np.where(kept, probability, 0)
    share /= share.sum(-1, keepdims=True)
    hidden = silu(np.einsum("btd,edf->btef", x, w["w1"])) * np.einsum("btd,edf->btef", x, w["w3"])
    return np.einsum("btef,efd,bte->btd", hidden, w["w2"], share)


@pytest.mark.parametrize("length", [5, 400], ids=["few tokens", "sorted by expert"])
def test_experts(length):
    module, w, cfg = layer(MoE)
    x = inputs(cfg, 1, length)
    out, stats = module(jnp.asarray(x), None)
    assert_near(out, moe_formula(x.astype(np.float64), w, cfg.num_experts_per_token))
    assert float(stats.tokens_per_expert.sum()) == 2 * length


def test_experts_over_runs_of_tokens(monkeypatch):
    """What a CPU does with many tokens: three whole runs of 128 and a rest of 16."""
    monkeypatch.setattr(moe, "CPU_TOKENS", 128)
    module, w, cfg = layer(MoE)
    x = inputs(cfg, 1, 400)
    expected = moe_formula(x.astype(np.float64), w, cfg.num_experts_per_token)
    assert_near(module(jnp.asarray(x), None)[0], expected)


@pytest.mark.parametrize("mode", ["sigmoid", "softmax"])
def test_shared_expert(mode):
    # The released code sizes it by intermediate_size (20 here), whatever this number is.
    module, w, cfg = layer(MoE, shared_intermediate_size=7, shared_expert_mode=mode)
    assert w["shared.gate"].shape == (cfg.hidden_size, cfg.intermediate_size)
    x = inputs(cfg).astype(np.float64)
    hidden = silu(x @ w["shared.gate"]) * (x @ w["shared.up"])
    logit = x @ w["shared.coefficient"]
    c = sigmoid(logit) if mode == "sigmoid" else np.ones_like(logit)  # softmax over one logit
    expected = moe_formula(x, w, 2) * (1 - c) + hidden @ w["shared.down"] * c
    assert_near(module(jnp.asarray(x, jnp.float32), None)[0], expected)


@pytest.mark.parametrize(("value", "expected"), [([0], 0), ([0, 0, 0], 0), ([20] * 3, 20), (0, 0)])
def test_list_valued_shared_intermediate_size(value, expected):
    raw = small_config().to_hf() | {"shared_intermediate_size": value}
    cfg = ModelConfig.from_hf(raw)
    assert cfg.shared_intermediate_size == expected
    assert cfg.to_hf()["shared_intermediate_size"] == value


def test_shared_intermediate_sizes_that_differ():
    raw = small_config().to_hf() | {"shared_intermediate_size": [20, 0, 20]}
    with pytest.raises(ConfigError, match=r"\[20, 0, 20\] differs between layers"):
        ModelConfig.from_hf(raw)


def test_tied_embeddings():
    model = random_model(small_config(tie_embeddings=True))
    assert model.head is None
    assert not [n for n in by_name(nnx.state(model)) if n.startswith("head")]
    out = forward(model, tokens(model.cfg, 1, 6))
    assert_near(out.logits, np.asarray(out.hidden) @ np.asarray(model.embed.embedding[...]).T)


def balance(model, ids, segment_ids):
    return model(ids, segment_ids=segment_ids).aux.load_balancing_loss


@pytest.mark.parametrize("over", ["model", "layers"])
def test_what_the_load_is_balanced_over(over):
    """Against the formula in NumPy, with padding."""
    model = random_model(small_config(router_aux_loss_over=over, num_layers=2, layer_types=None))
    ids, segments = tokens(model.cfg, 2, 9), jnp.ones((2, 9), jnp.int32).at[1, 6:].set(0)
    out = nnx.jit(lambda m: m(ids, segment_ids=segments, return_intermediates=True))(model)
    logits = np.asarray(out.intermediates.router_logits, np.float64)[:, np.asarray(segments) != 0]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)  # [L, N, E]
    visits = np.zeros_like(p)
    np.put_along_axis(visits, np.argsort(logits, axis=-1)[..., -2:], 1, axis=-1)
    parts = [(visits, p)] if over == "model" else list(zip(visits, p, strict=True))
    experts = p.shape[-1]
    expected = [
        experts * np.sum(v.reshape(-1, experts).mean(0) * q.reshape(-1, experts).mean(0))
        for v, q in parts
    ]
    np.testing.assert_allclose(out.aux.load_balancing_loss, np.mean(expected), rtol=1e-5)
    slope = nnx.jit(nnx.grad(balance))(model, ids, segments)
    assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(slope))


def test_what_is_balanced_has_to_be_known():
    with pytest.raises(ConfigError, match=r"'model' or 'layers', got 'tokens'"):
        small_config(router_aux_loss_over="tokens")


@nnx.jit
@nnx.value_and_grad
def next_token_gradient(model, ids, segment_ids):
    out = model(ids, segment_ids=segment_ids)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(out.logits[:, :-1]), ids[:, 1:, None], -1)
    real = (segment_ids[:, 1:] != 0) & (segment_ids[:, :-1] != 0)
    return -jnp.where(real, chosen[..., 0], 0).sum() + out.aux.load_balancing_loss


# Eight layers: the gradient of a norm of zeros, 1/sqrt(eps) = 316 a norm, overflows over depth.
@pytest.fixture(scope="module")
def deep_model():
    return random_model(small_config(num_layers=8, layer_types=None))


@pytest.mark.parametrize(
    "segments",
    [[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 2, 2]],
    ids=["left", "right", "middle"],
)
@pytest.mark.parametrize("zero_row", [False, True], ids=["", "zero embedding row"])
def test_gradients_through_padding_are_finite(deep_model, segments, zero_row):
    ids = jnp.array([[0, 0, 0, 5, 6, 7, 0, 9]], jnp.int32)
    state = nnx.state(deep_model)
    structure, state = nnx.split(deep_model)
    if zero_row:  # transformers sets the padding token's row to zero; id 0 is a real token too
        table = deep_model.embed.embedding
        state["embed"]["embedding"] = table.replace(table.get_value().at[0].set(0))
    model = nnx.merge(structure, state)
    loss, grads = next_token_gradient(model, ids, jnp.array([segments], jnp.int32))
    assert np.isfinite(loss)
    for name, gradient in by_name(grads).items():
        assert np.isfinite(gradient.get_value()).all(), name


def test_padding_alone_gives_finite_gradients(deep_model):
    ids = jnp.zeros((1, 8), jnp.int32)
    loss, grads = next_token_gradient(deep_model, ids, jnp.zeros((1, 8), jnp.int32))
    assert loss == 0
    for name, gradient in by_name(grads).items():
        np.testing.assert_array_equal(gradient.get_value(), 0, err_msg=name)


def test_norm_of_zeros():
    x, scale = jnp.zeros((2, 4)), jnp.ones(4)
    value, gradient = jax.value_and_grad(lambda x: rms_norm(x, scale, 1e-5).sum())(x)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 4)))


def test_norm_casts_down_before_the_scale():
    """Float32 statistics, then bfloat16, then the product with the scale, as released."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 32)), jnp.bfloat16)
    scale = jnp.asarray(1 + np.random.default_rng(1).standard_normal(32) / 10, jnp.bfloat16)
    x32 = x.astype(jnp.float32)
    normed = x32 / jnp.sqrt((x32**2).mean(-1, keepdims=True) + 1e-5)
    expected = normed.astype(jnp.bfloat16) * scale[None]
    np.testing.assert_array_equal(rms_norm(x, scale, 1e-5), expected)


def test_no_tokens():
    model = random_model(small_config())
    with pytest.raises(ValueError, match="at least one token; got T = 0"):
        model(jnp.zeros((1, 0), jnp.int32))


def test_one_token():
    model = random_model(small_config())
    ids = tokens(model.cfg, 2, 7)
    whole, first = forward(model, ids).logits, forward(model, ids[:, :1]).logits
    assert_near(first, np.asarray(whole[:, :1]))


def test_cache_that_is_too_small():
    model = random_model(small_config())
    cache = mmjax.HybridCache.create(model.cfg, 1, 4)
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of capacity 4"):
        model(jnp.zeros((1, 5), jnp.int32), cache=cache)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig.tiny().num_layers = 3
