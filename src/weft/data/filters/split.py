"""Makes a document an instruction that is answered: what is given goes to the user, the rest to the assistant."""

from typing import Literal

from pydantic import NonNegativeInt

from weft.config import Config
from weft.data.annotate.material import instruction_of, material_of, noted, task_of
from weft.data.annotate.role import Reject
from weft.data.annotate.split import index_of
from weft.data.filters.removal import rejected
from weft.data.stage import Outcome, Writes
from weft.document import Document, Text, Turn


class Split(Config):
    """Cuts documents in two by their task; where, is in `meta.split`: a number of parts after the instruction."""

    kind: Literal["split"] = "split"
    seed: NonNegativeInt = 0


def build(config: Split) -> Writes:
    def stage(document: Document) -> Outcome:
        instruction = instruction_of(document)
        if instruction is None:
            return rejected("no_instruction", "it begins with none, and none was annotated")
        index = index_of(document, config.seed)
        if isinstance(index, Reject):
            return rejected(index.reason, index.message)
        material = material_of(document)
        system = tuple(turn for turn in document.turns if turn.role == "system" and turn not in material.turns)
        asked = Turn("user", (Text(instruction), *material.parts[:index]))
        turns = (*system, asked, Turn("assistant", material.parts[index:]))
        split = {"task": task_of(document), "index": index, "seed": config.seed}
        return noted(Document(turns, document.id, document.meta), split=split), ()

    return Writes(stage)
