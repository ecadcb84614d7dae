"""The studies of consensus sub-networks return what they declare, cut what they say, and share what they should."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from weightroom import prune, tasks
from weightroom.nets.small import ResNet
from weightroom.papers import consensus_subnetwork as paper
from weightroom.prune.base import prunable
from weightroom.study import Arm, Scale, Trial

BLOCKS, CHANNELS = paper.study(Scale.SMOKE)


def run(study, name, seed=0, **more):
    arm = study.arms[name]
    assert isinstance(arm, Arm)
    trial = Trial(seed=seed, scale=Scale.SMOKE, params=arm.defaults, **more)
    result = arm.run(trial)
    assert set(result) == set(study.metrics)
    assert all(isinstance(value, float) for value in result.values())
    return result, trial.spent


@pytest.mark.parametrize("study", [BLOCKS, CHANNELS], ids=["blocks", "channels"])
def test_every_arm_runs_at_the_size_of_the_consensus(study, tmp_path):
    found = {name: run(study, name, shared=tmp_path) for name in study.arms}
    results = {name: result for name, (result, _) in found.items()}
    assert results["dense"]["kept"] == 1
    for name in ("random sub-network, retrained", "found sub-network, retrained"):
        assert results[name]["kept"] == results["polarised"]["kept"] < 1
        assert found[name][1]["trainings"] == 1
    dense, small = found["dense"][1]["parameters"], found["polarised"][1]["parameters"]
    assert small == found["found sub-network, retrained"][1]["parameters"] < dense
    assert len(list(tmp_path.glob("consensus*.safetensors"))) == 1
    assert len(list(tmp_path.glob("dense*.safetensors"))) == 1


@pytest.mark.parametrize("study", [BLOCKS, CHANNELS], ids=["blocks", "channels"])
def test_pruners_of_weights_take_what_the_consensus_has_taken(study, monkeypatch):
    derived, plans = [], []
    derive, fit = prune.ConsensusGatePruner.derive, prune.PlanPruner.fit
    monkeypatch.setattr(prune.ConsensusGatePruner, "derive", lambda *args: derived.append(derive(*args)) or derived[-1])
    monkeypatch.setattr(prune.PlanPruner, "fit", lambda *args, **how: plans.append(fit(*args, **how)) or plans[-1])
    _, spent = run(study, "polarised")
    weights = lambda model: sum(site.tensor.numel() for site in prunable(model))  # noqa: E731
    (small, _), dense = derived[0], paper.residual_mlp()
    assert spent["parameters"] == sum(p.numel() for p in small.parameters())
    kept = weights(small) / weights(dense)
    assert kept < 1
    for name in ("global magnitude", "LAMP", "ERK", "uniform", "random"):
        result, _ = run(study, name)
        assert 1 - plans[-1].sparsity() == pytest.approx(kept, abs=1e-3)
        assert result["kept"] == pytest.approx(kept)
    assert len(plans) == 5


def test_trials_are_decided_by_the_seed():
    first, _ = run(BLOCKS, "polarised")
    assert first == run(BLOCKS, "polarised")[0]
    assert first != run(BLOCKS, "polarised", seed=1)[0]
    assert run(CHANNELS, "random sub-network, retrained")[0] == run(CHANNELS, "random sub-network, retrained")[0]


def test_a_network_cut_at_the_start_has_the_initial_weights_of_what_is_kept():
    setup = paper._Setup(tasks.digits().with_(model=paper.residual_mlp), tasks.digits(), "block")
    opened = torch.tensor([1, 0, 0, 1, 1, 0])
    state = torch.get_rng_state()
    small = paper._cut_at_start(setup, Trial(seed=3), opened)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(layer) is nn.Identity for layer in small[2:8]] == [False, True, True, False, False, True]
    full = setup.task.model(seed=3)
    assert torch.equal(small[5].inner.weight, full[5].inner.weight)


def test_the_halved_controls():
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    full, deep, wide = paper.residual_mlp(), paper.residual_mlp(depth=3), paper.residual_mlp(inner=32)
    assert (len(full), len(deep), wide[2].inner.out_features) == (9, 6, 32)
    assert count(deep) < 0.56 * count(full)
    assert count(wide) < 0.56 * count(full)
    assert {"half as deep"} == set(BLOCKS.arms) - set(CHANNELS.arms)


@pytest.mark.parametrize("name", paper.PAPER.methods)
def test_what_the_family_gets(name):
    method = paper.PAPER.methods[name]
    torch.manual_seed(0)
    model, x = ResNet(1, 3, blocks=(2, 1), width=4), torch.randn(4, 1, 8, 8)
    pruner = method.make(0.25, **method.defaults, lambda_pol=1.0)
    assert (pruner.cost, pruner.lambda_pol) == ("params", 1.0)
    wrapped = pruner.wrap(model, x)
    total = sum(p.numel() for p in model.parameters())
    assert (1 - pruner.keep) * wrapped.gated_cost == pytest.approx(0.25 * total)
    with pytest.raises(ValueError, match=r"sparsity 0.99 cannot be reached: the gates control \d+% of the weights"):
        method.make(0.99, **method.defaults).wrap(model, x)
    assert len(wrapped.units) == (8 if "channels" in name else 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small, plan = pruner.derive(wrapped, [(x,)])
    assert small(x).shape == (4, 3)
    assert plan.sparsity() == 0
    assert method.unfit(tasks.digits()) is not None
    assert "residual" in method.unfit(tasks.digits(net="cnn"))
    assert method.unfit(tasks.digits().with_(model=paper.residual_mlp)) is None


@pytest.mark.parametrize("scale", [Scale.SMOKE, Scale.SMALL])
def test_two_studies(scale):
    studies = paper.study(scale)
    assert [study.name for study in studies] == ["consensus-subnetwork: blocks", "consensus-subnetwork: channels"]
    assert all(study.claims and len(study.seeds) >= (1 if scale is Scale.SMOKE else 5) for study in studies)


def test_card():
    assert paper.PAPER.names() == ["weightroom.prune.ConsensusGatePruner", "weightroom.prune.PolarizationLoss"]
