"""The synchroniser against golden tensors of the released code and against that code's formulation, written anew here.

Golden and oracle comparisons are in float64; gradients too.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from weft.errors import ConfigError, UsageError
from weft.synchronizer.mmfs import FeatureBank, FeatureSynchronizer, MMFSConfig
from weft.synchronizer.visibility import nearest_first

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "mmfs"
CASES = (
    "interleaved", "packed_documents", "sequence_mask", "single_step", "nonsquare_grid_refs", "box_refs",
    "pixel_padding", "nonzero_ignore_token",
)  # fmt: skip
SMALL = MMFSConfig(
    query_width=12, feature_width=10, value_width=8, out_width=9, heads=4, points=3, sides=(6, 4, 2), base=4,
    max_images=7, offset_init=3.0,
)  # fmt: skip
SQUARE = tuple((side, side) for side in SMALL.sides)
each_form = pytest.mark.parametrize("form", ["reference", "bags", "rows"])


def released(module: FeatureSynchronizer, queries, features, shapes, visible, points) -> Tensor:
    """As the released model computes: queries expanded picture by picture, every picture sampled, values anew.

    points (B or 1, Q, 2); visible (B, Q, N).
    """
    c, (batch, count, _), images = module.config, queries.shape, features.shape[1]
    h, s, k = c.heads, len(c.sides), c.points
    index = visible * visible.flip(2).cumsum(2).flip(2)
    value = module.value_proj(features.flatten(1, 2)).unflatten(2, (h, -1))
    z = module.dynamic_offset_mask(queries.unsqueeze(2).repeat(1, 1, images, 1)) + module.query_relpos(index)
    offsets = module.sampling_offsets(z).view(batch, count, images, h, 1, k, 2).repeat(1, 1, 1, 1, s, 1, 1)
    logits = module.attention_weights(z).view(batch, count, images, h, s, k + 1)
    null = torch.full_like(logits[..., -1:], -math.log(images * s))
    logits = logits[..., :-1] + (~visible)[..., None, None, None] * -10000.0
    logits = torch.cat((logits, null), -1).permute(0, 1, 3, 2, 4, 5)
    weights = logits.flatten(3).softmax(-1).view(batch, count, h, images * s, k + 1)
    ratio = torch.tensor([side / c.base for side in c.sides], dtype=offsets.dtype)
    size = torch.tensor([(cols, rows) for rows, cols in shapes], dtype=offsets.dtype)
    at = points[:, :, None, None, None, None] + offsets * ratio[:, None, None] / size[:, None]
    at = at.permute(0, 1, 3, 2, 4, 5, 6).flatten(3, 4)
    found = []
    for i, (maps, shape) in enumerate(
        zip(value.split([r * c for r, c in shapes] * images, 1), shapes * images, strict=True)
    ):
        maps = maps.permute(0, 2, 3, 1).reshape(batch * h, -1, *shape)
        grid = 2 * at[:, :, :, i].transpose(1, 2).flatten(0, 1) - 1
        found.append(F.grid_sample(maps, grid, align_corners=False))
    shares = weights[..., :-1].transpose(1, 2).reshape(batch * h, 1, count, -1)
    out = (torch.stack(found, -2).flatten(-2) * shares).sum(-1).unflatten(0, (batch, h)).permute(0, 3, 1, 2)
    out = out + weights[..., -1].sum(3, keepdim=True) * module.ignore_token.view(h, -1)
    return module.output_proj(out.flatten(2))


def make(config: MMFSConfig = SMALL, seed: int = 0, *, null: bool = False) -> FeatureSynchronizer:
    """Every parameter random, so that nothing is hidden by a zero."""
    module = FeatureSynchronizer(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        if null:
            module.ignore_token.copy_(torch.randn(module.ignore_token.shape, generator=generator))
    return module


class Inputs:
    def __init__(self, *, batch=2, queries=5, images=4, shapes=SQUARE, seed=0, config=SMALL) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.queries = draw(batch, queries, config.query_width)
        self.features = draw(batch, images, sum(rows * cols for rows, cols in shapes), config.feature_width)
        self.points = torch.rand(batch, queries, 2, generator=generator, dtype=torch.float64).requires_grad_()
        self.visible = torch.rand(batch, queries, images, generator=generator) < 0.6
        self.bank = FeatureBank(self.features, shapes)

    def read(self, module: FeatureSynchronizer, **kwargs) -> Tensor:
        return module(self.queries, self.bank, self.visible, self.points, **kwargs)


@each_form
@pytest.mark.parametrize("case", CASES)
def test_golden(case, form):
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden tensors in {GOLDEN}")
    from safetensors.torch import load_file

    of = json.loads((GOLDEN / "config.json").read_text())
    module = FeatureSynchronizer(
        MMFSConfig(
            of["d_query"], of["d_value"], int(of["d_model"] * of["ratio"]), of["d_out"], of["n_heads"], of["n_points"],
            tuple(of["spatial_shapes"]), of["base_spatial_shape"], of["max_num_image_per_seq"],
            of["offset_init_magnitude"], without_images="bias",
        )
    ).double()  # fmt: skip
    weights = load_file(GOLDEN / "weights.safetensors")
    if case == "nonzero_ignore_token":
        weights |= load_file(GOLDEN / "weights_ignore_token.safetensors")
    module.load_state_dict(weights)
    tensors = load_file(GOLDEN / f"case_{case}.safetensors")
    queries, features, points = (
        tensors[f"in.{name}"].requires_grad_() for name in ("query", "input_flatten", "reference_points")
    )
    shapes = tuple((rows, cols) for rows, cols in tensors["in.input_spatial_shapes"][: of["n_levels"]].tolist())
    padding = tensors.get("in.input_padding_mask")
    visible = tensors["in.attention_mask"].bool()
    if visible.dim() == 3:  # a step of decoding takes the last row
        visible = visible[:, -queries.shape[1] :]
    bank = FeatureBank(features, shapes, None if padding is None else padding.bool())
    out = module(queries, bank, visible, points, impl=form)
    torch.testing.assert_close(out, tensors["out.output"], rtol=1e-9, atol=1e-10)
    (out * tensors["cot.output"]).sum().backward()
    learnt = {f"param.{name}": parameter for name, parameter in module.named_parameters()}
    learnt |= {"query": queries, "input_flatten": features, "reference_points": points}
    assert {f"grad.{name}" for name in learnt} == {name for name in tensors if name.startswith("grad.")}
    for name, tensor in learnt.items():
        wanted = tensors[f"grad.{name}"]
        torch.testing.assert_close(tensor.grad, wanted, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@each_form
@pytest.mark.parametrize("shapes", [SQUARE, ((5, 7), (3, 4), (1, 2))], ids=["square", "other"])
@pytest.mark.parametrize("seed", range(3))
def test_the_affine_form_is_the_released_formulation(seed, shapes, form):
    module = make(dataclasses.replace(SMALL, without_images="bias"), seed, null=True)
    inputs = Inputs(shapes=shapes, seed=seed)
    learnt = [inputs.queries, inputs.features, inputs.points, *module.parameters()]
    names = ["queries", "features", "points", *(name for name, _ in module.named_parameters())]
    got = inputs.read(module, impl=form)
    wanted = released(module, inputs.queries, inputs.features, shapes, inputs.visible, inputs.points)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = zip(torch.autograd.grad(got, learnt, weight), torch.autograd.grad(wanted, learnt, weight), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@each_form
def test_a_picture_that_is_not_seen_counts_nothing(form):
    module, inputs = make(), Inputs()
    inputs.visible[:, :, 1] = False
    out = inputs.read(module, impl=form)
    (dfeatures,) = torch.autograd.grad(out.sum(), inputs.features)
    assert not dfeatures[:, 1].any()
    with torch.no_grad():
        inputs.features[:, 1] = 1e6
    assert inputs.read(module, impl=form).equal(out)


def test_what_stands_for_a_missing_picture_is_never_read():
    module, inputs = make(), Inputs()
    inputs.visible[:, :, 1] = False
    out = inputs.read(module)
    with torch.no_grad():
        inputs.features[:, 1] = torch.nan
    assert inputs.read(module).equal(out)


@each_form
@pytest.mark.parametrize("without_images", ["zero", "bias"])
@pytest.mark.parametrize("all_blind", [False, True])
def test_a_query_that_sees_no_picture(without_images, all_blind, form):
    module, inputs = make(dataclasses.replace(SMALL, without_images=without_images)), Inputs()
    inputs.visible[0, 2] = inputs.visible[1, 4] = False
    if all_blind:
        inputs.visible[:] = False
    out = inputs.read(module, impl=form)
    wanted = torch.zeros_like(out[0, 0]) if without_images == "zero" else module.output_proj.bias
    blind = ~inputs.visible.any(2)
    assert out[blind].equal(wanted.expand(int(blind.sum()), -1))
    assert out[~blind].abs().amin(1).gt(0).all()
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in (*module.parameters(), inputs.queries))
    if all_blind and without_images == "zero":
        assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("without_images", ["zero", "bias"])
def test_a_batch_without_any_picture(without_images):
    module, inputs = make(dataclasses.replace(SMALL, without_images=without_images)), Inputs(images=0)
    wanted = 0 if without_images == "zero" else module.output_proj.bias
    assert inputs.read(module).equal(torch.zeros(2, 5, 9, dtype=torch.float64) + wanted)


def test_zero_logits_leave_the_null_slot_one_share_of_all():
    module = make(dataclasses.replace(SMALL, offset_init=0.0))
    with torch.no_grad():
        for linear in (module.attention_weights, module.sampling_offsets, module.value_proj, module.output_proj):
            linear.weight.zero_()
            linear.bias.zero_()
        module.value_proj.bias.fill_(1.0)
        module.output_proj.weight.copy_(torch.eye(9, 8))
    for seen in (1, 2, 4):
        for images in (4, 6):  # missing pictures change nothing
            inputs = Inputs(images=images)
            inputs.visible = (torch.arange(images) < seen).expand(2, 5, -1)
            with torch.no_grad():
                inputs.points.fill_(0.5)
            shares = seen * 3 * 3  # scales x points
            torch.testing.assert_close(
                inputs.read(module)[..., :8], torch.tensor(shares / (shares + 1), dtype=torch.float64).expand(2, 5, 8)
            )


def test_missing_pictures_change_nothing():
    module, inputs = make(), Inputs()
    out = inputs.read(module)
    padded = FeatureBank(F.pad(inputs.features, (0, 0, 0, 0, 0, 3)), SQUARE)
    torch.testing.assert_close(
        module(inputs.queries, padded, F.pad(inputs.visible, (0, 3)), inputs.points), out, rtol=0, atol=1e-13
    )


def test_projected_once_and_read_token_by_token():
    module, inputs = make(), Inputs()
    whole, projected = inputs.read(module), module.project(inputs.bank)
    for t in range(5):
        now = slice(t, t + 1)
        step = module(inputs.queries[:, now], projected, inputs.visible[:, now], inputs.points[:, now])
        torch.testing.assert_close(step, whole[:, now], rtol=0, atol=1e-13)


def test_no_query_reads_another_and_none_a_picture_it_does_not_see():
    module, inputs = make(), Inputs(queries=6, images=3)
    inputs.visible = (torch.arange(3) < torch.tensor([0, 1, 1, 2, 3, 3]).unsqueeze(1)).expand(2, -1, -1)
    out = inputs.read(module)
    for cut in range(6):
        changed = Inputs(queries=6, images=3)
        changed.visible = inputs.visible
        with torch.no_grad():
            changed.queries[:, cut + 1 :] += 1.0
            changed.features[:, int(inputs.visible[0, cut].sum()) :] += 1.0
        assert changed.read(module)[:, : cut + 1].equal(out[:, : cut + 1])


def test_one_answer_for_all_queries_and_lists_made_before():
    module, inputs = make(), Inputs()
    alike = inputs.visible[:, 0]
    inputs.visible = alike.unsqueeze(1).expand(-1, 5, -1)
    out = inputs.read(module)
    for visible in (alike, nearest_first(inputs.visible), nearest_first(alike.unsqueeze(1))):
        assert module(inputs.queries, inputs.bank, visible, inputs.points).equal(out)


def test_one_reference_point_for_all():
    module, inputs = make(), Inputs()
    centre = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
    inputs.points = centre.expand(2, 5, 2)
    assert module(inputs.queries, inputs.bank, inputs.visible, centre).equal(inputs.read(module))


def test_maps_are_laid_out_scale_by_scale_row_by_row():
    maps = [torch.randn(2, 3, 10, rows, cols) for rows, cols in ((3, 5), (2, 1))]
    bank = FeatureBank.of_maps(maps)
    assert bank.shapes == ((3, 5), (2, 1))
    assert bank.features[1, 2, 7].equal(maps[0][1, 2, :, 1, 2])
    assert bank.features[1, 2, 16].equal(maps[1][1, 2, :, 1, 0])


def test_a_new_synchroniser_samples_where_no_query_has_a_say():
    module, inputs = FeatureSynchronizer(SMALL).double(), Inputs()
    pictures = nearest_first(inputs.visible)
    offsets, _ = module._offsets_and_logits(inputs.queries, pictures, module.project(inputs.bank))
    assert offsets.equal(
        module.sampling_offsets.bias.view(4, 1, 3, 2).expand_as(offsets.transpose(2, 3)).transpose(2, 3)
    )
    assert offsets.abs().max() <= 3.0
    # the same places of the picture in every scale
    points = module._points(inputs.points, offsets, pictures, SQUARE)
    assert points.shape == (2, 5, 4, pictures.shape[2], 1, 3, 2)
    assert not module.ignore_token.any()
    assert {name for name, _ in module.named_parameters()} == set(module.state_dict()) - {"ignore_token"}


def test_parameters_of_the_full_size():
    with torch.device("meta"):
        module = FeatureSynchronizer(MMFSConfig(5120, 1024, 1024, 5120, 16, 8, (32, 16, 8), 16, 50, 3.0))
    gate_and_norms = 1 + 5120 + 1024
    assert round((sum(p.numel() for p in module.parameters()) + gate_and_norms) / 1e6, 2) == 36.30


@each_form
def test_bfloat16_stays_near(form):
    module, inputs = make(), Inputs()
    wanted = inputs.read(module)
    half = module.bfloat16()
    bank = FeatureBank(inputs.features.bfloat16(), SQUARE)
    got = half(inputs.queries.bfloat16(), bank, inputs.visible, inputs.points.float(), impl=form)
    assert got.dtype == torch.bfloat16
    # offsets near 1 with 8 bits move a sample by a hundredth of a cell
    assert (got - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda i: setattr(i, "visible", i.visible[:, :3]), "`visible`"),
        (lambda i: setattr(i, "visible", i.visible[:, :, :3]), "`visible`"),
        (lambda i: setattr(i, "bank", FeatureBank(i.features[:1], SQUARE)), "pictures"),
        (lambda i: setattr(i, "bank", FeatureBank(i.features[..., :5], SQUARE)), "10 wide"),
        (lambda i: setattr(i, "bank", FeatureBank(i.features, SQUARE[:2])), "in 2 scales"),
        (lambda i: setattr(i, "bank", FeatureBank(i.features, ((6, 6), (4, 4), (2, 3)))), "value, axis 2"),
        (lambda i: setattr(i, "points", torch.zeros(2, 5, 2, 2)), "reference points"),
    ],
)
def test_sizes_that_disagree_are_named(change, named):
    inputs = Inputs()
    change(inputs)
    with pytest.raises(UsageError, match=named):
        inputs.read(make())


def test_more_pictures_than_there_are_places_for():
    inputs = Inputs(images=8)
    inputs.visible = torch.ones(2, 5, 8, dtype=torch.bool)
    with pytest.raises(UsageError, match="8 pictures, this synchroniser counts to 6"):
        inputs.read(make())
    inputs.visible[..., :2] = False
    assert inputs.read(make()).shape == (2, 5, 9)


def test_heads_that_do_not_divide_the_values():
    with pytest.raises(ConfigError, match="8 is not divisible by 3"):
        dataclasses.replace(SMALL, heads=3)
