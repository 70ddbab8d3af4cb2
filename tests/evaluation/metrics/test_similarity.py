"""CLIP and DINO scores of embeddings that are fed: cosines, clipping, prefix, aggregation; DINO's preprocessing."""

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from weft.errors import CheckpointError, UsageError
from weft.evaluation.metrics.similarity import (
    DinoV1,
    clip_i,
    clip_score,
    clip_t,
    cosines,
    dino,
    ref_clip_score,
    torchmetrics_clip_score,
)


class Fed:
    """Embeddings by what they are of, of any length; keeps the texts it was asked for."""

    def __init__(self, **angles: float) -> None:
        self.angles, self.asked = angles, []

    def _of(self, names) -> torch.Tensor:
        angles = torch.tensor([self.angles[name.rpartition(" ")[2]] for name in names]) * torch.pi / 180
        return torch.stack((angles.cos(), angles.sin()), 1) * torch.arange(1, len(names) + 1).view(-1, 1)

    def picture_features(self, pictures) -> torch.Tensor:
        return self._of(pictures)

    def text_features(self, texts) -> torch.Tensor:
        self.asked += texts
        return self._of(texts)


def cos(degrees: float) -> float:
    return float(np.cos(np.deg2rad(degrees)))


@pytest.fixture
def model() -> Fed:
    return Fed(a=0, b=60, c=180, near=10, across=100, far=170)


def test_cosines_do_not_depend_on_lengths():
    a = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    b = a.flip(0) + 0.1
    found = cosines(3 * a, 0.2 * b)
    torch.testing.assert_close(found, F.cosine_similarity(a.double(), b.double()))
    assert cosines(a, a).sub(1).abs().max() < 1e-12
    with pytest.raises(UsageError, match="compare"):
        cosines(a, b[:2])


def test_picture_with_picture_and_picture_with_text(model):
    for metric in (clip_i, dino):
        found = metric(["a", "b", "a"], ["b", "b", "c"], model)
        assert found.per_sample == pytest.approx((0.5, 1, -1), abs=1e-6)
        assert found.value == pytest.approx(1 / 6, abs=1e-6)
    found = clip_t(["a", "a"], ["near", "across"], model)
    assert found.per_sample == pytest.approx((cos(10), cos(100)), abs=1e-6)
    assert model.asked == ["near", "across"]


def test_clip_score_has_a_prefix_a_factor_and_a_floor(model):
    found = clip_score(["a", "a"], ["near", "far"], model)
    assert found.per_sample == pytest.approx((2.5 * cos(10), 0), abs=1e-6)
    assert found.value == pytest.approx(1.25 * cos(10), abs=1e-6)
    assert model.asked == ["A photo depicts near", "A photo depicts far"]


def test_ref_clip_score_is_the_harmonic_mean_with_the_best_reference(model):
    found = ref_clip_score(["a", "a", "a", "c"], ["near"] * 4, [["b", "c"], ["c"], ["far", "a"], ["b"]], model)
    score, best = 2.5 * cos(10), [cos(50), 0, cos(10), cos(50)]
    wanted = [2 * score * b / (score + b) for b in best[:3]]
    assert found.per_sample == pytest.approx((*wanted, 0), abs=1e-6)
    assert found.value == pytest.approx(sum(wanted) / 4, abs=1e-6)
    assert all(text.startswith("A photo depicts ") for text in model.asked)
    with pytest.raises(UsageError, match="no reference"):
        ref_clip_score(["a"], ["near"], [[]], model)


def test_what_torchmetrics_calls_clip_score_is_another_number(model):
    found = torchmetrics_clip_score(["a", "a"], ["near", "across"], model)
    assert found.per_sample == pytest.approx((100 * cos(10), 100 * cos(100)), abs=1e-4)
    assert found.value == pytest.approx(50 * (cos(10) + cos(100)), abs=1e-4)
    assert model.asked == ["near", "across"]
    assert torchmetrics_clip_score(["a"], ["far"], model).value == 0


def test_many_pairs_are_the_mean_of_pairs_and_not_of_batches(model):
    found = clip_t(["a"] * 33, ["near"] * 32 + ["c"], model)
    assert len(found.per_sample) == 33
    assert found.value == pytest.approx((32 * cos(10) - 1) / 33, abs=1e-6)


def test_unequal_numbers_are_refused(model):
    for metric in (clip_i, clip_t, clip_score, dino, torchmetrics_clip_score):
        with pytest.raises(UsageError, match="do not match"):
            metric(["a", "b"], ["a"], model)


def test_dino_is_given_the_middle_of_a_picture_256_high():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 411, 3), dtype=np.uint8)
    found = DinoV1.prepare(PILImage.fromarray(pixels))
    sized = PILImage.fromarray(pixels).resize((350, 256), PILImage.Resampling.BICUBIC)
    middle = np.asarray(sized)[16:240, 63:287] / 255
    wanted = (middle - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(found.permute(1, 2, 0), wanted, rtol=0, atol=1e-5)


def test_dino_answers_with_the_first_position(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_hidden_layers=1, num_attention_heads=6, intermediate_size=8, patch_size=16)
    network = ViTModel(config, add_pooling_layer=False).eval()
    network.save_pretrained(tmp_path)
    pictures = [PILImage.effect_noise((260, 256), 50 + 40 * i).convert("RGB") for i in range(2)]
    found = DinoV1(tmp_path).picture_features(pictures)
    with torch.no_grad():
        seen = network(pixel_values=torch.stack([DinoV1.prepare(each) for each in pictures])).last_hidden_state[:, 0]
    torch.testing.assert_close(found, seen / seen.norm(dim=1, keepdim=True))
    assert dino(pictures, pictures[::-1], DinoV1(tmp_path)).value < 0.999


def test_another_network_is_no_dino(tmp_path):
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16}
    for name, config, kind in (
        ("width", ViTConfig(hidden_size=8, intermediate_size=8, **small), ViTModel),
        ("v2", Dinov2Config(hidden_size=384, mlp_ratio=1, **small), Dinov2Model),
    ):
        kind(config).save_pretrained(tmp_path / name)
        with pytest.raises(CheckpointError, match="no DINO v1"):
            DinoV1(tmp_path / name)
    with pytest.raises(CheckpointError):
        DinoV1(tmp_path / "nothing")
