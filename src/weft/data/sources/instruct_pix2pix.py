"""InstructPix2Pix: edits of pictures.

    seeds.json                  [[folder, [seed, ...]], ...]
    <folder>/prompt.json        {input, edit, output}
    <folder>/<seed>_0.jpg       before; _1.jpg is after

or Parquet with original_prompt, original_image, edit_prompt, edited_prompt, edited_image.
"""

from collections.abc import Iterator
from typing import Any, Literal

from weft.data.sources.base import FileSource, Plan, Source, read_json
from weft.data.sources.draft import Draft, identity
from weft.data.sources.fields import of_type, plain, required
from weft.data.sources.files import ROWS, Place, file_source
from weft.data.sources.rules.edits import Edit, edit_of, edits
from weft.data.stage import Record, RecordError, rejected

_SEEDS = "seeds.json"
_FIELDS = ("original_image", "edit_prompt", "edited_image")


class InstructPix2Pix(FileSource):
    """The folder with seeds.json, or Parquet files."""

    kind: Literal["instruct_pix2pix"] = "instruct_pix2pix"


def _documents(config: InstructPix2Pix, value: Any, place: Place) -> Iterator[Record]:
    if isinstance(value, dict):
        draft = Draft(config, place)
        turns = edits(draft, [edit_of(value, _FIELDS)])
        meta = plain(value, "original_prompt", "edited_prompt")
        yield draft.record(identity("instruct_pix2pix", None, value), turns, meta)
        return
    entry = of_type(value, list, "entry")
    if len(entry) != 2:
        raise RecordError("count_mismatch", f"an entry must be [folder, seeds], got {len(entry)} values")
    folder, seeds = of_type(entry[0], str, "entry[0]"), of_type(entry[1], list, "entry[1]")
    for i, seed in enumerate(seeds):
        try:
            yield _seed(
                config, place, folder, str(seed) if isinstance(seed, int) else of_type(seed, str, f"seeds[{i}]")
            )
        except RecordError as error:
            yield rejected(place.file, place.number, error)


def _seed(config: InstructPix2Pix, place: Place, folder: str, seed: str) -> Record:
    draft = Draft(config, place)
    prompt = of_type(read_json(draft.folder, f"{folder}/prompt.json"), dict, "prompt.json")
    instruction = required(prompt, "edit", str)
    change = Edit(f"{folder}/{seed}_0.jpg", instruction, f"{folder}/{seed}_1.jpg", ("before", "edit", "after"))
    name = identity("instruct_pix2pix", f"{folder}/{seed}", None)
    return draft.record(name, edits(draft, [change]), plain(prompt, "input", "output"))


_FILES = file_source("instruct_pix2pix", _documents, (_SEEDS, *ROWS))


def plan(config: InstructPix2Pix) -> Plan:
    """Raises `UsageError` where nothing can be read."""
    seeds = config.path / _SEEDS
    # the table names every folder, so that hundreds of thousands of them need not be listed
    return _FILES.plan(config.model_copy(update={"path": seeds}) if seeds.is_file() else config)


SOURCE = Source(plan, _FILES.read)
