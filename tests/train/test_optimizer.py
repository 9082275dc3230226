"""Learning rates, AdamW's constants, what is decayed and what is clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmjax.layers.lightning import LightningAttention
from mmjax.layers.norm import RMSNorm
from tests.train.programs import adamw, tiny_model
from train.config import OptimizerConfig
from train.optimizer import learning_rate


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
