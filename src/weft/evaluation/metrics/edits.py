"""A generated picture against the one it should be, pixel by pixel. All in RGB, at the target's size.

l1, l2   mean absolute and mean squared difference of values in 0..1, as MagicBrush (arXiv:2306.10012) has them:
         l2 has no root; a generated picture of another size is resized by Pillow's bicubic filter first
psnr     10 log10(255^2 / mean squared difference), in decibels, of each picture; infinite for equal ones
ssim     Wang et al. 2004: mean over all places where a window fits, K1 = 0.01, K2 = 0.03, nothing scaled down first
lpips    a learned distance, see `weft.scorers`, at the target's size, colours in -1..1

Papers mean several things by PSNR and SSIM, and seldom say which. The range is 255 in all of these, never the range of
the values that happen to occur, so that pictures of one set compare.

    rgb        all three channels: one error of them all (PSNR), the mean of three likenesses (SSIM)
    grey       luma of 0.299, 0.587, 0.114, rounded to whole numbers, as the SSIM paper's code
    y          the Y of BT.601's YCbCr, 16..235, not rounded, as papers on super-resolution
    gaussian   11 x 11, deviation 1.5, population variances: the SSIM paper
    uniform    7 x 7, all alike, sample variances: scikit-image unless told otherwise
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.errors import UsageError
from weft.evaluation.metrics.pictures import to_pixels
from weft.evaluation.metrics.scores import Scores, mean_of, same_length
from weft.scorers import LPIPS

if TYPE_CHECKING:
    from PIL import Image as PILImage

Pictures = Sequence["PILImage.Image"]
Channels = Literal["rgb", "grey", "y"]
Window = Literal["gaussian", "uniform"]

PEAK = 255.0
WINDOW, DEVIATION = 11, 1.5
EVEN_WINDOW = 7
K1, K2 = 0.01, 0.03
LEAST_FOR_LPIPS = 32
"""Pixels of a side, below which its networks run out of picture."""


def l1(generated: Pictures, targets: Pictures) -> Scores:
    return mean_of([(a - b).abs().mean().item() / PEAK for a, b in _pairs(generated, targets)])


def l2(generated: Pictures, targets: Pictures) -> Scores:
    return mean_of([(a - b).square().mean().item() / PEAK**2 for a, b in _pairs(generated, targets)])


def psnr(generated: Pictures, targets: Pictures, *, channels: Channels) -> Scores:
    seen = CHANNELS[channels]
    errors = ((seen(a) - seen(b)).square().mean().item() for a, b in _pairs(generated, targets))
    return mean_of([10 * math.log10(PEAK**2 / error) if error else math.inf for error in errors])


def ssim(generated: Pictures, targets: Pictures, *, channels: Channels, window: Window) -> Scores:
    """
    Raises:
        UsageError: a target is smaller than the window.
    """
    line, share = WINDOWS[window]()
    values = []
    for a, b in _pairs(generated, targets):
        if min(a.shape[1:]) < len(line):
            raise UsageError(f"a picture of {a.shape[2]} x {a.shape[1]} is smaller than the window", where="SSIM")
        values.append(_likeness(CHANNELS[channels](a), CHANNELS[channels](b), line, share))
    return mean_of(values)


def _gaussian() -> tuple[Tensor, float]:
    at = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    line = (-at.square() / (2 * DEVIATION**2)).exp()
    return line / line.sum(), 1.0


def _uniform() -> tuple[Tensor, float]:
    n = EVEN_WINDOW**2
    return torch.full((EVEN_WINDOW,), 1 / EVEN_WINDOW, dtype=torch.float64), n / (n - 1)


def _likeness(a: Tensor, b: Tensor, line: Tensor, share: float) -> float:
    """
    Args:
        a, b: (C, rows, cols) float64.
        line: the window is its product with itself.
        share: what variances are multiplied by.
    """

    def blur(x: Tensor) -> Tensor:
        across = F.conv2d(x[:, None], line.view(1, 1, 1, -1))
        return F.conv2d(across, line.view(1, 1, -1, 1))[:, 0]

    mean_a, mean_b = blur(a), blur(b)
    variances = share * (blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2)
    covariance = share * (blur(a * b) - mean_a * mean_b)
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).mean().item()


def lpips(generated: Pictures, targets: Pictures, model: LPIPS) -> Scores:
    """
    Raises:
        UsageError: a target is too small for the network.
    """
    values = []
    for a, b in _pairs(generated, targets):
        if min(a.shape[1:]) < LEAST_FOR_LPIPS:
            raise UsageError(
                f"a picture of {a.shape[2]} x {a.shape[1]} has a side below {LEAST_FOR_LPIPS}", where="LPIPS"
            )
        described = model.describe(torch.stack((a, b)).float() / (PEAK / 2) - 1)
        values.append(model.distances(described)[0, 1].item())
    return mean_of(values)


def _pairs(generated: Pictures, targets: Pictures) -> Iterator[tuple[Tensor, Tensor]]:
    """(3, rows, cols) float64, 0..255, of each pair."""
    from PIL import Image as PILImage

    same_length("edits", generated=generated, targets=targets)
    for ours, target in zip(generated, targets, strict=True):
        sized = ours.convert("RGB").resize(target.size, PILImage.Resampling.BICUBIC)
        yield to_pixels(sized).double(), to_pixels(target).double()


def _rgb(pixels: Tensor) -> Tensor:
    return pixels


def _luma(pixels: Tensor) -> Tensor:
    weights = torch.tensor((0.299, 0.587, 0.114), dtype=pixels.dtype)
    return torch.einsum("chw,c->hw", pixels, weights).round()[None]


def _bt_601(pixels: Tensor) -> Tensor:
    weights = torch.tensor((65.481, 128.553, 24.966), dtype=pixels.dtype) / PEAK
    return 16 + torch.einsum("chw,c->hw", pixels, weights)[None]


CHANNELS: Mapping[str, Callable[[Tensor], Tensor]] = {"rgb": _rgb, "grey": _luma, "y": _bt_601}
"""(3, rows, cols) of 0..255 -> (C, rows, cols)."""
WINDOWS: Mapping[str, Callable[[], tuple[Tensor, float]]] = {"gaussian": _gaussian, "uniform": _uniform}
"""A window's side, and what variances are multiplied by."""
