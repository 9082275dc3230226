"""Conversion at size: in units, resumed after a kill, checked, planned from headers alone."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import mmjax
from mmjax import cli
from mmjax.config import ModelConfig
from mmjax.convert import CheckpointError, convert, stream
from mmjax.convert.api import open_params, preview
from mmjax.convert.orbax_folder import _plain_array
from mmjax.convert.params import by_name
from mmjax.convert.safetensors_folder import _Tensor
from mmjax.convert.synth import preset, random_numbers, synthesise
from mmjax.sharding import make_mesh
from tests.mmjax.programs import small_config
from tests.mmjax.test_convert import assert_same_tensors, read_tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Several files, several units a file, tensors of several parts."""
    folder = tmp_path_factory.mktemp("synth") / "model"
    cfg = small_config(param_dtype="bfloat16", vocab_size=302)
    synthesise(cfg, folder, shard_bytes=30_000)
    return folder


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(stream, "UNIT_BYTES", 3000)


def entries(path):
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize("layout", ["hf", "hf-native", "orbax"])
def test_units_there_and_back(source, tmp_path, layout):
    assert len(list(source.glob("*.safetensors"))) > 1
    convert(source, tmp_path / "there", layout, shard_bytes=20_000)
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(source))
    assert entries(tmp_path) == ["back", "there"]
    assert stream.JOURNAL not in entries(tmp_path / "there")


def test_orbax_reads_what_was_streamed(source, tmp_path):
    """With Orbax's own reader, chunks that hang over and stacked ones included."""
    convert(source, tmp_path / "orbax", "orbax")
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(tmp_path / "orbax" / "params")
    expected = by_name(nnx.state(mmjax.load(source)))
    assert set(arrays) == set(expected)
    for name, variable in expected.items():
        np.testing.assert_array_equal(arrays[name], variable.get_value(), err_msg=name)
    zarray = json.loads((tmp_path / "orbax/params/embed.embedding/.zarray").read_text())
    assert 302 % zarray["chunks"][0]


def test_what_orbax_wrote_is_read_in_slices(source, tmp_path):
    model = mmjax.load(source)
    mmjax.save(model, tmp_path / "orbax", "orbax")
    params = open_params(tmp_path / "orbax")
    value = by_name(nnx.state(model))["blocks.runs.0.moe.w1"].get_value()
    index = (slice(0, 1), slice(0, 1), slice(1, 3), slice(4, 9), slice(None))
    np.testing.assert_array_equal(params.read("blocks.runs.0.moe.w1", index), value[index])


@pytest.mark.parametrize(
    "changed", [{"order": "?"}, {"dtype": ">f4"}, {"compressor": {"id": "zlib"}}]
)
def test_arrays_that_lie_otherwise_are_left_to_tensorstore(tmp_path, changed):
    told = {"zarr_format": 2, "chunks": [3], "order": "C", "dtype": "<f4", "compressor": None}
    (tmp_path / ".zarray").write_text(json.dumps(told))
    assert _plain_array(tmp_path / ".zarray") == ((3,), "C", np.dtype("float32"))
    (tmp_path / ".zarray").write_text(json.dumps(told | changed))
    assert _plain_array(tmp_path / ".zarray") is None
    assert _plain_array(tmp_path / "none") is None


def test_chunks_are_read_as_tensorstore_reads_them(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "orbax", "orbax")
    plain, through = open_params(tmp_path / "orbax"), open_params(tmp_path / "orbax")
    monkeypatch.setattr(through, "_plain", dict.fromkeys(through.specs))
    monkeypatch.setattr(plain, "_stores", None)
    for name, spec in plain.specs.items():
        chunk, _, dtype = plain._plain[name]
        assert dtype == spec.dtype
        for start in itertools.product(*map(range, [0] * len(chunk), spec.shape, chunk)):
            index = tuple(map(slice, start, np.minimum(np.add(start, chunk), spec.shape)))
            np.testing.assert_array_equal(plain.read(name, index), through.read(name, index))
    assert {order for _, order, _ in plain._plain.values()} == {"C", "F"}
    index = (slice(1, 3), slice(0, 5))
    monkeypatch.undo()
    ours = open_params(tmp_path / "orbax").read("embed.embedding", index)  # No whole chunk.
    np.testing.assert_array_equal(ours, through.read("embed.embedding", index))


def test_a_chunk_cut_short_is_told(source, tmp_path):
    convert(source, tmp_path / "orbax", "orbax")
    chunk = tmp_path / "orbax/params/embed.embedding/1.0"
    chunk.write_bytes(chunk.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"1\.0: 1 problem\s+ends within embed.embedding"):
        convert(tmp_path / "orbax", tmp_path / "back", "hf")


# Kills and damage ------------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
from mmjax.convert import convert, stream
stream.UNIT_BYTES = 3000
write, count = stream.Journal.note, 0
def note(*args):
    global count
    write(*args)
    count += 1
    if count == 7:
        os.kill(os.getpid(), signal.SIGKILL)
stream.Journal.note = note
convert(sys.argv[1], sys.argv[2], sys.argv[3])
"""


def test_goes_on_after_a_kill(source, tmp_path, monkeypatch):
    layout, target = "orbax", tmp_path / "out"
    argv = [sys.executable, "-c", _KILLED, str(source), str(target), layout]
    ended = subprocess.run(argv, check=False, capture_output=True, cwd=Path.cwd())
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    partial = tmp_path / ".out.partial"
    assert entries(tmp_path) == [".out.partial"]
    assert len((partial / stream.JOURNAL).read_text().splitlines()) == 1 + 7
    assert "holds a beginning" in preview(source, target, layout)
    written = []
    write = stream._write

    def recorded(folder, unit, *, sync):
        written.append(unit)
        return write(folder, unit, sync=sync)

    monkeypatch.setattr(stream, "_write", recorded)
    convert(source, target, layout)
    monkeypatch.undo()
    whole = tmp_path / "whole"
    monkeypatch.setattr(stream, "UNIT_BYTES", 3000)
    monkeypatch.setattr(stream, "_write", lambda *a, **k: (again.append(1), write(*a, **k))[1])
    again = []
    convert(source, whole, layout)
    assert len(written) == len(again) - 7
    files = [p.relative_to(whole) for p in whole.rglob("*") if p.is_file()]
    told_by_orbax = {"_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt"}
    for file in files:
        if file.name not in told_by_orbax:
            assert (target / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_journal_line_cut_short_does_not_count(tmp_path):
    journal = stream.Journal(tmp_path, "of")
    journal.begin()
    journal.note(0, 0xAB)
    journal.note(1, 0xCD)
    journal.close()
    file = tmp_path / stream.JOURNAL
    file.write_text(file.read_text()[:-4])
    again = stream.Journal(tmp_path, "of")
    assert again.done == {0: 0xAB}
    again.note(2, 0xEF)
    again.close()
    last = stream.Journal(tmp_path, "of")
    assert last.done == {0: 0xAB, 2: 0xEF}
    last.close()


def test_error_keeps_what_was_written_and_goes_on(source, tmp_path, monkeypatch):
    write, count = stream._write, []

    def fail(folder, unit, *, sync):
        count.append(unit)
        if len(count) > 20:
            raise OSError("disk full")
        return write(folder, unit, sync=sync)

    monkeypatch.setattr(stream, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(source, tmp_path / "out", "hf", workers=1)
    assert entries(tmp_path) == [".out.partial"]
    monkeypatch.setattr(stream, "_write", write)
    convert(source, tmp_path / "out", "hf", workers=1)
    assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(source))
    assert entries(tmp_path) == ["out"]


def test_damage_is_found_and_mended(source, tmp_path, monkeypatch):
    """A disk that gives back other bytes than it took."""
    write = stream._write

    def damage(folder, unit, *, sync):
        crc = write(folder, unit, sync=sync)
        if unit.offset == 0 and unit.file.startswith("model-00002"):
            with (folder / unit.file).open("r+b") as file:
                file.seek(unit.size - 1)
                file.write(b"\xff")
        return crc

    monkeypatch.setattr(stream, "_write", damage)
    with pytest.raises(CheckpointError, match=r"model-00002.*: bytes 0 to \d+ differ from what"):
        convert(source, tmp_path / "out", "hf", shard_bytes=20_000)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(stream, "_write", write)
    convert(source, tmp_path / "out", "hf", shard_bytes=20_000)
    assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(source))


def test_damage_between_a_kill_and_the_next_run_is_mended(source, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_write_texts", None)
    with pytest.raises(TypeError):
        convert(source, tmp_path / "out", "hf", shard_bytes=20_000)
    monkeypatch.undo()
    monkeypatch.setattr(stream, "UNIT_BYTES", 3000)
    file = tmp_path / ".out.partial" / "model-00002-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    done = convert(source, tmp_path / "out", "hf", shard_bytes=20_000)
    assert 0 < done.written < 7000
    assert_same_tensors(read_tensors(tmp_path / "out"), read_tensors(source))


def test_two_conversions_to_one_place(source, tmp_path, monkeypatch):
    (tmp_path / ".out.partial").mkdir()
    journal = stream.Journal(tmp_path / ".out.partial", "another")
    with pytest.raises(CheckpointError, match="another process is converting to it"):
        convert(source, tmp_path / "out", "hf")
    journal.begin()
    journal.note(0, 1)
    journal.close()
    with pytest.raises(CheckpointError, match="holds the beginning of another conversion"):
        convert(source, tmp_path / "out", "hf")


def test_too_little_room_is_told_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(CheckpointError, match=r"needs [\d.]+ MB, of which 0.0 MB are free there"):
        convert(source, tmp_path / "out", "orbax")
    assert not entries(tmp_path)


# Size ------------------------------------------------------------------------------------------


def test_released_structure_in_hundreds_of_shards(tmp_path, monkeypatch, capsys):
    """Files of their full 912 GB, of which only the headers are on the disk; none else is read."""
    monkeypatch.setattr(stream, "UNIT_BYTES", 128 * 2**20)
    folder = tmp_path / "model"
    argv = [
        "synth",
        str(folder),
        "--preset",
        "minimax_vl_01",
        "--fill",
        "zeros",
        "--shard-mb",
        "2350",
    ]
    assert cli.main(argv) == 0
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 8637
    assert len(set(index["weight_map"].values())) > 400
    on_disk = sum(p.stat().st_blocks * 512 for p in folder.iterdir())
    assert on_disk < 30e6 < 9e11 < sum(p.stat().st_size for p in folder.iterdir())
    monkeypatch.setattr(_Tensor, "__getitem__", None)
    assert (
        cli.main(["convert", str(folder), str(tmp_path / "o"), "--to", "orbax", "--dry-run"]) == 0
    )
    told = capsys.readouterr().out
    assert "hf, 4" in told
    assert "456,437,219,328 parameters" in told
    assert "nothing was written" in told
    assert entries(tmp_path) == ["model"]


def test_random_numbers_are_usable_weights():
    for name in ("bfloat16", "float16", "float32"):
        numbers = random_numbers(1001, np.dtype(name), 3).astype(np.float64)
        assert numbers.shape == (1001,)
        assert 2**-7 <= np.abs(numbers).min() < 2**-6 < np.abs(numbers).max() < 2**-5
        assert 400 < (numbers > 0).sum() < 600


def test_synth_with_its_structure_cut(tmp_path):
    cfg = preset("minimax_text_01", layers=2, experts=2, vocab=7)
    assert (cfg.num_layers, cfg.num_experts, cfg.vocab_size) == (2, 2, 7)
    assert cfg.hidden_size == 6144
    with pytest.raises(SystemExit):
        cli.main(["synth", str(tmp_path / "m"), "--layers", "0"])


# Onto a mesh -----------------------------------------------------------------------------------


def test_a_mesh_reads_each_number_once(source, monkeypatch):
    """Devices that hold the same part share one reading of it."""
    read = []
    getitem = _Tensor.__getitem__

    def recorded(self, index):
        out = getitem(self, index)
        read.append(out.nbytes)
        return out

    monkeypatch.setattr(_Tensor, "__getitem__", recorded)
    whole = sum(t.nbytes for t in read_tensors(source).values())
    reference = by_name(nnx.state(mmjax.load(source)))
    assert sum(read) == whole
    read.clear()
    cfg = ModelConfig.from_hf(source)
    assert cfg.num_kv_heads == 2  # of which `model` = 4 would be refused
    mesh = make_mesh({"data": 4, "model": 2}, jax.devices()[:8])
    loaded = by_name(nnx.state(mmjax.load(source, mesh=mesh)))
    # Norms and routers are cut within a key's dimension, where a row is read for its parts.
    assert whole <= sum(read) < 1.3 * whole
    for name, variable in loaded.items():
        np.testing.assert_array_equal(variable.get_value(), reference[name].get_value())
