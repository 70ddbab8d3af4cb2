"""What every generalist offers: tokens, a decoder stack whose heads are applied outside, and pictures as elements.

A protocol, no base class. Everything else - masks, caches, guidance, losses, the interleaved loop - is generic and
lives above (`training/`, `generation/`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from weft.document import Document, Image, Text
from weft.errors import ContextError
from weft.images import decode_image
from weft.layout import ImageSpan, ModalityLayout, Span, TextSpan, TokenSequence

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from weft.adapters.routing import RoutingState

Kind = Literal["discrete", "continuous", "diffusion"]


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the structural tokens in a model's vocabulary."""

    begin: int
    end: int
    pad: int
    separator: int
    """Ends a turn."""
    begin_image: int
    end_image: int

    def __iter__(self) -> Iterator[int]:
        return iter((self.begin, self.end, self.pad, self.separator, self.begin_image, self.end_image))


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
    """B batch, L positions, D model width, P patches per picture, K picture codes."""

    name: str
    kind: Kind
    tokens: SpecialTokens
    grid: tuple[int, int]
    """Rows and columns of a picture's patches."""
    picture_size: tuple[int, int]
    """(width, height) in pixels of the pictures it makes."""
    context_length: int
    decoder: nn.Module
    """The stack that holds the linear layers adapters attach to."""
    routing: "RoutingState | None"
    """Set by `weft.adapters.attach`; `forward` hands it the layout."""
    fingerprint: str
    """Hash of the frozen weights: what an adapter was trained on."""

    def tokenize(self, text: str) -> list[int]: ...
    def detokenize(self, ids: Sequence[int]) -> str: ...

    def encode_images(self, pictures: "Sequence[PILImage.Image]") -> Tensor:
        """Pictures of any size -> (M, P) ids of their elements."""
        ...

    def decode_image(self, ids: Tensor) -> "PILImage.Image":
        """(P,) element ids -> picture."""
        ...

    def embed(self, ids: Tensor, layout: ModalityLayout) -> Tensor:
        """(B, L) -> (B, L, D)."""
        ...

    def forward(self, embeds: Tensor, layout: ModalityLayout, step: DecodeStep | None = None) -> Tensor:
        """The decoder stack: (B, L, D) -> (B, L, D) hidden states. Without `step`, a full causal pass."""
        ...

    def text_logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V); V covers every id, picture elements are -inf."""
        ...

    def image_logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V); everything but picture elements is -inf."""
        ...

    def parameters(self) -> Any: ...


def encode_document(backbone: Backbone, document: Document, *, answer: bool = False) -> TokenSequence:
    """Tokens, spans and targets of a document whose pictures hold their bytes.

        <s> user parts <sep> assistant parts <sep> user parts <sep> assistant parts </s>

    Targets are the assistant's elements (or what `Turn.loss` says), with the token that ends the turn: `</s>` after the
    last, `<sep>` otherwise.

    Args:
        answer: the document is a prompt: end it with the separator after which the assistant writes.

    Raises:
        ImageError: a picture cannot be decoded.
    """
    ids: list[int] = [backbone.tokens.begin]
    spans: list[Span] = [TextSpan(1)]
    target: list[bool] = [False]

    def add(new: Sequence[int], learn: bool, span: Span) -> None:
        ids.extend(new)
        target.extend([learn] * len(new))
        if isinstance(span, TextSpan) and isinstance(spans[-1], TextSpan):
            spans[-1] = TextSpan(spans[-1].length + span.length)
        elif span.length:
            spans.append(span)

    def text(new: Sequence[int], learn: bool) -> None:
        add(new, learn, TextSpan(len(new)))

    pictures = [
        decode_image(_bytes_of(image, document), where=_where(document, image, i))
        for i, image in enumerate(document.images)
    ]
    codes = iter(backbone.encode_images(pictures).tolist() if pictures else [])
    rows, cols = backbone.grid
    for i, turn in enumerate(document.turns):
        learn = turn.role == "assistant" if turn.loss is None else turn.loss
        for part in turn.parts:
            if isinstance(part, Text):
                text(backbone.tokenize(part.text), learn)
            else:
                text([backbone.tokens.begin_image], learn)
                add(next(codes), learn, ImageSpan(rows, cols, given=not learn))
                text([backbone.tokens.end_image], learn)
        last = i == len(document.turns) - 1
        if not (last and turn.role != "assistant" and not answer):
            text([backbone.tokens.end if last and not answer else backbone.tokens.separator], learn)
    return TokenSequence(torch.tensor(ids), tuple(spans), torch.tensor(target), document.id)


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
