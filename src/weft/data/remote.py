"""A finished dataset on an object store: every file is put there, and the manifest last, since nothing is renamed."""

import json
import posixpath
from pathlib import Path

import fsspec

from weft.atomic import MANIFEST, verify_folder
from weft.errors import UsageError


def put_folder(folder: Path, url: str) -> None:
    """Copy a dataset to `url`; a reader that finds the manifest there finds everything.

    Raises:
        UsageError: no such kind of store is known, or what it takes is not installed.
        CheckpointError: `folder` is not whole.
    """
    verify_folder(folder)
    try:
        store, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"cannot write there: {error}", where=url, fix="install what it names, or mend the URL"
        ) from error
    _clear(store, root)
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    for name in (*(file for file in files if file != MANIFEST), MANIFEST):
        place = posixpath.join(root, name)
        store.makedirs(posixpath.dirname(place), exist_ok=True)
        store.put_file(str(folder / name), place)


def _clear(store: fsspec.AbstractFileSystem, root: str) -> None:
    """Remove the dataset that is there, its manifest first: half of one must not look whole."""
    manifest = posixpath.join(root, MANIFEST)
    if store.exists(manifest):
        names = json.loads(store.cat_file(manifest))["files"]
        store.rm_file(manifest)
        for name in names:
            if store.exists(posixpath.join(root, name)):
                store.rm_file(posixpath.join(root, name))
