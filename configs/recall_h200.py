"""Needles at four times the training length: a hybrid, and its softmax and lightning twins.

    python -m train --config=configs/recall_h200.py:hybrid --workdir=runs/recall/hybrid
    python -m train --config=configs/recall_h200.py:softmax --workdir=runs/recall/softmax
    python -m train --config=configs/recall_h200.py:lightning --workdir=runs/recall/lightning
    python -m train.evaluation --draw runs/recall/maps.png --trained 1024 \
      hybrid=runs/recall/hybrid/evaluation/step_00003200.json \
      softmax=runs/recall/softmax/evaluation/step_00003200.json \
      lightning=runs/recall/lightning/evaluation/step_00003200.json

Three models of the same width, depth and steps, about 19M parameters, differ in their attention
alone: seven lightning layers and a softmax as in the papers, eight softmax layers, eight lightning
layers. They learn needles, conversations and variables in samples of 128 to 1024 tokens and are
asked at 1, 2, 4 and 8 times that, at nine depths of the needle.

Hardware and time: one NVIDIA H200 for all three side by side (XLA_PYTHON_CLIENT_MEM_FRACTION=0.3
for each), 10 minutes at most. Expected: docs/evaluation.md has what was measured.
"""

from ml_collections import ConfigDict

_LAYERS = {
    "hybrid": ("lightning",) * 7 + ("softmax",),
    "softmax": ("softmax",) * 8,
    "lightning": ("lightning",) * 8,
}


def get_config(kind: str = "hybrid") -> ConfigDict:
    """The job of one of the three: "hybrid", "softmax" or "lightning"."""
    if kind not in _LAYERS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(map(repr, _LAYERS))}")
    return ConfigDict(
        {
            "task": "sft",
            "log_every": 50,
            # Copying is found sooner in short rows: of 256 tokens, the loss fell to 1.8 in as many
            # seconds in which rows of 1024 came to 2.8.
            "stages": (
                {"name": "short", "steps": 800, "sequence_length": 256, "batch_size": 128},
                {
                    "name": "long",
                    "steps": 2400,
                    "sequence_length": 1024,
                    "batch_size": 32,
                    "learning_rate": 2.5e-5,
                    "decay": "cosine",
                },
            ),
            "remat": "none",
            "model": {
                "preset": "tiny",
                "layer_types": _LAYERS[kind],
                "num_layers": 8,
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_heads": 4,
                "num_kv_heads": 4,
                "head_dim": 128,
                # As in the released models: half of a head does not turn, and of the half that
                # does, most turns by less than it does in training, however long the text.
                "rotary_dim": 64,
                "rope_theta": 1e7,
                "num_experts": 4,
                "dtype": "bfloat16",
                "param_dtype": "float32",
            },
            "data": {
                "source": "recall",
                "tasks": (
                    # Most of what there is to learn from: a value every eleven tokens.
                    "associative_recall",
                    "associative_recall",
                    "niah(digits=3)",
                    "niah(haystack='needles', digits=3)",
                    "niah(keys=8, queries=8, digits=3)",
                    "niah(keys=8, queries=8, haystack='needles', digits=3)",
                    "multi_round",
                    "variable_tracking(chains=2, hops=2, digits=3)",
                ),
                "sequence_length": 1024,
                "batch_size": 32,
            },
            "evaluation": {
                "every": 3200,
                "tasks": (
                    "niah(digits=3)",
                    "niah(keys=8, digits=3)",
                    "niah(haystack='needles', digits=3)",
                    "niah(keys=8, queries=4, digits=3)",
                    "multi_round",
                    "variable_tracking(chains=2, hops=2, digits=3)",
                ),
                "lengths": (1024, 2048, 4096, 8192),
                "depths": 9,
                "samples": 12,
            },
            "optimizer": {
                # At 2e-3 none of the three learns, at 2e-4 in twice the steps.
                "learning_rate": 5e-4,
                "warmup_steps": 100,
                "weight_decay": 0.01,
            },
            "checkpoint": {"every": 10_000, "keep": 1, "export": "hf"},
        }
    )
