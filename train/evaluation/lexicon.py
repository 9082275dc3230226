"""The words that the synthetic tasks are made of, and a small tokenizer that knows them whole."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mmjax.tokenizer import Tokenizer
from train.data.tokenizer import SPECIAL

# Names of keys and variables: as many as a haystack of 8K tokens that is all needles can use.
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
NAMES = tuple(
    "".join(pair)
    for pair in random.Random(0).sample([*itertools.product(_SYLLABLES, repeat=2)], 1024)
)
ADJECTIVES = (
    *("old", "young", "quiet", "loud", "green", "yellow", "small", "large", "warm", "cold"),
    *("bright", "dark", "slow", "quick", "gentle", "brave", "clever", "lazy", "happy", "tired"),
)
NOUNS = (
    *("baker", "sailor", "painter", "farmer", "teacher", "doctor", "singer", "pilot", "miller"),
    *("weaver", "fox", "horse", "owl", "cat", "dog", "bear", "rabbit", "whale", "crow", "bee"),
    *("river", "forest", "garden", "bridge", "tower", "window", "market", "harbour", "valley"),
    *("island", "lamp", "table", "basket", "mirror", "letter", "clock", "kettle", "blanket"),
    *("bottle", "ladder"),
)
VERBS = (
    *("watches", "follows", "paints", "finds", "carries", "remembers", "likes", "forgets"),
    *("repairs", "visits", "draws", "hides", "moves", "cleans", "sells", "describes"),
)
PLACES = ("near", "behind", "above", "below", "beside", "before", "after", "without")
FORMS = ("poem", "story", "saying", "riddle", "song", "toast", "letter", "joke")
# Everything else that the tasks say.
_FRAMES = (
    "A a an and are all below special magic number numbers is hidden within the following text "
    "Make sure to memorize it I will quiz you about afterwards What mentioned in provided for One "
    "of The some them track variables assigned value chain Question Find that names Answer "
    "According assignment above VAR variable s list words which appear more often than others "
    "memorize ones most common coded track frequency each word ignore dots three frequently "
    "appeared Write write about Repeat repeat numbers your answer to my request order their first "
    "appearance they were by here there with was text from same user name ai assistant They"
)


def sentence(rng: random.Random) -> str:
    """One sentence, such as ` The old baker follows the young fox near the river.` as it stands."""
    a, b = rng.sample(ADJECTIVES, 2)
    x, y, z = rng.sample(NOUNS, 3)
    place = f" {rng.choice(PLACES)} the {z}" if rng.random() < 0.5 else ""
    return f" The {a} {x} {rng.choice(VERBS)} the {b} {y}{place}."


def _tokens() -> Iterator[str]:
    """The words as they stand in a text: with the space before them, and some without as well."""
    for word in (*_FRAMES.split(), *ADJECTIVES, *NOUNS, *VERBS, *PLACES, *FORMS):
        yield from (word, f"Ġ{word}")
    for word in (*NAMES, *range(1000)):
        yield f"Ġ{word}"


def word_tokenizer() -> Tokenizer:
    """Every word of the tasks and every number below 1000 is one token; all else goes by bytes.

    About 2,500 ids, so that a model of a few million parameters spends them on recall rather than
    on an embedding.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = dict.fromkeys([*SPECIAL, *alphabet, *_tokens()])
    vocab = {text: number for number, text in enumerate(known)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)
