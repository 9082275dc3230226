"""Images through the engine: the same tokens as the model alone, prefixes kept by content."""

import base64
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import mmjax
from mmjax import Engine, ImagePrompt, RequestError, SamplingParams, cli
from mmjax.engine.images import Features
from mmjax.model import ImageTokens
from mmjax.vision import Image, feature_index, image_tokens, pixel_values
from mmjax.vision.tiles import tile_count
from tests.mmjax.engines import byte_tokenizer
from tests.mmjax.programs import random_model
from tests.mmjax.serving import CHAT, post, serving

SIZES = {"max_slots": 2, "max_length": 512, "page_size": 16, "prefill_chunk": 16}
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def case(golden):
    with np.load(golden / "vl" / "tiny_two_images" / "golden.npz") as data:
        return dict(data)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_special_tokens(["<image>"])
    return tokenizer


@pytest.fixture(scope="module")
def model(golden, tokenizer):
    """Of the golden model's shape, but that bytes and <image> are among its tokens."""
    cfg = mmjax.ModelConfig.from_hf(golden / "vl" / "tiny_two_images")
    vision = dataclasses.replace(cfg.vision, image_token_id=258)
    assert tokenizer.backend.token_to_id("<image>") == 258
    changes = {"vocab_size": 259, "dtype": "float32", "param_dtype": "float32"}
    return random_model(dataclasses.replace(cfg, vision=vision, **changes))


@pytest.fixture(scope="module")
def images(case):
    return [Image.of(case[f"image{i}"]) for i in range(2)]


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return Engine(model, tokenizer, **SIZES)


@pytest.fixture(scope="module")
def expected(case, model, images):
    """Greedy continuation by whole forwards of the model."""
    cfg = model.cfg.vision
    tiles = np.concatenate([pixel_values(image, cfg) for image in images])
    first = tile_count(images[0].size, cfg)
    rows = [feature_index(images[0].size, cfg), feature_index(images[1].size, cfg, first)]
    ids = ours(case["input_ids"])
    index = np.full(len(ids) + 6, -1, np.int32)
    index[: len(ids)][np.array(ids) == cfg.image_token_id] = np.concatenate(rows)
    features = jax.jit(model.vision.features)(jnp.asarray(tiles))[None]
    images = ImageTokens(features, jnp.asarray(index)[None])
    run = jax.jit(lambda t, i: model(t, images=i).logits)
    padded = np.zeros((1, len(index)), np.int32)
    for _ in range(6):
        padded[0, : len(ids)] = ids
        logits = run(jnp.asarray(padded), images)
        ids.append(int(jnp.argmax(logits[0, len(ids) - 1])))
    return ids[-6:]


def ours(ids):
    """The golden prompt with this model's image token."""
    return np.where(ids == 125, 258, ids).reshape(-1).tolist()


def unexpanded(case):
    return ours(case["unexpanded_input_ids"])


def test_two_images_of_a_prompt(case, engine, images, expected):
    (done,) = engine.generate([ImagePrompt(unexpanded(case), images)], GREEDY)
    assert done.token_ids == expected
    assert done.prompt_tokens == case["input_ids"].size


def test_prefixes_are_kept_by_content(case, model, engine, images, expected, monkeypatch):
    prompt = ImagePrompt(unexpanded(case), images)
    engine.generate([prompt], GREEDY)
    computed = []
    chunk = Features._compute
    monkeypatch.setattr(Features, "_compute", lambda *a: (computed.append(a), chunk(*a))[1])
    (again,) = engine.generate([prompt], GREEDY)
    assert again.cached_tokens > 100
    assert again.token_ids == expected
    assert not computed  # Nor is the tower run again.
    other = Image.of(255 - images[0].pixels)
    changed = ImagePrompt(unexpanded(case), [other, images[1]])
    (done,) = engine.generate([changed], GREEDY)
    before = unexpanded(case).index(258)
    assert done.cached_tokens <= before
    (fresh,) = Engine(model, **SIZES, num_prefixes=0).generate([changed], GREEDY)
    assert done.token_ids == fresh.token_ids


def test_swapped_images_are_another_prompt(case, engine, images):
    whole = engine.generate([ImagePrompt(unexpanded(case), images)], GREEDY)
    ids = unexpanded(case)
    (turned,) = engine.generate([ImagePrompt(ids, images[::-1])], GREEDY)
    assert turned.prompt_tokens == whole[0].prompt_tokens
    assert turned.cached_tokens <= ids.index(engine.cfg.vision.image_token_id)


def test_text_alone_and_images_side_by_side(case, engine, images, expected):
    text = [3, 5, 8, 13]
    alone = engine.generate([text], GREEDY)
    both = engine.generate([text, ImagePrompt(unexpanded(case), images)], GREEDY)
    assert both[0].token_ids == alone[0].token_ids
    assert both[1].token_ids == expected


def test_features_are_forgotten_with_the_weights(case, model, engine, images, expected):
    prompt = ImagePrompt(unexpanded(case), images)
    engine.generate([prompt], GREEDY)
    engine.update(model)
    assert not engine._features._kept
    (done,) = engine.generate([prompt], GREEDY)
    assert done.token_ids == expected
    assert done.cached_tokens == 0


def test_what_cannot_be_run_is_told(case, engine, images):
    with pytest.raises(RequestError, match=r"has 2 image tokens .* and 1 images"):
        engine.add(ImagePrompt(unexpanded(case), images[:1]))
    with pytest.raises(RequestError, match=r"has 1 image tokens .* and 0 images"):
        engine.add([engine.cfg.vision.image_token_id])
    many = [engine.cfg.vision.image_token_id] * 9
    with pytest.raises(RequestError, match="exceed the engine's 512 tokens"):
        engine.add(ImagePrompt(many, [images[0]] * 9))


def test_a_model_of_text_takes_no_images(golden, images):
    engine = Engine(mmjax.load(golden / "text" / "pattern010"), max_slots=1, max_length=64)
    with pytest.raises(RequestError, match="has no vision half"):
        engine.add(ImagePrompt([1, 2], images))


# The command line ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vl") / "model"
    mmjax.save(model, folder)
    tokenizer.save(folder)
    return folder


def test_generate_with_pictures(folder, tmp_path, capsys):
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        PIL.Image.new("RGB", (50, 30), colour).save(tmp_path / f"{name}.png")
    red, blue = str(tmp_path / "red.png"), str(tmp_path / "blue.png")
    argv = ["generate", str(folder), "--prompt", "which?", "--max-tokens", "3"]
    assert cli.main([*argv, "--image", red, "--image", blue]) == 0
    assert "which?" in capsys.readouterr().out
    assert cli.main([*argv, "--image", str(tmp_path / "green.png")]) == 2
    assert "green.png is broken" in capsys.readouterr().err
    assert cli.main([*argv, "--prompt", "and?", "--image", red]) == 2
    assert "--image goes with one --prompt" in capsys.readouterr().err


def test_images_over_http(engine):
    stream = io.BytesIO()
    PIL.Image.new("RGB", (28, 28), (0, 200, 0)).save(stream, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url}}
    asked = {"type": "text", "text": "which?"}
    body = {"model": "tiny", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    with serving(engine, vision=engine.cfg.vision) as address:
        counts = []
        for content in ([asked], [asked, picture], [picture, asked, picture]):
            messages = [{"role": "user", "content": content}]
            status, _, answer = post(address, CHAT, body | {"messages": messages})
            assert status == 200, answer
            counts.append(answer["usage"]["prompt_tokens"])
        told = [{"role": "user", "content": "<image>"}]
        status, _, answer = post(address, CHAT, body | {"messages": told})
    each = image_tokens((28, 28), engine.cfg.vision)
    assert counts == [counts[0] + n * each for n in range(3)]
    assert status == 400
    assert "has 1 image tokens" in answer["error"]["message"]


def test_image_tokens_are_counted(images, model):
    assert [image_tokens(i.size, model.cfg.vision) for i in images] == [152, 76]
