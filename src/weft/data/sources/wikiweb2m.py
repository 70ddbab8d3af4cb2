"""WikiWeb2M: Wikipedia pages by section, as TFRecord files of SequenceExamples.

A section is its title and text, then its pictures, each with its caption. A section with a table or a list is left out:
its text has lost them.
"""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.base import FileSource, OnBadImage, Plan, Source, Unit, decode_utf8, root_of, select
from weft.data.sources.draft import Draft, identity
from weft.data.sources.elements import INSTRUCTION
from weft.data.sources.files import Place
from weft.data.sources.rules.parallel import remote_image
from weft.data.stage import Record, RecordError, rejected
from weft.data.tfrecord import Values, parse_example, payloads
from weft.document import Part, assistant
from weft.errors import UsageError

_SUFFIX = ".tfrecord"


class WikiWeb2M(FileSource):
    """TFRecord files, plain or in gzip. A picture is looked for in `images` under the SHA-256 of its URL."""

    kind: Literal["wikiweb2m"] = "wikiweb2m"
    on_bad_image: OnBadImage = "image"
    instruction: str = INSTRUCTION
    """What the user asks; {title} is replaced."""
    tables: bool = False
    """Keep sections with a table or a list."""


def plan(config: WikiWeb2M) -> Plan:
    """Raises `UsageError` where nothing can be read."""
    # names go on behind the suffix: wikiweb2m-train.tfrecord.gz-00000-of-00005
    files, others = select(config.path, lambda file: _SUFFIX in file.lower())
    if not files:
        raise UsageError("source wikiweb2m found nothing to read", where=str(config.path), fix="it reads *.tfrecord*")
    return Plan(tuple(Unit("wikiweb2m", file, number=0) for file in files), tuple(others))


def read(config: WikiWeb2M, unit: Unit) -> Iterator[Record]:
    root = root_of(config.path)
    for number, payload in enumerate(payloads(root / unit.file), start=1):
        try:
            if isinstance(payload, RecordError):
                raise payload
            yield _document(config, payload, Place(root, unit.file, number))
        except RecordError as error:
            yield rejected(unit.file, number, error)


class _Page:
    """The features of a page by name, each of the type it must have."""

    def __init__(self, payload: bytes) -> None:
        self._context, self._lists = parse_example(payload)
        self.sections = len(self._of("section_text"))

    def text(self, key: str) -> str:
        return _text(_one(self._context.get(key, []), key), key)

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if self._context.get(key) else None

    def section_text(self, key: str, i: int) -> str:
        return _text(_one(self._step(key, i), f"{key}[{i}]"), f"{key}[{i}]")

    def section_flag(self, key: str, i: int) -> bool:
        value = _one(self._step(key, i), f"{key}[{i}]")
        if not isinstance(value, int):
            raise RecordError("wrong_type", f"field {key}[{i}] must be a whole number", field=key)
        return bool(value)

    def section_texts(self, key: str, i: int) -> list[str]:
        return [_text(value, f"{key}[{i}][{j}]") for j, value in enumerate(self._step(key, i))]

    def _step(self, key: str, i: int) -> Values:
        found = self._of(key)
        if len(found) != self.sections:
            raise RecordError(
                "count_mismatch", f"{key} has {len(found)} steps, section_text {self.sections}", field=key
            )
        return found[i]

    def _of(self, key: str) -> list[Values]:
        if key not in self._lists:
            raise RecordError("missing_key", f"feature list {key} is missing", field=key)
        return self._lists[key]


def _document(config: WikiWeb2M, payload: bytes, place: Place) -> Record:
    page, draft = _Page(payload), Draft(config, place)
    title, url = page.text("page_title"), page.text("page_url")
    if not title.strip():
        raise RecordError("empty_value", "field page_title is empty", field="page_title")
    parts: list[Part] = []
    for i in range(page.sections):
        parts += _section(config, draft, page, i, title)
    split = page.optional_text("split")
    meta = {"title": title, "url": url, **({"split": split} if split else {})}
    instruction = config.instruction.replace("{title}", title)
    return draft.record(identity("wikiweb2m", url, None), [assistant(*parts)], meta, instruction=instruction)


def _section(config: WikiWeb2M, draft: Draft, page: _Page, i: int, title: str) -> list[Part]:
    heading, body = page.section_text("section_title", i), page.section_text("section_text", i)
    urls = page.section_texts("section_image_url", i)
    captions = page.section_texts("section_image_clean_ref_desc", i)
    if len(captions) != len(urls):
        message = f"section {i} has {len(urls)} pictures and {len(captions)} captions"
        raise RecordError("count_mismatch", message, field="section_image_clean_ref_desc")
    at = f"section_text[{i}]"
    if page.section_flag("section_contains_table_or_list", i) and not config.tables:
        why = "its section has a table or a list"
        draft.lost_text("section_table", why, at)
        for j, url in enumerate(urls):
            draft.lost_image("section_table", why, f"section_image_url[{i}][{j}]", url)
            if captions[j].strip():
                draft.lost_text("section_table", why, f"section_image_clean_ref_desc[{i}][{j}]")
        return []
    # the first section bears the title of the page
    parts = draft.text(body if heading in ("", title) else f"## {heading}\n\n{body}", at)
    for j, (url, caption) in enumerate(zip(urls, captions, strict=True)):
        parts += remote_image(draft, url, f"section_image_url[{i}][{j}]", {})
        if caption.strip():
            parts += draft.text(caption, f"section_image_clean_ref_desc[{i}][{j}]")
    return parts


def _one(values: Values, field: str) -> Any:
    if len(values) != 1:
        reason = "missing_key" if not values else "count_mismatch"
        raise RecordError(reason, f"field {field} must hold one value, got {len(values)}", field=field)
    return values[0]


def _text(value: Any, field: str) -> str:
    if not isinstance(value, bytes):
        raise RecordError("wrong_type", f"field {field} must be bytes, got {type(value).__name__}", field=field)
    return decode_utf8(value)


SOURCE = Source(plan, read)
