"""Documents with too few or too many sentences."""

from typing import Literal

from pydantic import NonNegativeInt

from weft.config import Config
from weft.data.annotate.material import material_of, source_of
from weft.data.filters.removal import Problem, rejected
from weft.data.sentences import most_sentences, sentences
from weft.data.stage import Outcome, Stage
from weft.document import Document


class SentenceCount(Config):
    """Keeps documents with `min` to `max` sentences; an instruction that the document begins with has none."""

    kind: Literal["sentence_count"] = "sentence_count"
    min: NonNegativeInt = 1
    max: NonNegativeInt | None = 12
    of_their_own: tuple[str, ...] = ("mmc4", "vist", "youcook2")
    """Sources whose texts are one sentence each."""


def count_sentences(texts: list[str], source: str, config: SentenceCount) -> int:
    return len(texts) if source in config.of_their_own else sum(len(sentences(text)) for text in texts)


def judge(texts: list[str], source: str, config: SentenceCount) -> Problem | None:
    """Why not, where the number is not within the limits."""
    if _is_within(texts, source, config):
        return None
    n = count_sentences(texts, source, config)
    if n < config.min:
        return Problem("too_few_sentences", f"{n} sentences, fewer than {config.min}", n, config.min)
    if config.max is not None and n > config.max:
        return Problem("too_many_sentences", f"{n} sentences, more than {config.max}", n, config.max)
    return None


def _is_within(texts: list[str], source: str, config: SentenceCount) -> bool:
    """Whether nobody needs to count: true of most documents that are kept."""
    if source in config.of_their_own or config.min > sum([bool(text.strip()) for text in texts]):
        return False
    return config.max is None or sum(map(most_sentences, texts)) <= config.max


def build(config: SentenceCount) -> Stage:
    def stage(document: Document) -> Outcome:
        problem = judge(material_of(document).texts, source_of(document), config)
        return (document, ()) if problem is None else rejected(*problem)

    return stage
