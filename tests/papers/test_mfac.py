"""The studies of M-FAC return what they declare, and their arms do what their names say."""

from __future__ import annotations

import pytest
import torch

from weightroom.papers import mfac
from weightroom.study import Arm, Scale, Trial

PRUNING, OPTIMIZER = mfac.study(Scale.SMOKE)


def run(study, name, seed=0, split="test"):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    setting = next(iter(study.settings.values()))
    trial = Trial(seed=seed, scale=Scale.SMOKE, setting=setting, params=arm.defaults, split=split)
    result = arm.run(trial)
    assert study.metric in result
    assert set(result) <= set(study.metrics)
    assert all(isinstance(value, float) for value in result.values())
    return result, trial.spent


@pytest.mark.parametrize("name", PRUNING.arms)
def test_pruning_arms_remove_nine_weights_in_ten(name):
    result, spent = run(PRUNING, name)
    weights, biases = 64 * 64 * 2 + 640, 138
    if name == "dense":
        assert "sparsity" not in result
        return
    assert result["sparsity"] == round(0.9 * weights) / weights
    assert spent["parameters"] <= weights - round(0.9 * weights) + biases
    gradients = {"M-FAC": 64, "M-FAC, one round": 16, "diagonal": 64, "diagonal, one round": 16}
    assert spent.get("backwards", 0) == gradients.get(name, 64 if name.startswith("M-FAC") else 0)


def test_the_correction_is_what_the_arm_without_it_lacks():
    assert run(PRUNING, "M-FAC")[0] != run(PRUNING, "M-FAC, no correction")[0]
    assert run(PRUNING, "M-FAC")[0] == run(PRUNING, "M-FAC")[0]


@pytest.mark.parametrize("name", OPTIMIZER.arms)
def test_optimizer_arms_train(name):
    result, spent = run(OPTIMIZER, name)
    assert 0 < result["train_loss"] < 3
    assert spent["steps"] == 2 * 17
    assert result != run(OPTIMIZER, name, split="val")[0]


def test_every_seed_has_a_stratified_split_of_its_own():
    first, second = (mfac._task(Scale.SMALL, seed) for seed in (0, 1))
    for task in (first, second):
        assert [len(part) for part in (task.train, task.val, task.test)] == [1077, 180, 540]
        counts = [torch.bincount(part.tensors[1], minlength=10) / len(part) for part in (task.train, task.test)]
        assert (counts[0] - counts[1]).abs().max() < 0.005
    assert not torch.equal(first.test.tensors[0], second.test.tensors[0])


@pytest.mark.parametrize("scale", list(Scale)[:3])
def test_claims_are_about_what_is_run(scale):
    pruning, optimizer = mfac._pruning(scale), mfac._optimizer(scale)
    assert pruning.claims
    assert {claim.expect.on for claim in pruning.claims} <= set(pruning.settings)
    assert any(claim.expect.tuned for claim in optimizer.claims)


def test_methods_make_what_they_should():
    pruner = mfac.PAPER.methods["M-FAC"].make(0.5)
    assert (pruner.sparsity, pruner.window, pruner.block_size, pruner.recomputations) == (0.5, 64, 128, 16)
    method = mfac.PAPER.also["optimizer"]["m-fac"]
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = method.make([x], **method.defaults)
    x.square().sum().backward()
    optimizer.step()
    assert (x < 1).all()


def test_card():
    assert mfac.PAPER.names() == [
        "weightroom.prune.MFACPruner",
        "weightroom.optim.MFAC",
        "weightroom.curvature.EmpiricalFisherInverse",
    ]
    assert "2107.03356" in mfac.PAPER.bibtex
