"""Merging models of different seeds: what the family trains, averages and measures."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import weightroom as wr
from weightroom.compare import merge
from weightroom.compare.base import Method
from weightroom.errors import UsageError
from weightroom.nets.small import ConvNet
from weightroom.study import Scale, Trial
from weightroom.weights import apply_permutation, reestimate_batchnorm


def toy(**more):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(240, 6, generator=g)
    data = TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())
    make = lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))  # noqa: E731
    return wr.Task("toy", **{"model": make, "train": data, "test": data, "recipe": {"epochs": 15, "lr": 1e-2}, **more})


def image():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 1, 8, 8, generator=g)
    data = TensorDataset(x, (x[:, 0, 0, 0] > 0).long())
    return toy(
        model=lambda: ConvNet(1, 2, channels=(3, 4), hidden=5), train=data, test=data, metrics=["nll"], recipe={"epochs": 2}
    )


def run(method, task, trial=None):
    trial = trial or Trial(seed=0, scale=Scale.SMALL, params=method.defaults)
    return merge._arm(task, method, None).run(trial)


def test_the_comparison_runs_every_arm_and_shows_the_line(tmp_path):
    results = wr.compare("merge", toy, seeds=1, store=tmp_path, workers=1)
    assert results.failed == 0
    table = results.frame.set_index("arm")
    merged = ["average", "weight matching", "weight matching to the mean", "straight-through matching"]
    assert set(table.index) == {*merged, "first model", "best model", "ensemble"}
    assert (table.loc[merged, "barrier"] >= 0).all()
    assert table.loc["weight matching", "barrier"] < table.loc["average", "barrier"] / 2
    assert table.loc["ensemble", "accuracy"] > 0.7
    assert table.loc[["first model", "best model", "ensemble"], "barrier"].isna().all()
    assert table.loc["first model", "trainings"] == 1
    assert (table.loc[[*merged, "best model", "ensemble"], "trainings"] == 3).all()
    assert table.loc["ensemble", "parameters"] == pytest.approx(3 * table.loc["average", "parameters"], rel=0.1)


def test_models_differ_and_are_trained_once(tmp_path):
    seen = []

    def make(trained):
        seen.append(trained.states)
        return trained.states

    task = toy()
    for _ in range(2):
        run(Method(make, {"models": 4}), task, Trial(seed=0, scale=Scale.SMALL, params={"models": 4}, shared=tmp_path))
    assert len(seen[0]) == 4
    assert len({float(state["0.weight"].sum()) for state in seen[0]}) == 4
    assert all(torch.equal(a["0.weight"], b["0.weight"]) for a, b in zip(*seen, strict=True))
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 4


def test_aligned_states_are_averaged_and_their_pairs_followed():
    """Three copies of one model, permuted: averaging undoes nothing, matching undoes everything."""
    task, kept = toy(), {}

    def copies(trained, undo):
        g = torch.Generator().manual_seed(1)
        (a, *_), spec = trained.states, trained.spec
        kept["accuracy"] = task.evaluate(trained.model(a))["accuracy"]
        perms = [{name: torch.randperm(n, generator=g) for name, n in spec.sizes(a).items()} for _ in range(2)]
        return [a, *(a if undo else apply_permutation(spec, perm, a) for perm in perms)]

    trial = Trial(seed=0, scale=Scale.SMALL, params={"undo": True})
    found = run(Method(copies), task, trial)
    assert found["barrier"] == 0
    assert found["accuracy"] == kept["accuracy"]
    grid, losses = zip(*((step, loss) for name, step, loss in trial.curves if name == "loss"), strict=True)
    assert grid == pytest.approx([i / 10 for i in range(11)])
    assert max(losses) - min(losses) < 1e-5
    trial = Trial(seed=0, scale=Scale.SMALL, params={"undo": False})
    found = run(Method(copies), task, trial)
    assert found["barrier"] > 0.05
    losses = [loss for name, _, loss in trial.curves if name == "loss"]
    assert found["barrier"] == pytest.approx(max(losses) - losses[0], abs=0.05)


def test_statistics_are_estimated_again_unless_told_otherwise():
    task = image()
    models, results, curves = [], {}, {}
    for reset in (True, False):
        trial = Trial(seed=0, scale=Scale.SMALL, params={"reset": reset, "models": 2})
        results[reset] = run(Method(lambda trained: models.append(trained) or trained.states), task, trial)
        curves[reset] = trial.curves
    assert results[True]["nll"] != results[False]["nll"]
    assert curves[True] != curves[False]
    trained = models[0]
    state = {k: (v + trained.states[1][k]) / 2 if v.is_floating_point() else v for k, v in trained.states[0].items()}
    merged = reestimate_batchnorm(trained.model(state), trained.batches())
    assert task.evaluate(merged)["nll"] == pytest.approx(results[True]["nll"], rel=1e-5)


def test_a_single_state_has_no_line():
    trial = Trial(seed=0, scale=Scale.SMALL, params={"models": 1})
    assert "barrier" not in run(merge.BASELINES["average"], toy(), trial)
    assert not trial.curves


def test_the_best_is_chosen_on_validation_data():
    def answer(k):
        model = nn.Linear(6, 2)
        with torch.no_grad():
            model.weight.zero_()
            model.bias.copy_(torch.tensor([1.0 - k, 0.0 + k]))
        return model.state_dict()

    x = torch.randn(10, 6)
    ones, zeros = TensorDataset(x, torch.ones(10).long()), TensorDataset(x, torch.zeros(10).long())
    task = toy(model=lambda: nn.Linear(6, 2), train=zeros, test=zeros, val=ones)
    trained = merge.Trained(task, Trial(seed=0), [answer(0), answer(1), answer(0)])
    assert task.evaluate(merge._best(trained), "val")["accuracy"] == 1
    task = task.with_(metrics=["nll"])  # lower is better
    assert task.evaluate(merge._best(merge.Trained(task, Trial(seed=0), [answer(1), answer(0)])), "val")["nll"] < 0.5


def test_the_ensemble_is_the_mean_of_probabilities():
    torch.manual_seed(0)
    models, x = [nn.Linear(6, 3) for _ in range(4)], torch.randn(5, 6)
    mean = sum(F.softmax(model(x), 1) for model in models) / 4
    torch.testing.assert_close(merge.Ensemble(models, labels=True)(x), mean.log())
    torch.testing.assert_close(merge.Ensemble(models, labels=False)(x), sum(model(x) for model in models) / 4)
    task = toy(test=TensorDataset(torch.randn(9, 6), torch.randn(9, 2)), train=TensorDataset(torch.randn(9, 6), torch.randn(9, 2)),
               loss=nn.MSELoss(), metrics=["mse"])  # fmt: skip
    assert not merge._labels(task)
    assert merge._labels(toy())
    assert math.isfinite(run(merge.BASELINES["ensemble"], task)["mse"])


def test_networks_that_cannot_be_followed_are_refused(tmp_path):
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 4), nn.Linear(8, 2)

        def forward(self, x):
            h = torch.relu(self.first(x))
            return self.last(torch.cat([h, h], 1))

    with pytest.raises(UsageError, match=r"'merge' cannot say which hidden units of task 'toy'.*'cat'"):
        wr.compare("merge", toy(model=Doubled), store=tmp_path)
