"""Requests in, events out: several answers written at once, each row in text or in a picture on its own.

    engine = Engine(backbone, slots=8)
    engine.submit(document, SamplingConfig(...))
    for event in engine.run(): ...

A prompt is prefilled alone, then every step is one forward of all slots, one position each, whether a slot has a row or
not: what a row computes does not depend on its neighbours, and the shapes do not change. The last token of the prompt
and everything after it is read by such steps, so that the adapters' partial sums start with each picture's own `[IMG]`.

A guided request holds more slots, its shadows: the prompt without its text, and with nothing at all, then the pictures
of the answer. Pictures are codes, drawn from logits, or vectors, which a regression gives; or they are painted at once
from the states of all that stands before them, and read as a prompt's are.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from weft.backbones.base import (
    Backbone,
    DecodingOptions,
    Elements,
    Keep,
    Painter,
    PictureForm,
    SpecialTokens,
    check_fits,
    encode_document,
    pixels_of,
)  # fmt: skip
from weft.document import Document
from weft.errors import ConfigError, DocumentError, UsageError
from weft.generation.cache import SlotCache
from weft.generation.capture import CudaGraphs, Kind, StaticStep
from weft.generation.events import Answer, Event, Finished, ImageBegin, ImageReady, Reason, TextDelta, Usage, collect
from weft.generation.inputs import WIDTH, Drawing, Input, StepTensors, to_numbers
from weft.generation.rows import Guidance, Place, Request, Row
from weft.generation.sampling import INVALID, SamplingConfig, choose, guide
from weft.generation.sights import Sights
from weft.generation.state import AnswerState, May, room_needed
from weft.generation.text import TextStream
from weft.layout import FEATURE, ImageSpan, Modality, Span, TextSpan, TokenSequence, lay_out
from weft.ops.packed_linear import Packs
from weft.synchronizer.sight import Looks, Sight, see

UNLIMITED = torch.iinfo(torch.int64).max
SMALLEST_PICTURE = 3
"""Positions of the smallest picture there can be: what opens it, one element, what closes it."""


class Engine:
    """Writes answers with one backbone.

    Args:
        slots: rows of every decoding step: answers written at once (a guided one takes two or three, see `slots_for`).
            The same request gets the same answer whatever is answered beside it, as long as this number is the same.
        context: positions of a sequence, prompt and answer; default and upper limit: the backbone's.
        capture: steps run over tensors that stay where they are, on CUDA as graphs; room for the whole context is then
            taken at once, and the model must not be changed. None: where the whole model is on one CUDA device, and has
            no synchroniser, for which there is no such form.
    """

    def __init__(
        self, backbone: Backbone, *, slots: int = 8, context: int | None = None, capture: bool | None = None
    ) -> None:
        if slots < 1:
            raise UsageError(f"an engine needs at least one slot, got {slots}")
        if context is not None and not 1 < context <= backbone.context_length:
            raise UsageError(f"a context of {context} was asked for; {backbone.name} has {backbone.context_length}")
        self._backbone, self._slots = backbone, slots
        self._context = backbone.context_length if context is None else context
        self._device = backbone.device
        if capture is None:
            is_on_one = {each.device for each in backbone.parameters()} == {self._device}
            capture = self._device.type == "cuda" and is_on_one and backbone.synchronizer is None
        elif capture and backbone.synchronizer is not None:
            raise UsageError("steps with a synchroniser cannot be captured", fix="leave capture out")
        self._cache = SlotCache(slots, self._context, static=capture)
        self._rings = None
        if backbone.routing is not None:
            from weft.adapters.rings import RingCache

            self._rings = RingCache(slots, columns=backbone.widest)
        heads = (head for name, head in backbone.named_children() if name.endswith("head"))
        self._packs = Packs([backbone.decoder, *heads], slots)
        # rows and columns of the pictures being written, by slot and number in the sequence
        pictures = self._context // SMALLEST_PICTURE + 1
        self._grids = torch.zeros(slots, pictures, 2, dtype=torch.int64, device=self._device)
        # what each slot reads next where that is a vector; always this tensor
        self._vectors: Tensor | None = None
        if backbone.kind != "discrete":
            self._vectors = torch.zeros(slots, 1, backbone.feature_width, device=self._device)
        self._painter = cast(Painter, backbone) if backbone.kind == "diffusion" else None
        self._hidden: Tensor | None = None
        """(B, D) of the last step, where pictures are painted from it."""
        self._sights = None if backbone.synchronizer is None else Sights(backbone.synchronizer, slots)
        self._idle = [Drawing(0, UNLIMITED, slot, slot) for slot in range(slots)]
        self._blank: dict[PictureForm, Tensor | None] = {}
        self._permitted: Tensor | None = None
        self._static: StaticStep | None = None
        if capture:
            numbers = torch.zeros(slots, WIDTH, dtype=torch.int64, device=self._device)
            graphs = CudaGraphs(self._device) if self._device.type == "cuda" else None
            self._static = StaticStep(self._compute, numbers, graphs)
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
        room = self._context - len(request.prompt)
        row = self._rows[request.id] = Row(
            request,
            places[0],
            places[1:],
            AnswerState(request.config, self._backbone.tokens, request.form, room),
            TextStream(self._backbone.detokenize),
            torch.Generator().manual_seed(request.config.seed),
            token=int(request.prompt.ids[-1]),
            prompt_images=sum(isinstance(span, ImageSpan) for span in request.prompt.spans),
        )
        self._prefill(row)

    def _prefill(self, row: Row) -> None:
        """Read what stands before each place of a row into its slot: one request at a time, in one forward."""
        sequences, places = (row.request.prompt, *row.request.shadows), row.places
        counts = [place.position for place in places]
        length = max(counts)
        if not length:
            return
        spans = [_first(sequence, count) for sequence, count in zip(sequences, counts, strict=True)]
        layout = lay_out(spans).to(self._device)
        ids = torch.full((len(places), length), self._backbone.tokens.pad)
        features = None
        for b, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            ids[b, :count] = sequence.ids[:count]
            given = sequence.dense_features()
            if given is not None:
                features = given.new_zeros(*ids.shape, given.shape[-1]) if features is None else features
                features[b, :count] = given[:count]
        # what stands in a slot after its own positions is hidden, then written over
        positions = torch.arange(length, device=self._device).expand(len(places), -1)
        step = self._cache.step(positions, reach=length, slots=[place.slot for place in places])
        features = None if features is None else features.to(self._device)
        if self._sights is not None:
            sight, vectors = self._look_at_prompt(row, sequences, length)
            layout, features = layout.seeing(sight), features if vectors is None else vectors
        embeds = self._backbone.embed(ids.to(self._device), layout, features)
        hidden = self._backbone.forward(embeds, layout, step)
        if self._painter is not None:
            row.hidden.append(hidden[0, : counts[0]])

    def _look_at_prompt(self, row: Row, sequences: Sequence[TokenSequence], length: int) -> tuple[Sight, Tensor | None]:
        """What the first `length` positions of a prompt and its shadows see, and (B, length, D) their vectors, if any.

        The pictures are kept for the steps that follow.
        """
        synchronizer, tokens = self._backbone.synchronizer, self._backbone.tokens
        assert synchronizer is not None and self._sights is not None
        layout = lay_out([sequence.spans for sequence in sequences]).to(self._device)
        ids = torch.full(layout.shape, tokens.pad, device=self._device)
        for b, sequence in enumerate(sequences):
            ids[b, : len(sequence)] = sequence.ids
        pixels = [picture.seen for sequence in sequences for picture in sequence.pixels]
        stacked = torch.stack(pixels) if pixels else None
        layout, vectors, looks = see(synchronizer, stacked, ids, layout, tokens.begin)
        if looks is not None:
            each = looks.split()
            for place, sequence in zip(row.places, sequences, strict=True):
                of_one, each = each[: len(sequence.pixels)], each[len(sequence.pixels) :]
                if of_one:
                    self._sights.add([place.slot], Looks.joined(of_one))
                if place is row.place:
                    self._remember(row, of_one)
        if vectors is not None and row.token == FEATURE:
            assert self._vectors is not None
            self._vectors[row.place.slot] = vectors[0, row.place.position]
        return layout.sight[:length], None if vectors is None else vectors[:, :length]

    def _remember(self, row: Row, looks: Sequence[Looks]) -> None:
        """Keep what the next picture is painted from."""
        if self._painter is not None:
            row.looks = [*row.looks, *looks][-self._painter.looks_back :]

    def _decode(self) -> list[Event]:
        inputs = self._inputs()
        rows = list(self._rows.values())
        forced = [row.state.forced() for row in rows]
        kind = self._kind(inputs, is_choosing=None in forced)
        numbers = to_numbers(inputs, self._drawings())
        sight = self._sight()
        with self._packs.in_use():
            if self._static is None:
                elements = self._compute(numbers.to(self._device), kind, sight)
            else:
                elements = self._static(numbers, kind)
        chosen = [] if elements is None else elements.tolist()  # the one wait for the device
        events: list[Event] = []
        for row, without_choice in zip(rows, forced, strict=True):
            for place in row.places:
                place.position += inputs[place.slot].is_real
            if self._hidden is not None:
                row.hidden.append(self._hidden[row.place.slot, None])
            if self._painter is not None and row.state.may() == May.PATCH:
                events += self._paint(row, self._painter)
            else:
                events += self._take(row, chosen[row.place.slot] if without_choice is None else without_choice)
        return events

    def _sight(self) -> Sight | None:
        """What each slot sees in the coming step."""
        synchronizer = self._backbone.synchronizer
        if self._sights is None or synchronizer is None:
            return None
        seen = [0] * self._slots
        for row in self._rows.values():
            # the last of two shadows knows nothing but the picture being written
            for place in row.places[:2]:
                seen[place.slot] = row.seen(synchronizer.sees_itself)
        return self._sights.step(seen)

    def _kind(self, inputs: Sequence[Input], is_choosing: bool) -> Kind:
        """What of the coming step is no number."""
        # where no row has a choice, no head is run, nor one that no row needs; one that some row needs runs for all
        predicted = {each.predicts.modality for each in inputs} if is_choosing else set()
        return Kind(
            self._cache.width(max(each.position for each in inputs) + 1),
            text=Modality.TEXT in predicted,
            image=Modality.IMAGE in predicted and self._painter is None,
            guided=any(row.is_guided for row in self._rows.values()),
            greedy=all(row.choice.temperature == 0 for row in self._rows.values()),
        )

    def _compute(self, numbers: Tensor, kind: Kind, sight: Sight | None = None) -> Tensor | None:
        """(B, WIDTH) -> (B,) the next element of each slot, INVALID where no choice is left; None without a head."""
        step = StepTensors.of(numbers, self._grids, kind.greedy)
        layout = step.layout if sight is None else step.layout.seeing(sight)
        embeds = self._backbone.embed(step.ids, layout, self._vectors)
        where = self._cache.step(step.positions, reach=kind.width, rings=self._rings)
        hidden = self._backbone.forward(embeds, layout, where)[:, 0]
        self._hidden = None if self._painter is None else hidden
        text = self._text(hidden, step) if kind.text else None
        image = self._image(hidden, step, kind.guided) if kind.image else None
        if text is None or image is None:
            return text if image is None else image
        return torch.where(step.is_image, image, text)

    def _inputs(self) -> list[Input]:
        """What each slot reads now."""
        pad = self._backbone.tokens.pad
        inputs = [Input(pad, 0)] * self._slots
        for row in self._rows.values():
            inputs[row.place.slot] = row.input()
            for shadow in row.shadows:
                inputs[shadow.slot] = row.shadow_input(shadow, pad)
        return inputs

    def _drawings(self) -> list[Drawing]:
        """How each slot chooses."""
        drawings = list(self._idle)
        for row in self._rows.values():
            slot, choice = row.place.slot, row.choice
            shadows = [each.slot for each in row.shadows] if row.is_guided else []
            without_text, without_all = (*shadows, slot, slot)[:2]
            text, images = row.request.guidance if row.is_guided else (1.0, 1.0)
            drawings[slot] = Drawing(
                row.state.may(), choice.top_k or UNLIMITED, without_text, without_all,
                choice.temperature, choice.top_p, row.uniform(), text, images,
            )  # fmt: skip
        return drawings

    def _text(self, hidden: Tensor, step: StepTensors) -> Tensor:
        """(B, D) -> (B,) the text token that each slot would write."""
        logits = self._backbone.text_logits(hidden)
        if self._permitted is None:
            self._permitted = _permitted(self._backbone.tokens, logits.shape[-1]).to(self._device)
        return choose(logits.masked_fill(~self._permitted[step.may], -torch.inf), step.draws)

    def _image(self, hidden: Tensor, step: StepTensors, guided: bool) -> Tensor:
        """(B, D) -> (B,) the element of a picture that each slot would write; vectors are kept in `_vectors`."""
        if self._vectors is not None:
            self._vectors.copy_(self._backbone.image_features(hidden).unsqueeze(1))
            return torch.where(self._vectors.isfinite().all(-1)[:, 0], FEATURE, INVALID)
        logits = self._backbone.image_logits(hidden)
        if guided:
            without_text, without_all = step.sources
            logits = guide(logits, logits[without_text], logits[without_all], *step.scales)
        codes = choose(logits, step.draws)
        return torch.where(codes == INVALID, INVALID, codes + self._backbone.vocabulary)

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
                row.vectors.append(self._vectors[row.place.slot, 0].clone())
            if state.is_complete:
                vectors = torch.stack(row.vectors).float() if row.vectors else None
                elements = Elements(row.request.form, torch.tensor(row.elements, device=self._device), vectors)
                picture = self._render(row, elements)
                self._look_at_answer(row, picture)
                return [ImageReady(request, state.images - 1, picture)]
        return []

    def _look_at_answer(self, row: Row, picture: PILImage.Image) -> Looks | None:
        """A picture of the answer is seen by what follows."""
        if self._sights is None:
            return None
        pixels, synchronizer = pixels_of(self._backbone, picture, learn=False), self._backbone.synchronizer
        assert pixels is not None and synchronizer is not None
        looks = synchronizer.look(pixels.seen.unsqueeze(0))
        self._sights.add([place.slot for place in row.places[:2]], looks)
        self._remember(row, [looks])
        return looks

    def _paint(self, row: Row, painter: Painter) -> list[Event]:
        """Paint the picture whose begin token was just read, and read all of it but the last element."""
        context = torch.cat(row.hidden)
        if not context[-1].isfinite().all():
            return self._finish(row, "invalid_logits")
        wanted, state = row.request.config, row.state
        options = DecodingOptions(
            wanted.seed + state.images - 1,
            wanted.diffusion.steps,
            wanted.diffusion.guidance,
            scheduler=wanted.diffusion.scheduler,
        )
        picture = painter.paint(context, Looks.joined(row.looks) if row.looks else None, options)
        looks = self._look_at_answer(row, picture)
        assert looks is not None and looks.tokens is not None and self._vectors is not None
        self._read_painted(row, looks.tokens)
        self._vectors[row.place.slot] = looks.tokens[0, -1]
        row.token = FEATURE
        for _ in range(row.request.form.patches):
            state.advance(FEATURE)
        return [ImageReady(row.request.id, state.images - 1, picture)]

    def _read_painted(self, row: Row, vectors: Tensor) -> None:
        """(1, P, D), all but the last, which the next step reads. The begin token is read again: what the adapters make
        of a picture starts with it."""
        form, place = row.request.form, row.place
        count = form.patches
        # [IMG] and the elements after it, which all but it see their own picture
        layout = lay_out([(TextSpan(1), ImageSpan(form.rows, form.cols, count - 1, after=0))]).to(self._device)
        ids = torch.full((1, count), FEATURE, device=self._device)
        ids[0, 0] = self._backbone.tokens.begin_image
        features = torch.cat((torch.zeros_like(vectors[:, :1]), vectors[:, :-1]), 1)
        visible = torch.ones(1, count, row.image + 1, dtype=torch.bool, device=self._device)
        visible[:, 0, -1] = False
        assert self._sights is not None
        layout = layout.seeing(self._sights.of(place.slot, visible))
        first = place.position - 1
        positions = torch.arange(first, first + count, device=self._device).unsqueeze(0)
        step = self._cache.step(positions, reach=first + count, slots=[place.slot])
        hidden = self._backbone.forward(self._backbone.embed(ids, layout, features), layout, step)
        row.hidden.append(hidden[0, 1:])
        place.position = first + count

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
            engine = _Vectors(self._backbone, slots=1, context=form.length + SMALLEST_PICTURE, capture=False)
            engine._start(Request(0, config, nothing, form, Guidance(1.0, 1.0)))
            for _ in engine.run():
                pass
            self._blank[form] = None if engine.elements is None else engine.elements.features
        return self._blank[form]

    def _finish(self, row: Row, reason: Reason) -> list[Event]:
        del self._rows[row.request.id]
        for slot in row.slots:
            self._cache.clear(slot)
            if self._sights is not None:
                self._sights.clear(slot)
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


def _first(sequence: TokenSequence, count: int) -> tuple[Span, ...]:
    """The spans of its first `count` positions, all but some of the last one."""
    last, left = sequence.spans[-1], sequence.spans[-1].length - len(sequence) + count
    return (*sequence.spans[:-1], TextSpan(left) if isinstance(last, TextSpan) else replace(last, present=left))


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
