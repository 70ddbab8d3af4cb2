"""Which position takes which branch: the rule, and the state that carries it to every adapted layer of one model.

A position takes the branch of what its hidden state is decoded into: the image branch where it predicts a patch, the
text branch where it predicts a token, none where it is padding. So the position of `[IMG]` takes the image branch for
patch 0 and the position of the last patch takes the text branch.
Source: Xu et al. 2024 (arXiv:2407.03604), section 3.2.

The state is set before a forward and stays until the next one, so that activation checkpointing, which runs layers
again during backward, finds the same routes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.errors import RoutingError
from weft.layout import Modality, ModalityLayout


@dataclass(frozen=True)
class ImageGroup:
    """The pictures of a batch that share one grid."""

    grid: tuple[int, int]
    index: Tensor
    """(M, P) flat position (sequence * L + position) that predicts each patch; B * L where it is not there yet."""
    whole: bool
    """No picture of the group ends early, so `index` holds positions only."""


@dataclass(frozen=True)
class Routes:
    """Index lists of one forward over whole sequences, made once and used by every layer."""

    shape: tuple[int, int]
    text: Tensor
    """(T,) flat positions of the text branch."""
    images: tuple[ImageGroup, ...]


@dataclass(frozen=True)
class StepRoutes:
    """One cached decoding step of B rows, one position each. All (B,): every row is computed, whatever it takes."""

    shape: tuple[int, int]
    is_text: Tensor
    is_image: Tensor
    slots: Tensor
    """Cache slot."""
    place: Tensor
    """Raster index of the patch to be predicted, 0 where there is none."""
    cols: Tensor
    """Columns of its grid."""


class RingCache:
    """The conv branches' partial sums, one ring per adapted layer and adapter, for a fixed number of cache slots.

    Owned by whoever decodes; a slot must be reset when a picture starts in it.

    Args:
        columns: of the widest grid to be decoded.
    """

    def __init__(self, slots: int, columns: int) -> None:
        self.slots, self.columns = slots, columns
        self._rings: dict[tuple[int, str], Tensor] = {}

    def ring(self, layer: object, adapter: str, size: int, taps: Tensor, rank: int) -> Tensor:
        """(slots, size, rank) partial sums of one layer, zero at first, like `taps` in dtype and device."""
        key = (id(layer), adapter)
        if key not in self._rings:
            self._rings[key] = taps.new_zeros(self.slots, size, rank, requires_grad=False)
        return self._rings[key]

    def reset(self, slots: Sequence[int]) -> None:
        """Forget the partial sums of these slots."""
        if len(slots):
            for ring in self._rings.values():
                ring[list(slots)] = 0

    def reorder(self, order: Tensor) -> None:
        """Slot i takes what slot order[i] holds, as beams do."""
        for key, ring in self._rings.items():
            self._rings[key] = ring[order]


class RoutingState:
    """Shared by the adapted layers of one model; whoever runs the model sets it before each forward."""

    def __init__(self) -> None:
        self.routes: Routes | StepRoutes | None = None
        self.rings: RingCache | None = None

    def set(self, layout: ModalityLayout, rings: RingCache | None = None, slots: Tensor | None = None) -> None:
        """Give the layout of the coming forward.

        Args:
            rings: given in cached decoding, where every row of the batch feeds one position: (B, 1).
            slots: (B,) cache slot of each row, with `rings`.

        Raises:
            RoutingError: a picture does not start at its first patch or has a gap, without `rings`.
        """
        if rings is None:
            self.routes = route(layout)
        else:
            batch, length = layout.shape
            if length != 1:
                raise RoutingError(f"cached decoding feeds one position per row, got {length}")
            self.routes = route_step(layout, torch.arange(batch) if slots is None else slots)
        self.rings = rings

    def of(self, shape: torch.Size) -> Routes | StepRoutes:
        """The routes for a layer input of shape (B, L, C) or (B * L, C).

        Raises:
            RoutingError: no layout was set, or one for another number of positions.
        """
        if self.routes is None:
            raise RoutingError(
                "an adapted model was run without the layout of its input",
                fix="set it first: weft.adapters.routing_of(model).set(layout)",
            )
        batch, length = self.routes.shape
        if shape[:-1].numel() != batch * length:
            raise RoutingError(
                f"the layout describes {batch} x {length} positions, the model was given {tuple(shape[:-1])}",
                fix="set the layout of this very batch before the forward",
            )
        return self.routes

    def __deepcopy__(self, memo: dict[int, object]) -> "RoutingState":
        # routes belong to a forward of the original, not to the copy
        copy = memo[id(self)] = RoutingState()
        return copy


def route_step(layout: ModalityLayout, slots: Tensor) -> StepRoutes:
    """The rule for one cached decoding step, without looking at a value: shapes are those of the batch."""
    plane = layout.outputs
    modality, image = plane.modality[:, 0], plane.image[:, 0].clamp_min(0)
    if layout.grids.shape[1]:
        cols = layout.grids[torch.arange(len(image), device=image.device), image, 1]
    else:
        cols = torch.ones_like(image)
    place = (plane.row[:, 0] * cols + plane.col[:, 0]).clamp_min(0)
    return StepRoutes(layout.shape, modality == Modality.TEXT, modality == Modality.IMAGE, slots, place, cols)


def route(layout: ModalityLayout) -> Routes:
    """The rule: index lists of the branches for whole sequences."""
    plane = layout.outputs
    batch, length = layout.shape
    modality = plane.modality.reshape(-1)
    text = (modality == Modality.TEXT).nonzero().squeeze(1)
    index = (modality == Modality.IMAGE).nonzero().squeeze(1)
    if not len(index):
        return Routes((batch, length), text, ())
    sequence, image = index // length, plane.image.reshape(-1)[index]
    rows, cols = layout.grids[sequence, image].unbind(-1)
    place = plane.row.reshape(-1)[index] * cols + plane.col.reshape(-1)[index]
    first = place == 0
    follows = torch.ones_like(first)
    # each patch is predicted by the position right after the one that predicts the patch before it
    follows[1:] = (place[1:] == place[:-1] + 1) & (index[1:] == index[:-1] + 1) & (image[1:] == image[:-1])
    wrong = (~(first | follows)).nonzero()
    if len(wrong) or not first[0]:
        at = index[wrong[0, 0] if len(wrong) else 0].item()
        raise RoutingError(
            f"sequence {at // length}, position {at % length}: a picture does not start at its first patch",
            fix="feed whole pictures, or decode with rings",
        )
    groups = []
    number = first.cumsum(0) - 1
    size_of = torch.stack((rows, cols), 1)[first]
    for grid in size_of.unique(dim=0).tolist():
        members = (size_of == torch.tensor(grid, device=index.device)).all(1)
        taken = members[number]
        patches = grid[0] * grid[1]
        table = index.new_full((int(members.sum()), patches), batch * length)
        table[(members.cumsum(0) - 1)[number[taken]], place[taken]] = index[taken]
        groups.append(ImageGroup((grid[0], grid[1]), table, whole=int(taken.sum()) == table.numel()))
    return Routes((batch, length), text, tuple(groups))
