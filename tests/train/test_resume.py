"""Jobs that are killed or told to stop, and started again with the same command.

A straight run and an interrupted one leave the same metrics and the same model, bit for bit.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Ten times quicker to compile, and a resume has to be exact whatever the compiler does.
QUICK = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
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
        "steps": 24,
        "data": {"paths": (str(ROOT / "train" / "*.py"),), "sequence_length": 32, "batch_size": 4},
    },
    "sft": {
        "steps": 80,
        "data": PROBLEMS | {"sequence_length": 96, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2, "decay": "linear", "warmup_steps": 5},
    },
    "cispo": {
        "steps": 14,
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
        "remat": False,
        "model": MODEL,
        "checkpoint": {"every": 2, "export": "hf"},
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
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | QUICK, stderr=subprocess.PIPE, text=True
    )


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
def tuned(tmp_path_factory):
    """The workdir of a straight sft run; cispo starts from its model."""
    folder = tmp_path_factory.mktemp("tuned")
    code, said = end(start(write_config(folder, "sft"), folder / "straight"))
    assert code == 0, said
    return folder / "straight"


@pytest.mark.parametrize("task", JOBS)
def test_interrupted_job_ends_as_a_straight_one(task, tmp_path, request):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    changes = {}
    if task == "cispo":
        changes = {"init_from": str(request.getfixturevalue("tuned") / "model")}
    config = write_config(tmp_path, task, **changes)
    if task == "sft":
        straight = request.getfixturevalue("tuned")
    else:
        code, said = end(start(config, straight))
        assert code == 0, said

    seed = os.getpid()
    rng = random.Random(seed)
    kill_at = rng.randint(1, JOBS[task]["steps"] // 2)
    print(f"seed {seed}: SIGKILL at step {kill_at}")
    code, said = stop(start(config, broken), broken, kill_at, signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    # A step that will not be run again must be in the metrics.
    assert last_checkpoint(broken) <= lines(broken) < JOBS[task]["steps"]

    stop_at = lines(broken) + rng.randint(1, 3)
    print(f"SIGTERM at step {stop_at}")
    code, said = stop(start(config, broken), broken, stop_at, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, said
    stopped = lines(broken)
    assert f"stopped by a signal after step {stopped} with a checkpoint" in said
    assert last_checkpoint(broken) == stopped < JOBS[task]["steps"]

    code, said = end(start(config, broken))
    assert code == 0, said
    assert f"resumed from step {stopped} of" in said
    assert lines(straight) == JOBS[task]["steps"]
    for name in ("metrics.jsonl", "model/model.safetensors", "tokenizer.json"):
        assert (broken / name).read_bytes() == (straight / name).read_bytes(), name
    if task == "cispo":
        check_that_it_reinforced(broken)


def check_that_it_reinforced(workdir):
    """Nothing would be shown by rollouts that all score the same."""
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert sum(m["groups_kept"] > 0 for m in metrics) > len(metrics) / 2
    assert max(m["logprob_drift"] for m in metrics) <= 1e-4
    assert "eval/initial_accuracy" in metrics[0]
    assert "eval/accuracy" in metrics[-1]


def test_finished_job_does_nothing_more(tuned):
    before = {p: p.read_bytes() for p in tuned.glob("*.jsonl")}
    code, said = end(start(tuned.parent / "sft.py", tuned))
    assert code == 0, said
    assert {p: p.read_bytes() for p in tuned.glob("*.jsonl")} == before
