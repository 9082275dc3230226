"""The shape of a model: `ModelConfig`, the published presets, and Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from mmjax.errors import ConfigError
from mmjax.vision.config import VisionConfig

__all__ = ["LIGHTNING", "SOFTMAX", "ConfigError", "ModelConfig"]

LIGHTNING = "lightning"
SOFTMAX = "softmax"
# MiniMax-01 puts one softmax layer after every seven lightning layers.
SUPER_BLOCK = 8

type Layout = Literal["hf", "hf-native"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of one MiniMax-01 / M1 decoder. Defaults are the published 456B model's.

    Source: MiniMax-01 (arXiv 2501.08313), section 2, and the released config.json files.

    Attributes:
      vocab_size: Rows of the embedding and of the LM head.
      hidden_size: D, width of the residual stream.
      intermediate_size: F, width of one expert.
      num_layers: L.
      num_heads: H, query heads, of both kinds of attention.
      num_kv_heads: G, key and value heads of softmax attention.
      head_dim: K; H·K need not equal D.
      num_experts: E.
      num_experts_per_token: Experts that each token visits.
      layer_types: "lightning" or "softmax" for each layer; None for a softmax layer every eighth.
      rotary_dim: Leading dimensions of each softmax head that RoPE turns.
      rope_theta: Base of the rotary frequencies.
      max_position_embeddings: Longest sequence in tokens.
      norm_eps: Epsilon of the layer norms (lightning's inner norm has its own, 1e-6).
      lightning_alpha, lightning_beta, softmax_alpha, softmax_beta, mlp_alpha, mlp_beta: Weights
        of the residual and of the sub-layer's output, by kind of sub-layer.
      postnorm: The residual is the normed tensor (as released); False for the un-normed one.
      tie_embeddings: The LM head is the embedding.
      shared_intermediate_size: Above zero, each layer has a shared expert (of width F, as in the
        original code, whatever this value).
      shared_expert_mode: How the shared expert's coefficient is squashed: "sigmoid" | "softmax".
      router_aux_loss_coef: Weight of the load-balancing loss.
      router_aux_loss_over: What is balanced: "model", experts over the tokens of all layers
        together, as in the released code, so that a layer may use few of its own; "layers", each
        layer's. It is the job's, like the next.
      expert_capacity_factor: In training each expert takes at most this many times its even share
        of a batch's token-slots, the first ones; 0 drops nothing. It is the job's, not the
        model's: config.json does not hold it.
      initializer_range: Standard deviation of the embedding at initialisation.
      bos_token_id, eos_token_id: Special ids, where the config names them.
      dtype: Of the activations.
      param_dtype: Of the parameters at initialisation; the router's are always float32.
      vision: The vision half, None for a model of text alone.
      extra: Keys of a foreign config.json that mean nothing here, as (key, JSON) pairs, so that
        writing the file back loses nothing.
    """

    vocab_size: int = 200064
    hidden_size: int = 6144
    intermediate_size: int = 9216
    num_layers: int = 80
    num_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 128
    num_experts: int = 32
    num_experts_per_token: int = 2
    layer_types: tuple[str, ...] | None = None
    rotary_dim: int = 64
    rope_theta: float = 1e7
    max_position_embeddings: int = 10240000
    norm_eps: float = 1e-5
    lightning_alpha: float = 3.5565588200778455
    lightning_beta: float = 1.0
    softmax_alpha: float = 3.5565588200778455
    softmax_beta: float = 1.0
    mlp_alpha: float = 3.5565588200778455
    mlp_beta: float = 1.0
    postnorm: bool = True
    tie_embeddings: bool = False
    shared_intermediate_size: int = 0
    shared_expert_mode: str = "sigmoid"
    router_aux_loss_coef: float = 0.001
    router_aux_loss_over: str = "model"
    expert_capacity_factor: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    dtype: str = "bfloat16"
    param_dtype: str = "bfloat16"
    vision: VisionConfig | None = None
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        types = self.layer_types
        if types is None:
            every = range(1, self.num_layers + 1)
            types = tuple(SOFTMAX if i % SUPER_BLOCK == 0 else LIGHTNING for i in every)
        object.__setattr__(self, "layer_types", tuple(types))
        self._check()

    def _check(self) -> None:
        problems = [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in [
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "num_experts",
                "num_experts_per_token",
                "max_position_embeddings",
            ]
            if getattr(self, name) < 1
        ]
        unknown = sorted(set(self.kinds) - {LIGHTNING, SOFTMAX})
        if unknown:
            problems.append(
                f"unknown attention type {', '.join(map(repr, unknown))} in layer_types; "
                f"known: {LIGHTNING!r}, {SOFTMAX!r}"
            )
        if len(self.kinds) != self.num_layers:
            problems.append(
                f"layer_types names {len(self.kinds)} layers, num_layers is {self.num_layers}"
            )
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            problems.append(
                f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.num_experts_per_token > self.num_experts:
            problems.append(
                f"num_experts_per_token {self.num_experts_per_token} exceeds "
                f"num_experts {self.num_experts}"
            )
        if self.router_aux_loss_over not in ("model", "layers"):
            problems.append(
                f"router_aux_loss_over must be 'model' or 'layers', "
                f"got {self.router_aux_loss_over!r}"
            )
        if not self.expert_capacity_factor >= 0:
            problems.append(
                f"expert_capacity_factor must be 0 (drop nothing) or above, "
                f"got {self.expert_capacity_factor}"
            )
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            problems.append(
                f"rotary_dim {self.rotary_dim} must be even and at most head_dim {self.head_dim}"
            )
        if self.shared_expert_mode not in ("sigmoid", "softmax"):
            problems.append(
                f"shared_expert_mode {self.shared_expert_mode!r} is not 'sigmoid' or 'softmax'"
            )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16", "float16"):
                problems.append(f"{name} {getattr(self, name)!r} is not float32, bfloat16, float16")
        if problems:
            raise ConfigError("model config: " + "; ".join(problems))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, never None."""
        assert self.layer_types is not None
        return self.layer_types

    @property
    def period(self) -> int:
        """Length of the shortest pattern that the layers repeat; L if they repeat none."""
        kinds = self.kinds
        return next(
            p
            for p in range(1, self.num_layers + 1)
            if self.num_layers % p == 0 and kinds == kinds[:p] * (self.num_layers // p)
        )

    @classmethod
    def minimax_text_01(cls, **overrides: Any) -> ModelConfig:
        """MiniMax-Text-01: 456B parameters, 45.9B active."""
        return cls(**overrides)

    @classmethod
    def minimax_m1(cls, **overrides: Any) -> ModelConfig:
        """MiniMax-M1, 40K and 80K: the architecture of Text-01."""
        return cls(**overrides)

    @classmethod
    def minimax_vl_01(cls, **overrides: Any) -> ModelConfig:
        """MiniMax-VL-01: Text-01 with 8,192 positions, and a vision tower in front."""
        values: dict[str, Any] = {"max_position_embeddings": 8192, "vision": VisionConfig()}
        return cls(**values | overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> ModelConfig:
        """About a million parameters with every code path: seven lightning layers and a softmax."""
        values: dict[str, Any] = {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_layers": 8,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 16,
            "num_experts": 4,
            "rotary_dim": 8,
            "rope_theta": 1e4,
            "max_position_embeddings": 1 << 20,
            "dtype": "float32",
            "param_dtype": "float32",
        } | overrides
        alpha = (2 * values["num_layers"]) ** 0.25  # DeepNorm's, as the papers use it
        for name in ("lightning_alpha", "softmax_alpha", "mlp_alpha"):
            values.setdefault(name, alpha)
        return cls(**values)

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> ModelConfig:
        """Reads a config.json: the released one, transformers' own, or VL's of both halves.

        Args:
          source: The parsed JSON, the file, or the folder that holds it.

        Raises:
          ConfigError: a key is missing, or asks for something this architecture has not.
        """
        raw = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
        vision = VisionConfig.from_hf(raw) if "vision_config" in raw else None
        if "text_config" in raw:
            raw = dict(raw["text_config"])
        native = "layer_types" in raw
        found, extra = _fields_from_hf(raw, _NATIVE if native else _RELEASED)
        found["layer_types"] = _layer_types(raw, native)
        if native:
            found |= _rope_from_native(raw, found)
        if "shared_intermediate_size" in found:
            found["shared_intermediate_size"] = _one_size(
                found["shared_intermediate_size"], found["num_layers"]
            )
            if found["shared_intermediate_size"] != raw["shared_intermediate_size"]:
                extra["shared_intermediate_size"] = raw["shared_intermediate_size"]
        _refuse_unsupported(raw)
        found = _typed(found)
        packed = tuple((key, json.dumps(value)) for key, value in extra.items())
        return cls(**found, vision=vision, extra=packed)

    def to_hf(self, layout: Layout = "hf") -> dict[str, Any]:
        """Writes a config.json back; `from_hf` of the result is this config.

        Args:
          layout: "hf" for the released keys, "hf-native" for those of transformers' own port.
        """
        if self.vision is not None:
            text = dataclasses.replace(self, vision=None)
            return self.vision.to_hf(text.to_hf(layout))
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = {key: json.loads(value) for key, value in self.extra}
        if layout == "hf":
            out = {key: fields[name] for key, name in _RELEASED.items()}
            out["attn_type_list"] = [int(kind == SOFTMAX) for kind in self.kinds]
            out["model_type"] = "minimax_m1"
            out["architectures"] = ["MiniMaxM1ForCausalLM"]
            out["hidden_act"] = "silu"
            drop = set(_NATIVE) | {"layer_types", "rope_parameters"}
        elif layout == "hf-native":
            out = {key: fields[name] for key, name in _NATIVE.items()}
            out["layer_types"] = [
                "full_attention" if kind == SOFTMAX else "linear_attention" for kind in self.kinds
            ]
            out["model_type"] = "minimax"
            out["architectures"] = ["MiniMaxForCausalLM"]
            out["hidden_act"] = "silu"
            out["block_size"] = 256
            out["rope_parameters"] = {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.rotary_dim / self.head_dim,
            }
            drop = set(_RELEASED) | {"attn_type_list", "auto_map"}
        else:
            raise ConfigError(f"unknown config layout {layout!r}; known: 'hf', 'hf-native'")
        identity = {"model_type", "architectures"}
        foreign = _is_native(extra) != (layout == "hf-native")
        kept = {
            key: value
            for key, value in extra.items()
            if (key not in drop or key in out) and not (foreign and key in identity)
        }
        return out | kept


# Released key -> field, and transformers' key -> field. Keys in neither are kept in `extra`.
_COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "postnorm": "postnorm",
    "rotary_dim": "rotary_dim",
    "shared_intermediate_size": "shared_intermediate_size",
    "shared_moe_mode": "shared_expert_mode",
}
_RELEASED = _COMMON | {
    "rope_theta": "rope_theta",
    "layernorm_linear_attention_alpha": "lightning_alpha",
    "layernorm_linear_attention_beta": "lightning_beta",
    "layernorm_full_attention_alpha": "softmax_alpha",
    "layernorm_full_attention_beta": "softmax_beta",
    "layernorm_mlp_alpha": "mlp_alpha",
    "layernorm_mlp_beta": "mlp_beta",
}
_NATIVE = _COMMON | {
    "linear_attn_alpha_factor": "lightning_alpha",
    "linear_attn_beta_factor": "lightning_beta",
    "full_attn_alpha_factor": "softmax_alpha",
    "full_attn_beta_factor": "softmax_beta",
    "mlp_alpha_factor": "mlp_alpha",
    "mlp_beta_factor": "mlp_beta",
}
# Keys without which a config.json says too little to build the model.
_REQUIRED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
]
# Architecture switches that no released model uses: key -> the values that mean "off".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "attention_dropout": (0, 0.0, None),
    "router_jitter_noise": (0, 0.0, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


def _read_json(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        parsed = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; a model folder holds a config.json") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{file} holds a {type(parsed).__name__}, expected an object")
    return parsed


def _fields_from_hf(
    raw: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    missing = [key for key in _REQUIRED if key not in raw]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    found = {field: raw[key] for key, field in names.items() if key in raw}
    extra = {k: v for k, v in raw.items() if k not in names and k not in ("attn_type_list",)}
    if found.get("shared_expert_mode") is None:
        found.pop("shared_expert_mode", None)
    return found, extra


def _layer_types(raw: Mapping[str, Any], native: bool) -> tuple[str, ...]:
    kinds: dict[Any, str]
    if native:
        key, kinds = "layer_types", {"linear_attention": LIGHTNING, "full_attention": SOFTMAX}
    else:
        key, kinds = "attn_type_list", {0: LIGHTNING, 1: SOFTMAX}
    if key not in raw:
        raise ConfigError(f"config.json lacks {key}, the attention type of each layer")
    values: Iterable[Any] = raw[key]
    unknown = sorted({repr(v) for v in values if v not in kinds})
    if unknown:
        raise ConfigError(
            f"config.json: unknown attention type {', '.join(unknown)} in {key}; "
            f"known: {', '.join(map(repr, kinds))}"
        )
    return tuple(kinds[v] for v in values)


def _rope_from_native(raw: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    # The base and the turned fraction stand at the top level in older files, in
    # rope_parameters in newer ones. A config that names neither turns the whole head.
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"config.json: rope_type {rope['rope_type']!r} is not supported, only 'default'"
        )
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        raise ConfigError("config.json lacks rope_theta, at the top level and in rope_parameters")
    factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    turned = found.get("rotary_dim")
    if turned is None:
        turned = int(found["head_dim"] * factor)
    return {"rope_theta": theta, "rotary_dim": turned}


def _one_size(value: Any, num_layers: int) -> int:
    """VL-01 writes `shared_intermediate_size` as a list."""
    if not isinstance(value, list):
        return int(value or 0)
    if not any(value):
        return 0
    if len(value) == num_layers and len(set(value)) == 1:
        return int(value[0])
    raise ConfigError(
        f"config.json: shared_intermediate_size {value} differs between layers; "
        "only one size for all layers is supported"
    )


def _typed(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in their own types: JSON writes a float without a point as it likes."""
    accepted: dict[str, set[type]] = {"int": {int}, "float": {int, float}, "bool": {bool}}
    types = {f.name: str(f.type) for f in dataclasses.fields(ModelConfig)}
    wrong = [
        f"{name} {value!r} (expected {types[name]})"
        for name, value in found.items()
        if types[name] in accepted and type(value) not in accepted[types[name]]
    ]
    if wrong:
        raise ConfigError("config.json has values of a wrong type: " + ", ".join(wrong))
    return {n: float(v) if types[n] == "float" else v for n, v in found.items()}


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    wrong = [
        f"{key}={raw[key]!r} (only {off[0]!r})"
        for key, off in _UNSUPPORTED.items()
        if key in raw and raw[key] not in off
    ]
    if wrong:
        raise ConfigError("config.json asks for what this model has not: " + ", ".join(wrong))


def _is_native(extra: Mapping[str, Any]) -> bool:
    return extra.get("model_type") == "minimax"
