"""Where a document is cut in two: what is given (context), and what is to be answered with (output).

The place is a number of parts, the same for the same document id and seed, whoever asks and whenever.
"""

from collections.abc import Callable
from itertools import accumulate

from weft.data.annotate.material import Material, material_of, task_of
from weft.data.annotate.role import Reject
from weft.document import Document, Image, Part, Text
from weft.llm import seed_of


def index_of(document: Document, seed: int = 0) -> int | Reject:
    """How many parts of the document's material are its context; the rest is the output."""
    material, task = material_of(document), task_of(document)
    index = _RULES[task](document, material, seed)
    output = material.parts[index:]
    has_text = any(isinstance(part, Text) for part in output)
    # a turn of a dialogue may be a picture alone
    if not any(isinstance(part, Image) for part in output) or not (has_text or task == "dialogue"):
        return Reject("no_output", f"{len(output)} parts after the context of {index}: no picture, or no text")
    return index


def _completion(document: Document, material: Material, seed: int) -> int:
    """Up to the first picture, or a third of all, whichever is more."""
    return max(_pictures(material.parts)[0] + 1, len(material.parts) // 3) if _pictures(material.parts) else 0


def _storytelling(document: Document, material: Material, seed: int) -> int:
    """One to three pictures with their texts."""
    pictures = _pictures(material.parts)
    if len(pictures) < 2:
        return len(material.parts)
    k = min(1 + seed_of(document.id or "", "split", seed) % 3, len(pictures) - 1)
    # a story that begins with a picture has the text after it
    return pictures[k] if isinstance(material.parts[0], Image) else pictures[k - 1] + 1


def _dialogue(document: Document, material: Material, seed: int) -> int:
    """All before the last turns of one speaker."""
    turns = material.turns
    last = len(turns)
    while last and turns[last - 1].role == turns[-1].role:
        last -= 1
    return [0, *accumulate(len(turn.parts) for turn in turns)][last]


def _script(document: Document, material: Material, seed: int) -> int:
    """Nothing but the goal is given."""
    return 0


def _pictures(parts: tuple[Part, ...]) -> list[int]:
    return [i for i, part in enumerate(parts) if isinstance(part, Image)]


_RULES: dict[str, Callable[[Document, Material, int], int]] = {
    "completion": _completion,
    "knowledge": _completion,
    "storytelling": _storytelling,
    "dialogue": _dialogue,
    "script": _script,
}
