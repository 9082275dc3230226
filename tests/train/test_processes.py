"""One job in two processes: it trains, stops and resumes as it would in one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from mmjax.config import ConfigError
from tests.train.test_resume import MODEL, ROOT, last_checkpoint, lines
from train import distributed

pytestmark = pytest.mark.slow

STEPS = 14


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with a config; data in two streams."""
    folder = tmp_path_factory.mktemp("processes")
    config = {
        "task": "pretrain",
        "steps": STEPS,
        "remat": "layer",
        "model": MODEL | {"num_heads": 4, "num_kv_heads": 2},
        "checkpoint": {"every": 2},
        "data": {
            "paths": (str(ROOT / "train" / "*.py"),),
            "sequence_length": 32,
            "batch_size": 8,
            "streams": 2,
        },
    }
    (folder / "job.py").write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config!r})\n"
    )
    return folder


def start(job, workdir, mesh, processes=1):
    """The processes of a job on 8 CPU devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    axes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    command = [sys.executable, "-m", "train", f"--config={job / 'job.py'}", f"--workdir={workdir}"]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(8 // processes),
        "JAX_COMPILATION_CACHE_DIR": str(job / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if processes > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            command + axes,
            cwd=ROOT,
            env=env | ({"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def end(running):
    """Exit codes, and what the processes said."""
    try:
        said = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], "\n".join(said)


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def wait_for(running, workdir, step):
    while lines(workdir) < step and all(process.poll() is None for process in running):
        time.sleep(0.01)


def test_two_processes_stop_and_are_killed_and_one_goes_on_with_another_mesh(job):
    codes, said = end(start(job, job / "straight", {"data": 4, "model": 2}))
    assert codes == [0], said
    workdir, mesh = job / "interrupted", {"data": 4, "expert": 2}

    running = start(job, workdir, mesh, processes=2)
    wait_for(running, workdir, 2)
    running[1].send_signal(signal.SIGTERM)  # To one of them: both stop after the same step.
    codes, said = end(running)
    assert codes == [128 + signal.SIGTERM] * 2, said
    stopped = last_checkpoint(workdir)
    assert stopped == lines(workdir) < STEPS

    running = start(job, workdir, mesh, processes=2)
    wait_for(running, workdir, stopped + 3)
    for process in running:
        process.send_signal(signal.SIGKILL)
    codes, said = end(running)
    assert codes == [-signal.SIGKILL] * 2, said
    assert stopped <= last_checkpoint(workdir) < STEPS

    codes, said = end(start(job, workdir, {"data": 4, "model": 2}))
    assert codes == [0], said
    assert "resumed" in said
    np.testing.assert_allclose(losses(workdir), losses(job / "straight"), rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_processes": 2, "process_id": 0}, "needs --coordinator_address"),
        ({"coordinator_address": "a:1", "num_processes": 2}, "needs --process_id"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "not in 0 to 1"),
    ],
)
def test_what_does_not_make_a_job_of_processes_is_said(given, says):
    with pytest.raises(ConfigError, match=says):
        distributed.join(**given)


def test_a_single_process_joins_nothing():
    assert not distributed.join()
