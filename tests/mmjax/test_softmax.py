"""Softmax attention, dense and in blocks, against float64; forward and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.testing import assert_close
from mmjax.layers import softmax

HEADS, GROUPS, DIM = 4, 2, 8
FORMS = {"dense": 1 << 40, "blocked": 0}
# As users compile it. One token's gradient in q is the difference of two equal sums, and zero only
# where both are taken alike.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@functools.cache
def _program(form):
    """Output and gradients of <out, d_out>; traced while `form` is in force."""

    @functools.partial(jax.jit, compiler_options=OPTIMISED)
    def run(q, k, v, index, segments, d_out):
        query, key = (None, None) if segments is None else segments

        def attend(q, k, v):
            return softmax.softmax_attention(q, k, v, index, query_segments=query, key_segments=key)

        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    return run


def oracle(q, k, v, index, segments, d_out):
    """The same in numpy, float64."""
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    repeat = HEADS // GROUPS
    wide_k, wide_v = k.repeat(repeat, 2), v.repeat(repeat, 2)
    mask = np.arange(k.shape[1])[None, None] <= index[:, :, None]
    if segments is not None:
        mask = mask & (segments[0][:, :, None] == segments[1][:, None])
    scale = DIM**-0.5
    scores = np.where(mask[:, None], np.einsum("bthk,bshk->bhts", q, wide_k) * scale, -np.inf)
    top = np.where(mask.any(-1)[:, None, :, None], scores.max(-1, keepdims=True), 0)
    weights = np.exp(scores - top)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bhts,bshk->bthk", weights, wide_v)
    d_weights = np.einsum("bthk,bshk->bhts", d_out, wide_v)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) * scale

    def by_group(x):
        return x.reshape(*x.shape[:2], GROUPS, repeat, DIM).sum(3)

    d_q = np.einsum("bhts,bshk->bthk", d_scores, wide_k)
    d_k = by_group(np.einsum("bhts,bthk->bshk", d_scores, q))
    d_v = by_group(np.einsum("bhts,bthk->bshk", weights, d_out))
    return out, d_q, d_k, d_v


def arrays(length, keys, dtype="float32"):
    rng = np.random.default_rng(length)

    def normal(count, heads):
        return rng.standard_normal((2, count, heads, DIM)).astype(jnp.dtype(dtype))

    return normal(length, HEADS), normal(keys, GROUPS), normal(keys, GROUPS), normal(length, HEADS)


@pytest.fixture(params=FORMS)
def check(request, monkeypatch):
    monkeypatch.setattr(softmax, "DENSE_SCORES", FORMS[request.param])

    def compare(length, keys, index, segments=None, dtype="float32"):
        q, k, v, d_out = arrays(length, keys, dtype)
        actual = _program(request.param)(q, k, v, index, segments, d_out)
        expected = oracle(q, k, v, index, segments, d_out)
        terms = max(length, keys) * DIM
        for name, got, want in zip(("out", "d_q", "d_k", "d_v"), actual, expected, strict=True):
            assert_close(got, want, dtype, terms, name)

    return compare


def _causal(length):
    return np.tile(np.arange(length, dtype=np.int32), (2, 1))


@pytest.mark.parametrize("length", [1, 511, 513, 1100])
def test_causal(check, length):
    check(length, length, _causal(length))


def test_segments_and_padding(check):
    segments = np.ones((2, 700), np.int32)
    segments[0, :30], segments[0, 300:] = 0, 2  # padding first, then two documents
    segments[1, 10:600], segments[1, 600:] = 5, 0
    index = np.where(segments != 0, _causal(700), -1).astype(np.int32)
    check(700, 700, index, (segments, segments))


def test_rows_that_see_nothing(check):
    index = np.full((2, 65), -1, np.int32)
    index[1] = np.arange(65)
    check(65, 65, index)


def test_queries_of_a_chunk_over_a_longer_cache(check):
    index = np.stack([np.arange(600, 633), np.arange(33)]).astype(np.int32)
    check(33, 900, index)


def test_bfloat16(check):
    check(700, 700, _causal(700), dtype="bfloat16")


@pytest.mark.parametrize("packed", [False, True])
def test_queries_sum_their_powers_directly_where_their_length_allows(packed, monkeypatch):
    """Of three blocks of queries the second is too long for it; forward alone, as in inference."""
    monkeypatch.setattr(softmax, "DENSE_SCORES", 0)
    q, k, v, d_out = arrays(1100, 1100)
    q[:, 512:1024] *= 100
    index, segments = _causal(1100), None
    if packed:
        segments = np.full((2, 1100), 3, np.int32)
        segments[0, :30], segments[0, 700:], segments[1, 1050:] = 0, 4, 0
        index = np.where(segments != 0, index, -1).astype(np.int32)
        segments = (jnp.asarray(segments),) * 2
    query, key = segments or (None, None)
    sees = {"query_segments": query, "key_segments": key}
    exact = oracle(q, k, v, index, segments, d_out)[0]
    out = jax.jit(softmax.softmax_attention)(q, k, v, index, **sees)
    assert_close(out, exact, "float32", 1100 * DIM, "out")

    direct = softmax._direct
    poison = functools.partial(jax.tree.map, lambda x: x * jnp.nan)
    monkeypatch.setattr(softmax, "_direct", lambda *a: poison(direct(*a)))
    out = jax.jit(lambda *a: softmax.softmax_attention(*a, **sees))(q, k, v, index)
    poisoned = np.isnan(out).any((0, 2, 3))
    assert poisoned[::256].tolist() == [True, True, False, False, True]


def test_powers_of_two():
    x = np.linspace(-softmax.REACH, softmax.REACH, 100_001, dtype=np.float32)
    exact = np.exp2(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32))
    assert np.max(np.abs(jax.jit(softmax._exp2)(x) - exact) / ulp) <= 2


def test_both_forms_are_really_run(monkeypatch):
    """The shapes above are on both sides of the limit that chooses the form."""
    seen = []
    for name in ("_dense", "_blocked"):
        form = getattr(softmax, name)
        monkeypatch.setattr(softmax, name, lambda *a, n=name, f=form: seen.append(n) or f(*a))
    q, k, v, _ = map(jnp.asarray, arrays(8, 8))
    for limit in FORMS.values():
        monkeypatch.setattr(softmax, "DENSE_SCORES", limit)
        softmax.softmax_attention(q, k, v, jnp.asarray(_causal(8)))
    assert seen == ["_dense", "_blocked"]
