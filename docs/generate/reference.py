"""The API reference and the config reference, from the source."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import re
from collections.abc import Iterator

# Modules whose `__all__` is their surface; a name is told where it first comes.
SURFACES = (
    *("mmjax", "mmjax.engine", "mmjax.convert", "mmjax.vision", "mmjax.plan", "mmjax.serve"),
    *("kernels_pallas", "kernels_pallas.grouped_matmul", "kernels_pallas.row_norm"),
)
# Names that users import from modules without an `__all__`.
ENTRY_POINTS = {
    "mmjax.cache": ("PagedCache",),
    "mmjax.chat": ("render_chat", "split_thinking", "ReplyParser"),
    "mmjax.config": ("ConfigError",),
    "mmjax.convert.synth": ("synthesise", "preset"),
    "mmjax.model": ("Output", "Aux", "Intermediates", "ImageTokens"),
    "mmjax.sharding": (
        *("ShardingRules", "ShardingError", "make_mesh", "parse_mesh", "param_shardings"),
        "constrain",
    ),
    "mmjax.tokenizer": ("TokenizerError",),
    "mmjax.layers.lightning": ("LightningAttention", "decay_rates"),
    "mmjax.layers.attention": ("SoftmaxAttention",),
    "mmjax.layers.moe": ("MoE", "load_balancing_loss"),
    "kernels_pallas.dispatch": ("UnavailableError",),
    "train.config": ("build", "JobConfig"),
    "train.tasks": ("run_task",),
    "train.job": ("Job",),
    "train.state": ("TrainState",),
    "train.step": ("language_step",),
    "train.pretrain": ("run",),
    "train.sft": ("run",),
    "train.dpo": ("run", "dpo_step", "reference_logprobs"),
    "train.losses": ("dpo_loss",),
    "train.cispo": ("run", "cispo_step"),
    "train.policy_losses": ("cispo", "grpo", "dapo", "gspo", "normalise"),
    "train.advantages": ("group_advantages",),
    "train.metrics": ("read_metrics",),
    "train.report": ("write_report",),
    "train.rewards.sandbox": ("SandboxError",),
}
_PAGES = {"mmjax": "mmjax", "kernels_pallas": "kernels_pallas", "train": "train"}
_INTRODUCTIONS = {
    "mmjax": "Models, checkpoints, the engine, the server and the planner. All of it is in the "
    "wheel.",
    "kernels_pallas": "Arrays in, arrays out. In the wheel.",
    "train": "The trainers run from a checkout: `python -m train`. These are the functions behind "
    "the command line.",
}


def entries() -> dict[str, list[str]]:
    """Module → names that the reference tells under it, each object once."""
    found: dict[str, list[str]] = {}
    told: set[int] = set()
    listed = [(m, tuple(importlib.import_module(m).__all__)) for m in SURFACES]
    for module, names in [*listed, *ENTRY_POINTS.items()]:
        for name in names:
            value = getattr(importlib.import_module(module), name)
            if id(value) not in told:
                told.add(id(value))
                found.setdefault(module, []).append(name)
    return found


def api_pages() -> dict[str, str]:
    """Page → markdown with one mkdocstrings block a name."""
    pages = {}
    for package, page in _PAGES.items():
        parts = [f"# {package}\n\n{_INTRODUCTIONS[package]}\n"]
        for module, names in entries().items():
            if module.partition(".")[0] != package:
                continue
            summary = (importlib.import_module(module).__doc__ or "").strip().split("\n\n")[0]
            parts.append(f"## {module}\n\n{summary}\n")
            parts += [f"::: {module}.{name}\n" for name in names]
        pages[f"reference/{page}.md"] = "\n".join(parts)
    return pages


def attribute_texts(section: type) -> dict[str, str]:
    """Field → its description, from the docstring's Attributes; names may share a description."""
    lines = inspect.getdoc(section).split("\nAttributes:\n")[1].split("\n\n")[0].split("\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        start = re.match(r"  ([\w, ]+): (.*)", line)
        if start:
            names = [name.strip() for name in start[1].split(",")]
            found |= dict.fromkeys(names, start[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def config_sections() -> Iterator[tuple[str, type]]:
    """Every section of a job's config with its dataclass, the job itself first."""
    from mmjax.config import ModelConfig
    from mmjax.vision import VisionConfig
    from train.config import SECTIONS, JobConfig

    yield "", JobConfig
    yield "model", ModelConfig
    yield "model.vision", VisionConfig
    yield from SECTIONS.items()


def keys(section: type) -> list[dataclasses.Field]:
    """The fields of a section that a config may set."""
    return [field for field in dataclasses.fields(section) if field.metadata.get("key", True)]


def config_page() -> str:
    """Every key of a job, with type, default and meaning."""
    parts = [_CONFIG_HEAD]
    for name, section in config_sections():
        parts.append(f"## {name or 'The job'}\n\n{inspect.getdoc(section).split(chr(10))[0]}\n")
        parts.append("| key | type | default | |\n|---|---|---|---|")
        texts = attribute_texts(section)
        for field in keys(section):
            key = f"{name}.{field.name}" if name else field.name
            cells = [f"`{key}`", f"`{field.type}`", _default(field), _told(field, texts)]
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        parts.append("")
    return "\n".join(parts)


_CONFIG_HEAD = """# Config reference

A file of `configs/` has a `get_config()` that returns an `ml_collections.ConfigDict` of these keys.
Any of them can be set on the command line, `--config.KEY=VALUE`, or by a gin file, `--gin_file`. A
key that does not exist is an error that names the nearest one. `model.preset` is "tiny",
"minimax_text_01", "minimax_m1" or "minimax_vl_01"; other keys of `model` replace the preset's.
Made from the dataclasses in `train/config.py`, `train/cispo_config.py` and `mmjax/config.py`.
"""


def _told(field: dataclasses.Field, texts: dict[str, str]) -> str:
    """A field's description: its own, the one that mentions it, or a link to its section.

    Raises:
      KeyError: the docstring does not mention the field.
    """
    if field.name in texts:
        return texts[field.name]
    if dataclasses.is_dataclass(getattr(field.default_factory, "__mro__", [None])[0]):
        return f"The section [{field.name}](#{field.name})."
    shared = [t for t in texts.values() if re.search(rf"\b{field.name}\b", t)]
    if not shared:
        raise KeyError(f"no description of {field.name}; add it to the docstring's Attributes")
    return shared[0]


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return "its own" if dataclasses.is_dataclass(made) else f"`{made!r}`"
    return "required"


def commands_page() -> str:
    """What every command says of itself with --help."""
    from mmjax import cli

    parts = ["# Commands\n\nWhat `--help` says; made from the parsers.\n"]
    for name in ("convert", "synth", "generate", "serve", "plan"):
        parts.append(f"## mmjax {name}\n\n```\n{_help(cli.main, [name, '--help'])}```\n")
    return "\n".join(parts)


def _help(main, argv: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(argv)
    return out.getvalue()


def module_docstring(path) -> str:
    """Of a file that is not to be imported."""
    return ast.get_docstring(ast.parse(path.read_text())) or ""
