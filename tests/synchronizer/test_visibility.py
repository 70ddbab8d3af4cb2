"""Which pictures are seen, against the rules written out picture by picture and against the released model's masks."""

import json
from pathlib import Path

import pytest
import torch

from weft.layout import ImageSpan, TextSpan, lay_out
from weft.synchronizer.visibility import begins_of, nearest_first, positions_of, seen_by_pictures, seen_by_positions

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "golden" / "mm_interleaved_loss"

BOS, TEXT, BEGIN, PATCH, PAD = range(5)


def random_rows(seed: int, rows: int = 4, length: int = 30) -> torch.Tensor:
    """Packed documents; the first may have lost its start, the last its end."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(rows):
        row: list[int] = []
        while len(row) < length:
            kind = int(torch.randint(5, (), generator=generator))
            row += {0: [BOS], 1: [BEGIN, PATCH, PATCH]}.get(kind, [TEXT])
        found.append(row[:length])
    return torch.tensor(found)


def start_before(row: list[int], at: int) -> int:
    """The latest document start at or before a position, -1 for none."""
    return max((i for i in range(at + 1) if row[i] == BOS), default=-1)


@pytest.mark.parametrize("seed", range(5))
def test_a_position_sees_the_pictures_begun_before_it_in_its_document(seed):
    ids = random_rows(seed)
    seen = seen_by_positions(ids == BOS, positions_of(ids == BEGIN))
    for b, row in enumerate(ids.tolist()):
        begins = [i for i, id in enumerate(row) if id == BEGIN]
        for t in range(len(row)):
            wanted = [start_before(row, t) <= s < t for s in begins]
            assert seen[b, t].tolist() == wanted + [False] * (seen.shape[2] - len(wanted))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reach", [1, 2, None])
def test_a_picture_sees_those_directly_before_it_in_its_document(seed, reach):
    ids = random_rows(seed)
    seen = seen_by_pictures(ids == BOS, positions_of(ids == BEGIN), reach=reach)
    for b, row in enumerate(ids.tolist()):
        begins = [i for i, id in enumerate(row) if id == BEGIN]
        for i in range(seen.shape[1]):
            for n in range(seen.shape[2]):
                real = n < i < len(begins) and i - n <= (reach or 99)
                assert bool(seen[b, i, n]) == (real and begins[n] >= start_before(row, begins[i]))


@pytest.mark.parametrize("case", ["row_context", "document_context"])
def test_released_masks(case):
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden tensors in {GOLDEN}")
    from safetensors.torch import load_file

    tensors, config = load_file(GOLDEN / f"case_{case}.safetensors"), json.loads((GOLDEN / "config.json").read_text())
    ids, special = torch.tensor(config["sample_ids"]), config["special"]
    starts, begins = ids == special["bos_token_id"], positions_of(ids == special["soi_token_id"])
    assert seen_by_positions(starts, begins).equal(tensors["aux.cross_attention_mask"].bool())
    # there the image decoder's documents are told apart by an argument of their own
    seen = seen_by_pictures(starts & (case == "document_context"), begins)
    assert seen.any(2)[begins < ids.shape[1]].equal(tensors["aux.image_decoder_mmfs_mask"].squeeze(1).bool())


def test_a_layout_says_where_its_pictures_begin():
    whole = [TextSpan(2), ImageSpan(2, 2), TextSpan(3), ImageSpan(1, 2), TextSpan(1)]
    unfinished = [TextSpan(3), ImageSpan(2, 3, present=2)]
    about_to = [ImageSpan(1, 1, before=0), TextSpan(2), ImageSpan(2, 3, present=0)]
    layout = lay_out([whole, unfinished, about_to, [TextSpan(4)]])
    length = layout.shape[1]
    assert begins_of(layout).tolist() == [[1, 8], [2, length], [-1, 2], [length, length]]
    assert begins_of(lay_out([[TextSpan(2)]])).shape == (1, 0)


def test_a_picture_is_seen_from_its_first_element_on():
    layout = lay_out([[TextSpan(2), ImageSpan(1, 3), TextSpan(1)], [ImageSpan(1, 2, before=0), TextSpan(2)]])
    nothing = torch.zeros(layout.shape, dtype=torch.bool)
    seen = seen_by_positions(nothing, begins_of(layout))[..., 0].tolist()
    assert seen == [[False, False, True, True, True, True], [True] * 6]


@pytest.mark.parametrize(
    "visible, pictures", [([1, 1, 0], [1, 0]), ([0, 1, 1], [2, 1]), ([1, 0, 1], [2, 0]), ([0, 0, 0], [])]
)
def test_the_last_picture_comes_first(visible, pictures):
    assert nearest_first(torch.tensor([[visible]], dtype=torch.bool)).tolist() == [[pictures]]


def test_a_place_in_the_list_is_the_relative_index():
    visible = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    relative = visible * visible.flip(2).cumsum(2).flip(2)
    pictures = nearest_first(visible)
    assert pictures.shape == (2, 5, int(visible.sum(2).max()))
    for b, q, m in torch.cartesian_prod(*(torch.arange(n) for n in pictures.shape)).tolist():
        picture = int(pictures[b, q, m])
        assert m >= visible[b, q].sum() if picture < 0 else relative[b, q, picture] == m + 1


def test_sequences_without_positions_or_pictures():
    none = torch.zeros(2, 0, dtype=torch.bool)
    assert positions_of(none).shape == (2, 0)
    assert seen_by_positions(torch.zeros(2, 3, dtype=torch.bool), positions_of(none)).shape == (2, 3, 0)
    assert seen_by_pictures(torch.zeros(2, 3, dtype=torch.bool), positions_of(none)).shape == (2, 0, 0)
    assert nearest_first(torch.zeros(2, 3, 0, dtype=torch.bool)).shape == (2, 3, 0)
