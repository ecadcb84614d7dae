"""The studies of output-distortion pruning return what they declare, and prune what they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightroom.papers import joint_layerwise
from weightroom.prune import RDPruner
from weightroom.study import Arm, Scale, Trial

ROUNDS, AT_ONCE, ADDING_UP = joint_layerwise.study(Scale.SMOKE)


def run(study, name, setting, seed=0, scale=Scale.SMOKE):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    trial = Trial(seed=seed, scale=scale, setting=study.settings[setting], params=arm.defaults)
    result = arm.run(trial)
    assert study.metric in result
    assert set(result) <= set(study.metrics)
    assert all(isinstance(value, float) for value in result.values())
    return result, trial.spent


@pytest.mark.parametrize("name", ROUNDS.arms)
def test_rounds_reach_their_sparsity(name):
    result, spent = run(ROUNDS, name, "0.360")
    removed = round(0.36 * 115_968)
    if name == "dense":
        assert result["sparsity"] == 0
        assert result["pruned"] > 0.5
    else:
        assert result["sparsity"] == removed / 115_968
        assert spent["parameters"] <= 115_968 - removed + 650
    assert ("pruned" in result) == (name != "random, retrained")


@pytest.mark.parametrize("name", AT_ONCE.arms)
def test_one_cut(name):
    result, _ = run(AT_ONCE, name, "0.7")
    assert ("distortion" in result) == (name not in ("dense", "random, retrained"))
    assert name == "dense" or result["sparsity"] == round(0.7 * 115_968) / 115_968
    if "distortion" in result:
        assert result["distortion"] > 0


def test_trials_are_decided_by_the_seed():
    first, _ = run(AT_ONCE, "RD, no data", "0.7")
    assert first == run(AT_ONCE, "RD, no data", "0.7")[0]
    assert first != run(AT_ONCE, "RD, no data", "0.7", seed=1)[0]


@pytest.mark.parametrize("name", ADDING_UP.arms)
def test_ratio_of_joint_to_summed_distortion(name):
    result, _ = run(ADDING_UP, name, "0.1")
    assert 0.5 < result["ratio"] < 2
    assert 1 / 4 <= result["largest_share"] < 1


def test_ratio_is_one_where_distortions_must_add_up(monkeypatch):
    torch.manual_seed(0)
    linear = nn.Linear(64, 10)
    monkeypatch.setattr(joint_layerwise, "_dense", lambda task, trial: nn.Sequential(nn.Flatten(), linear))
    for name in ADDING_UP.arms:  # a single layer is its own sum
        assert run(ADDING_UP, name, "0.5")[0] == {"ratio": pytest.approx(1.0), "largest_share": 1.0}


def test_pixels_are_scaled_by_the_training_data():
    task = joint_layerwise._perceptron()
    x = joint_layerwise._inputs(task.train, "cpu")
    assert x.mean(0).abs().max() < 1e-4
    assert ((x.std(0) - 1).abs() < 1e-3).logical_or(x.std(0) == 0).all()
    assert joint_layerwise._inputs(task.test, "cpu").mean(0).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [Scale.SMOKE, Scale.SMALL])
def test_claims_are_about_settings_that_are_run(scale):
    for study in joint_layerwise.study(scale):
        assert study.claims
        assert all(study.setting_of(claim.expect) in study.settings for claim in study.claims)


def test_at_real_scale_one_cut_of_a_residual_network(monkeypatch):
    monkeypatch.setattr(joint_layerwise, "_small_resnet", joint_layerwise._perceptron)
    (study,) = joint_layerwise.study(Scale.REAL)
    assert study.name == "joint-layerwise: at once"
    assert {"dense", "global", "LAMP", "ERK", "uniform", "random", "random, retrained", "RD"} <= set(study.arms)


def test_what_the_family_gets():
    for name, method in joint_layerwise.PAPER.methods.items():
        pruner = method.make(0.5, **method.defaults)
        assert isinstance(pruner, RDPruner)
        assert (pruner.calibration == "noise") == (name == "RD, no data")
        assert all(hasattr(pruner, key) for key in method.space)
