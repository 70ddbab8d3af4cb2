"""Synchronisers in a U-Net: by hooks that leave no trace, and as in the released model where tensors of it exist."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from weft.errors import RoutingError, UsageError
from weft.ops.positions import grid_sin_cos, resize_table
from weft.synchronizer.attach import select
from weft.synchronizer.attach_unet import UNetSyncConfig, attach_to_unet
from weft.synchronizer.mmfs import FeatureBank
from weft.synchronizer.visibility import nearest_first

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "sd_unet_mmfs"
SHAPES = ((3, 3), (2, 2))
CONFIG = UNetSyncConfig(
    side=8, feature_width=6, value_width=8, heads=2, points=3, sides=(3, 2), max_images=4, offset_init=1.0
)
RENAMES = {"mmfs_module.": "", "mmfs_down_blocks.": "branches.", "mmfs_mid_block.": "branches.mid."}
"""Parts of released keys -> of ours."""


def our_key(key):
    for released, ours in RENAMES.items():
        key = key.replace(released, ours)
    return key


@pytest.fixture
def unet():
    """Skips: 8 channels of side 8, two of 8 and one halved, then two of 12."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 12), layers_per_block=2, norm_num_groups=4, cross_attention_dim=10,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


@pytest.fixture
def inputs():
    torch.manual_seed(2)
    return {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 10),
    }  # fmt: skip


@pytest.fixture
def bank():
    torch.manual_seed(3)
    return FeatureBank(torch.randn(2, 3, 13, 6), SHAPES)


@pytest.fixture
def visible():
    """The first sees two of three pictures, the second none."""
    return torch.tensor([[True, False, True], [False, False, False]])


def attached(unet, config=CONFIG, trained=True):
    torch.manual_seed(1)
    insertion = attach_to_unet(unet, config)
    if trained:
        for parameter in insertion.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return insertion


def run(unet, inputs, **more):
    return unet(**inputs, **more).sample


def test_a_fresh_insertion_and_its_removal_change_no_bit(unet, inputs, bank, visible):
    plain, keys = run(unet, inputs), unet.state_dict().keys()
    insertion = attached(unet, trained=False)
    insertion.set(bank, visible)
    assert torch.equal(run(unet, inputs), plain)
    for branch in insertion.branches.values():
        torch.nn.init.normal_(branch.conv.weight)
    assert not torch.allclose(run(unet, inputs)[0], plain[0], atol=1e-2)
    assert unet.state_dict().keys() == keys
    insertion.detach()
    assert torch.equal(run(unet, inputs), plain)


def test_there_is_one_branch_for_every_skip_and_one_for_the_middle(unet):
    branches = attached(unet).branches
    found = {name: (branch.mmfs.config.query_width, branch.mmfs.config.base) for name, branch in branches.items()}
    assert found == {
        "0": (8, 8), "1": (8, 8), "2": (8, 8), "3": (8, 4), "4": (12, 4), "5": (12, 4), "mid": (12, 4),
    }  # fmt: skip


def test_branches_add_to_skips_and_middle_once_before_the_way_up(unet, inputs, bank, visible):
    """The same additions as arguments of diffusers, which it adds at the same place."""
    insertion, skips, middle = attached(unet), [], []
    bare = [unet.conv_in.register_forward_hook(lambda _, __, out: skips.append(out))]
    bare += [down.register_forward_hook(lambda _, __, out: skips.extend(out[1])) for down in unet.down_blocks]
    bare += [unet.mid_block.register_forward_hook(lambda _, __, out: middle.append(out))]
    insertion.set(bank, visible)
    got = run(unet, inputs)
    for handle in bare:
        handle.remove()
    added = [insertion.run(str(i), skip) for i, skip in enumerate(skips)]
    added_to_middle = insertion.run("mid", middle[0])
    insertion.detach()
    wanted = run(
        unet, inputs, down_block_additional_residuals=tuple(added), mid_block_additional_residual=added_to_middle
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8)])
def test_a_cell_asks_with_its_position_and_from_its_centre(unet, bank, visible, size):
    """One branch put together by hand, in float64, cell by cell."""
    (rows, cols), branch = size, attached(unet).double().branches["4"]
    bank = FeatureBank(bank.features.double(), SHAPES)
    x = torch.randn(2, 12, rows, cols, dtype=torch.float64)
    got = branch(x, branch.project(bank), nearest_first(visible.unsqueeze(1)))
    features = FeatureBank(branch.feat_norm(bank.features), SHAPES)
    table = resize_table(grid_sin_cos(8, 8, 12), rows, cols, align_corners=False).view(rows, cols, 12)
    for i in range(rows):
        for j in range(cols):
            query = (branch.query_norm(x[:, :, i, j]) + table[i, j]).unsqueeze(1)
            centre = torch.tensor([[[(j + 0.5) / cols, (i + 0.5) / rows]]])
            wanted = branch.mmfs(query, features, visible, centre)[:, 0] @ branch.conv.weight[:, :, 0, 0].T
            wanted = (wanted + branch.conv.bias) * visible.any(1, keepdim=True)
            torch.testing.assert_close(got[:, :, i, j], wanted, rtol=0, atol=1e-6)  # places are float32


def test_a_picture_that_sees_none_gets_nothing_or_the_biases_alone(unet, inputs, bank, visible):
    plain = run(unet, inputs)
    insertion = attached(unet)
    insertion.set(bank, visible)
    got = run(unet, inputs)
    assert torch.equal(got[1], plain[1]) and not torch.allclose(got[0], plain[0], atol=1e-2)
    insertion.set_without_pictures()
    assert torch.equal(run(unet, inputs), plain)
    insertion.detach()
    released = attached(unet, CONFIG.model_copy(update={"without_images": "bias"}))
    released.set(bank, visible)
    biased = run(unet, inputs)
    assert torch.equal(biased[0], got[0]) and not torch.allclose(biased[1], plain[1], atol=1e-2)
    bank.features[1] += 1.0
    assert torch.equal(run(unet, inputs), biased)


@pytest.mark.parametrize("size", [(8, 8), (12, 4)])
def test_kept_values_serve_all_steps_and_sizes(unet, inputs, bank, visible, size):
    insertion, calls = attached(unet), []
    inputs["sample"] = torch.randn(2, 4, *size)
    insertion.branches["mid"].mmfs.value_proj.register_forward_hook(lambda *_: calls.append(1))
    kept = insertion.project(bank)
    insertion.set(kept, visible)
    steps = [run(unet, inputs) for _ in range(2)]
    assert len(calls) == 1
    insertion.set(bank, visible)
    assert torch.equal(run(unet, inputs), steps[0]) and torch.equal(*steps)


def test_guidance_shows_both_halves_the_same_pictures(unet, inputs, bank, visible):
    insertion, twice = attached(unet), torch.tensor([0, 1, 0, 1])
    insertion.set(bank, visible)
    once = run(unet, inputs)
    insertion.set(select(insertion.project(bank), twice), visible[twice])
    both = run(unet, {name: value[twice] for name, value in inputs.items()})
    torch.testing.assert_close(both, once[twice], rtol=0, atol=1e-5)  # other sizes are summed in another order


@pytest.mark.parametrize("reentrant", [True, False])
def test_only_the_insertion_trains_and_checkpointing_gives_the_same_gradients(unet, inputs, bank, visible, reentrant):
    insertion = attached(unet)
    unet.train().requires_grad_(False)

    def gradients():
        features, sample = bank.features.clone().requires_grad_(), inputs["sample"].clone().requires_grad_()
        insertion.zero_grad()
        insertion.set(FeatureBank(features, SHAPES), visible)
        run(unet, {**inputs, "sample": sample}).square().sum().backward()
        assert all(parameter.grad is None for parameter in unet.parameters())
        found = {name: parameter.grad.clone() for name, parameter in insertion.named_parameters()}
        return found | {"features": features.grad, "sample": sample.grad}

    plain = gradients()
    assert all(grad.any() for grad in plain.values())

    def checkpointed(function, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)

    unet.enable_gradient_checkpointing(checkpointed)
    calls = []
    unet.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients()
    assert len(calls) == 2  # it was run again
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-4)


def test_it_is_saved_alone_and_loaded_strictly(unet, inputs, bank, visible, tmp_path):
    insertion = attached(unet)
    insertion.set(bank, visible)
    wanted = run(unet, inputs)
    save_file(insertion.state_dict(), tmp_path / "sync.safetensors")
    insertion.detach()
    other = attached(unet, trained=False)
    other.load_state_dict(load_file(tmp_path / "sync.safetensors"), strict=True)
    other.set(bank, visible)
    assert torch.equal(run(unet, inputs), wanted)


def test_what_was_not_set_or_is_of_another_size_raises(unet, inputs, bank, visible):
    insertion = attached(unet)
    with pytest.raises(RoutingError, match="without being told what to read"):
        run(unet, inputs)
    insertion.set(FeatureBank(bank.features[:1], SHAPES), visible[:1])
    with pytest.raises(RoutingError, match="was set for 1 x 1 queries, the model was given 2 x 1"):
        run(unet, inputs)
    with pytest.raises(UsageError, match="Linear is no U-Net"):
        attach_to_unet(torch.nn.Linear(1, 1), CONFIG)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden tensors in {GOLDEN}")
def test_a_released_model_gives_its_outputs_and_gradients():
    weights, c = load_file(GOLDEN / "weights.safetensors"), json.loads((GOLDEN / "config.json").read_text())
    case = load_file(GOLDEN / "case_denoise.safetensors")
    unet = UNet2DConditionModel(**c["unet"]).eval()
    unet.load_state_dict({key[5:]: weight for key, weight in weights.items() if key.startswith("unet.")}, strict=True)
    unet.requires_grad_(False)
    inputs = {"timestep": case["in.timesteps"]}
    inputs["sample"] = case["in.noisy_latents"].requires_grad_()
    inputs["encoder_hidden_states"] = case["in.encoder_hidden_states"].requires_grad_()
    torch.testing.assert_close(run(unet, inputs), case["out.noise_pred_without_mmfs"], rtol=0, atol=1e-4)

    config = UNetSyncConfig(
        side=c["latent"], feature_width=c["input_channel"], value_width=c["block"]["attn_dim"],
        heads=c["block"]["num_heads"], points=c["mmfs_points"], sides=c["feats"], max_images=c["max_num_image_per_seq"],
        without_images="bias",
    )  # fmt: skip
    insertion = attach_to_unet(unet, config)
    inserted = {our_key(key): weight for key, weight in weights.items() if key.startswith("mmfs_module.")}
    tables = {key: inserted.pop(key) for key in list(inserted) if key.endswith(".pos_embed")}
    assert len(tables) == len(insertion.branches) == 13
    insertion.load_state_dict(inserted, strict=True)

    features = [case[f"in.mmfs_features.{i}"].requires_grad_() for i in range(c["n_levels"])]
    insertion.set(FeatureBank.of_maps(features), case["in.mmfs_mask"] > 0)
    for name in insertion.branches:
        of = "mid" if name == "mid" else f"down.{name}"
        before = case[f"aux.{of}_before"]
        torch.testing.assert_close(before + insertion.run(name, before), case[f"aux.{of}_after"], rtol=0, atol=1e-4)
    got = run(unet, inputs)
    torch.testing.assert_close(got, case["out.noise_pred"], rtol=0, atol=1e-4)

    (got * case["cot.noise_pred"]).sum().backward()
    found = {f"grad.param.{name}": parameter.grad for name, parameter in insertion.named_parameters()}
    found |= {f"grad.mmfs_features.{i}": scale.grad for i, scale in enumerate(features)}
    found["grad.noisy_latents"] = inputs["sample"].grad
    found["grad.encoder_hidden_states"] = inputs["encoder_hidden_states"].grad
    for key in (key for key in case if key.startswith("grad.")):
        wanted = case[key]
        torch.testing.assert_close(found[our_key(key)], wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
