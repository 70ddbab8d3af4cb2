"""LPIPS against a second, plain computation; CLIP and DINO against transformers; hashes by what they promise."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file
from torch.nn import functional as F

from weft.errors import CheckpointError, UsageError
from weft.scorers import (
    CLIP,
    DINO,
    LPIPS,
    NETWORKS,
    clip_score,
    cosine_distances,
    difference_hash,
    hamming,
    hash_distances,
    tells_apart,
)

WIDTH = 8
TAPPED = {"alex": 5, "vgg": 5, "squeeze": 7}


def picture(seed: int, size: tuple[int, int] = (80, 72)) -> PILImage.Image:
    """Smooth, as photos are: few large blocks, scaled up."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return PILImage.fromarray(blocks).resize(size, PILImage.Resampling.BICUBIC)


def conv(x, weights, name, **options):
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)


def alex(x, w):
    """By the published names: features.0, 3, 6, 8 and 10 are convolutions."""
    found = [F.relu(conv(x, w, "features.0", stride=4, padding=2))]
    found.append(F.relu(conv(F.max_pool2d(found[-1], 3, 2), w, "features.3", padding=2)))
    found.append(F.relu(conv(F.max_pool2d(found[-1], 3, 2), w, "features.6", padding=1)))
    found.append(F.relu(conv(found[-1], w, "features.8", padding=1)))
    found.append(F.relu(conv(found[-1], w, "features.10", padding=1)))
    return found


def vgg(x, w):
    found = []
    for names in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        for name in names:
            x = F.relu(conv(x, w, f"features.{name}", padding=1))
        found.append(x)
        x = F.max_pool2d(x, 2, 2)
    return found


def squeeze(x, w):
    def fire(x, n):
        s = F.relu(conv(x, w, f"features.{n}.squeeze"))
        e1 = F.relu(conv(s, w, f"features.{n}.expand1x1"))
        return torch.cat((e1, F.relu(conv(s, w, f"features.{n}.expand3x3", padding=1))), 1)

    def pool(x):
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    found = [F.relu(conv(x, w, "features.0", stride=2))]
    found.append(fire(fire(pool(found[-1]), 3), 4))
    found.append(fire(fire(pool(found[-1]), 6), 7))
    found.append(fire(pool(found[-1]), 9))
    for n in (10, 11, 12):
        found.append(fire(found[-1], n))
    return found


PLAIN = {"alex": alex, "vgg": vgg, "squeeze": squeeze}


def plain_distance(network, backbone, linear, a, b):
    """One pair, layer by layer: unit length over channels, squared difference, weighted, averaged over places."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    of_a, of_b = (PLAIN[network](((x - shift) / scale).double(), backbone) for x in (a, b))
    total = 0.0
    for n, (fa, fb) in enumerate(zip(of_a, of_b, strict=True)):
        ua = fa / (fa.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
        ub = fb / (fb.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
        total += F.conv2d((ua - ub).pow(2), linear[f"lin{n}.model.1.weight"].double()).mean().item()
    return total


def published(network: str, folder: Path, width: int = WIDTH) -> tuple[dict, dict, Path, Path]:
    """Random weights under the names that are published, with a classifier that nobody wants."""
    torch.manual_seed(7)
    made = LPIPS(network, width)
    backbone = {f"features.{key}": torch.randn_like(t) / math.sqrt(t[0].numel()) for key, t in
                made.features.state_dict().items()}  # fmt: skip
    linear = {f"lin{i}.model.1.weight": torch.rand(1, len(w), 1, 1) for i, w in enumerate(made.weights)}
    files = folder / "backbone.safetensors", folder / "linear.safetensors"
    save_file({**backbone, "classifier.1.weight": torch.zeros(3, 3)}, files[0])
    save_file(linear, files[1])
    return backbone, linear, *files


@pytest.mark.parametrize("network", NETWORKS)
def test_lpips_is_the_plain_computation_for_every_pair(network, tmp_path):
    backbone, linear, *files = published(network, tmp_path)
    assert len(linear) == TAPPED[network]
    model = LPIPS(network, WIDTH).load(*files)
    pixels = torch.rand(3, 3, 96, 80, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = model.distances(model.describe(pixels))
    in_double = {key: tensor.double() for key, tensor in backbone.items()}
    for i in range(3):
        for j in range(3):
            wanted = plain_distance(network, in_double, linear, pixels[i : i + 1], pixels[j : j + 1])
            # float32 through up to 13 convolutions against float64
            assert found[i, j].item() == pytest.approx(wanted, rel=2e-4, abs=1e-7)
    assert found.diagonal().abs().max() == 0
    assert found[0, 1] > 0.01


@pytest.mark.parametrize("network", NETWORKS)
def test_features_computed_once_give_the_distances_of_pairs(network, tmp_path):
    *_, a, b = published(network, tmp_path)
    model = LPIPS(network, WIDTH).load(a, b)
    pictures = [picture(seed) for seed in range(4)]
    together = model.of_pictures(pictures, 64)
    for i in range(4):
        for j in range(4):
            pair = model.of_pictures([pictures[i], pictures[j]], 64)[0, 1]
            torch.testing.assert_close(together[i, j], pair, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together, together.T)


def test_a_negative_weight_counts_nothing(tmp_path):
    """Published weights are not negative; a root of one would be no number."""
    _, linear, backbone, file = published("alex", tmp_path)
    linear["lin0.model.1.weight"] = -linear["lin0.model.1.weight"]
    save_file(linear, file)
    found = LPIPS("alex", WIDTH).load(backbone, file).of_pictures([picture(0), picture(1)], 64)
    assert torch.isfinite(found).all()


def test_more_noise_is_further_away(tmp_path):
    *_, backbone, linear = published("alex", tmp_path)
    model = LPIPS("alex", WIDTH).load(backbone, linear)
    original = np.asarray(picture(3)).astype(float)
    noise = np.random.default_rng(0).normal(size=original.shape)
    noisy = [PILImage.fromarray((original + s * noise).clip(0, 255).astype(np.uint8)) for s in (0, 5, 25, 100)]
    distances = model.of_pictures(noisy, 64)[0].tolist()
    assert distances == sorted(distances)
    assert distances[0] == 0 < distances[1]


@pytest.mark.parametrize("network", NETWORKS)
def test_the_published_shapes(network):
    """Of torchvision's networks, at full width; counted without their classifiers."""
    sizes = {"alex": 2_469_696, "vgg": 14_714_688, "squeeze": 722_496}
    with torch.device("meta"):
        layers, _ = NETWORKS[network](64)
    assert sum(p.numel() for layer in layers for p in layer.parameters()) == sizes[network]


@pytest.mark.parametrize("problem", ["missing", "shape", "other", "damaged", "gone"])
def test_weights_that_do_not_fit_are_named(problem, tmp_path):
    backbone, linear, file, other = published("alex", tmp_path)
    if problem == "missing":
        save_file({key: t for key, t in backbone.items() if key != "features.6.bias"}, file)
        what = "features.6.bias"
    elif problem == "shape":
        save_file({**backbone, "features.0.weight": torch.zeros(2, 3, 11, 11)}, file)
        what = "features.0.weight"
    elif problem == "other":
        save_file({key: t for key, t in linear.items() if not key.startswith("lin4")}, other)
        what = "weights.4"
    elif problem == "damaged":
        file.write_bytes(b"not safetensors")
        what = "cannot be read"
    else:
        file.unlink()
        what = "cannot be read"
    with pytest.raises(CheckpointError, match=what) as error:
        LPIPS("alex", WIDTH).load(file, other)
    assert error.value.where == str(other if problem == "other" else file)


@pytest.mark.parametrize("side", [4, 8, 16])
def test_a_hash_says_where_it_gets_darker(side):
    falling = PILImage.fromarray(np.tile(np.arange(255, -1, -1, dtype=np.uint8), (64, 1)))
    assert difference_hash(falling, side) == 2 ** (side * side) - 1
    assert difference_hash(falling.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT), side) == 0
    left = np.zeros((64, 64), dtype=np.uint8)
    left[: 64 // side, :32] = 255  # only the first row of cells has an edge
    bits = f"{difference_hash(PILImage.fromarray(left), side):0{side * side}b}"
    assert "1" in bits[:side]
    assert "1" not in bits[side:]


def test_a_look_survives_scaling_and_compression_and_another_picture_does_not(tmp_path):
    for seed in range(20):
        original = picture(seed, (320, 240))
        file = tmp_path / "a.jpg"
        original.resize((200, 150)).save(file, quality=70)
        with PILImage.open(file) as opened:
            same = hamming(difference_hash(original), difference_hash(opened))
        assert same <= 12
        assert hamming(difference_hash(original), difference_hash(picture(seed + 100, (320, 240)))) > 64
        brighter = PILImage.fromarray((np.asarray(original) * 0.5 + 60).astype(np.uint8))
        assert hamming(difference_hash(original), difference_hash(brighter)) <= 24


def test_hashes_of_even_pictures_tell_nothing_apart():
    white, black = (PILImage.new("RGB", (64, 64), colour) for colour in ("white", "black"))
    assert not tells_apart(difference_hash(white))
    assert tells_apart(difference_hash(picture(0)))
    found = hash_distances([white, black, picture(0), picture(0), picture(1)])
    assert found[0, 1] == 1
    assert found[2, 3] == 0
    assert 0.2 < found[2, 4] < 0.8
    assert (found == found.T).all()
    assert (found.diagonal() == 0).all()


def test_hamming_counts_bits():
    assert [hamming(a, b) for a, b in ((0, 0), (0b1011, 0b0010), (2**255, 0))] == [0, 2, 1]


def save_clip(folder: Path) -> tuple[object, object]:
    """A random CLIP, two layers of each, with a tokenizer of letters; and its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {token: i for i, token in enumerate([*letters, *(f"{x}</w>" for x in letters)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    side = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**side, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "projection_dim": 8}
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": 0}
    vision = {**side, "image_size": 32, "patch_size": 8, "projection_dim": 8}
    model = CLIPModel(CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=8)).eval()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPProcessor(CLIPImageProcessor(**sizes), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[Path, object, object]:
    folder = tmp_path_factory.mktemp("models") / "clip-nano"
    return folder, *save_clip(folder)


TEXTS = ["a red house", "the sea", "words that go on and on and on until no position is left for them"]


def test_cosines_are_those_of_the_model(clip):
    folder, model, processor = clip
    scorer = CLIP(folder)
    assert scorer.name == "clip-nano"
    pictures = [picture(seed) for seed in range(2)]
    found = scorer.cosines(pictures, TEXTS)
    assert found.shape == (2, 3)
    for i, one in enumerate(pictures):
        for j, text in enumerate(TEXTS):
            inputs = processor(text=[text], images=[one], return_tensors="pt", truncation=True)
            with torch.no_grad():
                out = model(**inputs)
            wanted = F.cosine_similarity(out.image_embeds, out.text_embeds).item()
            assert found[i, j].item() == pytest.approx(wanted, abs=1e-5)
    assert found.std() > 1e-3


def test_features_of_pictures_are_those_that_cosines_are_made_of(clip):
    folder, model, processor = clip
    pictures = [picture(seed) for seed in range(3)]
    features = CLIP(folder).picture_features(pictures)
    inputs = processor(text=["x"], images=pictures, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).image_embeds
    torch.testing.assert_close(features, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features @ CLIP(folder).text_features(TEXTS).T, CLIP(folder).cosines(pictures, TEXTS))
    distances = cosine_distances(features)
    # a unit vector's product with itself is 1 up to rounding
    torch.testing.assert_close(distances.diagonal(), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(distances[0, 1], 1 - F.cosine_similarity(wanted[:1], wanted[1:2])[0])


def test_a_cosine_needs_both(clip):
    for pictures, texts in (([], ["a"]), ([picture(0)], [])):
        with pytest.raises(UsageError, match="a picture and a text"):
            CLIP(clip[0]).cosines(pictures, texts)


def test_dino_gives_the_first_position(tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pictures = [picture(seed) for seed in range(3)]
    with torch.no_grad():
        wanted = model(**processor(pictures, return_tensors="pt")).last_hidden_state[:, 0]
    found = DINO(tmp_path).picture_features(pictures)
    torch.testing.assert_close(found, wanted / wanted.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [CLIP, DINO])
def test_a_folder_without_a_model_is_named(model, tmp_path):
    with pytest.raises(CheckpointError, match="can be read") as error:
        model(tmp_path)
    assert error.value.where == str(tmp_path)


def test_clip_score():
    cosines = torch.tensor([-0.5, 0.0, 0.24, 0.4])
    torch.testing.assert_close(clip_score(cosines), torch.tensor([0.0, 0.0, 0.6, 1.0]))
