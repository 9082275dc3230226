"""What the documentation prints: fenced blocks, the commands in them, and what a command names."""

import argparse
import functools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Programs that are not ours, in commands that are only shown.
FOREIGN = {"npm", "srun", "gcloud", "xpk", "export", "pip", "curl"}
_BLOCK = re.compile(r"(?:^<!-- (.*?) -->\n)?^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)


class Block(NamedTuple):
    """A fenced block: its page and line, language, text, and the comment right before it."""

    page: Path
    line: int
    language: str
    text: str
    comment: str

    @property
    def reason(self):
        """Why it is not run, empty if it is."""
        return self.comment.removeprefix("not run: ") if self.comment.startswith("not run:") else ""

    @property
    def background(self):
        """Whether it serves until the page ends."""
        return self.comment == "background"


def blocks(page):
    """The fenced blocks of a page."""
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, m.start(2)) + 1, m[2], m[3], m[1] or "")
        for m in _BLOCK.finditer(text)
    ]


def commands(text):
    """The commands of a shell block as lists of words; assignments in front are dropped."""
    found = []
    for line in _lines(text):
        words = []
        for word in [*line, ";"]:
            if word in (";", "&&", "&"):
                found.append(words)
                words = []
            elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
                words.append(word)
    return [words for words in found if words]


def _lines(text):
    """Words of each line; a quotation may go over several."""
    pending = ""
    for line in text.replace("\\\n", " ").splitlines():
        pending += line
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=";&")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # No closing quotation.
            pending += "\n"
            continue
        pending = ""
        yield words


def spans(page):
    """Commands of ours in a page's inline code."""
    text = _BLOCK.sub("", page.read_text())
    found = re.findall(r"`((?:mmjax [a-z]|python -m |make [a-z])[^`]*)`", text)
    return [words for span in found for words in commands(span.replace("\n", " "))]


def faults(words):
    """What a command names that is not there."""
    program, rest = words[0], words[1:]
    if program == "srun":  # What it starts is ours.
        return faults(rest)
    if program == "mmjax":
        return _mmjax_faults(rest)
    if program == "make":
        return _make_faults(rest)
    if re.fullmatch(r"(.*/)?python3?", program):
        return _python_faults(rest)
    if program in FOREIGN or re.search(r"/(pre-commit|run)$", program):
        return []
    return [f"{program} is no program that the documentation knows"]


@functools.cache
def _subcommand(name):
    from mmjax import cli

    parser = cli._parser([name])
    (sub,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return sub.choices.get(name)


def _mmjax_faults(rest):
    if rest[:1] in ([], ["--help"]):
        return []
    parser = _subcommand(rest[0])
    if parser is None:
        return [f"mmjax has no command {rest[0]}"]
    known = set(parser._option_string_actions)
    missing = [f"mmjax {rest[0]} has no {flag}" for flag in _flags(rest) if flag not in known]
    files = [w for w in rest if w.startswith("configs/")]
    return missing + [f"{f} does not exist" for f in files if not _exists(f.partition(":")[0])]


def _make_faults(rest):
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
    wanted = [w for w in rest if "=" not in w and not w.startswith("(")]
    return [f"make has no target {w}" for w in wanted if w not in targets]


def _python_faults(rest):
    if rest[:1] != ["-m"]:
        return [] if not rest or rest[0].startswith("-") or _exists(rest[0]) else [f"{rest[0]}?"]
    module = rest[1]
    if module in {"pip", "pytest", "build", "mkdocs", "jupytext"}:
        return [
            f"{w} does not exist" for w in rest[2:] if w.startswith("tests/") and not _exists(w)
        ]
    if module == "train":
        return _train_faults(rest[2:])
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / module.replace(".", "/") / "__main__.py"
    if not path.exists():
        return [f"there is no module {module}"]
    source = path.read_text()
    if "DEFINE_" in source:  # absl's flags, which hold a config's keys too.
        shared = (ROOT / "train" / "__main__.py").read_text() if "job_config" in source else ""
        known = {*re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source + shared), "help"}
        return [
            f"{module} has no {f}" for f in _flags(rest[2:]) if f[2:].split(".")[0] not in known
        ]
    flags = [f for f in _flags(rest[2:]) if f'"{f}"' not in source and f != "--help"]
    return [f"{module} has no {flag}" for flag in flags]


def _train_faults(rest):
    source = (ROOT / "train" / "__main__.py").read_text()
    known = {*re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source), "config", "helpshort", "help"}
    wrong = []
    for flag in _flags(rest):
        name, _, key = flag[2:].partition(".")
        if name not in known:
            wrong.append(f"python -m train has no {flag}")
        elif key and key != "KEY" and not config_has(key):
            wrong.append(f"a job has no key {key}")
    configs = [w.partition("=")[2] for w in rest if w.startswith("--config=")]
    files = [c.partition(":")[0] for c in configs]
    return wrong + [f"{f} does not exist" for f in files if not _exists(f)]


def _flags(words):
    """Long options, without values and the brackets of a synopsis."""
    found = [re.match(r"[\[(]*(--[\w.-]+)", word) for word in words]
    return [m[1].replace("--[no-]", "--") for m in found if m]


def _exists(path):
    placeholder = re.search(r"\b(NAME|FILE|DIR|KEY)\b|…", path) or path == "mine.py"
    return bool(placeholder) or (ROOT / path).exists()


def config_has(key):
    """Whether a job's config has a dotted key."""
    from docs.generate.reference import config_sections, keys

    sections = dict(config_sections())
    name, _, field = key.rpartition(".")
    if name in ("mesh", "sharding"):
        return True
    fields = {f.name for f in keys(sections[name])} if name in sections else set()
    return field in fields or key in sections or key in ("model.preset", "mesh", "sharding")


def python_faults(text):
    """What a Python block names of ours that is not there: imports, and keys of `config`."""
    import ast
    import importlib

    wrong = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("mmjax", "train"):
            module = importlib.import_module(node.module)
            wrong += [f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
        if isinstance(node, ast.Assign):
            target = ast.unparse(node.targets[0])
            if target.startswith("config.") and not config_has(target[7:]):
                wrong.append(target)
    return wrong
