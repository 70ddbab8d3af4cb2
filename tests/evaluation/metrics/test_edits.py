"""L1, L2, PSNR, SSIM and LPIPS of pairs, against the released code's numbers and plain sums."""

import json
import math
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
    assert psnr([grey], [brighter]).value == pytest.approx(10 * math.log10(3 * 25))
    assert psnr([grey], [grey]).value == math.inf
    assert l1([grey, grey], [grey, brighter]).per_sample == pytest.approx((0, 51 / 255 / 3))


def test_the_generated_picture_takes_the_targets_size_and_not_the_other_way_round():
    small, large = noise(12, 16), noise(40, 36, seed=1)
    resized = small.resize((40, 36), PILImage.Resampling.BICUBIC)
    for metric in (l1, l2, psnr):
        assert metric([small], [large]) == metric([resized], [large])
        assert metric([small], [large]).value != pytest.approx(metric([large], [small]).value, rel=1e-3)
    assert l1([small.convert("RGBA")], [large]) == l1([small], [large])


def plain_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Window by window."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    found = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


def test_ssim_is_the_mean_over_windows():
    a = noise(15, 18)
    b = PILImage.blend(a, noise(15, 18, seed=1), 0.3)
    x, y = (np.asarray(each).astype(float) for each in (a, b))
    by_channel = [plain_ssim(x[..., c], y[..., c]) for c in range(3)]
    assert ssim([a], [b], channels="rgb").value == pytest.approx(np.mean(by_channel), rel=1e-10)
    luma = [np.round(each @ (0.299, 0.587, 0.114)) for each in (x, y)]
    assert ssim([a], [b], channels="grey").value == pytest.approx(plain_ssim(*luma), rel=1e-10)
    assert ssim([a], [a], channels="grey").value == pytest.approx(1)
    # Pillow's own luma is the same
    grey = [each.convert("L").convert("RGB") for each in (a, b)]
    assert ssim([a], [b], channels="grey").value == pytest.approx(
        ssim(*[[g] for g in grey], channels="rgb").value, 1e-3
    )


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
        ssim([noise(10, 20)], [noise(10, 20)], channels="rgb")
    with pytest.raises(UsageError, match="LPIPS"):
        lpips([noise(31, 40)], [noise(31, 40)], LPIPS("alex", width=4))
    with pytest.raises(UsageError, match="2 targets"):
        l1([noise(3, 3)], [noise(3, 3)] * 2)
