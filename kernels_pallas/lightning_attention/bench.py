"""`python -m kernels_pallas.lightning_attention.bench`: this GPU's figures as a table.

Beside fla (`chunk_simple_gla` and `fused_recurrent_simple_gla` with the same decay rates and scale
1) where fla-core and torch are installed, in the same process. The floor is the time that reading
each input once and writing each output once takes at the copy bandwidth measured first.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import dispatch, lightning_attention, lightning_attention_step
from kernels_pallas.lightning_attention.shapes import DIM, LAYERS, SLOTS, Shape, decay_rates
from kernels_pallas.timing import milliseconds, torch_milliseconds

# Beyond the shapes of tuning: what must run on one card.
_LONGEST = (Shape(1, 2**20, 64), Shape(1, 2**20, 32))
_DOCUMENTS, _PACKED = 32, Shape(1, 65536, 64)
_CHUNK = 64


class Case(NamedTuple):
    """One line of the table: how to measure it in milliseconds, on our side and on fla's; the bytes
    it moves at least, and its floating-point operations.
    """

    what: str
    ours: Callable[[], float]
    peer: Callable[[_Peer], float]
    least_bytes: float
    flops: float


def main(argv: list[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Measure lightning attention on this GPU.")
    parser.add_argument("--max-length", type=int, default=2**20, help="leave out longer shapes")
    parser.add_argument("--heads", type=int, nargs="*", default=[64, 32, 8], help="only these")
    parser.add_argument("--no-peer", action="store_true", help="without fla")
    args = parser.parse_args(argv)
    # Memory is shared with torch, and the longest sequences want nearly all of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    target = dispatch.target()
    if reason := target.why_not_hopper():
        sys.exit(f"lightning_attention.bench: {reason}")
    cases = list(_cases(args.max_length, args.heads))
    peer = None if args.no_peer else _Peer.find()
    # All of fla's first: torch gives its memory back when asked, XLA keeps what it once took.
    theirs = [_measured(functools.partial(case.peer, peer)) if peer else "–" for case in cases]
    bandwidth = copy_bandwidth()
    print(f"{target.kind}, jax {jax.__version__}, {peer.version if peer else 'no peer'}")
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s; K = V = {DIM}, bf16, state float32\n")
    print("| what | ms | fla ms | fla / ours | GB | GFLOP | floor ms | ours / floor |")
    print("|---|---|---|---|---|---|---|---|")
    for case, their in zip(cases, theirs, strict=True):
        _print(case, _measured(case.ours), their, bandwidth)


def _cases(max_length: int, heads: list[int]) -> Iterator[Case]:
    shapes = [s for s in (*LAYERS, *_LONGEST) if s.length <= max_length and s.heads in heads]
    for shape in shapes:
        yield _attention(shape)
        yield _attention(shape, backward=True)
    for shape in shapes:
        if shape.heads == 8:
            yield _attention(shape, slowest=True)
    if 64 in heads:
        yield _attention(_PACKED)
        yield _attention(_PACKED, documents=_DOCUMENTS)
        yield from map(_step, SLOTS)


def copy_bandwidth() -> float:
    """Bytes a second that a large copy on this device moves, read and written."""
    x = jnp.ones((2**30,), jnp.float32)
    copy = jax.jit(lambda x: -x)
    return 2 * x.nbytes / (milliseconds(lambda: copy(x)) / 1e3)


def _print(case: Case, ours: float | str, theirs: float | str, bandwidth: float) -> None:
    floor = case.least_bytes / bandwidth * 1e3

    def text(x: float | str, form: str = ".3f") -> str:
        return x if isinstance(x, str) else format(x, form)

    faster: float | str = "–"
    if not isinstance(ours, str) and not isinstance(theirs, str):
        faster = theirs / ours
    over: float | str = "–" if isinstance(ours, str) else ours / floor
    cells = [case.what, text(ours), text(theirs), text(faster, ".2f")]
    cells += [f"{case.least_bytes / 1e9:.2f}", f"{case.flops / 1e9:.0f}", f"{floor:.3f}"]
    print("| " + " | ".join([*cells, text(over, ".2f")]) + " |", flush=True)


def _attention(
    shape: Shape, *, backward: bool = False, documents: int | None = None, slowest: bool = False
) -> Case:
    name = f"n {shape.length:,}, H {shape.heads}, forward" + (" + backward" if backward else "")
    name += f", {documents} documents" if documents else ""
    name += ", the slowest heads" if slowest else ""
    rates = decay_rates(shape.heads, slowest=slowest)
    array = shape.batch * shape.length * shape.heads * DIM * 2
    products = 2 * shape.batch * shape.length * shape.heads * DIM * (2 * _CHUNK + 2 * DIM)
    # Backward: q, k, v, do in and dq, dk, dv out; three passes of the forward's products.
    return Case(
        name,
        lambda: _ours(shape, rates, backward, documents),
        lambda peer: peer.attention(shape, rates, backward, documents),
        array * (11 if backward else 4),
        products * (4 if backward else 1),
    )


def _measured(measure: Callable[[], float]) -> float | str:
    """Milliseconds, or what ended the measurement."""
    try:
        return measure()
    except Exception as error:
        full = any(text in str(error).lower() for text in ("out of memory", "resource_exhausted"))
        return "out of memory" if full else type(error).__name__


def _ours(shape: Shape, rates: list[float], backward: bool, documents: int | None) -> float:
    dims = (shape.batch, shape.length, shape.heads, DIM)
    q, k, v, d_out = _normal(4, dims)
    decay = jnp.asarray(rates, jnp.float32)
    segments = None
    if documents:
        ids = np.repeat(np.arange(1, documents + 1, dtype=np.int32), shape.length // documents)
        segments = jnp.asarray(ids)[None]
    attend = functools.partial(
        lightning_attention, decay=decay, segment_ids=segments, implementation="mosaic_gpu"
    )
    if not backward:
        forward = jax.jit(lambda q, k, v: attend(q, k, v)[0])
        return milliseconds(lambda: forward(q, k, v))

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v)[0], q, k, v)
        return out, pull(d_out)

    calls = 10 if shape.length <= 65536 else 2  # Short ones hide the queueing of their kernels.
    return milliseconds(lambda: both(q, k, v, d_out), repeats=5, calls=calls)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normal(count: int, dims: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), count)
    return [jax.random.normal(key, dims, jnp.bfloat16) for key in keys]


def _step(rows: int) -> Case:
    heads, state = 64, rows * 64 * DIM * DIM * 4
    return Case(
        f"step, {rows} rows, H {heads}",
        lambda: _our_step(rows, heads),
        lambda peer: peer.step(rows, heads),
        2 * state,
        state,  # A multiply-add to decay and add, one to read, for each of its elements.
    )


def _our_step(rows: int, heads: int) -> float:
    """Inside a compiled loop, eight layers an iteration, each on the same pool."""
    q, k, v = _normal(3, (rows, heads, DIM))
    decay = jnp.asarray(decay_rates(heads), jnp.float32)
    slots = jnp.arange(rows, dtype=jnp.int32)
    layers, iterations = 8, 20

    def iteration(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        for _ in range(layers):
            carry = lightning_attention_step(
                carry[0], k, v, decay, carry[1], slots=slots, implementation="mosaic_gpu"
            )
        return carry

    loop = jax.jit(
        lambda q, state: jax.lax.fori_loop(0, iterations, iteration, (q, state))[1][0, 0, 0, 0]
    )
    state = jnp.zeros((rows, heads, DIM, DIM), jnp.float32)
    return milliseconds(lambda: loop(q, state), calls=2) / (layers * iterations)


class _Peer(NamedTuple):
    """fla's kernels through torch."""

    version: str
    torch: Any
    chunk: Callable[..., Any]
    recurrent: Callable[..., Any]

    @classmethod
    def find(cls) -> _Peer | None:
        if not (importlib.util.find_spec("torch") and importlib.util.find_spec("fla")):
            return None
        # By name: no package here depends on them.
        torch, fla = importlib.import_module("torch"), importlib.import_module("fla")
        ops = importlib.import_module("fla.ops.simple_gla")
        version = f"fla {fla.__version__} on torch {torch.__version__}"
        return cls(version, torch, ops.chunk_simple_gla, ops.fused_recurrent_simple_gla)

    def attention(
        self, shape: Shape, rates: list[float], backward: bool, documents: int | None
    ) -> float:
        torch = self.torch
        torch.cuda.empty_cache()
        dims = (shape.batch, shape.length, shape.heads, DIM)
        q, k, v = (
            torch.randn(dims, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
            for _ in range(3)
        )
        d_out = torch.randn(dims, device="cuda", dtype=torch.bfloat16) if backward else None
        gamma = -torch.tensor(rates, device="cuda")
        borders = None
        if documents:
            borders = torch.linspace(0, shape.length, documents + 1, device="cuda").long()

        def run() -> None:
            out, _ = self.chunk(q, k, v, g_gamma=gamma, scale=1.0, cu_seqlens=borders)
            if backward:
                torch.autograd.grad(out, (q, k, v), d_out)

        return self._milliseconds(run)

    def step(self, rows: int, heads: int) -> float:
        torch = self.torch
        torch.cuda.empty_cache()
        q, k, v = (
            torch.randn((rows, 1, heads, DIM), device="cuda", dtype=torch.bfloat16)
            for _ in range(3)
        )
        state = torch.zeros((rows, heads, DIM, DIM), device="cuda")
        gamma = -torch.tensor(decay_rates(heads), device="cuda")

        def run() -> None:
            self.recurrent(
                q, k, v, g_gamma=gamma, scale=1.0, initial_state=state, output_final_state=True
            )

        return self._milliseconds(run)

    def _milliseconds(self, run: Callable[[], None]) -> float:
        time = torch_milliseconds(self.torch, run, repeats=7)
        self.torch.cuda.empty_cache()
        return time


if __name__ == "__main__":
    main()
