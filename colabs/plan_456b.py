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
# # Plan a run of 456 billion parameters
#
# What a train step, a prefill, a decode step and a reinforcement budget of MiniMax-M1 need on chips that
# are not here: memory, FLOPs, the roofline, the best mesh, the price. All of it is counted, on a CPU, in
# seconds; `mmjax plan` is the same from a shell, and compiles the real step ahead for TPUs where `libtpu`
# is installed.

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
import dataclasses

import jax
import matplotlib.pyplot as plt
import numpy as np

jax.config.update("jax_platforms", "cpu")  # Nothing is computed.

from mmjax import ModelConfig
from mmjax.config import LIGHTNING, SOFTMAX
from mmjax.plan import Job, best_meshes, estimate, parse_topology, read_request
from mmjax.plan.counts import active_parameters
from mmjax.plan.curve import compare
from mmjax.plan.estimate import Reinforcement, bill, generation, show_mesh

FIGURES = Path("runs/colabs/plan_456b")
FIGURES.mkdir(parents=True, exist_ok=True)
GIB = 2**30

# %% [markdown]
# ## The model
#
# 80 layers, 32 experts of which a token meets two. Nineteen of twenty parameters are experts'.

# %%
m1 = ModelConfig.minimax_m1()
total, active, inner = active_parameters(m1)
experts = m1.num_layers * m1.num_experts * 3 * m1.hidden_size * m1.intermediate_size
print(f"{total / 1e9:.2f}B parameters, {experts / total:.0%} of them experts'")
print(f"{active / 1e9:.2f}B meet a token, {inner / 1e9:.2f}B without embedding and head")
assert total == 456_089_655_296  # As the released index has it.
assert abs(inner / 1e9 - 45.9) < 0.1  # As MiniMax counts.

# %% [markdown]
# ## A train step on 512 chips
#
# `configs/minimax_m1.py` trains 512 rows of 8,192 tokens. On each topology the search goes over all meshes
# that divide the job, and ranks those that fit by the longest term of the roofline: compute, HBM or
# network.

# %%
request = read_request("configs/minimax_m1.py")
train = Job("train", request.model, request.batch, request.length, remat=request.remat)
chosen = {}
for name in ("v5p:8x8x8", "v6e:16x16", "h200:512", "b200:256"):
    best = best_meshes(train, parse_topology(name), 1)[0]
    chosen[name] = best
    terms = ", ".join(f"{term} {s:.1f} s" for term, s in best.seconds.items())
    print(
        f"{name:10} {show_mesh(best.mesh):28} {best.peak / GIB:5.1f} GiB of "
        f"{best.topology.chip.hbm / GIB:.0f}{'' if best.fits else ' (too much)'}: {terms}"
    )

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
bottom = np.zeros(len(chosen))
parts = list(dict.fromkeys(part for e in chosen.values() for part in e.memory))
for part in parts:
    sizes = np.array([e.memory.get(part, 0) / GIB for e in chosen.values()], float)
    left.bar(list(chosen), sizes, bottom=bottom, label=part)
    bottom += sizes
left.plot(list(chosen), [e.topology.chip.hbm / GIB for e in chosen.values()], "k_", markersize=30)
left.set(ylabel="GiB a device", title="memory (mark: what there is)")
left.legend(fontsize=7)
for i, term in enumerate(("compute", "HBM", "network")):
    seconds = [e.seconds[term] for e in chosen.values()]
    right.bar(np.arange(len(chosen)) + 0.25 * (i - 1), seconds, 0.25, label=term)
right.set_xticks(range(len(chosen)), list(chosen))
right.set(ylabel="seconds", title="roofline of a step")
right.legend()
fig.savefig(FIGURES / "train.png", dpi=110, bbox_inches="tight")

v5p = chosen["v5p:8x8x8"]
assert v5p.fits
assert v5p.peak == sum(v5p.memory.values())
assert abs(v5p.bound - 8.62) < 0.05, v5p.bound  # docs/plan.md
# Six FLOPs a weight and token are the least; attention and what else there is come on top.
assert v5p.flops_model > 6 * inner * train.new_tokens

# %% [markdown]
# ## The mesh matters
#
# The same chips, the same step. A mesh that leaves experts on one device, or cuts heads further than
# needed, is slower or does not fit.

# %%
topology = parse_topology("v5p:8x8x8")
meshes = [
    {"data": 16, "expert": 32},
    {"data": 512},
    {"data": 64, "expert": 8},
    {"data": 8, "expert": 8, "model": 8},
    {"context": 16, "expert": 32},
]
for mesh in meshes:
    e = estimate(train, topology, mesh)
    fits = "fits" if e.fits else "does not fit"
    print(
        f"{show_mesh(mesh):26} {e.peak / GIB:6.1f} GiB, {fits}; step ≥ {e.bound:.1f} s, {e.binds} binds"
    )
    assert e.bound >= v5p.bound - 1e-9 or not e.fits  # The search found no worse.

# %% [markdown]
# ## What recomputing costs
#
# `remat` trades memory for FLOPs: "none" keeps everything, "layer" the inputs of layers, "super_block"
# those of eight.

# %%
spent = {}
for remat in ("none", "layer", "super_block"):
    e = estimate(dataclasses.replace(train, remat=remat), topology, v5p.mesh)
    spent[remat] = e
    print(f"{remat:12} {e.peak / GIB:6.1f} GiB, step ≥ {e.bound:.2f} s")
assert spent["none"].peak > spent["layer"].peak > spent["super_block"].peak
assert spent["none"].flops < spent["layer"].flops < spent["super_block"].flops

# %% [markdown]
# ## Long contexts
#
# The tokens of a step stay the same, 4.2 million; rows grow from 8K to 1M and are cut over `context`. Seven
# of eight layers do not mind.

# %%
lengths = [8192, 32768, 131072, 524288, 1048576]
rows = [train.new_tokens // n for n in lengths]
bounds = []
for length, batch in zip(lengths, rows, strict=True):
    e = best_meshes(dataclasses.replace(train, batch=batch, length=length), topology, 1)[0]
    bounds.append(e.bound)
    print(
        f"{batch:4} x {length:9,}: {show_mesh(e.mesh):36} {e.peak / GIB:5.1f} GiB, step ≥ {e.bound:.1f} s"
    )
assert bounds[-1] / bounds[0] < lengths[-1] / lengths[0] / 10  # Far less than with the length.

softmax_only = dataclasses.replace(m1, layer_types=(SOFTMAX,) * m1.num_layers)
longest = dataclasses.replace(train, batch=rows[-1], length=lengths[-1])
mesh = {"context": 128, "expert": 4}
hybrid = estimate(longest, topology, mesh)
plain = estimate(dataclasses.replace(longest, model=softmax_only), topology, mesh)
print(
    f"1M tokens a row, all layers softmax: {plain.flops_model / hybrid.flops_model:.1f} times the FLOPs"
)
assert plain.flops_model > 2 * hybrid.flops_model

# %% [markdown]
# ## Serving
#
# A decode step reads weights, states, keys and values once. Lightning states are 280 MiB a sequence,
# whatever its length.

# %%
states = m1.kinds.count(LIGHTNING) * m1.num_heads * m1.head_dim**2 * 4
assert states == 280 * 2**20
pod = parse_topology("v6e:16x16")
served = {}
for length in (8192, 65536, 524288):
    served[length] = best_meshes(Job("decode", m1, 256, length), pod, 1)[0]
    e = served[length]
    print(
        f"256 rows behind {length:7,} tokens: {show_mesh(e.mesh):28} {e.peak / GIB:5.1f} GiB, "
        f"step ≥ {1e3 * e.bound:.1f} ms, {e.tokens_per_second:,.0f} tokens/s at most, {e.binds} binds"
    )
assert all(e.binds == "HBM" for e in served.values())

table = compare(m1)
fig, ax = plt.subplots(figsize=(6, 3.4))
ax.loglog([r.length for r in table], [r.ours for r in table], "o-", label="MiniMax-M1")
ax.loglog(
    [r.length for r in table], [r.expanded for r in table], "o-", label="DeepSeek-R1, expanded"
)
ax.set(xlabel="tokens generated", ylabel="FLOPs", title="Cost of a generation")
ax.legend()
fig.savefig(FIGURES / "generation.png", dpi=110, bbox_inches="tight")
shares = [r.share for r in table]
for r in table:
    print(f"{r.length:8,} tokens: {r.share:.0%} of R1's FLOPs")
assert shares == sorted(shares, reverse=True)  # The longer, the better;
assert shares[-1] < 0.6  # short generations gain nothing.

# %% [markdown]
# ## The bill
#
# At the roofline's pace, so at least this. `PRICE` is for one chip-hour, in your currency.

# %%
PRICE = 2.0  # @param {type: "number"}
tokens = 1e12
pretraining = bill(topology, tokens / v5p.tokens_per_second, PRICE)
budget = Reinforcement(1000, 8192, 40000)
decode = generation(m1, budget, topology)
sampling = bill(topology, budget.total / decode.tokens_per_second, PRICE)
updates = bill(topology, budget.total / v5p.tokens_per_second, PRICE)
for name, b in (("1e12 tokens", pretraining), ("RL, sampling", sampling), ("RL, updates", updates)):
    print(f"{name:14} {b.hours:8,.0f} h, {b.chip_hours:10,.0f} chip-hours, {b.cost:10,.0f}")
assert np.isclose(pretraining.cost, pretraining.hours * 512 * PRICE)
assert abs(pretraining.hours - 570.9) < 5  # docs/plan.md
