"""What an MM-Interleaved is: sizes of its parts, ids, how it paints. Defaults are the released 13B model's."""

from math import isqrt
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from weft.codecs.resampler import ResamplerConfig
from weft.codecs.vision import VisualTokenizerConfig
from weft.config import Config
from weft.synchronizer.attach_llm import DecoderSyncConfig
from weft.synchronizer.attach_unet import UNetSyncConfig

PAPER_SCHEDULER, PAPER_STEPS = "DDPMScheduler", 250
"""How the paper's pictures were painted."""
FAST_SCHEDULER, FAST_STEPS = "DPMSolverMultistepScheduler", 25
"""What comes close to it in a tenth of the time."""

SCALES = 4
"""Maps that the eye makes of a picture; the U-Net reads them all."""

# Of Stable Diffusion 2.1-base, where they differ from diffusers' defaults.
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "sample_size": 768,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


class LlamaSizes(Config):
    """The language model."""

    vocabulary: PositiveInt = 32002
    """V, with the begin of a picture and its placeholder."""
    width: PositiveInt = 5120
    """D."""
    mlp: PositiveInt = 13824
    layers: PositiveInt = 40
    heads: PositiveInt = 40
    eps: PositiveFloat = 1e-6
    theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    context_length: PositiveInt = 2048


class TokenIds(Config):
    """Ids that mean something."""

    begin: NonNegativeInt = 1
    end: NonNegativeInt = 2
    pad: NonNegativeInt = 31999
    """An ordinary piece of text, which therefore is never learnt as text."""
    begin_image: NonNegativeInt = 32000
    placeholder: NonNegativeInt = 32001
    """What the released code has where the vectors of a picture go; here `FEATURE` stands there."""


class SamplerConfig(Config):
    """How noise becomes a picture, unless asked otherwise."""

    scheduler: str = FAST_SCHEDULER
    """By the name of its class in diffusers; the paper's is DDPMScheduler, with 250 steps."""
    steps: PositiveInt = FAST_STEPS
    guidance: float = 3.5

    def steps_of(self, scheduler: str) -> int:
        """Of a scheduler that was asked for without a number of steps."""
        if scheduler == self.scheduler:
            return self.steps
        return PAPER_STEPS if scheduler == PAPER_SCHEDULER else FAST_STEPS


class MMInterleavedConfig(Config):
    """An MM-Interleaved."""

    llm: LlamaSizes = LlamaSizes()
    tokens: TokenIds = TokenIds()
    eye: VisualTokenizerConfig = VisualTokenizerConfig()
    decoder_sync: DecoderSyncConfig = DecoderSyncConfig(without_images="bias")
    condition: ResamplerConfig = ResamplerConfig(
        queries=77, width=1024, source_width=5120, layers=1, heads=16, qk_norm=False
    )
    """From the states of the language model to what the U-Net attends to."""
    unet: dict[str, Any] = UNET
    """As diffusers writes it; so are the next two."""
    unet_sync: UNetSyncConfig = UNetSyncConfig(without_images="bias")
    vae: dict[str, Any] = VAE
    scheduler: dict[str, Any] = SCHEDULER
    """Of the noise the U-Net is trained on, whichever sampler it names."""
    sampler: SamplerConfig = SamplerConfig()
    drop_condition: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of pictures that learn to be painted without what stands before them."""
    max_prev_images: PositiveInt = 1
    """So many pictures directly before a picture are seen while it is painted; the released U-Net was trained with 1.
    """
    mean_over: Literal["all", "counted"] = "all"
    """Pictures that count zero in what is learnt, such as the first of a document, are part of the mean, or not."""
    compat: bool = True
    """What the released model does although it may be by accident: synchronisers give their biases where no picture is
    seen, one earlier picture is seen in painting, and nothing forbids to write a placeholder as text."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) in which the vectors of a picture are laid, as square as their number allows."""
        queries = self.eye.resampler.queries
        rows = next(n for n in range(isqrt(queries), 0, -1) if queries % n == 0)
        return rows, queries // rows

    @property
    def canvas(self) -> int:
        """Pixels along one side of a painted picture."""
        return int(self.unet["sample_size"]) * 2 ** (len(self.vae["block_out_channels"]) - 1)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        width, features, attended = self.llm.width, self.eye.vision.width, self.unet["cross_attention_dim"]
        pairs = {
            "eye.width": (self.eye.width, "llm.width", width),
            "condition.source_width": (self.condition.source_width, "llm.width", width),
            "condition.width": (self.condition.width, "unet.cross_attention_dim", attended),
            "decoder_sync.feature_width": (self.decoder_sync.feature_width, "eye.vision.width", features),
            "unet_sync.feature_width": (self.unet_sync.feature_width, "eye.vision.width", features),
        }
        for one, (value, other, wanted) in pairs.items():
            if value != wanted:
                raise ValueError(f"{one} {value} is not {other} {wanted}")
        if len(self.unet_sync.sides) != SCALES:
            raise ValueError(f"unet_sync.sides has {len(self.unet_sync.sides)} scales, the eye {SCALES}")
        highest, new = max(self.tokens.model_dump().values()), (self.tokens.begin_image, self.tokens.placeholder)
        if highest >= self.llm.vocabulary:
            raise ValueError(f"token {highest} is beyond llm.vocabulary {self.llm.vocabulary}")
        if new != (self.llm.vocabulary - 2, self.llm.vocabulary - 1):
            raise ValueError(f"tokens.begin_image and tokens.placeholder are {new}, not the last of llm.vocabulary")
        if self.max_prev_images >= self.unet_sync.max_images:
            raise ValueError(
                f"max_prev_images {self.max_prev_images} is not below unet_sync.max_images {self.unet_sync.max_images}"
            )
        return self

    @model_validator(mode="after")
    def _compat_is_the_released_behaviour(self) -> Self:
        if not self.compat:
            return self
        for name, sync in (("decoder_sync", self.decoder_sync), ("unet_sync", self.unet_sync)):
            if sync.without_images != "bias":
                raise ValueError(f"compat needs {name}.without_images bias, or turn compat off")
        if self.max_prev_images != 1:
            raise ValueError("compat needs max_prev_images 1, or turn compat off")
        return self
