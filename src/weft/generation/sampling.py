"""How the next element is chosen: what a request asks for, and the arithmetic over a batch of logits.

B rows, V ids. Every row is computed by itself and brings its own uniform number, drawn from its own generator, so that
no request changes or uses up the randomness of another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from weft.config import Config

INVALID = -2
"""The id of a row whose logits allow no choice."""


class Choice(Config):
    """How one element is drawn from its distribution."""

    temperature: NonNegativeFloat = 0.0
    """Logits are divided by it; 0 always takes the likeliest."""
    top_k: PositiveInt | None = None
    """Only the k likeliest."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest that together have this probability."""


GREEDY = Choice()


class DiffusionConfig(Config):
    """How vectors become pixels. None: as the model's makers do it."""

    steps: PositiveInt | None = None
    guidance: NonNegativeFloat | None = None
    """Away from a picture that was written without a prompt; 1 is off."""
    scheduler: str | None = None
    """A class of diffusers by its name, such as DDPMScheduler; where pictures are painted from the text itself."""


class SamplingConfig(Config):
    """What a request asks of its answer."""

    text: Choice = GREEDY
    """For text, and for the decision to begin a picture or to end."""
    image: Choice = GREEDY
    """For the patches of pictures."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The same seed gives the same answer, whatever else is being answered."""
    guidance: NonNegativeFloat | None = None
    """Classifier-free guidance of pictures: 0 ignores the prompt's text, 1 is off, more exaggerates it. None: as much
    as the model's makers use."""
    image_guidance: NonNegativeFloat | None = None
    """The same away from the prompt's pictures, for a model whose pictures are codes."""
    size: tuple[PositiveInt, PositiveInt] | None = None
    """(width, height) of its pictures in pixels. None: what the model makes by default."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Where pixels are made by a diffusion model."""
    first: Literal["any", "image"] = "any"
    """`image`: the answer begins with a picture."""
    min_images: NonNegativeInt = 0
    """The answer does not end before it has so many pictures; text is cut short where they need its room."""
    max_images: NonNegativeInt = 16
    max_text_tokens: NonNegativeInt = 1024
    """A text token beyond them ends the answer."""
    max_tokens: PositiveInt | None = None
    """All tokens of the answer, patches and the final end included. None: as many as the context has room for."""

    @property
    def owed_images(self) -> int:
        """Pictures the answer must have."""
        return max(self.min_images, int(self.first == "image"))

    @model_validator(mode="after")
    def _images_are_allowed(self) -> Self:
        if self.owed_images > self.max_images:
            raise ValueError(f"max_images = {self.max_images} forbids a picture that first or min_images asks for")
        return self


@dataclass(frozen=True)
class Draws:
    """One draw for each row, all (B,): a `Choice`, and a number in [0, 1) where its temperature is not 0."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor
    greedy: bool
    """No row has a temperature."""

    @classmethod
    def of(cls, choices: Sequence[Choice], uniforms: Sequence[float], device: torch.device) -> Self:
        unlimited = torch.iinfo(torch.int64).max
        return cls(
            torch.tensor([choice.temperature for choice in choices], device=device),
            torch.tensor([choice.top_k or unlimited for choice in choices], device=device),
            torch.tensor([choice.top_p for choice in choices], device=device),
            torch.tensor(uniforms, device=device),
            greedy=all(choice.temperature == 0 for choice in choices),
        )


def guide(logits: Tensor, without_text: Tensor, without_all: Tensor, text: Tensor, images: Tensor) -> Tensor:
    """Classifier-free guidance, all (B, K), the scales `text` and `images` (B,):

        without_all + images (without_text - without_all) + text (logits - without_text)

    as in Chameleon's released inference. A scale of 1 leaves its pair out, exactly.
    """
    both = torch.where(
        (images == 1)[:, None], without_text, without_all + images[:, None] * (without_text - without_all)
    )
    guided = both + text[:, None] * (logits - without_text)
    # -inf - -inf is no number: what a head excludes stays excluded
    is_off = (text == 1) & (images == 1)
    return torch.where(is_off[:, None] | (logits == -torch.inf), logits, guided)


def choose(logits: Tensor, draws: Draws) -> Tensor:
    """(B, V) logits, -inf where an id is not allowed -> (B,) ids.

    INVALID where no id has a finite logit, or one is not a number or infinite.
    """
    best, likeliest = logits.max(-1)  # NaN and infinity come through the maximum
    ids = likeliest if draws.greedy else torch.where(draws.temperature > 0, _sample(logits, draws), likeliest)
    return torch.where(best.isfinite(), ids, INVALID)


def _sample(logits: Tensor, draws: Draws) -> Tensor:
    """The id at which each row's cumulative probability, likeliest first, passes its uniform number."""
    ranked, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    warmth = torch.where(draws.temperature > 0, draws.temperature, 1.0)
    # the maximum goes to 0 before the division, so that no temperature can overflow it
    ranked = keep_top_k((ranked - ranked[:, :1]) / warmth[:, None], draws.top_k)
    kept = keep_top_p(ranked.softmax(-1), draws.top_p)
    cumulative = kept.cumsum(-1)
    rank = (cumulative <= draws.uniform[:, None] * cumulative[:, -1:]).sum(-1)
    # rounding may put the product at the very sum: the last id that was kept
    rank = torch.minimum(rank, (kept > 0).sum(-1) - 1).clamp_min(0)
    return ids.gather(-1, rank[:, None])[:, 0]


def keep_top_k(ranked: Tensor, top_k: Tensor) -> Tensor:
    """(B, V) logits in falling order -> -inf after the first top_k (B,)."""
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    return ranked.masked_fill(rank >= top_k[:, None], -torch.inf)


def keep_top_p(ranked: Tensor, top_p: Tensor) -> Tensor:
    """(B, V) probabilities in falling order -> 0 after the first that together reach top_p (B,)."""
    before = ranked.cumsum(-1) - ranked
    # the likeliest stays, whatever rounding says; p = 1 means all
    beyond = (before >= top_p[:, None]) & (top_p[:, None] < 1)
    beyond[:, 0] = False
    return ranked.masked_fill(beyond, 0.0)
