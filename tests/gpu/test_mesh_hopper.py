"""A model spread over two Hopper GPUs, along each mesh axis, against one: `make gpu-test`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch
from mmjax.convert.params import by_name
from mmjax.sharding import MESH_AXES, make_mesh, param_shardings
from tests.mmjax.programs import random_model, small_config

pytestmark = pytest.mark.skipif(
    dispatch.target().why_not_hopper() is not None or jax.device_count() < 2,
    reason="needs two Hopper GPUs",
)


@pytest.fixture(scope="module")
def model():
    return random_model(
        small_config(
            hidden_size=128, intermediate_size=128, head_dim=64, num_layers=2, num_experts=4,
            layer_types=("lightning", "softmax"), rotary_dim=32, vocab_size=512,
        )
    )  # fmt: skip


def loss_and_gradients(decoder, devices, **shape):
    """Of packed rows with padding, as host arrays."""
    mesh = make_mesh(shape, jax.devices()[:devices])
    graphdef, params = nnx.split(decoder)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (2, 512)).astype(np.int32)
    segments = np.repeat([[1, 1, 2, 2, 2, 3, 3, 0]] * 2, 64, axis=1).astype(np.int32)

    def loss(params, tokens, segments):
        out = nnx.merge(graphdef, params)(tokens, segment_ids=segments)
        logp = jax.nn.log_softmax(out.logits[:, :-1], axis=-1)
        chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
        real = (segments[:, 1:] != 0).astype(jnp.float32)
        return -(chosen * real).sum() / real.sum() + 0.01 * out.aux.load_balancing_loss

    rows = NamedSharding(mesh, P(("data", "expert"), None))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(params, mesh))
        batch = (jax.device_put(x, rows) for x in (tokens, segments))
        value, gradients = jax.jit(jax.value_and_grad(loss))(placed, *batch)
    return float(value), {k: np.asarray(v) for k, v in by_name(gradients).items()}


@pytest.fixture(scope="module")
def on_one(model):
    return loss_and_gradients(model, 1)


@pytest.mark.parametrize("axis", MESH_AXES)
def test_two_gpus_match_one(model, on_one, axis):
    expected, gradients = on_one
    value, spread = loss_and_gradients(model, 2, **{axis: 2})
    assert abs(value - expected) <= 1e-5 * abs(expected)
    for name, gradient in gradients.items():
        error = np.linalg.norm(spread[name] - gradient) / np.linalg.norm(gradient)
        assert error <= 2e-5, f"{name}: {error:.1e}"
