"""One answer being written: its places in the cache, what it reads next, and how its next element is drawn."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from weft.backbones.base import PictureForm
from weft.generation.events import Usage
from weft.generation.inputs import Input, element_input
from weft.generation.sampling import Choice, SamplingConfig
from weft.generation.state import AnswerState, May
from weft.generation.text import TextStream
from weft.layout import FEATURE, TokenSequence
from weft.synchronizer.sight import Looks


class Guidance(NamedTuple):
    """Classifier-free guidance of pictures, away from the prompt's text and away from its pictures; 1 is off."""

    text: float
    images: float


@dataclass(frozen=True)
class Request:
    id: int
    config: SamplingConfig
    prompt: TokenSequence
    form: PictureForm
    """Of the answer's pictures."""
    guidance: Guidance
    shadows: tuple[TokenSequence, ...] = ()
    """What guidance leads away from: the prompt without its text; and without its pictures, if these are guided too."""

    @property
    def slots(self) -> int:
        return 1 + len(self.shadows)


@dataclass
class Place:
    """A sequence in the cache."""

    slot: int
    position: int
    """Of the next element it reads."""


@dataclass
class Row:
    request: Request
    place: Place
    shadows: list[Place]
    """The sequences that guidance leads away from; they read the answer's pictures and sleep in between."""
    state: AnswerState
    text: TextStream
    generator: torch.Generator
    token: int
    """The element read next."""
    prompt_images: int
    elements: list[int] = field(default_factory=list)
    """Of the picture being written, so far."""
    vectors: list[Tensor] = field(default_factory=list)
    """(F,) each, of those elements that are vectors."""
    hidden: list[Tensor] = field(default_factory=list)
    """(n, D) each, of all that was read, where pictures are painted from it."""
    looks: list[Looks] = field(default_factory=list)
    """Of the last pictures, one each, where pictures are painted."""

    @property
    def places(self) -> list[Place]:
        return [self.place, *self.shadows]

    @property
    def slots(self) -> list[int]:
        return [place.slot for place in self.places]

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt), self.state.text_tokens, self.state.image_tokens)

    @property
    def image(self) -> int:
        """Number, in the sequence, of the picture that was begun last."""
        return self.prompt_images + self.state.images - 1

    def input(self) -> Input:
        """What the row reads next."""
        state, form = self.state, self.request.form
        last = state.last_raster
        if self.token == FEATURE and last is None:
            last = form.patches - 1  # the prompt ends with a picture
        return element_input(self.token, self.place.position, self.image, last, state.next_raster, form.cols)

    def shadow_input(self, shadow: Place, pad: int) -> Input:
        """What a shadow reads at the same time: an element of a picture, or nothing."""
        if self.state.inside is not None:
            return replace(self.input(), position=shadow.position)
        # nothing is written where the next element will be, never over what is there
        return Input(pad, shadow.position)

    def begin_image(self) -> None:
        """Picture by picture, the last shadow knows nothing of what was written before."""
        self.elements.clear()
        self.vectors.clear()
        if len(self.shadows) == 2:
            self.shadows[1].position = len(self.request.shadows[1])

    def seen(self, sees_itself: bool) -> int:
        """Pictures of the sequence that its next input sees: those that are whole, or its own as well."""
        inside, form = self.state.inside, self.request.form
        is_open = inside is not None and inside <= len(form.before) + (0 if sees_itself else form.patches)
        return self.prompt_images + self.state.images - is_open

    @property
    def choice(self) -> Choice:
        """How the next element is drawn."""
        return self.request.config.image if self.state.may() == May.PATCH else self.request.config.text

    @property
    def is_guided(self) -> bool:
        """The next element is."""
        return bool(self.shadows) and self.state.may() == May.PATCH

    def uniform(self) -> float:
        """The number that draws the next element; the generator is used only where one is drawn."""
        if self.state.forced() is not None or self.choice.temperature == 0:
            return 0.0
        return torch.rand((), generator=self.generator).item()
