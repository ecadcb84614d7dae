"""The studies of self-distillation return what they declare, on the data that they describe."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from torch import nn

from weightroom import data, tasks, train
from weightroom.papers import self_distillation as paper
from weightroom.study import Arm, Scale, Trial

THEORY, NETWORK = paper.study(Scale.SMOKE)


def trial(study, seed=0, on=None, **given):
    return Trial(seed=seed, scale=Scale.SMOKE, setting=study.settings[on or next(iter(study.settings))], **given)


def run(study, name, given):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    result = arm.run(given)
    assert study.metric in result
    assert set(result) <= set(study.metrics)
    assert all(isinstance(value, float) for value in result.values())
    return result


@pytest.mark.parametrize("on", ["gamma 20, lambda 0.02", "gamma 80, lambda 1"])
def test_theory_study(on):
    results = {name: run(THEORY, name, trial(THEORY, on=on)) for name in THEORY.arms}
    assert results["one fit"]["relative"] == 1.0
    assert results["oracle ridge"]["error"] <= min(results[name]["error"] for name in ("one fit", "limit", "tuned ridge")) + 1e-3
    assert len({round(result["error"], 12) for result in results.values()}) >= 7
    first = results["one fit"]["error"]
    for result in results.values():
        assert result["excess"] == pytest.approx(result["error"] - 1.15 * first)
    assert run(THEORY, "alpha*", trial(THEORY, on=on)) == results["alpha*"]
    assert run(THEORY, "alpha*", trial(THEORY, seed=1, on=on)) != results["alpha*"]


def test_without_labels_a_large_penalty_collapses():
    given = trial(THEORY, on="gamma 20, lambda 1")
    assert run(THEORY, "alpha 0", given)["relative"] > 1.5
    assert run(THEORY, "alpha*", given)["relative"] < run(THEORY, "alpha 0", given)["relative"]


def test_ridges_are_those_of_scikit_learn():
    sine = paper._Sine(trial(THEORY))
    rows = sine.ridges(sine.grid)
    assert rows.shape == (len(paper._PENALTIES), 500)
    for i in (0, 30, 60):
        ridge = KernelRidge(kernel="rbf", gamma=sine.gamma, alpha=paper._PENALTIES[i]).fit(sine.X, sine.y)
        np.testing.assert_allclose(rows[i], ridge.predict(sine.grid), rtol=0, atol=1e-8)


def test_network_study(tmp_path):
    spent = {
        "teacher": 1,
        "alpha 0": 2,
        "alpha 1": 2,
        "alpha estimated": 3,
        "alpha by grid": 6,
        "cross entropy": 1,
        "label smoothing": 1,
    }
    assert set(spent) == set(NETWORK.arms)
    results = {}
    for name, trainings in spent.items():
        given = trial(NETWORK, shared=tmp_path)
        results[name] = run(NETWORK, name, given)
        assert given.spent["trainings"] == trainings
        assert ("alpha" in results[name]) == (trainings > 1)
    # The teacher is trained once for five arms, and so is the first student of three: it learns from the teacher alone.
    assert len(list(tmp_path.glob("*.safetensors"))) == sum(spent.values()) - 4 - 2
    assert results["alpha 0"]["alpha"] == 0
    assert 0 <= results["alpha estimated"]["alpha"] <= 1
    assert len({results[name]["accuracy"] for name in ("teacher", "cross entropy", "label smoothing")}) == 3
    assert run(NETWORK, "alpha estimated", trial(NETWORK)) == results["alpha estimated"]  # with and without the shared folder
    assert run(NETWORK, "teacher", trial(NETWORK, seed=1)) != results["teacher"]


def test_network_data():
    task = paper._noisy(trial(NETWORK, on="noise 0.4"))
    clean = paper._noisy(Trial(seed=0, scale=Scale.SMOKE, setting=0.0))
    assert [len(getattr(task, split)) for split in ("train", "val", "test")] == [600, 300, 897]
    changed = (data.targets(task.train) != data.targets(clean.train)).double().mean()
    assert changed == pytest.approx(0.4 * 0.9, abs=0.05)
    for split in ("val", "test"):
        assert torch.equal(data.targets(getattr(task, split)), data.targets(getattr(clean, split)))


@pytest.mark.parametrize("alpha, trainings", [("estimate", 3), (0.25, 2)])
def test_the_method_trains_models_of_the_task(alpha, trainings):
    method = paper.PAPER.methods["self-distillation"]
    assert method.whole
    task, seen = tasks.wine(), []

    def fit(model, *, loss=None, step=None, data=None):
        seen.append(data)
        train.fit(model, data, loss=loss, optimizer=torch.optim.Adam, epochs=1)

    student = method.make(task, Trial(seed=0), fit, **{**method.defaults, "alpha": alpha})
    assert isinstance(student, nn.Module)
    assert len(seen) == trainings
    assert seen[0][:][1].sum() == len(task.train)
    assert seen[0][:][1].max() == 1.0
    assert seen[-1][:][1].min() > 0


def test_the_first_model_is_the_one_that_the_seed_makes():
    models = []
    method = paper.PAPER.methods["self-distillation"]
    method.make(tasks.wine(), Trial(seed=3), lambda model, **what: models.append(model), alpha=0.5)
    expected = tasks.wine().model(seed=3).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in models[0].state_dict().items())
    assert not torch.equal(models[1][1].weight, models[0][1].weight)


def test_card():
    assert paper.PAPER.names()[:2] == ["weightroom.kernels.SelfDistilledKernelRidge", "weightroom.distill.SelfDistiller"]
    assert "2102.13088" in paper.PAPER.bibtex
    defaults = paper.PAPER.methods["self-distillation"].defaults
    assert set(defaults) < set(inspect.signature(paper._whole).parameters)
