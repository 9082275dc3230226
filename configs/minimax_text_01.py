"""MiniMax-Text-01 from scratch: the first stage of its pre-training, at full size.

    mmjax plan --config configs/minimax_text_01.py --topology v5p:8x8x8
    python -m train --config=configs/minimax_text_01.py --workdir=runs/text01

456B parameters, of which 45.9B meet a token. Rows of 8,192 tokens, 16.8M tokens an update, AdamW
with bf16 moments, 2e-4 after 500 updates of warm-up; the paper doubles the batch at 69B tokens,
which is where this job ends. `data.paths` and `data.tokenizer` are yours to fill in.

Hardware and time: 512 chips of TPU v5p (v5p:8x8x8), counted, not run: docs/plan.md has the memory,
the roofline and the price. Expected: a loss that falls; nobody has run this configuration yet.

Source: MiniMax-01 (arXiv 2501.08313), section 4.2.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The job."""
    return ConfigDict(
        {
            "task": "pretrain",
            "steps": 4112,
            "remat": "super_block",
            "mesh": {"data": 16, "expert": 32},
            "model": {"preset": "minimax_text_01", "rope_theta": 1e4},
            "data": {
                "source": "text",
                "paths": ("data/pretrain/*.jsonl",),
                "tokenizer": "data/tokenizer",
                "sequence_length": 8192,
                "batch_size": 2048,
            },
            "optimizer": {
                "learning_rate": 2e-4,
                "warmup_steps": 500,
                "decay": "constant",
                "weight_decay": 0.1,
                # Text-01's; the default 1e-15 is M1's.
                "eps": 1e-8,
            },
            "checkpoint": {"every": 200, "keep": 3, "export": "hf"},
        }
    )
