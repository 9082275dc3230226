"""Experts in int8: how far they are off, and that every form of them computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax import Engine, SamplingParams
from mmjax.layers import experts
from mmjax.layers.int8 import Int8Matrices, to_int8
from mmjax.layers.moe import MoE
from tests.mmjax.engines import ONE_LAYER, SIZES, prompt
from tests.mmjax.programs import random_model, small_config
from tests.mmjax.test_engine_mesh import assert_alike, on_mesh
from tests.mmjax.test_experts import layer


def test_entries_are_off_by_half_a_step():
    rng = np.random.default_rng(0)
    matrices = rng.standard_normal((3, 20, 8)).astype(np.float32) * 10.0 ** rng.integers(-6, 6, 8)
    matrices[1, :, 2] = 0
    rounded = to_int8(jnp.asarray(matrices))
    assert rounded.values.dtype == jnp.int8
    assert rounded.shape == matrices.shape
    step = np.abs(matrices).max(1, keepdims=True) / 127
    assert (np.abs(rounded.astype(jnp.float32) - matrices) <= 0.501 * step).all()
    np.testing.assert_array_equal(rounded.astype(jnp.float32)[1, :, 2], 0)


@pytest.mark.parametrize("count", [1, 17])
def test_all_forms_agree(count):
    tokens, share, expert, kernels = layer(count)
    rounded = experts.Weights(*map(to_int8, kernels))
    exact = experts.Weights(*(w.astype(jnp.float32) for w in rounded))
    for form in (experts._visited_experts, experts._every_expert, experts.apply_experts):
        want = form(tokens, share, expert, exact)
        np.testing.assert_allclose(form(tokens, share, expert, rounded), want, atol=2e-6)


def test_a_layer_is_off_by_little():
    """Three roundings of 1/254 of a column's largest entry at most, all of them independent."""
    tokens, share, expert, kernels = layer(64)
    want = experts.apply_experts(tokens, share, expert, kernels)
    got = experts.apply_experts(tokens, share, expert, experts.Weights(*map(to_int8, kernels)))
    error = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
    assert 1e-4 < error < 0.01


def test_engine_with_int8_experts():
    model = random_model(small_config(**ONE_LAYER))
    rounded = model.with_int8_experts()
    kinds = {type(m.scales) for _, m in nnx.iter_graph(rounded) if isinstance(m, MoE)}
    assert kinds == {nnx.Dict}
    assert all(m.scales is None for _, m in nnx.iter_graph(model) if isinstance(m, MoE))
    engine = Engine(model, **SIZES, int8_experts=True)
    assert {x.dtype for x in engine._leaves} == {jnp.dtype("int8"), jnp.dtype("float32")}
    rows, params = [prompt(40), prompt(3, 1)], SamplingParams(6, 0.0, logprobs=0, ignore_eos=True)
    done = engine.generate(rows, params)
    whole = jnp.asarray([rows[0] + done[0].token_ids], jnp.int32)
    logp = jax.nn.log_softmax(rounded(whole).logits[0, 39:-1])
    own = [t.logprob for t in done[0].logprobs]
    np.testing.assert_allclose(own, logp[np.arange(6), np.array(done[0].token_ids)], atol=2e-5)
    # New weights are rounded too, and on a mesh all is as on one device.
    engine.update(model)
    mesh = Engine(on_mesh(model, {"expert": 2, "model": 2}), **SIZES, int8_experts=True)
    assert_alike(mesh.generate(rows, params), engine.generate(rows, params))
    assert any(isinstance(x, Int8Matrices) for x in _kernels(rounded))


def _kernels(model):
    return [w for _, m in nnx.iter_graph(model) if isinstance(m, MoE) for w in m._kernels()]
