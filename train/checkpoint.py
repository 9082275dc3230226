"""Checkpoints with Orbax: atomic, asynchronous, the data iterator included, checked when read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mmjax.config import ConfigError
from train import distributed
from train.config import CheckpointConfig
from train.data.streams import Resumable
from train.state import TrainState, from_flat, to_flat

# What Orbax calls a checkpoint that is still being written.
_UNFINISHED = "*.orbax-checkpoint-tmp*"


class Checkpoints:
    """The checkpoints of one workdir: the state's arrays and the iterator's place together.

    Args:
      workdir: Folder of the job; checkpoints go to `workdir/checkpoints` unless `cfg` says where.
      cfg: How many to keep.
    """

    def __init__(self, workdir: Path, cfg: CheckpointConfig) -> None:
        place = _place(cfg.path or str(workdir / "checkpoints"))
        for left in sorted(place.glob(_UNFINISHED)) if place.exists() else ():
            _tell(f"checkpoint {left} was not finished when its job ended; it is removed")
        distributed.wait_for_all("unfinished checkpoints")  # Before the primary removes them.
        self._manager = ocp.CheckpointManager(
            place,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=cfg.keep,
                keep_period=cfg.keep_every or None,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
        )
        self._damaged: set[int] = set()

    def save(self, state: TrainState, data: Resumable) -> None:
        """Saves at the state's step, once; returns while the arrays are being written."""
        step = int(state.step)
        if step in self._manager.all_steps():
            if step not in self._damaged:
                return
            self._manager.delete(step)
            self._damaged.remove(step)
        flat = to_flat(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(flat),
            data=ocp.args.JsonSave(distributed.union(data.get_state())),
            sums=ocp.args.JsonSave(check_sums(flat)),
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, state: TrainState, data: Resumable) -> TrainState | None:
        """The latest checkpoint in the structure and sharding of `state`, None if there is none.

        One that cannot be read, or whose arrays are not those that were saved, is told and passed
        over for the one before. The iterator is moved to its place in it.

        Raises:
          ConfigError: the checkpoint is of another model or optimizer, or none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            found = self._read(step, to_flat(state))
            if isinstance(found, str):
                _tell(f"checkpoint {step} in {self._manager.directory} is damaged: {found}")
                self._damaged.add(step)
                continue
            if self._damaged:
                _tell(f"going on from checkpoint {step}, the last one that is whole")
            try:
                data.set_state(found["data"])
            except (ValueError, KeyError) as error:
                raise self._unfit(step, error) from None
            return from_flat(state, found["state"])
        if steps:
            raise ConfigError(
                f"no checkpoint in {self._manager.directory} can be read; bring one back, or "
                "remove them to start anew"
            )
        return None

    def _read(self, step: int, like: Mapping[str, jax.Array]) -> Mapping[str, Any] | str:
        """A checkpoint's items, or what is wrong with it: the same on every process."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, dict(like))
        found: Any = None
        try:
            problem = ""
            self._check_fit(step, like)
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target),
                    data=ocp.args.JsonRestore(),
                    sums=ocp.args.JsonRestore(),
                ),
            )
        except ConfigError:
            raise
        except Exception as error:  # Orbax and TensorStore raise what their readers do.
            problem = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        told = distributed.union({str(jax.process_index()): problem} if problem else {})
        if told:
            return str(next(iter(told.values())))
        sums = check_sums(found["state"])
        changed = [name for name, x in sums.items() if found["sums"][name] != x]
        if changed:
            return f"{len(changed)} arrays have other values than were saved, {changed[0]} first"
        return {"state": found["state"], "data": found["data"]}

    def _check_fit(self, step: int, like: Mapping[str, jax.Array]) -> None:
        """Raises ConfigError for a checkpoint whose arrays have other names, shapes or dtypes."""
        folder = self._manager.directory / str(step) / "state"
        with closing(ocp.StandardCheckpointHandler()) as reader:
            saved = reader.metadata(folder).tree
        there = {name: _described(x) for name, x in saved.items()}
        wanted = {name: _described(x) for name, x in like.items()}
        hint = "set the model, its dtypes and the optimizer back, or start in another workdir"
        for name in sorted(there.keys() ^ wanted.keys()):
            raise self._unfit(
                step, f"{name} is only in {'it' if name in there else 'the job'}; {hint}"
            )
        for name, described in wanted.items():
            if there[name] != described:
                raise self._unfit(
                    step, f"{name} is {there[name]} there, {described} in the job; {hint}"
                )

    def _unfit(self, step: int, why: object) -> ConfigError:
        place = f"checkpoint {step} in {self._manager.directory}"
        return ConfigError(f"{place} does not fit this job: {why}")

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()


def _described(x: Any) -> str:
    """Dtype and shape of an array or of what stands for one."""
    return f"{np.dtype(x.dtype).name}{list(x.shape)}"


def _place(path: str) -> epath.Path:
    path = path.removeprefix("file://")
    try:
        place = epath.Path(path if "://" in path else Path(path).absolute())
        place.mkdir(parents=True, exist_ok=True)
    except (KeyError, ImportError, OSError) as error:
        raise ConfigError(
            f"checkpoint.path {path!r} cannot be reached from here: {error}"
        ) from None
    return place


def _tell(text: str) -> None:
    if distributed.is_primary():
        print(text, file=sys.stderr)


def check_sums(flat: Mapping[str, jax.Array]) -> dict[str, int]:
    """A check sum of each array, taken on the devices, the same however it is sharded."""
    return {name: int(x) for name, x in _device_sums(dict(flat)).items()}


@jax.jit
def _device_sums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _check_sum(x) for name, x in flat.items()}


def _check_sum(x: jax.Array) -> jax.Array:
    """The sum modulo 2^32 of the bits of each element times an odd number of its own.

    Odd numbers have inverses modulo 2^32, so any change of one element changes the sum.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    weights = jnp.ones(bits.shape, jnp.uint32)
    for axis, factor in enumerate((0x9E3779B2, 0x85EBCA6A, 0xC2B2AE3C, 0x27D4EB2E, 0x165667B0)):
        if axis < bits.ndim:
            place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            weights += place * jnp.uint32(factor)
    return jnp.sum(bits * weights, dtype=jnp.uint32)
