"""Components, weights, failures; what tasks a config can name; files of problems."""

import json

import pytest

from mmjax.config import ConfigError
from train.config import RewardsConfig
from train.data.reasoning import ReasoningProblems, split_problems
from train.data.sources import parse_task
from train.rewards.gym import GymSource
from train.rewards.scoring import Score, answer_of, score_completions

TASKS = ("logic.operation(terms=2)", "logic.sudoku")


@pytest.fixture(scope="module")
def problems():
    return ReasoningProblems(
        TASKS, 8, 0, rewards=RewardsConfig(correct_weight=0.75, format_weight=0.25)
    )


def thought(answer):
    return f"<think>\nhm\n</think>\n\n{answer}"


def test_reward_is_the_weighted_sum_of_its_components(problems):
    problem = problems[0]
    texts = [thought(problem.answer), thought("12345678"), problem.answer]
    scores = score_completions(problems, [problem] * 3, texts, [True] * 3)
    assert scores == [
        Score(1.0, False, {"format": 1.0, "correct": 1.0}),
        Score(0.25, False, {"format": 1.0, "correct": 0.0}),
        Score(0.0, False, {"format": 0.0, "correct": 0.0}),
    ]


def test_completion_cut_off_at_the_limit_has_neither_form_nor_answer(problems):
    text = thought(problems[0].answer)
    (score,) = score_completions(problems, [problems[0]], [text], [False])
    assert score == Score(0.0, False, {"format": 0.0, "correct": 0.0})


def test_scores_stay_beside_their_samples_whatever_the_tasks(problems):
    chosen = list(problems) * 2
    right = [i % 3 == 0 for i in range(len(chosen))]
    texts = [thought(p.answer if r else "no") for p, r in zip(chosen, right, strict=True)]
    scores = score_completions(problems, chosen, texts, [True] * len(texts))
    assert [s.components["correct"] for s in scores] == [float(r) for r in right]
    assert score_completions(problems, [], [], []) == []


def test_reward_that_raises_fails_its_own_sample_alone(problems, monkeypatch):
    source = problems._sources[TASKS[0]]
    check = source.score

    def raising(problem, answer):
        if answer == "boom":
            raise MemoryError
        return check(problem, answer)

    monkeypatch.setattr(source, "score", raising)
    problem = problems[0]
    texts = [thought(a) for a in (problem.answer, "boom", problem.answer, "boom", "7777777")]
    scores = score_completions(problems, [problem] * 5, texts, [True] * 5)
    assert [s.reward for s in scores] == [1.0, 0.0, 1.0, 0.0, 0.25]
    assert [s.failed for s in scores] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nhm\n</think>\n\n4", "4"),
        ("hm</think>4", "4"),
        ("<think>\n</think> 4 ", "4"),
        ("4", None),
        ("<think>\n4", None),
        ("<think>\n</think>", None),
        ("<think>\n</think> \n", None),
        ("<think>a</think>4</think>5", None),
        ("<think>a</think><think>b</think>5", None),
        ("<think>a<think>b</think>5", None),
        ("</think>4<think>", None),
    ],
)
def test_form_is_thinking_closed_once_and_an_answer(text, answer):
    assert answer_of(text) == answer


# Tasks.


def test_families_and_texts(problems):
    assert problems.families == dict.fromkeys(TASKS, "rule")
    assert len(problems.texts) == len(problems) == 8
    assert {p.task for p in problems} == set(TASKS)
    assert problems.metrics() == {}


@pytest.mark.parametrize(
    ("task", "read"),
    [
        ("chain_sum", ("chain_sum", {})),
        (" logic.sudoku(size=9, blanks=0.5)", ("logic.sudoku", {"size": 9, "blanks": 0.5})),
        ("math(path='a b.jsonl')", ("math", {"path": "a b.jsonl"})),
    ],
)
def test_task_is_read(task, read):
    assert parse_task(task) == read


@pytest.mark.parametrize(
    "task", ["", "a b", "f(1)", "f(x=y)", "f(**{})", "f(x=1", "f(x=__import__('os'))", "f()()", "3"]
)
def test_task_that_is_none(task):
    with pytest.raises(ConfigError, match="does not read as name"):
        parse_task(task)


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ("chain_sums", "near: chain_sum"),
        ("chain_sum(min_term=3)", "min_term"),
        ("chain_sum(min_terms=0)", r"task 'chain_sum\(min_terms=0\)'"),
        ("logic.suduko", "known: cryptarithm, futoshiki"),
        ("logic.sudoku(sizes=4)", "sizes"),
        ("logic.sudoku(size=5)", "size = 5; sudoku has 4 or 9"),
        ("logic.futoshiki(blanks=2)", "blanks = 2 is no share"),
        ("logic.game_of_24(numbers=2, largest=4, target=17)", "no game found for target 17"),
        ("math(path='nowhere.jsonl')", "nowhere.jsonl does not exist"),
        ("math", "path"),
        ("judge.grade(path='x')", "needs either rewards.judge_url"),
        ("judge.rank(path='x')", "judge.grade and judge.compare are known"),
    ],
)
def test_task_that_cannot_be_opened(task, complaint):
    with pytest.raises(ConfigError, match=complaint):
        ReasoningProblems((task,), 1, 0)


def math_file(tmp_path, count=200):
    rows = [{"question": f"What is {i} / 7?", "answer": f"{i}/7"} for i in range(count)]
    path = tmp_path / "math.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"math(path={str(path)!r})"


def test_files_are_split_by_question_and_not_by_seed(tmp_path):
    task = math_file(tmp_path)
    splits = [split_problems((task, "logic.operation"), 1000, 100, seed) for seed in (0, 1)]
    (train, test), (other, again) = splits
    assert test.texts == again.texts
    files = [{p.question for p in s if p.task == task} for s in (train, test, other)]
    assert not files[0] & files[1]
    assert files[0] == files[2]
    assert len(files[0]) + len(files[1]) == 200
    assert 5 < len(files[1]) < 50
    assert [p.question for p in train] != [p.question for p in other]


def test_file_that_is_too_short_to_hold_out_from(tmp_path):
    with pytest.raises(ConfigError, match="0 problems to train on and 1 held out"):
        split_problems((math_file(tmp_path, 1),), 10, 10, 0)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no object"),
        ('{"question": "x"}', "needs the text answer"),
        ('{"question": "x", "answer": 3}', "needs the text answer"),
    ],
)
def test_file_with_a_row_that_is_no_problem(tmp_path, line, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": "x", "answer": "1"}}\n\n{line}\n')
    with pytest.raises(ConfigError, match=rf"a\.jsonl:3 {complaint}"):
        ReasoningProblems((f"math(path={str(path)!r})",), 1, 0)


def test_worked_solutions_stay_with_their_dataset():
    source = GymSource("chain_sum", "chain_sum", {"min_terms": 2, "max_terms": 2})
    (problem,) = source.draw(1, 0, held_out=False)
    assert problem.question.count("+") + problem.question.count(" - ") == 1
