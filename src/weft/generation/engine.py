"""Requests in, events out: several answers written at once, each row in text or in a picture on its own.

    engine = Engine(backbone, slots=8)
    engine.submit(document, SamplingConfig(...))
    for event in engine.run(): ...

A prompt is prefilled alone, then every step is one forward of all slots, one position each, whether a slot has a row or
not: what a row computes does not depend on its neighbours, and the shapes do not change. The last token of the prompt
and everything after it is read by such steps, so that the adapters' partial sums start with each picture's own `[IMG]`.

A guided request holds a second slot, its shadow: the prompt without its text, then the pictures of the answer.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from weft.backbones.base import Backbone, SpecialTokens, check_fits, encode_document
from weft.document import Document, Image, Turn
from weft.errors import ConfigError, DocumentError, UsageError
from weft.generation.cache import SlotCache
from weft.generation.events import Answer, Event, Finished, ImageBegin, ImageReady, Reason, TextDelta, Usage, collect
from weft.generation.inputs import Input, to_tensors
from weft.generation.rows import Place, Request, Row
from weft.generation.sampling import GREEDY, INVALID, Draws, SamplingConfig, choose, guide
from weft.generation.state import AnswerState, May, room_needed
from weft.generation.text import TextStream
from weft.layout import ImageSpan, Modality, TokenSequence, lay_out


class Engine:
    """Writes answers with one backbone.

    Args:
        slots: rows of every decoding step: answers written at once (a guided one takes two). The same request gets the
            same answer whatever is answered beside it, as long as this number is the same.
        context: positions of a sequence, prompt and answer; default and upper limit: the backbone's.
    """

    def __init__(self, backbone: Backbone, *, slots: int = 8, context: int | None = None) -> None:
        if backbone.kind != "discrete":
            raise UsageError(f"{backbone.name} makes {backbone.kind} pictures; this engine writes discrete ones")
        if slots < 1:
            raise UsageError(f"an engine needs at least one slot, got {slots}")
        if context is not None and not 1 < context <= backbone.context_length:
            raise UsageError(f"a context of {context} was asked for; {backbone.name} has {backbone.context_length}")
        self._backbone, self._slots = backbone, slots
        self._context = backbone.context_length if context is None else context
        self._patches = backbone.grid[0] * backbone.grid[1]
        self._device = next(iter(backbone.parameters())).device
        self._cache = SlotCache(slots, self._context)
        self._rings = None
        if backbone.routing is not None:
            from weft.adapters.rings import RingCache

            self._rings = RingCache(slots, columns=backbone.grid[1])
        # every picture has the same grid, and a context holds no more of them than this
        pictures = self._context // (self._patches + 2) + 1
        self._grids = torch.tensor(backbone.grid, device=self._device).expand(slots, pictures, 2)
        self._permitted: Tensor | None = None
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
            UsageError: pictures are guided and the engine has one slot.
        """
        if not document.turns or document.turns[-1].role == "assistant":
            raise DocumentError("a prompt ends with a turn to be answered", where=document.id, fix="add a user turn")
        needed = room_needed(config, self._patches)
        if config.max_tokens is not None and config.max_tokens < needed:
            raise ConfigError(
                f"max_tokens = {config.max_tokens} has no room for {config.owed_images} pictures and the end",
                fix=f"allow at least {needed}",
            )
        prompt = encode_document(self._backbone, document, answer=True)
        check_fits(prompt, self._context, reserve=needed)
        unconditional = None
        if config.guidance != 1.0 and config.max_images:
            if self._slots == 1:
                raise UsageError("guided pictures take two slots, the engine has one", fix="raise slots")
            unconditional = encode_document(self._backbone, _without_text(document), answer=True)
        request = Request(next(self._ids), config, prompt, unconditional)
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
            request = self._waiting.popleft()
            slots, self._free = self._free[: request.slots], self._free[request.slots :]
            last, shadow = len(request.prompt) - 1, None
            self._prefill(request.prompt, last, slots[0])
            if request.unconditional is not None:
                shadow = Place(slots[1], len(request.unconditional))
                self._prefill(request.unconditional, shadow.position, shadow.slot)
            self._rows[request.id] = Row(
                request,
                Place(slots[0], last),
                shadow,
                AnswerState(request.config, self._backbone.tokens, self._patches, self._context - len(request.prompt)),
                TextStream(self._backbone.detokenize),
                torch.Generator().manual_seed(request.config.seed),
                token=int(request.prompt.ids[last]),
                prompt_images=sum(isinstance(span, ImageSpan) for span in request.prompt.spans),
            )

    def _prefill(self, sequence: TokenSequence, count: int, slot: int) -> None:
        """Read the first `count` positions, which end in text, into a slot."""
        layout = lay_out([sequence.spans])[:count].to(self._device)
        positions = torch.arange(count, device=self._device)[None]
        step = self._cache.step(positions, reach=count, slots=[slot])
        embeds = self._backbone.embed(sequence.ids[None, :count].to(self._device), layout)
        self._backbone.forward(embeds, layout, step)

    def _decode(self) -> list[Event]:
        inputs = self._inputs()
        ids, positions, layout = to_tensors(inputs, self._grids)
        step = self._cache.step(positions, reach=max(each.position for each in inputs) + 1, rings=self._rings)
        hidden = self._backbone.forward(self._backbone.embed(ids, layout), layout, step)[:, 0]
        chosen = self._choose(self._logits(hidden, inputs))
        events: list[Event] = []
        for row in list(self._rows.values()):
            for place in filter(None, (row.place, row.shadow)):
                place.position += inputs[place.slot].is_real
            forced = row.state.forced()
            events += self._take(row, chosen[row.place.slot] if forced is None else forced)
        return events

    def _inputs(self) -> list[Input]:
        """What each slot reads now."""
        tokens, grid = self._backbone.tokens, self._backbone.grid
        inputs = [Input(tokens.pad, 0)] * self._slots
        for row in self._rows.values():
            inputs[row.place.slot] = row.input(grid)
            if row.shadow is not None:
                inputs[row.shadow.slot] = row.shadow_input(row.shadow, grid, tokens.pad, tokens.end_image)
        return inputs

    def _logits(self, hidden: Tensor, inputs: Sequence[Input]) -> Tensor:
        """(B, D) -> (B, V), each row from the head of what it predicts, pictures guided."""
        is_image = [each.predicts.modality == Modality.IMAGE for each in inputs]
        # a head that no row needs is left out; one that some row needs runs for all, so that shapes stay the same
        if not any(is_image):
            return self._backbone.text_logits(hidden)
        logits = self._backbone.image_logits(hidden)
        if not all(is_image):
            rows = torch.tensor(is_image, device=self._device)[:, None]
            logits = torch.where(rows, logits, self._backbone.text_logits(hidden))
        shadows, scales = list(range(self._slots)), [1.0] * self._slots
        for row in self._rows.values():
            if row.shadow is not None:
                shadows[row.place.slot], scales[row.place.slot] = row.shadow.slot, row.guidance
        if all(scale == 1.0 for scale in scales):
            return logits
        return guide(logits, logits[shadows], torch.tensor(scales, device=self._device))

    def _choose(self, logits: Tensor) -> list[int]:
        """(B, V) -> the element of each slot, INVALID where no choice is left; the one wait for the device."""
        may, choices, uniforms = [May(0)] * self._slots, [GREEDY] * self._slots, [0.0] * self._slots
        for row in self._rows.values():
            slot = row.place.slot
            may[slot], choices[slot], uniforms[slot] = row.state.may(), row.choice, row.uniform()
        if self._permitted is None:
            self._permitted = _permitted(self._backbone.tokens, logits.shape[-1]).to(self._device)
        is_allowed = self._permitted[torch.tensor(may, device=self._device)]
        logits = logits.masked_fill(~is_allowed, -torch.inf)
        return choose(logits, Draws.of(choices, uniforms, self._device)).tolist()

    def _take(self, row: Row, token: int) -> list[Event]:
        """Add an element to an answer."""
        if token == INVALID:
            return self._finish(row, "invalid_logits")
        request, state = row.request.id, row.state
        row.token = token
        match state.advance(token):
            case May.TEXT:
                return _text(request, row.text.push(token))
            case May.BEGIN_IMAGE:
                if self._rings is not None:
                    self._rings.reset(row.slots)
                return [*_text(request, row.text.flush()), ImageBegin(request, state.images - 1)]
            case May.PATCH:
                row.patches.append(token)
                if len(row.patches) == self._patches:
                    picture = self._backbone.decode_image(torch.tensor(row.patches, device=self._device))
                    row.patches.clear()
                    return [ImageReady(request, state.images - 1, picture)]
            case May.END:
                assert state.reason is not None
                return self._finish(row, state.reason)
        return []

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


def _without_text(document: Document) -> Document:
    turns = (Turn(turn.role, tuple(part for part in turn.parts if isinstance(part, Image))) for turn in document.turns)
    return Document(tuple(turns), document.id)


def _permitted(tokens: SpecialTokens, vocabulary: int) -> Tensor:
    """(2 ** kinds, V) bool: the ids that each set of kinds allows. That text is no patch is the heads' business."""
    table = torch.zeros(2 ** len(May), vocabulary, dtype=torch.bool)
    for may in map(May, range(len(table))):
        if may & (May.TEXT | May.PATCH):
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
