"""Reinforcement on one GPU: algorithms side by side, and how sampler and trainer agree.

    python -m benchmarks.rl_h200 start --out runs/rl
    python -m benchmarks.rl_h200 ways --model runs/rl/start/model
    python -m benchmarks.rl_h200 compare --out runs/rl --algorithms cispo --seeds 0 1 2
    python -m benchmarks.rl_h200 agreement --out runs/rl
    python -m benchmarks.rl_h200 asynchronous --out runs/rl

`start` fine-tunes the small model that the others begin with. `ways` says what a fine-tuned model
makes of held-out problems in its own way, answering at once, and thinking first: reinforcement can
find what lies between the first and the last. `compare` runs each algorithm with
each seed for the same number of rollout batches of 16 updates, adds to curves.json, and draws
curves.svg of all that is in it: held-out accuracy, its mean and spread over the seeds. `agreement`
prints the correlation of the sampler's and the trainer's probabilities in bfloat16 with the LM head
in bfloat16 and in float32, and at learning rate 0 the drift by position up to 8K tokens.
`asynchronous` runs CISPO on all devices in turn, and with half of them sampling while the others
train.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

import mmjax
from mmjax.chat import THINK_END, split_thinking
from mmjax.engine import Engine, SamplingParams
from mmjax.model import Decoder
from mmjax.tokenizer import EOS, Tokenizer
from train.batches import Batch, by_sample
from train.cispo import policy_logprobs
from train.cispo_config import CispoConfig
from train.config import JobConfig, build
from train.data.reasoning import ReasoningProblems, prompt_text, worked_solution
from train.metrics import read_metrics
from train.policy_losses import agreement
from train.tasks import run_task

# The same for all, so that what differs is the loss.
STEPS, UPDATES, RATE = 60, 16, 1e-5
MODEL = {
    "preset": "tiny",
    "num_layers": 4,
    "layer_types": ("lightning", "lightning", "lightning", "softmax"),
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "rotary_dim": 32,
    "vocab_size": 384,
    "dtype": "bfloat16",
    "param_dtype": "float32",
}
TASK = "chain_sum(min_terms=5, max_terms=5, min_digits=2, max_digits=2)"
# Tokens of a solution that set it on the way of thinking: the mark, its line's end, the first two
# of the first step.
_STARTED = 4


def job(stage: str, out: Path, **changes: object) -> JobConfig:
    """The fine-tuning that all begin with, or one run of reinforcement."""
    config = ConfigDict(
        {
            "task": stage,
            "steps": 2500 if stage == "sft" else STEPS,
            "remat": "none",
            "log_every": 20,
            "model": MODEL,
            "data": {
                "source": "reasoning",
                "tasks": (TASK,),
                "size": 100_000,
                "direct_share": 0.65,
                "sequence_length": 256,
                "batch_size": 64,
            },
            "cispo": {
                "prompts_per_batch": 32,
                "samples_per_prompt": 16,
                "updates_per_batch": UPDATES,
                "max_prompt_tokens": 64,
                "max_new_tokens": 96,
                "eval_problems": 256,
                "eval_every": 5,
            },
            "sampling": {"rounds": 2},
            "asynchronous": {"max_staleness": 0, "sampler_devices": 0},
            "optimizer": {
                "learning_rate": 1e-3 if stage == "sft" else RATE,
                "weight_decay": 0.01,
                "warmup_steps": 20,
                "decay": "cosine" if stage == "sft" else "constant",
            },
            "checkpoint": {"every": 10_000, "export": "hf" if stage == "sft" else ""},
        }
    )
    if stage == "cispo":
        config.init_from = str(out / "start" / "model")
    config.update_from_flattened_dict(changes)
    return build(config)


def compare(out: Path, algorithms: list[str], seeds: list[int], steps: int, rate: float) -> None:
    """Runs what is asked for and draws all that has been run."""
    file = out / "curves.json"
    curves = json.loads(file.read_text()) if file.exists() else {}
    for algorithm in algorithms:
        for seed in seeds:
            name, began = f"{algorithm}-{seed}", time.perf_counter()
            changes = {
                "cispo.algorithm": algorithm,
                "seed": seed,
                "steps": steps,
                "optimizer.learning_rate": rate,
            }
            run_task(job("cispo", out, **changes), out / name)
            records = read_metrics(out / name)
            points = [[0.0, r["eval/initial_accuracy"]] for r in records[:1]]
            points += [[r["step"], r["eval/accuracy"]] for r in records if "eval/accuracy" in r]
            curves.setdefault(algorithm, {})[str(seed)] = points
            file.write_text(json.dumps(curves, indent=1))
            print(f"{name}: {points[0][1]:.3f} to {points[-1][1]:.3f}, ", end="")
            print(f"{time.perf_counter() - began:.0f} s", flush=True)
    _draw(curves, out / "curves.svg")
    print("\n| algorithm | seeds | at the start | half way | at the end, mean (least, most) |")
    print("|---|---|---|---|---|")
    for algorithm, runs in curves.items():
        spread = _spread(runs)
        start, middle, end = spread[0], spread[len(spread) // 2], spread[-1]
        print(f"| {algorithm} | {len(runs)} | {start[1]:.3f} | {middle[1]:.3f} | ", end="")
        print(f"{end[1]:.3f} ({end[2]:.3f}, {end[3]:.3f}) |")


def print_ways(folder: Path, tasks: Sequence[str], size: int) -> None:
    """Greedy accuracy by task, and that of answers whose start is given."""
    tokenizer = Tokenizer.load(folder)
    problems = ReasoningProblems(tasks, size, 10**6, held_out=True)
    close = tokenizer.encode(THINK_END)
    prompts: list[list[int]] = []
    for problem in problems:
        prompt = tokenizer.encode(prompt_text(problem))
        thinking, at_once = (
            tokenizer.encode(worked_solution(problem, thinking=way)) for way in (True, False)
        )
        # As far as the first step's first tokens, and as far as the end of no thinking.
        prompts += [
            prompt,
            prompt + at_once[: at_once.index(close[0]) + len(close)],
            prompt + thinking[:_STARTED],
        ]
    engine = Engine(mmjax.load(folder, dtype="bfloat16"), tokenizer, max_slots=512, max_length=1024)
    done = engine.generate(prompts, SamplingParams(512, temperature=0.0))
    scores: dict[str, list[list[float]]] = {}
    for i, problem in enumerate(problems):
        texts = [
            tokenizer.decode(
                [*prompts[3 * i + way][len(prompts[3 * i]) :], *done[3 * i + way].token_ids]
            )
            for way in range(3)
        ]
        got = [problems.score(problem, split_thinking(text.removesuffix(EOS))[1]) for text in texts]
        scores.setdefault(problem.task, []).append(got)
    print("| task | problems | its own way | at once | thinking |\n|---|---|---|---|---|")
    for task, rows in scores.items():
        values = " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0))
        print(f"| {task} | {len(rows)} | {values} |", flush=True)


def _spread(runs: dict[str, list[list[float]]]) -> list[tuple[float, float, float, float]]:
    """(step, mean, least, most) where every seed has been evaluated."""
    rows = zip(*runs.values(), strict=False)
    values = [(row[0][0], [accuracy for _, accuracy in row]) for row in rows]
    return [(step, statistics.mean(v), min(v), max(v)) for step, v in values]


def _draw(curves: dict[str, dict[str, list[list[float]]]], file: Path) -> None:
    """Means over the seeds in bands from the least to the most."""
    from matplotlib.figure import Figure

    picture = Figure((6.4, 3.6), layout="constrained")
    axes = picture.subplots()
    for algorithm, runs in curves.items():
        steps, means, least, most = zip(*_spread(runs), strict=True)
        (line,) = axes.plot(steps, means, label=f"{algorithm}, {len(runs)} seeds")
        axes.fill_between(steps, least, most, color=line.get_color(), alpha=0.2)
    axes.set(xlabel=f"rollout batches of {UPDATES} updates", ylabel="held-out accuracy")
    axes.set_ylim(bottom=0)
    axes.legend()
    picture.savefig(file)


def print_modes(out: Path, steps: int, rate: float) -> None:
    """Tokens a second and accuracy of the synchronous mode and of the asynchronous one."""
    count = jax.device_count()
    print(f"{count} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {steps} batches\n")
    print("| mode | s a batch | tokens drawn/s | trained/s | staleness | accuracy |")
    print("|---|---|---|---|---|---|", flush=True)
    common = {"steps": steps, "optimizer.learning_rate": rate}
    apart = {"asynchronous.max_staleness": 2, "asynchronous.sampler_devices": count // 2}
    for mode, changes in (("synchronous", common), ("asynchronous", common | apart)):
        run_task(job("cispo", out, **changes), out / mode)
        records = read_metrics(out / mode)
        # The first batches compile.
        warm = records[len(records) // 4 :]
        phases = [k for k in warm[-1] if k.startswith("seconds/") and k != "seconds/evaluate"]
        seconds = sum(r[phase] for r in warm for phase in phases)
        rates = [sum(r[f"tokens_{k}"] for r in warm) / seconds for k in ("sampled", "trained")]
        staleness = statistics.mean(r["staleness/mean"] for r in warm)
        first = records[0]["eval/initial_accuracy"]
        last = [first, *(r["eval/accuracy"] for r in records if "eval/accuracy" in r)][-1]
        print(f"| {mode} | {seconds / len(warm):.2f} | {rates[0]:.0f} | {rates[1]:.0f} | ", end="")
        print(f"{staleness:.2f} | {first:.3f} → {last:.3f} |")


# Sampler against trainer.


@contextlib.contextmanager
def head_dtype(dtype: str) -> Iterator[None]:
    """The LM head of trainer and sampler in bfloat16 instead of float32."""
    if dtype == "float32":
        yield
        return

    def logits(self: Decoder, hidden: jax.Array) -> jax.Array:
        assert self.head is not None
        low = jnp.bfloat16
        product = hidden.astype(low) @ self.head.kernel[...].astype(low)
        return product.astype(low).astype(jnp.float32)

    with (
        mock.patch.object(Decoder, "logits", logits),
        mock.patch("mmjax.engine.programs._last_logits", lambda m, h: logits(m, h)[:, 0]),
    ):
        # Programs of the other head are not to be found again.
        jax.clear_caches()
        mmjax.engine.programs.compiled.cache_clear()
        yield
    jax.clear_caches()
    mmjax.engine.programs.compiled.cache_clear()


def drawn_and_recomputed(
    model: Decoder, rows: int, prompt: int, new: int, seed: int
) -> Batch[np.ndarray]:
    """Completions of random prompts; `anchor` is what the trainer's forward pass makes of them."""
    engine = Engine(model, max_slots=rows, max_length=prompt + new, num_prefixes=rows)
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, model.cfg.vocab_size, (rows, prompt)).astype(np.int32)
    each = [
        SamplingParams(new, seed=i, logprobs=0, ignore_eos=True, repetition_halt=None)
        for i in range(rows)
    ]
    done = engine.generate(list(prompts), each)
    tokens = np.array([c.token_ids for c in done], np.int32)
    behaviour = np.array([[t.logprob for t in c.logprobs or []] for c in done], np.float32)
    batch = Batch(
        sequences=np.concatenate([prompts, tokens], axis=1)[:, None],
        prompt_lengths=np.full((rows, 1), prompt, np.int32),
        lengths=np.full((rows, 1), new, np.int32),
        tokens=tokens[:, None],
        behaviour=behaviour[:, None],
        anchor=behaviour[:, None],
        mask=np.ones((rows, 1, new), np.float32),
        advantages=np.zeros((rows, 1), np.float32),
    )
    graphdef, params = nnx.split(model)
    placed = jax.tree.map(jnp.asarray, by_sample(batch))
    trainer = policy_logprobs(graphdef, CispoConfig(), params, placed)
    return batch._replace(anchor=np.asarray(trainer)[:, None])


def print_agreement(out: Path, rows: int, new: int) -> None:
    """Both tables."""
    config = job("sft", out).model
    config = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
    folder = out / "start" / "model"
    make = jax.jit(lambda: nnx.split(Decoder(config, rngs=nnx.Rngs(0), remat="layer")))
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {rows} rows of {new} tokens\n")
    print("| weights | LM head | correlation | largest Δp | mean Δp | largest Δ log π |")
    print("|---|---|---|---|---|---|")
    for weights in ("random", "fine-tuned"):
        if weights == "fine-tuned" and not folder.exists():
            print("| fine-tuned | run `start` first | | | | |")
            continue
        for dtype in ("bfloat16", "float32"):
            with head_dtype(dtype):
                if weights == "random":
                    model = nnx.merge(*make())
                else:
                    model = mmjax.load(folder, dtype="bfloat16")
                batch = drawn_and_recomputed(model, rows, 32, new, seed=1)
            stats = agreement(*map(jnp.asarray, (batch.anchor, batch.behaviour, batch.mask)))
            values = " | ".join(f"{float(x):.5f}" for x in stats.values())
            print(f"| {weights} | {dtype} | {values} |", flush=True)
            if dtype == "float32":
                _print_drift(batch)


def _print_drift(batch: Batch[np.ndarray]) -> None:
    """By eighths of the completion."""
    new = batch.tokens.shape[-1]
    parts = [slice(i * new // 8, (i + 1) * new // 8) for i in range(8)]
    print(f"\n| positions of {new} | " + " | ".join(f"to {p.stop}" for p in parts) + " |")
    print("|---" * 9 + "|")
    difference = np.abs(batch.anchor - batch.behaviour)
    rows = {
        "mean Δ log π": [f"{difference[..., p].mean():.5f}" for p in parts],
        "largest": [f"{difference[..., p].max():.4f}" for p in parts],
        "correlation": [
            f"{np.corrcoef(*(np.exp(x[..., p]).ravel() for x in batch[4:6]))[0, 1]:.5f}"
            for p in parts
        ],
    }
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(values) + " |")
    print(flush=True)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("start", "ways", "compare", "agreement", "asynchronous"))
    parser.add_argument("--out", type=Path, default=Path("runs/rl"))
    parser.add_argument("--model", type=Path, help="folder, of `ways`")
    parser.add_argument("--tasks", nargs="+", default=[TASK], help="of `ways`")
    parser.add_argument("--problems", type=int, default=512, help="held-out ones of `ways`")
    parser.add_argument("--algorithms", nargs="+", default=["cispo", "dapo", "grpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="rollout batches of a run")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate of reinforcement")
    parser.add_argument("--rows", type=int, default=8, help="rows of `agreement`")
    parser.add_argument("--tokens", type=int, default=8192, help="new tokens of a row of it")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "start":
        run_task(job("sft", args.out), args.out / "start")
    elif args.what == "ways":
        print_ways(args.model or args.out / "start" / "model", args.tasks, args.problems)
    elif args.what == "compare":
        compare(args.out, args.algorithms, args.seeds, args.steps, args.rate)
    elif args.what == "asynchronous":
        print_modes(args.out, args.steps, args.rate)
    else:
        print_agreement(args.out, args.rows, args.tokens)


if __name__ == "__main__":
    main()
