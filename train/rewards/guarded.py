"""Computer algebra on a model's text, in processes that may hang, grow or die.

An expression such as 9^9^9^9 takes a computer algebra system for ever. So it runs in processes of
its own, which end themselves after some seconds; the answer then counts as failed and the next
one gets a fresh process. No text is evaluated as Python: expressions are built node by node.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import math
import queue
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 5.0
_MEMORY = 2 << 30
_ROOT = Path(__file__).parents[2]


class GuardedError(Exception):
    """An answer that took too long or that the checker could not make sense of."""


class Guarded:
    """Processes that check; as many as calls come at the same time, kept for the next."""

    def __init__(self) -> None:
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()

    def ask(self, check: str, *arguments: str) -> bool:
        """The verdict of a function of `CHECKS`.

        Raises:
          GuardedError: no verdict.
        """
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = _started()
        try:
            reply = _exchange(process, json.dumps([check, *arguments]))
        except (OSError, ValueError):
            reply = None
        if reply is None:
            process.kill()
            process.communicate()
            raise GuardedError(f"{check} gave no verdict within {SECONDS} s and {_MEMORY >> 30} GB")
        self._idle.put(process)
        if isinstance(reply, str):
            raise GuardedError(reply)
        return reply

    def close(self) -> None:
        """Ends the idle processes."""
        while not self._idle.empty():
            self._idle.get().communicate()


@functools.cache
def shared() -> Guarded:
    """The one of this process."""
    return Guarded()


def _started() -> subprocess.Popen[str]:
    # It ends when its standard input does, so it outlives this process by SECONDS at most.
    return subprocess.Popen(
        [sys.executable, "-m", "train.rewards.guarded"],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _exchange(process: subprocess.Popen[str], line: str) -> bool | str | None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    return json.loads(answer) if answer else None


# In the other process.


def _same_mathematics(gold: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list[Any]:
        boxed = f"\\boxed{{{text}}}"
        return list(parse(boxed, [LatexExtractionConfig()], parsing_timeout=None))

    return bool(verify(read(gold), read(answer), timeout_seconds=None))


def _same_form(gold: str, answer: str) -> bool:
    given = _built(answer)
    return given is not None and bool(build(gold) == given)


def _antiderivative(integrand: str, variable: str, answer: str) -> bool:
    import sympy

    given = _built(answer)
    # What else has a slope of its own in another letter would pass for a constant.
    if given is None or {s.name for s in given.free_symbols} - {variable, "C"}:
        return False
    slope = sympy.diff(given, sympy.Symbol(variable))
    return bool(sympy.simplify(slope - build(integrand)) == 0)


def _built(answer: str) -> Any | None:
    with contextlib.suppress(SyntaxError, ValueError):
        return build(answer)
    return None


CHECKS: dict[str, Callable[..., bool]] = {
    "same_mathematics": _same_mathematics,
    "same_form": _same_form,
    "antiderivative": _antiderivative,
}
_FUNCTIONS = ("sin", "cos", "tan", "asin", "acos", "atan", "exp", "log", "sqrt", "sinh", "cosh")
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}


def build(text: str) -> Any:
    """A SymPy expression from Python's notation, of numbers, letters, + - * / ** and functions.

    Raises:
      ValueError: anything else in it.
    """
    import sympy

    def node_of(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=bool()):
                pass
            case ast.Constant(value=int() | float() as value) if abs(value) < math.inf:
                return sympy.Rational(str(value))
            case ast.Name(id=name) if name in ("pi", "E"):
                return getattr(sympy, name)
            case ast.Name(id=name) if len(name) == 1 and name.isascii():
                return sympy.Symbol(name)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -node_of(inner)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](node_of(left), node_of(right))
            case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in _FUNCTIONS:
                return getattr(sympy, name)(node_of(inner))
        raise ValueError(f"{type(node).__name__} in an expression")

    return node_of(ast.parse(text.strip().replace("^", "**"), mode="eval").body)


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import math_verify  # noqa: F401  takes seconds, which are not the answer's
    import sympy  # noqa: F401

    for line in sys.stdin:
        check, *arguments = json.loads(line)
        # What SIGALRM does by default cannot be held up: it ends the process.
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            reply: bool | str = CHECKS[check](*arguments)
        except Exception as error:  # a parser may raise anything on a model's text
            reply = f"{type(error).__name__}: {str(error)[:200]}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    _main()
