"""Jobs that are killed or told to stop, and started again with the same command.

A straight run and an interrupted one leave the same metrics and the same model, bit for bit.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.metrics import read_metrics
from train.report import write_report
from train.watch import read_transcripts

ROOT = Path(__file__).parents[2]
# Each program is compiled once for all runs.
QUICK = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
MODEL = {
    "num_layers": 2,
    "layer_types": ("lightning", "softmax"),
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "vocab_size": 300,
}
PROBLEMS = {"source": "reasoning", "tasks": ("chain_sum",), "size": 400, "direct_share": 1.0}
JOBS = {
    "pretrain": {
        "steps": 12,
        "checkpoint": {"every": 2, "export": "hf", "export_every": 5},
        "data": {"paths": (str(ROOT / "train" / "*.py"),), "sequence_length": 32, "batch_size": 4},
    },
    "sft": {
        "steps": 80,
        "data": PROBLEMS | {"sequence_length": 96, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2, "decay": "linear", "warmup_steps": 5},
    },
    "cispo": {
        "steps": 8,
        "data": PROBLEMS,
        "cispo": {
            "prompts_per_batch": 8,
            "samples_per_prompt": 8,
            "updates_per_batch": 2,
            "max_prompt_tokens": 80,
            "max_new_tokens": 12,
            "eval_every": 0,
            "eval_problems": 16,
        },
    },
}


def write_config(folder, task, **changes):
    """A config file that imports ml_collections alone."""
    job = {
        "task": task,
        "remat": "layer",
        "model": MODEL,
        "checkpoint": {"every": 16 if task == "sft" else 2, "export": "hf"},
        **JOBS[task],
        **changes,
    }
    file = folder / f"{task}.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({job!r})\n"
    )
    return file


def start(config, workdir):
    command = [sys.executable, "-m", "train", f"--config={config}", f"--workdir={workdir}"]
    env = os.environ | QUICK | {"JAX_COMPILATION_CACHE_DIR": str(config.parent / "compiled")}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def end(process):
    """(exit code, what it said)."""
    try:
        _, said = process.communicate(timeout=200)
    finally:
        process.kill()
    return process.returncode, said


def lines(workdir):
    file = workdir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def stop(process, workdir, step, how):
    """Sends a signal once that step is in the metrics."""
    try:
        while process.poll() is None and lines(workdir) < step:
            time.sleep(0.002)
        process.send_signal(how)
    finally:
        code, said = end(process)
    return code, said


def last_checkpoint(workdir):
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Runs the straight job of a task, once; returns its config and workdir."""
    folder = tmp_path_factory.mktemp("jobs")
    done = {}

    def straight(task):
        if task not in done:
            model = {"init_from": str(straight("sft")[1] / "model")} if task == "cispo" else {}
            done[task] = write_config(folder, task, **model), folder / task
            code, said = end(start(*done[task]))
            assert code == 0, said
            assert lines(folder / task) == JOBS[task]["steps"]
        return done[task]

    return straight


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_killed_job_ends_as_a_straight_one(task, jobs, tmp_path):
    config, straight = jobs(task)
    step = random_step(1, JOBS[task]["steps"] - 5)
    code, said = stop(start(config, tmp_path), tmp_path, step, signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    # A step that will not be run again has to be in the metrics already.
    assert last_checkpoint(tmp_path) <= lines(tmp_path) < JOBS[task]["steps"]
    if task == "pretrain":
        check_that_a_signal_saves(task, config, tmp_path)
    finish(config, tmp_path)
    names = ["model/model.safetensors", "tokenizer.json"]
    on_the_way = ["model-5", "model-10"] if task == "pretrain" else []
    for name in names + [f"{folder}/model.safetensors" for folder in on_the_way]:
        assert (tmp_path / name).read_bytes() == (straight / name).read_bytes(), name
    assert untimed(tmp_path) == untimed(straight)


TIMES = ("seconds/", "tokens_per_second/", "data/wait", "tflops", "mfu")


def untimed(workdir):
    """The metrics without what the clock says."""
    return [{k: v for k, v in m.items() if not k.startswith(TIMES)} for m in read_metrics(workdir)]


def check_that_a_signal_saves(task, config, workdir):
    step = lines(workdir) + random_step(1, 2)
    code, said = stop(start(config, workdir), workdir, step, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM == 143, said
    stopped = lines(workdir)
    assert f"stopped by a signal after step {stopped} with a checkpoint" in said
    assert last_checkpoint(workdir) == stopped < JOBS[task]["steps"]


def random_step(least, most):
    seed = os.getpid()
    step = random.Random(seed).randint(least, most)
    print(f"seed {seed}: signal after {step} steps")
    return step


def finish(config, workdir):
    code, said = end(start(config, workdir))
    assert code == 0, said


@pytest.mark.slow
def test_cispo_job_by_its_command(jobs):
    """Killed ones are in test_kill.py."""
    _, workdir = jobs("cispo")
    metrics = read_metrics(workdir)
    assert sum(m["groups_kept"] > 0 for m in metrics) > len(metrics) / 2
    apart = [m["probability/log_difference_max"] for m in metrics if m["updates"]]
    assert len(apart) > len(metrics) / 2
    assert max(apart) <= 1e-4
    assert "eval/initial_accuracy" in metrics[0]
    assert "eval/accuracy" in metrics[-1]
    assert {t["kind"] for t in read_transcripts(workdir)} == {"training", "held-out"}
    assert "<svg" in write_report(workdir).read_text()
