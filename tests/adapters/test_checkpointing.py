"""Activation checkpointing runs layers again in backward, with the routes and random numbers of their own forward."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tests.adapters.llama import IMAGE_BRANCHES, MIXED, MOVED, TEXT, adapted, assert_equal, gradients, loss_of
from weft.adapters import routing_of
from weft.errors import RoutingError

KINDS = list(IMAGE_BRANCHES)
FORMS = {"reentrant": {"use_reentrant": True}, "non-reentrant": {"use_reentrant": False}}


def checkpointed(model: PeftModel, arguments: dict[str, Any]) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    return model


def trained(model: PeftModel, step: Callable[[PeftModel], None]) -> dict[str, Tensor | None]:
    torch.manual_seed(4)
    step(model)
    return gradients(model)


def one_step(model: PeftModel) -> None:
    loss_of(model, MIXED).backward()


def sum_of_two(model: PeftModel) -> None:
    (loss_of(model, MIXED) + loss_of(model, MOVED)).backward()


def first_of_two(model: PeftModel) -> None:
    loss = loss_of(model, MIXED)
    loss_of(model, MOVED)
    loss.backward()


def with_a_look_in_between(model: PeftModel) -> None:
    loss = loss_of(model, MIXED)
    with torch.no_grad():
        loss_of(model, TEXT)
    loss.backward()


def backward_twice(model: PeftModel) -> None:
    loss = loss_of(model, MIXED)
    loss.backward(retain_graph=True)
    loss.backward()


def text_without_a_layout(model: PeftModel) -> None:
    with routing_of(model).text_only():
        loss = loss_of(model, None)
    loss.backward()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_run_without_checkpointing(kind, form, dropout):
    plain = trained(adapted(kind, dropout), one_step)
    assert_equal(trained(checkpointed(adapted(kind, dropout), FORMS[form]), one_step), plain)


@pytest.mark.parametrize("form", FORMS)
def test_layers_run_again_only_after_their_forward(form):
    """What the comparison above rests on: checkpointing is on."""
    model = checkpointed(adapted(), FORMS[form])
    calls = []
    model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = loss_of(model, MIXED)
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "step", [sum_of_two, first_of_two, with_a_look_in_between, backward_twice, text_without_a_layout]
)
def test_with_our_context_any_order_of_forwards_and_backwards_is_right(step):
    model = adapted()
    checkpointed(model, {"use_reentrant": False, "context_fn": routing_of(model).checkpoint_context})
    assert_equal(trained(model, step), trained(adapted(), step))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [sum_of_two, first_of_two, with_a_look_in_between])
def test_without_it_a_backward_that_would_take_a_later_layout_raises(step, form):
    with pytest.raises(RoutingError, match="layout of a later one"):
        step(checkpointed(adapted(), FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
def test_a_layout_set_ahead_of_its_forward_is_not_taken_either(form):
    model = checkpointed(adapted(), FORMS[form])
    loss = loss_of(model, MIXED)
    routing_of(model).set(MOVED)
    with pytest.raises(RoutingError, match="layout of a later one"):
        loss.backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_backward_through_a_kept_graph_needs_no_context(form):
    assert_equal(trained(checkpointed(adapted(), FORMS[form]), backward_twice), trained(adapted(), backward_twice))
