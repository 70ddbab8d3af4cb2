from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from safetensors.torch import save_file
from torch import ones

from weft.backbones.hub import WANTED, Found, find, is_hub_name
from weft.errors import CheckpointError, UsageError

COMMIT = "0f357a6575bcb1a5c4dad1762fb52c6a345ea16e"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The hub answers with the folder in `asked.answer`, or raises it; `asked.calls` are what it was asked."""

    class Hub:
        def __init__(self):
            self.answer, self.calls = snapshot(tmp_path), []

        def __call__(self, name, **options):
            self.calls.append((name, options))
            if isinstance(self.answer, Exception):
                raise self.answer
            return str(self.answer)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def snapshot(cache, files=("model.safetensors", "config.json")):
    folder = cache / "hub" / "models--o--n" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in files:
        if name.endswith(".safetensors"):
            save_file({"a": ones(1)}, folder / name)
        else:
            (folder / name).write_text("{}")
    return folder


def answered(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


def test_a_folder_is_itself_and_asks_nobody(asked, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find("owner/name") == Found(find("owner/name").folder, None) and not is_hub_name("owner/name")
    assert find(str(tmp_path)).folder == tmp_path
    assert asked.calls == []
    with pytest.raises(UsageError, match="no revision 'v1'"):
        find(str(tmp_path), "v1")


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere/at/all", "/nowhere/x", "~/x", "a/b/c", "../b", "o/", "-o/n", ""]
)
def test_what_is_no_name_asks_nobody(asked, name):
    with pytest.raises(UsageError, match="no model"):
        find(name)
    assert asked.calls == []


def test_a_near_miss_is_named():
    with pytest.raises(UsageError) as caught:
        find("Anole-7b-v0.1-hf")
    assert caught.value.fix == "did you mean leloy/Anole-7b-v0.1-hf?"


def test_weights_texts_and_tokenizers_are_fetched_and_the_commit_is_recorded(asked):
    found = find("o/n", "main")
    assert found == Found(asked.answer, COMMIT)
    ((name, options),) = asked.calls
    assert name == "o/n" and options == {"revision": "main", "allow_patterns": list(WANTED)}


def test_pickles_and_code_are_never_fetched():
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "unet/config.json", "a/model.bf16-00001-of-00008.safetensors", "tokenizer.model",
              "model.safetensors.index.bf16.json", "merges.txt", "LICENSE.txt", "emu3.tiktoken"]  # fmt: skip
    others = ["pytorch_model.bin", "x/consolidated.00.pth", "vqgan.ckpt", "a.pt", "modeling_emu.py", "flax.msgpack"]
    assert list(filter_repo_objects(wanted + others, allow_patterns=list(WANTED))) == wanted


def test_pickles_alone_are_named_with_the_way_out(asked, tmp_path):
    asked.answer = snapshot(tmp_path / "other", ["config.json"])
    with pytest.raises(CheckpointError, match="no weights in safetensors") as caught:
        find("GAIR/Anole-7b-v0.1")
    assert "weft models convert" in caught.value.fix and "hf download GAIR/Anole-7b-v0.1" in caught.value.fix


def offline():
    error = errors.LocalEntryNotFoundError("no snapshot")
    error.__cause__ = errors.OfflineModeIsEnabled("offline")
    return error


TROUBLES = {
    "a gated model": (errors.GatedRepoError("gated", response=answered(403)), "accept their licence", "hf auth login"),
    "an unknown model": (errors.RepositoryNotFoundError("?", response=answered(404)), "no model o/n", "spelling"),
    "an unknown revision": (errors.RevisionNotFoundError("?", response=answered(404)), "no revision 'v9'", "branch"),
    "no token": (errors.HfHubHTTPError("401", response=answered(401)), r"hand out o/n \(401\)", "auth login"),
    "forbidden": (errors.HfHubHTTPError("403", response=answered(403)), r"hand out o/n \(403\)", "auth login"),
    "a broken hub": (errors.HfHubHTTPError("500\nmore", response=answered(500)), "broke off: 500", "where it stopped"),
    "a broken line": (errors.HTTPError("the read timed out"), "broke off: the read timed out", "where it stopped"),
    "a reset line": (ConnectionResetError("reset"), "broke off: reset", "where it stopped"),
    "no connection": (errors.LocalEntryNotFoundError("no snapshot"), "cannot be reached", "with a connection"),
    "offline": (offline(), "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
    "an impossible name": (errors.HFValidationError("o--n"), "cannot be a name", "folder"),
    "a cache that cannot be written": (PermissionError(13, "denied", "/c"), "cache cannot be written", "HF_HOME"),
}  # fmt: skip


@pytest.mark.parametrize("name", TROUBLES)
def test_every_trouble_with_the_hub_says_what_to_do(asked, name):
    asked.answer, what, fix = TROUBLES[name]
    with pytest.raises((CheckpointError, UsageError), match=what) as caught:
        find("o/n", "v9")
    assert fix in caught.value.fix and caught.value.where
    assert caught.value.__cause__ is asked.answer


def test_a_full_disk_stays_what_it_is(asked):
    asked.answer = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        find("o/n")


def test_a_cached_model_is_found_offline_and_another_is_not(tmp_path, monkeypatch):
    """The library itself, on a cache made by hand and without a network."""
    cache = tmp_path / "hub"
    folder = snapshot(tmp_path)
    refs = folder.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        find("o/other")
    assert find("o/n") == Found(folder, COMMIT)
