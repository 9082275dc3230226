"""`python -m kernels_pallas.tune`: measure block sizes on this GPU, keep the fastest right ones.

Each configuration's output and gradients are compared with the XLA implementation in float32
first; one that is wrong is refused, however fast. Results go to `tuned/<device>.json`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, tuning
from kernels_pallas.grouped_matmul import api as grouped_api
from kernels_pallas.grouped_matmul import mosaic_gpu as grouped_gpu
from kernels_pallas.grouped_matmul import shapes as grouped_shapes
from kernels_pallas.grouped_matmul.reference import grouped_matmul_reference
from kernels_pallas.grouped_matmul.swiglu import swiglu_through
from kernels_pallas.lightning_attention import mosaic_gpu
from kernels_pallas.lightning_attention.api import shape_key
from kernels_pallas.lightning_attention.chunked import lightning_attention_chunked
from kernels_pallas.lightning_attention.shapes import DIM, LAYERS, Shape, decay_rates
from kernels_pallas.timing import milliseconds

# bf16 rounds each operand by 2⁻⁹; what the kernel rounds beside its inputs doubles that.
_BOUND = 5e-3
# Times that each of some blocks is measured.
_ROUNDS = 5


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


def tune_lightning_layers(longest: int, target: dispatch.Target) -> None:
    """Tunes lightning attention at the shapes of real models, up to a length."""
    for shape in LAYERS:
        print(shape, flush=True)
        if shape.length > longest:
            continue
        best = tune_lightning_attention(shape, target)
        if best is None:
            sys.exit(f"kernels_pallas.tune: no configuration is right at {shape}")
        dims = (shape.batch, shape.length, shape.heads, DIM)
        like = jax.ShapeDtypeStruct(dims, jnp.bfloat16)
        key = shape_key(like, like)
        file = tuning.store(target.kind, "lightning_attention", "mosaic_gpu", key, best._asdict())
        print(f"{key}: {best} -> {file}")


def grouped_candidates(what: str, rows: int, groups: int) -> list[grouped_gpu.Blocks]:
    """Blocks worth trying for a pass."""
    if what != "d_rhs" and rows <= 64 * groups:
        # As many stages as shared memory holds; SwiGLU halves the columns of a tile.
        sizes = [(256, 5), (128, 8)] + [(64, 12)] * (what != "swiglu")
        return [grouped_gpu.Blocks(rows=64, columns=n, stages=s) for n, s in sizes]
    return [grouped_gpu.Blocks(panel=panel) for panel in (4, 8, 12)]


# A pass of a grouped op: of lhs, the matrices, sizes and d_out.
type _Pass = Callable[..., Any]


def grouped_passes(blocks: grouped_gpu.Blocks, cores: int) -> dict[str, _Pass]:
    """What each entry of the tuned file decides about, run with these blocks."""
    passes = grouped_gpu.Passes(blocks, blocks, blocks, cores)

    def product(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, _: int = 1) -> jax.Array:
        return grouped_gpu.grouped_matmul_mosaic_gpu(lhs, rhs, sizes, passes)

    def swiglu(*args: jax.Array) -> jax.Array:
        return grouped_gpu.grouped_swiglu_mosaic_gpu(*args[:-1], passes)

    return _passes_of(product, swiglu)


def _passes_of(
    product: Callable[..., jax.Array], swiglu: Callable[..., jax.Array]
) -> dict[str, _Pass]:
    def d_lhs(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, d_out: jax.Array) -> jax.Array:
        return jax.vjp(lambda lhs: product(lhs, rhs, sizes, 1), lhs)[1](d_out)[0]

    def d_rhs(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, d_out: jax.Array) -> jax.Array:
        return jax.vjp(lambda rhs: product(lhs, rhs, sizes, 1), rhs)[1](d_out)[0]

    return {
        "forward": lambda lhs, rhs, sizes, d_out: product(lhs, rhs, sizes, 1),
        "swiglu": lambda lhs, rhs, sizes, d_out: swiglu(lhs, rhs, rhs[::-1], sizes, None, 1),
        "d_lhs": d_lhs,
        "d_rhs": d_rhs,
    }


def tune_grouped_pass(
    what: str, shape: grouped_shapes.Shape, target: dispatch.Target
) -> grouped_gpu.Blocks | None:
    """The fastest right blocks of a pass at balanced and skewed sizes; None if all were wrong."""
    rows, inner, columns, groups = shape
    keys = jax.random.split(jax.random.key(0), 3)
    dims = (rows, inner), (groups, inner, columns), (rows, columns)
    lhs, rhs, d_out = (
        (jax.random.normal(key, x) * scale).astype(jnp.bfloat16)
        for key, x, scale in zip(keys, dims, (1, inner**-0.5, 1), strict=True)
    )
    # The reference multiplies every row with every matrix: a part of the rows is enough for it.
    part = shape._replace(rows=min(rows, 1024))
    part_sizes = jnp.asarray(grouped_shapes.skewed(part))
    parts = [lhs[: part.rows], rhs, part_sizes, d_out[: part.rows]]
    exact = _passes_of(grouped_matmul_reference, swiglu_through(grouped_matmul_reference))[what]
    wanted = jax.jit(exact)(
        *(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in parts)
    )
    many = shape in grouped_shapes.LAYERS
    routings = [grouped_shapes.by_chance(shape)]
    if many:
        routings = [grouped_shapes.balanced(shape), grouped_shapes.skewed(shape)]
    candidates = grouped_candidates(what, rows, groups)
    runs = [jax.jit(grouped_passes(blocks, target.cores)[what]) for blocks in candidates]

    def compiled(run: Any) -> Any:
        return [run.lower(lhs, rhs, part_sizes, d_out).compile(), run.lower(*parts).compile()]

    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(compiled, runs))
    right: dict[grouped_gpu.Blocks, Any] = {}
    for blocks, (run, run_part) in zip(candidates, programs, strict=True):
        error = _relative_error(run_part(*parts), wanted)
        if error <= _BOUND:
            right[blocks] = run
        else:
            print(f"refused {blocks}: relative error {error:.1e} > {_BOUND}")

    def measure(run: Any) -> float:
        return sum(
            milliseconds(partial(run, lhs, rhs, jnp.asarray(sizes), d_out)) for sizes in routings
        )

    # In turns, as a card slows while it warms up.
    rounds = [{blocks: measure(run) for blocks, run in right.items()} for _ in range(_ROUNDS)]
    times = {blocks: statistics.median(each[blocks] for each in rounds) for blocks in right}
    for blocks, ms in times.items():
        print(f"  {what} {blocks}: {ms:.3f} ms", flush=True)
    return min(times, key=times.__getitem__, default=None)


def tune_grouped_layers(rows: int | None, target: dispatch.Target) -> None:
    """Tunes the passes of the grouped product at the shapes of real models, of so many rows."""
    up, down = grouped_shapes.LAYERS
    few = grouped_shapes.DECODING[-1]
    wanted = [(up, ("forward", "swiglu", "d_lhs", "d_rhs")), (down, ("forward", "d_lhs", "d_rhs"))]
    for shape, passes in [*wanted, (few, ("forward", "swiglu"))]:
        if rows not in (None, shape.rows):
            continue
        like = jax.ShapeDtypeStruct((shape.rows, shape.inner), jnp.bfloat16)
        matrices = jax.ShapeDtypeStruct((shape.groups, shape.inner, shape.columns), jnp.bfloat16)
        for what in passes:
            best = tune_grouped_pass(what, shape, target)
            if best is None:
                sys.exit(f"kernels_pallas.tune: no configuration of {what} is right at {shape}")
            key = grouped_api.shape_key(what, like, matrices)
            file = tuning.store(target.kind, "grouped_matmul", "mosaic_gpu", key, best._asdict())
            print(f"{key}: {best} -> {file}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Tune block sizes on this GPU.")
    parser.add_argument("op", choices=["lightning_attention", "grouped_matmul"])
    parser.add_argument(
        "--max-length", type=int, default=2**20, help="lightning_attention: leave out longer shapes"
    )
    parser.add_argument("--rows", type=int, help="grouped_matmul: shapes of so many rows alone")
    args = parser.parse_args(argv)
    target = dispatch.target()
    if reason := target.why_not_hopper():
        sys.exit(f"kernels_pallas.tune: {reason}")
    if args.op == "grouped_matmul":
        tune_grouped_layers(args.rows, target)
    else:
        tune_lightning_layers(args.max_length, target)


if __name__ == "__main__":
    main()
