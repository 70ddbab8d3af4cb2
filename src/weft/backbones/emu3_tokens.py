"""Emu3's tokens, by name: `tokenizer.json` and the `vocabulary_map` of config.json must agree about them."""

from typing import TYPE_CHECKING, Any

from weft.backbones.base import SpecialTokens
from weft.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BEGIN, END, PAD = "<|extra_203|>", "<|extra_204|>", "<|endoftext|>"
BEGIN_IMAGE, IMAGE, END_IMAGE = "<|image start|>", "<|image token|>", "<|image end|>"
LINE_END, FRAME_END, PLACEHOLDER = "<|extra_200|>", "<|extra_201|>", "<image>"


def code_name(code: int) -> str:
    """The name of a picture code in the vocabulary."""
    return f"<|visual token {code:06d}|>"


def id_of(token: str, tokenizer: "Tokenizer", config: Any) -> int:
    """Of a token that the model needs.

    Raises:
        CheckpointError: the tokenizer does not have it, or `vocabulary_map` says another number.
    """
    number = tokenizer.token_to_id(token)
    if number is None or number >= config.text_config.vocab_size:
        raise CheckpointError(
            f"the vocabulary has no {token}", where="tokenizer.json", fix="use the tokenizer that came with the weights"
        )
    if config.vocabulary_map.get(token) != number:
        raise CheckpointError(
            f"{token} is {number} in tokenizer.json and {config.vocabulary_map.get(token)} in the vocabulary_map",
            where="config.json",
            fix="use the config and the tokenizer that came with the weights",
        )
    return number


def special_tokens(tokenizer: "Tokenizer", config: Any, codes: set[int]) -> SpecialTokens:
    begin, end, pad, begin_image, end_image = (
        id_of(token, tokenizer, config) for token in (BEGIN, END, PAD, BEGIN_IMAGE, END_IMAGE)
    )
    named = {begin, end, pad, begin_image, end_image}
    added = tokenizer.get_added_tokens_decoder()
    words = set(tokenizer.get_vocab().values()) - added.keys()
    others = set(range(config.text_config.vocab_size)) - words - codes - named
    return SpecialTokens(begin, end, pad, end, begin_image, end_image, tuple(sorted(others)))
