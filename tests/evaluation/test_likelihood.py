"""An option's score is the sum of its tokens' log-probabilities, as the whole document's own logits have them."""

import io
import itertools

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
    options = [f"a {size} {color} ball" for size in range(10) for color in ("red", "blue", "green")]
    found = log_likelihoods(backbone, prompt, [*options, *options[:3]])
    assert found[30:] == found[:3]
    # in rows of another batch, to a rounding of single precision
    for some in (slice(0, 1), slice(23, 27), slice(29, 30)):
        assert found[some] == pytest.approx(log_likelihoods(backbone, prompt, options[some]), abs=5e-5)
    assert min(abs(a - b) for a, b in itertools.combinations(found[:30], 2)) > 1e-4


def test_an_option_without_room_is_refused():
    backbone = load_backbone("nano")
    with pytest.raises(ContextError):
        log_likelihoods(backbone, Document((user("a cat"),)), ["ball " * backbone.context_length])
