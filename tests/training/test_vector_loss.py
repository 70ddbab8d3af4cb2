"""What is learnt of pictures that are vectors."""

import pytest
import torch
from PIL import Image as PILImage
from torch.nn import functional as F

from weft.adapters import AdapterConfig, adapter_parameters, attach
from weft.backbones import load_backbone
from weft.backbones.base import encode_document
from weft.data.collate import collate
from weft.data.packing import split_to_fit
from weft.document import Document, Image, assistant, user
from weft.images import encode_png
from weft.layout import FEATURE, ImageSpan
from weft.training import Objective, evaluate_loss
from weft.training.objective import CorruptionConfig, LossConfig, corrupt, count_targets


def part(colour):
    return Image(encode_png(PILImage.new("RGB", (20, 20), colour)))


DOCUMENTS = [
    Document((user("look", part("red")), assistant("so", part("blue"), "and", part("green")))),
    Document((user("say"), assistant("no picture"))),
    Document(
        (user("two"), assistant(part("white"))),
    ),
]


@pytest.fixture(scope="module")
def emu2():
    return load_backbone("nano-emu2")


@pytest.fixture(scope="module")
def batch(emu2):
    return collate([encode_document(emu2, document) for document in DOCUMENTS], emu2.tokens.pad)


def vectors_by_hand(backbone, kind):
    """The error of every vector to be learnt, one at a time, in float64."""
    errors = []
    for document in DOCUMENTS:
        sequence = encode_document(backbone, document)
        alone = collate([sequence], backbone.tokens.pad)
        with torch.no_grad():
            hidden = backbone.forward(backbone.embed(alone.ids, alone.layout, alone.features), alone.layout)[0]
            predicted = backbone.image_features(hidden).double()
        number = 0
        for t, id in enumerate(sequence.ids.tolist()):
            if id == FEATURE:
                target = sequence.features[number].double()
                number += 1
                if sequence.is_target[t]:
                    said = predicted[t - 1]
                    mse = ((said - target) ** 2).sum() / len(target)
                    cosine = 1 - (said @ target) / (said.norm() * target.norm())
                    errors.append(float(mse if kind == "mse" else cosine))
    return errors


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_the_loss_of_vectors_is_the_mean_over_vectors_of_their_error(emu2, batch, kind):
    errors = vectors_by_hand(emu2, kind)
    losses = evaluate_loss(Objective(emu2, config=LossConfig(regression=kind, image_weight=0.5)), [batch])
    assert losses.image_targets == len(errors) == 3 * emu2.form.patches
    assert losses.image == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert losses.total == pytest.approx(losses.text + 0.5 * losses.image, rel=1e-6)


def test_codes_count_as_often_as_their_weight_says():
    backbone = load_backbone("nano")
    batch = collate([encode_document(backbone, document) for document in DOCUMENTS], backbone.tokens.pad)
    losses = evaluate_loss(Objective(backbone, config=LossConfig(image_weight=3)), [batch])
    texts, images = count_targets(batch).tolist()
    assert losses.total == pytest.approx((texts * losses.text + 3 * images * losses.image) / (texts + images), rel=1e-5)


def test_only_pictures_to_be_learnt_are_made_noisy(batch):
    torch.manual_seed(0)
    noisy = corrupt(batch, CorruptionConfig())
    changed = (noisy != batch.features).any(-1)
    is_vector, given = batch.ids == FEATURE, torch.zeros_like(batch.ids, dtype=torch.bool)
    given[0] = batch.layout.inputs.image[0] == 0  # the red picture of the first document
    assert torch.equal(changed, is_vector & ~given)
    assert torch.equal(corrupt(batch, CorruptionConfig(noise=0, replaced=0)), batch.features)


def test_replaced_vectors_forget_what_they_were(batch):
    torch.manual_seed(1)
    replaced = corrupt(batch, CorruptionConfig(noise=0, replaced=1.0))
    changed = (replaced != batch.features).any(-1)
    share = changed.sum() / (batch.ids == FEATURE).sum()
    assert 0 < share < 1
    spread = batch.features[changed].std(-1)
    assert (replaced[changed].std(-1) / spread).mean() == pytest.approx(1.0, abs=0.5)
    assert F.cosine_similarity(replaced[changed], batch.features[changed]).abs().mean() < 0.8


def test_noise_is_for_training_only_and_targets_stay_clean(batch):
    backbone = load_backbone("nano-emu2")
    attach(backbone, AdapterConfig(rank=2))
    noisy = Objective(backbone, config=LossConfig(corruption=CorruptionConfig()))
    plain = Objective(backbone)
    backbone.decoder.eval()
    assert torch.equal(noisy(batch), plain(batch))
    backbone.decoder.train()
    torch.manual_seed(0)
    first = noisy(batch)
    torch.manual_seed(0)
    assert torch.equal(noisy(batch), first)
    assert not torch.equal(first, plain(batch))
    first.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(backbone).values())


def test_a_batch_without_vectors_leaves_zero_gradients_not_none():
    backbone = load_backbone("nano-emu2")
    attach(backbone, AdapterConfig(rank=2))
    for parameter in adapter_parameters(backbone).values():
        torch.nn.init.normal_(parameter, std=0.1)
    text = collate([encode_document(backbone, DOCUMENTS[1])], backbone.tokens.pad)
    assert text.features is None
    losses = Objective(backbone)(text)
    assert losses[1] == 0
    losses.sum().backward()
    gradients = {name: parameter.grad for name, parameter in adapter_parameters(backbone).items()}
    assert all(gradient is not None for gradient in gradients.values())
    assert all(gradient.eq(0).all() for name, gradient in gradients.items() if "moss_image" in name)


@pytest.mark.parametrize("name", ["nano-emu2", "nano-emu3", "nano-janus"])
@pytest.mark.parametrize("spare", [0, 1, 7])
def test_pieces_of_a_long_document_keep_pictures_whole_and_their_vectors(name, spare):
    backbone = load_backbone(name)
    pictures = [part(colour) for colour in ("red", "blue", "green")]
    answer = assistant("once " * 3, pictures[0], "then " * 9, pictures[1], pictures[2], "end")
    whole = encode_document(backbone, Document((user("go", part("black")), answer)))
    longest = max(span.length + span.before + span.after for span in whole.spans if isinstance(span, ImageSpan))
    pieces = split_to_fit(whole, longest + 1 + spare, "split")
    assert len(pieces) > 1
    assert torch.cat([piece.ids[1:] for piece in pieces]).tolist() == whole.ids[1:].tolist()
    batch = collate(pieces, backbone.tokens.pad)  # refuses what does not fit together
    spans = [span for piece in pieces for span in piece.spans if isinstance(span, ImageSpan)]
    assert spans == [span for span in whole.spans if isinstance(span, ImageSpan)]
    for piece in pieces:
        at = 0
        for span in piece.spans:
            if isinstance(span, ImageSpan):
                assert piece.ids[at - span.before] == backbone.tokens.begin_image
                assert piece.ids[at + span.length + span.after - 1] == backbone.tokens.end_image
            at += span.length
    if whole.features is not None:
        rows = torch.cat([piece.features for piece in pieces if piece.features is not None])
        assert torch.equal(rows, whole.features)
        assert torch.equal(batch.features[batch.ids == FEATURE], whole.features)
