"""Greedy pictures of the engine have the codes that transformers' own generation gives, alone and side by side."""

import pytest
import torch
from transformers import Emu3ForConditionalGeneration, GenerationConfig, JanusForConditionalGeneration

from weft.backbones import emu3, janus
from weft.backbones.base import encode_document
from weft.document import Document, user
from weft.generation import Engine, SamplingConfig

PROMPTS = [
    Document((user(text),)) for text in ("a", "a red boat", "two gulls over the harbour", "the open sea, at dawn")
]
ANSWER = SamplingConfig(first="image", max_images=1, max_text_tokens=0)


@pytest.fixture(scope="module")
def nano_janus(tmp_path_factory):
    """Ours, and transformers' reading of what we save."""
    model, folder = janus.nano(), tmp_path_factory.mktemp("janus")
    janus.save(model, folder)
    return model, JanusForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def nano_emu3(tmp_path_factory):
    model, folder = emu3.nano(), tmp_path_factory.mktemp("emu3")
    emu3.save(model, folder)
    return model, Emu3ForConditionalGeneration.from_pretrained(folder).eval()


def answers(backbone, config, requests, monkeypatch):
    """Element ids of each prompt's picture, `requests` answered at a time."""
    seen = []
    decode = type(backbone).decode_image
    monkeypatch.setattr(
        type(backbone), "decode_image", lambda self, made, options: seen.append(made.ids) or decode(self, made, options)
    )
    engine = Engine(backbone, slots=requests * (1 + (config.guidance != 1.0)))
    for prompt in PROMPTS:
        engine.submit(prompt, config)
    assert sum(1 for _ in engine.run()) == 3 * len(PROMPTS)  # begins, is ready, is finished
    return torch.stack(seen)


@pytest.mark.parametrize("requests", [1, 3, 4])
@pytest.mark.parametrize("guidance", [5.0, 2.0])
def test_janus_writes_the_codes_of_its_guided_generation(nano_janus, guidance, requests, monkeypatch):
    ours, theirs = nano_janus
    tokens = ours.tokens
    how = GenerationConfig(
        bos_token_id=tokens.begin, pad_token_id=tokens.pad, eos_token_id=tokens.end, do_sample=False,
        guidance_scale=guidance, generation_kwargs={"boi_token_id": tokens.begin_image},
    )  # fmt: skip

    def reference(prompt):
        ids = torch.tensor([[*encode_document(ours, prompt, answer=True).ids.tolist(), tokens.begin_image]])
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="image", generation_config=how)
        return made[0] + ours.vocabulary

    wanted = torch.stack([reference(prompt) for prompt in PROMPTS])
    assert len(wanted.unique(dim=0)) > 1  # pictures depend on their prompts
    found = answers(ours, ANSWER.model_copy(update={"guidance": guidance}), requests, monkeypatch)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("requests", [1, 3, 4])
def test_emu3_writes_the_codes_of_generation_bound_to_the_form(nano_emu3, requests, monkeypatch):
    ours, theirs = nano_emu3
    form, tokens, codes = ours.form, ours.tokens, ours.code_rows.tolist()

    def reference(prompt):
        ids = torch.tensor([[*encode_document(ours, prompt, answer=True).ids.tolist(), *form.before]])

        def allowed(_, written):
            at = len(written) - ids.shape[1]
            return codes if form.forced(at) is None else [form.forced(at)]

        how = GenerationConfig(
            bos_token_id=tokens.begin, pad_token_id=tokens.pad, eos_token_id=tokens.end, do_sample=False,
            max_new_tokens=form.patches,
        )  # fmt: skip
        made = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), prefix_allowed_tokens_fn=allowed, generation_config=how
        )
        elements = made[0, ids.shape[1] :]
        return torch.where(elements == form.line_end, elements, elements - codes[0] + ours.vocabulary)

    wanted = torch.stack([reference(prompt) for prompt in PROMPTS])
    assert len(wanted.unique(dim=0)) > 1
    found = answers(ours, ANSWER.model_copy(update={"guidance": 1.0}), requests, monkeypatch)
    assert torch.equal(found, wanted)
