"""Every mode of training that a recipe can ask for: full fine-tuning, two weight sets, isolated gradients."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from weft.adapters import AdapterConfig, adapter_parameters, attach, load_adapter
from weft.adapters.gradients import backward_by_modality
from weft.backbones import load_backbone
from weft.data.collate import collate
from weft.document import Document, user
from weft.errors import AdapterError
from weft.generation import SamplingConfig, generate
from weft.layout import ImageSpan, TextSpan, lay_out
from weft.training import build, steps, train

LAYOUT = lay_out([[TextSpan(3), ImageSpan(2, 2), TextSpan(4)], [TextSpan(6)]])
IDS = torch.randint(6, 250, LAYOUT.shape, generator=torch.Generator().manual_seed(0))


def trajectory(backbone, parameters, updates: int) -> tuple[list[float], torch.Tensor]:
    """Losses of Adam on some weights, and the logits at the end."""
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(updates):
        logits = backbone.head(backbone.forward(backbone.embed(IDS, LAYOUT), LAYOUT))
        loss = F.cross_entropy(logits[:, :-1][LAYOUT.is_real[:, 1:]], IDS[:, 1:][LAYOUT.is_real[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, backbone.head(backbone.forward(backbone.embed(IDS, LAYOUT), LAYOUT))


# float64 sums of the norms are float32 inside the stack; float32 rounds W0 + dW and each product anew
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("norms", [True, False], ids=["all weights", "linears alone"])
def test_full_is_training_the_weights_themselves(dtype, tolerance, norms):
    real, ours = load_backbone("nano").to(dtype), load_backbone("nano").to(dtype)
    chosen = [p for name, p in real.decoder.named_parameters() if norms or "norm" not in name]
    for parameter in chosen:
        parameter.requires_grad_(True)
    attach(ours, AdapterConfig(kind="full", modules_to_save=None if norms else []))
    wanted, got = (
        trajectory(backbone, parameters, updates=15)
        for backbone, parameters in ((real, chosen), (ours, list(adapter_parameters(ours).values())))
    )
    assert wanted[0][-1] < 0.7 * wanted[0][0], "it learns"
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(wanted[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], wanted[1], rtol=0, atol=tolerance)


def test_two_weight_sets_with_one_update_are_one_and_each_trains_its_own():
    one, two = load_backbone("nano"), load_backbone("nano")
    attach(one, AdapterConfig(kind="full"))
    attach(two, AdapterConfig(kind="full_two"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter_parameters(one).items():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
        for other in ("moss_text_", "moss_image_"):
            adapter_parameters(two)[name.replace("moss_text_", other)].data.copy_(parameter)
    with torch.no_grad():
        first, second = (b.forward(b.embed(IDS, LAYOUT), LAYOUT) for b in (one, two))
    torch.testing.assert_close(second[LAYOUT.is_real], first[LAYOUT.is_real], rtol=0, atol=1e-5)
    text = lay_out([[TextSpan(6)]])
    two.forward(two.embed(IDS[:1, :6], text), text).sum().backward()
    for name, parameter in adapter_parameters(two).items():
        assert parameter.grad is not None
        if ".moss_image_" in name:
            assert parameter.grad.abs().max() == 0, name


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "full"},
        {"kind": "full_two"},
        {"kind": "moss", "rank": 2, "dropout": 0.1, "isolate_gradients": True, "modules_to_save": ["norm"]},
        {"kind": "sam_conv_lora", "rank": 2, "context_images": "text", "image": {"gate": "token"}},
    ],
    ids=lambda adapter: adapter["kind"],
)
def test_a_mode_is_resumed_to_the_same_bytes_and_generates(recipe, results, tmp_path, adapter):
    settings = {"sampling": {"every": None}, "validate_every": 100, "schedule": {"steps": 6}, "save_every": 2}
    settings["optim"] = {"learning_rate": 1e-3}

    def config_in(name: str):
        # replaced, not merged with the fixture's section
        return recipe(out=tmp_path / name, **settings).model_copy(update={"adapter": AdapterConfig(**adapter)})

    config, whole = config_in("cut"), config_in("whole")
    asked = itertools.count()
    assert len(list(train(config, stop=lambda: next(asked) == 3))) == 3
    list(train(config))
    list(train(whole))
    assert results(config.out) == results(whole.out)
    backbone = load_backbone("nano")
    load_adapter(backbone, config.out / "adapter")
    assert any(parameter.abs().max() > 0 for parameter in adapter_parameters(backbone).values())
    sampling = SamplingConfig(max_text_tokens=3, min_images=1, max_images=1)
    (answer,) = generate(backbone, [Document((user("hello"),))], sampling)
    assert answer.parts


def test_isolated_gradients_of_a_step_are_those_of_the_whole_batch(recipe, monkeypatch):
    settings = {"optim": {"micro_batch": 1, "clip": 1e9}, "schedule": {"steps": 4, "warmup": 0}}
    config = recipe(adapter={"dropout": 0.0, "isolate_gradients": True}, **settings)
    training, seen = build(config), {}
    generator = torch.Generator().manual_seed(0)
    for parameter in training.parameters.values():  # at zero up-projections nothing crosses
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    weights = {name: parameter.detach().clone() for name, parameter in training.parameters.items()}
    update = training.optimizer.step
    monkeypatch.setattr(
        training.optimizer,
        "step",
        lambda: (seen.update({n: p.grad.clone() for n, p in training.parameters.items()}), update())[1],
    )
    next(steps(training))

    def gradients(isolated: bool) -> dict[str, torch.Tensor]:
        fresh = build(config)
        for name, parameter in fresh.parameters.items():
            parameter.data.copy_(weights[name])
        numbers = [fresh.order[place] for place in range(3)]
        batch = collate([part for n in numbers for part in fresh.examples[n]], fresh.backbone.tokens.pad)
        text, image = fresh.objective(batch) / (batch.labels != -100).sum()
        if isolated:
            backward_by_modality(fresh.backbone.decoder, text, image)
        else:
            (text + image).backward()
        return {name: parameter.grad for name, parameter in fresh.parameters.items()}

    expected, summed = gradients(True), gradients(False)
    for name, gradient in seen.items():
        # micro-batches are other float32 sums
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert max(float((expected[name] - summed[name]).abs().max()) for name in seen) > 1e-4, "something is cut"


def test_isolated_training_learns_both(recipe):
    config = recipe(adapter={"isolate_gradients": True}, schedule={"steps": 30, "warmup": 3}, data={"validation": 0})
    reports = list(steps(build(config)))
    assert not any(report.skipped for report in reports)
    assert reports[-1].losses.text < 0.7 * reports[0].losses.text
    assert reports[-1].losses.image < reports[0].losses.image
    assert all(math.isfinite(report.gradient_norm) for report in reports)


def test_the_result_is_proven_in_a_fresh_process(recipe, monkeypatch):
    seen = []
    from weft.backbones import reload

    fresh = reload._in_fresh_process
    monkeypatch.setattr(reload, "_in_fresh_process", lambda *given: (seen.append(given), fresh(*given))[1])
    config = recipe(sampling={"every": None}, verify=True, schedule={"steps": 4})
    list(train(config))
    assert len(seen) == 1
    assert seen[0][0] == "nano"
    assert (config.out / "adapter" / "adapter_model.safetensors").exists()
    # asked again, it is not trained again, and the key may differ
    list(train(recipe(sampling={"every": None}, verify=False, schedule={"steps": 4})))


def test_an_adapter_that_does_nothing_is_no_result(recipe):
    config = recipe(sampling={"every": None}, verify=True, optim={"learning_rate": 1e-30})
    with pytest.raises(AdapterError, match="does nothing") as caught:
        list(train(config))
    assert caught.value.where == str(config.out / "adapter")
    assert not (config.out / "adapter").exists()
    assert (config.out / "checkpoints" / "step_000012").exists()


def test_a_fresh_process_that_disagrees_is_no_result(recipe, monkeypatch):
    from weft.backbones import reload

    monkeypatch.setattr(reload, "_in_fresh_process", lambda *_: ({"0.text": torch.zeros(1)}, {}))
    config = recipe(sampling={"every": None}, verify=True, schedule={"steps": 4})
    with pytest.raises(AdapterError, match="reads back changed"):
        list(train(config))
    assert not (config.out / "adapter").exists()
