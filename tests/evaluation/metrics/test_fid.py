"""Frechet and kernel distances: released codes' numbers, closed forms, and what every variant does to pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from weft.errors import UsageError
from weft.evaluation.metrics.fid import (
    PREPARATIONS,
    ROOTS,
    features_of,
    frechet_distance,
    kernel_distance,
    network_input,
    squared_mmd,
    statistics,
)

KNOWN = Path(__file__).parents[4] / "shared" / "data" / "eval" / "fid_numerics"
known = pytest.mark.skipif(not KNOWN.is_dir(), reason="../shared/data/eval/fid_numerics is not there")
each_root = pytest.mark.parametrize("root", ROOTS)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(a, b, root="symmetric") -> float:
    return frechet_distance(statistics(a, variant="x"), statistics(b, variant="x"), root=root)


def noise(cols: int, rows: int, seed: int = 0) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), dtype=np.uint8))


@known
@each_root
def test_distances_are_those_of_the_released_codes(root):
    features, wanted = np.load(KNOWN / "features.npz"), json.loads((KNOWN / "expected_distance.json").read_text())
    a, b = (torch.from_numpy(features[name]) for name in "ab")
    for other in ("pytorch_fid_sqrtm", "torchmetrics_eigvals"):
        assert distance(a, b, root) == pytest.approx(wanted["all"][other], rel=1e-6)
        halves = wanted["first_half_vs_second_half_of_a"][other]
        assert distance(a[:60], a[60:], root) == pytest.approx(halves, rel=1e-6)
        few = wanted["first_9_rows_each_rank_deficient"][other]
        assert distance(a[:9], b[:9], root) == pytest.approx(few, rel=1e-4)
    assert distance(a, a, root) == pytest.approx(0, abs=1e-9)
    of_a, of_b = statistics(a, variant="x"), statistics(b, variant="x")
    assert (of_a.mean - of_b.mean).square().sum().item() == pytest.approx(wanted["mean_term_only"], rel=1e-9)
    assert [each.covariance.trace().item() for each in (of_a, of_b)] == pytest.approx(wanted["trace_sigma"], rel=1e-9)


@known
def test_kernel_distance_is_the_released_codes():
    features, wanted = np.load(KNOWN / "features.npz"), json.loads((KNOWN / "expected_distance.json").read_text())
    a, b = (torch.from_numpy(features[name])[:120] for name in "ab")
    assert squared_mmd(a, b) == pytest.approx(wanted["kid_first_min_rows_no_subsets"], rel=1e-6)


@each_root
def test_gaussians_along_the_axes_have_a_distance_in_closed_form(root):
    scales = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.1, 0.5]], dtype=torch.float64)
    # whitened: mean zero, covariance one, exactly
    white = draw(50, 3) - draw(50, 3).mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / 49)).T
    a, b = white * scales[0], white.flip(0) * scales[1] + 2
    assert distance(a, b, root) == pytest.approx(3 * 4 + (scales[0] - scales[1]).square().sum().item(), rel=1e-10)


@each_root
def test_statistics_in_float64_are_numpys_whatever_the_features_are(root):
    features = (draw(9000, 5) + 1000).float()
    found = statistics(features, variant="x")
    assert found.n == 9000 and not found.is_singular
    exact = features.double().numpy()
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-9)
    assert statistics(features[:5], variant="x").is_singular


def test_both_roots_agree_where_the_covariance_is_singular():
    a, b = draw(20, 40), draw(30, 40, seed=1) + 0.3
    assert distance(a, b) == pytest.approx(distance(a, b, "product"), rel=1e-6)


def test_a_covariance_that_is_none_is_refused():
    one = statistics(draw(50, 3), variant="x")
    wrong = type(one)(one.mean, -one.covariance, one.n, "x")
    with pytest.raises(UsageError, match="imaginary"):
        frechet_distance(one, wrong, root="product")


@pytest.mark.parametrize(
    "features, told",
    [
        (draw(1, 3), "no covariance"),
        (draw(3), "no covariance"),
        (torch.tensor([[1.0, 2], [3, 4], [float("nan"), 0]]), "picture 2"),
    ],
)
def test_features_without_statistics_are_refused(features, told):
    with pytest.raises(UsageError, match=told):
        statistics(features, variant="clean")


def test_variants_are_not_compared():
    clean, small = (statistics(draw(5, 3), variant=name) for name in ("clean", "64"))
    with pytest.raises(UsageError, match="clean and 3 features of 64"):
        frechet_distance(clean, small)


def test_squared_mmd_is_the_sum_over_pairs():
    a, b = draw(4, 3), draw(6, 3, seed=1)

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    def inside(rows):
        n = len(rows)
        return sum(kernel(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    across = sum(kernel(x, y) for x in a for y in b) / 24
    assert squared_mmd(a, b) == pytest.approx(inside(a) + inside(b) - 2 * across, rel=1e-12)


def test_kernel_distance_is_unbiased_and_the_same_for_the_same_seed():
    a, b, far = draw(300, 8), draw(200, 8, seed=1), draw(200, 8, seed=2) + 1
    same = kernel_distance(a, b, subsets=40, at_most=100, seed=3)
    assert same == kernel_distance(a, b, subsets=40, at_most=100, seed=3)
    assert same != kernel_distance(a, b, subsets=40, at_most=100, seed=4)
    assert len(same.per_sample) == 40 and min(same.per_sample) < 0 < max(same.per_sample)
    assert kernel_distance(a, far, subsets=40, at_most=100).value > 10 * abs(same.value)
    everything = kernel_distance(a[:200], b, subsets=1)
    assert everything.value == pytest.approx(squared_mmd(a[:200], b), rel=1e-10)


@known
@pytest.mark.parametrize(
    "name, made, tolerance",
    [
        ("clean_fid_pil_bicubic_float_0_255", lambda p: PREPARATIONS["clean"].resize(p), 0.05),
        ("clean_fid_legacy_pytorch_bilinear_0_255", lambda p: PREPARATIONS["pytorch-fid"].resize(p), 0.05),
        ("pytorch_fid_network_input_-1_1", lambda p: network_input(p, "pytorch-fid"), 5e-4),
        ("mm_interleaved_64_then_299_-1_1", lambda p: network_input(p, "64"), 5e-4),
    ],
)
def test_pixels_are_those_of_the_released_codes(name, made, tolerance):
    wanted = json.loads((KNOWN / "expected_resize.json").read_text())["small"][name]
    with PILImage.open(KNOWN / "small.png") as picture:
        found = made(picture).double()
    assert list(found.permute(1, 2, 0).shape) == wanted["shape"]
    np.testing.assert_allclose(found.mean((1, 2)), wanted["mean_rgb"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.std((1, 2), correction=0), wanted["std_rgb"], rtol=0, atol=tolerance)
    for row, col, *rgb in wanted["probes_row_col_rgb"]:
        np.testing.assert_allclose(found[:, row, col], rgb, rtol=0, atol=tolerance)


def at(pixels: np.ndarray, row: float, col: float) -> np.ndarray:
    """Bilinear, borders repeated."""
    rows, cols, _ = pixels.shape
    top, left = int(np.floor(row)), int(np.floor(col))
    total = np.zeros(3)
    for i, of_row in ((top, 1 - (row - top)), (top + 1, row - top)):
        for j, of_col in ((left, 1 - (col - left)), (left + 1, col - left)):
            total += of_row * of_col * pixels[min(max(i, 0), rows - 1), min(max(j, 0), cols - 1)]
    return total


@pytest.mark.parametrize("variant, centre", [("pytorch-fid", 0.5), ("clean-legacy-tf", 0.0)])
@pytest.mark.parametrize("size", [(90, 70), (400, 301), (299, 299), (1, 1)])
def test_bilinear_without_antialiasing_reads_four_pixels(variant, centre, size):
    picture = noise(*size)
    pixels = np.asarray(picture).astype(float)
    found = PREPARATIONS[variant].resize(picture)
    for row, col in [(0, 0), (298, 298), (0, 298), (150, 149), (17, 230)]:
        place = [(k + centre) * n / 299 - centre for k, n in ((row, size[1]), (col, size[0]))]
        np.testing.assert_allclose(found[:, row, col], at(pixels, *place), rtol=0, atol=0.05)


def test_antialiasing_is_what_sets_torchmetrics_apart():
    large, small = noise(600, 598), noise(100, 120)
    ways = {name: PREPARATIONS[name].resize for name in ("pytorch-fid", "torchmetrics-1.9")}
    same = [way(small) for way in ways.values()]
    torch.testing.assert_close(*same, rtol=0, atol=1e-3)
    # half the size: a triangle over four pixels instead of two, so noise has less than half the variance
    plain, smooth = (way(large).std() for way in ways.values())
    assert smooth < 0.7 * plain
    # Pillow's triangle is the same, in whole numbers
    pillow = np.asarray(large.resize((299, 299), PILImage.Resampling.BILINEAR)).astype(float)
    np.testing.assert_allclose(ways["torchmetrics-1.9"](large).permute(1, 2, 0), pillow, rtol=0, atol=1.01)


def test_scales_put_black_and_white_where_each_network_input_has_them():
    black, white = (PILImage.new("RGB", (8, 8), color) for color in ("black", "white"))
    highest = {"pytorch-fid": 1, "64": 1} | dict.fromkeys(("clean", "clean-legacy-tf", "torchmetrics-1.9"), 127 / 128)
    assert highest.keys() == PREPARATIONS.keys()
    for name, high in highest.items():
        assert network_input(black, name).eq(-1).all()
        # weights of a filter add up to one, but for rounding
        assert (network_input(white, name) - high).abs().max() < 1e-6


def test_64_keeps_the_middle_of_a_wide_picture():
    picture = noise(301, 128)
    picture.paste((255, 0, 0), (0, 0, 80, 128))
    made = PREPARATIONS["64"].resize(picture)
    sized = picture.resize((150, 64), PILImage.Resampling.BICUBIC)
    again = PREPARATIONS["pytorch-fid"].resize(sized.crop((43, 0, 107, 64)))
    assert made.equal(again)


def test_features_come_in_order_whatever_the_batch_and_the_sizes():
    pictures = [noise(20 + i, 30, seed=i) for i in range(5)]

    def network(pixels):
        return pixels.mean((2, 3))

    once = features_of(iter(pictures), network, variant="clean", batch=5)
    assert once.shape == (5, 3) and once.equal(features_of(pictures, network, variant="clean", batch=2))
    torch.testing.assert_close(once[3], network_input(pictures[3], "clean").mean((1, 2)))


def test_an_unknown_variant_is_refused():
    with pytest.raises(UsageError, match="legacy"):
        network_input(noise(3, 3), "legacy")
