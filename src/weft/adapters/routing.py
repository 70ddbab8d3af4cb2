"""Which position takes which branch: the rule, and the state that carries it to every adapted layer of one model.

A position takes the branch of what its hidden state is decoded into: the image branch where it predicts a patch, the
text branch where it predicts a token, none where it is padding. So the position of `[IMG]` takes the image branch for
patch 0 and the position of the last patch takes the text branch.
Source: Xu et al. 2024 (arXiv:2407.03604), section 3.2; `Rule` holds our options.

The state is set before a forward and stays until the next one, so that activation checkpointing, which runs layers
again during backward, finds the same routes.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from weft.adapters.rings import RingCache, StepTables, step_tables
from weft.errors import RoutingError
from weft.layout import Modality, ModalityLayout
from weft.ops.autograd_time import autograd_time, in_backward_of_earlier
from weft.ops.grid import Patches, Window

Modal = Literal["image", "text", "none"]
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rule:
    """The routing options of an adapter."""

    routing: Literal["output", "input"] = "output"
    """By what a position predicts, as in the paper, or by what it reads."""
    context_images: Modal = "image"
    """What the patches of pictures that are given, not generated, take."""


@dataclass(frozen=True)
class Routes:
    """Index lists of one forward over whole sequences, made once and used by every layer."""

    like: Tensor
    """(B, L); only its shape counts, which as a tensor's may vary in one compiled graph, as numbers may not."""
    text: Tensor
    """(T,) flat positions (sequence * L + position) of the text branch."""
    image: Tensor
    """(n,) flat positions of the image branch, the rows of `patches`."""
    patches: Patches

    @property
    def shape(self) -> torch.Size:
        """(B, L)."""
        return self.like.shape

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def all_text(self) -> bool:
        """Every position, padding included, takes the text branch."""
        return len(self.text) == self.like.numel()


@dataclass(frozen=True)
class StepRoutes:
    """One cached decoding step of B rows, one position each. Shapes depend on B alone, so that it can be captured."""

    shape: tuple[int, int]
    is_text: Tensor
    """(B,)"""
    is_image: Tensor
    """(B,)"""
    only: Literal["text", "image"] | None
    """What every row takes, where that was known without asking the device: the other branch is then left out."""
    tables: dict[str, StepTables]
    """By the window's name."""

    @property
    def device(self) -> torch.device:
        return self.is_text.device


class RoutingState:
    """Shared by the adapted layers of one model; whoever runs the model sets it before each forward.

    Attributes:
        rings: of the step being run, in cached decoding.
        stash: what the first of several layers with one input has computed for the others (`project.py`).
    """

    def __init__(self) -> None:
        self.rings: RingCache | None = None
        self.stash: Any = None
        self._rules: dict[str, Rule] = {}
        self._windows: tuple[Window, ...] = ()
        self._routes: dict[str, Routes | StepRoutes] = {}
        self._text_only = False
        self._fresh = False
        self._since = 0

    def register(self, adapter: str, rule: Rule, windows: Sequence[Window]) -> None:
        """Let a named adapter be routed by `rule`, with tables for its windows."""
        self._rules[adapter] = rule
        self._windows = tuple(dict.fromkeys((*self._windows, *windows)))

    def unregister(self, adapter: str) -> None:
        """Forget an adapter that was deleted."""
        self._rules.pop(adapter, None)

    def set(self, layout: ModalityLayout, rings: RingCache | None = None, slots: Tensor | None = None) -> None:
        """Give the layout of the coming forward.

        Args:
            rings: given in cached decoding, where every row of the batch feeds one position: (B, 1).
            slots: (B,) cache slot of each row, with `rings`; in order if left out.

        Raises:
            RoutingError: a picture does not start at its first patch, has a gap or ends early, without `rings`.
        """
        batch, length = layout.shape
        rules = self._rules or {"default": Rule()}
        routes: dict[Rule, Routes | StepRoutes]
        if rings is None:
            routes = {rule: route(layout, rule, self._windows) for rule in dict.fromkeys(rules.values())}
        elif length != 1:
            raise RoutingError(
                f"cached decoding feeds one position per row, got {length}",
                fix="pass layout[t : t + 1] of each step, or leave the rings out for whole sequences",
            )
        else:
            device = layout.outputs.modality.device
            slots = torch.arange(batch, device=device) if slots is None else slots
            routes = {
                rule: route_step(layout, slots, rings, rule, self._windows) for rule in dict.fromkeys(rules.values())
            }
        self._routes = {name: routes[rule] for name, rule in rules.items()}
        self.rings, self.stash, self._fresh = rings, None, True
        self._since = autograd_time()

    def begin(self, layout: ModalityLayout | None, active: Sequence[str] | None = None) -> None:
        """A forward of the whole model starts, with this layout or the one that was set for it.

        Args:
            active: the adapters in use; None: all.

        Raises:
            RoutingError: neither: the layout of the forward before would be taken for this one's.
        """
        if not any(name in self._rules for name in (self._rules if active is None else active)):
            self._fresh = False  # nothing to route, and the next forward is another one
            return
        if layout is not None:
            self.set(layout)
        if not (self._fresh or self._text_only):
            raise RoutingError(
                "an adapted model was run without the layout of its input",
                fix="call model(..., layout=layout), or weft.adapters.routing_of(model).set(layout) before each call",
            )
        if not self._fresh:
            self._routes, self.rings = {}, None
        self._fresh = False
        if not torch.compiler.is_compiling():
            self._since = autograd_time()

    @contextlib.contextmanager
    def text_only(self) -> Iterator[None]:
        """Within the block, a forward without a layout is one of text alone, padding included.

        A layout that was set before the block, and not used, is forgotten.
        """
        before, self._text_only, self._fresh = self._text_only, True, False
        try:
            yield
        finally:
            self._text_only = before
            if not before:
                self._routes = {}

    def of(self, adapter: str, shape: torch.Size, device: torch.device = _CPU) -> Routes | StepRoutes:
        """The routes for a layer input of shape (B, L, C) or (B * L, C) on this device.

        Raises:
            RoutingError: no layout was set, or one for another number of positions or on another device, or one after
                the forward that activation checkpointing runs again.
        """
        if not torch.compiler.is_compiling() and in_backward_of_earlier(self._since):
            raise RoutingError(
                "a layer runs again for the backward of one forward, and the layout of a later one was set since",
                fix="call backward before the next forward, or give gradient checkpointing use_reentrant=False and "
                "context_fn=routing_of(model).checkpoint_context",
            )
        routes = self._routes.get(adapter)
        if routes is None and self._text_only:
            routes = self._routes[adapter] = _text_routes(shape, device, self._windows)
        if routes is None:
            raise RoutingError(
                "an adapted model was run without the layout of its input",
                fix="set it first: weft.adapters.routing_of(model).set(layout)",
            )
        batch, length = routes.shape
        if shape[:-1] != routes.shape and (len(shape) != 2 or shape[0] != batch * length):
            raise RoutingError(
                f"the layout describes {batch} x {length} positions, the model was given {tuple(shape[:-1])}",
                fix="set the layout of this very batch before the forward",
            )
        if routes.device != device:
            raise RoutingError(
                f"the layout is on {routes.device}, the model's input on {device}",
                fix="move it to the model first: layout.to(device)",
            )
        return routes

    def checkpoint_context(self) -> tuple[Any, Any]:
        """`context_fn` of torch's checkpointing: layers run again in backward find the routes of their own forward,
        also where another forward came in between."""
        return contextlib.nullcontext(), _Restored(self)

    def __deepcopy__(self, memo: dict[int, object]) -> "RoutingState":
        # routes belong to a forward of the original, not to the copy
        copy = memo[id(self)] = RoutingState()
        copy._rules, copy._windows = dict(self._rules), self._windows
        return copy


class _Restored:
    """Within it, a state is as it was for the forward in which this was made. Entered by every backward through it."""

    def __init__(self, state: RoutingState) -> None:
        self._state = state
        self._own = {name: getattr(state, name) for name in ("_routes", "rings", "_text_only")}
        self._own |= {"stash": None, "_since": 0}

    def __enter__(self) -> None:
        self._later = {name: getattr(self._state, name) for name in self._own}
        vars(self._state).update(self._own)

    def __exit__(self, *_: object) -> None:
        vars(self._state).update(self._later)


def _text_routes(shape: torch.Size, device: torch.device, windows: tuple[Window, ...]) -> Routes:
    every = torch.arange(math.prod(shape[:-1]), device=device)
    none = every[:0]
    return Routes(every.view(shape[0], -1), every, none, Patches.of((), none, none, none.new_empty(0, 2), windows))


def route_step(
    layout: ModalityLayout, slots: Tensor, rings: RingCache, rule: Rule = Rule(), windows: Sequence[Window] = ()
) -> StepRoutes:
    """The rule for one cached decoding step. On an accelerator no value is looked at."""
    plane = layout.outputs if rule.routing == "output" else layout.inputs
    modality, image = plane.modality[:, 0], plane.image[:, 0].clamp_min(0)
    is_text, is_image = modality == Modality.TEXT, modality == Modality.IMAGE
    if layout.grids.shape[1]:
        rows = torch.arange(len(image), device=image.device)
        cols, given = layout.grids[rows, image, 1].clamp_min(1), layout.given[rows, image]
    else:
        cols, given = torch.ones_like(image), torch.zeros_like(is_image)
    is_image, is_text = _give(is_image, is_text, given, rule)
    only: Literal["text", "image"] | None = None
    if modality.device.type == "cpu":
        too_wide = is_image & (cols > rings.columns)
        if windows and bool(too_wide.any()):
            at = int(too_wide.nonzero()[0])
            raise RoutingError(
                f"row {at} writes a picture of {int(cols[at])} columns, the rings hold {rings.columns}",
                fix="make the RingCache as wide as the widest grid to be decoded",
            )
        only = "text" if bool(is_text.all()) else "image" if bool(is_image.all()) else None
    place = (plane.row[:, 0] * cols + plane.col[:, 0]).clamp_min(0)
    tables = {w.name: step_tables(w, rings, slots, place, cols, is_image) for w in windows}
    return StepRoutes(layout.shape, is_text, is_image, only, tables)


def _give(is_image: Tensor, is_text: Tensor, given: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """(is_image, is_text) after the rule for pictures that are given."""
    if rule.context_images == "image":
        return is_image, is_text
    moved = is_image & given
    return is_image & ~moved, is_text | moved if rule.context_images == "text" else is_text


def route(layout: ModalityLayout, rule: Rule = Rule(), windows: Sequence[Window] = ()) -> Routes:
    """The rule: index lists of the branches for whole sequences.

    Raises:
        RoutingError: names the sequence and the position where the layout is malformed.
    """
    plane = layout.outputs if rule.routing == "output" else layout.inputs
    batch, length = layout.shape
    modality, flat_image = plane.modality.reshape(-1), plane.image.reshape(-1)
    is_text, is_image = modality == Modality.TEXT, modality == Modality.IMAGE
    index = is_image.nonzero().squeeze(1)
    if not len(index):
        none = Patches.of((), index, index, index.new_zeros(0, 2), tuple(windows))
        return Routes(plane.modality, is_text.nonzero().squeeze(1), index, none)
    sequence, image = index // length, flat_image[index]
    _check(~((image >= 0) & (image < layout.grids.shape[1])), index, length, "a patch of a picture without a grid")
    grid = layout.grids[sequence, image]
    row, col = plane.row.reshape(-1)[index], plane.col.reshape(-1)[index]
    inside = (row >= 0) & (col >= 0) & (row < grid[:, 0]) & (col < grid[:, 1])
    _check(~inside, index, length, "a patch outside its picture's grid")
    place = row * grid[:, 1] + col
    begins = _check_runs(index, sequence, image, place, grid, is_text, (batch, length))
    if rule.context_images != "image":
        is_image, is_text = _give(is_image, is_text, _at(layout.given[sequence, image], index, is_image), rule)
        keep = ~layout.given[sequence, image]
        index, place, grid, begins = index[keep], place[keep], grid[keep], begins[keep]
    # pictures of one grid follow each other, so that they can be convolved together
    number = begins.cumsum(0) - 1
    size_of = grid[begins]
    whole = torch.bincount(number, minlength=len(size_of)) == size_of.prod(1)
    groups: tuple[tuple[tuple[int, int], int], ...] = ()
    if bool(whole.all()) and len(size_of):
        sizes, which, counts = size_of.unique(dim=0, return_inverse=True, return_counts=True)
        groups = tuple(((h, w), m) for (h, w), m in zip(sizes.tolist(), counts.tolist(), strict=True))
        order = which[number].argsort(stable=True)
        index, place, grid = index[order], place[order], grid[order]
    first = torch.arange(len(index), device=index.device) - place
    text = is_text.nonzero().squeeze(1)
    return Routes(plane.modality, text, index, Patches.of(groups, first, place, grid, tuple(windows)))


def _at(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Boolean `values` of the positions `index`, spread over all positions."""
    return torch.zeros_like(like).index_put_((index,), values)


def _check_runs(
    index: Tensor, sequence: Tensor, image: Tensor, place: Tensor, grid: Tensor, is_text: Tensor, shape: tuple[int, int]
) -> Tensor:
    """(n,) bool, True where a picture begins; every picture is one run of positions that only padding may cut short."""
    length = shape[1]
    begins = place == 0
    follows = torch.zeros_like(begins)
    follows[1:] = (
        (place[1:] == place[:-1] + 1)
        & (index[1:] == index[:-1] + 1)
        & (image[1:] == image[:-1])
        & (sequence[1:] == sequence[:-1])
    )
    _check(~(begins | follows), index, length, "a picture does not start at its first patch, or has a gap")
    ends = torch.ones_like(begins)
    ends[:-1] = ~follows[1:]
    short = ends & (place + 1 < grid.prod(1))
    # an unfinished picture is fine where nothing but padding comes after it
    real = is_text.index_fill(0, index, True).view(shape)
    last = (real * torch.arange(length, device=index.device)).amax(1)
    goes_on = index % length < last[sequence]
    _check(short & goes_on, index, length, "an unfinished picture that is not at the end of its sequence")
    return begins


def _check(wrong: Tensor, index: Tensor, length: int, what: str) -> None:
    if bool(wrong.any()):
        at = int(index[wrong][0])
        raise RoutingError(
            f"sequence {at // length}, position {at % length}: {what}", fix="feed whole pictures, or decode with rings"
        )
