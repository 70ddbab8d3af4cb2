"""What rows see: through an eye that knows each picture by its colour, so that what was shown can be read off."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from weft.errors import RoutingError
from weft.layout import FEATURE, ImageSpan, ModalityLayout, TextSpan, lay_out
from weft.synchronizer.attach_llm import DecoderSyncConfig, attach_to_decoder
from weft.synchronizer.mmfs import FeatureBank
from weft.synchronizer.sight import NOTHING, Looks, Synchronizer, see

BEGIN, SIDES, WIDTH = 1, (4, 2), 8


class Eye(nn.Module):
    """Maps of a picture's first value; two tokens of it."""

    def forward(self, pixels: Tensor) -> Looks:
        first = pixels[:, :1, :1, :1]
        maps = tuple(first.expand(-1, WIDTH, side, side) for side in (8, *SIDES))
        return Looks(maps, first.flatten(1).unsqueeze(1).expand(-1, 2, WIDTH))


def decoder() -> LlamaModel:
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaModel(config)


def synchronizer(sees_itself: bool = False, without_images: str = "zero") -> Synchronizer:
    config = DecoderSyncConfig(
        every=1, feature_width=WIDTH, value_width=4, heads=2, points=2, sides=SIDES, base=2,
        without_images=without_images,  # type: ignore[arg-type]
    )  # fmt: skip
    insertion = attach_to_decoder(decoder(), config)
    return Synchronizer(Eye(), insertion, 4, sees_itself)


def pictures(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)


def batch() -> tuple[Tensor, ModalityLayout]:
    """Two pictures, none, and one; each of 1 x 2 vectors, without an end token."""
    picture = ImageSpan(1, 2, after=0)
    spans = [[TextSpan(2), picture, TextSpan(1), picture], [TextSpan(3)], [TextSpan(3), picture]]
    layout = lay_out(spans)
    ids = torch.full(layout.shape, 5)
    ids[:, 0] = BEGIN
    return ids.masked_fill(layout.inputs.image >= 0, FEATURE), layout


def test_every_sequence_gets_its_pictures_in_order() -> None:
    ids, layout = batch()
    seen, vectors, looks = see(synchronizer(), pictures(51, 102, 204), ids, layout, BEGIN)
    bank = seen.sight.bank
    assert isinstance(bank, FeatureBank) and looks is not None and vectors is not None
    # the finest map is none that the branches read
    assert bank.shapes == ((4, 4), (2, 2)) and bank.features.shape == (3, 2, 20, WIDTH)
    firsts = bank.features[:, :, 0, 0]
    assert torch.allclose(firsts, torch.tensor([[0.2, 0.4], [0.0, 0.0], [0.8, 0.0]]))
    assert torch.allclose(vectors[ids == FEATURE][::2, 0], torch.tensor([0.2, 0.4, 0.8]))
    assert vectors[ids != FEATURE].abs().sum() == 0


@pytest.mark.parametrize("sees_itself", [False, True])
def test_a_picture_is_seen_before_it_is_whole_only_where_it_was_painted(sees_itself: bool) -> None:
    ids, layout = batch()
    seen, _, _ = see(synchronizer(sees_itself), pictures(51, 102, 204), ids, layout, BEGIN)
    #         <s>  b  p0 p1 b  p0 p1
    first = [0, 0, 1, 1, 1, 1, 1] if sees_itself else [0, 0, 0, 0, 1, 1, 1]
    second = [0, 0, 0, 0, 0, 1, 1] if sees_itself else [0, 0, 0, 0, 0, 0, 0]
    assert seen.sight.visible[0].T.int().tolist() == [first, second]
    assert not seen.sight.visible[1].any()


def test_another_document_of_the_row_sees_nothing() -> None:
    ids, layout = batch()
    ids[0, 4] = BEGIN  # the begin token of the second picture starts a document
    seen, _, _ = see(synchronizer(), pictures(51, 102, 204), ids, layout, BEGIN)
    assert not seen.sight.visible[0, 4:, 0].any()


def test_numbers_that_disagree_are_refused() -> None:
    ids, layout = batch()
    with pytest.raises(RoutingError, match="2 pictures were given for 3"):
        see(synchronizer(), pictures(1, 2), ids, layout, BEGIN)
    ids[0, 2] = 5
    with pytest.raises(RoutingError, match="6 vectors, the sequences have 5 places"):
        see(synchronizer(), pictures(1, 2, 3), ids, layout, BEGIN)


def test_pictures_that_nobody_looked_at_are_refused() -> None:
    _, layout = batch()
    with pytest.raises(RoutingError, match="without what they look like"):
        synchronizer().show(layout)


@pytest.mark.parametrize("without_images", ["zero", "bias"])
def test_without_pictures_a_bias_is_added_all_the_same(without_images: str) -> None:
    torch.manual_seed(0)
    model = decoder()
    config = DecoderSyncConfig(
        every=1, feature_width=WIDTH, value_width=4, heads=2, points=2, sides=SIDES, base=2,
        without_images=without_images,  # type: ignore[arg-type]
    )  # fmt: skip
    eyes = Synchronizer(Eye(), attach_to_decoder(model, config), 4)
    layout = lay_out([[TextSpan(3)]])
    embeds = torch.randn(1, 3, 16)
    eyes.show(layout.seeing(NOTHING))
    before = model(inputs_embeds=embeds).last_hidden_state
    for branch in eyes.insertion.branches.values():
        branch.gate.data.fill_(1.0)
        branch.mmfs.output_proj.bias.data.fill_(1.0)
    eyes.show(layout.seeing(NOTHING))
    after = model(inputs_embeds=embeds).last_hidden_state
    assert torch.equal(before, after) == (without_images == "zero")
