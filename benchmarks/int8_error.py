"""What int8 experts cost in accuracy.

    .venv/bin/python -m benchmarks.int8_error [--model runs/demo-0/cispo/model]

One expert layer of random weights at several widths against float32: the error of bfloat16 beside
that of int8 weights with bfloat16 activations. With a model's folder, its log-probabilities too, of
random tokens, against the same model without int8. Prints Markdown tables.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

import mmjax
from mmjax.layers.experts import Weights, apply_experts
from mmjax.layers.int8 import to_int8

TOKENS, EXPERTS, TOP_K = 32, 4, 2
WIDTHS = ((256, 384), (1024, 1536), (3072, 4608))


def layer_errors(width: int, ffn: int) -> tuple[float, float]:
    """Relative rms error of the output in bfloat16, and with int8 weights besides."""
    keys = jax.random.split(jax.random.key(0), 5)

    def draw(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape) / shape[-2] ** 0.5

    into, back = (EXPERTS, width, ffn), (EXPERTS, ffn, width)
    weights = [draw(k, *s) for k, s in zip(keys, (into, into, back), strict=False)]
    kernels = Weights(*(w.astype(jnp.bfloat16) for w in weights))
    tokens = jax.random.normal(keys[3], (TOKENS, width)).astype(jnp.bfloat16)
    top, expert = jax.lax.top_k(jax.random.normal(keys[4], (TOKENS, EXPERTS)), TOP_K)
    share, expert = jax.nn.softmax(top), expert.astype(jnp.int32)
    exact = Weights(*(w.astype(jnp.float32) for w in kernels))
    want = apply_experts(tokens.astype(jnp.float32), share, expert, exact)
    share = share.astype(jnp.bfloat16)

    def error(kernels: Weights) -> float:
        got = apply_experts(tokens, share, expert, kernels).astype(jnp.float32)
        return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))

    return error(kernels), error(Weights(*map(to_int8, kernels)))


def model_error(folder: str) -> tuple[float, float, float]:
    """Mean and largest difference of log-probabilities, and share of equal greedy tokens."""
    model = mmjax.load(folder)
    tokens = jax.random.randint(jax.random.key(0), (8, 128), 0, model.cfg.vocab_size)
    run = jax.jit(lambda m, t: jax.nn.log_softmax(m(t).logits))
    exact, rounded = run(model, tokens), run(model.with_int8_experts(), tokens)
    apart = jnp.abs(exact - rounded)
    alike = (exact.argmax(-1) == rounded.argmax(-1)).mean()
    return float(apart.mean()), float(apart.max()), float(alike)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", help="folder of a model")
    args = parser.parse_args()
    print("| experts | relative error, bfloat16 | with int8 |\n|---|---|---|")
    for width, ffn in WIDTHS:
        plain, rounded = layer_errors(width, ffn)
        print(f"| {width} x {ffn} | {plain:.4f} | {rounded:.4f} |", flush=True)
    if args.model:
        mean, largest, alike = model_error(args.model)
        print(
            f"\nlog-probabilities differ by {mean:.4f} on average, {largest:.4f} at most; "
            f"{alike:.1%} of the likeliest tokens are the same."
        )


if __name__ == "__main__":
    main()
