"""The adapter section of a recipe: a few keys by name, and the branches that they mean."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from weft.adapters.config import Branch, MossConfig, Scaling
from weft.adapters.routing import Modal
from weft.config import Config
from weft.errors import AdapterError
from weft.ops.grid import WindowShape

Kind = Literal["lora", "moe_lora", "moss", "sam_conv_lora", "full", "full_two"]

_LOW_RANK = ("rank", "alpha", "dropout", "scaling")
USES: dict[Kind, tuple[str, ...]] = {
    "lora": _LOW_RANK,
    "moe_lora": _LOW_RANK,
    "moss": (*_LOW_RANK, "kernel", "window"),
    "sam_conv_lora": (*_LOW_RANK, "window", "experts", "gate"),
    "full": (),
    "full_two": (),
}
"""Which keys of a branch each kind has a use for."""
TWO_BRANCHES: dict[Kind, Kind] = {"lora": "moe_lora", "full": "full_two"}
"""Kinds with one branch for all positions -> their like with two."""
NORMS = ("norm",)
"""PEFT takes this for every module whose name ends in it: in a decoder stack all that has weights but is not linear."""

_RANK, _SCALE = 8, 2.0
_IMAGE: dict[Kind, dict[str, Any]] = {"moss": {"kernel": 2}, "sam_conv_lora": {"experts": (2, 4)}}
_NEUTRAL = {"kernel": 1, "dropout": 0.0}
"""Values that ask for nothing, so that every kind may have them."""


def _section(value: Any) -> Any:
    if value is not None and value != "none" and not isinstance(value, Mapping | Config):
        raise ValueError("it is a section with keys of its own, or none")
    return None if value == "none" else value


_OFF = BeforeValidator(_section)


class TextBranchConfig(Config):
    """Keys of one branch that differ from the adapter's; those left out are the adapter's."""

    rank: PositiveInt | None = None
    alpha: float | None = None
    dropout: float | None = None
    scaling: Scaling | None = None


class ImageBranchConfig(TextBranchConfig):
    """The same for pictures, whose positions form a grid."""

    kernel: PositiveInt | None = None
    window: WindowShape | None = None
    experts: tuple[PositiveInt, ...] | None = None
    """Kernels of the convolutions inside the rank space (sam_conv_lora only); left out, 2 and 4."""
    gate: Literal["token"] | None = None
    """Weigh the experts of each position by a softmax of its own (sam_conv_lora only)."""


class LayerConfig(Config):
    """What differs in some layers. `none`: no branch there."""

    text: Annotated[TextBranchConfig | None, _OFF] = TextBranchConfig()
    image: Annotated[ImageBranchConfig | None, _OFF] = ImageBranchConfig()


class AdapterConfig(Config):
    """The adapter section of a recipe."""

    kind: Kind = "moss"
    """`lora`: one branch for all. `moe_lora`: a linear one per modality. `moss`: a convolution for pictures.
    `sam_conv_lora`: convolutions inside the rank space of pictures.
    `full`: all weights of the decoder stack, as dense updates of its linear layers that start at zero, and its norms.
    `full_two`: the same with an update per modality: two sets of linear weights, one of norms. A backbone's embeddings
    and heads are outside its stack and stay frozen (docs/decisions/0007-full-fine-tuning-is-an-adapter.md)."""
    rank: PositiveInt | None = None
    """Left out, 8."""
    alpha: float | None = None
    """The update is multiplied by alpha / rank, or as `scaling` says; left out, by 2."""
    kernel: PositiveInt | None = None
    """Side of the picture branch's window, in patches (moss only); left out, 2."""
    dropout: float = 0.0
    """Of the branches' input."""
    window: WindowShape | None = None
    """`up_left`, the paper's; or `raster`, which also reads up-right patches, from kernel 3 on."""
    scaling: Scaling | None = None
    """`rank`: alpha / rank. `sqrt_rank`: alpha / sqrt(rank). `raw`: alpha."""
    targets: list[str] | str = "all-linear"
    """Which linear layers: names, a regular expression, or all of them."""
    exclude: list[str] | str | None = None
    """Which of them not: names or a regular expression."""
    layers: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    """Numbers of the decoder layers to adapt. None: all."""
    text: Annotated[TextBranchConfig | None, _OFF] = TextBranchConfig()
    """What differs for text positions. `none`: they keep the frozen layers' outputs."""
    image: Annotated[ImageBranchConfig | None, _OFF] = ImageBranchConfig()
    """What differs for pictures' positions. `none`: they keep the frozen layers' outputs."""
    patterns: dict[str, LayerConfig] = {}  # noqa: RUF012 - pydantic copies it
    """Regular expression, searched in the names of adapted layers -> what differs there. The last match decides."""
    routing: Literal["output", "input"] = "output"
    """A position takes the branch of what it predicts, as in the paper, or of what it reads."""
    context_images: Modal = "image"
    """Which branch the pictures of the context take, those that are given and not generated."""
    isolate_gradients: bool = False
    """The loss of text trains the text branches only, that of pictures theirs only; takes a second backward pass."""
    modules_to_save: list[str] | None = None
    """Ends of names of modules trained whole and saved with the adapter. None: with `full` and `full_two` the norms of
    the stack, otherwise nothing."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for place, section in self._sections():
            for key, value in section.items():
                if key not in USES[self.kind] and value != _NEUTRAL.get(key):
                    others = " or ".join(kind for kind, keys in USES.items() if key in keys)
                    raise ValueError(f"{place}{self.kind} has no {key}; use kind: {others}")
        other = TWO_BRANCHES.get(self.kind)
        image = [self.image, *(layer.image for layer in self.patterns.values())]
        if other and any(map(_said, image)):
            raise ValueError(f"{self.kind} has one branch for all positions, and none for pictures; use kind: {other}")
        if other and None not in image and (self.routing, self.context_images) != ("output", "image"):
            raise ValueError(f"{self.kind} has one branch for all positions, so nothing is routed; use kind: {other}")
        try:
            self.to_peft()
        except AdapterError as error:
            raise ValueError("; ".join(filter(None, (error.what, error.fix)))) from error
        return self

    def to_peft(self) -> MossConfig:
        """The same in PEFT's terms."""
        return MossConfig(
            target_modules=self.targets,
            exclude_modules=self.exclude,
            layers_to_transform=self.layers,
            modules_to_save=self._modules_to_save(),
            text=None if self.text is None else self._branch({}, self.text),
            image=self._image(),
            patterns={pattern: self._changes(layer) for pattern, layer in self.patterns.items()},
            routing=self.routing,
            context_images=self.context_images,
            isolate_gradients=self.isolate_gradients,
        )

    def _sections(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Where keys of branches are set, and those that are set there."""
        yield "", _said(self)
        yield "text: ", _said(self.text)
        yield "image: ", _said(self.image)
        for pattern, layer in self.patterns.items():
            yield f"patterns: {pattern}: text: ", _said(layer.text)
            yield f"patterns: {pattern}: image: ", _said(layer.image)

    def _modules_to_save(self) -> list[str] | None:
        if self.modules_to_save is None:
            return list(NORMS) if self.kind in ("full", "full_two") else None
        return self.modules_to_save or None

    def _image(self) -> Branch | Literal["text"] | None:
        if self.image is None:
            return None
        if self.kind in TWO_BRANCHES:
            return "text"
        return self._branch(_IMAGE.get(self.kind, {}) | self._window(), self.image)

    def _window(self) -> dict[str, Any]:
        return {key: value for key, value in _said(self).items() if key in ("kernel", "window")}

    def _branch(self, grid: dict[str, Any], *sections: TextBranchConfig | None) -> Branch:
        """The branch of the adapter's own keys, and over them those of its sections."""
        if not USES[self.kind]:
            return Branch("full")
        own = {key: value for key, value in _said(self).items() if key in _LOW_RANK}
        keys: dict[str, Any] = {"rank": _RANK, "scaling": "rank", **own, **grid}
        for section in sections:
            keys |= _said(section)
        if "alpha" not in keys:
            units = {"rank": keys["rank"], "sqrt_rank": math.sqrt(keys["rank"]), "raw": 1.0}
            keys["alpha"] = _SCALE * units[keys["scaling"]]
        return Branch(**keys)

    def _changes(self, layer: LayerConfig) -> dict[str, dict[str, Any] | None]:
        """What a pattern changes, as `MossConfig` wants it: fields of the branches, or None for no branch."""
        grid = _IMAGE.get(self.kind, {}) | self._window()
        changes: dict[str, dict[str, Any] | None] = {}
        for modality, here, there, own in (
            ("text", layer.text, self.text, {}), ("image", layer.image, self.image, grid),
        ):  # fmt: skip
            said = _said(here)
            if here is None:
                changes[modality] = None
            elif said:
                branch = asdict(self._branch(own, there, here))
                # alpha may follow from the rank; where there is no branch to change, this is a whole one
                follows = ("alpha",) if {"rank", "scaling"} & said.keys() else ()
                names = branch.keys() if there is None else {*said, *follows}
                changes[modality] = {name: branch[name] for name in names}
        return changes


def _said(section: Config | None) -> dict[str, Any]:
    """The keys of a branch that a section sets."""
    keys = {*ImageBranchConfig.model_fields}
    return {} if section is None else section.model_dump(include=keys, exclude_none=True)
