"""What one answer may say next: the grammar of text and pictures, and its budgets. Knows no tensors.

    answer = (text | [IMG] patch x P [/IMG])* end

Whatever is chosen, the answer keeps to the grammar and ends: a picture is begun only if it and the final end fit into
what is left, the token after its last patch is not chosen, and every other token uses up some of the budget.
"""

from enum import IntFlag

from weft.backbones.base import SpecialTokens
from weft.generation.events import Reason
from weft.generation.sampling import SamplingConfig


class May(IntFlag):
    """The kinds of element."""

    TEXT = 1
    BEGIN_IMAGE = 2
    END = 4
    PATCH = 8
    END_IMAGE = 16


def room_needed(config: SamplingConfig, patches: int) -> int:
    """Tokens of the shortest answer: the pictures it owes, each between its two tokens, and the end."""
    return config.owed_images * (patches + 2) + 1


class AnswerState:
    """Where one answer stands.

    Args:
        patches: P, of each picture.
        room: tokens the context has left, at least `room_needed`.
    """

    def __init__(self, config: SamplingConfig, tokens: SpecialTokens, patches: int, room: int) -> None:
        self._config, self._tokens, self._patches = config, tokens, patches
        self._left = room if config.max_tokens is None else min(room, config.max_tokens)
        self.raster: int | None = None
        """In a picture: the patch that comes next, P when its end does."""
        self.images = 0
        """Pictures begun."""
        self.text_tokens = 0
        self.image_tokens = 0
        self.reason: Reason | None = None
        """Why the answer ended, once it has."""

    def may(self) -> May:
        """The kinds of element that may come next; never none."""
        if self.raster is not None:
            return May.PATCH if self.raster < self._patches else May.END_IMAGE
        if self._config.first == "image" and self.images == 0:
            return May.BEGIN_IMAGE
        may = May(0)
        owed = self._owed()
        if owed == 0:
            # where no text fits any more it may still be chosen, and cuts the answer off: only so can an answer that
            # fills its budget exactly be told from one that wanted to go on
            may |= May.END | May.TEXT
        elif self._text_fits():
            may |= May.TEXT
        if self.images < self._config.max_images and self._left > max(owed, 1) * (self._patches + 2):
            may |= May.BEGIN_IMAGE
        return may

    def forced(self) -> int | None:
        """The token that comes next where there is no choice."""
        return {May.BEGIN_IMAGE: self._tokens.begin_image, May.END_IMAGE: self._tokens.end_image}.get(self.may())

    def advance(self, token: int) -> May:
        """Take the next token, which must be one that `may` allows; returns its kind, END where the answer is over."""
        if self.raster is not None:
            self._left -= 1
            if self.raster == self._patches:
                self.raster = None
                return May.END_IMAGE
            self.raster += 1
            self.image_tokens += 1
            return May.PATCH
        if token in (self._tokens.end, self._tokens.separator):
            self.reason = "stop"
            return May.END
        if token == self._tokens.begin_image:
            self._left -= 1
            self.images += 1
            self.raster = 0
            return May.BEGIN_IMAGE
        if not self._text_fits():
            self.reason = "length"
            return May.END
        self._left -= 1
        self.text_tokens += 1
        return May.TEXT

    def _owed(self) -> int:
        return max(self._config.owed_images - self.images, 0)

    def _text_fits(self) -> bool:
        """One more text token leaves room for the pictures that are owed and the end."""
        within = self.text_tokens < self._config.max_text_tokens
        return within and self._left - 1 > self._owed() * (self._patches + 2)
