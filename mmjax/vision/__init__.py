"""Images in: decoding, tiles, the vision tower, and the tokens that stand for them."""

from mmjax.vision.config import VisionConfig
from mmjax.vision.images import Image, ImageError, read_image
from mmjax.vision.tiles import expand_images, feature_index, image_tokens, pixel_values

__all__ = [
    "Image",
    "ImageError",
    "VisionConfig",
    "expand_images",
    "feature_index",
    "image_tokens",
    "pixel_values",
    "read_image",
]
