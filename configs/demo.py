"""A tiny M1 learns to add, subtract and multiply with visible thinking.

    python -m train --config=configs/demo.py:sft --workdir=runs/demo/sft
    python -m train --config=configs/demo.py:cispo --workdir=runs/demo/cispo
"""

from ml_collections import ConfigDict


def get_config(stage: str = "cispo") -> ConfigDict:
    """The job of one stage, "sft" or "cispo"."""
    if stage not in ("sft", "cispo"):
        raise ValueError(f"unknown stage {stage!r}; known: 'sft', 'cispo'")
    config = ConfigDict()
    config.task = stage
    config.seed = 0
    config.remat = False
    config.model = ConfigDict({"preset": "tiny", "vocab_size": 384})
    config.data = ConfigDict(
        {
            "source": "reasoning",
            "tasks": ("chain_sum",),
            "size": 30000,
            "direct_share": 0.6,
            "sequence_length": 128,
            "batch_size": 16,
        }
    )
    config.cispo = ConfigDict({"max_prompt_tokens": 40, "max_new_tokens": 40})
    config.optimizer = ConfigDict({"weight_decay": 0.01, "clip_norm": 1.0})
    config.checkpoint = ConfigDict({"every": 50, "export": "hf"})
    if stage == "sft":
        config.steps = 200
        config.log_every = 10
        config.optimizer.learning_rate = 2e-3
        config.optimizer.warmup_steps = 20
    else:
        config.steps = 100
        config.init_from = "runs/demo/sft/model"
        config.optimizer.learning_rate = 3e-4
        config.optimizer.warmup_steps = 5
    return config
