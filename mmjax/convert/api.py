"""Loading, saving and converting whole models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from mmjax.convert import headers, stream, write
from mmjax.convert.errors import CheckpointError
from mmjax.convert.params import PARAMS, ModelParams, Params, abstract_decoder, by_name
from mmjax.convert.safetensors_folder import SafetensorsParams
from mmjax.model import Decoder
from mmjax.sharding import DEFAULT_RULES, ShardingRules, param_shardings

Layout = Literal["hf", "hf-native", "orbax"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules = DEFAULT_RULES,
    dtype: DTypeLike | None = None,
) -> Decoder:
    """Loads a model folder: safetensors in the released or in transformers' layout, or Orbax.

    Everything is checked from the files' headers before the first tensor is read. Of a
    safetensors folder the host then holds one stacked parameter at a time; on a mesh each
    device's part alone is read.

    Args:
      path: The folder. Tensor names decide the layout, whichever keys config.json uses.
      mesh: From `mmjax.sharding.make_mesh`; None for the default device.
      rules: How parameters lie on the mesh: by default as they are trained, SERVING_RULES to run
        the model without gathering weights for each call.
      dtype: Of parameters and activations; routers and a shared expert's coefficient are float32.
        None keeps every tensor's own, and takes the embedding's for the activations.

    Returns:
      The decoder.

    Raises:
      ConfigError: config.json is missing, wrong or asks for what this model has not.
      CheckpointError: lists everything that is wrong with the files, at most 20 in full.
      ShardingError: the mesh does not divide the model.
    """
    params = open_params(Path(path), None if dtype is None else jnp.dtype(dtype).name)
    structure, state = abstract_decoder(params.cfg)
    variables = by_name(state)
    shardings = None if mesh is None else _shardings(state, mesh, rules)
    for name, array in params.arrays(shardings):
        placed = array if isinstance(array, jax.Array) else jax.device_put(array)
        variables[name] = variables[name].replace(placed)
    paths = [path for path, _ in nnx.to_flat_state(state)]
    return nnx.merge(structure, nnx.from_flat_state(zip(paths, variables.values(), strict=True)))


def save(
    model: Decoder,
    path: str | Path,
    layout: Layout = "hf",
    tokenizer_from: str | Path | None = None,
) -> None:
    """Writes a model folder, whole or not at all.

    Args:
      model: On one device or on a mesh. Where several processes share that, each of them makes
        this call, and the first one writes; not in layout "orbax".
      path: A folder that does not exist yet, or an empty one.
      layout: "hf" (the released names) | "hf-native" (transformers' own) | "orbax".
      tokenizer_from: A model folder whose tokenizer and generation files are copied.

    Raises:
      CheckpointError: `path` holds something, or the layout is unknown or cannot hold this model.
    """
    _check_layout(layout)
    source = None if tokenizer_from is None else Path(tokenizer_from)
    _write(ModelParams(model), Path(path), layout, source)


def convert(
    source: str | Path,
    target: str | Path,
    layout: Layout,
    *,
    shard_bytes: int = write.SHARD_BYTES,
    workers: int = stream.WORKERS,
) -> stream.Report:
    """Rewrites a model folder in another layout, dtypes kept, tokenizer files copied along.

    The host holds a few units of at most 128 MiB, or of one row or expert where that is more,
    whatever the layouts. Every unit is read back and compared by its CRC-32 at the end. After a
    kill or an error the same call goes on where it was.

    Args:
      source: A folder that `load` reads.
      target: A folder that does not exist yet, or an empty one.
      layout: "hf" | "hf-native" | "orbax".
      shard_bytes: Largest safetensors file, one tensor at least.
      workers: Units that are read and written at a time.

    Returns:
      How much it was, and how long it took.

    Raises:
      ConfigError: the source's config.json is missing or wrong.
      CheckpointError: the source is not whole, the target holds something, the layout is unknown
        or cannot hold this model, or what was written cannot be read back.
    """
    _check_layout(layout)
    path = Path(target)
    write.check_destination(path)
    params = open_params(Path(source))
    output = _output(params, layout, shard_bytes)
    _check_room(path, output)
    with stream.resumable(output, path, _identity(params)) as (folder, journal):
        report = stream.write_checked(output, folder, journal, workers=workers)
        write.copy_companions(Path(source), folder)
    return report


def preview(
    source: str | Path,
    target: str | Path,
    layout: Layout,
    *,
    shard_bytes: int = write.SHARD_BYTES,
    workers: int = stream.WORKERS,
) -> str:
    """What `convert` would do, from headers alone, in words.

    Raises:
      ConfigError, CheckpointError: as `convert` would.
    """
    _check_layout(layout)
    path = Path(target)
    write.check_destination(path)
    params = open_params(Path(source))
    output = _output(params, layout, shard_bytes)
    files = len({unit.file for unit in output.units})
    numbers = sum(math.prod(spec.shape) for spec in params.specs.values())
    partial = path.with_name(f".{path.name}.partial")
    told = [
        f"from {source}: {params.layout}, {len(params.files)} files, {numbers:,} parameters",
        f"to {target}: {layout}, {files} files, {_gb(output.size)}; {_gb(_free(path))} are free",
        f"in {len(output.units)} units of at most {_gb(output.largest)}, {workers} at a time: "
        f"about {_gb(output.largest * workers * 3)} of memory",
    ]
    if partial.exists():
        told.append(f"{partial} holds a beginning, on which the conversion would go on")
    return "\n".join(told)


def _output(params: Params, layout: Layout, shard_bytes: int) -> stream.Output:
    if layout == "orbax":
        from mmjax.convert.orbax_folder import orbax_output  # late: Orbax is slow to import

        return orbax_output(params)
    make = write.from_params(params, layout)
    return write.safetensors_output(params.cfg, params.specs, layout, shard_bytes, make)


def _identity(params: Params) -> str:
    """Changes when the source does."""
    told = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in params.files]
    return json.dumps(told)


def _free(path: Path) -> int:
    there = next(p for p in path.resolve().parents if p.exists())
    return shutil.disk_usage(there).free


def _check_room(path: Path, output: stream.Output) -> None:
    partial = path.with_name(f".{path.name}.partial")
    taken = sum(f.stat().st_blocks * 512 for f in partial.rglob("*") if f.is_file())
    if output.size - taken > _free(path):
        told = f"needs {_gb(output.size - taken)}, of which {_gb(_free(path))} are free there"
        raise CheckpointError(path, [told])


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def open_params(path: Path, dtype: str | None = None) -> Params:
    """The parameters in a model folder, checked but not read.

    Raises:
      ConfigError: config.json is missing or wrong.
      CheckpointError: `path` is no model folder, or not a whole one.
    """
    if not path.is_dir():
        what = "is a file, expected a folder" if path.exists() else "does not exist"
        raise CheckpointError(path, [what])
    if (path / PARAMS).is_dir():
        from mmjax.convert.orbax_folder import OrbaxParams  # late: Orbax is slow to import

        return OrbaxParams(path, dtype)
    if (path / headers.INDEX).exists() or any(path.glob("*.safetensors")):
        return SafetensorsParams(path, dtype)
    seen = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    expected = f"{headers.SINGLE}, {headers.INDEX} or {PARAMS}/"
    raise CheckpointError(path, [f"is no model folder: expected {expected}; found {seen}"])


def _shardings(state: nnx.State, mesh: Mesh, rules: ShardingRules) -> dict[str, Sharding]:
    variables = by_name(param_shardings(state, mesh, rules))
    return {name: variable.get_value() for name, variable in variables.items()}


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise CheckpointError("layout", [f"unknown {layout!r}; known: {', '.join(LAYOUTS)}"])


def _write(params: Params, path: Path, layout: Layout, companions: Path | None) -> None:
    if jax.process_count() > 1:
        _write_together(params, path, layout, companions)
        return
    with write.new_folder(path) as folder:
        if layout == "orbax":
            from mmjax.convert.orbax_folder import write_orbax  # late: Orbax is slow to import

            write_orbax(params, folder)
        else:
            _fill(_output(params, layout, write.SHARD_BYTES), params, folder)
        if companions is not None:
            write.copy_companions(companions, folder)


def _fill(output: stream.Output, params: Params, folder: Path) -> None:
    stream.write_all(output, folder, workers=stream.WORKERS if params.threads else 1)


def _write_together(params: Params, path: Path, layout: Layout, companions: Path | None) -> None:
    """The first process writes; all of them bring it the numbers, in the same order."""
    if layout == "orbax":
        raise CheckpointError(path, ["several processes write hf or hf-native, not orbax"])
    write.check_destination(path)
    output = _output(params, layout, write.SHARD_BYTES)
    multihost_utils.sync_global_devices(f"{path} is free")
    if jax.process_index():
        for unit in output.units:
            for part in unit.parts:
                part()
    else:
        with write.new_folder(path) as folder:
            _fill(output, params, folder)
            if companions is not None:
                write.copy_companions(companions, folder)
    multihost_utils.sync_global_devices(f"{path} is whole")
