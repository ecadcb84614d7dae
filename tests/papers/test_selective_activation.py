"""The studies of AP return what they declare, remove what they say, and share what they should."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightroom.papers import selective_activation
from weightroom.study import Arm, Scale, Trial

WIDE, NARROW = selective_activation.study(Scale.SMOKE)


def run(study, name, seed=0, **more):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    trial = Trial(seed=seed, scale=Scale.SMOKE, setting=study.settings["0.640"], params=arm.defaults, **more)
    result = arm.run(trial)
    assert set(result) == set(study.metrics)
    assert all(isinstance(value, float) for value in result.values())
    return result, trial.spent


@pytest.mark.parametrize("name", WIDE.arms)
def test_arms_keep_what_the_setting_says(name):
    result, spent = run(WIDE, name)
    weights = 64 * 400 + 400 * 200 + 200 * 10
    if name == "dense":
        assert result["density"] == 1
    else:
        assert result["density"] == pytest.approx(1 - round(0.36 * weights) / weights, abs=1e-12)
    assert spent["trainings"] == (1 if name in ("dense", "random, retrained") else 3)
    assert 0 < result["dynamic"] < 1


def test_trials_are_decided_by_the_seed_and_shared_through_the_store(tmp_path):
    first, _ = run(NARROW, "magnitude + random negative")
    assert first == run(NARROW, "magnitude + random negative", shared=tmp_path)[0]
    assert first == run(NARROW, "magnitude + random negative", shared=tmp_path)[0]
    assert first != run(NARROW, "magnitude + random negative", seed=1, shared=tmp_path)[0]
    assert first != run(NARROW, "magnitude + AP", shared=tmp_path)[0]
    assert len(list(tmp_path.glob("cycles*.safetensors"))) == 3


@pytest.mark.parametrize("scale", [Scale.SMOKE, Scale.SMALL])
def test_claims_are_about_settings_that_are_run(scale):
    for study in selective_activation.study(scale):
        assert study.claims
        assert all(study.setting_of(claim.expect) in study.settings for claim in study.claims)
    assert list(WIDE.settings) == ["0.640"]


def test_the_learning_rates_course():
    rate = selective_activation._authors_rate
    assert [rate(0.0, 0), rate(0.4, 10_000), rate(0.5, 19_550), rate(0.64, 25_024)] == [0.0, 0.5, 0.1, 0.01]


@pytest.mark.filterwarnings("ignore:AP finds fewer")
@pytest.mark.parametrize("name", selective_activation.PAPER.methods)
def test_what_the_family_gets(name):
    method = selective_activation.PAPER.methods[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(40, 6)
    data = list(zip(x.split(20), x[:, :3].argmax(1).split(20), strict=True))
    pruner = method.make(0.75, **method.defaults)
    plan = pruner.fit(model, data, x[:1], nn.functional.cross_entropy)
    assert plan.sparsity() == 162 / 216
    assert plan.macs() == 54
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert method.make(0.0, **method.defaults).fit(model, data, x[:1], nn.functional.cross_entropy).sparsity() == 0
    assert pruner.share == (0.1 if "AP" in name else 0)


def test_card():
    assert selective_activation.PAPER.names() == [
        "weightroom.prune.ActivateWhilePruning",
        "weightroom.diagnostics.dead_neuron_rate",
    ]
