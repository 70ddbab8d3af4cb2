"""Documents whose text is not good enough, as a chat model or built-in rules judge it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from weft.config import Config
from weft.data.annotate.material import noted
from weft.data.annotate.port import AnnotatorConfig, Rules, open_annotator
from weft.data.annotate.quality import Quality, Template
from weft.data.annotate.role import Answer, Reject, ask
from weft.data.filters.removal import rejected
from weft.data.stage import Outcome, Together
from weft.document import Document


class TextQuality(Config):
    """Keeps documents whose verdict is 1; who gave it is in `meta.annotations`."""

    kind: Literal["text_quality"] = "text_quality"
    annotator: AnnotatorConfig = Rules()
    cache: Path | None = None
    """A folder that keeps every reply."""
    prompt: Template = "paper"
    on_no_verdict: Literal["drop", "keep"] = "drop"
    """What becomes of a document on which no verdict could be had."""


def build(config: TextQuality) -> Together:
    role, port = Quality(config.prompt), open_annotator(config.annotator, config.cache)

    def stage(documents: Sequence[Document]) -> list[Outcome]:
        answers = ask(role, documents, port)
        return [_judge(*each, config) for each in zip(documents, answers, strict=True)]

    return Together(stage)


def _judge(document: Document, answer: Answer, config: TextQuality) -> Outcome:
    verdict = answer.value
    if isinstance(verdict, Reject):
        if config.on_no_verdict == "drop":
            return rejected(verdict.reason, verdict.message)
        return noted(document, annotations={"quality": {**answer.provenance, "verdict": verdict.reason}}), ()
    if not verdict.is_good:
        return rejected("text_quality", verdict.why, verdict.value, verdict.threshold)
    return noted(document, annotations={"quality": answer.provenance}), ()
