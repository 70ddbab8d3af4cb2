"""Tokenizers: read from a checkpoint, asked for structural tokens, made of bytes for the nano models."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_tokenizer(folder: Path) -> "Tokenizer":
    """The `tokenizer.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            "tokenizer.json is missing", where=str(folder), fix="fetch it from where the weights came from"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(
            f"tokenizer.json cannot be read: {error}", where=str(path), fix="it is damaged: fetch it again"
        ) from error


def token_id(tokenizer: "Tokenizer", token: str) -> int:
    """Of a token that the model needs.

    Raises:
        CheckpointError: the tokenizer does not have it.
    """
    number = tokenizer.token_to_id(token)
    if number is None:
        raise CheckpointError(f"the tokenizer has no {token}", fix="use the tokenizer that was saved with the model")
    return number


def byte_tokenizer(first: Sequence[str] = (), last: Sequence[str] = ()) -> "Tokenizer":
    """A token for each byte, after the special tokens `first` and before the special tokens `last`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = (*first, *sorted(pre_tokenizers.ByteLevel.alphabet()), *last)
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*first, *last)])
    return tokenizer
