"""ms-swift: JSON Lines of {messages: [{role, content, loss?}], images}, with `<image>` where a picture stands.

Pictures in answers are carried, as its pre-training data has them; ms-swift shows them to a model all the same, and
does not make it draw them.
"""

from typing import Any

from weft.data.exchange.conversations import Limits, about, fit, paths_of, texts_of
from weft.data.exchange.form import DATA, Form, Lines, data_files
from weft.document import Document

_FILE = f"{DATA}.jsonl"
_LIMITS = Limits(marks=("<image>", "<video>", "<audio>", "<bbox>", "<ref-object>"), loss=True, any_order=True)


def _record(document: Document) -> dict[str, Any]:
    messages = [
        {"role": role, "content": text} | ({} if loss is None else {"loss": loss})
        for role, text, loss in texts_of(document)
    ]
    return {"messages": messages, "images": paths_of(document), **about(document)}


FORM = Form(
    lacks=_LIMITS.lacks,
    fit=lambda document: fit(document, _LIMITS),
    write=lambda files: Lines(files, _FILE, _record),
    sources=lambda path: data_files(path, _FILE, {"kind": "swift", "own_ids": True}),
    data=_FILE,
    usage=f"`swift sft --dataset {_FILE} ...`, run inside this folder, for pictures are named relative to it.",
)
