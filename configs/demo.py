"""A tiny M1 finds out that thinking before answering pays.

Two jobs on sums of five numbers from reasoning-gym's `chain_sum`:

    python -m train --config=configs/demo.py:sft --workdir=runs/demo/sft
    python -m train --config=configs/demo.py:cispo --workdir=runs/demo/cispo

The first fine-tunes a fresh model on solutions of which most answer at once and the others think
step by step; greedy decoding then mostly answers at once, and wrongly. The second reinforces it
with CISPO: reward is the verifier's verdict alone, and the thinking way wins.

`make demo` runs both and draws the curve. Hardware and time: two CPU cores, under ten minutes.
Expected: greedy accuracy on held-out problems below 0.6 after the first job, above 0.9 after the
second; benchmarks/results/demo_cpu.md has what was measured.
"""

from ml_collections import ConfigDict


def get_config(stage: str = "cispo") -> ConfigDict:
    """The job of one stage, "sft" or "cispo"."""
    if stage not in ("sft", "cispo"):
        raise ValueError(f"unknown stage {stage!r}; known: 'sft', 'cispo'")
    config = ConfigDict()
    config.task = stage
    config.seed = 0
    config.remat = "layer"
    config.model = ConfigDict(
        {
            "preset": "tiny",
            "num_layers": 2,
            "layer_types": ("lightning", "softmax"),
            "hidden_size": 96,
            "head_dim": 24,
            "rotary_dim": 12,
            "vocab_size": 384,
        }
    )
    config.data = ConfigDict(
        {
            "source": "reasoning",
            "tasks": ("chain_sum(min_terms=5, max_terms=5)",),
            "size": 30000,
            "direct_share": 0.65,
            "sequence_length": 128,
            "batch_size": 16,
        }
    )
    config.cispo = ConfigDict(
        {
            "prompts_per_batch": 32,
            "samples_per_prompt": 16,
            "updates_per_batch": 2,
            "max_prompt_tokens": 28,
            "max_new_tokens": 46,
            "eval_problems": 512,
            "eval_every": 10,
        }
    )
    config.optimizer = ConfigDict({"weight_decay": 0.01, "decay": "cosine"})
    config.checkpoint = ConfigDict({"every": 100, "export": "hf"})
    if stage == "sft":
        config.steps = 2000
        config.log_every = 50
        config.optimizer.learning_rate = 4e-3
        config.optimizer.warmup_steps = 20
    else:
        config.steps = 50
        config.init_from = "runs/demo/sft/model"
        config.optimizer.learning_rate = 2e-4
        config.optimizer.warmup_steps = 4
        config.checkpoint.every = 20
    return config
