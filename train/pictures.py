"""Supervised fine-tuning on pictures with captions, and what it made of the held-out ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mmjax import Engine, ImagePrompt, SamplingParams
from mmjax.chat import IMAGE
from mmjax.config import ConfigError, ModelConfig
from mmjax.model import Decoder
from mmjax.tokenizer import Tokenizer
from mmjax.vision import VisionConfig, image_tokens
from train import distributed
from train.config import JobConfig
from train.data.pictures import (
    Picture,
    answer_text,
    load_image,
    picture_examples,
    prompt_text,
    read_pictures,
    split_pictures,
)
from train.data.pipeline import example_stream
from train.data.streams import Streams
from train.gallery import Answer, write_gallery
from train.job import Job
from train.language import fit
from train.tokenizing import job_tokenizer

# Pictures that are answered side by side.
_SLOTS = 32


def run(cfg: JobConfig, workdir: Path) -> Job:
    """Runs or resumes the job; at its end held-out pictures are named, into `pictures.html`.

    Args:
      cfg: With data.source "pictures"; cispo.eval_problems pictures are held out.
      workdir: Folder of the job.

    Raises:
      ConfigError: the folder of pictures is wrong, or the model takes none.
    """
    if cfg.model.vision is None and not cfg.init_from:
        raise ConfigError("the model has no vision half: set model.vision, or init_from a VL model")
    pictures = read_pictures(cfg.data.paths[0])
    seen, held_out = split_pictures(pictures, cfg.cispo.eval_problems, cfg.seed)
    texts = [prompt_text(cfg.data.question) + answer_text(picture) for picture in seen]
    tokenizer = _with_image_token(job_tokenizer(cfg, workdir, texts))
    cfg = _with_image_id(cfg, tokenizer)
    job = Job(cfg, workdir, tokenizer, cfg.steps)
    vision = _vision(job.model_cfg, tokenizer)
    examples, store = picture_examples(seen, tokenizer, vision, cfg.data)

    def make(cfg: JobConfig, *, after: Mapping[str, Any] | None, **_: Any) -> Streams:
        return example_stream(examples, cfg, after=after, rows=job.rows, pictures=store)

    fit(job, make)
    if job.stop_signal is None and jax.process_count() == 1:
        report(name_pictures(job.model, tokenizer, held_out, cfg.data.question), workdir)
    return job


def name_pictures(
    model: Decoder, tokenizer: Tokenizer, pictures: Sequence[Picture], question: str
) -> list[Answer]:
    """What the model says to each picture, greedily."""
    assert model.cfg.vision is not None
    prompt = tokenizer.encode(prompt_text(question))
    images = [load_image(picture) for picture in pictures]
    longest = max(len(tokenizer.encode(answer_text(picture))) for picture in pictures) + 4
    room = max(image_tokens(image.size, model.cfg.vision) for image in images)
    length = len(prompt) + room + longest
    engine = Engine(
        model,
        tokenizer,
        max_slots=min(_SLOTS, len(pictures)),
        max_length=length,
        prefill_chunk=1 << (length - 1).bit_length(),
        num_prefixes=0,
    )
    params = SamplingParams(max_tokens=longest, temperature=0.0)
    done = engine.generate([ImagePrompt(prompt, [image]) for image in images], params)
    return [
        Answer(picture.file, picture.caption, completion.text)
        for picture, completion in zip(pictures, done, strict=True)
    ]


def report(answers: Sequence[Answer], workdir: Path) -> None:
    """The share of right answers, on the terminal, in eval.json and over a page of pictures."""
    if not answers or not distributed.is_primary():
        return
    right = sum(answer.right for answer in answers)
    told = {"accuracy": right / len(answers), "pictures": len(answers)}
    (workdir / "eval.json").write_text(json.dumps(told) + "\n")
    page = workdir / "pictures.html"
    write_gallery(answers, page)
    print(f"{right} of {len(answers)} held-out pictures named rightly: {page}")


def _with_image_token(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.backend.add_special_tokens([IMAGE])
    return tokenizer


def _with_image_id(cfg: JobConfig, tokenizer: Tokenizer) -> JobConfig:
    """The job with the tokenizer's own image token; a model that is loaded has one already."""
    if cfg.model.vision is None:
        return cfg
    token = tokenizer.backend.token_to_id(IMAGE)
    assert token is not None
    vision = dataclasses.replace(cfg.model.vision, image_token_id=token)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vision=vision))


def _vision(cfg: ModelConfig, tokenizer: Tokenizer) -> VisionConfig:
    if cfg.vision is None:
        raise ConfigError("the model of init_from has no vision half: name a VL model")
    token = tokenizer.backend.token_to_id(IMAGE)
    if token != cfg.vision.image_token_id:
        raise ConfigError(
            f"the tokenizer's {IMAGE} is {token}, the model's {cfg.vision.image_token_id}"
        )
    return cfg.vision
