"""Emu2's tokens: LLaMA's with those that it adds, from a `tokenizer.json` or LLaMA's own sentencepiece model."""

from pathlib import Path
from typing import TYPE_CHECKING

from weft.backbones.base import ChatFormat, SpecialTokens
from weft.backbones.checkpoint import read_json
from weft.backbones.tokenizer import read_tokenizer, token_id
from weft.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BEGIN, END, UNKNOWN, PAD = "<s>", "</s>", "<unk>", "[PAD]"
BEGIN_IMAGE, END_IMAGE = "[IMG]", "[/IMG]"
PLACEHOLDERS = ("<image>", "[gIMG]")
"""What the released code writes where a vector goes, of a picture and of a video frame; here `FEATURE` stands there."""
USER, ASSISTANT = "[USER]", "[ASSISTANT]"
ADDED = (
    PAD, BEGIN_IMAGE, END_IMAGE, *PLACEHOLDERS, "[/gIMG]", "[EOC]", "[VIDEO]", "<grounding>", "<phrase>", "</phrase>",
    "<object>", "</object>", "</delimiter_of_multi_objects/>", "<REC>", *(f"<patch_index_{i:04}>" for i in range(257)),
)  # fmt: skip
"""What every Emu2 adds to LLaMA's tokens, in this order; Emu2-Chat adds `USER` and `ASSISTANT` after them."""
SYSTEM = "You are a helpful assistant, dedicated to delivering comprehensive and meticulous responses."
"""What stands before the first turn of Emu2-Chat."""


def complete(tokenizer: "Tokenizer", vocabulary: int, where: str) -> None:
    """Add the tokens that plain LLaMA lacks, as the released code does when it starts, and mark all as special.

    Raises:
        CheckpointError: the tokenizer is not the one of a model with so many tokens.
    """
    from tokenizers import AddedToken

    # text that spells a control token stays text
    tokenizer.encode_special_tokens = True
    for wanted in ((*ADDED, USER, ASSISTANT), ADDED):
        missing = sum(tokenizer.token_to_id(token) is None for token in wanted)
        if tokenizer.get_vocab_size() + missing == vocabulary:
            special = (UNKNOWN, BEGIN, END, *wanted)
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
            break
    if tokenizer.get_vocab_size() != vocabulary:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {vocabulary}",
            where=where,
            fix="use the tokenizer that was saved with the model",
        )


def special_tokens(tokenizer: "Tokenizer") -> SpecialTokens:
    named = (BEGIN, END, PAD, BEGIN_IMAGE, END_IMAGE)
    begin, end, pad, begin_image, end_image = (token_id(tokenizer, token) for token in named)
    rest = (tokenizer.token_to_id(token) for token in (UNKNOWN, *ADDED, USER, ASSISTANT) if token not in named)
    others = tuple(number for number in rest if number is not None)
    return SpecialTokens(begin, end, pad, end, begin_image, end_image, others)


def chat_format(tokenizer: "Tokenizer") -> ChatFormat:
    begin, end = token_id(tokenizer, BEGIN), token_id(tokenizer, END)
    if tokenizer.token_to_id(USER) is None:
        return ChatFormat(start=(begin,), user=((), ()), assistant=((), (end,)), end=(end,))
    # The released tokenizer drops the spaces beside these tokens: `system [USER]: question [ASSISTANT]: answer</s>`
    colon = tokenizer.encode(":", add_special_tokens=False).ids
    return ChatFormat(
        start=(begin, *tokenizer.encode(SYSTEM, add_special_tokens=False).ids),
        user=((token_id(tokenizer, USER), *colon), ()),
        assistant=((token_id(tokenizer, ASSISTANT), *colon), (end,)),
        end=(end,),
        system=((), ()),
    )


def find_tokenizer(folder: Path) -> "Tokenizer":
    """Of a checkpoint's folder or the one where Emu2-Gen has it, with the tokens of `added_tokens.json`."""
    for place in (folder, folder / "tokenizer"):
        if (place / "tokenizer.json").is_file():
            tokenizer = read_tokenizer(place)
        elif (place / "tokenizer.model").is_file():
            tokenizer = _from_sentencepiece(place / "tokenizer.model")
        else:
            continue
        if (place / "added_tokens.json").is_file():
            _add_tokens(tokenizer, place / "added_tokens.json")
        return tokenizer
    raise CheckpointError(
        "there is neither tokenizer.json nor tokenizer.model",
        where=str(folder),
        fix="fetch it from where the weights came from",
    )


def _add_tokens(tokenizer: "Tokenizer", path: Path) -> None:
    for token, number in sorted(read_json(path).items(), key=lambda pair: pair[1]):
        tokenizer.add_special_tokens([token])
        if tokenizer.token_to_id(token) != number:
            raise CheckpointError(
                f"{token} becomes token {tokenizer.token_to_id(token)} and should be {number}",
                where=str(path),
                fix="fetch the tokenizer and its added tokens again, of one revision",
            )


def _from_sentencepiece(path: Path) -> "Tokenizer":
    """LLaMA's sentencepiece model as a tokenizer of the `tokenizers` library.

    Raises:
        UsageError: sentencepiece or protobuf is not installed.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    try:
        extracted = SentencePieceExtractor(str(path)).extract(models.BPE)
    except ImportError as error:
        raise UsageError(
            "a tokenizer.model is read with sentencepiece, which is not installed",
            where=str(path),
            fix="pip install sentencepiece protobuf",
        ) from error
    except Exception as error:  # protobuf raises nothing more precise
        raise CheckpointError(
            f"tokenizer.model cannot be read: {error}", where=str(path), fix="fetch it again"
        ) from error
    bpe = models.BPE(extracted["vocab"], extracted["merges"], unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
