"""Two processes on CPU, one with pictures and one with text alone, do as one process with the data of both.

Run as a module, this file is one of the two processes: `python -m tests.adapters.test_distributed RANK FOLDER`.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.adapters.llama import IMAGE_BRANCHES, MIXED, TEXT, adapted, adapters, ids_for
from weft.adapters.layer import MossLinear
from weft.layout import ModalityLayout

ROOT = Path(__file__).parents[2]
PROCESSES = 2
DATA = {"one with pictures": (MIXED, TEXT), "no pictures": (TEXT, TEXT)}


def replicated(model: PeftModel) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=False)


def sharded_by_layer(model: PeftModel) -> nn.Module:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def sharded_by_linear(model: PeftModel) -> nn.Module:
    """q, k and v are never there at one time, so they cannot share their products."""
    for module in list(model.modules()):
        if isinstance(module, MossLinear):
            fully_shard(module)
    return fully_shard(model)


def sharded_and_checkpointed(model: PeftModel) -> nn.Module:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return sharded_by_layer(model)


WRAPPERS: dict[str, Callable[[PeftModel], nn.Module]] = {
    f.__name__: f for f in (replicated, sharded_by_layer, sharded_by_linear, sharded_and_checkpointed)
}
CASES = [
    *(("replicated", kind) for kind in IMAGE_BRANCHES),
    *(("sharded_by_layer", kind) for kind in ("moss", "sam")),
    ("sharded_by_linear", "moss"),
    ("sharded_and_checkpointed", "sam"),
]


def loss_of(model: nn.Module, layout: ModalityLayout, ids: Tensor) -> Tensor:
    """A sum over positions, so that the losses of parts add up to that of the whole."""
    logits = model(input_ids=ids, layout=layout).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / ids.numel()


def parts(layout: ModalityLayout, ids: Tensor) -> Iterator[tuple[ModalityLayout, Tensor]]:
    """Every sequence by itself."""
    for row in range(len(ids)):
        yield layout.map(lambda tensor, row=row: tensor[row : row + 1]), ids[row : row + 1]


def take_step(model: nn.Module) -> None:
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_as_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder / 'meeting'}", timedelta(seconds=60), rank=rank, world_size=PROCESSES
    )
    found: dict[str, Tensor] = {}

    def keep(case: str, model: PeftModel) -> None:
        missing = [name for name, parameter in adapters(model) if parameter.grad is None]
        assert not missing, f"{case}: no gradient for {missing}"
        found.update({f"{case}/{name}": whole(parameter.grad) for name, parameter in adapters(model)})

    for wrapper, kind in CASES:
        model = adapted(kind, dtype=torch.float64)
        wrapped = WRAPPERS[wrapper](model)
        for data, layouts in DATA.items():
            wrapped.zero_grad()
            loss_of(wrapped, layouts[rank], ids_for(layouts[rank], seed=rank)).backward()
            keep(f"{wrapper}/{kind}/{data}", model)

        wrapped.zero_grad()
        layout = DATA["one with pictures"][rank]
        (first, last) = parts(layout, ids_for(layout, seed=rank))
        if isinstance(wrapped, DistributedDataParallel):
            with wrapped.no_sync():
                (loss_of(wrapped, *first) / 2).backward()
        else:
            wrapped.set_requires_gradient_sync(False)
            (loss_of(wrapped, *first) / 2).backward()
            wrapped.set_requires_gradient_sync(True)
        (loss_of(wrapped, *last) / 2).backward()
        keep(f"{wrapper}/{kind}/accumulated", model)

        take_step(wrapped)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(wrapped, options=options)
        found.update({f"{wrapper}/{kind}/saved/{name}": tensor.contiguous() for name, tensor in state.items()})
    if rank == 0:
        save_file({name: tensor.clone() for name, tensor in found.items()}, folder / "found.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("two processes")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.adapters.test_distributed", str(rank), str(folder)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(PROCESSES)
    ]  # fmt: skip
    try:
        logs = [process.communicate(timeout=270)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(logs)
    return load_file(folder / "found.safetensors")


def alone(kind: str, data: str) -> PeftModel:
    """One process that has the data of both; the mean of their losses, as gradients are averaged."""
    model = adapted(kind, dtype=torch.float64)
    for rank, layout in enumerate(DATA[data]):
        (loss_of(model, layout, ids_for(layout, seed=rank)) / PROCESSES).backward()
    return model


def assert_found(found: dict[str, Tensor], case: str, wanted: dict[str, Tensor]) -> None:
    under = {name.removeprefix(f"{case}/"): tensor for name, tensor in found.items() if name.startswith(f"{case}/")}
    assert under.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            under[name], tensor, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@cache
def gradients_alone(kind: str, data: str) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in adapters(alone(kind, data))}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("wrapper,kind", CASES)
def test_gradients_are_those_of_one_process_with_all_data(found, wrapper, kind, data):
    wanted = gradients_alone(kind, data)
    assert_found(found, f"{wrapper}/{kind}/{data}", wanted)
    for name, gradient in wanted.items():
        assert ("moss_image" in name and data == "no pictures") == (gradient.abs().max() == 0), name


@pytest.mark.parametrize("wrapper,kind", CASES)
def test_gradients_of_sequences_one_after_another_add_up_to_those_of_the_batch(found, wrapper, kind):
    assert_found(found, f"{wrapper}/{kind}/accumulated", gradients_alone(kind, "one with pictures"))


@pytest.mark.parametrize("wrapper,kind", CASES)
def test_the_weights_saved_after_a_step_are_those_of_one_process(found, wrapper, kind):
    model = alone(kind, "one with pictures")
    take_step(model)
    assert_found(found, f"{wrapper}/{kind}/saved", {name: tensor.data for name, tensor in model.state_dict().items()})


if __name__ == "__main__":
    run_as_process(int(sys.argv[1]), Path(sys.argv[2]))
