"""Checkpoints with Orbax: atomic, asynchronous, the data iterator included."""

from __future__ import annotations

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from mmjax.config import ConfigError
from train import distributed
from train.config import CheckpointConfig
from train.data.streams import Resumable
from train.state import TrainState, from_flat, to_flat


class Checkpoints:
    """The checkpoints of one workdir: the state's arrays and the iterator's place together.

    Args:
      workdir: Folder of the job; checkpoints go to `workdir/checkpoints`.
      cfg: How many to keep.
    """

    def __init__(self, workdir: Path, cfg: CheckpointConfig) -> None:
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=cfg.keep, enable_async_checkpointing=True
            ),
        )

    def save(self, state: TrainState, data: Resumable) -> None:
        """Saves at the state's step, once; returns while the arrays are being written."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(to_flat(state)),
            data=ocp.args.JsonSave(distributed.union(data.get_state())),
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, state: TrainState, data: Resumable) -> TrainState | None:
        """The latest checkpoint in the structure and sharding of `state`, None if there is none.

        The iterator is moved to its place in it.

        Raises:
          ConfigError: the checkpoint is of another model or optimizer.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, to_flat(state))
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(target),
            data=ocp.args.JsonRestore(),
        )
        try:
            restored = self._manager.restore(step, args=items)
            data.set_state(restored["data"])
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"checkpoint {step} in {self._manager.directory} does not fit this job "
                f"(changed model, optimizer or data.streams?): {error}"
            ) from None
        return from_flat(state, restored["state"])

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()
