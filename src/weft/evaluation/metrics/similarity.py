"""Cosines of what CLIP or DINO make of pictures and texts. Models come from the caller; each number belongs to one.

    name                      model                  value
    clip_i                    OpenAI CLIP ViT-B/32   cosine(generated, target), in MagicBrush
    clip_i                    OpenAI CLIP ViT-L/14   cosine(generated, real), of VIST in MM-Interleaved
    clip_t                    OpenAI CLIP ViT-B/32   cosine(generated, caption of the turn), in MagicBrush
    dino                      DINO v1 ViT-S/16       cosine(generated, target), in MagicBrush
    clip_score                OpenAI CLIP ViT-B/32   2.5 max(cosine, 0), `A photo depicts ` before the caption
    ref_clip_score            OpenAI CLIP ViT-B/32   harmonic mean of it and max(0, best cosine with a reference)
    torchmetrics_clip_score   OpenAI CLIP ViT-L/14   100 cosine, the mean cut at 0: no prefix, no 2.5

CLIPScore is Hessel et al. 2021 (arXiv:2104.08718). What torchmetrics 1.9 calls so is another number.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from weft import scorers
from weft.errors import CheckpointError, UsageError
from weft.evaluation.metrics.pictures import centre_crop, shorter_side_to, to_pixels
from weft.evaluation.metrics.scores import Scores, mean_of, same_length

if TYPE_CHECKING:
    from PIL import Image as PILImage

Pictures = Sequence["PILImage.Image"]

PREFIX = "A photo depicts "
AT_ONCE = 32
DINO_SHORTER_SIDE, DINO_SIDE = 256, 224
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_WIDTH, DINO_PATCH = 384, 16


class SeesPictures(Protocol):
    def picture_features(self, pictures: Pictures) -> Tensor:
        """(M, D)."""


class SeesBoth(SeesPictures, Protocol):
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(M, D), in the same space."""


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(M, D) and (M, D) of any length -> (M,) float64, row by row."""
    if a.shape != b.shape:
        raise UsageError(f"features do not compare: {tuple(a.shape)} and {tuple(b.shape)}", where="cosine")
    return (F.normalize(a.double(), dim=-1) * F.normalize(b.double(), dim=-1)).sum(-1)


def clip_i(generated: Pictures, targets: Pictures, model: SeesPictures) -> Scores:
    same_length("clip_i", generated=generated, targets=targets)
    return mean_of(_between(model.picture_features, generated, model.picture_features, targets))


def dino(generated: Pictures, targets: Pictures, model: SeesPictures) -> Scores:
    """With `DinoV1`."""
    same_length("dino", generated=generated, targets=targets)
    return mean_of(_between(model.picture_features, generated, model.picture_features, targets))


def clip_t(pictures: Pictures, captions: Sequence[str], model: SeesBoth) -> Scores:
    """Of the generated pictures; of the targets it is the oracle beside it."""
    same_length("clip_t", pictures=pictures, captions=captions)
    return mean_of(_between(model.picture_features, pictures, model.text_features, captions))


def clip_score(pictures: Pictures, captions: Sequence[str], model: SeesBoth) -> Scores:
    same_length("clip_score", pictures=pictures, captions=captions)
    said = [PREFIX + caption for caption in captions]
    found = torch.tensor(_between(model.picture_features, pictures, model.text_features, said), dtype=torch.float64)
    return mean_of(scorers.clip_score(found).tolist())


def ref_clip_score(
    pictures: Pictures, captions: Sequence[str], references: Sequence[Sequence[str]], model: SeesBoth
) -> Scores:
    """
    Args:
        references: of each picture, at least one.
    """
    same_length("ref_clip_score", pictures=pictures, references=references)
    alone = clip_score(pictures, captions, model).per_sample
    values = []
    for score, caption, others in zip(alone, captions, references, strict=True):
        if not others:
            raise UsageError("a caption has no reference", where="ref_clip_score", fix="use clip_score")
        ours, *theirs = (PREFIX + text for text in (caption, *others))
        best = max(0.0, *_between(model.text_features, [ours] * len(theirs), model.text_features, theirs))
        values.append(2 * score * best / (score + best) if score and best else 0.0)
    return mean_of(values)


def torchmetrics_clip_score(pictures: Pictures, captions: Sequence[str], model: SeesBoth) -> Scores:
    """Values of samples may be negative, as in torchmetrics 1.9: it is the mean that is cut at 0."""
    same_length("torchmetrics_clip_score", pictures=pictures, captions=captions)
    found = mean_of([100 * each for each in _between(model.picture_features, pictures, model.text_features, captions)])
    return Scores(found.per_sample, max(found.value, 0.0) if captions else found.value)


def _between(
    see_one: Callable[[Sequence[Any]], Tensor], ones: Sequence[Any],
    see_other: Callable[[Sequence[Any]], Tensor], others: Sequence[Any],
) -> list[float]:  # fmt: skip
    found: list[float] = []
    for start in range(0, len(ones), AT_ONCE):
        some, other = ones[start : start + AT_ONCE], others[start : start + AT_ONCE]
        found += cosines(see_one(some), see_other(other)).tolist()
    return found


class DinoV1:
    """DINO v1 ViT-S/16 (Caron et al. 2021, arXiv:2104.14294), a folder of transformers, and its preprocessing."""

    def __init__(self, folder: Path | str) -> None:
        """
        Raises:
            CheckpointError: the folder holds no such model; DINOv2 is another.
        """
        from transformers import AutoConfig, ViTModel

        try:
            config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
            if (config.model_type, config.hidden_size, config.patch_size) != ("vit", DINO_WIDTH, DINO_PATCH):
                raise ValueError(f"it is a {config.model_type} of width {getattr(config, 'hidden_size', None)}")
            self._model: Any = ViTModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True).eval()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"no DINO v1 ViT-S/16 can be read: {error}",
                where=str(folder),
                fix="give facebook/dino-vits16 as transformers saves it",
            ) from error

    @staticmethod
    def prepare(picture: "PILImage.Image") -> Tensor:
        """(3, 224, 224): shorter side to 256, bicubic; the middle; ImageNet's mean and deviation."""
        cropped = centre_crop(shorter_side_to(picture.convert("RGB"), DINO_SHORTER_SIDE), DINO_SIDE)
        mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_DEVIATION))
        return (to_pixels(cropped) / 255 - mean) / deviation

    @torch.no_grad()
    def picture_features(self, pictures: Pictures) -> Tensor:
        """(M, 384), of length 1: what the network has at its first position."""
        seen = self._model(pixel_values=torch.stack([self.prepare(each) for each in pictures]))
        return F.normalize(seen.last_hidden_state[:, 0], dim=-1)
