"""Beam search: sequences change places between steps, and with them the partial sums of the picture being written."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.adapters.llama import IMAGE_BRANCHES, WIDE, WORDS, adapted
from weft.adapters import RingCache, routing_of
from weft.layout import ImageSpan, TextSpan, lay_out

BEAMS = 3
SPANS = [TextSpan(2), ImageSpan(3, 2), TextSpan(2), WIDE, TextSpan(2)]
LENGTH = sum(span.length for span in SPANS)
ORDERS = [
    torch.randint(BEAMS, (BEAMS,), generator=torch.Generator().manual_seed(step)) if step % 3 else torch.arange(BEAMS)
    for step in range(LENGTH)
]
"""Which hypothesis each beam goes on from, at every step: some are dropped, some go on twice."""


def decode(model, ids: Tensor, orders: list[Tensor]) -> Tensor:
    """Logits (B, L, V) of ids (B, L) fed one by one; before step t beam i takes the place of beam orders[t][i]."""
    batch = len(ids)
    layout = lay_out([SPANS] * batch)
    cache, rings, found = DynamicCache(), RingCache(batch, columns=3), []
    for t in range(LENGTH):
        rings.reorder(orders[t])
        if t:
            cache.reorder_cache(orders[t])
        now = layout[t : t + 1]
        starts = (now.outputs.row == 0) & (now.outputs.col == 0)
        rings.reset(starts[:, 0].nonzero().squeeze(1).tolist())
        routing_of(model).set(now, rings)
        found.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("kind", IMAGE_BRANCHES)
@torch.no_grad()
def test_reordered_beams_are_the_hypotheses_decoded_by_themselves(kind):
    model = adapted(kind).double().eval()
    fed = torch.randint(WORDS, (BEAMS, LENGTH), generator=torch.Generator().manual_seed(1))
    logits = decode(model, fed, ORDERS)
    # what each beam has become at the end: its elements, and the beams it was at each step
    lines = [torch.arange(BEAMS)]
    for order in reversed(ORDERS[1:]):
        lines.insert(0, order[lines[0]])
    assert len({tuple(line.tolist()) for line in lines}) > 1, "no beam was ever replaced"
    alone = torch.arange(1)
    for beam in range(BEAMS):
        history = torch.stack([line[beam] for line in lines])
        ids = fed[history, torch.arange(LENGTH)]
        by_itself = decode(model, ids[None], [alone] * LENGTH)[0]
        torch.testing.assert_close(logits[history, torch.arange(LENGTH)], by_itself, rtol=0, atol=1e-12)


@torch.no_grad()
def test_rings_left_in_place_give_other_outputs(monkeypatch):
    """The test above would see it if they were not reordered."""
    model = adapted().double().eval()
    ids = torch.randint(WORDS, (BEAMS, LENGTH), generator=torch.Generator().manual_seed(1))
    right = decode(model, ids, ORDERS)
    monkeypatch.setattr(RingCache, "reorder", lambda *_: None)
    assert (decode(model, ids, ORDERS) - right).abs().max() > 1e-3
