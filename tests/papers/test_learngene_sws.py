"""The study of stage-wise weight sharing returns what it declares; its starts are what their names say."""

from __future__ import annotations

import pytest
import torch

from weightroom.papers import learngene_sws
from weightroom.papers.learngene_sws import PAPER, _distilled, _fresh, _setup, _ViT
from weightroom.study import Scale, Trial

STUDY = learngene_sws.study(Scale.SMOKE)


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    return Trial(seed=0, scale=Scale.SMOKE, setting=1, shared=tmp_path_factory.mktemp("shared"))


def run(name, trial, **changes):
    arm = STUDY.arms[name]
    given = {"seed": 0, "scale": Scale.SMOKE, "setting": 1, "params": arm.defaults, "shared": trial.shared, **changes}
    now = Trial(**given)
    return arm.run(now), now


@pytest.mark.parametrize("name", STUDY.arms)
def test_arms_return_what_is_declared(name, trial):
    result, now = run(name, trial)
    assert set(result) <= set(STUDY.metrics)
    assert {"accuracy", "accuracy_start", "accuracy_end"} <= set(result)
    assert all(isinstance(v, float) for v in result.values())
    assert result == run(name, trial)[0]
    assert now.spent["parameters"] > 0
    if name in ("scratch, to the end", "scratch, whole budget"):
        assert result["accuracy"] == result["accuracy_end"]
    if name == "scratch, to the end":
        assert result["accuracy_start"] == run("scratch", trial)[0]["accuracy_start"]
        assert result["accuracy"] == run("scratch", trial)[0]["accuracy_end"]
    stored = {"sws": 0.5, "stages shuffled": 0.5, "repeated, unshared": 0.5, "first layers, unshared": 1.0}
    assert name not in stored or result["stored"] == stored[name]


@pytest.mark.parametrize("name", STUDY.arms)
def test_what_an_arm_starts_from_is_part_of_its_cost(name, trial, tmp_path):
    """Two hundred samples are four batches: two epochs of tuning, one of distillation, two of the teacher."""
    scratch, distilled, epochs = name.startswith("scratch"), not name.startswith("scratch"), 3 if "budget" in name else 2
    folders = [trial.shared, *[tmp_path, tmp_path, None] * (name == "rest only")]  # made, found, made without a store
    costs = [run(name, trial, shared=folder)[1].spent for folder in folders]
    for spent in costs:
        assert spent["trainings"] == (1 if scratch else 3)
        assert spent["steps"] == 4 * (epochs + 3 * distilled)
        assert spent["backwards"] == spent["steps"]
        assert spent["forwards"] == spent["steps"] + 4 * distilled  # the teacher's, in the distillation
        assert spent["parameters"] == costs[0]["parameters"]
    assert costs[0]["train_seconds"] > 0


def test_seed_setting_and_rate_decide(trial):
    first = run("sws", trial)[0]
    assert first != run("sws", trial, seed=1)[0]
    assert first != run("sws", trial, setting=0)[0]
    assert first != run("sws", trial, params={"lr": 0.1})[0]
    assert {"rest only", "scratch"} <= set(STUDY.arms)
    assert STUDY.arms["sws"].defaults == {"lr": 5e-4}
    assert STUDY.arms["scratch"].defaults == {"lr": 2e-3}
    assert STUDY.arms["sws"].space == STUDY.arms["scratch"].space
    assert STUDY.arms["sws"].space["lr"] == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]


def layers(start, trial, depth=6):
    return list(start(trial, depth)[0].encoder)


def flat(layer):
    return torch.cat([p.detach().flatten() for p in layer.parameters()])


def which(layer, blocks):
    return next((i for i, block in enumerate(blocks) if torch.equal(flat(layer), flat(block))), None)


def test_starts(trial):
    aux = _distilled(trial, (2, 2, 2, 2))
    blocks = aux.encoder.blocks
    assert len(blocks) == 4
    assert [which(layer, blocks) for layer in layers(learngene_sws._sws, trial)] == [0, 0, 1, 1, 2, 3]
    assert [which(layer, blocks) for layer in layers(learngene_sws._shuffled, trial)] == [2, 2, 0, 0, 3, 1]
    unshared = _distilled(trial, (1,) * 8).encoder.blocks
    assert [which(layer, unshared) for layer in layers(learngene_sws._first_layers, trial)] == [0, 1, 2, 3, 4, 5]
    four = _distilled(trial, (1,) * 4).encoder.blocks
    assert [which(layer, four) for layer in layers(learngene_sws._repeated, trial)] == [0, 0, 1, 1, 2, 3]


def test_null_starts_share_what_they_should(trial):
    aux = _distilled(trial, (2, 2, 2, 2))
    rest, _ = learngene_sws._rest_only(trial, 4)
    scratch, _ = learngene_sws._scratch(trial, 4)
    assert torch.equal(rest.position, aux.position)
    assert torch.equal(rest.head.weight, aux.head.weight)
    assert not torch.equal(scratch.head.weight, aux.head.weight)
    assert [which(a, scratch.encoder) for a in rest.encoder] == [0, 1, 2, 3]
    assert torch.equal(scratch.position, learngene_sws._scratch(trial, 6)[0].position)
    permuted, _ = learngene_sws._permuted(trial, 4)
    for p, q in zip(permuted.encoder.parameters(), learngene_sws._sws(trial, 4)[0].encoder.parameters(), strict=True):
        assert torch.equal(p.detach().flatten().sort().values, q.detach().flatten().sort().values)
        assert p.ndim == 1 or not torch.equal(p, q)


def test_the_global_random_state_is_left_alone(trial):
    before = torch.random.get_rng_state()
    _fresh(trial, (1, 1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_scales():
    small, full = (learngene_sws.study(scale) for scale in (Scale.SMALL, Scale.FULL))
    assert list(small.settings) == ["depth 4", "depth 6"]
    assert list(full.settings) == ["depth 6", "depth 12"]
    assert small.tune == 5
    assert any(claim.expect.tuned for claim in small.claims)
    setup = _setup(Scale.FULL)
    assert sorted(setup.order) == list(range(len(setup.repeats)))
    assert sorted(_setup(Scale.SMALL).order) == [0, 1, 2, 3]
    assert _ViT(setup, setup.repeats)(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_card():
    assert not PAPER.methods
    assert "xia2024exploring" in PAPER.bibtex
