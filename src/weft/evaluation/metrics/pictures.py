"""How metrics bring pictures to a size, and to tensors. What each wants is part of its definition."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image as PILImage


def to_pixels(picture: "PILImage.Image") -> Tensor:
    """(3, rows, cols) float32, 0..255."""
    rgb = picture.convert("RGB")
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1).float()


def shorter_side_to(picture: "PILImage.Image", side: int) -> "PILImage.Image":
    """Bicubic; the longer side keeps the proportion, rounded down."""
    from PIL import Image as PILImage

    width, height = picture.size
    shorter = min(width, height)
    size = (side * width // shorter, side * height // shorter)
    return picture.resize(size, PILImage.Resampling.BICUBIC)


def centre_crop(picture: "PILImage.Image", side: int) -> "PILImage.Image":
    """A square of a picture that is at least as large."""
    left, top = round((picture.width - side) / 2), round((picture.height - side) / 2)
    return picture.crop((left, top, left + side, top + side))
