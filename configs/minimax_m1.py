"""MiniMax-M1's continual pre-training on Text-01, and its reinforcement, at full size.

    mmjax plan --config configs/minimax_m1.py --topology v5p:8x8x8
    mmjax plan --config configs/minimax_m1.py --topology v6e:16x16 --job prefill
    mmjax plan --config configs/minimax_m1.py --topology v6e:16x16 --job decode
    python -m train --config=configs/minimax_m1.py --workdir=runs/m1
    python -m train --config=configs/minimax_m1.py:long --workdir=runs/m1_long
    python -m train --config=configs/minimax_m1.py:cispo --workdir=runs/m1_cispo

456B parameters, of which 45.9B meet a token. Continual pre-training on 7.5T tokens: AdamW with M1's
betas and eps, 8e-5 for 2.5T tokens, then decayed to 8e-6 over 5T. Rows of 8,192, 4.2M tokens an
update, the shape of the decay and bf16 moments are ours. The stage "long" grows the context from
32K to 1M in four steps, which is published; where they lie and how long each takes is ours. The
load-balancing loss weighs less than Text-01's, by how much is not published: set
`model.router_aux_loss_coef`. Starts from Text-01; `init_from` and `data` are yours to fill in.

The stage "cispo" has what the report gives of M1's reinforcement: AdamW's constants, 16 updates a
rollout batch, groups without a signal replaced, the length penalty, the halt after 3,000 tokens
likelier than 0.99, windows of 40K to 80K, no KL, no lower bound, rule-checked tasks first. What it
does not give is ours and marked so.

Hardware and time: 512 chips of TPU v5p (v5p:8x8x8), counted, not run: docs/plan.md has the memory,
the roofline and the price. Expected: a loss that goes on falling; nobody has run this
configuration yet.

Source: MiniMax-M1 report, sections 2.1, 3 and 4.
"""

from ml_collections import ConfigDict

B = 1_000_000_000


def get_config(stage: str = "pretrain") -> ConfigDict:
    """The job of one stage, "pretrain", "long" or "cispo"."""
    if stage not in ("pretrain", "long", "cispo"):
        raise ValueError(f"unknown stage {stage!r}; known: 'pretrain', 'long', 'cispo'")
    config = _pretrain()
    if stage == "long":
        config.update(_long())
    if stage == "cispo":
        del config.stages
        config.update(_cispo())
    return config


def _long() -> ConfigDict:
    """What differs in the growth of the context; all but its ends and the four steps is ours."""
    lengths = {"32K": 32768, "128K": 131072, "512K": 524288, "1M": 1048576}
    return ConfigDict(
        {
            "init_from": "runs/m1/model",
            "stages": tuple(
                {
                    "name": name,
                    "tokens": 20 * B,
                    "sequence_length": length,
                    "batch_size": 4194304 // length,
                }
                for name, length in lengths.items()
            ),
            "mesh": {"data": 1, "context": 128, "expert": 4},
            "data": {"paths": ("data/long/*.jsonl",)},
            "optimizer": {"learning_rate": 8e-6},
        }
    )


def _cispo() -> ConfigDict:
    """What differs from pre-training."""
    return ConfigDict(
        {
            "task": "cispo",
            "steps": 1000,  # ours
            # Four copies of the model sample, 128 chips each. Compiled ahead for v5p:8x8x8, an
            # update of rows of 90,112 tokens takes 58 GiB of a chip's 95: benchmarks/m1_update.py.
            "mesh": {"data": 4, "context": 2, "expert": 8, "model": 8},  # ours
            "init_from": "runs/m1/model",
            "data": {
                "source": "reasoning",
                # The published sets are not; these are families of theirs. docs/rewards.md.
                "tasks": (
                    "math(path='data/math/*.jsonl')",
                    "code(path='data/code/*.jsonl')",
                    "logic.game_of_24",
                    "logic.cryptarithm",
                    "judge.grade(path='data/general/*.jsonl')",
                ),
                "size": 250_000,
            },
            "cispo": {
                "prompts_per_batch": 512,  # ours
                "samples_per_prompt": 16,  # ours
                "updates_per_batch": 16,
                "max_prompt_tokens": 8192,  # ours
                "max_new_tokens": 81920,
                "is_weight_cap": 5.0,  # ours; only that it is tuned is published
                "length_buckets": 8,  # ours
                "eval_every": 50,  # ours
            },
            "sampling": {
                "rounds": 4,  # ours
                "slots": 512,  # ours
                # 10 GiB a chip, beside the sampler's weights, 13, and its states, 9.
                "kv_tokens": 2_097_152,  # ours
                "overlong_tokens": 4096,  # ours, DAPO's
                "repetition_tokens": 3000,
                "repetition_probability": 0.99,
                "windows": (40960, 49152, 57344, 65536, 73728, 81920),
            },
            # That general tasks come later is published, when is not.
            "curriculum": {"general_from": 200, "general_full": 400, "general_share": 0.15},
            "alerts": {
                "max_grad_norm": 10.0,
                "min_correlation": 0.98,
                "max_truncated": 0.5,
            },  # ours
            "optimizer": {
                "learning_rate": 1e-6,  # ours
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-15,
                "clip_norm": 1.0,  # ours
                "weight_decay": 0.1,  # ours
                "microbatches": 16,  # ours
            },
            "checkpoint": {"every": 10, "keep": 3, "export": "hf"},
        }
    )


def _pretrain() -> ConfigDict:
    return ConfigDict(
        {
            "task": "pretrain",
            "stages": (
                {"name": "constant", "tokens": 2500 * B},
                {
                    "name": "decay",
                    "tokens": 5000 * B,
                    "learning_rate": 8e-6,
                    "decay": "cosine",  # ours
                },
            ),
            "init_from": "runs/text01_long/model",
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
                "weight_decay": 0.1,
                "rounding": "stochastic",  # ours
            },
            "checkpoint": {"every": 200, "keep": 3, "export": "hf"},
        }
    )
