"""The losses of one fixed small run, step by step, against tests/golden/train/loss.json.

A change in them is a change in what training does. Where it is meant, say why in the commit and
write the file anew:

    python -m tests.train.test_golden_loss
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax import Decoder, ModelConfig
from tests.train.programs import lenient
from train.config import OptimizerConfig
from train.optimizer import make_optimizer
from train.state import init_state
from train.step import language_step

FILE = Path(__file__).parents[1] / "golden" / "train" / "loss.json"
STEPS, ROWS, LENGTH = 25, 4, 48


def packed(step):
    """Two documents and padding a row; token t of a document is a line modulo 61."""
    place = np.arange(LENGTH)
    tokens, ids = np.zeros((2, ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        cut, end = 15 + 4 * row, LENGTH - 3 * row
        slope, start = 1 + (3 * step + row) % 5, (7 * step + 11 * row) % 61
        tokens[row] = (start + slope * place) % 61 + 1
        tokens[row, cut:] = (start + (slope + 2) * (place[cut:] - cut)) % 61 + 1
        ids[row] = np.where(place < cut, 1, np.where(place < end, 2, 0))
        tokens[row, end:] = 0
    positions = np.where(ids == 1, place[None], place[None] - 15 - 4 * np.arange(ROWS)[:, None])
    batch = {"tokens": tokens, "segment_ids": ids, "positions": np.where(ids > 0, positions, 0)}
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
    return batch | {"loss_mask": jnp.asarray(ids > 0, jnp.float32)}


def losses():
    """Of a hybrid with experts in float32: AdamW with warm-up and decay, two microbatches."""
    cfg = ModelConfig.tiny(
        num_layers=2,
        layer_types=("lightning", "softmax"),
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
    )
    optimizer = lenient(
        make_optimizer(
            OptimizerConfig(learning_rate=1e-2, warmup_steps=3, decay="cosine", z_loss=1e-3), STEPS
        )
    )
    graphs = []

    def make():
        model = Decoder(cfg, rngs=nnx.Rngs(0), remat="products")
        graphs.append(nnx.graphdef(model))
        return init_state(model, optimizer, 0)[1]

    state = jax.jit(make)()
    found = []
    for step in range(STEPS):
        state, metrics = language_step(
            graphs[0], optimizer, state, packed(step), microbatches=2, z_loss=1e-3
        )
        found.append([float(metrics[name]) for name in ("loss", "total_loss", "grad_norm")])
    return found


def test_losses_are_those_of_the_golden_file():
    """To 1e-4: steps multiply what another order of sums does to the last bit."""
    golden = json.loads(FILE.read_text())
    found = losses()
    assert found[-1][0] < 0.5 * found[0][0]
    np.testing.assert_allclose(found, golden, rtol=1e-4)


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("[\n" + ",\n".join(map(json.dumps, losses())) + "\n]\n")
