"""Several processes of one job: JAX's own multi-controller runtime, joined before all else."""

from __future__ import annotations

import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmjax.config import ConfigError

_VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
) -> bool:
    """Joins the processes of one job; to be called before JAX touches a device.

    What is not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      coordinator_address: "host:port" that process 0 listens on.
      num_processes: Of the job.
      process_id: Of this one, from 0.
      detect: Have JAX ask the cluster (Slurm, Open MPI, Cloud TPU, Kubernetes) for all three.

    Returns:
      Whether there is anything to join.

    Raises:
      ConfigError: some of the three are missing, or make no sense together.
    """
    if detect:
        jax.distributed.initialize()
        return True
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    for name, variable in _VARIABLES.items():
        if given[name] is None:
            given[name] = os.environ.get(variable)
    if all(value is None for value in given.values()):
        return False
    jax.distributed.initialize(*_checked(given))
    return True


def _checked(given: dict[str, Any]) -> tuple[str, int, int]:
    missing = [f"--{n} (or {_VARIABLES[n]})" for n, value in given.items() if value is None]
    if missing:
        raise ConfigError(
            f"a job of several processes needs {', '.join(missing)}; under Slurm, on Cloud TPU or "
            "Kubernetes say --distributed instead"
        )
    try:
        count, index = int(given["num_processes"]), int(given["process_id"])
    except ValueError as error:
        raise ConfigError(f"num_processes and process_id are whole numbers: {error}") from None
    if not 0 <= index < count:
        raise ConfigError(f"process_id {index} is not in 0 to {count - 1} (num_processes {count})")
    return str(given["coordinator_address"]), count, index


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def should_stop(step: int) -> bool:
    """Whether a process has had SIGTERM and `step` is the one after which all are to stop."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def from_primary(value: np.ndarray) -> np.ndarray:
    """The first process's array, in all of them."""
    if jax.process_count() == 1:
        return value
    return np.asarray(multihost_utils.broadcast_one_to_all(value))


def union(part: dict[str, Any]) -> dict[str, Any]:
    """What all processes hold together: JSON values under names that mean the same everywhere."""
    if jax.process_count() == 1:
        return part
    text = np.frombuffer(json.dumps(part).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size], np.int32)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    whole: dict[str, Any] = {}
    for size, row in zip(sizes, texts, strict=True):
        whole |= json.loads(row[: int(size)].tobytes())
    return whole
