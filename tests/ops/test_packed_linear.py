"""Packed weights give the same products, to the order of summation, and are used only where they fit."""

import copy

import pytest
import torch
from torch import nn

from weft.adapters import AdapterConfig, attach, detach
from weft.backbones import load_backbone
from weft.document import Document, user
from weft.generation import SamplingConfig, generate
from weft.ops import packed_linear
from weft.ops.packed_linear import FEWEST_ROWS, PackedLinear, Packs

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this build of torch has no MKL")


def stack(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 80, bias=bias), nn.GELU(), nn.Linear(80, 24, bias=bias))


@pytest.fixture
def multiplied(monkeypatch):
    """How often a packed weight was used."""
    calls = []
    real = torch.ops.mkl._mkl_linear

    class Spy:
        _mkl_reorder_linear_weight = staticmethod(torch.ops.mkl._mkl_reorder_linear_weight)

        @staticmethod
        def _mkl_linear(*arguments):
            calls.append(arguments)
            return real(*arguments)

    monkeypatch.setattr(packed_linear.torch.ops, "mkl", Spy)
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [4, 8, 33])
def test_products_are_those_of_the_layer(bias, rows, multiplied):
    module = stack(bias)
    packs, x = Packs([module], rows), torch.randn(rows, 1, 48)
    with torch.no_grad():
        expected = module(x)
        assert not multiplied
        with packs.in_use():
            found = module(x)
    assert len(multiplied) == 2
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def test_a_row_does_not_depend_on_its_neighbours():
    module, x = stack(), torch.randn(8, 48)
    other = torch.randn(8, 48)
    other[3] = x[3]
    packs = Packs([module], 8)
    with torch.no_grad(), packs.in_use():
        assert torch.equal(module(x)[3], module(other)[3])


def test_other_inputs_go_the_usual_way(multiplied):
    module = stack()
    packs, x = Packs([module], 8), torch.randn(8, 48)
    with packs.in_use():
        assert module(x).requires_grad
        with torch.no_grad():
            module(x[:5])
            module.double()(x.double())
    assert not multiplied


def test_a_changed_weight_is_packed_anew(multiplied):
    module, x = stack(), torch.randn(8, 48)
    packs = Packs([module], 8)
    with torch.no_grad():
        for change in (lambda w: w, lambda w: w.mul_(2), lambda w: w.add_(1)):
            change(module[0].weight)
            with packs.in_use():
                torch.testing.assert_close(module(x), module[2](module[1](x @ module[0].weight.T + module[0].bias)))
    assert multiplied


def test_layers_stay_what_they_are():
    module = stack()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    one, two = Packs([module], 8), Packs([module], 16)
    assert all(isinstance(module[i], nn.Linear) for i in (0, 2))
    with torch.no_grad(), one.in_use(), two.in_use():
        module(torch.randn(16, 48))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert copy.deepcopy(module)(torch.ones(2, 48)).requires_grad
    assert all(layer.in_use is None for layer in module if isinstance(layer, PackedLinear))


class Attention(nn.Module):
    """Three layers that read one input, one of them with a bias and of another width, and one that does not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj = nn.Linear(48, 80), nn.Linear(48, 24, bias=False)
        self.v_proj, self.o_proj = nn.Linear(48, 24, bias=False), nn.Linear(80, 48)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(q + (k * v).sum(-1, keepdim=True))


def test_layers_that_read_one_input_share_a_product(multiplied):
    module, x = Attention(), torch.randn(8, 1, 48)
    packs, seen = Packs([module], 8), []
    with torch.no_grad():
        expected = module(x)
        with packs.in_use():
            for _ in range(2):
                torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)
                seen.append(len(multiplied))
            module.k_proj.weight.mul_(2)
        expected = module(x)
        with packs.in_use():
            torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)
    assert seen == [2, 4]


def test_a_layer_of_several_with_another_input_gets_its_own_product():
    module, x, y = Attention(), torch.randn(8, 48), torch.randn(8, 48)
    packs = Packs([module], 8)
    with torch.no_grad():
        expected = module.q_proj(x), module.k_proj(y), module.v_proj(x), module.v_proj(y), module.q_proj(y)
        with packs.in_use():
            found = module.q_proj(x), module.k_proj(y), module.v_proj(x), module.v_proj(y), module.q_proj(y)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_packed_where_it_does_not_pay(monkeypatch):
    few, half, large = stack(), stack().bfloat16(), stack()
    Packs([few], FEWEST_ROWS - 1)
    Packs([half], 8)
    monkeypatch.setattr(packed_linear, "LARGEST", 1000)
    Packs([large], 8)
    assert not any(isinstance(layer, PackedLinear) for module in (few, half, large) for layer in module)


def test_an_adapter_attaches_to_layers_that_were_packed():
    backbone = load_backbone("nano")
    config = SamplingConfig(max_text_tokens=4, max_images=1)
    document = Document((user("hi"),))
    before = generate(backbone, [document], config, slots=8)
    attach(backbone, AdapterConfig(rank=2))
    assert generate(backbone, [document], config, slots=8) == before
    detach(backbone)
    assert generate(backbone, [document], config, slots=8) == before
