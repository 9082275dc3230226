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
      ConfigError: an unknown limit, one that is no number above 0, or what `FileSource` raises.
    """

    fields = ("question",)

    def __init__(
        self, task: str, sandbox: Sandbox, path: str, workers: int = 0, **limits: Any
    ) -> None:
        super().__init__(task, path)
        unknown = sorted(set(limits) - set(Limits._fields))
        if unknown:
            known = ", ".join(("path", "workers", *Limits._fields))
            raise ConfigError(f"task {task!r}: unknown parameter {unknown}; known: {known}")
        for name, value in {**limits, "workers": workers}.items():
            fits = isinstance(value, int | float if name == "seconds" else int) and (
                value >= 0 if name == "workers" else value > 0
            )
            if isinstance(value, bool) or not fits:
                kind = "number" if name == "seconds" else "whole number"
                least = "0 or above" if name == "workers" else "above 0"
                raise ConfigError(f"task {task!r}: {name} must be a {kind} {least}, got {value!r}")
        self._sandbox, self._limits = sandbox, Limits()._replace(**limits)
        self.workers = workers or os.cpu_count() or 1

    def invalid(self, row: Mapping[str, Any]) -> str:
        """A row without tests would take any program."""
        tests, asserts = row.get("tests"), row.get("asserts")
        if (tests is None) == (asserts is None):
            return "needs either tests or asserts"
        if asserts is not None and not (isinstance(asserts, str) and "assert" in asserts):
            return "needs as asserts a text of Python with an assert"
        listed = isinstance(tests, list) and tests and all(map(_is_test, tests))
        if asserts is None and not listed:
            return 'needs as tests a list of {"input": text, "output": text}'
        return super().invalid(row)

    def question(self, row: dict[str, Any]) -> str:
        """The row's, and how to answer."""
        return row["question"] + _HINTS["asserts" if row.get("tests") is None else "tests"]

    def score(self, problem: Problem, answer: str) -> float:
        """1 if the one program of the answer passes all tests."""
        program = only_program(answer)
        if program is None:
            return 0.0
        if (asserts := problem.entry.get("asserts")) is not None:
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

    Plain values come as copies: numbers, text, bytes, None, and tuples, lists, sets, frozensets and
    dictionaries of them. Others stay with the program: their attributes can be read, their methods
    called, and they can be iterated, indexed, measured and written, but what they are compared with
    never goes to the program. One whose class is derived from a plain one is equal to what that
    would be; any other is equal to itself alone. Arguments are copied, so a change to them does not
    show. Errors come with their text, as their class or the built-in one it is derived from.
    """
    return sandbox.converse(
        _SERVER.format(program=program, wire=_WIRE),
        _CLIENT.format(asserts=asserts, wire=_WIRE),
        limits,
    )


def _is_test(test: Any) -> bool:
    return isinstance(test, dict) and all(isinstance(test.get(k), str) for k in ("input", "output"))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


# What both sides know: how values travel, as literals. Those that are not plain have a number.
_WIRE = """
containers = (dict, list, tuple, set, frozenset)
scalars = (bool, int, str, bytes)

def packed(value, other, derived=False):
    kind = type(value)
    if derived:
        plain = (*containers, float, complex, *scalars)
        kind = next((t for t in plain if isinstance(value, t)), kind)
    if value is None or kind in scalars:
        return value if kind is type(value) else kind(value)
    if kind in (float, complex):
        return (kind.__name__, kind.__repr__(value))
    if kind in containers:
        each = dict.items(value) if kind is dict else kind.__iter__(value)
        return (kind.__name__, [packed(x, other) for x in each])
    return other(value)

def unpacked(value, other):
    if not isinstance(value, tuple):
        return value
    kind, inner = value
    for plain in containers:
        if kind == plain.__name__:
            return plain(unpacked(x, other) for x in inner)
    return other(inner) if kind == "held" else {"float": float, "complex": complex}[kind](inner)
"""
# The program, then a loop that answers requests: the number of an object (None for the program
# itself), what to look up in it or do with it (None for its plain value), and arguments.
_SERVER = """
import os, sys
channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
requests = os.fdopen(os.dup(0), encoding="utf-8")
os.dup2(os.open("/dev/null", os.O_RDWR), 0)
os.dup2(0, 1)
main = {{"__name__": "__main__", "__builtins__": __builtins__}}
exec(compile({program!r}, "program.py", "exec"), main)

import ast, builtins, operator
exec({wire!r})
held = []
special = {{"__call__": operator.call, "__getitem__": operator.getitem}}
special |= {{f"__{{f.__name__}}__": f for f in (bool, float, int, iter, len, next, repr, str)}}

def hold(value):
    held.append(value)
    return ("held", len(held) - 1)

def refuse(value):
    raise TypeError("no plain value")

def lineage(error):
    names = [c.__name__ for c in error.__mro__]
    known = [getattr(builtins, c.__name__, None) is c for c in error.__mro__]
    return names[: known.index(True) + 1]

def answer(owner, name, arguments):
    if name is None:
        return ("value", packed(held[owner], refuse, derived=True))
    if arguments is not None:
        args, kwargs = unpacked(arguments, held.__getitem__)
        return ("value", packed(special[name](held[owner], *args, **kwargs), hold))
    found = main[name] if owner is None else getattr(held[owner], name)
    if isinstance(found, type) and issubclass(found, Exception):
        return ("error", lineage(found))
    return ("value", packed(found, hold))

for line in requests:
    try:
        reply = repr(answer(*ast.literal_eval(line)))
    except BaseException as error:
        reply = repr(("raised", lineage(type(error)), list(map(str, error.args))))
    channel.write(reply + "\\n")
    channel.flush()
"""
_CLIENT = """
import ast, builtins, os, sys
channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
replies = os.fdopen(os.dup(0), encoding="utf-8")
os.dup2(os.open("/dev/null", os.O_RDWR), 1)
exec({wire!r})
errors = {{}}

def error_class(names):
    first, *rest = map(str, names)
    if not rest:
        found = getattr(builtins, first, None)
        return found if isinstance(found, type) and issubclass(found, Exception) else RuntimeError
    key = (first, *rest)
    return errors.get(key) or errors.setdefault(key, type(first, (error_class(rest),), {{}}))

def passed(value):
    if isinstance(value, Remote):
        return ("held", number_of(value))
    raise TypeError(f"{{type(value).__name__}} cannot be passed to the program")

def ask(owner, name, arguments=None):
    channel.write(repr((owner, name, arguments)) + "\\n")
    channel.flush()
    kind, *rest = ast.literal_eval(replies.readline(1 << 20))
    if kind == "value":
        return unpacked(rest[0], Remote)
    if kind == "error":
        return error_class(rest[0])
    raise error_class(rest[0])(*map(str, rest[1]))

def special(name):
    def method(self, *args, **kwargs):
        return ask(number_of(self), name, packed((args, kwargs), passed))
    return method

class Remote:
    __slots__ = ("_Remote__number",)
    def __init__(self, number): self.__number = int(number)
    def __getattr__(self, name): return ask(self.__number, name)
    __call__, __getitem__, __next__ = map(special, ("__call__", "__getitem__", "__next__"))
    __len__, __bool__, __int__, __float__ = map(
        special, ("__len__", "__bool__", "__int__", "__float__"))
    __str__, __repr__ = map(special, ("__str__", "__repr__"))
    def __iter__(self):
        each = special("__iter__")(self)
        return each if isinstance(each, Remote) else iter(each)
    def __hash__(self): return hash(self.__number)
    # What these compare with does not go to the program.
    def __contains__(self, value): return any(each == value for each in self)
    def __eq__(self, other):
        if isinstance(other, Remote):
            return number_of(other) == self.__number or same(plain_of(self), plain_of(other))
        return same(plain_of(self), [other])

def number_of(remote): return remote._Remote__number

def plain_of(remote):
    try:
        return [ask(number_of(remote), None)]
    except TypeError:
        return []

def same(one, other): return bool(one and other) and one == other

class Names(dict):
    def __missing__(self, name):
        if hasattr(builtins, name):
            return getattr(builtins, name)
        return ask(None, name)

exec(compile({asserts!r}, "asserts.py", "exec"), Names(__name__="__main__"))
"""
