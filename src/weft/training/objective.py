"""What is learnt: the position before a target predicts it, text by the text head, pictures by the picture head.

    discrete     loss = mean over text and picture targets of cross-entropy, pictures counting `image_weight` times
    continuous   loss = mean over text targets of cross-entropy
                      + image_weight * mean over picture targets of ||predicted - target||^2 / width   (or 1 - cosine)

    diffusion    the same with pictures painted at once, each target counting
                      the mean over its latents of (predicted noise - noise)^2

as in Xu et al. 2024 (arXiv:2407.03604) and, the last, Tian et al. 2024 (arXiv:2401.10208). The two parts are reported
apart. Knows no optimizer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn
from torch.nn import functional as F

from weft.backbones.base import Backbone, Painter
from weft.config import Config
from weft.data.collate import IGNORED, Batch
from weft.layout import FEATURE, Modality
from weft.synchronizer.sight import Looks, see

Regression = Literal["mse", "cosine"]


class CorruptionConfig(Config):
    """Noise on the vectors that a model of continuous pictures reads while it learns to write them.

    Neighbouring vectors predict each other, so that without it a low loss says nothing about what the model writes from
    its own vectors, whose small errors add up.
    """

    noise: NonNegativeFloat = 0.3
    """Standard deviation of what is added, as a share of each vector's own."""
    replaced: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Up to this share of a picture's vectors is replaced by noise; how many is drawn for each picture."""


class LossConfig(Config):
    """What is minimised."""

    image_weight: NonNegativeFloat = 1.0
    """Of pictures, where that of text is 1."""
    regression: Regression = "mse"
    """Of pictures as vectors; others are not concerned."""
    corruption: CorruptionConfig | None = None
    """Of pictures as vectors, while training."""


@dataclass(frozen=True)
class Losses:
    """Means over targets: cross-entropies in nats, or errors of vectors; None where there is no such target."""

    text: float | None
    image: float | None
    text_targets: int
    image_targets: int
    total: float | None
    """What is minimised."""

    @classmethod
    def of(cls, sums: Tensor, counts: Tensor, weights: Tensor) -> "Losses":
        """From (2,) summed losses, (2,) numbers of targets and what `Objective.weights` says: text, image."""
        (text, image), (texts, images) = sums.tolist(), counts.tolist()
        total = float((sums.double() * weights.double()).sum()) if counts.any() else None
        return cls(text / texts if texts else None, image / images if images else None, texts, images, total)


class Objective(nn.Module):
    """A batch -> (2,) summed losses of its text and image targets.

    A module, so that what wraps modules (distributed training) sees the whole forward.
    """

    def __init__(
        self, backbone: Backbone, precision: torch.dtype = torch.float32, config: LossConfig = LossConfig()
    ) -> None:
        super().__init__()
        self.backbone, self.precision, self.config = backbone, precision, config

    def forward(self, batch: Batch) -> Tensor:
        reduced = self.precision != torch.float32
        features = batch.features
        if features is not None and self.config.corruption is not None and self.backbone.decoder.training:
            features = corrupt(batch, self.config.corruption)
        with torch.autocast(batch.ids.device.type, dtype=self.precision, enabled=reduced):
            layout, looks, synchronizer = batch.layout, None, self.backbone.synchronizer
            if synchronizer is not None:
                pixels = None if batch.pictures is None else batch.pictures.seen
                layout, vectors, looks = see(synchronizer, pixels, batch.ids, layout, self.backbone.tokens.begin)
                features = features if vectors is None else vectors
            embeds = self.backbone.embed(batch.ids, layout, features)
            hidden = self.backbone.forward(embeds, layout)
            return torch.stack([self._text(hidden, batch), self._image(hidden, batch, looks)])

    def weights(self, counts: Tensor) -> Tensor:
        """(2,) numbers of targets -> (2,) what the summed losses are multiplied by."""
        weights = torch.tensor([1.0, self.config.image_weight], device=counts.device)
        # cross-entropies are of one kind: all targets count alike; an error of vectors or noise is a term of its own
        return weights / (counts.sum() if self.backbone.kind == "discrete" else counts).clamp_min(1)

    def _text(self, hidden: Tensor, batch: Batch) -> Tensor:
        # heads are wide: they are applied where something is learnt and nowhere else
        chosen = _is_target(batch, Modality.TEXT)
        logits = self.backbone.text_logits(hidden[chosen])
        return F.cross_entropy(logits.float(), batch.labels[chosen], reduction="sum")

    def _image(self, hidden: Tensor, batch: Batch, looks: Looks | None) -> Tensor:
        if self.backbone.kind == "diffusion":
            if looks is None or batch.pictures is None or batch.pictures.painted is None:
                return hidden.sum() * 0
            errors = cast(Painter, self.backbone).painting_errors(
                hidden, batch.ids, batch.layout, looks, batch.pictures.painted
            )
            return errors.sum()
        chosen = _is_target(batch, Modality.IMAGE)
        if self.backbone.kind == "discrete":
            logits = self.backbone.image_logits(hidden[chosen])
            codes = batch.labels[chosen] - self.backbone.vocabulary
            return F.cross_entropy(logits.float(), codes, reduction="sum")
        predicted = self.backbone.image_features(hidden[chosen]).float()
        if batch.features is None:
            return predicted.sum()  # no target: zero, that gradients reach
        target = batch.features.roll(-1, dims=1)[chosen].float()  # no target stands first
        return regression(predicted, target, self.config.regression).sum()


def regression(predicted: Tensor, target: Tensor, kind: Regression) -> Tensor:
    """(n, F) twice -> (n,): ||predicted - target||^2 / F, or 1 - the cosine of their angle."""
    if kind == "mse":
        return (predicted - target).square().mean(-1)
    return 1 - F.cosine_similarity(predicted, target, dim=-1)


def corrupt(batch: Batch, config: CorruptionConfig) -> Tensor:
    """The batch's features (B, L, F), those of pictures to be learnt made noisy. Drawn from torch's own generator."""
    features, layout = batch.features, batch.layout
    assert features is not None
    image = layout.inputs.image.clamp_min(0)
    to_learn = (batch.ids == FEATURE) & ~layout.given.gather(1, image)
    share = torch.rand(layout.given.shape, device=features.device) * config.replaced
    is_replaced = torch.rand(batch.ids.shape, device=features.device) < share.gather(1, image)
    spread = features.std(-1, keepdim=True)
    noise = torch.randn_like(features) * spread
    noisy = torch.where(is_replaced.unsqueeze(-1), noise, features + config.noise * noise)
    return torch.where(to_learn.unsqueeze(-1), noisy, features)


def count_targets(batch: Batch) -> Tensor:
    """(2,) numbers of text and image targets: elements, or whole pictures where these are painted at once."""
    text, image = (_is_target(batch, modality).sum() for modality in (Modality.TEXT, Modality.IMAGE))
    if batch.pictures is not None and batch.pictures.painted is not None:
        image = image.new_tensor(len(batch.pictures.painted))
    return torch.stack([text, image])


@torch.no_grad()
def evaluate_loss(objective: Objective, batches: Iterable[Batch]) -> Losses:
    """Losses over all targets of several batches, as they are now; dropout is whatever the model's mode says."""
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for batch in batches:
        sums += objective(batch).double().cpu()
        counts += count_targets(batch).cpu()
    return Losses.of(sums, counts, objective.weights(counts))


def _is_target(batch: Batch, modality: Modality) -> Tensor:
    return (batch.labels != IGNORED) & (batch.layout.outputs.modality == modality)
