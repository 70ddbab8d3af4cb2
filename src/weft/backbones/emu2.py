"""Emu2: a LLaMA that reads pictures as vectors of a vision tower, and writes them by regressing the next vector.

    pixels --tower, pooled--> features (Q, F) --project_up--> inputs of the stack
    hidden state --project_down--> the next feature; the Q features of a picture --diffusion decoder--> pixels

Loads the released layouts: one file with `visual.*, decoder.lm.*, project_*.weight` (Emu2, Emu2-Chat), the same under
`multimodal_encoder.` with `unet.*, vae.*` beside it (Emu2-Gen), and the hub's folders of both. Pickles go through
`convert` first. Only Emu2-Gen has a pixel decoder, and only Emu2-Chat words around turns: elsewhere parts follow each
other. The published safety checker is not loaded.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.atomic import write_folder, write_json
from weft.backbones.base import (
    ChatFormat,
    DecodeStep,
    DecodingOptions,
    Elements,
    Kind,
    PictureForm,
    SpecialTokens,
    run_decoder,
)
from weft.backbones.checkpoint import Checkpoint, LoadOptions, fill, place_decoder, read_json, read_tokenizer
from weft.codecs.diffusion import DiffusionConfig, DiffusionDecoder
from weft.codecs.eva import EvaConfig, EvaTower
from weft.errors import CheckpointError, UsageError
from weft.layout import FEATURE, ModalityLayout

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from tokenizers import Tokenizer

    from weft.adapters.routing import RoutingState

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

BEGIN, END, UNKNOWN, PAD = "<s>", "</s>", "<unk>", "[PAD]"
BEGIN_IMAGE, END_IMAGE = "[IMG]", "[/IMG]"
PLACEHOLDERS = ("<image>", "[gIMG]")
"""What the released code writes where a vector goes, of a picture and of a video frame; here `FEATURE` stands there."""
USER, ASSISTANT = "[USER]", "[ASSISTANT]"
ADDED = (
    PAD, BEGIN_IMAGE, END_IMAGE, *PLACEHOLDERS, "[/gIMG]", "[EOC]", "[VIDEO]", "<grounding>", "<phrase>", "</phrase>",
    "<object>", "</object>", "</delimiter_of_multi_objects/>", "<REC>", *(f"<patch_index_{i:04}>" for i in range(257)),
)  # fmt: skip
"""What every Emu2 adds to LLaMA's tokens, in this order; Emu2-Chat adds `USER` and `ASSISTANT` after them."""
SYSTEM = "You are a helpful assistant, dedicated to delivering comprehensive and meticulous responses."
"""What stands before the first turn of Emu2-Chat."""
TOWER_HEAD, DECODER_HEAD = 112, 128
"""Widths of an attention head in the released models, for checkpoints that do not say."""
CHAT_VOCABULARY, CHAT_QUERIES = 32274, 256
SHARD = 2**31
"""Bytes that `convert` holds in memory and writes to one file."""

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


class Emu2Backbone(nn.Module):
    """A `Backbone` of kind continuous; see `weft.backbones.base` for shapes."""

    kind: Kind = "continuous"
    guidance = (1.0, 1.0)
    revision: str | None = None
    codes = 0

    def __init__(self, config: Emu2Config, tokenizer: "Tokenizer", name: str) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        _check_queries(config, name)
        self.config, self.name, self.tokenizer = config, name, tokenizer
        _complete(tokenizer, config.vocabulary, name)
        self.tokens, self.chat = _special_tokens(tokenizer), _chat_format(tokenizer)
        self.placeholders = [tokenizer.token_to_id(token) for token in PLACEHOLDERS]
        self.vocabulary = config.vocabulary
        self.feature_width = config.vision.width
        self.form = self._form(config.queries)
        self.widest = self.form.cols
        self.context_length = config.context_length
        self.routing: RoutingState | None = None
        self.fingerprint = ""
        self.visual = EvaTower(config.vision)
        self.project_up = nn.Linear(config.vision.width, config.width, bias=False)
        self.project_down = nn.Linear(config.width, config.vision.width, bias=False)
        self.table = nn.Embedding(config.vocabulary, config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.decoder = LlamaModel(
            LlamaConfig(
                vocab_size=1,  # the stack's own table is dropped: `embed` is ours
                hidden_size=config.width,
                intermediate_size=config.mlp,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                rms_norm_eps=config.eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.theta},
                max_position_embeddings=config.context_length,
                bos_token_id=None, eos_token_id=None, pad_token_id=None,
                attn_implementation="sdpa",
            )
        )  # fmt: skip
        self.decoder.name_or_path = name
        self.decoder.embed_tokens = None
        self.pixels = DiffusionDecoder(config.pixels) if config.pixels else None

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    # --- text and pictures ------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        # the tokenizer itself puts a space before: a word is the same token at the start of a text as inside it
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([i for i in ids if 0 <= i < self.vocabulary], skip_special_tokens=True)

    def form_of(self, size: tuple[int, int]) -> PictureForm:
        side = self.pixels.side if self.pixels else self.config.vision.side
        if size != (side, side):
            raise UsageError(
                f"{self.name} makes no pictures of {size[0]} x {size[1]} pixels", fix=f"ask for {side} x {side}"
            )
        return self.form

    def _form(self, queries: int) -> PictureForm:
        side = isqrt(queries)
        return PictureForm(side, side, (self.tokens.begin_image,), (self.tokens.end_image,))

    @torch.no_grad()
    def encode_images(self, pictures: "Sequence[PILImage.Image]", *, generated: bool) -> list[Elements]:
        form = self._form(self.config.queries if generated else self.config.read_queries)
        pixels = torch.stack([_to_tensor(picture, self.config.vision.side) for picture in pictures])
        features = self.visual.pooled(pixels.to(self.visual.cls_token), form.patches).float()
        ids = torch.full((form.patches,), FEATURE, device=features.device)
        return [Elements(form, ids, each) for each in features]

    @torch.no_grad()
    def decode_image(self, elements: Elements, options: DecodingOptions = DecodingOptions()) -> "PILImage.Image":
        from PIL import Image as PILImage

        if self.pixels is None:
            raise CheckpointError(
                f"{self.name} came without a pixel decoder: it reads pictures, and writes them as vectors only",
                fix="load Emu2-Gen, whose folder has unet and vae",
            )
        drawn = self.pixels.config
        guidance = drawn.guidance if options.guidance is None else options.guidance
        negative = self._blank() if options.negative is None and guidance != 1 else options.negative
        pixels = self.pixels(
            self._checked(elements.features),
            None if negative is None else self._checked(negative),
            steps=drawn.steps if options.steps is None else options.steps,
            guidance=guidance,
            seed=options.seed,
        )[0]
        values = (pixels * 255).round().to(torch.uint8)
        return PILImage.fromarray(values.permute(1, 2, 0).cpu().numpy())

    def _checked(self, features: Tensor | None) -> Tensor:
        wanted = (self.config.queries, self.feature_width)
        if features is None or features.shape != wanted:
            found = "none" if features is None else f"a tensor {tuple(features.shape)}"
            raise UsageError(
                f"{self.name} draws a picture from vectors {wanted}, and got {found}",
                fix="encode pictures with generated=True",
            )
        return features[None].to(self.device, torch.float32)

    def _blank(self) -> Tensor:
        """(Q, F) features of a picture that is zero once normalised, which is one of mean colour."""
        side = self.config.vision.side
        pixels = self.visual.cls_token.new_zeros(1, 3, side, side)
        return self.visual.pooled(pixels, self.config.queries)[0]

    # --- the stack and its heads ------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, layout: ModalityLayout, features: Tensor | None = None) -> Tensor:
        words = self.table(ids.clamp_min(0))  # FEATURE is below zero
        if features is None:
            return words
        seen = self.project_up(features.to(words.dtype))
        return torch.where((ids == FEATURE).unsqueeze(-1), seen, words)

    def forward(self, embeds: Tensor, layout: ModalityLayout, step: DecodeStep | None = None) -> Tensor:
        return run_decoder(self.decoder, self.routing, embeds, layout, step)

    def text_logits(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        for number in self.placeholders:  # one by one: an index tensor would have to be on the device
            logits[..., number] = -torch.inf
        return logits

    def image_logits(self, hidden: Tensor) -> Tensor:
        raise TypeError(f"pictures of {self.name} are vectors, not codes: use image_features")

    def image_features(self, hidden: Tensor) -> Tensor:
        return self.project_down(hidden)


def _check_queries(config: Emu2Config, where: str) -> None:
    for queries in (config.queries, config.read_queries):
        if not config.vision.pools_to(queries):
            raise CheckpointError(
                f"{config.vision.grid} x {config.vision.grid} patches do not divide into {queries} equal squares",
                where=where,
                fix="mend n_query and v_query of vision_config in config.json",
            )


def _to_tensor(picture: "PILImage.Image", side: int) -> Tensor:
    """Any RGB picture -> (3, side, side), stretched to the square and normalised as for CLIP."""
    import numpy as np
    from PIL import Image as PILImage

    picture = picture.resize((side, side), PILImage.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


# --- tokens -----------------------------------------------------------------------------------------------------------


def _complete(tokenizer: "Tokenizer", vocabulary: int, where: str) -> None:
    """Add the tokens that plain LLaMA lacks, as the released code does when it starts, and mark all as special.

    Raises:
        CheckpointError: the tokenizer is not the one of a model with so many tokens.
    """
    from tokenizers import AddedToken

    # text that spells a control token stays text
    tokenizer.encode_special_tokens = True
    for wanted in ((*ADDED, USER, ASSISTANT), ADDED):
        missing = sum(tokenizer.token_to_id(token) is None for token in wanted)
        if tokenizer.get_vocab_size() + missing == vocabulary:
            special = (UNKNOWN, BEGIN, END, *wanted)
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
            break
    if tokenizer.get_vocab_size() != vocabulary:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {vocabulary}",
            where=where,
            fix="use the tokenizer that was saved with the model",
        )


def _special_tokens(tokenizer: "Tokenizer") -> SpecialTokens:
    named = (BEGIN, END, PAD, BEGIN_IMAGE, END_IMAGE)
    begin, end, pad, begin_image, end_image = (_id(tokenizer, token) for token in named)
    rest = (tokenizer.token_to_id(token) for token in (UNKNOWN, *ADDED, USER, ASSISTANT) if token not in named)
    others = tuple(number for number in rest if number is not None)
    return SpecialTokens(begin, end, pad, end, begin_image, end_image, others)


def _id(tokenizer: "Tokenizer", token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise CheckpointError(f"the tokenizer has no {token}", fix="use the tokenizer that was saved with the model")
    return number


def _chat_format(tokenizer: "Tokenizer") -> ChatFormat:
    begin, end = _id(tokenizer, BEGIN), _id(tokenizer, END)
    if tokenizer.token_to_id(USER) is None:
        return ChatFormat(start=(begin,), user=((), ()), assistant=((), (end,)), end=(end,))
    # The released tokenizer drops the spaces beside these tokens: `system [USER]: question [ASSISTANT]: answer</s>`
    colon = tokenizer.encode(":", add_special_tokens=False).ids
    return ChatFormat(
        start=(begin, *tokenizer.encode(SYSTEM, add_special_tokens=False).ids),
        user=((_id(tokenizer, USER), *colon), ()),
        assistant=((_id(tokenizer, ASSISTANT), *colon), (end,)),
        end=(end,),
        system=((), ()),
    )


def _find_tokenizer(folder: Path) -> "Tokenizer":
    """Of a checkpoint's folder or the one where Emu2-Gen has it, with the tokens of `added_tokens.json`."""
    for place in (folder, folder / "tokenizer"):
        if (place / "tokenizer.json").is_file():
            tokenizer = read_tokenizer(place)
        elif (place / "tokenizer.model").is_file():
            tokenizer = _from_sentencepiece(place / "tokenizer.model")
        else:
            continue
        if (place / "added_tokens.json").is_file():
            _add_tokens(tokenizer, place / "added_tokens.json")
        return tokenizer
    raise CheckpointError(
        "there is neither tokenizer.json nor tokenizer.model",
        where=str(folder),
        fix="fetch it from where the weights came from",
    )


def _add_tokens(tokenizer: "Tokenizer", path: Path) -> None:
    for token, number in sorted(read_json(path).items(), key=lambda pair: pair[1]):
        tokenizer.add_special_tokens([token])
        if tokenizer.token_to_id(token) != number:
            raise CheckpointError(
                f"{token} becomes token {tokenizer.token_to_id(token)} and should be {number}",
                where=str(path),
                fix="fetch the tokenizer and its added tokens again, of one revision",
            )


def _from_sentencepiece(path: Path) -> "Tokenizer":
    """LLaMA's sentencepiece model as a tokenizer of the `tokenizers` library.

    Raises:
        UsageError: sentencepiece or protobuf is not installed.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    try:
        extracted = SentencePieceExtractor(str(path)).extract(models.BPE)
    except ImportError as error:
        raise UsageError(
            "a tokenizer.model is read with sentencepiece, which is not installed",
            where=str(path),
            fix="pip install sentencepiece protobuf",
        ) from error
    except Exception as error:  # protobuf raises nothing more precise
        raise CheckpointError(
            f"tokenizer.model cannot be read: {error}", where=str(path), fix="fetch it again"
        ) from error
    bpe = models.BPE(extracted["vocab"], extracted["merges"], unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


# --- reading ----------------------------------------------------------------------------------------------------------


def open_folder(folder: Path) -> Checkpoint:
    """A released or saved Emu2; of Emu2-Gen, the folder `multimodal_encoder`, beside which `load` looks.

    Raises:
        CheckpointError: as `Checkpoint.open`.
    """
    encoder = folder / "multimodal_encoder"
    return Checkpoint.open(encoder if encoder.is_dir() else folder)


def load(checkpoint: Checkpoint, name: str, options: LoadOptions = LoadOptions()) -> Emu2Backbone:
    """Build the model that `open_folder` found.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape, or the tokenizer is another model's.
        UsageError: diffusers or sentencepiece is needed and not installed; or as `place_decoder`.
    """
    whole = _with_pixels(checkpoint)
    model = _on_meta(whole.config, {key: info.shape for key, info in whole.tensors.items()}, whole.folder, name)
    fill(model, whole, _key, dtype=options.dtype, device=options.staging)
    model.decoder = place_decoder(model.decoder, options)
    for part in model.children():
        if part is not model.decoder:
            part.to(options.device)
    if model.pixels is not None and options.dtype == torch.float16:
        model.pixels.vae.float()  # SDXL's autoencoder overflows in float16
    model.fingerprint = checkpoint.fingerprint
    return model.requires_grad_(False).eval()


def _with_pixels(checkpoint: Checkpoint) -> Checkpoint:
    """With the tensors of the folders beside it, named as in the one-file Emu2-Gen: one check for all of them."""
    if checkpoint.folder.name != "multimodal_encoder":
        return checkpoint
    root = checkpoint.folder.parent
    parts = {part: Checkpoint.open(root / part).tensors for part in ("unet", "vae")}
    beside = {f"{part}.{key}": info for part, tensors in parts.items() for key, info in tensors.items()}
    return replace(checkpoint, folder=root, tensors={**checkpoint.tensors, **beside})


def _on_meta(values: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], folder: Path, name: str) -> Emu2Backbone:
    """The model of a config.json and the shapes of stored tensors, without memory."""
    config = _config(values, {key: shape for stored, shape in shapes.items() if (key := _key(stored))}, str(folder))
    if any(key.startswith("unet.") for key in shapes):
        config = replace(config, pixels=_pixels_config(folder))
    tokenizer = _find_tokenizer(folder)
    with torch.device("meta"):
        return Emu2Backbone(config, tokenizer, name)


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


def _key(stored: str) -> str | None:
    """Of a tensor in any of the released layouts, ours; None for what is not needed."""
    key = stored.removeprefix("multimodal_encoder.").removeprefix("model.")
    key = _LEGACY.get(key, key)
    if key.startswith("safety_checker.") or key.endswith(".rotary_emb.inv_freq"):
        return None
    return next((ours + key[len(theirs) :] for theirs, ours in KEYS if key.startswith(theirs)), key)


def _hub_key(key: str) -> str:
    """Of one of our tensors, the hub's."""
    if key.startswith("project_"):
        return key
    theirs = next((theirs + key[len(ours) :] for theirs, ours in KEYS if key.startswith(ours)), key)
    return f"model.{theirs}"


def _config(values: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], where: str) -> Emu2Config:
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
            f"this is no Emu2: there is no tensor {_hub_key(key)}", where=where, fix="give the folder of an Emu2"
        )
    return shapes[key]


def _count(shapes: Iterable[str], prefix: str) -> int:
    """Blocks, by the numbers after `prefix`."""
    return len({key.removeprefix(prefix).partition(".")[0] for key in shapes if key.startswith(prefix)})


def _pixels_config(folder: Path) -> DiffusionConfig:
    """From the folders that diffusers writes; of the released Emu2-Gen where there are none."""
    files = (("unet/config.json", UNET), ("vae/config.json", VAE), ("scheduler/scheduler_config.json", SCHEDULER))
    unet, vae, scheduler = (
        read_json(folder / file) if (folder / file).is_file() else released for file, released in files
    )
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    return DiffusionConfig(unet, vae, scheduler, index.get("num_inference_steps", 50), index.get("guidance_scale", 3.0))


# --- writing ----------------------------------------------------------------------------------------------------------


def save(model: Emu2Backbone, folder: Path) -> None:
    """Write the hub's layout into an existing folder: that of Emu2, or of Emu2-Gen if there is a pixel decoder."""
    _write(model, model.state_dict(), folder)


def _write(model: Emu2Backbone, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """
    Args:
        tensors: those of the model, which may itself be on the meta device.
    """
    pixels = model.config.pixels
    encoder, home = (folder / "multimodal_encoder", folder / "tokenizer") if pixels else (folder, folder)
    encoder.mkdir(exist_ok=True)
    write_json(encoder / "config.json", _config_json(model.config))
    own = {_hub_key(key): tensor for key, tensor in tensors.items() if not key.startswith("pixels.")}
    _write_tensors(encoder, "model", own)
    home.mkdir(exist_ok=True)
    model.tokenizer.save(str(home / "tokenizer.json"))
    if pixels is None:
        return
    for part, values in (("unet", pixels.unet), ("vae", pixels.vae)):
        prefix = f"pixels.{part}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        write_json(folder / part / "config.json", values)
        _write_tensors(folder / part, "diffusion_pytorch_model", own)
    write_json(folder / "scheduler" / "scheduler_config.json", pixels.scheduler)
    index = {"num_inference_steps": pixels.steps, "guidance_scale": pixels.guidance}
    write_json(folder / "model_index.json", {"_class_name": "EmuVisualGenerationPipeline", **index})


def _write_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> None:
    """One file, or shards of `SHARD` bytes and their index; only one shard is in memory at a time."""
    from safetensors.torch import save_file

    groups = list(_groups(tensors))
    names = [
        f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors"
        for i in range(len(groups))
    ]
    for name, keys in zip(names, groups, strict=True):
        # copies: what was mapped from one file shares its storage
        save_file({key: tensors[key].clone(memory_format=torch.contiguous_format) for key in keys}, folder / name)
    if len(groups) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        weights = {key: name for name, keys in zip(names, groups, strict=True) for key in keys}
        index = {"metadata": {"total_size": size}, "weight_map": weights}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for key, tensor in tensors.items():
        if group and size + tensor.nbytes > SHARD:
            yield group
            group, size = [], 0
        group.append(key)
        size += tensor.nbytes
    yield group


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


def convert(source: Path, out: Path) -> None:
    """Write pickled weights as safetensors in the hub's layout, once; nothing remains of an attempt that fails.

    Tensors are mapped from the pickles and written in shards: memory holds one shard. `torch.load` reads tensors and
    nothing else (`weights_only`). Configuration and tokenizer are taken from the folder of the pickles; sizes that no
    config.json there gives are those of the tensors.

    Args:
        source: a pickle, or a folder with one, or with shards and their `pytorch_model.bin.index.json`.
        out: a folder that will be written, or replaced.

    Raises:
        CheckpointError: there is no pickle; it is damaged, or holds more than tensors; it is no Emu2.
    """
    folder = source if source.is_dir() else source.parent
    stored = {key: tensor for path in _pickles(source) for key, tensor in _unpickle(path).items()}
    values = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    model = _on_meta(values, {key: tuple(tensor.shape) for key, tensor in stored.items()}, folder, source.name)
    tensors = {ours: tensor for key, tensor in stored.items() if (ours := _key(key))}
    wrong = sorted(model.state_dict().keys() ^ tensors.keys())
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors are missing or unexpected, the first is {_hub_key(wrong[0])}",
            where=str(source),
            fix="fetch all files of the checkpoint again",
        )
    with write_folder(out) as staging:
        _write(model, tensors, staging)


def _pickles(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    index = source / "pytorch_model.bin.index.json"
    if index.is_file():
        return [source / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    found = sorted(path for path in source.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    if len(found) != 1:
        raise CheckpointError(
            f"there are {len(found)} pickled files and no index of them" if found else "there is no pickled file",
            where=str(source),
            fix="name the file that holds the model, or fetch pytorch_model.bin.index.json",
        )
    return found


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a damaged or hostile pickle raises is not promised
        raise CheckpointError(
            f"this cannot be read as tensors alone: {error}", where=str(path), fix="fetch it again"
        ) from error
    state = state.get("module", state) if isinstance(state, dict) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(state):
        raise CheckpointError("this holds more than tensors by name", where=str(path), fix="give a state dict")
    return tensors


# --- a small one, for tests -------------------------------------------------------------------------------------------


def nano() -> Emu2Backbone:
    """Random weights, fixed by a seed: 2 layers of width 32, pictures read as 4 x 4 and written as 2 x 2 vectors."""
    unet = {
        **UNET, "sample_size": 8, "block_out_channels": [16, 16], "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 24,
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24 + 6 * 8,
    }  # fmt: skip
    vae = {
        **VAE, "sample_size": 16, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    }  # fmt: skip
    tokenizer = _byte_tokenizer()
    config = Emu2Config(
        vocabulary=tokenizer.get_vocab_size() + len(ADDED) + 2,
        vision=EvaConfig(side=28, patch=7, width=24, layers=2, heads=2, mlp=48),
        width=32, mlp=64, layers=2, heads=2, context_length=512, queries=4, read_queries=16,
        pixels=DiffusionConfig(unet, vae, SCHEDULER, steps=2),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Emu2Backbone(config, tokenizer, "nano-emu2")
        for part in (model.visual, model.decoder, model.project_up, model.project_down, model.table, model.head):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    # large enough that every layer matters to the logits that tests compare
                    nn.init.normal_(parameter, std=0.2)
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    model.fingerprint = digest.hexdigest()
    return model.requires_grad_(False).eval()


def _byte_tokenizer() -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate((UNKNOWN, BEGIN, END, *alphabet))}, []))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer
