"""A synchroniser put on a model that was made without one: it changes nothing until trained, and leaves no trace."""

import json
import shutil

import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import nn

from weft.adapters import AdapterConfig, adapter_parameters, attach, detach
from weft.backbones import load_backbone
from weft.backbones.base import encode_document
from weft.backbones.trained import load_trained
from weft.config import load_config
from weft.data.collate import collate
from weft.document import Document, Image, assistant, user
from weft.errors import AdapterError, ConfigError, RoutingError, UsageError
from weft.images import encode_png
from weft.synchronizer import (
    SynchronizerConfig,
    attach_synchronizer,
    detach_synchronizer,
    load_synchronizer,
    save_synchronizer,
    synchronizer_parameters,
)
from weft.synchronizer.eye import Eye, EyeConfig
from weft.synchronizer.sight import Synchronizer, see

NAMES = ["nano", "nano-chameleon", "nano-janus", "nano-emu3", "nano-emu2"]
CONFIG = SynchronizerConfig(
    eye=EyeConfig(side=16, width=8, stem=4, scales=2), every=2, value_width=8, heads=2, points=2
)


def picture(colour):
    return Image(encode_png(PILImage.new("RGB", (20, 20), colour)))


def story(second="blue"):
    return Document((user("look", picture("red")), assistant("so", picture(second), "and", picture("green"), "end")))


def batch_of(backbone, document):
    return collate([encode_document(backbone, document)], backbone.tokens.pad)


def hidden(backbone, document=None):
    """(L, D) of the decoder stack, as `Objective` runs it."""
    batch = batch_of(backbone, document or story())
    layout, synchronizer = batch.layout, backbone.synchronizer
    if synchronizer is not None:
        layout, _, _ = see(synchronizer, batch.pictures.seen, batch.ids, layout, backbone.tokens.begin)
    return backbone.forward(backbone.embed(batch.ids, layout, batch.features), layout)[0]


def trained(backbone, seed=1):
    """As if it had been."""
    torch.manual_seed(seed)
    for parameter in synchronizer_parameters(backbone).values():
        nn.init.normal_(parameter, std=0.4)


@pytest.fixture
def nano():
    backbone = load_backbone("nano")
    attach_synchronizer(backbone, CONFIG)
    trained(backbone)
    return backbone


@pytest.mark.parametrize("adapter", ["none", "before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_one_and_its_removal_change_no_bit(name, adapter):
    backbone = load_backbone(name)
    keys, plain = list(backbone.state_dict()), hidden(backbone)
    if adapter == "before":
        attach(backbone, AdapterConfig(rank=2))
    attach_synchronizer(backbone, CONFIG)
    if adapter == "after":
        attach(backbone, AdapterConfig(rank=2))
    assert torch.equal(hidden(backbone), plain)
    trained(backbone)
    assert (hidden(backbone) - plain).abs().max() > 1e-3
    if adapter == "none":
        assert list(backbone.state_dict()) == keys
    else:
        detach(backbone)
        assert (hidden(backbone) - plain).abs().max() > 1e-3
    detach_synchronizer(backbone)
    assert torch.equal(hidden(backbone), plain)
    assert list(backbone.state_dict()) == keys


def test_neither_finds_the_other(nano):
    """An adapter for all linear layers takes none of the branches', and freezes none."""
    attach(nano, AdapterConfig(rank=2))
    assert not any("mmfs" in name for name in adapter_parameters(nano))
    assert all(parameter.requires_grad for parameter in synchronizer_parameters(nano).values())
    assert not {id(p) for p in synchronizer_parameters(nano).values()} & {id(p) for p in nano.parameters()}


def test_an_adapter_that_trains_norms_comes_first():
    backbone = load_backbone("nano")
    plain = hidden(backbone)
    attach(backbone, AdapterConfig(kind="full"))
    attach_synchronizer(backbone, CONFIG)
    trained(backbone)
    assert (hidden(backbone) - plain).abs().max() > 1e-3
    detach_synchronizer(backbone)
    detach(backbone)
    assert torch.equal(hidden(backbone), plain)
    attach_synchronizer(backbone, CONFIG)
    attach(backbone, AdapterConfig(kind="full"))
    with pytest.raises(UsageError):  # and never quietly without its branches
        hidden(backbone)


def test_what_stands_before_a_picture_does_not_change_with_it(nano):
    ids = batch_of(nano, story()).ids[0].tolist()
    begin = [place for place, id in enumerate(ids) if id == nano.tokens.begin_image][1]
    # its codes are those of another picture too; what follows its end changes through the pixels as well
    one, other = (hidden(nano, story(colour)) for colour in ("blue", "yellow"))
    assert torch.equal(one[: begin + 1], other[: begin + 1])
    assert not torch.equal(one[-1], other[-1])


def test_saved_alone_and_loaded_it_gives_the_same_bits(nano, tmp_path):
    save_synchronizer(nano, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["synchronizer.safetensors", "synchronizer_config.json"]
    fresh = load_backbone("nano")
    load_synchronizer(fresh, tmp_path)
    assert torch.equal(hidden(fresh), hidden(nano))
    found = synchronizer_parameters(fresh)
    assert list(found) == list(synchronizer_parameters(nano))
    assert not any(parameter.requires_grad for parameter in found.values())
    again = tmp_path / "again"
    again.mkdir()
    save_synchronizer(fresh, again)
    for file in again.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def without(name):
    return lambda folder: (folder / name).unlink()


def tensors(change):
    def apply(folder):
        file = folder / "synchronizer.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file)

    return apply


def config(change):
    def apply(folder):
        file = folder / "synchronizer_config.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return apply


DAMAGES = {
    "no config": (without("synchronizer_config.json"), "no synchronizer_config.json"),
    "no tensors": (without("synchronizer.safetensors"), "cannot be read"),
    "cut tensors": (
        lambda folder: (folder / "synchronizer.safetensors").write_bytes(
            (folder / "synchronizer.safetensors").read_bytes()[:-5]
        ),
        "cannot be read",
    ),
    "no JSON": (lambda folder: (folder / "synchronizer_config.json").write_text("{"), "cannot be read"),
    "an unknown key": (config(lambda values: values["synchronizer"].update(rank=8)), "rank"),
    "no base": (config(lambda values: values.pop("base")), "base"),
    "other weights": (config(lambda values: values["base"].update(fingerprint="0" * 64)), "other weights"),
    "one tensor fewer": (tensors(lambda found: found.pop("branches.0.gate")), "branches.0.gate is missing"),
    "one tensor more": (tensors(lambda found: found.update(stray=torch.ones(1))), "stray is not"),
    "another shape": (tensors(lambda found: found.update({"branches.0.gate": torch.ones(2)})), "branches.0.gate has"),
    "other sizes": (config(lambda values: values["synchronizer"].update(value_width=16)), "asks for"),
    "not finite": (tensors(lambda found: found["branches.0.gate"].fill_(torch.nan)), "not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_folder_is_refused_by_name(nano, tmp_path, damage):
    save_synchronizer(nano, tmp_path)
    spoil, said = DAMAGES[damage]
    spoil(tmp_path)
    fresh = load_backbone("nano")
    plain = hidden(fresh)
    with pytest.raises(AdapterError, match=said) as caught:
        load_synchronizer(fresh, tmp_path)
    assert str(tmp_path) in caught.value.where
    assert fresh.synchronizer is None
    assert torch.equal(hidden(fresh), plain)


def test_one_trained_on_another_model_is_refused(nano, tmp_path):
    save_synchronizer(nano, tmp_path)
    with pytest.raises(AdapterError, match="trained on nano with other weights than this nano-emu2"):
        load_synchronizer(load_backbone("nano-emu2"), tmp_path)


def test_a_folder_does_not_load_as_less_than_it_was(nano, tmp_path):
    """Written whole, with a manifest, as training does."""
    from weft.adapters import save_adapter
    from weft.atomic import write_folder

    attach(nano, AdapterConfig(rank=2))
    with write_folder(tmp_path / "adapter") as staging:
        save_adapter(nano, staging)
        (staging / "synchronizer").mkdir()
        save_synchronizer(nano, staging / "synchronizer")
    whole = load_backbone("nano")
    load_trained(whole, tmp_path / "adapter")
    assert torch.equal(hidden(whole), hidden(nano))
    shutil.rmtree(tmp_path / "adapter" / "synchronizer")
    with pytest.raises(AdapterError, match="no synchronizer/synchronizer"):
        load_trained(load_backbone("nano"), tmp_path / "adapter")


def test_there_is_one_at_most(nano):
    with pytest.raises(AdapterError, match="already has a synchroniser") as caught:
        attach_synchronizer(nano, CONFIG)
    assert "detach" in caught.value.fix
    nano.synchronizer = Synchronizer(nano.synchronizer.eye, nano.synchronizer.insertion, 16)
    with pytest.raises(AdapterError, match="already has a synchroniser") as caught:
        attach_synchronizer(nano, CONFIG)
    assert "parts" in caught.value.fix
    for ask in (detach_synchronizer, synchronizer_parameters):
        with pytest.raises(AdapterError, match="no attached synchroniser"):
            ask(nano)


def test_the_seed_decides_the_start_and_the_caller_s_random_numbers_are_left_alone():
    starts = []
    for seed in (0, 0, 1):
        backbone = load_backbone("nano")
        torch.manual_seed(len(starts))
        before = torch.random.get_rng_state()
        attach_synchronizer(backbone, CONFIG, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        starts.append({name: p.clone() for name, p in synchronizer_parameters(backbone).items()})
    assert all(torch.equal(starts[0][name], tensor) for name, tensor in starts[1].items())
    assert not all(torch.equal(starts[0][name], tensor) for name, tensor in starts[2].items())


def gradients(backbone, form):
    """Of the synchroniser, from the sum of squares of the stack's states."""
    if form != "off":
        backbone.decoder.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": form == "reentrant"}
        )
    backbone.decoder.train()
    calls = []
    backbone.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    batch = batch_of(backbone, story())
    layout, _, _ = see(backbone.synchronizer, batch.pictures.seen, batch.ids, batch.layout, backbone.tokens.begin)
    embeds = backbone.embed(batch.ids, layout, batch.features).requires_grad_(True)
    backbone.forward(embeds, layout).square().sum().backward()
    assert len(calls) == (1 if form == "off" else 2)
    return {name: parameter.grad for name, parameter in synchronizer_parameters(backbone).items()}


def fresh_nano(frozen_eye=False):
    backbone = load_backbone("nano")
    attached = attach_synchronizer(backbone, CONFIG)
    trained(backbone)
    attached.eye.requires_grad_(not frozen_eye)
    return backbone


def test_gradients_reach_eye_and_branches_through_checkpointing():
    plain = gradients(fresh_nano(), "off")
    again = gradients(fresh_nano(), "non-reentrant")
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name
        assert gradient.abs().max() > 0, name


def test_reentrant_checkpointing_is_for_an_eye_that_does_not_learn():
    plain, again = (gradients(fresh_nano(frozen_eye=True), form) for form in ("off", "reentrant"))
    for name, gradient in plain.items():
        if name.startswith("eye."):
            assert gradient is None and again[name] is None
        else:
            assert torch.equal(again[name], gradient), name
    with pytest.raises(RoutingError, match="reentrant") as caught:
        gradients(fresh_nano(), "reentrant")
    assert "use_reentrant=False" in caught.value.fix


@pytest.mark.parametrize(("side", "scales", "sides"), [(16, 1, (4,)), (24, 2, (6, 3)), (64, 3, (16, 8, 4))])
def test_the_eye_gives_normalised_maps_that_know_their_places(side, scales, sides):
    eye = Eye(EyeConfig(side=side, width=8, stem=4, scales=scales))
    looks = eye(torch.full((2, 3, side, side), 0.5))
    assert eye.config.sides == tuple(scale.shape[2] for scale in looks.maps) == sides
    assert looks.tokens is None
    for scale in looks.maps:
        assert scale.shape[1:] == (8, *scale.shape[2:3] * 2)
        cells = scale[0].flatten(1).T
        # a picture of one colour: inside, only the place tells cells apart
        assert len(cells.unique(dim=0)) == len(cells)
        assert torch.equal(scale[0], scale[1])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(RoutingError, match="pixels of shape"):
        Eye(EyeConfig(side=16, scales=1))(torch.zeros(1, 3, 16, 12))
    for key, value, said in (("side", 40, "multiple of 16"), ("width", 6, "multiple of 4"), ("sid", 8, "unknown key")):
        with pytest.raises(ConfigError, match=said):
            load_config(EyeConfig, overrides={key: value})
