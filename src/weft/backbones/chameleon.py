"""Chameleon, and Anole, which is Chameleon taught to draw: one table of tokens for text and for picture codes.

    text id t -> row t     code k -> the row of the token whose name spells k (`IMGIMG`, digits as A..J, `Z`)

The stack is transformers'; heads are applied here, as its own forbids codes, in training too. `load` tells layouts by
what the files hold: that of transformers, which has only the encoder of pictures (facebook/chameleon-7b); the same with
the pixel decoder under `model.vqmodel.decoder` (leloy/Anole-7b-v0.1-hf, and what `save` and `meta.convert` write); an
older form of either, whose query and key rows were left in Meta's order. Meta's own files are converted in `meta.py`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
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
from weft.backbones.checkpoint import (
    Checkpoint,
    LoadOptions,
    Rename,
    Transform,
    fill,
    fingerprint_of,
)
from weft.backbones.placement import place
from weft.backbones.shards import write_weights
from weft.backbones.tokenizer import byte_tokenizer, read_tokenizer
from weft.codecs.pixels import to_picture
from weft.codecs.vqgan import VQGAN, module_key, released_key
from weft.errors import CheckpointError, UsageError
from weft.layout import ModalityLayout

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from tokenizers import Tokenizer
    from transformers import ChameleonConfig

    from weft.adapters.routing import RoutingState
    from weft.synchronizer.sight import Synchronizer

SPECIAL = ("<s>", "</s>", "<pad>", "<reserved08706>", "<racm3:break>", "<eoss>")
"""Begins a text, ends an answer, pads, ends a turn, begins a picture, ends one."""
NEVER_WRITTEN = re.compile(r"<image>|<reserved\d+>")
VQ = "model.vqmodel."
VQ_FOLDER = "vqgan"
"""A checkpoint without a pixel decoder may hold a whole VQGAN here, in the layout of leloy/Anole-7b-v0.1-vqvae-hf."""
CODEBOOK = "quantize.embedding.weight"
_NO_OPTIONS = DecodingOptions()
FROM_META = "give a checkpoint in the transformers layout; the original release is converted by weft models convert"


class ChameleonBackbone(nn.Module):
    """A `Backbone` of kind discrete; see `weft.backbones.base` for shapes.

    The codec keeps float32 at load whatever the stack's dtype, as in Meta's code.
    """

    kind: Kind = "discrete"
    guidance = (3.0, 1.2)
    revision: str | None = None
    canvas = 0
    code_rows: Tensor
    """(K,) the row of each picture code."""

    def __init__(self, config: "ChameleonConfig", tokenizer: "Tokenizer", name: str, *, draws: bool) -> None:
        """
        Args:
            config: as `read_config` checked it.
            draws: the checkpoint holds a pixel decoder.

        Raises:
            CheckpointError: a token is missing, or the tokenizer is another model's.
        """
        from transformers import ChameleonModel

        super().__init__()
        self.name, self.tokenizer = name, tokenizer
        names, self.vocabulary, self.codes = config.vocabulary_map, config.vocab_size, config.vq_config.num_embeddings
        _keep_text_text(tokenizer)
        begin, end, pad, separator, begin_image, end_image = (_id(names, token, tokenizer) for token in SPECIAL)
        special = (begin, end, pad, separator, begin_image, end_image)
        others = tuple(id for token, id in names.items() if NEVER_WRITTEN.fullmatch(token) and id not in special)
        self.tokens = SpecialTokens(*special, others)
        self.chat = ChatFormat((begin,), user=((), (separator,)), assistant=((), (separator,)), end=(end,))
        self.context_length, self.feature_width = config.max_position_embeddings, 0
        self.routing: RoutingState | None = None
        self.synchronizer: Synchronizer | None = None
        self.fingerprint = ""

        self.decoder = ChameleonModel(config)
        self.decoder.name_or_path = name
        self.decoder.vqmodel = None
        self.decoder.embed_tokens = None
        self.table = nn.Embedding(self.vocabulary, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, self.vocabulary, bias=False)
        self.codec = VQGAN(config.vq_config, decoder=draws)
        rows, cols = self.codec.grid
        self.form, self.widest = PictureForm(rows, cols, before=(begin_image,), after=(end_image,)), cols

        code_rows = [_id(names, token_of(code)) for code in range(self.codes)]
        self.first_row, self.last_row = min(code_rows), max(code_rows)
        self.in_order = code_rows == list(range(self.first_row, self.last_row + 1))
        # on the CPU also where the model is built on the meta device: it comes from no checkpoint
        self.register_buffer("code_rows", torch.tensor(code_rows, device="cpu"), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    # --- text and pictures --------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([i for i in ids if 0 <= i < self.vocabulary], skip_special_tokens=True)

    def form_of(self, size: tuple[int, int]) -> PictureForm:
        side = self.codec.side
        if size != (side, side):
            raise UsageError(f"{self.name} makes pictures of {side} x {side} pixels, not {size[0]} x {size[1]}")
        return self.form

    @torch.no_grad()
    def encode_images(self, pictures: "Sequence[PILImage.Image]", *, generated: bool) -> list[Elements]:
        # one at a time: the encoder holds hundreds of MB for each
        codes = [self.codec.encode(self.codec.prepare(picture)[None])[0] for picture in pictures]
        return [Elements(self.form, self.vocabulary + of_one) for of_one in codes]

    @torch.no_grad()
    def decode_image(self, elements: Elements, options: DecodingOptions = _NO_OPTIONS) -> "PILImage.Image":
        pixels = self.codec.decode(elements.ids[None] - self.vocabulary)[0]
        return to_picture((pixels + 1) * 127.5)

    # --- the stack and its heads --------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, layout: ModalityLayout, features: Tensor | None = None) -> Tensor:
        codes = self.code_rows[(ids - self.vocabulary).clamp_min(0)]
        return self.table(torch.where(ids < self.vocabulary, ids, codes))

    def forward(self, embeds: Tensor, layout: ModalityLayout, step: DecodeStep | None = None) -> Tensor:
        return run_decoder(self, embeds, layout, step)

    def text_logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).index_fill_(-1, self.code_rows, -torch.inf)

    def image_logits(self, hidden: Tensor) -> Tensor:
        # the codes' rows lie together in released vocabularies, so a view of the head is all that is multiplied
        logits = F.linear(hidden, self.head.weight[self.first_row : self.last_row + 1])
        return logits if self.in_order else logits[..., self.code_rows - self.first_row]

    def image_features(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError("pictures are codes")


def token_of(code: int) -> str:
    """The name of a picture code in the vocabulary: 120 -> IMGIMGBCAZ."""
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def _id(names: Mapping[str, int], token: str, tokenizer: "Tokenizer | None" = None) -> int:
    if token not in names:
        raise CheckpointError(f"vocabulary_map has no {token}", where="config.json", fix=FROM_META)
    if tokenizer is not None and tokenizer.token_to_id(token) != names[token]:
        raise CheckpointError(
            f"{token} is {names[token]} in vocabulary_map, and {tokenizer.token_to_id(token)} in tokenizer.json",
            fix="use the tokenizer that was saved with the model",
        )
    return names[token]


def _keep_text_text(tokenizer: "Tokenizer") -> None:
    """Let text that spells a control token or a code be read as text."""
    from tokenizers import AddedToken

    added = tokenizer.get_added_tokens_decoder().values()
    tokenizer.add_special_tokens([AddedToken(token.content, special=True) for token in added if not token.special])
    tokenizer.encode_special_tokens = True


# --- configuration and layouts ----------------------------------------------------------------------------------------


def read_config(values: dict[str, Any], where: str) -> "ChameleonConfig":
    """Check a config.json of the transformers layout.

    Raises:
        CheckpointError: it is another model's, has no vocabulary_map, or values that cannot be meant.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import ChameleonConfig

    where = f"{where}/config.json"
    if values.get("model_type") != "chameleon":
        raise CheckpointError(f"this is a checkpoint of {values.get('model_type')}, not of chameleon", where=where)
    names = values.get("vocabulary_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(
            "there is no vocabulary_map, from which the ids of codes come", where=where, fix=FROM_META
        )
    try:
        config = ChameleonConfig.from_dict({**values, "attn_implementation": "sdpa"})
        misfit = _misfit(config)
    except (StrictDataclassError, ArithmeticError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"this cannot be the configuration: {error}", where=where, fix=FROM_META) from error
    if misfit:
        raise CheckpointError(misfit, where=where, fix=FROM_META)
    return config


def _misfit(config: "ChameleonConfig") -> str | None:
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    if max(config.vocabulary_map.values()) >= config.vocab_size:
        return f"vocabulary_map has ids beyond vocab_size {config.vocab_size}"
    if config.hidden_size % (2 * heads) or heads % key_heads:
        return f"hidden_size {config.hidden_size} does not fit {heads} heads, {key_heads} of them for keys"
    if config.vq_config.base_channels % 32:  # the norms have 32 groups
        return f"base_channels {config.vq_config.base_channels} of vq_config is no multiple of 32"
    return None


def halves_from_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head from Meta's order, which rotates neighbours, to transformers', which rotates halves.

        (x0 y0 x1 y1 ...) -> (x0 x1 ... y0 y1 ...)

    Args:
        rows: (heads * head width, ...).
    """
    return rearrange(rows, "(heads width pair) ... -> (heads pair width) ...", heads=heads, pair=2)


def _from_old_form(config: "ChameleonConfig") -> Transform:
    """Query and key projections in Meta's order, and one norm for all heads."""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}

    def transform(key: str, tensor: Tensor) -> Tensor:
        found = re.search(r"\.self_attn\.([qk])_(proj|norm)\.", key)
        if found is None:
            return tensor
        if found[2] == "norm":
            return halves_from_pairs(tensor, 1).expand(heads[found[1]], -1)
        whole = tensor.shape[0] % (2 * heads[found[1]]) == 0  # else `fill` says that the shape is wrong
        return halves_from_pairs(tensor, heads[found[1]]) if whole else tensor

    return transform


def _stack_key(key: str) -> str | None:
    if key.startswith(VQ) or key.endswith("rotary_emb.inv_freq"):
        return None
    ours = {"model.embed_tokens.weight": "table.weight", "lm_head.weight": "head.weight"}
    return ours.get(key, f"decoder.{key.removeprefix('model.')}")


def _codec_key(levels: int, prefix: str) -> Rename:
    to_module: Callable[[str], str] = module_key(levels)
    return lambda key: to_module(key.removeprefix(prefix)) if key.startswith(prefix) else None


def in_transformers_layout(model: ChameleonBackbone) -> dict[str, Tensor]:
    """The model's tensors under the keys of the transformers layout, the pixel decoder as in leloy/Anole-7b-v0.1-hf."""
    renamed = {}
    for key, tensor in model.state_dict().items():
        part, _, rest = key.partition(".")
        if part == "codec":
            renamed[VQ + released_key(rest, model.codec.levels)] = tensor
        else:
            renamed[{"table": "model.embed_tokens.", "head": "lm_head.", "decoder": "model."}[part] + rest] = tensor
    return renamed


# --- load and save ----------------------------------------------------------------------------------------------------


def load(checkpoint: Checkpoint, name: str, options: LoadOptions) -> ChameleonBackbone:
    """Read any layout of the transformers kind; see the module.

    Raises:
        CheckpointError: another model's checkpoint, or tensors or tokens are missing, unexpected or of other shapes.
    """
    folder = checkpoint.folder
    config = read_config(checkpoint.config, str(folder))
    tokenizer = read_tokenizer(folder)
    vq, prefix = checkpoint, VQ
    if not any(key.startswith(f"{VQ}decoder.") for key in checkpoint.tensors) and (folder / VQ_FOLDER).is_dir():
        vq, prefix = Checkpoint.open(folder / VQ_FOLDER), ""
        _check_same_codebook(checkpoint, vq)
    draws = any(key.startswith(f"{prefix}decoder.") for key in vq.tensors)
    with torch.device("meta"):
        model = ChameleonBackbone(config, tokenizer, name, draws=draws)
    norm = checkpoint.tensors.get("model.layers.0.self_attn.q_norm.weight")
    transform = _from_old_form(config) if norm is not None and len(norm.shape) == 1 else None

    # the codec first: it is small, and a wrong one is noticed before the stack is read
    fill(model.codec, vq, _codec_key(model.codec.levels, prefix), dtype=torch.float32, device=options.device)
    stack = nn.ModuleDict({"decoder": model.decoder, "table": model.table, "head": model.head})
    fill(stack, checkpoint, _stack_key, transform, dtype=options.dtype, device=options.staging)
    place(model, options)
    model.fingerprint = checkpoint.fingerprint
    return model.requires_grad_(False).eval()


def _check_same_codebook(checkpoint: Checkpoint, vq: Checkpoint) -> None:
    ours, theirs = checkpoint.get(VQ + CODEBOOK).float(), vq.get(CODEBOOK).float()
    # one of the two may have been stored in half precision
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-6):
        raise CheckpointError(
            "this is not the VQGAN of the model beside it: their codebooks differ",
            where=str(vq.folder),
            fix="take the one that belongs to this release, or remove the folder",
        )


def save(model: ChameleonBackbone, folder: Path) -> None:
    """Write config.json, tokenizer.json and model.safetensors, with the pixel decoder, into an existing folder."""
    config = {
        **model.decoder.config.to_dict(),
        "architectures": ["ChameleonForConditionalGeneration"],
        "dtype": str(model.table.weight.dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config)
    model.tokenizer.save(str(folder / "tokenizer.json"))
    write_weights(folder, in_transformers_layout(model))


def nano() -> ChameleonBackbone:
    """Random weights, fixed by a seed: 2 layers of width 32, pictures of 2 x 2 of 16 codes, a byte vocabulary."""
    codes = 16
    # from the last code to the first, so that nothing can rely on an offset
    control = (*SPECIAL, *(token_of(code) for code in reversed(range(codes))), "<image>")
    tokenizer = byte_tokenizer(control)
    names = dict(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))
    values = {
        "model_type": "chameleon", "vocab_size": len(names), "vocabulary_map": names, "max_position_embeddings": 512,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "vq_config": {"embed_dim": 8, "num_embeddings": codes, "latent_channels": 8, "base_channels": 32,
                      "channel_multiplier": [1, 1, 2], "num_res_blocks": 1, "resolution": 8, "out_channels": 3},
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ChameleonBackbone(read_config(values, "nano"), tokenizer, "nano-chameleon", draws=True)
        for key, parameter in model.named_parameters():
            if "norm" in key or parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                # large enough that every layer matters to what tests compare
                nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    model.fingerprint = fingerprint_of(model)
    return model.requires_grad_(False).eval()
