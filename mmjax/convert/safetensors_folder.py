"""Model folders of safetensors files."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Sharding

from mmjax.config import ModelConfig
from mmjax.convert import headers
from mmjax.convert.errors import CheckpointError, CheckpointWarning
from mmjax.convert.native import BUFFERS
from mmjax.convert.params import AnyArray, Params, param_specs, read_numbers, with_dtype
from mmjax.convert.table import Table
from mmjax.convert.view import Index, copy_into

_TEXT_PREFIX = "language_model."
_VISION = ("vision_tower.", "multi_modal_projector.", "image_newline")
_BUFFERS = tuple(f".self_attn.{name}" for name in BUFFERS)


class SafetensorsParams(Params):
    """A folder of safetensors files in either layout, checked whole from its headers.

    Args:
      path: The folder: config.json, and model.safetensors or shards with their index.
      dtype: Convert to this, routers excepted; None keeps each tensor's.

    Raises:
      ConfigError: config.json is wrong.
      CheckpointError: lists everything that is wrong with the tensors. None was read.
    """

    def __init__(self, path: Path, dtype: str | None = None) -> None:
        cfg = ModelConfig.from_hf(path)
        folder = headers.read_folder(path)
        if folder.problems and not folder.tensors:
            raise CheckpointError(path, folder.problems)
        found, left_out = _wanted_tensors(cfg, folder.tensors)
        self._table = _matching_table(cfg, found)
        lost = folder.lost if cfg.vision else {_text_name(name) for name in folder.lost}
        problems = folder.problems + _compare(self._table, found, lost)
        if not problems and dtype is None:
            problems = _mixed_dtypes(self._table, found)
        if problems:
            raise CheckpointError(path, problems)
        if left_out:
            what = ", ".join(f"{count} in {part}" for part, count in sorted(left_out.items()))
            message = f"{path}: tensors that are not part of the text model stay behind: {what}"
            warnings.warn(message, CheckpointWarning, stacklevel=4)
        self._tensors = found
        self.files = sorted({info.file for info in found.values()})
        self.layout = self._table.layout
        own = headers.DTYPES[found[self._table.of_param("embed.embedding")[()].key].dtype]
        self.cfg = with_dtype(cfg, dtype or own)
        self.specs = param_specs(self.cfg)
        if dtype is None:
            self.specs = {n: self._own_spec(n, spec.shape) for n, spec in self.specs.items()}

    def _own_spec(self, param: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        first = next(iter(self._table.of_param(param).values()))
        return jax.ShapeDtypeStruct(shape, headers.DTYPES[self._tensors[first.key].dtype])

    def read(self, param: str, index: Index) -> np.ndarray:
        """A slice of a parameter, reading no tensor that does not touch it."""
        spec, pieces = self.specs[param], self._table.of_param(param)
        spans = [range(size)[cut] for size, cut in zip(spec.shape, index, strict=True)]
        place, piece = next(iter(pieces.items()))
        stacked = len(place)
        places = list(itertools.product(*spans[:stacked]))
        if len(places) == 1:
            # As it lies in the file, without another copy; whoever reads pieces has threads.
            piece = pieces[places[0]]
            value = piece.view.read(_Tensor(self._tensors[piece.key]), index[stacked:])
            return value[(None,) * stacked].astype(spec.dtype, copy=False)
        # In the file's order of axes, so that reading is plain copying; whoever takes the array
        # transposes it, XLA faster than NumPy could, or another file's writer not at all.
        order = [*range(stacked), *(stacked + axis for axis in piece.view.file_order)]
        out = np.empty([len(spans[axis]) for axis in order], spec.dtype)
        out = out.transpose(np.argsort(order))

        def fill(place: tuple[int, ...]) -> None:
            piece = pieces[place]
            here = tuple(i - span.start for i, span in zip(place, spans, strict=False))
            tensor = _Tensor(self._tensors[piece.key])
            copy_into(out[here], piece.view.read(tensor, index[stacked:]))

        # Copies leave the interpreter free, so threads share the work.
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(fill, places):
                pass
        return out

    def arrays(self, shardings: Mapping[str, Sharding] | None) -> Iterator[tuple[str, AnyArray]]:
        """Every parameter, one at a time; on a mesh each device's part alone is read."""
        for name, spec in self.specs.items():
            if shardings is None:
                yield name, self.read(name, (slice(None),) * len(spec.shape))
            else:
                yield name, self._sharded(name, spec, shardings[name])

    def _sharded(self, name: str, spec: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        parts: dict[tuple[tuple[int | None, ...], ...], np.ndarray] = {}

        def read(index: Index | None) -> np.ndarray:
            assert index is not None
            # Devices that hold the same part share one reading of it.
            bounds = tuple((cut.start, cut.stop) for cut in index)
            if bounds not in parts:
                parts[bounds] = self.read(name, index)
            return parts[bounds]

        return jax.make_array_from_callback(spec.shape, sharding, read)


class _Tensor:
    """A tensor of a file that reads slices: whole rows plainly, since the pages of a memory map
    would be counted as this process's memory; columns through a map that is closed after it.
    """

    def __init__(self, info: headers.TensorInfo) -> None:
        self._info = info
        self._dtype = np.dtype(headers.DTYPES[info.dtype])

    def __getitem__(self, index: Index) -> np.ndarray:
        info = self._info
        spans = [range(size)[cut] for size, cut in zip(info.shape, index, strict=True)]
        if any(len(s) < size for s, size in zip(spans[1:], info.shape[1:], strict=True)):
            mapped = np.memmap(info.file, self._dtype, "r", info.start, info.shape)
            return np.array(mapped[index])
        start = info.start + spans[0].start * math.prod(info.shape[1:]) * self._dtype.itemsize
        return read_numbers(info.file, start, [*map(len, spans)], self._dtype, info.name)


def _text_name(name: str) -> str:
    return name.removeprefix(_TEXT_PREFIX)


def _wanted_tensors(
    cfg: ModelConfig, tensors: Mapping[str, headers.TensorInfo]
) -> tuple[dict[str, headers.TensorInfo], Counter[str]]:
    """The model's tensors, and how many stay behind, by part.

    A model of text takes the text half of a VL folder, without its prefix.
    """
    left_out: Counter[str] = Counter()
    if cfg.vision is None and any(name.startswith(_TEXT_PREFIX) for name in tensors):
        vision = {name for name in tensors if name.startswith(_VISION)}
        left_out.update(name.split(".")[0] for name in vision)
        # What has neither prefix must not pass for the text model's tensor of that name.
        tensors = {
            _text_name(name) if name.startswith(_TEXT_PREFIX) else f"{name} (no {_TEXT_PREFIX})": t
            for name, t in tensors.items()
            if name not in vision
        }
    return {name: t for name, t in tensors.items() if not name.endswith(_BUFFERS)}, left_out


def _matching_table(cfg: ModelConfig, found: Mapping[str, headers.TensorInfo]) -> Table:
    """The table of the layout that the names speak, whatever layout config.json is in."""
    native = any(".mlp.experts." in name or ".mlp.gate." in name for name in found)
    return Table(cfg, "hf-native" if native else "hf")


def _compare(table: Table, found: Mapping[str, headers.TensorInfo], lost: set[str]) -> list[str]:
    """Every difference between the tensors that the model wants and those that are there."""
    wrong, missing, unexpected = [], [], []
    for key, shape in table.tensors.items():
        info = found.get(key)
        if info is None:
            missing += [] if key in lost else [f"{key} is missing, expected {list(shape)}"]
            continue
        where = f"{info.file.name}: {key}"
        if info.shape != shape:
            wrong.append(f"{where} has shape {list(info.shape)}, expected {list(shape)}")
        if info.dtype not in headers.DTYPES:
            wrong.append(f"{where} has dtype {info.dtype}, expected {', '.join(headers.DTYPES)}")
    for key, info in found.items():
        if key not in table.tensors:
            where = f"{info.file.name}: {key} {list(info.shape)}"
            unexpected.append(f"{where} is no tensor of this model in the layout {table.layout}")
    return wrong + missing + unexpected


def _mixed_dtypes(table: Table, found: Mapping[str, headers.TensorInfo]) -> list[str]:
    """Parameters whose stacked layers or experts come in several dtypes."""
    problems = []
    for param in table.param_shapes():
        example = {found[p.key].dtype: p.key for p in table.of_param(param).values()}
        if len(example) > 1:
            seen = ", ".join(f"{key} in {dtype}" for dtype, key in example.items())
            problems.append(
                f"{param} is stacked from tensors of one dtype, got {seen}; pass a dtype to convert"
            )
    return problems
