"""Gives every document an instruction that it answers, in `meta.instruction`; `split` puts it into the document."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from weft.config import Config
from weft.data.annotate.instruct import Instruct as Role
from weft.data.annotate.instruct import Template
from weft.data.annotate.material import material_of, noted
from weft.data.annotate.port import AnnotatorConfig, Rules, open_annotator
from weft.data.annotate.role import Answer, Reject, ask
from weft.data.filters.removal import rejected
from weft.data.stage import Outcome, Together
from weft.document import Document


class Instruct(Config):
    """Writes an instruction for every document, or drops those for which none could be had."""

    kind: Literal["instruct"] = "instruct"
    annotator: AnnotatorConfig = Rules()
    cache: Path | None = None
    """A folder that keeps every reply."""
    prompt: Template = "paper"
    temperature: float = Field(1.0, ge=0, le=2)
    keep: bool = False
    """Leave documents that begin with an instruction alone."""


def build(config: Instruct) -> Together:
    role = Role(config.prompt, config.temperature)
    port = open_annotator(config.annotator, config.cache)

    def stage(documents: Sequence[Document]) -> list[Outcome]:
        has_one = [config.keep and material_of(document).instruction is not None for document in documents]
        asked = [document for document, has in zip(documents, has_one, strict=True) if not has]
        answers = iter(ask(role, asked, port))
        return [
            (document, ()) if has else _take(document, next(answers), port is not None and role.is_cut(document))
            for document, has in zip(documents, has_one, strict=True)
        ]

    return Together(stage)


def _take(document: Document, answer: Answer, is_cut: bool) -> Outcome:
    if isinstance(answer.value, Reject):
        return rejected(answer.value.reason, answer.value.message)
    provenance = {**answer.provenance, **({"truncated": True} if is_cut else {})}
    return noted(document, instruction=answer.value, annotations={"instruct": provenance}), ()
