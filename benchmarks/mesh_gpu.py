"""One training step of a small M1 on one GPU, and on all GPUs of this machine along each mesh axis.

    python -m benchmarks.mesh_gpu

The model has M1's layer (7 lightning, 1 softmax, 128 a head, top-2 experts) at 2.0B parameters,
float32 weights and moments, bf16 activations; the step is `python -m train`'s own. Prints a
Markdown table: the step time, its ratio to one GPU's, the first step's time, compiling included,
and the loss of the first three steps.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from mmjax import Decoder, ModelConfig
from mmjax.sharding import DEFAULT_RULES, MESH_AXES, make_mesh, param_shardings
from train.config import OptimizerConfig
from train.optimizer import make_optimizer
from train.state import init_state
from train.step import language_step

WARM, TIMED = 3, 5


def model_config(layers: int) -> ModelConfig:
    """M1's layer, smaller in every direction but the heads'."""
    return ModelConfig.tiny(
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=4096,
        num_layers=layers,
        layer_types=("lightning",) * (layers - 1) + ("softmax",),
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rotary_dim=64,
        num_experts=8,
        dtype="bfloat16",
    )


def measure(
    cfg: ModelConfig, shape: dict[str, int], batch: int, length: int
) -> tuple[float, float, str]:
    """Median seconds of a step, seconds of the first, and the losses of the first ones."""
    devices = int(np.prod(list(shape.values())))
    mesh = make_mesh(shape, jax.devices()[:devices])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-4), 100)

    def make() -> Decoder:
        return Decoder(cfg, rngs=nnx.Rngs(0))

    graphdef, params = nnx.split(nnx.eval_shape(make))
    place = param_shardings(params, mesh)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, length)).astype(np.int32)
    packed = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        "loss_mask": np.ones(tokens.shape, np.float32),
    }
    rows = NamedSharding(mesh, DEFAULT_RULES.spec(("batch",), of="batch"))
    losses, times = [], []
    with jax.set_mesh(mesh):
        made = jax.jit(lambda: nnx.split(make())[1], out_shardings=place)()
        graphdef, state = init_state(nnx.merge(graphdef, made), optimizer, 0)
        data = {name: jax.device_put(x, rows) for name, x in packed.items()}
        for _ in range(WARM + TIMED):
            start = time.perf_counter()
            state, metrics = language_step(graphdef, optimizer, state, data)
            losses.append(float(metrics["loss"]))
            times.append(time.perf_counter() - start)
    told = ", ".join(f"{x:.4f}" for x in losses[:WARM])
    return statistics.median(times[WARM:]), times[0], told


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--axes", nargs="+", choices=MESH_AXES, default=MESH_AXES)
    args = parser.parse_args()
    cfg, count = model_config(args.layers), jax.device_count()
    print(f"{count} × {jax.devices()[0].device_kind}, jax {jax.__version__}; {args.batch} rows of")
    print(f"{args.length} tokens\n")
    print("| mesh | step, ms | one GPU / this | first step, s | loss of the first steps |")
    print("|---|---|---|---|---|")
    alone = 0.0
    for name, shape in [
        ("one GPU", {"data": 1}),
        *((f"{a}={count}", {a: count}) for a in args.axes),
    ]:
        seconds, first, losses = measure(cfg, shape, args.batch, args.length)
        alone = alone or seconds
        values = f"{seconds * 1e3:.1f} | {alone / seconds:.2f} | {first:.1f} | {losses}"
        print(f"| {name} | {values} |", flush=True)


if __name__ == "__main__":
    main()
