"""What every generalist offers: tokens, a decoder stack whose heads are applied outside, and pictures as elements.

A protocol, no base class. Everything else - masks, caches, guidance, losses, the interleaved loop - is generic and
lives above (`training/`, `generation/`).

A sequence is made of elements. Below `vocabulary` an id is a text token; vocabulary + k is picture code k, whatever the
model's own numbering; `FEATURE` is an element that has no id but a vector.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from weft.backbones.attention import NAME
from weft.codecs.pixels import fit, to_values
from weft.document import Document, Image, Role, Turn
from weft.errors import ContextError, UsageError
from weft.images import decode_image
from weft.layout import FEATURE, ImageSpan, ModalityLayout, Pixels, Span, TextSpan, TokenSequence

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from weft.adapters.routing import RoutingState
    from weft.synchronizer.sight import Looks, Synchronizer

PIXELS_AT_ONCE = 2**24
"""Of a document's pictures: where together they have more, they are decoded and encoded one after the other."""
Kind = Literal["discrete", "continuous", "diffusion"]
"""Pictures are written as codes from a distribution, as vectors from a regression, or at once from the context."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the structural tokens in a model's vocabulary. Two may be the same where the model has one for both."""

    begin: int
    end: int
    """Ends an answer."""
    pad: int
    separator: int
    """Ends a turn, and an answer as well."""
    begin_image: int
    end_image: int
    others: tuple[int, ...] = ()
    """More ids that are never written as text: placeholders, roles, what stands inside pictures."""

    def __iter__(self) -> Iterator[int]:
        return iter((self.begin, self.end, self.pad, self.separator, self.begin_image, self.end_image, *self.others))


@dataclass(frozen=True)
class ChatFormat:
    """The tokens around turns.

    start (before_user parts after_user | before_assistant parts after_assistant)* ... end
    """

    start: tuple[int, ...]
    """Begins every sequence; its first token is repeated where a long sequence is cut in pieces."""
    user: tuple[tuple[int, ...], tuple[int, ...]]
    """Before and after a user's turn."""
    assistant: tuple[tuple[int, ...], tuple[int, ...]]
    """Before and after an assistant's turn; what stands after it is learnt with it."""
    end: tuple[int, ...]
    """After the last turn, if it is the assistant's, instead of its usual end."""
    system: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Before and after a system turn; None: as a user's."""
    blank: int | None = None
    """What stands in place of each token of text in a prompt that pictures are guided away from; None: nothing."""

    def around(self, role: Role) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if role == "system" and self.system is not None:
            return self.system
        return self.assistant if role == "assistant" else self.user


@dataclass(frozen=True)
class PictureForm:
    """How a picture stands in a sequence: text tokens that open it, rows x cols elements, text tokens that close it."""

    rows: int
    cols: int
    """The last column is `line_end` where that is given."""
    before: tuple[int, ...]
    """The first is `begin_image`, by which the model decides to write a picture; the others follow without choice."""
    after: tuple[int, ...]
    """They follow the last element without choice."""
    line_end: int | None = None
    """The id that closes every row, without choice."""

    @property
    def patches(self) -> int:
        """P, line ends among them."""
        return self.rows * self.cols

    @property
    def length(self) -> int:
        return len(self.before) + self.patches + len(self.after)

    def forced(self, raster: int) -> int | None:
        """The id of element `raster` (row by row), where there is no choice."""
        return self.line_end if self.line_end is not None and raster % self.cols == self.cols - 1 else None


@dataclass(frozen=True)
class Elements:
    """A picture as a model reads or writes it."""

    form: PictureForm
    ids: Tensor
    """(P,) int64: vocabulary + code, or a line end; `FEATURE` throughout where `features` are given."""
    features: Tensor | None = None
    """(P, F) float32."""


@dataclass(frozen=True)
class DecodingOptions:
    """How elements become pixels where a diffusion model does it; others ignore it. None: as the model's makers do."""

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    negative: Tensor | None = None
    """(P, F) what guidance leads away from; None: the model's features of a picture that is zero once normalised."""
    scheduler: str | None = None
    """By the name of its class in diffusers; models that know one only ignore it."""


@dataclass(frozen=True)
class DecodeStep:
    """Where the rows of a cached forward stand: made by the engine, read by the decoder stack and the adapters."""

    slots: Tensor
    """(B,) cache slot of each row."""
    positions: Tensor
    """(B, q) position of each input in its own sequence."""
    mask: Tensor
    """(B, 1, q, width) bool, True where a key may be read."""
    keys_values: Any
    """A transformers `Cache` that writes each row at its own positions."""
    rings: Any
    """The adapters' partial sums (`weft.adapters.rings.RingCache`), or None."""


class Backbone(Protocol):
    """B batch, L positions, D model width, P elements of a picture, V text vocabulary, K picture codes, F features."""

    name: str
    kind: Kind
    tokens: SpecialTokens
    chat: ChatFormat
    vocabulary: int
    """V: element ids below it are the model's text tokens, those from it on are picture codes."""
    codes: int
    """K; 0 where pictures are no codes."""
    feature_width: int
    """F of the vectors that stand for `FEATURE` elements; 0 where there are none."""
    form: PictureForm
    """Of the pictures it makes, unless asked for another size."""
    widest: int
    """Columns of the widest form it can make."""
    guidance: tuple[float, float]
    """The scales that its makers use for classifier-free guidance of pictures drawn as codes, away from the prompt's
    text and away from its pictures; 1 is off."""
    canvas: int
    """Pixels along one side of what a model of kind diffusion paints; 0 for others."""
    context_length: int
    decoder: nn.Module
    """The stack that holds the linear layers adapters attach to."""
    routing: "RoutingState | None"
    """Set by `weft.adapters.attach`; `forward` hands it the layout."""
    synchronizer: "Synchronizer | None"
    """Its own, or set by `weft.synchronizer.attach_synchronizer`; `forward` gives it what the layout says is seen."""
    fingerprint: str
    """Hash of the frozen weights: what an adapter was trained on."""
    revision: str | None
    """The commit on the hub that it came from."""

    @property
    def device(self) -> torch.device:
        """Where inputs of `embed` go and hidden states come out."""
        ...

    def tokenize(self, text: str) -> list[int]: ...
    def detokenize(self, ids: Sequence[int]) -> str: ...

    def form_of(self, size: tuple[int, int]) -> PictureForm:
        """The form of a picture of (width, height) pixels.

        Raises:
            UsageError: this model makes no pictures of that size; names those that it makes.
        """
        ...

    def encode_images(self, pictures: "Sequence[PILImage.Image]", *, generated: bool) -> list[Elements]:
        """Pictures of any size as elements.

        Args:
            generated: as the model writes pictures; otherwise as it reads them, which may be another way.
        """
        ...

    def decode_image(self, elements: Elements, options: DecodingOptions = ...) -> "PILImage.Image":
        """Elements as the model writes them -> picture.

        Raises:
            CheckpointError: the checkpoint came without a pixel decoder; says where to get one.
        """
        ...

    def embed(self, ids: Tensor, layout: ModalityLayout, features: Tensor | None = None) -> Tensor:
        """(B, L) element ids and (B, L, F) the vectors of those that are `FEATURE` -> (B, L, D)."""
        ...

    def forward(self, embeds: Tensor, layout: ModalityLayout, step: DecodeStep | None = None) -> Tensor:
        """The decoder stack: (B, L, D) -> (B, L, D) hidden states. Without `step`, a full causal pass."""
        ...

    def text_logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V); ids that are no text and no structure are -inf."""
        ...

    def image_logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., K), of kind discrete."""
        ...

    def image_features(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., F) the next vector, of kind continuous."""
        ...

    def parameters(self) -> Any: ...
    def named_children(self) -> Any: ...


class Painter(Backbone, Protocol):
    """A backbone of kind diffusion: it paints a picture at once, from what stands before it."""

    looks_back: int
    """So many earlier pictures of the document are looked at while one is painted."""

    def painting_errors(
        self, hidden: Tensor, ids: Tensor, layout: ModalityLayout, looks: "Looks", painted: Tensor
    ) -> Tensor:
        """What is minimised where pictures are painted at once, of kind diffusion.

        Noise and its times are drawn from torch's own generator.

        Args:
            hidden: (B, L, D) of the whole batch.
            ids: (B, L) elements.
            looks: of all M pictures of the batch.
            painted: (T, 3, canvas, canvas) uint8, the pictures that are not given in the layout, in order.

        Returns:
            (T,) mean squared errors.
        """
        ...

    def paint(self, context: Tensor, before: "Looks | None", options: DecodingOptions = ...) -> "PILImage.Image":
        """One picture, of kind diffusion.

        Args:
            context: (n, D) hidden states of its document, the last one that of its begin token.
            before: the pictures of the document before it, in order; None: there are none.
        """
        ...


class Stack(Protocol):
    """What of a backbone `run_decoder` runs."""

    decoder: nn.Module
    routing: "RoutingState | None"
    synchronizer: "Synchronizer | None"


def run_decoder(backbone: Stack, embeds: Tensor, layout: ModalityLayout, step: DecodeStep | None) -> Tensor:
    """`Backbone.forward` for a stack with the interface of transformers' LLaMA-like models."""
    decoder, routing = backbone.decoder, backbone.routing
    if routing is not None:
        routing.set(layout, step.rings if step else None, step.slots if step else None)
    if backbone.synchronizer is not None:
        backbone.synchronizer.show(layout)
    if step is None:
        if layout.documents is not None:
            _check_keeps_apart(decoder)
        out = decoder(inputs_embeds=embeds, attention_mask=layout.readable, position_ids=layout.places, use_cache=False)
    else:
        out = decoder(
            inputs_embeds=embeds,
            attention_mask=step.mask,
            position_ids=step.positions,
            past_key_values=step.keys_values,
            use_cache=True,
        )
    return out.last_hidden_state


def _check_keeps_apart(decoder: nn.Module) -> None:
    """Raise `UsageError` unless the stack's attention takes (B, 1, L, L) bool: others misread it without a word."""
    config: Any = decoder.config
    kind = config._attn_implementation
    if kind not in ("sdpa", NAME):
        raise UsageError(
            f"the attention of {type(decoder).__name__} ({kind}) cannot keep the documents of a row apart",
            fix="data.rows.attention: full, or data.packing: none",
        )


Keep = Literal["all", "pictures", "nothing"]
"""Of a prompt: all of it; its pictures; only what begins a sequence. Guidance leads pictures away from the last two:
from the text, or from text and pictures."""


def encode_document(
    backbone: Backbone, document: Document, *, answer: bool = False, keep: Keep = "all"
) -> TokenSequence:
    """Elements, spans and targets of a document whose pictures hold their bytes.

    The tokens around turns are the model's `chat` format. Targets are the assistant's elements (or what `Turn.loss`
    says), with the tokens that end the turn; what follows without choice inside a picture is not learnt.

    Args:
        answer: the document is a prompt: end it with the tokens after which the assistant writes.
        keep: what of a prompt remains; without `all`, nothing but pictures, and `chat.blank` for each token of text,
            stands between `chat.start`'s first token and the answer.

    Raises:
        ImageError: a picture cannot be decoded.
    """
    writing, chat = _Writing(), backbone.chat

    def text(ids: Sequence[int], learn: bool = False) -> None:
        if keep != "all":
            ids = [] if chat.blank is None else [chat.blank] * len(ids)
        writing.text(ids, learn)

    writing.text(chat.start[:1], learn=False)
    text(chat.start[1:])
    pictures = _elements(backbone, document) if keep != "nothing" else iter(())
    for i, turn in enumerate(document.turns):
        learn = _is_learnt(turn)
        before, after = chat.around(turn.role)
        text(before)
        for part in turn.parts:
            if isinstance(part, Image):
                if keep != "nothing":
                    writing.picture(*next(pictures), backbone.vocabulary, learn)
            else:
                text(backbone.tokenize(part.text), learn)
        if i < len(document.turns) - 1 or answer:
            text(after, learn)
        elif turn.role == "assistant":
            text(chat.end, learn)
    if answer:
        text(chat.assistant[0])
    return writing.sequence(document.id)


@dataclass
class _Writing:
    """A sequence being put together."""

    ids: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    target: list[bool] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)

    def text(self, new: Sequence[int], learn: bool) -> None:
        self.ids.extend(new)
        self.target.extend([learn] * len(new))
        if self.spans and isinstance(self.spans[-1], TextSpan):
            self.spans[-1] = TextSpan(self.spans[-1].length + len(new))
        elif new:
            self.spans.append(TextSpan(len(new)))

    def picture(self, elements: Elements, pixels: Pixels | None, vocabulary: int, learn: bool) -> None:
        form, ids = elements.form, elements.ids.tolist()
        # where pictures are painted from what stands before them, none is learnt that nothing stands before
        is_first = len(self.ids) == 1 and pixels is not None and pixels.painted is not None
        self.text(form.before[:1], learn and not is_first)
        self.text(form.before[1:], learn=False)
        self.spans.append(
            ImageSpan(form.rows, form.cols, given=not learn, before=len(form.before), after=len(form.after))
        )
        self.ids.extend(ids)
        self.target.extend(learn and (id == FEATURE or id >= vocabulary) for id in ids)
        if elements.features is not None:
            self.features.append(elements.features.float().cpu())
        if pixels is not None:
            self.pixels.append(pixels)
        self.text(form.after, learn)

    def sequence(self, name: str | None) -> TokenSequence:
        features = torch.cat(self.features) if self.features else None
        return TokenSequence(
            torch.tensor(self.ids), tuple(self.spans), torch.tensor(self.target), name, features, tuple(self.pixels)
        )


def _is_learnt(turn: Turn) -> bool:
    return turn.role == "assistant" if turn.loss is None else turn.loss


def _elements(backbone: Backbone, document: Document) -> Iterator[tuple[Elements, Pixels | None]]:
    """The document's pictures in order, those to be learnt as the model writes them, the others as it reads them.

    They are encoded together, as long as they do not take much memory.
    """
    learnt = [_is_learnt(turn) for turn in document.turns for part in turn.parts if isinstance(part, Image)]
    found: dict[int, tuple[Elements, Pixels | None]] = {}
    together: dict[int, PILImage.Image] = {}

    def encode(*, generated: bool) -> None:
        if together:
            encoded = backbone.encode_images(list(together.values()), generated=generated)
            for (i, picture), elements in zip(together.items(), encoded, strict=True):
                found[i] = elements, pixels_of(backbone, picture, learn=generated)
            together.clear()

    for generated in (False, True):
        for i, image in enumerate(document.images):
            if learnt[i] == generated:
                together[i] = decode_image(_bytes_of(image, document), where=_where(document, image, i))
                if sum(picture.width * picture.height for picture in together.values()) >= PIXELS_AT_ONCE:
                    encode(generated=generated)
        encode(generated=generated)
    return (found[i] for i in range(len(learnt)))


def pixels_of(backbone: Backbone, picture: "PILImage.Image", *, learn: bool) -> Pixels | None:
    """What a model that looks at pixels needs of a picture; None: it does not."""
    if backbone.synchronizer is None:
        return None
    canvas = backbone.canvas if learn else 0
    seen, painted = (fit(picture, side) if side else None for side in (backbone.synchronizer.side, canvas))
    assert seen is not None
    return Pixels(to_values(seen).byte(), None if painted is None else to_values(painted).byte())


def check_fits(sequence: TokenSequence, limit: int, *, reserve: int = 0) -> None:
    """Raise `ContextError` unless the sequence and `reserve` further positions fit into `limit`."""
    if len(sequence) + reserve > limit:
        room = f" and {reserve} are kept for the answer" if reserve else ""
        raise ContextError(
            f"the document needs {len(sequence)} positions{room}, but the context has {limit}",
            where=sequence.name,
            fix="shorten the text or use fewer pictures",
        )


def _bytes_of(image: Image, document: Document) -> bytes:
    if image.data is None:
        raise ValueError(f"document {document.id}: picture {image.path} was not read before encoding")
    return image.data


def _where(document: Document, image: Image, number: int) -> str:
    owner = f"document {document.id}, " if document.id else ""
    return f"{owner}picture {number + 1}" + (f" ({image.path})" if image.path else "")
