"""The studies of DIMAP return what they declare; all arms cut the same layers of the same network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightroom import tasks
from weightroom.papers import dimap
from weightroom.study import Arm, Scale, Trial

pytest.importorskip("transformers")
CUT, TUNED = dimap.study(Scale.SMOKE)
BLOCKS = 12 * (2 * 24**2 + 2 * 48**2)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


def run(study, name, shared, seed=0, setting=None):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    setting = next(iter(study.settings.values())) if setting is None else setting
    trial = Trial(seed=seed, scale=Scale.SMOKE, setting=setting, params=arm.defaults, shared=shared)
    result = arm.run(trial)
    assert set(result) == set(study.metrics)
    assert all(isinstance(value, float) for value in result.values())
    return result, trial.spent


@pytest.mark.parametrize("name", CUT.arms)
def test_every_arm_cuts_the_blocks_and_nothing_else(name, shared):
    result, spent = run(CUT, name, shared)
    dense, everything = run(CUT, "dense", shared)
    if name == "dense":
        assert result["sparsity"] == result["macs_removed"] == 0
        return
    assert result["sparsity"] == round(0.7 * BLOCKS) / BLOCKS
    assert everything["parameters"] - spent["parameters"] == round(0.7 * BLOCKS)
    assert 0.5 < result["macs_removed"] < 0.8
    assert result["macs_removed"] == pytest.approx(1 - spent["flops"] / everything["flops"])
    assert result["accuracy"] <= dense["accuracy"] + 0.2
    if name == "random":
        assert result == run(CUT, name, shared)[0]


def test_arms_differ_in_what_they_keep(shared):
    parts = {name: run(CUT, name, shared)[0]["macs_removed"] for name in CUT.arms if name != "dense"}
    assert len({round(v, 6) for v in parts.values()}) >= 7


@pytest.mark.parametrize("name", ["DIMAP", "random, retrained"])
def test_fine_tuning(name, shared):
    result, spent = run(TUNED, name, shared)
    assert spent["steps"] == 17 * (3 if "retrained" in name else 1)
    assert result["sparsity"] == round(0.8 * BLOCKS) / BLOCKS


def test_the_schedule_warms_up_for_half_of_the_steps():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = dimap._warm_up_and_cosine(optimizer, 10)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(2e-3)
    assert rates[5] == 2.0 == max(rates)
    assert rates[10] == pytest.approx(0.02)


@pytest.mark.parametrize("scale", [Scale.SMOKE, Scale.SMALL])
def test_claims_are_about_what_is_run(scale):
    for study in dimap.study(scale):
        assert study.claims
        assert {claim.expect.on for claim in study.claims} <= set(study.settings)
        assert {"dense", "global magnitude", "LAMP", "ERK", "uniform", "random"} <= set(study.arms)


def test_the_network_is_small_and_its_start_is_decided_by_the_seed():
    task = dimap._task(Scale.SMALL)
    model = task.model(seed=1)
    assert 75_000 < sum(p.numel() for p in model.parameters()) < 80_000
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), task.model(seed=1).parameters(), strict=True))
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_what_the_family_gets():
    method = dimap.PAPER.methods["DIMAP"]
    assert method.make(0.5).sparsity == 0.5
    assert method.unfit(dimap._task(Scale.SMALL)) is None
    assert "no attention or MLP layers found" in method.unfit(tasks.digits())


def test_card():
    assert dimap.PAPER.names() == ["weightroom.prune.DIMAPPruner", "weightroom.prune.distortion_importance"]
    assert "2404.13648" in dimap.PAPER.bibtex
