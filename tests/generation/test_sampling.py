import pytest
import torch

from weft.config import load_config
from weft.errors import ConfigError
from weft.generation import Choice, SamplingConfig
from weft.generation.sampling import INVALID, Draws, choose, guide, keep_top_k, keep_top_p

CPU = torch.device("cpu")
INF = float("inf")


def draw(logits, choices, uniforms):
    return choose(torch.tensor(logits), Draws.of(choices, uniforms, CPU)).tolist()


def test_no_temperature_takes_the_likeliest():
    assert draw([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]], [Choice()] * 2, [0.9, 0.9]) == [1, 0]


def test_each_row_is_drawn_in_its_own_way():
    logits = [[0.0, 3.0, 1.0]] * 3
    choices = [Choice(), Choice(temperature=1e6), Choice(temperature=1e6, top_k=2)]
    assert draw(logits, choices, [0.99, 0.99, 0.99]) == [1, 0, 2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_uniform_number_draws_from_the_softmax(temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    uniforms = ((torch.arange(20000) + 0.5) / 20000).tolist()
    ids = choose(logits.expand(20000, 4), Draws.of([Choice(temperature=temperature)] * 20000, uniforms, CPU))
    share = ids.bincount(minlength=4) / 20000
    torch.testing.assert_close(share, (logits / temperature).softmax(-1), rtol=0, atol=1e-3)


def test_top_k_keeps_k_and_top_p_the_fewest_that_reach_p():
    ranked = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 3)
    assert (keep_top_k(ranked, torch.tensor([1, 3, 9])) > -INF).sum(1).tolist() == [1, 3, 4]
    assert (keep_top_p(ranked, torch.tensor([0.01, 0.65, 1.0])) > 0).sum(1).tolist() == [1, 2, 4]


def test_ties_do_not_widen_top_k():
    ids = {draw([[1.0] * 5], [Choice(temperature=1.0, top_k=2)], [u / 100])[0] for u in range(100)}
    assert len(ids) == 2


def test_what_is_not_allowed_is_never_drawn_even_at_the_edge():
    choice = Choice(temperature=1.0)
    for uniform in (0.0, 1 - 2**-24, 1 - 2**-53):
        assert draw([[-INF, 0.0, -INF, 0.5, -INF]], [choice], [uniform])[0] in (1, 3)


@pytest.mark.parametrize("bad", [[float("nan"), 1.0], [-INF, -INF], [INF, 1.0], [-INF, float("nan")]])
@pytest.mark.parametrize("choice", [Choice(), Choice(temperature=1.0, top_k=1, top_p=0.5)])
def test_a_row_without_a_choice_is_invalid_and_its_neighbour_is_not(bad, choice):
    assert draw([bad, [0.0, 9.0]], [choice, choice], [0.5, 0.5]) == [INVALID, 1]


def test_guidance_mixes_and_leaves_excluded_ids_out():
    full, no_text, nothing = (torch.tensor([[value, -INF]] * 4) for value in (1.0, 3.0, 7.0))
    text, images = torch.tensor([[4.0, 1.0, 1.0, 4.0], [1.0, 1.0, 2.0, 2.0]])
    guided = guide(full, no_text, nothing, text, images)
    assert guided[:, 1].tolist() == [-INF] * 4
    assert guided[:, 0].tolist() == [3 + 4 * (1 - 3), 1.0, 7 + 2 * (3 - 7) + 1 * (1 - 3), 7 + 2 * (3 - 7) + 4 * (1 - 3)]


@pytest.mark.parametrize(
    "override", [{"text.temperature": -1}, {"image.top_k": 0}, {"text.top_p": 0}, {"min_images": 17}, {"seed": -1}]
)
def test_a_request_that_cannot_be_meant_is_refused(override):
    with pytest.raises(ConfigError):
        load_config(SamplingConfig, overrides=override)
