"""MiniMax-01 and MiniMax-M1 in JAX."""

from mmjax.cache import HybridCache
from mmjax.config import ModelConfig
from mmjax.convert import CheckpointError, load, save
from mmjax.engine import Engine, ImagePrompt, RequestError, SamplingParams
from mmjax.model import Decoder
from mmjax.tokenizer import Tokenizer
from mmjax.vision import Image, ImageError, VisionConfig, read_image

__all__ = [
    "CheckpointError",
    "Decoder",
    "Engine",
    "HybridCache",
    "Image",
    "ImageError",
    "ImagePrompt",
    "ModelConfig",
    "RequestError",
    "SamplingParams",
    "Tokenizer",
    "VisionConfig",
    "load",
    "read_image",
    "save",
]
