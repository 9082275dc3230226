"""Training a 1B-class hybrid mixture of experts on one H200: tokens a second, MFU, where time goes.

    python -m benchmarks.train_h200 --length 8192
    python -m benchmarks.train_h200 --length 131072
    python -m benchmarks.train_h200 --length 8192 --tiny      # any machine

The model is M1 at half its width and one super-block: D 3072, 32 heads of 128, 4 KV heads, 8
experts of F 4608 of which 2 meet a token, 7 lightning layers and a softmax layer, 32,768 tokens of
vocabulary: 3.4B parameters, 1.28B active (1.18B without embedding and head). bfloat16 parameters
that are rounded stochastically, bfloat16 moments, products kept by remat, 131,072 tokens a step:
16 rows of 8,192, or one of 131,072. The step is `python -m train`'s own, on random tokens, one
document a row (`--documents` packs more).

Counted before it was run; us a token at 600 TFLOP/s for products, 4 TB/s for memory:

| part | FLOPs a token | 8K | 128K |
|---|---|---|---|
| projections and experts, 3 x 2.37 GFLOP | 7.1 G | 11.9 | 11.9 |
| LM head, 3 products | 0.6 G | 1.0 | 1.0 |
| softmax core: forward, and 2.5 forwards of it backward, at 500 | 0.24 G, 3.8 G | 0.5 | 7.5 |
| lightning core, measured at H 64: 75 ns a token and layer | 0.04 G | 0.3 | 0.3 |
| element-wise: norms, SiLU, gates, RoPE, SwiGLU, 3 passes, at least | – | 1.1 | 1.1 |
| rows to experts and back, routing | – | 0.5 | 0.5 |
| AdamW: 16 bytes a parameter | – | 0.1 | 0.1 |
| together | 7.9 G, 11 G | 15.4 | 22.4 |
| MFU of 989 TFLOP/s | | 0.52 | 0.50 |

What XLA does not fuse comes on top; 0.45 and 0.40 leave 2.4 and 5.4 us a token for it. Memory at
its peak, GB: parameters, moments and gradients 27, products that are kept 80 KB a token and layer,
86 together, one layer's values and gradients 15.
"""

from __future__ import annotations

import argparse
import collections
import functools
import glob
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas import lightning_attention
from kernels_pallas.timing import milliseconds
from mmjax import Decoder, ModelConfig
from mmjax.layers.fused_softmax import self_attention
from mmjax.layers.lightning import decay_rates
from mmjax.layers.moe import MoE
from mmjax.plan.counts import active_parameters
from train import losses
from train.config import OptimizerConfig
from train.optimizer import make_optimizer
from train.state import TrainState, init_state
from train.step import apply_gradients, language_step
from train.throughput import model_flops

# Dense bf16 of an H200: the data sheet's, and what a product of XLA's reached on ours.
PEAK, MEASURED = 989e12, 671e12
WARM, TIMED = 3, 8

# Kernels of a trace by what they are; the first that matches.
KINDS = (
    ("softmax attention", r"sdpa|flash|fmha|cudnn"),
    ("lightning attention", r"lightning|_added_states|linear_attention"),
    ("grouped products", r"grouped|mosaic|pallas|multiprocessor"),
    ("dense products", r"gemm|cublas|nvjet|xmma|cutlass|dot"),
    ("copies", r"memcpy|copy|MemcpyD2D|transpose"),
    ("sorting", r"sort|topk|top_k"),
    ("fusions", r"fusion|input_|loop_|reduce|wrapped"),
)


def model_config(tiny: bool) -> ModelConfig:
    """M1 at half its width, one super-block; or the same in small."""
    shape = {
        "vocab_size": 32768,
        "hidden_size": 3072,
        "intermediate_size": 4608,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 128,
        "rotary_dim": 64,
        "num_experts": 8,
    }
    small = {name: 512 if name == "vocab_size" else 64 for name in list(shape)[:3]}
    small |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rotary_dim": 8}
    small |= {"num_layers": 2, "layer_types": ("lightning", "softmax")}
    values: dict[str, Any] = shape | (small if tiny else {"num_layers": 8})
    return ModelConfig.tiny(
        **values,
        rope_theta=1e4,
        max_position_embeddings=1 << 20,
        dtype="bfloat16",
        param_dtype="bfloat16",
    )


def packed_batch(cfg: ModelConfig, rows: int, length: int, documents: int) -> dict[str, jax.Array]:
    """Random tokens, so many documents of about equal length a row."""
    rng = np.random.default_rng(0)
    starts = np.sort(rng.choice(np.arange(1, length), documents - 1, replace=False))
    segments = np.searchsorted(starts, np.arange(length), side="right") + 1
    first = np.concatenate([[0], starts])[segments - 1]
    whole = np.broadcast_to
    return {
        "tokens": jnp.asarray(rng.integers(0, cfg.vocab_size, (rows, length)), jnp.int32),
        "segment_ids": jnp.asarray(whole(segments, (rows, length)), jnp.int32),
        "positions": jnp.asarray(whole(np.arange(length) - first, (rows, length)), jnp.int32),
        "loss_mask": jnp.ones((rows, length), jnp.float32),
    }


def initial(cfg: ModelConfig, optimizer: Any, remat: str) -> tuple[Any, TrainState]:
    """A fresh model's definition and state, initialised under jit."""

    def make() -> Decoder:
        return Decoder(cfg, rngs=nnx.Rngs(0), remat=remat)

    graphdef = nnx.graphdef(nnx.eval_shape(make))
    # XLA's CPU compiler takes minutes to optimise what runs once.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    params = jax.jit(lambda: nnx.split(make())[1], compiler_options=quick)()
    return init_state(nnx.merge(graphdef, params), optimizer, 0)


def print_facts(cfg: ModelConfig, args: argparse.Namespace, rows: int) -> None:
    """The state that the figures are of."""
    total, active, inner = active_parameters(cfg)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    print(
        f"D {cfg.hidden_size}, F {cfg.intermediate_size}, {cfg.num_heads} heads of {cfg.head_dim}, "
        f"{cfg.num_kv_heads} KV heads, {cfg.num_experts_per_token} of {cfg.num_experts} experts, "
        f"{cfg.num_layers} layers, vocabulary {cfg.vocab_size}"
    )
    print(
        f"parameters {total / 1e9:.3f}B, active {active / 1e9:.3f}B "
        f"({inner / 1e9:.3f}B without embedding and head)"
    )
    print(
        f"batch {rows} x {args.length} tokens, {args.documents} documents a row, "
        f"{args.microbatches} microbatches, remat {args.remat}, rounding {args.rounding}, moments "
        f"{args.moments}"
    )


def time_steps(
    step: Callable[[Any], Any], state: Any
) -> tuple[Any, list[float], float, list[float]]:
    """State, seconds of each timed step, seconds of the first, losses of the first ones."""
    times, seen = [], []
    for _ in range(WARM + TIMED):
        start = time.perf_counter()
        state, metrics = step(state)
        seen.append(float(metrics["loss"]))
        times.append(time.perf_counter() - start)
    return state, times[WARM:], times[0], seen[:WARM]


def trace(step: Callable[[Any], Any], state: Any) -> tuple[Any, collections.Counter[str]]:
    """State, and nanoseconds of each kernel of one step, as the profiler names them."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, metrics = step(state)
            jax.block_until_ready((state, metrics))
        spent: collections.Counter[str] = collections.Counter()
        for file in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
            for plane in jax.profiler.ProfileData.from_file(file).planes:
                if "device" not in plane.name.lower():
                    continue
                for line in plane.lines:
                    if not line.name.lower().startswith("stream"):
                        continue
                    for event in line.events:
                        spent[re.sub(r"[._]\d+", "", event.name)] += event.duration_ns
    return state, spent


def print_trace(spent: collections.Counter[str], seconds: float) -> None:
    """Kernels of a step by kind, and the longest."""
    total = sum(spent.values()) / 1e6
    if not total:
        print("\nno trace of the device")
        return
    kinds: collections.Counter[str] = collections.Counter()
    for name, ns in spent.items():
        found = (kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))
        kinds[next(found, "other")] += ns
    print(f"\nkernels of one step: {total:.1f} ms of {seconds * 1e3:.1f}\n\n| kind | ms | share |")
    print("|---|---|---|")
    for kind, ns in kinds.most_common():
        print(f"| {kind} | {ns / 1e6:.1f} | {ns / 1e6 / total:.3f} |")
    print("\n| kernel | ms |\n|---|---|")
    for name, ns in spent.most_common(40):
        print(f"| {name[:110]} | {ns / 1e6:.1f} |")


type _Part = tuple[str, int, Callable[[], Any]]


def parts(cfg: ModelConfig, rows: int, length: int) -> list[_Part]:
    """Name, how often a step has it, and a call of forward and backward alone."""
    rng = np.random.default_rng(0)

    def some(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), cfg.dtype)

    heads, groups, dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    q, d = some(rows, length, heads, dim), some(rows, length, heads, dim)
    keys = some(rows, length, groups, dim)
    x = some(rows, length, cfg.hidden_size)
    ids = jnp.ones((rows, length), jnp.int32)
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
    decay = jnp.asarray(decay_rates(heads, cfg.num_layers)[0])
    moe = MoE(cfg, nnx.Rngs(0))
    graph, weights = nnx.split(moe)
    wide = some(cfg.hidden_size, 4 * heads * dim)

    def both(run: Callable[..., jax.Array], *args: Any) -> Callable[[], Any]:
        """Forward and backward, compiled."""
        shape = jax.eval_shape(run, *args)
        d_out = jnp.broadcast_to(jnp.asarray(1.0, shape.dtype), shape.shape)
        compiled = jax.jit(lambda args, d_out: jax.vjp(run, *args)[1](d_out))
        return functools.partial(compiled, args, d_out)

    def experts(weights: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, weights)(x, None, training=True)[0]

    lightning = both(
        lambda q, k, v: lightning_attention(q, k, v, decay, segment_ids=ids)[0], q, d, d
    )
    softmax = both(lambda q, k, v: self_attention(q, k, v, index, ids), q, keys, keys)
    product = both(lambda x, w: jnp.einsum("btd,df->btf", x, w), x, wide)
    return [
        ("lightning core", 7, lightning),
        ("softmax core", 1, softmax),
        ("experts, router included", 8, both(experts, weights, x)),
        ("x [B, T, D] times [D, 4 H K], as qkv and gate", 7, product),
    ]


def print_parts(cfg: ModelConfig, rows: int, length: int) -> None:
    """Forward and backward of single parts, alone on the device."""
    print(
        "\n| part, forward and backward, alone | ms | a step has | ms a step |\n|---|---|---|---|"
    )
    for name, count, run in parts(cfg, rows, length):
        ms = milliseconds(run, repeats=3, calls=2)
        print(f"| {name} | {ms:.2f} | {count} | {ms * count:.1f} |", flush=True)


def print_ends(cfg: ModelConfig, optimizer: Any, state: Any, rows: int, length: int) -> Any:
    """The head's loss with its gradient, and the optimizer, alone; returns the state."""
    hidden = jnp.zeros((rows, length, cfg.hidden_size), cfg.dtype)
    targets = jnp.zeros((rows, length), jnp.int32)
    weights = jnp.full((rows, length), 1 / (rows * length), jnp.float32)

    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return losses.weighted_loss(0.0, hidden, kernel, targets, weights)[0]

    run, kernel = jax.jit(jax.grad(loss, (0, 1))), state.params["head"]["kernel"][...]
    ms = milliseconds(lambda: run(hidden, kernel), repeats=3, calls=2)
    print(f"| head and loss | {ms:.2f} | 1 |")
    update = jax.jit(functools.partial(apply_gradients, optimizer), donate_argnums=0)
    grads = jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p))(state.params)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        state, norm = update(state, grads)
        jax.block_until_ready((state, norm))
        times.append(time.perf_counter() - start)
    print(f"| AdamW | {min(times) * 1e3:.2f} | 1 |")
    return state


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=131072, help="a step")
    parser.add_argument("--documents", type=int, default=1, help="in a row")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--remat", default="products")
    parser.add_argument("--rounding", default="stochastic")
    parser.add_argument("--moments", default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="a small model and few tokens")
    parser.add_argument("--no-parts", action="store_true", help="the step alone, and its trace")
    args = parser.parse_args()
    if args.tiny:
        args.length = min(args.length, 512)
        args.tokens = 2 * args.length
    cfg, rows = model_config(args.tiny), args.tokens // args.length
    settings = {"rounding": args.rounding, "moments": args.moments, "learning_rate": 1e-4}
    optimizer = make_optimizer(OptimizerConfig(**settings), 1000)
    print_facts(cfg, args, rows)
    batch = packed_batch(cfg, rows, args.length, args.documents)
    graphdef, state = initial(cfg, optimizer, args.remat)

    def step(state: Any) -> Any:
        return language_step(graphdef, optimizer, state, batch, microbatches=args.microbatches)

    state, times, first, seen = time_steps(step, state)
    seconds, tokens = statistics.median(times), rows * args.length
    flops = model_flops(cfg, rows, args.length) / seconds
    print(f"first step {first:.1f} s, losses {', '.join(f'{x:.4f}' for x in seen)}")
    print(
        f"step {seconds * 1e3:.1f} ms ({min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}), "
        f"{tokens / seconds:,.0f} tokens/s, {seconds / tokens * 1e6:.2f} us a token, "
        f"{flops / 1e12:.1f} TFLOP/s, MFU {flops / PEAK:.3f} of 989, {flops / MEASURED:.3f} of 671",
        flush=True,
    )
    stats = jax.devices()[0].memory_stats() or {}
    print(
        f"peak memory {stats.get('peak_bytes_in_use', 0) / 1e9:.1f} GB of "
        f"{stats.get('bytes_limit', 0) / 1e9:.1f}",
        flush=True,
    )
    state, spent = trace(step, state)
    print_trace(spent, seconds)
    if not args.no_parts:
        print("\n| part, alone | ms | a step has |\n|---|---|---|")
        state = print_ends(cfg, optimizer, state, rows, args.length)
        del state
        print_parts(cfg, rows, args.length)


if __name__ == "__main__":
    main()
