"""A small drawn world with a grammar: scenes, captions, edits, stories, and the exact reader of its pictures.

Every picture is a function of its scene and every sentence has one meaning, so what a model writes can be scored
without a judge: `Reader.read` finds the scene whose render is nearest to a picture, exactly, over all scenes.

    scene    = setting x time x {left, middle, right} things; a thing has a kind, a colour and a size
    caption  = things from left to right, then setting, then time
    edit     = one valid change of a scene, with its sentence
    story    = a caption and two edits asked for; three sentences and three pictures answered

Random choices come from the caller's `random.Random`.
"""

import contextlib
import functools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

SIDE = 64
"""Pixels along one side of a picture."""

SETTINGS = ("meadow", "beach", "snow", "desert")
TIMES = ("day", "night")
KINDS = ("cat", "house", "boat", "tree", "ball", "car")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("small", "big")
PLACES = ("left", "middle", "right")
ATTRIBUTES = ("setting", "time", "things", "colors", "sizes", "places")
"""The names under which a caption or a picture is scored."""

_WHERE = {"meadow": "in the meadow", "beach": "on the beach", "snow": "in the snow", "desert": "in the desert"}
_WHEN = {"day": "by day", "night": "at night"}
_AT = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
_CENTER_X = {"left": 16, "middle": 32, "right": 48}
_HALF_WIDTH = {"small": 9.0, "big": 14.5}
_BASE_Y = 58
_SCALE = 4


@dataclass(frozen=True, order=True)
class Thing:
    kind: str
    color: str
    size: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """One picture. `things` maps a place to a thing, left before right; middle stands alone."""

    setting: str
    time: str
    things: tuple[tuple[str, Thing], ...]

    def __post_init__(self) -> None:
        places = [place for place, _ in self.things]
        kinds = {thing.kind for _, thing in self.things}
        assert places in (["left"], ["middle"], ["right"], ["left", "right"]), places
        assert len(kinds) == len(places), "two things of one kind could not be told apart in a sentence"

    def caption(self) -> str:
        things = " and ".join(f"{thing} {_AT[place]}" for place, thing in self.things)
        return f"{things}, {_WHERE[self.setting]} {_WHEN[self.time]}."

    def attributes(self) -> dict[str, object]:
        """What `ATTRIBUTES` names, each comparable with ==."""
        return {
            "setting": self.setting,
            "time": self.time,
            "things": tuple(thing.kind for _, thing in self.things),
            "colors": tuple(thing.color for _, thing in self.things),
            "sizes": tuple(thing.size for _, thing in self.things),
            "places": tuple(place for place, _ in self.things),
        }

    def replace_thing(self, kind: str, **change: str) -> "Scene":
        things = tuple(
            (place, replace(thing, **change) if thing.kind == kind else thing) for place, thing in self.things
        )
        return replace(self, things=things)


@dataclass(frozen=True)
class Story:
    """A first scene and the edits that lead to the next ones."""

    scenes: tuple[Scene, ...]
    edits: tuple[str, ...]

    def instruction(self) -> str:
        return f"tell a story: {self.scenes[0].caption()[:-1]}" + "".join(f", then {e[:-1]}" for e in self.edits) + "."

    def sentences(self) -> tuple[str, ...]:
        scene = self.scenes[0]
        first = f"once there {'was' if len(scene.things) == 1 else 'were'} {scene.caption()}"
        return (first, *self.edits)


# --- sampling -------------------------------------------------------------------------------------------------------


def all_things() -> list[Thing]:
    return [Thing(kind, color, size) for kind in KINDS for color in COLORS for size in SIZES]


def random_scene(rng: random.Random, *, two_things: float = 0.6) -> Scene:
    """A scene; `two_things` is the share with a thing on either side."""
    first, second = (
        Thing(kind, rng.choice(COLORS), rng.choice(SIZES)) for kind in rng.sample(KINDS, 2)
    )  # different kinds
    things: tuple[tuple[str, Thing], ...] = (("left", first), ("right", second))
    if rng.random() >= two_things:
        things = ((rng.choice(PLACES), first),)
    return Scene(rng.choice(SETTINGS), rng.choice(TIMES), things)


def is_held_out(scene: Scene, share: int = 10) -> bool:
    """True for one scene in `share`, by a hash of its caption: never drawn in training, the same on every machine."""
    return sha256(scene.caption().encode()).digest()[0] % share == 0


def valid_edits(scene: Scene) -> Iterator[tuple[str, Scene]]:
    """Every change that makes sense in this scene, as (sentence, scene afterwards)."""
    if scene.time == "day":
        yield "night falls.", replace(scene, time="night")
    else:
        yield "day breaks.", replace(scene, time="day")
    for place, thing in scene.things:
        name = f"the {thing.kind}"
        for color in COLORS:
            if color != thing.color:
                yield f"{name} turns {color}.", scene.replace_thing(thing.kind, color=color)
        if thing.size == "small":
            yield f"{name} grows.", scene.replace_thing(thing.kind, size="big")
        else:
            yield f"{name} shrinks.", scene.replace_thing(thing.kind, size="small")
        if len(scene.things) == 1:
            for target in PLACES:
                if target != place:
                    where = _AT[target].split()[-1]
                    yield f"{name} moves to the {where}.", replace(scene, things=((target, thing),))
        else:
            yield f"{name} leaves.", replace(scene, things=tuple(t for t in scene.things if t[1] != thing))
    if len(scene.things) == 1 and scene.things[0][0] != "middle":
        place, thing = scene.things[0]
        for other in all_things():
            if other.kind != thing.kind:
                pair = {place: thing, ("right" if place == "left" else "left"): other}
                yield f"{other} comes.", replace(scene, things=tuple((p, pair[p]) for p in ("left", "right")))


def random_edit(rng: random.Random, scene: Scene) -> tuple[str, Scene]:
    """A valid edit; the kinds of change (last word or verb) are equally likely, not the sentences."""
    by_verb: dict[str, list[tuple[str, Scene]]] = {}
    for sentence, after in valid_edits(scene):
        words = sentence[:-1].split()
        verb = next(word for word in words if word.endswith("s") and word not in ("colors",))
        by_verb.setdefault(verb, []).append((sentence, after))
    return rng.choice(by_verb[rng.choice(sorted(by_verb))])


def held_out_scene(rng: random.Random) -> Scene:
    """A scene that no training data shows."""
    while True:
        scene = random_scene(rng)
        if is_held_out(scene):
            return scene


def random_story(rng: random.Random, *, edits: int = 2, held_out: bool | None = None) -> Story:
    """A story of `edits` + 1 pictures which never comes back to a scene it has shown.

    Args:
        held_out: True: the first scene is a held-out one. False: no scene is. None: any.
    """
    while True:
        scenes, sentences = [random_scene(rng)], []
        for _ in range(edits):
            sentence, after = random_edit(rng, scenes[-1])
            scenes.append(after)
            sentences.append(sentence)
        wanted = held_out is None or (is_held_out(scenes[0]) if held_out else not any(map(is_held_out, scenes)))
        if wanted and len(set(scenes)) == len(scenes):
            return Story(tuple(scenes), tuple(sentences))


_THING = rf"a (?P<size>{'|'.join(SIZES)}) (?P<color>{'|'.join(COLORS)}) (?P<kind>{'|'.join(KINDS)})"
_PLACED = re.compile(rf"{_THING} (?P<place>{'|'.join(_AT.values())})")


def parse_caption(text: str) -> Scene | None:
    """The scene of a caption, or None where the text is not exactly one."""
    for setting, where in _WHERE.items():
        for time, when in _WHEN.items():
            if text.endswith(f", {where} {when}."):
                things = tuple(
                    (match["place"].split()[-1], Thing(match["kind"], match["color"], match["size"]))
                    for match in _PLACED.finditer(text)
                )
                with contextlib.suppress(AssertionError):
                    scene = Scene(setting, time, things)
                    return scene if scene.caption() == text else None
    return None


# --- drawing --------------------------------------------------------------------------------------------------------

_RGB = {
    "red": (214, 48, 49),
    "orange": (240, 138, 36),
    "yellow": (247, 212, 60),
    "green": (38, 150, 70),
    "blue": (44, 106, 214),
    "purple": (132, 66, 178),
    "pink": (245, 140, 186),
    "white": (248, 248, 246),
}
_SKY = {"day": (150, 206, 243), "night": (24, 28, 66)}
_GROUND = {"meadow": (134, 196, 92), "beach": (240, 220, 164), "snow": (236, 242, 250), "desert": (228, 176, 102)}
_FAR = {"meadow": (98, 166, 86), "beach": (64, 140, 196), "snow": (168, 188, 214), "desert": (204, 142, 82)}
_NIGHT_GROUND, _NIGHT_THING = 0.42, 0.82


def _shade(rgb: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return tuple(round(channel * factor) for channel in rgb)  # type: ignore[return-value]


def _canvas() -> PILImage.Image:
    return PILImage.new("RGB", (SIDE * _SCALE, SIDE * _SCALE))


class _Pen:
    """Draws in picture pixels on the enlarged canvas; every shape gets an outline of about one pixel."""

    def __init__(self, canvas: PILImage.Image, outline: tuple[int, int, int] | None = None) -> None:
        self._draw, self._outline = ImageDraw.Draw(canvas), outline

    def _xy(self, points: tuple[float, ...]) -> list[float]:
        return [value * _SCALE for value in points]

    def ellipse(self, *box: float, fill: tuple[int, int, int]) -> None:
        self._draw.ellipse(self._xy(box), fill=fill, outline=self._outline, width=_SCALE)

    def box(self, *box: float, fill: tuple[int, int, int], radius: float = 0) -> None:
        self._draw.rounded_rectangle(self._xy(box), radius * _SCALE, fill=fill, outline=self._outline, width=_SCALE)

    def polygon(self, *points: float, fill: tuple[int, int, int]) -> None:
        self._draw.polygon(self._xy(points), fill=fill, outline=self._outline, width=_SCALE)

    def line(self, *points: float, fill: tuple[int, int, int], width: float) -> None:
        self._draw.line(self._xy(points), fill=fill, width=round(width * _SCALE), joint="curve")


@functools.cache
def _background(setting: str, time: str) -> PILImage.Image:
    night = time == "night"
    ground, far = _GROUND[setting], _FAR[setting]
    if night:
        ground, far = _shade(ground, _NIGHT_GROUND), _shade(far, _NIGHT_GROUND)
    canvas = _canvas()
    pen = _Pen(canvas)
    pen.box(0, 0, SIDE, SIDE, fill=_SKY[time])
    if night:
        pen.ellipse(48, 4, 60, 16, fill=(246, 240, 200))
        pen.ellipse(44.5, 2.5, 56, 14, fill=_SKY[time])
        for x, y in ((8, 8), (22, 4.5), (35, 10)):
            pen.ellipse(x - 0.9, y - 0.9, x + 0.9, y + 0.9, fill=(246, 240, 200))
    else:
        pen.ellipse(48, 4, 60, 16, fill=(255, 222, 89))
        for x, y, r in ((9, 10, 4), (14, 8, 5), (19, 10, 4)):
            pen.ellipse(x - r, y - r * 0.8, x + r, y + r * 0.8, fill=(250, 252, 255))
    if setting == "meadow":
        pen.ellipse(-22, 36, 40, 80, fill=far)
        pen.ellipse(28, 39, 92, 80, fill=far)
    elif setting == "beach":
        pen.box(0, 38, SIDE, 52, fill=far)
    elif setting == "snow":
        pen.polygon(-8, 50, 12, 28, 32, 50, fill=far)
        pen.polygon(20, 50, 44, 24, 70, 50, fill=far)
    else:
        pen.ellipse(-14, 40, 30, 70, fill=far)
        pen.ellipse(36, 37, 84, 74, fill=far)
    pen.box(-2, 48, SIDE + 2, SIDE + 2, fill=ground)
    return canvas


def _draw_thing(canvas: PILImage.Image, thing: Thing, place: str, time: str) -> None:
    dim = _NIGHT_THING if time == "night" else 1.0
    fill, x, y, h = _shade(_RGB[thing.color], dim), _CENTER_X[place], _BASE_Y, _HALF_WIDTH[thing.size]
    dark, wood, glass = _shade(fill, 0.5), _shade((122, 82, 48), dim), _shade((255, 244, 190), dim)
    pen = _Pen(canvas, outline=dark)
    if thing.kind == "ball":
        pen.ellipse(x - 0.9 * h, y - 1.8 * h, x + 0.9 * h, y, fill=fill)
        pen.ellipse(x - 0.45 * h, y - 1.45 * h, x - 0.05 * h, y - 1.05 * h, fill=_shade((255, 255, 255), dim))
    elif thing.kind == "house":
        pen.box(x - 0.75 * h, y - 1.15 * h, x + 0.75 * h, y, fill=fill)
        pen.polygon(x - h, y - 1.05 * h, x, y - 2 * h, x + h, y - 1.05 * h, fill=dark)
        pen.box(x - 0.5 * h, y - 0.75 * h, x - 0.05 * h, y, fill=wood)
        pen.box(x + 0.15 * h, y - 0.8 * h, x + 0.55 * h, y - 0.4 * h, fill=glass)
    elif thing.kind == "tree":
        pen.box(x - 0.2 * h, y - 0.8 * h, x + 0.2 * h, y, fill=wood)
        pen.polygon(x - 0.95 * h, y - 0.6 * h, x, y - 1.7 * h, x + 0.95 * h, y - 0.6 * h, fill=fill)
        pen.polygon(x - 0.7 * h, y - 1.15 * h, x, y - 2.1 * h, x + 0.7 * h, y - 1.15 * h, fill=fill)
    elif thing.kind == "boat":
        pen.polygon(x - h, y - 0.65 * h, x + h, y - 0.65 * h, x + 0.6 * h, y, x - 0.6 * h, y, fill=wood)
        pen.line(x, y - 0.65 * h, x, y - 2 * h, fill=dark, width=1.2)
        pen.polygon(x + 0.1 * h, y - 2 * h, x + 0.9 * h, y - 0.8 * h, x + 0.1 * h, y - 0.8 * h, fill=fill)
        pen.polygon(x - 0.1 * h, y - 1.75 * h, x - 0.8 * h, y - 0.8 * h, x - 0.1 * h, y - 0.8 * h, fill=fill)
    elif thing.kind == "car":
        pen.polygon(
            x - 0.6 * h, y - 0.7 * h, x - 0.4 * h, y - 1.25 * h, x + 0.35 * h, y - 1.25 * h, x + 0.65 * h, y - 0.7 * h,
            fill=glass,
        )  # fmt: skip
        pen.box(x - h, y - 0.8 * h, x + h, y - 0.2 * h, fill=fill, radius=0.15 * h)
        for wheel in (-0.55, 0.55):
            pen.ellipse(
                x + wheel * h - 0.27 * h, y - 0.5 * h, x + wheel * h + 0.27 * h, y, fill=_shade((60, 60, 66), dim)
            )
    elif thing.kind == "cat":
        pen.line(
            x + 0.6 * h, y - 0.3 * h, x + 0.9 * h, y - 0.6 * h, x + 0.85 * h, y - 1.2 * h, fill=dark, width=0.18 * h
        )
        pen.ellipse(x - 0.7 * h, y - h, x + 0.7 * h, y, fill=fill)
        for side in (-1, 1):
            pen.polygon(
                x + side * 0.6 * h, y - 1.3 * h, x + side * 0.55 * h, y - 2.05 * h, x + side * 0.05 * h, y - 1.6 * h,
                fill=fill,
            )  # fmt: skip
        pen.ellipse(x - 0.65 * h, y - 1.8 * h, x + 0.65 * h, y - 0.75 * h, fill=fill)
        eye = _Pen(canvas)
        for side in (-1, 1):
            eye.ellipse(
                x + side * 0.28 * h - 0.1 * h,
                y - 1.4 * h,
                x + side * 0.28 * h + 0.1 * h,
                y - 1.15 * h,
                fill=(30, 30, 34),
            )
    else:
        raise AssertionError(thing.kind)


@functools.lru_cache(maxsize=4096)
def _pixels(setting: str, time: str, things: tuple[tuple[str, Thing], ...]) -> np.ndarray:
    canvas = _background(setting, time).copy()
    for place, thing in things:
        _draw_thing(canvas, thing, place, time)
    pixels = np.asarray(canvas.reduce(_SCALE))
    pixels.setflags(write=False)
    return pixels


def draw(scene: Scene) -> PILImage.Image:
    """The picture of a scene: `SIDE` x `SIDE`, RGB."""
    return PILImage.fromarray(_pixels(scene.setting, scene.time, scene.things))


# --- reading --------------------------------------------------------------------------------------------------------


class Reader:
    """Finds the scene whose render is nearest to a picture in squared distance, exactly, over all scenes.

    Each thing stays inside its half of the picture, or alone in the middle, so the minimum over every pair of things
    is the sum of the minima of two halves: 97 candidates each, 96 in the middle, for 8 backgrounds. A pair of one kind,
    which no scene has, is excluded by taking the best pair of different kinds.
    """

    def __init__(self) -> None:
        self._things = all_things()
        self._kind = np.array([KINDS.index(thing.kind) for thing in self._things])
        half = SIDE // 2
        self._tables: list[tuple[str, str, dict[str, _Table], dict[str, _Table]]] = []
        for setting in SETTINGS:
            for time in TIMES:
                empty = _pixels(setting, time, ())
                renders = {
                    place: np.stack([_pixels(setting, time, ((place, thing),)) for thing in self._things]).astype(
                        np.float32
                    )
                    for place in PLACES
                }
                halves = {
                    "left": renders["left"][:, :, :half],
                    "right": renders["right"][:, :, half:],
                    "middle": renders["middle"],
                }
                blank = {"left": empty[:, :half].astype(np.float32), "right": empty[:, half:].astype(np.float32)}
                drawn = {place: _Table(table.reshape(len(self._things), -1)) for place, table in halves.items()}
                self._tables.append(
                    (setting, time, drawn, {place: _Table(b.reshape(1, -1)) for place, b in blank.items()})
                )

    def read(self, picture: PILImage.Image) -> Scene:
        """The nearest scene to a `SIDE` x `SIDE` picture (another size is scaled first)."""
        if picture.size != (SIDE, SIDE):
            picture = picture.resize((SIDE, SIDE), PILImage.Resampling.BOX)
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
        half = SIDE // 2
        parts = {
            "left": pixels[:, :half].reshape(-1),
            "right": pixels[:, half:].reshape(-1),
            "middle": pixels.reshape(-1),
        }
        best, found = np.inf, None
        for setting, time, drawn, blank in self._tables:
            distance = {place: drawn[place].distances(parts[place]) for place in PLACES}
            bare = {place: blank[place].distances(parts[place])[0] for place in ("left", "right")}
            pairs = distance["left"][:, None] + distance["right"][None, :]
            pairs[self._kind[:, None] == self._kind[None, :]] = np.inf
            left, right = np.unravel_index(np.argmin(pairs), pairs.shape)
            options = [
                (pairs[left, right], (("left", left), ("right", right))),
                *(
                    (distance[place].min() + rest, ((place, distance[place].argmin()),))
                    for place, rest in (("left", bare["right"]), ("right", bare["left"]), ("middle", 0.0))
                ),
            ]
            for score, things in options:
                if score < best:
                    best, found = score, Scene(setting, time, tuple((p, self._things[i]) for p, i in things))
        assert found is not None
        return found


class _Table:
    """Rows to compare a picture with."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows, self._norms = rows, (rows * rows).sum(1)

    def distances(self, row: np.ndarray) -> np.ndarray:
        """|a - b|^2 of every row and this one, expanded: one matrix-vector product."""
        return self._norms - 2 * (self._rows @ row) + row @ row
