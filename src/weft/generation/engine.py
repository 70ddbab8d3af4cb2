"""Requests in, events out: several answers written at once, each row in text or in a picture on its own.

    engine = Engine(backbone, slots=8)
    engine.submit(document, SamplingConfig(...))
    for event in engine.run(): ...

A prompt is prefilled alone, then every step is one forward of all slots, one position each, whether a slot has a row or
not: what a row computes does not depend on its neighbours, and the shapes do not change. The last token of the prompt
and everything after it is read by such steps, so that the adapters' partial sums start with each picture's own `[IMG]`.

A guided request holds more slots, its shadows: the prompt without its text, and with nothing at all, then the pictures
of the answer. Pictures are codes, drawn from logits, or vectors, which a regression gives.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from weft.backbones.base import (
    Backbone,
    DecodingOptions,
    Elements,
    Keep,
    PictureForm,
    SpecialTokens,
    check_fits,
    encode_document,
)  # fmt: skip
from weft.document import Document
from weft.errors import ConfigError, DocumentError, UsageError
from weft.generation.cache import SlotCache
from weft.generation.events import Answer, Event, Finished, ImageBegin, ImageReady, Reason, TextDelta, Usage, collect
from weft.generation.inputs import Input, to_tensors
from weft.generation.rows import Guidance, Place, Request, Row
from weft.generation.sampling import GREEDY, INVALID, Draws, SamplingConfig, choose, guide
from weft.generation.state import AnswerState, May, room_needed
from weft.generation.text import TextStream
from weft.layout import FEATURE, ImageSpan, Modality, TextSpan, TokenSequence, lay_out
from weft.ops.packed_linear import Packs

SMALLEST_PICTURE = 3
"""Positions of the smallest picture there can be: what opens it, one element, what closes it."""


class Engine:
    """Writes answers with one backbone.

    Args:
        slots: rows of every decoding step: answers written at once (a guided one takes two or three, see `slots_for`).
            The same request gets the same answer whatever is answered beside it, as long as this number is the same.
        context: positions of a sequence, prompt and answer; default and upper limit: the backbone's.
    """

    def __init__(self, backbone: Backbone, *, slots: int = 8, context: int | None = None) -> None:
        if backbone.kind == "diffusion":
            raise UsageError(f"{backbone.name} makes pictures at once; this engine writes them element by element")
        if slots < 1:
            raise UsageError(f"an engine needs at least one slot, got {slots}")
        if context is not None and not 1 < context <= backbone.context_length:
            raise UsageError(f"a context of {context} was asked for; {backbone.name} has {backbone.context_length}")
        self._backbone, self._slots = backbone, slots
        self._context = backbone.context_length if context is None else context
        self._device = backbone.device
        self._cache = SlotCache(slots, self._context)
        self._rings = None
        if backbone.routing is not None:
            from weft.adapters.rings import RingCache

            self._rings = RingCache(slots, columns=backbone.widest)
        heads = (head for name, head in backbone.named_children() if name.endswith("head"))
        self._packs = Packs([backbone.decoder, *heads], slots)
        # rows and columns of the pictures being written, by slot and number in the sequence
        pictures = self._context // SMALLEST_PICTURE + 1
        self._grids = torch.zeros(slots, pictures, 2, dtype=torch.int64, device=self._device)
        # what each slot reads next where that is a vector
        self._vectors: Tensor | None = None
        if backbone.kind == "continuous":
            self._vectors = torch.zeros(slots, 1, backbone.feature_width, device=self._device)
        self._blank: dict[PictureForm, Tensor | None] = {}
        self._permitted: Tensor | None = None
        nothing = torch.zeros(2, slots)
        self._guiding: tuple[list[int], Tensor, Tensor] = ([], nothing, nothing)
        self._waiting: deque[Request] = deque()
        self._rows: dict[int, Row] = {}
        self._free = list(range(slots))
        self._cancelled: set[int] = set()
        self._ids = itertools.count()

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests being answered."""
        return len(self._rows)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def submit(self, document: Document, config: SamplingConfig) -> int:
        """Queue a prompt, whose pictures hold their bytes; returns the number that its events carry.

        Raises:
            ContextError: the prompt leaves no room for the shortest answer that `config` allows.
            ConfigError: `max_tokens` leaves none.
            DocumentError: the document does not end with a turn to be answered.
            UsageError: pictures are guided and the engine has too few slots, or their size is none of the model's.
        """
        if not document.turns or document.turns[-1].role == "assistant":
            raise DocumentError("a prompt ends with a turn to be answered", where=document.id, fix="add a user turn")
        form = self._backbone.form if config.size is None else self._backbone.form_of(config.size)
        needed = room_needed(config, form)
        if config.max_tokens is not None and config.max_tokens < needed:
            raise ConfigError(
                f"max_tokens = {config.max_tokens} has no room for {config.owed_images} pictures and the end",
                fix=f"allow at least {needed}",
            )
        wanted = slots_for(self._backbone, config)
        if wanted > self._slots:
            raise UsageError(
                f"guided pictures take {wanted} slots, the engine has {self._slots}",
                fix="raise slots, or set guidance: 1",
            )
        prompt = encode_document(self._backbone, document, answer=True)
        check_fits(prompt, self._context, reserve=needed)
        keeps: tuple[Keep, ...] = ("pictures", "nothing")
        shadows = tuple(
            encode_document(self._backbone, document, answer=True, keep=keep) for keep in keeps[: wanted - 1]
        )
        guidance = _guidance(self._backbone, config)
        request = Request(next(self._ids), config, prompt, form, guidance, shadows)
        self._waiting.append(request)
        return request.id

    def cancel(self, request: int) -> None:
        """End a request at the start of the next step; one that has ended already is left alone."""
        if request in self._rows or any(waiting.id == request for waiting in self._waiting):
            self._cancelled.add(request)

    def run(self) -> Iterator[Event]:
        """Step until no request is left."""
        while self._waiting or self._rows:
            yield from self.step()

    # no_grad, not inference_mode: what a model keeps from this forward may meet a training step later
    @torch.no_grad()
    def step(self) -> list[Event]:
        """End what was cancelled, give free slots to waiting requests, and write one element of every answer."""
        events = self._end_cancelled()
        with _evaluating(self._backbone.decoder):
            self._admit()
            if self._rows:
                events += self._decode()
        return events

    def _end_cancelled(self) -> list[Event]:
        events: list[Event] = []
        for request in [waiting for waiting in self._waiting if waiting.id in self._cancelled]:
            self._waiting.remove(request)
            events.append(Finished(request.id, "cancelled", Usage(len(request.prompt), 0, 0)))
        for row in [self._rows[request] for request in sorted(self._cancelled & self._rows.keys())]:
            events += self._finish(row, "cancelled")
        self._cancelled.clear()
        return events

    def _admit(self) -> None:
        # in order of arrival: a guided request that waits for its second slot is not overtaken
        while self._waiting and len(self._free) >= self._waiting[0].slots:
            self._start(self._waiting.popleft())

    def _start(self, request: Request) -> None:
        slots, self._free = self._free[: request.slots], self._free[request.slots :]
        # the prompt's last token is read by the first step, a shadow's last by its prefill
        places = [Place(slots[0], len(request.prompt) - 1)]
        places += (Place(slot, len(shadow)) for slot, shadow in zip(slots[1:], request.shadows, strict=True))
        for place, sequence in zip(places, (request.prompt, *request.shadows), strict=True):
            self._prefill(sequence, place.position, place.slot)
        room = self._context - len(request.prompt)
        self._rows[request.id] = Row(
            request,
            places[0],
            places[1:],
            AnswerState(request.config, self._backbone.tokens, request.form, room),
            TextStream(self._backbone.detokenize),
            torch.Generator().manual_seed(request.config.seed),
            token=int(request.prompt.ids[-1]),
            prompt_images=sum(isinstance(span, ImageSpan) for span in request.prompt.spans),
        )

    def _prefill(self, sequence: TokenSequence, count: int, slot: int) -> None:
        """Read the first `count` positions, which end in text, into a slot."""
        if not count:
            return
        layout = lay_out([sequence.spans])[:count].to(self._device)
        positions = torch.arange(count, device=self._device)[None]
        step = self._cache.step(positions, reach=count, slots=[slot])
        ids, features = sequence.ids[None, :count].to(self._device), sequence.dense_features()
        features = None if features is None else features[None, :count].to(self._device)
        embeds = self._backbone.embed(ids, layout, features)
        self._backbone.forward(embeds, layout, step)

    def _decode(self) -> list[Event]:
        inputs = self._inputs()
        ids, positions, layout = to_tensors(inputs, self._grids)
        step = self._cache.step(positions, reach=max(each.position for each in inputs) + 1, rings=self._rings)
        embeds = self._backbone.embed(ids, layout, self._vectors)
        rows = list(self._rows.values())
        forced = [row.state.forced() for row in rows]
        with self._packs.in_use():
            hidden = self._backbone.forward(embeds, layout, step)[:, 0]
            # where no row has a choice, no head is run
            chosen = self._choose(hidden, inputs) if None in forced else []
        events: list[Event] = []
        for row, without_choice in zip(rows, forced, strict=True):
            for place in row.places:
                place.position += inputs[place.slot].is_real
            events += self._take(row, chosen[row.place.slot] if without_choice is None else without_choice)
        return events

    def _inputs(self) -> list[Input]:
        """What each slot reads now."""
        pad = self._backbone.tokens.pad
        inputs = [Input(pad, 0)] * self._slots
        for row in self._rows.values():
            inputs[row.place.slot] = row.input()
            for shadow in row.shadows:
                inputs[shadow.slot] = row.shadow_input(shadow, pad)
        return inputs

    def _choose(self, hidden: Tensor, inputs: Sequence[Input]) -> list[int]:
        """(B, D) -> the next element of each slot, INVALID where no choice is left; the one wait for the device."""
        is_image = [each.predicts.modality == Modality.IMAGE for each in inputs]
        draws = self._draws()
        # a head that no row needs is left out; one that some row needs runs for all, so that shapes stay the same
        if not any(is_image):
            return self._text(hidden, draws).tolist()
        elements = self._image(hidden, draws)
        if not all(is_image):
            rows = torch.tensor(is_image, device=self._device)
            elements = torch.where(rows, elements, self._text(hidden, draws))
        return elements.tolist()

    def _draws(self) -> Draws:
        choices, uniforms = [GREEDY] * self._slots, [0.0] * self._slots
        for row in self._rows.values():
            choices[row.place.slot], uniforms[row.place.slot] = row.choice, row.uniform()
        return Draws.of(choices, uniforms, self._device)

    def _text(self, hidden: Tensor, draws: Draws) -> Tensor:
        """(B, D) -> (B,) the text token that each slot would write."""
        logits = self._backbone.text_logits(hidden)
        may = [May(0)] * self._slots
        for row in self._rows.values():
            may[row.place.slot] = row.state.may()
        if self._permitted is None:
            self._permitted = _permitted(self._backbone.tokens, logits.shape[-1]).to(self._device)
        is_allowed = self._permitted[torch.tensor(may, device=self._device)]
        return choose(logits.masked_fill(~is_allowed, -torch.inf), draws)

    def _image(self, hidden: Tensor, draws: Draws) -> Tensor:
        """(B, D) -> (B,) the element of a picture that each slot would write; vectors are kept in `_vectors`."""
        if self._vectors is not None:
            self._vectors = self._backbone.image_features(hidden).unsqueeze(1)
            return torch.where(self._vectors.isfinite().all(-1)[:, 0], FEATURE, INVALID)
        codes = choose(self._guided(self._backbone.image_logits(hidden)), draws)
        return torch.where(codes == INVALID, INVALID, codes + self._backbone.vocabulary)

    def _guided(self, logits: Tensor) -> Tensor:
        """(B, K) -> (B, K), the rows that are guided led away from their shadows."""
        guided = [row for row in self._rows.values() if row.is_guided]
        if not guided:
            return logits
        requests = [row.request.id for row in guided]
        if requests != self._guiding[0]:  # the same from step to step while pictures are being written
            self._guiding = requests, *self._lead_away(guided)
        _, (without_text, without_all), (text, images) = self._guiding
        return guide(logits, logits[without_text], logits[without_all], text, images)

    def _lead_away(self, guided: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """(2, B) the slots that each slot is led away from, itself where it is not; and (2, B) by how much."""
        sources = [list(range(self._slots)) for _ in range(2)]
        scales = [[1.0] * self._slots for _ in range(2)]
        for row in guided:
            slot = row.place.slot
            for kind, shadow in enumerate(row.shadows):
                sources[kind][slot] = shadow.slot
            for kind, scale in enumerate(row.request.guidance):
                scales[kind][slot] = scale
        return torch.tensor(sources, device=self._device), torch.tensor(scales, device=self._device)

    def _take(self, row: Row, element: int) -> list[Event]:
        """Add an element to an answer."""
        if element == INVALID:
            return self._finish(row, "invalid_logits")
        request, state = row.request.id, row.state
        row.token = element
        kind = state.advance(element)
        if kind == May.TEXT:
            return _text(request, row.text.push(element))
        if kind == May.BEGIN_IMAGE:
            self._begin_image(row)
            return [*_text(request, row.text.flush()), ImageBegin(request, state.images - 1)]
        if kind == May.END:
            assert state.reason is not None
            return self._finish(row, state.reason)
        if state.last_raster is not None:
            row.elements.append(element)
            if self._vectors is not None:
                row.vectors.append(self._vectors[row.place.slot, 0])
            if state.is_complete:
                vectors = torch.stack(row.vectors).float() if row.vectors else None
                elements = Elements(row.request.form, torch.tensor(row.elements, device=self._device), vectors)
                return [ImageReady(request, state.images - 1, self._render(row, elements))]
        return []

    def _begin_image(self, row: Row) -> None:
        row.begin_image()
        form = row.request.form
        self._grids[row.slots, row.image] = torch.tensor((form.rows, form.cols), device=self._device)
        if self._rings is not None:
            self._rings.reset(row.slots)

    def _render(self, row: Row, elements: Elements) -> PILImage.Image:
        wanted = row.request.config.diffusion
        negative = None
        if elements.features is not None and wanted.guidance != 1:
            negative = self._without_prompt(elements.form)
        options = DecodingOptions(
            row.request.config.seed + row.state.images - 1, wanted.steps, wanted.guidance, negative
        )
        return self._backbone.decode_image(elements, options)

    def _without_prompt(self, form: PictureForm) -> Tensor | None:
        """(P, F) the picture that the model writes with nothing before it; None: it can write none."""
        if form not in self._blank:
            start = torch.tensor(self._backbone.chat.start[:1])
            nothing = TokenSequence(start, (TextSpan(1),), torch.zeros(1, dtype=torch.bool))
            config = SamplingConfig(first="image", max_images=1, max_text_tokens=0)
            engine = _Vectors(self._backbone, slots=1, context=form.length + SMALLEST_PICTURE)
            engine._start(Request(0, config, nothing, form, Guidance(1.0, 1.0)))
            for _ in engine.run():
                pass
            self._blank[form] = None if engine.elements is None else engine.elements.features
        return self._blank[form]

    def _finish(self, row: Row, reason: Reason) -> list[Event]:
        del self._rows[row.request.id]
        for slot in row.slots:
            self._cache.clear(slot)
        self._free = sorted(self._free + row.slots)
        return [*_text(row.request.id, row.text.flush()), Finished(row.request.id, reason, row.usage)]


def generate(
    backbone: Backbone,
    documents: Iterable[Document],
    config: SamplingConfig,
    *,
    slots: int = 8,
    context: int | None = None,
) -> list[Answer]:
    """Answer every prompt, `slots` at a time; answers stand in the order of the documents. See `Engine`.

    Raises:
        WeftError: a prompt cannot be answered (see `Engine.submit`); then none is.
    """
    engine = Engine(backbone, slots=slots, context=context)
    events: dict[int, list[Event]] = {engine.submit(document, config): [] for document in documents}
    for event in engine.run():
        events[event.request].append(event)
    return [collect(of_one) for of_one in events.values()]


def _text(request: int, text: str) -> list[Event]:
    return [TextDelta(request, text)] if text else []


class _Vectors(Engine):
    """Keeps the first picture's elements instead of making pixels of them."""

    elements: Elements | None = None

    def _render(self, row: Row, elements: Elements) -> PILImage.Image:
        self.elements = elements
        return PILImage.new("RGB", (1, 1))


def slots_for(backbone: Backbone, config: SamplingConfig) -> int:
    """Slots of an `Engine` that a request takes: one, and one for each thing that its pictures are led away from."""
    guidance = _guidance(backbone, config)
    return 1 + (guidance != (1.0, 1.0)) + (guidance.images != 1.0)


def _guidance(backbone: Backbone, config: SamplingConfig) -> Guidance:
    if backbone.kind != "discrete" or not config.max_images:
        return Guidance(1.0, 1.0)
    text, images = backbone.guidance
    return Guidance(
        text if config.guidance is None else config.guidance,
        images if config.image_guidance is None else config.image_guidance,
    )


def _permitted(tokens: SpecialTokens, vocabulary: int) -> Tensor:
    """(2 ** kinds, V) bool: the text tokens that each set of kinds allows."""
    table = torch.zeros(2 ** len(May), vocabulary, dtype=torch.bool)
    for may in map(May, range(len(table))):
        if may & May.TEXT:
            table[may] = True
            table[may, list(tokens)] = False
        table[may, tokens.begin_image] = May.BEGIN_IMAGE in may
        table[may, [tokens.end, tokens.separator]] = May.END in may
    return table


@contextmanager
def _evaluating(decoder: nn.Module) -> Iterator[None]:
    """No dropout: a model that is being trained is sampled from as it will be used."""
    if not decoder.training:
        yield
        return
    decoder.eval()
    try:
        yield
    finally:
        decoder.train()
