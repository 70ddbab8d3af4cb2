"""One answer being written: its places in the cache, what it reads next, and how its next element is drawn."""

from dataclasses import dataclass, field, replace

import torch

from weft.generation.events import Usage
from weft.generation.inputs import Input, image_input, text_input
from weft.generation.sampling import Choice, SamplingConfig
from weft.generation.state import AnswerState, May
from weft.generation.text import TextStream
from weft.layout import TokenSequence


@dataclass(frozen=True)
class Request:
    id: int
    config: SamplingConfig
    prompt: TokenSequence
    unconditional: TokenSequence | None
    """The prompt without its text, if pictures are guided."""

    @property
    def slots(self) -> int:
        return 1 if self.unconditional is None else 2


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
    shadow: Place | None
    """The unconditional sequence, which reads the answer's pictures and sleeps in between."""
    state: AnswerState
    text: TextStream
    generator: torch.Generator
    token: int
    """The element read next."""
    prompt_images: int
    patches: list[int] = field(default_factory=list)
    """Of the picture being written, so far."""

    @property
    def slots(self) -> list[int]:
        return [self.place.slot] if self.shadow is None else [self.place.slot, self.shadow.slot]

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt), self.state.text_tokens, self.state.image_tokens)

    def input(self, grid: tuple[int, int]) -> Input:
        """What the row reads next."""
        if self.state.raster is None:
            return text_input(self.token, self.place.position)
        image = self.prompt_images + self.state.images - 1
        return image_input(self.token, self.place.position, image, self.state.raster, grid)

    def shadow_input(self, shadow: Place, grid: tuple[int, int], pad: int, end_image: int) -> Input:
        """What the shadow reads at the same time: an element of a picture, or nothing."""
        if self.state.raster is not None or self.token == end_image:
            return replace(self.input(grid), position=shadow.position)
        # nothing is written where the next element will be, never over what is there
        return Input(pad, shadow.position)

    @property
    def choice(self) -> Choice:
        """How the next element is drawn."""
        return self.request.config.image if self.state.may() == May.PATCH else self.request.config.text

    @property
    def guidance(self) -> float:
        """Of the next element."""
        return self.request.config.guidance if self.shadow is not None and self.state.may() == May.PATCH else 1.0

    def uniform(self) -> float:
        """The number that draws the next element; the generator is used only where one is drawn."""
        if self.state.forced() is not None or self.choice.temperature == 0:
            return 0.0
        return torch.rand((), generator=self.generator).item()
