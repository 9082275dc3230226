"""Checkpoints in every layout: what goes in comes out, and what is wrong is told at once."""

import dataclasses
import inspect
import itertools
import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

import mmjax
from mmjax.config import ConfigError, ModelConfig
from mmjax.convert import CheckpointError, CheckpointWarning, convert, stream
from mmjax.convert.native import buffer, buffer_shapes, differences
from mmjax.convert.params import by_name, param_specs
from mmjax.convert.safetensors_folder import SafetensorsParams
from mmjax.convert.table import LAYOUTS, Table
from mmjax.convert.view import View
from tests.mmjax.programs import random_model, small_config

CASES = ("hybrid8", "pattern010", "superblocks16_bf16")


def read_tensors(folder):
    """Every tensor of a folder by name."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as stream:
            tensors |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    return tensors


def assert_same_tensors(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert actual[name].tobytes() == tensor.tobytes(), name


def assert_same_model(actual, expected):
    wanted = by_name(nnx.state(expected))
    for name, variable in by_name(nnx.state(actual)).items():
        array = wanted.pop(name).get_value()
        assert variable.get_value().dtype == array.dtype, name
        np.testing.assert_array_equal(variable.get_value(), array, err_msg=name)
    assert not wanted


def write_folder(path, tensors, config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture
def copy(golden, tmp_path):
    """A golden case's folder, to be damaged."""

    def make(case):
        return shutil.copytree(golden / "text" / case, tmp_path / case)

    return make


# The tables ------------------------------------------------------------------------------------

CONFIGS = {
    "m1": ModelConfig.minimax_m1(),
    "tiny": ModelConfig.tiny(),
    "pattern": small_config(),
    "tied": small_config(tie_embeddings=True),
    "shared": small_config(shared_intermediate_size=20),
    "lightning only": small_config(num_layers=2, layer_types=("lightning",) * 2),
    "softmax first": small_config(num_layers=4, layer_types=("softmax", "lightning") * 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_tables_hold_every_parameter(name, layout):
    cfg = CONFIGS[name]
    if cfg.shared_intermediate_size and layout == "hf-native":
        pytest.skip("has no place for a shared expert")
    table = Table(cfg, layout)
    specs = param_specs(cfg)
    assert table.param_shapes() == {param: spec.shape for param, spec in specs.items()}
    for param, spec in specs.items():
        pieces = table.of_param(param)
        stacked = spec.shape[: len(next(iter(pieces)))]
        assert set(pieces) == set(itertools.product(*map(range, stacked)))
    numbers = sum(math.prod(spec.shape) for spec in specs.values())
    assert sum(map(math.prod, table.tensors.values())) == numbers


def test_released_names_and_shapes():
    tensors = Table(ModelConfig.minimax_m1(), "hf").tensors
    assert len(tensors) == 8243
    published = {
        "model.embed_tokens.weight": (200064, 6144),
        "lm_head.weight": (200064, 6144),
        "model.norm.weight": (6144,),
        "model.layers.0.input_layernorm.weight": (6144,),
        "model.layers.79.post_attention_layernorm.weight": (6144,),
        "model.layers.78.self_attn.qkv_proj.weight": (24576, 6144),
        "model.layers.0.self_attn.output_gate.weight": (8192, 6144),
        "model.layers.0.self_attn.norm.weight": (8192,),
        "model.layers.0.self_attn.out_proj.weight": (6144, 8192),
        "model.layers.7.self_attn.q_proj.weight": (8192, 6144),
        "model.layers.7.self_attn.k_proj.weight": (1024, 6144),
        "model.layers.79.self_attn.v_proj.weight": (1024, 6144),
        "model.layers.79.self_attn.o_proj.weight": (6144, 8192),
        "model.layers.3.block_sparse_moe.gate.weight": (32, 6144),
        "model.layers.3.block_sparse_moe.experts.31.w1.weight": (9216, 6144),
        "model.layers.3.block_sparse_moe.experts.31.w2.weight": (6144, 9216),
        "model.layers.3.block_sparse_moe.experts.31.w3.weight": (9216, 6144),
    }
    assert {key: tensors[key] for key in published} == published


def test_native_names_and_shapes():
    tensors = Table(ModelConfig.minimax_m1(), "hf-native").tensors
    assert tensors["model.layers.3.mlp.gate.weight"] == (32, 6144)
    assert tensors["model.layers.3.mlp.experts.gate_up_proj"] == (32, 18432, 6144)
    assert tensors["model.layers.3.mlp.experts.down_proj"] == (32, 6144, 9216)
    assert not [key for key in tensors if "block_sparse_moe" in key]


def test_layers_stand_where_the_model_puts_them():
    pieces = Table(ModelConfig.minimax_m1(), "hf").pieces
    places = {p.key: (p.param, p.place) for p in pieces}
    norm = "model.layers.{}.input_layernorm.weight".format
    assert places[norm(0)] == ("blocks.runs.0.attention_norm.scale", (0, 0))
    assert places[norm(6)] == ("blocks.runs.0.attention_norm.scale", (0, 6))
    assert places[norm(7)] == ("blocks.runs.1.attention_norm.scale", (0, 0))
    assert places[norm(78)] == ("blocks.runs.0.attention_norm.scale", (9, 6))


@pytest.mark.parametrize(
    ("axes", "part"),
    [("(h c k) d -> d h c k", None), ("d (h k) -> h k d", None), ("e (p f) d -> e d f", 1)],
)
def test_view_reads_any_slice_and_no_more_rows_than_it_needs(axes, part):
    sizes = {"h": 4, "c": 3, "k": 2, "d": 6, "e": 3, "f": 4, "p": 2}
    view = View.of(axes, sizes, part)
    tensor = np.arange(math.prod(view.shape)).reshape(view.shape)
    whole = view.read(tensor, (slice(None),) * len(view.order))
    assert whole.shape == view.param_shape
    read = []

    class Recorder:
        def __getitem__(self, index):
            read.append(tensor[index].size)
            return tensor[index]

    rng = np.random.default_rng(0)
    for _ in range(50):
        bounds = [sorted(rng.choice(n + 1, 2, replace=False)) for n in view.param_shape]
        index = tuple(slice(int(a), int(b)) for a, b in bounds)
        np.testing.assert_array_equal(view.read(Recorder(), index), whole[index])
    # One head, one expert or one column: exactly its own numbers are read.
    read.clear()
    first = tuple(slice(0, 1) if i == 0 else slice(None) for i in range(len(view.order)))
    assert view.read(Recorder(), first).size == read[0]


# Round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_released_layout_comes_back_byte_for_byte(case, golden, tmp_path):
    source = golden / "text" / case
    convert(source, tmp_path / "native", "hf-native")
    convert(tmp_path / "native", tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", "hf", shard_bytes=100_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(source))
    wanted = dataclasses.replace(ModelConfig.from_hf(source), extra=())
    assert dataclasses.replace(ModelConfig.from_hf(tmp_path / "back"), extra=()) == wanted


@pytest.mark.parametrize("layout", ["hf", "hf-native", "orbax"])
def test_save_and_load(layout, tmp_path):
    model = random_model(small_config(param_dtype="bfloat16", dtype="bfloat16"))
    mmjax.save(model, tmp_path / "model", layout)
    back = mmjax.load(tmp_path / "model")
    assert_same_model(back, model)
    assert dataclasses.replace(back.cfg, extra=()) == model.cfg


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_shared_expert(layout, tmp_path):
    model = random_model(small_config(shared_intermediate_size=20, shared_expert_mode="softmax"))
    mmjax.save(model, tmp_path / "model", layout)
    assert_same_model(mmjax.load(tmp_path / "model"), model)
    if layout == "hf":
        tensors = read_tensors(tmp_path / "model")
        assert tensors["model.layers.0.coefficient.weight"].shape == (1, 24)
        assert tensors["model.layers.0.shared_mlp.down_proj.weight"].shape == (24, 20)


def test_native_layout_has_no_shared_expert(tmp_path):
    model = random_model(small_config(shared_intermediate_size=20))
    with pytest.raises(CheckpointError, match=r"has a shared expert .*20.*; use the layout hf or"):
        mmjax.save(model, tmp_path / "model", "hf-native")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["hf", "hf-native", "orbax"])
def test_tied_embeddings(layout, tmp_path):
    model = random_model(small_config(tie_embeddings=True))
    mmjax.save(model, tmp_path / "model", layout)
    assert "lm_head.weight" not in read_tensors(tmp_path / "model")
    assert_same_model(mmjax.load(tmp_path / "model"), model)


def test_qkv_rows_are_head_major(tmp_path):
    model = random_model(small_config())
    mmjax.save(model, tmp_path / "model")
    rows = read_tensors(tmp_path / "model")["model.layers.2.self_attn.qkv_proj.weight"]
    qkv = model.blocks.runs[2].attention.qkv.get_value()[0, 0]  # [D, H, 3, K]
    np.testing.assert_array_equal(rows[8:16], qkv[:, 0, 1].T)  # k of the first head
    np.testing.assert_array_equal(rows[24:32], qkv[:, 1, 0].T)  # q of the second


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_dtype_is_converted_but_for_routers(dtype, layout, golden, tmp_path):
    convert(golden / "text" / "superblocks16_bf16", tmp_path / "model", layout)
    own = by_name(nnx.state(mmjax.load(tmp_path / "model")))
    model = mmjax.load(tmp_path / "model", dtype=dtype)
    assert (model.cfg.dtype, model.cfg.param_dtype) == (dtype, dtype)
    for name, variable in by_name(nnx.state(model)).items():
        expected = own[name].get_value().astype(jnp.float32 if "router" in name else dtype)
        assert variable.get_value().dtype == expected.dtype, name
        np.testing.assert_array_equal(variable.get_value(), expected, err_msg=name)


def test_bfloat16_gates_become_float32_when_a_dtype_is_given(golden, tmp_path):
    source = golden / "text" / "superblocks16_bf16"
    tensors = {n: t.astype(jnp.bfloat16) for n, t in read_tensors(source).items()}
    config = json.loads((source / "config.json").read_text())
    folder = write_folder(tmp_path / "gates", tensors, config)
    router = "blocks.runs.0.moe.router"
    assert by_name(nnx.state(mmjax.load(folder)))[router].get_value().dtype == jnp.bfloat16
    model = mmjax.load(folder, dtype=jnp.bfloat16)
    assert by_name(nnx.state(model))[router].get_value().dtype == jnp.float32


def test_released_names_under_native_config_and_the_other_way_round(golden, tmp_path):
    source = golden / "text" / "pattern010"
    convert(source, tmp_path / "native", "hf-native")
    reference = mmjax.load(source)
    native_config = (tmp_path / "native" / "config.json").read_text()
    mixed = shutil.copytree(source, tmp_path / "released names")
    (mixed / "config.json").write_text(native_config)
    assert_same_model(mmjax.load(mixed), reference)
    shutil.copyfile(source / "config.json", tmp_path / "native" / "config.json")
    assert_same_model(mmjax.load(tmp_path / "native"), reference)


def test_buffers_of_the_original_code_are_ignored(copy):
    folder = copy("pattern010")
    tensors = read_tensors(folder)
    for layer, name in itertools.product((0, 2), ("slope_rate", "query_decay", "diagonal_decay")):
        tensors[f"model.layers.{layer}.self_attn.{name}"] = np.zeros((2, 1, 1), np.float32)
    reference = mmjax.load(folder)
    save_file(tensors, folder / "model.safetensors")
    assert_same_model(mmjax.load(folder), reference)


def test_native_folders_hold_transformers_buffers(golden, tmp_path):
    source = golden / "text" / "pattern010"
    convert(source, tmp_path / "native", "hf-native")
    tensors = read_tensors(tmp_path / "native")
    cfg = ModelConfig.from_hf(source)
    shapes = buffer_shapes(cfg)
    assert {key: tensors[key].shape for key in shapes} == shapes
    assert set(tensors) == set(shapes) | set(Table(cfg, "hf-native").tensors)
    slope = tensors["model.layers.2.self_attn.slope_rate"]
    # Two heads, the last of three layers, transformers' formula.
    factor = 1 - 2 / (2 + 1e-5) + 1e-5
    np.testing.assert_allclose(slope[:, 0, 0], [2**-4 * factor, 2**-8 * factor], rtol=1e-6)
    keys = ("query_decay", "key_decay", "diagonal_decay")
    query, key, diagonal = (buffer(cfg, f"model.layers.0.self_attn.{k}") for k in keys)
    rate = 2**-4 * (1 + 1e-5)
    np.testing.assert_allclose(query[0, [0, 255], 0], np.exp(-rate * np.array([1, 256])), rtol=1e-5)
    np.testing.assert_allclose(key[0, [0, 255], 0], np.exp(-rate * np.array([255, 0])), rtol=1e-5)
    np.testing.assert_allclose(diagonal[0, 0, 9, [7, 9, 10]], [np.exp(-2 * rate), 1, 0], rtol=1e-5)


def test_what_transformers_computes_otherwise():
    assert differences(small_config(rotary_dim=8)) == []
    texts = differences(small_config(rotary_dim=4, postnorm=False))
    assert "all 8 dimensions" in texts[0]
    assert "un-normed" in texts[1]


VISION = ("vision_tower.vision_model.a.weight", "multi_modal_projector.b.bias", "image_newline")


def vl_folder(golden, path, **more):
    source = golden / "text" / "pattern010"
    tensors = {f"language_model.{n}": t for n, t in read_tensors(source).items()}
    tensors |= {name: np.zeros(3, np.float32) for name in VISION}
    config = {"text_config": json.loads((source / "config.json").read_text())}
    return write_folder(path, tensors | more, config)


def test_text_half_of_a_vl_folder(golden, tmp_path):
    folder = vl_folder(golden, tmp_path / "vl")
    with pytest.warns(CheckpointWarning, match="1 in image_newline, 1 in multi_modal_projector, 1"):
        model = mmjax.load(folder)
    assert_same_model(model, mmjax.load(golden / "text" / "pattern010"))


def test_vl_folder_with_a_text_tensor_outside_the_text_model(golden, tmp_path):
    stray = {"model.norm.weight": np.ones(40, np.float32)}
    folder = vl_folder(golden, tmp_path / "vl", **stray)
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight \(no language_model\.\) \[40\]"
    ):
        mmjax.load(folder)


def test_vision_tensors_without_a_text_prefix_are_unexpected(copy):
    folder = copy("pattern010")
    save_file(
        read_tensors(folder) | {"image_newline": np.zeros(3, np.float32)},
        folder / "model.safetensors",
    )
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: image_newline \[3\] is no tens"
    ):
        mmjax.load(folder)


def test_slices_of_safetensors_parameters(golden):
    """What a device on a mesh reads is the slice of the whole."""
    params = SafetensorsParams(golden / "text" / "superblocks16_bf16")
    rng = np.random.default_rng(0)
    for name, spec in params.specs.items():
        bounds = [sorted(rng.choice(n + 1, 2, replace=False)) for n in spec.shape]
        index = tuple(slice(int(a), int(b)) for a, b in bounds)
        whole = params.read(name, (slice(None),) * len(spec.shape))
        np.testing.assert_array_equal(params.read(name, index), whole[index])


# Writing ---------------------------------------------------------------------------------------


def test_shards_and_index(golden, tmp_path):
    source = golden / "text" / "hybrid8"
    convert(source, tmp_path / "model", "hf", shard_bytes=90_000)
    files = sorted(p.name for p in (tmp_path / "model").glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    tensors = read_tensors(source)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name in files:
        with safe_open(tmp_path / "model" / name, "np") as stream:
            held = [stream.get_tensor(key).nbytes for key in stream.keys()]  # noqa: SIM118
        assert sum(held) <= 90_000 or len(held) == 1


def test_companion_files_come_along(copy, tmp_path):
    folder = copy("pattern010")
    names = ["tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"]
    for name in names:
        (folder / name).write_text(f"this is {name}")
    convert(folder, tmp_path / "converted", "orbax")
    mmjax.save(mmjax.load(folder), tmp_path / "saved", tokenizer_from=folder)
    for target in ("converted", "saved"):
        copied = {n for n in names if (tmp_path / target / n).exists()}
        assert copied == set(names) - {"README.md"}
        assert (tmp_path / target / "tokenizer.json").read_text() == "this is tokenizer.json"


def test_written_files_are_as_readable_as_others(golden, tmp_path):
    convert(golden / "text" / "pattern010", tmp_path / "model", "hf")
    modes = {p.name: p.stat().st_mode for p in (tmp_path / "model").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_dtype_in_the_config_follows_the_tensors(copy, tmp_path):
    folder = copy("superblocks16_bf16")
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    mmjax.save(mmjax.load(folder, dtype="float32"), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "float32"


def test_destination_that_holds_something(golden, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match=f"{name}: 1 problem.*\n.*exists already"):
            convert(golden / "text" / "pattern010", tmp_path / name, "hf")
    assert (tmp_path / "full" / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert(golden / "text" / "pattern010", tmp_path / "empty", "hf")
    assert_same_model(mmjax.load(tmp_path / "empty"), mmjax.load(golden / "text" / "pattern010"))


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_nothing(golden, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(stream, "_write", fail)
    model = mmjax.load(golden / "text" / "pattern010")
    with pytest.raises(type(error)):
        mmjax.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_unknown_layout(golden, tmp_path):
    with pytest.raises(CheckpointError, match="unknown 'gguf'; known: hf, hf-native, orbax"):
        inspect.unwrap(convert)(golden / "text" / "pattern010", tmp_path / "model", "gguf")


# Bad input -------------------------------------------------------------------------------------


def problems(folder, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        mmjax.load(folder, **kwargs)
    assert str(caught.value).startswith(f"{folder}: ")
    return caught.value.problems


def rewrite(folder, **tensors):
    """Replaces tensors of a single-file folder, None for leaving one out."""
    held = read_tensors(folder) | tensors
    save_file({n: t for n, t in held.items() if t is not None}, folder / "model.safetensors")


NORM = "model.norm.weight"


def test_missing_tensor(copy):
    folder = copy("pattern010")
    rewrite(folder, **{NORM: None})
    assert problems(folder) == (f"{NORM} is missing, expected [40]",)


def test_unexpected_tensor(copy):
    folder = copy("pattern010")
    rewrite(folder, extra=np.zeros((2, 3), np.float32))
    expected = "model.safetensors: extra [2, 3] is no tensor of this model in the layout hf"
    assert problems(folder) == (expected,)


def test_wrong_shape(copy):
    folder = copy("pattern010")
    rewrite(folder, **{NORM: np.zeros((41,), np.float32)})
    expected = f"model.safetensors: {NORM} has shape [41], expected [40]"
    assert problems(folder) == (expected,)


def test_wrong_dtype(copy):
    folder = copy("pattern010")
    rewrite(folder, **{NORM: np.zeros((40,), np.int32)})
    expected = f"model.safetensors: {NORM} has dtype I32, expected F32, BF16, F16"
    assert problems(folder) == (expected,)


def test_one_parameter_in_two_dtypes(copy):
    folder = copy("hybrid8")
    name = "model.layers.3.self_attn.norm.weight"
    tensor = read_tensors(folder)[name]
    rewrite(folder, **{name: tensor.astype(jnp.bfloat16)})
    (text,) = problems(folder)
    assert text.startswith("blocks.runs.0.attention.norm is stacked from tensors of one dtype")
    assert f"{name} in BF16" in text
    model = mmjax.load(folder, dtype="float32")
    value = by_name(nnx.state(model))["blocks.runs.0.attention.norm"].get_value()[0, 3]
    np.testing.assert_array_equal(value.reshape(-1), tensor.astype(jnp.bfloat16).astype(np.float32))


def test_missing_shard(copy):
    folder = copy("superblocks16_bf16")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert problems(folder) == ("model-00002-of-00003.safetensors is missing",)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1], ids=["empty", "in the length", "header", "data"])
def test_truncated_shard(copy, keep):
    folder = copy("superblocks16_bf16")
    file = folder / "model-00002-of-00003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    (text,) = problems(folder)
    if keep in (0, 5):
        assert text == f"{file.name} is not a safetensors file: its header has no length"
    elif keep == 1000:
        header = 8 + int.from_bytes(data[:8], "little")
        assert text == f"{file.name} is truncated: it has 1000 bytes, its header alone {header}"
    else:
        sizes = f"it has {len(data) - 1} bytes, expected {len(data)}"
        assert text == f"{file.name} is truncated: {sizes}"


def test_bytes_after_the_end(copy):
    folder = copy("pattern010")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    (text,) = problems(folder)
    assert text.startswith("model.safetensors has bytes that no tensor owns: it has ")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "data_offsets": [0, 8]}}',
        b"\xff\xfe",
    ],
)
def test_corrupt_header(copy, header):
    folder = copy("pattern010")
    blob = len(header).to_bytes(8, "little") + header + bytes(8)
    (folder / "model.safetensors").write_bytes(blob)
    (text,) = problems(folder)
    assert text.startswith("model.safetensors has a corrupt header: ")


def test_header_length_that_is_no_length(copy):
    folder = copy("pattern010")
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    assert problems(folder) == (
        "model.safetensors is not a safetensors file: its header has no length",
    )


def test_shards_without_their_index(copy):
    folder = copy("superblocks16_bf16")
    (folder / "model.safetensors.index.json").unlink()
    (text,) = problems(folder)
    assert text.startswith("model.safetensors.index.json is missing, though there are shards such")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_index_that_is_none(copy, content):
    folder = copy("superblocks16_bf16")
    (folder / "model.safetensors.index.json").write_text(content)
    (text,) = problems(folder)
    assert text.startswith("model.safetensors.index.json is no index, expected an object with")


def test_index_that_disagrees_with_the_files(copy):
    folder = copy("superblocks16_bf16")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    moved, unlisted = "lm_head.weight", "model.norm.weight"
    index["weight_map"][moved] = "model-00001-of-00003.safetensors"
    del index["weight_map"][unlisted]
    file.write_text(json.dumps(index))
    name = "model.safetensors.index.json"
    first, last = (f"model-0000{i}-of-00003.safetensors" for i in (1, 3))
    assert set(problems(folder)) == {
        f"{first}: {moved} is not in this file, though {name} says so",
        f"{last}: {moved} is in this file, but {name} says {first}",
        f"{last}: {unlisted} is in this file, but {name} says nothing of it",
    }


def test_everything_wrong_is_told_at_once(copy, tmp_path):
    folder = copy("superblocks16_bf16")
    (folder / "model-00002-of-00003.safetensors").unlink()
    third = folder / "model-00003-of-00003.safetensors"
    with safe_open(third, "np") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    tensors["lm_head.weight"] = np.zeros((128, 33), np.float32)
    tensors["model.norm.weight"] = np.zeros(32, np.int64)
    save_file(tensors, third)
    config = json.loads((folder / "config.json").read_text()) | {"num_local_experts": 3}
    (folder / "config.json").write_text(json.dumps(config))
    found = problems(folder)
    assert found[0] == "model-00002-of-00003.safetensors is missing"
    assert f"{third.name}: lm_head.weight has shape [128, 33], expected [128, 32]" in found
    assert f"{third.name}: model.norm.weight has dtype I64, expected F32, BF16, F16" in found
    assert any("experts.3.w1.weight [24, 32] is no tensor of this model" in p for p in found)
    assert any("gate.weight has shape [4, 32], expected [3, 32]" in p for p in found)
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "out", "orbax")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{folder}: {len(found)} problems"
    assert len(lines) == 1 + 20 + 1
    assert lines[-1] == f"  ... and {len(found) - 20} more"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def orbax(golden, tmp_path):
    convert(golden / "text" / "pattern010", tmp_path / "orbax", "orbax")
    return tmp_path / "orbax"


def test_orbax_of_another_model(orbax):
    config = json.loads((orbax / "config.json").read_text())
    config |= {"vocab_size": 131, "attn_type_list": [0, 1, 1]}
    (orbax / "config.json").write_text(json.dumps(config))
    found = problems(orbax)
    assert "embed.embedding has shape [130, 40], expected [131, 40]" in found
    assert "blocks.runs.1.attention.q has shape [1, 1, 40, 2, 16], expected [1, 2, 40, 2, 16]" in (
        found
    )
    assert "blocks.runs.2.attention.qkv [1, 1, 40, 2, 3, 16] is no parameter of this model" in found


def test_orbax_that_lacks_a_parameter(orbax):
    config = json.loads((orbax / "config.json").read_text()) | {"shared_intermediate_size": 24}
    (orbax / "config.json").write_text(json.dumps(config))
    missing = "blocks.runs.0.moe.shared.down is missing, expected [1, 1, 24, 40]"
    assert missing in problems(orbax)


@pytest.mark.parametrize("lost", ["_METADATA", "*"])
def test_orbax_folder_that_is_damaged(orbax, lost):
    for file in (orbax / "params").glob(lost):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    (text,) = problems(orbax)
    assert text.startswith(("params/ holds no Orbax checkpoint", "params/ cannot be read: "))


def test_folders_that_are_no_model(tmp_path):
    assert problems(tmp_path / "nowhere") == ("does not exist",)
    (tmp_path / "file").write_text("")
    assert problems(tmp_path / "file") == ("is a file, expected a folder",)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pytorch_model.bin").write_text("")
    (text,) = problems(tmp_path / "other")
    assert text.startswith("is no model folder: expected model.safetensors, model.safetensors.ind")
    assert text.endswith("found pytorch_model.bin")


def test_folder_without_a_config(copy):
    folder = copy("pattern010")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        mmjax.load(folder)
