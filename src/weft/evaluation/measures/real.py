"""What real pictures come to in a Frechet distance, kept in files: computed once, read for every model after.

    <variant>-<16 letters>.safetensors      mean (D,) and covariance (D, D), float64
                                            facts: JSON of n, variant, and hashes of the pictures and of the network

The letters are a hash of the pictures' bytes and of the network's weights, so that other pictures get another file. How
pictures reach the network, and which network it is, changes the number: a file that was made otherwise is refused.
"""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.atomic import sha256_of, write_bytes
from weft.errors import UsageError
from weft.evaluation.journal import EvaluationError, fingerprint
from weft.evaluation.metric import Context
from weft.images import decode_image

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from weft.evaluation.metrics.fid import Statistics

    Network = Callable[[Tensor], Tensor]


def statistics_for(context: Context, variant: str, network: "Network") -> "Statistics":
    """Of the real pictures of all samples, or of those that the file given stands for.

    Raises:
        UsageError: the file was made in another variant or by another network.
    """
    kept, weights = context.weights.real_statistics, context.file("inception")
    if kept is None:
        raise UsageError("there is no place for statistics", where="weights.real_statistics")
    if kept.is_file():
        return read_statistics(kept, variant=variant, weights=weights)

    def pictures() -> Iterator[bytes]:
        for answer in context.answers:
            yield from map(answer.place.picture, answer.sample.reference["images"])

    file = keep_statistics(kept, pictures, variant=variant, weights=weights, network=network, batch=context.batch)
    return read_statistics(file, variant=variant, weights=weights)


def keep_statistics(
    folder: Path,
    pictures: Callable[[], Iterable[bytes]],
    *,
    variant: str,
    weights: Path,
    network: "Network",
    batch: int = 32,
) -> Path:
    """The file of these pictures in this folder; made, whole or not at all, if it is not there.

    Args:
        pictures: PNG, JPEG and the like, in the same order each time it is called.
        weights: the file of the network.
    """
    from safetensors.torch import save

    from weft.evaluation.metrics.fid import features_of, statistics

    of, by = fingerprint(_hashes(pictures())), sha256_of(weights)
    file = folder / f"{variant}-{fingerprint([variant, of, by])[:16]}.safetensors"
    if not file.is_file():
        decoded = (decode_image(data) for data in pictures())
        found = statistics(features_of(decoded, network, variant=variant, batch=batch), variant=variant)
        facts = json.dumps({"n": found.n, "variant": variant, "pictures": of, "network": by})
        # one entry: the library writes several in any order
        write_bytes(file, save({"mean": found.mean, "covariance": found.covariance}, {"facts": facts}))
    return file


def read_statistics(file: Path, *, variant: str, weights: Path) -> "Statistics":
    """
    Raises:
        EvaluationError: it is no such file.
        UsageError: it was made in another variant or by another network.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from weft.evaluation.metrics.fid import Statistics

    try:
        with safe_open(file, "pt") as opened:
            facts = json.loads((opened.metadata() or {})["facts"])
            mean, covariance = opened.get_tensor("mean"), opened.get_tensor("covariance")
            found = Statistics(mean, covariance, facts["n"], facts["variant"])
            by = facts["network"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise EvaluationError(
            f"this does not hold statistics of pictures: {error!r}",
            where=str(file),
            fix="delete it, and give a folder as weights.real_statistics, which makes it anew",
        ) from error
    if mean.dtype != torch.float64 or covariance.shape != (len(mean), len(mean)):
        raise EvaluationError(f"statistics are {mean.dtype}, {tuple(covariance.shape)}", where=str(file))
    if found.variant != variant:
        raise UsageError(
            f"these are statistics of fid/{found.variant}, not of fid/{variant}",
            where=str(file),
            fix=f"score by --metrics [fid/{found.variant}] alone, or give a folder as weights.real_statistics",
        )
    if by != sha256_of(weights):
        raise UsageError(
            "these statistics were made by another network",
            where=str(file),
            fix="give the weights that made them, or a folder as weights.real_statistics",
        )
    return found


def pack(found: "Statistics") -> dict[str, Any]:
    """As a record keeps it; of the covariance, which is symmetric, one half."""
    upper = found.covariance.numpy()[_upper(len(found.mean))]
    halves = {"mean": found.mean.numpy(), "covariance": upper}
    packed = {name: base64.b64encode(each.astype("<f8").tobytes()).decode() for name, each in halves.items()}
    return {"n": found.n, "variant": found.variant, **packed}


def unpack(packed: Mapping[str, Any]) -> "Statistics":
    import numpy as np
    import torch

    from weft.evaluation.metrics.fid import Statistics

    mean, upper = (np.frombuffer(base64.b64decode(packed[name]), "<f8") for name in ("mean", "covariance"))
    covariance = np.zeros((len(mean), len(mean)))
    covariance[_upper(len(mean))] = upper
    covariance = np.triu(covariance) + np.triu(covariance, 1).T
    return Statistics(torch.from_numpy(mean.copy()), torch.from_numpy(covariance), packed["n"], packed["variant"])


def _upper(side: int) -> "tuple[np.ndarray, ...]":
    import numpy as np

    return np.triu_indices(side)


def _hashes(pictures: Iterable[bytes]) -> Iterator[str]:
    import hashlib

    for data in pictures:
        yield hashlib.sha256(data).hexdigest()
