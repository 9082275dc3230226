"""Which prompts come, and how long a completion may be."""

import json
from collections import Counter

import numpy as np

from train.cispo_config import CurriculumConfig, SamplingConfig
from train.curriculum import Curriculum, Windows

TASKS = ["sum"] * 20 + ["sort"] * 10 + ["essay"] * 10
FAMILIES = {"sum": "rule", "sort": "rule", "essay": "general"}


def curriculum(sampling=None, **cfg):
    return Curriculum(TASKS, FAMILIES, CurriculumConfig(**cfg), sampling or SamplingConfig(), 3)


def tasks(drawn):
    return Counter(TASKS[i] for i in drawn)


def test_each_prompt_of_a_task_comes_once_an_epoch():
    drawn = curriculum(general_share=0).draw(200, 0)
    for task, size in (("sum", 20), ("sort", 10)):
        mine = [i for i in drawn if TASKS[i] == task]
        for start in range(0, len(mine) - size, size):
            assert len(set(mine[start : start + size])) == size
    assert tasks(drawn).keys() == {"sum", "sort"}


def test_general_tasks_are_mixed_in_gradually():
    mixing = curriculum(general_from=10, general_full=20, general_share=0.5)
    shares = [tasks(mixing.draw(400, batch))["essay"] / 400 for batch in (0, 9, 14, 19, 50)]
    assert shares[:2] == [0, 0]
    np.testing.assert_allclose(shares[2:], [0.25, 0.5, 0.5], atol=0.07)


def test_tasks_of_middling_pass_rate_come_more_often():
    adaptive = curriculum(adaptive=True, general_share=0, memory=0.0)
    adaptive.rates.record_tasks({"sum": 0.5, "sort": 1.0})
    drawn = tasks(adaptive.draw(600, 0))
    assert drawn["sum"] > 15 * drawn["sort"] > 0


def test_prompts_that_always_pass_are_not_drawn_again():
    sampling = SamplingConfig(retire_pass_rate=0.9, retire_after=8)
    retiring = curriculum(sampling, general_share=0)
    for i in range(0, 20, 2):
        retiring.rates.record(i, [1.0] * 8)
    retiring.rates.record(1, [1.0] * 7)
    retiring.rates.record(3, [1.0] * 7 + [0.0])
    assert retiring.retired == 10
    drawn = retiring.draw(300, 0)
    assert {i for i in drawn if TASKS[i] == "sum"} == set(range(1, 20, 2))
    for i in range(1, 20, 2):
        retiring.rates.record(i, [1.0] * 100)
    assert "sum" in tasks(retiring.draw(20, 0)), "a task whose prompts are all retired goes on"


def test_place_can_be_saved_and_taken_up_again():
    one = curriculum(adaptive=True)
    one.draw(7, 0)
    one.rates.record(4, [1.0, 0.0, 0.25])
    one.rates.record_tasks({"sum": 0.3})
    state = json.loads(json.dumps(one.get_state()))
    other = curriculum(adaptive=True)
    other.set_state(state)
    assert [other.draw(9, b) for b in range(5)] == [one.draw(9, b) for b in range(5)]
    assert other.rates.of(4) == one.rates.of(4) == (1.25 / 3, 3)


STAGED = SamplingConfig(windows=(8, 16, 32), window_steps=2, window_share=0.9)


def test_window_grows_once_it_is_full_and_perplexity_has_settled():
    windows = Windows(STAGED, 32)
    full, short = np.full(100, 8), np.full(100, 4)
    assert windows.limit == 8
    assert not any(windows.record(full, e) for e in (2.0, 1.5, 1.2, 1.0))  # still falling
    assert not any(windows.record(short, 1.0) for _ in range(3))  # settled, but far from the limit
    assert windows.record(full, 1.0)
    assert windows.limit == 16
    assert not any(windows.record(full, 1.0) for _ in range(10))  # the limit is another now
    assert windows.record(full * 2, 1.0)
    assert windows.limit == 32
    assert not any(windows.record(full * 4, 1.0) for _ in range(10))  # the last stage


def test_window_can_be_saved_and_taken_up_again():
    one, other = Windows(STAGED, 32), Windows(STAGED, 32)
    for entropy in (1.0, 1.0, 1.0):
        one.record(np.full(9, 8), entropy)
    other.set_state(json.loads(json.dumps(one.get_state())))
    assert other.record(np.full(9, 8), 1.0)
    assert Windows(SamplingConfig(), 24).limit == 24
