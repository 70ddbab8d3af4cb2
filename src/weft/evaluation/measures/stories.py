"""The drawn world's answers, scored by its exact reader."""

import functools
from collections.abc import Mapping
from typing import Any

from weft.document import Image, Text
from weft.evaluation.metric import Answered, Context, Measured, Metric, each
from weft.images import decode_image


def _story(answer: Answered, context: Context) -> Measured:
    from weft.evaluation.tasks.picturebook import score_story, story_of

    story = story_of(answer.sample.reference)
    score = score_story(story, answer.loaded.parts, answer.prediction.reason == "stop", _reader())
    values = {"wellformed": float(score.wellformed)}
    values |= {f"picture_{i}": float(hit) for i, hit in enumerate(score.pictures, 1)}
    values |= {f"sentence_{i}": float(hit) for i, hit in enumerate(score.sentences, 1)}
    seen = [None if scene is None else scene.caption() for scene in score.seen]
    return Measured(answer.id, values, " | ".join(caption or "-" for caption in seen))


def _picture(answer: Answered, context: Context) -> Measured:
    """The first picture against the scene asked for: all of it, and each attribute."""
    from weft.data.sources.picturebook import ATTRIBUTES, parse_caption

    wanted = parse_caption(str(answer.sample.reference["caption"]))
    assert wanted is not None
    kinds = [type(part) for part in answer.loaded.parts if not (isinstance(part, Text) and not part.text.strip())]
    pictures = answer.loaded.images
    seen = _reader().read(decode_image(pictures[0].data or b"")) if pictures else None
    there = wanted.attributes()
    found: Mapping[str, Any] = seen.attributes() if seen else {}
    values = {name: float(name in found and found[name] == there[name]) for name in ATTRIBUTES}
    values = {"exact": float(seen == wanted), **values, "wellformed": float(kinds == [Image])}
    return Measured(answer.id, values, seen.caption() if seen else "")


def _caption(answer: Answered, context: Context) -> Measured:
    """The text against the picture's caption, which has one meaning."""
    from weft.data.sources.picturebook import ATTRIBUTES, parse_caption

    wanted = parse_caption(str(answer.sample.reference["caption"]))
    assert wanted is not None
    said = parse_caption(answer.text)
    there = wanted.attributes()
    found: Mapping[str, Any] = said.attributes() if said else {}
    values: dict[str, float | None] = {"exact": float(said == wanted)}
    values |= {name: float(name in found and found[name] == there[name]) for name in ATTRIBUTES}
    return Measured(answer.id, values, answer.text)


@functools.cache
def _reader() -> Any:
    from weft.data.sources.picturebook import Reader

    return Reader()


METRICS = {
    "picturebook/story": Metric("form, pictures and sentences of a story, read back exactly", each(_story), digits=3),
    "picturebook/picture": Metric("attributes of a drawn picture, read back exactly", each(_picture), digits=3),
    "picturebook/caption": Metric("attributes that a caption names", each(_caption), digits=3),
}
