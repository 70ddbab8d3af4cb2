"""What of a sequence is learnt as text, and how its text becomes tokens: the rules of the released MM-Interleaved.

    ids       <s>  a  cat  BoI  I   I   .  </s>  <s>  BoI  I   I   hi  </s>         I: a vector of a picture
    targets    a  cat BoI   -   -   .  </s>  -    -    -   -   hi  </s>             of the position; `-` is ignored

Source: Tian et al. 2024 (arXiv:2401.10208), and the released model.
"""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.backbones.mm_interleaved.config import TokenIds
from weft.errors import UsageError
from weft.layout import FEATURE

IGNORED = -100
"""A target where nothing is learnt."""
BEGIN, END, BEGIN_IMAGE, PLACEHOLDER = "<s>", "</s>", "<|beginofimage|>", "<|image|>"
"""How released data spells what is no text."""


def text_targets(
    ids: Tensor,
    tokens: TokenIds,
    *,
    is_real: Tensor | None = None,
    prompt: int | Tensor = 0,
    caption_only: bool = False,
) -> Tensor:
    """What every position is to predict.

    Not learnt are: the first `prompt` tokens; padding; what stands for pictures; the begin of a picture right after
    that of its document, which nothing could tell; and where documents begin.

    Args:
        ids: (B, L) with `FEATURE` or placeholders where pictures are.
        is_real: (B, L) bool, False at padding; None: only the pad token is padding.
        prompt: tokens at the start of every sequence that are given; or (B,), of each.
        caption_only: text of a document is learnt from the begin of its first picture on, as it was for the captions
            of two of the sets of pairs that the model was pre-trained on.

    Returns:
        (B, L - 1), the id of the next token or `IGNORED`.
    """
    length = ids.shape[1]
    places = torch.arange(length, device=ids.device)
    is_begin, is_picture = ids == tokens.begin, ids == tokens.begin_image
    ignored = is_begin | (ids == tokens.pad) | (ids == tokens.placeholder) | (ids == FEATURE)
    ignored[:, 1:] |= is_begin[:, :-1] & is_picture[:, 1:]
    given = torch.as_tensor(prompt, device=ids.device)
    ignored |= places < (given.unsqueeze(1) if given.dim() else given)
    if is_real is not None:
        ignored |= ~is_real
    if caption_only:
        document, picture = (torch.where(mark, places, -1).cummax(1).values for mark in (is_begin, is_picture))
        ignored |= picture < document.clamp_min(0)
    return ids.masked_fill(ignored, IGNORED)[:, 1:]


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of (B, L, V) logits over all (B, L - 1) targets of the batch that are learnt.

    Raises:
        UsageError: nothing is learnt: a mean over nothing is no number.
    """
    if not (targets != IGNORED).any():
        raise UsageError(
            "no text is learnt in the whole batch: all of it is prompt, padding or pictures",
            fix="give shorter prompts, or leave the text loss out for this batch",
        )
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def tokenize_marked(
    text: str, encode: Callable[[str], Sequence[int]], tokens: TokenIds, *, vectors: int | None = None
) -> list[int]:
    """Text in which documents and pictures are spelled out, as released data has it.

    Each run of text between marks is encoded by itself, so that its first word is that of a new text. Beside pictures
    white space is dropped; beside the begin and the end of a document it stays.

    Args:
        encode: plain text, not empty -> its tokens.
        vectors: elements of a picture, if `BEGIN_IMAGE` alone stands for a whole one; None: placeholders are in `text`.

    Returns:
        The tokens, the begin of a document first.
    """
    marks = {BEGIN: tokens.begin, END: tokens.end, BEGIN_IMAGE: tokens.begin_image, PLACEHOLDER: tokens.placeholder}
    parts = re.split(f"({'|'.join(map(re.escape, marks))})", text)  # text and marks take turns
    ids = [tokens.begin]
    for i, part in enumerate(parts):
        if part in marks:
            ids.append(marks[part])
            if vectors is not None and part == BEGIN_IMAGE:
                ids += [tokens.placeholder] * vectors
            continue
        if i > 0 and parts[i - 1] in (BEGIN_IMAGE, PLACEHOLDER):
            part = part.lstrip()
        if i < len(parts) - 1 and parts[i + 1] in (BEGIN_IMAGE, PLACEHOLDER):
            part = part.rstrip()
        ids += encode(part) if part else ()
    return ids
