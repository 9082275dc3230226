"""Lightning attention compiled for TPUs that are not here: what fits, not how fast it is."""

import functools
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.lightning_attention.mosaic_tpu import lightning_attention_mosaic_tpu
from kernels_pallas.lightning_attention.step_mosaic_tpu import lightning_attention_step_mosaic_tpu

LIBRARY = Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LIBRARY.exists(), reason="libtpu is for x86-64 Linux alone"),
]

DIM = 128
# Topology, and GiB of HBM for one of its devices.
CHIPS = {
    "v5e": ("v5e:2x2", 16),
    "v5p": ("v5p:2x2x1", 95),
    "v6e": ("v6e:2x2", 32),
    "tpu7x": ("tpu7x:2x2x1", 96),
}
LENGTHS = (2**13, 2**17, 2**20)
# Arrays like q that a program takes and gives: q, k, v, out; q, k, v, d_out, d_q, d_k, d_v.
ARRAYS = {"forward": 4, "backward": 7}
CASES = [
    (chip, length, heads, direction)
    for chip, (_, gib) in CHIPS.items()
    for heads in (8, 64)
    for length in LENGTHS
    for direction, arrays in ARRAYS.items()
    if arrays * length * heads * DIM * 2 < 0.95 * gib * 2**30
]


@functools.cache
def _mesh(chip):
    # libtpu is to ask nobody where it runs, and to share a machine with another test process.
    os.environ |= {
        "TPU_LIBRARY_PATH": str(LIBRARY),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(CHIPS[chip][0], platform="tpu")
    return jax.sharding.Mesh(np.array(topology.devices[:1]), "x")


def _compile(chip, f, *shapes, **kwargs):
    """Compiles f of arrays (shape, dtype); returns the program and the seconds that it took."""
    mesh = _mesh(chip)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = [jax.ShapeDtypeStruct(*shape, sharding=whole) for shape in shapes]
    start = time.monotonic()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(f, **kwargs).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    return program, time.monotonic() - start


def _heads(f):
    """f on q, k, v (and d_out) as projections write them, [B, T, H·DIM]."""

    def flat(decay, segment_ids, state, *arrays):
        split = (x.reshape(*x.shape[:2], -1, DIM) for x in arrays)
        return jax.tree.map(_flatten, f(decay, segment_ids, state, *split))

    return flat


def _flatten(x):
    return x.reshape(*x.shape[:2], -1) if x.dtype == jnp.bfloat16 else x


@_heads
def _forward(decay, segment_ids, state, q, k, v):
    return lightning_attention_mosaic_tpu(q, k, v, decay, segment_ids, state)


@_heads
def _backward(decay, segment_ids, state, q, k, v, d_out):
    def attend(q, k, v, state):
        return lightning_attention_mosaic_tpu(q, k, v, decay, segment_ids, state)

    _, pull = jax.vjp(attend, q, k, v, state)
    return pull((d_out, state))


@pytest.mark.parametrize(("chip", "length", "heads", "direction"), CASES)
def test_attention(chip, length, heads, direction):
    tokens = (1, length, heads * DIM), jnp.bfloat16
    program, seconds = _compile(
        chip,
        {"forward": _forward, "backward": _backward}[direction],
        ((heads,), jnp.float32),
        ((1, length), jnp.int32),
        ((1, heads, DIM, DIM), jnp.float32),
        *[tokens] * {"forward": 3, "backward": 4}[direction],
    )
    memory = program.memory_analysis()
    # The segment ids in chunks, and the states of the ends: neither an array like q, nor the states
    # of T / 256 chunks.
    bound = 16 * length + 4 * 4 * heads * DIM * DIM
    print(
        f"{chip} T={length} H={heads} {direction}: {seconds:.1f} s, {memory.temp_size_in_bytes} B"
    )
    assert memory.temp_size_in_bytes <= bound
    assert seconds <= 60


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("heads", [8, 64])
def test_step(chip, heads):
    keys = (128, heads, DIM), jnp.bfloat16
    pool = (256, heads, DIM, DIM), jnp.float32
    program, seconds = _compile(
        chip,
        lightning_attention_step_mosaic_tpu,
        *[keys] * 3,
        ((heads,), jnp.float32),
        pool,
        ((128,), jnp.int32),
        donate_argnums=4,
    )
    memory = program.memory_analysis()
    print(f"{chip} H={heads} step: {seconds:.1f} s, {memory.temp_size_in_bytes} B")
    assert memory.alias_size_in_bytes >= 4 * np.prod(pool[0])  # Updated where it lies.
    assert memory.temp_size_in_bytes <= 16 * 2**20
    assert seconds <= 60
