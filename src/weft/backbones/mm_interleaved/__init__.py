"""MM-Interleaved: a vision encoder, a LLaMA and a diffusion model, joined by synchronisers that read earlier pictures.

    pixels --eye--> tokens (M, P, D) in the place of each picture, and maps that the synchronisers sample
    text and tokens --decoder, synchronised--> states;  states --head + head_new--> the next token
    states up to a begin token --context_proj, condition--> what the U-Net attends to;  noise --U-Net, synchronised--> a
    picture, which goes back into the sequence through the eye

What is painted from what, and by which steps, is in `painting.py`; which text is learnt, in `text.py`. Source: Tian et
al. 2024 (arXiv:2401.10208), and the released model, which `config.compat` follows where it differs.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
from weft.backbones.checkpoint import Checkpoint, LoadOptions, fingerprint_of
from weft.backbones.mm_interleaved import files
from weft.backbones.mm_interleaved.config import LlamaSizes, MMInterleavedConfig, SamplerConfig, TokenIds
from weft.backbones.mm_interleaved.painting import (
    SHORTEST,
    Contexts,
    Denoised,
    Draws,
    add_noise,
    contexts_of,
    denoise,
    earlier_pictures,
    latents_of,
    make_scheduler,
    make_unet,
    make_vae,
    pixels_of,
)
from weft.backbones.mm_interleaved.text import BEGIN, BEGIN_IMAGE, END, PLACEHOLDER
from weft.backbones.tokenizer import byte_tokenizer
from weft.codecs.pixels import to_picture
from weft.codecs.resampler import Resampler, ResamplerConfig
from weft.codecs.vision import VisionConfig, VisualTokenizer, VisualTokenizerConfig
from weft.errors import ContextError, RoutingError, UsageError
from weft.layout import FEATURE, ModalityLayout
from weft.ops.positions import sin_cos
from weft.synchronizer.attach import Kept, select
from weft.synchronizer.attach_llm import DecoderSyncConfig, attach_to_decoder
from weft.synchronizer.attach_unet import UNetSyncConfig, attach_to_unet
from weft.synchronizer.mmfs import FeatureBank
from weft.synchronizer.sight import Looks, Synchronizer
from weft.synchronizer.visibility import begins_of, seen_by_pictures

if TYPE_CHECKING:
    from PIL import Image as PILImage
    from tokenizers import Tokenizer

    from weft.adapters.routing import RoutingState

NEW_TOKENS = 2
"""The last of the vocabulary, which LLaMA did not have."""
NEVER, SELDOM = -100.0, -5.0
"""Logits of the new tokens at the start: of the frozen head, and of both heads together."""


class Eye(VisualTokenizer):
    """The visual tokenizer, as synchronisers want it."""

    def forward(self, pixels: Tensor) -> Looks:  # type: ignore[override]
        seen = super().forward(pixels)
        return Looks(seen.maps, seen.tokens)


class MMInterleavedBackbone(nn.Module):
    """A `Painter`; see `weft.backbones.base` for shapes, and the module's docstring for what it is made of."""

    distances: Tensor
    """(context_length, D) where the states of a context stand, from the picture backwards; fixed."""

    kind: Kind = "diffusion"
    guidance = (1.0, 1.0)
    revision: str | None = None
    codes = 0

    def __init__(self, config: MMInterleavedConfig, tokenizer: "Tokenizer", name: str) -> None:
        """Random weights; what joins the parts is such that they work as if they were alone.

        Raises:
            UsageError: diffusers is not installed.
        """
        super().__init__()
        ids, width, vocabulary = config.tokens, config.llm.width, config.llm.vocabulary
        self.config, self.name, self.tokenizer = config, name, tokenizer
        # text that spells a control token stays text
        tokenizer.encode_special_tokens = True
        self.tokens = SpecialTokens(
            ids.begin, ids.end, ids.pad, ids.end, ids.begin_image, ids.begin_image, (ids.placeholder,)
        )
        self.chat = ChatFormat(start=(ids.begin,), user=((), ()), assistant=((), (ids.end,)), end=(ids.end,))
        self.vocabulary, self.feature_width, self.canvas = vocabulary, width, config.canvas
        self.form = PictureForm(*config.grid, before=(ids.begin_image,), after=())
        self.widest = self.form.cols
        self.context_length = config.llm.context_length
        self.looks_back = config.max_prev_images
        self.routing: RoutingState | None = None
        self.fingerprint = ""

        self.table = nn.Embedding(vocabulary, width)
        self.soi = nn.Parameter(torch.zeros(1, width))
        self.decoder: Any = _make_llama(config.llm, name)
        self.decoder_sync = attach_to_decoder(self.decoder, config.decoder_sync)
        self.head, self.head_new = nn.Linear(width, vocabulary), nn.Linear(width, NEW_TOKENS)
        self.eye = Eye(config.eye)
        self.context_proj = nn.Linear(width, width)
        self.condition = Resampler(config.condition)
        self.blank = nn.Parameter(torch.randn(1, config.condition.queries, config.condition.width) * 0.02)
        self.unet: Any = make_unet(config.unet)
        self.vae: Any = make_vae(config.vae)
        self.unet_sync = attach_to_unet(self.unet, config.unet_sync)
        self.register_buffer(
            "distances", sin_cos(torch.arange(self.context_length, device="cpu"), width), persistent=False
        )
        side = config.eye.vision.side
        self.synchronizer: Synchronizer | None = Synchronizer(self.eye, self.decoder_sync, side, sees_itself=True)
        self._reset_heads()

    @torch.no_grad()
    def _reset_heads(self) -> None:
        """As in pre-training: new tokens are seldom chosen at first, and what is learnt of them is in `head_new`."""
        nn.init.zeros_(self.head.bias)
        nn.init.zeros_(self.head.weight[-NEW_TOKENS:])
        nn.init.constant_(self.head.bias[-NEW_TOKENS:], NEVER)
        nn.init.zeros_(self.head_new.weight)
        nn.init.constant_(self.head_new.bias, SELDOM - NEVER)

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    # --- text and pictures ------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        # white space beside pictures is no text, and a space stands before every text: see `tokenize_marked`
        text = text.strip()
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([i for i in ids if 0 <= i < self.vocabulary], skip_special_tokens=True)

    def form_of(self, size: tuple[int, int]) -> PictureForm:
        if size != (self.canvas, self.canvas):
            raise UsageError(
                f"{self.name} makes no pictures of {size[0]} x {size[1]} pixels",
                fix=f"ask for {self.canvas} x {self.canvas}",
            )
        return self.form

    def encode_images(self, pictures: "Sequence[PILImage.Image]", *, generated: bool) -> list[Elements]:
        """Places for them alone: their vectors are made of pixels together with the text."""
        ids = torch.full((self.form.patches,), FEATURE)
        return [Elements(self.form, ids) for _ in pictures]

    def decode_image(self, elements: Elements, options: DecodingOptions = DecodingOptions()) -> "PILImage.Image":
        raise UsageError(
            f"the vectors of {self.name} are what it sees of a picture, which cannot be made of them again",
            fix="paint it from what stands before it",
        )

    # --- the stack and its heads ------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, layout: ModalityLayout, features: Tensor | None = None) -> Tensor:
        words = self.table(ids.clamp_min(0))  # FEATURE is below zero
        words = words + (ids == self.tokens.begin_image).unsqueeze(-1) * self.soi.to(words.dtype)
        if features is None:
            return words
        return torch.where((ids == FEATURE).unsqueeze(-1), features.to(words.dtype), words)

    def forward(self, embeds: Tensor, layout: ModalityLayout, step: DecodeStep | None = None) -> Tensor:
        return run_decoder(self, embeds, layout, step)

    def text_logits(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        logits[..., -NEW_TOKENS:] += self.head_new(hidden)
        if not self.config.compat:
            logits[..., self.config.tokens.placeholder] = -torch.inf
        return logits

    def image_logits(self, hidden: Tensor) -> Tensor:
        raise TypeError(f"pictures of {self.name} are painted at once, not written as codes: use paint")

    def image_features(self, hidden: Tensor) -> Tensor:
        raise TypeError(f"pictures of {self.name} are painted at once, not written as vectors: use paint")

    # --- learning to paint ------------------------------------------------------------------------------------------

    def painting_errors(
        self, hidden: Tensor, ids: Tensor, layout: ModalityLayout, looks: Looks, painted: Tensor, *,
        draws: Draws | None = None, is_start: Tensor | None = None, keep: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `Painter`. A picture that nothing but the start of its document stands before counts zero.

        Args:
            draws: what is random; None: drawn from torch's own generator.
            is_start: (B, L) bool, True where a context starts that pictures do not see beyond; None: documents do.
            keep: (T,) bool, False at pictures that count zero.

        Raises:
            RoutingError: the numbers of pictures disagree.
        """
        result = self.denoise_painted(hidden, ids, layout, looks, painted, draws=draws, is_start=is_start)
        counts = result.contexts.lengths >= SHORTEST
        counts = counts if keep is None else counts & keep
        errors = result.errors.masked_fill(~counts, 0.0)
        # all pictures are a divisor of the mean: those that count stand for the others too, if they alone are to be
        return errors * (len(counts) / counts.sum().clamp_min(1)) if self.config.mean_over == "counted" else errors

    def denoise_painted(
        self, hidden: Tensor, ids: Tensor, layout: ModalityLayout, looks: Looks, painted: Tensor, *,
        draws: Draws | None = None, is_start: Tensor | None = None,
    ) -> Denoised:  # fmt: skip
        """What `painting_errors` measures."""
        begins = begins_of(layout)
        is_there = begins < layout.shape[1]
        chosen = is_there & ~layout.given
        _check_pictures(is_there, chosen, looks, painted)
        is_start = ids == self.tokens.begin if is_start is None else is_start
        scheduler = make_scheduler("DDPMScheduler", self.config.scheduler)
        if draws is None:
            shape = (len(painted), *self._latent_shape)
            draws = Draws.make(shape, scheduler.config.num_train_timesteps, hidden.device)

        contexts = contexts_of(hidden, is_start, begins, chosen)
        is_dropped = draws.uniform < self.config.drop_condition
        condition = torch.where(is_dropped[:, None, None], self.blank, self._condition(contexts))
        noisy, wanted = add_noise(scheduler, latents_of(self.vae, painted, draws.posterior), draws)
        seen = seen_by_pictures(is_start, begins, reach=self.config.max_prev_images)
        self._look_back(*earlier_pictures(_all_scales(looks), is_there, seen, chosen))
        return Denoised(contexts, condition, noisy, self._unet(noisy, draws.times, condition), wanted)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        side = self.config.unet["sample_size"]
        return self.unet.config.in_channels, side, side

    def _condition(self, contexts: Contexts) -> Tensor:
        """(T, Q, E)"""
        length = contexts.keep.shape[1]
        if length > len(self.distances):
            raise ContextError(
                f"a picture stands behind {length} tokens, {self.name} knows {len(self.distances)}",
                fix="use shorter documents",
            )
        states = self.context_proj(contexts.states.to(self.context_proj.weight.dtype))
        placed = states.to(self.condition.queries.dtype) + self.distances[:length].to(self.condition.queries)
        return self.condition(placed, contexts.keep)

    def _unet(self, latents: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        dtype = self.unet.dtype
        return self.unet(latents.to(dtype), times, encoder_hidden_states=condition.to(dtype)).sample

    def _look_back(self, bank: FeatureBank | Kept, visible: Tensor) -> None:
        """Show the U-Net earlier pictures: (B, K) which of them."""
        if visible.any():
            self.unet_sync.set(bank, visible)
        elif self.config.unet_sync.without_images == "zero":
            self.unet_sync.set_without_pictures()
        else:  # a bias is added all the same
            self.unet_sync.set(self._nothing(len(visible)), visible.new_zeros(len(visible), 1))

    def _nothing(self, pictures: int) -> FeatureBank:
        """(T, 1, V, F) for pictures that see none."""
        sync = self.config.unet_sync
        cells = sum(side * side for side in sync.sides)
        features = torch.zeros(pictures, 1, cells, sync.feature_width, device=self.device)
        return FeatureBank(features, tuple((side, side) for side in sync.sides))

    # --- painting ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def paint(
        self, context: Tensor, before: Looks | None, options: DecodingOptions = DecodingOptions()
    ) -> "PILImage.Image":
        """See `Painter`.

        Raises:
            UsageError: no steps, or a scheduler that is not known.
        """
        sampler = self.config.sampler
        name = options.scheduler or sampler.scheduler
        scheduler = make_scheduler(name, self.config.scheduler)
        steps = sampler.steps_of(name) if options.steps is None else options.steps
        if steps < 1:
            raise UsageError(
                f"a picture cannot be painted in {steps} steps",
                fix=f"use 1 or more; {sampler.steps_of(name)} are usual",
            )
        scheduler.set_timesteps(steps, device=self.device)
        last = torch.tensor([[len(context) - 1]], device=context.device)
        nowhere = torch.zeros(1, len(context), dtype=torch.bool, device=context.device)
        contexts = contexts_of(context.unsqueeze(0), nowhere, last, last >= 0)

        bank, sees = self._nothing(1), torch.zeros(1, 1, dtype=torch.bool, device=self.device)
        if before is not None:
            found = _all_scales(before)
            bank = replace(found, features=found.features.transpose(0, 1)[:, -self.config.max_prev_images :])
            sees = sees.new_ones(bank.features.shape[:2])
        generator = torch.Generator("cpu").manual_seed(options.seed)
        noise = torch.randn(1, *self._latent_shape, generator=generator).to(self.device)
        guidance = sampler.guidance if options.guidance is None else options.guidance
        latents = self.draw(contexts, bank, sees, noise, scheduler, guidance, generator)
        return to_picture(pixels_of(self.vae, latents)[0] * 255)

    def draw(
        self, contexts: Contexts, bank: FeatureBank, visible: Tensor, noise: Tensor, scheduler: Any, guidance: float,
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        """Latents (T, C, h, w) of pictures that stand behind contexts.

        Args:
            bank: (T, K, V, F) earlier pictures, the nearest last.
            visible: (T, K) bool which of them is seen.
            noise: (T, C, h, w).
            scheduler: with its steps set.
        """
        condition = self._condition(contexts)
        rows = torch.arange(len(noise), device=noise.device)
        if guidance != 1:
            # without a condition, the same pictures are seen
            condition = torch.cat((self.blank.expand_as(condition), condition))
            rows = rows.repeat(2)
        # projected once for all steps
        kept = select(self.unet_sync.project(bank), rows) if visible.any() else bank
        self._look_back(kept, visible[rows])
        return denoise(
            lambda latents, time: self._unet(latents, time, condition), scheduler, noise, guidance, generator
        )


def _make_llama(sizes: LlamaSizes, name: str) -> Any:
    from transformers import LlamaConfig, LlamaModel

    decoder = LlamaModel(
        LlamaConfig(
            vocab_size=1,  # the stack's own table is dropped: `embed` is ours
            hidden_size=sizes.width,
            intermediate_size=sizes.mlp,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            rms_norm_eps=sizes.eps,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.theta},
            max_position_embeddings=sizes.context_length,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
            attn_implementation="sdpa",
        )
    )  # fmt: skip
    decoder.name_or_path = name
    decoder.embed_tokens = None
    return decoder


def _all_scales(looks: Looks) -> FeatureBank:
    """(M, 1, V, F), every picture by itself: a U-Net reads all maps there are."""
    return FeatureBank.of_maps([scale.unsqueeze(1) for scale in looks.maps])


def _check_pictures(is_there: Tensor, chosen: Tensor, looks: Looks, painted: Tensor) -> None:
    found, wanted = (len(looks.maps[0]), len(painted)), (int(is_there.sum()), int(chosen.sum()))
    if found != wanted:
        raise RoutingError(
            f"{found[0]} pictures were seen and {found[1]} are to be painted, but the sequences have {wanted[0]}, "
            f"{wanted[1]} of them not given",
            fix="give one picture for each, in their order",
        )


# --- on disk ----------------------------------------------------------------------------------------------------------


def load(checkpoint: Checkpoint, name: str, options: LoadOptions = LoadOptions()) -> MMInterleavedBackbone:
    """See `files.load`."""
    return files.load(MMInterleavedBackbone, checkpoint, name, options)


def save(model: MMInterleavedBackbone, folder: Path) -> None:
    """See `files.save`."""
    files.save(model, folder)


def convert(source: Path, out: Path) -> None:
    """See `files.convert`."""
    files.convert(MMInterleavedBackbone, source, out)


# --- a small one, for tests -------------------------------------------------------------------------------------------


def nano() -> MMInterleavedBackbone:
    """Random weights, fixed by a seed: 2 layers of width 32, pictures of 2 x 2 vectors, painted with 32 x 32 pixels."""
    from tokenizers import decoders, normalizers

    specials = ("<unk>", BEGIN, END)
    tokenizer = byte_tokenizer(specials, ("<pad>", BEGIN_IMAGE, PLACEHOLDER))
    # a space before every text, as LLaMA's tokenizer puts it
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Strip(" ", 1, 0)])
    size = tokenizer.get_vocab_size()
    config = MMInterleavedConfig(
        llm=LlamaSizes(vocabulary=size, width=32, mlp=64, layers=2, heads=2, context_length=512),
        tokens=TokenIds(pad=size - 3, begin_image=size - 2, placeholder=size - 1),
        eye=VisualTokenizerConfig(
            vision=VisionConfig(side=28, patch=7, width=16, layers=4, heads=2, mlp=32, stem=4, points=2),
            resampler=ResamplerConfig(queries=4, width=16, source_width=16, layers=1, heads=2, mlp=32),
            width=32,
        ),
        decoder_sync=DecoderSyncConfig(
            every=2, feature_width=16, value_width=8, heads=2, points=2, sides=(8, 4, 2), base=4, max_images=33
        ),
        condition=ResamplerConfig(queries=5, width=16, source_width=32, layers=1, heads=2, mlp=32, qk_norm=False),
        unet={
            "sample_size": 16, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": 2, "cross_attention_dim": 16, "use_linear_projection": True,
        },
        unet_sync=UNetSyncConfig(side=16, feature_width=16, value_width=8, heads=2, points=2, sides=(16, 8, 4, 2)),
        vae={
            "sample_size": 32, "block_out_channels": [4, 4], "layers_per_block": 1, "norm_num_groups": 2,
            "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        },
        sampler=SamplerConfig(steps=2),
        compat=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MMInterleavedBackbone(config, tokenizer, "nano-mm_interleaved")
        for part in (model.eye.proj, model.decoder, model.decoder_sync, model.unet_sync, model.table, model.head):
            for parameter in part.parameters():
                # large enough that every layer and every synchroniser matters to what tests compare
                if parameter.dim() > 1 or not parameter.any():
                    nn.init.normal_(parameter, std=0.2)
    model.fingerprint = fingerprint_of(model)
    return model.requires_grad_(False).eval()
