"""The released generalists that can be loaded, what they cost in memory, and what a folder on disk is.

A new one is a row of `KNOWN`. Memory is computed from a row or a folder, never measured here; each formula stands in
the docstring of its function.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weft.errors import CheckpointError

if TYPE_CHECKING:
    from weft.backbones.checkpoint import Checkpoint

Precision = Literal["bf16", "8bit", "4bit"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "8bit", "4bit")

RANK = 64
"""Of the MoSS adapter whose training is reckoned with."""
BYTES: dict[Precision, float] = {"bf16": 2, "8bit": 1, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Of one weight of a linear layer. In 4 bits, bitsandbytes keeps one byte for 64 weights, and a float for 256 bytes."""
LONGEST = 16384
"""Positions: longer contexts are not reckoned with, because nobody fills them here."""


@dataclass(frozen=True)
class Shape:
    """A LLaMA-like decoder stack."""

    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    """Rows of the embedding table and of the text head."""

    @property
    def kv_width(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the linear layers of one decoder layer: q, k, v, o, gate, up, down."""
        d, kv, mlp = self.hidden, self.kv_width, self.mlp
        return (d, d), (d, kv), (d, kv), (d, d), (d, mlp), (d, mlp), (mlp, d)


@dataclass(frozen=True)
class Known:
    """A released checkpoint."""

    name: str
    """On the hub."""
    family: str
    licence: str
    """In a few words; the makers' text is what counts."""
    parameters: int
    """Of everything that is loaded: stack, tables and heads, towers, codec, picture decoder."""
    shape: Shape
    context: int
    elements: int
    """Positions that a picture takes when the model writes it in its usual size."""
    extra: int
    """Positions around these: what opens and closes a picture."""
    writes: bool
    """It was trained to write pictures; the others can learn it."""
    pixels: bool
    """The checkpoint holds what turns elements into pixels."""
    layout: str
    note: str = ""

    @property
    def pictures(self) -> int:
        """How many fit into the context, without text."""
        return self.context // (self.elements + self.extra)


_RESEARCH = "research only"
_CHECK = "check it yourself: tagged MIT, but the makers' repository carries a DeepSeek model licence"
_NO_MONEY = "non-commercial: derived from LLaMA 1 (the code is Apache-2.0)"
_B7 = Shape(4096, 32, 11008, 32, 32, 65536)
_EMU2 = Shape(6656, 60, 17920, 52, 52, 32272)
_EMU3 = Shape(4096, 32, 14336, 32, 8, 184622)
_VICUNA = Shape(5120, 40, 13824, 40, 40, 32002)

KNOWN: tuple[Known, ...] = (
    Known("leloy/Anole-7b-v0.1-hf", "chameleon", f"{_RESEARCH}: Chameleon's licence, whatever its tag says",
          7_082_000_000, _B7, 4096, 1024, 2, True, True, "transformers, with the picture decoder beside the encoder"),
    Known("GAIR/Anole-7b-v0.1", "chameleon", f"{_RESEARCH}: Chameleon's licence",
          7_082_000_000, _B7, 4096, 1024, 2, True, True, "Meta's, pickled",
          "fetch it with `hf download`, then convert it once with `weft models convert`"),
    Known("facebook/chameleon-7b", "chameleon", f"{_RESEARCH}, gated: accept it on the hub",
          7_043_000_000, _B7, 4096, 1024, 2, False, False, "transformers",
          "reads pictures; to see those that a tuned one writes, take the picture decoder from an Anole release"),
    Known("facebook/chameleon-30b", "chameleon", f"{_RESEARCH}, gated: accept it on the hub",
          34_324_000_000, Shape(8192, 48, 22016, 64, 8, 65536), 4096, 1024, 2, False, False, "transformers",
          "reads pictures; to see those that a tuned one writes, take the picture decoder from an Anole release"),
    Known("deepseek-community/Janus-Pro-1B", "janus", _CHECK,
          2_077_000_000, Shape(2048, 24, 5632, 16, 16, 102400), 16384, 576, 2, True, True, "transformers"),
    Known("deepseek-community/Janus-Pro-7B", "janus", _CHECK,
          7_408_000_000, Shape(4096, 30, 11008, 32, 32, 102400), 16384, 576, 2, True, True, "transformers"),
    Known("BAAI/Emu3-Gen-hf", "emu3", "Apache-2.0", 8_763_000_000, _EMU3, 9216, 2352, 9, True, True, "transformers",
          "writes 384 x 384 pixels, so that several fit one context; --size up to 720 x 720, of which one fits"),
    Known("BAAI/Emu3-Chat-hf", "emu3", "Apache-2.0", 8_763_000_000, _EMU3, 131072, 8190, 9, False, True,
          "transformers", "trained to read pictures; tuned, it writes 720 x 720 pixels unless asked for another size"),
    Known("BAAI/Emu2", "emu2", _NO_MONEY, 36_900_000_000, _EMU2, 2048, 64, 2, True, False, "Emu2's, pickled",
          "fetch and convert it as Anole; the picture decoder comes with Emu2-Gen"),
    Known("BAAI/Emu2-Chat", "emu2", _NO_MONEY, 36_900_000_000, replace(_EMU2, vocabulary=32274), 2048, 64, 2, False,
          False, "Emu2's", "reads a picture as 256 elements; if there are pickles only, fetch and convert it"),
    Known("BAAI/Emu2-Gen", "emu2", _NO_MONEY, 39_500_000_000, _EMU2, 2048, 64, 2, True, True,
          "diffusers: multimodal_encoder, unet, vae"),
    Known("OpenGVLab/MM-Interleaved", "mm_interleaved", _NO_MONEY, 14_868_000_000, _VICUNA, 2048, 64, 1, True, True,
          "its makers', pickled",
          "fetch it as Anole; before you convert it, put tokenizer.model of lmsys/vicuna-13b-v1.3 beside the pickles"),
)  # fmt: skip

DEFAULTS: dict[str, tuple[Shape, int]] = {
    "chameleon": (_B7, 4096),
    "janus": (replace(_B7, vocabulary=32000), 2048),
    "emu3": (_EMU3, 9216),
    "emu2": (_EMU2, 2048),
}
"""Shape and context where a `config.json` says nothing: transformers leaves out what its classes have by default."""


def by_name(name: str) -> Known | None:
    return next((known for known in KNOWN if known.name.lower() == name.lower()), None)


# --- memory -----------------------------------------------------------------------------------------------------------


def linear_parameters(shape: Shape) -> int:
    """Weights of the stack's linear layers, which quantising narrows and adapters wrap: the sum of in * out."""
    return shape.layers * sum(i * o for i, o in shape.linears)


def weight_bytes(parameters: int, shape: Shape, precision: Precision) -> int:
    """All parameters: the stack's linear layers at the bytes of `BYTES`, the rest in 2 bytes.

    In 8 bits every row of a linear layer has a scale of 4 bytes besides.
    """
    linear = linear_parameters(shape)
    scales = 4 * shape.layers * sum(o for _, o in shape.linears) if precision == "8bit" else 0
    return round(linear * BYTES[precision]) + scales + 2 * (parameters - linear)


def cache_bytes(shape: Shape, context: int) -> int:
    """Keys and values of one sequence at full context, in 2 bytes: 2 * layers * kv width * context * 2.

    Guidance needs one more for each branch that it compares with.
    """
    return 2 * shape.layers * shape.kv_width * min(context, LONGEST) * 2


def adapter_parameters(shape: Shape, rank: int = RANK) -> int:
    """Of a `moss` adapter with a 2 x 2 window on all linear layers: rank * ((1 + 4) * in + 2 * out) for each."""
    return shape.layers * sum(rank * (5 * i + 2 * o) for i, o in shape.linears)


def run_bytes(parameters: int, shape: Shape, context: int, precision: Precision) -> int:
    """To answer one prompt: weights and one cache at full context. What a codec or diffusion model computes with is
    not counted."""
    return weight_bytes(parameters, shape, precision) + cache_bytes(shape, context)


def train_bytes(parameters: int, shape: Shape, context: int, precision: Precision) -> int:
    """To train a MoSS adapter of rank 64 on one sequence at full context, with gradient checkpointing: the sum of

    - the weights;
    - 16 bytes for each parameter of the adapter: itself, its gradient and AdamW's two averages, in float32;
    - the input of every layer, in 2 bytes: 2 * layers * context * hidden;
    - what one recomputed layer keeps, in 2 bytes: 2 * context * (8 * hidden + 4 * mlp);
    - text logits at every position and their gradient, in float32: 8 * context * vocabulary. An upper bound: positions
      of pictures have fewer logits, or none.

    An estimate: measured were the weights, caches and adapters of small models, not the activations of large ones.
    """
    context = min(context, LONGEST)
    inputs = 2 * shape.layers * context * shape.hidden
    one_layer = 2 * context * (8 * shape.hidden + 4 * shape.mlp)
    logits = 8 * context * shape.vocabulary
    weights = weight_bytes(parameters, shape, precision)
    return weights + 16 * adapter_parameters(shape) + inputs + one_layer + logits


# --- folders ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examined:
    """A checkpoint in a local folder, from its headers."""

    family: str
    layout: str
    parts: dict[str, "Checkpoint"]
    """Subfolder -> what it holds; "" for the folder itself."""
    shape: Shape
    context: int
    pixels: bool

    @property
    def main(self) -> "Checkpoint":
        """The part with the decoder stack."""
        return next(iter(self.parts.values()))

    @property
    def parameters(self) -> int:
        return sum(self.dtypes.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """dtype -> how many numbers are stored in it, the most first."""
        found: Counter[str] = Counter()
        for part in self.parts.values():
            for info in part.tensors.values():
                found[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape)
        return dict(found.most_common())

    @property
    def bytes(self) -> int:
        return sum(info.bytes for part in self.parts.values() for info in part.tensors.values())


def examine(folder: Path, family: str) -> Examined:
    """What is in a local folder of that family, without reading a tensor.

    Raises:
        CheckpointError: it is damaged or incomplete, or its configuration is another family's.
    """
    parts = _parts(folder, family)
    main = next(iter(parts.values()))
    keys = [key for part in parts.values() for key in part.tensors]
    pixels = family == "tiny" or "unet" in parts or any(key.endswith("decoder.conv_out.weight") for key in keys)
    try:
        shape, context = _shape_of(main.config, family)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"config.json does not describe a model of the family {family}: {error!r}",
            where=str(main.folder),
            fix="fetch it from where the weights came from",
        ) from error
    return Examined(family, _layout(family, main, list(parts)), parts, shape, context, pixels)


def _parts(folder: Path, family: str) -> "dict[str, Checkpoint]":
    from weft.backbones.checkpoint import Checkpoint

    if (folder / "multimodal_encoder").is_dir():
        places = [place for place in ("multimodal_encoder", "unet", "vae") if (folder / place).is_dir()]
        return {place: Checkpoint.open(folder / place) for place in places}
    parts = {"": Checkpoint.open(folder)}
    if family == "chameleon":
        from weft.backbones.chameleon import VQ_FOLDER

        if (folder / VQ_FOLDER).is_dir():
            parts[VQ_FOLDER] = Checkpoint.open(folder / VQ_FOLDER)
    return parts


def _layout(family: str, main: "Checkpoint", parts: list[str]) -> str:
    if family in ("tiny", "mm_interleaved"):
        return "Weft's own"
    if family == "emu2":
        return "Emu2's" if parts == [""] else f"diffusers: {', '.join(parts)}"
    if main.config.get("model_type") == "multi_modality":
        return "the makers' own"
    norm = main.tensors.get("model.layers.0.self_attn.q_norm.weight")
    if norm is not None and len(norm.shape) == 1:
        return "transformers, by an old conversion of Anole"
    return "transformers"


def _shape_of(config: dict[str, Any], family: str) -> tuple[Shape, int]:
    """The decoder stack's shape, and the context."""
    if family == "tiny":
        rows, heads = config["vocabulary"] + config["codec"]["codes"], config["heads"]
        return Shape(config["width"], config["layers"], config["mlp"], heads, heads, rows), config["context_length"]
    if family == "mm_interleaved":
        llm = config["llm"]
        sizes = (llm[key] for key in ("width", "layers", "mlp", "heads", "heads", "vocabulary"))
        return Shape(*sizes), llm["context_length"]
    usual, context = DEFAULTS[family]
    text = config.get("text_config") or config.get("language_config") or config
    heads = text.get("num_attention_heads", usual.heads)
    same = usual.kv_heads == usual.heads
    shape = Shape(
        text.get("hidden_size", usual.hidden),
        text.get("num_hidden_layers", usual.layers),
        text.get("intermediate_size", usual.mlp),
        heads,
        text.get("num_key_value_heads") or (heads if same else usual.kv_heads),
        text.get("vocab_size", usual.vocabulary),
    )
    return shape, text.get("max_position_embeddings", context)
