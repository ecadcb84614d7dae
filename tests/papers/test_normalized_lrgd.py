"""The studies of Normalized LR+GD return what they declare, and their data and bounds are what they should be."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

import weightroom as wr
from weightroom.papers import normalized_lrgd as paper
from weightroom.study import Arm, Scale, Trial

WORST, IMBALANCED, PAIRS, REST = paper.study(Scale.SMOKE)


def run(study, name, setting="", seed=0):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    trial = Trial(seed=seed, scale=Scale.SMOKE, setting=study.settings[setting], params=arm.defaults)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = arm.run(trial)
    assert set(result) <= set(study.metrics)
    assert study.metric in result
    assert all(isinstance(v, float) and math.isfinite(v) for v in result.values())
    return result, trial


@pytest.mark.parametrize("name", WORST.arms)
def test_worst_case_study(name):
    result, trial = run(WORST, name, "1000")
    assert result["iterations"] == paper._TABLE_1.get(name, result["iterations"])
    assert result["separated"] == 1.0
    assert result["per_row"] == result["iterations"] / 1000
    assert trial.spent == {"oracle_calls": result["iterations"]}
    assert ("bound_share" in result) == ("lr+gd" not in name)
    assert trial.curves


@pytest.mark.parametrize("name", IMBALANCED.arms)
def test_imbalanced_study(name):
    result, _ = run(IMBALANCED, name)
    assert result == run(IMBALANCED, name)[0]
    assert result != run(IMBALANCED, name, seed=1)[0]
    assert result["separated"] == 1.0
    assert ("ratio" in result) == ("gamma" in name)
    if "gamma" in name:
        gamma = name.rpartition(" ")[2]
        plain = run(IMBALANCED, f"lr+gd, gamma {gamma}")[0]["iterations"]
        assert result["ratio"] == plain / result["iterations"]
    if "bound_share" in result:
        assert result["bound_share"] <= 1


def test_pairs_study():
    low, high = (run(PAIRS, f"lr+gd, gamma {g}", "8-1")[0] for g in (1, 100))
    assert low["peak_loss"] < high["peak_loss"]
    assert low != run(PAIRS, "lr+gd, gamma 1", "8-1", seed=1)[0]


@pytest.mark.parametrize("name", REST.arms)
def test_rest_study(name):
    result, _ = run(REST, name, "8")
    assert result["separated"] == 0.0
    assert result.get("iterations", 200) == 200


def test_the_linear_program_finds_what_can_be_separated():
    assert [run(REST, "linear program", c)[0]["separated"] for c in ("1", "9")] == [1.0, 0.0]


def test_data():
    A, y = paper._worst_case(5)
    assert A.tolist() == [[0.5, -1.0]] + 4 * [[-0.5, -1.0]]
    assert y.tolist() == [1, -1, -1, -1, -1]
    A, y = paper._imbalanced(3)
    assert (A.shape, (y > 0).sum(), (A[:, -1] == 1).all()) == ((1010, 21), 10, True)
    assert paper._margin(y[:, None] * A[:, :-1]) >= 0.3
    B, z = paper._repeated(A, y)
    assert (len(B), (z > 0).sum(), (z < 0).sum()) == (2000, 1000, 1000)
    A, y = paper._digits(3, 8)
    assert (A.shape, (y > 0).sum(), A.max(), A.min()) == ((357, 65), 183, 1.0, 0.0)
    B, z = paper._nine_tenths(A, y, seed=0)
    assert (len(B), (z > 0).sum()) == (165 + 157, 165)
    assert len(np.unique(np.vstack([A, B]), axis=0)) == len(np.unique(A, axis=0))
    A, y = paper._digits(9, None)
    assert (len(A), (y > 0).sum()) == (1797, 180)


def test_margins_and_bounds():
    A, y = paper._worst_case(50)
    assert paper._margin(y[:, None] * A) == pytest.approx(0.5)
    assert paper._bound(A, y, 2.0) == pytest.approx(1.25 / 0.25 + 2 * math.log(99) / (2.0 * 0.25))
    assert paper._bound(A, y, 1.0, True, "batch") == paper._bound(A, y, 1.0, limit="online") == pytest.approx(5.0)
    assert paper._bound(A, y, 1.0, False, "batch") == pytest.approx(250.0)
    A, y = paper._imbalanced(0, 5, 40, 4)
    svm = LinearSVC(C=1e6, loss="hinge", fit_intercept=False, max_iter=10**6, tol=1e-8, random_state=0).fit(A, y)
    reached = (y * (A @ svm.coef_[0])).min() / np.linalg.norm(svm.coef_)
    assert paper._margin(y[:, None] * A) == pytest.approx(reached, rel=1e-4)


@pytest.mark.parametrize("scale", Scale)
def test_every_claim_names_what_exists_at_every_scale(scale):
    assert len(paper.study(scale)) == 4 + (scale in (Scale.REAL, Scale.FULL))


def test_card():
    assert paper.PAPER.names() == [
        "weightroom.estimators.NormalizedLogisticGD",
        "weightroom.losses.NormalizedLogisticLoss",
        "weightroom.optim.NormalizedLRGD",
    ]
    assert "2412.08424" in paper.PAPER.bibtex


def test_the_loss_joins_a_comparison_on_two_classes_alone(tmp_path):

    method = paper.PAPER.methods["normalized logistic"]
    assert method.unfit(wr.tasks.load("breast-cancer")) is None
    assert method.unfit(wr.tasks.load("digits")) == "its loss needs two logits for each sample, the model gives (10,)"
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.5]], requires_grad=True)
    value = method.make(None)(logits, torch.tensor([1, 0]))
    value.backward()
    assert float(value.detach()) == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-0.5))) / 2, rel=1e-6)
    p = torch.softmax(torch.nn.functional.logsigmoid(torch.tensor([-2.0, -0.5])), 0)
    torch.testing.assert_close(logits.grad, torch.stack([torch.stack([p[0], -p[0]]), torch.stack([-p[1], p[1]])]))
