"""Emu3: one vocabulary for text and picture codes, pictures of any size with a token at the end of every row.

    <|image start|> "H*W" <|image token|>  H x (W codes, <|extra_200|>)  <|extra_201|> <|image end|>

The decoder stack and the picture codec are transformers'. Reads the layout of BAAI/Emu3-Chat-hf and
BAAI/Emu3-Gen-hf: the keys of transformers' `Emu3ForConditionalGeneration`, in the older form that these were released
with and in today's. Wang et al. 2024 (arXiv:2409.18869).

Both were trained on pictures of 512 x 512 pixels and more, of which at most two fit into Emu3-Gen's context of 9216.
Here pictures are as large as lets `PICTURES` of them fit beside some text, there 384 x 384 pixels (2361 positions), and
no larger than its makers generate. `use_area`, or "area" under "weft" in config.json, chooses another size.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.atomic import write_json
from weft.backbones.attention import grouped_attention
from weft.backbones.base import (
    ChatFormat,
    DecodeStep,
    DecodingOptions,
    Elements,
    Kind,
    PictureForm,
    run_decoder,
)
from weft.backbones.checkpoint import Checkpoint, LoadOptions, fill, fingerprint_of, read_json
from weft.backbones.emu3_layouts import KEYS, read_config, rename
from weft.backbones.emu3_tokens import (
    BEGIN,
    BEGIN_IMAGE,
    END,
    END_IMAGE,
    FRAME_END,
    IMAGE,
    LINE_END,
    PAD,
    PLACEHOLDER,
    code_name,
    id_of,
    special_tokens,
)
from weft.backbones.placement import place
from weft.backbones.shards import write_weights
from weft.backbones.tokenizer import byte_tokenizer, read_tokenizer
from weft.codecs.pixels import to_picture, to_values
from weft.errors import UsageError
from weft.layout import ModalityLayout

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from tokenizers import Tokenizer

    from weft.adapters.routing import RoutingState
    from weft.synchronizer.sight import Synchronizer

PICTURES, SHARE = 3, 0.78
"""So many pictures of the usual size take up no more than this share of the context."""
GENERATED = 720 * 720
"""Pixels of the pictures that its makers generate."""
RATIO = 5
"""The longer side of a picture is at most so many times the shorter one: the bound that its makers set."""
Chat = Literal["chat", "plain"]
"""Emu3-Chat's turns; or none, as Emu3-Gen takes a caption and continues with its picture."""
SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Pixels:
    """How pictures are made ready for the codec, as `preprocessor_config.json` says it. Sizes are in pixels."""

    smallest: int = 512 * 512
    largest: int = 1024 * 1024
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class Emu3Backbone(nn.Module):
    """A `Backbone` of kind discrete; see `weft.backbones.base` for shapes.

    Pictures are read and written in one way. The codec stays in float32 and in evaluation mode, and is never trained.
    """

    kind: Kind = "discrete"
    guidance = (3.0, 1.0)
    revision: str | None = None
    canvas = 0

    def __init__(
        self, config: Any, tokenizer: "Tokenizer", name: str, pixels: Pixels, chat: Chat = "chat",
        area: int | None = None,
    ) -> None:  # fmt: skip
        """From a transformers `Emu3Config`; `area` as in `use_area`."""
        from transformers.models.emu3.modeling_emu3 import Emu3TextModel, Emu3VQVAE

        super().__init__()
        self.config, self.tokenizer, self.name, self.pixels = config, tokenizer, name, pixels
        tokenizer.encode_special_tokens = True  # text that spells a control token stays text
        text = config.text_config
        self.context_length = text.max_position_embeddings
        self.vocabulary, self.codes, self.feature_width = text.vocab_size, config.vq_config.codebook_size, 0
        self.routing: RoutingState | None = None
        self.synchronizer: Synchronizer | None = None
        self.fingerprint = ""
        rows = [id_of(code_name(code), tokenizer, config) for code in range(self.codes)]
        self._image, self._line_end, self._frame_end = (
            id_of(token, tokenizer, config) for token in (IMAGE, LINE_END, FRAME_END)
        )
        self._first_row = rows[0] if rows == list(range(rows[0], rows[0] + self.codes)) else None
        self.tokens = special_tokens(tokenizer, config, set(rows))
        self._set_chat(chat)

        self.decoder = Emu3TextModel._from_config(text, attn_implementation=grouped_attention())
        self.decoder.name_or_path = name
        self.decoder.embed_tokens = None
        self.table = nn.Embedding(self.vocabulary, text.hidden_size)
        self.head = nn.Linear(text.hidden_size, self.vocabulary, bias=False)
        self.codec = Emu3VQVAE(config.vq_config)
        self.factor: int = self.codec.vision_spatial_factor
        # named devices: a build on the meta device must not lose them
        self.register_buffer("code_rows", torch.tensor(rows, device="cpu"), persistent=False)
        unwritten = torch.zeros(self.vocabulary, dtype=torch.bool, device="cpu")
        # the end of a frame is learnt as text, with all that closes a picture
        unwritten[[*rows, *(set(self.tokens.others) - {self._frame_end})]] = True
        self.register_buffer("unwritten", unwritten, persistent=False)
        self.code_rows: Tensor
        self.unwritten: Tensor

        longest = math.isqrt(RATIO * self.context_length)
        self.widest = 1 + max(cols for cols in range(1, longest + 1) if self._can_write(math.ceil(cols / RATIO), cols))
        self.use_area(area or self._usual_area())

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.codec.eval()  # it normalises by running statistics, which training would overwrite
        return self

    # --- text -------------------------------------------------------------------------------------------------------

    def _set_chat(self, chat: Chat) -> None:
        """Emu3-Chat's turns have the tokens of `SYSTEM USER: question ASSISTANT: answer`, and an end after each answer.

        Every text begins with a space there, so that it has the tokens that it has after `USER:` and `ASSISTANT:`.
        """
        begin, end = self.tokens.begin, self.tokens.end
        self._chat, self._lead = chat, " " if chat == "chat" else ""
        if chat == "plain":
            self.chat = ChatFormat((begin,), user=((), ()), assistant=((), ()), end=(end,))
            return
        system, user, assistant = (tuple(self._ids(text)) for text in (SYSTEM, " USER:", " ASSISTANT:"))
        self.chat = ChatFormat(
            (begin, *system), user=(user, ()), assistant=(assistant, (end,)), end=(end,), system=((), ())
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def tokenize(self, text: str) -> list[int]:
        return self._ids(self._lead + text) if text else []

    def detokenize(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode([i for i in ids if i < self.vocabulary], skip_special_tokens=True)
        return text.removeprefix(self._lead)

    # --- pictures ---------------------------------------------------------------------------------------------------

    def use_area(self, area: int) -> None:
        """Write square pictures of about `area` pixels unless asked for another size, and read none that are larger.

        Raises:
            UsageError: such a picture does not fit into the context.
        """
        side = round(math.sqrt(max(area, 0)) / self.factor) * self.factor
        self.form = self.form_of((side, side))
        self.area = area

    def _usual_area(self) -> int:
        room = SHARE * self.context_length
        sides = range(1, math.isqrt(min(GENERATED, self.pixels.largest)) // self.factor + 1)
        side = max(s for s in sides if PICTURES * self._form(s, s).length <= room) * self.factor
        return side * side

    def form_of(self, size: tuple[int, int]) -> PictureForm:
        (cols, over), (rows, under) = (divmod(side, self.factor) for side in size)
        if over or under or not self._can_write(rows, cols):
            side = max(s for s in range(1, self.widest) if self._can_write(s, s)) * self.factor
            raise UsageError(
                f"{self.name} makes no pictures of {size[0]} x {size[1]} pixels",
                fix=f"use multiples of {self.factor}, at most about {side} x {side}, in shape at most {RATIO}:1",
            )
        return self._form(rows, cols)

    def _can_write(self, rows: int, cols: int) -> bool:
        short, long = sorted((rows, cols))
        return (
            0 < short <= long <= RATIO * short
            and rows * cols * self.factor**2 <= self.pixels.largest
            and self._form(rows, cols).length <= self.context_length
        )

    def _form(self, rows: int, cols: int) -> PictureForm:
        """Of a picture of rows x cols codes."""
        before = (self.tokens.begin_image, *self._ids(f"{rows}*{cols}"), self._image)
        return PictureForm(rows, cols + 1, before, (self._frame_end, self.tokens.end_image), self._line_end)

    @torch.no_grad()
    def encode_images(self, pictures: "Sequence[PILImage.Image]", *, generated: bool) -> list[Elements]:
        return [self._encode(picture) for picture in pictures]

    def _encode(self, picture: "PILImage.Image") -> Elements:
        # Alone, not padded to a batch: the codec looks across the whole picture, padding would change its codes.
        from PIL import Image as PILImage

        smallest, largest = (min(bound, self.area) for bound in (self.pixels.smallest, self.pixels.largest))
        size = width, height = fit(picture.size, self.factor, smallest, largest)
        resized = picture.resize(size, PILImage.Resampling.BICUBIC)
        pixels = to_values(resized).to(self.device) / 255
        mean, std = self._scale(pixels.device)
        codes = self.codec.encode(((pixels - mean) / std)[None], [(height, width)]).image_tokens[0]
        ids = F.pad(codes + self.vocabulary, (0, 1), value=self._line_end)
        return Elements(self._form(*codes.shape), ids.flatten())

    @torch.no_grad()
    def decode_image(self, elements: Elements, options: DecodingOptions | None = None) -> "PILImage.Image":
        codes = elements.ids.to(self.device).view(elements.form.rows, elements.form.cols)[:, :-1] - self.vocabulary
        pixels = self.codec.decode(codes[None])[0]
        mean, std = self._scale(pixels.device)
        return to_picture((pixels * std + mean) * 255)

    def _scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(3, 1, 1) twice, such that (pixels in [0, 1] - mean) / std is what the codec reads and writes."""
        mean, std = (
            torch.tensor(values, device=device).view(3, 1, 1) for values in (self.pixels.mean, self.pixels.std)
        )
        return mean, std

    # --- the stack and its heads ------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, layout: ModalityLayout, features: Tensor | None = None) -> Tensor:
        code = (ids - self.vocabulary).clamp_min(0)
        return self.table(torch.where(ids < self.vocabulary, ids, self.code_rows[code]))

    def forward(self, embeds: Tensor, layout: ModalityLayout, step: DecodeStep | None = None) -> Tensor:
        return run_decoder(self, embeds, layout, step)

    def text_logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).masked_fill_(self.unwritten, -torch.inf)

    def image_logits(self, hidden: Tensor) -> Tensor:
        # the released codes stand in a row in the vocabulary: a view, no copy
        first, weight = self._first_row, self.head.weight
        return F.linear(hidden, weight[self.code_rows] if first is None else weight[first : first + self.codes])


def fit(size: tuple[int, int], factor: int, smallest: int, largest: int) -> tuple[int, int]:
    """(width, height) in pixels -> the nearest of about the same shape: multiples of `factor`, of an area in bounds.

    The numbers are those of transformers' `Emu3ImageProcessor`, which what is scaled up to `smallest` may exceed by the
    last row and column. Its makers refuse shapes beyond `RATIO`; here they are squeezed to it.
    """
    width, height = min(size[0], RATIO * size[1]), min(size[1], RATIO * size[0])
    cols, rows = round(width / factor), round(height / factor)
    if cols * rows * factor**2 > largest:
        scale = math.sqrt(width * height / largest)
        cols, rows = max(1, math.floor(width / scale / factor)), max(1, math.floor(height / scale / factor))
    elif cols * rows * factor**2 < smallest:
        scale = math.sqrt(smallest / (width * height))
        cols, rows = math.ceil(width * scale / factor), math.ceil(height * scale / factor)
    return cols * factor, rows * factor


# --- files ------------------------------------------------------------------------------------------------------------


def load(checkpoint: Checkpoint, name: str, options: LoadOptions) -> Emu3Backbone:
    """Read a folder in transformers' layout, as released or as `save` writes it.

    It has Emu3-Chat's turns unless "chat" under "weft" in config.json is "plain" or, where nothing is said there, it or
    its folder is named Emu3-Gen: the released folders differ in nothing else.

    Raises:
        CheckpointError: it is of another family, or tensors, tokens or settings are missing or do not fit together.
    """
    config = read_config(checkpoint)
    own = getattr(config, "weft", {})
    is_gen = re.search("emu3-gen", f"{name} {checkpoint.folder.resolve()}", re.IGNORECASE)
    tokenizer = read_tokenizer(checkpoint.folder)
    with torch.device("meta"):
        model = Emu3Backbone(
            config,
            tokenizer,
            name,
            _read_pixels(checkpoint.folder),
            own.get("chat", "plain" if is_gen else "chat"),
            own.get("area"),
        )
    fill(model, checkpoint, rename, partial(_cast, dtype=options.dtype), device=options.staging)
    place(model, options)
    model.fingerprint = checkpoint.fingerprint
    return model.requires_grad_(False).eval()


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The codec in float32, which its makers run it in; integers as they are."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float32 if key.startswith("codec.") else dtype)


def _read_pixels(folder: Path) -> Pixels:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return Pixels()
    values = read_json(path)
    names = {"smallest": "min_pixels", "largest": "max_pixels", "mean": "image_mean", "std": "image_std"}
    given: dict[str, Any] = {}
    for ours, theirs in names.items():
        value = values.get(theirs)
        if value is not None:
            given[ours] = tuple(value) if isinstance(value, list) else value
    return Pixels(**given)


def save(model: Emu3Backbone, folder: Path) -> None:
    """Write config, tokenizer, preprocessing and weights into an existing folder, as transformers reads them."""
    values = {
        **model.config.to_dict(),
        "architectures": ["Emu3ForConditionalGeneration"],
        "dtype": str(model.table.weight.dtype).removeprefix("torch."),
        "weft": {"chat": model._chat, "area": model.area},
    }
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{"bos_token": BEGIN, "eos_token": END, "pad_token": PAD, "padding_side": "left"},
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": PLACEHOLDER, "boi_token": BEGIN_IMAGE, "eoi_token": END_IMAGE,
                                 "image_wrapper_token": IMAGE, "eof_token": FRAME_END},
    }  # fmt: skip
    pixels = model.pixels
    preprocessing = {
        "image_processor_type": "Emu3ImageProcessor",
        "min_pixels": pixels.smallest, "max_pixels": pixels.largest, "spatial_factor": model.factor,
        "image_mean": pixels.mean, "image_std": pixels.std,
    }  # fmt: skip
    for file, content in (
        ("config.json", values), ("tokenizer_config.json", tokens), ("preprocessor_config.json", preprocessing)
    ):  # fmt: skip
        write_json(folder / file, content)
    model.tokenizer.save(str(folder / "tokenizer.json"))
    write_weights(folder, {_released(key): tensor for key, tensor in model.state_dict().items()})


def _released(key: str) -> str:
    theirs, ours = next(pair for pair in KEYS if key.startswith(pair[1]))
    return theirs + key.removeprefix(ours)


# --- a small one ------------------------------------------------------------------------------------------------------


@cache
def _nano_tokenizer_json(codes: int) -> str:
    """Bytes, then the special tokens of the release that have a use, then the codes."""
    special = (PAD, PLACEHOLDER, LINE_END, FRAME_END, BEGIN, END, BEGIN_IMAGE, END_IMAGE, IMAGE)
    return byte_tokenizer(last=(*special, *map(code_name, range(codes)))).to_str()


def nano() -> Emu3Backbone:
    """Random weights, fixed by a seed: 2 layers of width 32, pictures of 4 x 4 codes, a byte vocabulary."""
    from tokenizers import Tokenizer
    from transformers import Emu3Config

    codes = 16
    tokenizer = Tokenizer.from_str(_nano_tokenizer_json(codes))
    ids = tokenizer.get_vocab()
    config = Emu3Config(
        text_config={
            "vocab_size": len(ids), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "bos_token_id": ids[BEGIN], "eos_token_id": ids[END], "pad_token_id": ids[PAD],
        },
        vq_config={
            "codebook_size": codes, "base_channels": 32, "channel_multiplier": [1, 1], "hidden_size": 32,
            "num_res_blocks": 1, "attn_resolutions": [1],
        },
        vocabulary_map=ids,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Emu3Backbone(config, tokenizer, "nano-emu3", Pixels(smallest=16, largest=1024), area=64)
        for parameter in model.decoder.parameters():
            if parameter.dim() == 2:
                # large enough that every layer matters to the logits that tests compare
                nn.init.normal_(parameter, std=0.15)
        nn.init.normal_(model.head.weight, std=0.3)
    model.fingerprint = fingerprint_of(model)
    return model.requires_grad_(False).eval()
