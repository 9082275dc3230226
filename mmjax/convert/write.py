"""What a model folder will hold: the files of each layout, in units that are made one by one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from mmjax.config import ModelConfig
from mmjax.convert import headers, native, stream
from mmjax.convert.errors import CheckpointError
from mmjax.convert.params import Params, Specs
from mmjax.convert.stream import Output, Unit
from mmjax.convert.table import Table, TensorLayout

SHARD_BYTES = 5_000_000_000
# Files that belong to a model but are none of its weights.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def check_destination(path: Path) -> None:
    """Refuses a place that holds something.

    Raises:
      CheckpointError: `path` is a file or a folder that is not empty.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise CheckpointError(path, ["exists already; name a new folder or an empty one"])


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` once the block ends well and vanishes otherwise."""
    check_destination(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial)
        raise


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and generation settings, those that there are."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


# Makes rows of a tensor: places of its first axis.
type _Make = Callable[[str, range], np.ndarray]


def safetensors_output(
    cfg: ModelConfig, specs: Specs, layout: TensorLayout, shard_bytes: int, make: _Make
) -> Output:
    """Files of safetensors, in units of at most `stream.UNIT_BYTES` or one row of a tensor.

    In transformers' layout its buffers are written too, so that it misses nothing.

    Args:
      cfg: The architecture.
      specs: Dtype of each parameter.
      layout: "hf" | "hf-native".
      shard_bytes: A file ends before the tensor that would make it larger than this.
      make: Gives rows of a tensor.

    Raises:
      CheckpointError: the layout cannot hold this model.
    """
    table = Table(cfg, layout)
    buffers = native.buffer_shapes(cfg) if layout == "hf-native" else {}
    shapes = table.tensors | buffers
    dtypes = {k: _dtype(specs, table, k) for k in table.tensors}
    dtypes |= dict.fromkeys(buffers, np.dtype(np.float32))
    sizes = {k: math.prod(shape) * dtypes[k].itemsize for k, shape in shapes.items()}
    shards = _shards(sizes, shard_bytes)
    units: list[Unit] = []
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        name = headers.SINGLE if len(shards) == 1 else name
        header = _header(keys, shapes, dtypes, sizes)
        parts: list[_Part] = [(len(header), partial(bytes, header))]
        for key in keys:
            if key in buffers:
                parts.append((sizes[key], partial(native.buffer, cfg, key)))
            else:
                lead = table.of_key(key)[0].view.lead
                parts += [
                    (size, partial(make, key, rows)) for size, rows in _rows(lead, sizes[key])
                ]
        units += _grouped(name, parts)
        weight_map |= dict.fromkeys(keys, name)
    texts = {"config.json": config_text(cfg, specs, layout)}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        texts[headers.INDEX] = json.dumps(index, indent=2) + "\n"
    return Output(units, texts, lambda _: None, _largest(units))


def from_params(params: Params, layout: TensorLayout) -> _Make:
    """Makes rows of tensors out of parameters."""
    table = Table(params.cfg, layout)
    return lambda key, rows: table.export(key, rows, params.read)


type _Part = tuple[int, Callable[[], np.ndarray | bytes]]


def _rows(lead: int, size: int) -> Iterator[tuple[int, range]]:
    """Bytes and rows of the parts in which a tensor is made."""
    each = size // lead
    step = stream.even_step(lead, each)
    for start in range(0, lead, step):
        rows = range(start, min(start + step, lead))
        yield each * len(rows), rows


def _grouped(file: str, parts: list[_Part]) -> Iterator[Unit]:
    """Units of neighbouring parts."""
    offset = filled = 0
    group: list[Callable[[], np.ndarray | bytes]] = []
    for size, make in parts:
        if group and filled + size > stream.UNIT_BYTES:
            yield Unit(file, offset, filled, tuple(group))
            offset, group, filled = offset + filled, [], 0
        group.append(make)
        filled += size
    yield Unit(file, offset, filled, tuple(group))


def _largest(units: list[Unit]) -> int:
    return max(unit.size for unit in units)


_NAMES = {np.dtype(name): code for code, name in headers.DTYPES.items()}


def _header(
    keys: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    sizes: Mapping[str, int],
) -> bytes:
    """The head of a safetensors file: its length, then JSON, filled up to a multiple of eight."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key in keys:
        stop = start + sizes[key]
        entries[key] = {
            "dtype": _NAMES[dtypes[key]],
            "shape": list(shapes[key]),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _dtype(specs: Specs, table: Table, key: str) -> np.dtype:
    dtypes = {specs[piece.param].dtype for piece in table.of_key(key)}
    if len(dtypes) > 1:
        problem = f"{key} would mix {' and '.join(sorted(d.name for d in dtypes))}"
        raise CheckpointError(f"layout {table.layout}", [problem])
    return np.dtype(dtypes.pop())


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Keys in order, cut where a file would outgrow `shard_bytes`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def config_text(cfg: ModelConfig, specs: Specs, layout: TensorLayout) -> str:
    """config.json in the layout's keys, with the dtype that the parameters are in."""
    config = cfg.to_hf(layout)
    dtype = specs["embed.embedding"].dtype.name
    if layout == "hf-native":
        config["dtype"] = dtype  # transformers loads in this one
    config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    return json.dumps(config, indent=2) + "\n"
