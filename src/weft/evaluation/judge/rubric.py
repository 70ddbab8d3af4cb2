"""What a judge is asked, as data: criteria, scale, wording, and what an answer without text or pictures gets.

The prompts of the published judges could not be recovered in full, or leave their scale open; the criteria here are
theirs, the wording is ours, and `version` is part of every record made with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.evaluation.metrics.interleaved import Modality


@dataclass(frozen=True)
class Criterion:
    name: str
    title: str
    asks: str
    about: tuple[Modality, ...] = ()
    """What it looks at. A task that asks for none of one of these has no such score; an answer without one of them gets
    the lowest."""
    compares: bool = False
    """It compares pictures with each other: with a single one there is a choice, see `JudgeConfig.single_image`."""


@dataclass(frozen=True)
class Rubric:
    name: str
    version: int
    source: str
    criteria: tuple[Criterion, ...]
    low: int
    high: int
    levels: Mapping[int, str]
    """What the scores mean, from the highest down."""
    digits: int | None = None
    """To which published tables round each criterion's mean before they average them; None: they do not."""

    @property
    def of_texts(self) -> tuple[str, ...]:
        """Criteria that a text's length may sway: all but those that look at pictures alone."""
        return tuple(each.name for each in self.criteria if each.about != ("image",))

    def system(self, criteria: Sequence[Criterion], *, together: bool = False) -> str:
        """The judge's role, the criteria, the scale, and how to reply.

        Args:
            together: scores are to be named, because there may be several.
        """
        levels = "\n".join(f"{score}: {meaning}" for score, meaning in self.levels.items())
        aspects = "\n".join(f"Aspect: {each.title}. {each.asks}" for each in criteria)
        what = "one aspect and nothing else" if len(criteria) == 1 else f"{len(criteria)} aspects, each for itself"
        return (
            f"You judge an answer that may hold text and pictures in turn. You judge {what}.\n\n{aspects}\n\n"
            f"Scores from {self.low} to {self.high}:\n{levels}\n\n{self.reply_form(criteria, together=together)}"
        )

    def reply_form(self, criteria: Sequence[Criterion], *, together: bool = False) -> str:
        number = f"where N is a whole number from {self.low} to {self.high}."
        if not together:
            return f"Reply with a short reason, then, on a line of its own, `Score: N`, {number}"
        lines = ", ".join(f"`Score ({each.title}): N`" for each in criteria)
        return f"Reply, for each aspect, with a short reason, then, on a line of its own, {lines}, {number}"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "criteria": [each.name for each in self.criteria]}


_ZERO_TO_FIVE = {
    5: "no flaw that a careful reader would name",
    4: "small flaws that do not disturb",
    3: "clear flaws, still useful",
    2: "serious flaws, partly useful",
    1: "almost nothing is right",
    0: "absent or unusable",
}
_ZERO_TO_TEN = {
    10: "no flaw that a careful reader would name",
    8: "small flaws that do not disturb",
    6: "clear flaws, still useful",
    4: "serious flaws, partly useful",
    2: "almost nothing is right",
    0: "absent or unusable; odd scores lie between their neighbours",
}

INTERLEAVED_EVAL = Rubric(
    "interleavedeval",
    1,
    "InterleavedBench (Liu et al. 2024), five aspects, 0 to 5",
    (
        Criterion(
            "text_quality",
            "Text quality",
            "Is the text of the output clear, coherent and free of errors? Look at grammar, spelling, readability, "
            "whether it fits the instruction and the context, and whether anything is said twice.",
            ("text",),
        ),
        Criterion(
            "perceptual_quality",
            "Perceptual quality",
            "Do the pictures of the output look convincing and natural, without distortion or artefacts in structure, "
            "colour or composition?",
            ("image",),
        ),
        Criterion(
            "image_coherence",
            "Image coherence",
            "Are style and subjects the same across the pictures: texture, palette, light and rendering; bodies, "
            "clothes and traits? A picture that nearly repeats an input picture, or another one of the output, is a "
            "flaw.",
            ("image",),
            compares=True,
        ),
        Criterion(
            "text_image_coherence",
            "Text-image coherence",
            "Does each text of the output go with its pictures, pair by pair, so that both tell one story?",
            ("text", "image"),
        ),
        Criterion(
            "helpfulness",
            "Helpfulness",
            "Do the texts and pictures of the output follow the instruction and give everything that is needed, in a "
            "sensible order?",
        ),
    ),
    0,
    5,
    _ZERO_TO_FIVE,
)

OPENING = Rubric(
    "opening",
    1,
    "OpenING (Zhou et al. 2025), seven criteria, 0 to 10",
    (
        Criterion("correctness", "Correctness", "Is what the texts say and the pictures show right and to the point?"),
        Criterion(
            "image_text_coherency",
            "Image-text coherency",
            "Do pictures and texts that belong together say the same?",
            ("text", "image"),
        ),
        Criterion(
            "multi_step_consistency",
            "Multi-step consistency",
            "Are style and subjects consistent from step to step, over pictures and texts?",
            compares=True,
        ),
        Criterion(
            "content_quality",
            "Content quality",
            "Are the pictures clear and natural, and the texts fluent and free of errors?",
        ),
        Criterion(
            "human_preference_alignment",
            "Human preference alignment",
            "Would most people find the answer acceptable: harmless, unbiased, and what was asked for?",
        ),
        Criterion("completeness", "Completeness", "Are all steps there that were asked for, each with its parts?"),
        Criterion("content_richness", "Content richness", "Are pictures and texts varied and full of substance?"),
    ),
    0,
    10,
    _ZERO_TO_TEN,
    digits=2,
)

COMM = Rubric(
    "comm",
    1,
    "CoMM (Chen et al. 2024), five criteria, 0 to 10",
    (
        Criterion("style", "Style", "Is the style of the pictures the same throughout?", ("image",), compares=True),
        Criterion(
            "entity",
            "Entity consistency",
            "Do the same people, animals and things look the same in every picture, and as the texts say?",
            ("image",),
            compares=True,
        ),
        Criterion(
            "trend",
            "Trend consistency",
            "Do the pictures develop in the order in which the texts develop?",
            ("text", "image"),
        ),
        Criterion("completeness", "Completeness", "Is the sequence whole, with nothing left out that was asked for?"),
        Criterion(
            "image_quality", "Image quality", "Are the pictures sharp, natural and free of artefacts?", ("image",)
        ),
    ),
    0,
    10,
    _ZERO_TO_TEN,
)

RUBRICS = {each.name: each for each in (INTERLEAVED_EVAL, OPENING, COMM)}
