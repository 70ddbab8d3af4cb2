"""Frechet and kernel distances between two sets of pictures, by the features that a network has of them.

    FID = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))      Heusel et al. 2017, arXiv:1706.08500
    KID = unbiased squared MMD with kernel (x.y / D + 1)^3  Binkowski et al. 2018, arXiv:1801.01401

How a picture gets to the network's 299 x 299 changes the number as much as a better model does, so every variant has a
name, statistics carry it, and distances between two variants are refused. All use the network of `inception.py`.

    pytorch-fid        bilinear, without antialiasing, pixel centres at one half; 2x - 1
    clean              bicubic with antialiasing, channel by channel in float, clipped but not rounded; (x - 128) / 128
    clean-legacy-tf    TensorFlow 1's bilinear: no antialiasing, pixel centres at zero; (x - 128) / 128
    torchmetrics-1.9   bilinear with antialiasing; (x - 128) / 128. Its antialias=False is clean-legacy-tf
    64                 shorter side to 64, bicubic, the 64 x 64 in the middle, rounded; then pytorch-fid. So does the
                       released code of MM-Interleaved; its numbers compare with no others

With no more pictures than features the covariance is singular and the distance biased upwards: results tell n.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.errors import UsageError
from weft.evaluation.metrics.pictures import centre_crop, shorter_side_to, to_pixels
from weft.evaluation.metrics.scores import Scores, mean_of

if TYPE_CHECKING:
    from PIL import Image as PILImage

SIDE = 299
SMALL = 64
ROWS_AT_ONCE = 4096
"""In float64 at a time, so that features themselves may stay in float32."""
IMAGINARY = 1e-3
"""What a root may have of it by rounding."""

Root = Literal["symmetric", "product"]


@dataclass(frozen=True)
class Statistics:
    """What a distance needs to know of a set of pictures."""

    mean: Tensor
    """(D,) float64."""
    covariance: Tensor
    """(D, D) float64, divided by n - 1."""
    n: int
    variant: str
    """How the pictures reached the network."""

    @property
    def is_singular(self) -> bool:
        """Too few pictures for a covariance of full rank."""
        return self.n <= len(self.mean)


def statistics(features: Tensor, *, variant: str) -> Statistics:
    """Mean and covariance, in float64.

    Args:
        features: (n, D).
        variant: a row of `PREPARATIONS`, or another name for what made these features.

    Raises:
        UsageError: fewer than two rows, or a number that is not finite.
    """
    _check(features, "statistics")
    mean = features.mean(0, dtype=torch.float64)
    total = mean.new_zeros(len(mean), len(mean))
    for rows in features.split(ROWS_AT_ONCE):
        centred = rows.double() - mean
        total.addmm_(centred.T, centred)
    return Statistics(mean, total / (len(features) - 1), len(features), variant)


def frechet_distance(a: Statistics, b: Statistics, *, root: Root = "symmetric") -> float:
    """FID, unclamped: rounding may leave a tiny negative number where both sets are the same.

    Args:
        root: how the trace of the root is found. "product": eigenvalues of S1 S2, the definition; "symmetric":
            those of L^T S2 L with S1 = L L^T, which are the same and many times faster to find.

    Raises:
        UsageError: other features or another variant, or a covariance that is none.
    """
    if a.variant != b.variant or a.mean.shape != b.mean.shape:
        told = " and ".join(f"{len(each.mean)} features of {each.variant}" for each in (a, b))
        raise UsageError(f"statistics do not compare: {told}", where="FID", fix="compute both in one variant")
    between = (a.mean - b.mean).square().sum()
    within = a.covariance.trace() + b.covariance.trace()
    return (between + within - 2 * ROOTS[root](a.covariance, b.covariance)).item()


def _by_product(a: Tensor, b: Tensor) -> Tensor:
    roots = torch.linalg.eigvals(a @ b).sqrt()
    if roots.imag.abs().max() > IMAGINARY:
        raise UsageError(
            f"the root of the covariances' product is imaginary by {roots.imag.abs().max():.1e}",
            where="FID",
            fix="covariances have no negative eigenvalues: compute the statistics again",
        )
    return roots.real.sum()


def _by_symmetry(a: Tensor, b: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(a)
    if failed:
        values, vectors = torch.linalg.eigh(a)
        factor = vectors * values.clamp_min(0).sqrt()
    return torch.linalg.eigvalsh(factor.T @ b @ factor).clamp_min(0).sqrt().sum()


ROOTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"symmetric": _by_symmetry, "product": _by_product}


def kernel_distance(a: Tensor, b: Tensor, *, subsets: int = 100, at_most: int = 1000, seed: int = 0) -> Scores:
    """KID: one value per pair of subsets, drawn without replacement, and their mean. May be negative.

    Args:
        a, b: (n, D) features of one variant.
        at_most: rows of a subset, or as many as the smaller set has.
        seed: of the draw.

    Raises:
        UsageError: fewer than two rows, a number that is not finite, other features.
    """
    _check(a, "KID")
    _check(b, "KID")
    generator = torch.Generator().manual_seed(seed)
    size = min(len(a), len(b), at_most)
    drawn = (
        tuple(each[torch.randperm(len(each), generator=generator)[:size]] for each in (a, b)) for _ in range(subsets)
    )
    return mean_of([squared_mmd(x, y) for x, y in drawn])


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased, of all rows (n, D) and (m, D): no row is compared with itself."""
    if a.shape[1] != b.shape[1]:
        raise UsageError(f"features do not compare: {a.shape[1]} and {b.shape[1]} of them", where="KID")
    a, b = a.double(), b.double()
    inside = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (_kernel(a, a), _kernel(b, b)))
    return float(inside - 2 * _kernel(a, b).mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _check(features: Tensor, where: str) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise UsageError(
            f"features of shape {tuple(features.shape)} have no covariance",
            where=where,
            fix="give (n, D), of two pictures at least",
        )
    finite = features.isfinite().all(1)
    if not finite.all():
        raise UsageError(f"features of picture {int(finite.long().argmin())} are not finite", where=where)


@dataclass(frozen=True)
class Preparation:
    """From a picture to what the network reads."""

    resize: Callable[["PILImage.Image"], Tensor]
    """An RGB picture -> (3, 299, 299) float32, 0..255."""
    scale: Callable[[Tensor], Tensor]


def _bilinear(picture: "PILImage.Image", antialias: bool = False) -> Tensor:
    pixels = to_pixels(picture)[None]
    return F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=antialias)[0]


def _antialiased(picture: "PILImage.Image") -> Tensor:
    return _bilinear(picture, antialias=True)


def _bicubic_by_channel(picture: "PILImage.Image") -> Tensor:
    import numpy as np
    from PIL import Image as PILImage

    resized = [
        np.asarray(PILImage.fromarray(channel.numpy()).resize((SIDE, SIDE), PILImage.Resampling.BICUBIC))
        for channel in to_pixels(picture)
    ]
    return torch.from_numpy(np.stack(resized)).clamp(0, 255)


def _tensorflow_1(picture: "PILImage.Image") -> Tensor:
    pixels = to_pixels(picture)
    for axis in (2, 1):
        last = pixels.shape[axis] - 1
        at = torch.arange(SIDE, dtype=torch.float32) * (pixels.shape[axis] / SIDE)
        before = at.long()
        share = (at - before).view(-1, *[1] * (2 - axis))
        low, high = (pixels.index_select(axis, each) for each in (before, (before + 1).clamp_max(last)))
        pixels = low + (high - low) * share
    return pixels


def _by_way_of_64(picture: "PILImage.Image") -> Tensor:
    return _bilinear(centre_crop(shorter_side_to(picture, SMALL), SMALL))


def _unit(pixels: Tensor) -> Tensor:
    return 2 * (pixels / 255) - 1


def _around_128(pixels: Tensor) -> Tensor:
    return (pixels - 128) / 128


PREPARATIONS: Mapping[str, Preparation] = {
    "pytorch-fid": Preparation(_bilinear, _unit),
    "clean": Preparation(_bicubic_by_channel, _around_128),
    "clean-legacy-tf": Preparation(_tensorflow_1, _around_128),
    "torchmetrics-1.9": Preparation(_antialiased, _around_128),
    "64": Preparation(_by_way_of_64, _unit),
}


def network_input(picture: "PILImage.Image", variant: str) -> Tensor:
    """(3, 299, 299), about -1..1.

    Raises:
        UsageError: there is no such variant.
    """
    if variant not in PREPARATIONS:
        raise UsageError(f"FID has no variant {variant!r}", fix=f"one of {', '.join(PREPARATIONS)}")
    preparation = PREPARATIONS[variant]
    return preparation.scale(preparation.resize(picture.convert("RGB")))


@torch.no_grad()
def features_of(
    pictures: Iterable["PILImage.Image"], network: Callable[[Tensor], Tensor], *, variant: str, batch: int = 32
) -> Tensor:
    """(n, D) float32, of pictures of any size.

    Args:
        network: (n, 3, 299, 299) -> (n, D), an `Inception`.
    """
    prepared = (network_input(picture, variant) for picture in pictures)
    found = []
    while some := list(islice(prepared, batch)):
        found.append(network(torch.stack(some)).float())
    return torch.cat(found) if found else torch.empty(0, 0)
