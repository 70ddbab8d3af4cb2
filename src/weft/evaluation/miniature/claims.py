"""What the papers say, as data: a contrast of arms that is positive where the statement is true.

    estimate = sum over arms of weight * mean of the measure      (losses count with the sign turned)

A gain of one arm over another has the weights +1 and -1; a gain that is to be larger here than there has four.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from weft.evaluation.miniature.aspects import LOWER_IS_BETTER

MOSS_PAPER = "MoSS (arXiv:2407.03604)"


@dataclass(frozen=True)
class Claim:
    name: str
    statement: str
    source: str
    """Where it is said, with the numbers printed there."""
    contrast: Mapping[str, float]
    """Arm -> weight."""
    measure: str = "overall"

    @property
    def sign(self) -> float:
        return -1.0 if self.measure in LOWER_IS_BETTER else 1.0


def _gain(better: str, worse: str) -> dict[str, float]:
    return {better: 1.0, worse: -1.0}


def _more(here: dict[str, float], there: dict[str, float]) -> dict[str, float]:
    """The first gain is larger than the second."""
    found = dict(here)
    for arm, weight in there.items():
        found[arm] = found.get(arm, 0.0) - weight
    return found


_RANKS = (4, 16, 32)
_OF_RANK = {8: ("moss", "moe_lora", "lora"), **{r: (f"moss_r{r}", f"moe_lora_r{r}", f"lora_r{r}") for r in _RANKS}}
_EQUAL = _gain("moss", "moe_equal")

CLAIMS: tuple[Claim, ...] = (
    Claim("tuning_helps", "Tuned with MoSS, the generalist writes better interleaved answers than untuned.",
          f"{MOSS_PAPER}, table 1: 1.684 to 3.178 (Emu2), 1.236 to 1.960 (Chameleon)", _gain("moss", "base")),
    Claim("moss_over_lora", "At equal rank MoSS is better than LoRA.",
          f"{MOSS_PAPER}, table 2: 1.964 to 3.178 at rank 256", _gain("moss", "lora")),
    Claim("moss_over_moe", "At equal rank MoSS is better than MoE-LoRA.",
          f"{MOSS_PAPER}, table 2: 2.510 to 3.178 at rank 256, with 1.68 times the parameters",
          _gain("moss", "moe_lora")),
    Claim("moe_over_lora", "Branches of their own for text and pictures are better than one for both.",
          f"{MOSS_PAPER}, table 2: 1.964 to 2.510 at rank 256", _gain("moe_lora", "lora")),
    Claim("moss_over_sam", "At equal rank MoSS is better than SAM-ConvLoRA.",
          f"{MOSS_PAPER}, table 10: 2.982 to 3.178", _gain("moss", "sam")),
    Claim("full_over_moss", "Full fine-tuning has the higher mean.",
          f"{MOSS_PAPER}, table 12: 3.178 to 3.244, by text quality and helpfulness", _gain("full", "moss")),
    Claim("moss_perceptual_over_full", "MoSS draws better pictures than full fine-tuning.",
          f"{MOSS_PAPER}, table 12: 3.21 to 3.62", _gain("moss", "full"), "perceptual_quality"),
    Claim("moss_coherence", "The pictures of MoSS hang together better than those of MoE-LoRA.",
          f"{MOSS_PAPER}, table 2: 2.66 to 3.41 at rank 256", _gain("moss", "moe_lora"), "image_coherence"),
    Claim("moss_loss_over_moe", "At equal rank MoSS predicts pictures better than MoE-LoRA.",
          f"{MOSS_PAPER}: local priors of pictures, section 3", _gain("moss", "moe_lora"), "image_loss"),
    Claim("equal_parameters_lora", "MoSS is better than LoRA with as many parameters.",
          f"reviewers of {MOSS_PAPER} asked; not in the paper", _gain("moss", "lora_equal")),
    Claim("equal_parameters_moe", "MoSS is better than MoE-LoRA with as many parameters.",
          f"reviewers of {MOSS_PAPER} asked; not in the paper", _EQUAL),
    Claim("equal_parameters_loss", "MoSS predicts pictures better than MoE-LoRA with as many parameters.",
          f"reviewers of {MOSS_PAPER} asked; not in the paper", _EQUAL, "image_loss"),
    Claim("equal_parameters_sam", "MoSS is better than SAM-ConvLoRA with as many parameters.",
          f"reviewers of {MOSS_PAPER} asked; not in the paper", _gain("moss", "sam_equal")),
    *(
        Claim(f"moss_over_moe_r{rank}", f"At rank {rank} MoSS is better than MoE-LoRA.",
              f"{MOSS_PAPER}, tables 13 to 15: 2.002 to 1.942, 2.204 to 2.372, 2.510 to 3.178 at ranks 64, 128, 256",
              _gain(*_OF_RANK[rank][:2]))
        for rank in _RANKS
    ),
    Claim("gain_grows_with_rank", "The gain of MoSS over MoE-LoRA is larger at rank 32 than at rank 4.",
          f"{MOSS_PAPER}, tables 13 to 15: -0.060, 0.168, 0.668 at ranks 64, 128, 256",
          _more(_gain("moss_r32", "moe_lora_r32"), _gain("moss_r4", "moe_lora_r4"))),
    Claim("kernel_3_over_2", "Kernel 3 predicts pictures better than kernel 2.",
          "asked by reviewers; the paper reports one kernel", _gain("moss_k3", "moss"), "image_loss"),
    Claim("kernel_2_over_3_equal", "With as many parameters kernel 2 predicts pictures better than kernel 3.",
          "asked by reviewers; the paper reports one kernel", _gain("moss", "moss_k3_equal"), "image_loss"),
    Claim("up_left_over_raster", "The window of the paper predicts pictures better than one that sees the upper right.",
          f"{MOSS_PAPER}, section 3: up and left", _gain("moss_k3", "moss_raster"), "image_loss"),
    Claim("output_over_input", "Routing by what a position predicts is better than by what it reads.",
          f"{MOSS_PAPER}, section 3: the rule; no comparison", _gain("moss", "moss_input")),
    Claim("output_over_input_linear", "The same without a window: routing by output is better.",
          f"{MOSS_PAPER}, section 3: the rule; no comparison", _gain("moe_lora", "moe_input")),
    Claim("locality", "The gain of MoSS comes from neighbouring patches: it is smaller where their order is shuffled.",
          f"reviewers of {MOSS_PAPER} asked (is convolution needed?); not in the paper",
          _more(_EQUAL, _gain("moss_permuted", "moe_equal_permuted")), "log_image_loss"),
    Claim("permuted_gain", "Where the order of patches is shuffled, MoSS still predicts pictures better.",
          "the control of the row above; false if the gain comes from neighbours",
          _gain("moss_permuted", "moe_equal_permuted"), "log_image_loss"),
    Claim("familiar_gain", "Where the generalist can draw the pictures already, MoSS predicts them better.",
          "locality is known then; not in the paper", _gain("moss_familiar", "moe_equal_familiar"), "log_image_loss"),
    *(
        Claim(f"{alphabet}_{measure}", f"With {what} MoSS {does} than MoE-LoRA with as many parameters.",
              f"{MOSS_PAPER}: {where}, without equal parameters",
              _gain(f"moss_{alphabet}", f"moe_equal_{alphabet}"), measure)
        for alphabet, what, where in (
            ("field", "codes that have a receptive field", "Chameleon, table 1"),
            ("vector", "pictures as vectors", "Emu2, table 2"),
        )
        for measure, does in (("overall", "is better"), ("log_image_loss", "predicts pictures better"))
    ),
    Claim("field_over_patch", "The gain is larger with codes that have a receptive field than with those of patches.",
          "locality depends on the alphabet; not in the paper",
          _more(_gain("moss_field", "moe_equal_field"), _EQUAL), "log_image_loss"),
    Claim("vector_over_field", "The gain is larger with vectors than with codes of the same encoder.",
          f"{MOSS_PAPER}, table 1: gains 1.494 (Emu2) and 0.724 (Chameleon) over the untuned models",
          _more(_gain("moss_vector", "moe_equal_vector"), _gain("moss_field", "moe_equal_field"))),
)  # fmt: skip
