"""The studies of the comp-sum losses return what they declare, on the data that they describe."""

from __future__ import annotations

import pytest
import torch

from weightroom.adversarial import SmoothAdversarialCompSum
from weightroom.losses import CompSumLoss
from weightroom.papers import comp_sum
from weightroom.study import Arm, Scale, Trial

TAU, ROBUST = comp_sum.study(Scale.SMOKE)


def run(study, name, seed=0, split="test", **more):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    setting = next(iter(study.settings.values()))
    trial = Trial(seed=seed, scale=Scale.SMOKE, setting=setting, params={**arm.defaults, **more}, split=split)
    result = arm.run(trial)
    assert set(result) == set(study.metrics)
    assert all(isinstance(value, float) and 0 <= value <= 1 for value in result.values())
    assert trial.spent.get("steps", 0) > 0 or result.get("failed") == 1
    return result


def test_methods_make_what_their_families_ask_for():
    task = comp_sum._task(0, Scale.SMALL)
    made = {name: method.make(task, **method.defaults) for name, method in comp_sum.PAPER.methods.items()}
    assert {name: loss.tau for name, loss in made.items()} == {"sum-exponential": 0.0, "comp-sum": 1.5}
    assert all(isinstance(loss, CompSumLoss) for loss in made.values())
    (robust,) = comp_sum.PAPER.also["robust"].values()
    objective = robust.make(0.2, (-1.0, 3.0), **robust.defaults)
    assert isinstance(objective, SmoothAdversarialCompSum)
    assert (objective.eps, objective.bounds) == (0.2, (-1.0, 3.0))
    for method in (*comp_sum.PAPER.methods.values(), robust):
        assert set(method.space) - {"lr"} <= set(method.defaults)


def test_data_are_split_by_the_seed():
    tasks = [comp_sum._task(seed, Scale.SMALL) for seed in (3, 3, 4)]
    parts = [[comp_sum._whole(part) for part in (task.train, task.val, task.test)] for task in tasks]
    assert [len(x) for x, _ in parts[0]] == [700, 200, 897]
    assert all(torch.equal(a, b) for a, b in zip(parts[0], parts[1], strict=True) for a, b in zip(a, b, strict=True))
    assert not torch.equal(parts[0][0][0], parts[2][0][0])
    assert all(x.min() == 0 and x.max() == 1 for x, _ in parts[0])


@pytest.mark.parametrize("name", ["tau 1", "tau 0", "tau 2"])
def test_a_loss_is_tried_alike_twice(name):
    first = run(TAU, name, lr=0.01)
    assert first == run(TAU, name, lr=0.01)
    assert first != run(TAU, name, lr=0.01, seed=1)
    assert first["failed"] == float(first["accuracy"] < 0.2)


def test_a_loss_that_diverges_is_counted():
    assert run(TAU, "tau 0", lr=1e6)["failed"] == 1


@pytest.mark.parametrize("name", list(ROBUST.arms))
def test_a_defence_is_tried_alike_twice(name):
    first = run(ROBUST, name)
    assert first["robust"] <= first["clean"]
    if name in ("TRADES", "ADV-COMP-SUM", "penalty at random"):
        assert first == run(ROBUST, name)
        assert first != run(ROBUST, name, split="val")


def test_random_penalty_stays_in_the_ball():
    objective = comp_sum._RandomPenalty(eps=0.1)
    x = torch.rand(20, 8, generator=torch.Generator().manual_seed(0))
    moved = objective.attack(torch.nn.Linear(8, 2), x, torch.zeros(20, dtype=torch.int64))
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert abs((moved - x).abs().max() - 0.1) < 1e-6


@pytest.mark.parametrize("scale", list(Scale))
def test_studies_are_well_formed(scale):
    for study in comp_sum.study(scale):
        assert study.paper is comp_sum.PAPER
        assert study.name.startswith("comp-sum: ")
        for arm in study.arms.values():
            assert all(arm.defaults[name] in choices for name, choices in arm.space.items())
