"""The parameters of one model, wherever they lie."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from mmjax.config import ModelConfig
from mmjax.convert.errors import CheckpointError
from mmjax.convert.view import Index
from mmjax.model import Decoder

type Specs = dict[str, jax.ShapeDtypeStruct]
type AnyArray = np.ndarray | jax.Array

# Where a model folder keeps its Orbax checkpoint.
PARAMS = "params"


class Params(abc.ABC):
    """What load, save and convert need of a model's parameters.

    `specs` gives shape and dtype of each, by its dotted path in the model's NNX state; `threads`
    says whether several of them may read at a time; `files` are those it lies in, if any, and
    `layout` is theirs.
    """

    cfg: ModelConfig
    specs: Specs
    threads: bool = True
    files: Sequence[Path] = ()
    layout: str = ""

    @abc.abstractmethod
    def read(self, param: str, index: Index) -> np.ndarray:
        """A slice of a parameter on the host, one slice a dimension, without steps."""

    @abc.abstractmethod
    def arrays(self, shardings: Mapping[str, Sharding] | None) -> Iterator[tuple[str, AnyArray]]:
        """Every parameter whole: sharded so, or where it is cheapest to have."""


def abstract_decoder(cfg: ModelConfig) -> tuple[Any, nnx.State]:
    """Structure and parameter shapes of a decoder, which is not built."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))


def param_specs(cfg: ModelConfig) -> Specs:
    """Shape and initial dtype of each parameter, by dotted path."""
    _, state = abstract_decoder(cfg)
    return {name: jax.ShapeDtypeStruct(v.shape, v.dtype) for name, v in by_name(state).items()}


def by_name(state: nnx.State) -> dict[str, Any]:
    """The variables of a state by dotted path."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def with_dtype(cfg: ModelConfig, dtype: str) -> ModelConfig:
    """The configuration with parameters and activations of this dtype."""
    return dataclasses.replace(cfg, dtype=dtype, param_dtype=dtype)


def read_numbers(
    file: Path, start: int, shape: Sequence[int], dtype: np.dtype, name: str
) -> np.ndarray:
    """Numbers that lie side by side in a file from byte `start` on.

    Raises:
      CheckpointError: the file ends before `name`, the array, does.
    """
    out = np.empty(shape, dtype)
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        left = memoryview(out.reshape(-1).view(np.uint8))
        while left:
            count = opened.readinto(left)
            if not count:
                raise CheckpointError(file, [f"ends within {name}"])
            left = left[count:]
    return out


class ModelParams(Params):
    """The parameters of a model in memory, on one device or on a mesh."""

    threads = False  # Collectives of a mesh must start in one order.

    def __init__(self, model: Decoder) -> None:
        self.cfg = model.cfg
        variables = by_name(nnx.state(model, nnx.Param))
        self._arrays = {name: variable.get_value() for name, variable in variables.items()}
        self.specs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in self._arrays.items()}

    def read(self, param: str, index: Index) -> np.ndarray:
        """A slice of a parameter on the host."""
        array = self._arrays[param]
        spans = [range(size)[cut] for size, cut in zip(array.shape, index, strict=True)]
        starts = tuple(np.int32(span.start) for span in spans)
        where = None
        if not array.is_fully_addressable:
            where = NamedSharding(array.sharding.mesh, PartitionSpec())
        return np.asarray(_cut(array, starts, tuple(map(len, spans)), where))

    def arrays(self, shardings: Mapping[str, Sharding] | None) -> Iterator[tuple[str, AnyArray]]:
        """Every parameter where it is."""
        del shardings
        yield from self._arrays.items()


@partial(jax.jit, static_argnames=("sizes", "where"))
def _cut(
    array: jax.Array,
    starts: tuple[Any, ...],
    sizes: tuple[int, ...],
    where: NamedSharding | None,
) -> jax.Array:
    # The place is traced, so that one program serves all layers of a parameter.
    cut = jax.lax.dynamic_slice(array, starts, sizes)
    return cut if where is None else jax.lax.with_sharding_constraint(cut, where)
