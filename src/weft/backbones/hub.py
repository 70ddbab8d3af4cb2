"""Where a model's name leads: a local folder, or a download from the Hugging Face hub.

Nothing goes to the network unless a name such as owner/name is asked for that is no local folder. Downloads resume
where they were interrupted and are kept in the hub's own cache.
"""

import difflib
import errno
import re
from dataclasses import dataclass
from pathlib import Path

from weft.backbones.catalogue import KNOWN
from weft.errors import CheckpointError, UsageError, WeftError

WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.tiktoken", "*.jinja", "LICENSE*")
"""Weights, configurations, tokenizers and the licence; never pickles, never code."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Found:
    folder: Path
    revision: str | None = None
    """The commit that was fetched; None for a local folder."""


def is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not Path(name).is_dir()


def find(name: str, revision: str | None = None) -> Found:
    """The folder of a model: `name` itself if it is one, else what the hub has under owner/name.

    Args:
        revision: branch, tag or commit on the hub; None: its main branch.

    Raises:
        UsageError: there is neither such a folder nor can there be such a name on the hub, or a revision was asked of a
            local folder.
        CheckpointError: the hub cannot be reached, has no such model or revision, wants its licence accepted first, or
            has pickled weights only.
    """
    if name and Path(name).is_dir():
        if revision is not None:
            raise UsageError(f"a local folder has no revision {revision!r}", where=name, fix="leave the revision out")
        return Found(Path(name))
    if not is_hub_name(name):
        near = difflib.get_close_matches(name, [known.name for known in KNOWN], n=1)
        raise UsageError(
            f"there is no model {name!r}, and no folder of that name",
            where="MODEL",
            fix=f"did you mean {near[0]}?" if near else "give a folder, or owner/name on the Hugging Face hub",
        )
    folder = _download(name, revision)
    if not any(folder.rglob("*.safetensors")):
        raise CheckpointError(
            f"{name} has no weights in safetensors; pickled ones are never loaded",
            where=f"https://huggingface.co/{name}",
            fix=f"hf download {name} --local-dir SRC, then once: weft models convert SRC OUT",
        )
    return Found(folder, folder.name)


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # what its http library raises

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(WANTED)))
    except (HTTPError, OSError, ValueError) as error:
        explained = _explain(error, name, revision)
        if explained is None:
            raise
        raise explained from error


def _explain(error: Exception, name: str, revision: str | None) -> WeftError | None:
    """What the hub's error means for a person; None where it is not the hub's."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined] # HTTPError, as above
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{name}"
    local = "give the folder of a copy"
    match error:
        case HFValidationError():
            return UsageError(f"{name!r} cannot be a name on the hub", where="MODEL", fix=local)
        case GatedRepoError():
            what = f"the makers of {name} give it only to those who accept their licence"
            return CheckpointError(what, where=page, fix=f"accept it on that page, then: hf auth login; or {local}")
        case RepositoryNotFoundError():
            near = difflib.get_close_matches(name, [known.name for known in KNOWN], n=1)
            spelling = f"did you mean {near[0]}?" if near and near[0] != name else "check its spelling"
            what = f"the hub has no model {name}, or shows it to its owners only"
            return CheckpointError(what, where=page, fix=f"{spelling} If it is private: hf auth login; or {local}")
        case RevisionNotFoundError():
            what = f"{name} has no revision {revision!r}"
            return CheckpointError(what, where=f"{page}/commits", fix="name a branch, a tag or a commit that it has")
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            what = f"the hub refuses to hand out {name} ({error.response.status_code})"
            return CheckpointError(what, where=page, fix=f"accept its licence there, then: hf auth login; or {local}")
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            offline = isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled)
            what = f"{name} is not complete in the cache, and the hub " + (
                "may not be asked: HF_HUB_OFFLINE is set" if offline else "cannot be reached"
            )
            fix = f"unset HF_HUB_OFFLINE, or {local}" if offline else f"run it again with a connection, or {local}"
            return CheckpointError(what, where=page, fix=fix)
        case HTTPError() | ConnectionError() | TimeoutError():
            what = f"the download of {name} broke off: {str(error).partition(chr(10))[0]}"
            return CheckpointError(what, where=page, fix="run the same again: it goes on where it stopped")
        case OSError(errno=errno.EACCES | errno.EROFS):
            return CheckpointError(f"the hub's cache cannot be written: {error}", where=page, fix="set HF_HOME")
        case _:
            return None
