"""One job in several processes: it trains, stops and resumes as it would in one."""

import json
import signal
import subprocess
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

import mmjax
from mmjax.config import ConfigError
from tests.mmjax.programs import random_model, small_config
from tests.processes import end as end_of
from tests.processes import start as processes_of
from tests.train.test_resume import MODEL, ROOT, last_checkpoint, lines
from train import distributed
from train.data.reasoning import ReasoningProblems, prompt_text
from train.data.tokenizer import train_tokenizer
from train.metrics import read_metrics
from train.watch import read_transcripts

pytestmark = pytest.mark.slow

STEPS = 14


def write_config(folder, config):
    (folder / "job.py").write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config!r})\n"
    )


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
    write_config(folder, config)
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


def start(job, workdir, mesh, processes=1, program=("-m", "train")):
    """The processes of a job on 8 CPU devices."""
    axes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    flags = [f"--config={job / 'job.py'}", f"--workdir={workdir}", *axes]
    pipes = {"stderr": subprocess.PIPE}
    cache = job / "compiled"
    return processes_of([*program, *flags], processes=processes, devices=8, cache=cache, **pipes)


def end(running):
    """Exit codes, and what the processes said."""
    codes, said = end_of(running)
    return codes, "\n".join(error for _, error in said)


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
    dying = ("-c", DYING, f"/{dies_at}", str(saving))
    running = start(job, workdir, mesh, processes=4, program=dying)
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


# Reinforcement whose rewards random weights can earn; which process gives one does not matter.
PARITY = """
import runpy
from train import rollout
from train.rewards.scoring import Score

def parity(_, asked, texts, finished):
    return [Score(len(t) % 2.0, False, {"correct": len(t) % 2.0}) for t in texts]

rollout.score_completions = parity
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""
BATCHES = 4


@pytest.fixture(scope="module")
def reinforcement(tmp_path_factory):
    """A folder with a model and the config that goes on from it."""
    folder = tmp_path_factory.mktemp("reinforcement")
    problems = ReasoningProblems(("chain_sum",), 100, 1)
    train_tokenizer([prompt_text(p) for p in problems], 300).save(folder)
    sizes = {k: v for k, v in MODEL.items() if k not in ("num_heads", "num_kv_heads")}
    shape = sizes | {"num_heads": 4, "num_kv_heads": 2}
    mmjax.save(random_model(small_config(**shape)), folder / "model", "hf", tokenizer_from=folder)
    config = {
        "task": "cispo",
        "steps": BATCHES,
        "remat": "none",
        "init_from": str(folder / "model"),
        "model": shape,
        "data": {"source": "reasoning", "tasks": ("chain_sum",), "size": 40},
        "cispo": {
            "prompts_per_batch": 8,
            "samples_per_prompt": 2,
            "updates_per_batch": 2,
            "max_prompt_tokens": 96,
            "max_new_tokens": 6,
            "eval_every": 2,
            "eval_problems": 6,
        },
        "sampling": {"rounds": 2},
        "optimizer": {"microbatches": 2},
        "checkpoint": {"every": 1, "export": "hf"},
    }
    write_config(folder, config)
    return folder


def test_two_processes_reinforce_as_one_does(reinforcement):
    """Sampling, scoring, updates and the exported model; one of the two is stopped on the way.

    The one has another mesh, which splits sequences whose length it does not divide.
    """
    mesh, program = {"data": 2, "expert": 2, "model": 2}, ("-c", PARITY)
    straight, workdir = reinforcement / "straight", reinforcement / "two"
    split = {"data": 2, "expert": 2, "context": 2}
    codes, said = end(start(reinforcement, straight, split, program=program))
    assert codes == [0], said

    running = start(reinforcement, workdir, mesh, processes=2, program=program)
    wait_for(running, workdir, 1)
    running[1].send_signal(signal.SIGTERM)
    codes, said = end(running)
    assert codes == [128 + signal.SIGTERM] * 2, said
    assert last_checkpoint(workdir) < BATCHES
    codes, said = end(start(reinforcement, workdir, mesh, processes=2, program=program))
    assert codes == [0, 0], said

    rows = [read_metrics(folder) for folder in (workdir, straight)]
    for mine, other in zip(*rows, strict=True):
        for name in ("reward", "length", "groups_sampled", "tokens_trained"):
            assert mine[name] == other[name]
        np.testing.assert_allclose(mine["loss"], other["loss"], rtol=1e-3)
        assert mine["probability/log_difference_max"] < 1e-4
    assert [x["text"] for x in read_transcripts(workdir)] == [
        x["text"] for x in read_transcripts(straight)
    ]
    # AdamW's first steps divide small gradients by themselves, rounding and all.
    files = [sorted((folder / "model").glob("*.safetensors")) for folder in (workdir, straight)]
    for mine, other in zip(*files, strict=True):
        tensors, expected = load_file(mine), load_file(other)
        assert tensors.keys() == expected.keys()
        for name, x in tensors.items():
            np.testing.assert_allclose(x, expected[name], atol=1e-4, err_msg=name)
    start_of = load_file(next((reinforcement / "model").glob("*.safetensors")))
    assert any(np.abs(x - start_of[name]).max() > 1e-3 for name, x in tensors.items())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["asynchronous.max_staleness=1", "asynchronous.sampler_devices=4"],
            "are for one process, not for 2; set both to 0",
        ),
        (["mesh.data=8"], "a batch of 4 rows does not divide over data·expert = 8 devices"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_at_once(reinforcement, flags, says):
    workdir = reinforcement / flags[0]
    job = [f"--config={reinforcement / 'job.py'}", f"--workdir={workdir}"]
    program = ["-m", "train", *job, *(f"--config.{flag}" for flag in flags)]
    pipes = {"stderr": subprocess.PIPE}
    cache = reinforcement / "compiled"
    codes, said = end(processes_of(program, processes=2, devices=8, cache=cache, **pipes))
    assert 0 not in codes
    assert says in said
    assert not (workdir / "transcripts.jsonl").exists()


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
