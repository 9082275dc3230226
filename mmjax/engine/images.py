"""Images of prompts: what stands at their tokens, computed when a chunk first needs it."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from mmjax.model import ImageTokens
from mmjax.vision import Image, VisionConfig, feature_index, pixel_values

# Tiles that the tower takes at a time, and images whose features are kept for other requests.
TILES, KEPT = 4, 16


@dataclasses.dataclass(frozen=True)
class ImagePrompt:
    """A prompt with an image token for each of its images, and the images in their order."""

    prompt: str | Sequence[int]
    images: Sequence[Image]


class Features:
    """Features of images by their digests, the least lately used forgotten first.

    Args:
      cfg: Of the vision half.
      run: `Vision.features` of TILES tiles.
    """

    def __init__(self, cfg: VisionConfig, run: Callable[[np.ndarray], np.ndarray]) -> None:
        self._cfg, self._run = cfg, run
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def clear(self) -> None:
        """Forgets all, since the weights are others."""
        self._kept.clear()

    def of(self, image: Image) -> np.ndarray:
        """What stands at each of the image's tokens, [tokens, D]."""
        if image.digest not in self._kept:
            self._kept[image.digest] = self._compute(image)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(image.digest)
        return self._kept[image.digest]

    def warm_up(self) -> None:
        """Compiles the tower."""
        side = self._cfg.image_size
        self._run(np.zeros((TILES, side, side, 3), np.float32))

    def chunk(
        self, images: Sequence[tuple[range, Image]], start: int, end: int, size: int
    ) -> ImageTokens | None:
        """The image tokens of places `start` to `end`, padded to `size`; None without any."""
        here = [
            (max(places.start, start), min(places.stop, end), places.start, image)
            for places, image in images
        ]
        here = [one for one in here if one[0] < one[1]]
        if not here:
            return None
        first = self.of(here[0][3])
        features = np.zeros((1, size, first.shape[1]), first.dtype)
        index = np.full((1, size), -1, np.int32)
        for begin, stop, origin, image in here:
            there = slice(begin - start, stop - start)
            features[0, there] = self.of(image)[begin - origin : stop - origin]
            index[0, there] = np.arange(size)[there]
        return ImageTokens(features, index)  # type: ignore[arg-type]

    def _compute(self, image: Image) -> np.ndarray:
        tiles = pixel_values(image, self._cfg)
        tiles = np.pad(tiles, ((0, -len(tiles) % TILES), (0, 0), (0, 0), (0, 0)))
        runs = [self._run(tiles[i : i + TILES]) for i in range(0, len(tiles), TILES)]
        table = np.concatenate([runs[0][:1], *(rows[1:] for rows in runs)])
        return table[feature_index(image.size, self._cfg)]
