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
# # Long context: needles against length
#
# A haystack of noise hides a few needles, each of which gives a key a value. At the end stand keys, and
# after each the model is to say its value. A hybrid of one lightning and one softmax layer learns it on
# rows of 64 tokens, and so does a model of lightning layers alone. Then the haystack grows, with needles
# at every depth, and so do time and memory. Runs on a CPU or one GPU.

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
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import mmjax

FIGURES = Path("runs/colabs/long_context")
FIGURES.mkdir(parents=True, exist_ok=True)
print(jax.devices())

# %% [markdown]
# ## The haystack
#
# Four keys, sixteen values, a needle token for each pair of them, sixteen kinds of noise. Only the
# answers are trained on.

# %%
KEYS, VALUES, NOISE, QUESTIONS = 4, 16, 16, 8
FIRST_NOISE = KEYS + VALUES
FIRST_NEEDLE = FIRST_NOISE + NOISE
VOCAB = FIRST_NEEDLE + KEYS * VALUES


def haystack(rng, rows, length, depth=None):
    """tokens [B, T] and a mask [B, T] of the answers; with a depth, all needles lie around it."""
    tokens = rng.integers(FIRST_NOISE, FIRST_NEEDLE, (rows, length))
    mask = np.zeros((rows, length), np.float32)
    body = length - 2 * QUESTIONS
    for row in range(rows):
        values = rng.integers(0, VALUES, KEYS)
        if depth is None:
            places = rng.choice(body, KEYS, replace=False)
        else:
            places = round(depth * (body - 2 * KEYS)) + rng.choice(2 * KEYS, KEYS, replace=False)
        tokens[row, places] = FIRST_NEEDLE + VALUES * np.arange(KEYS) + values
        asked = rng.integers(0, KEYS, QUESTIONS)
        tokens[row, body::2], tokens[row, body + 1 :: 2] = asked, KEYS + values[asked]
    mask[:, body + 1 :: 2] = 1
    return tokens.astype(np.int32), mask


def shown(token):
    """a–d for keys, 0–15 for values, a0–d15 for needles, a dot for noise."""
    if token >= FIRST_NEEDLE:
        key, value = divmod(int(token) - FIRST_NEEDLE, VALUES)
        return f" {'abcd'[key]}={value} "
    return (
        "·" if token >= FIRST_NOISE else f" {'abcd'[token]}?" if token < KEYS else str(token - KEYS)
    )


sample, answers = haystack(np.random.default_rng(0), 1, 64)
print("".join(shown(token) for token in sample[0]))

# %% [markdown]
# ## Training

# %%
LENGTH, ROWS = 64, 16
STEPS = 120 if SMALL else 400


def train(kinds):
    """A model of these layers, and its share of right answers step by step."""
    cfg = mmjax.ModelConfig.tiny(
        num_layers=len(kinds),
        layer_types=kinds,
        vocab_size=VOCAB,
        num_heads=8,
        intermediate_size=64,
    )
    graphdef, params = nnx.split(mmjax.Decoder(cfg, rngs=nnx.Rngs(0), remat="none"))
    rate = optax.warmup_cosine_decay_schedule(0.0, 6e-3, 50, STEPS)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.01)
    )

    @jax.jit
    def step(params, state, tokens, mask):
        def loss(params):
            logits = nnx.merge(graphdef, params)(tokens).logits[:, :-1]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            right = (logits.argmax(-1) == tokens[:, 1:]) * mask[:, 1:]
            return (losses * mask[:, 1:]).sum() / mask.sum(), right.sum() / mask.sum()

        (_, right), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, right

    rng, state, curve = np.random.default_rng(1), optimizer.init(params), []
    for _ in range(STEPS):
        params, state, right = step(params, state, *haystack(rng, ROWS, LENGTH))
        curve.append(right)
    return nnx.merge(graphdef, params), np.asarray(jnp.stack(curve))


LAYERS = {"hybrid": ("lightning", "softmax"), "lightning alone": ("lightning", "lightning")}
trained, curves = {}, {}
for name, kinds in LAYERS.items():
    trained[name], curves[name] = train(kinds)
    print(
        f"{name}: {curves[name][-20:].mean():.3f} right at {LENGTH} tokens; chance {1 / VALUES:.3f}"
    )

fig, ax = plt.subplots(figsize=(6, 3.2))
for name, curve in curves.items():
    ax.plot(np.convolve(curve, np.ones(20) / 20, "valid"), label=name)
ax.set(xlabel="update", ylabel="share right", ylim=(0, 1.02), title=f"{LENGTH} tokens a row")
ax.legend()
fig.savefig(FIGURES / "training.png", dpi=110, bbox_inches="tight")

# %% [markdown]
# ## Needles against length and depth
#
# Rows longer than any that was trained on; depth 0 is the start of the haystack. The cost of a row is
# measured beside it: compiled, best of three.

# %%
LENGTHS = [64, 128, 256, 512] if SMALL else [64, 128, 256, 512, 1024, 2048, 4096]
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIED = 8 if SMALL else 16


def right_answers(model, length, depth, seed=2):
    tokens, mask = haystack(np.random.default_rng(seed), TRIED, length, depth)
    guesses = np.asarray(forward(model, tokens))[:, :-1]
    return float(((guesses == tokens[:, 1:]) * mask[:, 1:]).sum() / mask.sum())


@nnx.jit
def forward(model, tokens):
    return model(tokens).logits.argmax(-1)


found = {
    name: np.array([[right_answers(model, n, d) for n in LENGTHS] for d in DEPTHS])
    for name, model in trained.items()
}
seconds = []
for length in LENGTHS:
    tokens = haystack(np.random.default_rng(3), TRIED, length)[0]
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        forward(trained["hybrid"], tokens).block_until_ready()
        best = min(best, time.perf_counter() - start)
    seconds.append(best / TRIED)
    shares = ", ".join(
        f"{name} {grid[:, LENGTHS.index(length)].mean():.2f}" for name, grid in found.items()
    )
    print(f"{length:5} tokens: {shares} right; {1e3 * seconds[-1]:.2f} ms a row")

fig, axes = plt.subplots(1, len(found) + 1, figsize=(5 * (len(found) + 1), 3.4), squeeze=False)
for ax, (name, grid) in zip(axes[0], found.items(), strict=False):
    image = ax.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
    ax.set_xticks(range(len(LENGTHS)), LENGTHS)
    ax.set_yticks(range(len(DEPTHS)), DEPTHS)
    ax.set(xlabel="tokens", ylabel="depth", title=f"{name}: share right")
    fig.colorbar(image, ax=ax)
axes[0, -1].loglog(LENGTHS, [1e3 * s for s in seconds], "o-")
axes[0, -1].set(xlabel="tokens", ylabel="ms a row", title="cost of a row, hybrid")
fig.savefig(FIGURES / "needles.png", dpi=110, bbox_inches="tight")

# %% [markdown]
# ## What a longer row leaves behind
#
# The lightning layer's state has one size; the softmax layer keeps keys and values of every token.

# %%
for length in (64, 4096):
    cache = mmjax.HybridCache.create(trained["hybrid"].cfg, batch=1, capacity=length)
    print(
        f"{length:5} tokens: state {cache.state.nbytes:,} B, keys and values {2 * cache.keys.nbytes:,} B"
    )
short, long = (
    mmjax.HybridCache.create(trained["hybrid"].cfg, batch=1, capacity=n) for n in (64, 4096)
)
assert long.state.nbytes == short.state.nbytes
assert long.keys.nbytes == 64 * short.keys.nbytes

# %% [markdown]
# ## What this page claims, checked

# %%
hybrid = found["hybrid"].mean(0)
print("hybrid, mean over depths:", dict(zip(LENGTHS, np.round(hybrid, 3).tolist(), strict=True)))
growth = np.log(seconds[-1] / seconds[-3]) / np.log(LENGTHS[-1] / LENGTHS[-3])
print(f"a row's cost grows with the length to the power of {growth:.2f}")
for name, curve in curves.items():
    assert curve[-20:].mean() > 0.9, (
        name,
        curve[-20:],
    )  # Both learn it at the length they train on.
assert hybrid[0] > 0.9, hybrid
assert hybrid[LENGTHS.index(4 * LENGTH)] > 4 / VALUES, (
    hybrid
)  # Four times as long: far from chance.
at = LENGTHS.index(8 * LENGTH)
assert hybrid[at] > found["lightning alone"].mean(0)[at], found  # What the softmax layer is for.
