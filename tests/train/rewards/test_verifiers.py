"""Verifiers: right answers in odd forms pass; near misses and exploits do not."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
         "knave.", '{"Anna": "knight", "Bob": "knave"}', "- Anna -> knight\n- Bob -> knave"],
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

WEAK = ("game_of_life_halting", "gsm_symbolic", "puzzle24", "polynomial_multiplication",
        "simple_integration", "n_queens", "string_insertion", "time_intervals",
        "spell_backward", "products", "chain_sum")  # fmt: skip


@pytest.mark.parametrize("name", WEAK)
def test_reasoning_gyms_verifiers_hold(name):
    source = GymSource(name, name, {})
    problems = list(source.draw(6, 0, held_out=False))
    first = problems[0]
    other = next(p.answer for p in problems if p.answer != first.answer)
    assert source.score_all([(p, p.answer) for p in problems]) == [1.0] * 6
    wrong = [other, f"{first.answer} {other}", f"{other}\n{first.answer}", first.question,
             f"{first.question} {first.answer}", first.answer + " __import__('os')",
             "__import__('os')._exit(1)", "1e999999999"]  # fmt: skip
    wrong.append(first.answer.translate(LOOKALIKES))
    verdicts = source.score_all([(first, w) for w in wrong if w != first.answer])
    assert not any(v == 1.0 for v in verdicts)


LOOKALIKES = str.maketrans("0123456789aeo", "０１２３４５６７８９аео")


@pytest.mark.parametrize("answer", ["1*2*3*4", "4*6", "(1+2+3)*4*1", "12+12", "24"])
def test_puzzle24_asks_for_the_given_numbers(answer):
    source = GymSource("puzzle24", "puzzle24", {})
    entry = {"metadata": {"numbers": [2, 2, 6, 6]}}
    assert source.score(Problem("puzzle24", "?", "", entry), answer) == 0.0
    assert source.score(Problem("puzzle24", "?", "", entry), "2*6+2*6") == 1.0
