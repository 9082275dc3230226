"""Images to tokens and features, against the golden outputs; and images that nobody should send."""

import dataclasses
import io
import json
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

import mmjax
from mmjax import HybridCache, ModelConfig
from mmjax.config import ConfigError
from mmjax.convert import convert
from mmjax.convert.params import by_name
from mmjax.model import ImageTokens
from mmjax.sharding import make_mesh
from mmjax.vision import (
    Image,
    ImageError,
    VisionConfig,
    expand_images,
    feature_index,
    image_tokens,
    pixel_values,
    read_image,
)
from mmjax.vision.config import pinpoints
from mmjax.vision.tiles import best_resolution, fit, tile_count, tile_grid, unpadded_grid
from tests.mmjax.programs import decode
from tests.mmjax.test_convert import assert_same_tensors, read_tensors

VL01 = VisionConfig()


@pytest.fixture(scope="module")
def case(golden):
    with np.load(golden / "vl" / "tiny_two_images" / "golden.npz") as data:
        return dict(data)


@pytest.fixture(scope="module")
def model(golden):
    return mmjax.load(golden / "vl" / "tiny_two_images")


@pytest.fixture(scope="module")
def images(case):
    return [Image.of(case[f"image{i}"]) for i in range(2)]


# Arithmetic ------------------------------------------------------------------------------------


def test_released_resolutions(golden):
    cases = json.loads((golden / "vl" / "anyres.json").read_text())
    assert [list(size) for size in VL01.resolutions] == cases["image_grid_pinpoints"]
    assert len(VL01.resolutions) == 28
    assert (2016, 2016) not in VL01.resolutions
    assert pinpoints(28)[1] == (28, 56)


def test_golden_arithmetic(golden):
    for case in json.loads((golden / "vl" / "anyres.json").read_text())["cases"]:
        size = case["height"], case["width"]
        where = fit(size, VL01)
        (high, wide), (height, width), (top, left) = where
        padding = [top, high - height - top, left, wide - width - left]
        assert list(best_resolution(size, VL01.resolutions)) == case["best_resolution"], size
        assert list(tile_grid(size, VL01)) == case["tile_grid"], size
        assert tile_count(size, VL01) == case["num_tiles_with_thumbnail"], size
        assert [height, width] == case["resized"], size
        assert padding == case["pad_top_bottom_left_right"], size
        assert list(map(len, unpadded_grid(size, VL01))) == case["unpadded_feature_grid"], size
        assert image_tokens(size, VL01) == case["num_image_tokens"], size


def test_index_holds_every_feature_that_is_not_padding():
    for size in [(336, 336), (480, 640), (2016, 1008), (100, 900), (1, 20000), (1, 1)]:
        index = feature_index(size, VL01, first_tile=3)
        assert len(index) == image_tokens(size, VL01)
        rows, columns = unpadded_grid(size, VL01)
        assert (index == 0).sum() == len(rows)
        seen = index[index > 0]
        assert len(set(seen.tolist())) == len(seen) == 576 + len(rows) * len(columns)
        assert seen.min() == 1 + 3 * 576
        assert seen.max() < 1 + (3 + tile_count(size, VL01)) * 576


def test_golden_pixels(case, images):
    cfg = ModelConfig.tiny(vision=tiny_vision()).vision
    values = np.concatenate([pixel_values(image, cfg) for image in images])
    np.testing.assert_array_equal(values.transpose(0, 3, 1, 2), case["pixel_values"])
    assert [tile_count(i.size, cfg) for i in images] == case["num_tiles"].tolist()
    assert [i.size for i in images] == list(map(tuple, case["image_sizes"].tolist()))


def tiny_vision(**changes):
    values = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "image_size": 28,
        "patch_size": 7,
        "image_token_id": 125,
    }
    return VisionConfig(**(values | changes))


def test_golden_expansion(case, images, model):
    ids, places = expand_images(case["unexpanded_input_ids"].reshape(-1), images, model.cfg.vision)
    np.testing.assert_array_equal(ids, case["input_ids"].reshape(-1))
    assert list(map(len, places)) == case["num_image_tokens"].reshape(-1).tolist()


def test_images_and_their_tokens_must_agree(images):
    cfg = tiny_vision()
    with pytest.raises(ImageError, match=r"has 1 image tokens \(id 125\) and 2 images"):
        expand_images([3, 125, 4], images, cfg)
    with pytest.raises(ImageError, match="has 3 image tokens"):
        expand_images([125, 125, 125], images, cfg)


# The model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_tokens_of(case, model, images):
    """What stands at the golden prompt's image tokens."""
    cfg = model.cfg.vision
    tiles = jnp.asarray(np.concatenate([pixel_values(image, cfg) for image in images]))
    features = jax.jit(model.vision.features)(tiles)
    first = tile_count(images[0].size, cfg)
    rows = np.concatenate(
        [feature_index(images[0].size, cfg), feature_index(images[1].size, cfg, first)]
    )
    ids = case["input_ids"].reshape(-1)
    index = np.full(len(ids), -1, np.int32)
    index[ids == cfg.image_token_id] = rows
    return ImageTokens(features[None], jnp.asarray(index)[None])


def test_golden_tower(case, model):
    tiles = jnp.asarray(case["pixel_values"].transpose(0, 2, 3, 1))
    hidden = jax.jit(model.vision.hidden)(tiles)
    np.testing.assert_allclose(hidden, case["vision_hidden"], atol=1e-5, rtol=0)


def test_golden_features(case, image_tokens_of):
    index = np.asarray(image_tokens_of.rows[0])
    packed = np.asarray(image_tokens_of.features[0])[index[index >= 0]]
    np.testing.assert_allclose(packed, case["image_features"], atol=1e-5, rtol=0)


def test_golden_logits(case, model, image_tokens_of):
    tokens = jnp.asarray(case["input_ids"].reshape(1, -1), jnp.int32)
    out = jax.jit(lambda t, i: model(t, images=i))(tokens, image_tokens_of)
    places = case["positions"].reshape(-1)
    shape = case["logits"].shape[-1]
    logits = np.asarray(out.logits)[0, places]
    np.testing.assert_allclose(logits, case["logits"].reshape(-1, shape), atol=1e-4, rtol=0)
    hidden = np.asarray(out.hidden)[0, places]
    wanted = case["final_hidden"].reshape(hidden.shape)
    np.testing.assert_allclose(hidden, wanted, atol=1e-4, rtol=0)


def test_golden_decode(case, model, image_tokens_of):
    tokens = jnp.asarray(case["input_ids"].reshape(1, -1), jnp.int32)
    count = int(case["prefill_len"])
    cache = HybridCache.create(model.cfg, 1, tokens.shape[1])
    images = ImageTokens(image_tokens_of.features, image_tokens_of.rows[:, :count])
    out = jax.jit(lambda t, c, i: model(t, cache=c, images=i))(tokens[:, :count], cache, images)
    logits, _ = decode(model, tokens[:, count:], out.cache)
    wanted = case["decode_logits"].reshape(logits.shape)
    np.testing.assert_allclose(logits, wanted, atol=1e-4, rtol=0)


# Configs and checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hf", "hf-native"])
def test_config_comes_back(golden, layout):
    cfg = ModelConfig.from_hf(golden / "vl" / "tiny_two_images")
    assert dataclasses.replace(cfg.vision, extra=()) == tiny_vision()
    back = ModelConfig.from_hf(json.loads(json.dumps(cfg.to_hf(layout))))
    assert dataclasses.replace(back.vision, extra=()) == tiny_vision()
    assert back.num_layers == cfg.num_layers


def test_released_config_comes_back_whole(golden):
    raw = json.loads((golden / "vl" / "tiny_two_images" / "config.json").read_text())
    written = ModelConfig.from_hf(raw).to_hf()
    assert {key: written[key] for key in raw if key != "text_config"} == {
        key: value for key, value in raw.items() if key != "text_config"
    }
    assert {k: written["text_config"][k] for k in raw["text_config"]} == raw["text_config"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -2}, r"vision_feature_layer=-2 \(only -1\)"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "vision_config.hidden_act='quick_gelu'"),
        ({"image_grid_pinpoints": [[336, 300]]}, r"resolution \(336, 300\) is no multiple"),
        ({"vision_config": {"patch_size": 13}}, "image_size 336 is no multiple of 13"),
        ({"vision_config": {"num_attention_heads": 0}}, "num_heads must be at least 1"),
    ],
)
def test_configs_that_cannot_be(golden, change, message):
    raw = {"vision_config": {}, "text_config": ModelConfig.tiny().to_hf()} | change
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize("layout", ["hf-native", "orbax"])
def test_vl_checkpoint_there_and_back(golden, tmp_path, layout):
    source = golden / "vl" / "tiny_two_images"
    convert(source, tmp_path / "there", layout)
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(source))
    assert (tmp_path / "back" / "preprocessor_config.json").exists()
    if layout == "hf-native":
        names = set(read_tensors(tmp_path / "there"))
        assert {"lm_head.weight", "model.image_newline", "model.language_model.norm.weight"} < names
        assert "model.vision_tower.encoder.layers.2.mlp.fc1.bias" in names


def test_vl_checkpoint_onto_a_mesh(golden, model):
    mesh = make_mesh({"data": 2, "model": 2}, jax.devices()[:4])
    loaded = by_name(nnx.state(mmjax.load(golden / "vl" / "tiny_two_images", mesh=mesh)))
    for name, variable in by_name(nnx.state(model)).items():
        np.testing.assert_array_equal(loaded[name].get_value(), variable.get_value())
    assert loaded["vision.patch"].get_value().sharding.is_fully_replicated
    assert not loaded["embed.embedding"].get_value().sharding.is_fully_replicated


# Images that nobody should send ----------------------------------------------------------------


def encoded(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def picture(mode="RGB", size=(7, 5)):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return PIL.Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_formats(kind):
    assert read_image(encoded(picture(), kind)).size == (5, 7)


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000)])
def test_extreme_shapes_are_fitted(size):
    image = read_image(encoded(PIL.Image.new("RGB", size, (255, 0, 0))))
    tiles = pixel_values(image, VL01)
    assert tiles.shape == (tile_count(image.size, VL01), 336, 336, 3)
    assert np.isfinite(tiles).all()
    assert len(feature_index(image.size, VL01)) == image_tokens(image.size, VL01) >= 576


@pytest.mark.parametrize("mode", ["CMYK", "L", "YCbCr"])
def test_colour_spaces_of_jpeg(mode):
    grey = PIL.Image.new("RGB", (16, 16), (200, 30, 60)).convert(mode)
    image = read_image(encoded(grey, "JPEG", quality=95))
    expected = np.asarray(grey.convert("RGB"))
    assert np.abs(image.pixels.astype(int) - expected).max() < 12


@pytest.mark.parametrize("mode", ["P", "1", "LA", "RGBA"])
def test_modes_of_png(mode):
    made = picture(mode)
    expected = np.asarray(made.convert("RGB"))
    np.testing.assert_array_equal(read_image(encoded(made)).pixels, expected)


def test_palette_with_transparency():
    made = picture("P")
    image = read_image(encoded(made, transparency=bytes(range(256))))
    np.testing.assert_array_equal(image.pixels, np.asarray(made.convert("RGB")))


def test_sixteen_bits_of_grey():
    deep = PIL.Image.fromarray(np.array([[0, 256, 65535]], np.uint16))
    assert read_image(encoded(deep)).pixels[0, :, 0].tolist() == [0, 1, 255]


def test_first_frame_of_an_animation():
    frames = [PIL.Image.new("RGB", (4, 4), c) for c in [(255, 0, 0), (0, 255, 0)]]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(data).pixels[0, 0].tolist() == [255, 0, 0]


def test_exif_turns_the_picture_upright():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    lying = picture(size=(9, 4))
    image = read_image(encoded(lying, "PNG", exif=exif))
    expected = np.asarray(lying.transpose(PIL.Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(image.pixels, expected)


@pytest.mark.parametrize("keep", [0, 4, 30, 60])
def test_broken_files(keep):
    with pytest.raises(ImageError, match=r"the image is (broken|in no known format)"):
        read_image(encoded(picture(size=(40, 40)))[:keep])


def test_other_formats_are_not_even_tried():
    with pytest.raises(ImageError, match="in no known format; known: PNG, JPEG"):
        read_image(encoded(picture(), "TIFF"))


def bomb(width, height):
    """A PNG of a few bytes that says that it is enormous."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("side", [7000, 12000, 60000])
def test_decompression_bombs_are_not_decoded(side):
    with pytest.raises(ImageError, match=r"(x \d+ pixels, at most|more pixels than the) 40000000"):
        read_image(bomb(side, side))


def test_pixels_must_be_pixels():
    for wrong in (np.zeros((2, 2), np.uint8), np.zeros((2, 2, 3)), np.zeros((0, 2, 3), np.uint8)):
        with pytest.raises(ImageError, match="an image is an array"):
            Image.of(wrong)


def test_files_and_digests(tmp_path):
    data = encoded(picture())
    (tmp_path / "a.png").write_bytes(data)
    first, second = read_image(tmp_path / "a.png"), read_image(data)
    assert first.digest == second.digest
    assert Image.of(first.pixels[:, ::-1]).digest != first.digest
    assert Image.of(first.pixels.reshape(7, 5, 3)).digest != first.digest
    with pytest.raises(ImageError, match=r"b\.png is broken: .*No such file"):
        read_image(tmp_path / "b.png")
