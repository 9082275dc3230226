"""Loss against compute on two CPU cores: softmax, lightning and hybrid attention at three sizes.

    python -m train.scaling --config=configs/scaling_cpu.py --workdir=runs/scaling

Byte-level models of four layers (hybrid: three lightning layers and a softmax) learn Python from
the standard library's top-level modules at a constant rate, and are evaluated on packages that they
never see. Each evaluation is a point; the lower envelope of a kind's points gives its law. Finished
runs are kept and stopped ones resumed.

Hardware and time: two CPU cores, about half an hour. Expected: docs/scaling.md has what was
measured.

Source: MiniMax-01 (arXiv 2501.08313), section on scaling laws, at a millionth of its compute.
"""

import sysconfig

from ml_collections import ConfigDict

_LIBRARY = sysconfig.get_paths()["stdlib"]


def get_config() -> ConfigDict:
    """The grid."""
    return ConfigDict(
        {
            "kinds": ("softmax", "lightning", "hybrid"),
            "every": 4,
            "sizes": {
                "16": {"hidden_size": 16, "intermediate_size": 32, "head_dim": 8, "rotary_dim": 4},
                "32": {"hidden_size": 32, "intermediate_size": 64},
                "64": {"hidden_size": 64, "intermediate_size": 128},
            },
            "job": {
                "task": "pretrain",
                "steps": 400,
                "log_every": 50,
                "model": {
                    "preset": "tiny",
                    "num_layers": 4,
                    "num_heads": 4,
                    "num_kv_heads": 2,
                    "head_dim": 16,
                    "num_experts": 4,
                    "vocab_size": 260,
                },
                "data": {
                    "source": "text",
                    "paths": (f"{_LIBRARY}/[a-h]*.py",),
                    "sequence_length": 256,
                    "batch_size": 8,
                },
                "optimizer": {"learning_rate": 3e-3, "warmup_steps": 20},
                "evaluation": {
                    "every": 40,
                    "lengths": (256,),
                    "rows": 128,
                    "paths": (f"{_LIBRARY}/email/*.py", f"{_LIBRARY}/json/*.py"),
                },
                "checkpoint": {"every": 100, "keep": 1},
            },
        }
    )
