"""A role asks one thing about a document: what to send, what an answer means, and what rules say without a model.

    render(document, attempt) -> Request    parse(document, Result) -> value | Reject    rules(document) -> the same

Roles are pure: they know no server. An answer is data, to be checked: what is not exactly what was asked for is a
`Reject`, and is asked for once more, with another seed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from weft.document import Document
from weft.llm import Failure, Port, Reply, Request, Result, seed_of

ATTEMPTS = 2
INPUT_TOKENS = 2048
"""Of a request: the paper's window."""


@dataclass(frozen=True)
class Reject:
    """Why there is no value."""

    reason: str
    message: str


V = TypeVar("V", covariant=True)


class Role(Protocol[V]):
    @property
    def name(self) -> str: ...

    @property
    def template(self) -> str:
        """Name and version of what is sent, for provenance."""

    def render(self, document: Document, attempt: int = 0) -> Request: ...

    def parse(self, document: Document, result: Result) -> V | Reject: ...

    def rules(self, document: Document) -> V | Reject: ...


@dataclass(frozen=True)
class Answer:
    """What a role found out about a document, and from whom."""

    value: Any
    """Or a `Reject`."""
    provenance: dict[str, Any]


def ask(role: Role[Any], documents: Sequence[Document], port: Port | None) -> list[Answer]:
    """The answer for each document, in order; without a port, that of the rules.

    Raises:
        LLMError: the server cannot be used at all.
    """
    if port is None:
        return [Answer(role.rules(document), {"annotator": "rules"}) for document in documents]
    found: dict[int, Answer] = {}
    left = list(range(len(documents)))
    for attempt in range(ATTEMPTS):
        requests = [_numbered(i, role.render(documents[i], attempt)) for i in left]
        for request, result in port.complete(requests):
            i = int(request.id)
            found[i] = Answer(role.parse(documents[i], result), _provenance(role, result, attempt))
        left = [i for i in left if isinstance(found[i].value, Reject) and found[i].value.reason != "llm_failed"]
    return [found[i] for i in range(len(documents))]


def request(role: str, document: Document, prompt: str, attempt: int, **options: Any) -> Request:
    """One user message, with a seed of its own."""
    seed = seed_of(document.id or "", role, attempt)
    return Request("", ({"role": "user", "content": prompt},), seed=seed, **options)


def said(result: Result) -> str | Reject:
    """The text of a reply that holds any, stripped."""
    if isinstance(result, Failure):
        return Reject("llm_failed", f"{result.kind}: {result.detail}")
    return result.text.strip() or unparsable("an empty answer")


def unparsable(what: str) -> Reject:
    return Reject("llm_unparsable", what)


_REFUSAL = re.compile(
    r"\b(?:i(?: a|')?m (?:sorry|unable|not able)|i (?:cannot|can't|can not|won't)|as an ai|as a language model"
    r"|i do not have|i don't have)\b",
    re.IGNORECASE,
)
_ABOUT_PROMPT = re.compile(
    r"\b(?:expert (?:data|instruction) annotator|given a (?:text )?material|the (?:above|given|provided) (?:text"
    r"|material|instructions?|prompt)|(?:previous|prior|above|system) (?:instructions?|prompts?)|the prompt)\b",
    re.IGNORECASE,
)


def evasion(text: str) -> Reject | None:
    """Whether an answer refuses, or talks about the request instead of answering it."""
    plain = text.replace("’", "'")  # noqa: RUF001
    if _REFUSAL.search(plain):
        return unparsable("a refusal")
    return unparsable("an answer about the prompt") if _ABOUT_PROMPT.search(plain) else None


def fenced(text: str) -> str:
    """A text between two marks that do not occur in it, for templates that keep what is untrusted apart."""
    # what is put in the place of a mark makes no new one
    inside = re.sub(r"<\s*(/?)\s*material", r"(\1material", text, flags=re.IGNORECASE)
    return f"<material>\n{inside}\n</material>"


def _numbered(i: int, request: Request) -> Request:
    return replace(request, id=str(i))


def _provenance(role: Role[Any], result: Result, attempt: int) -> dict[str, Any]:
    about = {"annotator": result.model, "tokens": result.tokens} if isinstance(result, Reply) else {}
    return {**about, "template": role.template, "attempt": attempt}
