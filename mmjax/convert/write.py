"""Writing a model folder: tensor by tensor, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.numpy import save_file

from mmjax.convert import headers, native
from mmjax.convert.errors import CheckpointError
from mmjax.convert.params import Params
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


def write_safetensors(
    params: Params, folder: Path, layout: TensorLayout, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes config.json and the tensors, holding one shard in memory.

    In transformers' layout its buffers are written too, so that it misses nothing.

    Args:
      params: Where the values come from.
      folder: An existing folder.
      layout: "hf" | "hf-native".
      shard_bytes: A file ends before the tensor that would make it larger than this.

    Raises:
      CheckpointError: the layout cannot hold this model.
    """
    table = Table(params.cfg, layout)
    buffers = native.buffer_shapes(params.cfg) if layout == "hf-native" else {}
    sizes = {k: math.prod(s) * _dtype(params, table, k).itemsize for k, s in table.tensors.items()}
    sizes |= {key: math.prod(shape) * 4 for key, shape in buffers.items()}
    shards = _shards(sizes, shard_bytes)
    write_config(params, folder, layout)
    weight_map: dict[str, str] = {}
    with _progress(sum(sizes.values())) as advance:
        for number, keys in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            name = headers.SINGLE if len(shards) == 1 else name
            tensors = {}
            for key in keys:
                tensors[key] = (
                    native.buffer(params.cfg, key)
                    if key in buffers
                    else table.export(key, params.at)
                )
                advance(sizes[key])
            save_file(tensors, folder / name, metadata={"format": "pt"})
            # safetensors makes files that only their owner can read.
            (folder / name).chmod((folder / "config.json").stat().st_mode)
            weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / headers.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _dtype(params: Params, table: Table, key: str) -> np.dtype:
    dtypes = {params.specs[piece.param].dtype for piece in table.of_key(key)}
    if len(dtypes) > 1:
        problem = f"{key} would mix {' and '.join(sorted(d.name for d in dtypes))}"
        raise CheckpointError(f"layout {table.layout}", [problem])
    return dtypes.pop()


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


def write_config(params: Params, folder: Path, layout: TensorLayout) -> None:
    """Writes config.json in the layout's keys, with the dtype that the parameters are in."""
    config = params.cfg.to_hf(layout)
    dtype = params.specs["embed.embedding"].dtype.name
    if layout == "hf-native":
        config["dtype"] = dtype  # transformers loads in this one
    config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on a terminal's stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing", total=total)
        yield lambda done: progress.advance(task, done)
