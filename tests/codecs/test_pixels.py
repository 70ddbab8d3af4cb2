import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from weft.codecs.pixels import to_picture, to_values

VALUES = np.arange(2 * 128 * 3, dtype=np.uint8).reshape(2, 128, 3)


# [0, 255], [0, 1] and [-1, 1], which is how the models scale them
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (255, 0), (127.5, -1)])
def test_eight_bit_values_survive_the_way_to_pixels_and_back(scale, shift):
    values = to_values(PILImage.fromarray(VALUES))
    assert values.shape == (3, 2, 128) and values.dtype == torch.float32
    pixels = values / scale + shift
    assert np.array_equal(np.asarray(to_picture((pixels - shift) * scale)), VALUES)


def test_values_are_rounded_and_clipped():
    values = torch.tensor([-3.0, 0.4, 0.6, 254.6, 255.4, 300.0])
    assert np.asarray(to_picture(values.expand(3, 1, 6)))[0, :, 0].tolist() == [0, 0, 1, 255, 255, 255]
