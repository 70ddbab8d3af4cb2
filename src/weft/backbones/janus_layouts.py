"""Released layouts of Janus: transformers' (deepseek-community/...), and the makers' own (deepseek-ai/...).

Of both: the configuration in transformers' words, and which stored tensor is which of the module's.
"""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weft.backbones.checkpoint import Checkpoint, Rename
from weft.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import JanusConfig

PARTS = {
    "model.language_model.embed_tokens.": "table.",
    "model.language_model.": "decoder.",
    "lm_head.": "head.",
    "model.vision_model.": "vision.",
    "model.aligner.": "aligner.",
    "model.vqmodel.": "codec.",
    "model.generation_embeddings.": "code_table.",
    "model.generation_aligner.": "code_aligner.",
    "model.generation_head.": "code_head.",
}
"""Prefixes of transformers' keys and of ours; the first that fits is meant."""

_TOWER = r"^vision_model\.vision_tower\."
MAKERS_KEYS: tuple[tuple[str, str], ...] = (
    (r"^language_model\.lm_head\.", "head."),
    (r"^language_model\.model\.embed_tokens\.", "table."),
    (r"^language_model\.model\.", "decoder."),
    (_TOWER + r"patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (_TOWER + r"pos_embed$", "vision.embeddings.position_embedding.weight"),
    (_TOWER + r"norm\.", "vision.post_layernorm."),
    (_TOWER + r"blocks\.(\d+)\.norm(\d)\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (_TOWER + r"blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection_layer."),
    (_TOWER + r"blocks\.(\d+)\.attn\.", r"vision.encoder.layers.\1.self_attn."),
    (_TOWER + r"blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^gen_embed\.", "code_table."),
    (r"^gen_head\.output_mlp_projector\.", "code_head.proj_out."),
    (r"^gen_head\.", "code_head."),
    (r"^gen_aligner\.", "code_aligner."),
    (r"^(code_aligner|aligner)\.layers\.0\.", r"\1.fc1."),
    (r"^(code_aligner|aligner)\.layers\.2\.", r"\1.hidden_layers.0."),
    (r"^gen_vision_model\.", "codec."),
    (r"^codec\.encoder\.conv_blocks\.", "codec.encoder.down."),
    (r"^codec\.decoder\.conv_blocks\.", "codec.decoder.up."),
    (r"^(codec\.\w+\.(?:down|up)\.\d+)\.res\.", r"\1.block."),
    (r"^(codec\.\w+\.mid)\.0\.", r"\1.block_1."),
    (r"^(codec\.\w+\.mid)\.1\.", r"\1.attn_1."),
    (r"^(codec\.\w+\.mid)\.2\.", r"\1.block_2."),
)
"""Applied in this order to a key of the makers' layout, whose fused q, k and v have been split."""
MAKERS_UNUSED = re.compile(_TOWER + r"attn_pool\.|^gen_vision_model\.quantize\.codebook_used$|rotary_emb\.inv_freq$")
"""The tower's head, which Janus skips; a statistic of the codec's training; what old versions stored of a constant."""
MAKERS_HEADS = 16
"""Attention heads of every tower that the makers' code can build; tensors do not tell their number."""
MAKERS_CODEC = (1, 1, 2, 2, 4)
"""Channel multipliers of the codec, which the makers' code fixes."""


def _is_makers(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("model_type") == "multi_modality"


def read_config(checkpoint: Checkpoint) -> "JanusConfig":
    """Check the configuration of either layout.

    Raises:
        CheckpointError: it is another family's, damaged, or does not fit together.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import JanusConfig

    where = str(checkpoint.folder / "config.json")
    kind = checkpoint.config.get("model_type")
    if kind not in ("janus", "multi_modality"):
        raise CheckpointError(
            f"this is no Janus: its model_type is {kind!r}", where=where, fix="give a folder of Janus or Janus-Pro"
        )
    try:
        values = _makers_config(checkpoint) if _is_makers(checkpoint) else checkpoint.config
        config = JanusConfig.from_dict(values)
        width, vision, codec = config.text_config.hidden_size, config.vision_config, config.vq_config
        inner = {
            "vision_config.projection_dim": vision.projection_dim,
            "vq_config.projection_dim": codec.projection_dim,
            "vq_config.image_token_embed_dim": codec.image_token_embed_dim,
        }
        wrong = [f"{field} is {value}" for field, value in inner.items() if value != width]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}, and text_config.hidden_size is {width}")
    except KeyError as error:
        raise CheckpointError(
            f"this is no Janus or Janus-Pro: {error} is missing",
            where=where,
            fix="JanusFlow, which has the same model_type, is another family; else fetch the file again",
        ) from error
    except (TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"this is no configuration of Janus: {error}", where=where, fix="fetch it again"
        ) from error
    return config


def _makers_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Their configuration in transformers' words; what they fix in code is read off the tensors."""
    values, tensors = checkpoint.config, checkpoint.tensors
    aligner, gen_aligner, gen_vision, gen_head = (
        values[f"{part}_config"]["params"] for part in ("aligner", "gen_aligner", "gen_vision", "gen_head")
    )
    tower, codec = "vision_model.vision_tower.", "gen_vision_model.encoder."
    width, _, patch, _ = tensors[f"{tower}patch_embed.proj.weight"].shape
    inner = tensors[f"{tower}blocks.0.mlp.fc1.weight"].shape[0]
    layers = {key.split(".")[3] for key in tensors if key.startswith(f"{tower}blocks.")}
    side = values["vision_config"]["params"]["image_size"]
    return {
        "model_type": "janus",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama", **{k: v for k, v in values["language_config"].items() if not k.startswith("_")}
        },
        "vision_config": {
            "hidden_size": width, "num_hidden_layers": len(layers), "num_attention_heads": MAKERS_HEADS,
            "image_size": side, "patch_size": patch, "mlp_ratio": inner / width, "projection_dim": aligner["n_embed"],
            "depth": aligner["depth"], "num_image_tokens": (side // patch) ** 2,
        },
        "vq_config": {
            "embed_dim": gen_vision["n_embed"], "num_embeddings": gen_vision["image_token_size"],
            "base_channels": tensors[f"{codec}conv_in.weight"].shape[0],
            "latent_channels": tensors[f"{codec}conv_out.weight"].shape[0], "channel_multiplier": list(MAKERS_CODEC),
            "projection_dim": gen_aligner["n_embed"], "num_hidden_layers": gen_aligner["depth"],
            "image_token_embed_dim": gen_head["image_token_embed"],
        },
    }  # fmt: skip


def renaming(checkpoint: Checkpoint) -> Rename:
    """From the keys of `one_source_each` to the module's."""
    return _rename_makers if _is_makers(checkpoint) else _rename


def _rename(key: str) -> str | None:
    if key.endswith("rotary_emb.inv_freq"):
        return None
    for theirs, ours in PARTS.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _rename_makers(key: str) -> str | None:
    if MAKERS_UNUSED.search(key):
        return None
    for theirs, ours in MAKERS_KEYS:
        key = re.sub(theirs, ours, key)
    return key


def one_source_each(checkpoint: Checkpoint, config: "JanusConfig") -> Checkpoint:
    """Every tensor under a name of its own: fused q, k and v as three runs of rows, a tied head beside its table."""
    tensors = {}
    for key, info in checkpoint.tensors.items():
        fused = re.fullmatch(_TOWER + r"(.*)\.qkv\.(weight|bias)", key)
        if fused is None:
            tensors[key] = info
            continue
        third = replace(info, shape=(info.shape[0] // 3, *info.shape[1:]))
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            tensors[key.replace("qkv", name)] = replace(third, start=info.start + i * third.bytes)
    table = "model.language_model.embed_tokens.weight"
    if config.tie_word_embeddings and "lm_head.weight" not in tensors and table in tensors:
        tensors["lm_head.weight"] = tensors[table]
    return replace(checkpoint, tensors=tensors)
