# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reinforce a small reasoner with CISPO
#
# A tiny M1 learns sums from worked solutions, of which most answer at once and a third think first.
# Greedy decoding then answers at once, and mostly wrongly. Reinforcement with CISPO is told nothing but
# whether an answer was right, and finds out that thinking pays. Runs on a CPU or one GPU.

# %%
# On a fresh runtime this fetches mmjax from its git repository; in a checkout it does nothing.
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = os.environ.get("MMJAX_REPOSITORY", "")  # @param {type: "string"}
for root in (Path.cwd(), Path.cwd().parent, Path.cwd() / "mmjax-checkout"):
    if (root / "mmjax" / "__init__.py").exists():
        break
else:
    assert REPOSITORY, "set REPOSITORY to the address that mmjax is cloned from"
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "mmjax-checkout"], check=True)
    extras = "train,cuda" if shutil.which("nvidia-smi") else "train"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "-e", f"mmjax-checkout[{extras}]"]
    subprocess.run(pip, check=True)
os.chdir(root)
sys.path.insert(0, str(root))
SMALL = os.environ.get("MMJAX_COLAB_SMALL") == "1"  # What CI runs.

# %%
import runpy

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import logging

from train.config import build
from train.metrics import read_metrics
from train.report import write_report
from train.tasks import run_task
from train.watch import read_transcripts

WORKDIR = Path("runs/colabs/cispo" + "_small" * SMALL)
WORKDIR.mkdir(parents=True, exist_ok=True)
logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
print(jax.devices())

# %% [markdown]
# ## The objective
#
# With $r = \pi_\theta / \pi_\mathrm{old}$ and the advantage $\hat A$ of a sample within its group, a token's
# term is
#
# $$\mathrm{sg}(\min(r, c)) \; \hat A \; \log \pi_\theta .$$
#
# PPO's and GRPO's clipped surrogate $\min(r \hat A, \mathrm{clip}(r, 1 \pm \epsilon) \hat A)$ has no gradient
# once $r$ has left the interval in the direction of the advantage: rare tokens that turn an argument,
# whose $r$ grows fast, drop out. CISPO bounds the weight and keeps every token.

# %%
CAP, EPSILON = 5.0, 0.2


def cispo(log_p, log_old, advantage):
    weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_p - log_old), CAP))
    return weight * advantage * log_p


def grpo(log_p, log_old, advantage):
    r = jnp.exp(log_p - log_old)
    return jnp.minimum(r * advantage, jnp.clip(r, 1 - EPSILON, 1 + EPSILON) * advantage)


ratios = jnp.logspace(-1, 1, 201)
log_old = jnp.full(ratios.shape, -3.0)
slopes = {
    f.__name__: jax.vmap(jax.grad(f), (0, 0, None))(log_old + jnp.log(ratios), log_old, 1.0)
    for f in (cispo, grpo)
}
fig, ax = plt.subplots(figsize=(6, 3.2))
for name, slope in slopes.items():
    ax.semilogx(ratios, slope, label=name)
ax.set(xlabel="r", ylabel="weight of ∇ log π", title="A token of a good sample")
ax.legend()
fig.savefig(WORKDIR / "objective.png", dpi=110, bbox_inches="tight")
beyond = ratios > 1 + EPSILON
assert np.all(slopes["grpo"][beyond] == 0)  # Dropped.
assert np.all(slopes["cispo"] > 0)  # Kept,
assert float(slopes["cispo"].max()) <= CAP * 1.00001  # with a bounded weight.

# %% [markdown]
# ## Fine-tuning, then reinforcement
#
# Both jobs are `configs/demo.py`'s: two layers, one lightning and one softmax, four experts. The
# verifier is reasoning-gym's. Each job writes metrics, checkpoints and transcripts to its workdir and
# goes on from there if this cell is run again.

# %%
GET_CONFIG = runpy.run_path("configs/demo.py")["get_config"]
if SMALL:
    # Sums of two digits, learned by heart and stopped early: minutes are too short for thinking.
    TASK = "chain_sum(min_terms=2, max_terms=2, min_digits=1, max_digits=1)"
    STEPS = {"sft": 70, "cispo": 14}
else:
    TASK = "chain_sum"
    STEPS = {"sft": 1700, "cispo": 40}


def job(stage):
    config = GET_CONFIG(stage)
    config.data.tasks = (TASK,)
    config.steps = STEPS[stage]
    if stage == "cispo":
        config.init_from = str(WORKDIR / "sft" / "model")
    if SMALL:
        config.remat = "none"
        config.data.update(size=2000, sequence_length=64, direct_share=1.0)
        config.cispo.update(max_new_tokens=12, updates_per_batch=4, eval_problems=256)
        config.optimizer.learning_rate = {"sft": 4e-3, "cispo": 1e-3}[stage]
    return build(config)


for stage in ("sft", "cispo"):
    run_task(job(stage), WORKDIR / stage)

# %% [markdown]
# ## Watching it
#
# Reward and held-out accuracy should rise together; length shows what the model found out; entropy
# that falls to nothing in a few batches would be collapse; the correlation of the sampler's and the
# trainer's probabilities says whether both compute the same policy. `report.html` in the workdir
# has all curves and transcripts on one page.

# %%
records = read_metrics(WORKDIR / "cispo")
steps = [record["step"] for record in records]
fig, axes = plt.subplots(2, 2, figsize=(11, 6), sharex=True)
panels = {
    "share right": ("reward", "eval/accuracy"),
    "tokens a completion": ("length",),
    "entropy of the sampler, nats": ("entropy",),
    "tokens at the cap": ("clipped/positive", "clipped/negative"),
}
for ax, (title, names) in zip(axes.flat, panels.items(), strict=True):
    for name in names:
        points = [(r["step"], r[name]) for r in records if name in r]
        ax.plot(*zip(*points, strict=True), "o-", markersize=3, label=name)
    ax.set(title=title)
    ax.legend()
    ax.grid(alpha=0.3)
for ax in axes[1]:
    ax.set(xlabel="rollout batch")
fig.tight_layout()
fig.savefig(WORKDIR / "curves.png", dpi=110)
print("all of it:", write_report(WORKDIR / "cispo"))

# %% [markdown]
# ## Before and after, on problems that neither job has seen

# %%
answers = {}
for entry in read_transcripts(WORKDIR / "cispo"):
    if entry["kind"] == "held-out":
        answers.setdefault(entry["question"], []).append(entry)
changed = sorted(answers.values(), key=lambda pair: pair[0]["reward"] - pair[-1]["reward"])
for pair in changed[:3]:
    before, after = pair[0], pair[-1]
    print(f"{before['question']!r} → {before['answer']}")
    print(f"  before ({before['reward']:g}): {before['text']!r}")
    print(f"  after  ({after['reward']:g}): {after['text']!r}")

# %% [markdown]
# ## What this page claims, checked

# %%
before = next(r["eval/initial_accuracy"] for r in records if "eval/initial_accuracy" in r)
after = [r["eval/accuracy"] for r in records if "eval/accuracy" in r][-1]
reward = [float(np.mean([r["reward"] for r in part])) for part in (records[:3], records[-3:])]
lengths = records[0]["length"], records[-1]["length"]
correlation = min(r["probability/correlation"] for r in records if r["updates"])
print(f"greedy accuracy on held-out problems {before:.3f} → {after:.3f}")
print(f"reward of samples, three batches at either end {reward[0]:.3f} → {reward[1]:.3f}")
print(f"tokens a sample {lengths[0]:.1f} → {lengths[1]:.1f}")
print(f"lowest correlation of sampler and trainer {correlation:.5f}")
assert correlation > 0.99, correlation  # The sampler drew from the policy that was trained.
assert reward[1] > reward[0] + 0.15, reward  # It learned,
if not SMALL:  # There are 162 sums of two digits: by heart says nothing of those left out.
    assert after > before + 0.2, (before, after)  # also for problems it has not seen,
    assert lengths[1] > 1.5 * lengths[0], lengths  # by thinking.
