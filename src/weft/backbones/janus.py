"""Janus and Janus-Pro: a LLaMA stack that reads pictures through one encoder and writes them through another.

    read     pixels -> SigLIP tower -> aligner -> 576 vectors of width D, put into the sequence as they are
    written  pixels <-> VQ codes, each with a row of `code_table` through `code_aligner`, drawn through `code_head`

Reads transformers' layout (deepseek-community/Janus-Pro-1B and its like) and the makers' own (deepseek-ai/...).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.atomic import write_json
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
from weft.backbones.checkpoint import Checkpoint, LoadOptions, fill, fingerprint_of, read_json
from weft.backbones.janus_layouts import PARTS, one_source_each, read_config, renaming
from weft.backbones.placement import place
from weft.backbones.shards import write_weights
from weft.backbones.tokenizer import byte_tokenizer, read_tokenizer, token_id
from weft.codecs.pixels import to_picture, to_values
from weft.errors import CheckpointError, UsageError
from weft.layout import FEATURE, ModalityLayout

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from tokenizers import Tokenizer
    from transformers import JanusConfig

    from weft.adapters.routing import RoutingState
    from weft.synchronizer.sight import Synchronizer

SPECIAL = (
    "<｜begin▁of▁sentence｜>",  # noqa: RUF001 - the bars are theirs
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "<｜▁pad▁｜>",  # noqa: RUF001
    "<begin_of_image>",
    "<end_of_image>",
)
ROLES = ("<|User|>", "<|Assistant|>")


@dataclass(frozen=True)
class Reading:
    """How a picture becomes the tower's pixels."""

    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    min_size: int = 14
    """Pixels that the shorter side keeps, however long the other is."""


class JanusBackbone(nn.Module):
    """A `Backbone` of kind discrete; see `weft.backbones.base` for shapes.

    The codec stays in float32 whatever the rest is loaded in, so that a picture's codes do not depend on it.
    """

    kind: Kind = "discrete"
    guidance = (5.0, 1.0)
    revision: str | None = None
    canvas = 0
    is_no_text: Tensor

    def __init__(self, config: "JanusConfig", tokenizer: "Tokenizer", name: str, reading: Reading) -> None:
        from transformers import JanusVisionModel, JanusVQVAE, LlamaModel
        from transformers.models.janus.modeling_janus import (
            JanusVisionAlignerMLP,
            JanusVQVAEAlignerMLP,
            JanusVQVAEHead,
        )

        super().__init__()
        text, vision, codec = config.text_config, config.vision_config, config.vq_config
        self.config, self.name, self.tokenizer, self.reading = config, name, tokenizer, reading
        # text that spells a control token stays text
        tokenizer.encode_special_tokens = True
        self.tokens = _special_tokens(tokenizer)
        self.chat = _chat_format(tokenizer, self.tokens)
        self.vocabulary, self.codes, self.feature_width = text.vocab_size, codec.num_embeddings, text.hidden_size
        self.side = codec.num_patches * 2 ** (len(codec.channel_multiplier) - 1)
        self.form = PictureForm(
            codec.num_patches, codec.num_patches, (self.tokens.begin_image,), (self.tokens.end_image,)
        )
        self.widest = self.form.cols
        self.context_length = text.max_position_embeddings
        self.routing: RoutingState | None = None
        self.synchronizer: Synchronizer | None = None
        self.fingerprint = ""
        self.decoder = LlamaModel._from_config(text, attn_implementation="sdpa")
        self.decoder.name_or_path = name
        self.decoder.embed_tokens = None
        self.table = nn.Embedding(text.vocab_size, text.hidden_size)
        self.head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.vision = JanusVisionModel._from_config(vision, attn_implementation="sdpa")
        self.aligner = JanusVisionAlignerMLP(vision)
        self.codec = JanusVQVAE._from_config(codec)
        self.code_table = nn.Embedding(codec.num_embeddings, codec.embed_dim)
        self.code_aligner = JanusVQVAEAlignerMLP(codec)
        self.code_head = JanusVQVAEHead(codec)
        self.register_buffer("is_no_text", _is_no_text(tokenizer, self.tokens, self.vocabulary), persistent=False)
        self._code_rows: tuple[list[tuple[int, int]], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    # --- text and pictures ------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        # the template has a space between a role's colon and its text, which belongs to the first word's token
        spaced = text if text[:1].isspace() and text[0] != " " else f" {text}"
        return self.tokenizer.encode(spaced, add_special_tokens=False).ids if text else []

    def detokenize(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode([i for i in ids if 0 <= i < self.vocabulary], skip_special_tokens=True)
        return text.removeprefix(" ")

    def form_of(self, size: tuple[int, int]) -> PictureForm:
        if size != (self.side, self.side):
            raise UsageError(
                f"{self.name} makes no pictures of {size[0]} x {size[1]} pixels",
                fix=f"ask for {self.side} x {self.side}, the only size it makes, and scale the picture afterwards",
            )
        return self.form

    @torch.no_grad()
    def encode_images(self, pictures: "Sequence[PILImage.Image]", *, generated: bool) -> list[Elements]:
        # one at a time: a picture's elements do not depend on its neighbours, and memory not on their number
        return [self._write(picture) if generated else self._read(picture) for picture in pictures]

    def _read(self, picture: "PILImage.Image") -> Elements:
        pixels = _to_read(picture, self.config.vision_config.image_size, self.reading)[None].to(self.device)
        features = self.aligner(self.vision(pixels).last_hidden_state)[0].float()
        rows = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return Elements(replace(self.form, rows=rows, cols=rows), torch.full((len(features),), FEATURE), features)

    def _write(self, picture: "PILImage.Image") -> Elements:
        pixels = _to_write(picture, self.side)[None].to(self.device)
        latent = F.normalize(self.codec.quant_conv(self.codec.encoder(pixels))[0].flatten(1), dim=0)  # (C, P)
        # By direction alone, as the codec was trained and as its decoder reads codes; transformers' `encode` compares
        # lengths as well, which gives other codes unless every entry of the codebook has length 1.
        book = F.normalize(self.codec.quantize.embedding.weight, dim=1)
        return Elements(self.form, (book @ latent).argmax(0) + self.vocabulary)

    @torch.no_grad()
    def decode_image(
        self,
        elements: Elements,
        options: DecodingOptions = DecodingOptions(),
    ) -> "PILImage.Image":
        codes = elements.ids.to(self.device) - self.vocabulary
        return to_picture((self.codec.decode(codes[None])[0] + 1) * 127.5)

    # --- the stack and its heads ------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, layout: ModalityLayout, features: Tensor | None = None) -> Tensor:
        # every table at every position, then a choice: shapes do not depend on what the ids are
        embeds = self.table(ids.clamp(0, self.vocabulary - 1))
        codes = self._embed_codes((ids - self.vocabulary).clamp_min(0))
        embeds = torch.where((ids >= self.vocabulary).unsqueeze(-1), codes, embeds)
        if features is not None:
            embeds = torch.where((ids == FEATURE).unsqueeze(-1), features.to(embeds), embeds)
        return embeds

    def _embed_codes(self, codes: Tensor) -> Tensor:
        """(...) codes -> (..., D). Frozen, the aligner is a fixed function of a fixed table: (K, D) rows, made once."""
        parameters = (*self.code_table.parameters(), *self.code_aligner.parameters())
        if any(parameter.requires_grad for parameter in parameters):
            return self.code_aligner(self.code_table(codes))
        made_from = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
        if self._code_rows is None or self._code_rows[0] != made_from:
            with torch.inference_mode(False), torch.no_grad():
                self._code_rows = (made_from, self.code_aligner(self.code_table.weight))
        return F.embedding(codes, self._code_rows[1])

    def forward(self, embeds: Tensor, layout: ModalityLayout, step: DecodeStep | None = None) -> Tensor:
        return run_decoder(self, embeds, layout, step)

    def text_logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).masked_fill_(self.is_no_text, -torch.inf)

    def image_logits(self, hidden: Tensor) -> Tensor:
        return self.code_head(hidden)

    def image_features(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError("pictures are codes")


# --- tokens -----------------------------------------------------------------------------------------------------------


def _special_tokens(tokenizer: "Tokenizer") -> SpecialTokens:
    ids = [token_id(tokenizer, token) for token in SPECIAL]
    begin, end, pad, begin_image, end_image = ids
    special = (id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    others = tuple(sorted(set(special) - set(ids)))
    return SpecialTokens(begin, end, pad, end, begin_image, end_image, others)


def _chat_format(tokenizer: "Tokenizer", tokens: SpecialTokens) -> ChatFormat:
    """`<|User|>: ...`, a blank line, `<|Assistant|>: ...`, end. A tokenizer without these tokens spells the roles."""

    def spell(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    def role(token: str) -> tuple[int, ...]:
        id = tokenizer.token_to_id(token)
        return spell(token.strip("<|>") + ":") if id is None else (id, *spell(":"))

    user, assistant = map(role, ROLES)
    return ChatFormat(
        start=(tokens.begin,),
        system=((), spell("\n\n")),
        user=(user, spell("\n\n")),
        assistant=(assistant, (tokens.end,)),
        end=(tokens.end,),
        # the makers' unconditional prompt is as long as the prompt, and reads its padding
        blank=tokens.pad,
    )


def _is_no_text(tokenizer: "Tokenizer", tokens: SpecialTokens, vocabulary: int) -> Tensor:
    """(V,) bool: placeholders, roles, and rows of the table that no token has."""
    is_no_text = torch.ones(vocabulary, dtype=torch.bool, device="cpu")
    known = [id for id in tokenizer.get_vocab().values() if id < vocabulary]
    is_no_text[known] = False
    is_no_text[[id for id in tokens.others if id < vocabulary]] = True
    return is_no_text


# --- pixels -----------------------------------------------------------------------------------------------------------


def _to_read(picture: "PILImage.Image", side: int, reading: Reading) -> Tensor:
    """Any RGB picture -> (3, side, side) normalised: the longer side fits, the other is padded in the mean colour."""
    from PIL import Image as PILImage

    scale = side / max(picture.size)
    width, height = (max(round(n * scale), reading.min_size) for n in picture.size)
    edge = max(width, height)
    square = PILImage.new("RGB", (edge, edge), tuple(int(255 * mean) for mean in reading.image_mean))
    fitted = picture.resize((width, height), PILImage.Resampling.BICUBIC)
    square.paste(fitted, ((edge - width) // 2, (edge - height) // 2))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (reading.image_mean, reading.image_std))
    return (to_values(square) / 255 - mean) / std


def _to_write(picture: "PILImage.Image", side: int) -> Tensor:
    """Any RGB picture -> (3, side, side) in [-1, 1]: the shorter side fits, the longer is cropped to its middle."""
    from PIL import Image as PILImage

    edge = min(picture.size)
    left, top = (picture.width - edge) / 2, (picture.height - edge) / 2
    square = picture.resize((side, side), PILImage.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    return to_values(square) / 127.5 - 1


# --- checkpoints ------------------------------------------------------------------------------------------------------


def load(checkpoint: Checkpoint, name: str, options: LoadOptions) -> JanusBackbone:
    """A frozen Janus from transformers' layout, or from the makers' in safetensors.

    Raises:
        CheckpointError: another family; the configuration, the tokenizer or a tensor is missing, damaged or does not
            fit. No tensor was read by then.
    """
    config = read_config(checkpoint)
    tokenizer, reading = read_tokenizer(checkpoint.folder), _read_reading(checkpoint.folder)
    with torch.device("meta"):
        model = JanusBackbone(config, tokenizer, name, reading)

    def prepare(key: str, tensor: Tensor) -> Tensor:
        if key == "vision.embeddings.position_embedding.weight" and tensor.dim() == 3:
            tensor = tensor[0]
        return tensor.to(torch.float32 if key.startswith("codec.") else options.dtype)

    fill(model, one_source_each(checkpoint, config), renaming(checkpoint), prepare, device=options.staging)
    place(model, options)
    model.fingerprint = checkpoint.fingerprint
    return model.requires_grad_(False).eval()


def save(model: JanusBackbone, folder: Path) -> None:
    """Write configurations, tokenizer and weights into an existing folder, in transformers' layout."""
    theirs = {ours: key for key, ours in PARTS.items()}
    tensors = {}
    for key, tensor in model.state_dict().items():
        part, _, rest = key.partition(".")
        tensors[theirs[f"{part}."] + rest] = tensor
    config = model.config.to_dict() | {
        "architectures": ["JanusForConditionalGeneration"],
        "tie_word_embeddings": False,  # two tensors here, whatever the checkpoint's were
        "dtype": str(model.table.weight.dtype).removeprefix("torch."),
    }
    for part in ("text_config", "vision_config", "vq_config"):
        config[part].pop("dtype", None)
    side = model.config.vision_config.image_size
    reading = {
        "image_processor_type": "JanusImageProcessor", "size": {"height": side, "width": side}, **asdict(model.reading)
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", reading)
    model.tokenizer.save(str(folder / "tokenizer.json"))
    write_weights(folder, tensors)


def _read_reading(folder: Path) -> Reading:
    """From the image processor's configuration, wherever the writer's version put it; without one, as released."""
    for file, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / file).is_file():
            values = read_json(folder / file)
            values = values if part is None else values.get(part, {})
            try:
                given = {key: values[key] for key in ("image_mean", "image_std") if values.get(key) is not None}
                colours = {key: tuple(float(value) for value in row) for key, row in given.items()}
                if any(len(row) != 3 for row in colours.values()):
                    raise ValueError("a colour has three values")
                return Reading(**colours, min_size=int(values.get("min_size", Reading.min_size)))
            except (TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"the image processor's configuration is damaged: {error}",
                    where=str(folder / file),
                    fix="fetch it again",
                ) from error
    return Reading()


# --- for tests --------------------------------------------------------------------------------------------------------


def nano() -> JanusBackbone:
    """Random weights, fixed by a seed: 2 layers of width 32, pictures of 2 x 2 elements, a byte vocabulary."""
    from transformers import JanusConfig

    special = (*SPECIAL, *ROLES, "<image_placeholder>")
    tokenizer = byte_tokenizer(special)
    config = JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32,
            "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
        },
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
            "mlp_ratio": 2.0, "projection_dim": 32, "num_image_tokens": 4,
        },
        vq_config={
            "embed_dim": 4, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32,
        },
        image_token_id=len(special) - 1,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = JanusBackbone(config, tokenizer, "nano-janus", Reading(min_size=1))
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # large enough that every layer matters to the logits that tests compare
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif key.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        nn.init.normal_(model.head.weight, std=0.3)
        nn.init.normal_(model.code_head.vision_head.weight, std=0.3)
    model.fingerprint = fingerprint_of(model)
    return model.requires_grad_(False).eval()
