"""One step's arithmetic, and what happens when it goes wrong."""

import math
import re

import pytest
import torch

from weft.data.dataset import ChatDataset
from weft.errors import ConfigError, DocumentError, NonFiniteError
from weft.training import build, steps
from weft.training.config import OptimConfig, ScheduleConfig
from weft.training.loop import learning_rate
from weft.training.objective import Objective


def weights(training):
    return {name: tensor.detach().clone() for name, tensor in training.parameters.items()}


def finished(config):
    training = build(config)
    reports = list(steps(training))
    return weights(training), reports


def test_micro_batches_give_the_step_of_the_whole_batch(recipe):
    # dropout draws differ with the shape of a forward, so it is off
    ends = [
        finished(recipe(adapter={"dropout": 0.0}, optim={"batch": 4, "micro_batch": size}, schedule={"steps": 4}))
        for size in (None, 1, 3)
    ]
    whole, losses = ends[0][0], [report.losses.total for report in ends[0][1]]
    for parts, reports in ends[1:]:
        # float32 sums in another order, through four steps of AdamW
        assert [report.losses.total for report in reports] == pytest.approx(losses, rel=1e-5)
        for name, tensor in parts.items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-5)


def test_the_gradient_is_that_of_the_mean_over_all_targets(recipe, monkeypatch):
    from weft.data.collate import collate

    config = recipe(adapter={"dropout": 0.0}, optim={"micro_batch": 1, "clip": 1e9}, schedule={"steps": 4, "warmup": 0})
    training, seen = build(config), {}
    step = training.optimizer.step
    monkeypatch.setattr(
        training.optimizer,
        "step",
        lambda: (seen.update({n: p.grad.clone() for n, p in training.parameters.items()}), step())[1],
    )
    fresh = build(config)
    (report, *_) = steps(training)
    order = [fresh.order[place] for place in range(config.optim.batch)]
    batch = collate([part for number in order for part in fresh.examples[number]], fresh.backbone.tokens.pad)
    losses = fresh.objective(batch)
    (losses.sum() / (batch.labels != -100).sum()).backward()
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in fresh.parameters.values()))
    assert report.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert norm > 0


def test_losses_fall_and_only_the_adapter_moves(recipe):
    config = recipe(schedule={"steps": 30, "warmup": 3}, data={"validation": 0})
    training = build(config)
    adapter = {id(parameter) for parameter in training.parameters.values()}
    frozen = [p for p in training.backbone.parameters() if id(p) not in adapter]
    before = [p.clone() for p in frozen]
    reports = list(steps(training))
    assert reports[-1].losses.text < 0.7 * reports[0].losses.text
    assert reports[-1].losses.image < 0.9 * reports[0].losses.image
    assert all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))
    assert all(p.grad is None for p in frozen)


def test_the_caller_s_random_numbers_do_not_matter_and_are_left_alone(recipe):
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        ends.append(finished(recipe(schedule={"steps": 6}))[0])
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_dropout_and_seed_matter(recipe):
    short = {"schedule": {"steps": 3, "warmup": 1}, "sampling": {"every": None}}
    plain = finished(recipe(**short))[0]
    for other in (recipe(seed=1, **short), recipe(adapter={"dropout": 0.0}, **short)):
        assert any(not torch.equal(tensor, plain[name]) for name, tensor in finished(other)[0].items())


def test_the_rate_warms_up_and_falls():
    optim, schedule = OptimConfig(learning_rate=1.0), ScheduleConfig(steps=10, warmup=4, final=0.1)
    rates = [learning_rate(optim, schedule, step) for step in range(1, 11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0.1 < rates[-1] < 0.2


def test_long_documents_are_cut_and_counted(recipe):
    training = build(recipe(data={"context": 24}, schedule={"steps": 4}))
    reports = list(steps(training))
    lengths = {len(part) for number in training.training for part in training.examples[number]}
    assert max(lengths) <= 24
    assert sum(report.cut_documents for report in reports) > 0
    whole = list(steps(build(recipe(schedule={"steps": 4}))))
    # every target is still learnt, once
    assert [r.losses.text_targets for r in reports] == [r.losses.text_targets for r in whole]
    assert sum(report.cut_documents for report in whole) == 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(recipe, monkeypatch, where):
    forward, calls = Objective.forward, []

    def sometimes(self, batch):
        calls.append(None)
        sums = forward(self, batch)
        if len(calls) == 2:
            if where == "loss":
                return sums * float("nan")
            sums.register_hook(lambda gradient: gradient * float("inf"))
        return sums

    monkeypatch.setattr(Objective, "forward", sometimes)
    training = build(recipe(optim={"micro_batch": None}, schedule={"steps": 4}))
    loop = steps(training)
    assert not next(loop).skipped
    before, moments = weights(training), {k: v["step"].clone() for k, v in training.optimizer.state.items()}
    report = next(loop)
    assert report.skipped
    assert report.losses.total is None
    assert report.to_json()["gradient_norm"] is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(training).items())
    assert all(torch.equal(training.optimizer.state[k]["step"], v) for k, v in moments.items())
    assert not next(loop).skipped
    assert (training.progress.skipped, training.progress.skipped_in_a_row) == (1, 0)


def test_three_such_steps_in_a_row_end_the_run_and_name_the_documents(recipe, monkeypatch):
    forward = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda self, batch: forward(self, batch) * float("nan"))
    loop = steps(build(recipe()))
    assert [next(loop).skipped, next(loop).skipped] == [True, True]
    with pytest.raises(NonFiniteError, match=r"steps 1 to 3") as caught:
        next(loop)
    assert len(re.findall(r"doc\d", caught.value.where)) == 3


def test_nothing_to_learn_is_said(recipe, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"id": "q", "messages": [{"role": "user", "content": "why?"}]}\n')
    with pytest.raises(DocumentError, match="anything to learn") as caught:
        next(steps(build(recipe(data={"path": file, "validation": 0}))))
    assert "q" in caught.value.where


def test_no_documents_left_to_learn_from(recipe):
    with pytest.raises(ConfigError, match="none is left"):
        build(recipe(data={"validation": 10}))


def test_pictures_are_encoded_once(recipe, monkeypatch):
    read, asked = ChatDataset.__getitem__, []
    monkeypatch.setattr(ChatDataset, "__getitem__", lambda self, i: (asked.append(i), read(self, i))[1])
    training = build(recipe())
    list(steps(training))
    assert sorted(asked) == sorted(training.training)
