"""What the tiny MM-Interleaved can do, on scenes that it was never shown, judged by the exact reader.

    python -m pretraining.mm_interleaved.check MODEL --count 200 --sheet docs/images/mm_interleaved.png

    draw    caption -> picture                                          exact, and by attribute
    tell    picture -> caption, greedy                                  word for word
    next    caption, picture, sentence -> picture                       exact; also where the U-Net does not look back
    third   caption, picture, sentence, picture, sentence -> picture    exact
    story   caption -> picture; then, from its own pictures, the next and the third

Pictures that a prompt holds are the true ones but for `story`. Prompts of a kind are run together, without the engine.
"""

import argparse
import json
import random
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image as PILImage
from PIL import ImageDraw

from weft.backbones.base import encode_document
from weft.backbones.checkpoint import Checkpoint
from weft.backbones.mm_interleaved import MMInterleavedBackbone, load
from weft.backbones.mm_interleaved.painting import contexts_of, make_scheduler, pixels_of
from weft.codecs.pixels import to_picture
from weft.data.collate import collate
from weft.data.sources.picturebook import ATTRIBUTES, Reader, Scene, Story, draw, held_out_scene, random_story
from weft.document import Document, Image, user
from weft.evaluation.tasks.picturebook import TEST_SEED, held_out_stories
from weft.images import encode_png
from weft.layout import TextSpan, TokenSequence
from weft.synchronizer.mmfs import FeatureBank
from weft.synchronizer.sight import see

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_CAPTION = 30
"""Tokens."""


def image(scene: Scene) -> Image:
    return Image(encode_png(draw(scene)))


@torch.no_grad()
def paint_all(
    model: MMInterleavedBackbone, prompts: "Sequence[Document]", *, guidance: float | None = None, seed: int = 0,
    blind: bool = False,
) -> list[PILImage.Image]:  # fmt: skip
    """The picture that follows each prompt.

    Args:
        blind: the U-Net does not look at earlier pictures; the language model does.
    """
    sampler, found = model.config.sampler, []
    for first in range(0, len(prompts), 64):
        sequences = [_begun(model, encode_document(model, prompt)) for prompt in prompts[first : first + 64]]
        batch = collate(sequences, model.tokens.pad)
        pixels = None if batch.pictures is None else batch.pictures.seen
        layout, vectors, looks = see(model.synchronizer, pixels, batch.ids, batch.layout, model.tokens.begin)
        hidden = model.forward(model.embed(batch.ids, layout, vectors), layout)
        ends = torch.tensor([[len(sequence) - 1] for sequence in sequences])
        contexts = contexts_of(hidden, batch.ids == model.tokens.begin, ends, ends >= 0)
        if looks is None:
            bank, visible = model._nothing(len(sequences)), torch.zeros(len(sequences), 1, dtype=torch.bool)
        else:
            last = torch.tensor([len(sequence.pixels) for sequence in sequences]).cumsum(0) - 1
            bank = FeatureBank.of_maps([scale[last].unsqueeze(1) for scale in looks.maps])
            visible = torch.full((len(sequences), 1), not blind)
        scheduler = make_scheduler(sampler.scheduler, model.config.scheduler)
        scheduler.set_timesteps(sampler.steps)
        generator = torch.Generator().manual_seed(seed + first)
        noise = torch.randn(len(sequences), *model._latent_shape, generator=generator)
        guided = sampler.guidance if guidance is None else guidance
        latents = model.draw(contexts, bank, visible, noise, scheduler, guided, generator)
        found += [to_picture(one * 255) for one in pixels_of(model.vae, latents)]
    return found


def _begun(model: MMInterleavedBackbone, sequence: TokenSequence) -> TokenSequence:
    """The same with the token after it that begins a picture."""
    ids = torch.cat((sequence.ids, torch.tensor([model.tokens.begin_image])))
    return TokenSequence(
        ids, (*sequence.spans, TextSpan(1)), torch.zeros(len(ids), dtype=torch.bool), pixels=sequence.pixels
    )


@torch.no_grad()
def tell_all(model: MMInterleavedBackbone, scenes: "Sequence[Scene]") -> list[str]:
    """Greedy captions of pictures."""
    sequences = []
    for scene in scenes:
        begun = encode_document(model, Document((user(image(scene)),)))
        # room for the answer, which nothing before it reads
        ids = torch.cat((begun.ids, torch.full((LONGEST_CAPTION,), model.tokens.pad)))
        spans = (*begun.spans, TextSpan(LONGEST_CAPTION))
        sequences.append(TokenSequence(ids, spans, torch.zeros(len(ids), dtype=torch.bool), pixels=begun.pixels))
    batch = collate(sequences, model.tokens.pad)
    layout, vectors, _ = see(model.synchronizer, batch.pictures.seen, batch.ids, batch.layout, model.tokens.begin)
    ids = batch.ids.clone()
    for at in range(ids.shape[1] - LONGEST_CAPTION, ids.shape[1]):
        hidden = model.forward(model.embed(ids, layout, vectors), layout)
        ids[:, at] = model.text_logits(hidden[:, at - 1]).argmax(-1)
    answers = [row[-LONGEST_CAPTION:].tolist() for row in ids]
    return [model.detokenize(a[: a.index(model.tokens.end)] if model.tokens.end in a else a) for a in answers]


def check(model: MMInterleavedBackbone, reader: Reader, count: int = 48, seed: int = 12345) -> dict[str, float]:
    """Shares of `count` tasks of each kind that are right."""
    rng = random.Random(seed)
    scenes = [held_out_scene(rng) for _ in range(count)]
    stories = [random_story(rng, held_out=True) for _ in range(count)]
    drawn = [reader.read(picture) for picture in paint_all(model, [prompt(scene.caption()) for scene in scenes])]
    told = tell_all(model, scenes)
    followed = [
        read_share(
            reader, paint_all(model, [continued(each, i) for each in stories]), [each.scenes[i] for each in stories]
        )
        for i in (1, 2)
    ]
    by_name = {
        name: [a.attributes()[name] == b.attributes()[name] for a, b in zip(drawn, scenes, strict=True)]
        for name in ATTRIBUTES
    }
    return {
        "draw": _share([seen == scene for seen, scene in zip(drawn, scenes, strict=True)]),
        **{name: _share(right) for name, right in by_name.items()},
        "tell": _share([text == scene.caption() for text, scene in zip(told, scenes, strict=True)]),
        "next": followed[0],
        "third": followed[1],
    }


def read_share(reader: Reader, pictures: "Sequence[PILImage.Image]", wanted: "Sequence[Scene]") -> float:
    return _share([reader.read(picture) == scene for picture, scene in zip(pictures, wanted, strict=True)])


def _share(right: "Sequence[bool]") -> float:
    return round(sum(right) / len(right), 3)


def prompt(*parts: str | Image) -> Document:
    return Document((user(*parts),))


def continued(story: Story, number: int, pictures: "Sequence[Image] | None" = None) -> Document:
    """What stands before picture `number` of a story; `pictures` are the true ones if none are given."""
    pictures = [image(scene) for scene in story.scenes] if pictures is None else pictures
    sentences = (story.scenes[0].caption(), *story.edits)
    parts = [part for i in range(number) for part in (sentences[i], pictures[i])]
    return prompt(*parts, sentences[number])


def tell_stories(model: MMInterleavedBackbone, stories: "Sequence[Story]") -> list[list[PILImage.Image]]:
    """All the pictures of each story, each painted from those painted before."""
    made: list[list[PILImage.Image]] = [[] for _ in stories]
    for number in range(len(stories[0].scenes)):
        prompts = [
            continued(story, number, [Image(encode_png(picture)) for picture in before])
            for story, before in zip(stories, made, strict=True)
        ]
        for before, picture in zip(made, paint_all(model, prompts, seed=number), strict=True):
            before.append(picture)
    return made


def sheet(model: MMInterleavedBackbone, seed: int = 1) -> PILImage.Image:
    """Six captions and two stories, drawn; the first prompts there are, none chosen."""
    rng = random.Random(seed)
    captions = [held_out_scene(rng).caption() for _ in range(6)]
    stories = [random_story(rng, held_out=True) for _ in range(2)]
    texts = captions + [text for story in stories for text in (story.scenes[0].caption(), *story.edits)]
    pictures = paint_all(model, [prompt(caption) for caption in captions])
    pictures += [picture for of_one in tell_stories(model, stories) for picture in of_one]
    width, height, across = 224, 250, 3
    page = PILImage.new("RGB", (width * across, height * len(texts) // across), "white")
    pen = ImageDraw.Draw(page)
    for i, (text, picture) in enumerate(zip(texts, pictures, strict=True)):
        x, y = i % across * width, i // across * height
        page.paste(picture.resize((192, 192), PILImage.Resampling.LANCZOS), (x + 16, y + 8))
        pen.multiline_text((x + 16, y + 204), "\n".join(textwrap.wrap(text, 34)), fill="black", spacing=2)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--sheet", type=Path, help="draw a page of pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, reader = load(Checkpoint.open(args.model), "tiny-mm"), Reader()
    found: dict[str, object] = dict(check(model, reader, args.count, seed=TEST_SEED))
    stories = held_out_stories(args.count)
    wanted = [story.scenes[1] for story in stories]
    for guidance in (1.0, 2.0, 3.0):
        pictures = paint_all(model, [prompt(story.scenes[0].caption()) for story in stories], guidance=guidance)
        found[f"draw, guidance {guidance:g}"] = read_share(reader, pictures, [story.scenes[0] for story in stories])
    prompts = [continued(story, 1) for story in stories]
    found["next, not looking back"] = read_share(reader, paint_all(model, prompts, blind=True), wanted)
    told = zip(*tell_stories(model, stories), strict=True)
    found["story"] = [read_share(reader, of_all, [s.scenes[i] for s in stories]) for i, of_all in enumerate(told)]
    since = time.time()
    for i in range(5):
        paint_all(model, prompts[i : i + 1])
    found["seconds per picture"] = round((time.time() - since) / 5, 2)
    print(json.dumps(found, indent=1))
    if args.sheet:
        sheet(model).save(args.sheet)


if __name__ == "__main__":
    main()
