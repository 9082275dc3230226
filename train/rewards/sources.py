"""From the name of a task to its problems and verifier."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from mmjax.config import ConfigError
from train.config import RewardsConfig
from train.data.sources import Source, parse_task

# Each opens `kind.name(...)`, and imports what it needs only then: some take seconds.
type Opener = Callable[[str, str, Mapping[str, Any], RewardsConfig], Source]


def open_source(task: str, rewards: RewardsConfig) -> Source:
    """The source of a task.

    Args:
      task: As `parse_task` reads it: math, code, judge.… , logic.… , or a reasoning-gym dataset.
      rewards: Where programs run, and who judges.

    Raises:
      ConfigError: an unknown task, or parameters that it does not take.
    """
    name, params = parse_task(task)
    kind, _, member = name.partition(".")
    opener = _OPENERS.get(kind, _gym)
    try:
        return opener(task, member if opener is not _gym else name, params, rewards)
    except TypeError as error:
        raise ConfigError(f"task {task!r}: {error}") from None


def _gym(task: str, name: str, params: Mapping[str, Any], rewards: RewardsConfig) -> Source:
    from train.rewards.gym import GymSource

    return GymSource(task, name, params)


def _logic(task: str, name: str, params: Mapping[str, Any], rewards: RewardsConfig) -> Source:
    from train.rewards.logic.families import FAMILIES
    from train.rewards.logic.source import LogicSource

    if name not in FAMILIES:
        raise ConfigError(f"task {task!r}: no family {name!r}; known: {', '.join(FAMILIES)}")
    return LogicSource(task, FAMILIES[name], params)


def _math(task: str, name: str, params: Mapping[str, Any], rewards: RewardsConfig) -> Source:
    from train.rewards.math_answers import MathSource

    return MathSource(task, **params)


def _code(task: str, name: str, params: Mapping[str, Any], rewards: RewardsConfig) -> Source:
    from train.rewards.programs import ProgramSource

    return ProgramSource(task, _sandbox(rewards), **params)


def _judge(task: str, name: str, params: Mapping[str, Any], rewards: RewardsConfig) -> Source:
    from train.rewards.judge import source_of

    source = source_of(name)
    if source is None:
        raise ConfigError(f"task {task!r}: judge.grade and judge.compare are known")
    return source(task, _judge_model(rewards), **params)


_OPENERS: dict[str, Opener] = {"logic": _logic, "math": _math, "code": _code, "judge": _judge}


@functools.cache
def _sandbox(rewards: RewardsConfig) -> Any:
    from train.rewards.sandbox import Sandbox

    return Sandbox(allow_unsandboxed=rewards.allow_unsandboxed, python=rewards.sandbox_python)


@functools.cache
def _judge_model(rewards: RewardsConfig) -> Any:
    from train.rewards.judge_models import EndpointJudge, EngineJudge

    if bool(rewards.judge_url) == bool(rewards.judge_folder):
        raise ConfigError(
            "a judge task needs either rewards.judge_url, of an endpoint with OpenAI's interface, "
            "or rewards.judge_folder, of a model"
        )
    if rewards.judge_folder:
        import mmjax

        model = mmjax.load(rewards.judge_folder)
        tokenizer = mmjax.Tokenizer.load(rewards.judge_folder)
        return EngineJudge(mmjax.Engine(model, tokenizer), rewards.judge_tokens)
    key = os.environ.get(rewards.judge_key, "") if rewards.judge_key else ""
    if rewards.judge_key and not key:
        raise ConfigError(f"rewards.judge_key names {rewards.judge_key}, which is not set")
    return EndpointJudge(
        rewards.judge_url, rewards.judge_model, key, max_tokens=rewards.judge_tokens
    )
