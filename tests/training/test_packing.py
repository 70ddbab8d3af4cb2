"""Documents in rows: read and learnt as if each were alone, resumed to the bit, and said how full rows are."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image as PILImage

from weft.adapters import AdapterConfig, adapter_parameters, attach
from weft.backbones import load_backbone
from weft.backbones.base import encode_document
from weft.backbones.mm_interleaved.painting import Draws
from weft.data.collate import IGNORED, collate
from weft.data.packing import cut, extent_of, join
from weft.document import Document, Image, assistant, user
from weft.errors import ConfigError, UsageError
from weft.images import encode_png
from weft.layout import Modality
from weft.synchronizer import SynchronizerConfig, attach_synchronizer, synchronizer_parameters
from weft.synchronizer.eye import EyeConfig
from weft.training import TrainConfig, build, make_plan, steps, train
from weft.training.examples import fingerprint
from weft.training.objective import Objective, count_targets

from .conftest import write_documents

FAMILIES = ["nano", "nano-chameleon", "nano-janus", "nano-emu3", "nano-emu2", "nano-mm_interleaved"]
SMALL = SynchronizerConfig(eye=EyeConfig(side=16, width=8, stem=4, scales=2), every=2, value_width=8, heads=2, points=2)
TOLERANCE = 1e-5


def picture(seed: int) -> Image:
    pixels = torch.randint(256, (24, 24, 3), generator=torch.Generator().manual_seed(seed)).byte().numpy()
    return Image(encode_png(PILImage.fromarray(pixels)))


DOCUMENTS = [
    Document((user("one of two"), assistant("so ", picture(0), " and ", picture(1))), "ends with a picture"),
    Document((user(picture(2), "what is it?"), assistant("a word")), "a given picture"),
    Document((assistant(picture(3), "it began with a picture"),), "begins with a picture"),
    Document((user("no picture"), assistant("none at all")), "text"),
    Document((user("another", picture(4)), assistant(picture(5), picture(6))), "three pictures"),
]


@pytest.fixture(scope="module", params=[*FAMILIES, "nano + synchronizer", "nano-emu2 + synchronizer"])
def model(request):
    """A model with MoSS, and all that starts at zero made large enough to matter."""
    name, *more = request.param.split(" + ")
    backbone = load_backbone(name)
    attach(backbone, AdapterConfig(rank=2))
    if more:
        attach_synchronizer(backbone, SMALL)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained(backbone).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        parameter.requires_grad_(True)
    backbone.decoder.eval()
    return backbone


def trained(backbone) -> dict[str, torch.nn.Parameter]:
    own = synchronizer_parameters(backbone) if backbone.synchronizer and not hasattr(backbone, "unet") else {}
    return {**adapter_parameters(backbone), **own}


@pytest.fixture
def same_noise(monkeypatch):
    """Every picture that is painted gets the noise of its number, whatever it stands beside; called to begin anew."""
    drawn = itertools.count()
    one = Draws.make

    def make(shape, times, device):
        found = []
        for _ in range(shape[0]):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(next(drawn))
                found.append(one((1, *shape[1:]), times, device))
        names = ("posterior", "noise", "times", "uniform")
        return Draws(*(torch.cat([getattr(each, name) for each in found]) for name in names))

    def begin_anew():
        nonlocal drawn
        drawn = itertools.count()

    monkeypatch.setattr(Draws, "make", make)
    return begin_anew


def sequences_of(backbone):
    return [encode_document(backbone, document) for document in DOCUMENTS]


def rows_of(sequences):
    """Of unlike lengths, so that one is padded; and one document alone in a row."""
    return [join(sequences[:3]), join(sequences[3:4]), join(sequences[4:] + sequences[:1])], [0, 1, 2, 3, 4, 0]


def learn(backbone, batches) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    for parameter in trained(backbone).values():
        parameter.grad = None
    sums = sum(Objective(backbone)(batch) for batch in batches)
    sums.sum().backward()
    return sums.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained(backbone).items()}


def test_an_isolated_row_is_learnt_as_its_documents_alone(model, same_noise):
    pad, sequences = model.tokens.pad, sequences_of(model)
    rows, numbers = rows_of(sequences)
    wanted, gradients = learn(model, [collate([sequences[number]], pad) for number in numbers])
    same_noise()
    batch = collate(rows, pad)
    losses, found = learn(model, [batch])
    torch.testing.assert_close(losses, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=TOLERANCE, atol=TOLERANCE * max(scale, 1), msg=name)
    alone = torch.stack([count_targets(collate([sequences[number]], pad)) for number in numbers]).sum(0)
    assert torch.equal(count_targets(batch), alone)


@torch.no_grad()
def states(backbone, batch):
    seen = {}
    forward = type(backbone).forward

    def tap(embeds, layout, step=None):
        seen["hidden"] = forward(backbone, embeds, layout, step)
        return seen["hidden"]

    backbone.forward = tap
    try:
        Objective(backbone)(batch)
    finally:
        del backbone.forward
    return seen["hidden"]


@pytest.mark.parametrize("attention", ["isolated", "full"])
def test_states_are_those_of_each_document_alone_unless_the_whole_row_is_read(model, attention):
    pad, sequences = model.tokens.pad, sequences_of(model)
    rows, numbers = rows_of(sequences)
    hidden = states(model, collate(rows, pad, isolated=attention == "isolated"))
    numbers, places = iter(numbers), [(row, length) for row, each in enumerate(rows) for length in each.documents]
    start = dict.fromkeys(range(len(rows)), 0)
    for row, length in places:
        alone = states(model, collate([sequences[next(numbers)]], pad))[0]
        part = hidden[row, start[row] : start[row] + length]
        if attention == "isolated" or start[row] == 0:
            torch.testing.assert_close(part, alone, rtol=TOLERANCE, atol=TOLERANCE * float(alone.abs().max()))
        else:
            assert (part - alone).abs().max() > 1e-3 * alone.abs().max()
        start[row] += length


def test_nothing_of_one_document_reaches_another(model):
    """Not even a bit: the gradients of one document's states are exactly zero everywhere else, pictures included."""
    sequences = sequences_of(model)
    batch = collate([join([sequences[0], sequences[4], sequences[1]])], model.tokens.pad)
    first, second, _ = (len(sequences[i]) for i in (0, 4, 1))
    layout, features, pixels = batch.layout, batch.features, None
    if model.synchronizer is not None:
        from weft.synchronizer.sight import see

        look, pixels = model.synchronizer.look, batch.pictures.seen.float().requires_grad_(True)
        model.synchronizer.__dict__["look"] = lambda given: model.synchronizer.eye(given / 255)
        try:
            layout, vectors, _ = see(model.synchronizer, pixels, batch.ids, layout, model.tokens.begin)
        finally:
            del model.synchronizer.__dict__["look"]
        assert look is not None
        features = features if vectors is None else vectors
    embeds = model.embed(batch.ids, layout, features).detach().requires_grad_(True)
    hidden = model.forward(embeds, layout)
    hidden[0, first : first + second].square().sum().backward()
    assert embeds.grad[0, first : first + second].abs().amax(-1).min() > 0
    assert embeds.grad[0, :first].abs().max() == 0
    assert embeds.grad[0, first + second :].abs().max() == 0
    if pixels is not None:
        others = torch.ones(len(pixels), dtype=torch.bool)
        others[2:5] = False  # those of the second document
        assert pixels.grad[~others].abs().max() > 0
        assert pixels.grad[others].abs().max() == 0


def test_nothing_is_learnt_of_first_tokens_and_padding():
    backbone = load_backbone("nano")
    sequences = sequences_of(backbone)
    for sequence in sequences:
        sequence.is_target[:] = True  # even if somebody wanted it
    batch = collate([join(sequences[:2]), join(sequences[2:])], backbone.tokens.pad)
    numbers = batch.layout.documents
    is_last = numbers != numbers.roll(-1, 1)  # its successor is of another document, or padding
    is_last[:, -1] = True
    assert (batch.labels[is_last | (numbers < 0)] == IGNORED).all()
    assert (batch.labels[~is_last & (numbers >= 0)] != IGNORED).all()
    assert torch.equal(numbers < 0, batch.layout.inputs.modality == Modality.NONE)
    for row, lengths in enumerate(([len(s) for s in sequences[:2]], [len(s) for s in sequences[2:]])):
        wanted = torch.cat([torch.arange(length) for length in lengths])
        assert torch.equal(batch.layout.places[row, : len(wanted)], wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_of_a_document_hold_all_of_it(name):
    backbone = load_backbone(name)
    whole = encode_document(backbone, DOCUMENTS[0])
    extent = extent_of(whole)
    assert len(extent.pictures) == 2
    middle = extent.pictures[1][0]
    pieces = [cut(whole, 0, middle, again=False), cut(whole, middle, len(whole), again=False)]
    row = join(pieces)
    assert torch.equal(row.ids, whole.ids)
    assert [span for span in row.spans if hasattr(span, "rows")] == [s for s in whole.spans if hasattr(s, "rows")]
    assert len(row.pixels) == len(whole.pixels)
    if whole.features is not None:
        assert torch.equal(row.features, whole.features)
    again = cut(whole, middle, len(whole), again=True)
    assert torch.equal(again.ids, torch.cat((whole.ids[:1], whole.ids[middle:])))
    collate([again, row], backbone.tokens.pad)  # at one with themselves


def test_attention_that_cannot_keep_documents_apart_is_refused_by_name():
    backbone = load_backbone("nano")
    batch = collate([join(sequences_of(backbone)[:2])], backbone.tokens.pad)
    backbone.decoder.config._attn_implementation = "eager"
    with pytest.raises(UsageError, match=r"ChameleonModel \(eager\) cannot keep the documents of a row apart"):
        Objective(backbone)(batch)
    Objective(backbone)(replace(batch, layout=replace(batch.layout, documents=None)))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("others") / "others.jsonl", count=4)


@pytest.fixture
def packed(recipe, documents, others):
    """A recipe with packing and two datasets, the second at twice the weight."""

    def make(packing="best_fit", data=None, **changes):
        sets = [{"path": documents}, {"path": others, "weight": 2}]
        rows = {"window": 6, "max_images": 6}
        section = {"path": None, "sets": sets, "context": 120, "packing": packing, "rows": rows, **(data or {})}
        return recipe(data=section, **{"sampling": {"every": None}, **changes})

    return make


@pytest.mark.parametrize("packing", ["best_fit", pytest.param("stream", marks=pytest.mark.slow)])
def test_resumed_is_uninterrupted(packed, tmp_path, results, packing):
    ends = []
    for cut_after, workers, cache in ((None, 0, None), (1, 2, None), (4, 3, tmp_path / "cache")):
        data = {"workers": workers, "cache": cache}
        config = packed(packing, data, out=tmp_path / f"run{len(ends)}", schedule={"steps": 6, "warmup": 1})
        if cut_after is not None:
            asked = itertools.count()
            stop = lambda asked=asked, cut_after=cut_after: next(asked) == cut_after  # noqa: E731
            assert list(train(config, stop=stop))[-1].step == cut_after
        list(train(config))
        ends.append(results(config.out))
    assert ends[0].keys() == ends[1].keys()
    assert all(end == ends[0] for end in ends[1:])


def test_rows_hold_what_documents_alone_do(packed):
    """A pass in rows learns the targets of a pass without them, in fewer and fuller sequences."""
    totals = {}
    for packing in ("none", "best_fit"):
        data = {"sets": packed().data.sets[:1], "validation": 0, "rows": {"window": 10}}
        training = build(packed(packing, data, optim={"batch": 1, "micro_batch": None}, schedule={"steps": 40}))
        targets, rows, positions = [0, 0], 0, 0
        for report in steps(training):
            if report.epoch > 1:
                break
            targets[0] += report.losses.text_targets
            targets[1] += report.losses.image_targets
            rows, positions = rows + 1, positions + report.positions
        totals[packing] = (targets, rows, positions)
    assert totals["best_fit"][0] == totals["none"][0]
    assert totals["best_fit"][2] == totals["none"][2]
    assert totals["best_fit"][1] < totals["none"][1] == 10


@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_rows_keep_to_their_bounds_and_sets_to_their_weights(packed, packing, others):
    training = build(packed(packing, {"validation": 0}))
    names: list[str] = []
    for loaded in itertools.islice(training.loader, 30):
        for row, (sequence,) in zip(loaded.rows, loaded.read, strict=True):
            assert len(sequence) == row.length == sum(sequence.documents) <= 120
            assert row.pictures == sum(hasattr(span, "rows") for span in sequence.spans) <= 6
            names += [training.order[piece.document] for piece in row.pieces if piece.start == 0]
    second = sum(number >= 10 for number in names)
    assert second / len(names) == pytest.approx(2 / 3, abs=0.02)


def test_long_documents_are_cut_in_rows_and_counted(packed):
    data = {"context": 24, "validation": 0, "rows": {"window": 14}}
    training = build(packed("best_fit", data, schedule={"steps": 6, "warmup": 1}))
    begin, counts = training.backbone.tokens.begin, []
    for loaded in itertools.islice(training.loader, 6):
        counts.append(0)
        for row, (sequence,) in zip(loaded.rows, loaded.read, strict=True):
            assert len(sequence) == row.length <= 24
            starts = torch.tensor([0, *itertools.accumulate(sequence.documents)][:-1])
            assert (sequence.ids[starts] == begin).all(), "each part begins like its document"
            counts[-1] += sum(piece.start > 0 for piece in row.pieces)
    assert sum(counts) > 0
    assert [report.cut_documents for report in steps(training)] == counts


def test_another_number_of_processes_is_refused_when_a_run_goes_on(packed):
    config = packed(schedule={"steps": 4, "warmup": 1})
    asked = itertools.count()
    list(train(config, stop=lambda: next(asked) == 2))
    state = next(config.out.glob("checkpoints/step_*/state.json"))
    assert json.loads(state.read_text())["loader"]["world"] == 1
    training = build(config)
    training.progress.step, training.progress.loader = 2, {**training.loader.state(), "world": 2}
    with pytest.raises(UsageError, match="2 processes shared the rows before, now 1"):
        next(steps(training))
    training.config = config.model_copy(update={"data": config.data.model_copy(update={"reshard": True})})
    assert next(steps(training)).step == 3


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_two_processes_give_the_run_of_one(packed, tmp_path, packing):
    # dropout draws differ between processes, so it is off
    settings = {"adapter": {"dropout": 0.0}, "optim": {"batch": 4}}
    alone, together = (packed(packing, out=tmp_path / name, **settings) for name in ("alone", "together"))
    list(train(alone))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(together.model_dump(mode="json")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "weft.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "train", str(file)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [[json.loads(x) for x in (c.out / "metrics.jsonl").read_text().splitlines()] for c in (alone, together)]
    for one, two in zip(*lines, strict=True):
        # float32 sums in another order
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert (two["text_targets"], two["epoch"]) == (one["text_targets"], one["epoch"])


# --- the cache --------------------------------------------------------------------------------------------------------


def test_documents_in_the_cache_are_encoded_once_for_all_runs(packed, tmp_path, results, monkeypatch):
    encoded = []

    def count(backbone, document, **options):
        encoded.append(document.id)
        return encode_document(backbone, document, **options)

    monkeypatch.setattr("weft.training.examples.encode_document", count)
    ends, counts = [], []
    for name, cache in (("without", None), ("first", tmp_path / "cache"), ("second", tmp_path / "cache")):
        encoded.clear()
        config = packed("best_fit", {"cache": cache}, out=tmp_path / name, schedule={"steps": 3, "warmup": 1})
        list(train(config))
        ends.append(results(config.out))
        counts.append(len([name for name in encoded if name]))
    assert ends[1] == ends[0] == ends[2]
    assert counts[0] == counts[1] > 0 == counts[2]


@pytest.mark.parametrize("name", FAMILIES)
def test_how_a_model_reads_is_known_and_changes_with_its_tokenizer_its_codec_and_its_types(name, monkeypatch):
    backbone = load_backbone(name)
    before = fingerprint(backbone)
    assert fingerprint(load_backbone(name)) == before
    with monkeypatch.context() as patch:
        tokenize = backbone.tokenize
        patch.setattr(backbone, "tokenize", lambda text: [*tokenize(text)[:-1], 7])
        assert fingerprint(backbone) != before
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "chat", replace(backbone.chat, end=(*backbone.chat.end, 7)))
        assert fingerprint(backbone) != before
    with monkeypatch.context() as patch:
        form = replace(backbone.form, before=(*backbone.form.before, 7))
        encode = backbone.encode_images
        patch.setattr(
            backbone, "encode_images", lambda *a, **k: [replace(elements, form=form) for elements in encode(*a, **k)]
        )
        assert fingerprint(backbone) != before
    assert fingerprint(backbone) == before
    backbone.table.to(torch.bfloat16) if hasattr(backbone, "table") else backbone.to(torch.bfloat16)
    assert fingerprint(backbone) != before


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_list_of_datasets_is_a_mixture(documents, others):
    config = TrainConfig.model_validate({"data": [{"path": documents}, {"path": others, "weight": 2}]})
    assert [(each.path, each.weight) for each in config.data.weighted] == [(documents, 1.0), (others, 2.0)]
    again = TrainConfig.model_validate(config.model_dump(mode="json"))
    assert again == config


@pytest.mark.parametrize("data", [{}, {"path": "a", "sets": [{"path": "b"}]}])
def test_one_of_path_and_sets_is_given(data):
    with pytest.raises(ValueError, match="path, or sets"):
        TrainConfig.model_validate({"data": data})


def test_a_set_of_which_nothing_is_left_is_named(packed, others):
    with pytest.raises(ConfigError, match="none is left"):
        build(packed(data={"validation": 13}))


@pytest.mark.parametrize("packing", ["best_fit", "stream"])
def test_the_plan_says_how_full_rows_are(packed, packing):
    rows = make_plan(packed(packing)).rows
    assert (rows.packing, rows.length, rows.documents) == (packing, 120, 6)
    assert 0.5 < rows.utilisation <= 1
    assert rows.alone < 0.6 * rows.utilisation
    assert 0 < rows.most_pictures <= 6
    assert make_plan(packed("none")).rows is None


def test_the_command_line_packs_and_says_so(recipe, tmp_path, capsys):
    from weft.cli import main

    file = tmp_path / "recipe.yaml"
    config = recipe(schedule={"steps": 2, "warmup": 1}, sampling={"every": None})
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with pytest.raises(SystemExit) as end:
        main(["train", str(file), "--data.packing", "best_fit", "--data.context", "120", "--dry-run"])
    assert end.value.code in (0, None)
    said = " ".join(capsys.readouterr().out.split())
    assert "rows: best_fit, 120 positions each, of which" in said
    assert not config.out.exists()
    with pytest.raises(SystemExit) as end:
        main(["train", str(file), "--data.packing", "best_fit", "--data.context", "120"])
    assert end.value.code in (0, None)
    assert (config.out / "adapter").is_dir()
