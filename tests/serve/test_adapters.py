"""Several models behind one address: a base, and adapters on the same weights."""

import threading

import pytest
import torch

from tests.serve.running import running
from weft.adapters import AdapterConfig, adapter_parameters, attach
from weft.backbones import load_backbone, load_model
from weft.backbones.trained import Parts, choose_parts, save_trained
from weft.document import Document, Text, user
from weft.errors import UsageError
from weft.generation import Engine, SamplingConfig, generate
from weft.serve.limits import Limits
from weft.serve.models import load_models, sharing, use_threads

LIMITS = Limits(answer_text_tokens=12, answer_images=1)
CONFIG = SamplingConfig(max_text_tokens=12, max_images=1)


def make(folder, kind, seed, *, parts=()):
    """An adapter that changes what nano says, and parameters of nano itself that are trained."""
    model, chance = load_backbone("nano"), torch.Generator().manual_seed(seed)
    attach(model, AdapterConfig(kind=kind, rank=4))
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3, generator=chance)
    chosen = choose_parts(model, parts) if parts else Parts()
    with torch.no_grad():
        for parameter in chosen.parameters.values():
            parameter += torch.randn(parameter.shape, generator=chance)
    folder.mkdir()
    save_trained(model, chosen, folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        "moss": make(root / "moss", "moss", 1),
        "lora": make(root / "lora", "lora", 2),
        "head": make(root / "head", "lora", 3, parts=["^head"]),
    }


def answer(http, model, text):
    asked = {"model": model, "messages": [{"role": "user", "content": text}], "seed": 0, "temperature": 0}
    got = http.post("/v1/chat/completions", json={**asked, "response_image_format": "parts"})
    assert got.status_code == 200, got.text
    return [part.get("text") or part["image_url"]["url"] for part in got.json()["choices"][0]["message"]["content"]]


def alone(backbone, text):
    from weft.images import data_uri

    (found,) = generate(backbone, [Document((user(Text(text)),))], CONFIG, slots=4)
    return [part.text if isinstance(part, Text) else data_uri(part.data) for part in found.parts]


def test_each_name_answers_as_its_adapter_does_alone(adapters):
    models = load_models("nano", adapters)
    assert list(models) == ["nano", "moss", "lora", "head"]
    with running(models, slots=4, limits=LIMITS) as server, server.http() as http:
        assert [each["id"] for each in http.get("/v1/models").json()["data"]] == list(models)
        said = {name: answer(http, name, "hello") for name in models}
        assert http.post("/v1/responses", json={"model": "other", "input": "a"}).status_code == 404
    expected = {name: alone(load_model("nano", adapters.get(name)), "hello") for name in models}
    assert said == expected
    assert len({str(each) for each in said.values()}) == len(models)


def test_the_weights_of_the_base_are_in_memory_once(adapters):
    models = load_models("nano", adapters)
    base = {tensor.data_ptr(): tensor.nbytes for tensor in models["nano"].parameters()}
    for name, model in models.items():
        added = {tensor.data_ptr(): tensor.nbytes for tensor in model.parameters() if tensor.data_ptr() not in base}
        own = sum(each.nbytes for each in adapter_parameters(model).values()) if name != "nano" else 0
        # the part that was trained has a copy, of which the base knows nothing
        own += models["head"].head.weight.nbytes if name == "head" else 0
        assert sum(added.values()) == own
        assert sum(tensor.nbytes for tensor in model.parameters()) >= sum(base.values())


def test_what_engines_make_of_the_base_is_in_memory_once_too(adapters):
    models = load_models("nano", {"one": adapters["lora"], "two": adapters["lora"]})
    engines = [Engine(models[name], slots=4) for name in ("one", "two")]
    for engine in engines:
        engine.submit(Document((user(Text("a")),)), CONFIG)
        engine.step()
    first, second = ([pack._copy for pack in engine._packs._packs] for engine in engines)
    if not first:
        pytest.skip("nothing is packed on this machine")
    shared = [one is two for one, two in zip(first, second, strict=True)]
    # the rest is the adapters' own
    assert sum(shared) == sum(isinstance(module, torch.nn.Linear) for module in models["nano"].decoder.modules()) + 1


def test_what_an_adapter_writes_into_the_model_itself_does_not_reach_the_base(adapters):
    before = alone(load_backbone("nano"), "hello")
    models = load_models("nano", {"head": adapters["head"]})
    assert alone(models["nano"], "hello") == before
    assert not torch.equal(models["nano"].head.weight, models["head"].head.weight)


def test_what_is_attached_to_one_does_not_show_in_the_other():
    base = load_backbone("nano")
    second = sharing(base)
    attach(second, AdapterConfig(kind="moss", rank=4))
    assert base.routing is None
    assert second.tokenizer is base.tokenizer
    assert "moss" not in str(base.decoder).lower()


def test_an_adapter_with_the_name_of_the_base_is_refused(adapters):
    with pytest.raises(UsageError, match="two models are called 'nano'"):
        load_models("nano", {"nano": adapters["lora"]})


@pytest.mark.parametrize(
    "given, variable, used",
    [(3, None, 3), (3, "1", 3), (None, "5", 5), (None, None, 2)],
)
def test_half_of_the_threads_are_left_to_callers_unless_somebody_says_how_many(given, variable, used, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    try:
        torch.set_num_threads(5)  # as torch itself takes them: of all cores, or what the variable says
        use_threads(given)
        found = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [used]
    finally:
        torch.set_num_threads(before)
