"""Text out of a model."""

from mmjax.engine.engine import Engine
from mmjax.engine.images import ImagePrompt
from mmjax.engine.results import Completion, EngineStats, Output, RequestError, TokenLogprob
from mmjax.engine.sampling import RepetitionHalt, SamplingParams

__all__ = [
    "Completion",
    "Engine",
    "EngineStats",
    "ImagePrompt",
    "Output",
    "RepetitionHalt",
    "RequestError",
    "SamplingParams",
    "TokenLogprob",
]
