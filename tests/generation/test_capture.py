"""Steps over tensors that stay where they are answer as the others do."""

import pytest
import torch
from PIL import Image as PILImage

from weft.adapters import AdapterConfig, adapter_parameters, attach
from weft.backbones import load_backbone
from weft.document import Document, Image, user
from weft.generation import Choice, Engine, SamplingConfig, collect
from weft.generation.capture import StaticStep
from weft.images import encode_png

WARM = Choice(temperature=1.0)
PICTURE = Image(encode_png(PILImage.new("RGB", (20, 20), "red")))
DOCUMENTS = [Document((user(*parts),)) for parts in (("a",), ("once", PICTURE), ("some words " * 6,))]
CONFIGS = [
    SamplingConfig(max_text_tokens=6, max_images=1),
    SamplingConfig(max_text_tokens=3, min_images=1, max_images=1, text=WARM, image=WARM, seed=3),
    SamplingConfig(first="image", max_images=1, max_text_tokens=2),
]
LED = SamplingConfig(max_text_tokens=2, min_images=1, max_images=1, guidance=2.5, image_guidance=1.5, image=WARM)
SLOTS = 5
NAMES = ["nano", "nano-chameleon", "nano-janus", "nano-emu3", "nano-emu2"]


def model(name, adapter="none"):
    backbone = load_backbone(name)
    if adapter != "none":
        attach(backbone, AdapterConfig(kind=adapter, rank=4))
        for i, parameter in enumerate(adapter_parameters(backbone).values()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
        backbone.decoder.eval()
    return backbone


class Spy:
    """The backbone, and where the tensors of its steps lie."""

    def __init__(self, backbone):
        self._backbone, self.places, self.steps = backbone, [], 0

    def __getattr__(self, name):
        return getattr(self._backbone, name)

    def embed(self, ids, layout, features=None):
        self._given = [ids] if features is None else [ids, features]
        return self._backbone.embed(ids, layout, features)

    def forward(self, embeds, layout, step=None):
        hidden = self._backbone.forward(embeds, layout, step)
        if embeds.shape[1] == 1 and len(embeds) == SLOTS:  # not where a picture is written beside, or a prompt read
            planes = [value for plane in (layout.inputs, layout.outputs) for value in vars(plane).values()]
            stored = [tensor for layer in step.keys_values.layers for tensor in (layer.keys, layer.values)]
            rings = list(step.rings._rings.values()) if step.rings else []
            tensors = [*self._given, *planes, layout.grids, step.slots, step.positions, *stored, *rings]
            self.places.append([tensor.data_ptr() for tensor in tensors])
        return hidden


def answers(backbone, capture, recorder=None):
    """Of a batch in which rows of every kind join and leave."""
    engine = Engine(backbone, slots=SLOTS, context=256, capture=capture)
    if recorder is not None:
        engine._static._recorder = recorder
    configs = [*CONFIGS, LED] if backbone.kind == "discrete" else CONFIGS
    events, asked = {}, []
    for turn, config in enumerate(configs):
        asked += [engine.submit(document, config) for document in DOCUMENTS[turn % 2 :]]
        for event in engine.step():
            events.setdefault(event.request, []).append(event)
    for event in engine.run():
        events.setdefault(event.request, []).append(event)
    return [collect(events[request]) for request in asked]


@pytest.mark.parametrize("adapter", [pytest.param("none", marks=pytest.mark.slow), "moss"])
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_other_steps_and_no_tensor_moves(name, adapter):
    backbone = model(name, adapter)
    free, fixed = Spy(backbone), Spy(backbone)
    expected, found = answers(free, False), answers(fixed, True)
    assert found == expected
    assert any(answer.images for answer in expected)
    assert len({answer.parts for answer in expected}) > 3
    assert len(fixed.places) > 10
    assert all(places == fixed.places[0] for places in fixed.places)
    assert any(places != free.places[0] for places in free.places)


class Tape:
    """A recorder whose record is the step itself; like a graph, it does not run while it is recorded."""

    def __init__(self):
        self.warmed = self.recorded = self.replayed = 0

    def warm_up(self, step):
        self.warmed += 1
        return step()

    def record(self, step):
        self.recorded += 1

        def replay():
            self.replayed += 1
            return step()

        return replay


def test_each_kind_of_step_is_recorded_once_and_replayed():
    backbone = model("nano", "moss")
    tape = Tape()
    assert answers(backbone, True, tape) == answers(backbone, False)
    # more than one width, with and without each head, guided or not, with and without draws
    assert 4 < tape.recorded <= tape.warmed < tape.replayed


def test_a_step_reads_new_numbers_from_the_old_place():
    seen = []

    def compute(numbers, kind):
        seen.append((numbers.data_ptr(), kind))
        return numbers[:, 0] * 2

    tape = Tape()
    step = StaticStep(compute, torch.zeros(3, 2, dtype=torch.int64), tape)
    found = [step(torch.full((3, 2), i), kind).tolist() for i, kind in enumerate("aabab")]
    assert found == [[2 * i] * 3 for i in range(5)]
    assert [kind for _, kind in seen] == list("aabab")
    assert len({place for place, _ in seen}) == 1
    assert (tape.warmed, tape.recorded, tape.replayed) == (2, 2, 3)


def test_steps_are_captured_only_where_asked_for_on_a_cpu():
    backbone = model("nano")
    assert Engine(backbone)._static is None
    assert Engine(backbone, capture=True)._static is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("adapter", ["none", "moss"])
@pytest.mark.parametrize("name", NAMES)
def test_graphs_answer_as_steps_that_are_not_captured(name, adapter):
    backbone = model(name, adapter).to("cuda")
    expected = answers(backbone, False)
    engine = Engine(backbone)
    assert engine._static is not None
    assert answers(backbone, True) == expected
