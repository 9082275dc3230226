"""An update of MiniMax-M1's reinforcement at full size, compiled ahead for TPUs that are not here.

    python -m benchmarks.m1_update --topology v5p:8x8x8

Takes the stage "cispo" of configs/minimax_m1.py, compiles `train.cispo.cispo_step` on samples of
the longest window and prints what a chip holds: parameters and moments, and what the update takes
beside them. Needs libtpu (docs/plan.md) and some five minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.minimax_m1 import get_config
from mmjax.model import Decoder
from mmjax.plan import parse_topology
from mmjax.plan.ahead import described_devices
from mmjax.sharding import DEFAULT_RULES, make_mesh, param_shardings
from train.batches import Batch
from train.cispo import cispo_step
from train.config import build
from train.optimizer import make_optimizer
from train.state import TrainState, init_state


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--topology", default="v5p:8x8x8", help="chips, as in mmjax plan")
    args = parser.parse_args()
    cfg = build(get_config("cispo"))
    mesh = make_mesh(cfg.mesh, described_devices(parse_topology(args.topology)))
    rl, parts = cfg.cispo, cfg.optimizer.microbatches
    count = rl.samples_per_update
    batch = abstract_batch(mesh, count, rl.max_prompt_tokens, rl.max_new_tokens)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)

    def make() -> Decoder:
        return Decoder(cfg.model, rngs=nnx.Rngs(0), remat=cfg.remat)

    print(
        f"{count} samples of {batch.sequences.shape[1]} tokens, {parts} parts, {dict(mesh.shape)}"
    )
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        graphdef, state = abstract_state(make, optimizer, mesh)
        traced = cispo_step.trace(graphdef, optimizer, rl, state, batch, parts)
        memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    held, beside = (n / 2**30 for n in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
    seconds = time.perf_counter() - start
    print(f"{held:.1f} GiB a chip of parameters, moments and samples, {beside:.1f} beside them")
    print(f"compiled for {args.topology} in {seconds:.0f} s")


def abstract_state(
    make: Callable[[], Decoder], optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef[Decoder], TrainState]:
    """Structure and abstract state of a job on a mesh, its moments like their parameters."""
    graphdef, params = nnx.split(nnx.eval_shape(make))
    placed = jax.tree.leaves(param_shardings(params, mesh))
    where = {x.shape: s for x, s in zip(jax.tree.leaves(params), placed, strict=True)}
    whole = NamedSharding(mesh, PartitionSpec())
    state: TrainState = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where.get(x.shape, whole)),
        jax.eval_shape(lambda: init_state(make(), optimizer, 0)[1]),
    )
    return graphdef, state


def abstract_batch(mesh: Mesh, count: int, prompt: int, new: int) -> Batch[Any]:
    """The samples of an update, `count` of prompts of `prompt` tokens and `new` new ones."""
    rows = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES.batch))

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    def real(*shape: int) -> jax.ShapeDtypeStruct:
        return array(*shape, dtype=jnp.float32)

    return Batch(
        sequences=array(count, prompt + new),
        prompt_lengths=array(count),
        lengths=array(count),
        tokens=array(count, new),
        behaviour=real(count, new),
        anchor=real(count, new),
        mask=real(count, new),
        advantages=real(count),
    )


if __name__ == "__main__":
    main()
