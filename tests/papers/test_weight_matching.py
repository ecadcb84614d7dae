"""The study of weight matching returns what it declares; its arms share their networks; its methods merge."""

from __future__ import annotations

import math

import pytest
import torch

from weightroom import tasks
from weightroom.compare import merge
from weightroom.errors import TaskError
from weightroom.nets.small import ResNet
from weightroom.papers import weight_matching as paper
from weightroom.study import Scale, Trial

(STUDY,) = paper.study(Scale.SMOKE)


def run(name, folder, seed=0):
    arm = STUDY.arms[name]
    return arm.run(Trial(seed=seed, scale=Scale.SMOKE, params=arm.defaults, shared=folder))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize("name", STUDY.arms)
def test_a_trial_returns_what_is_declared(name, shared):
    result = run(name, shared)
    assert set(result) == set(STUDY.metrics)
    assert all(isinstance(value, float) and math.isfinite(value) for value in result.values())
    assert result == run(name, shared)
    assert len(list(shared.glob("*.safetensors"))) == 3  # the networks a, b and c, whatever the arm


def test_arms_differ_as_they_should(shared):
    none, other, matched = (run(name, shared) for name in ("no permutation", "random permutation", "weight matching"))
    assert none["barrier_cut"] == none["l2_reduction"] == none["rise_difference"] == 0
    assert none["barrier_bc"] != other["barrier_bc"]  # b and c are not permuted alike
    assert matched["l2_reduction"] > 0
    assert matched["R_0.3"] > none["R_0.3"]
    assert run("weight matching", shared, seed=1) != matched


def test_networks_are_as_described():
    task = paper._digits()
    assert [m.out_features for m in task.model().modules() if isinstance(m, torch.nn.Linear)] == [64, 64, 10]
    assert (task.recipe.optimizer, task.recipe.lr, task.recipe.batch_size) == ("adam", 1e-3, 64)
    assert len(task.train) == 1078


@pytest.mark.parametrize("name", paper.PAPER.methods)
def test_methods_bring_units_into_one_order(name):
    method = paper.PAPER.methods[name]
    task = tasks.digits(hidden=(8, 8))
    trial = Trial(seed=0, scale=Scale.SMOKE)
    states = [task.model(seed=s).state_dict() for s in range(3)]
    trained = merge.Trained(task, trial, states)
    found = method.make(trained, **method.defaults)
    x = task.test[:8][0]
    for before, after in zip(states, found, strict=True):
        torch.testing.assert_close(trained.model(after)(x), trained.model(before)(x))
    assert set(method.space) <= set(method.defaults)


def test_without_photographs_the_study_says_what_it_leaves_out(monkeypatch):
    def missing(**_):
        raise TaskError("the photographs are not there")

    monkeypatch.setattr(paper.tasks, "cifar10", missing, raising=False)
    with pytest.warns(UserWarning, match="leaves out .* the photographs are not there"):
        (only,) = paper.study(Scale.FULL)
    assert "the photographs are not there" in only.notes["left out"]


def test_residual_networks_run_where_there_are_photographs(monkeypatch, tmp_path):
    def small(epochs):
        return tasks.digits("cnn", epochs=epochs)

    monkeypatch.setattr(paper.tasks, "cifar10", small, raising=False)
    monkeypatch.setattr(paper, "ResNet", lambda blocks, width: ResNet(1, 10, blocks=(1, 1), width=width // 32))
    monkeypatch.setattr(paper, "_SAMPLES", 200)
    digits, photographs = paper.study(Scale.FULL)
    assert photographs.name != digits.name
    arm = photographs.arms["straight-through"]
    given = {**arm.run.keywords, "epochs": 1}
    result = arm.run.func(Trial(seed=0, params=arm.defaults, shared=tmp_path), **given)
    assert set(result) == set(photographs.metrics) - {"taylor_error"}


def test_card():
    assert "weightroom.weights.weight_matching" in paper.PAPER.names()
    assert "2402.04051" in paper.PAPER.bibtex
