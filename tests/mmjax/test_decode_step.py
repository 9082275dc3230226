"""With fused projections, and on the kernels of a decode step, a model is the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.cache import PagedCache
from mmjax.config import LIGHTNING
from mmjax.engine.programs import Pools
from mmjax.layers import lightning, moe
from tests.mmjax.programs import random_model, small_config


@pytest.mark.parametrize("postnorm", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
def test_fused_projections_change_nothing(monkeypatch, postnorm, tokens):
    """One token of a row runs on the kernels' surfaces, here their references, more as ever."""
    cfg = small_config(hidden_size=32, intermediate_size=32, vocab_size=50, postnorm=postnorm)
    plain = random_model(cfg).unstacked()
    fused = plain.with_fused_projections()
    pools = Pools.create(cfg, 4, 16, 3)
    pools = pools._replace(state=jax.random.normal(jax.random.key(0), pools.state.shape))
    ids = jax.random.randint(jax.random.key(1), (3, tokens), 0, 50, jnp.int32)
    real = jnp.array([[1], [0], [1]], jnp.int32) * jnp.ones((3, tokens), jnp.int32)

    def run(model):
        table, slots = jnp.arange(3, dtype=jnp.int32)[:, None], jnp.array([0, -1, 2], jnp.int32)
        cache = PagedCache(*pools, table, slots, jnp.array([3, 0, 6], jnp.int32))
        return jax.jit(lambda: model(ids, segment_ids=real, cache=cache))()

    want = run(plain)
    calls = []
    monkeypatch.setattr(moe, "why_not_fused", lambda *_: None)
    for module, name in ((moe, "add_norm_route"), (lightning, "gated_lightning_step")):
        op = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, op=op, name=name, **k: calls.append(name) or op(*a, **k)
        )
    got = run(fused)
    kinds = cfg.kinds if tokens == 1 else ()
    assert calls.count("gated_lightning_step") == list(kinds).count(LIGHTNING)
    assert calls.count("add_norm_route") == len(kinds)
    rows = np.array([0, 2])
    np.testing.assert_allclose(got.logits[rows], want.logits[rows], rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        *((out.aux, out.cache.state, out.cache.keys) for out in (got, want)),
    )
