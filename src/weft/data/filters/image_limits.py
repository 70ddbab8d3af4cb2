"""Pictures that cannot be decoded, or that are too small, too large, too narrow, blank or of an unwanted format."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from weft.config import Config
from weft.data.filters.removal import Costs, Problem, without
from weft.data.stage import Stage
from weft.errors import ImageError
from weft.images import MAX_PIXELS, decode_image, media_type

if TYPE_CHECKING:
    from PIL import Image as PILImage

Format = Literal["png", "jpeg", "webp", "gif", "bmp"]


class ImageLimits(Config):
    """Decodes every picture, and looks at what came out."""

    kind: Literal["image_limits"] = "image_limits"
    on_bad_image: Costs = "image"
    min_side: PositiveInt = 64
    max_side: PositiveInt = 16_384
    max_pixels: PositiveInt = MAX_PIXELS
    max_aspect: float = Field(3.0, ge=1)
    """The longer side by the shorter one."""
    formats: tuple[Format, ...] = ("png", "jpeg", "webp", "gif", "bmp")
    min_range: int = Field(1, ge=0, le=256)
    """A picture is blank if no channel's largest and smallest value are so far apart."""


def build(config: ImageLimits) -> Stage:
    return lambda document: without(document, lambda image, _: _problem(image.data or b"", config), config.on_bad_image)


def _problem(data: bytes, config: ImageLimits) -> Problem | None:
    try:
        picture = decode_image(data, max_pixels=config.max_pixels)
    except ImageError as error:
        return Problem(error.reason, error.what)
    kind = media_type(data).removeprefix("image/")
    if kind not in config.formats:
        return Problem("image_format", f"{kind}, none of {', '.join(config.formats)}")
    return _shape(picture, config) or _blank(picture, config)


def _shape(picture: "PILImage.Image", config: ImageLimits) -> Problem | None:
    short, long = sorted(picture.size)
    size = f"{picture.size[0]} x {picture.size[1]} pixels"
    if short < config.min_side:
        return Problem("image_too_small", f"{size}, a side of less than {config.min_side}", short, config.min_side)
    if long > config.max_side:
        return Problem("image_too_large", f"{size}, a side of more than {config.max_side}", long, config.max_side)
    if long > config.max_aspect * short:
        message = f"{size}, sides of {long / short:.2f} to 1, more than {config.max_aspect:g}"
        return Problem("image_aspect", message, long / short, config.max_aspect)
    return None


def _blank(picture: "PILImage.Image", config: ImageLimits) -> Problem | None:
    ranges = [high - low for low, high in picture.getextrema()]  # type: ignore[misc]
    if max(ranges) < config.min_range:
        message = f"channels range over {max(ranges)} values, less than {config.min_range}"
        return Problem("image_blank", message, max(ranges), config.min_range)
    return None
