"""The studies of LV-HBA return what they declare; their data and solvers are as described."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from weightroom.optim import resolve_lower
from weightroom.papers import lv_hba
from weightroom.study import Arm, Scale, Trial

TOY, CLEANING = lv_hba.study(Scale.SMOKE)


def run(study, name, seed=0):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    result = arm.run(Trial(seed=seed, scale=Scale.SMOKE, setting=next(iter(study.settings.values())), params=arm.defaults))
    assert set(result) <= set(study.metrics)
    assert study.metric in result
    assert all(isinstance(v, float) and np.isfinite(v) for v in result.values())
    return result


@pytest.mark.parametrize("name", TOY.arms)
def test_toy(name):
    result = run(TOY, name)
    assert (result["error"] > 1) == ("raw row" in name and "steps" not in name)
    if name == "implicit gradient":
        assert result["error"] < 1e-6
    if name == "lv-hba":
        assert result["error_times_c"] == pytest.approx(0.775, abs=0.015)
        assert result["steps_to_target"] == pytest.approx(1750, abs=200)


@pytest.mark.parametrize("n", [1, 4])
def test_implicit_gradients_are_those_of_finite_differences(n):
    def hyper(x):  # the shortest solution of the lower level: y1 = x + 1, y2 the mean that the constraint asks for
        y2 = -(x.sum() + (x + 1).sum()) / n
        return ((x - y2) ** 2).sum() / 2 + (x**2).sum() / 2

    found = minimize(hyper, np.zeros(n), tol=1e-12)
    np.testing.assert_allclose(found.x, -0.3, atol=1e-5)
    result = lv_hba._implicit(Trial(seed=0, setting=n))
    assert result["error"] < 1e-6
    assert result["steps_to_target"] == 1  # along the vector of ones its curvature is 10, and the step 1/10


@pytest.mark.parametrize("name", CLEANING.arms)
def test_cleaning(name):
    result = run(CLEANING, name)
    assert result == run(CLEANING, name)
    assert ("flips_found" in result) == (name.startswith("lv-hba") and "frozen" not in name)
    assert (result["accuracy"] == result["resolved"]) or name.startswith("lv-hba")
    assert result != run(CLEANING, name, seed=2)


def test_data():
    data = lv_hba._Cancer(3)
    assert data.Z.shape == (250, 30)
    assert len(data.y_val) == 120
    assert len(data.y_test) == 199
    assert 0.3 < data.flipped.double().mean() < 0.5
    assert (data.start >= -6).all()
    assert (data.start <= -5).all()
    again = lv_hba._Cancer(3)
    assert data.y.equal(again.y)
    assert not data.y.equal(lv_hba._Cancer(4).y)
    pooled = torch.cat([data.Z, data.Z_val, data.Z_test])
    torch.testing.assert_close(pooled.square().sum(), torch.tensor(569.0).double())


def test_the_svm_is_the_lower_level():
    data = lv_hba._Cancer(0)
    data.Z, data.y = data.Z[:40], data.y[:40]
    x = torch.linspace(-2, 1, 40).double()
    w, b = lv_hba._svm(data.Z, data.y, x.exp())
    like = {"w": torch.zeros(30).double(), "b": torch.zeros(()).double(), "xi": torch.zeros(40).double()}
    solved = resolve_lower(lv_hba._cleaning(data, None), x, like)
    torch.testing.assert_close(solved["w"], w, atol=1e-5, rtol=0)
    torch.testing.assert_close(solved["b"], b, atol=1e-5, rtol=0)


def test_card():
    assert lv_hba.PAPER.names()[0] == "weightroom.optim.lv_hba"
    assert not lv_hba.PAPER.methods
    assert "2401.16164" in lv_hba.PAPER.bibtex
