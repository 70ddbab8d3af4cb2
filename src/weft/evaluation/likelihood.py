"""How likely a model finds each of several short texts as its answer: the sum of their tokens' log-probabilities."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from weft.backbones.base import check_fits, encode_document
from weft.document import Document
from weft.generation.beams import Rows

if TYPE_CHECKING:
    from weft.backbones.base import Backbone

AT_ONCE = 25


@torch.no_grad()
def log_likelihoods(backbone: "Backbone", prompt: Document, options: Sequence[str]) -> list[float]:
    """One number for each option; what ends an answer is not part of it. Equal options have equal numbers.

    The same option beside others differs by a rounding: on some processors the products of an attention depend on where
    a row lies in memory.

    Raises:
        ContextError: the prompt and the longest option do not fit into the context.
    """
    sequence = encode_document(backbone, prompt, answer=True)
    asked = [tuple(backbone.tokenize(option)) for option in options]
    tokens = list(dict.fromkeys(asked))
    check_fits(sequence, backbone.context_length, reserve=max(map(len, tokens), default=0))
    found: dict[tuple[int, ...], float] = {}
    for start in range(0, len(tokens), AT_ONCE):
        some = tokens[start : start + AT_ONCE]
        # always as many rows: products of another shape are rounded otherwise
        rows = Rows(backbone, sequence, AT_ONCE)
        sums = [0.0] * len(some)
        for length in range(max(map(len, some))):
            # a row that has ended goes on with anything: it is not read any more
            begun = [ids[:length] if len(ids) > length else (0,) * length for ids in some]
            scores = torch.log_softmax(rows.logits(begun).double(), -1)
            for i, ids in enumerate(some):
                if len(ids) > length:
                    sums[i] += float(scores[i, ids[length]])
        found |= zip(some, sums, strict=True)
    return [found[each] for each in asked]
