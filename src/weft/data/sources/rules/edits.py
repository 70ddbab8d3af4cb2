"""A picture, what is to be changed in it, and the picture afterwards; or several such changes in a row."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from weft.data.sources.draft import Draft
from weft.data.sources.fields import Object, present
from weft.document import Turn, assistant, user


@dataclass(frozen=True)
class Edit:
    before: Any
    """A path, or {bytes, path}."""
    instruction: Any
    after: Any
    names: tuple[str, str, str]
    """Of these three fields."""
    goes_on: bool = False
    """The last edit ended with the picture that this one begins with: it is not shown again."""


def edit_of(record: Object, names: tuple[str, str, str]) -> Edit:
    """The edit whose parts are these fields of the record."""
    before, instruction, after = (present(record, key) for key in names)
    return Edit(before, instruction, after, names)


def edits(draft: Draft, changes: Iterable[Edit]) -> list[Turn]:
    turns = []
    for change in changes:
        before, instruction, after = change.names
        shown = [] if change.goes_on else draft.image(change.before, before)
        turns.append(user(*shown, *draft.text(change.instruction, instruction)))
        turns.append(assistant(*draft.image(change.after, after)))
    return turns
