"""Image files to pixels, whatever their format and whoever sent them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import PIL.Image

# What is decoded; Pillow knows dozens of formats more, of which nobody needs to trust the decoders.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# 40 megapixels take 120 MB; the model sees at most 2 of them.
MAX_PIXELS = 40_000_000


class ImageError(ValueError):
    """An image that cannot be used; the message says what is wrong with it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """Pixels [h, w, 3] uint8, and the digest by which equal images know each other."""

    pixels: np.ndarray
    digest: bytes

    @classmethod
    def of(cls, pixels: np.ndarray) -> Image:
        """An image of these pixels.

        Raises:
          ImageError: they are not [h, w, 3] uint8, or there are none.
        """
        shape = pixels.shape
        if pixels.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or not pixels.size:
            told = f"got {list(shape)} {pixels.dtype}"
            raise ImageError(f"an image is an array [height, width, 3] of uint8, {told}")
        pixels = np.ascontiguousarray(pixels)
        hashed = hashlib.blake2b(f"{shape[0]}x{shape[1]} ".encode(), digest_size=16)
        hashed.update(pixels)
        return cls(pixels, hashed.digest())

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


def read_image(source: bytes | str | Path, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Decodes an image as RGB: the first frame of an animation, upright, without its alpha.

    Transparent pixels keep the colour that the file gives them, as MiniMax's processor has it.

    Args:
      source: A file, or its bytes: PNG, JPEG, WebP, GIF or BMP.
      max_pixels: Larger images are refused before they are decoded.

    Raises:
      ImageError: it is no such image, broken, or too large.
    """
    import PIL.Image  # late, here and elsewhere: text needs no Pillow
    from PIL import ImageOps

    what = "the image" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with warnings.catch_warnings():
            # The limit is ours; other warnings are about metadata that is not read.
            warnings.simplefilter("ignore")
            with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > max_pixels:
                    raise ImageError(
                        f"{what} has {width} x {height} pixels, at most {max_pixels} are taken"
                    )
                return Image.of(np.asarray(_rgb(ImageOps.exif_transpose(opened))))
    except PIL.UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise ImageError(f"{what} is in no known format; known: {known}") from None
    except PIL.Image.DecompressionBombError:
        raise ImageError(f"{what} has more pixels than the {max_pixels} that are taken") from None
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, MemoryError) as error:
        raise ImageError(f"{what} is broken: {error}") from None


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    import PIL.Image

    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255
        grey = np.asarray(image).astype(np.int64) >> 8
        image = PIL.Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
