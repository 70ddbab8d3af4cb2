"""Pictures painted at once from what stands before them, and what a model with synchronisers sees while it writes."""

import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from weft.adapters import AdapterConfig, adapter_parameters, attach
from weft.backbones import load_backbone
from weft.backbones.base import encode_document
from weft.document import Document, Image, Turn, user
from weft.errors import UsageError
from weft.generation import Engine, SamplingConfig, generate
from weft.generation.events import ImageReady
from weft.generation.sampling import DiffusionConfig
from weft.generation.state import AnswerState, May
from weft.layout import ImageSpan, TextSpan, lay_out
from weft.synchronizer.sight import see

TWO = SamplingConfig(min_images=2, max_images=2, max_text_tokens=6, seed=3)


def photo(*colour: int) -> Image:
    buffer = io.BytesIO()
    PILImage.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return Image(buffer.getvalue())


def model(adapter: bool = False) -> Any:
    backbone: Any = load_backbone("nano-mm_interleaved")
    generator = torch.Generator().manual_seed(0)
    for part in (backbone.decoder_sync, backbone.unet_sync):
        for name, parameter in part.named_parameters():
            if "gate" in name or "conv" in name:
                nn.init.normal_(parameter, std=0.5, generator=generator)
    if adapter:
        attach(backbone, AdapterConfig(kind="moss", rank=2))
        for parameter in adapter_parameters(backbone).values():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return backbone


class Spy:
    """Keeps what was written, and what pictures were painted from."""

    def __init__(self, backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.contexts: list[Tensor] = []
        self.before: list[Any] = []
        self.elements: list[int] = []
        paint, advance = getattr(backbone, "paint", None), AnswerState.advance

        def spied(context: Tensor, before: Any, options: Any) -> Any:
            self.contexts.append(context.clone())
            self.before.append(before)
            assert paint is not None
            return paint(context, before, options)

        def advanced(state: AnswerState, token: int) -> May:
            self.elements.append(token)
            return advance(state, token)

        monkeypatch.setattr(backbone, "paint", spied, raising=False)
        monkeypatch.setattr(AnswerState, "advance", advanced)


def whole(backbone: Any, prompt: Document, elements: list[int], pictures: Iterable[Image]) -> tuple[Tensor, Tensor]:
    """Prompt and answer as one sequence of ids, and its hidden states in one full forward."""
    start, form = encode_document(backbone, prompt, answer=True), backbone.form
    ids = torch.cat((start.ids, torch.tensor(elements)))[None]
    spans: list[Any] = list(start.spans)
    i = 0
    while i < len(elements):
        spans.append(TextSpan(1))
        i += 1
        if elements[i - 1] == backbone.tokens.begin_image:
            spans.append(ImageSpan(form.rows, form.cols, after=len(form.after)))
            i += form.patches
    layout = lay_out([spans])
    answered = Document((user("x"), Turn("assistant", tuple(pictures), loss=False)))
    pixels = [each.seen for each in (*start.pixels, *encode_document(backbone, answered).pixels)]
    layout, vectors, _ = see(backbone.synchronizer, torch.stack(pixels), ids, layout, backbone.tokens.begin)
    with torch.no_grad():
        return ids[0], backbone.forward(backbone.embed(ids, layout, vectors), layout)[0]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("ends", ["with text", "with a picture"])
def test_pictures_are_painted_from_the_states_of_the_full_forward(
    adapter: bool, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = model(adapter)
    spy = Spy(backbone, monkeypatch)
    parts = ("a red ", photo(255, 0, 0), " then") if ends == "with text" else ("a red", photo(255, 0, 0))
    prompt = Document((user(*parts),))
    (answer,) = generate(backbone, [prompt], TWO, slots=2)
    pictures = list(answer.images)
    ids, hidden = whole(backbone, prompt, spy.elements, pictures)
    begins = (ids == backbone.tokens.begin_image).nonzero().flatten().tolist()
    assert len(begins) == 3 and len(spy.contexts) == len(pictures) == 2
    for context, begin in zip(spy.contexts, begins[1:], strict=True):
        assert len(context) == begin + 1
        torch.testing.assert_close(context, hidden[: begin + 1], rtol=0, atol=2e-5)
    # the nearest earlier picture, of the prompt and then of the answer
    for looks, document in zip(spy.before, (prompt, Document((user(pictures[0]),))), strict=True):
        seen = encode_document(backbone, document).pixels[0].seen
        torch.testing.assert_close(looks.maps[0], backbone.synchronizer.look(seen[None]).maps[0])


def test_a_picture_is_the_same_beside_others_and_alone() -> None:
    backbone = model()
    prompts = [
        Document((user("a boat", photo(0, 0, 255), photo(9, 200, 7)),)),
        Document((user("nothing but text"),)),
        Document((user(photo(200, 200, 0)),)),
    ]
    alone = [generate(backbone, [prompt], TWO, slots=3)[0] for prompt in prompts]
    together = generate(backbone, prompts, TWO, slots=3)
    for one, other in zip(alone, together, strict=True):
        assert one.parts == other.parts
    assert len({next(answer.images).sha256 for answer in together}) == 3


def test_earlier_pictures_matter() -> None:
    backbone = model()
    answers = [
        generate(backbone, [Document((user("the same", photo(*colour)),))], TWO)[0]
        for colour in ((255, 0, 0), (0, 0, 255))
    ]
    first, second = (next(answer.images).sha256 for answer in answers)
    assert first != second


def test_how_a_picture_is_painted_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = model()
    prompt = Document((user("a tree"),))

    def picture(**changes: Any) -> str:
        config = SamplingConfig(
            first="image", max_images=1, max_text_tokens=0, seed=changes.pop("seed", 0),
            diffusion=DiffusionConfig(**changes),
        )  # fmt: skip
        return next(generate(backbone, [prompt], config)[0].images).sha256

    usual = picture()
    assert picture() == usual
    different = [picture(seed=1), picture(steps=4), picture(guidance=1.0), picture(scheduler="DDPMScheduler", steps=3)]
    assert len({usual, *different}) == 5
    with pytest.raises(UsageError, match="NoScheduler"):
        picture(scheduler="NoScheduler")


def test_rows_join_while_others_paint() -> None:
    backbone = model()
    engine = Engine(backbone, slots=2)
    numbers = [engine.submit(Document((user(f"picture {i}"),)), TWO) for i in range(4)]
    ready: dict[int, list[int]] = {number: [] for number in numbers}
    for event in engine.run():
        if isinstance(event, ImageReady):
            ready[event.request].append(event.index)
    assert ready == {number: [0, 1] for number in numbers}


@pytest.fixture
def synchronised() -> Any:
    from weft.synchronizer import SynchronizerConfig, attach_synchronizer

    backbone: Any = load_backbone("nano")
    attach_synchronizer(backbone, SynchronizerConfig())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in backbone.synchronizer.named_parameters():
        if "gate" in name:
            nn.init.constant_(parameter, 1.0)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return backbone


def test_what_is_written_code_by_code_sees_whole_pictures_only(
    synchronised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states of cached steps are those of one full forward over prompt and answer."""
    backbone, steps = synchronised, []
    forward = backbone.forward

    def spied(embeds: Tensor, layout: Any, step: Any = None) -> Tensor:
        hidden = forward(embeds, layout, step)
        if step is not None and embeds.shape[1] == 1:
            steps.append(hidden[0, 0].clone())
        return hidden

    monkeypatch.setattr(backbone, "forward", spied)
    spy = Spy(backbone, monkeypatch)
    prompt = Document((user("a", photo(255, 0, 0)),))
    config = SamplingConfig(min_images=2, max_images=2, max_text_tokens=3)
    (answer,) = generate(backbone, [prompt], config, slots=1)
    monkeypatch.undo()
    _, hidden = whole(backbone, prompt, spy.elements, answer.images)
    begin = len(encode_document(backbone, prompt, answer=True)) - 1
    assert len(steps) == len(hidden) - 1 - begin > 2 * backbone.form.length
    torch.testing.assert_close(torch.stack(steps), hidden[begin:-1], rtol=0, atol=2e-4)
