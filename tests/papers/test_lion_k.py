"""The studies of Lion-K return what they declare, and their independent solver is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from weightroom.papers import lion_k
from weightroom.study import Arm, Scale, Trial

EXACT, NETWORK = lion_k.study(Scale.SMOKE)


def run(study, name, seed=0):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    result = arm.run(Trial(seed=seed, scale=Scale.SMOKE, params=arm.defaults))
    assert set(result) <= set(study.metrics)
    assert study.metric in result
    assert all(isinstance(v, float) for v in result.values())
    return result


@pytest.mark.parametrize("name", ["l1", "trunc", "adamw", "l1, decay in the gradient"])
def test_exact_study(name):
    result = run(EXACT, name)
    assert (abs(result["gap"]) < 1e-6) == (name in ("l1", "trunc"))
    assert (result["violation"] > 0.01) == ("gradient" in name)


def test_network_study():
    lion = run(NETWORK, "lion 20")
    assert lion == run(NETWORK, "lion 20")
    assert lion != run(NETWORK, "lion 20", seed=1)
    assert lion["beyond_bound"] <= 1e-6
    projected = run(NETWORK, "lion 0, projected to 0.2")
    assert projected["max_weight"] <= 0.2 + 1e-7
    assert "beyond_bound" not in projected
    assert "at_bound" not in run(NETWORK, "sgd")


@pytest.mark.parametrize("lam", [0.5, 2.0])
def test_the_solver_agrees_with_others(lam):
    rng = np.random.default_rng(0)
    A = rng.standard_normal((20, 5))
    b = A @ (3 * rng.standard_normal(5))
    Q, c, eye = A.T @ A / 20, A.T @ b / 20, np.eye(5)
    terms = lion_k._TERMS
    ridge = np.linalg.solve(Q + lam * eye, c)
    np.testing.assert_allclose(lion_k._solve(Q, c, lam, terms["square"]), ridge, atol=1e-6)
    box = lsq_linear(A, b, (-1 / lam, 1 / lam), method="bvls", tol=1e-14).x
    np.testing.assert_allclose(lion_k._solve(Q, c, lam, terms["l1"]), box, atol=1e-6)
    for name, order in {"l2": 2.0, "lp": 1.5, "linf": 1.0}.items():
        x = lion_k._solve(Q, c, lam, terms[name])
        assert np.linalg.norm(x, order) == pytest.approx(1 / lam, abs=1e-6)
        # Optimal in the ball of a norm: <x, -grad> is as large as any point of the ball makes it, the dual norm / lam.
        dual = np.inf if order == 1 else order / (order - 1)
        descent = c - Q @ x
        assert x @ descent == pytest.approx(np.linalg.norm(descent, dual) / lam, rel=1e-5)


@pytest.mark.parametrize("name", lion_k.PAPER.methods)
def test_methods_make_optimizers_that_train(name):
    method = lion_k.PAPER.methods[name]
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = method.make([x], **method.defaults)
    x.square().sum().backward()
    optimizer.step()
    assert (x < 1).all()


def test_card():
    assert lion_k.PAPER.names() == ["weightroom.optim.LionK", "weightroom.optim.lionk_objective"]
    assert "2310.05898" in lion_k.PAPER.bibtex
