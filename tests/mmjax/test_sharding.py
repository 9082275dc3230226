"""Mesh, sharding rules, and models on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mmjax
from mmjax.convert.params import abstract_decoder, by_name
from mmjax.sharding import (
    DEFAULT_RULES,
    ShardingError,
    ShardingRules,
    activation_spec,
    active_mesh,
    constrain,
    make_mesh,
    param_shardings,
)
from tests.mmjax.programs import forward, random_model, small_config, tokens

BOTH = ("data", "expert")
ALL = ("data", "context", "expert")
# Each kind of parameter, under the two stacked axes of the layers.
SPECS = {
    "embed.embedding": P("model", ALL),
    "head.kernel": P(ALL, "model"),
    "norm.scale": P(None),
    "blocks.runs.0.attention_norm.scale": P(None, None, None),
    "blocks.runs.0.moe_norm.scale": P(None, None, None),
    "blocks.runs.0.attention.qkv": P(None, None, ALL, "model", None, None),
    "blocks.runs.0.attention.gate": P(None, None, ALL, "model", None),
    "blocks.runs.0.attention.norm": P(None, None, "model", None),
    "blocks.runs.0.attention.out": P(None, None, "model", None, ALL),
    "blocks.runs.1.attention.q": P(None, None, ALL, "model", None),
    "blocks.runs.1.attention.k": P(None, None, ALL, "model", None),
    "blocks.runs.1.attention.v": P(None, None, ALL, "model", None),
    "blocks.runs.1.attention.out": P(None, None, "model", None, ALL),
    "blocks.runs.0.moe.router": P(None, None, ALL, None),
    "blocks.runs.0.moe.w1": P(None, None, "expert", ("data", "context"), "model"),
    "blocks.runs.0.moe.w3": P(None, None, "expert", ("data", "context"), "model"),
    "blocks.runs.0.moe.w2": P(None, None, "expert", "model", ("data", "context")),
    "blocks.runs.0.moe.shared.gate": P(None, None, ALL, "model"),
    "blocks.runs.0.moe.shared.up": P(None, None, ALL, "model"),
    "blocks.runs.0.moe.shared.down": P(None, None, "model", ALL),
    "blocks.runs.0.moe.shared.coefficient": P(None, None, ALL, None),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "expert": 2, "model": 2})


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(shared_intermediate_size=20))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("sharding") / "model"
    mmjax.save(model, path)
    return path


def same_sharding(actual, mesh, spec, ndim):
    return actual.is_equivalent_to(NamedSharding(mesh, spec), ndim)


def test_specs_of_every_kind_of_parameter(mesh, model):
    _, state = abstract_decoder(model.cfg)
    shapes = by_name(state)
    shardings = by_name(param_shardings(state, mesh))
    kinds = {name.replace("runs.1", "runs.0").replace("runs.2", "runs.0") for name in shapes}
    covered = {name.replace("runs.1", "runs.0") for name in SPECS}
    assert kinds == covered
    for name, spec in SPECS.items():
        actual = shardings[name].get_value()
        assert same_sharding(actual, mesh, spec, len(shapes[name].shape)), (name, actual.spec)


def test_logical_axes():
    assert DEFAULT_RULES.spec(("batch", "sequence", None)) == P(BOTH, ("context",), None)
    assert DEFAULT_RULES.spec(("norm",)) == P(None)


def test_collision():
    with pytest.raises(ShardingError, match=r"w: logical axes \('d_model', 'ffn'\) want .*'data'"):
        ShardingRules(ffn=("data",)).spec(("d_model", "ffn"), of="w")


def test_unknown_logical_axis():
    with pytest.raises(ShardingError, match="w: unknown logical axis 'hidden'; known: batch,"):
        DEFAULT_RULES.spec(("hidden",), of="w")


def test_mesh_sizes():
    assert dict(make_mesh().shape) == {"data": 8, "context": 1, "expert": 1, "model": 1}
    taken = make_mesh({"expert": 2, "data": -1}).shape
    assert (taken["data"], taken["expert"]) == (4, 2)
    assert make_mesh({"model": 2}, jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3}, "needs 3 devices, there are 8"),
        ({"data": 3, "model": -1}, "needs 6 devices, there are 8"),
        ({"tensor": 8}, r"unknown mesh axis \['tensor'\]; known: data, context, expert, model"),
        ({"data": 0}, "needs 0 devices"),
    ],
)
def test_mesh_that_does_not_fit_the_devices(shape, message):
    with pytest.raises(ShardingError, match=message):
        make_mesh(shape)


def test_mesh_that_does_not_divide_the_model(folder):
    with pytest.raises(ShardingError) as error:
        mmjax.load(folder, mesh=make_mesh({"model": 8}))
    text = str(error.value)
    assert text.startswith("the mesh does not divide the model: ")
    assert "blocks.runs.0.attention.qkv dimension 3 of size 4 over model=8" in text
    assert "more" in text


def test_load_on_a_mesh(mesh, model, folder):
    sharded = mmjax.load(folder, mesh=mesh)
    single = by_name(nnx.state(model))
    for name, variable in by_name(nnx.state(sharded)).items():
        array = variable.get_value()
        if name in SPECS:
            assert same_sharding(array.sharding, mesh, SPECS[name], array.ndim), name
        np.testing.assert_array_equal(array, single[name].get_value(), err_msg=name)
    w1 = sharded.blocks.runs[0].moe.w1.get_value()
    assert {s.data.shape for s in w1.addressable_shards} == {(1, 1, 2, 12, 10)}  # E/2, D/2, F/2


@nnx.jit
def sharded_forward(model, ids):
    return model(ids).logits


def test_same_logits_on_a_mesh(mesh, model, folder):
    ids = tokens(model.cfg, 4, 12)
    expected = forward(model, ids).logits
    with jax.set_mesh(mesh):
        placed = jax.device_put(ids, NamedSharding(mesh, P(BOTH)))
        logits = sharded_forward(mmjax.load(folder, mesh=mesh), placed)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_orbax_across_meshes(mesh, model, folder, tmp_path):
    mmjax.save(mmjax.load(folder, mesh=mesh), tmp_path / "orbax", "orbax")
    other = make_mesh({"data": 4, "model": 2})
    back = mmjax.load(tmp_path / "orbax", mesh=other)
    assert back.cfg == mmjax.load(folder).cfg
    single = by_name(nnx.state(model))
    for name, variable in by_name(nnx.state(back)).items():
        array = variable.get_value()
        if name in SPECS:
            assert same_sharding(array.sharding, other, SPECS[name], array.ndim), name
        np.testing.assert_array_equal(array, single[name].get_value(), err_msg=name)


def test_safetensors_from_a_mesh(mesh, model, folder, tmp_path):
    mmjax.save(mmjax.load(folder, mesh=mesh), tmp_path / "copy")
    single = by_name(nnx.state(model))
    for name, variable in by_name(nnx.state(mmjax.load(tmp_path / "copy"))).items():
        np.testing.assert_array_equal(variable.get_value(), single[name].get_value(), err_msg=name)


@pytest.mark.parametrize(
    ("rows", "batch"), [(8, BOTH), (4, BOTH), (2, ("data",)), (6, ("data",)), (1, None), (5, None)]
)
def test_activations_are_spread_as_far_as_they_go(mesh, rows, batch):
    axes = ("batch", "sequence", "heads")
    assert activation_spec(mesh, (rows, 6, 3), axes) == P(batch, "context", None)


def test_no_mesh_inside_a_shard_map(mesh):
    """There, arrays are local and constraints mean nothing."""
    seen = []

    def body(x):
        seen.append(active_mesh())
        return constrain(x, "batch", "sequence")

    x = jnp.zeros((4, 6))
    assert active_mesh() is None
    with jax.set_mesh(mesh):
        assert active_mesh().shape == mesh.shape
        jax.eval_shape(jax.shard_map(body, in_specs=P(BOTH), out_specs=P(BOTH)), x)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        assert active_mesh() is None
    assert seen == [None]


def test_constrain(mesh):
    x = jnp.zeros((4, 6, 2))
    assert constrain(x, "batch", "sequence", None) is x  # no mesh is set
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: constrain(x, "batch", "sequence", None))(x)
    assert same_sharding(pinned.sharding, mesh, P(BOTH, None, None), 3)


def test_rules_from_a_config(model):
    rules = ShardingRules.from_values(
        {
            "d_model": ["data"],
            "vocab": None,
            "tensors": [("head.*", (None, ("data", "model"))), ("*.moe.w2", (None, "model", None))],
        }
    )
    _, state = abstract_decoder(model.cfg)
    mesh = make_mesh({"data": 2, "expert": 2, "model": 2})
    specs = {n: v.get_value().spec for n, v in by_name(param_shardings(state, mesh, rules)).items()}
    assert specs["embed.embedding"] == P(None, ("data",))
    assert specs["head.kernel"] == P(None, ("data", "model"))
    assert specs["blocks.runs.0.moe.w1"] == P(None, None, ("expert",), ("data",), ("model",))
    assert specs["blocks.runs.0.moe.w2"] == P(None, None, None, ("model",), None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dmodel": "data"}, "unknown key sharding.dmodel; did you mean sharding.d_model?"),
        ({"batch": "data"}, "unknown key sharding.batch"),
        ({"vocab": ["tensor"]}, r"sharding of vocab: unknown mesh axis \['tensor'\]; known: data"),
        ({"vocab": [1]}, r"sharding.vocab = \[1\] names no mesh axes"),
        ({"tensors": ["head.kernel"]}, "'head.kernel' is no pair of a pattern and the mesh axes"),
        ({"tensors": [("head.kernels", (None,))]}, "no parameter; the nearest name is head.kernel"),
        ({"tensors": [("head.*", (None,))]}, r"head.\* has 1 dimensions, head.kernel has 2"),
        ({"tensors": [("head.*", ("data", "data"))]}, r"want mesh axis \['data'\] twice"),
    ],
)
def test_wrong_rules(values, message, model, mesh):
    _, state = abstract_decoder(model.cfg)
    with pytest.raises(ShardingError, match=message):
        param_shardings(state, mesh, ShardingRules.from_values(values))
