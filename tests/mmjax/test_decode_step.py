"""The decode step that routes tokens in the kernel that norms them is the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.cache import PagedCache
from mmjax.engine.programs import Pools
from mmjax.layers import moe
from tests.mmjax.programs import random_model, small_config


@pytest.mark.parametrize("postnorm", [True, False])
def test_routing_with_the_norm_changes_nothing(monkeypatch, postnorm):
    cfg = small_config(hidden_size=32, intermediate_size=32, vocab_size=50, postnorm=postnorm)
    model = random_model(cfg)
    state = jax.random.normal(jax.random.key(0), Pools.create(cfg, 4, 8, 3).state.shape)
    pools = Pools.create(cfg, 4, 8, 3)._replace(state=state)
    length = jnp.array([3, 0, 6], jnp.int32)

    def step(_=None):
        table, slots = jnp.arange(3, dtype=jnp.int32)[:, None], jnp.array([0, -1, 2], jnp.int32)
        real = jnp.array([[1], [0], [1]], jnp.int32)
        cache = PagedCache(*pools, table, slots, length)
        tokens = jnp.array([[3], [0], [44]], jnp.int32)
        return jax.jit(lambda: model(tokens, segment_ids=real, cache=cache))()

    want = step()
    calls = []
    fused = moe.add_norm_route
    monkeypatch.setattr(moe, "why_not_fused", lambda *_: None)
    monkeypatch.setattr(moe, "add_norm_route", lambda *a, **k: calls.append(1) or fused(*a, **k))
    got = step()
    assert calls
    real = np.array([0, 2])
    np.testing.assert_allclose(got.logits[real], want.logits[real], rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        *((out.aux, out.cache.state, out.cache.keys) for out in (got, want)),
    )
