"""Rows of a Parquet file, one at a time; a row group is a unit of work."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weft.data.sources.base import Unit
from weft.data.stage import RecordError

_BATCH = 16
"""Rows decoded together."""


def units(root: Path, file: str, form: str) -> Iterator[Unit]:
    """Row groups; a file that is no Parquet file is one run of no rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(root / file)
    except (pa.ArrowException, OSError):
        yield Unit(form, file, number=0)
        return
    first = 1
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if rows:
            yield Unit(form, file, first, rows, group)
        first += rows


def items(root: Path, unit: Unit) -> Iterator[tuple[int, dict[str, Any] | RecordError]]:
    """Number and columns of every row; after damage, every row that cannot be reached any more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    done = 0
    try:
        with pq.ParquetFile(root / unit.file, pre_buffer=False) as file:
            for batch in file.iter_batches(_BATCH, row_groups=[unit.offset]) if unit.number else ():
                for i in range(batch.num_rows):
                    yield unit.first + done, _row(batch.slice(i, 1))
                    done += 1
    except (pa.ArrowException, OSError) as error:
        damage = RecordError("damaged_file", f"Parquet file is damaged: {' '.join(str(error).split())[:200]}")
        for number in range(unit.first + done, unit.first + max(unit.number, 1)):
            yield number, damage


def _row(batch: Any) -> dict[str, Any] | RecordError:
    try:
        (row,) = batch.to_pylist()
    except UnicodeDecodeError as error:
        return RecordError("not_utf8", f"byte {error.start} of a text is not UTF-8")
    except (ValueError, OverflowError) as error:
        return RecordError("bad_value", f"a value cannot be read: {error}")
    return row
