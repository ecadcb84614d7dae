"""The study of FTWT returns what it declares, its control arms spend what they should, and the family gets a dynamic pruner."""

from __future__ import annotations

import pytest
import torch

from weightroom import tasks
from weightroom.nets.small import ConvNet
from weightroom.papers import ftwt
from weightroom.prune import DynamicMaskPruner
from weightroom.study import Arm, Scale, Trial

STUDY = ftwt.study(Scale.SMOKE)


def run(name, seed=0):
    arm = STUDY.arms[name]
    assert isinstance(arm, Arm)
    result = arm.run(Trial(seed=seed, scale=Scale.SMOKE, params=arm.defaults))
    assert set(result) <= set(STUDY.metrics)
    assert all(isinstance(value, float) for value in result.values())
    return result


@pytest.mark.parametrize("name", STUDY.arms)
def test_arms_return_what_the_study_declares(name):
    result = run(name)
    assert 0 <= result["accuracy"] <= 1
    if name == "baseline, fine-tuned":
        assert result["macs_cut"] == 0
    elif name.startswith(("FTWT", "top")):
        assert result["estimate_gap"] == pytest.approx(abs(result["estimated_cut"] - result["macs_cut"]))
        assert 0.4 < result["mask_accuracy"] <= 1
    else:
        assert "mask_accuracy" not in result


def test_random_and_static_masks_spend_the_same():
    for kept in (0.5, 0.3):
        on = [round(kept * c) for c in (16, 32, 32, 64)]
        spent = 64 * on[0] + 64 * on[0] * on[1] + 16 * on[1] * on[2] + 16 * on[2] * on[3]
        dense = 64 * 16 + 64 * 16 * 32 + 16 * 32 * 32 + 16 * 32 * 64
        for name in ("random masks", "static"):
            assert run(f"{name}, {kept:g}")["macs_cut"] == pytest.approx(1 - spent / dense)


def test_trials_are_decided_by_the_seed():
    for name in ("FTWT, r 0.7", "random masks, 0.5"):
        assert run(name, 3) == run(name, 3)
        assert run(name, 3) != run(name, 4)


def test_random_masks_differ_and_static_ones_do_not():
    torch.manual_seed(0)
    model, x = ConvNet(1, 10, channels=(8, 12)), torch.randn(20, 1, 8, 8)
    for prepare, kinds in ((ftwt.random_masks(0.5), 2), (ftwt.static_masks(0.5), 1)):
        wrapped = DynamicMaskPruner().wrap(model, x)
        prepare(wrapped, [x], 0)
        wrapped.eval()(x)
        for block in wrapped.blocks.values():
            assert (block.last.mask.sum(1) == block.conv.out_channels // 2).all()
            assert (len(block.last.mask.unique(dim=0)) > 1) == (kinds > 1)


def test_static_masks_keep_the_channels_that_fire_most():
    torch.manual_seed(0)
    model, x = ConvNet(1, 10, channels=(4,)), torch.randn(20, 1, 8, 8)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0]))
    wrapped = DynamicMaskPruner().wrap(model, x)
    ftwt.static_masks(0.5)(wrapped, [x], 0)
    wrapped.eval()(x)
    assert (wrapped.blocks["0"].last.mask == torch.tensor([0.0, 1.0, 0.0, 1.0])).all()


def test_what_the_family_gets():
    method = ftwt.PAPER.methods["FTWT"]
    assert method.start == "trained"
    pruner = method.make(0.75, seed=3, **method.defaults)
    assert isinstance(pruner, DynamicMaskPruner)
    assert (pruner.mass, pruner.target, pruner.seed, pruner.dynamic) == (0.5, "ratio", 3, True)
    assert method.make(0.0).mass == 0
    assert method.unfit(tasks.digits("cnn")) is None
    assert "no block to gate" in method.unfit(tasks.digits("mlp"))


@pytest.mark.parametrize("scale", [Scale.SMOKE, Scale.SMALL])
def test_claims_are_decided_on_enough_seeds(scale):
    study = ftwt.study(scale)
    assert len(study.claims) >= 15
    assert len(study.seeds) == scale.pick(1, 5, 3)
