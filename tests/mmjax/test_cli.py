"""The command line: conversion in every direction, and one message for what is wrong."""

import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax import cli
from mmjax.convert import convert
from mmjax.convert.api import LAYOUTS
from mmjax.convert.params import by_name


@pytest.fixture(scope="module")
def released(golden):
    return golden / "text" / "pattern010"


@pytest.fixture(scope="module")
def sources(released, tmp_path_factory):
    """The same model in every layout."""
    root = tmp_path_factory.mktemp("sources")
    for layout in LAYOUTS:
        convert(released, root / layout, layout)
    return root


@pytest.mark.parametrize(("source", "target"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_convert(sources, released, source, target, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["convert", str(sources / source), str(out), "--to", target]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"wrote {out}: 0.0")
    assert ("its logits will differ" in told.err) == (target == "hf-native")
    names = {p.name for p in out.iterdir()}
    assert names == {"config.json", "params" if target == "orbax" else "model.safetensors"}
    expected = by_name(nnx.state(mmjax.load(released)))
    for name, variable in by_name(nnx.state(mmjax.load(out))).items():
        np.testing.assert_array_equal(variable.get_value(), expected[name].get_value())


def _missing_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    return "model-00002-of-00003.safetensors is missing"


def _truncated_file(folder):
    file = folder / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "model-00003-of-00003.safetensors is truncated: it has 222396 bytes, expected 222496"


def _change(folder, change):
    """Changes the tensors of the third shard, and the index with them."""
    file, index = (
        folder / "model-00003-of-00003.safetensors",
        folder / "model.safetensors.index.json",
    )
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    told = json.loads(index.read_text())
    told["weight_map"] |= dict.fromkeys(tensors, file.name)
    index.write_text(json.dumps(told))


def _wrong_shape(folder):
    _change(folder, lambda t: t.update({"model.norm.weight": np.zeros((31,), np.float32)}))
    return "model-00003-of-00003.safetensors: model.norm.weight has shape [31], expected [32]"


def _unknown_key(folder):
    _change(folder, lambda t: t.update({"model.normal.weight": np.zeros((4,), np.float32)}))
    return "model-00003-of-00003.safetensors: model.normal.weight [4] is no tensor of this model"


def _misspelt_config(folder):
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"hidden_size"', '"hiden_size"'))
    return "config.json lacks hidden_size"


def _unknown_attention(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"attn_type_list": [0] * 15 + [2]}))
    return "config.json: unknown attention type 2 in attn_type_list; known: 0, 1"


@pytest.mark.parametrize(
    "damage",
    [
        _missing_shard,
        _truncated_file,
        _wrong_shape,
        _unknown_key,
        _misspelt_config,
        _unknown_attention,
    ],
)
def test_bad_input(golden, damage, tmp_path, capsys):
    folder = shutil.copytree(golden / "text" / "superblocks16_bf16", tmp_path / "in")
    message = damage(folder)
    assert cli.main(["convert", str(folder), str(tmp_path / "out"), "--to", "orbax"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("mmjax convert: error: ")
    assert message in told.err
    assert "Traceback" not in told.err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_destination_that_holds_something(released, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert cli.main(["convert", str(released), str(tmp_path), "--to", "hf"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_vision_tensors_are_told(released, tmp_path, capsys):
    (tmp_path / "vl").mkdir()
    text = {f"language_model.{n}": t for n, t in load_file(released / "model.safetensors").items()}
    save_file(text | {"image_newline": np.zeros(4, np.float32)}, tmp_path / "vl/model.safetensors")
    config = {"text_config": json.loads((released / "config.json").read_text())}
    (tmp_path / "vl" / "config.json").write_text(json.dumps(config))
    assert cli.main(["convert", str(tmp_path / "vl"), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert "not part of the text model stay behind: 1 in image_newline" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["convert"], ["convert", "a", "b", "--to", "gguf"], ["fly"]])
def test_wrong_arguments(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: mmjax" in capsys.readouterr().err


def test_interrupt(released, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "convert", interrupt)
    assert cli.main(["convert", str(released), str(tmp_path / "out"), "--to", "hf"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_as_a_program(tmp_path):
    """A clean exit code and stderr in a process of its own; help does not load the engine."""
    missing = [str(tmp_path / "nowhere"), str(tmp_path / "out"), "--to", "hf"]
    program = [sys.executable, "-m", "mmjax.cli", "convert", *missing]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == (
        f"mmjax convert: error: {tmp_path / 'nowhere'}: 1 problem\n  does not exist\n"
    )
    assert not (tmp_path / "out").exists()
