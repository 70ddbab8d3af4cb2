"""Every task reads its released layout: the prompt's parts in order, the reference, ids and facets."""

import base64
import io
import json

import pytest
from PIL import Image as PILImage

from tests.evaluation.making import png, write
from weft.document import Image
from weft.errors import UsageError, WeftError
from weft.evaluation.generate import read_samples
from weft.evaluation.measures import METRICS
from weft.evaluation.task import TaskConfig, choose
from weft.evaluation.tasks import TASKS, picturebook, pictures

PICTURE = png(size=(40, 20))
VQA_ANSWERS = [{"answer": "yes", "answer_id": i} for i in range(1, 11)]


def read(name, root, **more):
    task, config, place = choose(TaskConfig(name=name, data=root, **more), TASKS)
    samples, facts = read_samples(task, config, place)
    for sample in samples:
        for part in (*sample.prompt.parts, *(part for parts in sample.then for part in parts)):
            place.loaded(part)  # every picture that is named is there
    return samples, facts


def said(sample):
    """The prompt's parts: texts, and paths of pictures (or their number of bytes)."""
    return [(part.path or len(part.data)) if isinstance(part, Image) else part.text for part in sample.prompt.parts]


def test_every_task_names_metrics_that_exist():
    for name, task in TASKS.items():
        assert task.metrics and set(task.metrics) <= set(METRICS), name
        assert task.about and task.splits and task.variants


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.layout])
def test_a_task_without_its_files_says_what_is_missing(name, tmp_path):
    with pytest.raises(UsageError, match="reads released files"):
        read(name, None)
    with pytest.raises(WeftError) as caught:
        read(name, tmp_path)
    assert caught.value.fix and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", [name for name in TASKS if name.startswith("picturebook")])
def test_the_drawn_world_needs_no_files(name, monkeypatch):
    monkeypatch.setattr(picturebook, "STORIES", 8)  # held-out ones take long to draw
    picturebook._split.cache_clear()
    samples, facts = read(name, None, limit=3)
    assert len(samples) == 3 and facts["of"] == 8
    assert read(name, None, limit=2)[1]["data"] == facts["data"] != read(name, None, split="dev", limit=2)[1]["data"]
    picturebook._split.cache_clear()


def bench(task_name="wikihow_next_step", **more):
    return {
        "id": "7",
        "task_name": task_name,
        "image": ["a/1.png", "a/2.png", "a/3.png"],
        "conversations": [
            {"from": "human", "value": "<BEGIN> How to? First <image>. then <image>"},
            {"from": "gpt", "value": "Last <image>"},
        ],
        **more,
    }


def zipped(names):
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, PICTURE)
    return buffer.getvalue()


def test_interleavedbench(tmp_path):
    records = [bench(), bench("marketing_generation", id="8"), bench("sequential image editing", id="9")]
    write(tmp_path, {"interleaved_bench.json": records, "a.zip": zipped(["1.png", "2.png", "3.png"])})
    samples, facts = read("interleavedbench", tmp_path)
    assert [sample.id for sample in samples] == ["7", "9"] and facts["of"] == 2
    assert said(samples[0]) == ["How to? First", "a/1.png", "then", "a/2.png"]
    assert samples[0].reference == {"text": "Last", "images": ["a/3.png"], "outputs": ["text", "image"]}
    assert samples[0].facets == {"use case": "multimodal script generation"}
    assert samples[1].reference["outputs"] == ["image"]
    assert len(read("interleavedbench", tmp_path, split="full")[0]) == 3


def test_an_unknown_use_case_fails_with_those_that_are_known_and_can_be_named(tmp_path):
    files = {f"a/{i}.png": PICTURE for i in (1, 2, 3)}
    write(tmp_path, {"interleaved_bench.json": [bench("vist_x")], **files})
    with pytest.raises(WeftError, match=r"'vist_x' is not known; known are wikihow_next_step") as caught:
        read("interleavedbench", tmp_path)
    assert "visual story completion" in caught.value.fix
    write(tmp_path, {"task_names.json": {"vist_x": "visual story completion"}})
    assert read("interleavedbench", tmp_path)[0][0].facets == {"use case": "visual story completion"}


def test_composition_has_text_scores_only_in_the_benchmarks_own_variant(tmp_path):
    files = {f"a/{i}.png": PICTURE for i in (1, 2, 3)}
    write(tmp_path, {"interleaved_bench.json": [bench("multi-concept image composition")], **files})
    assert read("interleavedbench", tmp_path)[0][0].reference["outputs"] == ["image"]
    own = read("interleavedbench", tmp_path, variant="benchmark")[0][0]
    assert own.reference["outputs"] == ["text", "image"]


def test_opening(tmp_path):
    steps = [{"image": "./images/S/1-i-1.jpg", "text": "<BEGIN> Go on. <image>"}, {"image": None, "text": "Please."}]
    record = {
        "total_uid": "0301096",
        "meta_task_id": "3",
        "meta_task_name": "Completion",
        "subtask_id": "1",
        "subtask_name": "Story",
        "data_id": "96",
        "conversations": [{"input": steps}, {"output": [{"text": "End <image>", "image": "./images/S/1-o-1.jpg"}]}],
    }
    write(tmp_path, {"OpenING-benchmark/test_data.jsonl": [record], "OpenING-benchmark/images/S/1-i-1.jpg": PICTURE})
    (sample,), _ = read("opening", tmp_path)
    assert said(sample) == ["Go on.", "OpenING-benchmark/images/S/1-i-1.jpg", "Please."]
    assert sample.reference["text"] == "End" and sample.facets == {"meta task": "Completion", "task": "Story"}


def brush(tmp_path):
    turns = [
        {"input": "5-input.png", "mask": "m", "output": "5-output1.png", "instruction": "make it blue"},
        {"input": "5-output1.png", "mask": "m", "output": "5-output2.png", "instruction": "add a hat"},
    ]
    names = ("5-input.png", "5-output1.png", "5-output2.png")
    captions = {"5": {"5-output1.png": "blue", "5-output2.png": "a hat"}}
    pictures = {f"images/5/{name}": PICTURE for name in names}
    return write(tmp_path, {"edit_sessions.json": {"5": turns}, "local_descriptions.json": captions, **pictures})


def test_magicbrush_all_turns_start_from_the_true_picture(tmp_path):
    samples, _ = read("magicbrush", brush(tmp_path))
    assert [sample.id for sample in samples] == ["5_1", "5_inde_2"] and {s.unit for s in samples} == {"5"}
    assert said(samples[1]) == ["images/5/5-output1.png", "add a hat"]
    assert samples[1].reference["images"] == ["images/5/5-output2.png"] and samples[1].reference["caption"] == "a hat"


def test_magicbrush_final_turn_goes_on_from_the_models_own_picture(tmp_path):
    (sample,), _ = read("magicbrush", brush(tmp_path), variant="final-turn")
    assert said(sample) == ["images/5/5-input.png", "make it blue"]
    assert [[part.text for part in parts] for parts in sample.then] == [["add a hat"]]
    assert sample.reference["images"] == ["images/5/5-output2.png"] and sample.reference["take"] == "last"


def test_vist(tmp_path):
    rows = [{"image_id": str(i), "caption": f"c{i}", "sequence_index": i} for i in (3, 1, 0, 2, 4)]
    pictures = {f"images/val_images/{i}.png": PICTURE for i in range(5)}
    write(tmp_path, {"annotations/val_formatted_filtered.json": {"annotations": {"s": rows}}, **pictures})
    (sample,), _ = read("vist", tmp_path)
    assert said(sample) == [x for i in range(4) for x in (f"c{i}", f"images/val_images/{i}.png")] + ["c4"]
    assert sample.reference["images"] == ["images/val_images/4.png"]


def test_cartoons_are_made_frame_after_frame(tmp_path):
    frames = [f"P/{i}" for i in range(5)]
    captions = {frame: [f"PORORO sees\n{frame}"] for frame in frames}
    write(tmp_path, {
        "following_cache4.json": {frames[0]: frames[1:]}, "descriptions.json": captions, "test_ids.json": [frames[0]],
        "P/0.png": PICTURE,
    })  # fmt: skip
    (sample,), _ = read("pororo", tmp_path)
    assert said(sample) == ["Pororo sees p/0", "P/0.png", "Pororo sees p/1"]
    assert [parts[0].text for parts in sample.then] == ["Pororo sees p/2", "Pororo sees p/3", "Pororo sees p/4"]
    assert sample.reference["images"] == [f"P/{i}.png" for i in range(1, 5)]
    write(tmp_path, {
        "flintstones_annotations_v1-0.json": [{"globalID": f, "description": f"fred {f}"} for f in frames],
        "train-val-test_split.json": {"test": [frames[0], "unknown"]},
        "video_frames_sampled_png/P/0.png": PICTURE,
    })  # fmt: skip
    (sample,), _ = read("flintstones", tmp_path)
    assert said(sample) == ["Fred p/0", "video_frames_sampled_png/P/0.png", "Fred p/1"]


def test_captions(tmp_path):
    row = {"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["a man", "a bike"]}
    table = {
        "images": [{"id": 1, "file_name": "f.jpg"}],
        "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": 1, "caption": "y"}],
    }
    paragraphs = {
        "annotations": [{"image_id": i, "caption": f"p{i}", "url": f"http://x/VG_100K/{i}.jpg"} for i in (1, 2)]
    }
    write(tmp_path, {
        "annotations/coco_karpathy_test.json": [row, row], row["image"]: PICTURE, "f.jpg": PICTURE,
        "nocaps_val_4500_captions.json": table,
        "annotations/paragraphs_coco.json": paragraphs, "test_split.json": [2], "VG_100K/2.jpg": PICTURE,
    })  # fmt: skip
    (sample,), _ = read("coco-captions", tmp_path)
    assert (sample.id, said(sample)) == ("391895", [row["image"], "a photo of"])
    assert sample.reference["captions"] == ["a man", "a bike"]
    (sample,), _ = read("nocaps", tmp_path, variant="tuned")
    assert said(sample)[1] == "Provide a one-sentence caption for the provided image."
    assert sample.reference["captions"] == ["x", "y"]
    write(tmp_path, {"test1k.token.coco_format": table})
    assert read("flickr30k", tmp_path)[0][0].reference["captions"] == ["x", "y"]
    (sample,), _ = read("image2paragraph", tmp_path)
    assert said(sample) == ["VG_100K/2.jpg", "Please describe the image in detail. The image depicts"]


@pytest.mark.parametrize("name,prefix", [("vqav2", "v2_"), ("okvqa", "")])
def test_questions_of_vqa(name, prefix, tmp_path):
    path = "val2014/COCO_val2014_000000000042.jpg"
    write(tmp_path, {
        f"{prefix}OpenEnded_mscoco_val2014_questions.json":
            {"questions": [{"question_id": 1, "image_id": 42, "question": "Is it?"}]},
        f"{prefix}mscoco_val2014_annotations.json":
            {"annotations": [{"question_id": 1, "answers": VQA_ANSWERS, "answer_type": "yes/no"}]},
        path: PICTURE,
    })  # fmt: skip
    (sample,), _ = read(name, tmp_path)
    assert said(sample) == [
        "Based on the image, please answer the question.",
        path,
        "Is it? Please provide an accurate answer within one word. The answer is:",
    ]
    assert sample.reference["answers"] == VQA_ANSWERS and sample.facets == {"answer type": "yes/no"}


def test_other_questions(tmp_path):
    asked = {"question_id": 1, "image_id": "x", "image": "t.jpg", "question": "q"}
    seen = {"image": "VizWiz_val_00000007.jpg", "question": "q", "answers": [{"answer": "a"}], "answer_type": "other"}
    write(tmp_path, {
        "textvqa_val_questions.json": {"questions": [asked]},
        "textvqa_val_annotations.json": {"annotations": [{"question_id": 1, "answers": VQA_ANSWERS}]},
        "val.json": [seen],
        "testdev_balanced_questions.json": {"9": {"imageId": "n1", "question": "q", "answer": "a"}},
        "t.jpg": PICTURE, "val/VizWiz_val_00000007.jpg": PICTURE, "images/n1.jpg": PICTURE,
    })  # fmt: skip
    assert said(read("textvqa", tmp_path)[0][0])[1] == "t.jpg"
    (sample,), _ = read("vizwiz", tmp_path)
    assert sample.id == "7" and "'Unanswerable'" in said(sample)[2] and sample.reference["answers"] == ["a"]
    assert read("gqa", tmp_path)[0][0].reference == {"answer": "a", "question": "q"}


def test_visdial_shows_all_rounds_or_all_but_the_last(tmp_path):
    rounds = [{"question": i, "answer": i, "answer_options": [0, 1, 2], "gt_index": i} for i in range(3)]
    data = {"questions": ["q0", "q1", "q2"], "answers": ["a0", "a1", "a2"]}
    dialogs = [{"image_id": 5, "caption": "a cat", "dialog": rounds}]
    write(tmp_path, {
        "visdial_1.0_val.json": {"data": {**data, "dialogs": dialogs}},
        "visdial_1.0_val_dense_annotations.json": [{"image_id": 5, "round_id": 3, "gt_relevance": [0, 1, 0.5]}],
        "VisualDialog_val2018/VisualDialog_val2018_000000000005.jpg": PICTURE,
    })  # fmt: skip
    (sample,), _ = read("visdial", tmp_path)
    assert (
        said(sample)[1] == "caption: a cat. question: q0? answer: a0. question: q1? answer: a1. question: q2? answer:"
    )
    assert sample.options == ("a0", "a1", "a2") and sample.reference == {"relevance": [0, 1, 0.5], "given": 2}
    (sample,), _ = read("visdial", tmp_path, variant="released")
    assert said(sample)[1] == "caption: a cat. question: q0? answer: a0. question: q2? answer:"


def test_refcoco_asks_on_a_grid(tmp_path):
    row = {"image": "r.png", "sent": "the dog", "bbox": [10, 5, 20, 20]}
    write(tmp_path, {"refcoco_val.jsonl": [row], "r.png": PICTURE})
    (sample,), _ = read("refcoco", tmp_path)
    assert said(sample)[1].endswith("this sentence describes. the dog<box>")
    pixels = [10.0, 5.0, 20.0, 20.0]
    assert sample.reference == {"box": [249.0, 249.0, 499.0, 999.0], "pixels": pixels, "size": [40, 20]}


def test_pope_and_mme(tmp_path):
    for split in ("random", "popular", "adversarial"):
        row = {"question_id": 1, "image": "p.jpg", "text": "Is there a cat?", "label": "no"}
        write(tmp_path, {f"coco_pope_{split}.json": ""})
        (tmp_path / f"coco_pope_{split}.json").write_text(str(row).replace("'", '"') + "\n")
    write(tmp_path, {"val2014/p.jpg": PICTURE})
    samples, _ = read("pope", tmp_path)
    assert [sample.id for sample in samples] == ["random-1", "popular-1", "adversarial-1"]
    assert said(samples[0]) == ["val2014/p.jpg", "Is there a cat? Please answer yes or no."]
    assert len(read("pope", tmp_path, split="popular", variant="plain")[0]) == 1
    for task in ("commonsense_reasoning", "numerical_calculation", "text_translation"):
        write(tmp_path, {f"{task}/1.txt": "Q1?\tYes\nQ2?\tNo\n", f"{task}/1.png": PICTURE})
    inner = "code_reasoning/questions_answers_YN/2.txt"
    write(tmp_path, {inner: "Q?\tNo\n", "code_reasoning/images/2.jpg": PICTURE})
    samples, _ = read("mme", tmp_path, split="cognition")
    assert len(samples) == 7 and samples[0].reference["answer"] == "yes"
    assert said(samples[-1]) == ["code_reasoning/images/2.jpg", "Q?"]


def test_mmbench_rotates_the_options(tmp_path):
    image = base64.b64encode(PICTURE).decode()
    head = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n"
    rows = f"3\tWhat?\t\tcat\tdog\tcow\t\tB\tanimals\t{image}\n4\tWho?\tlook\tx\ty\t\t\tA\tpeople\t3\n"
    write(tmp_path, {"mmbench_dev_en.tsv": head + rows})
    samples, _ = read("mmbench", tmp_path)
    assert [sample.id for sample in samples] == ["3", "1000003", "2000003", "4", "1000004"]
    assert [s.reference["options"][s.reference["answer"]] for s in samples] == ["dog", "dog", "dog", "x", "x"]
    assert samples[1].reference["options"] == {"A": "dog", "B": "cow", "C": "cat"}
    assert said(samples[3]) == [len(PICTURE), "look\nWho?\nA. x\nB. y\nAnswer with the option's letter from the given "
                                              "choices directly."]  # fmt: skip
    assert len(read("mmbench", tmp_path, variant="once")[0]) == 2
    assert {s.reference["rotations"] for s in samples[:3]} == {3}
    # a byte order mark changes nothing, an answer that is held back is not A
    (tmp_path / "mmbench_dev_en.tsv").write_text("\ufeff" + head + rows)
    assert read("mmbench", tmp_path)[0] == samples
    (tmp_path / "mmbench_dev_en.tsv").write_text(head + rows.replace("\tA\tpeople", "\t\tpeople"))
    with pytest.raises(WeftError, match="question 4 has the answer ''"):
        read("mmbench", tmp_path)


def test_mmmu_weaves_its_pictures_in(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"id": "validation_Art_1", "question": "Look <image 1> who?", "options": "['a', \"b's\"]", "answer": "B",
         "question_type": "multiple-choice", "image_1": {"bytes": PICTURE}},
        {"id": "validation_Art_2", "question": "How many <image 1>", "options": "[]", "answer": "['2', 'two']",
         "question_type": "open", "image_1": {"bytes": PICTURE}},
    ]  # fmt: skip
    (tmp_path / "Art").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "Art/validation-00000-of-00001.parquet")
    samples, _ = read("mmmu", tmp_path)
    assert said(samples[0])[:2] == ["Look", len(PICTURE)] and "(B) b's" in said(samples[0])[2]
    assert samples[0].reference == {"options": {"A": "a", "B": "b's"}, "answers": ["B"]}
    assert samples[1].reference == {"options": {}, "answers": ["2", "two"]} and samples[1].facets == {"subject": "Art"}


def test_pictures_of_texts_and_maps(tmp_path):
    labels = io.BytesIO()
    PILImage.new("L", (4, 4), 3).save(labels, "PNG")
    clause = {"class": "cat", "count": 1}
    write(tmp_path, {
        "annotations/captions_val2014.json": {"annotations": [
            {"image_id": 9, "caption": "A Cat"}, {"image_id": 9, "caption": "again"}, {"image_id": 4, "caption": "Dog"}
        ]},
        "coco_val_captions.jsonl": [{"image_id": 9, "caption": "In This Image"}],
        "evaluation_metadata.jsonl": [{"tag": "single_object", "include": [clause], "prompt": "a photo of a cat"}],
        "validation.json": [{"image_id": "v1", "caption": "a room"}],
        "annotations_with_color/validation/v1.png": PICTURE, "annotations/validation/v1.png": labels.getvalue(),
    })  # fmt: skip
    samples, _ = read("coco-30k", tmp_path)
    mm_interleaved, _ = read("coco-30k", tmp_path, variant="mm-interleaved")
    assert [said(sample) for sample in samples] == [["a cat"], ["dog"]] == [said(s) for s in mm_interleaved]
    assert samples[0].reference["images"] == ["val2014/COCO_val2014_000000000009.jpg"]
    assert said(read("ln-coco", tmp_path)[0][0]) == ["In This Image"]
    samples, _ = read("geneval", tmp_path)
    assert [sample.sampling["seed"] for sample in samples] == [0, 1, 2, 3] and len({s.unit for s in samples}) == 1
    assert said(read("ade20k", tmp_path)[0][0]) == ["annotations_with_color/validation/v1.png", "a room."]


def coco(tmp_path, images=40):
    rows = [
        {"id": 100 * i + k, "image_id": i, "caption": f" Caption {k} of {i} "} for k in (3, 1, 2) for i in range(images)
    ]
    return write(tmp_path, {"annotations/captions_val2014.json": {"annotations": rows}})


def test_captions_of_coco_are_the_first_ones_or_drawn_by_a_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "COCO_N", 20)
    first, _ = read("coco-30k", coco(tmp_path))
    assert [(each.id, said(each)) for each in first] == [(str(i), [f"caption 3 of {i}"]) for i in range(20)]
    drawn, facts = read("coco-30k", tmp_path, variant="drawn")
    assert len({each.reference["images"][0] for each in drawn}) == 20 and facts["ids"] == [each.id for each in drawn]
    assert [int(each.id) // 100 for each in drawn] != list(range(20))
    assert len({said(each)[0][:9] for each in drawn}) == 3  # not always the first one
    # the file's order and other pictures that are not drawn change nothing; the seed does
    table = json.loads((tmp_path / "annotations/captions_val2014.json").read_text())
    shuffled = {"annotations": table["annotations"][::-1]}
    write(tmp_path, {"annotations/captions_val2014.json": shuffled})
    assert read("coco-30k", tmp_path, variant="drawn")[1] == facts
    write(tmp_path, {"coco_30k_ids.json": facts["ids"]})
    assert read("coco-30k", tmp_path, variant="listed")[0] == drawn
    monkeypatch.setattr(pictures, "COCO_SEED", 7)
    assert read("coco-30k", tmp_path, variant="drawn")[1]["ids"] != facts["ids"]


def test_a_published_list_of_captions_is_taken_as_it_is(tmp_path):
    write(coco(tmp_path), {"coco_30k_ids.json": [502, 501, 3]})
    samples, _ = read("coco-30k", tmp_path, variant="listed")
    assert [each.id for each in samples] == ["502", "501", "3"]
    assert [each.reference["images"][0][-7:] for each in samples] == ["005.jpg", "005.jpg", "000.jpg"]
    write(tmp_path, {"coco_30k_ids.json": [502, 999]})
    with pytest.raises(WeftError, match="no caption 999"):
        read("coco-30k", tmp_path, variant="listed")


def test_long_captions_are_drawn_again_up_to_a_number_rarer_pictures_more_often(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "COCO_N", 400)
    rows = [{"image_id": 1 if i < 9 else 2, "caption": f"c{i}"} for i in range(10)]
    write(tmp_path, {"coco_val_captions.jsonl": rows})
    once, _ = read("ln-coco", tmp_path)
    samples, facts = read("ln-coco", tmp_path, variant="mm-interleaved")
    assert (
        len(samples) == 400 and samples[:10] == once and read("ln-coco", tmp_path, variant="mm-interleaved")[1] == facts
    )
    seeds = [dict(each.sampling) for each in samples if said(each) == ["c9"]]
    assert seeds == [{}, *({"seed": i} for i in range(1, len(seeds)))]
    assert 150 < len(seeds) < 240  # one picture of two, not one caption of ten


def test_mm_vet(tmp_path):
    row = {"imagename": "v.jpg", "question": "Why?", "answer": "so <OR> thus", "capability": ["ocr", "math"]}
    write(tmp_path, {"mm-vet.json": {"v1_0": row}, "images/v.jpg": PICTURE})
    (sample,), _ = read("mm-vet", tmp_path)
    assert said(sample) == ["images/v.jpg", "Why?"] and sample.reference["capabilities"] == ["ocr", "math"]


def test_names_that_are_nearly_right_are_suggested(tmp_path):
    with pytest.raises(UsageError) as caught:
        read("magicbrsh", tmp_path)
    assert caught.value.fix == "did you mean magicbrush?"
    with pytest.raises(UsageError, match="no split of vist 'train'"):
        read("vist", tmp_path, split="train")
