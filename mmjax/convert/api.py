"""Loading, saving and converting whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from mmjax.convert import headers, write
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
        variables[name] = variables[name].replace(jax.device_put(array))
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
      model: On one device or on a mesh of this process.
      path: A folder that does not exist yet, or an empty one.
      layout: "hf" (the released names) | "hf-native" (transformers' own) | "orbax".
      tokenizer_from: A model folder whose tokenizer and generation files are copied.

    Raises:
      CheckpointError: `path` holds something, or the layout is unknown or cannot hold this model.
    """
    _check_layout(layout)
    source = None if tokenizer_from is None else Path(tokenizer_from)
    _write(ModelParams(model), Path(path), layout, write.SHARD_BYTES, source)


def convert(
    source: str | Path,
    target: str | Path,
    layout: Layout,
    *,
    shard_bytes: int = write.SHARD_BYTES,
) -> None:
    """Rewrites a model folder in another layout, dtypes kept, tokenizer files copied along.

    Between the two safetensors layouts the host holds one shard and one tensor at a time; to and
    from Orbax it holds the model.

    Args:
      source: A folder that `load` reads.
      target: A folder that does not exist yet, or an empty one.
      layout: "hf" | "hf-native" | "orbax".
      shard_bytes: Largest safetensors file, one tensor at least.

    Raises:
      ConfigError: the source's config.json is missing or wrong.
      CheckpointError: the source is not whole, the target holds something, or the layout is
        unknown or cannot hold this model.
    """
    _check_layout(layout)
    write.check_destination(Path(target))
    _write(open_params(Path(source)), Path(target), layout, shard_bytes, Path(source))


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


def _write(
    params: Params, path: Path, layout: Layout, shard_bytes: int, companions: Path | None
) -> None:
    if jax.process_count() > 1:
        raise CheckpointError(path, ["model folders are written by one process, not by several"])
    with write.new_folder(path) as folder:
        if layout == "orbax":
            from mmjax.convert.orbax_folder import write_orbax  # late: Orbax is slow to import

            write_orbax(params, folder)
        else:
            write.write_safetensors(params, folder, layout, shard_bytes)
        if companions is not None:
            write.copy_companions(companions, folder)
