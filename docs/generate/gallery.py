"""The example gallery, from the docstrings of configs/, and the Colabs as pages."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

from docs.generate.pages import ROOT, colabs

_HEAD = """# Examples

One file of `configs/` a job, made from their docstrings. `mmjax plan --config FILE --topology
CHIP:SHAPE` says what each needs elsewhere; [the config reference](reference/config.md) has every
key.
"""
# Curves that were measured, by config.
_CURVES = {"demo": ("images/learning_curve.png", "results/demo_cpu.md")}


class Example(NamedTuple):
    """A config file: its name, title, commands, what it says of hardware and time and of the
    result to expect, and the rest of its docstring.
    """

    name: str
    title: str
    commands: str
    hardware: str
    expected: str
    text: str


def examples() -> list[Example]:
    """All files of configs/.

    Raises:
      ValueError: a docstring lacks the command, "Hardware and time:" or "Expected".
    """
    files = sorted((ROOT / "configs").glob("[a-z]*.py"))
    return [read_example(f.stem, ast.get_docstring(ast.parse(f.read_text())) or "") for f in files]


def read_example(name: str, text: str) -> Example:
    """Takes a config's docstring apart."""
    title, _, rest = text.partition("\n")
    commands = "\n".join(line.strip() for line in rest.splitlines() if line.startswith("    "))
    prose = "\n".join(line for line in rest.splitlines() if not line.startswith("    "))
    flat = re.sub(r"\s+", " ", prose)
    hardware = re.search(r"Hardware and time: (.*?)(?= Expected|$)", flat)
    expected = re.search(r"Expected[^:.]*: .*?(?= Source:|$)", flat)
    if not (commands and hardware and expected):
        raise ValueError(
            f"configs/{name}.py: the docstring needs an indented command, 'Hardware and time:' and "
            "'Expected: …'"
        )
    told = re.sub(r"\s*Hardware and time:.*", "", prose, flags=re.S).strip()
    return Example(name, title, commands, hardware[1], expected[0], told)


def page() -> str:
    """The gallery."""
    parts = [_HEAD]
    for e in examples():
        parts.append(f"## {e.name}\n\n**{e.title}**\n\n```sh\n{e.commands}\n```\n\n{e.text}\n")
        parts.append(f"| | |\n|---|---|\n| file | `configs/{e.name}.py` |")
        expected = e.expected.replace("|", "\\|")
        label, _, what = expected.partition(": ")
        parts.append(f"| hardware, time | {e.hardware} |\n| {label.lower()} | {what} |\n")
        if e.name in _CURVES:
            image, result = _CURVES[e.name]
            parts.append(f"[![Curve of {e.name}]({image})]({result})\n")
    return "\n".join(parts)


def colab_page(name: str) -> str:
    """A Colab as markdown: its text and its code, formulas as MathML."""
    text = (ROOT / "colabs" / f"{name}.py").read_text()
    cells = re.split(r"^# %%", text, flags=re.M)[1:]
    parts = []
    for cell in cells:
        head, _, body = cell.partition("\n")
        if "[markdown]" in head:
            parts.append(_formulas("\n".join(line[2:] for line in body.strip().splitlines())))
        elif body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    told = (
        f"`colabs/{name}.ipynb` is this page as a notebook, `python colabs/{name}.py` runs it as a "
        "program, and `MMJAX_COLAB_SMALL=1` makes it small enough for a test."
    )
    return "\n\n".join([parts[0], told, *parts[1:]]) + "\n"


def _formulas(text: str) -> str:
    from latex2mathml.converter import convert

    text = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1], display="block"), text, flags=re.S)
    return re.sub(r"\$([^$\n]+)\$", lambda m: convert(m[1]), text)


def colab_pages() -> dict[str, str]:
    """Page → markdown of every Colab."""
    return {f"colabs/{name}.md": colab_page(name) for name in colabs()}


def config_files() -> list[Path]:
    """The files behind the gallery."""
    return sorted((ROOT / "configs").glob("[a-z]*.py"))
