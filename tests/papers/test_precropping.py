"""The study of PreCrop returns what it declares, and its arms keep the share of weights that the setting says."""

from __future__ import annotations

import pytest
import torch

from weightroom.papers import precropping
from weightroom.prune import SynFlowPruner, layerwise_density
from weightroom.study import Arm, Scale, Trial

STUDY = precropping.study(Scale.SMOKE)
WEIGHTS = 33_040
CROPS = set(precropping._CROPS)


def run(name, seed=0):
    arm = STUDY.arms[name]
    assert isinstance(arm, Arm)
    trial = Trial(seed=seed, scale=Scale.SMOKE, setting=0.2, params=arm.defaults)
    result = arm.run(trial)
    assert set(result) <= set(STUDY.metrics)
    assert all(isinstance(value, float) for value in result.values())
    return result, trial.spent


@pytest.mark.parametrize("name", STUDY.arms)
def test_arms_keep_what_the_setting_says(name):
    result, spent = run(name)
    assert 0 <= result["accuracy"] <= 1
    if name == "dense":
        assert result["density"] == 1
    elif name in CROPS:
        assert 0.18 < result["density"] <= 0.2
        assert spent["flops"] < 0.5 * 2 * 1_000_000
    else:
        assert result["density"] == pytest.approx(0.2, abs=1e-9)
        assert "density_gap" in result
        assert spent["parameters"] <= 0.2 * WEIGHTS + 298


def test_trials_are_decided_by_the_seed():
    first, again, other = (
        {k: v for k, v in run("SynFlow, shuffled", seed)[0].items() if k != "seconds_per_epoch"} for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_random_masks_follow_the_densities():
    torch.manual_seed(0)
    model = precropping.plain_cnn()
    densities = layerwise_density(model, params=0.08)
    plan = precropping.random_masks(model, densities, 2643, seed=0)
    layers = plan.layers()
    assert sum(layer.kept for layer in layers.values()) == 2643
    assert all(abs(layer.kept / layer.size - densities[name]) < 1 / layer.size + 1e-9 for name, layer in layers.items())
    other = precropping.random_masks(model, densities, 2643, seed=1)
    assert any(not torch.equal(other.masks[name], mask) for name, mask in plan.masks.items())


@pytest.mark.parametrize("scale", [Scale.SMOKE, Scale.SMALL])
def test_claims_are_about_settings_that_are_run(scale):
    study = precropping.study(scale)
    assert len(study.claims) >= 10
    assert all(study.setting_of(claim.expect) in study.settings for claim in study.claims)
    assert sum(p.numel() for n, p in precropping.plain_cnn().named_parameters() if p.ndim > 1) == WEIGHTS


def test_what_the_family_gets():
    method = precropping.PAPER.methods["SynFlow"]
    assert method.start == "initial"
    pruner = method.make(0.5, **method.defaults)
    assert isinstance(pruner, SynFlowPruner)
    assert pruner.rounds == 100
