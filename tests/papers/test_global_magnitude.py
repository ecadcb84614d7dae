"""The studies of global magnitude pruning return what they declare, and their arms start from the same network."""

from __future__ import annotations

import pytest

from weightroom.papers import global_magnitude
from weightroom.study import Arm, Scale, Trial

PERCEPTRON, CONVOLUTIONS = global_magnitude.study(Scale.SMOKE)


def run(study, name, setting, seed=0):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    trial = Trial(seed=seed, scale=Scale.SMOKE, setting=study.settings[setting], params=arm.defaults)
    result = arm.run(trial)
    assert study.metric in result
    assert set(result) <= set(study.metrics)
    assert all(isinstance(value, float) for value in result.values())
    return result, trial.spent


@pytest.mark.parametrize("name", PERCEPTRON.arms)
def test_arms_remove_what_the_setting_says(name):
    result, spent = run(PERCEPTRON, name, "0.98")
    weights, biases = 115_968, 650
    if name == "dense":
        assert spent["parameters"] > 0.99 * weights
        assert "sparsity" not in result
        return
    assert result["sparsity"] == round(0.98 * weights) / weights
    assert spent["parameters"] <= weights - round(0.98 * weights) + biases
    if name == "global + MT":
        assert result["smallest_layer"] >= int(0.002 * weights)


def test_trials_are_decided_by_the_seed():
    first, _ = run(PERCEPTRON, "random", "0.98")
    assert first == run(PERCEPTRON, "random", "0.98")[0]
    assert first != run(PERCEPTRON, "random", "0.98", seed=1)[0]


def test_a_convolutional_network():
    result, _ = run(CONVOLUTIONS, "global + MT", "0.9")
    assert result["sparsity"] == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize("scale", [Scale.SMOKE, Scale.SMALL])
def test_claims_are_about_settings_that_are_run(scale):
    for study in global_magnitude.study(scale):
        assert study.claims
        assert all(study.setting_of(claim.expect) in study.settings for claim in study.claims)


def test_the_minimum_is_feasible_at_every_sparsity():
    for sparsity in (0.9, 0.98, 0.99, 0.995, 0.999):
        pruner = global_magnitude._with_minimum(sparsity, 4)
        assert 0 < 4 * pruner.min_fraction <= 0.8 * (1 - sparsity) + 1e-12


def test_what_the_family_gets():
    method = global_magnitude.PAPER.methods["global magnitude, minimum kept"]
    assert method.make(0.5, **method.defaults).min_fraction == 5e-4
