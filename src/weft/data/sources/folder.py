"""Markdown and HTML files with local pictures: how-tos, posts. The title becomes the instruction, the body the answer.

A picture is looked for beside its file, inside the source's folder; then, if there is one, in the folder of pictures.
Pictures on the network are not fetched here; those that `weft data fetch` put into that folder are found there.
"""

import base64
import binascii
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from weft.config import Config
from weft.data.sources.base import (
    NOT_FETCHED,
    OnBadImage,
    Plan,
    Source,
    Unit,
    decode_utf8,
    load_picture,
    natural,
    read_limited,
    root_of,
    select,
    settle,
)
from weft.data.sources.draft import probed, url_name
from weft.data.sources.elements import INSTRUCTION
from weft.data.sources.markup import Page, Picture, parse_html, parse_markdown
from weft.data.stage import Count, Loss, Record, RecordError, rejected
from weft.document import Document, Image, Part, Text, Turn, user

MARKDOWN = (".md", ".markdown")
HTML = (".html", ".htm")
_NUMBERED = re.compile(r"\d+\D*$")


class Folder(Config):
    """A Markdown or HTML file, or a folder of them."""

    kind: Literal["folder"] = "folder"
    path: Path
    documents: Literal["file", "steps"] = "file"
    """`file`: each is a document. `steps`: the numbered files of one folder (step_1.md, step_2.md, ...) are one."""
    instruction: str = INSTRUCTION
    """What the user asks; {title} is replaced."""
    images: Path | None = None
    """A second folder in which pictures are looked for, by the path that the file gives."""
    on_bad_image: OnBadImage = "image"
    """What a picture that cannot be read costs: the `record`, or only the `image`."""


def plan(config: Folder) -> Plan:
    files, others = select(config.path, lambda file: file.lower().endswith(MARKDOWN + HTML))
    if config.documents == "steps":
        files = list(dict.fromkeys(_folder_of(file) if _is_step(file) else file for file in files))
    return Plan(tuple(Unit("folder", file) for file in files), tuple(others))


def read(config: Folder, unit: Unit) -> Iterator[Record]:
    root = root_of(config.path)
    try:
        yield _document(root, unit.file, config)
    except RecordError as error:
        yield rejected(unit.file, None, error)


def _document(root: Path, name: str, config: Folder) -> Record:
    files = _steps(root, name) if (root / name).is_dir() else [name]
    pages = [_page(root / file) for file in files]
    title = next((page.title for page in pages if page.title), PurePosixPath(root / name).stem)
    parts: list[Part] = []
    losses: list[Loss] = []
    read = Count(1)
    for file, page in zip(files, pages, strict=True):
        for part in page.parts:
            if isinstance(part, str):
                read += Count(texts=1)
                parts.append(Text(part))
                continue
            read += Count(images=1)
            found = _load(part, root, _folder_of(file), config)
            if isinstance(found, Loss):
                losses.append(found)
            else:
                parts.append(found)
    turns = (user(config.instruction.replace("{title}", title)), Turn("assistant", tuple(parts)))
    meta = {key: value for page in reversed(pages) for key, value in page.meta.items()}
    document, lost = settle(Document(turns, name, {"title": title, **meta}), losses, config.on_bad_image)
    return Record(name, None, document, read, lost, added=1)


def _page(file: Path) -> Page:
    data = read_limited(file)
    return parse_html(data) if file.name.lower().endswith(HTML) else parse_markdown(decode_utf8(data))


def _load(picture: Picture, root: Path, folder: str, config: Folder) -> Image | Loss:
    source = picture.source
    if source is None:
        return Loss("image", "image_without_source", "a drawing in the page, or an <img> that names no file")
    if source.startswith("data:"):
        return _inline(source)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:|//", source):
        fetched = None if config.images is None else probed(config.images, url_name(source))
        if config.images is None or fetched is None:
            return Loss("image", "image_remote", NOT_FETCHED, image=source)
        data = load_picture(config.images, fetched)
        return data if isinstance(data, Loss) else Image(data, fetched)
    try:
        path = unquote(urlsplit(source).path, errors="strict")
    except ValueError as error:
        return Loss("image", "image_path", f"not a path: {error}", image=source)
    # `..` may lead from one folder of the source to another, not out of it
    relative = path if path.startswith("/") else posixpath.normpath(posixpath.join(folder, path))
    found = load_picture(root, relative)
    if isinstance(found, Loss) and config.images is not None:
        second = load_picture(config.images, path)
        found = found if isinstance(second, Loss) else second
    return found if isinstance(found, Loss) else Image(found, relative)


def _inline(source: str) -> Image | Loss:
    head, _, body = source.partition(",")
    shown = f"{head[:40]},..."
    try:
        data = base64.b64decode(unquote(body), validate=True) if head.endswith(";base64") else b""
    except (binascii.Error, ValueError):
        data = b""
    return Image(data) if data else Loss("image", "image_inline", "not a picture in base64", image=shown)


def _folder_of(file: str) -> str:
    return posixpath.dirname(file) or "."


def _is_step(file: str) -> bool:
    return _NUMBERED.search(PurePosixPath(file).stem) is not None


def _steps(root: Path, folder: str) -> list[str]:
    names = sorted((entry.name for entry in (root / folder).iterdir() if entry.is_file()), key=natural)
    wanted = [name for name in names if name.lower().endswith(MARKDOWN + HTML) and _is_step(name) and name[0] != "."]
    return [posixpath.normpath(f"{folder}/{name}") for name in wanted]


SOURCE = Source(plan, read)
