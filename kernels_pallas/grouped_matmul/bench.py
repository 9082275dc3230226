"""`python -m kernels_pallas.grouped_matmul.bench`: this GPU's figures as tables.

Beside the dense product of the same size, measured right before each line since a GPU at its power
limit slows as it warms up, `jax.lax.ragged_dot`, and where they are installed tokamax and
`torch._grouped_mm`, in the same process. The floor of a decoding step is the time that reading the
matrices of the groups with rows takes at the copy bandwidth measured first.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import dispatch, grouped_matmul, grouped_swiglu
from kernels_pallas.grouped_matmul import shapes
from kernels_pallas.grouped_matmul.shapes import DECODING, EXPERTS, FFN, LAYERS, TOP_K, WIDTH, Shape
from kernels_pallas.timing import milliseconds, torch_milliseconds

_ROUTINGS = {"balanced": shapes.balanced, "skewed": shapes.skewed}
# A decoding step is shorter than its launch from Python: many inside one program.
_STEPS = 24

type Run = Callable[..., jax.Array]


def main(argv: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Measure the grouped product on this GPU.")
    parser.add_argument("--no-peers", action="store_true", help="dense and ours alone")
    args = parser.parse_args(argv)
    # Memory is shared with torch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    target = dispatch.target()
    if reason := target.why_not_hopper():
        sys.exit(f"grouped_matmul.bench: {reason}")
    peers = {} if args.no_peers else _peers()
    bandwidth = copy_bandwidth()
    print(
        f"{target.kind}, jax {jax.__version__}; bf16; copy bandwidth {bandwidth / 1e12:.2f} TB/s\n"
    )
    _products(LAYERS[0], peers)
    _layer(LAYERS[0])
    _decoding(bandwidth)


def copy_bandwidth() -> float:
    """Bytes a second that a large copy on this device moves, read and written."""
    x = jnp.ones((2**29,), jnp.float32)
    copy = jax.jit(lambda x: -x)
    return 2 * x.nbytes / (milliseconds(lambda: copy(x)) / 1e3)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normal(seed: int, dims: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), dims)).astype(jnp.bfloat16)


def _arrays(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """lhs, rhs and d_out."""
    rows, inner, columns, groups = shape
    rhs = _normal(1, (groups, inner, columns), inner**-0.5)
    return _normal(0, (rows, inner)), rhs, _normal(2, (rows, columns))


def _d_lhs(product: Run) -> Run:
    def run(lhs: jax.Array, rhs: jax.Array, d_out: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.vjp(lambda lhs: product(lhs, rhs, sizes), lhs)[1](d_out)[0]

    return run


def _d_rhs(product: Run) -> Run:
    def run(lhs: jax.Array, rhs: jax.Array, d_out: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.vjp(lambda rhs: product(lhs, rhs, sizes), rhs)[1](d_out)[0]

    return run


def _forward(product: Run) -> Run:
    return lambda lhs, rhs, d_out, sizes: product(lhs, rhs, sizes)


_PASSES: dict[str, tuple[Callable[[Run], Run], Run]] = {
    # And the dense product of the same size.
    "forward": (_forward, lambda lhs, rhs, d_out: lhs @ rhs[0]),
    "d_lhs": (_d_lhs, lambda lhs, rhs, d_out: d_out @ rhs[0].T),
    "d_rhs": (_d_rhs, lambda lhs, rhs, d_out: lhs.T @ d_out),
}


def _products(shape: Shape, peers: dict[str, Any]) -> None:
    rows, inner, columns, groups = shape
    arrays = _arrays(shape)
    flops = 2 * rows * inner * columns
    moved = 2 * (rows * inner + groups * inner * columns + rows * columns)
    print(f"{rows} x {inner} x {columns}, {groups} groups: {flops / 1e12:.2f} TFLOP, at least")
    print(f"{moved / 1e9:.1f} GB. TFLOP/s:\n")
    names = ["jax.lax.ragged_dot", *peers] if peers else []
    print(
        "| " + " | ".join(["pass", "routing", "ms", "ours", "dense", "ours / dense", *names]) + " |"
    )
    print("|---" * (6 + len(names)) + "|")
    for what, (part, plain) in _PASSES.items():
        ours = jax.jit(part(functools.partial(grouped_matmul, implementation="mosaic_gpu")))
        dense = jax.jit(plain)
        for routing, sizes_of in _ROUTINGS.items():
            sizes = jnp.asarray(sizes_of(shape))
            alone = milliseconds(lambda: dense(*arrays), repeats=5)  # noqa: B023
            ms = milliseconds(lambda: ours(*arrays, sizes), repeats=5)  # noqa: B023
            cells = [what, routing, f"{ms:.2f}", *(f"{flops / x / 1e9:.0f}" for x in (ms, alone))]
            cells.append(f"{alone / ms:.2f}")
            if peers:
                ragged = jax.jit(part(jax.lax.ragged_dot))
                times = [_time(lambda: ragged(*arrays, sizes))]  # noqa: B023
                times += [peer(what, part, arrays, sizes) for peer in peers.values()]
                cells += [x if isinstance(x, str) else f"{flops / x / 1e9:.0f}" for x in times]
            print("| " + " | ".join(cells) + " |", flush=True)


def _time(run: Callable[[], object]) -> float | str:
    """Milliseconds of a peer, or what ended the measurement."""
    try:
        return milliseconds(run, repeats=3, calls=1)
    except Exception as error:
        return type(error).__name__


def _peers() -> dict[str, Any]:
    found: dict[str, Any] = {}
    if importlib.util.find_spec("tokamax"):
        tokamax = importlib.import_module("tokamax")

        def through_tokamax(what: str, part: Callable[[Run], Run], arrays: Any, sizes: Any) -> Any:
            run = jax.jit(part(functools.partial(tokamax.ragged_dot, implementation="mosaic")))
            return _time(lambda: run(*arrays, sizes))

        found["tokamax"] = through_tokamax
    if importlib.util.find_spec("torch"):
        found["torch._grouped_mm"] = _through_torch
    return found


def _through_torch(what: str, part: Any, arrays: Any, sizes: jax.Array) -> float | str:
    torch = importlib.import_module("torch")
    try:
        lhs, rhs, d_out = (torch.from_dlpack(x) for x in arrays)
        ends = torch.from_dlpack(jnp.cumsum(sizes).astype(jnp.int32))
        operands = {
            "forward": (lhs, rhs),
            "d_lhs": (d_out, rhs.transpose(1, 2)),
            "d_rhs": (lhs.T, d_out),
        }[what]
        return torch_milliseconds(torch, lambda: torch._grouped_mm(*operands, offs=ends), repeats=5)
    except Exception as error:
        return type(error).__name__


# The whole expert layer.


def _moved(rows: jax.Array, source: jax.Array, back: jax.Array, share: int = 1) -> jax.Array:
    """rows[source // share], whose transpose gathers too: `back` is the permutation's inverse."""

    @jax.custom_vjp
    def take(rows: jax.Array) -> jax.Array:
        return rows[source // share]

    def transpose(_: None, d: jax.Array) -> tuple[jax.Array]:
        return (d[back].reshape(-1, share, d.shape[1]).sum(1),)

    take.defvjp(lambda rows: (take(rows), None), transpose)
    return take(rows)


def _expert_layer(
    x: jax.Array, w1: jax.Array, w2: jax.Array, w3: jax.Array, expert: jax.Array, share: jax.Array
) -> jax.Array:
    """Gather, SwiGLU, down-projection, weighted scatter; x [N, D], expert and share [N, k]."""
    count, top_k = expert.shape
    order = jnp.argsort(expert.reshape(-1), stable=True).astype(jnp.int32)
    place = jnp.argsort(order).astype(jnp.int32)
    sizes = jnp.bincount(expert.reshape(-1), length=w1.shape[0]).astype(jnp.int32)
    hidden = grouped_swiglu(_moved(x, order, place, top_k), w1, w3, sizes)
    out = _moved(grouped_matmul(hidden, w2, sizes), place, order).reshape(count, top_k, -1)
    return (out.astype(jnp.float32) * share[:, :, None]).sum(1).astype(x.dtype)


def _layer(shape: Shape) -> None:
    tokens = shape.rows // TOP_K
    into, back = (EXPERTS, WIDTH, FFN), (EXPERTS, FFN, WIDTH)
    x, d_out = _normal(0, (tokens, WIDTH)), _normal(1, (tokens, WIDTH))
    weights = [_normal(i, dims, dims[1] ** -0.5) for i, dims in enumerate((into, back, into))]
    logits = jax.random.normal(jax.random.key(1), (tokens, EXPERTS))
    top, expert = jax.lax.top_k(logits, TOP_K)
    share = jax.nn.softmax(top)

    @jax.jit
    def both(x: jax.Array, *rest: jax.Array) -> Any:
        *weights, d_out = rest
        layer = functools.partial(_expert_layer, expert=expert, share=share)
        out, pull = jax.vjp(layer, x, *weights)
        return out, pull(d_out)

    rows = _normal(3, (shape.rows, WIDTH))
    dense = jax.jit(lambda rows, w: rows @ w)
    alone = 9 * milliseconds(lambda: dense(rows, weights[0][0]), repeats=5)
    ms = milliseconds(lambda: both(x, *weights, d_out), repeats=3, calls=2)
    print(f"\nExpert layer, {tokens} tokens to {TOP_K} of {EXPERTS} experts by chance, forward +")
    print("backward: gather, SwiGLU, down-projection, weighted scatter.\n")
    print("| ms | its nine products as dense ones, ms | dense / ours |\n|---|---|---|")
    print(f"| {ms:.1f} | {alone:.1f} | {alone / ms:.2f} |", flush=True)


def _decoding(bandwidth: float) -> None:
    print("\nDecoding: rows drawn at random over 32 experts.\n")
    print("| op | rows | experts with rows | us | GB | floor us | floor / ours |")
    print("|---|---|---|---|---|---|---|")
    for name, op in (("grouped_matmul", grouped_matmul), ("grouped_swiglu", grouped_swiglu)):
        for shape in DECODING:
            sizes = shapes.by_chance(shape)
            active = int((sizes > 0).sum())
            _, inner, columns, _ = shape
            matrices = 1 if op is grouped_matmul else 2
            read = matrices * active * inner * columns * 2
            us = 1e3 * _step_milliseconds(op, matrices, shape, sizes)
            floor = read / bandwidth * 1e6
            cells = [name, shape.rows, active, f"{us:.0f}", f"{read / 1e9:.2f}", f"{floor:.0f}"]
            print("| " + " | ".join(map(str, [*cells, f"{floor / us:.2f}"])) + " |", flush=True)


def _step_milliseconds(op: Any, matrices: int, shape: Shape, sizes: np.ndarray) -> float:
    """Inside a compiled loop, in which every step reads other matrices."""
    rows, inner, columns, groups = shape
    lhs = _normal(0, (rows, inner))
    weights = [_normal(i, (groups, inner, columns), inner**-0.5) for i in range(matrices)]

    every = jnp.asarray(np.stack([np.roll(sizes, 5 * i) for i in range(_STEPS)]))

    @jax.jit
    def loop(lhs: jax.Array, every: jax.Array, *weights: jax.Array) -> jax.Array:
        def step(lhs: jax.Array, sizes: jax.Array) -> tuple[jax.Array, None]:
            out = op(lhs, *weights, sizes, implementation="mosaic_gpu")
            return lhs + 0 * out[:1, :1], None  # The next step waits for this one.

        return jax.lax.scan(step, lhs, every)[0][0, 0]

    return milliseconds(lambda: loop(lhs, every, *weights), repeats=5, calls=2) / _STEPS


if __name__ == "__main__":
    main()
