"""What is learnt: the position before a target predicts it, text by the text head, patches by the picture head.

    loss = mean over text and image targets of cross-entropy

as for discrete pictures in Xu et al. 2024 (arXiv:2407.03604). The two parts are reported apart. Knows no optimizer.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.backbones.base import Backbone
from weft.data.collate import IGNORED, Batch
from weft.layout import Modality


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies, in nats; None where there is no such target."""

    text: float | None
    image: float | None
    text_targets: int
    image_targets: int

    @classmethod
    def of(cls, sums: Tensor, counts: Tensor) -> "Losses":
        """From (2,) summed cross-entropies and (2,) numbers of targets: text, image."""
        (text, image), (texts, images) = sums.tolist(), counts.tolist()
        return cls(text / texts if texts else None, image / images if images else None, texts, images)

    @property
    def total(self) -> float | None:
        """Over all targets alike: what is minimised."""
        targets = self.text_targets + self.image_targets
        summed = (self.text or 0.0) * self.text_targets + (self.image or 0.0) * self.image_targets
        return summed / targets if targets else None


class Objective(nn.Module):
    """A batch -> (2,) summed cross-entropies of its text and image targets.

    A module, so that what wraps modules (distributed training) sees the whole forward.
    """

    def __init__(self, backbone: Backbone, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.backbone, self.precision = backbone, precision

    def forward(self, batch: Batch) -> Tensor:
        reduced = self.precision != torch.float32
        with torch.autocast(batch.ids.device.type, dtype=self.precision, enabled=reduced):
            hidden = self.backbone.forward(self.backbone.embed(batch.ids, batch.layout), batch.layout)
            heads = ((self.backbone.text_logits, Modality.TEXT), (self.backbone.image_logits, Modality.IMAGE))
            return torch.stack([_summed(head, hidden, batch, modality) for head, modality in heads])


def count_targets(batch: Batch) -> Tensor:
    """(2,) numbers of text and image targets."""
    return torch.stack([_is_target(batch, modality).sum() for modality in (Modality.TEXT, Modality.IMAGE)])


@torch.no_grad()
def evaluate_loss(objective: nn.Module, batches: Iterable[Batch]) -> Losses:
    """Losses over all targets of several batches, as they are now; dropout is whatever the model's mode says."""
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for batch in batches:
        sums += objective(batch).double().cpu()
        counts += count_targets(batch).cpu()
    return Losses.of(sums, counts)


def _is_target(batch: Batch, modality: Modality) -> Tensor:
    return (batch.labels != IGNORED) & (batch.layout.outputs.modality == modality)


def _summed(head: Callable[[Tensor], Tensor], hidden: Tensor, batch: Batch, modality: Modality) -> Tensor:
    # heads are wide: they are applied where something is learnt and nowhere else
    chosen = _is_target(batch, modality)
    return F.cross_entropy(head(hidden[chosen]).float(), batch.labels[chosen], reduction="sum")
