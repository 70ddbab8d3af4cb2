"""LLaVA: a JSON array of {id, image, conversations: [{from, value}]}, with `<image>` where a picture stands.

`image` is one path, a list where there are several, and absent where there is none, as mixes of LLaVA have it. Pictures
in answers are carried, as InterleavedBench has them in this form.
"""

from typing import Any

from weft.data.exchange.conversations import Limits, about, fit, paths_of, texts_of
from weft.data.exchange.form import DATA, Array, Form, data_files
from weft.document import Document

_FILE = f"{DATA}.json"
_LIMITS = Limits(system=False)
_NAMES = {"user": "human", "assistant": "gpt"}


def _record(document: Document) -> dict[str, Any]:
    paths = paths_of(document)
    said = [{"from": _NAMES[role], "value": text} for role, text, _ in texts_of(document)]
    image = {"image": paths[0] if len(paths) == 1 else paths} if paths else {}
    return {**about(document), **image, "conversations": said}


FORM = Form(
    lacks=_LIMITS.lacks,
    fit=lambda document: fit(document, _LIMITS),
    write=lambda files: Array(files, _FILE, _record),
    sources=lambda path: data_files(path, _FILE, {"kind": "llava", "own_ids": True}),
    data=_FILE,
    usage=f"`--data_path {_FILE} --image_folder .`, run inside this folder.",
)
