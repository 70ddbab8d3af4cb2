"""Generated pictures against real ones, texts and labels: networks that the user has, and what `metrics/` computes.

A picture that is missing gets the worst value by rule, which is counted; in a distance between sets it is left out.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from weft.evaluation.metric import Answered, Context, LacksWeights, Measured, Metric, Sums, each, means
from weft.evaluation.records import Record, Status

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from weft.evaluation.metrics.edits import Channels, Window

    Pair = tuple[PILImage.Image, PILImage.Image]

FID_VARIANTS = ("pytorch-fid", "clean", "clean-legacy-tf", "torchmetrics-1.9", "64")


def pairs(answer: Answered) -> "list[Pair]":
    """Generated pictures with the real ones, in order; `take: last` pairs the last ones."""
    paths: Sequence[str] = answer.sample.reference["images"]
    pictures = answer.pictures()
    if answer.sample.reference.get("take") == "last":
        pictures = pictures[-len(paths) :]
    return [(made, answer.reference_picture(path)) for made, path in zip(pictures, paths, strict=False)]


Score = Callable[["list[Pair]", Answered, Context], dict[str, float]]


def _against_real(score: Score, worst: Mapping[str, float | None]) -> Any:
    """Values of an answer's pairs, each the mean over the pictures asked for.

    Args:
        worst: of each value, for a picture that is missing; None: it says nothing of the generated picture.
    """

    def measure(answers: Sequence[Answered], context: Context) -> Iterator[Measured]:
        for answer in answers:
            found = pairs(answer)
            wanted = len(answer.sample.reference["images"])
            known = score(found, answer, context) if found else {}
            share = len(found) / wanted
            values: dict[str, float | None] = {}
            status: dict[str, Status] = {}
            for name, least in worst.items():
                values[name] = known.get(name) if least is None else known.get(name, 0.0) * share + least * (1 - share)
                if values[name] is None:
                    status[name] = "not_applicable"
                elif least is not None and len(found) < wanted:
                    status[name] = "by_rule"
            yield Measured(answer.id, values, "", status)

    return measure


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _clip(context: Context, name: str) -> Any:
    from weft.scorers import CLIP

    return context.network(name, CLIP)


def _clip_i(weights: str) -> Score:
    def score(found: "list[Pair]", answer: Answered, context: Context) -> dict[str, float]:
        from weft.evaluation.metrics.similarity import clip_i

        ours, real = map(list, zip(*found, strict=True))
        return {"cosine": clip_i(ours, real, _clip(context, weights)).value}

    return score


def _dino(found: "list[Pair]", answer: Answered, context: Context) -> dict[str, float]:
    from weft.evaluation.metrics.similarity import DinoV1, dino

    ours, real = map(list, zip(*found, strict=True))
    return {"cosine": dino(ours, real, context.network("dino", DinoV1)).value}


def _clip_t(found: "list[Pair]", answer: Answered, context: Context) -> dict[str, float]:
    """Also of the real picture, which is the oracle."""
    ours, real = map(list, zip(*found, strict=True))
    caption = answer.sample.reference.get("caption")
    if not caption:
        raise LacksWeights(f"sample {answer.id} has no caption")
    cosines = _clip(context, "clip_b32").cosines([*ours, *real], [caption])[:, 0].tolist()
    return {"cosine": _mean(cosines[: len(ours)]), "oracle": _mean(cosines[len(ours) :])}


def _made_for_caption(whose: Literal["hessel", "torchmetrics"], weights: str) -> Any:
    """The first picture against the caption that it was made for."""

    def measure(answer: Answered, context: Context) -> Measured:
        from weft.evaluation.metrics import similarity

        pictures = answer.pictures()[:1]
        if not pictures:
            return Measured(answer.id, {"clip_score": 0.0}, status={"clip_score": "by_rule"})
        score = similarity.clip_score if whose == "hessel" else similarity.torchmetrics_clip_score
        found = score(pictures, [answer.sample.reference["caption"]], _clip(context, weights))
        return Measured(answer.id, {"clip_score": found.per_sample[0]})

    return each(measure)


def _cut_mean(records: Sequence[Record]) -> dict[str, float]:
    """It is the mean that torchmetrics cuts at 0, not the samples."""
    return {name: max(value, 0.0) for name, value in means(records).items()}


def _caption_of(answer: Answered, context: Context) -> Measured:
    """The caption that was written against its picture."""
    from weft.evaluation.metrics.similarity import clip_score

    picture = answer.reference_picture(answer.sample.reference["image"])
    found = clip_score([picture], [answer.text], _clip(context, "clip_b32"))
    return Measured(answer.id, {"clip_score": found.value}, answer.text)


def _caption_and_references(answer: Answered, context: Context) -> Measured:
    from weft.evaluation.metrics.similarity import ref_clip_score

    reference = answer.sample.reference
    picture = answer.reference_picture(reference["image"])
    found = ref_clip_score([picture], [answer.text], [reference["captions"]], _clip(context, "clip_b32"))
    return Measured(answer.id, {"ref_clip_score": found.value}, answer.text)


def _l1l2(found: "list[Pair]", answer: Answered, context: Context) -> dict[str, float]:
    from weft.evaluation.metrics.edits import l1, l2

    ours, real = map(list, zip(*found, strict=True))
    return {"l1": l1(ours, real).value, "l2": l2(ours, real).value}


def _psnr(channels: "Channels") -> Score:
    def score(found: "list[Pair]", answer: Answered, context: Context) -> dict[str, float]:
        from weft.evaluation.metrics.edits import psnr

        ours, real = map(list, zip(*found, strict=True))
        # equal pictures have no finite ratio; 100 dB is what no other pair of 8-bit pictures reaches
        return {"psnr": _mean([min(each, 100.0) for each in psnr(ours, real, channels=channels).per_sample])}

    return score


def _ssim(channels: "Channels", window: "Window") -> Score:
    def score(found: "list[Pair]", answer: Answered, context: Context) -> dict[str, float]:
        from weft.evaluation.metrics.edits import ssim

        ours, real = map(list, zip(*found, strict=True))
        return {"ssim": ssim(ours, real, channels=channels, window=window).value}

    return score


def _lpips(found: "list[Pair]", answer: Answered, context: Context) -> dict[str, float]:
    from weft.evaluation.metrics.edits import lpips
    from weft.scorers import LPIPS

    linear = context.file("lpips_linear")
    model = context.network("lpips", lambda file: LPIPS().load(file, linear))
    ours, real = map(list, zip(*found, strict=True))
    return {"lpips": lpips(ours, real, model).value}


# --- distances between sets ---


def _features(variant: str, *, against_file: bool = False) -> Any:
    """Features of made and real pictures, kept in the records: the distance is made of those alone.

    Args:
        against_file: of the real ones, where a file is given for it, only their statistics, with the first sample.
    """

    def measure(answers: Sequence[Answered], context: Context) -> Iterator[Measured]:
        from weft.evaluation.measures import real
        from weft.evaluation.metrics.fid import features_of
        from weft.evaluation.metrics.inception import load_inception

        network = context.network("inception", load_inception)
        is_kept = against_file and context.weights.real_statistics is not None
        for answer in answers:
            found = pairs(answer)
            wanted = len(answer.sample.reference["images"])
            sides = [("made", [a for a, _ in found]), *([] if is_kept else [("real", [b for _, b in found])])]
            extra: dict[str, Any] = {
                side: [_packed(row) for row in features_of(pictures, network, variant=variant, batch=context.batch)]
                for side, pictures in sides
                if pictures
            }
            if is_kept and answer.id == context.answers[0].id:
                extra["statistics"] = real.pack(real.statistics_for(context, variant, network))
            yield Measured(answer.id, {"pictures": float(len(found)), "asked": float(wanted)}, extra=extra)

    return measure


def _packed(row: Any) -> str:
    return base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()


def _unpacked(records: Sequence[Record], side: str) -> Any:
    import numpy as np
    import torch

    rows = [np.frombuffer(base64.b64decode(row), "<f4") for record in records for row in record.extra.get(side, ())]
    return torch.from_numpy(np.stack(rows).copy()) if rows else torch.zeros(0, 0)


def _fid(variant: str) -> Any:
    def aggregate(records: Sequence[Record]) -> dict[str, float]:
        from weft.evaluation.measures import real
        from weft.evaluation.metrics.fid import frechet_distance, statistics

        made = _unpacked(records, "made")
        kept = [record.extra["statistics"] for record in records if "statistics" in record.extra]
        pictures = _unpacked(records, "real")
        if len(made) < 2 or (len(pictures) < 2 and not kept):
            return {}
        ours = statistics(made, variant=variant)
        theirs = real.unpack(kept[0]) if kept else statistics(pictures, variant=variant)
        return {
            "fid": frechet_distance(ours, theirs),
            "singular": float(ours.is_singular or theirs.is_singular),
            **_sizes(ours.n, theirs.n),
        }

    return aggregate


def _kid(records: Sequence[Record]) -> dict[str, float]:
    from weft.evaluation.metrics.fid import kernel_distance

    made, real = _unpacked(records, "made"), _unpacked(records, "real")
    if min(len(made), len(real)) < 2:
        return {}
    return {"kid": kernel_distance(made, real).value, **_sizes(len(made), len(real))}


def _sizes(made: int, real: int) -> dict[str, float]:
    """Pictures of both sets, which a distance depends on."""
    return {"made": float(made), "real": float(real)}


# --- detections and labels from files ---


def _geneval(answers: Sequence[Answered], context: Context) -> Iterator[Measured]:
    from weft.evaluation.journal import EvaluationError
    from weft.evaluation.metrics.geneval import read_detections, read_wanted, verdict

    found = context.network("detections", _read_detections)
    for answer in answers:
        wanted = read_wanted(answer.sample.reference["wanted"])
        if not answer.prediction.images:
            yield Measured(answer.id, {"correct": 0.0}, "no picture", {"correct": "by_rule"}, {"tag": wanted.tag})
            continue
        if answer.id not in found:
            raise EvaluationError(
                f"picture {answer.id} has no detections",
                where=str(context.file("detections")),
                fix="detect objects in every picture",
            )
        made = verdict(read_detections(found[answer.id]), wanted)
        yield Measured(answer.id, {"correct": float(made.right)}, "; ".join(made.reasons), extra={"tag": wanted.tag})


def _read_detections(file: Any) -> dict[str, Any]:
    from weft.evaluation.journal import Journal

    return {str(line["id"]): line["detections"] for line in Journal(file).read()}


def geneval(records: Sequence[Record]) -> dict[str, float]:
    """Share of right pictures by tag, and the mean of those shares, which is the score."""
    tags: dict[str, list[float]] = {}
    for record in records:
        tags.setdefault(record.extra["tag"], []).append(record.values["correct"] or 0.0)
    found = {tag: _mean(values) for tag, values in tags.items()}
    return {"overall": _mean(list(found.values())), **found}


def _miou(answers: Sequence[Answered], context: Context) -> Iterator[Measured]:
    import io

    import numpy as np
    from PIL import Image as PILImage

    from weft.evaluation.metrics.segmentation import areas

    folder = context.file("labels")
    for answer in answers:
        # labels are indices: they must not pass the door that makes everything RGB
        with PILImage.open(io.BytesIO(answer.place.picture(answer.sample.reference["labels"]))) as labels:
            wanted = np.asarray(labels)
        file = folder / f"{answer.id}.png"
        if not answer.prediction.images or not file.is_file():
            if answer.prediction.images:
                raise LacksWeights(f"weights.labels has no {file.name}: segment every generated picture")
            predicted = np.full(wanted.shape, 0)
            # nothing was made: no pixel is right, and no class gains by it
            counts = areas(predicted, wanted)
            counts = type(counts)((0,) * len(counts.shared), (0,) * len(counts.shared), counts.labelled)
            status: dict[str, Status] = {"accuracy": "by_rule"}
        else:
            with PILImage.open(file) as found:
                counts, status = areas(np.asarray(found), wanted), {}
        extra = {"shared": list(counts.shared), "predicted": list(counts.predicted), "labelled": list(counts.labelled)}
        yield Measured(answer.id, {"accuracy": counts.accuracy}, "", status, extra)


def _areas(record: Record) -> list[float]:
    return [*record.extra["shared"], *record.extra["predicted"], *record.extra["labelled"]]


def _miou_of(sums: Sequence[float]) -> dict[str, float]:
    from weft.evaluation.metrics.segmentation import Areas, miou

    n = len(sums) // 3
    counts = [tuple(round(each) for each in sums[i * n : (i + 1) * n]) for i in range(3)]
    found = miou([Areas(*counts)])
    return {"miou": found.value, "miou_occurring": found.occurring, "pixel_accuracy": found.accuracy}


def _fids() -> dict[str, Metric]:
    found = {
        f"fid/{variant}": Metric(
            f"Frechet distance of Inception features, pictures by way of {variant}",
            _features(variant, against_file=True),
            _fid(variant),
            intervals=False,
            lower_is_better=True,
            needs=("inception",),
            uses=("real_statistics",),
        )
        for variant in FID_VARIANTS
    }
    kid = Metric(
        "kernel distance of Inception features, 100 subsets",
        _features("pytorch-fid"),
        _kid,
        intervals=False,
        lower_is_better=True,
        digits=4,
        needs=("inception",),
    )
    return {**found, "kid/pytorch-fid": kid}


def _cosine(about: str, score: Score, needs: str, *beside: str) -> Metric:
    measure = _against_real(score, {"cosine": 0.0, **dict.fromkeys(beside)})
    return Metric(about, measure, scale=100.0, needs=(needs,))


def _likenesses() -> dict[str, Metric]:
    """PSNR and SSIM in every variant; `metrics/edits.py` says what each is."""
    all_channels: tuple[Channels, ...] = ("rgb", "grey", "y")
    windows: tuple[Window, ...] = ("gaussian", "uniform")
    ratios = {
        f"psnr/{channels}-255": Metric(
            f"decibels of {channels}, range 255, equal pictures 100", _against_real(_psnr(channels), {"psnr": 0.0})
        )
        for channels in all_channels
    }
    likeness = {
        f"ssim/{channels}-{window}-255": Metric(
            f"structural likeness of {channels}, {window} window, range 255",
            _against_real(_ssim(channels, window), {"ssim": 0.0}),
            digits=4,
        )
        for channels in all_channels
        for window in windows
    }
    return {**ratios, **likeness}


METRICS = {
    "clip-i/b32": _cosine("cosine of CLIP ViT-B/32 features, made and real", _clip_i("clip_b32"), "clip_b32"),
    "clip-i/l14": _cosine("cosine of CLIP ViT-L/14 features, made and real", _clip_i("clip_l14"), "clip_l14"),
    "clip-t/b32": _cosine(
        "cosine of CLIP ViT-B/32, picture and caption; the real picture's as oracle",
        _clip_t,
        "clip_b32",
        "oracle",
    ),
    "dino/s16": _cosine("cosine of DINO v1 ViT-S/16 features, made and real", _dino, "dino"),
    "clip-score/b32": Metric(
        "CLIPScore of a picture and the caption it was made for, 2.5 max(cosine, 0)",
        _made_for_caption("hessel", "clip_b32"),
        digits=4,
        needs=("clip_b32",),
    ),
    "clip-score/torchmetrics": Metric(
        "what torchmetrics calls CLIPScore: 100 cosine of CLIP ViT-L/14, without CLIPScore's prefix and factor",
        _made_for_caption("torchmetrics", "clip_l14"),
        _cut_mean,
        digits=4,
        needs=("clip_l14",),
    ),
    "clip-score/b32-caption": Metric(
        "CLIPScore of a written caption and its picture", each(_caption_of), digits=4, needs=("clip_b32",)
    ),
    "ref-clip-score/b32": Metric(
        "RefCLIPScore of a written caption: its CLIPScore and its likeness to the references",
        each(_caption_and_references),
        digits=4,
        needs=("clip_b32",),
    ),
    "edits/l1l2": Metric(
        "mean absolute and mean squared difference, colours 0 to 1",
        _against_real(_l1l2, {"l1": 1.0, "l2": 1.0}),
        digits=4,
        lower_is_better=True,
    ),
    **_likenesses(),
    "lpips/alex": Metric(
        "LPIPS",
        _against_real(_lpips, {"lpips": 1.0}),
        digits=4,
        lower_is_better=True,
        needs=("lpips", "lpips_linear"),
    ),
    **_fids(),
    "geneval/mask2former": Metric(
        "objects found as the prompt names them; mean of the tags",
        _geneval,
        geneval,
        scale=100.0,
        needs=("detections",),
    ),
    "miou/ade20k": Metric(
        "mean IoU over 150 classes, those that never occur as 0",
        _miou,
        Sums(_areas, _miou_of),
        digits=4,
        needs=("labels",),
    ),
}
