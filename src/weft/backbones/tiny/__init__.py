"""The embedded generalist: transformers' Chameleon decoder stack, small, with our own picture codec.

`load("tiny")` is trained and ships with the package; `load("nano")` has random weights and answers in milliseconds, for
tests. Both run the code path that real checkpoints take.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
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
)  # fmt: skip
from weft.backbones.checkpoint import fingerprint_of
from weft.backbones.tokenizer import byte_tokenizer, token_id
from weft.codecs.pixels import to_picture, to_values
from weft.codecs.vq import VQCodec, VQConfig
from weft.errors import CheckpointError, UsageError
from weft.layout import ModalityLayout

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from tokenizers import Tokenizer

    from weft.adapters.routing import RoutingState
    from weft.synchronizer.sight import Synchronizer

WEIGHTS = Path(__file__).parent / "weights"
SPECIAL = ("<pad>", "<s>", "</s>", "<sep>", "[IMG]", "[/IMG]")


@dataclass(frozen=True)
class TinyConfig:
    vocabulary: int
    """Text tokens; picture codes are numbered after them."""
    width: int = 128
    layers: int = 6
    heads: int = 4
    mlp: int = 344
    context_length: int = 2048
    codec: VQConfig = VQConfig()


class TinyBackbone(nn.Module):
    """A `Backbone` of kind discrete; see `weft.backbones.base` for shapes."""

    kind: Kind = "discrete"
    revision: str | None = None
    canvas = 0

    def __init__(self, config: TinyConfig, tokenizer: "Tokenizer", name: str) -> None:
        from transformers import ChameleonConfig, ChameleonModel

        super().__init__()
        self.config, self.name, self.tokenizer = config, name, tokenizer
        # text that spells a control token stays text
        tokenizer.encode_special_tokens = True
        pad, begin, end, separator, begin_image, end_image = (token_id(tokenizer, token) for token in SPECIAL)
        self.tokens = SpecialTokens(begin, end, pad, separator, begin_image, end_image)
        self.chat = ChatFormat((begin,), user=((), (separator,)), assistant=((), (separator,)), end=(end,))
        self.vocabulary, self.codes, self.feature_width = config.vocabulary, config.codec.codes, 0
        rows, cols = config.codec.grid
        self.form = PictureForm(rows, cols, before=(begin_image,), after=(end_image,))
        self.widest, self.guidance = cols, (1.0, 1.0)
        self.context_length = config.context_length
        self.routing: RoutingState | None = None
        self.synchronizer: Synchronizer | None = None
        self.fingerprint = ""
        total, patches = config.vocabulary + config.codec.codes, self.form.patches
        stack = ChameleonConfig(
            vocab_size=1,  # the stack's own table is dropped: `embed` is ours
            hidden_size=config.width,
            intermediate_size=config.mlp,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.context_length,
            vocabulary_map={"<image>": 0},
            vq_config={"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32,
                       "channel_multiplier": [1], "num_res_blocks": 1, "resolution": 8},
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
            attn_implementation="sdpa",
        )  # fmt: skip
        self.decoder = ChameleonModel(stack)
        self.decoder.name_or_path = name
        self.decoder.vqmodel = None
        self.decoder.embed_tokens = None
        self.table = nn.Embedding(total, config.width)
        # Where a patch lies and where the next one will: the stack's rotary positions are relative and know no grid.
        self.place_in = nn.Embedding(patches, config.width)
        self.place_out = nn.Embedding(patches, config.width)
        self.head = nn.Linear(config.width, total, bias=False)
        self.codec = VQCodec(config.codec)
        for module in (self.table, self.place_in, self.place_out, self.head):
            nn.init.normal_(module.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    # --- text and pictures ------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        # the leading space makes a word's token the same at the start of a text as inside it
        return self.tokenizer.encode(f" {text}", add_special_tokens=False).ids if text else []

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i < self.config.vocabulary], skip_special_tokens=True)[1:]

    def form_of(self, size: tuple[int, int]) -> PictureForm:
        side = self.config.codec.side
        if size != (side, side):
            raise UsageError(f"{self.name} makes pictures of {side} x {side} pixels, not {size[0]} x {size[1]}")
        return self.form

    @torch.no_grad()
    def encode_images(self, pictures: "Sequence[PILImage.Image]", *, generated: bool) -> list[Elements]:
        pixels = torch.stack([_to_tensor(picture, self.config.codec.side) for picture in pictures])
        codes = self.codec.encode(pixels.to(self.device))
        return [Elements(self.form, self.vocabulary + of_one) for of_one in codes]

    @torch.no_grad()
    def decode_image(self, elements: Elements, options: DecodingOptions = DecodingOptions()) -> "PILImage.Image":
        pixels = self.codec.decode(elements.ids[None].to(self.device) - self.vocabulary)[0]
        return to_picture((pixels + 1) * 127.5)

    # --- the stack and its heads ------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, layout: ModalityLayout, features: Tensor | None = None) -> Tensor:
        embeds = self.table(ids)
        for plane, table in ((layout.inputs, self.place_in), (layout.outputs, self.place_out)):
            place = plane.row * self.form.cols + plane.col
            embeds = embeds + table(place.clamp_min(0)) * (place >= 0).unsqueeze(-1)
        return embeds

    def forward(self, embeds: Tensor, layout: ModalityLayout, step: DecodeStep | None = None) -> Tensor:
        return run_decoder(self, embeds, layout, step)

    def text_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.head.weight[: self.vocabulary])

    def image_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.head.weight[self.vocabulary :])

    def image_features(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError("pictures are codes")


def _to_tensor(picture: "PILImage.Image", side: int) -> Tensor:
    """Any RGB picture -> (3, side, side) in [-1, 1]: centre crop to a square, then area-averaged."""
    from PIL import Image as PILImage

    if picture.size != (side, side):
        edge = min(picture.size)
        left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
        picture = picture.resize((side, side), PILImage.Resampling.BOX, box=(left, top, left + edge, top + edge))
    return to_values(picture) / 127.5 - 1


def load(name: str) -> TinyBackbone:
    """`tiny` (trained, from the package), `nano` (random, for tests), or a folder written by `save`."""
    if name == "nano":
        return _nano()
    return read(WEIGHTS if name == "tiny" else Path(name), name)


def save(model: TinyBackbone, folder: Path) -> None:
    """Write `config.json`, `tokenizer.json` and `model.safetensors` (stack and codec) into an existing folder."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    model.tokenizer.save(str(folder / "tokenizer.json"))
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "model.safetensors")


def read(folder: Path, name: str) -> TinyBackbone:
    """Load what `save` wrote.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, unexpected or of another shape.
    """
    try:
        values = json.loads((folder / "config.json").read_text())
        values_codec = values.pop("codec")
        codec = VQConfig(**{**values_codec, "widths": tuple(values_codec["widths"])})
        config = TinyConfig(**values, codec=codec)
        tokenizer = _read_tokenizer(folder)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"this is not a tiny generalist: {error}", where=str(folder)) from error
    model = TinyBackbone(config, tokenizer, name)
    _load_strictly(model, weights, folder)
    return _frozen(model)


def _read_tokenizer(folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"tokenizer.json: {error}") from error


def _load_strictly(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    wanted = model.state_dict()
    for key in sorted(wanted.keys() | weights.keys()):
        if key not in weights:
            raise CheckpointError(f"tensor {key} is missing", where=str(folder / "model.safetensors"))
        if key not in wanted:
            raise CheckpointError(f"tensor {key} is not part of this model", where=str(folder / "model.safetensors"))
        if wanted[key].shape != weights[key].shape:
            raise CheckpointError(
                f"tensor {key} has shape {tuple(weights[key].shape)}, this model wants {tuple(wanted[key].shape)}",
                where=str(folder / "model.safetensors"),
            )
    model.load_state_dict({key: tensor.to(wanted[key].dtype) for key, tensor in weights.items()})


def _frozen(model: TinyBackbone) -> TinyBackbone:
    model.requires_grad_(False).eval()
    model.fingerprint = fingerprint_of(model)
    return model


def _nano() -> TinyBackbone:
    """Random weights, fixed by a seed: 2 layers of width 32, pictures of 2 x 2 codes, a byte vocabulary."""
    tokenizer = byte_tokenizer(SPECIAL)
    codec = VQConfig(side=16, patch=8, codes=16, code_width=4, hidden=16, widths=(8, 8, 8))
    config = TinyConfig(
        tokenizer.get_vocab_size(), width=32, layers=2, heads=2, mlp=64, context_length=512, codec=codec
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyBackbone(config, tokenizer, "nano")
        for parameter in model.decoder.parameters():
            if parameter.dim() == 2 and parameter.shape[0] > 2:
                # large enough that every layer matters to the logits that tests compare
                nn.init.normal_(parameter, std=0.15)
        nn.init.normal_(model.head.weight, std=0.3)
    return _frozen(model)
