"""Programs with tests, run in the sandbox.

Tests of input and output each get a run of their own. Assertions run in a second sandbox and call
the program's functions over a pipe: only values of Python's own types come back, so a program can
neither read the tests, nor end them early, nor answer with an object that equals everything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from mmjax.config import ConfigError
from train.data.files import FileSource
from train.data.sources import Problem
from train.rewards.sandbox import Limits, Outcome, Sandbox

_FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_MAX_LENGTH = 100_000
_HINTS = {
    "tests": "\n\nWrite a Python program that reads standard input and writes standard output. "
    "Answer with one code block.",
    "asserts": "\n\nAnswer with Python code in one code block.",
}


class ProgramSource(FileSource):
    """Rows of `question` and either `tests`, a list of {"input", "output"}, or `asserts`, code.

    Args:
      task: As the config names it.
      sandbox: Where programs run.
      path: Of the JSONL file.
      workers: Programs at a time; 0 for as many as there are CPUs.
      limits: Fields of `Limits`, such as seconds or memory_mb.

    Raises:
      ConfigError: an unknown limit, or what `FileSource` raises.
    """

    fields = ("question",)

    def __init__(
        self, task: str, sandbox: Sandbox, path: str, workers: int = 0, **limits: float
    ) -> None:
        super().__init__(task, path)
        unknown = sorted(set(limits) - set(Limits._fields))
        if unknown:
            known = ", ".join(("path", "workers", *Limits._fields))
            raise ConfigError(f"task {task!r}: unknown parameter {unknown}; known: {known}")
        whole: dict[str, Any] = {k: v if k == "seconds" else int(v) for k, v in limits.items()}
        self._sandbox, self._limits = sandbox, Limits()._replace(**whole)
        self.workers = workers or os.cpu_count() or 1

    def invalid(self, row: Mapping[str, Any]) -> str:
        """A row without tests would take any program."""
        tests, asserts = row.get("tests"), row.get("asserts")
        if (tests is None) == (asserts is None):
            return "needs either tests or asserts"
        if isinstance(asserts, str) and "assert" not in asserts:
            return "has asserts without an assert"
        listed = isinstance(tests, list) and tests and all(map(_is_test, tests))
        if asserts is None and not listed:
            return 'needs as tests a list of {"input": text, "output": text}'
        return super().invalid(row)

    def question(self, row: dict[str, Any]) -> str:
        """The row's, and how to answer."""
        return row["question"] + _HINTS["tests" if "tests" in row else "asserts"]

    def score(self, problem: Problem, answer: str) -> float:
        """1 if the one program of the answer passes all tests."""
        program = only_program(answer)
        if program is None:
            return 0.0
        if "asserts" in problem.entry:
            asserts = problem.entry["asserts"]
            return float(run_asserts(self._sandbox, program, asserts, self._limits).status == "ok")
        return float(all(self._passes(program, test) for test in problem.entry["tests"]))

    def _passes(self, program: str, test: Mapping[str, str]) -> bool:
        outcome = self._sandbox.run(program, test["input"].encode(), self._limits)
        return outcome.status == "ok" and _lines(outcome.output.decode("utf-8", "replace")) == (
            _lines(test["output"])
        )


def only_program(answer: str) -> str | None:
    """The one code block of an answer; all of it if there is none; None if there are several."""
    if len(answer) > _MAX_LENGTH:
        return None
    if "```" not in answer:
        return answer
    blocks = _FENCE.findall(answer)
    return blocks[0] if len(blocks) == 1 and answer.count("```") == 2 else None


def run_asserts(sandbox: Sandbox, program: str, asserts: str, limits: Limits) -> Outcome:
    """Runs assertions on a program's functions, classes and constants.

    Its values come as literals: numbers but inf and nan, text, bytes, None, and tuples, lists,
    sets and dictionaries of them. Other values stay with the program; their methods can be called
    and their attributes read. Arguments are copied, so a change to them does not show.
    """
    return sandbox.converse(
        _SERVER.format(program=program), _CLIENT.format(asserts=asserts), limits
    )


def _is_test(test: Any) -> bool:
    return isinstance(test, dict) and all(isinstance(test.get(k), str) for k in ("input", "output"))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


# The program, then a loop that answers requests: (what to look up on which object, arguments).
_SERVER = """
import os, sys
channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
requests = os.fdopen(os.dup(0), encoding="utf-8")
os.dup2(os.open("/dev/null", os.O_RDWR), 0)
os.dup2(0, 1)
main = {{"__name__": "__main__", "__builtins__": __builtins__}}
exec(compile({program!r}, "program.py", "exec"), main)

import ast
held = []
plain = (int, float, complex, str, bytes, bool, type(None))

def literal(value):
    if type(value) in plain:
        return True
    if type(value) in (list, tuple, set):
        return all(map(literal, value))
    return type(value) is dict and all(map(literal, value)) and all(map(literal, value.values()))

def written(value):
    if literal(value):
        return repr(("value", value))
    held.append(value)
    return repr(("held", len(held) - 1, callable(value)))

for line in requests:
    owner, name, arguments = ast.literal_eval(line)
    try:
        found = getattr(held[owner], name) if owner is not None else main[name]
        reply = written(found if arguments is None else found(*arguments[0], **arguments[1]))
    except BaseException as error:
        reply = repr(("raised", type(error).__name__))
    channel.write(reply + "\\n")
    channel.flush()
"""
_CLIENT = """
import ast, builtins, os, sys
channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
replies = os.fdopen(os.dup(0), encoding="utf-8")
os.dup2(os.open("/dev/null", os.O_RDWR), 1)

def ask(*request):
    channel.write(repr(request) + "\\n")
    channel.flush()
    kind, *rest = ast.literal_eval(replies.readline(1 << 20))
    if kind == "value":
        return rest[0]
    if kind == "held":
        return Remote(int(rest[0]))
    error = getattr(builtins, str(rest[0]), None)
    known = isinstance(error, type) and issubclass(error, Exception)
    raise error() if known else RuntimeError(rest)

class Remote:
    def __init__(self, number): self._number = number
    def __getattr__(self, name): return Method(self._number, name)
    def __call__(self, *args, **kwargs): return ask(self._number, "__call__", (args, kwargs))

class Method:
    def __init__(self, owner, name): self._owner, self._name = owner, name
    def __call__(self, *args, **kwargs): return ask(self._owner, self._name, (args, kwargs))

class Names(dict):
    def __missing__(self, name):
        if hasattr(builtins, name):
            return getattr(builtins, name)
        found = ask(None, name, None)
        return Method(None, name) if isinstance(found, Remote) else found

exec(compile({asserts!r}, "asserts.py", "exec"), Names(__name__="__main__"))
"""
