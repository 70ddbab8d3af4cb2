"""Grouped attention gives what transformers' sdpa attention gives, which copies keys to every query head."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from weft.backbones.attention import attend


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("heads, groups", [(6, 2), (6, 3), (4, 4), (5, 1)])
def test_every_query_head_reads_the_keys_of_its_group(heads, groups, length, is_masked):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, length, heads, 8, dtype=torch.float64, generator=draw).transpose(1, 2)
    key, value = (torch.randn(2, groups, 16, 8, dtype=torch.float64, generator=draw)[:, :, :7] for _ in range(2))
    readable = torch.arange(7) <= torch.tensor([[2], [5]])[:, None, :, None]
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=False)
    given = module, query, key, value, readable if is_masked else None
    found, wanted = (f(*given, dropout=0.0, scaling=0.3)[0] for f in (attend, sdpa_attention_forward))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
