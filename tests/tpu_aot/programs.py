"""What the tests that compile whole programs for TPUs share."""

import pytest

from mmjax.config import ModelConfig
from mmjax.plan.ahead import find_compiler

NEEDS_COMPILER = [
    pytest.mark.slow,
    pytest.mark.skipif(find_compiler() is None, reason="libtpu is for x86-64 Linux alone"),
]

SMALL = ModelConfig.tiny(
    hidden_size=256,
    intermediate_size=256,
    num_layers=2,
    layer_types=("lightning", "softmax"),
    head_dim=128,
    num_experts=2,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
