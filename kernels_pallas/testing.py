"""What tests, tuner and benchmarks share: seeded inputs, float64 oracles, tolerances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class LightningInputs(NamedTuple):
    """Arguments of `lightning_attention`, and cotangents of its two results.

    q, k [B, T, H, K]; v, d_out [B, T, H, V]; decay [H]; segment_ids [B, T] or None;
    initial_state, d_state [B, H, K, V].
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    decay: np.ndarray
    segment_ids: np.ndarray | None
    initial_state: np.ndarray
    d_out: np.ndarray
    d_state: np.ndarray


def lightning_inputs(
    seed: int,
    *,
    batch: int = 2,
    length: int,
    key_dim: int = 24,
    value_dim: int = 16,
    decay: Sequence[float],
    segment_ids: np.ndarray | None = None,
    dtype: str = "float32",
) -> LightningInputs:
    """Standard normal inputs of one shape; H is the number of decays."""
    rng = np.random.default_rng(seed)
    heads = len(decay)

    def normal(*shape: int, dtype: str = dtype) -> np.ndarray:
        return rng.standard_normal(shape).astype(jnp.dtype(dtype))

    keys, values = (batch, length, heads, key_dim), (batch, length, heads, value_dim)
    state = (batch, heads, key_dim, value_dim)
    return LightningInputs(
        q=normal(*keys),
        k=normal(*keys),
        v=normal(*values),
        decay=np.array(decay, np.float32),
        segment_ids=segment_ids,
        initial_state=normal(*state, dtype="float32"),
        d_out=normal(*values),
        d_state=normal(*state, dtype="float32"),
    )


class LightningResults(NamedTuple):
    """Results of `lightning_attention` and the gradients of <out, d_out> + <state, d_state>."""

    out: np.ndarray
    state: np.ndarray
    d_q: np.ndarray
    d_k: np.ndarray
    d_v: np.ndarray
    d_initial_state: np.ndarray


def lightning_oracle(inputs: LightningInputs) -> LightningResults:
    """Lightning attention and its gradients by the recurrence, token by token in float64.

    With dS_t the cotangent of S_t, outputs after it included:

        dq_t = S_t do_t,    dS_t = q_t do_tᵀ + exp(-s) dS_{t+1},
        dk_t = dS_t v_t,    dv_t = dS_tᵀ k_t
    """
    q, k, v, d_out = (x.astype(np.float64) for x in (inputs.q, inputs.k, inputs.v, inputs.d_out))
    batch, length = q.shape[:2]
    ids = np.ones((batch, length), np.int64) if inputs.segment_ids is None else inputs.segment_ids
    keep = np.exp(-inputs.decay.astype(np.float64))[:, None, None]  # [H, 1, 1]
    out, d_q, d_k, d_v = (np.zeros_like(x) for x in (v, q, k, v))
    final, d_initial = (np.zeros(inputs.initial_state.shape) for _ in range(2))
    for b in range(batch):
        tokens = np.flatnonzero(ids[b])
        fresh = np.diff(ids[b, tokens], prepend=ids[b, tokens[:1]]) != 0
        state = inputs.initial_state[b].astype(np.float64)
        states = []
        for t, restarts in zip(tokens, fresh, strict=True):
            state = keep * (0 if restarts else 1) * state + k[b, t, :, :, None] * v[b, t, :, None]
            out[b, t] = np.einsum("hk,hkv->hv", q[b, t], state)
            states.append(state)
        final[b] = state
        d_state = inputs.d_state[b].astype(np.float64)
        for t, restarts in zip(tokens[::-1], fresh[::-1], strict=True):
            d_q[b, t] = np.einsum("hkv,hv->hk", states.pop(), d_out[b, t])
            d_state = d_state + q[b, t, :, :, None] * d_out[b, t, :, None]
            d_k[b, t] = np.einsum("hkv,hv->hk", d_state, v[b, t])
            d_v[b, t] = np.einsum("hkv,hk->hv", d_state, k[b, t])
            d_state = keep * (0 if restarts else 1) * d_state
        d_initial[b] = d_state
    return LightningResults(out, final, d_q, d_k, d_v, d_initial)


class GroupedInputs(NamedTuple):
    """Arguments of `grouped_matmul` and the cotangent of its result.

    lhs [M, K]; rhs [E, K, N]; group_sizes [E]; d_out [M, N].
    """

    lhs: np.ndarray
    rhs: np.ndarray
    group_sizes: np.ndarray
    d_out: np.ndarray


def grouped_inputs(
    seed: int,
    group_sizes: Sequence[int],
    *,
    rows: int | None = None,
    inner: int = 24,
    columns: int = 16,
    dtype: str = "float32",
) -> GroupedInputs:
    """Standard normal inputs; `rows` beyond the sum of the sizes belong to no group."""
    rng = np.random.default_rng(seed)
    rows = sum(group_sizes) if rows is None else rows
    shapes = (rows, inner), (len(group_sizes), inner, columns), (rows, columns)
    lhs, rhs, d_out = (rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)
    return GroupedInputs(lhs, rhs, np.array(group_sizes, np.int32), d_out)


class GroupedResults(NamedTuple):
    """The result of `grouped_matmul` and the gradients of <out, d_out>."""

    out: np.ndarray
    d_lhs: np.ndarray
    d_rhs: np.ndarray


def grouped_oracle(inputs: GroupedInputs) -> GroupedResults:
    """Each group's rows times its own matrix, in float64."""
    lhs, rhs, d_out = (x.astype(np.float64) for x in (inputs.lhs, inputs.rhs, inputs.d_out))
    out, d_lhs, d_rhs = np.zeros_like(d_out), np.zeros_like(lhs), np.zeros_like(rhs)
    stop = 0
    for e, size in enumerate(inputs.group_sizes):
        rows = slice(stop, stop := stop + int(size))
        out[rows] = lhs[rows] @ rhs[e]
        d_lhs[rows] = d_out[rows] @ rhs[e].T
        d_rhs[e] = lhs[rows].T @ d_out[rows]
    return GroupedResults(out, d_lhs, d_rhs)


class SwigluResults(NamedTuple):
    """The result of `grouped_swiglu` and the gradients of <out, d_out>."""

    out: np.ndarray
    d_lhs: np.ndarray
    d_w1: np.ndarray
    d_w3: np.ndarray


def swiglu_oracle(inputs: GroupedInputs, w3: np.ndarray) -> SwigluResults:
    """silu(lhs rhs) (lhs w3) of each group, in float64; rhs is w1."""
    h1, h3 = (grouped_oracle(inputs._replace(rhs=w)).out for w in (inputs.rhs, w3))
    share = 1 / (1 + np.exp(-h1))
    d_out = inputs.d_out.astype(np.float64)
    d_h1 = d_out * h3 * share * (1 + h1 * (1 - share))
    d_h3 = d_out * h1 * share
    gate = grouped_oracle(inputs._replace(d_out=d_h1))
    gated = grouped_oracle(inputs._replace(rhs=w3, d_out=d_h3))
    return SwigluResults(h1 * share * h3, gate.d_lhs + gated.d_lhs, gate.d_rhs, gated.d_rhs)


def tolerance(dtype: str, reduction_length: int) -> float:
    """Largest error against float64, as a share of the largest element of the result.

    A sum of n products in float32 is off by about sqrt(n) roundings of float32; its operands
    and its result carry a rounding of their own dtype each, which does not grow with n. Both come
    with a factor of 4, four standard deviations of the sum's random walk.
    """
    widest = float(jnp.finfo(dtype).eps)
    return 4 * (widest + float(np.finfo(np.float32).eps) * reduction_length**0.5)


def assert_close(
    actual: object, expected: np.ndarray, dtype: str, reduction_length: int, name: str = "result"
) -> None:
    """Asserts that a result is as close to its float64 oracle as its arithmetic allows.

    Args:
      actual: The result.
      expected: The oracle's, float64.
      dtype: Of the operands of the products.
      reduction_length: Terms that the longest sum in one element has.
      name: Of the result, for the message.

    Raises:
      AssertionError: shapes differ, a number is not finite, or an element is further away than
        `tolerance`; says which element, and both values.
    """
    got = np.asarray(actual).astype(np.float64)
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    error = np.abs(got - expected)
    bound = tolerance(dtype, reduction_length) * max(float(np.abs(expected).max(initial=0)), 1e-30)
    bad = ~(error <= bound)  # a NaN is bad
    if bad.any():
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), got.shape)
        raise AssertionError(
            f"{name}: {bad.sum()} of {bad.size} elements are off by more than {bound:.3g}; worst "
            f"at {tuple(map(int, worst))}: {got[worst]:.9g}, expected {expected[worst]:.9g}"
        )
