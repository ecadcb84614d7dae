"""The studies of SSO return what they declare, and their problems and rivals are what they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import weightroom as wr
from weightroom.papers import sso
from weightroom.study import Arm, Scale, Trial

FULL, MINI = sso.study(Scale.SMOKE)
STUDIES = {study.name: study for study in (FULL, MINI)}


def trial(study, setting="", seed=0, **params):
    setting = study.settings[setting or next(iter(study.settings))]
    return Trial(seed=seed, scale=Scale.SMOKE, setting=setting, params=params)


def run(study, name, **more):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    given = trial(study, **{**arm.defaults, **more})
    result = arm.run(given)
    assert set(result) == set(study.metrics)
    assert all(isinstance(v, float) for v in result.values())
    assert set(given.spent) == {"oracle_calls", "steps"}
    return result, given


@pytest.mark.parametrize(("study", "name"), [(s, n) for s, study in STUDIES.items() for n in study.arms])
def test_every_arm_lowers_the_loss_and_says_what_it_spent(study, name):
    study = STUDIES[study]
    result, given = run(study, name)
    start = trial(study)
    first = (sso._table if study is FULL else sso._digits)(start).mean()
    assert result["loss"] < first
    calls = 3 if study is FULL else 5
    if name in ("gd", "adam", "gd, 1/L"):
        assert given.spent == {"oracle_calls": calls, "steps": calls}
        assert result["loss_kappa_1"] == result["loss_kappa_1000"] == result["loss"]
    elif name in ("sso 1", "sso 10", "sso 100"):
        assert given.spent["oracle_calls"] == calls
        assert calls <= given.spent["steps"] <= calls * int(name.split()[1])
    else:
        assert given.spent["oracle_calls"] >= calls
    if name == "sso 100":
        assert result["loss_kappa_1"] == first  # not one step within the budget
        assert result["loss"] <= result["loss_kappa_1000"] < first


def test_arms_are_deterministic_and_paired():
    assert run(FULL, "sso 10")[0] == run(FULL, "sso 10")[0]
    assert run(FULL, "sso 10")[0] != run(FULL, "sso 10", seed=1)[0]
    assert run(MINI, "sls")[0] == run(MINI, "sls")[0]


@pytest.mark.parametrize("setting", FULL.settings)
def test_tables(setting):
    p = sso._table(trial(FULL, setting))
    spread = 0.0 if setting == "logistic" else 2.0
    scales = p.x.std(0, correction=0)
    torch.testing.assert_close(scales, torch.logspace(0, -spread, p.x.shape[1], dtype=torch.float64))
    assert len(p.x) == (354 if "squares" in setting else 455)
    assert p.batch == len(p.x)
    assert p.mean() == pytest.approx(0.5 if "squares" in setting else math.log(2))


def test_gradient_descent_by_the_smoothness_is_stable_and_not_by_much_more():
    p = sso._table(trial(FULL, "least squares, ill-conditioned"))
    rows = torch.cat([p.x, torch.ones_like(p.x[:, :1])], 1)
    largest = torch.linalg.eigvalsh(rows.T @ rows / len(rows))[-1]
    take = sso._gd_by_l(p, {})
    before = p.mean()
    take(p.x, p.y)
    moved = p.model.weight.detach().clone()
    gradient = p.x.T @ -p.y / len(p.x)
    torch.testing.assert_close(moved, -gradient.T / largest)
    assert p.mean() < before


def test_batches_cover_every_epoch():
    p = sso._digits(trial(MINI))
    batches = p.batches(0)
    sizes = [len(next(batches)[1]) for _ in range(30)]
    assert sum(sizes[:15]) == sum(sizes[15:]) == len(p.x) == 1797
    assert torch.equal(next(p.batches(4))[0], next(p.batches(4))[0])
    assert not torch.equal(next(p.batches(4))[0], next(p.batches(5))[0])


def test_method_joins_the_family():
    method = sso.PAPER.methods["sso"]
    x = torch.nn.Parameter(torch.ones(3, 1))
    optimizer = method.make([x], **method.defaults)
    optimizer.step(lambda: x * 1, lambda z: z.square().sum() / 4)
    assert x.abs().max() < 1
    assert optimizer.param_groups[0]["lr"] == 2.0


def test_card():
    assert sso.PAPER.names() == ["weightroom.optim.SSO"]
    assert "2302.02607" in sso.PAPER.bibtex


def test_it_leaves_tasks_with_dropout_out():

    task = wr.tasks.load("breast-cancer")
    method = sso.PAPER.methods["sso"]
    assert method.unfit(task) is None
    noisy = task.with_(model=lambda: nn.Sequential(nn.Linear(30, 4), nn.Dropout(0.3), nn.Linear(4, 2)))
    assert method.unfit(noisy) == "its surrogate needs outputs without noise, and the model has dropout"
