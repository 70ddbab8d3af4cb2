"""Meta's layout of Chameleon, in which Anole is released too -> the transformers layout that `chameleon.py` reads.

    models/7b/{params.json, consolidate_params.json, consolidated.pth}      (30b: consolidated.00.pth, 01, 02, 03)
    tokenizer/{text_tokenizer.json, vqgan.yaml, vqgan.ckpt}

Done once, because these are pickles, read with `weights_only`. Tensor by tensor: memory holds about two of the files
that are written (`shards.py`), whatever the size of the model.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.atomic import write_folder, write_json
from weft.backbones.chameleon import (
    VQ,
    ChameleonBackbone,
    halves_from_pairs,
    in_transformers_layout,
    read_config,
)
from weft.backbones.checkpoint import few, read_json
from weft.backbones.pickles import read_pickle
from weft.backbones.shards import write_made
from weft.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT = 4096
"""Positions; no file of the release says it."""
IMAGE, RESERVED = "<image>", "<reserved08707>"
"""transformers' placeholder of a picture, and the spare token that it renames."""
VQ_NAMES = {
    "embed_dim": "embed_dim", "n_embed": "num_embeddings", "z_channels": "latent_channels", "double_z": "double_latent",
    "ch": "base_channels", "ch_mult": "channel_multiplier", "in_channels": "in_channels", "out_ch": "out_channels",
    "num_res_blocks": "num_res_blocks", "attn_resolutions": "attn_resolutions", "resolution": "resolution",
    "dropout": "dropout",
}  # fmt: skip
"""vqgan.yaml -> vq_config."""
_RELEASE = "give the folder of the release that holds models/ and tokenizer/, complete"

Merge = Callable[[Sequence[Tensor]], Tensor]
"""The same tensor of every shard -> the whole one."""


@dataclass(frozen=True)
class _Piece:
    """A tensor to be written: from which ones, and how."""

    parts: Sequence[Tensor]
    merge: Merge

    def make(self) -> Tensor:
        return self.merge(self.parts).contiguous()

    def on_meta(self) -> Tensor:
        return self.merge([part.to("meta") for part in self.parts])


def convert(source: Path, out: Path) -> None:
    """Convert a release into the new folder `out`.

    `out` appears when all of it is written: config.json, tokenizer.json, and safetensors with the pixel decoder under
    `model.vqmodel.decoder`. Tensors keep their dtype.

    Args:
        source: the folder that holds models/ and tokenizer/, or that of one model within.

    Raises:
        CheckpointError: a file is missing, damaged, or a pickle of more than tensors; tensors are missing, unexpected
            or of other shapes than the configuration says. Nothing was written by then.
        UsageError: `out` is a folder that is not empty.
    """
    if out.is_dir() and any(out.iterdir()):
        raise UsageError("the folder exists and is not empty", where=str(out), fix="name a new one")
    weights, tokens = _find(Path(source))
    params = _params(weights)
    files = _shard_files(weights, params)
    tokenizer = _tokenizer(_file(tokens, "text_tokenizer.json"))
    vq_config = _vq_config(_file(tokens, "vqgan.yaml"))
    vqgan = read_pickle(_file(tokens, "vqgan.ckpt"), "state_dict")
    shards = [read_pickle(file) for file in files]

    pieces = _merged(shards, params, files[0])
    # losses of its training may have been kept in it
    pieces |= {f"{VQ}{k}": _Piece([t], _copy) for k, t in vqgan.items() if not k.startswith("loss.")}
    config = _config(params, vq_config, tokenizer, pieces)
    with torch.device("meta"):
        wanted = ChameleonBackbone(read_config(config, str(weights)), tokenizer, "converted", draws=True)
    sizes = _check(pieces, in_transformers_layout(wanted), weights)
    config["dtype"] = str(shards[0]["output.weight"].dtype).removeprefix("torch.")
    with write_folder(out) as staging:
        write_json(staging / "config.json", config)
        tokenizer.save(str(staging / "tokenizer.json"))
        write_made(sizes, lambda key: pieces[key].make(), staging)


# --- files of the release ---------------------------------------------------------------------------------------------


def _find(source: Path) -> tuple[Path, Path]:
    """The folders with params.json and with the tokenizers."""
    found = [source] if (source / "params.json").is_file() else [p.parent for p in source.glob("models/*/params.json")]
    if not found:
        raise CheckpointError("there is no models/*/params.json here", where=str(source), fix=_RELEASE)
    if len(found) > 1:
        names = ", ".join(str(folder) for folder in sorted(found))
        raise CheckpointError("there are several models here", where=str(source), fix=f"give one of {names}")
    (weights,) = found
    for tokens in (weights / "tokenizer", weights.resolve().parent.parent / "tokenizer"):
        if tokens.is_dir():
            return weights, tokens
    raise CheckpointError("there is no folder tokenizer/", where=str(source), fix=_RELEASE)


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise CheckpointError(f"{name} is missing", where=str(folder), fix=_RELEASE)
    return folder / name


def _params(weights: Path) -> dict[str, Any]:
    params = read_json(weights / "params.json")
    params |= params.get("model", {})
    if (weights / "consolidate_params.json").is_file():
        params |= read_json(weights / "consolidate_params.json")
    for name in ("n_heads", "n_layers"):
        if type(params.get(name)) is not int or params[name] < 1:
            raise CheckpointError(f"there is no number {name}", where=str(weights / "params.json"), fix=_RELEASE)
    params["n_kv_heads"] = params.get("n_kv_heads") or params["n_heads"]
    return params


def _shard_files(weights: Path, params: dict[str, Any]) -> list[Path]:
    if (weights / "consolidated.pth").is_file():
        return [weights / "consolidated.pth"]
    found = len(list(weights.glob("consolidated.*.pth")))
    count = max(params.get("model_parallel_size") or 1, found)
    return [_file(weights, f"consolidated.{i:02d}.pth") for i in range(count)]


def _vq_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text())["model"]["params"]
        values = values | values["ddconfig"]
        return {ours: values[name] for name, ours in VQ_NAMES.items()}
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"this does not describe a VQGAN: {error!r}", where=str(path), fix=_RELEASE) from error


def _tokenizer(path: Path) -> "Tokenizer":
    """With transformers' name for the placeholder of a picture."""
    from tokenizers import AddedToken, Tokenizer

    values = read_json(path)
    try:
        names = values["model"]["vocab"]
        if IMAGE not in names:
            names[IMAGE] = names.pop(RESERVED)
            for token in values.get("added_tokens", ()):
                if token["content"] == RESERVED:
                    token["content"] = IMAGE
        tokenizer = Tokenizer.from_str(json.dumps(values))
    except KeyError as error:
        raise CheckpointError(f"there is no {error} in it", where=str(path), fix=_RELEASE) from error
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"this is no tokenizer: {error}", where=str(path), fix="fetch it again") from error
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (IMAGE, "<pad>") if t in names])
    return tokenizer


def _config(
    params: dict[str, Any], vq_config: dict[str, Any], tokenizer: "Tokenizer", pieces: Mapping[str, _Piece]
) -> dict[str, Any]:
    names = tokenizer.get_vocab(with_added_tokens=True)
    table = pieces["model.embed_tokens.weight"].on_meta()
    gate = pieces["model.layers.0.mlp.gate_proj.weight"].on_meta()
    return {
        "model_type": "chameleon",
        "architectures": ["ChameleonForConditionalGeneration"],
        "vocab_size": table.shape[0],
        "hidden_size": table.shape[1],
        "intermediate_size": gate.shape[0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": params.get("rope_theta", 10000.0)},
        "swin_norm": params.get("swin_norm", False),
        "bos_token_id": names.get("<s>"),
        "eos_token_id": names.get("</s>"),
        "pad_token_id": names.get("<pad>"),
        "vq_config": vq_config,
        "vocabulary_map": names,
    }


# --- tensors ----------------------------------------------------------------------------------------------------------


def _copy(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].clone()


def _rows(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), 0)


def _columns(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), 1)


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).float().mean(0).to(parts[0].dtype)


def _rotary_rows(heads: int, parts: Sequence[Tensor]) -> Tensor:
    return halves_from_pairs(_rows(parts), heads)


def _rotary_norm(heads: int, parts: Sequence[Tensor]) -> Tensor:
    """Each shard's vector, for each of its heads."""
    return torch.cat([halves_from_pairs(part, 1).expand(heads // len(parts), -1) for part in parts])


def _rules(params: dict[str, Any]) -> Iterator[tuple[str, str, Merge]]:
    """(Meta's key, transformers' key, how shards become one)."""
    queries, keys = params["n_heads"], params["n_kv_heads"]
    in_layer: tuple[tuple[str, str, Merge], ...] = (
        ("attention.wq.weight", "self_attn.q_proj.weight", partial(_rotary_rows, queries)),
        ("attention.wk.weight", "self_attn.k_proj.weight", partial(_rotary_rows, keys)),
        ("attention.wv.weight", "self_attn.v_proj.weight", _rows),
        ("attention.wo.weight", "self_attn.o_proj.weight", _columns),
        ("attention.q_normalization.weight", "self_attn.q_norm.weight", partial(_rotary_norm, queries)),
        ("attention.q_normalization.bias", "self_attn.q_norm.bias", partial(_rotary_norm, queries)),
        ("attention.k_normalization.weight", "self_attn.k_norm.weight", partial(_rotary_norm, keys)),
        ("attention.k_normalization.bias", "self_attn.k_norm.bias", partial(_rotary_norm, keys)),
        ("feed_forward.w1.weight", "mlp.gate_proj.weight", _rows),
        ("feed_forward.w3.weight", "mlp.up_proj.weight", _rows),
        ("feed_forward.w2.weight", "mlp.down_proj.weight", _columns),
        ("attention_norm.weight", "input_layernorm.weight", _mean),
        ("ffn_norm.weight", "post_attention_layernorm.weight", _mean),
    )
    yield "tok_embeddings.weight", "model.embed_tokens.weight", _columns
    for i in range(params["n_layers"]):
        for meta, ours, merge in in_layer:
            yield f"layers.{i}.{meta}", f"model.layers.{i}.{ours}", merge
    yield "norm.weight", "model.norm.weight", _mean
    yield "output.weight", "lm_head.weight", _rows


def _merged(shards: Sequence[Mapping[str, Tensor]], params: dict[str, Any], file: Path) -> dict[str, _Piece]:
    rules = list(_rules(params))
    known = {meta for meta, _, _ in rules}
    for shard in shards:
        _refuse(file, missing=known - shard.keys(), unexpected=shard.keys() - known - {"rope.freqs"})
    unlike = {k for k in known if len({(shard[k].shape, shard[k].dtype) for shard in shards}) > 1}
    _refuse(file, unlike_in_other_shards=unlike)
    pieces = {ours: _Piece([shard[meta] for shard in shards], merge) for meta, ours, merge in rules}
    for meta, ours, _ in rules:
        try:
            pieces[ours].on_meta()
        except Exception as error:  # torch and einops each raise their own
            shape = tuple(shards[0][meta].shape)
            raise CheckpointError(
                f"{meta} has shape {shape}, which does not fit {params['n_heads']} heads in {len(shards)} shards",
                where=str(file),
                fix=_RELEASE,
            ) from error
    return pieces


def _check(pieces: Mapping[str, _Piece], wanted: Mapping[str, Tensor], weights: Path) -> dict[str, int]:
    """The size of each piece in bytes, if the model takes them all."""
    found = {key: piece.on_meta() for key, piece in pieces.items()}
    _refuse(weights, missing=wanted.keys() - found.keys(), unexpected=found.keys() - wanted.keys())
    _refuse(
        weights,
        of_another_shape=(
            f"{key} with {tuple(found[key].shape)} for {tuple(tensor.shape)}"
            for key, tensor in wanted.items()
            if found[key].shape != tensor.shape
        ),
    )
    return {key: tensor.nbytes for key, tensor in found.items()}


def _refuse(where: Path, **troubles: Iterable[str]) -> None:
    for trouble, keys in troubles.items():
        if named := sorted(keys):
            raise CheckpointError(f"tensors {trouble.replace('_', ' ')}: {few(named)}", where=str(where), fix=_RELEASE)
