"""L1, L2, PSNR, SSIM and LPIPS of pairs, against the released code's numbers and plain sums."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from weft.errors import UsageError
from weft.evaluation.metrics.edits import l1, l2, lpips, psnr, ssim
from weft.scorers import LPIPS

KNOWN = Path(__file__).parents[4] / "shared" / "data" / "eval" / "edit_l1l2"


def noise(cols: int, rows: int, seed: int = 0) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), dtype=np.uint8))


@pytest.mark.skipif(not KNOWN.is_dir(), reason="../shared/data/eval/edit_l1l2 is not there")
def test_l1_and_l2_are_those_of_the_released_rule():
    wanted = json.loads((KNOWN / "expected.json").read_text())
    pairs = [[PILImage.open(KNOWN / pair[key]) for pair in wanted["pairs"]] for key in ("generated", "target")]
    for metric, name in ((l1, "l1"), (l2, "l2")):
        found = metric(*pairs)
        assert found.per_sample == pytest.approx([pair[name] for pair in wanted["pairs"]], abs=1e-5)
        assert found.value == pytest.approx(wanted[f"mean_{name}"], abs=1e-5)


def test_known_differences_have_known_values():
    grey, brighter = PILImage.new("RGB", (12, 12), (100, 100, 100)), PILImage.new("RGB", (12, 12), (151, 100, 100))
    assert l1([grey], [brighter]).value == pytest.approx(51 / 255 / 3)
    assert l2([grey], [brighter]).value == pytest.approx((51 / 255) ** 2 / 3)
    assert psnr([grey], [brighter], channels="rgb").value == pytest.approx(10 * math.log10(3 * 25))
    # 51 * 0.299 = 15.249: from a luma of 100 to one of 115
    assert psnr([grey], [brighter], channels="grey").value == pytest.approx(20 * math.log10(255 / 15))
    assert psnr([grey], [brighter], channels="y").value == pytest.approx(20 * math.log10(255 / (51 * 65.481 / 255)))
    assert psnr([grey], [grey], channels="y").value == math.inf
    assert l1([grey, grey], [grey, brighter]).per_sample == pytest.approx((0, 51 / 255 / 3))


def test_the_generated_picture_takes_the_targets_size_and_not_the_other_way_round():
    small, large = noise(12, 16), noise(40, 36, seed=1)
    resized = small.resize((40, 36), PILImage.Resampling.BICUBIC)
    for metric in (l1, l2, partial(psnr, channels="rgb")):
        assert metric([small], [large]) == metric([resized], [large])
        assert metric([small], [large]).value != pytest.approx(metric([large], [small]).value, rel=1e-3)
    assert l1([small.convert("RGBA")], [large]) == l1([small], [large])


def plain_ssim(a: np.ndarray, b: np.ndarray, window: str) -> float:
    """Window by window."""
    if window == "gaussian":
        line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
        weights, share = np.outer(line, line) / np.outer(line, line).sum(), 1
    else:
        weights, share = np.full((7, 7), 1 / 49), 49 / 48
    side, found = len(weights), []
    for i in range(a.shape[0] - side + 1):
        for j in range(a.shape[1] - side + 1):
            x, y = a[i : i + side, j : j + side], b[i : i + side, j : j + side]
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (share * (weights * (z - m) ** 2).sum() for z, m in ((x, mx), (y, my)))
            cov = share * (weights * (x - mx) * (y - my)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize("window", ["gaussian", "uniform"])
def test_ssim_is_the_mean_over_windows(window):
    a = noise(15, 18)
    b = PILImage.blend(a, noise(15, 18, seed=1), 0.3)
    x, y = (np.asarray(each).astype(float) for each in (a, b))
    wanted = {
        "rgb": np.mean([plain_ssim(x[..., c], y[..., c], window) for c in range(3)]),
        "grey": plain_ssim(*(np.round(each @ (0.299, 0.587, 0.114)) for each in (x, y)), window),
        "y": plain_ssim(*(16 + each @ (65.481, 128.553, 24.966) / 255 for each in (x, y)), window),
    }
    for channels, value in wanted.items():
        assert ssim([a], [b], channels=channels, window=window).value == pytest.approx(value, rel=1e-10)
        assert ssim([a], [a], channels=channels, window=window).value == pytest.approx(1)
    assert len({round(value, 3) for value in wanted.values()}) == 3
    # Pillow's own luma is the same
    grey = [[each.convert("L").convert("RGB")] for each in (a, b)]
    assert ssim(*grey, channels="rgb", window=window).value == pytest.approx(wanted["grey"], rel=1e-3)


def test_lpips_is_the_scorers_distance_at_the_targets_size():
    torch.manual_seed(0)
    model = LPIPS("alex", width=4)
    a, b, c = noise(64, 48), noise(64, 48, seed=1), noise(90, 90, seed=2)
    found = lpips([a, a, c], [b, a, b], model)
    pixels = torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) / 127.5 - 1 for x in (a, b)])
    wanted = model.distances(model.describe(pixels))[0, 1].item()
    assert found.per_sample[0] == pytest.approx(wanted, rel=1e-5) and wanted > 0
    assert found.per_sample[1] == 0
    assert found.per_sample[2] == lpips([c.resize((64, 48), PILImage.Resampling.BICUBIC)], [b], model).value


def test_pictures_that_are_too_small_or_too_few_are_refused():
    with pytest.raises(UsageError, match="window"):
        ssim([noise(10, 20)], [noise(10, 20)], channels="rgb", window="gaussian")
    assert ssim([noise(7, 7)], [noise(7, 7)], channels="rgb", window="uniform").value == pytest.approx(1)
    with pytest.raises(UsageError, match="window"):
        ssim([noise(6, 20)], [noise(6, 20)], channels="rgb", window="uniform")
    with pytest.raises(UsageError, match="LPIPS"):
        lpips([noise(31, 40)], [noise(31, 40)], LPIPS("alex", width=4))
    with pytest.raises(UsageError, match="2 targets"):
        l1([noise(3, 3)], [noise(3, 3)] * 2)
