"""Hugging Face: a folder that `datasets.load_dataset` loads without a script, pictures as pictures.

The data files are those of a dataset of Weft, which such a folder is already. What is different here is what is not
there: no ledger of what was dropped, and no recipe. What a repository on the Hub should have, and no more.
"""

from weft.data.exchange.files import Files
from weft.data.exchange.form import WHOLE, Form, whole
from weft.document import Document


class _Parquet:
    def __init__(self, files: Files) -> None:
        from weft.data.shards import ShardWriter

        folder = files.folder / "data"
        folder.mkdir()
        self._writer = ShardWriter(folder)

    def add(self, document: Document) -> None:
        import pyarrow as pa

        from weft.data.shards import SCHEMA, size_of, to_columns

        row = pa.RecordBatch.from_arrays(to_columns([document]), schema=SCHEMA)
        self._writer.add(row, [size_of(document)])

    def close(self) -> None:
        self._writer.close()


FORM = Form(
    lacks=WHOLE,
    fit=whole,
    write=_Parquet,
    sources=lambda path: [{"kind": "embedded", "path": str(path)}],
    data="data/train-*.parquet",
    usage='`datasets.load_dataset("{name}", split="train")`.',
    is_loadable=True,
    resumes=False,
)
