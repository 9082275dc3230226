"""Verifiers: right answers in odd forms pass; near misses and exploits do not."""

import json
import random
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_gym.factory import DATASETS

from train.data.sources import Problem
from train.rewards.guarded import GuardedError, shared
from train.rewards.gym import GymSource
from train.rewards.logic.families import FAMILIES
from train.rewards.math_answers import MathSource, final_answer
from train.rewards.reading import evaluate, plain, read_assignment, read_grid, read_items

SQUARE = {"given": [[1, 0, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 0]]}
ROWS = ["1 2 3 4", "3 4 1 2", "2 1 4 3", "4 3 2 1"]
GRID = "\n".join(ROWS)
WALLS = ["# # 1", "# 2 #", "1 # #"]
# Of each family: data, right answers, wrong ones.
CASES = {
    "game_of_24": (
        {"numbers": [4, 1, 7, 1], "target": 24},
        ["(4-1)*(7+1)", "(4 − 1) × (1 + 7)", "(1+7)*(4-1) = 24", "Answer: (4-1)*(7+1)",
         "**(4-1)*(7+1)**", "\\boxed{(4-1)*(7+1)}", "```\n(4-1)*(7+1)\n```", "((4-1))*((7+1))",
         "$(4-1)*(7+1)$"],
        ["24", "4*1*7-1-1", "(4-1)*(7+1)*1", "(4-1)*8", "4*7-1-1", "(4-1)*(7+1) = 25", "(41)-(17)",
         "(4-1)*(7+1) (4-1)*(7+1)", "(4-1)*(7+1)\n4+1+7+1", "(4-1)**(7+1)", "4+1+7+1",
         "__import__('os')._exit(0)", "(4-1)*(7+1) or 1", "9**9**9**9", "1/(1-1)+4+7",
         "(４-１)*(７+１)", "[(4-1)*(7+1)]", "(" * 3000, "4-1*7+1+" + "1" * 5000],
    ),
    "sudoku": (
        SQUARE,
        [GRID, GRID.replace(" ", ","), GRID.replace(" ", ""), f"```\n{GRID}\n```",
         "| " + " |\n| ".join(r.replace(" ", " | ") for r in ROWS) + " |",
         str([list(map(int, r.split())) for r in ROWS]), "The answer is:\n" + GRID,
         ROWS[0] + "\n" + ROWS[1] + "\n-----+-----\n" + ROWS[2] + "\n" + ROWS[3]],
        [GRID.replace("1 2 3", "2 1 3"), "\n".join(ROWS[:3]), GRID + "\n" + GRID, "1 2 3 4",
         GRID.replace("2 1", "1 2"), GRID.replace("4", "5"), GRID.replace("2", "."),
         "\n".join(r[::-1] for r in ROWS), GRID.replace("1", "１"), "x\n" + GRID,
         GRID + "\nimport os", "[[x for x in range(4)]] * 4"],
    ),
    "futoshiki": (
        {"given": [[0] * 4] * 4, "less": [[0, 0, 0, 1], [3, 3, 3, 2]]},
        [GRID, GRID.replace(" ", ", "), f"```text\n{GRID}\n```", GRID.replace(" ", "")],
        ["\n".join(ROWS[::-1]), GRID + "\n" + GRID, "\n".join(ROWS[:2]), GRID.replace("1", "l"),
         "1 2 3 4\n" * 4, GRID.replace("3", "З")],
    ),
    "skyscrapers": (
        {"size": 4, "views": {"top": [4, 2, 2, 1], "bottom": [1, 2, 2, 4],
                              "left": [4, 2, 2, 1], "right": [1, 2, 2, 4]}},
        ["1 2 3 4\n2 1 4 3\n3 4 1 2\n4 3 2 1"],
        ["1 2 3 4\n2 3 4 1\n3 4 1 2\n4 1 2 3", GRID, "4 3 2 1\n3 4 1 2\n2 1 4 3\n1 2 3 4"],
    ),
    "number_wall": (
        {"given": [[".", ".", "1"], [".", "2", "."], [".", ".", "."]]},
        ["# # 1\n# 2 #\n# . #", "# # 1\n. 2 #\n# # #", "##1\n#2#\n#.#", "[['#','#','1'],"
         "['#','2','#'],['#','.','#']]"],
        ["\n".join(WALLS), "# # 1\n# 2 .\n# # #", "# # 1\n# 2 #\n# # #", ". . 1\n. 2 .\n. . .",
         "# # #\n# 2 #\n# . #", "# # 1\n# 2 #\n. . #", "# # 1\n# 2 #\n# . #\n" * 2, "# # 1\n# 2 #"],
    ),
    "minesweeper": (
        {"board": [["1", "?"], ["?", "?"]], "mines": 1},
        ["(1, 2)", "(2,1)", "[(2, 2)]", "[[1, 2]]", "Answer: (1, 2)"],
        ["(1, 1)", "(1, 2), (2, 1)", "(3, 3)", "(1, 2) or (2, 1)", "1 2", "", "(1, 2), (1, 2)",
         "(0, 1)", "(1, 2) exit()", "(９, 1)", "(-1, 2)", "(999999999999, 1)"],
    ),
    "knights_and_knaves": (
        {"names": ["Anna", "Bob"], "claims": [["knave", 1, 0], ["both", 0, 1]]},
        ["Anna = knight, Bob = knave", "Bob: knave\nAnna: Knight", "Anna is a knight and Bob is a "
         "knave.", '{"Anna": "knight", "Bob": "knave"}', "- Anna -> knight\n- Bob -> knave",
         "- **Anna**: knight\n- **Bob**: knave", "1. Anna: knight\n2. Bob: knave",
         "Anna is a knight. Bob is a knave.", "**Answer:** Anna is a knight, Bob is a knave"],
        ["Anna = knight", "Anna = knave, Bob = knight", "Anna = knight, Bob = knave, Bob = knight",
         "Anna = knight, Anna = knave, Bob = knave", "Anna = knight, Bob = knave, Eve = knight",
         "Anna = knight, Bob = liar", "Anna = knight, Вob = knave", "knight, knave",
         "Anna says: Bob is a knave.\nAnna = knight, Bob = knave"],
    ),
    "cryptarithm": (
        {"words": ["AB", "AB", "CD"]},
        ["A=4, B=3, C=8, D=6", "A: 4\nB: 3\nC: 8\nD: 6", "{'D': 6, 'C': 8, 'B': 3, 'A': 4}",
         "A is 3 and B is 4 and C is 6 and D is 8"],
        ["A=1, B=2, C=2, D=4", "A=0, B=4, C=0, D=8", "A=4, B=3, C=8", "A=4, B=3, C=8, D=6, E=1",
         "A=4, A=5, B=3, C=8, D=6", "A=4, B=3, C=8, D=5", "A=４, B=3, C=8, D=6", "43 + 43 = 86",
         "A=4, B=3, C=8, D=exit()", "A=44, B=3, C=8, D=6"],
    ),
    "operation": (
        {"value": -1234},
        ["-1234", "−1234", "-1,234", "Answer: -1234", "\\boxed{-1234}", "$-1234$", "-1234."],
        ["1234", "-1234.5", "-1234 or 3", "-1234\n-1235", "-617*2", "--1234", "-１234", "-1 234",
         "-12,34", "int('-1234')", "-1234" + "0" * 5000, "x @ y = -1234", ""],
    ),
    "word_sorting": (
        {"right": ["cab", "abc", "bca"]},
        ["cab, abc, bca", "cab abc bca", "['cab', 'abc', 'bca']", "CAB, ABC, BCA", "cab\nabc\nbca",
         "(cab,abc,bca)", "Answer: cab, abc, bca"],
        ["abc, cab, bca", "cab, abc", "cab, abc, bca, bca", "cab, abc, bca\nabc, bca, cab",
         "сab, abc, bca", "cab, abc, bca or abc, bca, cab", "sorted(['abc', 'bca', 'cab'])", ""],
    ),
}  # fmt: skip


def cases(right):
    return [
        pytest.param(name, answer, id=f"{name}-{i}")
        for name, case in CASES.items()
        for i, answer in enumerate(case[1 if right else 2])
    ]


def test_every_family_has_its_cases():
    assert set(CASES) == set(FAMILIES)
    assert all(name == family.name for name, family in FAMILIES.items())


@pytest.mark.parametrize(("name", "answer"), cases(right=True))
def test_right_answers_in_odd_forms(name, answer):
    assert FAMILIES[name]().check(CASES[name][0], answer)


@pytest.mark.parametrize(("name", "answer"), cases(right=False))
def test_near_misses_and_exploits(name, answer):
    assert not FAMILIES[name]().check(CASES[name][0], answer)


HARDER = {
    "cryptarithm": {"digits": 5, "terms": 3},
    "futoshiki": {"size": 6, "signs": 12},
    "game_of_24": {"numbers": 5, "target": 36},
    "knights_and_knaves": {"people": 5},
    "minesweeper": {"size": 9, "mines": 12},
    "number_wall": {"size": 8, "largest": 7},
    "operation": {"symbols": 4, "terms": 6, "largest": 50},
    "skyscrapers": {"size": 6},
    "sudoku": {"size": 9, "blanks": 0.6},
    "word_sorting": {"words": 12, "length": 6, "letters": 4},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("harder", [False, True])
def test_generated_puzzles_hold_their_own_answers_and_nothing_near(name, harder):
    puzzle = FAMILIES[name](**HARDER[name] if harder else {})
    made = [puzzle.generate(random.Random(f"0 {i}")) for i in range(20)]
    assert len({m.question for m in made}) > 15
    assert made[3] == puzzle.generate(random.Random("0 3"))
    for question, answer, data in made:
        assert puzzle.check(data, answer)
        assert puzzle.check(data, f"  {answer}\n")
        twice = (f"{answer}\n{answer}", f"{answer} {answer}")
        strange = (f"{answer}\nexit()", answer + "ı", answer[:-1])
        for wrong in ("", question, f"{question}\n{answer}", *twice, *strange):
            assert not puzzle.check(data, wrong), wrong


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300), st.sampled_from(sorted(FAMILIES)))
def test_verifiers_never_raise(text, name):
    FAMILIES[name]().check(CASES[name][0], text)


# Reading.

EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda e: st.tuples(e, st.sampled_from("+-*/"), e).map(lambda t: f"({t[0]} {t[1]}{t[2]})"),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(EXPRESSIONS)
def test_expressions_have_the_value_that_fractions_give(expression):
    try:
        expected = eval(  # of this test's own text
            "".join(f"Fraction({p})" if p.isdigit() else p for p in _pieces(expression)),
            {"Fraction": Fraction},
        )
    except ZeroDivisionError:
        expected = None
    assert evaluate(expression).value == expected


def _pieces(expression):
    word = ""
    for c in expression:
        if not c.isdigit():
            yield from (word, c) if word else (c,)
            word = ""
        else:
            word += c
    if word:
        yield word


@pytest.mark.parametrize(
    "text",
    ["5", "$5$", "$\\boxed{5}$", "\\boxed{$5$}", "**Answer: 5**", "**Answer:** 5", "`5`", "\\(5\\)",
     "The final answer is: **$5$**", "\\[\\boxed{5}\\]", "Answer: ```\n5\n```", "```\n$5$\n```",
     "The answer is 5.", "The answer is **5**.", "# Answer\n5", "<answer>5</answer>",
     "<answer>$5$</answer>"],
)  # fmt: skip
def test_wrapping_comes_off_whatever_is_around_what(text):
    assert plain(text) == "5"


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="0123456789+-*/() .eE_x,[]", max_size=60))
def test_readers_never_raise(text):
    evaluate(text)
    plain(text)
    read_items(text)
    read_grid(text, 2, 2, "01")
    read_assignment(text, "x")
    final_answer("\\boxed{" + text)


@pytest.mark.parametrize(
    "expression",
    ["", "1 2", "1+", "(1", "1)", "-1", "1.5", "2**3", "a", "1e3", "²", "9" * 13, "((" * 30 + "1"],
)
def test_what_is_no_expression(expression):
    assert evaluate(expression) is None


# Mathematics.


@pytest.fixture(scope="module", autouse=True)
def no_processes_left():
    yield
    shared().close()


def math_score(gold, answer):
    source = MathSource.__new__(MathSource)
    return source.score(Problem("math", "How much?", gold, {}), answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1/2", "0.5"), ("1/2", "The result:\n\n\\boxed{\\frac12}"), ("7", "\\boxed{7}"),
        ("7", "7.0"), ("1000", "1,000"), ("x+1", "1+x"), ("(1,2)", "(1, 2)"), ("3", "x = 3"),
        ("\\{1,2\\}", "\\{2,1\\}"), ("\\sqrt{2}", "\\boxed{\\sqrt2}"), ("12", "12\\text{ cm}"),
        ("-3", "$-3$"), ("30", "\\boxed{30^\\circ}"), ("30", "30°"), ("5", "**5**"),
        ("[0,1]", "\\left[0,1\\right]"), ("-3", "x=-3"), ("-3", "(-3)"), ("-3", "x_1 = -3"),
        ("1,234", "1\\,234"), ("1234", "1{,}234"), ("12,345,678", "12345678"), ("π", "π"),
        ("\\pi", "π"), ("2\\pi", "\\boxed{2π}"), ("x^2", "x*x"),
        ("2\\sqrt{3}", "2 \\cdot \\sqrt{3}"),
        ("12\\%", "12%"), ("12\\%", "12"), ("12", "12\\%"), ("12\\%", "0.12"), ("0.5", "1/2"),
        ("-\\frac{1}{2}", "\\frac{-1}{2}"), ("2x+1", "1+2x"), ("2^{10}", "1024"),
        ("\\text{Monday}", "\\boxed{\\text{Monday}}"), ("(1,-2)", "(1, -2)"),
    ],
)  # fmt: skip
def test_right_mathematics(gold, answer):
    assert math_score(gold, answer) == 1.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("7", "3+4"), ("7", "\\boxed{3+4}"), ("8", "2^3"), ("120", "5!"), ("7", "seven"), ("7", ""),
        ("3", "\\boxed{3} or \\boxed{4}"), ("3", "\\boxed{4} \\boxed{3}"), ("3", "3, 4"),
        ("3", "3 or 4"), ("3", "\\boxed{3"), ("3", "３"), ("3", "З"), ("3", "3\n4"), ("1/2", "1/3"),
        ("x", "__import__('os')._exit(0)"), ("3", "\\boxed{9^{9^{9^9}}}"), ("3", "3" * 5000),
        ("2", "\\boxed{\\frac{4}{2}}"), ("12", "24/2"), ("12", "5=12"), ("100", "50/0.5"),
        ("2", "\\sqrt{4}"),
        ("1/2", "1-1/2"), ("\\frac{1}{3}", "\\int_0^1 x^2 dx"), ("1/2", "\\lim_{x\\to 0} x/(2x)"),
        ("x^2/2", "\\int x dx"), ("10", "\\sum_{i=1}^4 i"), ("12", "1200\\%"), ("12\\%", "1200\\%"),
        ("12", "0.12\\%"), ("1/2", "2 = 1/2"), ("3", "3 \\text{ or } 4"), ("1/2", "0.25+0.25"),
        ("How much?", "\\boxed{}"), ("4", "How much? Put the final answer in \\boxed{}."),
    ],
)  # fmt: skip
def test_wrong_mathematics(gold, answer):
    assert math_score(gold, answer) == 0.0


@pytest.mark.parametrize(
    ("question", "gold", "answer"),
    [("Simplify $\\frac{2}{4}$.", "\\frac{1}{2}", "\\frac{2}{4}"), ("Add: x + x", "2x", "x+x")],
)
def test_repeating_the_question_is_no_mathematics(question, gold, answer):
    source = MathSource.__new__(MathSource)
    problem = Problem("math", question, gold, {"question": question})
    assert source.score(problem, answer) == 0.0
    assert source.score(problem, gold) == 1.0


def test_giant_numbers_end_their_process_and_not_the_trainer(monkeypatch):
    with pytest.raises(GuardedError, match="no verdict"):
        math_score("x^2", "\\boxed{9^{9^{9^9}}}")
    assert math_score("x^2", "x \\cdot x") == 1.0


# reasoning-gym.

EXPLOITS = (
    "nan", "inf", "-{}", "{}/7", "{} or nothing, I am not sure", "not:{}", "{}, 17", "{}x", "{}{}",
    "{} {}", "{}\n{}", "{}?", "[]", "{{}}", "()", "''", "x", "1e999999999", "1e9_9_9_9_9_9_9_9_9",
    "1.e99999999", "{} __import__('os')", "__import__('os')._exit(1)",
)  # fmt: skip
# Of some datasets these are right: the constant of an integral, moves after the last one.
HARMLESS = {"simple_integration", "intermediate_integration", "sokoban"}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # reasoning-gym leaves files open.
@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"composite"}))
def test_right_answers_to_reasoning_gym_in_odd_forms_and_exploits(name):
    source = GymSource(name, name, {})
    problems = list(source.draw(5, 0, held_out=False))
    known = [p for p in problems if p.answer]
    for form in ("{}", "  {}\n", "**{}**", "Answer: {}", "\\boxed{{{}}}", "```\n{}\n```"):
        texts = [(p, form.format(p.answer)) for p in known if form == "{}" or p.answer.isascii()]
        assert source.score_all(texts) == [1.0] * len(texts), form
    for problem in problems:
        answer = problem.answer
        others = [p.answer for p in known if p.answer != answer][:1]
        wrong = [form.format(*[answer] * 2) for form in EXPLOITS if answer or "{}" not in form]
        wrong += [f"{answer} {other}" for other in others] + [f"{o}\n{answer}" for o in others]
        wrong += [problem.question, f"{problem.question} {answer}", answer.translate(LOOKALIKES)]
        asked = [(problem, w) for w in wrong if not _is_number_of(w, answer) and w != answer]
        verdicts = dict(zip((w for _, w in asked), source.score_all(asked), strict=True))
        passed = {w for w, verdict in verdicts.items() if verdict == 1.0}
        allowed = {f"{answer}/7", answer * 2} if name in HARMLESS else set()
        assert passed <= allowed
        assert not [w for w, v in verdicts.items() if isinstance(v, Exception)]


def _is_number_of(text, answer):
    """Whether a text has -0 or 00 where the answer has 0."""
    return re.sub(r"-?\b0+\b", "0", text) == re.sub(r"\b0+\b", "0", answer)


@pytest.mark.parametrize(
    ("name", "key"), [("graph_color", "possible_answer"), ("rubiks_cube", "example_correct_answer")]
)
def test_datasets_without_a_known_answer_take_a_right_one(name, key):
    source = GymSource(name, name, {})
    for problem in source.draw(3, 0, held_out=False):
        right = problem.entry["metadata"][key]
        assert source.score(problem, right if isinstance(right, str) else json.dumps(right)) == 1.0
        assert source.score(problem, "{}") == source.score(problem, "U") == 0.0


@pytest.mark.parametrize(
    ("name", "known", "metadata", "right", "wrong"),
    [
        ("coin_flip", "0.0000305", {}, ["0.0000305", "0.00003050"], ["0", "0.0001", "0.125 1"]),
        ("complex_arithmetic", "48.0 - 36.0i", {}, ["48-36i", "48.0 - 36.0 i"], ["48+36i", "48"]),
        ("complex_arithmetic", "0.0 + 1.0i", {}, ["i", "0+i", "1i"], ["-i", "1", ""]),
        ("polynomial_equations", "-3.625, 0.0", {}, ["0, -3.625"], ["-3.625", "0, -3.625, 1"]),
        ("polynomial_equations", "", {}, ["none", "No real solutions"], ["0", "nothing"]),
        ("number_sorting", "['-1.5', '2.0']", {}, ["[-1.5, 2]", '["-1.5", "2.0"]'], ["[-1, 2]"]),
        ("prime_factorization", "2 × 433", {}, ["433 × 2", "2*433", "2 x 433"], ["866", "2 × 4"]),
        ("power_function", "-0.00136748", {}, ["-1.37e-3", "-0.00137"], ["-0.0013", "1.37e-3"]),
        ("time_intervals", "5 days", {}, ["5", "5 day"], ["-5 days", "5 days, 6 days"]),
        ("time_intervals", "00:34:28", {}, ["0:34:28"], ["00:34:29", "34:28"]),
        ("advanced_geometry", "(4.051, -5.487)", {}, ["(4.051,-5.487)"], ["4.051, -5.487, 17"]),
        ("game_of_life", "[[0,1],[1,0]]", {}, ["[[0, 1], [1, 0]]"], ["[[0,1],[1]]", "[[0,true]]"]),
        ("chain_sum", "-1234", {}, ["-1,234", "-1234.0", "$-1234$"], ["-12,34", "−-1234", "1234"]),
        (
            "fraction_simplification",
            "2/3",
            {"simplified_numerator": 2, "simplified_denominator": 3},
            ["\\frac{2}{3}", "$2 / 3$"],
            ["4/6", "\\frac{4}{6}", "2/3x", "$2/3"],
        ),
    ],
)
def test_rules_of_reasoning_gym(name, known, metadata, right, wrong):
    source = GymSource(name, name, {})
    problem = Problem(name, "What?", known, {"metadata": metadata})
    assert source.score_all([(problem, answer) for answer in right]) == [1.0] * len(right)
    assert source.score_all([(problem, answer) for answer in wrong]) == [0.0] * len(wrong)


LOOKALIKES = str.maketrans("0123456789aeo", "０１２３４５６７８９аео")


@pytest.mark.parametrize("answer", ["1*2*3*4", "4*6", "(1+2+3)*4*1", "12+12", "24"])
def test_puzzle24_asks_for_the_given_numbers(answer):
    source = GymSource("puzzle24", "puzzle24", {})
    entry = {"metadata": {"numbers": [2, 2, 6, 6]}}
    assert source.score(Problem("puzzle24", "?", "", entry), answer) == 0.0
    assert source.score(Problem("puzzle24", "?", "", entry), "2*6+2*6") == 1.0
