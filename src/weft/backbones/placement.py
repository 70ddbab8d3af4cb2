"""Where a filled model lies: on one device, its decoder spread over several or quantised on its way there."""

from collections.abc import Iterator

import torch
from torch import nn

from weft.backbones.checkpoint import LoadOptions, few
from weft.errors import UsageError


def place(backbone: nn.Module, options: LoadOptions) -> None:
    """Move a filled backbone: its decoder as `place_decoder`, all else to the device.

    Raises:
        UsageError: as `place_decoder`.
    """
    backbone.decoder = place_decoder(backbone.get_submodule("decoder"), options)
    for name, part in backbone.named_children():
        if name != "decoder":
            part.to(options.device)
    for name, buffer in backbone.named_buffers(recurse=False):
        setattr(backbone, name, buffer.to(options.device))


def place_decoder(decoder: nn.Module, options: LoadOptions) -> nn.Module:
    """Move a filled decoder stack to where the options want it, quantised if they want it.

    Quantised are the linear layers, which is what adapters wrap; norms keep their dtype. The layers are quantised as
    they arrive on the device.

    Raises:
        UsageError: bitsandbytes or a CUDA device is missing; the device map names no such module, leaves one out, or
            needs offloading, which would move weights at every step.
    """
    if options.quantize is not None:
        _check_can_quantise(options)
        _quantise(decoder, options)
    if options.device_map is None:
        return decoder.to(options.device)
    from accelerate import dispatch_model

    places = _auto_map(decoder, options) if options.device_map == "auto" else _checked_map(decoder, options.device_map)
    first = next(iter(places.values()))
    skip = getattr(decoder, "_skip_keys_device_placement", None)
    return dispatch_model(decoder, places, main_device=torch.device(first), skip_keys=skip)


def _auto_map(decoder: nn.Module, options: LoadOptions) -> dict[str, str | int]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import CustomDtype, get_balanced_memory

    narrow = {"8bit": torch.int8, "4bit": CustomDtype.INT4}.get(options.quantize or "")
    special = {f"{path}.weight": narrow for path, _ in _linears(decoder)} if narrow is not None else None
    whole = list(getattr(decoder, "_no_split_modules", None) or ())
    room = get_balanced_memory(decoder, no_split_module_classes=whole, special_dtypes=special)
    places = infer_auto_device_map(decoder, room, whole, special_dtypes=special)
    if torch.cuda.is_available() and not {"cpu", "disk"}.isdisjoint(places.values()):
        raise UsageError(
            "the model does not fit on the CUDA devices of this machine",
            where="device_map auto",
            fix="use a smaller dtype, 8bit or 4bit, or more devices",
        )
    return places


def _checked_map(decoder: nn.Module, device_map: str | dict[str, str | int]) -> dict[str, str | int]:
    if isinstance(device_map, str):
        raise UsageError(f"there is no device map {device_map!r}", where="device_map", fix="use auto, or a mapping")
    names = {name for name, _ in decoder.named_modules()}
    unknown = [name for name in device_map if name not in names]
    if unknown:
        children = ", ".join(name for name, _ in decoder.named_children())
        raise UsageError(f"the decoder has no module {unknown[0]}", where="device_map", fix=f"its parts are {children}")
    uncovered = [
        key
        for key, _ in decoder.named_parameters()
        if not any(name == "" or key.startswith(f"{name}.") for name in device_map)
    ]
    if uncovered:
        raise UsageError(
            f"the device map says nothing about {few(uncovered)}", where="device_map", fix="name them, or use auto"
        )
    kinds = {str(place) if place in ("cpu", "disk") else "device" for place in device_map.values()}
    if len(kinds) > 1 or "disk" in kinds:
        raise UsageError(
            "the device map keeps weights on the CPU or the disk beside a device: they would be moved at every step",
            where="device_map",
            fix="spread the decoder over devices alone, or quantise it",
        )
    return device_map


def _check_can_quantise(options: LoadOptions) -> None:
    where = f"quantize {options.quantize}"
    if options.quantize not in ("8bit", "4bit"):
        raise UsageError(f"cannot quantise to {options.quantize!r}", where=where, fix="use 8bit or 4bit")
    has_cuda = torch.cuda.is_available()
    if not has_cuda or (options.device_map is None and not options.device.startswith("cuda")):
        raise UsageError(
            "quantised weights need a CUDA device" + ("" if has_cuda else ", and torch finds none on this machine"),
            where=where,
            fix="load with device cuda on a machine that has one, or without quantize",
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "bitsandbytes is not installed", where=where, fix="pip install 'weft[quantize]'; it needs a CUDA device"
        ) from error


def _quantise(decoder: nn.Module, options: LoadOptions) -> None:
    """Put bitsandbytes' layers in the place of linear ones; they narrow their weights when they are moved."""
    from bitsandbytes import nn as quantised

    for path, linear in list(_linears(decoder)):
        size = (linear.in_features, linear.out_features)
        with torch.device("meta"):
            if options.quantize == "8bit":
                narrow = quantised.Linear8bitLt(*size, bias=linear.bias is not None, has_fp16_weights=False)
                weight = quantised.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            else:
                has_bias = linear.bias is not None
                narrow = quantised.Linear4bit(*size, has_bias, compute_dtype=options.dtype, quant_type="nf4")
                weight = quantised.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        narrow.weight, narrow.bias = weight, linear.bias
        owner, _, name = path.rpartition(".")
        setattr(decoder.get_submodule(owner), name, narrow.requires_grad_(False))


def _linears(decoder: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for path, part in decoder.named_modules():
        if isinstance(part, nn.Linear):  # bitsandbytes' are, too
            yield path, part
