"""The studies of CV-SW return what they declare, from the same directions in every arm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightroom.errors import TaskError
from weightroom.papers import cv_sw
from weightroom.study import Arm, Scale, Study, Trial
from weightroom.transport import sliced_wasserstein

VARIANCE, FLOW = cv_sw.study(Scale.SMOKE)


def run(study: Study, name: str, on: str = "", seed: int = 0) -> dict[str, float]:
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    setting = study.settings[on] if on else None
    result = dict(arm.run(Trial(seed=seed, scale=Scale.SMOKE, setting=setting, params=arm.defaults)))
    assert set(result) == set(study.metrics)
    result.pop("milliseconds", None)
    return result


@pytest.mark.parametrize("on", ["digits 0-1, L = 10", "sphere-torus, L = 10"])
def test_variance_study(on: str):
    plain = run(VARIANCE, "plain", on)
    assert plain["variance_ratio"] == plain["variance_ratio_high"] == 1
    lower = run(VARIANCE, "lower", on)
    assert lower == run(VARIANCE, "lower", on)
    assert lower != run(VARIANCE, "lower", on, seed=1)
    assert lower["variance_ratio"] < lower["variance_ratio_high"]
    # The same directions: the spread of both relates as the ratio says.
    assert (lower["relative_std"] / plain["relative_std"]) ** 2 == pytest.approx(lower["variance_ratio"])
    assert run(VARIANCE, "plain, twice the directions", on)["variance_ratio"] < 1


def test_flow_study():
    pytest.importorskip("ot")
    lower, plain = run(FLOW, "lower"), run(FLOW, "plain")
    assert lower == run(FLOW, "lower")
    assert lower != plain
    assert lower != run(FLOW, "lower", seed=1)
    for flow in (lower, plain):
        assert flow["w2_early"] > flow["w2"] > flow["w2_late"]


def test_the_truth_is_the_mean_over_the_sphere():
    x, t = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, -2.0, 0.5])
    assert cv_sw._truth(x, x + t, 30).item() == pytest.approx(t.square().sum().item() / 3, rel=1e-6)
    x, y = cv_sw._pair("digits 0-1")
    plain = sliced_wasserstein(
        x, y, n_projections=5000, control_variate=None, squared=True, generator=torch.Generator().manual_seed(0)
    )
    assert cv_sw._truth(x, y, 2000).item() == pytest.approx(plain.item(), rel=0.06)


def test_the_pairs_are_what_they_are_called():
    x, y = cv_sw._pair("digits 3-8")
    assert x.shape == y.shape == (170, 64)
    assert x.max() == y.max() == 1
    x, y = cv_sw._pair("sphere-torus")
    torch.testing.assert_close(x.norm(dim=1), torch.ones(512))
    ring = y - torch.tensor([0.5, 0.2, 0.1])
    torch.testing.assert_close((ring[:, :2].norm(dim=1) - 1) ** 2 + ring[:, 2] ** 2, torch.full((512,), 0.35**2))
    torch.testing.assert_close(cv_sw._pair("sphere-torus with equal means")[1], ring)
    x, y = cv_sw._pair("Gaussians")
    torch.testing.assert_close((y.std(0) / x.std(0)), torch.tensor([3.0, 2.0, 1.0]), rtol=0.15, atol=0)


def test_exact_distance():
    pytest.importorskip("ot")
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([2.0, 1.0, -2.0])
    assert cv_sw._w2(x, x.flip(0) + shift) == pytest.approx(3.0, rel=1e-6)


def test_full_scale_reads_the_clouds_of_the_paper(tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTROOM_DATA", str(tmp_path))
    with pytest.raises(TaskError, match="set WEIGHTROOM_DATA to a folder with shapenet-50/"):
        cv_sw._clouds(Scale.FULL, 0)
    (tmp_path / "shapenet-50").mkdir()
    np.save(tmp_path / "shapenet-50/reconstruct_random_50_shapenetcore55.npy", np.random.default_rng(0).normal(size=(50, 8, 3)))
    start, target = cv_sw._clouds(Scale.FULL, 0)
    assert start.shape == target.shape == (8, 3)
    assert start.mean() == pytest.approx(-10, abs=1.5)
    assert target.mean() == pytest.approx(10, abs=1.5)
    assert start.dtype == torch.float32


@pytest.mark.parametrize("scale", list(Scale))
def test_every_scale_makes_studies(scale: Scale):
    variance, flow = cv_sw.study(scale)
    assert variance.baseline == flow.baseline == "plain"
    assert variance.scale == flow.scale == scale
    assert len({claim.says for claim in variance.claims}) == len(variance.claims)


def test_card():
    assert cv_sw.PAPER.names() == ["weightroom.transport.SlicedWassersteinLoss", "weightroom.transport.sliced_wasserstein"]
    assert "2305.00402" in cv_sw.PAPER.bibtex
