"""Janus and Janus-Pro: a LLaMA stack that reads pictures through one encoder and writes them through another.

    read     pixels -> SigLIP tower -> aligner -> 576 vectors of width D, put into the sequence as they are
    written  pixels <-> VQ codes, each with a row of `code_table` through `code_aligner`, drawn through `code_head`

Reads transformers' layout (deepseek-community/Janus-Pro-1B and its like) and the makers' own (deepseek-ai/...).
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from weft.errors import CheckpointError, UsageError
from weft.layout import FEATURE, ModalityLayout

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from tokenizers import Tokenizer
    from transformers import JanusConfig

    from weft.adapters.routing import RoutingState

SPECIAL = (
    "<｜begin▁of▁sentence｜>",  # noqa: RUF001 - the bars are theirs
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "<｜▁pad▁｜>",  # noqa: RUF001
    "<begin_of_image>",
    "<end_of_image>",
)
ROLES = ("<|User|>", "<|Assistant|>")

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""The makers' system turn where pictures are read. Where one is to be drawn they give none."""

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
        from PIL import Image as PILImage

        codes = elements.ids.to(self.device) - self.vocabulary
        pixels = self.codec.decode(codes[None])[0].clamp(-1, 1)
        values = ((pixels + 1) * 127.5).round().to(torch.uint8)
        return PILImage.fromarray(values.permute(1, 2, 0).cpu().numpy())

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
        return run_decoder(self.decoder, self.routing, embeds, layout, step)

    def text_logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).masked_fill_(self.is_no_text, -torch.inf)

    def image_logits(self, hidden: Tensor) -> Tensor:
        return self.code_head(hidden)

    def image_features(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError("pictures are codes")


# --- tokens -----------------------------------------------------------------------------------------------------------


def _special_tokens(tokenizer: "Tokenizer") -> SpecialTokens:
    ids = {token: id for token in SPECIAL if (id := tokenizer.token_to_id(token)) is not None}
    missing = [token for token in SPECIAL if token not in ids]
    if missing:
        raise CheckpointError(
            f"the tokenizer has no {', '.join(missing)}", fix="use the tokenizer.json that belongs to the model"
        )
    begin, end, pad, begin_image, end_image = ids.values()
    special = (id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    others = tuple(sorted(set(special) - set(ids.values())))
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
    return (_values(square) / 255 - mean) / std


def _to_write(picture: "PILImage.Image", side: int) -> Tensor:
    """Any RGB picture -> (3, side, side) in [-1, 1]: the shorter side fits, the longer is cropped to its middle."""
    from PIL import Image as PILImage

    edge = min(picture.size)
    left, top = (picture.width - edge) / 2, (picture.height - edge) / 2
    square = picture.resize((side, side), PILImage.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    return _values(square) / 127.5 - 1


def _values(picture: "PILImage.Image") -> Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def load(checkpoint: Checkpoint, name: str, options: LoadOptions) -> JanusBackbone:
    """A frozen Janus from transformers' layout, or from the makers' in safetensors.

    Raises:
        CheckpointError: another family; the configuration, the tokenizer or a tensor is missing, damaged or does not
            fit. No tensor was read by then.
    """
    config = _read_config(checkpoint)
    tokenizer, reading = read_tokenizer(checkpoint.folder), _read_reading(checkpoint.folder)
    with torch.device("meta"):
        model = JanusBackbone(config, tokenizer, name, reading)

    def prepare(key: str, tensor: Tensor) -> Tensor:
        if key == "vision.embeddings.position_embedding.weight" and tensor.dim() == 3:
            tensor = tensor[0]
        return tensor.to(torch.float32 if key.startswith("codec.") else options.dtype)

    rename = _rename_makers if _is_makers(checkpoint) else _rename
    fill(model, _one_source_each(checkpoint, config), rename, prepare, device=options.staging)
    model.decoder = place_decoder(model.decoder, options)
    for part_name, part in model.named_children():
        if part_name != "decoder":
            part.to(options.device)
    model.is_no_text = model.is_no_text.to(options.device)
    model.fingerprint = checkpoint.fingerprint
    return model.requires_grad_(False).eval()


def save(model: JanusBackbone, folder: Path) -> None:
    """Write configurations, tokenizer and weights into an existing folder, in transformers' layout."""
    import json

    from safetensors.torch import save_file

    theirs = {ours: key for key, ours in PARTS.items()}
    tensors = {}
    for key, tensor in model.state_dict().items():
        part, _, rest = key.partition(".")
        tensors[theirs[f"{part}."] + rest] = tensor.contiguous()
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
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(reading, indent=2) + "\n")
    model.tokenizer.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _is_makers(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("model_type") == "multi_modality"


def _read_config(checkpoint: Checkpoint) -> "JanusConfig":
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


def _one_source_each(checkpoint: Checkpoint, config: "JanusConfig") -> Checkpoint:
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


# --- for tests --------------------------------------------------------------------------------------------------------


def nano() -> JanusBackbone:
    """Random weights, fixed by a seed: 2 layers of width 32, pictures of 2 x 2 elements, a byte vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import JanusConfig

    special = (*SPECIAL, *ROLES, "<image_placeholder>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate((*special, *alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    config = JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": len(special) + len(alphabet), "hidden_size": 32,
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
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    model.fingerprint = digest.hexdigest()
    return model.requires_grad_(False).eval()
