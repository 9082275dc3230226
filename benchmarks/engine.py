"""Prefill and decode of the engine over length and batch, beside the floor and transformers.

    .venv/bin/python -m benchmarks.engine --model tiny --peer-python PYTHON
    python -m benchmarks.engine --model 3b --prefill-chunk 8192 --lengths 8192,32768,131072 \
        --batches 1,16,64,256 --peak-tflops 671 --bandwidth 4300

PYTHON is an interpreter with torch and transformers, which are no dependencies of this project;
without it the peer's columns stay empty. Both sides run in the same call, one after the other, on
the same device, with random weights of the same shapes. Prints Markdown tables.

The floor of a decode step is the time that its bytes take at the device's copy bandwidth: every
weight that is used once (of the experts those that `batch` tokens visit on average), each lightning
state read and written, keys and values read. That of a prefill is its FLOPs at --peak-tflops.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax import Decoder, Engine, ModelConfig, SamplingParams
from mmjax.config import LIGHTNING, SOFTMAX
from mmjax.engine.engine import SHORT_BURST

_SHARED = {
    "vocab_size": 65536,
    "num_heads": 32,
    "num_kv_heads": 4,
    "head_dim": 128,
    "num_experts": 8,
    "rotary_dim": 64,
    "rope_theta": 1e7,
    "dtype": "bfloat16",
    "param_dtype": "bfloat16",
}
MODELS = {
    "tiny": ModelConfig.tiny(),
    # 3.0B parameters, 1.2B of them used by a token: one super-block of half the released width.
    "3b": ModelConfig.tiny(hidden_size=3072, intermediate_size=3584, **_SHARED),
    # 3.3B, 1.4B: two super-blocks of a third of it.
    "3b-deep": ModelConfig.tiny(hidden_size=2048, intermediate_size=3072, num_layers=16, **_SHARED),
}
_PEER = """
import json, statistics, time, torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM
torch.manual_seed(0)
cuda = torch.cuda.is_available()
if cuda:
    torch.set_default_device("cuda")
torch.set_default_dtype(getattr(torch, DTYPE))
model = MiniMaxForCausalLM(MiniMaxConfig(**CONFIG)).eval()
def wait():
    if cuda:
        torch.cuda.synchronize()
def measure(call, repeats):
    times = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
out = {"prefill": {}, "decode": {}}
with torch.no_grad():
    for length in LENGTHS:
        ids = torch.randint(0, CONFIG["vocab_size"], (1, length))
        out["prefill"][length] = measure(lambda: model(ids, logits_to_keep=1), 2)
    for batch in BATCHES:
        ids = torch.randint(0, CONFIG["vocab_size"], (batch, CONTEXT))
        first = model(ids, use_cache=True, logits_to_keep=1)
        state = {"cache": first.past_key_values, "at": CONTEXT}
        def step():
            # Its cache counts no tokens while layer 0 is linear, so positions are given.
            where = torch.full((batch, 1), state["at"])
            o = model(
                ids[:, :1], past_key_values=state["cache"], position_ids=where, use_cache=True)
            state["cache"], state["at"] = o.past_key_values, state["at"] + 1
            o.logits.argmax(-1)
        out["decode"][batch] = measure(step, 20)
print(json.dumps(out))
"""


def build(cfg: ModelConfig) -> Decoder:
    """A decoder with random weights."""
    graphdef, params = jax.jit(lambda: nnx.split(Decoder(cfg, rngs=nnx.Rngs(0))))()
    return nnx.merge(graphdef, params)


def measure(call: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds of a call after a first one."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def prompts(cfg: ModelConfig, count: int, length: int) -> list[np.ndarray]:
    """Random ones, all different."""
    return list(np.random.default_rng(0).integers(0, cfg.vocab_size, (count, length)))


def greedy(tokens: int) -> SamplingParams:
    """Exactly so many tokens."""
    return SamplingParams(tokens, 0.0, ignore_eos=True, repetition_halt=None)


def prefill(model: Decoder, length: int, chunk: int) -> float:
    """Seconds until the first token of one prompt, no prefix kept."""
    engine = Engine(
        model, max_slots=1, max_length=length + 1, prefill_chunk=chunk, num_prefixes=0,
        num_pages=length // 64 + 1,
    )  # fmt: skip
    (prompt,) = prompts(model.cfg, 1, length)
    return measure(lambda: engine.generate([prompt], greedy(1)))


def curve(model: Decoder, length: int, chunk: int) -> list[tuple[int, float, int]]:
    """Of each whole chunk of one long prompt: tokens before it, seconds, bytes in use after it."""
    engine = Engine(
        model, max_slots=1, max_length=length, prefill_chunk=chunk, num_prefixes=0,
        num_pages=-(-length // 64),
    )  # fmt: skip
    first, prompt = prompts(model.cfg, 2, length - 1)
    engine.generate([first[: 2 * chunk]], greedy(1))  # compiles
    engine.add(prompt, greedy(1))
    found = []
    for before in range(0, length - chunk, chunk):
        start = time.perf_counter()
        engine.step()
        jax.block_until_ready(jax.live_arrays())
        found.append((before, time.perf_counter() - start, memory()))
    while engine.has_work:
        engine.step()
    return found


def memory() -> int:
    """Bytes in use on the default device, or by this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return stats.get("bytes_in_use", pages * resource.getpagesize())


def _print_curve(chunks: list[tuple[int, float, int]]) -> None:
    least = min(seconds for _, seconds, _ in chunks)
    size = chunks[1][0] - chunks[0][0]
    print(f"\n| tokens before a chunk of {size} | us a token | beyond the fastest chunk | GB |\n"
          "|---|---|---|---|")  # fmt: skip
    shown = {chunks[0][0], chunks[-1][0]} | {size << i for i in range(len(chunks).bit_length())}
    for before, seconds, used in chunks:
        if before in shown:
            print(f"| {before} | {seconds / size * 1e6:.2f} | {1 - least / seconds:.0%} "
                  f"| {used / 1e9:.2f} |")  # fmt: skip
    print(f"\n{sum(seconds for _, seconds, _ in chunks):.1f} s for all chunks.")


def decode(model: Decoder, batch: int, context: int, chunk: int) -> float:
    """Seconds a step of a batch whose rows are `context` tokens long, host and all."""
    # While a chunk of another prompt is computed the rows that are there gain some tokens too.
    waiting = SHORT_BURST * batch * -(-context // chunk) if context > chunk else 0
    steps = 128 + waiting
    length = context + steps + 16
    engine = Engine(
        model, max_slots=batch, max_length=length, prefill_chunk=chunk, num_prefixes=0,
        num_pages=batch * (-(-length // 64)),
    )  # fmt: skip
    rows = prompts(model.cfg, batch, context)

    def run() -> list[float]:
        """Times of the rounds that are one burst of every row, after those that take prompts in."""
        names = {engine.add(row, greedy(steps + 16)) for row in rows}
        times, begun = [], set[str]()
        while engine.has_work:
            start = time.perf_counter()
            outputs = engine.step()
            seconds = time.perf_counter() - start
            gaining = {o.request_id for o in outputs}
            if begun == gaining == names and len(outputs[0].token_ids) == 16:
                times.append(seconds / 16)
            begun |= gaining
        return times

    run()
    return statistics.median(run())


def group(model: Decoder, length: int, samples: int, chunk: int) -> tuple[float, float]:
    """Seconds until the first tokens of one prompt, and of `samples` samples of it."""
    engine = Engine(
        model, max_slots=samples, max_length=length + 16, prefill_chunk=chunk,
        num_pages=(samples + 2) * (length // 64 + 1),
    )  # fmt: skip
    engine.warm_up()
    (prompt,) = prompts(model.cfg, 1, length)

    def run(n: int) -> float:
        engine.update(model)  # drops what is kept
        params = SamplingParams(1, seed=0, n=n, ignore_eos=True)
        start = time.perf_counter()
        engine.generate([prompt], params)
        return time.perf_counter() - start

    each = [(run(1), run(samples)) for _ in range(5)]
    one, many = zip(*each[1:], strict=True)
    return statistics.median(one), statistics.median(many)


def decode_bytes(cfg: ModelConfig, batch: int, context: int) -> float:
    """Bytes that a decode step moves at least."""
    size = np.dtype(jnp.dtype(cfg.param_dtype)).itemsize
    d, h, g, k = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    lightning, softmax = cfg.kinds.count(LIGHTNING), cfg.kinds.count(SOFTMAX)
    attention = lightning * 5 * d * h * k + softmax * (2 * d * h * k + 2 * d * g * k)
    missed = (1 - cfg.num_experts_per_token / cfg.num_experts) ** batch
    experts = cfg.num_layers * cfg.num_experts * (1 - missed) * 3 * d * cfg.intermediate_size
    weights = (attention + experts + d * cfg.vocab_size) * size
    states = 2 * 4 * lightning * batch * h * k * k
    kv = 2 * softmax * batch * context * g * k * np.dtype(jnp.dtype(cfg.dtype)).itemsize
    return weights + states + kv


def prefill_flops(cfg: ModelConfig, length: int) -> float:
    """FLOPs of the products that a prefill has to compute: the causal half of softmax attention, no
    LM head, and of the last layer what its cache takes, as nobody reads its output.
    """
    d, h, g, k = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    experts = cfg.num_experts_per_token * 3 * d * cfg.intermediate_size
    lightning = 2 * (5 * d * h * k + experts) + 4 * h * k * k
    softmax = 2 * (2 * d * h * k + 2 * d * g * k + experts) + 2 * h * k * length
    each = {LIGHTNING: lightning, SOFTMAX: softmax}
    last = {LIGHTNING: 2 * 2 * d * h * k + 2 * h * k * k, SOFTMAX: 2 * 2 * d * g * k}
    *kinds, end = cfg.kinds
    return length * (sum(each[kind] for kind in kinds) + last[end])


def bandwidth() -> float:
    """Bytes a second of a copy on the default device, read and write counted."""
    x = jnp.ones(1 << 26, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / measure(lambda: jax.block_until_ready(copy(x)), 10)


def ask_peer(python: str, cfg: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """transformers' times on the same shapes."""
    keep = {"rope_theta": cfg.rope_theta, "max_position_embeddings": 1 << 20}
    native = cfg.to_hf("hf-native")
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    names += "num_key_value_heads head_dim num_local_experts num_experts_per_tok layer_types"
    config = keep | {name: native[name] for name in names.split()}
    constants = {"CONFIG": config, "LENGTHS": args.lengths, "BATCHES": args.batches}
    constants |= {"CONTEXT": args.context, "DTYPE": cfg.dtype}
    code = "".join(f"{name} = {value!r}\n" for name, value in constants.items()) + _PEER
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Command line of this module."""
    args = _arguments()
    cfg = MODELS[args.model]
    peer = ask_peer(args.peer_python, cfg, args) if args.peer_python else {}
    speed = args.bandwidth * 1e9 if args.bandwidth else bandwidth()
    device = jax.devices()[0]
    kind = platform.machine() if device.platform == "cpu" else device.device_kind
    print(f"{args.model} on {kind}, jax {jax.__version__}, {speed / 1e9:.0f} GB/s of copy\n")
    model = build(cfg)

    def other(what: str, key: int, unit: float) -> str:
        return f"{peer[what][str(key)] * unit:.3g}" if peer else ""

    print("| prefill, tokens | s | tokens/s | share of peak | transformers, s |")
    print("|---|---|---|---|---|")
    for length in args.lengths:
        seconds = prefill(model, length, args.prefill_chunk)
        share = ""
        if args.peak_tflops:
            share = f"{prefill_flops(cfg, length) / seconds / args.peak_tflops / 1e12:.0%}"
        beside = other("prefill", length, 1)
        rate = length / seconds
        print(f"| {length} | {seconds:.3f} | {rate:.0f} | {share} | {beside} |", flush=True)
    print(f"\n| decode at {args.context} tokens, batch | ms a step | tokens/s | floor, ms | share "
          "| transformers, ms |\n|---|---|---|---|---|---|")  # fmt: skip
    for batch in args.batches:
        seconds = decode(model, batch, args.context, args.prefill_chunk)
        floor = decode_bytes(cfg, batch, args.context) / speed
        print(
            f"| {batch} | {seconds * 1e3:.3f} | {batch / seconds:.0f} | {floor * 1e3:.3f} | "
            f"{floor / seconds:.0%} | {other('decode', batch, 1e3)} |",
            flush=True,
        )
    if args.samples:
        one, many = group(model, 4096, args.samples, args.prefill_chunk)
        print(f"\nFirst tokens of a 4096-token prompt: {one:.3f} s; of {args.samples} samples of "
              f"it: {many:.3f} s, {many / one:.2f} times that.")  # fmt: skip
    if args.curve:
        _print_curve(curve(model, args.curve, args.prefill_chunk))


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",") if number]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--lengths", type=numbers, default=[1024, 4096, 16384])
    parser.add_argument("--batches", type=numbers, default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=128, help="tokens before the decoded ones")
    parser.add_argument("--prefill-chunk", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=16, help="of one prompt; 0 for none")
    parser.add_argument("--curve", type=int, help="also a prompt this long, chunk by chunk")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the share of peak")
    parser.add_argument("--bandwidth", type=float, help="GB/s of the device; measured if not given")
    parser.add_argument("--peer-python", help="interpreter with torch and transformers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
