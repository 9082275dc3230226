"""The engine on a mesh of virtual devices."""

import jax
import numpy as np
from flax import nnx

from mmjax import Engine, SamplingParams
from mmjax.sharding import make_mesh, param_shardings
from tests.mmjax.engines import CFG, SIZES, prompt, small_engine, small_model
from tests.mmjax.programs import random_model

PROMPTS = [prompt(40), prompt(1, 1), prompt(40)]
PARAMS = [
    SamplingParams(8, 0.0, ignore_eos=True, logprobs=1),
    SamplingParams(8, seed=1, logprobs=0),
]
PARAMS.append(SamplingParams(8, seed=2, n=2, logprobs=0))


def on_mesh(model, sizes):
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(sizes, jax.devices()[:count])
    structure, state = nnx.split(model)
    return nnx.merge(structure, jax.device_put(state, param_shardings(state, mesh)))


def assert_alike(done, expected):
    for mine, other in zip(done, expected, strict=True):
        assert mine.token_ids == other.token_ids
        assert mine.cached_tokens == other.cached_tokens
        own, others = ([t.logprob for t in c.logprobs] for c in (mine, other))
        np.testing.assert_allclose(own, others, atol=2e-5)


def test_tokens_on_a_mesh_are_those_of_one_device():
    single = small_engine()
    single.update(small_model())
    engine = Engine(on_mesh(small_model(), {"expert": 2, "model": 2, "context": 2}), **SIZES)
    assert_alike(engine.generate(PROMPTS, PARAMS), single.generate(PROMPTS, PARAMS))
    # KV heads and heads are halved, nothing else is.
    pools = engine._memory.pools
    assert pools.keys.addressable_shards[0].data.shape[2] == CFG.num_kv_heads // 2
    assert pools.state.addressable_shards[0].data.shape[2] == CFG.num_heads // 2
    # From a trainer on one device to the engine's mesh.
    other = random_model(CFG, seed=1)
    for each in (engine, single):
        each.update(other)
    assert_alike(engine.generate(PROMPTS, PARAMS), single.generate(PROMPTS, PARAMS))
    single.update(small_model())
