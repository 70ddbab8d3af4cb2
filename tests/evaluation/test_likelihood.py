"""An option's score is the sum of its tokens' log-probabilities, as the whole document's own logits have them."""

import io

import pytest
import torch
from PIL import Image as PILImage

from weft.backbones import load_backbone
from weft.backbones.base import encode_document
from weft.data.collate import collate
from weft.document import Document, Image, user
from weft.errors import ContextError
from weft.evaluation.likelihood import log_likelihoods


def picture():
    buffer = io.BytesIO()
    PILImage.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return Image(buffer.getvalue())


def reference(backbone, prompt, option):
    """One forward over prompt and option, without any cache."""
    sequence = encode_document(backbone, prompt, answer=True)
    tokens = backbone.tokenize(option)
    batch = collate([sequence], backbone.tokens.pad)
    from dataclasses import replace

    from weft.layout import TextSpan

    longer = replace(
        sequence,
        ids=torch.cat([sequence.ids, torch.tensor(tokens)]),
        spans=(*sequence.spans, TextSpan(len(tokens))),
        is_target=torch.cat([sequence.is_target, torch.ones(len(tokens), dtype=torch.bool)]),
    )
    batch = collate([longer], backbone.tokens.pad)
    with torch.no_grad():
        hidden = backbone.forward(backbone.embed(batch.ids, batch.layout, batch.features), batch.layout)
        scores = torch.log_softmax(backbone.text_logits(hidden[0]).double(), -1)
    first = len(sequence)
    return sum(float(scores[first - 1 + i, token]) for i, token in enumerate(tokens))


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_scores_are_those_of_one_forward_over_everything(name):
    backbone = load_backbone(name)
    prompt = Document((user(picture(), "a cat"),))
    options = ["a small red ball", "a house", "once there was a big blue boat on the left", "day breaks."]
    found = log_likelihoods(backbone, prompt, options)
    assert found == pytest.approx([reference(backbone, prompt, option) for option in options], abs=2e-4)
    assert len({round(each, 3) for each in found}) == len(options)


def test_an_option_scores_the_same_beside_others():
    backbone = load_backbone("nano")
    prompt = Document((user("a cat"),))
    options = [f"a {color} ball" for color in ("red", "blue", "green")] * 10
    found = log_likelihoods(backbone, prompt, options)
    assert found[:3] == found[27:] == log_likelihoods(backbone, prompt, options[:3])


def test_an_option_without_room_is_refused():
    backbone = load_backbone("nano")
    with pytest.raises(ContextError):
        log_likelihoods(backbone, Document((user("a cat"),)), ["ball " * backbone.context_length])
