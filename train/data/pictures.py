"""Pictures with captions: a folder with a captions.jsonl, and what a job makes of them.

A line of captions.jsonl is {"file": "a.png", "caption": "waving hand", "group": "1F44B"}. Pictures
of a group are variants of one thing; held-out ones are drawn where others of their group remain.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmjax.chat import render_chat
from mmjax.config import ConfigError
from mmjax.tokenizer import EOS, Tokenizer
from mmjax.vision import Image, ImageError, VisionConfig, feature_index, read_image
from mmjax.vision.tiles import expand_images, tiles
from train.config import DataConfig
from train.data.examples import Example
from train.data.packing import Pictures

CAPTIONS = "captions.jsonl"


class Picture(NamedTuple):
    """An image file, what it shows, and the group of its variants."""

    file: Path
    caption: str
    group: str


def read_pictures(folder: str | Path) -> list[Picture]:
    """The pictures that a folder's captions.jsonl names, in its order.

    Raises:
      ConfigError: there is no such file, or a line of it is wrong.
    """
    path = Path(folder) / CAPTIONS
    if not path.is_file():
        raise ConfigError(
            f"data.paths: {path} does not exist; python -m train.data.openmoji makes such a folder"
        )
    pictures = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            file, caption = str(entry["file"]), str(entry["caption"])
            group = str(entry.get("group", file))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            told = f'{path}:{number} is no JSON object with "file" and "caption": {error!r}'
            raise ConfigError(told) from None
        pictures.append(Picture(path.parent / file, caption, group))
    return pictures


def split_pictures(
    pictures: Sequence[Picture], held_out: int, seed: int
) -> tuple[list[Picture], list[Picture]]:
    """Training and held-out pictures; at most half of a group is held out.

    Raises:
      ConfigError: there are not as many such pictures.
    """
    sizes = Counter(picture.group for picture in pictures)
    taken: Counter[str] = Counter()
    chosen: set[int] = set()
    for i in np.random.default_rng(seed).permutation(len(pictures)).tolist():
        group = pictures[i].group
        if len(chosen) < held_out and 2 * (taken[group] + 1) <= sizes[group]:
            taken[group] += 1
            chosen.add(i)
    if len(chosen) < held_out:
        raise ConfigError(
            f"{held_out} pictures cannot be held out: only {len(chosen)} of {len(pictures)} are "
            "variants of others"
        )
    kept = [p for i, p in enumerate(pictures) if i not in chosen]
    return kept, [pictures[i] for i in sorted(chosen)]


def load_image(picture: Picture) -> Image:
    """The picture's pixels.

    Raises:
      ConfigError: it cannot be read.
    """
    try:
        return read_image(picture.file)
    except ImageError as error:
        raise ConfigError(str(error)) from None


def prompt_text(question: str) -> str:
    """The turn that asks about a picture, up to the answer."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return render_chat([{"role": "user", "content": content}])


def answer_text(picture: Picture) -> str:
    """The answer that is to be learnt."""
    return f"{picture.caption}{EOS}"


def picture_examples(
    pictures: Sequence[Picture], tokenizer: Tokenizer, cfg: VisionConfig, data: DataConfig
) -> tuple[list[Example], Pictures]:
    """Question and answer about each picture, and the tiles of all.

    Raises:
      ConfigError: a picture cannot be read, or does not fit a row.
    """
    prompt = tokenizer.encode(prompt_text(data.question))
    examples, cut, count = [], [], 0
    for picture in pictures:
        image = load_image(picture)
        cut.append(tiles(image, cfg))
        ids, (place,) = expand_images(prompt, [image], cfg)
        answer = tokenizer.encode(answer_text(picture))
        features = np.full(len(ids) + len(answer), -1, np.int32)
        features[place.start : place.stop] = feature_index(image.size, cfg)
        numbers = range(count, count + len(cut[-1]))
        if len(features) > data.sequence_length or len(numbers) > data.tiles_per_row:
            raise ConfigError(
                f"{picture.file} takes {len(features)} tokens and {len(numbers)} tiles, a row has "
                f"data.sequence_length {data.sequence_length} and data.tiles_per_row "
                f"{data.tiles_per_row}"
            )
        example = Example.answering(ids.tolist(), answer)
        examples.append(example._replace(tiles=np.array(numbers, np.int32), features=features))
        count = numbers.stop
    return examples, Pictures(np.concatenate(cut), cfg.patches, data.tiles_per_row)
