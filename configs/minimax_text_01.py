"""MiniMax-Text-01 as the paper trained it, at full size: pre-training, long context, post-training.

    mmjax plan --config configs/minimax_text_01.py --topology v5p:8x8x8
    python -m train --config=configs/minimax_text_01.py --workdir=runs/text01
    python -m train --config=configs/minimax_text_01.py:long --workdir=runs/text01_long
    python -m train --config=configs/minimax_text_01.py:sft_short --workdir=runs/text01_sft_short
    python -m train --config=configs/minimax_text_01.py:sft_long --workdir=runs/text01_sft_long
    python -m train --config=configs/minimax_text_01.py:dpo_short --workdir=runs/text01_dpo_short
    python -m train --config=configs/minimax_text_01.py:dpo_long --workdir=runs/text01_dpo_long
    python -m train --config=configs/minimax_text_01.py:rl --workdir=runs/text01_rl

456B parameters, of which 45.9B meet a token. What the paper publishes stands as it is; what is ours
says so. `data` and `init_from` name files that are yours to fill in.

- "pretrain": rows of 8,192 tokens; batches of 16M tokens, doubled at 69B, 790B and 4.7T tokens;
  AdamW 0.9, 0.95, weight decay 0.1; 2e-4 after 500 updates of warm-up, 1.3e-4 from 7.2T on, decayed
  exponentially to 3e-5 over the last of 11.4T; RoPE base 10,000.
- "long": 128K (300B tokens, base 5M), 512K (32B, base 10M) and 1M (26B, base 10M), with documents
  of up to 32K, up to 128K and beyond at 30/70/0, 35/35/30 and 30/30/40 percent, the weights going
  linearly from stage to stage, and 10 percent of long questions and answers in the last fifth.
- "sft_short", "sft_long", "dpo_short", "dpo_long", "rl": the five stages of `POST_TRAINING`. Of the
  first four a batch is counted in rows of packed chats or pairs, which is our reading.

Hardware and time: 512 chips of TPU v5p (v5p:8x8x8), counted, not run: docs/plan.md has the memory,
the roofline and the price. Expected: a loss that falls; nobody has run these configurations yet.

Source: MiniMax-01 (arXiv 2501.08313), sections 4.2, 4.3 and 5.
"""

from ml_collections import ConfigDict

# Stage: method, sequence length, epochs, batch, learning rate at first and at last, decay.
POST_TRAINING = {
    "I": ("sft", 8192, 2, 128, 1e-5, 1e-6, "cosine"),
    "II": ("sft", 1032192, 2, 80, 3e-6, 3e-6, "constant"),
    "III": ("dpo", 8192, 1, 64, 5e-7, 5e-8, "cosine"),
    "IV": ("dpo", 1032192, 1, 64, 5e-7, 5e-7, "constant"),
    "V": ("grpo", 8192, 1, 512, 1e-6, 1e-7, "cosine"),
}
B = 1_000_000_000


def get_config(stage: str = "pretrain") -> ConfigDict:
    """The job of one stage."""
    made = {
        "pretrain": _pretrain,
        "long": _long,
        "sft_short": lambda: _sft("I", "runs/text01_long/model"),
        "sft_long": lambda: _sft("II", "runs/text01_sft_short/model"),
        "dpo_short": lambda: _dpo("III", "runs/text01_sft_long/model"),
        "dpo_long": lambda: _dpo("IV", "runs/text01_dpo_short/model"),
        "rl": _rl,
    }
    if stage not in made:
        raise ValueError(f"unknown stage {stage!r}; known: {', '.join(map(repr, made))}")
    return ConfigDict(made[stage]())


def _pretrain() -> dict:
    return {
        "task": "pretrain",
        "stages": (
            {"name": "16M", "tokens": 69 * B},
            {"name": "32M", "tokens": 721 * B, "batch_size": 4096},
            {"name": "64M", "tokens": 3910 * B, "batch_size": 8192},
            {"name": "128M", "tokens": 2500 * B, "batch_size": 16384},
            {"name": "lower", "tokens": 3200 * B, "learning_rate": 1.3e-4},
            {"name": "decay", "tokens": 1000 * B, "learning_rate": 3e-5, "decay": "exponential"},
        ),
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
        "optimizer": _optimizer(2e-4) | {"warmup_steps": 500},
        "checkpoint": {"every": 200, "keep": 3, "export": "hf"},
    }


def _optimizer(rate: float) -> dict:
    return {
        "learning_rate": rate,
        "weight_decay": 0.1,
        # Text-01's; the default 1e-15 is M1's.
        "eps": 1e-8,
        "rounding": "stochastic",  # ours; 2e-4 is less than half of bfloat16's last bit
    }


def _long() -> dict:
    stages: list[dict] = []
    for name, length, theta, tokens, shares, batch in (
        ("128K", 131072, 5e6, 300, (30, 70, 0), 1024),  # batches are ours: 134M tokens
        ("512K", 524288, 1e7, 32, (35, 35, 30), 256),
        ("1M", 1048576, 1e7, 26, (30, 30, 40), 128),
    ):
        lengths = dict(zip(("short", "medium", "long"), map(float, shares), strict=True))
        shape = {"sequence_length": length, "batch_size": batch, "rope_theta": theta}
        answers = {source: 0.9 * share for source, share in lengths.items()} | {"long_qa": 10.0}
        fifth = tokens * B // 5
        stages += [
            {"name": name, "tokens": 4 * fifth, "weights": lengths, "blend": bool(stages), **shape},
            {"name": f"{name} with answers", "tokens": fifth, "weights": answers, "blend": True},
        ]
    sources = ("short", "medium", "long", "long_qa")
    return _pretrain() | {
        "init_from": "runs/text01/model",
        "stages": tuple(stages),
        "mesh": {"context": 16, "expert": 32},  # ours
        "data": {
            "source": "text",
            "mixture": tuple({"name": s, "paths": (f"data/long/{s}/*.jsonl",)} for s in sources),
            "tokenizer": "data/tokenizer",
        },
        "optimizer": _optimizer(3e-5),  # ours: with which pre-training ends
    }


def _sft(stage: str, init_from: str) -> dict:
    _, length, _, batch, first, last, decay = POST_TRAINING[stage]
    context = 16 if length > 8192 else 1
    return {
        "task": "sft",
        "init_from": init_from,
        # Two epochs of data whose size is not published: the steps are ours.
        "stages": ({"name": stage, "steps": 2000, "learning_rate": last, "decay": decay},),
        "remat": "super_block",
        "mesh": {"data": 32 // context, "context": context, "expert": 16},  # ours
        "model": {"preset": "minimax_text_01"},
        "data": {
            "source": "text",
            "mixture": ({"name": "chats", "paths": ("data/sft/*.jsonl",), "kind": "chat"},),
            "sequence_length": length,
            "batch_size": batch,
        },
        "optimizer": _optimizer(first),
        "checkpoint": {"every": 200, "keep": 3, "export": "hf"},
    }


def _dpo(stage: str, init_from: str) -> dict:
    _, length, _, batch, first, last, decay = POST_TRAINING[stage]
    context = 16 if length > 8192 else 1
    return {
        "task": "dpo",
        "steps": 1000,  # ours: one epoch of data whose size is not published
        "init_from": init_from,
        "remat": "super_block",
        "mesh": {"data": 32 // context, "context": context, "expert": 16},  # ours
        "model": {"preset": "minimax_text_01"},
        "data": {
            "source": "text",
            "mixture": ({"name": "pairs", "paths": ("data/dpo/*.jsonl",), "kind": "preference"},),
            "sequence_length": length,
            "batch_size": batch,
        },
        "dpo": {"beta": 0.1},  # ours: the paper has none
        "optimizer": _optimizer(first) | {"decay": decay, "final_ratio": last / first},
        "checkpoint": {"every": 200, "keep": 3, "export": "hf"},
    }


def _rl() -> dict:
    _, _, _, batch, first, last, decay = POST_TRAINING["V"]
    return {
        "task": "cispo",
        "steps": 1000,  # ours
        "init_from": "runs/text01_dpo_long/model",
        "remat": "super_block",
        "model": {"preset": "minimax_text_01"},
        "data": {"source": "reasoning", "tasks": ("math(path='data/math/*.jsonl')",)},
        "cispo": {
            # The paper's GRPO drops tokens of a large ratio and a negative advantage, and adds a
            # KL term whose gradient is bounded; this is GRPO as first published.
            "algorithm": "grpo",
            "prompts_per_batch": 64,  # ours, with the next: 512 completions
            "samples_per_prompt": batch // 64,
            "updates_per_batch": 1,  # ours
            "max_prompt_tokens": 2048,  # ours, with the next: rows of 8,192
            "max_new_tokens": 6144,
        },
        "optimizer": _optimizer(first) | {"decay": decay, "final_ratio": last / first},
        "checkpoint": {"every": 50, "keep": 3, "export": "hf"},
    }
