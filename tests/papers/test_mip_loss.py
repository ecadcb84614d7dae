"""The card and the study of SPOCKMIP."""

from __future__ import annotations

import pytest
import torch

from weightroom.papers.mip_loss import PAPER, _Patches, study
from weightroom.study.core import Scale, Trial


def run(name, seed=0, **how):
    arm = study(Scale.SMOKE).arms[name]
    return arm.run(Trial(seed, Scale.SMOKE, params=arm.defaults, **how))


@pytest.mark.parametrize("scale", list(Scale))
def test_the_study_stands_at_every_scale(scale):
    made = study(scale)
    assert made.scale is scale
    assert {c.expect.metric or made.metric for c in made.claims} == {"fragments", "recall", "dice", "precision"}


@pytest.mark.parametrize("name", list(study(Scale.SMOKE).arms))
def test_an_arm_gives_every_metric_and_counts_its_steps(name):
    made = study(Scale.SMOKE)
    trial = Trial(0, Scale.SMOKE, params=made.arms[name].defaults)
    metrics = made.arms[name].run(trial)
    assert set(metrics) == set(made.metrics)
    assert all(0 <= metrics[m] <= 1 for m in metrics if m != "fragments")
    assert trial.spent["steps"] == trial.spent["backwards"] == 20


def test_a_trial_is_decided_by_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = run("mip multi")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert run("mip multi") == first
    assert run("mip multi", seed=1) != first


def test_arms_differ_and_splits_too():
    outcomes = [run(name, seed=1) for name in study(Scale.SMOKE).arms] + [run("mip multi", seed=1, split="val")]
    assert all(a != b for i, a in enumerate(outcomes) for b in outcomes[:i])


def test_a_patch_comes_with_its_windows_of_the_projected_labels():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(3, 1, 9, 9, 9, generator=generator) < 0.1).float()
    images = torch.randn(3, 1, 9, 9, 9, generator=generator)
    patches = _Patches(images, labels, 4, 20, seed=1)
    assert len(patches) == 20
    for i, (image, label, *projected) in enumerate(patches[j] for j in range(20)):
        a, b, c = patches.corner[i].tolist()
        which = patches.volume[i]
        assert torch.equal(image, images[which, :, a : a + 4, b : b + 4, c : c + 4])
        assert torch.equal(label, labels[which, :, a : a + 4, b : b + 4, c : c + 4])
        assert torch.equal(projected[0], labels[which].amax(1)[:, b : b + 4, c : c + 4])
        assert torch.equal(projected[1], labels[which].amax(2)[:, a : a + 4, c : c + 4])
        assert torch.equal(projected[2], labels[which].amax(3)[:, a : a + 4, b : b + 4])
        assert all((p >= label.amax(axis + 1)).all() for axis, p in enumerate(projected))
    assert patches.corner.max() == 5
    assert patches.corner.min() == 0


def test_methods_make_losses_of_logits():
    logits = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    label = (logits > 1).float()
    values = {name: method.make(None, **method.defaults)(logits, label) for name, method in PAPER.methods.items()}
    assert all(v.ndim == 0 and v.isfinite() for v in values.values())
    assert values["mip-loss"] != values["focal tversky"]
    assert set(PAPER.methods["mip-loss"].space) <= set(PAPER.methods["mip-loss"].defaults)


def test_the_card():
    assert PAPER.key == "mip-loss"
    assert "weightroom.losses.SPOCKMIPLoss" in PAPER.names()
    assert "2407.08655" in PAPER.bibtex
