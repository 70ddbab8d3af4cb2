"""RGB pictures <-> tensors of their 8-bit values. How a model scales them is known by each model."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image as PILImage


def fit(picture: "PILImage.Image", side: int) -> "PILImage.Image":
    """The middle square of a picture, `side` pixels wide.

    Halved by boxes while it is twice as large, then bicubic, as MM-Interleaved's makers do it.
    """
    from PIL import Image as PILImage

    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), PILImage.Resampling.BOX)
    scale = side / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), PILImage.Resampling.BICUBIC)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def to_values(picture: "PILImage.Image") -> Tensor:
    """RGB picture -> (3, rows, cols) float32 in [0, 255]."""
    import numpy as np

    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float()


def to_picture(values: Tensor) -> "PILImage.Image":
    """(3, rows, cols), rounded and clipped to [0, 255] -> RGB picture."""
    from PIL import Image as PILImage

    eight_bit = values.round().clamp(0, 255).to(torch.uint8)
    return PILImage.fromarray(eight_bit.permute(1, 2, 0).cpu().numpy())
