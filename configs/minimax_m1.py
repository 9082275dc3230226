"""MiniMax-M1's continual pre-training on Text-01, at full size.

    mmjax plan --config configs/minimax_m1.py --topology v5p:8x8x8
    mmjax plan --config configs/minimax_m1.py --topology v6e:16x16 --job prefill
    mmjax plan --config configs/minimax_m1.py --topology v6e:16x16 --job decode
    python -m train --config=configs/minimax_m1.py --workdir=runs/m1

456B parameters, of which 45.9B meet a token. Rows of 8,192 tokens, 4.2M tokens an update, AdamW
with M1's betas and eps and with bf16 moments, 8e-5: the constant part of the schedule, 2.5T tokens.
The batch is not published. Starts from Text-01; `init_from`, `data.paths` and `data.tokenizer` are
yours to fill in.

Hardware and time: 512 chips of TPU v5p (v5p:8x8x8), counted, not run: docs/plan.md has the memory,
the roofline and the price. Expected: a loss that goes on falling; nobody has run this
configuration yet.

Source: MiniMax-M1 report, sections 2.1 and 3.2.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The job."""
    return ConfigDict(
        {
            "task": "pretrain",
            "steps": 596_000,
            "init_from": "runs/text01/model",
            "remat": "super_block",
            "mesh": {"data": 16, "expert": 32},
            "model": {"preset": "minimax_m1"},
            "data": {
                "source": "text",
                "paths": ("data/continual/*.jsonl",),
                "tokenizer": "data/tokenizer",
                "sequence_length": 8192,
                "batch_size": 512,
            },
            "optimizer": {
                "learning_rate": 8e-5,
                "decay": "constant",
                "weight_decay": 0.1,
            },
            "checkpoint": {"every": 200, "keep": 3, "export": "hf"},
        }
    )
