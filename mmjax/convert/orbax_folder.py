"""Model folders that hold an Orbax checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from mmjax.config import ModelConfig
from mmjax.convert.errors import CheckpointError
from mmjax.convert.params import PARAMS, AnyArray, Params, Specs, param_specs, with_dtype
from mmjax.convert.write import write_config


def write_orbax(params: Params, folder: Path) -> None:
    """Writes config.json and the parameters as an Orbax checkpoint, from the mesh they are on."""
    write_config(params, folder, "hf")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / PARAMS, dict(params.arrays(None)))


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

    def _stored(self, path: Path) -> Specs:
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                metadata = checkpointer.metadata(self._path).item_metadata
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(path, [f"{PARAMS}/ cannot be read: {error}"]) from error
        if metadata is None:
            raise CheckpointError(path, [f"{PARAMS}/ holds no Orbax checkpoint"])
        return {n: jax.ShapeDtypeStruct(m.shape, m.dtype) for n, m in metadata.tree.items()}

    def at(self, param: str, place: tuple[int, ...]) -> np.ndarray:
        """The parameter at a place of its stacked axes; the first call reads everything."""
        return self._host_arrays[param][place]

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
