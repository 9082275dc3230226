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
# # Lightning attention, from the recurrence to the kernel
#
# MiniMax-01 replaces softmax attention by a linear recurrence in seven of eight layers. Each head
# keeps one matrix $S$ that decays at a constant rate $s$:
#
# $$S_t = e^{-s} S_{t-1} + k_t v_t^\top, \qquad o_t = q_t S_t.$$
#
# This page computes it in four ways, from slow to fast, shows that they agree, and measures what
# each costs against the length. Runs on a CPU or one GPU.

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

from kernels_pallas.dispatch import UnavailableError
from kernels_pallas.lightning_attention import lightning_attention, lightning_attention_step
from mmjax.layers.lightning import decay_rates

FIGURES = Path("runs/colabs/lightning_attention")
FIGURES.mkdir(parents=True, exist_ok=True)
# Otherwise a GPU multiplies float32 matrices in TF32, and nothing agrees to more than 3 digits.
jax.config.update("jax_default_matmul_precision", "highest")
GPU = jax.default_backend() == "gpu"
print(jax.devices())

# %% [markdown]
# ## Decay rates
#
# The rates are not learned. Head $h$ of $H$ in layer $l$ of $L$ has
# $s = 2^{-8h/H}\,(1 - l/(L-1) + 10^{-5})$: fast heads see a few tokens, slow ones thousands, and
# later layers forget more slowly than earlier ones. $1/s$ is a head's memory in tokens.

# %%
rates = decay_rates(64, 80)  # MiniMax-Text-01: 64 heads, 80 layers
fig, ax = plt.subplots(figsize=(6, 3.2))
for layer in (0, 39, 70, 78):
    ax.semilogy(np.arange(1, 65), 1 / rates[layer], label=f"layer {layer}")
ax.set(xlabel="head", ylabel="1/s, tokens", title="Memory of a head in MiniMax-Text-01")
ax.legend()
fig.savefig(FIGURES / "memory.png", dpi=110, bbox_inches="tight")
print(f"layer 0: from {1 / rates[0, 0]:.2f} to {1 / rates[0, -1]:.0f} tokens")

# %% [markdown]
# ## 1. The recurrence, token by token
#
# $T$ steps, each waiting for the one before. Little work, but no matrix product in it.

# %%
HEADS, DIM = 4, 32
decay = jnp.asarray(decay_rates(HEADS, 8)[0])


def inputs(length, dtype=jnp.float32, heads=HEADS, dim=DIM):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (1, length, heads, dim), dtype) for key in keys]


@jax.jit
def recurrence(q, k, v, decay):
    def step(state, qkv):  # state [B, H, K, V]
        q, k, v = qkv
        state = jnp.exp(-decay)[:, None, None] * state + k[..., :, None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state)

    start = jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]))
    in_time = [jnp.moveaxis(x, 1, 0) for x in (q, k, v)]
    state, out = jax.lax.scan(step, start, in_time)
    return jnp.moveaxis(out, 0, 1), state


# %% [markdown]
# ## 2. Unrolled: every token against every token
#
# $o_i = \sum_{j \le i} e^{-s(i-j)}\,(q_i \cdot k_j)\,v_j$. All products of matrices, but $T^2$ of them,
# like softmax attention.


# %%
@jax.jit
def quadratic(q, k, v, decay):
    place = jnp.arange(q.shape[1])
    ago = place[:, None] - place[None, :]
    weight = jnp.where(ago >= 0, jnp.exp(-decay[:, None, None] * jnp.maximum(ago, 0)), 0.0)
    return jnp.einsum("bihk,bjhk,hij,bjhv->bihv", q, k, weight, v)


# %% [markdown]
# ## 3. Chunks: quadratic inside, recurrent between
#
# Cut the sequence into chunks of $C$ tokens. Inside a chunk everything is a matrix product; what
# came before is in $S$. The work is $T \cdot C$, and $T/C$ steps wait for each other. All weights are
# $e^{-s \cdot n}$ with $n \ge 0$, so nothing overflows at any length.


# %%
def chunked(q, k, v, decay, size):
    batch, length, heads, _ = q.shape
    i = jnp.arange(1, size + 1, dtype=jnp.float32)
    ago = i[:, None] - i[None, :]
    rate = decay[:, None]
    within = jnp.where(ago >= 0, jnp.exp(-rate[..., None] * jnp.maximum(ago, 0)), 0)  # [H, C, C]
    entering, leaving = jnp.exp(-rate * i), jnp.exp(-rate * (size - i))  # [H, C]
    keep = jnp.exp(-decay * size)[:, None, None]

    def step(state, qkv):
        q, k, v = qkv  # [B, C, H, ·]
        out = jnp.einsum("bihk,bjhk,hij,bjhv->bihv", q, k, within, v)
        out += jnp.einsum("hi,bihk,bhkv->bihv", entering, q, state)
        return keep * state + jnp.einsum("hj,bjhk,bjhv->bhkv", leaving, k, v), out

    def cut(x):
        return jnp.moveaxis(x.reshape(batch, length // size, size, heads, -1), 1, 0)

    start = jnp.zeros((batch, heads, k.shape[3], v.shape[3]))
    state, out = jax.lax.scan(step, start, (cut(q), cut(k), cut(v)))
    return jnp.moveaxis(out, 0, 1).reshape(v.shape), state


# %% [markdown]
# ## 4. The library's kernel
#
# `lightning_attention` picks the best implementation for the arrays' device: Pallas kernels on
# Hopper GPUs and TPUs, chunks in plain XLA elsewhere. A named one that cannot run here says why.

# %%
q, k, v = inputs(512)
out, state = lightning_attention(q, k, v, decay)
for name in ("mosaic_gpu", "mosaic_tpu", "chunked", "reference"):
    try:
        lightning_attention(q, k, v, decay, implementation=name)
        print(f"{name}: runs here")
    except UnavailableError as error:
        print(f"{name}: {error}")

# %%
by_definition, last_state = recurrence(q, k, v, decay)


def difference(x, y):
    return float(jnp.abs(x - y).max() / jnp.abs(y).max())


found = {
    "quadratic": difference(quadratic(q, k, v, decay), by_definition),
    "chunks of 16": difference(chunked(q, k, v, decay, 16)[0], by_definition),
    "chunks of 128": difference(chunked(q, k, v, decay, 128)[0], by_definition),
    "the library": difference(out, by_definition),
    "the library's state": difference(state, last_state),
}
for name, value in found.items():
    print(f"{name:20} differs from the recurrence by {value:.1e}")
assert max(found.values()) < 1e-5, found

# %% [markdown]
# ## The backward pass is the same map
#
# With $dS$ the cotangent of the state, $dq = L(do, v, k)$, where $L$ is the forward map itself; $dk$ and
# $dv$ are $L$ run from the last token to the first. So no state of a chunk has to be stored.


# %%
def flip(x):
    return x[:, ::-1]


def loss(q, k, v):
    return jnp.sum(lightning_attention(q, k, v, decay)[0] * target)


target = jax.random.normal(jax.random.key(1), out.shape)
dq, dk, dv = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
from_forward = {
    "dq": (dq, lightning_attention(target, v, k, decay)[0]),
    "dk": (dk, flip(lightning_attention(flip(v), flip(target), flip(q), decay)[0])),
    "dv": (dv, flip(lightning_attention(flip(k), flip(q), flip(target), decay)[0])),
}
for name, (gradient, mirrored) in from_forward.items():
    print(f"{name}: {difference(mirrored, gradient):.1e} from the forward map's")
    assert difference(mirrored, gradient) < 1e-5

# %% [markdown]
# ## Prefill and decode are one thing
#
# The state after a prompt is all that decoding needs. It has the same size after 10 tokens and after
# 10 million; keys and values of softmax attention grow with every token.

# %%
_, state = lightning_attention(q[:, :500], k[:, :500], v[:, :500], decay)
for t in range(500, 512):
    one, state = lightning_attention_step(q[:, t], k[:, t], v[:, t], decay, state)
    assert difference(one, out[:, t]) < 1e-5
print("12 decode steps after a prefill of 500 tokens give the outputs of the whole sequence")

tokens = np.array([2**n for n in range(10, 24)])
kv_bytes = tokens * 2 * 8 * 128 * 2  # one layer of M1: 8 KV heads of 128, keys and values, bf16
state_bytes = np.full(len(tokens), 64 * 128 * 128 * 4)  # 64 heads, float32
fig, ax = plt.subplots(figsize=(6, 3.2))
ax.loglog(tokens, kv_bytes / 2**20, label="softmax: keys and values")
ax.loglog(tokens, state_bytes / 2**20, label="lightning: the state")
ax.set(xlabel="tokens", ylabel="MiB a sequence", title="What one layer of M1 remembers")
ax.legend()
fig.savefig(FIGURES / "memory_of_a_layer.png", dpi=110, bbox_inches="tight")
crossing = state_bytes[0] // (2 * 8 * 128 * 2)
print(f"from {crossing} tokens on, the state is smaller")
assert crossing == 1024

# %% [markdown]
# ## Cost against length
#
# Best of several runs, one sequence, on this device. Softmax attention is XLA's
# (`jax.nn.dot_product_attention`). Compiling is not counted. On a CPU it is the time of all its
# cores together, in which what else the machine does is not counted either.

# %%
HEADS, DIM = (8, 128) if GPU else (4, 32)
DTYPE = jnp.bfloat16 if GPU else jnp.float32
if GPU:
    LENGTHS = [2048, 4096, 8192] if SMALL else [2048, 4096, 8192, 16384, 65536, 262144]
    SOFTMAX_LIMIT, SCAN_LIMIT = 8192, 8192
else:
    LENGTHS = [1024, 2048, 4096, 16384] if SMALL else [1024, 2048, 4096, 8192, 16384, 65536]
    SOFTMAX_LIMIT, SCAN_LIMIT = (4096, 4096) if SMALL else (8192, 16384)
decay = jnp.asarray(decay_rates(HEADS, 8)[0])
softmax = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
library = jax.jit(lambda q, k, v: lightning_attention(q, k, v, decay)[0])
in_order = jax.jit(lambda q, k, v: recurrence(q, k, v, decay)[0])
ways = {
    "softmax attention": (softmax, SOFTMAX_LIMIT),
    "lightning, token by token": (in_order, SCAN_LIMIT),
    "lightning, the library": (library, LENGTHS[-1]),
}


clock = time.perf_counter if GPU else time.process_time


def seconds(f, args, repeats=5):
    jax.block_until_ready(f(*args))
    best = np.inf
    for _ in range(repeats):
        start = clock()
        jax.block_until_ready(f(*args))
        best = min(best, clock() - start)
    return best


costs = {name: {} for name in ways}
for length in LENGTHS:
    args = inputs(length, DTYPE, HEADS, DIM)
    for name, (f, limit) in ways.items():
        if length <= limit:
            costs[name][length] = seconds(f, args)
    row = ", ".join(f"{name} {1e3 * c[length]:.2f} ms" for name, c in costs.items() if length in c)
    print(f"{length:>7}: {row}")

fig, ax = plt.subplots(figsize=(6, 4))
for name, cost in costs.items():
    ax.loglog(list(cost), [1e3 * s for s in cost.values()], "o-", label=name)
ax.set(xlabel="tokens", ylabel="ms", title=f"One layer's attention, {jax.devices()[0].device_kind}")
ax.legend()
ax.grid(alpha=0.3)
fig.savefig(FIGURES / "cost.png", dpi=110, bbox_inches="tight")

# %% [markdown]
# ## What this page claims, checked
#
# Four times the tokens cost softmax attention more than they cost lightning attention, and at the
# longest common length lightning is faster. On a GPU short sequences cost what starting a kernel
# costs, so growth is read at the longest lengths.


# %%
def growth(cost, longest):
    """Exponent of the cost between a quarter of a length and the length."""
    return np.log(cost[longest] / cost[longest // 4]) / np.log(4)


common = SOFTMAX_LIMIT  # The longest length of both.
linear = growth(costs["lightning, the library"], LENGTHS[-1])
square = growth(costs["softmax attention"], common)
gain = costs["softmax attention"][common] / costs["lightning, the library"][common]
print(f"growth with length: lightning {linear:.2f}, softmax {square:.2f}")
print(f"at {common} tokens lightning takes 1/{gain:.1f} of softmax attention's time")
assert linear < 1.5, linear  # Closer to linear than to quadratic.
assert square > linear + 0.2, (square, linear)
assert gain > 1.5, gain
