"""`python -m kernels_pallas.paged_attention.bench`: this GPU's decode steps over pages as a table.

32 heads of 128 and 4 KV heads, bfloat16, pages of 64 tokens that lie anywhere in their pool. The
floor is the time that reading the keys and values takes at `--bandwidth`. Each time is of a call
inside a compiled loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import paged_attention
from kernels_pallas.timing import milliseconds

_HEADS, _GROUPS, _DIM, _PAGE = 32, 4, 128, 64
_CALLS = 16
# Tokens of each row. In the last one a row is long and 63 are not.
_CASES = (
    [128] * 256,
    [4096],
    [4096] * 16,
    [4096] * 64,
    [4096] * 256,
    [32768],
    [32768] * 16,
    [32768] * 64,
    [262144],
    [131072] + [2048] * 63,
)


def main() -> None:
    """The decode steps over pages of this GPU, as a table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--bandwidth", type=float, default=4150, help="GB/s of a copy")
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| rows | tokens | floor, us | mosaic_gpu, us | chunked, us |")
    print("|---|---|---|---|---|")
    for tokens in _CASES:
        read = 2 * sum(tokens) * _GROUPS * _DIM * 2
        lengths = " + ".join(f"{tokens.count(n)} x {n}" for n in dict.fromkeys(tokens))
        cells = [len(tokens), lengths, f"{read / args.bandwidth / 1e3:.1f}"]
        inputs = step_inputs(tokens)
        for name in ("mosaic_gpu", "chunked"):
            cells.append(f"{_microseconds(inputs, name):.1f}")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def step_inputs(tokens: Sequence[int]) -> tuple[jax.Array, ...]:
    """What `paged_attention` takes, for rows that see so many tokens each."""
    lengths = np.array(tokens, np.int32)
    need = -(-lengths // _PAGE)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (lengths.size, 1, _HEADS, _DIM), jnp.bfloat16)
    pool = (1, int(need.sum()), _GROUPS, _PAGE, _DIM)
    pools = [jax.random.normal(key, pool, jnp.bfloat16) for key in keys[1:]]
    pages = np.random.default_rng(0).permutation(pool[1]).astype(np.int32)
    table = np.zeros((lengths.size, need.max()), np.int32)
    for row, own in zip(table, np.split(pages, np.cumsum(need)[:-1]), strict=True):
        row[: own.size] = own
    return q, *pools, jnp.asarray(table), jnp.asarray(lengths - 1)[:, None], jnp.int32(0)


def _microseconds(inputs: tuple[jax.Array, ...], implementation: str) -> float:
    @jax.jit
    def loop(q: jax.Array, *rest: jax.Array) -> jax.Array:
        def step(_: jax.Array, q: jax.Array) -> jax.Array:
            out = paged_attention(q, *rest, implementation=implementation)
            return q + (out * 1e-3).astype(q.dtype)  # The next step waits for this one.

        return jax.lax.fori_loop(0, _CALLS, step, q)

    return 1e3 * milliseconds(lambda: loop(*inputs), repeats=3, calls=3) / _CALLS


if __name__ == "__main__":
    main()
