"""What pictures are made of. Whether a window over neighbouring patches helps may depend on it, so there are several.

    patch      the tiny generalist's own: one code for each 8 x 8 patch, which knows nothing of its neighbours
    permuted   the same codes, written in a fixed random order: what stands up and left in the sequence's grid is not
               what lies up and left in the picture
    familiar   the same codes, in the order in which the generalist has learnt to draw
    field      codes of an encoder that sees 16 x 16 pixels around each patch, half of each neighbour, as tokenizers of
               real models do; a codec of its own, trained here
    vector     the same encoder's output before it is rounded to a code, normalised, predicted by regression

A generalist that can draw already leaves an adapter nothing to learn about pictures: in the familiar order all arms end
at the same place. So while arms are tuned, every row of a picture is written from right to left, and what stands where
has to be learnt. Neighbours stay neighbours, but where the order is random.

The generalist learns codes that are not its own by going on with its single skills (never stories, and from left to
right) with all weights, for the same number of steps each. What a new code or vector means is known before that as far
as linear algebra can tell: a code starts as the mean of what stood at its patches before, vectors by least squares. How
well it is known in the end is measured by drawing held-out captions, and stands in the report.
"""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.atomic import verify_folder, write_folder, write_json
from weft.backbones.base import DecodingOptions, Elements, encode_document
from weft.backbones.checkpoint import fingerprint_of
from weft.backbones.tiny import TinyBackbone
from weft.codecs.pixels import to_picture, to_values
from weft.codecs.vq import VQCodec, VQConfig
from weft.data.mixture import permutation
from weft.data.sources.picturebook import (
    SIDE,
    Scene,
    all_things,
    draw,
    is_held_out,
    random_edit,
    random_scene,
    random_story,
)
from weft.document import Document, Image, assistant, user
from weft.evaluation.miniature.arms import Alphabet, Budget
from weft.evaluation.miniature.aspects import fidelity
from weft.evaluation.miniature.tuning import Pace, Row, Say, descend, document_loss
from weft.images import encode_png
from weft.layout import FEATURE, ModalityLayout

if TYPE_CHECKING:
    from PIL import Image as PILImage

REACH = 4
"""Pixels of its neighbours that the encoder with a receptive field sees on each side of a patch."""
SEED = 20_261_121
"""Of what is drawn to make alphabets; arms and held-out stories have others."""
CODEC_RATE, BASE_RATE = 2e-3, 1.5e-3
CODEC_BATCH, BASE_BATCH = 32, 16
OWN: tuple[Alphabet, ...] = ("patch", "permuted", "familiar")
"""Of codes that the generalist has from the start."""
SKILLS = {"draw": 34, "edit": 40, "tell": 8, "again": 4, "say": 14}
"""Documents of each kind, in percent, while an alphabet is learnt: what the generalist was made with."""


class FieldCodec(VQCodec):
    """A codec whose encoder sees `REACH` pixels more than the patch on each side."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        first = self.encoder[0]
        assert isinstance(first, nn.Linear)
        self.encoder[0] = nn.Linear(3 * (config.patch + 2 * REACH) ** 2, first.out_features)

    def features(self, pixels: Tensor) -> Tensor:
        patch = self.config.patch
        windows = F.unfold(pixels, patch + 2 * REACH, padding=REACH, stride=patch)
        return self.encoder(windows.transpose(1, 2))


class MiniatureBackbone(TinyBackbone):
    """The tiny generalist with pictures in another alphabet."""

    def __init__(self, of: TinyBackbone, alphabet: Alphabet) -> None:
        """
        Args:
            of: the generalist, whose weights are copied where they fit.
        """
        super().__init__(of.config, of.tokenizer, f"{of.name}-{alphabet}")
        self.alphabet = alphabet
        config, width = of.config.codec, of.config.width
        if alphabet in ("field", "vector"):
            self.codec = FieldCodec(config)
        # the cell of the picture at each place of the sequence
        self.register_buffer("order", torch.arange(self.form.patches))
        if alphabet == "vector":
            self.kind = "continuous"
            self.codes, self.feature_width = 0, config.code_width
            self.project_up = nn.Linear(config.code_width, width, bias=False)
            self.project_down = nn.Linear(width, config.code_width)
            self.register_buffer("mean", torch.zeros(config.code_width))
            self.register_buffer("spread", torch.ones(config.code_width))
        own = {name: tensor for name, tensor in of.state_dict().items() if not name.startswith("codec.")}
        if alphabet in OWN:
            own |= {name: tensor for name, tensor in of.state_dict().items() if name.startswith("codec.")}
        self.load_state_dict(own, strict=False)
        self.requires_grad_(False).eval()

    order: Tensor
    mean: Tensor
    spread: Tensor

    def write_anew(self) -> None:
        """From now on pictures are written in an order that the generalist has not learnt, but for `familiar`."""
        patches, columns = self.form.patches, self.form.cols
        if self.alphabet == "permuted":
            self.order.copy_(torch.tensor(tuple(permutation(SEED, 0, patches))))
        elif self.alphabet != "familiar":
            self.order.copy_(torch.arange(patches).unflatten(0, (-1, columns)).flip(1).flatten())

    @torch.no_grad()
    def encode_images(self, pictures: "Sequence[PILImage.Image]", *, generated: bool) -> list[Elements]:
        pixels = pixels_of(pictures, self.config.codec.side)
        if self.kind == "discrete":
            return [Elements(self.form, self.vocabulary + codes[self.order]) for codes in self.codec.encode(pixels)]
        ids = torch.full((self.form.patches,), FEATURE)
        return [Elements(self.form, ids, vectors) for vectors in self.vectors(pixels)]

    @torch.no_grad()
    def decode_image(self, elements: Elements, options: DecodingOptions = DecodingOptions()) -> "PILImage.Image":
        if elements.features is None:
            codes = torch.empty_like(elements.ids)
            codes[self.order] = elements.ids - self.vocabulary
            pixels = self.codec.decode(codes[None])
        else:
            pixels = self.codec.render((elements.features * self.spread + self.mean)[None]).clamp(-1, 1)
        return to_picture((pixels[0] + 1) * 127.5)

    def vectors(self, pixels: Tensor) -> Tensor:
        """(M, 3, side, side) -> (M, P, F)."""
        return (self.codec.features(pixels) - self.mean) / self.spread

    def embed(self, ids: Tensor, layout: ModalityLayout, features: Tensor | None = None) -> Tensor:
        embeds = self.table(ids.clamp_min(0))
        if features is not None:
            embeds = torch.where((ids == FEATURE).unsqueeze(-1), self.project_up(features), embeds)
        for plane, table in ((layout.inputs, self.place_in), (layout.outputs, self.place_out)):
            place = plane.row * self.form.cols + plane.col
            embeds = embeds + table(self.order[place.clamp_min(0)]) * (place >= 0).unsqueeze(-1)
        return embeds

    def image_features(self, hidden: Tensor) -> Tensor:
        return self.project_down(hidden)


def make(
    alphabet: Alphabet, of: TinyBackbone, budget: Budget, folder: Path, codec: Path, say: Say
) -> MiniatureBackbone:
    """The generalist that writes pictures in this alphabet, made or read from `folder`.

    Args:
        codec: the folder of the codec with a receptive field, one for both alphabets that have it, so that they differ
            in the rounding alone.
    """
    model = MiniatureBackbone(of, alphabet)
    if alphabet in OWN:
        model.fingerprint = of.fingerprint
        return model
    done = folder / "model"
    if not done.is_dir():
        train_codec(model.codec, budget, codec, say)
        _align(model, of, budget)
        curve = _learn(model, budget, folder, say)
        with write_folder(done) as staging:
            _save(model, staging)
            write_json(staging / "curve.json", curve)
    verify_folder(done)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(done / "model.safetensors"))
    model.fingerprint = fingerprint_of(model)
    return model


# --- the codec with a receptive field -------------------------------------------------------------------------------


def train_codec(codec: VQCodec, budget: Budget, folder: Path, say: Say) -> None:
    """Train a codec in place, or read it; resumable.

    A codebook of moving averages (van den Oord et al. 2017); entries that are not used are put where outputs are.
    """
    from safetensors.torch import load_file, save_file

    done = folder / "model"
    if not done.is_dir():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            for module in codec.modules():
                if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                    module.reset_parameters()
        _fit_codec(codec, budget, folder, say)
        with write_folder(done) as staging:
            save_file({k: v.contiguous() for k, v in codec.state_dict().items()}, staging / "codec.safetensors")
    verify_folder(done)
    codec.load_state_dict(load_file(done / "codec.safetensors"))
    codec.requires_grad_(False)


def _fit_codec(codec: VQCodec, budget: Budget, folder: Path, say: Say) -> None:
    config, rng = codec.config, random.Random(SEED)
    scenes = [_seen_scene(rng) for _ in range(budget.pictures)]
    pictures = torch.stack([_values(draw(scene), config.side).byte() for scene in scenes])
    empty = torch.stack([_values(draw_empty(scene), config.side).byte() for scene in scenes])
    codec.requires_grad_(True)
    book = codec.codebook.weight.requires_grad_(False)
    counts = nn.Parameter(torch.ones(config.codes), requires_grad=False)
    totals = nn.Parameter(book.detach().clone(), requires_grad=False)
    kept = dict(codec.named_parameters()) | {"counts": counts, "totals": totals}

    def loss(step: int) -> tuple[Tensor, Row]:
        generator = torch.Generator().manual_seed(SEED + step)
        chosen = torch.randint(len(pictures), (CODEC_BATCH,), generator=generator)
        pixels = pictures[chosen].float() / 127.5 - 1
        # what is drawn covers little of a picture and is what matters
        weight = 1 + 3 * (pictures[chosen] != empty[chosen]).any(1, keepdim=True).float()
        features = codec.features(pixels)
        with torch.no_grad():
            codes = codec.nearest(features)
            flat, index = features.reshape(-1, config.code_width), codes.reshape(-1)
            counts.mul_(0.97).index_add_(0, index, torch.full_like(index, 0.03, dtype=torch.float32))
            totals.mul_(0.97).index_add_(0, index, flat * 0.03)
            book.copy_(totals / counts.clamp_min(1e-5).unsqueeze(1))
            if step % 20 == 0 and step < 0.7 * budget.codec:
                unused = (counts < 0.03).nonzero().squeeze(1)
                other = flat[torch.randint(len(flat), (len(unused),), generator=generator)]
                book[unused], totals[unused], counts[unused] = other, other, 1.0
        nearest = codec.codebook(codes).detach()
        # the gradient passes the rounding as if there were none
        error = codec.render(features + (nearest - features).detach()) - pixels
        rounding = (features - nearest).square().mean()
        value = (weight * (0.5 * error.abs() + error.square())).mean() + 0.25 * rounding
        return value, {"loss": float(value.detach())}

    descend(kept, loss, Pace(budget.codec, CODEC_RATE, budget.save_every, weight_decay=0.01), folder, say)


# --- the generalist learns it ---------------------------------------------------------------------------------------


@torch.no_grad()
def _align(model: MiniatureBackbone, of: TinyBackbone, budget: Budget) -> None:
    """What the new codes or vectors mean, as far as linear algebra can tell from pictures in both alphabets."""
    rng = random.Random(SEED + 1)
    pixels = pixels_of([draw(_seen_scene(rng)) for _ in range(min(1500, budget.pictures))], of.config.codec.side)
    old = of.codec.encode(pixels).reshape(-1)
    first = of.vocabulary
    if model.alphabet == "field":
        new = model.codec.encode(pixels).reshape(-1)
        together = torch.zeros(of.codes, of.codes).index_put_((new, old), torch.ones(len(new)), accumulate=True)
        used = together.sum(1) > 0
        shares = together[used] / together[used].sum(1, keepdim=True)
        for weight, source in ((model.table.weight, of.table.weight), (model.head.weight, of.head.weight)):
            weight[first:] = source[first:].mean(0)
            weight[first:][used] = shares @ source[first:]
        return
    raw = model.codec.features(pixels).reshape(-1, model.feature_width)
    model.mean.copy_(raw.mean(0))
    model.spread.copy_(raw.std(0).clamp_min(1e-3))
    vectors = (raw - model.mean) / model.spread
    up = torch.linalg.lstsq(vectors, of.table.weight[first + old]).solution
    model.project_up.weight.copy_(up.T)
    nn.init.zeros_(model.project_down.weight)
    nn.init.zeros_(model.project_down.bias)


def _learn(model: MiniatureBackbone, budget: Budget, folder: Path, say: Say) -> list[Row]:
    rng = random.Random(SEED + 2)
    count = max(1, min(budget.base * BASE_BATCH, 12_000))
    sequences = [encode_document(model, skill(rng, number)) for number in range(count)]
    model.requires_grad_(True)
    model.codec.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = document_loss(model, sequences, BASE_BATCH, SEED)
    curve = descend(trained, loss, Pace(budget.base, BASE_RATE, budget.save_every, weight_decay=0.01), folder, say)
    model.requires_grad_(False)
    return curve[:: max(1, len(curve) // 200)]


def skill(rng: random.Random, number: int) -> Document:
    """One document of what the generalist was made with; no held-out scene is in it."""
    kind = rng.choices(list(SKILLS), list(SKILLS.values()))[0]
    scene = _seen_scene(rng)
    if kind == "draw":
        turns = user(scene.caption()), assistant(_image(scene))
    elif kind == "tell":
        turns = user(_image(scene)), assistant(scene.caption())
    elif kind == "again":
        turns = user(_image(scene), "again."), assistant(_image(scene))
    elif kind == "edit":
        sentence, after = random_edit(rng, scene)
        while is_held_out(after):
            scene = _seen_scene(rng)
            sentence, after = random_edit(rng, scene)
        turns = user(_image(scene), sentence), assistant(_image(after))
    else:
        story = random_story(rng, edits=rng.randint(1, 3), held_out=False)
        lines = [story.scenes[0].caption(), *story.edits]
        turns = user("say each: " + ", then ".join(line[:-1] for line in lines) + "."), assistant(" ".join(lines))
    return Document(turns, f"{kind}-{number}")


# --- what an alphabet is like ---------------------------------------------------------------------------------------


@torch.no_grad()
def describe(model: MiniatureBackbone, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Of held-out scenes: how near reconstructions come, and how much of an empty background keeps its elements when
    something stands elsewhere in the picture."""
    pictures, codec = [draw(scene) for scene in scenes], model.codec
    again = [model.decode_image(each) for each in model.encode_images(pictures, generated=True)]
    decibel = [fidelity(picture, scene) for picture, scene in zip(again, scenes, strict=True)]
    side, patch = model.config.codec.side, model.config.codec.patch
    pixels = pixels_of(pictures, side)
    empty = pixels_of([draw_empty(scene) for scene in scenes], side)
    touched = F.max_pool2d((pixels != empty).any(1, keepdim=True).float(), patch).flatten(1).bool()
    same = (codec.encode(pixels) == codec.encode(empty))[~touched]
    return {
        "reconstruction_db": round(sum(decibel) / len(decibel), 3),
        "untouched_patches_keep_their_code": round(float(same.float().mean()), 4) if len(same) else None,
    }


def draw_empty(scene: Scene) -> "PILImage.Image":
    """The background of a scene alone: of each half, what it is where a thing stands in the other."""
    thing, half = all_things()[0], SIDE // 2
    picture, other = (draw(Scene(scene.setting, scene.time, ((place, thing),))).copy() for place in ("right", "left"))
    picture.paste(other.crop((half, 0, SIDE, SIDE)), (half, 0))
    return picture


def pixels_of(pictures: "Sequence[PILImage.Image]", side: int) -> Tensor:
    """Pictures -> (M, 3, side, side) in [-1, 1]."""
    return torch.stack([_values(each, side) / 127.5 - 1 for each in pictures])


def _values(picture: "PILImage.Image", side: int) -> Tensor:
    """(3, side, side) in [0, 255]."""
    from PIL import Image as PILImage

    return to_values(picture if picture.size == (side, side) else picture.resize((side, side), PILImage.Resampling.BOX))


def _seen_scene(rng: random.Random) -> Scene:
    while True:
        scene = random_scene(rng)
        if not is_held_out(scene):
            return scene


def _image(scene: Scene) -> Image:
    return Image(encode_png(draw(scene)))


def _save(model: MiniatureBackbone, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**dataclasses.asdict(model.config), "alphabet": model.alphabet}))
