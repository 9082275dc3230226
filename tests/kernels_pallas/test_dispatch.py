"""Which device a computation is for, and what that rules out."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kernels_pallas import dispatch


def _traced_target(f=lambda x: x):
    seen = []

    def trace(x):
        seen.append(dispatch.target(x))
        return f(x)

    jax.eval_shape(trace, jax.ShapeDtypeStruct((8,), jnp.float32))
    return seen[0]


def _mesh(devices, kind, platform):
    device = AbstractDevice(kind, None, platform)
    return AbstractMesh((devices,), ("data",), (AxisType.Auto,), abstract_device=device)


def test_arrays_say_where_they_are():
    one = dispatch.target(jnp.ones(8))
    assert (one.platform, one.spread) == ("cpu", False)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    spread = jax.device_put(jnp.ones(8), jax.sharding.NamedSharding(mesh, spec))
    assert dispatch.target(spread).spread


def test_traced_arrays_are_where_the_mesh_is():
    assert _traced_target().platform == "cpu"
    with jax.sharding.use_abstract_mesh(_mesh(1, "TPU v5e", "tpu")):
        assert _traced_target().why_not_tpu() is None
    with jax.sharding.use_abstract_mesh(_mesh(4, "NVIDIA H200", "gpu")):
        assert "call it in jax.shard_map" in _traced_target().why_not_hopper()
    with jax.sharding.use_abstract_mesh(_mesh(1, "NVIDIA A100", "gpu")):
        reason = _traced_target().why_not_hopper()
    assert reason == "it needs a Hopper GPU; the arrays are on gpu (NVIDIA A100)"


def test_inside_shard_map_each_device_is_alone():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    seen = []

    def part(x):
        seen.append(dispatch.target(x))
        return x

    spec = jax.sharding.PartitionSpec("data")
    jax.jit(jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=spec))(jnp.ones(8))
    assert not seen[0].spread
