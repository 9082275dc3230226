"""Learning rates, AdamW's constants, what is decayed and what is clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmjax.config import ConfigError
from mmjax.layers.lightning import LightningAttention
from mmjax.layers.norm import RMSNorm
from tests.train.programs import adamw, assert_same, tiny_model
from train.config import OptimizerConfig
from train.optimizer import (
    _hashed,
    apply_updates,
    check_frozen,
    learning_rate,
    stochastic_round,
)


def rates(updates, steps, **changes):
    schedule = learning_rate(OptimizerConfig(learning_rate=0.8, **changes), updates)
    return [float(schedule(step)) for step in steps]


def near(expected):
    return pytest.approx(expected, rel=1e-6)


def test_warmup_is_linear_and_its_first_update_is_not_lost():
    assert rates(100, range(6), warmup_steps=4) == near([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_warmup_of_one_update():
    assert rates(100, range(3), warmup_steps=1) == near([0.8] * 3)


def test_constant():
    assert rates(10, [0, 5, 10, 100]) == near([0.8] * 4)


MIDDLE = {"cosine": 0.44, "linear": 0.44, "exponential": 0.8 * 0.1**0.5}


@pytest.mark.parametrize("decay", MIDDLE)
def test_decay_ends_with_the_job(decay):
    """Peak 0.8 and final 0.08, from the end of the warm-up (4) to the last update (24)."""
    seen = rates(24, [3, 4, 14, 24, 99], warmup_steps=4, decay=decay)
    assert seen == near([0.8, 0.8, MIDDLE[decay], 0.08, 0.08])


@pytest.mark.parametrize("decay", MIDDLE)
def test_decay_of_a_given_length(decay):
    seen = rates(1000, [0, 10, 20, 999], decay=decay, decay_steps=20)
    assert seen == near([0.8, MIDDLE[decay], 0.08, 0.08])


def test_final_ratio():
    assert rates(10, [10], decay="linear", final_ratio=0.5) == near([0.4])


def updates_of(optimizer, gradients):
    """Updates of one parameter at zero, gradient after gradient; and the last state."""
    params = jnp.zeros(2)
    state, out = optimizer.init(params), []
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        out.append(np.asarray(update))
    return np.stack(out), state


@pytest.mark.parametrize("scale", [1e-17, 1e-15, 1e-3])
def test_constants_are_those_of_m1(scale):
    """b1 0.9, b2 0.95, eps 1e-15: a larger eps would swallow gradients that M1 saw."""
    gradients = scale * np.array([[1.0, -2.0], [3.0, 0.5], [-1.0, 4.0]])
    actual, _ = updates_of(adamw(learning_rate=0.1, weight_decay=0.0), gradients)
    m = v = np.zeros(2)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        expected = -0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-15)
        np.testing.assert_allclose(actual[t - 1], expected, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    _, state = updates_of(adamw(clip_norm=1.0), [[30.0, 40.0]])
    np.testing.assert_allclose(optax.tree.get(state, "mu"), [0.06, 0.08], rtol=1e-6)


def test_small_gradients_are_not_scaled_up():
    _, state = updates_of(adamw(clip_norm=1.0), [[0.3, 0.4]])
    np.testing.assert_allclose(optax.tree.get(state, "mu"), [0.03, 0.04], rtol=1e-6)


def test_clip_norm_zero_clips_nothing():
    _, state = updates_of(adamw(clip_norm=0.0), [[30.0, 40.0]])
    np.testing.assert_allclose(optax.tree.get(state, "mu"), [3.0, 4.0], rtol=1e-6)


def test_weight_decay_leaves_norm_scales_alone():
    """With gradients of zero, decay is all that moves a parameter: by lr · decay of itself."""
    model = tiny_model()
    scales = {id(m.scale) for _, m in nnx.iter_graph(model) if isinstance(m, RMSNorm)}
    scales |= {id(m.norm) for _, m in nnx.iter_graph(model) if isinstance(m, LightningAttention)}
    is_scale = {p: id(v) in scales for p, v in nnx.iter_graph(model) if isinstance(v, nnx.Param)}
    params = nnx.state(model)
    optimizer = adamw(learning_rate=0.5, weight_decay=0.2)
    update = jax.jit(
        optimizer.update, compiler_options={"xla_backend_optimization_level": 0}
    )  # compiles in a tenth of the time
    updates, _ = update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = dict(nnx.to_flat_state(updates))
    assert set(moved) == set(is_scale)
    assert sum(is_scale.values()) == 6  # two of each layer, lightning's inner one, the final one
    for path, value in nnx.to_flat_state(params):
        expected = 0 if is_scale[path] else -0.1 * value[...]
        np.testing.assert_allclose(moved[path][...], expected, rtol=1e-6, err_msg=str(path))


# Narrow parameters and moments.


def bits(x):
    return np.asarray(x).view(np.uint16)


def test_stochastic_rounding_is_right_on_average():
    """Of n values at a share p between two neighbours, n p ± 5 sqrt(n p (1 - p)) go up."""
    count = 1 << 16
    for value, low, high in [(1.0 + 1 / 512, 1.0, 1 + 1 / 128), (-3e-5, None, None)]:
        x = jnp.full((count // 64, 64), value, jnp.float32)
        rounded = np.asarray(stochastic_round(x, (7, 0)).astype(jnp.float32), np.float64)
        seen = sorted(set(rounded.reshape(-1).tolist()))
        assert len(seen) == 2
        assert low is None or seen == [low, high]
        share = (np.float64(np.float32(value)) - seen[0]) / (seen[1] - seen[0])
        sigma = (count * share * (1 - share)) ** 0.5
        assert abs((rounded == seen[1]).sum() - count * share) < 5 * sigma


def test_stochastic_rounding_keeps_what_bfloat16_has():
    x = jnp.asarray([0.0, -0.0, 1.0, -2.5, 3e38, jnp.inf, -jnp.inf], jnp.bfloat16)
    rounded = stochastic_round(x.astype(jnp.float32), (1, 2))
    np.testing.assert_array_equal(bits(rounded), bits(x))
    assert np.isnan(stochastic_round(jnp.full(64, jnp.nan), (3,)).astype(jnp.float32)).all()


def test_random_bits_differ_by_seed_and_place():
    drawn = [np.asarray(_hashed((4, 32, 32), seeds)) for seeds in ((0, 0), (0, 1), (1, 0))]
    assert len(np.unique(np.stack(drawn))) > 0.999 * 3 * 4096
    for one in drawn:
        ones = np.unpackbits(one.view(np.uint8)).mean()
        assert abs(ones - 0.5) < 5 * 0.5 / (32 * 4096) ** 0.5
        for shifted in (np.roll(one, 1, 0), np.roll(one, 1, 1), np.roll(one, 1, 2)):
            same = np.unpackbits((~(one ^ shifted)).view(np.uint8)).mean()
            assert abs(same - 0.5) < 5 * 0.5 / (32 * 4096) ** 0.5


def run_narrow(rounding, steps=40, state=None, params=None):
    """bfloat16 parameters at 1 under a gradient that moves them by less than their last bit."""
    optimizer = adamw(
        learning_rate=2.0**-12,
        weight_decay=0.0,
        clip_norm=0.0,
        rounding=rounding,
        moments="float32",
    )
    params = jnp.ones((64, 64), jnp.bfloat16) if params is None else params
    state = optimizer.init(params) if state is None else state
    for _ in range(steps):
        updates, state = optimizer.update(jnp.ones_like(params), state, params)
        params = apply_updates(params, updates)
    return params, state


def test_nearest_rounding_loses_small_updates():
    assert (np.asarray(run_narrow("nearest")[0], np.float32) == 1).all()


def test_master_weights_keep_small_updates():
    """40 updates of 2^-12 each: 1 - 40 / 4096, rounded once."""
    params, state = run_narrow("master")
    assert state.master.dtype == jnp.float32
    np.testing.assert_allclose(state.master, 1 - 40 / 4096, rtol=1e-6)
    np.testing.assert_array_equal(bits(params), bits(state.master.astype(jnp.bfloat16)))


def test_stochastic_rounding_keeps_small_updates_on_average():
    """Of a step of 2^-12 a parameter takes 2^-8 with probability 1/16, 40 times."""
    params, _ = run_narrow("stochastic")
    moved = 1 - np.asarray(params, np.float64)
    sigma = 2.0**-8 * (40 / 16 * 15 / 16 / 4096) ** 0.5
    assert abs(moved.mean() - 40 / 4096) < 5 * sigma


def test_stochastic_rounding_goes_on_bit_for_bit():
    params, state = run_narrow("stochastic", 7)
    halves, kept = run_narrow("stochastic", 3)
    assert_same((params, state), run_narrow("stochastic", 4, kept, halves))


@pytest.mark.parametrize("rounding", ["nearest", "master", "stochastic"])
@pytest.mark.parametrize("moments", ["", "float32", "bfloat16"])
def test_moments_have_their_dtype_and_are_computed_in_float32(rounding, moments):
    params = {"w": jnp.full((8,), 0.5, jnp.bfloat16), "router": jnp.full((8,), 0.5)}
    optimizer = adamw(rounding=rounding, moments=moments, learning_rate=0.1, weight_decay=0.0)
    state = optimizer.init(params)
    kept = jax.tree.map(lambda x: x.dtype, state)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3, p.dtype), params)
    for _ in range(3):
        updates, state = optimizer.update(grads, state, params)
        params = apply_updates(params, updates)
    assert jax.tree.map(lambda x: x.dtype, state) == kept
    for name in ("mu", "nu"):
        found = {k: x.dtype.name for k, x in optax.tree.get(state, name).items()}
        own = {"w": "bfloat16", "router": "float32"}
        assert found == (dict.fromkeys(own, moments) if moments else own)
    # Three equal gradients: Adam moves by the learning rate each time.
    assert params["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(params["router"], 0.2, rtol=1e-2)
    np.testing.assert_allclose(params["w"].astype(jnp.float32), 0.2, rtol=1.2e-2)


def test_patterns_that_freeze_nothing_or_all():
    params = {"head": {"kernel": jnp.zeros(2)}, "embed": jnp.zeros(2)}
    check_frozen(params, ())
    check_frozen(params, ("head.*",))
    with pytest.raises(ConfigError, match=r"no parameter matches 'vision.\*'; .*: embed, head.ke"):
        check_frozen(params, ("head.*", "vision.*"))
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        check_frozen(params, ("head.*", "emb*"))
