"""The studies of the three-regime model return what they declare, and their arms share what they should."""

from __future__ import annotations

import pytest
import torch

from weightroom.papers import three_regime
from weightroom.study import Arm, Scale, Trial

STUDIES = {study.name.partition(": ")[2]: study for study in three_regime.study(Scale.SMOKE)}
GRID, ADVICE = STUDIES["temperature and load"], STUDIES["advice"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


def run(study, name, shared, setting=None, seed=0):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    setting = next(iter(study.settings)) if setting is None else setting
    trial = Trial(seed=seed, scale=Scale.SMOKE, setting=study.settings[setting], params=arm.defaults, shared=shared)
    result = arm.run(trial)
    assert study.metric in result
    assert set(result) <= set(study.metrics)
    assert all(isinstance(value, float) for value in result.values())
    return result


def test_the_grid_and_what_is_made_of_it(shared):
    cells = {(name, d): run(GRID, name, shared, d) for name in ("1 epochs", "2 epochs", "3 epochs") for d in GRID.settings}
    assert run(GRID, "1 epochs", shared, "0.03") == cells["1 epochs", "0.03"]
    assert run(GRID, "1 epochs", None, "0.03") == cells["1 epochs", "0.03"]  # made anew it is the same
    assert all(set(cell) == {"test_error", "train_error", "lmc", "cka"} for cell in cells.values())
    assert run(GRID, "3 epochs, SAM", shared) != cells["3 epochs", "0.03"]

    both = run(STUDIES["interaction"], "3 epochs instead of 1", shared)
    gain = {d: cells["3 epochs", d]["test_error"] - cells["1 epochs", d]["test_error"] for d in ("0.03", "0.5")}
    assert both["interaction"] == pytest.approx(gain["0.03"] - gain["0.5"])

    usual, advised, validated = (run(ADVICE, name, shared) for name in ("3 epochs", "advised", "chosen by validation"))
    assert usual == {**cells["3 epochs", "0.03"], "epochs": 3.0}
    for chosen in (advised, validated):
        assert chosen == {**cells[f"{chosen['epochs']:.0f} epochs", "0.03"], "epochs": chosen["epochs"]}


@pytest.mark.parametrize("name", ["dense", "LAMP", "random", "random, retrained"])
def test_rivals(name, shared):
    assert run(ADVICE, name, shared, "0.03")["test_error"] < 1


def test_the_perceptron(shared):
    study = STUDIES["perceptron at density 0.04"]
    clean, noisy = (run(study, "1 epochs", shared, setting) for setting in study.settings)
    assert clean != noisy


def test_early_stopping_is_one_training_cut_short(shared):
    setup = three_regime._setup(Scale.SMOKE)
    stopped = setup.dense(Trial(seed=0, shared=shared), 2)
    whole = setup.task.model(seed=0)
    seen = {}
    per_epoch = -(-len(setup.task.train) // setup.task.recipe.batch_size)

    def keep(step):
        if step == 2 * per_epoch:
            seen.update({k: v.clone() for k, v in whole.state_dict().items()})

    setup.fit(whole, 0, 3, keep)
    assert all(torch.equal(v, seen[k]) for k, v in stopped.state_dict().items())


@pytest.mark.parametrize("scale", [Scale.SMOKE, Scale.SMALL])
def test_claims_are_about_settings_that_are_run(scale):
    studies = three_regime.study(scale)
    assert len({study.name for study in studies}) == len(studies)
    for study in studies:
        assert study.claims
        assert all(study.setting_of(claim.expect) in study.settings for claim in study.claims)


def test_the_network_is_the_one_described():
    model = three_regime._convolutions()
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in model) == 4
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_what_the_families_get():
    assert not three_regime.PAPER.methods
    method = three_regime.PAPER.methods_of("optimizer")["sam"]
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = method.make([x], **method.defaults)

    def closure():
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (x < 1).all()
    assert set(method.space) <= set(optimizer.param_groups[0])
