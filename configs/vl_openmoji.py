"""A small VL model learns to name emojis.

    npm pack openmoji@17.0.0
    python -m train.data.openmoji openmoji-17.0.0.tgz data/openmoji
    python -m train --config=configs/vl_openmoji.py --workdir=runs/openmoji

4,495 pictures of OpenMoji (CC BY-SA 4.0) with their names, of which 200 are held out: variants,
most of them in a colour of skin, whose thing is seen in training in another one. Tower, projector
and decoder start from nothing; an answer is right if it is the whole name.
runs/openmoji/pictures.html shows them.

Hardware and time: one H200, 7 minutes beside other jobs. Expected: at least 45% of the held-out
pictures named rightly to the letter (measured: 96 of 200); most of the others differ in the colour
of skin or in "man", "woman" and "person".
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The job."""
    config = ConfigDict()
    config.task = "sft"
    config.steps = 2000
    config.seed = 0
    config.remat = "layer"
    config.log_every = 50
    config.model = ConfigDict(
        {
            "preset": "tiny",
            "num_layers": 4,
            "layer_types": ("lightning", "lightning", "lightning", "softmax"),
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 32,
            "rotary_dim": 16,
            "vocab_size": 2048,
            # 36 patches a picture; its thumbnail is the same again.
            "vision": {
                "hidden_size": 192,
                "intermediate_size": 768,
                "num_layers": 6,
                "num_heads": 6,
                "image_size": 72,
                "patch_size": 12,
            },
        }
    )
    config.data = ConfigDict(
        {
            "source": "pictures",
            "paths": ("data/openmoji",),
            "sequence_length": 1024,
            "tiles_per_row": 24,
            "batch_size": 16,
        }
    )
    config.optimizer = ConfigDict(
        {"learning_rate": 1e-3, "warmup_steps": 50, "decay": "cosine", "weight_decay": 0.05}
    )
    config.cispo = ConfigDict({"eval_problems": 200})
    config.checkpoint = ConfigDict({"every": 500, "export": "hf"})
    return config
