import pytest

from weft.backbones.tokenizer import byte_tokenizer, read_tokenizer, token_id
from weft.errors import CheckpointError


def test_a_tokenizer_is_read_or_refused(tmp_path):
    from tokenizers import Tokenizer, models

    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        read_tokenizer(tmp_path)
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(tmp_path).token_to_id("a") == 0


def test_a_missing_token_is_named():
    tokenizer = byte_tokenizer(("<s>",))
    assert token_id(tokenizer, "<s>") == 0
    with pytest.raises(CheckpointError, match="no </s>"):
        token_id(tokenizer, "</s>")


@pytest.mark.parametrize("text", ["a fox", " \n\t", "ü😀\0", ""])
def test_a_byte_is_a_token_between_the_special_ones(text):
    tokenizer = byte_tokenizer(("<s>", "</s>"), ("<image>",))
    assert [tokenizer.token_to_id(token) for token in ("<s>", "</s>", "<image>")] == [0, 1, 258]
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode()) and all(2 <= id < 258 for id in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(f"<s>{text}").ids == [0, *ids]
