"""Synthetic tasks: what their prompts say, how long they are, and that training never sees them."""

import re

import pytest

from mmjax.config import ConfigError
from mmjax.tokenizer import EOS
from train.config import DataConfig, EvaluationConfig
from train.data.tokenizer import train_tokenizer
from train.evaluation import lexicon
from train.evaluation.examples import RecallExamples, prompt_hash
from train.evaluation.lexicon import word_tokenizer
from train.evaluation.suite import Suite
from train.evaluation.tasks import Encoder, Task, TooShortError

TOKENIZER = word_tokenizer()
TASKS = (
    "niah(digits=3)",
    "niah(keys=4, values=3)",
    "niah(keys=6, queries=4, digits=3)",
    "niah(haystack='needles', digits=3)",
    "variable_tracking(chains=2, hops=2)",
    "common_words(common=3, often=6, seldom=2)",
    "frequent_words",
    "associative_recall",
    "shuffled_pairs",
    "multi_round",
)


def task(text, split="held-out", seed=0, chat=True, tokenizer=TOKENIZER):
    return Task(text, Encoder(tokenizer), split, seed, chat=chat)


def tokens(sample):
    return len(TOKENIZER.encode(sample.text + "".join(sample.answer)))


def needles(text):
    return re.findall(r"magic numbers for (\w+) is: (\d+)\.", text)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("text", TASKS)
def test_prompt_and_answer_fill_the_length(text, chat):
    for length in (300, 1000):
        for index in range(4):
            assert 0.9 * length <= tokens(task(text, chat=chat).sample(index, length)) <= length


def test_answer_is_what_the_needle_says():
    sample = task("niah(keys=5, digits=3)").sample(0, 400)
    asked = re.search(r"What is the special magic number for (\w+) ", sample.text)[1]
    found = needles(sample.text)
    assert len(found) == 5
    assert sample.values == (dict(found)[asked],)
    assert "".join(sample.answer) == f" {sample.values[0]}.{EOS}"


def test_several_keys_are_answered_in_the_order_of_the_question():
    sample = task("niah(keys=6, queries=4, digits=3)").sample(1, 400)
    listed = re.search(r"What are all the special magic numbers for (.*) mentioned", sample.text)[1]
    asked = re.split(r", | and ", listed)
    found = dict(needles(sample.text))
    answer = ", ".join(f"{name}: {found[name]}" for name in asked)
    assert "".join(sample.answer) == f" {answer}.{EOS}"


def test_all_values_of_a_key_are_in_the_haystack():
    sample = task("niah(keys=3, values=4, digits=3)").sample(0, 400)
    found = needles(sample.text)
    (name,) = {name for name, value in found if value in sample.values}
    assert {value for key, value in found if key == name} == set(sample.values)
    assert len(sample.values) == 4


@pytest.mark.parametrize("text", ["niah(values=4)", "niah(keys=2, queries=2, values=3)"])
def test_values_of_a_key_are_answered_in_the_order_of_the_text(text):
    for index in range(10):
        sample = task(text).sample(index, 600, index / 9)
        in_text: dict[str, list[str]] = {}
        for name, value in needles(sample.text):
            in_text.setdefault(name, []).append(value)
        listed = re.search(r"magic numbers for ([a-z ]+) mentioned", sample.text)[1]
        wanted = [value for name in listed.split(" and ") for value in in_text[name]]
        assert list(sample.values) == wanted
        assert re.findall(r"\d+", "".join(sample.answer)) == wanted


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("text", ["niah", "niah(haystack='needles', digits=3)", "multi_round"])
def test_needle_stands_at_its_depth(text, depth):
    sample = task(text).sample(0, 2000, depth)
    before, found, _ = sample.text.partition(sample.values[0])
    assert found
    assert len(TOKENIZER.encode(before)) / 2000 == pytest.approx(depth, abs=0.04)


def test_variables_hold_what_is_asked_for():
    sample = task("variable_tracking(chains=3, hops=3)").sample(0, 500)
    held = {}
    for name, value, other in re.findall(r"VAR (\w+) = (?:(\d+)|VAR (\w+))", sample.text):
        held[name] = value or held[other]
    wanted = re.search(r"assigned the value (\d+)", sample.text)[1]
    assert sample.values == tuple(name for name, value in held.items() if value == wanted)
    assert len(sample.values) == 4
    assert len(held) == 12


def test_common_words_are_more_common_than_all_others():
    sample = task("common_words(common=3, often=6, seldom=2)").sample(0, 500)
    words = re.findall(r" \d+\. (\w+)", sample.text)
    counts = {word: words.count(word) for word in dict.fromkeys(words)}
    assert sample.values == tuple(word for word, count in counts.items() if count == 6)
    assert {counts[w] for w in counts if w not in sample.values} == {2}


def test_frequent_words_come_most_frequent_first():
    sample = task("frequent_words(top=4)").sample(0, 1500)
    words = sample.text.split("\n")[2].split()
    counts = {word: words.count(word) for word in set(words)}
    assert sample.values == tuple(sorted(counts, key=counts.get, reverse=True)[:4])


def test_shuffled_pairs_are_those_of_the_text_in_another_order():
    sample = task("shuffled_pairs(digits=2, names=64)").sample(0, 300)
    pairs = re.findall(r" (\w+) (\d\d)\.", sample.text)
    answered = re.findall(r" (\w+) (\d\d)[,.]", "".join(sample.answer))
    assert len(pairs) > 30
    assert sorted(pairs) == sorted(answered)
    assert pairs != answered


def test_a_task_without_one_right_answer_is_not_asked():
    cfg = EvaluationConfig(tasks=("shuffled_pairs",), lengths=(300,))
    with pytest.raises(ConfigError, match=r"'shuffled_pairs' .* is for data.tasks"):
        Suite(cfg, TOKENIZER, chat=True)


def test_conversation_asks_for_an_earlier_answer_among_similar_ones():
    sample = task("multi_round").sample(0, 800)
    form, subject = re.search(r"Repeat the (\w+) about (\w+)\.", sample.text).groups()
    replies = re.findall(rf"Write a {form} about {subject}\..*?\n.*?\n(.*?){EOS}", sample.text)
    assert replies == [sample.values[0]]
    assert len(re.findall(rf"about {subject}", sample.text)) == 3
    assert len(re.findall(rf"Write a {form}", sample.text)) >= 2


@pytest.mark.parametrize("kind", ["niah(keys=4, haystack='needles', ", "associative_recall("])
def test_few_names_are_the_same_in_all_samples(kind):
    few, known = task(f"{kind}names=8)"), set(lexicon.NAMES[:8])
    named = [set(re.findall(r"(\w+) is: ", few.sample(i, 200).text)) for i in range(6)]
    assert all(len(names) >= 4 and names <= known for names in named)
    assert set.union(*named) == known


IMPOSSIBLE = {
    "niah(digits=0)": "digits must be at least 1",
    "niah(digits=1.5)": r"digits = 1\.5 is no int",
    "niah(names=-3)": "names must be at least 1",
    "niah(keys=True)": "keys = True is no int",
    "niah(haystack=3)": "haystack = 3 is no str",
    "variable_tracking(hops=-1)": "hops must be at least 0",
    "variable_tracking(chains=5, digits=1)": "5 chains cannot have values of their own with 1 dig",
    "common_words(common=0)": "common must be at least 1",
    "common_words(seldom=30)": "needs seldom < often",
    "common_words(common=1024)": "common < 1024",
    "frequent_words(top=400)": "needs top < 256",
    "frequent_words(alpha=0)": "alpha > 0",
    "frequent_words(alpha='a')": "alpha = 'a' is no float",
}


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_values_that_a_parameter_cannot_have(text):
    with pytest.raises(ConfigError, match=IMPOSSIBLE[text]):
        task(text).sample(0, 1000)


def test_same_seed_same_sample_and_another_elsewhere():
    one = task(TASKS[0]).sample(3, 300)
    assert one == task(TASKS[0]).sample(3, 300)
    others = [task(TASKS[0]).sample(4, 300), task(TASKS[0], seed=1).sample(3, 300)]
    others.append(task(TASKS[0], split="train").sample(3, 300))
    assert all(one.text != other.text for other in others)


def test_tokenizer_that_merges_across_pieces_encodes_whole_texts():
    """The pieces of such a tokenizer would be ids that it never gives for the text."""
    texts = [task(TASKS[0]).sample(i, 300).text for i in range(20)]
    merging = train_tokenizer(texts, 500)
    encoder = Encoder(merging)
    niah = Task(TASKS[0], encoder, "held-out", 0, chat=True)
    encoder.check(niah.sample(0, 300))
    sample = niah.sample(1, 300)
    prompt, answer = encoder.prompt_and_answer(sample)
    assert prompt == merging.encode(sample.text)
    assert merging.decode(answer) == "".join(sample.answer)
    assert len(prompt) + len(answer) <= 300


def test_words_are_one_token_each():
    text = " One of the special magic numbers for" + " 999. The old baker"
    assert len(TOKENIZER.encode(text)) == 12
    assert TOKENIZER.decode(TOKENIZER.encode("any œther text\n")) == "any œther text\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("needle", "unknown recall task 'needle'; known: niah"),
        ("niah(key=3)", "unknown key; known: keys, values"),
        ("niah(keys=2, queries=3)", "1 <= queries <= keys"),
        ("niah(haystack='hay')", "haystack 'noise' or 'needles'"),
        ("niah(keys=2000)", "2000 names are too many"),
        ("niah(keys=5, names=4)", "5 names are too many; there are 4"),
    ],
)
def test_wrong_tasks(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        task(text).sample(0, 500)


@pytest.mark.parametrize("text", TASKS)
def test_length_that_is_too_short(text):
    with pytest.raises(TooShortError, match="does not fit"):
        task(text).sample(0, 24)


# Examples to train on.

DATA = DataConfig("recall", tasks=TASKS[:4], sequence_length=400)


def test_examples_predict_the_answer_alone_and_fit_a_row():
    examples = RecallExamples(DATA, TOKENIZER, 0)
    lengths = []
    for i in range(80):
        ids, mask = examples[i].ids.tolist(), examples[i].loss_mask.tolist()
        lengths.append(len(ids))
        assert mask == sorted(mask)
        assert TOKENIZER.decode(ids[mask.index(1) :]).endswith(f".{EOS}")
    assert max(lengths) <= 400
    assert min(lengths) < 150  # short ones too, log-uniformly
    seventh = examples[7].ids.tolist()
    assert seventh == RecallExamples(DATA, TOKENIZER, 0)[7].ids.tolist()
    assert seventh == examples[1::2][3].ids.tolist()
    assert seventh != RecallExamples(DATA, TOKENIZER, 1)[7].ids.tolist()


def test_excluded_prompt_is_drawn_again():
    ids, mask = (array.tolist() for array in RecallExamples(DATA, TOKENIZER, 0)[5][:2])
    text = TOKENIZER.decode(ids[: mask.index(1)])
    other = RecallExamples(DATA, TOKENIZER, 0, frozenset([prompt_hash(text)]))
    assert other[5].ids.tolist() != ids
    assert other[4].ids.tolist() == RecallExamples(DATA, TOKENIZER, 0)[4].ids.tolist()
