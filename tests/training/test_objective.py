"""What is learnt, and from which positions."""

import math

import pytest
import torch

from weft.adapters import AdapterConfig, adapter_parameters, attach
from weft.backbones import load_backbone
from weft.backbones.base import encode_document
from weft.data import open_dataset
from weft.data.collate import collate
from weft.training import Losses, Objective, evaluate_loss
from weft.training.objective import count_targets


@pytest.fixture
def adapted():
    backbone = load_backbone("nano")
    attach(backbone, AdapterConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(backbone).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return backbone


@pytest.fixture
def sequences(adapted, documents):
    dataset = open_dataset(documents)
    return [encode_document(adapted, dataset[i]) for i in range(5)]


@torch.no_grad()
def by_hand(backbone, sequence):
    """Cross-entropies of one sequence, a target at a time, in float64: text targets, picture targets."""
    batch = collate([sequence], backbone.tokens.pad)
    hidden = backbone.forward(backbone.embed(batch.ids, batch.layout), batch.layout)[0]
    logits = backbone.head(hidden).double()
    cut = backbone.config.vocabulary
    text, image = [], []
    for t in range(len(sequence) - 1):
        if sequence.is_target[t + 1]:
            target = sequence.ids[t + 1].item()
            of_text = target < cut
            shown = logits[t, :cut] if of_text else logits[t, cut:]
            (text if of_text else image).append(float(shown.logsumexp(0) - logits[t, target]))
    return text, image


def test_losses_are_means_over_text_and_over_picture_targets(adapted, sequences):
    each = [by_hand(adapted, sequence) for sequence in sequences]
    text, image = ([loss for pair in each for loss in pair[kind]] for kind in (0, 1))
    assert text
    assert image
    # batched: padding and neighbours change nothing
    losses = evaluate_loss(Objective(adapted), [collate(sequences, adapted.tokens.pad)])
    assert (losses.text_targets, losses.image_targets) == (len(text), len(image))
    # float32 products against the same in float64 sums
    assert losses.text == pytest.approx(math.fsum(text) / len(text), rel=1e-5)
    assert losses.image == pytest.approx(math.fsum(image) / len(image), rel=1e-5)
    assert losses.total == pytest.approx(math.fsum(text + image) / len(text + image), rel=1e-5)


def test_only_the_answer_counts(adapted, sequences):
    batch = collate(sequences[:1], adapted.tokens.pad)
    answer = sequences[0].is_target.sum()
    assert count_targets(batch).sum() == answer < len(sequences[0]) - 1


def test_no_targets_of_a_kind_is_no_number():
    losses = Losses.of(torch.tensor([6.0, 0.0]), torch.tensor([3, 0]), torch.tensor([1 / 3, 1 / 3]))
    assert (losses.text, losses.image, losses.total) == (2.0, None, pytest.approx(2.0))
    assert Losses.of(torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.ones(2)).total is None


def test_a_batch_without_pictures_leaves_zero_gradients_not_none(adapted, sequences):
    text_only = [sequence for sequence in sequences if all(id < adapted.config.vocabulary for id in sequence.ids)]
    assert text_only
    Objective(adapted)(collate(text_only, adapted.tokens.pad)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in adapter_parameters(adapted).items()}
    assert all(gradient is not None for gradient in gradients.values())
    assert all(gradient.eq(0).all() for name, gradient in gradients.items() if "moss_image" in name)


def test_reduced_precision_is_close(adapted, sequences):
    batch = [collate(sequences, adapted.tokens.pad)]
    full, reduced = (evaluate_loss(Objective(adapted, dtype), batch) for dtype in (torch.float32, torch.bfloat16))
    assert reduced.total == pytest.approx(full.total, rel=0.02)  # bf16 keeps 8 bits
    assert reduced.total != full.total
