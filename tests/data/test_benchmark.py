"""`benchmarks.data` runs: what it measures is right before it is timed, and its last line has every figure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import data as benchmark
from tests.data.corpus import encoded, picture
from weft.errors import ImageError
from weft.images import decode_image
from weft.scorers import LPIPS

ROOT = Path(__file__).parents[2]
KEYS = {
    "decode_512", "decode_3mp", "lpips_once", "ray_over_pool", "docs_per_s_core", "packing_instruction",
    "packing_mmc4", "rss_growth_10x", "vs_data_juicer",
}  # fmt: skip


def reason(data: bytes, least: int | None) -> str | None:
    try:
        decode_image(data, least=least)
    except ImageError as error:
        return error.reason
    return None


@pytest.mark.parametrize("progressive", [False, True])
def test_scaled_decoding_refuses_what_full_decoding_refuses(progressive):
    data = encoded(picture(1, (64, 48)), "JPEG", progressive=progressive)
    damaged = [data[:cut] for cut in range(0, len(data), 3)]
    damaged += [data[:at] + bytes([at % 256]) + data[at + 1 :] for at in range(0, len(data), 3)]
    found = [(reason(each, None), reason(each, 8)) for each in damaged]
    assert all(full == scaled for full, scaled in found)
    assert {full for full, _ in found} >= {None, "image_truncated"}


@pytest.mark.parametrize(("size", "least", "wanted"), [((512, 400), 200, (256, 200)), ((512, 400), 201, (512, 400))])
def test_a_scaled_picture_is_never_smaller_than_was_asked(size, least, wanted):
    data = benchmark.photograph(size, 0)
    assert decode_image(data, least=least).size == wanted
    assert decode_image(data).size == size


def test_packing_is_measured_over_every_token_once():
    found = benchmark.packing(benchmark.TINY)
    assert found["packing_instruction"]["share"]["median"] >= 0.95
    assert found["packing_mmc4"]["share"]["median"] >= 0.98


def test_lpips_once_and_pairwise_agree():
    network, pictures = (
        LPIPS("alex", width=8),
        [benchmark.naive_picture(benchmark.photograph((64, 64), i)) for i in (0, 1)],
    )
    found = network.of_pictures(pictures, benchmark.SIDE)
    assert found[0, 1] > 0.01
    torch.testing.assert_close(found, benchmark.pairwise(network, pictures), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_last_line_has_every_figure(tmp_path):
    command = [sys.executable, "-m", "benchmarks.data", "--tiny", "--out", str(tmp_path / "figures.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    last = json.loads(done.stdout.splitlines()[-1])
    assert set(last) == KEYS
    assert last["vs_data_juicer"] is None
    assert json.loads((tmp_path / "figures.json").read_text())["figures"] == last
