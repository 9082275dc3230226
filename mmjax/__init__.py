"""MiniMax-01 and MiniMax-M1 in JAX."""

from mmjax.cache import HybridCache
from mmjax.config import ModelConfig
from mmjax.convert import CheckpointError, load, save
from mmjax.engine import Engine, RequestError, SamplingParams
from mmjax.model import Decoder
from mmjax.tokenizer import Tokenizer

__all__ = [
    "CheckpointError",
    "Decoder",
    "Engine",
    "HybridCache",
    "ModelConfig",
    "RequestError",
    "SamplingParams",
    "Tokenizer",
    "load",
    "save",
]
