"""Text out of a model."""

from mmjax.engine.generate import Completions, generate
from mmjax.engine.sampling import SamplingParams

__all__ = ["Completions", "SamplingParams", "generate"]
