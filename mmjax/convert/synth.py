"""Checkpoints in the structure of a released one, of any size, to try things on."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from mmjax.config import ModelConfig
from mmjax.convert import stream, write
from mmjax.convert.errors import CheckpointError
from mmjax.convert.params import param_specs
from mmjax.convert.stream import Output, Unit
from mmjax.convert.table import Table, TensorLayout

Fill = Literal["random", "zeros"]
FILLS: tuple[Fill, ...] = get_args(Fill)


def synthesise(
    cfg: ModelConfig,
    target: str | Path,
    layout: TensorLayout = "hf",
    *,
    fill: Fill = "random",
    shard_bytes: int = write.SHARD_BYTES,
) -> None:
    """Writes a model folder with every tensor that a model of this shape has.

    Args:
      cfg: The architecture; `param_dtype` is the weights', routers are float32.
      target: A folder that does not exist yet, or an empty one.
      layout: "hf" | "hf-native".
      fill: "random" draws numbers around a hundredth, the same ones each time; "zeros" leaves
        holes, so that the files are of their full length but take no room on most file systems.
      shard_bytes: Largest safetensors file, one tensor at least.

    Raises:
      CheckpointError: the target holds something, or the layout cannot hold this model.
    """
    specs = param_specs(cfg)
    make = _random_rows(cfg, layout) if fill == "random" else _no_rows
    output = write.safetensors_output(cfg, specs, layout, shard_bytes, make)
    if fill == "zeros":
        output = _hollow(output)
    with write.new_folder(Path(target)) as folder:
        stream.write_all(output, folder)


def preset(name: str, *, layers: int | None, experts: int | None, vocab: int | None) -> ModelConfig:
    """A released model's shape with fewer layers, experts or tokens.

    Args:
      name: "minimax_m1" | "minimax_text_01" | "minimax_vl_01".
      layers: The first ones; None for all.
      experts: Of each layer; None for all.
      vocab: Tokens; None for all.

    Raises:
      ConfigError: such a model cannot be.
    """
    changes = {"num_layers": layers, "num_experts": experts, "vocab_size": vocab}
    wanted = {key: value for key, value in changes.items() if value is not None}
    cfg: ModelConfig = getattr(ModelConfig, name)(**wanted)
    return cfg


def _no_rows(key: str, rows: range) -> np.ndarray:
    raise AssertionError(f"rows of {key} are left out")


def _hollow(output: Output) -> Output:
    """The same files with their headers alone written."""
    lengths: dict[str, int] = {}
    for unit in output.units:
        lengths[unit.file] = max(lengths.get(unit.file, 0), unit.offset + unit.size)

    def prepare(folder: Path) -> None:
        for name, length in lengths.items():
            with (folder / name).open("wb") as file:
                os.truncate(file.fileno(), length)

    def head(unit: Unit) -> Unit:
        header = unit.parts[0]()
        return Unit(unit.file, 0, len(header), (lambda: header,))

    heads = [head(unit) for unit in output.units if not unit.offset]
    return Output(heads, output.texts, prepare, output.largest)


def _random_rows(cfg: ModelConfig, layout: TensorLayout) -> Callable[[str, range], np.ndarray]:
    table, specs = Table(cfg, layout), param_specs(cfg)

    def make(key: str, rows: range) -> np.ndarray:
        piece = table.of_key(key)[0]
        shape = piece.view.cut(len(rows)).shape
        dtype = np.dtype(specs[piece.param].dtype)
        seed = zlib.crc32(f"{key} {rows.start}".encode())
        return random_numbers(math.prod(shape), dtype, seed).reshape(shape)

    return make


# For each width: which bits are drawn, and the exponent that the others make: ±[2^-7, 2^-5).
_DRAWN = {
    "bfloat16": (0x80FF, 0x3C00),
    "float16": (0x87FF, 0x2000),
    "float32": (0x80FFFFFF, 0x3C000000),
}


def random_numbers(count: int, dtype: np.dtype, seed: int) -> np.ndarray:
    """Numbers of 2^-7 to 2^-5 of either sign, as fast as their bits can be drawn."""
    if dtype.name not in _DRAWN:
        raise CheckpointError("synth", [f"no random numbers in {dtype.name}"])
    drawn, fixed = _DRAWN[dtype.name]
    words = -(-count * dtype.itemsize // 8)
    bits = np.random.SFC64(seed).random_raw(words).view(f"u{dtype.itemsize}")[:count]
    bits &= np.array(drawn, bits.dtype)
    bits |= np.array(fixed, bits.dtype)
    return bits.view(dtype)
