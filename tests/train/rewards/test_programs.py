"""Programs scored by tests: what passes, and what tries to pass without solving anything."""

import json

import pytest

from mmjax.config import ConfigError
from train.data.reasoning import ReasoningProblems
from train.data.sources import Problem
from train.rewards.programs import ProgramSource, only_program, run_asserts
from train.rewards.sandbox import Limits, Sandbox

LIMITS = Limits(seconds=10.0, cpu_seconds=2, memory_mb=128)


@pytest.fixture(scope="module")
def box():
    return Sandbox()


@pytest.fixture(scope="module")
def source(box, tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "a.jsonl"
    path.write_text(json.dumps({"question": "x", "asserts": "assert f(1) == 2"}))
    return ProgramSource("code", box, str(path), workers=2, cpu_seconds=2, memory_mb=128)


SUMS = {"tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10"}]}
ADD = "print(sum(map(int, input().split())))"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (ADD, True),
        (f"```python\n{ADD}\n```", True),
        (f"Here:\n\n```py\n{ADD}\n```\nIt adds.", True),
        (f"{ADD}\nprint()\n", True),
        (f"```\n{ADD}\n```\n```\n{ADD}\n```", False),
        (f"```\n{ADD}", False),
        ("print(3)", False),
        ("print('3 10')", False),
        ("print(3)\nprint(10)", False),
        (f"{ADD}\nraise SystemExit(1)", False),
        ("", False),
        ("print(\u0456nput())", False),
        (ADD + "\n#" + "x" * 200_000, False),
    ],
)
def test_input_and_output(source, answer, right):
    assert source.score(Problem("code", "?", "", SUMS), answer) == float(right)


PLUS = "assert f(1) == 2\nfor i in range(3):\n    assert f(i) == i + 1"


@pytest.mark.parametrize(
    "program",
    [
        "def f(x): return x + 1",
        "f = lambda x: x + 1\nprint('noise', 3)",
        "import sys\nclass F:\n  def __call__(self, x): return x + 1\nf = F()\nsys.stdin.read()",
        "def f(x):\n  print('value', 3)\n  return x + 1\nif __name__ == '__main__': print(f(3))",
    ],
)
def test_right_programs_pass_assertions(box, program):
    outcome = run_asserts(box, program, PLUS, LIMITS)
    assert outcome.status == "ok", outcome.message


@pytest.mark.parametrize(
    "program",
    [
        "def f(x): return x",
        "",
        "def f(x",
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import os\ndef f(x): os._exit(0)",
        "def f(x): raise SystemExit(0)",
        "def f(x): raise AssertionError",
        "class Same:\n  def __eq__(self, other): return True\ndef f(x): return Same()",
        "class Same(int):\n  def __eq__(self, other): return True\ndef f(x): return Same(x)",
        "class Text(str):\n  def __repr__(self): return '__import__(\"os\")._exit(0)'\n"
        "def f(x): return Text()",
        # Writes what a right reply looks like, or the end of a process, wherever it can.
        "import os\nfor fd in range(3, 30):\n  try: os.write(fd, b\"('value', 2)\\n\" * 9)\n"
        "  except OSError: pass\ndef f(x): return x",
        "def f(x):\n  import sys\n  sys._getframe(1).f_globals['written'] = lambda v: "
        "'exit()'\n  return x",
        "import builtins\nbuiltins.repr = lambda x: '(\"value\", True)'\ndef f(x): return x",
    ],
)
def test_exploits_fail_assertions(box, program):
    assert run_asserts(box, program, PLUS, LIMITS).status == "error"


def test_assertions_on_classes_errors_and_containers(box):
    program = """
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
LIMIT = 5
def group(words, by=None): return {len(w): {w} for w in words}
"""
    asserts = """
def check(candidate):
    assert candidate(["a", "bcd"]) == {1: {"a"}, 3: {"bcd"}}
check(group)
assert group(words=()) == {} and LIMIT == 5
stack = Stack(1)
stack.push((2, None, 1.5, b"x"))
assert stack.pop() == (2, None, 1.5, b"x") and stack.pop() == 1
try:
    stack.pop()
    raise ValueError
except IndexError:
    pass
"""
    outcome = run_asserts(box, program, asserts, LIMITS)
    assert outcome.status == "ok", outcome.message


def test_what_ordinary_answers_return(box):
    program = """
import collections, dataclasses, enum, math
class Negative(ValueError): pass
class Deeper(Negative): pass
@dataclasses.dataclass
class Point:
    x: int
    y: float = math.inf
    def shifted(self, by): return Point(self.x + by.x, self.y)
class Node:
    ROOTS = 2
    def __init__(self, *children): self.children = list(children)
    def __len__(self): return len(self.children)
    def __getitem__(self, i): return self.children[i]
    def __str__(self): return "node"
class Colour(enum.Enum):
    RED = 1
Pair = collections.namedtuple("Pair", "left right")
def count(text): return collections.Counter(text)
def squares(n): return (i * i for i in range(n))
def root(x):
    if x < 0: raise Negative("below", x)
    if x == 0: raise Deeper("none")
    return {x ** 0.5, frozenset([x])}
def apply(x): return x.children
"""
    asserts = """
assert count("aab") == {"a": 2, "b": 1} and count("aab") == count("aba") != count("b")
assert count("aab")["a"] == 2 and "b" in count("aab") and "c" not in count("aab")
assert len(count("aab")) == 2 and sorted(count("ba")) == ["a", "b"]
assert list(squares(3)) == [0, 1, 4] and next(squares(1)) == 0 and sum(squares(4)) == 14
assert root(4) == {2.0, frozenset({4})}
try:
    root(-4)
except Negative as error:
    assert error.args == ("below", "-4")
try:
    root(0)
except ValueError as error:
    assert str(error) == "none"
try:
    root(0)
except Negative:
    pass
point = Point(3)
assert point.x == 3 and point.y == float("inf") and point.shifted(Point(4)).x == 7
assert point == point and point != Point(3) and str(point) == "Point(x=3, y=inf)"
node = Node(Node(), 5)
assert len(node) == 2 and node[1] == 5 and str(node) == "node" and not node[0] and node
assert Node.ROOTS == 2 and len(apply(node)) == 2 and [len(n) for n in node.children[:1]] == [0]
pair = Pair(1, right=2)
assert pair == (1, 2) and pair.right == 2 and Colour.RED.value == 1 and [*Colour][0].name == "RED"
"""
    outcome = run_asserts(box, program, asserts, LIMITS)
    assert outcome.status == "ok", outcome.message


def test_program_is_not_told_what_its_values_are_compared_with(box):
    program = """
seen = []
class Spy:
    def __eq__(self, other): return seen.append(other) or True
    def __contains__(self, other): return seen.append(other) or True
    def __lt__(self, other): return seen.append(other) or True
    def __iter__(self): return iter([self])
def f(): return Spy()
"""
    asserts = """
found = f()
assert found != 98765 and 98765 not in found and [found] != [98765] and found in [found]
try:
    found < 98765
    raise ValueError
except TypeError:
    pass
assert seen == []
"""
    outcome = run_asserts(box, program, asserts, LIMITS)
    assert outcome.status == "ok", outcome.message


def test_program_cannot_see_the_assertions(box):
    """Neither in its memory nor in the memory of processes it can reach."""
    program = """
import gc, sys
def f(x):
    seen = [repr(o) for o in gc.get_objects() if isinstance(o, (str, dict, tuple))]
    frame = sys._getframe()
    while frame:
        seen += map(repr, [frame.f_locals, frame.f_globals])
        frame = frame.f_back
    return "98765" in "".join(seen).replace('"98765"', "")
"""
    asserts = "assert f(1) is False\nassert 98765 == 98765"
    assert run_asserts(box, program, asserts, LIMITS).status == "ok"


def test_programs_are_scored_side_by_side(source):
    problem = Problem("code", "?", "", {"asserts": PLUS})
    good, bad = "def f(x): return x + 1", "def f(x): return x"
    assert source.score_all([(problem, p) for p in (good, bad, good)]) == [1.0, 0.0, 1.0]


def test_one_code_block_or_none():
    assert only_program("a") == "a"
    assert only_program("x\n```python\na\n```\ny") == "a\n"
    assert only_program("```\na\n```\n```\nb\n```") is None


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "x"}, "needs either tests or asserts"),
        ({"question": "x", "tests": [], "asserts": "assert 1"}, "needs either"),
        ({"question": "x", "tests": []}, "needs as tests a list"),
        ({"question": "x", "tests": [{"input": "1"}]}, "needs as tests a list"),
        ({"question": "x", "asserts": "f(1)"}, "needs as asserts a text"),
        ({"question": "x", "asserts": ["assert f(1)"]}, "needs as asserts a text"),
        ({"asserts": "assert f(1)"}, "needs the text question"),
    ],
)
def test_row_without_tests_would_take_any_program(tmp_path, row, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=complaint):
        ReasoningProblems((f"code(path={str(path)!r})",), 1, 0)


@pytest.mark.parametrize(
    ("row", "right"),
    [({**SUMS, "asserts": None}, ADD), ({"asserts": PLUS, "tests": None}, "def f(x): return x+1")],
)
def test_row_of_a_table_has_the_other_field_empty(box, tmp_path, row, right):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "x", **row}))
    source = ProgramSource("code", box, str(path))
    (problem,) = [*source.draw(1, 0, held_out=False), *source.draw(1, 0, held_out=True)]
    assert ("standard input" in problem.question) == (right == ADD)
    assert source.score(problem, right) == 1.0
    assert source.score(problem, "pass") == 0.0


@pytest.mark.parametrize(
    ("limit", "complaint"),
    [
        ("memory_mb='abc'", "memory_mb must be a whole number above 0, got 'abc'"),
        ("memory_mb=1.5", "memory_mb must be a whole number"),
        ("workers=-1", "workers must be a whole number 0 or above"),
        ("seconds='5'", "seconds must be a number above 0"),
        ("processes=True", "processes must be a whole number"),
    ],
)
def test_limits_are_numbers(tmp_path, limit, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "x", **SUMS}))
    with pytest.raises(ConfigError, match=complaint):
        ReasoningProblems((f"code(path={str(path)!r}, {limit})",), 1, 0)


def test_unknown_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "x", **SUMS}))
    with pytest.raises(ConfigError, match=r"'second'.*known: path, workers, seconds"):
        ReasoningProblems((f"code(path={str(path)!r}, second=3)",), 1, 0)
