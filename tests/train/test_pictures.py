"""Pictures with captions: packed with their tiles, a frozen tower, a whole small job."""

import io
import json
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import resvg_py

from configs import vl_openmoji
from mmjax.config import ConfigError
from mmjax.vision import VisionConfig
from mmjax.vision.tiles import normalise, tiles
from tests.train.programs import lenient
from train import pictures as task
from train import sft
from train.config import DataConfig, JobConfig, OptimizerConfig, build
from train.data.examples import Example
from train.data.openmoji import main as make_openmoji
from train.data.pictures import (
    answer_text,
    load_image,
    picture_examples,
    prompt_text,
    read_pictures,
    split_pictures,
)
from train.data.pipeline import example_stream
from train.data.tokenizer import train_tokenizer
from train.gallery import Answer, write_gallery
from train.optimizer import make_optimizer
from train.step import _image_tokens, without_gradient

pytestmark = pytest.mark.slow

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 1,
    "num_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
LAYERS = {"num_layers": 2, "layer_types": ("lightning", "softmax")}
DATA = DataConfig(source="pictures", sequence_length=128, batch_size=2, tiles_per_row=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures of six things, one and two tiles wide."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(12):
        size = (8, 8) if i % 3 else (16, 8)
        noise = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        PIL.Image.fromarray(noise).save(folder / f"{i}.png")
        entry = {"file": f"{i}.png", "caption": f"thing {i}", "group": str(i // 2)}
        lines.append(json.dumps(entry))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    texts = [prompt_text(DATA.question) + answer_text(p) for p in read_pictures(folder)]
    return task._with_image_token(train_tokenizer(texts, 290))


@pytest.fixture(scope="module")
def vision(tokenizer):
    return VisionConfig(**VISION, image_token_id=tokenizer.backend.token_to_id("<image>"))


def test_held_out_pictures_have_siblings(folder):
    pictures = read_pictures(folder)
    seen, held_out = split_pictures(pictures, 5, seed=1)
    assert len(held_out) == 5
    assert sorted(p.file for p in [*seen, *held_out]) == sorted(p.file for p in pictures)
    assert {p.group for p in held_out} <= {p.group for p in seen}
    with pytest.raises(ConfigError, match="7 pictures cannot be held out: only 6 of 12"):
        split_pictures(pictures, 7, seed=1)


def test_folders_that_are_wrong(folder, tmp_path, tokenizer, vision):
    with pytest.raises(ConfigError, match=r"captions\.jsonl does not exist; python -m train\.data"):
        read_pictures(tmp_path)
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png"}\n')
    with pytest.raises(ConfigError, match=r"captions\.jsonl:1 is no JSON object with"):
        read_pictures(tmp_path)
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "caption": "x"}\n')
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"a\.png is in no known format"):
        picture_examples(read_pictures(tmp_path), tokenizer, vision, DATA)
    short = DataConfig(source="pictures", sequence_length=16, tiles_per_row=8)
    with pytest.raises(ConfigError, match=r"takes .* tokens and 3 tiles, a row has"):
        picture_examples(read_pictures(folder), tokenizer, vision, short)


def batches(examples, data, store=None):
    return example_stream(examples, JobConfig("sft", 1, data=data), pictures=store)


def test_packed_tokens_find_their_own_pictures(folder, tokenizer, vision):
    """Each image token's feature is the one that its picture alone has."""
    pictures = read_pictures(folder)
    examples, store = picture_examples(pictures, tokenizer, vision, DATA)
    batch = next(batches(examples, DATA, store))
    assert batch["tiles"].dtype == np.uint8
    assert batch["tiles"].shape == (2, 8, 8, 8, 3)
    by_answer = {tuple(e.ids): i for i, e in enumerate(examples)}
    found = 0
    for row, segments in enumerate(batch["segment_ids"]):
        index = batch["image_index"][row]
        for segment in range(1, segments.max() + 1):
            place = segments == segment
            number = by_answer[tuple(batch["tokens"][row][place].tolist())]
            alone, here = np.array(examples[number].features), index[place]
            np.testing.assert_array_equal(here < 0, alone < 0)
            np.testing.assert_array_equal(here == 0, alone == 0)  # The newline is everyone's.
            cut = tiles(load_image(pictures[number]), vision)
            for mine, theirs in zip(here[here > 0] - 1, alone[alone > 0] - 1, strict=True):
                assert mine % vision.patches == theirs % vision.patches
                tile = batch["tiles"][row][mine // vision.patches]
                np.testing.assert_array_equal(tile, cut[theirs // vision.patches])
            found += 1
        assert (index[segments == 0] < 0).all()
    assert found >= 4


def test_packing_without_pictures_has_none(tokenizer):
    batch = next(batches([Example.answering([], [1, 2, 3])] * 9, DataConfig(sequence_length=8)))
    assert set(batch) == {"tokens", "segment_ids", "positions", "loss_mask"}


def test_frozen_parameters_get_no_gradient_and_no_moments():
    params = {"vision": {"patch": jnp.ones((2, 3)), "linear": jnp.ones(4)}, "head": jnp.ones(5)}
    frozen = ("vision.patch*",)
    gradient = jax.grad(
        lambda p: sum(x.sum() for x in jax.tree.leaves(without_gradient(p, frozen)))
    )
    grads = gradient(params)
    assert not grads["vision"]["patch"].any()
    assert grads["vision"]["linear"].all()
    optimizer = lenient(make_optimizer(OptimizerConfig(learning_rate=1e-2), 10, frozen))
    state = optimizer.init(params)
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * (4 + 5)
    updates, _ = optimizer.update(grads, state, params)
    assert not updates["vision"]["patch"].any()  # Weight decay would move it too.
    assert updates["vision"]["linear"].all()
    assert updates["head"].all()


def test_a_job_from_pictures_to_a_page(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.job.make_optimizer", lambda *a: lenient(make_optimizer(*a)))
    config = vl_openmoji.get_config()
    config.steps, config.remat = 3, "none"
    config.data.paths = (str(folder),)
    config.data.sequence_length = 128
    config.data.tiles_per_row = 8
    config.data.batch_size = 8
    config.cispo.eval_problems = 4
    config.model = {
        "preset": "tiny",
        **LAYERS,
        "hidden_size": 32,
        "vocab_size": 280,
        "vision": VISION,
    }
    job = sft.run(build(config), tmp_path / "job")
    assert int(job.state.step) == 3
    told = json.loads((tmp_path / "job" / "eval.json").read_text())
    assert told["pictures"] == 4
    assert "of 4 held-out pictures named rightly" in capsys.readouterr().out
    page = (tmp_path / "job" / "pictures.html").read_text()
    assert page.count("<figure") == 4
    assert (tmp_path / "job" / "model" / "model.safetensors").exists()
    exported = json.loads((tmp_path / "job/model/config.json").read_text())
    token = job.tokenizer.backend.token_to_id("<image>")
    assert exported["image_token_index"] == token < exported["text_config"]["vocab_size"]


def test_a_model_without_a_vision_half(folder, tmp_path):
    config = vl_openmoji.get_config()
    config.data.paths = (str(folder),)
    config.cispo.eval_problems = 2
    config.model = {"preset": "tiny", **LAYERS}
    with pytest.raises(ConfigError, match=r"no vision half: set model\.vision"):
        task.run(build(config), tmp_path)


def test_gallery(folder, tmp_path):
    file = folder / "0.png"
    answers = [Answer(file, "a <b>", "a <b>"), Answer(file, "cat", "dog"), Answer(file, "cat", " ")]
    write_gallery(answers, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "1 of 3 held-out pictures" in page
    assert "a &lt;b&gt;" in page
    assert "<del>dog</del><br>cat" in page
    assert "(nothing)" in page
    assert page.index("dog") < page.index("a &lt;b&gt;")  # Wrong answers first.


def test_normalise_matches_the_step(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2, 8, 8, 3), np.uint8)
    seen = {}

    class Vision:
        def features(self, x):
            seen["x"] = np.asarray(x)
            return x

    class Model:
        vision = Vision()

    _image_tokens(Model(), {"tiles": jnp.asarray(pixels), "image_index": jnp.zeros((1, 1))})
    np.testing.assert_allclose(seen["x"], normalise(pixels), atol=1e-6)


# OpenMoji --------------------------------------------------------------------------------------

_SVG = (
    '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">'
    '<rect width="36" height="72"/></svg>'
)


def package(path, **changes):
    told = [
        {"hexcode": "1F44B", "annotation": "waving hand", "skintone_base_hexcode": "1F44B"},
        {"hexcode": "1F431", "annotation": "cat face", "skintone_base_hexcode": ""},
    ]
    files = {"package/data/openmoji.json": json.dumps(told)}
    files |= {f"package/color/svg/{code}.svg": _SVG for code in ("1F44B", "1F431")}
    with tarfile.open(path, "w:gz") as archive:
        for name, text in (files | changes).items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_openmoji_package(tmp_path, capsys):
    assert resvg_py
    made = package(tmp_path / "openmoji.tgz")
    assert make_openmoji([str(made), str(tmp_path / "out"), "--side", "24"]) == 0
    hand, cat = read_pictures(tmp_path / "out")
    assert (hand.caption, hand.group, cat.group) == ("waving hand", "1F44B", "1F431")
    pixels = load_image(cat).pixels
    assert pixels.shape == (24, 24, 3)
    assert pixels[5, 3].tolist() == [0, 0, 0]
    assert pixels[5, 20].tolist() == [255, 255, 255]  # Drawn on white.
    assert "CC BY-SA 4.0" in (tmp_path / "out" / "LICENSE").read_text()
    assert "2 pictures to" in capsys.readouterr().out
    (tmp_path / "other.tgz").write_bytes(b"no archive")
    assert make_openmoji([str(tmp_path / "other.tgz"), str(tmp_path / "out")]) == 2
    assert "is no package of openmoji" in capsys.readouterr().err
