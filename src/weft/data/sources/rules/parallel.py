"""Texts and pictures in two lists side by side: at each place one of them holds something and the other is null."""

import re
from collections.abc import Iterator
from typing import Any

from weft.data.sources.base import NOT_FETCHED, FileSource
from weft.data.sources.draft import Draft, identity, probed, url_name
from weft.data.sources.fields import Object, of_type, plain, required, same_length
from weft.data.sources.files import Place
from weft.data.stage import Record, RecordError
from weft.document import Part, assistant

_CUT = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
"""Between pages that were put together."""

Element = tuple[int, str | None, str | None]
"""Place in the lists, then a text or a picture's URL."""


def parallel(
    config: FileSource, record: Object, place: Place, source: str, native: str | None, about: list[Object], meta: Object
) -> Iterator[Record]:
    """The documents of `texts` and `images`; pictures are found by the hash of their URL.

    Args:
        about: what is known of the picture at each place. An entry with `invalid` is not to be used.
    """
    texts, images = required(record, "texts", list), required(record, "images", list)
    same_length(texts=texts, images=images, metadata=about)
    pages = _pages([_element(i, texts[i], images[i]) for i in range(len(texts))])
    whole = identity(source, native, [texts, images])
    for number, page in enumerate(pages):
        draft = Draft(config, place)
        parts = [part for element in page for part in _part(draft, element, about)]
        yield draft.record(f"{whole}#{number}" if number else whole, [assistant(*parts)], meta)


def _element(i: int, text: Any, image: Any) -> Element:
    if (text is None) == (image is None):
        what = "both are" if text is not None else "neither is"
        raise RecordError("not_one_of_two", f"of texts[{i}] and images[{i}] {what} set", field=f"texts[{i}]")
    if text is not None:
        return i, of_type(text, str, f"texts[{i}]"), None
    return i, None, of_type(image, str, f"images[{i}]")


def _pages(elements: list[Element]) -> list[list[Element]]:
    pages: list[list[Element]] = [[]]
    for i, text, url in elements:
        pieces = re.split(re.escape(_CUT), text) if text is not None else []
        if len(pieces) < 2:
            pages[-1].append((i, text, url))
            continue
        for number, piece in enumerate(pieces):
            if number:
                pages.append([])
            if piece.strip():
                pages[-1].append((i, piece, None))
    # a mark at either end cuts nothing off
    return [page for page in pages if page] or [[]]


def _part(draft: Draft, element: Element, about: list[Object]) -> list[Part]:
    i, text, url = element
    if text is not None:
        return draft.text(text, f"texts[{i}]")
    return remote_image(draft, str(url), f"images[{i}]", about[i])


def remote_image(draft: Draft, url: str, field: str, about: Object) -> list[Part]:
    """A picture by its URL, under whose hash it was put into the folder of pictures; nothing is fetched here."""
    if about.get("invalid"):
        return draft.lost_image("image_invalid", "the record says that it is not to be used", field, url)
    name = probed(draft.folder, url_name(url))
    if name is None:
        return draft.lost_image("image_remote", NOT_FETCHED, field, url)
    return draft.image(name, field, about={"url": url, **plain(about, *about)})
