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
from train.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.slow

STEPS = 14


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with a config; data in four streams."""
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
            "streams": 4,
            "tokenizer": str(folder),
        },
    }
    train_tokenizer(["def return self import"], 300).save(folder)
    (folder / "job.py").write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config!r})\n"
    )
    return folder


# A job that says when a checkpoint is about to be whole, and then waits to be killed.
DYING = """
import os, runpy, sys, time
from pathlib import Path

rename, whole, saving = os.rename, sys.argv.pop(1), Path(sys.argv.pop(1))

def waiting(source, target):
    if "orbax-checkpoint-tmp" in str(source) and str(target).endswith(whole):
        saving.touch()
        time.sleep(60)
    rename(source, target)

os.rename = waiting
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


def start(job, workdir, mesh, processes=1, dying=()):
    """The processes of a job on 8 CPU devices.

    dying: Step whose checkpoint is not to be finished, and a file that tells that it is written.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    axes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    program = ["-c", DYING, *map(str, dying)] if dying else ["-m", "train"]
    flags = [f"--config={job / 'job.py'}", f"--workdir={workdir}"]
    command = [sys.executable, *program, *flags]
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


def place_in_data(workdir):
    """What the last checkpoint knows of the data: all that the next tokens follow from."""
    step = last_checkpoint(workdir)
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())


def test_processes_stop_and_are_killed_in_a_save_and_others_go_on_with_another_mesh(job):
    """One process; two that stop; four that are killed while they save; one to the end."""
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

    dies_at, saving = (stopped // 2 + 2) * 2, job / "saving"
    running = start(job, workdir, mesh, processes=4, dying=(f"/{dies_at}", saving))
    while not saving.exists() and all(process.poll() is None for process in running):
        time.sleep(0.01)
    for process in running:
        process.send_signal(signal.SIGKILL)
    codes, said = end(running)
    assert codes == [-signal.SIGKILL] * 4, said
    assert stopped < last_checkpoint(workdir) < dies_at
    assert list((workdir / "checkpoints").glob(f"{dies_at}.*"))

    codes, said = end(start(job, workdir, {"data": 4, "model": 2}))
    assert codes == [0], said
    assert "resumed" in said
    assert "was not finished when its job ended; it is removed" in said
    np.testing.assert_allclose(losses(workdir), losses(job / "straight"), rtol=1e-4)
    assert place_in_data(workdir) == place_in_data(job / "straight")


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
