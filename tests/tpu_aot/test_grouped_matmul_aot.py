"""The grouped product compiled for TPUs that are not here: what fits, not how fast it is."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.grouped_matmul.mosaic_tpu import (
    grouped_matmul_mosaic_tpu,
    grouped_swiglu_mosaic_tpu,
)
from kernels_pallas.grouped_matmul.shapes import EXPERTS, FFN, WIDTH
from tests.tpu_aot.test_lightning_aot import LIBRARY, _compile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LIBRARY.exists(), reason="libtpu is for x86-64 Linux alone"),
]

# Rows and experts of one device: Text-01's share under expert parallelism, and all of it. Compiled
# once each, since a chip takes seconds; the kernels differ between chips by little.
CASES = [("v5e", 8192, 2), ("v5p", 65536, 2), ("v6e", 8192, 1), ("tpu7x", 65536, EXPERTS)]


def _forward(x, w1, w2, w3, sizes):
    return grouped_matmul_mosaic_tpu(grouped_swiglu_mosaic_tpu(x, w1, w3, sizes), w2, sizes)


def _backward(x, w1, w2, w3, sizes):
    out, pull = jax.vjp(lambda *args: grouped_swiglu_mosaic_tpu(*args, sizes), x, w1, w3)
    return pull(out)


@pytest.mark.parametrize(("chip", "rows", "experts"), CASES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_expert_layer(chip, rows, experts, direction):
    into, back = ((experts, *dims) for dims in ((WIDTH, FFN), (FFN, WIDTH)))
    shapes = [(rows, WIDTH), into, back, into]
    program, seconds = _compile(
        chip,
        {"forward": _forward, "backward": _backward}[direction],
        *[(shape, jnp.bfloat16) for shape in shapes],
        ((experts,), jnp.int32),
    )
    memory = program.memory_analysis()
    print(
        f"{chip} M={rows} E={experts} {direction}: {seconds:.1f} s, {memory.temp_size_in_bytes} B"
    )
    # Forward: the hidden rows. Backward: h1, h3, their gradients and the hidden rows. No copy of a
    # weight, transposed or not.
    bound = {"forward": 1, "backward": 5}[direction] * 2 * rows * FFN
    assert memory.temp_size_in_bytes <= 1.1 * bound
    assert seconds <= 60
