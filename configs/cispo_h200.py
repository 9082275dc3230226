"""Several reasoning tasks with thinking on one H200: a warm-up, then CISPO with M1's rules.

    python -m train --config=configs/cispo_h200.py:sft --workdir=runs/cispo_h200/sft
    python -m train --config=configs/cispo_h200.py:cispo --workdir=runs/cispo_h200/cispo
    python -m train.report runs/cispo_h200/cispo

A 100M-parameter M1 in bfloat16 (seven lightning layers and a softmax, 8 experts of which 2 meet a
token) learns sums of six two-digit numbers, greatest common divisors, letter counts and products
from worked solutions, two thirds of them without thinking; then CISPO with 16 updates a rollout
batch, as M1 has it, finds out that thinking pays.

Hardware and time: one NVIDIA H200, about 3 minutes for the first job and 7 for the second.
Expected: held-out accuracy over the four tasks from 0.45 to 0.79 after 10 batches, two and a half
minutes of them with compiling, and 0.83 after 20 to 100 (benchmarks/results/rl_h200.md).
"""

from ml_collections import ConfigDict


def get_config(stage: str = "cispo") -> ConfigDict:
    """The job of one stage, "sft" or "cispo"."""
    if stage not in ("sft", "cispo"):
        raise ValueError(f"unknown stage {stage!r}; known: 'sft', 'cispo'")
    config = ConfigDict()
    config.task = stage
    config.remat = "none"
    config.model = ConfigDict(
        {
            "preset": "tiny",
            "num_layers": 8,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 128,
            "rotary_dim": 64,
            "num_experts": 8,
            "vocab_size": 512,
            "dtype": "bfloat16",
            # AdamW at 1e-5 moves weights by less than bfloat16 can hold.
            "param_dtype": "float32",
        }
    )
    config.data = ConfigDict(
        {
            "source": "reasoning",
            "tasks": (
                "chain_sum(min_terms=6, max_terms=6, min_digits=2, max_digits=2)",
                "gcd(max_value=999)",
                "letter_counting(min_words=6, max_words=12)",
                "products(min_digits=2, max_digits=3)",
            ),
            "size": 100_000,
            "direct_share": 0.65,
            "sequence_length": 1024,
            "batch_size": 32,
        }
    )
    config.cispo = ConfigDict(
        {
            "prompts_per_batch": 64,
            "samples_per_prompt": 16,
            "updates_per_batch": 16,
            "max_prompt_tokens": 160,
            "max_new_tokens": 320,
            "length_buckets": 2,
            "eval_problems": 512,
            "eval_every": 10,
        }
    )
    config.sampling = ConfigDict(
        {"rounds": 3, "slots": 1024, "overlong_tokens": 64, "overlong_penalty": 0.5}
    )
    config.curriculum = ConfigDict({"adaptive": True})
    config.alerts = ConfigDict({"min_entropy": 0.002, "min_correlation": 0.95})
    config.optimizer = ConfigDict({"weight_decay": 0.01, "decay": "cosine"})
    config.checkpoint = ConfigDict({"every": 200, "export": "hf"})
    if stage == "sft":
        config.steps = 2400
        config.log_every = 50
        config.optimizer.learning_rate = 1e-3
        config.optimizer.warmup_steps = 50
    else:
        config.steps = 120
        config.init_from = "runs/cispo_h200/sft/model"
        # With 16 updates a batch, 5e-5 finds less and loses some of it again.
        config.optimizer.learning_rate = 1e-5
        config.optimizer.warmup_steps = 32
        config.checkpoint.every = 40
    return config
