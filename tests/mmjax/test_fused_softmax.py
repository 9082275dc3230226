"""When attention goes through cuDNN, and what is asked of it; tests/gpu compares the results."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from kernels_pallas import dispatch
from mmjax.layers.fused_softmax import _one_document, self_attention, why_not


@pytest.fixture
def h200(monkeypatch):
    """A machine that says it has one, with cuDNN: enough to trace and to lower for it."""
    monkeypatch.setattr(
        "kernels_pallas.dispatch.target", lambda *_: dispatch.Target("gpu", "NVIDIA H200", 132)
    )
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91400)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)


def arrays(length=2048, dim=128, dtype=jnp.bfloat16):
    def shape(heads):
        return jax.ShapeDtypeStruct((2, length, heads, dim), dtype)

    return shape(8), shape(2), shape(2)


def lowered(ids):
    """The program of a forward and backward on a GPU."""

    def loss(q, k, v, ids):
        index = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32)[None], q.shape[:2])
        return jnp.sum(self_attention(q, k, v, index, ids).astype(jnp.float32))

    run = jax.jit(jax.grad(loss, (0, 1, 2)))
    return run.trace(*arrays(), ids).lower(lowering_platforms=("cuda",)).as_text()


def masks(program):
    """Of the calls; quotes are escaped in a program's text."""
    return set(re.findall(r"mask_type\\22: \\22(\w+)\\22", program))


def test_a_row_of_one_segment_is_fused(h200):
    program = lowered(None)
    assert "__cudnn$fmhaSoftmax" in program
    assert "__cudnn$fmhaSoftmaxBackward" in program
    assert masks(program) == {"CAUSAL"}
    assert "stablehlo.case" not in program


@pytest.mark.parametrize("masked", [True, False])
def test_packed_rows_choose_in_the_program(h200, monkeypatch, masked):
    """Between one document a row, and a mask or, where that would be too large, XLA's blocks."""
    if not masked:
        monkeypatch.setattr("mmjax.layers.fused_softmax._MOST_MASK", 2 * 2 * 2048**2 - 1)
    program = lowered(jax.ShapeDtypeStruct((2, 2048), jnp.int32))
    assert "__cudnn$fmhaSoftmaxBackward" in program
    assert ("__cudnn$fmhaScaleBiasSoftmaxBackward" in program) == masked
    assert masks(program) == {"PADDING_CAUSAL"} | ({"CAUSAL"} if masked else set())
    assert "stablehlo.case" in program


REFUSED = [
    ({"dtype": jnp.float32}, "it takes bfloat16 and float16, not float32"),
    ({"dim": 256}, "heads of 256; it takes multiples of 8 up to 128"),
    ({"dim": 20}, "heads of 20; it takes multiples of 8 up to 128"),
    ({"length": 512}, "512 tokens are few enough for all scores at once"),
]


@pytest.mark.parametrize(("change", "text"), REFUSED)
def test_what_it_cannot_take(h200, change, text):
    assert why_not(arrays(**change)[0]) == text


def test_other_devices_have_none():
    q = jnp.zeros((1, 2048, 1, 8), jnp.bfloat16)
    assert why_not(q) == "it needs a GPU; the arrays are on cpu (cpu)"


@pytest.mark.parametrize(
    ("rows", "whole", "lengths"),
    [
        ([[1, 1, 1, 1], [3, 3, 3, 3]], True, [4, 4]),
        ([[1, 1, 0, 0], [1, 0, 0, 0]], True, [2, 1]),
        ([[1, 1, 2, 2], [1, 1, 1, 1]], False, None),
        ([[0, 1, 1, 1], [1, 1, 1, 1]], False, None),
        ([[1, 0, 1, 1], [1, 1, 1, 1]], False, None),
        ([[1, 1, 2, 0], [1, 1, 1, 1]], False, None),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], False, None),
    ],
)
def test_rows_of_one_document(rows, whole, lengths):
    found, counted = _one_document(jnp.asarray(rows, jnp.int32))
    assert bool(found) == whole
    if whole:
        np.testing.assert_array_equal(counted, lengths)
