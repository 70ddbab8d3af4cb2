"""What one answer may say next: the grammar of text and pictures, and its budgets. Knows no tensors.

    answer  = (text | picture)* end
    picture = [IMG] opening* element x P closing*

Whatever is chosen, the answer keeps to the grammar and ends: a picture is begun only if it and the final end fit into
what is left, and chosen where they do not it cuts the answer off; what opens and closes it and its lines is not chosen;
and every other token uses up some of the budget.
"""

from enum import IntFlag

from weft.backbones.base import PictureForm, SpecialTokens
from weft.generation.events import Reason
from weft.generation.sampling import SamplingConfig


class May(IntFlag):
    """The kinds of element."""

    TEXT = 1
    BEGIN_IMAGE = 2
    END = 4
    PATCH = 8
    """An element of a picture that is chosen."""
    FORCED = 16
    """An element that follows without choice."""


def room_needed(config: SamplingConfig, form: PictureForm) -> int:
    """Tokens of the shortest answer: the pictures it owes, with what opens and closes them, and the end."""
    return config.owed_images * form.length + 1


class AnswerState:
    """Where one answer stands.

    Args:
        form: of its pictures.
        room: tokens the context has left, at least `room_needed`.
    """

    def __init__(self, config: SamplingConfig, tokens: SpecialTokens, form: PictureForm, room: int) -> None:
        self._config, self._tokens, self._form = config, tokens, form
        self._left = room if config.max_tokens is None else min(room, config.max_tokens)
        self.inside: int | None = None
        """How many elements of a picture the last one completes, `[IMG]` being the first; None where it is text."""
        self.images = 0
        """Pictures begun."""
        self.text_tokens = 0
        self.image_tokens = 0
        self.reason: Reason | None = None
        """Why the answer ended, once it has."""

    @property
    def last_raster(self) -> int | None:
        """The place of the last element in its picture, row by row; None where it is text."""
        return None if self.inside is None else self._raster(self.inside - 1)

    @property
    def next_raster(self) -> int | None:
        """The place of the next element in its picture; None where it is text."""
        return None if self.inside is None else self._raster(self.inside)

    @property
    def is_complete(self) -> bool:
        """The last element is the last of a picture's P."""
        return self.last_raster == self._form.patches - 1

    def may(self) -> May:
        """The kinds of element that may come next; never none."""
        if self._is_open():
            raster = self.next_raster
            return May.FORCED if raster is None or self._form.forced(raster) is not None else May.PATCH
        if self._config.first == "image" and self.images == 0:
            return May.BEGIN_IMAGE
        may = May(0)
        owed = self._owed()
        # where nothing is owed, what no longer fits may still be chosen, and cuts the answer off: only so can an answer
        # that fills its budget exactly be told from one that wanted to go on
        if owed == 0:
            may |= May.END | May.TEXT
        elif self._text_fits():
            may |= May.TEXT
        if self.images < self._config.max_images and (owed == 0 or self._picture_fits()):
            may |= May.BEGIN_IMAGE
        return may

    def forced(self) -> int | None:
        """The token that comes next where there is no choice."""
        may = self.may()
        if may == May.BEGIN_IMAGE:
            return self._tokens.begin_image
        if may != May.FORCED:
            return None
        assert self.inside is not None
        before, patches = self._form.before, self._form.patches
        if self.inside < len(before):
            return before[self.inside]
        raster = self.next_raster
        return self._form.after[self.inside - len(before) - patches] if raster is None else self._form.forced(raster)

    def advance(self, token: int) -> May:
        """Take the next element, one that `may` allows; returns its kind, END where the answer is over."""
        if self._is_open():
            assert self.inside is not None
            kind = self.may()
            self._left -= 1
            self.inside += 1
            self.image_tokens += kind == May.PATCH
            return kind
        if token in (self._tokens.end, self._tokens.separator):
            self.reason = "stop"
            return May.END
        fits = self._picture_fits() if token == self._tokens.begin_image else self._text_fits()
        if not fits:
            self.reason = "length"
            return May.END
        if token == self._tokens.begin_image:
            self._left -= 1
            self.images += 1
            self.inside = 1
            return May.BEGIN_IMAGE
        self._left -= 1
        self.inside = None
        self.text_tokens += 1
        return May.TEXT

    def _is_open(self) -> bool:
        return self.inside is not None and self.inside < self._form.length

    def _raster(self, element: int) -> int | None:
        raster = element - len(self._form.before)
        return raster if 0 <= raster < self._form.patches else None

    def _owed(self) -> int:
        return max(self._config.owed_images - self.images, 0)

    def _picture_fits(self) -> bool:
        """One more picture leaves room for others that are owed and the end."""
        return self._left > max(self._owed(), 1) * self._form.length

    def _text_fits(self) -> bool:
        """One more text token leaves room for the pictures that are owed and the end."""
        within = self.text_tokens < self._config.max_text_tokens
        return within and self._left - 1 > self._owed() * self._form.length
