"""What a folder of safetensors files holds, read from the headers alone."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The formats of released weights; anything else (integers, float8) needs a rule of its own.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
# What safetensors itself allows.
_LARGEST_HEADER = 100_000_000


class TensorInfo(NamedTuple):
    """One tensor of a file: its name there, its format ("BF16"), its shape, its first byte."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class Folder(NamedTuple):
    """The tensors of a folder by name, what is wrong with its files, and the names lost so."""

    tensors: dict[str, TensorInfo]
    problems: list[str]
    lost: set[str]


class _BadFileError(ValueError):
    """A file that is no whole safetensors file."""


def read_folder(path: Path) -> Folder:
    """Reads the headers of `model.safetensors`, or of every file that the index names."""
    index, problems = _read_index(path)
    tensors: dict[str, TensorInfo] = {}
    lost: set[str] = set()
    names = sorted({SINGLE} if index is None else set(index.values()))
    told_of: dict[str, set[str]] = {name: set() for name in names}
    for key, name in ({} if index is None else index).items():
        told_of[name].add(key)
    with ThreadPoolExecutor() as pool:  # Hundreds of files on a network's disk take a while.
        every = list(pool.map(lambda name: _try_header(path / name), names))
    for name, found in zip(names, every, strict=True):
        told = told_of[name]
        if isinstance(found, _BadFileError):
            problems.append(str(found))
            lost |= told
            continue
        if index is not None:
            problems += [
                f"{name}: {key} is not in this file, though {INDEX} says so"
                for key in sorted(told - set(found))
            ]
            problems += [
                f"{name}: {key} is in this file, but {INDEX} says {index.get(key, 'nothing of it')}"
                for key in sorted(set(found) - told)
            ]
            lost |= told - set(found)
        tensors |= found
    return Folder(tensors, problems, lost)


def _try_header(file: Path) -> dict[str, TensorInfo] | _BadFileError:
    try:
        return read_header(file)
    except _BadFileError as error:
        return error


def _read_index(path: Path) -> tuple[dict[str, str] | None, list[str]]:
    """The file of each key; None without an index."""
    file = path / INDEX
    if not file.exists():
        parts = sorted(p.name for p in path.glob("model-*-of-*.safetensors"))
        if parts and not (path / SINGLE).exists():
            return {}, [f"{INDEX} is missing, though there are shards such as {parts[0]}"]
        return None, []
    try:
        index = json.loads(file.read_text())["weight_map"]
        return {str(key): str(name) for key, name in index.items()}, []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{INDEX} is no index, expected an object with a weight_map: {error!r}"]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, once its length agrees with its header.

    Raises:
      _BadFileError: no such file, cut short, or not a safetensors file.
    """
    if not file.is_file():
        raise _BadFileError(f"{file.name} is missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _LARGEST_HEADER:
            raise _BadFileError(f"{file.name} is not a safetensors file: its header has no length")
        if 8 + length > size:
            raise _BadFileError(
                f"{file.name} is truncated: it has {size} bytes, its header alone {8 + length}"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        infos = {key: _tensor(file, key, entry, 8 + length) for key, entry in header.items()}
        ends = [entry["data_offsets"][1] for entry in header.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _BadFileError(f"{file.name} has a corrupt header: {error!r}") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        what = "is truncated" if size < expected else "has bytes that no tensor owns"
        raise _BadFileError(f"{file.name} {what}: it has {size} bytes, expected {expected}")
    return infos


def _tensor(file: Path, name: str, entry: dict[str, Any], data: int) -> TensorInfo:
    start, stop = entry["data_offsets"]
    shape = tuple(map(int, entry["shape"]))
    info = TensorInfo(file, name, str(entry["dtype"]), shape, data + int(start))
    width = _BYTES.get(info.dtype)
    if width is not None and stop - start != width * math.prod(info.shape):
        raise ValueError(f"{info.dtype} {list(info.shape)} does not take {stop - start} bytes")
    return info
