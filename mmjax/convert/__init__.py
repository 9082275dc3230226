"""Checkpoints: released safetensors, transformers' own layout, Orbax."""

from mmjax.convert.api import convert, load, save
from mmjax.convert.errors import CheckpointError, CheckpointWarning

__all__ = ["CheckpointError", "CheckpointWarning", "convert", "load", "save"]
