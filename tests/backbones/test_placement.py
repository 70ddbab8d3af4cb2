import pytest
import torch
from torch import nn

from tests.backbones.stacks import stack
from weft.backbones import placement
from weft.backbones.checkpoint import LoadOptions
from weft.backbones.placement import place, place_decoder
from weft.errors import UsageError

WHOLE_MAP = {"embed_tokens": "cpu", "layers.0": "cpu", "layers.1": "cpu", "norm": "cpu", "rotary_emb": "cpu"}


@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}, WHOLE_MAP])
def test_a_decoder_is_placed_and_computes_the_same(device_map, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    decoder = stack("llama").eval()
    ids = torch.arange(8)[None]
    wanted = decoder(input_ids=ids).last_hidden_state
    placed = place_decoder(decoder, LoadOptions(device_map=device_map))
    assert torch.equal(placed(input_ids=ids).last_hidden_state, wanted)


@pytest.mark.parametrize(
    "device_map, words",
    [
        ("balanced", "no device map 'balanced'"),
        ({"layers": "cpu", "layer.1": "cpu"}, r"no module layer\.1"),
        ({"layers.0": "cpu"}, r"says nothing about embed_tokens\.weight, layers\.1\.self_attn\.q_proj\.weight"),
        ({**WHOLE_MAP, "layers.1": 0}, "moved at every step"),
        ({**WHOLE_MAP, "layers.1": "disk"}, "moved at every step"),
        ({"": "disk"}, "moved at every step"),
    ],
)
def test_a_device_map_that_cannot_be_meant_is_refused(device_map, words):
    with pytest.raises(UsageError, match=words) as caught:
        place_decoder(stack("llama"), LoadOptions(device_map=device_map))
    assert caught.value.fix


def test_a_model_too_large_for_its_devices_is_refused(monkeypatch):
    import accelerate

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.utils.get_balanced_memory", lambda *args, **options: {0: 1, "cpu": 2**40})
    monkeypatch.setattr(
        accelerate, "infer_auto_device_map", lambda *args, **options: {"layers.0": 0, "layers.1": "cpu"}
    )
    with pytest.raises(UsageError, match="does not fit"):
        place_decoder(stack("llama"), LoadOptions(device_map="auto"))


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantising_without_a_cuda_device_is_refused(quantize, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    decoder = stack("llama")
    with pytest.raises(UsageError, match="finds none on this machine"):
        place_decoder(decoder, LoadOptions(quantize=quantize, device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="need a CUDA device") as caught:
        place_decoder(decoder, LoadOptions(quantize=quantize))
    assert "device cuda" in caught.value.fix


def test_quantising_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="not installed") as caught:
        place_decoder(stack("llama"), LoadOptions(quantize="4bit", device="cuda"))
    assert "weft[quantize]" in caught.value.fix
    with pytest.raises(UsageError, match="cannot quantise to '2bit'"):
        place_decoder(stack("llama"), LoadOptions(quantize="2bit", device="cuda"))


def test_a_decoder_that_is_to_be_spread_or_quantised_is_first_read_to_the_cpu():
    assert LoadOptions(device="cuda").staging == "cuda"
    assert LoadOptions(device="cuda", quantize="4bit").staging == "cpu"
    assert LoadOptions(device="cuda", device_map="auto").staging == "cpu"


@pytest.mark.parametrize("device_map", [None, "auto"])
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantised_layers_compute_nearly_the_same_and_take_adapters(quantize, device_map, monkeypatch):
    """As far as bitsandbytes goes without a CUDA device: its layers, not their kernels."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_quantised("cpu", LoadOptions(torch.bfloat16, "cpu", device_map, quantize), monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device_map", [None, "auto"])
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_decoder_is_quantised_on_its_way_to_the_device(quantize, device_map, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    check_quantised("cuda", LoadOptions(torch.bfloat16, "cuda", device_map, quantize), monkeypatch)


def check_quantised(device, options, monkeypatch):
    import accelerate
    import bitsandbytes
    from accelerate.utils import CustomDtype

    from weft.adapters import AdapterConfig
    from weft.adapters.layer import MossLinear

    asked, infer = [], accelerate.infer_auto_device_map
    monkeypatch.setattr(
        accelerate, "infer_auto_device_map", lambda *a, **o: asked.append(o["special_dtypes"]) or infer(*a, **o)
    )
    torch.manual_seed(0)
    decoder = stack("llama").to(torch.bfloat16).eval().requires_grad_(False)
    for part in decoder.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.2)
    ids = torch.arange(8, device=device)[None]
    wanted = decoder.to(device)(input_ids=ids).last_hidden_state
    if device == "cpu":
        monkeypatch.setattr(placement, "_check_can_quantise", lambda options: None)
    decoder = place_decoder(decoder.cpu(), options)
    kind = bitsandbytes.nn.Linear8bitLt if options.quantize == "8bit" else bitsandbytes.nn.Linear4bit
    layers = {name: part for name, part in decoder.named_modules() if isinstance(part, kind)}
    assert len(layers) == 14
    for layer in layers.values():
        assert layer.weight.nbytes == layer.in_features * layer.out_features // (1 if options.quantize == "8bit" else 2)
    found = decoder(input_ids=ids).last_hidden_state
    assert 0 < (found - wanted).norm() < (0.05 if options.quantize == "8bit" else 0.6) * wanted.norm()
    narrow = torch.int8 if options.quantize == "8bit" else CustomDtype.INT4
    assert asked == ([{f"{name}.weight": narrow for name in layers}] if options.device_map else [])
    peft = __import__("peft").get_peft_model(decoder, AdapterConfig(kind="moss", rank=2).to_peft())
    assert sum(isinstance(part, MossLinear) for part in peft.modules()) == 14


def test_all_of_a_model_goes_to_the_device():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
            self.register_buffer("kept", torch.ones(2))
            self.register_buffer("made", torch.ones(2), persistent=False)

    model = Model()
    place(model, LoadOptions(device="meta"))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.state_dict().keys() == Model().state_dict().keys()
