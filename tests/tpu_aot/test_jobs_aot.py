"""The updates of jobs and the engine's programs, compiled for TPUs that are not here."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.m1_update import abstract_batch, abstract_state
from mmjax.engine import programs
from mmjax.engine.sampling import Wanted
from mmjax.model import Decoder
from mmjax.plan import parse_topology
from mmjax.plan.ahead import described_devices
from mmjax.sharding import DEFAULT_RULES, SERVING_RULES, make_mesh, param_shardings
from tests.tpu_aot.programs import NEEDS_COMPILER, SMALL
from train.cispo import cispo_step
from train.cispo_config import CispoConfig
from train.config import DpoConfig, OptimizerConfig
from train.dpo import dpo_step
from train.optimizer import make_optimizer
from train.step import language_step

pytestmark = NEEDS_COMPILER
ONE, SPREAD = ("v5e:1x1", {}), ("v5e:2x4", {"data": 2, "expert": 2, "model": 2})
LONG = ("v5p:2x2x2", {"data": 2, "context": 2, "model": 2})
B, T = 8, 256  # packed rows; with two microbatches as many as the batch axes of any mesh here
R, PROMPT, NEW, PAIRS = 16, 24, 40, 3
OPTIMIZER = make_optimizer(OptimizerConfig(rounding="stochastic", warmup_steps=10), 100)


def mesh_of(topology, sizes):
    return make_mesh(sizes or {"data": 1}, described_devices(parse_topology(topology)))


def like(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def compile_for_tpu(function, *args, **kwargs):
    """Lowers and compiles; returns the lowered text and what the compiler says of memory."""
    lowered = function.trace(*args, **kwargs).lower(lowering_platforms=("tpu",))
    return lowered.as_text(), lowered.compile().memory_analysis()


def decoder():
    return Decoder(SMALL, rngs=nnx.Rngs(0), remat="layer")


def language(array):
    rows = {name: array(B, T) for name in ("tokens", "segment_ids", "positions")}
    return rows | {"loss_mask": array(B, T, dtype=jnp.float32)}


def update(kind, mesh):
    """An update's function, and its arguments but for the structure, the optimizer and the state:
    those before it, the batch, and keywords.
    """
    rows = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES.batch))

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    def real(*shape):
        return array(*shape, dtype=jnp.float32)

    if kind == "pretrain":
        return language_step, (), language(array), {"microbatches": 2}
    if kind == "dpo":
        rejected = {f"rejected_{name}": x for name, x in language(array).items()}
        batch = language(array) | rejected | {"reference": real(B, PAIRS, 2)}
        return dpo_step, (DpoConfig(),), batch, {}
    batch = abstract_batch(mesh, R, PROMPT, NEW)
    return cispo_step, (CispoConfig(samples_per_prompt=2),), batch, {"microbatches": 2}


@pytest.mark.parametrize(
    ("kind", "topology", "sizes"),
    [
        ("pretrain", *SPREAD),
        ("pretrain", *LONG),
        ("dpo", *ONE),
        ("cispo", *ONE),
        ("cispo", *SPREAD),
        ("cispo", *LONG),
    ],
)
def test_update(kind, topology, sizes):
    mesh = mesh_of(topology, sizes)
    step, config, batch, how = update(kind, mesh)
    with (
        jax.numpy_dtype_promotion("standard"),  # Optax multiplies floats by counts.
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    ):
        graphdef, state = abstract_state(decoder, OPTIMIZER, mesh)
        text, memory = compile_for_tpu(step, graphdef, OPTIMIZER, *config, state, batch, **how)
    for kernel in ("lightning_attention_dq", "lightning_attention_dkdv", "grouped_matmul_d_rhs"):
        assert kernel in text
    # The state's memory is used again; what else a device takes is its part of the batch.
    assert memory.alias_size_in_bytes > 0.95 * memory.argument_size_in_bytes


@pytest.mark.parametrize(
    ("topology", "sizes"), [ONE, SPREAD, ("v6e:2x2", {"expert": 2, "model": 2})]
)
def test_engine(topology, sizes):
    mesh = mesh_of(topology, sizes)
    whole = NamedSharding(mesh, PartitionSpec())

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        made = nnx.eval_shape(lambda: Decoder(SMALL, rngs=nnx.Rngs(0)).unstacked())
        graphdef, params = nnx.split(made)
        placed = jax.tree.map(like, params, param_shardings(params, mesh, SERVING_RULES))
        leaves, treedef = jax.tree.flatten(placed)
        shapes = jax.eval_shape(lambda: programs.Pools.create(SMALL, 64, 64, 8))
        heads = ("kv_heads", "kv_heads", "heads")
        specs = [DEFAULT_RULES.spec((None, None, name), of="cache") for name in heads]
        pools = programs.Pools(
            *(like(x, NamedSharding(mesh, s)) for x, s in zip(shapes, specs, strict=True))
        )
        calls = programs.compiled(graphdef, treedef)
        table, rows = array(4, 16), array(4, programs.ROW_WORDS)
        held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in pools)
        for call, args, kernel in (
            (
                calls.prefill,
                (array(1, T), array(1, 16), array(1, 3), array()),
                "lightning_attention",
            ),
            (calls.decode, (rows, table, array(), array(dtype=bool)), "lightning_attention_step"),
        ):
            wanted = {"wanted": Wanted.ANYTHING} if call is calls.decode else {}
            text, memory = compile_for_tpu(call, leaves, pools, *args, **wanted)
            assert kernel in text
            assert "grouped_matmul" in text
            assert memory.alias_size_in_bytes >= held  # Pools are written in place.
