"""`python -m tests.mmjax.engine_process`: what an engine on all devices of a job draws, printed.

This may be one of several processes of it.
"""

import json

import jax
from flax import nnx

from mmjax import Engine, SamplingParams
from mmjax.sharding import make_mesh, param_shardings
from tests.mmjax.engines import SIZES, prompt, small_model
from tests.mmjax.programs import random_model
from train import distributed

# More pages than there are: some samples have to go to the host.
PROMPTS = [prompt(40), prompt(24, 1), prompt(40), prompt(7, 2), prompt(60, 3)]
PARAMS = [
    SamplingParams(40, 0.0, ignore_eos=True, logprobs=1),
    SamplingParams(48, seed=1, logprobs=0),
    SamplingParams(40, seed=2, n=2, logprobs=0, top_p=0.9),
    SamplingParams(60, seed=3, min_p=0.05, logprobs=2),
    SamplingParams(40, seed=4, logprobs=0),
]


def drawn(engine, params):
    return [
        [c.token_ids, c.finish_reason, [t.logprob for t in c.logprobs]]
        for c in engine.generate(PROMPTS, params)
    ]


def main():
    distributed.join()
    mesh = make_mesh({"expert": 2, "model": 2})

    def placed(model):
        structure, state = nnx.split(model)
        where = param_shardings(state, mesh)
        # Each process has drawn the same numbers, of which its devices take their parts.
        parts = jax.tree.map(
            lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__), state, where
        )
        return nnx.merge(structure, parts)

    engine = Engine(placed(small_model()), **SIZES)
    first = drawn(engine, PARAMS)
    engine.update(placed(random_model(engine.cfg, seed=1)))
    # Without a seed, of which all processes have to think alike.
    unseeded = [SamplingParams(40, logprobs=0)] * len(PROMPTS)
    told = {"first": first, "second": drawn(engine, PARAMS), "unseeded": drawn(engine, unseeded)}
    told["preemptions"] = engine.stats().preemptions
    print(json.dumps(told))


if __name__ == "__main__":
    main()
