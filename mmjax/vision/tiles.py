"""Images to tiles, and tiles' features to tokens: the arithmetic of MiniMax-VL-01's processor.

An image is fitted into one of the config's resolutions without changing its shape, padded to it
with black and cut into tiles; the whole image, squeezed into one tile, comes first. The tower makes
a grid of features of each tile. Those of the padding are left out; a newline follows each row.

Sizes are (height, width). Source: the released processor; transformers' port of minimax_vl_01.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmjax.vision.config import VisionConfig
from mmjax.vision.images import Image, ImageError

if TYPE_CHECKING:
    import PIL.Image

# CLIP's.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC

type Size = tuple[int, int]


class Fit(NamedTuple):
    """How an image lies in a resolution: its size there and the padding above and to the left."""

    resolution: Size
    resized: Size
    offset: Size


def best_resolution(size: Size, resolutions: Sequence[Size]) -> Size:
    """The resolution that keeps most of the image's pixels, and of those the one that wastes least.

    Of equal ones the first.
    """
    height, width = size

    def rank(resolution: Size) -> tuple[int, int]:
        high, wide = resolution
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -(wide * high - kept)

    return max(resolutions, key=rank)


def fit(size: Size, cfg: VisionConfig) -> Fit:
    """Where an image of this size lies in its best resolution."""
    height, width = size
    resolution = best_resolution(size, cfg.resolutions)
    high, wide = resolution
    # A line of pixels stays one, where the original would make it none and fail.
    if width / height > wide / high:
        resized = max(int(wide * height / width), 1), wide
    else:
        resized = high, max(int(high * width / height), 1)
    return Fit(resolution, resized, ((high - resized[0]) // 2, (wide - resized[1]) // 2))


def tile_grid(size: Size, cfg: VisionConfig) -> Size:
    """Tiles down and across, the thumbnail not counted."""
    high, wide = best_resolution(size, cfg.resolutions)
    return high // cfg.image_size, wide // cfg.image_size


def tile_count(size: Size, cfg: VisionConfig) -> int:
    """Tiles of an image with the thumbnail."""
    down, across = tile_grid(size, cfg)
    return 1 + down * across


def unpadded_grid(size: Size, cfg: VisionConfig) -> tuple[range, range]:
    """Rows and columns of the image's grid of features that are not of padding."""
    down, across = tile_grid(size, cfg)
    rows, columns = down * cfg.grid, across * cfg.grid
    height, width = size
    if width / height > columns / rows:
        pad = (rows - height * columns // width) // 2
        return range(pad, rows - pad), range(columns)
    pad = (columns - width * rows // height) // 2
    return range(rows), range(pad, columns - pad)


def image_tokens(size: Size, cfg: VisionConfig) -> int:
    """Tokens that an image of this size takes."""
    rows, columns = unpadded_grid(size, cfg)
    return cfg.patches + len(rows) * (len(columns) + 1)


def feature_index(size: Size, cfg: VisionConfig, first_tile: int = 0) -> np.ndarray:
    """The row of `Vision.features` behind each token of an image, [tokens] int32.

    The thumbnail's features first; then the rows of the grid over all tiles, each with a newline,
    which is row 0.

    Args:
      size: Of the image.
      cfg: Of the model.
      first_tile: The image's thumbnail among the tiles.
    """
    rows, columns = unpadded_grid(size, cfg)
    _, across = tile_grid(size, cfg)
    row, column = np.meshgrid(rows, columns, indexing="ij")
    tile = 1 + (row // cfg.grid) * across + column // cfg.grid
    patch = (row % cfg.grid) * cfg.grid + column % cfg.grid
    grid = 1 + (first_tile + tile) * cfg.patches + patch
    newline = np.zeros((len(rows), 1), grid.dtype)
    thumbnail = 1 + first_tile * cfg.patches + np.arange(cfg.patches)
    lines = np.concatenate([grid, newline], axis=1).reshape(-1)
    return np.concatenate([thumbnail, lines]).astype(np.int32)


def tiles(image: Image, cfg: VisionConfig) -> np.ndarray:
    """The thumbnail and the tiles row by row, [tiles, S, S, 3] uint8."""
    import PIL.Image

    side = cfg.image_size
    picture = PIL.Image.fromarray(image.pixels)
    thumbnail = np.asarray(_resized(picture, (side, side)))[None]
    where = fit(image.size, cfg)
    canvas = np.zeros((*where.resolution, 3), np.uint8)
    (top, left), (height, width) = where.offset, where.resized
    canvas[top : top + height, left : left + width] = np.asarray(_resized(picture, where.resized))
    down, across = tile_grid(image.size, cfg)
    cut = canvas.reshape(down, side, across, side, 3).swapaxes(1, 2)
    return np.concatenate([thumbnail, cut.reshape(-1, side, side, 3)])


def _resized(picture: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    return picture.resize(size[::-1], _BICUBIC)


def normalise(tiles: np.ndarray) -> np.ndarray:
    """uint8 tiles as the tower takes them: (x / 255 - mean) / std in float32."""
    return (tiles.astype(np.float32) / np.float32(255) - MEAN) / STD


def pixel_values(image: Image, cfg: VisionConfig) -> np.ndarray:
    """An image as the tower takes it, [tiles, S, S, 3] float32."""
    return normalise(tiles(image, cfg))


def expand_images(
    ids: Sequence[int] | np.ndarray, images: Sequence[Image], cfg: VisionConfig
) -> tuple[np.ndarray, list[range]]:
    """Repeats each image token as often as its image has features.

    Args:
      ids: Token ids with one image token for each image.
      images: In the order of their tokens.
      cfg: Of the model.

    Returns:
      The ids [T] int32, and the places of each image's tokens.

    Raises:
      ImageError: there are more or fewer image tokens than images.
    """
    found = [i for i, token in enumerate(ids) if token == cfg.image_token_id]
    if len(found) != len(images):
        raise ImageError(
            f"the prompt has {len(found)} image tokens (id {cfg.image_token_id}) and "
            f"{len(images)} images; it needs one token for each"
        )
    parts: list[np.ndarray] = []
    places: list[range] = []
    start = length = 0
    for at, image in zip(found, images, strict=True):
        count = image_tokens(image.size, cfg)
        parts += [np.asarray(ids[start:at]), np.full(count, cfg.image_token_id)]
        length += at - start
        places.append(range(length, length + count))
        start, length = at + 1, length + count
    return np.concatenate([*parts, np.asarray(ids[start:])]).astype(np.int32), places
