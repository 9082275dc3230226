"""`python -m tests.train.killed_job FOLDER SEED`: a job that dies by SIGKILL again and again.

Each life is a fork of a process that has imported everything and started no device, so that twenty
of them cost little. In a life the job is killed at the n-th call of a place; the last one ends.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import jax

import mmjax
from mmjax.config import ModelConfig
from train import checkpoint, cispo, rollout, watch
from train import config as job_config
from train.data import reasoning
from train.data.reasoning import Problem
from train.data.tokenizer import train_tokenizer
from train.job import Job
from train.rewards.scoring import Score

STEPS, DEATHS = 10, 20


class Problems:
    """Questions whose rewards random weights can earn."""

    def __init__(self, first, count):
        self.families = {"toy": "rule"}
        self.digest = f"{first} {count}"
        self._problems = [Problem("toy", f"{first + i}+{i}=", str(i), {}) for i in range(count)]

    def __len__(self):
        return len(self._problems)

    def __iter__(self):
        return iter(self._problems)

    def __getitem__(self, index):
        return self._problems[index]

    def metrics(self):
        return {}


def parity(_, asked, texts, finished):
    """Rewards completions of an odd number of characters."""
    return [Score(len(t) % 2.0, False, {"correct": len(t) % 2.0}) for t in texts]


def job(folder):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1}
    sizes = {"prompts_per_batch": 4, "samples_per_prompt": 2, "updates_per_batch": 2}
    sizes |= {"max_prompt_tokens": 48, "max_new_tokens": 6, "eval_every": 0, "eval_problems": 4}
    return job_config.JobConfig(
        "cispo",
        STEPS,
        init_from=str(folder / "start"),
        remat="none",
        model=ModelConfig.tiny(num_layers=1, layer_types=("lightning",), vocab_size=300, **small),
        data=job_config.DataConfig(tasks=("toy",)),
        cispo=job_config.CispoConfig(**sizes),
        sampling=job_config.SamplingConfig(rounds=2, retire_pass_rate=0.9, retire_after=2),
        curriculum=job_config.CurriculumConfig(adaptive=True),
        checkpoint=job_config.CheckpointConfig(every=1, export="hf"),
    )


def kill_at(place, count, wait):
    """Kills the process at the count-th call of a place, or `wait` seconds after it began."""
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) < count:
            return original(*args, **kwargs)
        if wait:  # Something is under way, as files that are being written.
            original(*args, **kwargs)
            time.sleep(wait)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, call)


PLACES = {
    "sampling": (rollout.Sampler, "step"),
    "scoring": (cispo, "score"),
    "update": (cispo, "cispo_step"),
    "weights": (rollout.Sampler, "update"),
    "transcripts": (watch.Transcripts, "write"),
    "checkpoint": (checkpoint.Checkpoints, "save"),
}


def make_start(folder):
    """The model that runs begin with."""
    tokenizer = train_tokenizer([reasoning.prompt_text(p) for p in Problems(0, 200)], 300)
    tokenizer.save(folder / "tokenizer")
    blank = job_config.JobConfig("sft", 1, model=job(folder).model)
    model = Job(blank, folder / "made", tokenizer, 1).model
    mmjax.save(model, folder / "start", "hf", tokenizer_from=folder / "tokenizer")


def live(folder, workdir, death):
    """One life, in a process of its own."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    cispo.split_problems = lambda *_: (Problems(100, 24), Problems(10, 4))
    rollout.score_completions = parity
    if not (folder / "start").exists():
        make_start(folder)
    if death:
        kill_at(*death)
    ended = cispo.run(job(folder), workdir)
    assert int(ended.state.step) == STEPS


def fork(*args):
    """Whether the life ended by itself."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            live(*args)
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert status == 0, f"a life failed: {args}"
    return True


def main(folder, seed):
    """A straight run, then one of DEATHS deaths and an end; says how it died."""
    chance = random.Random(seed)
    assert fork(folder, folder / "straight", None)
    # Most deaths come at once: what a life computes before them takes time. Together they leave
    # some steps to the end.
    late = chance.sample(range(DEATHS), 3)
    deaths = []
    for i in range(DEATHS):
        count = chance.randint(2, 3) if i in late else 1
        death = list(PLACES)[i % len(PLACES)], count, chance.choice([0, 0, 0.02, 0.1])
        assert not fork(folder, folder / "killed", death), f"{death} did not come"
        deaths.append(death)
    assert fork(folder, folder / "killed", None)
    print(json.dumps(deaths))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
