"""ModelConfig: presets, the three kinds of config.json it reads, and what it refuses."""

import dataclasses
import inspect
import json
import math

import pytest

from mmjax.config import ConfigError, ModelConfig
from mmjax.convert.params import param_specs

# The released config.json of MiniMax-M1, but for names of code files.
RELEASED = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": ([0] * 7 + [1]) * 10,
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "minimax_m1",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 200064,
}
# What transformers 5.23 writes for the same model.
NATIVE = {
    "architectures": ["MiniMaxForCausalLM"],
    "attention_dropout": 0.0,
    "block_size": 256,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": None,
    "full_attn_alpha_factor": 3.5565588200778455,
    "full_attn_beta_factor": 1.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10,
    "linear_attn_alpha_factor": 3.5565588200778455,
    "linear_attn_beta_factor": 1.0,
    "max_position_embeddings": 10240000,
    "mlp_alpha_factor": 3.5565588200778455,
    "mlp_beta_factor": 1.0,
    "model_type": "minimax",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "rope_theta": 10000000,
        "rope_type": "default",
        "partial_rotary_factor": 0.5,
    },
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "vocab_size": 200064,
}


def without_extra(cfg):
    vision = cfg.vision and dataclasses.replace(cfg.vision, extra=())
    return dataclasses.replace(cfg, vision=vision, extra=())


@pytest.mark.parametrize("preset", ["minimax_text_01", "minimax_m1"])
def test_published_values(preset):
    cfg = getattr(ModelConfig, preset)()
    assert without_extra(ModelConfig.from_hf(RELEASED)) == cfg
    assert cfg.kinds == (("lightning",) * 7 + ("softmax",)) * 10
    assert cfg.period == 8
    # DeepNorm's alpha for 80 layers.
    assert cfg.lightning_alpha == pytest.approx((2 * 80) ** 0.25, rel=1e-15)


def test_published_parameter_count():
    specs = param_specs(ModelConfig.minimax_m1())
    assert sum(math.prod(spec.shape) for spec in specs.values()) == 456_089_655_296
    # The released index: gates in float32, the rest in bfloat16.
    size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs.values())
    assert size == 912_210_767_872


def test_vl_text_config():
    text = RELEASED | {"max_position_embeddings": 8192, "shared_intermediate_size": [0]}
    raw = {"model_type": "minimax_vl_01", "vision_config": {}, "text_config": text}
    cfg = ModelConfig.from_hf(raw)
    assert without_extra(cfg) == ModelConfig.minimax_vl_01()
    assert cfg.to_hf()["text_config"]["shared_intermediate_size"] == [0]


def test_golden_vl_text_config(golden):
    """The list-valued shared_intermediate_size of the VL files means no shared expert."""
    cfg = ModelConfig.from_hf(golden / "vl" / "tiny_two_images")
    assert cfg.shared_intermediate_size == 0
    assert cfg.kinds == ("lightning", "lightning", "softmax")


def test_native_keys():
    assert without_extra(ModelConfig.from_hf(NATIVE)) == ModelConfig.minimax_m1()


def test_native_rope_at_the_top_level():
    raw = {k: v for k, v in NATIVE.items() if k != "rope_parameters"}
    cfg = ModelConfig.from_hf(raw | {"rope_theta": 5e6, "rotary_dim": 32})
    assert (cfg.rope_theta, cfg.rotary_dim) == (5e6, 32)
    whole = ModelConfig.from_hf(raw | {"rope_theta": 5e6})
    assert whole.rotary_dim == 128


@pytest.mark.parametrize(("raw", "layout"), [(RELEASED, "hf"), (NATIVE, "hf-native")])
def test_same_layout_back_is_lossless(raw, layout):
    written = ModelConfig.from_hf(raw).to_hf(layout)
    assert {key: written[key] for key in raw} == raw


@pytest.mark.parametrize("layout", ["hf", "hf-native"])
@pytest.mark.parametrize(
    "cfg",
    [
        ModelConfig.minimax_m1(),
        ModelConfig.minimax_vl_01(),
        ModelConfig.tiny(),
        ModelConfig.tiny(
            num_layers=3,
            layer_types=("lightning", "softmax", "lightning"),
            lightning_alpha=1.7,
            softmax_beta=0.8,
            postnorm=False,
            tie_embeddings=True,
            shared_intermediate_size=64,
            shared_expert_mode="softmax",
            rotary_dim=6,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ],
    ids=["m1", "vl", "tiny", "unusual"],
)
def test_every_field_survives_json(cfg, layout):
    back = ModelConfig.from_hf(json.loads(json.dumps(cfg.to_hf(layout))))
    dtypes = {"dtype": cfg.dtype, "param_dtype": cfg.param_dtype}  # not config.json's business
    assert dataclasses.replace(without_extra(back), **dtypes) == cfg


def test_through_the_other_layout():
    cfg = ModelConfig.from_hf(RELEASED)
    native = ModelConfig.from_hf(cfg.to_hf("hf-native"))
    assert native.to_hf("hf-native")["model_type"] == "minimax"
    back = native.to_hf("hf")
    assert back["model_type"] == "minimax_m1"
    assert without_extra(ModelConfig.from_hf(back)) == without_extra(cfg)


def test_reads_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(RELEASED)
    assert ModelConfig.from_hf(str(tmp_path / "config.json")) == ModelConfig.from_hf(RELEASED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_type_list": [0] * 79 + [2]}, r"unknown attention type 2 in attn_type_list"),
        ({"attn_type_list": [0] * 79}, "layer_types names 79 layers, num_layers is 80"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling="),
        ({"quantization_config": {"bits": 8}}, "quantization_config="),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"shared_intermediate_size": [0, 5]}, r"shared_intermediate_size \[0, 5\] differs"),
        ({"shared_moe_mode": "relu"}, "shared_expert_mode 'relu'"),
        ({"num_key_value_heads": 7}, "num_heads 64 is no multiple of num_kv_heads 7"),
        ({"num_experts_per_tok": 33}, "33 exceeds num_experts 32"),
        ({"rotary_dim": 130}, "rotary_dim 130 must be even and at most head_dim 128"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"hidden_size": "6144"}, r"hidden_size '6144' \(expected int\)"),
        ({"postnorm": 1}, r"postnorm 1 \(expected bool\)"),
        ({"vocab_size": True}, r"vocab_size True \(expected int\)"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(RELEASED | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 80}, "unknown attention type 'sliding_attention'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": None}, "lacks rope_theta"),
    ],
)
def test_refuses_native(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(NATIVE | change)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_local_experts", "attn_type_list", "vocab_size"]
)
def test_missing_key(key):
    with pytest.raises(ConfigError, match=f"config.json lacks {key}"):
        ModelConfig.from_hf({k: v for k, v in RELEASED.items() if k != key})


def test_misspelt_required_key():
    raw = {("hiden_size" if key == "hidden_size" else key): v for key, v in RELEASED.items()}
    with pytest.raises(ConfigError, match="lacks hidden_size"):
        ModelConfig.from_hf(raw)


def test_unknown_layout():
    with pytest.raises(ConfigError, match="unknown config layout 'gguf'; known: 'hf', 'hf-native'"):
        inspect.unwrap(ModelConfig.to_hf)(ModelConfig.tiny(), "gguf")  # past the type checks


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), ("{", "is not valid JSON"), ("[]", "holds a list")],
)
def test_unreadable_file(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(tmp_path)


def test_unknown_kind_of_layer():
    with pytest.raises(ConfigError, match="unknown attention type 'linear' in layer_types"):
        ModelConfig.tiny(layer_types=("linear",) * 8)
