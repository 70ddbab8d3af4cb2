"""What records are made of and summed up to is what the pure functions say, on the known answers as well."""

import base64
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.evaluation.making import SHARED, answered, png, write
from weft.cli import main
from weft.errors import UsageError
from weft.evaluation.bootstrap import intervals
from weft.evaluation.evaluate import METRICS, TASKS, adopt, keep_real
from weft.evaluation.journal import EvaluationError
from weft.evaluation.measures.texts import CORPUS_BLEU, circular, mme
from weft.evaluation.metric import means
from weft.evaluation.metrics.choices import ROTATIONS
from weft.evaluation.metrics.length import at_length, line_at, repetition
from weft.evaluation.records import Record
from weft.evaluation.run import Run
from weft.evaluation.score import ScoringConfig, score
from weft.evaluation.summary import aggregate, rounded
from weft.evaluation.task import TaskConfig

PIXEL = base64.b64encode(png(size=(1, 1))).decode()
known = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


def load(name):
    return json.loads((SHARED / name).read_text())


def summary(folder, config, answers, metrics=None, **more):
    run = answered(folder / "run", config, answers)
    skipped = score(run, TASKS, METRICS, ScoringConfig(metrics=metrics, **more))
    found = aggregate(run, METRICS, resamples=50)
    return {name: metric["values"] for name, metric in found["metrics"].items()}, skipped, found


@known
def test_captions_by_way_of_records(tmp_path):
    cases, wanted = load("abstract48s_captions/input.json"), load("abstract48s_captions/expected.json")
    table = {
        "images": [{"id": c["image_id"], "file_name": "x.png"} for c in cases],
        "annotations": [{"image_id": c["image_id"], "caption": r} for c in cases for r in c["references"]],
    }
    write(tmp_path, {"nocaps_val_4500_captions.json": table, "x.png": png()})
    answers = {c["image_id"]: [c["candidate_B"]] for c in cases}
    values, _, _ = summary(tmp_path, TaskConfig(name="nocaps", data=tmp_path), answers)
    corpus = wanted["candidate_B"]["corpus"]
    assert values["cider-d/ptb"]["cider_d"]["value"] == pytest.approx(corpus["CIDEr"], abs=1e-9)
    assert values["rouge-l/ptb"]["rouge_l"]["value"] == pytest.approx(corpus["ROUGE_L"], abs=1e-9)
    for n in range(1, 5):
        assert values["bleu/ptb"][f"bleu_{n}"]["value"] == pytest.approx(corpus[f"Bleu_{n}"], abs=1e-9)
    assert {"low", "high"} <= set(values["bleu/ptb"]["bleu_4"])


@known
def test_vqa_by_way_of_records(tmp_path):
    annotations, wanted = load("vqa_textvqa/annotations.json"), load("vqa_textvqa/expected.json")
    predictions = {row["question_id"]: row["answer"] for row in load("vqa_textvqa/predictions.json")}
    questions = [{**row, "image": "x.png"} for row in annotations]
    write(tmp_path, {
        "textvqa_val_questions.json": {"questions": questions},
        "textvqa_val_annotations.json": {"annotations": annotations}, "x.png": png(),
    })  # fmt: skip
    answers = {str(row["question_id"]): [predictions[row["question_id"]]] for row in annotations}
    values, _, _ = summary(tmp_path, TaskConfig(name="textvqa", data=tmp_path), answers, ("vqa/v2",))
    # an answer of a prediction file is stripped at its ends, which VQA does too
    assert values["vqa/v2"]["accuracy"]["rounded"] == wanted["overall"]


@known
def test_pope_by_way_of_records(tmp_path):
    cases, wanted = load("pope/input.json"), load("pope/expected.json")
    rows = [
        {"question_id": c["question_id"], "image": c["image"], "text": c["question"], "label": c["label"]}
        for c in cases
    ]
    write(tmp_path, {"coco_pope_random.json": "".join(json.dumps(row) + "\n" for row in rows)})
    answers = {f"random-{c['question_id']}": [c["answer"]] for c in cases}
    values, _, _ = summary(tmp_path, TaskConfig(name="pope", data=tmp_path, split="random"), answers)
    found = {name: cell["value"] for name, cell in values["pope/pope"].items()}
    names = {"accuracy": "acc", "precision": "precision", "recall": "recall", "f1": "f1", "yes_ratio": "yes_ratio"}
    assert found == pytest.approx({ours: wanted[theirs] for ours, theirs in names.items()}, abs=1e-12)


@known
def test_circular_choices_by_way_of_records():
    from weft.evaluation.metrics.choices import infer_letter

    rows, wanted = load("mmbench_circular/input.json"), load("mmbench_circular/expected.json")
    turns = Counter(row["index"] % ROTATIONS for row in rows)
    records = [
        Record(
            "m",
            str(row["index"]),
            {"accuracy": float(infer_letter(row["prediction"], row["options"]) == row["answer"])},
            unit=str(row["index"] % ROTATIONS),
            extra={"index": row["index"], "rotations": turns[row["index"] % ROTATIONS]},
        )
        for row in rows
    ]
    found = circular(records)
    assert found["circular"] == pytest.approx(wanted["circular_accuracy"])
    assert found["rows"] == wanted["vanilla_accuracy_all_rows"]
    assert found["first"] == wanted["vanilla_accuracy_first_rotation"]


@known
def test_rankings_by_way_of_records(tmp_path):
    cases, wanted = load("visdial_ndcg/input.json"), load("visdial_ndcg/expected.json")
    rounds = [{"question": 0, "answer": 0, "answer_options": list(range(100)), "gt_index": 0}] * 10
    dialogs = [
        {"image_id": c["image_id"], "caption": "c",
         "dialog": [{**r, "gt_index": c["gt_index"]} for r in rounds]} for c in cases
    ]  # fmt: skip
    write(tmp_path, {
        "visdial_1.0_val.json":
            {"data": {"questions": ["q"], "answers": [f"a{i}" for i in range(100)], "dialogs": dialogs}},
        "visdial_1.0_val_dense_annotations.json": [
            {"image_id": c["image_id"], "round_id": c["round_id"], "gt_relevance": c["gt_relevance"]} for c in cases
        ],
    })  # fmt: skip
    answers = {str(c["image_id"]): [float(score) for score in c["scores"]] for c in cases}
    values, _, _ = summary(tmp_path, TaskConfig(name="visdial", data=tmp_path), answers)
    assert values["visdial/ndcg"]["ndcg"]["value"] == pytest.approx(wanted["ndcg"], abs=1e-6)
    assert values["visdial/sparse"]["mean_rank"]["value"] == pytest.approx(wanted["mean"], abs=1e-5)


@known
def test_geneval_by_way_of_records(tmp_path):
    found = load("geneval_logic/input.json")["cases"][:8]
    metadata = [{**case["metadata"], "prompt": "p"} for case in found]
    seen = [{"id": f"{i:05d}-{k}", "detections": c["detections"]} for i, c in enumerate(found) for k in range(4)]
    write(tmp_path, {"evaluation_metadata.jsonl": metadata, "detections.jsonl": seen})
    answers = {f"{i:05d}-{k}": [png()] for i in range(8) for k in range(4)}
    answers["00000-3"] = []
    values, _, _ = summary(
        tmp_path,
        TaskConfig(name="geneval", data=tmp_path),
        answers,
        weights={"detections": tmp_path / "detections.jsonl"},
    )
    right = [case["correct"] for case in load("geneval_logic/expected.json")["cases"][:8]]
    tags: dict = {}
    for i, (case, hit) in enumerate(zip(found, right, strict=True)):
        hits = [float(hit)] * (3 if i == 0 else 4) + [0.0] * (i == 0)
        tags.setdefault(case["metadata"]["tag"], []).extend(hits)
    means_of_tags = {tag: sum(hits) / len(hits) for tag, hits in tags.items()}
    cells = {name: cell["value"] for name, cell in values["geneval/mask2former"].items()}
    assert {tag: cells[tag] for tag in tags} == pytest.approx(means_of_tags)
    assert cells["overall"] == pytest.approx(sum(means_of_tags.values()) / len(tags))


def test_edits_against_the_true_picture_and_missing_ones_by_rule(tmp_path):
    turn = {"input": "5-input.png", "mask": "m", "instruction": "x"}
    turns = [{**turn, "output": "5-output1.png"}, {**turn, "output": "5-output2.png"}]
    write(tmp_path, {
        "edit_sessions.json": {"5": turns}, "local_captions.json": {},
        **{f"images/5/5-{name}.png": png("white") for name in ("input", "output1", "output2")},
    })  # fmt: skip
    answers = {"5_1": [png("black", (8, 8))], "5_inde_2": ["sorry"]}
    values, skipped, _ = summary(tmp_path, TaskConfig(name="magicbrush", data=tmp_path), answers)
    assert values["edits/l1l2"]["l1"]["value"] == 1.0 and values["edits/l1l2"]["l1"]["by_rule"] == 1
    assert set(skipped) == {"clip-i/b32", "dino/s16", "clip-t/b32"}
    assert skipped["dino/s16"].startswith("weights.dino is not given: DINO v1")


COLORS = ["red", "green", "blue", "white"]


@pytest.fixture
def landscapes(tmp_path, monkeypatch):
    """Four pictures with captions, and a network that has the mean of two colours as features."""
    import weft.evaluation.metrics.inception as inception

    seen = []

    def network(pixels):
        seen.append(len(pixels))
        return pixels.mean((2, 3))[:, :2]

    monkeypatch.setattr(inception, "load_inception", lambda file: network)
    rows = [{"image_id": i, "caption": "c"} for i in range(4)]
    write(tmp_path, {
        "coco_val_captions.jsonl": rows, "w.safetensors": b"x",
        **{f"val2017/{i:012d}.jpg": png(color) for i, color in enumerate(COLORS)},
    })  # fmt: skip
    return seen


def painted(folder, colors, metrics=("fid/64",), root=None, **weights):
    answers = {f"{i + 1:06d}-{i}": [png(color)] for i, color in enumerate(colors)}
    given = {"inception": (root or folder) / "w.safetensors", **weights}
    return summary(folder, TaskConfig(name="ln-coco", data=root or folder), answers, metrics, weights=given)


def test_distances_between_sets_are_made_of_the_records_alone(tmp_path, landscapes):
    import torch
    from PIL import ImageColor

    from weft.evaluation.metrics.fid import frechet_distance, statistics

    values, _, _ = painted(tmp_path, ["red", "red", "blue", "black"])

    def features(names):
        return torch.tensor([[2 * (c / 255) - 1 for c in ImageColor.getrgb(name)[:2]] for name in names])

    wanted = [statistics(features(each), variant="64") for each in (["red", "red", "blue", "black"], COLORS)]
    assert values["fid/64"]["fid"]["value"] == pytest.approx(frechet_distance(*wanted), abs=1e-5)


def test_real_pictures_are_seen_once_for_all_models(tmp_path, landscapes):
    kept, ours = tmp_path / "real", (["red", "red", "blue", "black"], ["blue", "white", "white", "black"])
    alone = [painted(tmp_path / f"alone{i}", each, root=tmp_path)[0]["fid/64"] for i, each in enumerate(ours)]
    landscapes.clear()
    both = [
        painted(tmp_path / f"kept{i}", each, root=tmp_path, real_statistics=kept)[0]["fid/64"]
        for i, each in enumerate(ours)
    ]
    assert sum(landscapes) == 4 + 4 + 4  # not 16
    assert [each["fid"]["value"] for each in both] == pytest.approx([each["fid"]["value"] for each in alone], abs=1e-9)
    assert [each["real"]["value"] for each in both] == [4.0, 4.0]
    (file,) = kept.iterdir()
    assert file.name.startswith("64-")
    write(tmp_path, {"val2017/000000000002.jpg": png("yellow")})
    painted(tmp_path / "other", ours[0], root=tmp_path, real_statistics=kept)
    assert len(list(kept.iterdir())) == 2  # other pictures, another file
    # one of them can stand for the task's pictures, whatever these are now
    named, _, found = painted(tmp_path / "named", ours[0], root=tmp_path, real_statistics=file)
    assert named["fid/64"]["fid"]["value"] == both[0]["fid"]["value"]
    assert found["metrics"]["fid/64"]["weights"]["real_statistics"]["name"] == file.name


def test_a_folder_of_pictures_has_the_statistics_of_the_same_pictures_of_a_task(tmp_path, landscapes, capsys):
    kept = tmp_path / "real"
    painted(tmp_path / "first", COLORS, root=tmp_path, real_statistics=kept)
    given = ("--variant", "64", "--inception", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "again"))
    with pytest.raises(SystemExit) as ended:
        main(["eval", "statistics", str(tmp_path / "val2017"), *given])
    file = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert not ended.value.code
    assert file.read_bytes() == (kept / file.name).read_bytes()
    with pytest.raises(UsageError, match="no variant of FID 'clan'"):
        keep_real(tmp_path / "val2017", "clan", tmp_path / "w.safetensors", kept)
    with pytest.raises(UsageError, match="there are 0 pictures"):
        keep_real(kept, "64", tmp_path / "w.safetensors", kept)


def test_statistics_of_another_variant_or_network_are_refused(tmp_path, landscapes):
    kept = tmp_path / "real"
    painted(tmp_path / "first", COLORS, root=tmp_path, real_statistics=kept)
    (file,) = kept.iterdir()
    with pytest.raises(UsageError, match="statistics of fid/64, not of fid/clean"):
        painted(tmp_path / "clean", COLORS, ("fid/clean",), tmp_path, real_statistics=file)
    write(tmp_path, {"w.safetensors": b"y"})
    with pytest.raises(UsageError, match="another network"):
        painted(tmp_path / "second", COLORS, root=tmp_path, real_statistics=file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(EvaluationError, match="does not hold statistics"):
        painted(tmp_path / "third", COLORS, root=tmp_path, real_statistics=file)


def test_statistics_are_scored_anew_when_the_file_is_another(tmp_path, landscapes):
    painted(tmp_path, COLORS)
    run = Run(tmp_path / "run")
    given = {"inception": tmp_path / "w.safetensors", "real_statistics": tmp_path / "real"}
    score(run, TASKS, METRICS, ScoringConfig(metrics=("fid/64",), weights=given))
    records = run.read_records()["fid/64"].values()
    assert ["statistics" in each.extra for each in records] == [True, False, False, False]
    assert not any("real" in each.extra for each in records)


def test_miou_over_all_pixels(tmp_path):
    import io

    from PIL import Image as PILImage

    def labels(value):
        buffer = io.BytesIO()
        PILImage.new("L", (4, 4), value).save(buffer, "PNG")
        return buffer.getvalue()

    write(tmp_path, {
        "validation.json": [{"image_id": name, "caption": "c"} for name in "ab"],
        **{f"annotations_with_color/validation/{name}.png": png() for name in "ab"},
        "annotations/validation/a.png": labels(3), "annotations/validation/b.png": labels(5),
        "made/a.png": labels(2), "made/b.png": labels(2),
    })  # fmt: skip
    values, _, _ = summary(
        tmp_path, TaskConfig(name="ade20k", data=tmp_path), {"a": [png()], "b": [png()]}, ("miou/ade20k",),
        weights={"labels": tmp_path / "made"},
    )  # fmt: skip
    cells = values["miou/ade20k"]
    assert cells["miou"]["value"] == pytest.approx(0.5 / 150) and cells["miou_occurring"]["value"] == 0.25
    assert cells["pixel_accuracy"]["value"] == 0.5


# --- rows that name what the literature leaves open ---


@known
def test_words_that_were_parted_before_are_scored_as_they_are(tmp_path):
    words, wanted = load("abstract48s_captions/tokenized.json"), load("abstract48s_captions/expected.json")
    table = {
        "images": [{"id": name, "file_name": "x.png"} for name in words["candidate_B"]],
        "annotations": [{"image_id": name, "caption": r} for name, each in words["references"].items() for r in each],
    }
    write(tmp_path, {"nocaps_val_4500_captions.json": table, "x.png": png()})
    config, metrics = TaskConfig(name="nocaps", data=tmp_path), ("cider-d/blanks", "bleu/blanks", "rouge-l/blanks")
    said = {name: [text] for name, text in words["candidate_B"].items()}
    values, _, _ = summary(tmp_path, config, said, metrics)
    corpus = wanted["candidate_B"]["corpus"]
    assert values["cider-d/blanks"]["cider_d"]["value"] == pytest.approx(corpus["CIDEr"], abs=1e-9)
    assert values["rouge-l/blanks"]["rouge_l"]["value"] == pytest.approx(corpus["ROUGE_L"], abs=1e-9)
    assert values["bleu/blanks"]["bleu_4"]["value"] == pytest.approx(corpus["Bleu_4"], abs=1e-9)
    # a capital letter and a full stop are part of a word here
    loud = {name: [text.upper() + "."] for name, text in words["candidate_B"].items()}
    values, _, _ = summary(tmp_path / "loud", config, loud, metrics)
    assert values["cider-d/blanks"]["cider_d"]["value"] == 0 == values["rouge-l/blanks"]["rouge_l"]["value"]


def referred(folder, said, metrics):
    rows = [{"image": "r.png", "sent": "s", "bbox": [64, 48, 192, 144], "width": 640, "height": 480}] * len(said)
    write(folder, {"refcoco_val.jsonl": rows, "r.png": png(size=(640, 480))})
    answers = {f"{i:06d}": [text] for i, text in enumerate(said, 1)}
    return summary(folder, TaskConfig(name="refcoco", data=folder, split="val"), answers, metrics)


def test_a_box_is_read_by_the_grammar_that_the_metric_names(tmp_path):
    written = {
        "grounding/mm-interleaved": "It is (99,99)(299,299).",
        "grounding/unit": "[0.1, 0.1, 0.3, 0.3]",
        "grounding/coco": "[64, 48, 128, 96]",
    }
    values, _, _ = referred(tmp_path, list(written.values()), tuple(written))
    for i, name in enumerate(written):
        assert values[name]["accuracy"]["value"] == pytest.approx(1 / 3), name
        records = [r for r in load_records(tmp_path) if r["metric"] == name]
        assert [r["values"]["iou"] > 0.97 for r in records] == [k == i for k in range(3)]
    # the other brackets hold no box of a grid; numbers of another unit are a box, elsewhere
    assert [values[name]["accuracy"].get("default", 0) for name in written] == [2, 1, 1]


def load_records(folder):
    return [json.loads(line) for line in (folder / "run/records.jsonl").read_text().splitlines()]


class Angles:
    """A CLIP that knows colours and words by an angle."""

    degrees = {"red": 0, "blue": 90, "near": 10, "far": 170, "other": 60}

    def picture_features(self, pictures):
        return self._of(["red" if each.getpixel((0, 0))[0] else "blue" for each in pictures])

    def text_features(self, texts):
        # what precedes the last word turns by one degree for each word: a prefix shows
        return self._of([text.split()[-1] for text in texts], [len(text.split()) - 1 for text in texts])

    def cosines(self, pictures, texts):
        return self.picture_features(pictures) @ self.text_features(texts).T

    def _of(self, names, more=None):
        import torch

        turned = [self.degrees[name] + by for name, by in zip(names, more or [0] * len(names), strict=True)]
        angles = torch.tensor(turned, dtype=torch.float64) * torch.pi / 180
        return torch.stack((angles.cos(), angles.sin()), 1)


def cos(degrees):
    return math.cos(math.radians(degrees))


@pytest.fixture
def clip(tmp_path, monkeypatch):
    monkeypatch.setattr("weft.scorers.CLIP", lambda folder: Angles())
    (tmp_path / "clip").mkdir()
    return {"clip_b32": tmp_path / "clip", "clip_l14": tmp_path / "clip"}


def test_three_numbers_that_are_called_clip_score(tmp_path, clip):
    captions = ["near", "far", "far", "other"]
    rows = [{"image_id": i, "caption": caption} for i, caption in enumerate(captions)]
    write(tmp_path, {"coco_val_captions.jsonl": rows, **{f"val2017/{i:012d}.jpg": png() for i in range(4)}})
    answers = {**{f"00000{i + 1}-{i}": [png("red")] for i in range(3)}, "000004-3": []}
    config = TaskConfig(name="ln-coco", data=tmp_path)
    values, _, _ = summary(tmp_path, config, answers, ("clip-score/b32", "clip-score/torchmetrics"), weights=clip)
    # CLIPScore: three words before, 2.5, each sample cut at 0
    assert values["clip-score/b32"]["clip_score"]["value"] == pytest.approx(2.5 * cos(13) / 4)
    # the other: no words before, and the mean is cut, not the samples
    assert values["clip-score/torchmetrics"]["clip_score"]["value"] == 0.0
    assert [r["values"]["clip_score"] for r in load_records(tmp_path) if "torchmetrics" in r["metric"]] == (
        pytest.approx([100 * cos(10), 100 * cos(170), 100 * cos(170), 0.0])
    )
    assert values["clip-score/b32"]["clip_score"]["by_rule"] == 1


def test_written_captions_are_scored_with_the_picture_and_with_references(tmp_path, clip):
    table = {
        "images": [{"id": 1, "file_name": "x.png"}],
        "annotations": [{"image_id": 1, "caption": caption} for caption in ("other", "far")],
    }
    write(tmp_path, {"nocaps_val_4500_captions.json": table, "x.png": png("red")})
    config, metrics = TaskConfig(name="nocaps", data=tmp_path), ("clip-score/b32-caption", "ref-clip-score/b32")
    values, _, _ = summary(tmp_path, config, {"1": ["near"]}, metrics, weights=clip)
    alone, best = 2.5 * cos(13), cos(50)
    assert values["clip-score/b32-caption"]["clip_score"]["value"] == pytest.approx(alone)
    wanted = 2 * alone * best / (alone + best)
    assert values["ref-clip-score/b32"]["ref_clip_score"]["value"] == pytest.approx(wanted)


def test_a_missing_picture_costs_the_score_and_not_its_oracle(tmp_path, clip):
    turn = {"input": "5-input.png", "mask": "m", "instruction": "x"}
    turns = [{**turn, "output": "5-output1.png"}, {**turn, "output": "5-output2.png"}]
    write(tmp_path, {
        "edit_sessions.json": {"5": turns},
        "local_captions.json": {"5": {"5-output1.png": "near", "5-output2.png": "near"}},
        **{f"images/5/5-{name}.png": png("red") for name in ("input", "output1", "output2")},
    })  # fmt: skip
    config = TaskConfig(name="magicbrush", data=tmp_path)
    values, _, _ = summary(tmp_path, config, {"5_1": [png("red")], "5_inde_2": []}, ("clip-t/b32",), weights=clip)
    assert values["clip-t/b32"]["cosine"]["value"] == pytest.approx(cos(10) / 2)
    assert values["clip-t/b32"]["cosine"]["by_rule"] == 1
    assert (
        values["clip-t/b32"]["oracle"]["value"] == pytest.approx(cos(10)) and values["clip-t/b32"]["oracle"]["n"] == 1
    )


def test_likenesses_have_no_unnamed_default(tmp_path):
    from PIL import Image as PILImage

    from weft.evaluation.metrics.edits import psnr, ssim

    names = [name for name in METRICS if name.startswith(("psnr/", "ssim/"))]
    assert len(names) == 3 + 6 and not {"psnr", "ssim", "edits/psnr-ssim"} & set(METRICS)
    write(tmp_path, {
        "coco_val_captions.jsonl": [{"image_id": 0, "caption": "c"}],
        "val2017/000000000000.jpg": png("red"),
    })  # fmt: skip
    values, _, _ = summary(
        tmp_path, TaskConfig(name="ln-coco", data=tmp_path), {"000001-0": [png("orange")]}, tuple(names)
    )
    pair, real = ([PILImage.new("RGB", (16, 12), color)] for color in ("orange", "red"))
    for name in names:
        kind, _, variant = name.partition("/")
        channels, *window, peak = variant.split("-")
        wanted = (
            ssim(pair, real, channels=channels, window=window[0]) if window else psnr(pair, real, channels=channels)
        )
        assert peak == "255" and values[name][kind]["value"] == pytest.approx(wanted.value), name


def test_the_first_letter_of_an_answer_is_a_parser_of_its_own(tmp_path):
    header = "index\tquestion\thint\tA\tB\tanswer\tcategory\timage\n"
    rows = "".join(f"{i}\tq\t\tcat\tdog\tA\tc\t{PIXEL}\n" for i in range(4))
    write(tmp_path, {"mmbench_dev_en.tsv": header + rows})
    config = TaskConfig(name="mmbench", data=tmp_path, split="dev", variant="once")
    answers = {"0": ["A. cat"], "1": ["(A) because"], "2": ["It is A"], "3": ["Able"]}
    values, _, _ = summary(tmp_path, config, answers, ("mcq/prefix", "mcq/circular"))
    assert values["mcq/prefix"]["accuracy"]["value"] == 0.5 and values["mcq/prefix"]["accuracy"]["default"] == 2
    assert values["mcq/circular"]["circular"]["value"] == 0.75


def test_a_metric_without_a_number_says_so(tmp_path):
    dialog = {
        "image_id": 1,
        "caption": "c",
        "dialog": [{"question": 0, "answer": 0, "answer_options": [0, 1], "gt_index": 0}],
    }
    write(tmp_path, {
        "visdial_1.0_val.json": {"data": {"questions": ["q"], "answers": ["a", "b"], "dialogs": [dialog]}},
        "visdial_1.0_val_dense_annotations.json": [{"image_id": 1, "round_id": 1, "gt_relevance": [0, 0]}],
    })  # fmt: skip
    _, skipped, found = summary(tmp_path, TaskConfig(name="visdial", data=tmp_path), {"1": [0.5, 0.2]})
    assert skipped == {} and list(found["skipped"]) == ["visdial/ndcg"]
    assert found["skipped"]["visdial/ndcg"].startswith("no number")


# --- sums, intervals ---


def test_mme_needs_both_questions_of_a_picture():
    hits = {"p": (1, 1), "q": (1, 0), "r": (0, 0)}
    records = [
        Record("m", f"{name}{i}", {"accuracy": float(hit)}, unit=name, extra={"task": "color"})
        for name, pair in hits.items()
        for i, hit in enumerate(pair)
    ]
    assert mme(records) == pytest.approx({"color": 100 * 3 / 6 + 100 / 3})
    assert mme(records[:-1]) == {}  # half of the score is over pictures


def test_a_question_without_all_its_rotations_is_not_right():
    records = [
        Record("m", str(index), {"accuracy": 1.0}, unit=str(index % ROTATIONS), extra={"index": index, "rotations": 2})
        for index in (1, ROTATIONS + 1, 2)
    ]
    assert circular(records) == {"circular": 1.0, "rows": 1.0, "first": 1.0}
    assert circular(records[2:]) == {"rows": 1.0, "first": 1.0}
    records[1] = Record("m", "b", {"accuracy": 0.0}, unit="1", extra={"index": ROTATIONS + 1, "rotations": 2})
    assert circular(records)["circular"] == 0.0


def test_a_score_that_is_no_number_is_named(tmp_path):
    dialog = {"image_id": 7, "caption": "c", "dialog": [
        {"question": 0, "answer": 0, "answer_options": [0, 1], "gt_index": 0}
    ]}  # fmt: skip
    write(tmp_path, {
        "visdial_1.0_val.json": {"data": {"questions": ["q"], "answers": ["a", "b"], "dialogs": [dialog]}},
        "visdial_1.0_val_dense_annotations.json": [{"image_id": 7, "round_id": 1, "gt_relevance": [0, 1]}],
    })  # fmt: skip
    write(tmp_path, {"run/predictions.jsonl": '{"id": "7", "parts": [], "scores": [0.5, NaN]}\n'})
    run = adopt(tmp_path / "run", TaskConfig(name="visdial", data=tmp_path), "someone")
    with pytest.raises(UsageError, match="score of 7 is not a number"):
        score(run, TASKS, METRICS, ScoringConfig())


def test_the_distance_of_a_set_to_itself_is_not_below_nought():
    assert str(rounded(-1e-9, METRICS["fid/clean"])) == "0.0"
    assert rounded(-0.02, METRICS["fid/clean"]) == -0.02


def test_pope_has_a_mean_of_its_three_splits_only():
    metric = METRICS["pope/pope"].aggregate
    records = [
        Record("m", split, {"accuracy": 1.0}, extra={"counts": [1, 0, 0, i], "split": split})
        for i, split in enumerate(("random", "popular", "adversarial"))
    ]
    assert metric(records)["accuracy"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert metric(records[1:2])["recall"] == 0.5
    assert set(metric(records[:2])) == {
        f"{split}_{name}" for split in ("random", "popular")
        for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")
    }  # fmt: skip


def test_grades_of_several_runs_have_a_deviation():
    metric = METRICS["mm-vet/v1"].aggregate
    records = [
        Record("m", str(i), {"grade": sum(runs) / 2}, extra={"capabilities": ["ocr"], "runs": runs})
        for i, runs in enumerate(([0.5, 0.5], [0.0, 1.0]))
    ]
    assert metric(records) == pytest.approx({"total": 0.5, "ocr": 0.5, "deviation": 0.25})
    alone = [Record("m", "a", {"grade": 0.5}, extra={"capabilities": ["ocr"], "runs": [0.5]})]
    assert metric(alone) == {"total": 0.5, "ocr": 0.5}


def values(n, seed=0):
    rng = random.Random(seed)
    return [Record("m", f"r{i}", {"x": rng.gauss(1, 2)}) for i in range(n)]


def test_an_interval_of_a_mean_is_as_wide_as_theory_says():
    records = values(400)
    xs = [record.values["x"] for record in records]
    middle = sum(xs) / len(xs)
    error = (sum((x - middle) ** 2 for x in xs) / len(xs)) ** 0.5 / len(xs) ** 0.5
    found = intervals(records, means, seed=0, resamples=2000)["x"]
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert found == intervals(records, means, seed=0, resamples=2000)["x"]
    assert found != intervals(records, means, seed=1, resamples=2000)["x"]


def test_a_formula_drawn_fast_is_the_formula_drawn_slowly():
    fast = intervals(values(30), means, seed=3, resamples=300)["x"]
    slow = intervals(values(30), lambda records: means(records), seed=3, resamples=300)["x"]
    assert (slow.low, slow.high) == pytest.approx((fast.low, fast.high), abs=1e-12)
    rng = random.Random(1)
    counts = [[rng.randrange(1, 9) for _ in range(10)] for _ in range(20)]
    records = [Record("m", f"r{i}", {}, extra={"counts": each}) for i, each in enumerate(counts)]
    fast = intervals(records, CORPUS_BLEU, seed=3, resamples=200)
    slow = intervals(records, lambda rows: CORPUS_BLEU(rows), seed=3, resamples=200)
    assert fast["bleu_2"].low == pytest.approx(slow["bleu_2"].low) and set(fast) == {f"bleu_{n}" for n in range(1, 5)}


def test_answers_of_one_unit_are_drawn_together():
    alone = [Record("m", f"r{i}", {"x": float(i // 4 % 2)}) for i in range(80)]
    units = [Record("m", f"r{i}", {"x": float(i // 4 % 2)}, unit=str(i // 4)) for i in range(80)]
    narrow, wide = (intervals(each, means, seed=0, resamples=1000)["x"] for each in (alone, units))
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2, rel=0.15)


def test_values_that_do_not_apply_are_left_out_of_their_own_mean_only():
    records = [Record("m", "a", {"x": 1.0, "y": None}), Record("m", "b", {"x": 0.0, "y": 3.0})]
    assert means(records) == {"x": 0.5, "y": 3.0}


def test_a_line_is_drawn_only_where_points_stand_on_both_sides():
    assert at_length([64, 128, 256], [1.0, 2.0, 3.0]) == pytest.approx((1.0, 2.0))
    assert at_length([64, 256, 256], [1.0, 3.0, 5.0], at=256) == pytest.approx((1.5, 4.0))
    assert at_length([64, 64, 128], [1.0, 1.0, 2.0], at=130) is None
    assert line_at([0.0, 1.0], [0.0, 1.0], 0.5) is None and line_at([1.0] * 3, [0.0] * 3, 1.0) is None


def test_repetition():
    assert repetition("a b c d e") == 0 and repetition("go on go on go on go on") == pytest.approx(3 / 5)
    assert repetition("short") == 0
