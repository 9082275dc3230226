"""The shape of the vision half: `VisionConfig`, and its keys in Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mmjax.errors import ConfigError

# Tiles of width and height of the released resolutions, as (height, widths).
_GRIDS = ((1, 6), (2, 6), (3, 6), (4, 4), (5, 3), (6, 3))


def pinpoints(tile: int) -> tuple[tuple[int, int], ...]:
    """The 28 resolutions (height, width) that images are fitted to, of tiles of this side.

    Source: config.json of MiniMax-VL-01, `image_grid_pinpoints`.
    """
    return tuple((h * tile, w * tile) for h, most in _GRIDS for w in range(1, most + 1))


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Vision tower, projector and tiling. Defaults are MiniMax-VL-01's.

    Source: MiniMax-01 (arXiv 2501.08313), section 3; the released config.json.

    Attributes:
      hidden_size: W, width of the tower.
      intermediate_size: Of its MLPs.
      num_layers: Of the tower.
      num_heads: Of the tower; they divide W.
      image_size: Side of a tile in pixels.
      patch_size: Side of a patch in pixels; it divides the tile.
      norm_eps: Epsilon of the tower's layer norms.
      resolutions: (height, width) that images are fitted to; empty for the 28 of `pinpoints`.
      image_token_id: The token that stands for an image, once in a prompt, and for each of its
        features in what the model sees.
      extra: Keys of a foreign config.json that mean nothing here, as (key, JSON) pairs: the
        model's own, then those of `vision_config` after "vision_config.".
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    norm_eps: float = 1e-5
    resolutions: tuple[tuple[int, int], ...] = ()
    image_token_id: int = 200025
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        sizes = self.resolutions or pinpoints(self.image_size)
        object.__setattr__(self, "resolutions", tuple((int(h), int(w)) for h, w in sizes))
        problems = [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in (*_FIELDS.values(), "image_size", "patch_size")
            if not getattr(self, name) > 0
        ]
        if not problems and self.hidden_size % self.num_heads:
            problems.append(f"hidden_size {self.hidden_size} is no multiple of {self.num_heads}")
        if not problems and self.image_size % self.patch_size:
            problems.append(f"image_size {self.image_size} is no multiple of {self.patch_size}")
        if not problems:
            wrong = [
                s for s in self.resolutions if s[0] % self.image_size or s[1] % self.image_size
            ]
            problems += [
                f"resolution {s} is no multiple of tiles of {self.image_size}" for s in wrong
            ]
        if problems:
            raise ConfigError("vision config: " + "; ".join(problems))

    @property
    def grid(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Features of a tile."""
        return self.grid**2

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> VisionConfig:
        """Reads the vision half of a VL config.json.

        Raises:
          ConfigError: it asks for something that this architecture has not.
        """
        vision = dict(raw["vision_config"])
        _refuse(raw, _TOP, "")
        _refuse(vision, _INNER, "vision_config.")
        values: dict[str, Any] = {
            name: vision[key] for key, name in _FIELDS.items() if key in vision
        }
        values["resolutions"] = tuple(map(tuple, raw.get("image_grid_pinpoints") or ()))
        if "image_token_index" in raw or "image_token_id" in raw:
            values["image_token_id"] = raw.get("image_token_index", raw.get("image_token_id"))
        outer = {k: v for k, v in raw.items() if k not in _OWN}
        inner = {f"vision_config.{k}": v for k, v in vision.items() if k not in _FIELDS}
        extra = tuple((key, json.dumps(value)) for key, value in (outer | inner).items())
        return cls(**values, extra=extra)

    def to_hf(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """The whole VL config.json around its `text_config`."""
        extra = {key: json.loads(value) for key, value in self.extra}
        prefix = "vision_config."
        inner = {k.removeprefix(prefix): v for k, v in extra.items() if k.startswith(prefix)}
        outer = {k: v for k, v in extra.items() if not k.startswith(prefix)}
        vision = {key: getattr(self, name) for key, name in _FIELDS.items()}
        return {
            "architectures": ["MiniMaxVL01ForConditionalGeneration"],
            "model_type": "minimax_vl_01",
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "image_seq_length": self.patches,
            **outer,
            "image_grid_pinpoints": [list(size) for size in self.resolutions],
            "image_token_index": self.image_token_id,
            "text_config": dict(text),
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_act": "gelu",
                "num_channels": 3,
                **inner,
                **vision,
            },
        }


# Key of vision_config -> field.
_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "norm_eps",
}
# Top-level keys that have a place of their own.
_OWN = {
    "text_config",
    "vision_config",
    "image_grid_pinpoints",
    "image_token_index",
    "image_token_id",
}
# Switches that the released model sets so: key -> the values that mean what is built here.
_TOP: dict[str, tuple[Any, ...]] = {
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_layer": (-1,),
    "vision_feature_select_strategy": ("default",),
}
_INNER: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "num_channels": (3,),
    "attention_dropout": (0, 0.0),
}


def _refuse(raw: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]], where: str) -> None:
    wrong = [
        f"{where}{key}={raw[key]!r} (only {values[0]!r})"
        for key, values in known.items()
        if key in raw and raw[key] not in values
    ]
    if wrong:
        raise ConfigError("config.json asks for what this model has not: " + ", ".join(wrong))
