"""Synthetic long-context tasks: a seed and a wanted length in, a prompt with its answer out.

Needles, variable tracking, common and frequent words follow RULER, the multi-round task follows
MR-NIAH. All texts are our own. A sample is a list of pieces, each opening at a word border, so that
a tokenizer which cuts there can encode them one by one and keep what it has seen.

Source: RULER (arXiv 2404.06654), section 3; MiniMax-01 (arXiv 2501.08313), section 5.2 (MR-NIAH).
"""

from __future__ import annotations

import bisect
import functools
import inspect
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmjax.chat import render_chat
from mmjax.config import ConfigError
from mmjax.tokenizer import EOS, Tokenizer
from train.data.sources import parse_task
from train.evaluation import lexicon

# Different sentences of one haystack pool; training and evaluation have pools of their own.
_POOL = 4096


class TooShortError(ConfigError):
    """A task does not fit a length."""


class Sample(NamedTuple):
    """prompt, answer: pieces of text; values: what a right answer has to name, nothing if other
    answers are as right, so that the task is only to learn from; depth: where the
    needle, or one of several, stands: 0 for the start of the haystack and 1 for its end.
    """

    prompt: list[str]
    answer: list[str]
    values: tuple[str, ...]
    depth: float

    @property
    def text(self) -> str:
        """The prompt as the model reads it."""
        return "".join(self.prompt)


class Draw(NamedTuple):
    """What a generator works with: randomness, a count of tokens, the tokens that the whole may
    take, where the needle goes (None for anywhere), sentences of the haystack, plain or chat form.
    """

    rng: random.Random
    count: Callable[[str], int]
    length: int
    depth: float | None
    pool: Sequence[str]
    chat: bool

    def where(self) -> float:
        """The wanted depth, or a random one."""
        return self.rng.random() if self.depth is None else self.depth

    def total(self, pieces: Sequence[str]) -> int:
        """Tokens of some pieces."""
        return sum(map(self.count, pieces))

    def names(self, number: int, of: int = len(lexicon.NAMES)) -> list[str]:
        """Distinct names of the first `of`.

        Raises:
          ConfigError: there are not as many.
        """
        known = lexicon.NAMES[:of]
        if number > len(known):
            raise ConfigError(f"{number} names are too many; there are {len(known)}")
        return self.rng.sample(known, number)

    def plenty_of_names(self, tokens: int, part: Sequence[str], beside: int, of: int) -> list[str]:
        """At least as many names as there is room for in such parts, and some beside, if there are
        as many.
        """
        room = max(tokens, 0) // max(self.total(part), 1)
        return self.names(min(room + beside, of), of)


type Generator = Callable[..., Sample]

_MAGIC = "A special magic number is hidden within the following text. Make sure to memorize it."
_MAGICS = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)


def niah(
    draw: Draw,
    *,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    haystack: str = "noise",
    digits: int = 7,
    names: int = len(lexicon.NAMES),
) -> Sample:
    """Needles, `One of the special magic numbers for KEY is: VALUE.`, in a haystack.

    Args:
      draw: Randomness, length, depth of a needle of the first key that is asked for.
      keys: Needles' keys in all, those that are not asked for being distractors.
      values: Values of each key that is asked for, in needles of their own.
      queries: Keys asked for; the answer names them in turn, and the values of each in the order
        of their needles.
      haystack: "noise" for sentences, "needles" for further needles alone.
      digits: Of a value.
      names: Different keys in all samples; the fewer, the sooner a small model knows them.

    Source: RULER, section 3.1 (single, multi-key, multi-value and multi-query NIAH).
    """
    if haystack not in ("noise", "needles") or not 1 <= queries <= keys or values < 1:
        raise ConfigError(
            f"niah(keys={keys}, values={values}, queries={queries}, haystack={haystack!r}) needs "
            "1 <= queries <= keys, values >= 1 and haystack 'noise' or 'needles'"
        )
    rng = draw.rng
    number = _numbers(rng, digits)
    drawn = draw.names(keys, names)
    asked = [(name, [next(number) for _ in range(values)]) for name in drawn[:queries]]
    others = [(name, next(number)) for name in drawn[queries:]]
    frame = _Frame(
        draw, [_MAGICS if values * queries > 1 else _MAGIC, "\n"], *_needle_question(asked)
    )
    needles = [_needle(name, value) for name, found in asked for value in found]
    loose = [_needle(*other) for other in others]
    left = frame.left - sum(map(draw.total, [*needles, *loose]))
    if haystack == "noise":
        hay = [[s] for s in _fill(draw, left, lambda: rng.choice(draw.pool))]
    else:
        hay = _more_needles(draw, left, number, set(drawn), names)
    for needle in loose:
        hay.insert(rng.randint(0, len(hay)), needle)
    wanted = draw.where()
    depths = [wanted, *(rng.random() for _ in needles[1:])]
    # The answer names a key's values as they come in the text.
    ordered = [d for of_key in itertools.batched(depths, values) for d in sorted(of_key)]
    hay = _insert(draw, hay, needles, ordered)
    return frame.sample(_joined(hay), _flat(asked), wanted)


def _needle(name: str, value: str) -> list[str]:
    return [" One of the special magic numbers for", f" {name}", " is:", f" {value}", "."]


def _flat(asked: Sequence[tuple[str, list[str]]]) -> tuple[str, ...]:
    return tuple(value for _, values in asked for value in values)


def _needle_question(
    asked: Sequence[tuple[str, list[str]]],
) -> tuple[list[str], list[str], list[str]]:
    """Pieces of the question, of the given start of its answer, and of the rest.

    One key: `The special magic number for KEY mentioned in the provided text is: VALUE`. Several:
    each is named again before its value, ` KEY: VALUE, KEY: VALUE`.
    """
    names = _listed([f" {name}" for name, _ in asked])
    if len(asked) == 1 and len(asked[0][1]) == 1:
        ask = ["\nWhat is the special magic number for", *names]
        lead = [" The special magic number for", *names, " mentioned in the provided text is:"]
        answer = [f" {asked[0][1][0]}"]
    else:
        ask = ["\nWhat are all the special magic numbers for", *names]
        lead = [" The special magic numbers for", *names, " mentioned in the provided text are:"]
        groups = []
        for name, values in asked:
            head = [f" {name}", ":"] if len(asked) > 1 else []
            groups.append(head + _separated([f" {v}" for v in values], " and"))
        answer = _separated(groups, ",")
    return [*ask, " mentioned in the provided text?"], lead, [*answer, "."]


def _listed(words: Sequence[str]) -> list[str]:
    """` a`, ` a and b` or ` a, b and c`, in pieces."""
    if len(words) == 1:
        return list(words)
    return [*_separated(words[:-1], ","), " and", words[-1]]


def _separated(parts: Sequence[Any], by: str) -> list[str]:
    pieces: list[str] = []
    for i, part in enumerate(parts):
        pieces += [by] * (i > 0) + ([part] if isinstance(part, str) else list(part))
    return pieces


def _numbers(rng: random.Random, digits: int) -> Iterator[str]:
    """Numbers of which the first `_distinct` are; then any."""
    low, high = 10 ** (digits - 1), 10**digits
    seen: set[int] = set()
    while True:
        number = rng.randrange(low, high)
        if number in seen and len(seen) < _distinct(digits):
            continue
        seen.add(number)
        yield str(number)


def _distinct(digits: int) -> int:
    """Half of the numbers of so many digits: as many are quickly drawn without one twice."""
    return (10**digits - 10 ** (digits - 1)) // 2


def _more_needles(
    draw: Draw, left: int, number: Iterator[str], taken: set[str], of: int
) -> list[list[str]]:
    found: list[list[str]] = []
    for name in draw.plenty_of_names(left, _needle("", ""), len(taken), of):
        if name in taken:
            continue
        needle = _needle(name, next(number))
        left -= draw.total(needle)
        if left < 0:
            break
        found.append(needle)
    return found


def associative_recall(draw: Draw, *, digits: int = 3, names: int = len(lexicon.NAMES)) -> Sample:
    """As many pairs of a name and a number as fit, all of them asked for in another order.

    To learn from, more than to be asked: an answer names a value every few tokens, where a needle's
    is one token of a thousand.

    Args:
      draw: Randomness and length.
      digits: Of a number.
      names: Different names in all samples.

    Source: Arora et al. (arXiv 2312.04927), multi-query associative recall.
    """
    return _pairs(draw, digits, names, _pair, lambda n, v: [f" {n}", ":", f" {v}"], asked=True)


def _pair(name: str, value: str) -> list[str]:
    return [f" {name}", " is:", f" {value}", "."]


def shuffled_pairs(draw: Draw, *, digits: int = 3, names: int = len(lexicon.NAMES)) -> Sample:
    """As many pairs of a name and a number as fit, repeated in an order that nothing tells.

    Only to learn from: a number follows from its name alone, where in `associative_recall` most of
    an answer can be copied from the question, so that a model learns to tell names apart sooner.

    Args:
      draw: Randomness and length.
      digits: Of a number.
      names: Different names in all samples.

    Source: Arora et al. (arXiv 2312.04927), multi-query associative recall.
    """

    def bare(name: str, value: str) -> list[str]:
        return [f" {name}", f" {value}"]

    return _pairs(draw, digits, names, lambda n, v: [*bare(n, v), "."], bare, asked=False)


def _pairs(
    draw: Draw,
    digits: int,
    names: int,
    in_text: Callable[[str, str], list[str]],
    in_answer: Callable[[str, str], list[str]],
    *,
    asked: bool,
) -> Sample:
    """As many pairs as fit, written in two ways, and whether the question lists their names."""
    number = _numbers(draw.rng, digits)
    head = ["Memorize the following numbers.\n"]

    def frame(pairs: Sequence[tuple[str, str]]) -> _Frame:
        ask = ["\nRepeat the numbers."]
        if asked:
            ask = ["\nRepeat the numbers of", *_listed([f" {name}" for name, _ in pairs]), "."]
        answer = _separated([in_answer(*pair) for pair in pairs], ",")
        return _Frame(draw, head, ask, [" They are:"], [*answer, "."])

    pairs: list[tuple[str, str]] = []
    left = frame([("", "")] * (2 if asked else 1)).left
    for name in draw.plenty_of_names(left, in_text("", ""), 1, names):
        pair = (name, next(number))
        listed = [",", f" {name}"] if asked else []
        left -= draw.total([*in_text(*pair), *in_answer(*pair), ",", *listed])
        if left < 0 and pairs:
            break
        pairs.append(pair)
    hay = _joined(in_text(*pair) for pair in pairs)
    draw.rng.shuffle(pairs)
    values = tuple(value for _, value in pairs) if asked else ()
    return frame(pairs).sample(hay, values, 0.0)


def variable_tracking(draw: Draw, *, chains: int = 1, hops: int = 4, digits: int = 5) -> Sample:
    """`VAR A = 123.`, `VAR B = VAR A.`, ...: which variables hold 123?

    Args:
      draw: Randomness, length, depth of the first assignment.
      chains: Chains of assignments, of which one is asked for.
      hops: Assignments after a chain's first.
      digits: Of the value.

    Source: RULER, section 3.2.
    """
    if chains > _distinct(digits):
        raise ConfigError(f"{chains} chains cannot have values of their own with {digits} digits")
    number = _numbers(draw.rng, digits)
    names = iter(draw.names(chains * (hops + 1)))
    chain_names = [[next(names) for _ in range(hops + 1)] for _ in range(chains)]
    values = [next(number) for _ in range(chains)]
    asked, value = chain_names[0], values[0]
    head = "Memorize and track the chain of variables assigned within the following text.\n"
    ask = ["\nFind all variables that are assigned the value", f" {value}", " in the text above."]
    lead = [" According to the text above, they are:"]
    answer = [*_separated([f" {name}" for name in asked], ","), "."]
    frame = _Frame(draw, [head], ask, lead, answer)
    steps = [_assignments(chain, v) for chain, v in zip(chain_names, values, strict=True)]
    left = frame.left - sum(draw.total(step) for chain in steps for step in chain)
    hay = [[s] for s in _fill(draw, left, lambda: draw.rng.choice(draw.pool))]
    first = draw.where()
    for chain in reversed(steps):  # The chain that is asked for last: its depth is the wanted one.
        start = first if chain is steps[0] else draw.rng.random()
        depths = sorted(start + (1 - start) * draw.rng.random() for _ in chain[1:])
        hay = _insert(draw, hay, chain, [start, *depths])
    return frame.sample(_joined(hay), tuple(asked), first)


def _assignments(chain: Sequence[str], value: str) -> list[list[str]]:
    first = [" VAR", f" {chain[0]}", " =", f" {value}", "."]
    later = [[" VAR", f" {b}", " =", " VAR", f" {a}", "."] for a, b in itertools.pairwise(chain)]
    return [first, *later]


def common_words(draw: Draw, *, common: int = 10, often: int = 30, seldom: int = 3) -> Sample:
    """A numbered list of words, some of them more often than all others.

    Args:
      draw: Randomness and length.
      common: Words that are asked for.
      often: Times that each of them appears.
      seldom: Times that each of the others does; as many as the length has room for.

    Source: RULER, section 3.3 (common words extraction).
    """
    names = draw.names(len(lexicon.NAMES))
    if seldom >= often or common >= len(names):
        raise ConfigError(
            f"common_words(common={common}, often={often}, seldom={seldom}) needs seldom < often "
            f"and common < {len(names)}, all the words there are"
        )
    wanted, rest = names[:common], names[common:]
    each = draw.count(" 100.") + draw.count(f" {wanted[0]}")
    head = (
        "Below is a list of words. Some appear more often than others. Memorize the ones which "
        "appear most often.\n"
    )
    ask = [f"\nWhat are the {common} most common words in the list above?"]
    lead = [" The most common words, in the order of their first appearance, are:"]
    answer = [*_separated([f" {word}" for word in wanted], ","), "."]
    frame = _Frame(draw, [head], ask, lead, answer)
    others = (frame.left // each - common * often) // seldom
    if others < 1:
        raise TooShortError(f"common_words(common={common}, often={often}) does not fit")
    words = wanted * often + rest[:others] * seldom
    draw.rng.shuffle(words)
    hay = _joined([f" {i}.", f" {word}"] for i, word in enumerate(words, 1))
    order = sorted(wanted, key=words.index)
    frame = frame._replace(answer=[*_separated([f" {word}" for word in order], ","), "."])
    return frame.sample(hay, tuple(order), 0.0)


def frequent_words(draw: Draw, *, top: int = 3, alpha: float = 2.0) -> Sample:
    """Words drawn from a Zipf distribution, f(k) ~ k^-alpha; the most frequent are asked for.

    Args:
      draw: Randomness and length.
      top: Words that are asked for, most frequent first.
      alpha: Of the distribution.

    Source: RULER, section 3.3 (frequent words extraction).
    """
    names = draw.names(256)
    if top >= len(names) or alpha <= 0:
        raise ConfigError(
            f"frequent_words(top={top}, alpha={alpha:g}) needs top < {len(names)}, all the words "
            "there are, and alpha > 0"
        )
    head = "Memorize the following coded text and track the frequency of each word.\n"
    ask = [f"\nWhat are the {top} most frequently appeared words in the coded text above?"]
    lead = [" The most frequently appeared words are:"]
    answer = [*_separated([f" {word}" for word in names[:top]], ","), "."]
    frame = _Frame(draw, [head], ask, lead, answer)
    weights = np.arange(1, len(names) + 1) ** -alpha
    counts = frame.left / draw.count(f" {names[0]}") * weights / weights.sum()
    if counts[top - 1] - counts[top] < 1:
        raise TooShortError(f"frequent_words(top={top}) does not fit the length")
    words = _joined([word] * int(n) for word, n in zip(names, counts, strict=True))
    draw.rng.shuffle(words)
    return frame.sample([f" {word}" for word in words], tuple(names[:top]), 0.0)


def multi_round(draw: Draw) -> Sample:
    """A long conversation whose last request is to repeat one of the earlier answers.

    Users ask for poems, stories, ... about people; some other round has the same form, another the
    same subject. The task is in chat form always.

    Source: MiniMax-01, section 5.2: MR-NIAH.
    """
    rng = draw.rng
    form, other = rng.sample(lexicon.FORMS, 2)
    subject, *others = draw.names(64)
    rest = itertools.cycle(others)
    needle = _round(draw, form, subject)
    same = [_round(draw, other, subject), _round(draw, form, next(rest))]
    last = _user(["Repeat", f" the {form}", " about", f" {subject}", "."])
    answer = [needle[-2], EOS]
    left = draw.length - draw.total([*needle, *_joined(same), *last, *answer])
    hay = []
    while (left := left - draw.total(filler := _filler(draw, rest))) >= 0:
        hay.append(filler)
    for round_ in same:
        hay.insert(rng.randint(0, len(hay)), round_)
    depth = draw.where()
    rounds = _insert(draw, hay, [needle], [depth])
    return Sample([*_joined(rounds), *last], answer, (needle[-2],), depth)


def _filler(draw: Draw, subjects: Iterator[str]) -> list[str]:
    return _round(draw, draw.rng.choice(lexicon.FORMS), next(subjects))


def _round(draw: Draw, form: str, subject: str) -> list[str]:
    reply = draw.rng.choice(draw.pool).strip()
    return [*_user(["Write", f" a {form}", " about", f" {subject}", "."]), reply, f"{EOS}\n"]


@functools.cache
def _turns() -> tuple[str, str]:
    """What stands before a user's text, and what between it and the reply."""
    before, after = render_chat([{"role": "user", "content": "\0"}]).split("\0")
    return before, after


def _user(pieces: Sequence[str]) -> list[str]:
    before, after = _turns()
    return [before, *pieces, after]


class _Frame(NamedTuple):
    """What stands around a haystack: head, the question, the given start of its answer; and the
    rest of the answer.
    """

    draw: Draw
    head: list[str]
    ask: list[str]
    lead: list[str]
    answer: list[str]

    @property
    def left(self) -> int:
        """Tokens that the haystack may take."""
        return self.draw.length - self.draw.total([*self._around([]), *self.answer, EOS])

    def sample(self, hay: Sequence[str], values: tuple[str, ...], depth: float) -> Sample:
        """Everything together."""
        return Sample(self._around(hay), [*self.answer, EOS], values, depth)

    def _around(self, hay: Sequence[str]) -> list[str]:
        if not self.draw.chat:
            return [*self.head, *hay, *self.ask, *self.lead]
        before, after = _turns()
        lead = [self.lead[0].lstrip(), *self.lead[1:]]
        return [before, *self.head, *hay, *self.ask, after, *lead]


def _fill(draw: Draw, left: int, make: Callable[[], str]) -> list[str]:
    """Sentences until `left` tokens are used up."""
    found: list[str] = []
    while True:
        text = make()
        left -= draw.count(text)
        if left < 0:
            return found
        found.append(text)


def _insert(
    draw: Draw, hay: Sequence[list[str]], needles: Sequence[list[str]], depths: Sequence[float]
) -> list[list[str]]:
    """The haystack's parts with needles between them, each at its share of the tokens."""
    ends = list(itertools.accumulate(draw.total(part) for part in hay))
    # A part that straddles the place goes before the needle; none does at depth 0.
    places = [
        min(bisect.bisect_left(ends, depth * ends[-1]) + (depth > 0), len(hay)) if hay else 0
        for depth in depths
    ]
    parts = list(hay)
    for i in sorted(range(len(needles)), key=lambda i: (places[i], i), reverse=True):
        parts.insert(places[i], needles[i])
    return parts


def _joined(parts: Iterable[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(parts))


_GENERATORS: Mapping[str, Generator] = {
    "niah": niah,
    "associative_recall": associative_recall,
    "shuffled_pairs": shuffled_pairs,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "multi_round": multi_round,
}


class _Kept(dict[str, list[int]]):
    """What a function gives for a text, kept. A dict, since most of a sample's making is looking
    up in it.
    """

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, text: str) -> list[int]:
        return self.setdefault(text, self._encode(text))


class Encoder:
    """Ids of pieces, kept; of whole texts where the tokenizer does not cut where pieces end.

    Args:
      tokenizer: To encode with.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids = _Kept(tokenizer.encode)
        self._whole = False

    def count(self, piece: str) -> int:
        """Tokens of one piece."""
        return len(self._ids[piece])

    def check(self, sample: Sample) -> None:
        """Encodes whole texts from now on if the pieces of this one encode otherwise."""
        pieces = [*sample.prompt, *sample.answer]
        if self._tokenizer.encode("".join(pieces)) != self._joined(pieces):
            self._whole = True

    def prompt_and_answer(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Ids of both."""
        if self._whole:
            answer = self._tokenizer.encode("".join(sample.answer))
            return self._tokenizer.encode(sample.text), answer
        return self._joined(sample.prompt), self._joined(sample.answer)

    def _joined(self, pieces: Sequence[str]) -> list[int]:
        return list(itertools.chain.from_iterable(map(self._ids.__getitem__, pieces)))


class Task:
    """One task of a config, such as `niah(keys=8, digits=3)`.

    Args:
      text: As the config writes it.
      encoder: Of the model's tokenizer.
      split: "train" or "held-out"; their randomness and their haystacks are different.
      seed: Of the samples.
      chat: In M1's chat form; otherwise plain text.

    Raises:
      ConfigError: an unknown task or parameter, or a value that it cannot have.
    """

    def __init__(self, text: str, encoder: Encoder, split: str, seed: int, *, chat: bool) -> None:
        name, params = parse_task(text)
        if name not in _GENERATORS:
            raise ConfigError(f"unknown recall task {text!r}; known: {', '.join(_GENERATORS)}")
        generator = _GENERATORS[name]
        known = [p for p in inspect.signature(generator).parameters if p != "draw"]
        wrong = sorted(set(params) - set(known))
        if wrong:
            raise ConfigError(
                f"recall task {text!r}: unknown {', '.join(wrong)}; known: {', '.join(known)}"
            )
        _check_values(text, inspect.signature(generator).parameters, params)
        self.text, self._generator, self._params = text, generator, params
        self._encoder, self._key, self._chat = encoder, f"{split}/{seed}", chat
        self._pool = _pool(self._key)
        self.has_depth = name in ("niah", "variable_tracking", "multi_round")

    def sample(self, index: int, length: int, depth: float | None = None) -> Sample:
        """Sample `index`, of at most `length` tokens with its answer, and hardly fewer.

        Args:
          index: The same one is the same sample.
          length: In tokens.
          depth: Of the needle from 0 to 1; None for anywhere.

        Raises:
          TooShortError: the task does not fit the length.
        """
        wanted, before = length, 0
        while True:
            rng = random.Random(f"{self.text}/{self._key}/{index}")
            encode = self._encoder
            draw = Draw(rng, encode.count, wanted, depth, self._pool, self._chat)
            sample = self._generator(draw, **self._params)
            size = sum(map(len, encode.prompt_and_answer(sample)))
            if size <= length:
                return sample
            if size == before:  # There is no haystack left to take away.
                raise TooShortError(f"task {self.text!r} does not fit {length} tokens")
            wanted, before = wanted - (size - length), size


def _check_values(
    text: str, known: Mapping[str, inspect.Parameter], params: Mapping[str, Any]
) -> None:
    """Raises ConfigError for values of other types than the defaults', and for too small ones."""
    for name, value in params.items():
        kind = type(known[name].default)
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or isinstance(value, bool):
            raise ConfigError(f"recall task {text!r}: {name} = {value!r} is no {kind.__name__}")
        least = 0 if name == "hops" else 1
        if kind is int and value < least:
            raise ConfigError(f"recall task {text!r}: {name} must be at least {least}")


@functools.lru_cache(maxsize=8)
def _pool(key: str) -> tuple[str, ...]:
    rng = random.Random(key)
    return tuple(lexicon.sentence(rng) for _ in range(_POOL))
