"""How Emu3's checkpoints name what they hold: tensors and settings."""

from typing import Any

from weft.backbones.checkpoint import Checkpoint
from weft.errors import CheckpointError

KEYS = (
    ("model.text_model.embed_tokens.", "table."),
    ("model.text_model.", "decoder."),
    ("lm_head.", "head."),
    ("model.vqmodel.", "codec."),
    ("text_model.model.embed_tokens.", "table."),
    ("text_model.model.", "decoder."),
    ("text_model.lm_head.", "head."),
    ("vqmodel.", "codec."),
)
"""How a released key begins, and ours; the first that fits. Today's form, which `save` writes, then the older one."""


def rename(key: str) -> str | None:
    if key.endswith(".rotary_emb.inv_freq"):
        return None  # computed from the config
    return next((ours + key.removeprefix(theirs) for theirs, ours in KEYS if key.startswith(theirs)), key)


def read_config(checkpoint: Checkpoint) -> Any:
    """transformers' `Emu3Config`, checked.

    Raises:
        CheckpointError: it is another family's or in the makers' own layout, damaged, or has values that cannot be
            meant.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Emu3Config

    where, values = str(checkpoint.folder / "config.json"), checkpoint.config
    if values.get("model_type") != "emu3":
        raise CheckpointError(
            f"this is a model of type {values.get('model_type')!r}, not 'emu3'",
            where=where,
            fix="use BAAI/Emu3-Chat-hf or BAAI/Emu3-Gen-hf, not the repositories that bring their own code",
        )
    try:
        config = Emu3Config.from_dict(values)
        if not isinstance(config.vocabulary_map, dict):
            raise ValueError("it has no vocabulary_map")
        _check_own(getattr(config, "weft", {}))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"this is not the configuration of an Emu3: {error}", where=where, fix="use the one of the release"
        ) from error
    return config


def _check_own(own: Any) -> None:
    if not isinstance(own, dict) or not own.keys() <= {"chat", "area"}:
        raise ValueError(f'"weft" may hold "chat" and "area", not {own}')
    if own.get("chat", "chat") not in ("chat", "plain") or not isinstance(own.get("area", 0), int):
        raise ValueError(f'"chat" is "chat" or "plain" and "area" is in pixels, not {own}')
