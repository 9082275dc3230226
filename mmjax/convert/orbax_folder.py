"""Model folders that hold an Orbax checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from jax.sharding import Sharding

from mmjax.config import ModelConfig
from mmjax.convert import stream
from mmjax.convert.errors import CheckpointError
from mmjax.convert.params import (
    PARAMS,
    AnyArray,
    Params,
    Specs,
    param_specs,
    read_numbers,
    with_dtype,
)
from mmjax.convert.stream import Output, Unit
from mmjax.convert.table import Table
from mmjax.convert.view import Index, copy_into
from mmjax.convert.write import config_text


def write_orbax(params: Params, folder: Path) -> None:
    """Writes config.json and the parameters as an Orbax checkpoint, from the mesh they are on."""
    (folder / "config.json").write_text(config_text(params.cfg, params.specs, "hf"))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / PARAMS, dict(params.arrays(None)))


def orbax_output(params: Params) -> Output:
    """An Orbax checkpoint in the making, a file a chunk: uncompressed Zarr, without OCDBT.

    Orbax itself writes what it wants to find beside the arrays, TensorStore their metadata; the
    chunks, raw bytes, are units.
    """
    table = Table(params.cfg, "hf")
    chunks = {name: _chunk(table, name, spec) for name, spec in params.specs.items()}
    units = [
        unit
        for name, spec in params.specs.items()
        for unit in _chunk_units(
            params, name, spec, chunks[name], _order(table, name, chunks[name])
        )
    ]

    def prepare(folder: Path) -> None:
        path = folder.resolve() / PARAMS
        with _quiet(), ocp.Checkpointer(_without_ocdbt()) as checkpointer:
            one = {name: np.zeros(1, spec.dtype) for name, spec in params.specs.items()}
            checkpointer.save(path, args=ocp.args.PyTreeSave(one))
        for name, spec in params.specs.items():
            shutil.rmtree(path / name)
            store = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{path / name}/"},
                "metadata": {
                    "compressor": None,
                    "chunks": list(chunks[name]),
                    "order": _order(table, name, chunks[name]),
                },
            }
            dtype = tensorstore.dtype(spec.dtype.name)
            tensorstore.open(store, create=True, dtype=dtype, shape=spec.shape).result()

    texts = {"config.json": config_text(params.cfg, params.specs, "hf")}
    return Output(units, texts, prepare, max(unit.size for unit in units))


def _without_ocdbt() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the terminal that Orbax finds no OCDBT to merge, which is as it should be."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _chunk(table: Table, name: str, spec: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Shape of a parameter's chunks: at most a unit, and in a released file side by side."""
    place, piece = next(iter(table.of_param(name).items()))
    chunk = [1] * len(place) + list(piece.view.param_shape)
    axis = len(place) + piece.view.lead_axis
    row = math.prod(chunk) * spec.dtype.itemsize // chunk[axis]
    chunk[axis] = stream.even_step(chunk[axis], row)
    # Small parameters go on over layers and experts.
    for i in reversed(range(len(place))):
        if chunk[i + 1 :] != list(spec.shape[i + 1 :]):
            break
        size = math.prod(chunk) * spec.dtype.itemsize
        chunk[i] = stream.even_step(spec.shape[i], size)
    return tuple(chunk)


def _order(table: Table, name: str, chunk: tuple[int, ...]) -> str:
    """Of the numbers in a chunk: "F", backwards, where a released file has them so.

    Then a chunk of a matrix is a stretch of that file, and nothing needs to be transposed.
    """
    place, piece = next(iter(table.of_param(name).items()))
    axes = piece.view.file_order
    alone = math.prod(chunk[: len(place)]) == 1
    return "F" if alone and len(axes) > 1 and axes == sorted(axes, reverse=True) else "C"


def _chunk_units(
    params: Params,
    name: str,
    spec: jax.ShapeDtypeStruct,
    chunk: tuple[int, ...],
    order: str,
) -> Iterator[Unit]:
    grid = [range(0, size, step) for size, step in zip(spec.shape, chunk, strict=True)]
    size = math.prod(chunk) * spec.dtype.itemsize

    def make(start: tuple[int, ...]) -> np.ndarray:
        index = tuple(
            slice(i, min(i + step, whole))
            for i, step, whole in zip(start, chunk, spec.shape, strict=True)
        )
        value = params.read(name, index)
        if order == "F":
            value = value.transpose()
        shape = chunk if order == "C" else chunk[::-1]
        if value.shape == shape and value.flags.c_contiguous:
            return value
        # Zarr's chunks are all of one size; the last ones hang over.
        data = (np.empty if value.shape == shape else np.zeros)(shape, spec.dtype)
        copy_into(data[tuple(slice(n) for n in value.shape)], value)
        return data

    for start in itertools.product(*grid):
        number = ".".join(str(i // step) for i, step in zip(start, chunk, strict=True))
        yield Unit(f"{PARAMS}/{name}/{number}", 0, size, (partial(make, start),))


def _inside(where: dict[str, Any], name: str) -> dict[str, Any]:
    if where["driver"] == "ocdbt":
        return {**where, "path": f"{name}/"}
    return {**where, "path": f"{where['path']}{name}/"}


# What Zarr calls these dtypes when their bytes lie as they do in memory.
_PLAIN = {"<f4": "float32", "<f2": "float16", "bfloat16": "bfloat16"}


def _plain_array(metadata: Path) -> tuple[tuple[int, ...], str, np.dtype] | None:
    """Chunk, order and dtype of an uncompressed array of Zarr 2 as TensorStore creates it."""
    if not metadata.is_file():
        return None
    told = json.loads(metadata.read_text())
    known = told.get("zarr_format") == 2 and told.get("order") in ("C", "F")
    as_is = told.get("compressor", 0) is None and not told.get("filters")
    dotted = told.get("dimension_separator", ".") == "."
    if not (known and as_is and dotted) or told.get("dtype") not in _PLAIN:
        return None
    return tuple(told["chunks"]), told["order"], np.dtype(_PLAIN[told["dtype"]])


class OrbaxParams(Params):
    """A model folder that `mmjax.save` wrote with the layout "orbax".

    Args:
      path: The folder: config.json and params/.
      dtype: Convert to this, routers excepted; None keeps each array's.

    Raises:
      ConfigError: config.json is wrong.
      CheckpointError: lists every parameter that is missing, unexpected or of a wrong shape.
    """

    def __init__(self, path: Path, dtype: str | None = None) -> None:
        cfg = ModelConfig.from_hf(path)
        self._path = path.resolve() / PARAMS
        stored = self._stored(path)
        expected = param_specs(cfg)
        problems = [
            f"{name} has shape {list(stored[name].shape)}, expected {list(spec.shape)}"
            for name, spec in expected.items()
            if name in stored and stored[name].shape != spec.shape
        ]
        problems += [
            f"{name} is missing, expected {list(spec.shape)}"
            for name, spec in expected.items()
            if name not in stored
        ]
        problems += [
            f"{name} {list(spec.shape)} is no parameter of this model"
            for name, spec in stored.items()
            if name not in expected
        ]
        if problems:
            raise CheckpointError(path, problems)
        self.cfg = with_dtype(cfg, dtype or stored["embed.embedding"].dtype.name)
        self.specs = stored if dtype is None else param_specs(self.cfg)
        # What tells this checkpoint from another.
        self.files = [self._path / "_METADATA", *self._path.glob("manifest.ocdbt")]
        self.layout = "orbax"

    def _stored(self, path: Path) -> Specs:
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                metadata = checkpointer.metadata(self._path).item_metadata
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(path, [f"{PARAMS}/ cannot be read: {error}"]) from error
        if metadata is None:
            raise CheckpointError(path, [f"{PARAMS}/ holds no Orbax checkpoint"])
        return {n: jax.ShapeDtypeStruct(m.shape, m.dtype) for n, m in metadata.tree.items()}

    def read(self, param: str, index: Index) -> np.ndarray:
        """A slice of a parameter, reading the chunks that hold it."""
        value = self._chunk(param, index)
        if value is None:
            store = self._stores[param]
            # In the order in which chunks lie on the disk, so that reading is plain copying.
            order = store.chunk_layout.inner_order or range(store.rank)
            value = store[index].transpose(order).read().result().transpose(np.argsort(order))
        return value.astype(self.specs[param].dtype, copy=False)

    def _chunk(self, param: str, index: Index) -> np.ndarray | None:
        """The slice, if it is one whole chunk of those that `orbax_output` writes; None otherwise.

        TensorStore would go through a chunk number by number, several times as slow as the disk.
        """
        plain = self._plain[param]
        if plain is None:
            return None
        chunk, order, dtype = plain
        shape = self.specs[param].shape
        spans = [range(size)[cut] for size, cut in zip(shape, index, strict=True)]
        number = [span.start // step for span, step in zip(spans, chunk, strict=True)]
        cuts = zip(shape, number, chunk, strict=True)
        if spans != [range(size)[n * step : (n + 1) * step] for size, n, step in cuts]:
            return None
        file = self._path / param / ".".join(map(str, number))
        if not file.is_file():  # A chunk of zeros alone need not be there.
            return None
        on_disk = chunk if order == "C" else chunk[::-1]
        data = read_numbers(file, 0, on_disk, dtype, param)
        data = data if order == "C" else data.transpose()
        return data[tuple(slice(len(span)) for span in spans)]

    @cached_property
    def _plain(self) -> dict[str, tuple[tuple[int, ...], str, np.dtype] | None]:
        """Chunk, order and dtype of the arrays whose chunks are files of their raw numbers."""
        return {name: _plain_array(self._path / name / ".zarray") for name in self.specs}

    @cached_property
    def _stores(self) -> dict[str, Any]:
        metadata = json.loads((self._path / "_METADATA").read_text())
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        where = {"driver": "file", "path": f"{self._path}/"}
        if metadata.get("use_ocdbt", True):
            where = {"driver": "ocdbt", "base": f"file://{self._path}/"}
        opened = {
            name: tensorstore.open(
                {"driver": driver, "kvstore": _inside(where, name)}, read=True, open=True
            )
            for name in self.specs
        }
        return {name: store.result() for name, store in opened.items()}

    @cached_property
    def _host_arrays(self) -> dict[str, np.ndarray]:
        # An array of one number stands for a shape here: Orbax asks for a host array that way.
        return self._restore(
            {n: np.broadcast_to(np.zeros((), s.dtype), s.shape) for n, s in self.specs.items()}
        )

    def _restore(self, target: Mapping[str, Any]) -> dict[str, Any]:
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore(self._path, target)
        except (OSError, ValueError) as error:
            raise CheckpointError(self._path, [f"cannot be read: {error}"]) from error

    def arrays(self, shardings: Mapping[str, Sharding] | None) -> Iterator[tuple[str, AnyArray]]:
        """Every parameter; on a mesh each device's part is read straight to it."""
        if shardings is None:
            yield from self._host_arrays.items()
            return
        target = {
            name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[name])
            for name, spec in self.specs.items()
        }
        yield from self._restore(target).items()
