"""The engine-less search for the likeliest text, beside transformers' own beam search over the same weights."""

import io

import pytest
import torch
from PIL import Image as PILImage
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM

from weft.backbones import load_backbone
from weft.backbones.base import encode_document
from weft.document import Document, Image, user
from weft.errors import ContextError
from weft.generation.beams import BeamConfig, beam_search


def loud(name, seed):
    """Random heads so loud that beams differ, and such that texts end."""
    backbone = load_backbone(name)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(backbone.head.weight, std=0.35, generator=generator)
    nn.init.normal_(backbone.table.weight, std=1.0, generator=generator)
    return backbone


def reference(backbone):
    model = LlamaForCausalLM(backbone.decoder.config.__class__(**{
        **backbone.decoder.config.to_dict(), "vocab_size": backbone.vocabulary, "tie_word_embeddings": False,
    }))  # fmt: skip
    stack = {f"model.{name}": tensor for name, tensor in backbone.decoder.state_dict().items()}
    stack["model.embed_tokens.weight"], stack["lm_head.weight"] = backbone.table.weight, backbone.head.weight
    model.load_state_dict(stack)
    return model.eval()


SETTINGS = [
    {},
    {"beams": 1},
    {"beams": 3, "length_penalty": 0.0},
    {"beams": 4, "length_penalty": 2.0},
    {"beams": 5, "length_penalty": -1.0},
    {"beams": 5, "min_tokens": 6},
    {"beams": 3, "repetition_penalty": 1.3},
    {"beams": 2, "max_tokens": 3},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_the_texts_are_those_of_transformers(setting, seed):
    backbone = loud("nano-emu2", seed)
    placeholders, backbone.placeholders = backbone.placeholders, []  # transformers counts them in its probabilities
    config = BeamConfig(**{"max_tokens": 12, **setting})
    tokens = backbone.tokens
    stops = sorted({tokens.begin_image, tokens.end, tokens.separator})
    document = Document((user("once upon a time"),))
    ids = encode_document(backbone, document, answer=True).ids[None]
    how = GenerationConfig(
        num_beams=config.beams, num_return_sequences=config.beams, max_new_tokens=config.max_tokens,
        min_new_tokens=config.min_tokens, length_penalty=config.length_penalty, do_sample=False,
        repetition_penalty=1.0, eos_token_id=stops, pad_token_id=tokens.pad, bos_token_id=None,
        suppress_tokens=sorted({*tokens, *placeholders} - set(stops)),
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    if config.repetition_penalty != 1:
        how.repetition_penalty = config.repetition_penalty
    model = reference(backbone)
    given = {"inputs_embeds": backbone.table(ids)} if config.repetition_penalty != 1 else {"input_ids": ids}
    out = model.generate(**given, attention_mask=torch.ones_like(ids), generation_config=how)
    start = 0 if "inputs_embeds" in given else ids.shape[1]
    wanted = []
    for row in out.sequences[:, start:].tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        wanted.append(tuple(row[:end]))
    found = beam_search(backbone, document, config)
    assert [each.ids for each in found] == wanted
    if config.beams > 1:
        torch.testing.assert_close(
            torch.tensor([each.score for each in found]), out.sequences_scores, rtol=1e-4, atol=1e-4
        )


def photo():
    buffer = io.BytesIO()
    PILImage.new("RGB", (40, 30), "teal").save(buffer, "PNG")
    return Image(buffer.getvalue())


@pytest.mark.parametrize(
    "name", ["nano", "nano-chameleon", "nano-janus", "nano-emu3", "nano-emu2", "nano-mm_interleaved"]
)
@torch.no_grad()
def test_every_backbone_tells_what_it_sees(name):
    """The score of the best text is its log-probability in one full forward."""
    from weft.data.collate import collate
    from weft.layout import TextSpan, TokenSequence
    from weft.synchronizer.sight import see

    backbone = load_backbone(name)
    document = Document((user(photo(), "what is this"),))
    best = beam_search(backbone, document, BeamConfig(beams=2, max_tokens=5, min_tokens=5, length_penalty=0.0))[0]
    assert len(best.ids) == 5
    assert best.ended == "length"
    prompt = encode_document(backbone, document, answer=True)
    whole = TokenSequence(
        torch.cat((prompt.ids, torch.tensor(best.ids))),
        (*prompt.spans, TextSpan(5)),
        torch.cat((prompt.is_target, torch.ones(5, dtype=torch.bool))),
        features=prompt.features,
        pixels=prompt.pixels,
    )
    batch = collate([whole], backbone.tokens.pad)
    layout, features = batch.layout, batch.features
    if backbone.synchronizer is not None:
        layout, features, _ = see(backbone.synchronizer, batch.pictures.seen, batch.ids, layout, backbone.tokens.begin)
    hidden = backbone.forward(backbone.embed(batch.ids, layout, features), layout)[0]
    scores = torch.log_softmax(backbone.text_logits(hidden[len(prompt) - 1 : -1]), -1)
    assert best.score == pytest.approx(float(scores.gather(1, torch.tensor(best.ids)[:, None]).sum()), abs=1e-4)


def test_a_text_that_does_not_fit_is_refused():
    backbone = load_backbone("nano")
    with pytest.raises(ContextError):
        beam_search(backbone, Document((user("word " * 10),)), BeamConfig(max_tokens=backbone.context_length))
