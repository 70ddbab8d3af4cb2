"""How alike pictures are, and how well a picture fits a text: learned scores, from weights that the user has.

LPIPS (Zhang et al. 2018, arXiv:1801.03924) is a distance: 0 for the same picture. Features are computed once for each
picture; a pair then costs one subtraction. Its networks are written out here, with the names of the published weights:
torchvision's `features.*` of the backbone, and the package's `lin*.model.1.weight`, in safetensors.

CLIPScore (Hessel et al. 2021, arXiv:2104.08718) is 2.5 max(cosine, 0); kept is the cosine, together with the name of
the model, because cosines of different models cannot be compared.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from PIL import Image as PILImage

Network = Literal["alex", "vgg", "squeeze"]

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of colours in [-1, 1]."""
EPS = 1e-10
SIDE = 224
HASHED = 128
"""Pixels that a side needs for a perceptual hash: more of them change it next to nothing."""


class _Fire(nn.Module):
    """SqueezeNet's: squeeze to few channels, expand by two convolutions side by side."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat((F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))), 1)


def _alex(n: int) -> tuple[list[nn.Module], tuple[int, ...]]:
    layers: list[nn.Module] = [
        nn.Conv2d(3, n, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(n, 3 * n, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(3 * n, 6 * n, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6 * n, 4 * n, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4 * n, 4 * n, 3, padding=1), nn.ReLU(),
    ]  # fmt: skip
    return layers, (1, 4, 7, 9, 11)


def _vgg(n: int) -> tuple[list[nn.Module], tuple[int, ...]]:
    layers: list[nn.Module] = []
    taps, channels = [], 3
    for width, depth in ((n, 2), (2 * n, 2), (4 * n, 3), (8 * n, 3), (8 * n, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        taps.append(len(layers) - 1)
    return layers, tuple(taps)


def _squeeze(n: int) -> tuple[list[nn.Module], tuple[int, ...]]:
    s = n // 4

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    layers: list[nn.Module] = [
        nn.Conv2d(3, n, 3, 2), nn.ReLU(), pool(), _Fire(n, s, n), _Fire(2 * n, s, n), pool(),
        _Fire(2 * n, 2 * s, 2 * n), _Fire(4 * n, 2 * s, 2 * n), pool(), _Fire(4 * n, 3 * s, 3 * n),
        _Fire(6 * n, 3 * s, 3 * n), _Fire(6 * n, 4 * s, 4 * n), _Fire(8 * n, 4 * s, 4 * n),
    ]  # fmt: skip
    return layers, (1, 4, 7, 9, 10, 11, 12)


NETWORKS = {"alex": _alex, "vgg": _vgg, "squeeze": _squeeze}


class LPIPS(nn.Module):
    """Random weights; `load` those that were published.

    Args:
        width: channels of the first convolution, 64 in the published networks.
    """

    def __init__(self, network: Network = "alex", width: int = 64) -> None:
        super().__init__()
        layers, self.taps = NETWORKS[network](width)
        self.network = network
        self.features = nn.Sequential(*layers)
        with torch.no_grad():
            widths = [each.shape[1] for each in self._tapped(torch.zeros(1, 3, 64, 64))]
        self.weights = nn.ParameterList(nn.Parameter(torch.rand(width)) for width in widths)
        self.requires_grad_(False).eval()

    def load(self, backbone: Path, linear: Path) -> "LPIPS":
        """Published weights, as safetensors: of the backbone, and of the linear layers.

        Raises:
            CheckpointError: a tensor is missing or of another shape.
        """
        stored = _read(backbone)
        kept = {key: tensor for key, tensor in stored.items() if key.startswith("features.")}
        for name, tensor in _read(linear).items():
            number = name.removeprefix("lin").split(".")[0]
            if number.isdecimal():
                kept[f"weights.{number}"] = tensor.flatten()
        wanted = self.state_dict()
        for key, tensor in wanted.items():
            where = str(linear if key.startswith("weights.") else backbone)
            if key not in kept:
                raise CheckpointError(
                    f"there is no tensor {key}", where=where, fix=f"give the weights of {self.network}"
                )
            if kept[key].shape != tensor.shape:
                raise CheckpointError(
                    f"tensor {key} is {tuple(kept[key].shape)}, not {tuple(tensor.shape)}",
                    where=where,
                    fix=f"give the weights of {self.network}",
                )
        self.load_state_dict({key: kept[key] for key in wanted})
        return self

    def _tapped(self, x: Tensor) -> list[Tensor]:
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                found.append(x)
        return found

    @torch.no_grad()
    def describe(self, pixels: Tensor) -> list[Tensor]:
        """(M, 3, rows, cols) in [-1, 1] -> of each layer (M, C, rows', cols'), whose squared differences add up."""
        shift, scale = (torch.tensor(each, device=pixels.device).view(3, 1, 1) for each in (SHIFT, SCALE))
        found = []
        for features, weight in zip(self._tapped((pixels - shift) / scale), self.weights, strict=True):
            norm = torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPS
            found.append((features / norm).mul_(weight.clamp_min(0).sqrt().view(-1, 1, 1)))
        return found

    @staticmethod
    def distances(described: Sequence[Tensor]) -> Tensor:
        """(M, M) between all pictures."""
        total = described[0].new_zeros(len(described[0]), len(described[0]))
        for layer in described:
            flat = layer.flatten(1)
            for i in range(1, len(flat)):
                total[i, :i] += (flat[:i] - flat[i]).square_().sum(1) / layer[0, 0].numel()
        return total + total.T

    def of_pictures(self, pictures: "Sequence[PILImage.Image]", side: int = SIDE) -> Tensor:
        """(M, M) between RGB pictures, resized to a square without cropping."""
        from PIL import Image as PILImage

        sized = [picture.resize((side, side), PILImage.Resampling.BICUBIC) for picture in pictures]
        pixels = torch.stack([_to_tensor(picture) for picture in sized]) / 127.5 - 1
        return self.distances(self.describe(pixels))


class CLIP:
    """transformers' CLIP, from a folder."""

    def __init__(self, folder: Path | str) -> None:
        """
        Raises:
            CheckpointError: the folder holds no CLIP.
        """
        from transformers import CLIPModel, CLIPProcessor

        try:
            self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
            self._processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True, use_fast=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"no CLIP can be read: {error}", where=str(folder), fix="give a folder saved by transformers"
            ) from error
        self.name = Path(folder).name

    @torch.no_grad()
    def cosines(self, pictures: "Sequence[PILImage.Image]", texts: Sequence[str]) -> Tensor:
        """(pictures, texts)."""
        if not pictures or not texts:
            raise UsageError("a cosine needs a picture and a text")
        inputs = self._processor(
            text=list(texts), images=list(pictures), return_tensors="pt", padding=True, truncation=True
        )
        out = self._model(**inputs)
        return cast(Tensor, out.image_embeds @ out.text_embeds.T)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(M, D), of length 1; what is longer than the model reads is cut."""
        inputs = self._processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        features = self._model.text_projection(self._model.text_model(**inputs).pooler_output)
        return F.normalize(features, dim=-1)

    @torch.no_grad()
    def picture_features(self, pictures: "Sequence[PILImage.Image]") -> Tensor:
        """(M, D), of length 1."""
        inputs = self._processor(images=list(pictures), return_tensors="pt")
        features = self._model.visual_projection(self._model.vision_model(**inputs).pooler_output)
        return F.normalize(features, dim=-1)


class DINO:
    """A vision transformer of transformers, such as DINOv2, from a folder."""

    def __init__(self, folder: Path | str) -> None:
        """
        Raises:
            CheckpointError: the folder holds no such model.
        """
        from transformers import AutoImageProcessor, AutoModel

        try:
            self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
            self._processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, use_fast=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"no vision model can be read: {error}", where=str(folder), fix="give a folder saved by transformers"
            ) from error

    @torch.no_grad()
    def picture_features(self, pictures: "Sequence[PILImage.Image]") -> Tensor:
        """(M, D), of length 1: what the model has at its first position."""
        inputs = self._processor(images=list(pictures), return_tensors="pt")
        return F.normalize(self._model(**inputs).last_hidden_state[:, 0], dim=-1)


def cosine_distances(features: Tensor) -> Tensor:
    """(M, D), of length 1 -> (M, M): one minus the cosine, 0 for equal ones and 2 at most."""
    return (1 - features @ features.T).clamp(0, 2)


def clip_score(cosine: Tensor) -> Tensor:
    """2.5 max(cosine, 0)."""
    return 2.5 * cosine.clamp_min(0)


def difference_hash(picture: "PILImage.Image", side: int = 16) -> int:
    """A perceptual hash of side * side bits: whether each cell is brighter than the one to its right."""
    from PIL import Image as PILImage

    grey = picture.convert("L").resize((side + 1, side), PILImage.Resampling.BOX)
    values = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(side, side + 1).int()
    bits = (values[:, :-1] > values[:, 1:]).flatten().tolist()
    return int("".join("01"[bit] for bit in bits), 2)


def hamming(a: int, b: int) -> int:
    """Bits in which two hashes differ."""
    return (a ^ b).bit_count()


def hash_distances(pictures: "Sequence[PILImage.Image]", side: int = 16) -> Tensor:
    """(M, M): the fraction of bits in which the hashes differ; 1 where one of two tells too little to be compared."""
    hashes = [difference_hash(picture, side) for picture in pictures]
    known = [tells_apart(each, side) for each in hashes]
    found = torch.zeros(len(hashes), len(hashes), dtype=torch.float64)
    for j in range(len(hashes)):
        for i in range(j):
            alike = hamming(hashes[i], hashes[j]) / side**2 if known[i] and known[j] else 1.0
            found[i, j] = found[j, i] = alike
    return found


def tells_apart(hashed: int, side: int = 16) -> bool:
    """Whether a hash says anything: those of pictures with large even areas are all much the same."""
    return side <= hashed.bit_count() <= side**2 - side


def _to_tensor(picture: "PILImage.Image") -> Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1).float()


def _read(file: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"weights cannot be read: {error}", where=str(file), fix="give a safetensors file"
        ) from error
