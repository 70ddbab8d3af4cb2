"""The network of FID against a second computation by published names; what it refuses."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from weft.errors import CheckpointError
from weft.evaluation.metrics.inception import Inception, load_inception, pool


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """Random, under the published names; normalisation as well, and of a size that keeps values alive."""
    torch.manual_seed(3)
    made = {}
    for name, tensor in Inception().state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith(("bn.running_var", "bn.weight")):
            made[name] = torch.rand(tensor.shape) + 0.5
        elif name.endswith("conv.weight"):
            made[name] = torch.randn(tensor.shape) * (2 / tensor[0].numel()) ** 0.5
        else:
            made[name] = torch.randn(tensor.shape) * 0.1
    return made


def plain(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """Layer by layer, as the network is published, means over what lies inside of the picture."""

    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
        mean, var, scale, shift = (w[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 0.001).sqrt()
        return (x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).clamp_min(0)

    def inside_mean(x):
        count = F.avg_pool2d(torch.ones_like(x), 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1) / count

    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", 1, 1)
    x = F.max_pool2d(x, 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    for n in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        dbl = conv(conv(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", 1, 1), f"{n}.branch3x3dbl_3", 1, 1)
        five = conv(conv(x, f"{n}.branch5x5_1"), f"{n}.branch5x5_2", 1, 2)
        x = torch.cat((conv(x, f"{n}.branch1x1"), five, dbl, conv(inside_mean(x), f"{n}.branch_pool")), 1)
    n = "Mixed_6a"
    dbl = conv(conv(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", 1, 1), f"{n}.branch3x3dbl_3", 2)
    x = torch.cat((conv(x, f"{n}.branch3x3", 2), dbl, F.max_pool2d(x, 3, 2)), 1)
    wide, tall = (0, 3), (3, 0)
    for n in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven = conv(x, f"{n}.branch7x7_1")
        seven = conv(conv(seven, f"{n}.branch7x7_2", 1, wide), f"{n}.branch7x7_3", 1, tall)
        dbl = conv(x, f"{n}.branch7x7dbl_1")
        for i, padding in ((2, tall), (3, wide), (4, tall), (5, wide)):
            dbl = conv(dbl, f"{n}.branch7x7dbl_{i}", 1, padding)
        x = torch.cat((conv(x, f"{n}.branch1x1"), seven, dbl, conv(inside_mean(x), f"{n}.branch_pool")), 1)
    n = "Mixed_7a"
    three = conv(conv(x, f"{n}.branch3x3_1"), f"{n}.branch3x3_2", 2)
    seven = conv(conv(x, f"{n}.branch7x7x3_1"), f"{n}.branch7x7x3_2", 1, wide)
    seven = conv(conv(seven, f"{n}.branch7x7x3_3", 1, tall), f"{n}.branch7x7x3_4", 2)
    x = torch.cat((three, seven, F.max_pool2d(x, 3, 2)), 1)
    for n, pooled in (("Mixed_7b", inside_mean), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        three = conv(x, f"{n}.branch3x3_1")
        three = [conv(three, f"{n}.branch3x3_2a", 1, (0, 1)), conv(three, f"{n}.branch3x3_2b", 1, (1, 0))]
        dbl = conv(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", 1, 1)
        dbl = [conv(dbl, f"{n}.branch3x3dbl_3a", 1, (0, 1)), conv(dbl, f"{n}.branch3x3dbl_3b", 1, (1, 0))]
        x = torch.cat((conv(x, f"{n}.branch1x1"), *three, *dbl, conv(pooled(x), f"{n}.branch_pool")), 1)
    return x.flatten(2).mean(2)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_published_names_load_and_compute_what_is_published(suffix, published, tmp_path):
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        counts = {name.replace("weight", "num_batches_tracked"): torch.tensor(0) for name in published if
                  name.endswith("bn.weight")}  # fmt: skip
        # the published file is older than torch's archives
        torch.save({**published, **counts}, file, _use_new_zipfile_serialization=False)
    else:
        save_file(published, file)
    network = load_inception(file)
    pixels = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = network(pixels)
    assert found.shape == (1, 2048)
    # one rounding per layer apart, after 94 convolutions
    torch.testing.assert_close(found, plain(pixels, published), rtol=2e-3, atol=2e-4)
    assert found.std() > 1e-2
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_the_names_and_sizes_are_the_published_ones(published):
    sizes = {name: tuple(tensor.shape) for name, tensor in published.items()}
    assert len(sizes) == 94 * 5 + 2
    assert sizes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert sizes["Mixed_5b.branch_pool.conv.weight"] == (32, 192, 1, 1)
    assert sizes["Mixed_6c.branch7x7dbl_5.conv.weight"] == (192, 160, 1, 7)
    assert sizes["Mixed_7a.branch7x7x3_4.bn.running_var"] == (192,)
    assert sizes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert sizes["fc.weight"] == (1008, 2048)


def test_means_leave_out_what_lies_outside():
    assert pool(torch.ones(1, 1, 3, 4), "mean").eq(1).all()
    assert pool(-torch.ones(1, 1, 3, 4), "max").eq(-1).all()
    assert pool(torch.arange(9.0).view(1, 1, 3, 3), "mean")[0, 0, 0, 0] == (0 + 1 + 3 + 4) / 4


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda w: {**w, "fc.weight": torch.zeros(1000, 2048)}, r"fc.weight is \(1000, 2048\), not \(1008, 2048\)"),
        (lambda w: {**w, "AuxLogits.fc.bias": torch.zeros(3)}, r"AuxLogits.fc.bias is \(3,\), not none"),
        (lambda w: {k: t for k, t in w.items() if k != "Mixed_7c.branch1x1.bn.bias"}, "branch1x1.bn.bias is none"),
    ],
)  # fmt: skip
def test_another_networks_weights_are_refused_by_name_and_shape(change, told, published, tmp_path):
    save_file(change(published), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=told) as caught:
        load_inception(tmp_path / "w.safetensors")
    assert "torchvision" in str(caught.value)


def test_a_file_that_is_none_or_holds_code_is_refused(tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"not a pickle")
    (tmp_path / "broken.safetensors").write_bytes(b"not safe")
    torch.save({"fc": Inception}, tmp_path / "code.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name in ("none.pth", "none.safetensors", "broken.pth", "broken.safetensors", "code.pth", "list.pth"):
        with pytest.raises(CheckpointError, match=name):
            load_inception(tmp_path / name)
