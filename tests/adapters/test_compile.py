"""torch.compile makes one graph of an adapted model for all layouts of the same sizes, and a second for other sizes."""

from collections.abc import Callable, Iterator

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch._dynamo.utils import counters

from tests.adapters.llama import (
    IMAGE_BRANCHES,
    MIXED,
    MOVED,
    TALL,
    TEXT,
    WIDE,
    adapted,
    assert_equal,
    gradients,
    ids_for,
)
from weft.adapters import routing_of
from weft.errors import RoutingError
from weft.layout import ModalityLayout, TextSpan, lay_out

OTHER_GRIDS = lay_out(
    [
        [TextSpan(2), TALL, TextSpan(2), TALL, TextSpan(1)],
        [TextSpan(3), TALL, TextSpan(4)],
    ]
)
LONGER = [
    lay_out([[TextSpan(2 + more), WIDE, TextSpan(2), TALL, TextSpan(1)], [TextSpan(3), *[TALL] * (1 + more % 2)]])
    for more in (1, 2, 3)
]
"""Other lengths, and other numbers of text positions and patches."""

Run = Callable[[ModalityLayout], Tensor]


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def whole_model(model: PeftModel, backend: str) -> Run:
    """The layout is set outside: index lists have as many entries as the values say, which no graph can hold."""
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def run(layout: ModalityLayout) -> Tensor:
        routing_of(model).set(layout)
        return compiled(input_ids=ids_for(layout)).logits

    return run


def base_forward(model: PeftModel, backend: str) -> Run:
    """The adapted model's own forward; the argument is then taken before the compiled part."""
    base = model.get_base_model()
    base.forward = torch.compile(base.forward, backend=backend, fullgraph=True)
    return lambda layout: model(input_ids=ids_for(layout), layout=layout).logits


def small(kind: str) -> PeftModel:
    return adapted(kind, dtype=torch.float64, layers=1)


def assert_as_eager(kind: str, model: PeftModel, run: Run, layout: ModalityLayout, atol: float = 1e-10) -> None:
    """Sums may be formed in another order: a few last bits of float64."""
    eager = small(kind)
    wanted = eager(input_ids=ids_for(layout), layout=layout).logits
    wanted.square().mean().backward()
    model.zero_grad()
    logits = run(layout)
    logits.square().mean().backward()
    torch.testing.assert_close(logits, wanted, rtol=0, atol=atol)
    assert_equal(gradients(model), gradients(eager), atol=atol)


@pytest.mark.parametrize(
    "kind,compiled",
    [
        ("moss", whole_model),
        *(pytest.param(kind, whole_model, marks=pytest.mark.slow) for kind in ("moe_lora", "raster", "sam")),
        *(pytest.param(kind, base_forward, marks=pytest.mark.slow) for kind in IMAGE_BRANCHES),
    ],
)
def test_one_graph_serves_all_layouts_of_the_same_sizes(kind, compiled):
    model = small(kind)
    run = compiled(model, "aot_eager")
    for layout in (MIXED, MOVED, OTHER_GRIDS, MIXED):
        assert_as_eager(kind, model, run, layout)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_second_graph_serves_all_other_sizes(backend):
    model = small("moss")
    run = whole_model(model, backend)
    for layout in (MIXED, *LONGER):
        assert_as_eager("moss", model, run, layout)
    assert graphs() == 2


@pytest.mark.slow
def test_batches_without_pictures_take_one_graph_more():
    model = small("moss")
    run = whole_model(model, "aot_eager")
    for layout in (MIXED, TEXT, MIXED, TEXT):
        assert_as_eager("moss", model, run, layout)
    assert graphs() == 2


@pytest.mark.slow
def test_code_generated_by_inductor_is_right_too():
    model = small("moss")
    run = whole_model(model, "inductor")
    for layout in (MIXED, MOVED, OTHER_GRIDS):
        assert_as_eager("moss", model, run, layout, atol=1e-6)  # LLaMA's norms are float32, and fused here
    assert graphs() == 1


def test_a_compiled_model_too_refuses_to_run_without_a_layout():
    model = small("moss")
    run = base_forward(model, "eager")
    run(MIXED)
    with pytest.raises(RoutingError, match="without the layout"):
        model(input_ids=ids_for(MIXED))


@pytest.mark.slow
def test_without_fullgraph_the_layout_may_be_an_argument():
    model = small("moss")
    compiled = torch.compile(model, backend="eager")
    logits = compiled(input_ids=ids_for(MIXED), layout=MIXED).logits
    torch.testing.assert_close(logits, small("moss")(input_ids=ids_for(MIXED), layout=MIXED).logits, rtol=0, atol=1e-10)
    with pytest.raises(RoutingError, match="without the layout"):
        compiled(input_ids=ids_for(MIXED))
