"""Shortens documents with too much text, segment by segment, so that every picture stays where it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from weft.config import Config
from weft.data.annotate.material import material_of, noted, source_of, with_texts
from weft.data.annotate.port import AnnotatorConfig, Rules, open_annotator
from weft.data.annotate.rewrite import Rewrite as Role
from weft.data.annotate.role import Answer, Reject, ask
from weft.data.filters.removal import rejected
from weft.data.filters.sentence_count import SentenceCount, judge
from weft.data.sentences import tokens
from weft.data.stage import Outcome, Together
from weft.document import Document


class Rewrite(Config):
    """Rewrites documents that are too long. Where that fails, one that fits as a whole stays as it was."""

    kind: Literal["rewrite"] = "rewrite"
    annotator: AnnotatorConfig = Rules()
    cache: Path | None = None
    """A folder that keeps every reply."""
    max_text_tokens: PositiveInt = 350
    max_segment_tokens: PositiveInt = 120
    sentences: SentenceCount = SentenceCount()
    """What a rewritten document has to satisfy again."""


def build(config: Rewrite) -> Together:
    role = Role(config.max_text_tokens, config.max_segment_tokens)
    port = open_annotator(config.annotator, config.cache)

    def stage(documents: Sequence[Document]) -> list[Outcome]:
        is_long = [role.is_wanted(document) for document in documents]
        long = [document for document, wanted in zip(documents, is_long, strict=True) if wanted]
        answers = iter(ask(role, long, port))
        return [
            _take(document, next(answers), config) if wanted else (document, ())
            for document, wanted in zip(documents, is_long, strict=True)
        ]

    return Together(stage)


def _take(document: Document, answer: Answer, config: Rewrite) -> Outcome:
    texts = answer.value
    if isinstance(texts, Reject):
        total = sum(tokens(text) for text in material_of(document).texts)
        if total <= config.max_text_tokens:
            return noted(document, annotations={"rewrite": {**answer.provenance, "kept_original": texts.message}}), ()
        what = f"{total} tokens, more than {config.max_text_tokens}, and no rewrite: {texts.message}"
        return rejected("rewrite_failed", what, total, config.max_text_tokens)
    problem = judge(list(texts), source_of(document), config.sentences)
    if problem is not None:
        return rejected(*problem)
    return noted(with_texts(document, list(texts)), annotations={"rewrite": answer.provenance}), ()
