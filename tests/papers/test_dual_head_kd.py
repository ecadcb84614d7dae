"""The study of two heads returns what it declares; its data and its methods are as described."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from weightroom.distill import DHKDObjective, DualHead
from weightroom.papers import dual_head_kd
from weightroom.study import Scale, Trial

STUDY = dual_head_kd.study(Scale.SMOKE)


def run(name: str, folder, seed: int = 0) -> dict[str, float]:
    arm = STUDY.arms[name]
    return arm.run(Trial(seed=seed, scale=Scale.SMOKE, params=arm.defaults, shared=folder))


@pytest.mark.parametrize("name", STUDY.arms)
def test_a_trial_returns_what_is_declared(name, tmp_path_factory):
    result = run(name, tmp_path_factory.getbasetemp() / "shared")
    assert set(result) <= set(STUDY.metrics)
    assert {"accuracy", "teacher_accuracy"} <= set(result)
    assert all(isinstance(value, float) for value in result.values())
    two_losses = name not in ("ce", "logit loss alone")
    assert ("cosine_backbone" in result) == two_losses
    assert ("cosine_head" in result) == (two_losses and "dual" not in name)
    assert all(-1 <= value <= 1 for value in result.values())


@pytest.mark.parametrize("name", ["ce", "dual head, nonlinear", "dual head, aligned"])
def test_a_trial_is_the_same_twice(name, tmp_path):
    first = run(name, tmp_path)
    torch.rand(1)
    assert run(name, tmp_path) == first
    assert run(name, tmp_path, seed=1) != first


def test_measuring_the_angle_changes_nothing():
    task = dual_head_kd._clusters(0)
    objective = STUDY.arms["one head"].run.keywords["make"](task.teacher(0), alpha=1.0)
    student = task.model(0)
    state = copy.deepcopy(student.state_dict())
    x, y = task.train[:64]
    angles = dual_head_kd._cosines(objective, student, x, y)
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), state.values(), strict=True))
    assert all(p.grad is None for p in student.parameters())
    names = [name for name, _ in student.named_parameters()]
    g1, g2 = (torch.autograd.grad(term, list(student.parameters()), retain_graph=True) for term in objective.terms(student, x, y))
    for part, inside in (("cosine_head", True), ("cosine_backbone", False)):
        a, b = (
            torch.cat([g.flatten() for name, g in zip(names, grads, strict=True) if name.startswith("fc") == inside])
            for grads in (g1, g2)
        )
        assert angles[part] == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)


def test_data_are_as_described():
    task = dual_head_kd._clusters(3)
    assert [len(part) for part in (task.train, task.val, task.test)] == [1500, 1000, 1500]
    x, y = task.train[:]
    assert x.shape == (1500, 64)
    assert (x.abs() < 1).all()
    assert set(y.tolist()) == set(range(40))
    sizes = [[m.out_features for m in net.modules() if isinstance(m, nn.Linear)] for net in (task.teacher(0), task.model(0))]
    assert sizes == [[256, 256, 256, 40], [16, 16, 40]]
    again, other = dual_head_kd._clusters(3), dual_head_kd._clusters(4)
    assert torch.equal(again.train[:][0], x)
    assert not torch.equal(other.train[:][0], x)


def test_every_tuned_arm_has_as_many_choices_and_its_default_is_one_of_them():
    for name, arm in STUDY.arms.items():
        if name not in ("ce", "one head, weight 0.1"):
            ((key, choices),) = arm.space.items()
            assert len(choices) == 5, name
            assert arm.defaults[key] in choices, name


@pytest.mark.parametrize("name", dual_head_kd.PAPER.methods)
def test_methods_wrap_train_and_unwrap(name):
    method = dual_head_kd.PAPER.methods[name]
    task = dual_head_kd._clusters(0)
    objective = method.make(task.teacher(0), **method.defaults)
    assert isinstance(objective, DHKDObjective)
    assert objective.align == ("aligned" in name)
    student = task.model(0)
    wrapped = objective.prepare(student)
    assert isinstance(wrapped, DualHead)
    assert isinstance(wrapped.aux, nn.Sequential if "nonlinear" in name else nn.Linear)
    x, y = task.train[:64]
    objective(wrapped, x, y).backward()
    assert student.fc.weight.grad.abs().sum() > 0
    assert objective.finish(wrapped) is student
    assert set(method.space) - {"lr"} <= set(method.defaults)


@pytest.mark.parametrize("scale", list(Scale))
def test_study_is_well_formed(scale):
    study = dual_head_kd.study(scale)
    assert study.paper is dual_head_kd.PAPER
    assert len(study.arms) == 11
    assert study.metric == "accuracy"


def test_card():
    assert dual_head_kd.PAPER.names() == [
        f"weightroom.distill.{name}" for name in ("DHKDObjective", "DualHead", "BinaryKLLoss", "BinaryKLNormLoss")
    ]
    assert "2411.08937" in dual_head_kd.PAPER.bibtex


def test_a_trial_is_the_same_with_and_without_the_measuring(monkeypatch):
    run = STUDY.arms["dual head, nonlinear"].run
    trial = lambda: Trial(3, Scale.SMOKE, params=STUDY.arms["dual head, nonlinear"].defaults)  # noqa: E731
    with_it = run(trial())
    nothing = {"cosine_head": 0.0, "cosine_backbone": 0.0}
    monkeypatch.setattr(dual_head_kd, "_cosines", lambda *_: nothing)
    assert run(trial())["accuracy"] == with_it["accuracy"]
    monkeypatch.setattr(dual_head_kd, "_cosines", lambda *_: nothing | {"cosine_head": float(torch.rand(()))})
    assert run(trial())["accuracy"] == with_it["accuracy"]
