"""Cached attention where several query heads share the keys of one (GQA), without a copy of the keys for each.

transformers' sdpa attention copies keys and values to every query head wherever there is a mask, in each layer of each
decoding step. With one position per row, the query heads of a group may instead stand as positions of their one key
head: the mask is the same for all of them.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

NAME = "weft_grouped"


def grouped_attention() -> str:
    """Make it known to transformers, through its registries; returns the name to build a model with."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """(B, H, q, C) queries and (B, G, width, C) keys and values of G groups -> (B, q, H, C)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, length, channels = query.shape
    groups = key.shape[1]
    if length > 1 or groups == heads or attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    by_group = query.reshape(batch, groups, heads // groups, channels)
    out = F.scaled_dot_product_attention(
        by_group, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(batch, 1, heads, -1), None
