"""Prefill, compile time, decode and one CISPO step of the tiny M1 on this CPU, beside transformers.

    .venv/bin/python -m benchmarks.cpu_tiny --peer-python PYTHON

PYTHON is an interpreter with torch and transformers, which are no dependencies of this project;
without it the peer's column stays empty. If it has TRL as well, one row more is the step of its
`GRPOTrainer` with loss_type="cispo", on the same model, prompts, samples and tokens. Both sides run
in the same call, one after the other, on all cores, float32, random weights of the same shapes. The
peer's decode step is a 32nd of what 33 new tokens of `generate` take more than one; its CISPO step
is `generate` and one AdamW step by hand. The CISPO steps of mmjax and TRL have a process each, with
malloc set as a job sets it. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
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
import optax
from flax import nnx

from mmjax import Decoder, Engine, HybridCache, ModelConfig, SamplingParams
from mmjax.sharding import make_mesh
from train.allocator import keep_freed_memory
from train.batches import by_sample, minibatches
from train.cispo import cispo_step
from train.cispo_config import CispoConfig
from train.config import JobConfig
from train.rollout import Asked, Sampler
from train.state import init_state

LENGTHS = (1024, 4096, 16384, 65536)
# The tiny model of the peers.
_MODEL = """
import json, resource, statistics, time, torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM
torch.manual_seed(0)
model = MiniMaxForCausalLM(MiniMaxConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4,
    num_experts_per_tok=2, max_position_embeddings=1 << 20,
    layer_types=["linear_attention"] * 7 + ["full_attention"])).eval()
"""
_PEER = """
def measure(call, repeats):
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

def generate(ids, new, **how):
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **how)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

def cispo():
    "One step as a user of transformers alone would write it."
    prompts = torch.arange(1, 9)[:, None].expand(8, 16).repeat_interleave(8, 0)
    with torch.no_grad():
        ids = generate(prompts, 32, do_sample=True, top_k=0)
    advantages = torch.tensor([-1.0, 1.0]).repeat(32)[:, None]
    logits = model(ids).logits[:, 15:-1]
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 16:, None])[..., 0]
    weight = (logprobs.detach() - logprobs.detach()).exp().clamp(max=5.0)
    loss = -(weight * advantages * logprobs).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

out, start = {}, peak()
with torch.no_grad():
    for length in LENGTHS:
        ids = torch.randint(0, 256, (1, length))
        out[f"prefill {length}"] = measure(lambda: model(ids), 3)
    out["memory"] = peak() - start
    for batch in (1, 16):
        ids = torch.randint(1, 256, (batch, 16))
        first, all = (measure(lambda: generate(ids, n, do_sample=False), 3) for n in (1, 33))
        out[f"decode {batch}"] = (all - first) / 32
out["cispo"] = measure(cispo, 5)
print(json.dumps(out))
"""
# Prompts are words that are ids; the median step of ten after the first two.
_TRL = """
import tempfile, datasets, tokenizers, transformers
from trl import GRPOConfig, GRPOTrainer
vocab = tokenizers.models.WordLevel({str(i): i for i in range(256)}, unk_token="0")
words = tokenizers.Tokenizer(vocab)
words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="0", eos_token="0", unk_token="0")
prompts = [{"prompt": " ".join([str(1 + n)] * 16)} for n in range(8)]
ends = []

class Clock(transformers.TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        ends.append(time.perf_counter())

def rewards(completions, completion_ids, **kwargs):
    assert all(len(ids) == 32 for ids in completion_ids) and len(completions) == 64
    return [float(i % 2) for i in range(64)]

with tempfile.TemporaryDirectory() as folder:
    GRPOTrainer(
        model, rewards, processing_class=tokenizer, callbacks=[Clock()],
        train_dataset=datasets.Dataset.from_list(prompts),
        args=GRPOConfig(
            folder, loss_type="cispo", epsilon_high=5.0, beta=0.0, num_generations=8,
            per_device_train_batch_size=64, max_completion_length=32, max_steps=12, top_k=0,
            generation_kwargs={"min_new_tokens": 32}, learning_rate=1e-4, use_cpu=True, bf16=False,
            gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_strategy="no")).train()
steps = [b - a for a, b in zip(ends[1:], ends[2:])]
print(json.dumps(statistics.median(steps)))
"""


def tiny_model() -> Decoder:
    """The same as the peers', with random weights."""
    make = jax.jit(lambda: nnx.split(Decoder(ModelConfig.tiny(), rngs=nnx.Rngs(0), remat="none")))
    graphdef, params = make()
    return nnx.merge(graphdef, params)


def measure(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the first call (compilation included) and the median of the following ones."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:])


def peak() -> float:
    """Most memory that this process has held so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def prefill(model: Decoder, length: int) -> tuple[float, float]:
    """First-call and median seconds of one row."""
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, model.cfg.vocab_size)
    forward = jax.jit(lambda m, t: m(t).logits)
    return measure(lambda: forward(model, tokens), repeats=3)


def decode(model: Decoder, batch: int, steps: int = 32) -> float:
    """Seconds a decode step, every layer with weights of its own as in the engine."""

    def run(m: Decoder, cache: HybridCache, token: jax.Array) -> Any:
        def step(_: int, carry: Any) -> Any:
            out = m(carry[1], cache=carry[0])
            return out.cache, jnp.argmax(out.logits[:, -1:], -1).astype(jnp.int32)

        return jax.lax.fori_loop(0, steps, step, (cache, token))

    compiled, model = jax.jit(run), model.unstacked()
    cache = HybridCache.create(model.cfg, batch, 128)
    token = jnp.zeros((batch, 1), jnp.int32)
    return measure(lambda: compiled(model, cache, token), repeats=20)[1] / steps


def engine(model: Decoder, batch: int, steps: int = 128) -> float:
    """Seconds a step of the engine, greedy, host included; prompts are one token."""
    server = Engine(model, max_slots=batch, max_length=steps + 1, prefill_chunk=64, num_prefixes=0)
    how = SamplingParams(steps, temperature=0.0, ignore_eos=True)
    return measure(lambda: server.generate([[1]] * batch, how), repeats=5)[1] / steps


def cispo() -> float:
    """Seconds of one step: 8 prompts x 8 samples x 32 tokens rolled out, then one update."""
    keep_freed_memory()
    model = tiny_model()
    rl = CispoConfig(
        prompts_per_batch=8,
        samples_per_prompt=8,
        updates_per_batch=1,
        max_prompt_tokens=16,
        max_new_tokens=32,
    )
    optimizer = optax.adamw(1e-4)
    mesh = make_mesh(devices=jax.devices()[:1])
    sampler = Sampler(model, None, JobConfig("cispo", 1, cispo=rl), mesh)
    graphdef, state = init_state(model, optimizer, 0)
    state = jax.tree.map(jnp.copy, state)  # Donated, while the model goes on.
    prompts = [[1 + n] * 16 for n in range(8)]
    rewards = np.tile(np.array([0, 1], np.float32), 4)  # every group says something

    def step() -> Any:
        nonlocal state
        sampler.update(state.params, 0)
        groups = sampler.sample(
            [Asked(n, n, prompt, sampler.params(n, 32)) for n, prompt in enumerate(prompts)]
        )
        scored = [group._replace(rewards=rewards) for group in groups]
        (batch,) = minibatches(scored, rl, 32)
        state, metrics = cispo_step(graphdef, optimizer, rl, state, by_sample(batch))
        return metrics

    return measure(step, repeats=9)[1]


def run_peer(python: str, code: str) -> Any:
    """What the code prints last in that interpreter, as JSON."""
    done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--peer-python", help="interpreter with torch and transformers")
    args = parser.parse_args()
    peer = {}
    if args.peer_python:
        peer = run_peer(args.peer_python, f"LENGTHS = {LENGTHS}\n{_MODEL}{_PEER}")
        has_trl = "import importlib.util; print(int(bool(importlib.util.find_spec('trl'))))"
        if run_peer(args.peer_python, has_trl):
            peer["trl"] = run_peer(args.peer_python, _MODEL + _TRL)
    model = tiny_model()
    print(f"{platform.machine()}, {jax.device_count()} device, jax {jax.__version__}\n")
    print("| what | mmjax | first call | transformers |\n|---|---|---|---|")

    def row(what: str, mine: str, first: str = "", key: str = "") -> None:
        other = f"{peer[key] * 1e3:.2f} ms" if key in peer else ""
        print(f"| {what} | {mine} | {first} | {other} |", flush=True)

    start = peak()
    for length in LENGTHS:
        first, median = prefill(model, length)
        row(f"prefill {length}", f"{median * 1e3:.1f} ms", f"{first:.1f} s", f"prefill {length}")
    other = f"{peer['memory']:.2f} GB" if peer else ""
    print(f"| memory of these over the start | {peak() - start:.2f} GB | | {other} |", flush=True)
    for batch in (1, 16):
        row(
            f"decode step, batch {batch}",
            f"{decode(model, batch) * 1e3:.2f} ms",
            key=f"decode {batch}",
        )
        row(f"step of the engine, batch {batch}", f"{engine(model, batch) * 1e3:.2f} ms")
    with multiprocessing.get_context("spawn").Pool(1) as process:
        row("CISPO step 8 x 8 x 32", f"{process.apply(cispo) * 1e3:.0f} ms", key="cispo")
    if "trl" in peer:
        row("the same, beside TRL's GRPOTrainer", "", key="trl")


if __name__ == "__main__":
    main()
