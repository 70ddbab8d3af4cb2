"""Where documents come from: one file each, one row each. Importing this draws in parsers, not torch."""

from typing import Annotated, Any

from pydantic import Field

from weft.data.sources import auto, chat_jsonl, elements, folder, picturebook_source
from weft.data.sources.base import Source

SOURCES: dict[str, Source[Any]] = {
    "auto": auto.SOURCE,
    "chat_jsonl": chat_jsonl.SOURCE,
    "elements": elements.SOURCE,
    "folder": folder.SOURCE,
    "picturebook": picturebook_source.SOURCE,
}

SourceConfig = Annotated[
    auto.Auto | chat_jsonl.ChatJsonl | elements.Elements | folder.Folder | picturebook_source.Picturebook,
    Field(discriminator="kind"),
]
