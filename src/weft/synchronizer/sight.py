"""What the rows of a batch see: pictures through an eye, and which position reads which of them.

    pixels (M, 3, side, side) --eye--> Looks --see--> ModalityLayout.sight --show--> the branches in the decoder stack

The layout carries it, so that whoever runs a decoder stack says what its positions are and what they see in one go.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from weft.errors import RoutingError
from weft.layout import FEATURE, ModalityLayout
from weft.synchronizer.attach import Branch, Insertion, Kept
from weft.synchronizer.mmfs import FeatureBank, MMFSConfig
from weft.synchronizer.visibility import begins_of, seen_by_positions


@dataclass(frozen=True)
class Looks:
    """What an eye makes of M pictures."""

    maps: tuple[Tensor, ...]
    """(M, F, rows, cols) for every scale, fine to coarse."""
    tokens: Tensor | None = None
    """(M, P, D) what stands for each picture in the sequence, where that is no code."""

    def split(self) -> "list[Looks]":
        """Of every picture by itself."""
        tokens = [None] * len(self.maps[0]) if self.tokens is None else self.tokens.split(1)
        maps = zip(*(scale.split(1) for scale in self.maps), strict=True)
        return [Looks(of_one, token) for of_one, token in zip(maps, tokens, strict=True)]

    @classmethod
    def joined(cls, looks: "Sequence[Looks]") -> "Looks":
        tokens = [each.tokens for each in looks if each.tokens is not None]
        maps = zip(*(each.maps for each in looks), strict=True)
        return cls(tuple(torch.cat(scale) for scale in maps), torch.cat(tokens) if tokens else None)


@dataclass(frozen=True)
class Sight:
    """What the positions of a batch see."""

    bank: FeatureBank | Kept | None
    """The pictures of each sequence; None: there is none in the whole batch."""
    visible: Tensor | None
    """(B, L, N) bool."""

    def __getitem__(self, positions: slice) -> "Sight":
        """A run of positions, every sequence."""
        return Sight(self.bank, None if self.visible is None else self.visible[:, positions])


NOTHING = Sight(None, None)


@dataclass(frozen=True)
class Synchronizer:
    """An eye, and the branches of a decoder stack that read what it sees."""

    eye: nn.Module
    """(M, 3, side, side) float in [0, 1] -> `Looks`."""
    insertion: Insertion
    side: int
    """Of the pictures that the eye takes, in pixels."""
    sees_itself: bool = False
    """The elements of a picture see it: where it is painted at once, and they are what was made of it."""

    @property
    def sides(self) -> tuple[int, ...]:
        """The scales that the branches read, by the sides of their maps."""
        return self._mmfs.sides

    @property
    def _mmfs(self) -> MMFSConfig:
        return cast(Branch, next(iter(self.insertion.branches.values()))).mmfs.config

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part, module in (("eye", self.eye), ("branches", self.insertion.branches)):
            yield from ((f"{part}.{name}", parameter) for name, parameter in module.named_parameters())

    def look(self, pixels: Tensor) -> Looks:
        """(M, 3, side, side) uint8."""
        weight = next(self.insertion.parameters())
        return cast(Looks, self.eye(pixels.to(weight.device, weight.dtype) / 255))

    def bank_of(self, looks: Looks) -> FeatureBank:
        """Every picture by itself: (M, 1, V, F), in the scales that the branches read."""
        sides = self.sides
        read = [scale.unsqueeze(1) for scale in looks.maps if scale.shape[2] in sides]
        if tuple(scale.shape[3] for scale in read) != sides:
            found = [tuple(scale.shape[2:]) for scale in looks.maps]
            raise RoutingError(f"the branches read maps with sides {sides}, the eye gives {found}")
        return FeatureBank.of_maps(read)

    def show(self, layout: ModalityLayout) -> None:
        """Give the branches what the coming forward reads.

        Raises:
            RoutingError: the layout has pictures, and it was not said who sees them.
        """
        sight = layout.sight
        if sight is None and layout.grids.shape[1]:
            raise RoutingError(
                "a model with synchronisers was given pictures without what they look like",
                fix="make the layout with see(synchronizer, pixels, ids, layout, begin)",
            )
        if sight is not None and sight.bank is not None:
            assert sight.visible is not None
            self.insertion.set(sight.bank, sight.visible)
        elif self._mmfs.without_images == "zero":
            self.insertion.set_without_pictures()
        else:  # a bias is added all the same
            hidden = layout.grids.new_zeros(*layout.shape, 1, dtype=torch.bool)
            self.insertion.set(self.blank_bank(len(hidden), 1), hidden)

    def blank_bank(self, batch: int, pictures: int) -> FeatureBank:
        """(B, N, V, F) zeros: room for pictures, or one that nobody sees."""
        shapes = tuple((side, side) for side in self.sides)
        cells = sum(side * side for side in self.sides)
        weight = next(self.insertion.parameters())
        return FeatureBank(weight.new_zeros(batch, pictures, cells, self._mmfs.feature_width), shapes)


def see(
    synchronizer: Synchronizer, pixels: Tensor | None, ids: Tensor, layout: ModalityLayout, begin: int
) -> tuple[ModalityLayout, Tensor | None, Looks | None]:
    """Look at the pictures of a batch.

    Args:
        pixels: (M, 3, side, side) uint8, sequence by sequence in order; None: there are none.
        ids: (B, L) element ids.
        begin: the id with which a document starts: what stands before it is not seen after it.

    Returns:
        The layout with what is seen; (B, L, D) the vectors of `FEATURE` elements, if pictures are such; and the looks.

    Raises:
        RoutingError: the layout has another number of pictures.
    """
    begins = begins_of(layout)
    is_there = begins < layout.shape[1]
    found, wanted = 0 if pixels is None else len(pixels), int(is_there.sum())
    if found != wanted:
        raise RoutingError(
            f"{found} pictures were given for {wanted} in the sequences", fix="give one for each, in their order"
        )
    if pixels is None:
        return layout.seeing(NOTHING), None, None
    looks = synchronizer.look(pixels)
    of_each = synchronizer.bank_of(looks)
    # one that is not there is never read
    features = of_each.features.new_zeros(*is_there.shape, *of_each.features.shape[2:])
    features[is_there] = of_each.features[:, 0]
    lengths = None if synchronizer.sees_itself else layout.grids.prod(-1)
    visible = seen_by_positions(ids == begin, begins, lengths)
    layout = layout.seeing(Sight(FeatureBank(features, of_each.shapes), visible))
    return layout, vectors_of(looks, ids), looks


def vectors_of(looks: Looks, ids: Tensor) -> Tensor | None:
    """(B, L, D) the tokens of pictures where the ids are `FEATURE`, zero elsewhere; None where they are codes.

    Raises:
        RoutingError: there are more or fewer such places.
    """
    if looks.tokens is None:
        return None
    rows, places = looks.tokens.flatten(0, 1), ids == FEATURE
    if len(rows) != int(places.sum()):
        raise RoutingError(
            f"{len(looks.tokens)} pictures have {len(rows)} vectors, the sequences have {int(places.sum())} places",
            fix="give one picture for each, in their order",
        )
    vectors = rows.new_zeros(*ids.shape, rows.shape[1])
    vectors[places] = rows
    return vectors
