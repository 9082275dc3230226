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
# # Inside a checkpoint
#
# Loads a model folder, or makes a small one first, and looks at what a hybrid mixture of experts
# does with a text: which experts each layer's router picks, where softmax attention looks, how large
# the states of lightning attention grow, and what the next token is. Every view is checked against
# the model's own output. Runs on a CPU or one GPU.

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

# %% [markdown]
# ## A checkpoint
#
# `CHECKPOINT` names a model folder (released or transformers' layout, or Orbax) with its
# `tokenizer.json`. Without one, a model of four layers is trained on this repository's own
# documentation, a minute or two on a CPU, and written in the released layout.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import logging
from ml_collections import ConfigDict

import mmjax
from mmjax.config import LIGHTNING, SOFTMAX
from mmjax.layers.lightning import decay_rates
from mmjax.layers.rope import apply_rope, rope_angles
from train.config import build
from train.metrics import read_metrics
from train.tasks import run_task

CHECKPOINT = os.environ.get("MMJAX_CHECKPOINT", "")  # @param {type: "string"}
WORKDIR = Path("runs/colabs/inside_a_checkpoint" + "_small" * SMALL)
WORKDIR.mkdir(parents=True, exist_ok=True)
logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
# Otherwise a GPU multiplies float32 matrices in TF32, and views agree with the model to 3 digits.
jax.config.update("jax_default_matmul_precision", "highest")


def job():
    config = ConfigDict({"task": "pretrain", "steps": 60 if SMALL else 600, "log_every": 20})
    config.remat = "none"
    config.model = {
        "preset": "tiny",
        "num_layers": 4,
        "layer_types": ("lightning", "lightning", "lightning", "softmax"),
        "vocab_size": 512 if SMALL else 1024,
    }
    config.data = {
        "source": "text",
        "paths": ("docs/*.md", "README.md", "CONTRIBUTING.md"),
        "sequence_length": 128,
        "batch_size": 8 if SMALL else 16,
    }
    config.optimizer = {"learning_rate": 4e-3, "warmup_steps": 10, "decay": "cosine"}
    config.checkpoint = {"every": 1000, "export": "hf"}
    return config


if not CHECKPOINT:
    run_task(build(job()), WORKDIR)
    CHECKPOINT = str(WORKDIR / "model")
    losses = [record["loss"] for record in read_metrics(WORKDIR)]
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f} nats a token")
    assert np.mean(losses[-5:]) < losses[0] - 1.0, losses

# %%
model = mmjax.load(CHECKPOINT)
tokenizer = mmjax.Tokenizer.load(CHECKPOINT)
cfg = model.cfg
print(f"{cfg.num_layers} layers: {', '.join(cfg.kinds[: cfg.period])}, repeated")
print(f"{cfg.num_heads} heads of {cfg.head_dim}, {cfg.num_experts} experts, {cfg.vocab_size} ids")

TEXT = Path("docs/engine.md").read_text()[:600]
ids = tokenizer.encode(TEXT)[:96]
pieces = [tokenizer.decode([i]) for i in ids]
tokens = jnp.asarray([ids], jnp.int32)
out = model(tokens, return_intermediates=True)
print(f"{len(ids)} tokens, logits {out.logits.shape} {out.logits.dtype}")


def figure(name, **shape):
    fig, axes = plt.subplots(**shape)
    figure.last = (fig, WORKDIR / f"{name}.png")
    return fig, axes


def save():
    fig, path = figure.last
    fig.savefig(path, dpi=110, bbox_inches="tight")


# %% [markdown]
# ## Routing by layer
#
# The router is a float32 product and a softmax; a token visits its two likeliest experts, with their
# probabilities scaled to sum to 1. The load of each expert should be near 1/E: an auxiliary loss
# pulls it there in training.

# %%
logits = out.intermediates.router_logits[:, 0]  # [L, T, E]
top = jax.lax.top_k(logits, cfg.num_experts_per_token)[1]  # [L, T, k]
visits = jax.nn.one_hot(top, cfg.num_experts).sum(2)  # [L, T, E]
load = np.asarray(visits.mean(1)) / cfg.num_experts_per_token

fig, (left, right) = figure("routing", ncols=2, figsize=(11, 3.4), width_ratios=(1, 2.4))
shown = left.imshow(load, aspect="auto", vmin=0)
left.set(xlabel="expert", ylabel="layer", title="share of the visits")
fig.colorbar(shown, ax=left)
right.imshow(np.asarray(top[:, :48, 0]), aspect="auto", cmap="tab20")
right.set_xticks(range(0, 48), [p.strip() or "·" for p in pieces[:48]], rotation=90, fontsize=6)
right.set(ylabel="layer", title="first expert of each token")
save()

counted = np.asarray(visits.sum(1))
assert np.array_equal(counted, out.aux.tokens_per_expert), "the model's own count differs"
assert np.allclose(counted.sum(1), len(ids) * cfg.num_experts_per_token)  # Dropless.
entropy = np.asarray(out.aux.router_entropy)
print(
    "entropy of the routers, nats:", np.round(entropy, 3), f"of ln E = {np.log(load.shape[1]):.3f}"
)
assert np.all((entropy > 0) & (entropy <= np.log(cfg.num_experts) + 1e-4))

# %% [markdown]
# ## Where softmax attention looks
#
# One softmax layer, its input taken from the model, its map made from its own matrices. Multiplied
# with the values and projected, the map gives the layer's output.

# %%
blocks = model.unstacked().blocks
layer = cfg.kinds.index(SOFTMAX)
block = blocks[layer]
x = block.attention_norm(out.intermediates.hidden_states[layer])
attention = block.attention
angles = rope_angles(jnp.arange(len(ids), dtype=jnp.int32)[None], cfg.rotary_dim, cfg.rope_theta)
q = apply_rope(jnp.einsum("btd,dhk->bthk", x, attention.q[...]), angles)
k = apply_rope(jnp.einsum("btd,dgk->btgk", x, attention.k[...]), angles)
v = jnp.einsum("btd,dgk->btgk", x, attention.v[...])
k, v = (jnp.repeat(y, cfg.num_heads // cfg.num_kv_heads, axis=2) for y in (k, v))
scores = jnp.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(cfg.head_dim)
maps = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((len(ids),) * 2, bool)), scores, -jnp.inf))

ours = jnp.einsum("bhij,bjhk,hkd->bid", maps, v, attention.out[...])
theirs = attention(x, angles, segment_ids=None)
error = float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())
print(f"layer {layer}: output from the map differs from the layer's by {error:.1e}")
assert error < (1e-4 if cfg.dtype == "float32" else 0.05)
assert np.allclose(maps.sum(-1), 1, atol=1e-5)

shown_heads = min(cfg.num_heads, 4)
fig, axes = figure("attention", ncols=shown_heads, figsize=(3 * shown_heads, 3), squeeze=False)
for head, ax in enumerate(axes[0]):
    ax.imshow(np.asarray(maps[0, head]) ** 0.5)
    ax.set(title=f"layer {layer}, head {head}")
save()

# %% [markdown]
# ## What lightning layers keep
#
# A state can hold no more than its decay allows: if no key-value product is longer than $m$, the norm
# of the state stays below $m / (1 - e^{-s})$. Slow heads (small $s$) can grow, fast ones cannot. The
# states come from decoding the text token by token through the cache, which is checked against the
# whole forward pass.

# %%


@jax.jit
def step(token, cache):
    out = model(token, cache=cache)
    return out.logits, out.cache


cache = mmjax.HybridCache.create(cfg, batch=1, capacity=len(ids))
norms, decoded = [], []
for token in ids:
    logits, cache = step(jnp.asarray([[token]], jnp.int32), cache)
    decoded.append(logits[0, 0])
    norms.append(jnp.linalg.norm(cache.state[:, 0], axis=(-2, -1)))
norms = np.asarray(jnp.stack(norms))  # [T, M lightning layers, H]

decode_error = float(jnp.abs(jnp.stack(decoded) - out.logits[0]).max())
print(f"logits of decoding differ from those of the whole text by {decode_error:.1e}")
assert decode_error < (1e-3 if cfg.dtype == "float32" else 1.0)

lightning = [i for i, kind in enumerate(cfg.kinds) if kind == LIGHTNING]
rates = decay_rates(cfg.num_heads, cfg.num_layers)[lightning]  # [M, H]
first = blocks[lightning[0]]
x = first.attention_norm(out.intermediates.hidden_states[lightning[0]])
qkv = jax.nn.silu(jnp.einsum("btd,dhnk->bthnk", x, first.attention.qkv[...]))
longest = (
    jnp.linalg.norm(qkv[0, :, :, 1], axis=-1) * jnp.linalg.norm(qkv[0, :, :, 2], axis=-1)
).max(0)
bound = np.asarray(longest) / (1 - np.exp(-rates[0]))
print(
    "layer 0: largest norm of each head",
    np.round(norms[:, 0].max(0), 2),
    "bound",
    np.round(bound, 2),
)
assert np.all(norms[:, 0].max(0) <= bound * 1.001)

fig, (left, right) = figure("states", ncols=2, figsize=(10, 3.4))
for head in range(0, cfg.num_heads, max(cfg.num_heads // 8, 1)):
    left.plot(norms[:, 0, head], label=f"1/s = {1 / rates[0, head]:.0f} tokens")
left.set(xlabel="token", ylabel="norm of the state", title=f"layer {lightning[0]}, by head")
left.legend()
right.imshow(norms[-1], aspect="auto")
right.set(xlabel="head", ylabel="lightning layer", title="norm after the text")
save()

# %% [markdown]
# ## Generate
#
# The engine decodes through pages and states of its own. Greedy decoding is the argmax of the model's
# logits; log-probabilities are those that a trainer would compute.

# %%
engine = mmjax.Engine(model, tokenizer, max_slots=4, max_length=256)
PROMPT = "The engine"
greedy = mmjax.SamplingParams(max_tokens=24, temperature=0.0, logprobs=0, ignore_eos=True)
(completion,) = engine.generate([PROMPT], greedy)
print(repr(PROMPT), "→", repr(completion.text))
for sample in engine.generate(
    [PROMPT], mmjax.SamplingParams(max_tokens=24, temperature=0.8, n=2, seed=1)
):
    print("sampled:", repr(sample.text))

whole = jnp.asarray([tokenizer.encode(PROMPT) + completion.token_ids], jnp.int32)
logprobs = jax.nn.log_softmax(model(whole).logits[0])
start = whole.shape[1] - len(completion.token_ids)
chosen = np.asarray(logprobs[jnp.arange(start - 1, whole.shape[1] - 1), whole[0, start:]])
reported = np.array([t.logprob for t in completion.logprobs])
print(
    f"the engine's log-probabilities differ from the model's by {np.abs(chosen - reported).max():.1e}"
)
if cfg.dtype == "float32":
    assert np.abs(chosen - reported).max() < 1e-3
    assert np.all(chosen >= np.asarray(logprobs[start - 1 : -1].max(-1)) - 1e-3)
