"""A small hybrid learns to write Python from the standard library's source: nothing to download.

    python -m train.data.preview --config=configs/stdlib_cpu.py
    python -m train --config=configs/stdlib_cpu.py --workdir=runs/stdlib

The tokenizer, 4,096 ids, is trained on the same files at the start.

Hardware and time: two CPU cores, some minutes. Expected: a loss that falls from ln 4096 = 8.3 to
below 5.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The job."""
    return ConfigDict(
        {
            "task": "pretrain",
            "steps": 400,
            "log_every": 10,
            "remat": "layer",
            "model": {
                "preset": "tiny",
                "num_layers": 4,
                "layer_types": ("lightning", "lightning", "lightning", "softmax"),
                "hidden_size": 128,
                "vocab_size": 4096,
            },
            "data": {
                "mixture": ({"name": "stdlib", "format": "stdlib"},),
                "sequence_length": 512,
                "batch_size": 8,
            },
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 20, "decay": "cosine"},
            "checkpoint": {"every": 100},
        }
    )
