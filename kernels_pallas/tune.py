"""`python -m kernels_pallas.tune`: measure block sizes on this GPU, keep the fastest right ones.

Each configuration's output and gradients are compared with the XLA implementation in float32
first; one that is wrong is refused, however fast. Results go to `tuned/<device>.json`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, tuning
from kernels_pallas.lightning_attention import mosaic_gpu
from kernels_pallas.lightning_attention.api import shape_key
from kernels_pallas.lightning_attention.chunked import lightning_attention_chunked
from kernels_pallas.lightning_attention.shapes import DIM, LAYERS, Shape, decay_rates
from kernels_pallas.timing import milliseconds

# bf16 rounds each operand by 2⁻⁹; what the kernel rounds beside its inputs doubles that.
_BOUND = 5e-3


def candidates(shape: Shape, multiprocessors: int) -> Iterator[mosaic_gpu.Blocks]:
    """Blocks worth trying: the default, half and twice its stretches, fewer chunks in flight."""
    dims = (shape.batch, shape.length, shape.heads, DIM)
    like = jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    default = mosaic_gpu.default_blocks(like, like, multiprocessors)
    split = default.stretches
    for stretches in sorted({max(split // 2, 1), split, 2 * split if split > 1 else 1}):
        yield default._replace(stretches=stretches)
    yield default._replace(stages=2)


def tune_lightning_attention(shape: Shape, target: dispatch.Target) -> mosaic_gpu.Blocks | None:
    """The fastest right blocks, by the time of a forward pass alone and one with its backward
    together; None if all were wrong.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    dims = (shape.batch, shape.length, shape.heads, DIM)
    q, k, v, d_out = (jax.random.normal(key, dims, jnp.bfloat16) for key in keys)
    decay = jnp.asarray(decay_rates(shape.heads), jnp.float32)
    state = jnp.zeros((shape.batch, shape.heads, DIM, DIM), jnp.float32)

    def results(attend: Any, d_out: jax.Array, *arrays: jax.Array) -> Any:
        (out, _), pull = jax.vjp(lambda *x: attend(*x, decay, None, state), *arrays)
        return out, *pull((d_out, jnp.zeros_like(state)))

    # The reference holds float32 copies of everything: a part of the sequence is enough for it.
    whole = (d_out, q, k, v)
    part = [x[:, :8192] for x in whole]
    wanted = jax.jit(lambda *x: results(lightning_attention_chunked, *x))(
        *(x.astype(jnp.float32) for x in part)
    )
    times: dict[mosaic_gpu.Blocks, float] = {}
    for blocks in candidates(shape, target.cores):
        attend = partial(mosaic_gpu.lightning_attention_mosaic_gpu, blocks=blocks)
        run = jax.jit(partial(results, attend))
        error = max(map(_relative_error, run(*part), wanted))
        if not error <= _BOUND:
            print(f"refused {blocks}: relative error {error:.1e} > {_BOUND}")
            continue
        forward = jax.jit(lambda *x, attend=attend: attend(*x, decay, None, state)[0])
        parts = milliseconds(partial(forward, q, k, v)), milliseconds(partial(run, *whole))
        times[blocks] = sum(parts)
        print(f"  {blocks}: {parts[0]:.3f} + {parts[1]:.3f} ms, error {error:.1e}", flush=True)
    return min(times, key=times.__getitem__, default=None)


def _relative_error(got: jax.Array, wanted: jax.Array) -> float:
    return float(jnp.linalg.norm(got.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted))


def main(argv: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Tune block sizes on this GPU.")
    parser.add_argument("op", choices=["lightning_attention"])
    parser.add_argument("--max-length", type=int, default=2**20, help="leave out longer shapes")
    args = parser.parse_args(argv)
    target = dispatch.target()
    if reason := target.why_not_hopper():
        sys.exit(f"kernels_pallas.tune: {reason}")
    for shape in LAYERS:
        print(shape, flush=True)
        if shape.length > args.max_length:
            continue
        best = tune_lightning_attention(shape, target)
        if best is None:
            sys.exit(f"kernels_pallas.tune: no configuration is right at {shape}")
        dims = (shape.batch, shape.length, shape.heads, DIM)
        like = jax.ShapeDtypeStruct(dims, jnp.bfloat16)
        key = shape_key(like, like)
        file = tuning.store(target.kind, args.op, "mosaic_gpu", key, best._asdict())
        print(f"{key}: {best} -> {file}")


if __name__ == "__main__":
    main()
