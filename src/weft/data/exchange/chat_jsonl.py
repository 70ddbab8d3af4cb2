"""Weft's own chat form: JSON Lines, and a folder of pictures. Everything of a document is carried."""

from weft.data.exchange.form import DATA, WITHIN_RECORD, Form, Lines, data_files, within_record
from weft.document import Document

_FILE = f"{DATA}.jsonl"

FORM = Form(
    lacks=WITHIN_RECORD,
    fit=within_record,
    write=lambda files: Lines(files, _FILE, Document.to_json),
    sources=lambda path: data_files(path, _FILE, {"kind": "chat_jsonl"}),
    data=_FILE,
    usage=f"`weft data build {{name}}/{_FILE} --out DATASET`, or any reader of JSON Lines.",
)
