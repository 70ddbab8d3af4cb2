"""Markdown and HTML -> title, texts and pictures in reading order.

Markdown is rendered to HTML first, so that pictures in links, tables and raw <img> are met in one way. Text keeps the
light marks that carry meaning without a browser: # headings, - and 1. lists, | between table cells, fenced code.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import yaml
from bs4 import BeautifulSoup
from bs4.builder import HTMLTreeBuilder
from bs4.dammit import EncodingDetector
from bs4.element import NavigableString, Tag

from weft.data.stage import RecordError

_UNSEEN = frozenset({"script", "style", "template", "noscript", "head", "iframe", "object", "audio", "video", "canvas"})
_BLOCKS = HTMLTreeBuilder.DEFAULT_BLOCK_ELEMENTS | {"body", "center", "details", "summary"}
_HEADINGS = {f"h{level}": "#" * level for level in range(1, 7)}
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Picture:
    """Where an <img> points; None: nowhere that could be read."""

    source: str | None


@dataclass(frozen=True)
class Page:
    title: str | None
    parts: tuple[str | Picture, ...]
    meta: dict[str, str] = field(default_factory=dict)
    """Front matter: its entries that are plain values, as text."""


def parse_markdown(text: str) -> Page:
    """CommonMark with tables, raw HTML and YAML front matter.

    Raises:
        RecordError: the front matter is not YAML, or something is nested too deeply.
    """
    from markdown_it import MarkdownIt

    front, body = _front_matter(text)
    # beyond its nesting limit the parser leaves text out without a word: none is set, recursion itself is bounded
    parser = MarkdownIt("commonmark", {"maxNesting": 100_000}).enable("table")
    # it would leave a link that it thinks unsafe as text; nothing here follows links, and the ledger is to name it
    parser.validateLink = lambda url: True  # type: ignore[method-assign]
    try:
        page = _read(BeautifulSoup(parser.render(body), "lxml"))
    except RecursionError as error:
        raise RecordError("too_deep", "elements are nested too deeply") from error
    return Page(front.get("title") or page.title, page.parts, front)


def parse_html(data: bytes) -> Page:
    """A page in the encoding that its byte order mark or its head declares; else it must be UTF-8.

    Raises:
        RecordError: the bytes do not fit the encoding, or something is nested too deeply.
    """
    try:
        return _read(BeautifulSoup(_decode_html(data), "lxml"))
    except RecursionError as error:
        raise RecordError("too_deep", "elements are nested too deeply") from error


def _decode_html(data: bytes) -> str:
    body, marked = EncodingDetector.strip_byte_order_mark(data)
    encoding = marked or EncodingDetector.find_declared_encoding(body, is_html=True) or "utf-8"
    try:
        return body.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise RecordError("bad_encoding", f"bytes do not fit the encoding of the page: {error}") from error


def _front_matter(text: str) -> tuple[dict[str, str], str]:
    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}, text
    try:
        # BaseLoader: every plain value stays the text that it is
        values = yaml.load(match[1] or "", Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise RecordError(
            "bad_front_matter", f"front matter is not YAML: {getattr(error, 'problem', error)}"
        ) from error
    if values is not None and not isinstance(values, dict):
        # a ruler, some text and another ruler
        return {}, text
    plain = {key: value for key, value in (values or {}).items() if isinstance(key, str) and isinstance(value, str)}
    return plain, text[match.end() :]


def _read(soup: BeautifulSoup) -> Page:
    heading = soup.find([*_HEADINGS])
    named = heading if heading is not None and heading.get_text().strip() else soup.find("title")
    title = " ".join(named.get_text().split()) if named is not None else ""
    reader = _Reader()
    reader.visit(soup)
    reader.end_text()
    return Page(title or None, tuple(reader.parts))


class _Reader:
    """Walks a tree once; what is to stand before the next word (line breaks, a list mark) waits until there is one."""

    def __init__(self) -> None:
        self.parts: list[str | Picture] = []
        self._text: list[str] = []
        self._breaks, self._mark = 0, ""

    def visit(self, node: Tag, *, literal: bool = False) -> None:
        for child in node.children:
            if isinstance(child, Tag):
                self._visit_tag(child, literal)
            elif type(child) is NavigableString:  # comments, doctypes and the like are subclasses
                self._add(str(child) if literal else re.sub(r"\s+", " ", child), literal)

    def end_text(self) -> None:
        text = "".join(self._text).strip()
        if text:
            self.parts.append(text)
        self._text.clear()

    def _visit_tag(self, tag: Tag, literal: bool) -> None:
        inside: Callable[[], None] = lambda: self.visit(tag, literal=literal)  # noqa: E731
        match tag.name:
            case name if name in _UNSEEN:
                return
            case "img":
                source = tag.get("src")
                self._picture(source if isinstance(source, str) and source else None)
            case "svg":
                self._picture(None)
            case "br":
                self._breaks = max(self._breaks, 1)
            case name if name in _HEADINGS:
                self._block(inside, mark=f"{_HEADINGS[name]} ")
            case "li":
                self._block(inside, breaks=1, mark=_list_mark(tag))
            case "tr":
                self._block(inside, breaks=1)
            case "ul" | "ol" if tag.find_parent("li") is not None:
                self._block(inside, breaks=1)
            case "td" | "th":
                if tag.find_previous_sibling(["td", "th"]) is not None:
                    self._mark = "| "
                    self._add(" ", False)
                inside()
            case "pre":
                self._block(lambda: self._code(tag))
            case "code" if not literal:
                self._add(f"`{tag.get_text()}`", False) if tag.find("img") is None else inside()
            case name if name in _BLOCKS:
                self._block(inside)
            case _:
                inside()

    def _picture(self, source: str | None) -> None:
        self.end_text()
        self.parts.append(Picture(source))

    def _block(self, inside: Callable[[], None], *, breaks: int = 2, mark: str = "") -> None:
        self._breaks = max(self._breaks, breaks)
        self._mark = mark or self._mark
        inside()
        self._breaks, self._mark = max(self._breaks, breaks), ""

    def _code(self, tag: Tag) -> None:
        self._add("```\n", True)
        self.visit(tag, literal=True)
        self._add("```" if self._text and self._text[-1].endswith("\n") else "\n```", True)

    def _add(self, text: str, literal: bool) -> None:
        if not literal and not text.strip():
            # a space between two words; before a break or at the start it would be none
            if self._text and not self._breaks and not self._text[-1].endswith((" ", "\n")):
                self._text.append(" ")
            return
        if self._text and self._breaks:
            self._text[-1] = self._text[-1].rstrip(" ")
            self._text.append("\n" * self._breaks)
        at_line_start = not self._text or self._text[-1].endswith("\n")
        self._text.append(self._mark + (text.lstrip() if at_line_start and not literal else text))
        self._breaks, self._mark = 0, ""


def _list_mark(tag: Tag) -> str:
    if tag.parent is None or tag.parent.name != "ol":
        return "- "
    start = tag.parent.get("start")
    first = int(start) if isinstance(start, str) and start.isdecimal() else 1
    return f"{first + len(tag.find_previous_siblings('li'))}. "
