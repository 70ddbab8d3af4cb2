"""What an answer is worth, without a judge: the five aspects of InterleavedBench by what the exact reader sees.

Every aspect is a share between 0 and 1 of one answer to a story of n asked pictures (n = 3), higher is better. Only
`helpfulness` looks at what was asked; the others judge an answer by itself, as InterleavedEval's definitions do.

text_quality          Of the texts that were asked for or written, whichever are more: those that say something in the
                      world's grammar. The first must be an opening ("once there was <caption>."), each later one a
                      change that makes sense in the scene that the texts before it tell of. After a text that is none
                      the scene is unknown, and nothing later can make sense.
perceptual_quality    Of the pictures that were asked for or written: how clean each is, from 0 where it differs from
                      the nearest render of any scene as much as one scene from another (15 dB), to 1 where it is as
                      near as the codec's own reconstructions of true pictures (`ceiling`), linear in dB between. It
                      does not matter which scene is shown.
image_coherence       Of the n - 1 pairs of successive pictures asked for, or written: those in which the second shows
                      the scene of the first after exactly one valid change, whatever the texts say.
text_image_coherence  Of the pictures that were asked for or written: those that show the scene of the answer's own
                      texts up to them. The i-th picture belongs to the i-th text; no text, no match.
helpfulness           Of the 2 n parts asked for, sentences and pictures in turn: those that stand at their place and
                      are exactly as asked, word for word and attribute by attribute.

overall               The mean of the five.

Beside them: `wellformed` (asked sentences and pictures in turn, ended by the model itself), `picture_1` ... `picture_3`
(as asked), and, of the true answer under the model, `text_loss` (nats a token), `image_loss` (nats a code; for vectors
the mean squared error of a number whose variance is 1), `log_image_loss` (its natural logarithm, so that differences
are relative and alphabets can be compared).
"""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from weft.data.sources.picturebook import SIDE, Reader, Scene, Story, draw, parse_caption, valid_edits
from weft.document import Image, Part, Text
from weft.evaluation.tasks.picturebook import score_story
from weft.images import decode_image

if TYPE_CHECKING:
    from PIL import Image as PILImage

ASPECTS = ("text_quality", "perceptual_quality", "image_coherence", "text_image_coherence", "helpfulness")
LOSSES = ("image_loss", "log_image_loss", "text_loss")
LOWER_IS_BETTER = frozenset(LOSSES)
RANGES = {"image_loss": (0.0, math.inf), "log_image_loss": (-math.inf, math.inf), "text_loss": (0.0, math.inf)}
"""Of the losses; all others are shares."""
FLOOR = 15.0
"""dB: what two different scenes of the world have in common."""


def score(story: Story, parts: Sequence[Part], finished: bool, reader: Reader, ceiling: float) -> dict[str, float]:
    """Every measure of one answer but the losses.

    Args:
        parts: the answer, text and pictures in order.
        finished: the model ended it by itself.
        ceiling: dB between the codec's reconstructions and the true pictures.
    """
    asked = len(story.scenes)
    texts = [part.text.strip() for part in parts if isinstance(part, Text)]
    pictures = [decode_image(part.data) for part in parts if isinstance(part, Image) and part.data]
    seen = [reader.read(picture) for picture in pictures]
    told = scenes_told(texts)
    of_texts, of_pictures = max(asked, len(texts)), max(asked, len(pictures))
    clean = [cleanness(fidelity(picture, scene), ceiling) for picture, scene in zip(pictures, seen, strict=True)]
    follows = [after in (scene for _, scene in valid_edits(before)) for before, after in itertools.pairwise(seen)]
    matches = [scene is not None and scene == shown for scene, shown in zip(told, seen, strict=False)]
    exact = score_story(story, parts, finished, reader)
    found = {
        "text_quality": sum(scene is not None for scene in told) / of_texts,
        "perceptual_quality": sum(clean) / of_pictures,
        "image_coherence": sum(follows) / max(1, of_pictures - 1),
        "text_image_coherence": sum(matches) / of_pictures,
        "helpfulness": helpfulness(story, parts, reader),
    }
    found["overall"] = sum(found.values()) / len(found)
    found["wellformed"] = float(exact.wellformed)
    return found | {f"picture_{i}": float(right) for i, right in enumerate(exact.pictures, start=1)}


def scenes_told(texts: Sequence[str]) -> list[Scene | None]:
    """The scene that each text leaves behind; None from the first that makes no sense."""
    found: list[Scene | None] = []
    scene: Scene | None = None
    for i, text in enumerate(texts):
        scene = _opening(text) if i == 0 else None if scene is None else dict(valid_edits(scene)).get(text)
        found.append(scene)
    return found


def helpfulness(story: Story, parts: Sequence[Part], reader: Reader) -> float:
    """Share of the asked parts that stand at their place and are exactly as asked."""
    asked = [part for step in zip(story.sentences(), story.scenes, strict=True) for part in step]
    return sum(_is(want, have, reader) for want, have in zip(asked, parts, strict=False)) / len(asked)


def fidelity(picture: "PILImage.Image", scene: Scene) -> float:
    """dB between a picture and the render of a scene; at most 60."""
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE))
    error = np.asarray(picture, dtype=np.float64) - np.asarray(draw(scene), dtype=np.float64)
    return 10 * math.log10(255**2 / max(float(np.square(error).mean()), 255**2 / 1e6))


def cleanness(decibel: float, ceiling: float) -> float:
    """A share; a codec without anything above the floor counts as one that is little better."""
    return min(1.0, max(0.0, (decibel - FLOOR) / max(1.0, ceiling - FLOOR)))


def _opening(text: str) -> Scene | None:
    for start in ("once there was ", "once there were "):
        if text.startswith(start):
            scene = parse_caption(text.removeprefix(start))
            return scene if scene is not None and Story((scene,), ()).sentences()[0] == text else None
    return None


def _is(want: str | Scene, have: Part, reader: Reader) -> bool:
    if isinstance(want, str):
        return isinstance(have, Text) and have.text.strip() == want
    return isinstance(have, Image) and have.data is not None and reader.read(decode_image(have.data)) == want
