"""Prompts → engine → scored groups, with what the trainer has to know of every token."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mmjax.config import ConfigError
from mmjax.engine import Completion, Engine, RepetitionHalt, RequestError, SamplingParams
from mmjax.engine.sample import interruption
from mmjax.model import Decoder
from mmjax.sharding import SERVING_RULES, on_replica, param_shardings, replicas
from mmjax.tokenizer import Tokenizer
from train import distributed
from train.cispo_config import SamplingConfig
from train.config import JobConfig
from train.data.reasoning import Problem, ReasoningProblems, prompt_text
from train.rewards.scoring import Score, score_completions

# Samples that run at a time unless the config says otherwise.
MAX_SLOTS = 512
# Prompt tokens that the engine takes in between two bursts, and tokens of a KV page.
_PREFILL, _PAGE = 2048, 64


class Group(NamedTuple):
    """G samples of one prompt, T the length of the longest of them.

    number: of the group in the job; problem: its index; prompt [P] int32; tokens [G, T] int32,
    behaviour [G, T] float32 (log-probability when drawn), versions [G, T] int32 (of the weights
    that drew it, in batches of updates) and forced [G, T] bool (given, not drawn), all zero past
    lengths [G] int32; reasons: why each sample ended, an engine's "stop", "length" or "repetition";
    rewards [G] float32, NaN until scored; components [G] float32 by name; failures: rewards that
    raised.
    """

    number: int
    problem: int
    prompt: np.ndarray
    tokens: np.ndarray
    behaviour: np.ndarray
    versions: np.ndarray
    forced: np.ndarray
    lengths: np.ndarray
    reasons: tuple[str, ...]
    rewards: np.ndarray
    components: Mapping[str, np.ndarray]
    failures: int

    @property
    def finished(self) -> np.ndarray:
        """Which samples ended by themselves [G]."""
        return np.array([reason == "stop" for reason in self.reasons])

    @property
    def has_signal(self) -> bool:
        """Whether its rewards differ."""
        return bool(self.rewards.max() > self.rewards.min())


def pack_group(group: Group) -> str:
    """A group as text, to the bit."""
    arrays = {k: v for k, v in group._asdict().items() if isinstance(v, np.ndarray)}
    arrays |= {f"component/{name}": x for name, x in group.components.items()}
    rest = [group.number, group.problem, list(group.reasons), group.failures]
    arrays["rest"] = np.array(json.dumps(rest))
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return base64.b64encode(file.getvalue()).decode()


def unpack_group(text: str) -> Group:
    """The inverse of `pack_group`."""
    with np.load(io.BytesIO(base64.b64decode(text))) as file:
        arrays = dict(file)
    number, problem, reasons, failures = json.loads(str(arrays.pop("rest")))
    names = [name for name in arrays if name.startswith("component/")]
    components = {name.removeprefix("component/"): arrays.pop(name) for name in names}
    return Group(
        number=number,
        problem=problem,
        reasons=tuple(reasons),
        failures=failures,
        components=components,
        **arrays,
    )


class Asked(NamedTuple):
    """A group to sample: its number, negative outside training; its problem; the prompt's ids; how
    to sample.
    """

    number: int
    problem: int
    prompt: Sequence[int]
    params: SamplingParams


@dataclasses.dataclass
class _Running:
    """A group that is not done: its completions so far, and the version of each token."""

    asked: Asked
    done: list[Completion]
    versions: list[list[int]]


class Sampler:
    """The job's engines, built once; they take new weights before each batch or at any time.

    There is one for each part of the mesh along `data`, and each samples its share of the groups.
    Of several processes, each runs the engines that its devices have a part in; it adds all groups
    nevertheless, and gets all of them from `sample`.

    Args:
      model: With the weights to begin with; its structure stays.
      tokenizer: Of the model; None where prompts are ids and nothing is interrupted.
      cfg: Of the job.
      mesh: Where the engines lie; weights are moved there, whatever mesh they come from.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer | None, cfg: JobConfig, mesh: Mesh
    ) -> None:
        rl = cfg.cispo
        self._tokenizer, self.version = tokenizer, 0
        self._rl, self._sampling = rl, cfg.sampling
        graphdef, params = nnx.split(model)
        self._where = param_shardings(params, mesh, SERVING_RULES)
        parts = replicas(mesh)
        self._count, here = len(parts), jax.process_index()
        self._replicas = {
            i: part
            for i, part in enumerate(parts)
            if any(device.process_index == here for device in part.devices.flat)
        }
        most = min(rl.prompts_per_batch * rl.samples_per_prompt, MAX_SLOTS * self._count)
        prompts = -(-rl.prompts_per_batch // self._count)
        moved = jax.device_put(params, self._where)
        self._engines = {
            i: Engine(
                nnx.merge(graphdef, on_replica(moved, part)),
                tokenizer,
                max_slots=-(-(cfg.sampling.slots or most) // self._count),
                max_length=rl.max_prompt_tokens + rl.max_new_tokens,
                page_size=_PAGE,
                num_pages=-(-cfg.sampling.kv_tokens // _PAGE) or None,
                prefill_chunk=_PREFILL,
                prefix_block=_PREFILL,
                num_prefixes=prompts,
            )
            for i, part in self._replicas.items()
        }
        # Side by side, as each waits for its devices; collectives of processes need one order.
        together = any(part.is_multi_process for part in parts)
        self._pool = None if together or len(self._engines) == 1 else ThreadPoolExecutor()
        self._running: dict[str, _Running] = {}
        self._aside: list[Group] = []

    def update(self, params: nnx.State, version: int) -> None:
        """Takes new weights; what is unfinished goes on with them.

        Args:
          params: On any mesh; they are copied, so that a trainer may give its own away.
          version: Their number.
        """
        moved = jax.device_put(params, self._where, may_alias=False)
        for i, engine in self._engines.items():
            engine.update(on_replica(moved, self._replicas[i]))
        self.version = version

    def add(self, asked: Asked) -> None:
        """Takes in a group.

        Raises:
          RequestError: the prompt is longer than the config allows.
        """
        if len(asked.prompt) > self._rl.max_prompt_tokens:
            raise RequestError(
                f"a prompt takes {len(asked.prompt)} tokens, cispo.max_prompt_tokens is "
                f"{self._rl.max_prompt_tokens}"
            )
        engine = self._engines.get(asked.number % self._count)
        if engine is None:
            return
        name = str(asked.number)
        engine.add(asked.prompt, asked.params, request_id=name)
        done = [Completion(name, i, logprobs=[]) for i in range(asked.params.n)]
        self._running[name] = _Running(asked, done, [[] for _ in done])

    def step(self) -> list[Group]:
        """A round of the engines' work; groups that are finished, not scored."""
        run = map if self._pool is None else self._pool.map
        outputs = [o for each in run(Engine.step, self._engines.values()) for o in each]
        for output in outputs:
            running = self._running[output.request_id]
            running.done[output.index].extend(output)
            running.versions[output.index] += [self.version] * len(output.token_ids)
        finished, self._aside = self._aside, []
        for name in dict.fromkeys(output.request_id for output in outputs):
            if all(c.finish_reason is not None for c in self._running[name].done):
                finished.append(self._finish(self._running.pop(name)))
        return finished

    def sample(self, wanted: Sequence[Asked]) -> list[Group]:
        """Runs groups to their ends and gives them in order, not scored.

        Others that end meanwhile are given by the next `step`.
        """
        for asked in wanted:
            self.add(asked)
        mine = {a.number for a in wanted if a.number % self._count in self._engines}
        done: dict[int, Group] = {}
        others: list[Group] = []
        while len(done) < len(mine):
            for group in self.step():
                if group.number in mine:
                    done[group.number] = group
                else:
                    others.append(group)
        self._aside = others
        if len(self._engines) < self._count:
            packed = distributed.union({str(n): pack_group(g) for n, g in done.items()})
            done = {int(number): unpack_group(text) for number, text in packed.items()}
        return [done[asked.number] for asked in wanted]

    def params(self, seed: int, limit: int) -> SamplingParams:
        """How a group is sampled in training.

        Args:
          seed: Of its draws.
          limit: Longest completion.
        """
        sampling = self._sampling
        return SamplingParams(
            limit,
            self._rl.temperature,
            seed=seed,
            n=self._rl.samples_per_prompt,
            logprobs=0,
            thinking_budget=sampling.thinking_budget or None,
            repetition_halt=_halt(sampling),
        )

    def greedy(self) -> SamplingParams:
        """How a held-out problem is answered."""
        sampled = self.params(0, self._rl.max_new_tokens)
        return dataclasses.replace(sampled, temperature=0.0, n=1)

    def _finish(self, running: _Running) -> Group:
        done = running.done
        lengths = np.array([len(c.token_ids) for c in done], np.int32)

        def rows(values: list[list[float]], dtype: type) -> np.ndarray:
            out: np.ndarray = np.zeros((len(done), int(lengths.max())), dtype)
            for row, value in zip(out, values, strict=True):
                row[: len(value)] = value
            return out

        forced = rows([[1.0] * n for n in lengths], bool)
        for row, completion in zip(forced, done, strict=True):
            start, stop = self._forced(running.asked.prompt, completion.token_ids)
            row[:start], row[stop:] = False, False
        return Group(
            number=running.asked.number,
            problem=running.asked.problem,
            prompt=np.array(running.asked.prompt, np.int32),
            tokens=rows([[*c.token_ids] for c in done], np.int32),
            behaviour=rows([[t.logprob for t in c.logprobs or []] for c in done], np.float32),
            versions=rows([[*v] for v in running.versions], np.int32),
            forced=forced,
            lengths=lengths,
            reasons=tuple(str(c.finish_reason) for c in done),
            rewards=np.full(len(done), np.nan, np.float32),
            components={},
            failures=0,
        )

    def _forced(self, prompt: Sequence[int], ids: list[int]) -> tuple[int, int]:
        """The stretch of tokens that closed the thinking part by force."""
        budget = self._sampling.thinking_budget
        tokenizer = self._tokenizer
        if not budget or tokenizer is None or len(ids) <= budget:
            return 0, 0
        return budget, budget + len(interruption(tokenizer, prompt, ids[:budget]))


def _halt(sampling: SamplingConfig) -> RepetitionHalt | None:
    if not sampling.repetition_tokens:
        return None
    return RepetitionHalt(sampling.repetition_tokens, sampling.repetition_probability)


def encode_prompt(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """Ids of the question in the chat template."""
    return tokenizer.encode(prompt_text(problem))


def check_prompts(problems: ReasoningProblems, tokenizer: Tokenizer, longest: int) -> None:
    """Raises ConfigError where prompts take more tokens than `longest`."""
    lengths = [len(encode_prompt(tokenizer, problem)) for problem in problems]
    over = sum(length > longest for length in lengths)
    if over:
        worst = int(np.argmax(lengths))
        raise ConfigError(
            f"cispo.max_prompt_tokens {longest}: {over} of {len(lengths)} prompts take more, up to "
            f"{lengths[worst]} tokens of task {problems[worst].task!r}: "
            f"{problems[worst].question[:200]!r}; raise it, or make the problems smaller"
        )


def texts_of(group: Group, tokenizer: Tokenizer) -> list[str]:
    """The completions without their end token."""
    end = tokenizer.backend.id_to_token(tokenizer.eos_id)
    assert end is not None
    return [
        tokenizer.decode(row[:n]).removesuffix(end)
        for row, n in zip(group.tokens, group.lengths, strict=True)
    ]


def score(
    groups: Sequence[Group],
    problems: ReasoningProblems,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    limit: int,
) -> list[Group]:
    """The groups with their rewards.

    A reward that raises costs its own sample alone. What comes near the limit loses some, see
    `overlong_penalty`. Several processes share the scoring.

    Args:
      groups: From the sampler.
      problems: What `Group.problem` counts in.
      tokenizer: For the texts.
      sampling: For the penalty.
      limit: Longest completion.
    """
    share = range(jax.process_index(), len(groups), jax.process_count())
    asked = [problems[groups[i].problem] for i in share for _ in groups[i].reasons]
    texts = [text for i in share for text in texts_of(groups[i], tokenizer)]
    finished = [bool(f) for i in share for f in groups[i].finished]
    scores = iter(score_completions(problems, asked, texts, finished))
    scored = distributed.union({str(i): [next(scores) for _ in groups[i].reasons] for i in share})
    done = []
    for i, group in enumerate(groups):
        mine = [Score(*values) for values in scored[str(i)]]
        components = {
            name: np.array([s.components[name] for s in mine], np.float32)
            for name in mine[0].components
        }
        rewards = np.array([s.reward for s in mine], np.float32)
        if sampling.overlong_tokens:
            components["overlong"] = -overlong_penalty(group.lengths, sampling, limit)
            rewards = rewards + components["overlong"]
        failures = sum(s.failed for s in mine)
        done.append(group._replace(rewards=rewards, components=components, failures=failures))
    return done


def overlong_penalty(lengths: np.ndarray, sampling: SamplingConfig, limit: int) -> np.ndarray:
    """What completions lose: nothing up to limit - overlong_tokens, then linearly up to
    overlong_penalty at the limit.

    Source: DAPO (arXiv 2503.14476), eq. 13, soft overlong punishment.
    """
    over = (lengths - (limit - sampling.overlong_tokens)) / max(sampling.overlong_tokens, 1)
    return (sampling.overlong_penalty * np.clip(over, 0, 1)).astype(np.float32)


def evaluate(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: ReasoningProblems,
    sampling: SamplingConfig,
    limit: int,
) -> list[Group]:
    """Greedy answers to all problems, one a group, scored without penalty."""
    asked = [
        Asked(-1 - i, i, encode_prompt(tokenizer, problem), sampler.greedy())
        for i, problem in enumerate(problems)
    ]
    groups = sampler.sample(asked)
    free = dataclasses.replace(sampling, overlong_tokens=0)
    return score(groups, problems, tokenizer, free, limit)


def accuracy(groups: Sequence[Group]) -> float:
    """Share of samples that are right."""
    return float(np.mean([passed(group) for group in groups]))


def passed(group: Group) -> np.ndarray:
    """How far each sample is right [G], 0 to 1: its component "correct", or else its reward."""
    return np.clip(group.components.get("correct", group.rewards), 0, 1)
