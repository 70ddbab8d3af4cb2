"""Emu2: a LLaMA that reads pictures as vectors of a vision tower, and writes them by regressing the next vector.

    pixels --tower, pooled--> features (Q, F) --project_up--> inputs of the stack
    hidden state --project_down--> the next feature; the Q features of a picture --diffusion decoder--> pixels

Loads the released layouts: one file with `visual.*, decoder.lm.*, project_*.weight` (Emu2, Emu2-Chat), the same under
`multimodal_encoder.` with `unet.*, vae.*` beside it (Emu2-Gen), and the hub's folders of both. Pickles go through
`convert` first. Only Emu2-Gen has a pixel decoder, and only Emu2-Chat words around turns: elsewhere parts follow each
other. The published safety checker is not loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.atomic import write_folder
from weft.backbones.base import DecodeStep, DecodingOptions, Elements, Kind, PictureForm, run_decoder
from weft.backbones.checkpoint import Checkpoint, LoadOptions, fill, fingerprint_of, read_json
from weft.backbones.emu2_layouts import (
    SCHEDULER,
    UNET,
    VAE,
    Emu2Config,
    hub_key,
    module_key,
    pixels_config,
    read_config,
    write_hub,
)
from weft.backbones.emu2_tokens import (
    ADDED,
    BEGIN,
    END,
    PLACEHOLDERS,
    UNKNOWN,
    chat_format,
    complete,
    find_tokenizer,
    special_tokens,
)
from weft.backbones.pickles import find_pickles, read_pickle
from weft.backbones.placement import place
from weft.backbones.tokenizer import byte_tokenizer
from weft.codecs.diffusion import DiffusionConfig, DiffusionDecoder
from weft.codecs.eva import EvaConfig, EvaTower
from weft.codecs.pixels import to_picture, to_values
from weft.errors import CheckpointError, UsageError
from weft.layout import FEATURE, ModalityLayout

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from tokenizers import Tokenizer

    from weft.adapters.routing import RoutingState
    from weft.synchronizer.sight import Synchronizer

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Emu2Backbone(nn.Module):
    """A `Backbone` of kind continuous; see `weft.backbones.base` for shapes."""

    kind: Kind = "continuous"
    guidance = (1.0, 1.0)
    revision: str | None = None
    canvas = 0
    codes = 0

    def __init__(self, config: Emu2Config, tokenizer: "Tokenizer", name: str) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        _check_queries(config, name)
        self.config, self.name, self.tokenizer = config, name, tokenizer
        complete(tokenizer, config.vocabulary, name)
        self.tokens, self.chat = special_tokens(tokenizer), chat_format(tokenizer)
        self.placeholders = [tokenizer.token_to_id(token) for token in PLACEHOLDERS]
        self.vocabulary = config.vocabulary
        self.feature_width = config.vision.width
        self.form = self._form(config.queries)
        self.widest = self.form.cols
        self.context_length = config.context_length
        self.routing: RoutingState | None = None
        self.synchronizer: Synchronizer | None = None
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
        return to_picture(pixels * 255)

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
        return run_decoder(self, embeds, layout, step)

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
    from PIL import Image as PILImage

    values = to_values(picture.resize((side, side), PILImage.Resampling.BICUBIC)) / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


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
        UsageError: diffusers or sentencepiece is needed and not installed; or as `place`.
    """
    whole = _with_pixels(checkpoint)
    model = _on_meta(whole.config, {key: info.shape for key, info in whole.tensors.items()}, whole.folder, name)
    fill(model, whole, module_key, dtype=options.dtype, device=options.staging)
    place(model, options)
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
    ours = {key: shape for stored, shape in shapes.items() if (key := module_key(stored))}
    config = read_config(values, ours, str(folder))
    if any(key.startswith("unet.") for key in shapes):
        config = replace(config, pixels=pixels_config(folder))
    tokenizer = find_tokenizer(folder)
    with torch.device("meta"):
        return Emu2Backbone(config, tokenizer, name)


# --- writing ----------------------------------------------------------------------------------------------------------


def save(model: Emu2Backbone, folder: Path) -> None:
    """Write the hub's layout into an existing folder: that of Emu2, or of Emu2-Gen if there is a pixel decoder."""
    write_hub(model.config, model.tokenizer, model.state_dict(), folder)


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
    stored = {key: tensor for path in find_pickles(source) for key, tensor in read_pickle(path, "module").items()}
    values = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    model = _on_meta(values, {key: tuple(tensor.shape) for key, tensor in stored.items()}, folder, source.name)
    tensors = {ours: tensor for key, tensor in stored.items() if (ours := module_key(key))}
    wrong = sorted(model.state_dict().keys() ^ tensors.keys())
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors are missing or unexpected, the first is {hub_key(wrong[0])}",
            where=str(source),
            fix="fetch all files of the checkpoint again",
        )
    with write_folder(out) as staging:
        write_hub(model.config, model.tokenizer, tensors, staging)


# --- a small one, for tests -------------------------------------------------------------------------------------------


def nano() -> Emu2Backbone:
    """Random weights, fixed by a seed: 2 layers of width 32, pictures read as 4 x 4 and written as 2 x 2 vectors."""
    from tokenizers import decoders, normalizers

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
    tokenizer = byte_tokenizer((UNKNOWN, BEGIN, END))
    # a space before every text, as LLaMA's tokenizer puts it
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Strip(" ", 1, 0)])
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
    model.fingerprint = fingerprint_of(model)
    return model.requires_grad_(False).eval()
