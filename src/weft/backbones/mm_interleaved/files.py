"""MM-Interleaved on disk: our own folder, and the pickled release, from which such a folder is made once.

    config.json      "model_type": "mm_interleaved", then an `MMInterleavedConfig`
    model*.safetensors and their index, named as in the module
    tokenizer.json   or LLaMA's tokenizer.model

Functions take `build`, the class of the model, which is above this file. Names of released tensors: `released.py`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pydantic
import torch
from torch import Tensor, nn

from weft.atomic import write_folder, write_json
from weft.backbones.checkpoint import Checkpoint, LoadOptions, few, fill, read_json
from weft.backbones.emu2_tokens import UNKNOWN
from weft.backbones.emu2_tokens import find_tokenizer as find_llama_tokenizer
from weft.backbones.mm_interleaved.config import MMInterleavedConfig
from weft.backbones.mm_interleaved.released import key_map, tables
from weft.backbones.mm_interleaved.text import BEGIN, BEGIN_IMAGE, END, PLACEHOLDER
from weft.backbones.pickles import find_pickles, read_pickle
from weft.backbones.placement import place
from weft.backbones.shards import write_made, write_weights
from weft.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODEL_TYPE = "mm_interleaved"
CONFIGS = Path(__file__).with_name("configs")
INDEX = "pytorch_model.bin.index.json"
MARK = "soi_token"
"""A tensor that only this family has."""
RELEASE = "mm_interleaved_pretrain"
"""The folder with the pickles in the repository of the release."""
TABLE_TOLERANCE = 1e-4
"""Between a stored table of sines and ours, beyond the rounding of the dtype in which it is stored."""
_AGAIN = "fetch all files of the release again, complete and unchanged"

B = TypeVar("B")
Build = Callable[[MMInterleavedConfig, "Tokenizer", str], B]
"""(config, tokenizer, name) -> the model."""


# --- configuration and tokenizer --------------------------------------------------------------------------------------


def shipped(name: Literal["full", "small"] = "full") -> MMInterleavedConfig:
    """A configuration that comes with the package.

    Args:
        name: "full" is the released 13B model over Stable Diffusion 2.1-base; "small" one in the sizes of the paper's
            ablations, to be trained: OpenLLaMA-3B, 32 vectors for a picture, pictures of 256 pixels.
    """
    path = CONFIGS / f"{name}.json"
    return read_config(read_json(path), path)


def read_config(values: Mapping[str, Any], path: Path) -> MMInterleavedConfig:
    """What a config.json says.

    Raises:
        CheckpointError: it is another model's, or does not fit the schema; the key is named.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"this describes a model of type {values.get('model_type')!r}, not {MODEL_TYPE!r}",
            where=str(path),
            fix="give the config.json of an MM-Interleaved that Weft wrote, or one of those in its folder configs",
        )
    try:
        return MMInterleavedConfig.model_validate({key: values[key] for key in values if key != "model_type"})
    except (pydantic.ValidationError, KeyError, TypeError) as error:
        what = repr(error)
        if isinstance(error, pydantic.ValidationError):
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            what = first["msg"].removeprefix("Value error, ")
            what = f"{place}: {what}" if place else what
        raise CheckpointError(
            f"this does not describe an MM-Interleaved: {what}", where=str(path), fix="mend it, or fetch it again"
        ) from error


def find_tokenizer(folder: Path, config: MMInterleavedConfig) -> "Tokenizer":
    """LLaMA's, from `tokenizer.json` or `tokenizer.model`, with the two tokens of pictures.

    Raises:
        CheckpointError: there is none, it is damaged, or it is not that of a model with these ids.
        UsageError: sentencepiece is needed and not installed.
    """
    if not has_tokenizer(folder):
        raise CheckpointError(
            "there is no tokenizer: neither tokenizer.json nor tokenizer.model",
            where=str(folder),
            fix="copy tokenizer.model of its language model there; that of the release is lmsys/vicuna-13b-v1.3",
        )
    return complete(find_llama_tokenizer(folder), config, str(folder))


def has_tokenizer(folder: Path) -> bool:
    places = (folder, folder / "tokenizer")
    return any((place / name).is_file() for place in places for name in ("tokenizer.json", "tokenizer.model"))


def complete(tokenizer: "Tokenizer", config: MMInterleavedConfig, where: str) -> "Tokenizer":
    """Add the tokens of pictures if they are not there yet, and see that all have the model's ids.

    Raises:
        CheckpointError: they have not.
    """
    from tokenizers import AddedToken

    for token in (UNKNOWN, BEGIN, END):
        if tokenizer.token_to_id(token) is not None:  # else it would become a new one
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    ids = {BEGIN_IMAGE: config.tokens.begin_image, PLACEHOLDER: config.tokens.placeholder}
    for token in ids:
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    wanted = {BEGIN: config.tokens.begin, END: config.tokens.end, **ids}
    for token, number in wanted.items():
        if tokenizer.token_to_id(token) != number:
            raise CheckpointError(
                f"{token} is token {tokenizer.token_to_id(token)} of the tokenizer and {number} of the model",
                where=where,
                fix="use the tokenizer of its language model",
            )
    if tokenizer.get_vocab_size() != config.llm.vocabulary:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {config.llm.vocabulary}",
            where=where,
            fix="use the tokenizer of its language model",
        )
    return tokenizer


# --- our folder -------------------------------------------------------------------------------------------------------


def load(build: Build[B], checkpoint: Checkpoint, name: str, options: LoadOptions = LoadOptions()) -> B:
    """The model in a folder, tensor by tensor. Its autoencoder stays in float32, in which alone it is exact enough.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape, config.json or the tokenizer does not fit.
        UsageError: diffusers or sentencepiece is needed and not installed; or as `place`.
    """
    folder = checkpoint.folder
    config = read_config(checkpoint.config, folder / "config.json")
    model = _on_meta(build, config, find_tokenizer(folder, config), name)
    fill(model, checkpoint, transform=partial(_held, options.dtype), device=options.staging)
    place(model, options)
    model.fingerprint = checkpoint.fingerprint
    found: B = model.requires_grad_(False).eval()
    return found


def _held(dtype: torch.dtype, key: str, tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if key.startswith("vae.") else dtype)


def _on_meta(build: Build[Any], config: MMInterleavedConfig, tokenizer: "Tokenizer", where: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    try:
        with torch.device("meta"):
            return build(config, tokenizer, where)
    # the libraries' own, of what they are given
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(
            f"config.json describes no model that can be built: {str(error).splitlines()[-1].strip()}",
            where=where,
            fix="mend it, or fetch it again",
        ) from error


def save(model: Any, folder: Path) -> None:
    """Write a model into an existing folder, as `load` reads it."""
    _write_config(model.config, folder)
    model.tokenizer.save(str(folder / "tokenizer.json"))
    write_weights(folder, model.state_dict())


def _write_config(config: MMInterleavedConfig, folder: Path) -> None:
    write_json(folder / "config.json", {"model_type": MODEL_TYPE, **config.model_dump(mode="json")})


# --- the release ------------------------------------------------------------------------------------------------------


def is_release(source: Path) -> bool:
    """Whether pickles at this place are an MM-Interleaved's.

    Raises:
        CheckpointError: as `find_pickles`; or a single pickle cannot be read.
    """
    source = _home(source)
    if (source / INDEX).is_file():
        return MARK in _weight_map(source / INDEX)
    return any(MARK in read_pickle(path, "module") for path in find_pickles(source))


def convert(build: Build[Any], source: Path, out: Path) -> None:
    """Write a release into the new folder `out`, once; nothing remains of an attempt that fails.

    Tensors are mapped from the pickles and written in shards: memory holds one shard. They keep their dtype. What our
    model computes is left out, when it was seen to be the same.

    Args:
        source: a pickle, or a folder with one, or with shards and their `pytorch_model.bin.index.json`. A tokenizer
            there is taken along; a config.json there, as `save` writes it, says the sizes. Without one they are those
            of the released 13B model.

    Raises:
        CheckpointError: a file is missing, damaged, or a pickle of more than tensors; tensors are missing, unexpected
            or of another shape; a table is not what our model computes; the tokenizer is another model's.
        UsageError: `out` is a folder that is not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError("the folder exists and is not empty", where=str(out), fix="name a new one")
    source = _home(source)
    folder = source if source.is_dir() else source.parent
    sizes = folder / "config.json"
    config = read_config(read_json(sizes), sizes) if sizes.is_file() else shipped("full")
    tokenizer = find_tokenizer(folder, config) if has_tokenizer(folder) else None
    stored = _read_release(source)
    model = _on_meta(build, config, tokenizer or _no_tokenizer(), str(folder))
    keys = {ours: released for released, ours in key_map(model).items()}
    _check(stored, model, keys, folder, has_sizes=sizes.is_file())
    with write_folder(out) as staging:
        _write_config(config, staging)
        if tokenizer is not None:
            tokenizer.save(str(staging / "tokenizer.json"))
        wanted = {key: stored[keys[key]].nbytes for key in model.state_dict()}
        write_made(wanted, lambda key: stored[keys[key]].clone(memory_format=torch.contiguous_format), staging)


def _home(source: Path) -> Path:
    """Where the pickles are, of the whole repository."""
    return source / RELEASE if (source / RELEASE).is_dir() else source


def _no_tokenizer() -> "Tokenizer":
    """For a model that is never run."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel())


def _weight_map(index: Path) -> dict[str, str]:
    files = read_json(index).get("weight_map")
    if not files or not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError("the index has no weight_map of tensors to files", where=str(index), fix=_AGAIN)
    if wrong := [name for name in files.values() if Path(name).name != name]:
        raise CheckpointError(f"the index names {wrong[0]}, which is not in its folder", where=str(index), fix=_AGAIN)
    return files


def _read_release(source: Path) -> dict[str, Tensor]:
    """All tensors by their released names, left on the disk until they are used."""
    index = source / INDEX
    if not index.is_file():
        return {key: tensor for path in find_pickles(source) for key, tensor in read_pickle(path, "module").items()}
    files = _weight_map(index)
    stored: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        path = source / name
        if not path.is_file():
            raise CheckpointError("the index names this shard, and it is missing", where=str(path), fix=_AGAIN)
        tensors = read_pickle(path)
        if wrong := sorted(tensors.keys() ^ {key for key, file in files.items() if file == name}):
            raise CheckpointError(f"this shard and the index disagree about {few(wrong)}", where=str(path), fix=_AGAIN)
        stored |= tensors
    return stored


def _check(
    stored: Mapping[str, Tensor], model: nn.Module, keys: Mapping[str, str], folder: Path, *, has_sizes: bool
) -> None:
    """Refuse all but exactly the tensors of a release.

    Args:
        keys: ours -> released.
    """
    computed = {key: make() for key, make in tables(model).items()}
    wanted = {keys[ours]: tensor for ours, tensor in model.state_dict().items()} | computed
    both = [(key, stored[key], tensor) for key, tensor in wanted.items() if key in stored]
    found = {
        "missing": [key for key in wanted if key not in stored],
        "unexpected": [key for key in stored if key not in wanted],
        "of another shape": [
            f"{key} with {tuple(has.shape)} for {tuple(needs.shape)}"
            for key, has, needs in both
            if has.shape != needs.shape
        ],
        "of another kind": [
            f"{key} of {has.dtype}" for key, has, needs in both if has.is_floating_point() != needs.is_floating_point()
        ],
    }
    if troubles := [f"{len(names)} {trouble}: {few(names)}" for trouble, names in found.items() if names]:
        other = "" if has_sizes else "; for a model of other sizes put its config.json beside them"
        raise CheckpointError(
            f"this is not the MM-Interleaved that is expected; tensors {'; '.join(troubles)}",
            where=str(folder),
            fix=_AGAIN + other,
        )
    for key, table in computed.items():
        rounding = torch.finfo(stored[key].dtype).eps if table.is_floating_point() else 0.0
        off = float((stored[key].double() - table.double()).abs().max())
        if not off <= TABLE_TOLERANCE + rounding:  # nor if it is nan
            raise CheckpointError(
                f"{key} differs by {off:.2g} from the table that this model computes in its place",
                where=str(folder),
                fix="this is no released model, or it was damaged: fetch it again",
            )
