"""Job configs: what is refused and how, the configs of this repository, the gin overlay."""

import copy
import dataclasses
import importlib
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from ml_collections import ConfigDict

import train.__main__ as cli
from mmjax.config import ConfigError
from mmjax.model import Decoder
from mmjax.sharding import ShardingRules
from tests.train.programs import lenient
from train import config as job_config
from train.batches import Batch, by_sample
from train.cispo import cispo_step
from train.config import SourceConfig, build
from train.data.reasoning import (
    ReasoningProblems,
    prompt_text,
    split_problems,
    worked_solution,
    worked_texts,
)
from train.dpo import dpo_step
from train.gin_overlay import apply_gin
from train.optimizer import make_optimizer
from train.scaling.grid import runs_of
from train.stages import resolve
from train.state import init_state
from train.step import language_step
from train.tokenizing import job_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
VALID = {
    "task": "sft",
    "steps": 10,
    "model": {"num_layers": 2, "layer_types": ("lightning", "softmax")},
    "data": {"source": "reasoning", "tasks": ("chain_sum",)},
}


def job(**changes):
    """A py-config from VALID with dotted keys changed, `__` for the dot."""
    values = copy.deepcopy(VALID)
    for name, value in changes.items():
        *sections, key = name.split("__")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return ConfigDict(values)


def message(config):
    with pytest.raises(ConfigError) as caught:
        build(config)
    return str(caught.value)


def test_values_arrive_typed():
    built = build(job(optimizer__learning_rate=1, mesh__data=-1, data__tasks=["products"]))
    assert built.optimizer.learning_rate == 1.0
    assert isinstance(built.optimizer.learning_rate, float)
    assert built.data.tasks == ("products",)
    assert built.mesh == {"data": -1}
    tensors = (("head.kernel", (None, ["data", "model"])),)
    built = build(job(sharding__d_model="data", sharding__tensors=tensors))
    exception = ("head.kernel", ((), ("data", "model")))
    assert built.sharding == ShardingRules(d_model=("data",), tensors=(exception,))
    assert built.model.num_layers == 2


def test_keys_of_the_model_that_are_set_are_known():
    built = build(job(model__preset="minimax_vl_01", model__vision__num_layers=2))
    assert set(built.model_keys) == {"num_layers", "layer_types", "vision.num_layers"}


def test_a_frozen_job_is_all_defaults_but_what_is_set():
    assert build(job()) == build(ConfigDict(VALID))
    assert build(job()).optimizer == job_config.OptimizerConfig()


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("stpes", "steps"),
        ("optimzer", "optimizer"),
        ("optimizer__learning_rat", "optimizer.learning_rate"),
        ("data__sequence_len", "data.sequence_length"),
        ("cispo__is_weight_kap", "cispo.is_weight_cap"),
        ("checkpoint__evry", "checkpoint.every"),
        ("model__num_layrs", "model.num_layers"),
        ("sharding__hed", "sharding.heads"),
    ],
)
def test_typo_names_the_nearest_key(typo, meant):
    text = message(job(**{typo: 1}))
    assert f"unknown key {typo.replace('__', '.')}; did you mean {meant}?" in text


def test_all_problems_are_named_at_once():
    text = message(
        job(stpes=1, optimizer__epz=1.0, model__hidden=3, seed="x", data__batch_size="many")
    )
    for part in ("stpes", "optimizer.epz", "model.hidden", "seed = 'x'", "batch_size = 'many'"):
        assert part in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "ten"),
        ("steps", 1.5),
        ("steps", True),
        ("steps", None),
        ("remat", 1),
        ("data", 3),
        ("data__paths", 5),
        ("data__paths", "a.txt"),
        ("data__tasks", (1, 2)),
        ("optimizer__learning_rate", "fast"),
        ("optimizer__learning_rate", True),
        ("model", "big"),
        ("model__num_layers", "8"),
        ("model__hidden_size", 64.0),
        ("model__layer_types", "softmax"),
        ("mesh__data", "2"),
    ],
)
def test_wrong_type_names_key_and_value(key, value):
    text = message(job(**{key: value}))
    assert f"{key.replace('__', '.')} = {value!r} is no" in text


def test_model_problems_stand_beside_the_others():
    text = message(job(stpes=1, model__num_kv_heads=3))
    assert "stpes" in text
    assert "num_heads 4 is no multiple of num_kv_heads 3" in text


@pytest.mark.parametrize("missing", ["task", "steps"])
def test_what_has_no_default_must_be_set(missing):
    config = job()
    del config[missing]
    assert f"{missing} is not set" in message(config)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("task", "'pretrain', 'sft', 'dpo', 'cispo'"),
        ("data__source", "'text', 'reasoning'"),
        ("optimizer__decay", "'constant', 'cosine', 'linear', 'exponential'"),
        ("checkpoint__export", "'', 'hf', 'hf-native'"),
        ("remat", "'super_block', 'layer', 'products', 'none'"),
        ("model__preset", "tiny, minimax_text_01, minimax_m1, minimax_vl_01"),
    ],
)
def test_unknown_choice_lists_the_known_ones(key, known):
    text = message(job(**{key: "ppo"}))
    assert "'ppo'" in text
    assert f"known: {known}" in text


def test_unknown_reasoning_task_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"chain_sums.*near: chain_sum"):
        split_problems(("chain_sum", "chain_sums"), 10, 4, seed=0)


def test_contradictions_are_named_at_once():
    text = message(
        job(task="cispo", cispo__prompts_per_batch=10, cispo__updates_per_batch=4, data__tasks=())
    )
    assert "prompts_per_batch 10 is no multiple of cispo.updates_per_batch 4" in text
    assert "data.tasks is empty" in text


CONTRADICTIONS = [
    ({"is_weight_cap": 0.2}, r"is absolute, 1 \+ ε: .* for ε = 0.2 write 1.2"),
    ({"is_weight_floor": 1.5}, "is_weight_floor 1.5 must be in"),
    ({"trust_low": 0.2}, "the two sides of one mask"),
    ({"clip_high": 0.2}, "clip_low and clip_high belong to the other algorithms"),
    ({"algorithm": "dapo", "is_weight_cap": 4.0}, "dapo clips the update by"),
    ({"algorithm": "dapo", "clip_low": 1.5}, "low must be in"),
    ({"algorithm": "grpo", "clip_high": 0.28}, "has one ε.* that makes dapo"),
    ({"algorithm": "dr_grpo", "advantage_scale": "group"}, "it is another algorithm"),
    ({"algorithm": "gspo", "normaliser": "tokens"}, "would weigh samples by their length"),
    ({"anchor": "proximal", "updates_per_batch": 1}, "makes every ratio 1"),
    ({"correction_cap": 2.0}, "which the ratio to anchor 'behaviour' does already"),
    ({"samples_per_prompt": 1}, "leaves no group to compare"),
]


@pytest.mark.parametrize(("values", "says"), CONTRADICTIONS)
def test_choices_of_the_loss_that_contradict_are_refused_with_the_reason(values, says):
    changes = {f"cispo__{name}": value for name, value in values.items()}
    assert re.search(says, message(job(task="cispo", **changes)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampling__windows": (32, 16)}, "and end with cispo.max_new_tokens 64"),
        ({"sampling__overlong_tokens": 64}, "must be less than the shortest limit, 64"),
        ({"sampling__thinking_budget": 64}, "leaves no token of 64 for an answer"),
        ({"sampling__windows": (0, 64)}, "must ascend from above 0"),
        ({"sampling__kv_tokens": 100}, "kv_tokens 100 cannot hold one sample of"),
        ({"sampling__repetition_probability": 1.0}, r"must be in \(0, 1\), got 1.0"),
        ({"asynchronous__sampler_devices": 1}, "set asynchronous.max_staleness to at least 1"),
        ({"optimizer__microbatches": 7}, r"microbatches 7 does not divide the \d+ samples"),
        ({"optimizer__z_loss": 1e-4}, "z_loss 0.0001 is for pretrain and sft"),
        ({"evaluation__every": 5}, r"evaluation.every 5 is for pretrain and sft; .*eval_every"),
        ({"cispo__eval_problems": 0}, "eval_problems 0 leaves nothing to evaluate on"),
        ({"rewards__correct_weight": 0}, "both 0: nothing is rewarded"),
        (
            {"curriculum__general_from": 50, "curriculum__general_full": 10},
            "general_full 10 is before curriculum.general_from 50",
        ),
    ],
)
def test_sampling_rules_that_contradict_are_refused(changes, says):
    assert re.search(says, message(job(task="cispo", **changes)))


def test_algorithms_take_their_published_choices():
    loss = {
        name: build(job(task="cispo", cispo__algorithm=name)).cispo.loss
        for name in job_config.ALGORITHMS
    }
    assert loss["cispo"][:2] == ("group_tokens", "group")
    assert loss["grpo"] == ("sample", "group", 0.2, 0.2)
    assert loss["dapo"][2:] == (0.2, 0.28)
    assert loss["dr_grpo"][:2] == ("max_tokens", "none")
    other = build(job(task="cispo", cispo__normaliser="prompt", cispo__advantage_scale="batch"))
    assert other.cispo.loss[:2] == ("prompt", "batch")


def test_text_without_paths():
    assert "data.paths is empty" in message(job(task="pretrain", data__source="text"))


@pytest.mark.parametrize("source", ["reasoning", "recall"])
def test_synthetic_tasks_are_not_to_pretrain_on(source):
    told = f"data.source '{source}' is for sft; pretrain reads 'text'"
    assert told in message(job(task="pretrain", data__source=source))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"every": 4, "keep_every": 6}, "keep_every 6 is no multiple of checkpoint.every 4"),
        ({"export_every": 5}, "export_every needs checkpoint.export"),
        ({"export_every": -5, "export": "hf"}, "export_every must be 0 or above, got -5"),
    ],
)
def test_checkpoints_that_make_no_sense(changes, says):
    assert says in message(job(checkpoint=changes))


def test_mixtures_are_typed():
    mixture = [{"name": "a", "format": "stdlib", "weight": 2}, {"name": "b", "paths": ["b.txt"]}]
    built = build(job(task="pretrain", data__source="text", data__mixture=mixture))
    library = SourceConfig("a", format="stdlib", weight=2.0)
    assert built.data.sources == (library, SourceConfig("b", ("b.txt",)))
    short = build(job(task="pretrain", data__source="text", data__paths=("a.txt",)))
    assert short.data.sources == (SourceConfig("text", ("a.txt",)),)


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ([{"name": "a", "path": ["a"]}], r"unknown key its path; did you mean its paths"),
        ([{"paths": ["a"]}], "name is not set"),
        ([{"name": "a", "paths": "a"}], "its paths = 'a' is no tuple"),
        (["a"], "data.mixture = .* is no tuple"),
        ([{"name": "a"}], r"'a': paths = \(\) with format ''"),
        ([{"name": "a", "paths": ["a"], "format": "csv"}], "format = 'csv'; known: .*'jsonl'"),
        ([{"name": "a", "paths": ["a"], "kind": "image"}], "kind = 'image'; known: 'text', 'chat'"),
        ([{"name": "a", "paths": ["a"], "weight": -1}], "weight must not be negative, got -1"),
        ([{"name": "a", "paths": ["a"], "weight": 0}], "no source has a weight above 0"),
        ([{"name": "a", "paths": ["a"]}] * 2, "two sources of one name among a, a"),
    ],
)
def test_mixture_that_makes_no_sense(sources, says):
    config = job(task="pretrain", data__source="text", data__mixture=sources)
    assert re.search(says, message(config))


@pytest.mark.parametrize(
    "key",
    ["steps", "log_every", "data__batch_size", "checkpoint__every", "cispo__temperature"],
)
def test_counts_must_be_positive(key):
    assert f"{key.replace('__', '.')} must be positive, got 0" in message(job(**{key: 0}))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("seed", -1, r"in [0, 2**31)"),
        ("seed", 2**40, r"in [0, 2**31)"),
        ("cispo__correction_cap", -1.0, "0 or above"),
        ("cispo__eval_problems", -5, "0 or above"),
        ("cispo__temperature", float("inf"), "positive"),
        ("cispo__temperature", float("nan"), "positive"),
        ("sampling__slots", -1, "0 or above"),
        ("sampling__overlong_penalty", -2.0, "0 or above"),
        ("sampling__retire_after", 0, "positive"),
        ("sampling__window_share", 7.0, "in [0, 1]"),
        ("curriculum__memory", 1.0, "in [0, 1)"),
        ("curriculum__general_share", 1.5, "in [0, 1]"),
        ("asynchronous__max_staleness", -3, "0 or above"),
        ("asynchronous__sampler_devices", -1, "0 or above"),
        ("alerts__max_truncated", 5.0, "in [0, 1]"),
        ("rewards__correct_weight", -1.0, "0 or above"),
        ("optimizer__learning_rate", -1e-3, "0 or above"),
        ("optimizer__learning_rate", float("nan"), "0 or above"),
        ("optimizer__b1", 2.0, "in [0, 1)"),
        ("optimizer__eps", -1.0, "positive"),
        ("optimizer__final_ratio", -0.1, "in [0, 1]"),
        ("optimizer__clip_norm", -1.0, "0 or above"),
        ("data__sequence_length", -8, "positive"),
        ("data__bad_share", 2.0, "in [0, 1]"),
        ("checkpoint__keep", 0, "positive"),
        ("evaluation__every", -1, "0 or above"),
    ],
)
def test_numbers_have_bounds(key, value, says):
    text = message(job(task="cispo", **{key: value}))
    assert f"{key.replace('__', '.')} must be {says}, got {value}" in text


# Those that a rule of their own looks at.
OF_RULES = {
    "cispo": {"is_weight_cap", "is_weight_floor"},
    "sampling": {"repetition_probability"},
    "evaluation": {"every", "depths", "samples", "rows"},
}


@pytest.mark.parametrize("section", sorted(job_config.SECTIONS))
def test_every_number_has_bounds(section):
    keys = job_config.BOUNDS.get(section, {}).values()
    bounded = {key for each in keys for key in each.split()}
    hints = typing.get_type_hints(job_config.SECTIONS[section])
    numbers = {name for name, hint in hints.items() if hint in (int, float)}
    assert bounded | OF_RULES.get(section, set()) == numbers


def test_exponential_decay_to_nothing():
    text = message(job(optimizer__decay="exponential", optimizer__final_ratio=0))
    assert "never reaches 0; take an optimizer.final_ratio above 0" in text


# Every config, by the commands that its docstring gives.


def commands():
    found = []
    for file in sorted(CONFIGS.glob("*.py")):
        if file.stem != "__init__":
            module = importlib.import_module(f"configs.{file.stem}")
            stages = re.findall(rf"--config=configs/{file.name}(?::(\w+))?", module.__doc__ or "")
            found += [pytest.param(module, s, id=f"{file.stem}:{s}") for s in stages or [None]]
    return found


@pytest.mark.parametrize(("module", "stage"), commands())
def test_config_is_built_and_its_step_traced(module, stage):
    assert module.__doc__, "a config's docstring says the command"
    assert "--config=configs/" in module.__doc__
    cfg = job_of(module.get_config(stage) if stage else module.get_config())
    # Of a job in stages the last one, whose rows are the longest.
    stages = resolve(cfg) if cfg.stages else ()
    optimizer = lenient(make_optimizer(cfg.optimizer, cfg.steps, (), stages))
    if stages:
        cfg = dataclasses.replace(cfg, data=stages[-1].data)
    state, graphdef = abstract_state(cfg, optimizer)
    if cfg.task == "cispo":
        new, metrics = jax.eval_shape(
            lambda s, b: cispo_step(
                graphdef, optimizer, cfg.cispo, s, b, cfg.optimizer.microbatches
            ),
            state,
            rl_batch(cfg),
        )
    elif cfg.task == "dpo":
        new, metrics = jax.eval_shape(
            lambda s, b: dpo_step(graphdef, optimizer, cfg.dpo, s, b), state, pair_batch(cfg)
        )
    else:
        new, metrics = jax.eval_shape(
            lambda s, b: language_step(graphdef, optimizer, s, b), state, text_batch(cfg)
        )
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(new)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(state)
    ]
    assert all(x.shape == () for x in metrics.values())


@pytest.mark.parametrize("name", ["cispo_cpu", "cispo_h200", "demo"])
def test_prompts_and_worked_solutions_fit_what_reinforcement_allows(name, tmp_path):
    module = importlib.import_module(f"configs.{name}")
    warm_up, job = (build(module.get_config(stage)) for stage in ("sft", "cispo"))
    size = 3000  # problems, to learn the tokenizer from as well
    warm_up = dataclasses.replace(warm_up, data=dataclasses.replace(warm_up.data, size=size))
    tokenizer = job_tokenizer(warm_up, tmp_path, worked_texts(warm_up))
    problems = list(ReasoningProblems(warm_up.data.tasks, size, seed=1, held_out=True))
    assert {problem.task for problem in problems} == set(warm_up.data.tasks)
    assert {problem.task for problem in problems} == set(job.data.tasks)
    for texts, most in (
        ([prompt_text(problem) for problem in problems], job.cispo.max_prompt_tokens),
        ([worked_solution(problem) for problem in problems], job.cispo.max_new_tokens),
    ):
        assert max(len(tokenizer.encode(text)) for text in texts) <= most


def job_of(config):
    """A grid of runs stands for its last one."""
    return runs_of(config)[-1].cfg if "sizes" in config else build(config)


def abstract_state(cfg, optimizer):
    def make():
        model = Decoder(cfg.model, rngs=nnx.Rngs(cfg.seed), remat=cfg.remat)
        graphs.append(nnx.graphdef(model))
        return init_state(model, optimizer, cfg.seed)[1]

    graphs = []
    return jax.eval_shape(make), graphs[0]


def pair_batch(cfg):
    batch = text_batch(cfg)
    shape = (cfg.data.batch_size, cfg.data.pairs_per_row, 2)
    reference = {"reference": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return batch | {f"rejected_{name}": x for name, x in batch.items()} | reference


def text_batch(cfg):
    shape = (cfg.data.batch_size, cfg.data.sequence_length)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    mask = jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = {"tokens": ids, "segment_ids": ids, "positions": ids, "loss_mask": mask}
    if cfg.data.source == "pictures":
        side = cfg.model.vision.image_size
        tiles = (cfg.data.batch_size, cfg.data.tiles_per_row, side, side, 3)
        batch |= {"image_index": ids, "tiles": jax.ShapeDtypeStruct(tiles, jnp.uint8)}
    return batch


def rl_batch(cfg):
    rl = cfg.cispo
    n, g, t = rl.prompts_per_batch // rl.updates_per_batch, rl.samples_per_prompt, rl.max_new_tokens

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    batch = Batch(
        sequences=array(jnp.int32, n, g, rl.max_prompt_tokens + t),
        prompt_lengths=array(jnp.int32, n, g),
        lengths=array(jnp.int32, n, g),
        tokens=array(jnp.int32, n, g, t),
        behaviour=array(jnp.float32, n, g, t),
        anchor=array(jnp.float32, n, g, t),
        mask=array(jnp.float32, n, g, t),
        advantages=array(jnp.float32, n, g),
    )
    return jax.eval_shape(by_sample, batch)


def test_the_command_line_knows_every_section():
    assert set(cli.SECTIONS) == {*job_config.SECTIONS, "model", "mesh", "sharding"}


# The gin overlay.


@pytest.fixture
def gin(tmp_path):
    """Writes lines to a gin file and returns its path."""

    def write(*lines):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.gin"
        file.write_text("\n".join(lines) + "\n")
        return str(file)

    return write


def test_gin_bindings_reach_every_kind_of_section(gin):
    config = job()
    assert "cispo" not in config
    file = gin(
        "job.steps = 7",
        "optimizer.learning_rate = 1e-5",
        "model.num_heads = 8",
        "data.tasks = ('products',)",
        "cispo.is_weight_cap = 3.0",
        "checkpoint.export = 'hf'",
    )
    apply_gin(config, [file])
    built = build(config)
    assert built.steps == 7
    assert built.optimizer.learning_rate == 1e-5
    assert built.model.num_heads == 8
    assert built.data.tasks == ("products",)
    assert built.cispo.is_weight_cap == 3.0
    assert built.checkpoint.export == "hf"


def test_gin_changes_what_is_bound_alone(gin):
    config = job(optimizer__warmup_steps=3)
    apply_gin(config, [gin("optimizer.learning_rate = 1e-5")])
    assert build(config) == build(job(optimizer__warmup_steps=3, optimizer__learning_rate=1e-5))


def test_later_gin_file_wins(gin):
    config = job()
    apply_gin(config, [gin("job.steps = 7"), gin("job.steps = 8")])
    assert build(config).steps == 8


def test_gin_of_one_job_does_not_leak_into_the_next(gin):
    apply_gin(job(), [gin("job.steps = 7")])
    config = job()
    apply_gin(config, [])
    assert build(config).steps == 10


def test_command_line_wins_over_gin(gin):
    config = job(optimizer__learning_rate=0.5)
    file = gin("optimizer.learning_rate = 1e-5", "job.steps = 7")
    apply_gin(config, [file], explicit=["optimizer.learning_rate"])
    assert build(config).optimizer.learning_rate == 0.5
    assert build(config).steps == 7


@pytest.mark.parametrize(
    "line",
    [
        "optimizer.learning_rat = 1",
        "optimzer.learning_rate = 1",
        "optimizer.learning_rate = ",
        "include 'nowhere.gin'",
    ],
)
def test_gin_line_that_means_nothing(gin, line):
    with pytest.raises(ConfigError, match=r"^gin: "):
        apply_gin(job(), [gin(line)])


def test_missing_gin_file():
    with pytest.raises(ConfigError, match=r"gin file nowhere\.gin does not exist"):
        apply_gin(job(), ["nowhere.gin"])


def test_gin_value_of_a_wrong_type(gin):
    config = job(optimizer__learning_rate=0.5)
    apply_gin(config, [gin("optimizer.learning_rate = 'fast'")])
    assert "optimizer.learning_rate = 'fast' is no float" in message(config)
