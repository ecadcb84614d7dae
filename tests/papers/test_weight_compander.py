"""The study of the weight compander returns what it declares, and each arm does what its name says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from weightroom.compare.optimizer import OptimizerMethod
from weightroom.papers import weight_compander as paper
from weightroom.study import Arm, Scale, Trial

STUDY = paper.study(Scale.SMOKE)


def run(name: str, seed: int = 0, noise: float = 0.0, **params: float) -> dict[str, float]:
    arm = STUDY.arms[name]
    assert isinstance(arm, Arm)
    result = arm.run(Trial(seed=seed, params={**arm.defaults, **params}, setting=noise))
    assert set(result) <= set(STUDY.metrics)
    assert all(isinstance(value, float) for value in result.values())
    return dict(result)


@pytest.mark.parametrize("name", STUDY.arms)
def test_every_arm_runs_and_its_seed_decides(name):
    result = run(name)
    assert ("slope" in result) == ("learnt" in name)
    assert result == run(name)
    assert result != run(name, seed=1)


def test_arms_are_what_their_names_say():
    plain, start = run("plain", lr=1e-9), run("plain, 2 x start", lr=1e-9)
    assert start["max_weight"] == pytest.approx(2 * plain["max_weight"])
    assert run("plain, 4 x rate", lr=0.01) == run("plain", lr=0.04)
    trial = Trial(seed=0, params={"lr": 0.03, "weight_decay": 0.0}, setting=0.0)
    assert paper._run(trial, clip=0.05)["max_weight"] == pytest.approx(0.05)
    assert run("wc 0.1, 0.1, preserved", lr=1e-9)["max_weight"] == pytest.approx(plain["max_weight"], rel=1e-5)
    assert run("wc 0.2, 0.1", lr=1e-9)["max_weight"] == pytest.approx(0.2 * math.atan(plain["max_weight"] / 0.1), rel=1e-5)
    assert run("wc 0.2, 0.1", lr=1e-9)["near_zero"] == pytest.approx(start["near_zero"], rel=0.05)
    slow, fast = run("wc learnt")["slope"], run("wc learnt at full rate")["slope"]
    assert abs(fast - 1) > abs(slow - 1) > 0
    model = paper._with_dropout(paper._task(0, 0.0).model(), 0.3)
    assert [type(m).__name__ for m in model] == ["Flatten", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]


def test_data():
    clean, noisy = paper._task(3, 0.0), paper._task(3, 0.3)
    assert [len(d) for d in (clean.train, clean.val, clean.test)] == [150, 200, 1447]
    labels = [torch.tensor([int(d[i][1]) for i in range(150)]) for d in (clean.train, noisy.train, clean.test, noisy.test)]
    assert 0.1 < (labels[0] != labels[1]).float().mean() < 0.45
    assert torch.equal(labels[2], labels[3])
    assert torch.equal(clean.train[:][0], torch.stack([noisy.train[i][0] for i in range(150)]))


def test_histogram_of_the_weights_is_logged():
    arm = STUDY.arms["plain"]
    assert isinstance(arm, Arm)
    trial = Trial(seed=0, params=arm.defaults, setting=0.0)
    arm.run(trial)
    shares = [value for name, _, value in trial.curves if name.startswith("share of weights")]
    assert sum(shares) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", paper.PAPER.methods)
def test_methods_compand_the_model_train_and_fold_it(name):
    method = paper.PAPER.methods[name]
    assert isinstance(method, OptimizerMethod)
    assert method.of == "model"
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    optimizer = method.make(model, **method.defaults)
    assert parametrize.is_parametrized(model[0], "weight")
    assert len(optimizer.param_groups) == (2 if "learnt" in name else 1)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    method.finish(model)
    assert type(model[0]) is nn.Linear


def test_card():
    assert paper.PAPER.names() == [
        f"weightroom.weights.{n}" for n in ("WeightCompander", "compand", "compand_param_groups", "fold")
    ]
    assert "2306.16993" in paper.PAPER.bibtex
