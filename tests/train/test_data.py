"""Problems and their verifiers, tokenizer, chat."""

import json

import numpy as np
import pytest
import reasoning_gym

from mmjax.chat import THINK_END, render_chat, split_thinking
from mmjax.tokenizer import BOS, EOS, Tokenizer, TokenizerError
from tests.train.programs import problems_and_tokenizer
from train.cispo_config import SamplingConfig
from train.config import DataConfig, JobConfig, SourceConfig
from train.data.reasoning import (
    ReasoningProblems,
    prompt_text,
    split_problems,
    worked_solution,
)
from train.data.tokenizer import train_tokenizer
from train.rewards.gym import GymSource
from train.rewards.scoring import Score, score_completions
from train.rollout import Group, score, texts_of
from train.tokenizing import job_tokenizer

# Problems.

ALL = ("chain_sum",)
RIGHT = Score(1.0, False, {"format": 1.0, "correct": 1.0})
WRONG = Score(0.0, False, {"format": 1.0, "correct": 0.0})
FORMLESS = Score(0.0, False, {"format": 0.0, "correct": 0.0})


def scored(problems, problem, text, finished=True):
    (score,) = score_completions(problems, [problem], [text], [finished])
    return score


@pytest.mark.parametrize("seed", [0, 1, 10**6])
def test_held_out_problems_are_disjoint_by_text(seed):
    train, held_out = split_problems(ALL, 1000, 100, seed)
    assert not train.texts & held_out.texts
    assert len(train.texts) == len(train)
    assert len(held_out.texts) == len(held_out)
    assert len(held_out) > 50


def test_held_out_problems_are_disjoint_by_seed(monkeypatch):
    """reasoning-gym draws problem i from seed + i."""
    drawn, create = [], reasoning_gym.create_dataset

    def note(name, *, size, seed, **params):
        drawn.append(range(seed, seed + size))
        return create(name, size=size, seed=seed, **params)

    monkeypatch.setattr(reasoning_gym, "create_dataset", note)
    split_problems(ALL[:1], 1000, 100, seed=3)
    held_out, train = drawn
    assert not set(held_out) & set(train)


def test_held_out_problems_are_the_same_for_every_seed():
    held_out = [split_problems(ALL, 50, 50, seed)[1].texts for seed in (0, 1)]
    assert held_out[0] == held_out[1]


@pytest.mark.parametrize("task", ALL)
@pytest.mark.parametrize("thinking", [True, False])
def test_worked_solutions_satisfy_the_verifier(task, thinking):
    problems = ReasoningProblems((task,), 300, seed=0)
    assert len(problems) > 100
    for problem in problems:
        text = worked_solution(problem, thinking=thinking).removesuffix(EOS)
        thought, answer = split_thinking(text)
        assert bool(thought) == thinking
        assert problems.score(problem, answer) == 1.0, text
        assert scored(problems, problem, text) == RIGHT


def test_solution_of_another_problem_scores_nothing():
    problems = ReasoningProblems(ALL, 50, seed=0)
    first = problems[0]
    other = next(p for p in problems if p.answer != first.answer)
    text = worked_solution(other).removesuffix(EOS)
    assert scored(problems, first, text) == WRONG


@pytest.mark.parametrize("text", ["{answer}", "<think>\n{answer}", ""])
def test_thinking_that_is_not_closed_scores_nothing(text):
    problems = ReasoningProblems(ALL, 1, seed=0)
    text = text.format(answer=problems[0].answer)
    assert split_thinking(text) == (None, "")
    assert scored(problems, problems[0], text) == FORMLESS


def test_thinking_is_split_from_the_answer():
    assert split_thinking(f"<think>\n1+1=2\n{THINK_END}\n\n2") == ("1+1=2", "2")
    assert split_thinking(f"{THINK_END}2") == ("", "2")


# Scored rollouts, with completions given instead of sampled.


def scored_groups(texts, reason="stop", problems=None):
    """Two groups of two samples."""
    own, tokenizer = problems_and_tokenizer()
    groups = []
    for number in range(2):
        rows = [np.array(tokenizer.encode(t), np.int32) for t in texts[2 * number : 2 * number + 2]]
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((2, lengths.max()), np.int32)
        for place, row in zip(tokens, rows, strict=True):
            place[: len(row)] = row
        drawn = np.zeros(tokens.shape, np.float32)
        group = Group(
            number=number,
            problem=number,
            prompt=np.ones(3, np.int32),
            tokens=tokens,
            behaviour=drawn,
            versions=tokens * 0,
            forced=drawn > 0,
            lengths=lengths,
            reasons=(reason, reason),
            rewards=np.full(2, np.nan, np.float32),
            components={},
            failures=0,
        )
        assert not any(EOS in text for text in texts_of(group, tokenizer))
        groups.append(group)
    return score(groups, problems or own, tokenizer, SamplingConfig(), 200)


def rewards_of(groups):
    return [group.rewards.tolist() for group in groups]


def right_and_wrong(problems):
    """For two problems: right, wrong, wrong, right."""
    right = [worked_solution(problems[i]) for i in range(2)]
    wrong = f"<think>\n{THINK_END}\n\n12345{EOS}"
    return [right[0], wrong, wrong, right[1]]


def test_rewards_stand_beside_their_samples():
    problems, _ = problems_and_tokenizer()
    done = scored_groups(right_and_wrong(problems))
    assert rewards_of(done) == [[1, 0], [0, 1]]
    assert [g.rewards.dtype for g in done] == [np.float32] * 2
    assert [g.failures for g in done] == [0, 0]
    assert [g.components["correct"].tolist() for g in done] == rewards_of(done)


@pytest.mark.parametrize("reason", ["length", "repetition"])
def test_completion_that_did_not_end_by_itself_scores_nothing(reason):
    problems, _ = problems_and_tokenizer()
    assert rewards_of(scored_groups(right_and_wrong(problems), reason)) == [[0, 0], [0, 0]]


def test_verifier_that_raises_costs_its_own_sample_alone(monkeypatch):
    problems, _ = problems_and_tokenizer()
    verdict = GymSource.score

    def raising(source, problem, answer):
        if answer == "12345" and problem == problems[0]:
            raise RuntimeError("verifier broke")
        return verdict(source, problem, answer)

    monkeypatch.setattr(GymSource, "score", raising)
    done = scored_groups(right_and_wrong(problems), problems=problems)
    assert rewards_of(done) == [[1, 0], [0, 1]]
    assert [g.failures for g in done] == [1, 0]


# Tokenizer and chat.


@pytest.fixture(scope="module")
def tokenizer():
    return problems_and_tokenizer()[1]


@pytest.mark.parametrize(
    "text", ["12+34=46", " spaces  and\n\nlines\t", "Grüße, 世界 🙂", f"{BOS}ai{EOS}\n", ""]
)
def test_tokenizer_round_trip(tokenizer, text, tmp_path):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(text) == ids
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)


def test_tokenizer_is_deterministic_and_within_its_size():
    first, second = (problems_and_tokenizer()[1] for _ in range(2))
    assert first.backend.to_str() == second.backend.to_str()
    assert first.vocab_size <= 300


def test_digits_and_marks_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("12345")) == 5
    assert len(tokenizer.encode(f"{BOS}<think>{THINK_END}{EOS}")) == 4
    assert tokenizer.decode(tokenizer.encode(f"a{EOS}"), skip_special_tokens=True) == "a"


def test_missing_and_broken_tokenizers(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def changed(tokenizer, folder, change):
    """The tokenizer as its file reads after a change to the JSON."""
    tokenizer.save(folder)
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text())
    change(whole)
    file.write_text(json.dumps(whole))
    return Tokenizer.load(folder)


def test_truncation_and_padding_of_a_file_are_taken_off(tokenizer, tmp_path):
    def short_and_wide(whole):
        whole["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0}
        whole["truncation"]["direction"] = "Right"
        whole["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 0}
        whole["padding"] |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": BOS}

    again = changed(tokenizer, tmp_path, short_and_wide)
    for text in ("123456789", "1"):
        assert again.encode(text) == tokenizer.encode(text)


def test_vocabulary_reaches_the_highest_id(tokenizer, tmp_path):
    def with_a_gap(whole):
        whole["model"]["vocab"]["7"] = 900

    again = changed(tokenizer, tmp_path, with_a_gap)
    assert again.encode("7") == [900]
    assert again.vocab_size == 901


CHATS = (SourceConfig("c", ("a.jsonl",), kind="chat"),)
TURNS = {
    "chats": JobConfig("sft", 1, data=DataConfig(mixture=CHATS)),
    "chats to pre-train on": JobConfig("pretrain", 1, data=DataConfig(mixture=CHATS)),
    "preferences": JobConfig(
        "dpo", 1, data=DataConfig(mixture=(SourceConfig("c", ("a",), kind="preference"),))
    ),
    "solutions": JobConfig("sft", 1, data=DataConfig("reasoning", tasks=ALL)),
    "reinforcement": JobConfig("cispo", 1, data=DataConfig(tasks=ALL)),
}


@pytest.mark.parametrize("what", TURNS)
def test_tokenizer_of_another_family_is_refused_where_there_are_turns(what, tmp_path):
    train_tokenizer(["some text"], 280).save(tmp_path)
    for file in tmp_path.iterdir():
        text = file.read_text().replace(EOS, "<|im_end|>").replace(BOS, "<|im_start|>")
        file.write_text(text)
    with pytest.raises(TokenizerError, match=f"has no token {BOS} and no {EOS}; chats are"):
        job_tokenizer(TURNS[what], tmp_path, ())
    plain = JobConfig("sft", 1, data=DataConfig(paths=("a.txt",)))
    assert job_tokenizer(plain, tmp_path, ()).decode([1]) == "<|im_end|>"


def test_replies_that_end_otherwise_than_turns_are_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</think>"}')
    with pytest.raises(TokenizerError, match="the tokenizer ends replies with </think>; chats"):
        job_tokenizer(TURNS["chats"], tmp_path, ())


def test_chat_is_rendered_as_m1s_template():
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "1+1"}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "2"},
    ]
    expected = (
        f"{BOS}system ai_setting=assistant\nBe brief.{EOS}\n"
        f"{BOS}user name=user\n1+1?{EOS}\n"
        f"{BOS}ai name=assistant\n2{EOS}\n"
    )
    assert render_chat(messages, reply=False) == expected
    assert render_chat(messages) == expected + f"{BOS}ai name=assistant\n"


def test_prompt_is_the_users_turn(tokenizer):
    problem = ReasoningProblems(ALL, 1, seed=0)[0]
    assert prompt_text(problem) == render_chat([{"role": "user", "content": problem.question}])


@pytest.mark.parametrize(
    ("chat", "complaint"),
    [
        ({"role": "robot", "content": "x"}, "unknown chat role 'robot'; known: system, user"),
        ({"content": "x"}, "unknown chat role None"),
        ({"role": "user", "content": 3}, "chat content must be a string or a list of text"),
        ({"role": "user"}, "got None"),
        ({"role": "user", "content": [{"type": "audio"}]}, "got .*audio"),
        ({"role": "user", "content": ["x"]}, "got .*x"),
        ({"role": "user", "content": [{"type": "text"}]}, "got .*text"),
    ],
)
def test_chat_that_cannot_be_rendered(chat, complaint):
    with pytest.raises(ValueError, match=complaint):
        render_chat([chat])
