"""Every message that a user can meet, collected from the `raise` statements of the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from docs.generate.pages import ROOT

PACKAGES = ("kernels_pallas", "mmjax", "train")


class Kind(NamedTuple):
    """cause: of all errors of a class; way_out: what to do first; page: to read on."""

    cause: str
    way_out: str
    page: str


# One for each public error class; a test holds the list complete.
KINDS = {
    "ApiError": Kind(
        "A request that the server refuses, told as OpenAI's error object.",
        "The message names the field and the value; `code` and the HTTP status say what kind it "
        "is. 429 and 503 carry `Retry-After`.",
        "serve",
    ),
    "CheckpointError": Kind(
        "A model folder that is missing, incomplete, of another shape than its config.json, or in "
        "the way of what is to be written.",
        "All that is wrong is listed at once. `mmjax convert SRC DST --to hf --dry-run` reads the "
        "headers alone and says the same without writing.",
        "convert",
    ),
    "ConfigError": Kind(
        "A config.json or a job's config with an unknown key, a value of another type, or choices "
        "that contradict each other.",
        "Unknown keys come with the nearest known one; the [config reference](config.md) "
        "has all of them.",
        "reference/config",
    ),
    "GuardedError": Kind(
        "A mathematical answer that could not be compared within its time or memory.",
        "Its sample scores 0 and is counted in `verifier_failures`; nothing to do unless they are "
        "many.",
        "rewards",
    ),
    "ImageError": Kind(
        "A picture that cannot be decoded, is too large, or may not be fetched.",
        "Write it again as PNG or JPEG, smaller than the limit that the message names.",
        "vision",
    ),
    "JudgeError": Kind(
        "A judge that does not answer, or answers without a single verdict.",
        "Check `rewards.judge_url`, `rewards.judge_model` and the variable that "
        "`rewards.judge_key` names.",
        "rewards",
    ),
    "PlanError": Kind(
        "A topology, mesh or job that does not divide, or does not fit the chips' memory.",
        "Take `--mesh auto`, more chips, a smaller batch, or `--remat super_block`.",
        "plan",
    ),
    "RequestError": Kind(
        "A prompt or sampling parameters that the engine cannot run.",
        "The message has the value and the limit; limits are arguments of `mmjax.Engine` and flags "
        "of `mmjax serve`.",
        "engine",
    ),
    "SandboxError": Kind(
        "No way to run models' programs apart from the job on this machine.",
        "Install bubblewrap, or run on a kernel that lets users make namespaces; "
        "`rewards.allow_unsandboxed` goes without, with what that means.",
        "rewards",
    ),
    "ServeError": Kind(
        "The server cannot start: address, key or model.",
        "Another `--port`, a key in `MMJAX_API_KEY`, a folder with a tokenizer.json.",
        "serve",
    ),
    "ShardingError": Kind(
        "A mesh that does not fit the devices, or a rule that uses a mesh axis twice.",
        "The sizes of a mesh multiply to the number of devices; one of them may be -1.",
        "launch",
    ),
    "TooShortError": Kind(
        "A synthetic task whose parameters need more tokens than the length that was asked for.",
        "Ask for longer samples, or for fewer words or needles.",
        "evaluation",
    ),
    "TokenizerError": Kind(
        "A tokenizer.json that is missing, broken, or has no end token.",
        "Copy the model's tokenizer.json and tokenizer_config.json into its folder.",
        "convert",
    ),
    "UnavailableError": Kind(
        "A kernel that was asked for by name cannot run on these arrays.",
        "Leave `implementation` out, and the best one that can run is taken.",
        "kernels/index",
    ),
}


class Message(NamedTuple):
    """text: of one error, with the places of values in ⟨⟩; where: its module; cause: what the
    docstring of the function that raises it says.
    """

    text: str
    where: str
    cause: str


def messages() -> dict[str, list[Message]]:
    """Error class → what the source raises it with."""
    found: dict[str, list[Message]] = {name: [] for name in KINDS}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            where = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            for name, text, cause in _raised(ast.parse(file.read_text()), KINDS):
                if len(text.strip("⟨⟩ ")) > 3:
                    found[name].append(Message(text, where, cause))
    return found


def _raised(tree: ast.Module, kinds: Mapping[str, Kind]) -> Iterator[tuple[str, str, str]]:
    """(class, message, documented cause) of every error, and of each item of lists of problems."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    made = {f.name: ast.unparse(f.returns) for f in functions if f.returns}
    for function in functions:
        told = _assigned(function)
        classes = []
        for node in ast.walk(function):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            name = made.get(name, name)
            if name in kinds:
                classes.append(name)
                for text in _texts(node.exc.args, told):
                    yield name, text, _cause(function, name)
        # Checks that gather problems and raise them together tell one message a problem.
        kind = (classes or ["ConfigError"])[0]
        for item in _problems(function):
            for text in _texts([item], told):
                yield kind, text, _cause(function, kind)


def _assigned(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """Texts that a function gives a name before it raises them."""
    nodes = [n for n in ast.walk(function) if isinstance(n, ast.Assign)]
    return {n.targets[0].id: n.value for n in nodes if isinstance(n.targets[0], ast.Name)}


def _problems(function: ast.FunctionDef) -> Iterator[ast.expr]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "problems.append":
            yield node.args[0]
        if isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "problems":
            yield node.value


def _texts(args: Sequence[ast.expr], told: Mapping[str, ast.expr]) -> Iterator[str]:
    """The messages among the arguments of an error."""
    for arg in args:
        if isinstance(arg, ast.Name) and arg.id in told:
            arg = told[arg.id]
        if isinstance(arg, ast.List):
            yield from _texts(arg.elts, told)
        elif isinstance(arg, ast.ListComp):
            yield from _texts([arg.elt], told)
        elif isinstance(arg, ast.JoinedStr | ast.BinOp) or (
            isinstance(arg, ast.Constant) and isinstance(arg.value, str)
        ):
            yield _text(arg)


def _text(node: ast.expr) -> str:
    """A message as it reads, values as ⟨name⟩."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"⟨{_short(node.value)}⟩"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return f"⟨{_short(node)}⟩"


def _short(node: ast.expr) -> str:
    """The last name in an expression that is no function's: what the value is of."""
    called = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and id(part) not in called:
            return part.attr.strip("_")
        if isinstance(part, ast.Name) and id(part) not in called:
            return part.id.strip("_").lower()
    return "…"


def _cause(function: ast.FunctionDef, name: str) -> str:
    text = re.sub(r"\s+", " ", ast.get_docstring(function) or "")
    found = re.search(rf"\b{name}: (.*?)(?= Source:| [A-Z]\w+Error:| Args:|$)", text)
    return found[1] if found else ""


def page() -> str:
    """All error classes and their messages."""
    parts = [_HEAD]
    for name, kind in KINDS.items():
        parts.append(
            f"## {name}\n\n{kind.cause} {kind.way_out} More: [{kind.page}](../{kind.page}.md).\n"
        )
        rows = dict.fromkeys(messages()[name])
        if rows:
            parts.append("| message | when | from |\n|---|---|---|")
            parts += [f"| {_cell(m.text)} | {_cell(m.cause)} | `{m.where}` |" for m in rows]
        parts.append("")
    return "\n".join(parts)


def _cell(text: str) -> str:
    escaped = re.sub(r"([|*_`<>\[\]])", r"\\\1", text)
    return re.sub(r"\s+", " ", escaped.replace("\\<", "&lt;").replace("\\>", "&gt;"))


_HEAD = """# Errors and their messages

Made from the `raise` statements of the source; ⟨⟩ stands for a value. Commands end in one of these
with exit code 2 and no traceback; anything else is a bug. What is no error but still wrong is in
[troubleshooting](../troubleshooting.md).
"""
