"""A thin gin overlay: `Section.field = value` lines onto the py-config's own sections."""

from __future__ import annotations

import dataclasses
import tokenize
from collections.abc import Sequence
from pathlib import Path

import gin
from ml_collections import ConfigDict

from mmjax.config import ConfigError, ModelConfig
from train.config import SECTIONS, JobConfig

_CONFIGURABLES = {"job": JobConfig, "model": ModelConfig, **SECTIONS}


def apply_gin(config: ConfigDict, files: Sequence[str], explicit: Sequence[str] = ()) -> None:
    """Writes the bindings of gin files into a py-config.

    A binding reads `optimizer.learning_rate = 3e-4`, `model.num_layers = 16` or
    `job.steps = 100`.

    Args:
      config: Changed in place.
      files: Paths, later ones win.
      explicit: Dotted keys set on the command line, which win over gin.

    Raises:
      ConfigError: a missing file, or a binding that gin does not accept.
    """
    for file in files:
        if not Path(file).is_file():
            raise ConfigError(f"gin file {file} does not exist")
    gin.clear_config()
    for name, section in _CONFIGURABLES.items():
        if name not in _registered:
            gin.external_configurable(section, name=name, module="mmjax")
            _registered.add(name)
    try:
        gin.parse_config_files_and_bindings(list(files), [], finalize_config=False)
    except (ValueError, SyntaxError, AttributeError, OSError, tokenize.TokenError) as error:
        raise ConfigError(f"gin: {error}") from None
    with config.unlocked(), config.ignore_type():  # `build` checks types, and says so kindly
        for name, section in _CONFIGURABLES.items():
            for field in dataclasses.fields(section):
                key = field.name if name == "job" else f"{name}.{field.name}"
                try:
                    bound = gin.query_parameter(f"mmjax.{name}.{field.name}")
                except ValueError:  # not bound
                    continue
                if key in explicit:
                    continue
                if name != "job" and name not in config:
                    config[name] = ConfigDict()
                target = config if name == "job" else config[name]
                target[field.name] = bound


_registered: set[str] = set()
