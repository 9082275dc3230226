"""Needles at four times the training length: a hybrid, and its softmax and lightning twins.

    python -m train --config=configs/recall_h200.py:hybrid --workdir=runs/recall/hybrid
    python -m train --config=configs/recall_h200.py:softmax --workdir=runs/recall/softmax
    python -m train --config=configs/recall_h200.py:lightning --workdir=runs/recall/lightning
    python -m train.evaluation --draw runs/recall/maps.png --trained 256 \
      hybrid=runs/recall/hybrid/evaluation/step_00003000.json \
      softmax=runs/recall/softmax/evaluation/step_00003000.json \
      lightning=runs/recall/lightning/evaluation/step_00003000.json
    python -m train --config=configs/recall_h200.py:hybrid_keys --workdir=runs/recall/hybrid_keys

Three models of the same width, depth and steps differ in their attention alone: a lightning layer
and a softmax one, two softmax layers, two lightning layers. They learn needles and pairs in samples
of 32 to 256 tokens and are asked at 1, 2, 4 and 8 times that, at nine depths of the needle. With
`_keys`, pairs are repeated in an order that nothing tells, and the hybrid learns to tell needles
apart.

Hardware and time: one NVIDIA H200 for all three side by side (XLA_PYTHON_CLIENT_MEM_FRACTION=0.3
for each), 10 minutes at most. Expected: docs/evaluation.md has what was measured.
"""

from ml_collections import ConfigDict

_LAYERS = {
    "hybrid": ("lightning", "softmax"),
    "softmax": ("softmax", "softmax"),
    "lightning": ("lightning", "lightning"),
}
# Few names and numbers, whose tokens a small model knows after some hundred steps: with 1,024 names
# and numbers of three digits none of the three learned to copy one in 3,200.
_WORDS = "digits=2, names=64"


# Of which most is to learn: a value every few tokens.
_PAIRS = {
    "": (f"associative_recall({_WORDS})",) * 2,
    "_keys": (f"shuffled_pairs({_WORDS})",) * 3,
}
_NEEDLES = (
    f"niah({_WORDS})",
    f"niah(keys=4, {_WORDS})",
    f"niah(keys=4, queries=4, {_WORDS})",
)


def get_config(kind: str = "hybrid") -> ConfigDict:
    """The job of one of the three: "hybrid", "softmax" or "lightning", or one with "_keys"."""
    known = [layers + pairs for pairs in _PAIRS for layers in _LAYERS]
    if kind not in known:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(map(repr, known))}")
    layers, keys, _ = kind.partition("_keys")
    return ConfigDict(
        {
            "task": "sft",
            "steps": 3000,
            "log_every": 50,
            "remat": "none",
            "model": {
                "preset": "tiny",
                "layer_types": _LAYERS[layers],
                "num_layers": 2,
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_heads": 8,
                "num_kv_heads": 8,
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
                "tasks": (*_PAIRS[keys], *_NEEDLES),
                "sequence_length": 256,
                "batch_size": 32,
            },
            "evaluation": {
                "every": 3000,
                "tasks": _NEEDLES,
                "lengths": (256, 512, 1024, 2048),
                "depths": 9,
                "samples": 12,
            },
            "optimizer": {
                "learning_rate": 7e-4,
                "warmup_steps": 100,
                "decay": "cosine",
                "weight_decay": 0.01,
            },
            "checkpoint": {"every": 10_000, "keep": 1, "export": "hf"},
        }
    )
