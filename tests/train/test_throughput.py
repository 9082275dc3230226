"""Counted FLOPs, and what a loop tells of its speed."""

import pytest

from mmjax.config import ModelConfig
from mmjax.plan.chips import chip_of
from train import throughput
from train.throughput import Throughput, model_flops


def test_flops_are_six_a_token_and_parameter_and_those_of_attention():
    """Products of 2 FLOPs a multiply, three passes; causal scores; 4 K a channel of lightning."""
    cfg = ModelConfig.tiny(num_layers=2, layer_types=("lightning", "softmax"))
    rows, length, d, wide, kv, f = 3, 64, 64, 4 * 16, 2 * 16, 128
    lightning = d * 5 * wide
    softmax = d * 2 * (wide + kv)
    experts = 2 * (d * 4 + 2 * 3 * d * f)
    products = 2 * (lightning + softmax + experts + d * 256)
    scores = 4 * wide * (length + 1) / 2 + 4 * wide * 16
    assert model_flops(cfg, rows, length) == 3 * rows * length * (products + scores)


KINDS = {
    "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA GH200 480GB": "h100",
    "NVIDIA GB200": "gb200",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v4": "v4",
    "TPU7x": "tpu7x",
}


@pytest.mark.parametrize("kind", KINDS)
def test_chip_of_a_device(kind):
    assert chip_of(kind).name == KINDS[kind]


def test_unknown_devices_have_no_peak():
    assert chip_of("cpu") is None


def test_speed_is_told_from_the_third_step_of_a_shape_on(monkeypatch):
    clock = iter([10.0, 60.0, 62.0, 66.0, 70.0, 90.0, 91.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    cfg = ModelConfig.tiny()
    speed = Throughput(2, "NVIDIA H200")
    assert speed.lap(cfg, 4, 64) == speed.lap(cfg, 4, 64) == {}
    flops = model_flops(cfg, 4, 64) / 2.0 / 2
    assert speed.lap(cfg, 4, 64) == {
        "seconds/step": 2.0,
        "tokens_per_second/train": 128.0,
        "tflops": flops / 1e12,
        "mfu": flops / 989e12,
    }
    assert speed.lap(cfg, 4, 64)["seconds/step"] == 4.0
    assert speed.lap(cfg, 8, 64) == speed.lap(cfg, 8, 64) == {}
    assert speed.lap(cfg, 8, 64)["tokens_per_second/train"] == 512.0


def test_speed_on_an_unknown_device_has_no_mfu():
    speed = Throughput(1, "cpu")
    for _ in range(3):
        told = speed.lap(ModelConfig.tiny(), 1, 64)
    assert set(told) == {"seconds/step", "tokens_per_second/train", "tflops"}
