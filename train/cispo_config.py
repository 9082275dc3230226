"""The sections of a reinforcement job's configuration, and which choices contradict each other."""

from __future__ import annotations

import dataclasses
import typing

from train.bounds import BELOW_ONE, NOT_NEGATIVE, POSITIVE, SHARE

NORMALISERS = ("group_tokens", "tokens", "sample", "prompt", "max_tokens")
SCALES = ("group", "batch", "none")


@dataclasses.dataclass(frozen=True)
class CispoConfig:
    """The policy loss, the batches that it is taken over, and their evaluation.

    Attributes:
      algorithm: "cispo", or for comparison "grpo", "dapo", "dr_grpo", "gspo"; see
        `train.policy_losses`.
      prompts_per_batch: N, groups of each rollout batch.
      samples_per_prompt: G, completions of each prompt.
      updates_per_batch: Off-policy updates on one rollout batch (M1: 16).
      max_prompt_tokens: Longest prompt; longer ones are an error.
      max_new_tokens: Longest completion.
      temperature: Of the sampler.
      is_weight_cap: cispo's absolute upper bound of the importance weight, 1 + ε_high of eq. 5.
      is_weight_floor: cispo's absolute lower bound; 0, as in the paper, is none.
      trust_low, trust_high: cispo's unified mask, ε_low and ε_high of the paper's eq. 7; both or
        none.
      clip_low, clip_high: ε of the other algorithms, relative to 1; None for the published ones.
      anchor: What the ratio is taken to: "behaviour", the sampler when it drew the token, or
        "proximal", the trainer's policy before the batch's first update.
      correction_cap: With anchor "proximal", cap of the factor π_proximal / π_behaviour; 0 for no
        such factor.
      normaliser: How tokens are averaged, see `train.policy_losses.normalise`; empty for the
        algorithm's own.
      advantage_scale: "group", "batch" or "none", see `train.advantages`; empty for the
        algorithm's own.
      length_buckets: Widths that batches are padded to, even shares of max_new_tokens; each is
        compiled once.
      eval_every: Rollout batches between evaluations; 0 for only at the start and the end.
      eval_problems: Held-out problems.
      target_accuracy: Stop early once an evaluation reaches it; above 1 never.

    Source: MiniMax-M1 report, section 3.1.
    """

    algorithm: str = "cispo"
    prompts_per_batch: int = 32
    samples_per_prompt: int = 16
    updates_per_batch: int = 4
    max_prompt_tokens: int = 64
    max_new_tokens: int = 64
    temperature: float = 1.0
    is_weight_cap: float = 5.0
    is_weight_floor: float = 0.0
    trust_low: float | None = None
    trust_high: float | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    anchor: str = "behaviour"
    correction_cap: float = 0.0
    normaliser: str = ""
    advantage_scale: str = ""
    length_buckets: int = 1
    eval_every: int = 10
    eval_problems: int = 256
    target_accuracy: float = 2.0

    @property
    def samples_per_update(self) -> int:
        """N G, the rows of an update."""
        return self.prompts_per_batch // self.updates_per_batch * self.samples_per_prompt

    @property
    def loss(self) -> Algorithm:
        """The algorithm's published choices, with those of this config in their place."""
        own = ALGORITHMS[self.algorithm]
        return Algorithm(
            self.normaliser or own.normaliser,
            self.advantage_scale or own.advantage_scale,
            own.clip_low if self.clip_low is None else self.clip_low,
            own.clip_high if self.clip_high is None else self.clip_high,
        )


class Algorithm(typing.NamedTuple):
    """Choices beside the terms of a policy loss."""

    normaliser: str
    advantage_scale: str
    clip_low: float = 0.0
    clip_high: float = 0.0


# As their papers have them; `train.policy_losses` names the papers.
ALGORITHMS = {
    "cispo": Algorithm("group_tokens", "group"),
    "grpo": Algorithm("sample", "group", 0.2, 0.2),
    "dapo": Algorithm("group_tokens", "group", 0.2, 0.28),
    "dr_grpo": Algorithm("max_tokens", "none", 0.2, 0.2),
    "gspo": Algorithm("sample", "group", 3e-4, 4e-4),
}


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Which completions make a batch, and when one is ended or its reward lessened.

    Attributes:
      rounds: Most rounds of sampling for one batch: groups without a signal are replaced by new
        ones until the batch is full (dynamic sampling). 1 takes the first round as it comes. A
        batch that stays short of groups is filled up with some that have no signal, and says so.
      overlong_tokens: Length of the last stretch before the limit in which the reward falls
        linearly, 0 for none.
      overlong_penalty: What a completion at the limit loses.
      thinking_budget: Tokens after which an open thinking part is closed by force; 0 for never. The
        forced tokens do not count in the loss.
      repetition_tokens: Ends a completion after so many tokens in a row that were each likelier
        than repetition_probability (M1: 3,000 and 0.99); 0 for never.
      repetition_probability: See above.
      retire_pass_rate: Prompts that passed at least so often are not drawn again
        (no-positive-resampling, ScaleRL: 0.9); above 1 for none.
      retire_after: Samples of a prompt before it can be retired.
      slots: Samples that run at a time, on all parts of the mesh along `data` together; 0 for those
        of a batch, 512 a part at most.
      kv_tokens: Tokens whose keys and values each of those parts holds at a time, to leave memory
        to the updates; 0 for those of all its samples, in 60% of the free memory at most. Samples
        that find no place wait.
      windows: Stages of the longest completion, ascending, instead of max_new_tokens alone, which
        must be the last of them (M1: 40K to 80K in six).
      window_share: A stage ends when the 99th percentile of lengths is at least this share of it,
      window_tolerance: and the mean perplexity of the last `window_steps` batches differs from that
        of as many before by less than this share.
      window_steps: See above.

    Source: MiniMax-M1 report, sections 3.2 and 4.2; DAPO (arXiv 2503.14476), sections 3.2 and 3.4;
    ScaleRL (arXiv 2510.13786).
    """

    rounds: int = 1
    overlong_tokens: int = 0
    overlong_penalty: float = 1.0
    thinking_budget: int = 0
    repetition_tokens: int = 3000
    repetition_probability: float = 0.99
    retire_pass_rate: float = 2.0
    retire_after: int = 16
    slots: int = 0
    kv_tokens: int = 0
    windows: tuple[int, ...] = ()
    window_share: float = 0.9
    window_tolerance: float = 0.02
    window_steps: int = 8


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
    """Which tasks the prompts of a batch come from.

    Attributes:
      adaptive: Draw tasks by p (1 - p) of their running pass rate p, and a little of each; else
        evenly.
      memory: Of the running pass rate, the share of its last value that stays after a batch.
      general_from: Batch at which tasks of the family "general" begin to be mixed in.
      general_full: Batch from which they have their full share.
      general_share: Of the prompts, once all are mixed in.

    Source: MiniMax-M1 report, section 4.1: rule-checked tasks first, general ones mixed in later.
    """

    adaptive: bool = False
    memory: float = 0.8
    general_from: int = 0
    general_full: int = 0
    general_share: float = 0.5


@dataclasses.dataclass(frozen=True)
class AsynchronousConfig:
    """Sampling while training.

    Attributes:
      max_staleness: Batches of updates that weights may have gone on by since the first token of a
        group was drawn, when the group is trained on; 0 is the synchronous mode.
      sampler_devices: The job's last devices, which sample alone while the others train; 0 for the
        same devices in turn.
    """

    max_staleness: int = 0
    sampler_devices: int = 0


@dataclasses.dataclass(frozen=True)
class AlertsConfig:
    """When a run is ill and stops with a checkpoint; a value that is not finite always is.

    Attributes:
      after: Batches before which only that counts.
      min_entropy: Lowest mean entropy of the sampler in nats; 0 for any.
      max_grad_norm: Largest mean norm of a batch's gradients before clipping; 0 for any.
      min_correlation: Lowest correlation of the sampler's and the trainer's probabilities; 0 for
        any.
      max_truncated: Largest share of completions cut off at the limit; 0 for any.
      patience: Batches in a row over a threshold before the run stops.
    """

    after: int = 10
    min_entropy: float = 0.0
    max_grad_norm: float = 0.0
    min_correlation: float = 0.0
    max_truncated: float = 0.0
    patience: int = 3


# By section.
BOUNDS = {
    "cispo": {
        POSITIVE: "prompts_per_batch samples_per_prompt updates_per_batch max_prompt_tokens "
        "max_new_tokens temperature length_buckets target_accuracy",
        NOT_NEGATIVE: "correction_cap eval_every eval_problems",
    },
    "sampling": {
        POSITIVE: "rounds retire_pass_rate retire_after window_steps",
        NOT_NEGATIVE: "overlong_tokens overlong_penalty thinking_budget repetition_tokens slots "
        "kv_tokens window_tolerance",
        SHARE: "window_share",
    },
    "curriculum": {
        NOT_NEGATIVE: "general_from general_full",
        SHARE: "general_share",
        BELOW_ONE: "memory",
    },
    "asynchronous": {NOT_NEGATIVE: "max_staleness sampler_devices"},
    "alerts": {
        POSITIVE: "patience",
        NOT_NEGATIVE: "after min_entropy max_grad_norm",
        SHARE: "min_correlation max_truncated",
    },
}


def contradictions(
    rl: CispoConfig,
    sampling: SamplingConfig,
    curriculum: CurriculumConfig,
    mode: AsynchronousConfig,
) -> list[str]:
    """Combinations that cannot be meant, each with the reason and the way out."""
    loss = _cispo_problems(rl) if rl.algorithm == "cispo" else _clip_problems(rl)
    begins, full = curriculum.general_from, curriculum.general_full
    ramp = _told(
        (
            0 < full < begins,
            f"curriculum.general_full {full} is before curriculum.general_from {begins}; general "
            "tasks have their full share once they have begun",
        )
    )
    return [*_batch_problems(rl), *loss, *ramp, *_sampling_problems(rl, sampling, mode)]


def _batch_problems(rl: CispoConfig) -> list[str]:
    problems = []
    if rl.prompts_per_batch % rl.updates_per_batch:
        problems.append(
            f"cispo.prompts_per_batch {rl.prompts_per_batch} is no multiple of "
            f"cispo.updates_per_batch {rl.updates_per_batch}; an update takes whole groups"
        )
    if rl.samples_per_prompt < 2:
        problems.append(
            "cispo.samples_per_prompt 1 leaves no group to compare a sample with; take at least 2"
        )
    if not rl.eval_problems:
        problems.append("cispo.eval_problems 0 leaves nothing to evaluate on; take at least 1")
    return problems


def _cispo_problems(rl: CispoConfig) -> list[str]:
    cap, trust = rl.is_weight_cap, (rl.trust_low, rl.trust_high)
    return _anchor_problems(rl) + _told(
        (
            not cap > 1,
            f"cispo.is_weight_cap {cap} is absolute, 1 + ε: at most 1 it would bind tokens that "
            f"have not moved; for ε = {cap} write {1 + cap}",
        ),
        (
            not 0 <= rl.is_weight_floor <= 1,
            f"cispo.is_weight_floor {rl.is_weight_floor} must be in [0, 1], where tokens that have "
            "not moved are not bound",
        ),
        (
            trust.count(None) == 1 or any(t is not None and not t > 0 for t in trust),
            f"cispo.trust_low and trust_high are {trust}; they are the two sides of one mask: set "
            "both to positive values, or none",
        ),
        (
            (rl.clip_low, rl.clip_high) != (None, None),
            "cispo.clip_low and clip_high belong to the other algorithms; cispo is bounded by "
            "is_weight_cap",
        ),
    )


def _clip_problems(rl: CispoConfig) -> list[str]:
    name, loss, own = rl.algorithm, rl.loss, CispoConfig()
    bounds = f"cispo.clip_low {loss.clip_low} and clip_high {loss.clip_high}"
    ours = (rl.is_weight_cap, rl.is_weight_floor, rl.trust_low, rl.trust_high)
    return _anchor_problems(rl) + _told(
        (
            ours != (own.is_weight_cap, own.is_weight_floor, own.trust_low, own.trust_high),
            f"{name} clips the update by cispo.clip_low and clip_high; is_weight_cap, "
            "is_weight_floor, trust_low and trust_high are cispo's",
        ),
        (
            not (0 < loss.clip_low < 1 and loss.clip_high > 0),
            f"{name} with {bounds}: low must be in (0, 1), high positive",
        ),
        (
            name in ("grpo", "dr_grpo") and loss.clip_low != loss.clip_high,
            f"{name} has one ε, but {bounds} are two; that makes dapo",
        ),
        (
            name == "dr_grpo" and loss[:2] != ALGORITHMS[name][:2],
            "dr_grpo is grpo without the scale and without a sample's length; with advantage_scale "
            f"{loss.advantage_scale!r} and normaliser {loss.normaliser!r} it is another algorithm",
        ),
        (
            name == "gspo" and loss.normaliser != "sample",
            f"gspo's term is a sample's, and normaliser {loss.normaliser!r} would weigh samples by "
            "their length; leave it 'sample'",
        ),
    )


def _anchor_problems(rl: CispoConfig) -> list[str]:
    return _told(
        (
            rl.anchor == "proximal" and rl.updates_per_batch == 1,
            "cispo.anchor 'proximal' with one update a batch makes every ratio 1, and no bound "
            "ever binds; take 'behaviour' or more cispo.updates_per_batch",
        ),
        (
            rl.correction_cap > 0 and rl.anchor == "behaviour",
            f"cispo.correction_cap {rl.correction_cap} corrects for the sampler, which the ratio "
            "to anchor 'behaviour' does already; set it to 0, or anchor to 'proximal'",
        ),
    )


def _sampling_problems(
    rl: CispoConfig, sampling: SamplingConfig, mode: AsynchronousConfig
) -> list[str]:
    stages = sampling.windows or (rl.max_new_tokens,)
    longest = rl.max_prompt_tokens + rl.max_new_tokens
    return _told(
        (
            0 < sampling.kv_tokens < longest,
            f"sampling.kv_tokens {sampling.kv_tokens} cannot hold one sample of "
            f"cispo.max_prompt_tokens + max_new_tokens = {longest}",
        ),
        (
            [0, *stages] != sorted({0, *stages}) or stages[-1] != rl.max_new_tokens,
            f"sampling.windows {stages} must ascend from above 0 and end with "
            f"cispo.max_new_tokens {rl.max_new_tokens}",
        ),
        (
            sampling.overlong_tokens >= stages[0],
            f"sampling.overlong_tokens {sampling.overlong_tokens} must be less than the shortest "
            f"limit, {stages[0]}",
        ),
        (
            sampling.thinking_budget >= stages[0],
            f"sampling.thinking_budget {sampling.thinking_budget} leaves no token of {stages[0]} "
            "for an answer",
        ),
        (
            not 0 < sampling.repetition_probability < 1,
            "sampling.repetition_probability must be in (0, 1), got "
            f"{sampling.repetition_probability}",
        ),
        (
            mode.sampler_devices > 0 and mode.max_staleness < 1,
            "asynchronous.sampler_devices sample while the others train, which is asynchronous; "
            "set asynchronous.max_staleness to at least 1",
        ),
    )


def _told(*cases: tuple[bool, str]) -> list[str]:
    """The texts of the cases that are so."""
    return [text for so, text in cases if so]
