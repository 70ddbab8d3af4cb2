"""How Emu2's checkpoints say what they hold: keys of tensors, sizes from `config.json` or from the tensors' shapes.

The module's keys and `Emu2Config` are what `emu2.py` works with; written is the hub's layout alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from weft.atomic import write_json
from weft.backbones.checkpoint import read_json
from weft.backbones.shards import write_weights
from weft.codecs.diffusion import DiffusionConfig
from weft.codecs.eva import EvaConfig
from weft.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOWER_HEAD, DECODER_HEAD = 112, 128
"""Widths of an attention head in the released models, for checkpoints that do not say."""
CHAT_VOCABULARY, CHAT_QUERIES = 32274, 256

# Of Emu2-Gen, where they differ from diffusers' defaults: an SDXL that attends to 1792 wide vectors.
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 1792,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 3328,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Emu2Config:
    vocabulary: int
    vision: EvaConfig = EvaConfig()
    width: int = 6656
    mlp: int = 17920
    layers: int = 60
    heads: int = 52
    eps: float = 1e-6
    theta: float = 10000.0
    """Base of the rotary frequencies."""
    context_length: int = 2048
    queries: int = 64
    """Features of a picture that the model writes."""
    read_queries: int = 64
    """Of one that it reads: 256 in Emu2-Chat."""
    pixels: DiffusionConfig | None = None


# --- keys -------------------------------------------------------------------------------------------------------------


KEYS = (
    ("decoder.lm.model.embed_tokens.", "table."),
    ("decoder.lm.model.", "decoder."),
    ("decoder.lm.lm_head.", "head."),
    ("decoder.lm.project_", "project_"),
    ("unet.", "pixels.unet."),
    ("vae.", "pixels.vae."),
)
"""How keys begin in the released layouts, once `multimodal_encoder.` and `model.` are off, and in ours."""
_LEGACY = {
    "decoder.lm.stu_regress_head.weight": "project_down.weight",
    "vl_adapter.projection.weight": "project_up.weight",
}
"""Names of the projections in the oldest files."""


def module_key(stored: str) -> str | None:
    """Of a tensor in any of the released layouts, ours; None for what is not needed."""
    key = stored.removeprefix("multimodal_encoder.").removeprefix("model.")
    key = _LEGACY.get(key, key)
    if key.startswith("safety_checker.") or key.endswith(".rotary_emb.inv_freq"):
        return None
    return next((ours + key[len(theirs) :] for theirs, ours in KEYS if key.startswith(theirs)), key)


def hub_key(key: str) -> str:
    """Of one of our tensors, the hub's."""
    if key.startswith("project_"):
        return key
    theirs = next((theirs + key[len(ours) :] for theirs, ours in KEYS if key.startswith(ours)), key)
    return f"model.{theirs}"


# --- sizes ------------------------------------------------------------------------------------------------------------


def read_config(values: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], where: str) -> Emu2Config:
    """From the hub's `config.json`; what it does not say, from the tensors, and the released constants for the rest."""
    vision = values.get("vision_config", {})
    if not isinstance(vision, dict):
        raise CheckpointError("vision_config of config.json is no object", where=where, fix="fetch config.json again")
    rows, width = _shape(shapes, "table.weight", where)
    seen = _shape(shapes, "visual.cls_token", where)[-1]
    patch = _shape(shapes, "visual.patch_embed.proj.weight", where)[-1]
    places = _shape(shapes, "visual.pos_embed", where)[1]
    try:
        seen = int(vision.get("width", seen))
        width = int(values.get("hidden_size", width))
        patch = int(vision.get("patch_size", patch))
        tower = EvaConfig(
            side=int(vision.get("image_size", isqrt(places - 1) * patch)),
            patch=patch,
            width=seen,
            layers=int(vision.get("layers", _count(shapes, "visual.blocks."))),
            heads=seen // int(vision.get("head_width", TOWER_HEAD)),
            mlp=int(vision.get("intermediate_size", _shape(shapes, "visual.blocks.0.mlp.fc1.weight", where)[0])),
            eps=float(vision.get("layer_norm_eps", 1e-6)),
        )
        rows = int(values.get("vocab_size", rows))
        queries = int(vision.get("v_query", 64))
        return Emu2Config(
            vocabulary=rows,
            vision=tower,
            width=width,
            mlp=int(values.get("intermediate_size", _shape(shapes, "decoder.layers.0.mlp.up_proj.weight", where)[0])),
            layers=int(values.get("num_hidden_layers", _count(shapes, "decoder.layers."))),
            heads=int(values.get("num_attention_heads", width // DECODER_HEAD)),
            eps=float(values.get("rms_norm_eps", 1e-6)),
            theta=float(values.get("rope_theta", 10000.0)),
            context_length=int(values.get("max_position_embeddings", 2048)),
            queries=queries,
            read_queries=int(vision.get("n_query", CHAT_QUERIES if rows == CHAT_VOCABULARY else queries)),
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json is damaged: {error}", where=where, fix="fetch it again") from error


def _shape(shapes: Mapping[str, Sequence[int]], key: str, where: str) -> Sequence[int]:
    if key not in shapes:
        raise CheckpointError(
            f"this is no Emu2: there is no tensor {hub_key(key)}", where=where, fix="give the folder of an Emu2"
        )
    return shapes[key]


def _count(shapes: Iterable[str], prefix: str) -> int:
    """Blocks, by the numbers after `prefix`."""
    return len({key.removeprefix(prefix).partition(".")[0] for key in shapes if key.startswith(prefix)})


def pixels_config(folder: Path) -> DiffusionConfig:
    """From the folders that diffusers writes; of the released Emu2-Gen where there are none."""
    files = (("unet/config.json", UNET), ("vae/config.json", VAE), ("scheduler/scheduler_config.json", SCHEDULER))
    unet, vae, scheduler = (
        read_json(folder / file) if (folder / file).is_file() else released for file, released in files
    )
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    return DiffusionConfig(unet, vae, scheduler, index.get("num_inference_steps", 50), index.get("guidance_scale", 3.0))


# --- writing ----------------------------------------------------------------------------------------------------------


def _config_json(config: Emu2Config) -> dict[str, Any]:
    """The hub's `config.json`."""
    vision = config.vision
    return {
        "architectures": ["EmuForCausalLM"],
        "vocab_size": config.vocabulary,
        "d_model": vision.width,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "rms_norm_eps": config.eps,
        "rope_theta": config.theta,
        "max_position_embeddings": config.context_length,
        "vision_config": {
            "image_size": vision.side,
            "patch_size": vision.patch,
            "width": vision.width,
            "layers": vision.layers,
            "head_width": vision.width // vision.heads,
            "intermediate_size": vision.mlp,
            "layer_norm_eps": vision.eps,
            "n_query": config.read_queries,
            "v_query": config.queries,
        },
    }


def write_hub(config: Emu2Config, tokenizer: "Tokenizer", tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a model into an existing folder: as Emu2, or as Emu2-Gen if there is a pixel decoder.

    Args:
        tensors: by the module's keys.
    """
    pixels = config.pixels
    encoder, home = (folder / "multimodal_encoder", folder / "tokenizer") if pixels else (folder, folder)
    write_json(encoder / "config.json", _config_json(config))
    own = {hub_key(key): tensor for key, tensor in tensors.items() if not key.startswith("pixels.")}
    write_weights(encoder, own)
    home.mkdir(exist_ok=True)
    tokenizer.save(str(home / "tokenizer.json"))
    if pixels is None:
        return
    for part, values in (("unet", pixels.unet), ("vae", pixels.vae)):
        prefix = f"pixels.{part}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        write_json(folder / part / "config.json", values)
        write_weights(folder / part, own, "diffusion_pytorch_model")
    write_json(folder / "scheduler" / "scheduler_config.json", pixels.scheduler)
    index = {"num_inference_steps": pixels.steps, "guidance_scale": pixels.guidance}
    write_json(folder / "model_index.json", {"_class_name": "EmuVisualGenerationPipeline", **index})
