from __future__ import annotations

import math

import pytest
import torch

from weightroom.losses import ALDRKLLoss, GCELoss, LDRKLLoss
from weightroom.papers import ldr
from weightroom.study import Scale, Trial


def test_methods_make_losses_for_a_task():
    task = ldr._task(0, "uniform", 0.0)
    made = {name: method.make(task, **method.defaults) for name, method in ldr.PAPER.methods.items()}
    assert isinstance(made["ldr-kl"], LDRKLLoss)
    assert isinstance(made["aldr-kl"], ALDRKLLoss)
    assert made["aldr-kl"].n_samples == 900
    assert isinstance(made["gce"], GCELoss)
    for name, method in ldr.PAPER.methods.items():
        assert set(method.space) - {"lr"} <= set(method.defaults), name


def test_task_is_split_and_spoilt_as_said():
    clean, noisy, shifted = (ldr._task(3, kind, rate) for kind, rate in (("uniform", 0.0), ("uniform", 0.6), ("next", 0.4)))
    assert [len(part) for part in (clean.train, clean.val, clean.test)] == [900, 200, 697]

    def labels(dataset):
        return torch.stack([dataset[i][1] for i in range(len(dataset))])

    for part, size in (("train", 900), ("val", 200)):
        before = labels(getattr(clean, part))
        changed = (labels(getattr(noisy, part)) != before).double().mean().item()
        assert abs(changed - 0.54) < 5 * math.sqrt(0.25 / size)
        after = labels(getattr(shifted, part))
        assert abs((after != before).double().mean().item() - 0.4) < 5 * math.sqrt(0.25 / size)
        assert set(((after - before) % 10).tolist()) == {0, 1}
    assert torch.equal(labels(noisy.test), labels(clean.test))


@pytest.mark.parametrize("name", ["ce", "aldr-kl"])
def test_a_trial_is_the_same_twice(name):
    study = ldr.study(Scale.SMOKE)
    arm = study.arms[name]
    first, second = (arm.run(Trial(1, Scale.SMOKE, study.settings["uniform 0.6"], {"lr": 0.03})) for _ in range(2))
    assert first == second
    assert set(first) <= set(study.metrics)
    assert ("moved" in first) == (name == "aldr-kl")


@pytest.mark.parametrize("scale", list(Scale))
def test_study_is_well_formed(scale):
    study = ldr.study(scale)
    assert study.paper is ldr.PAPER
    assert all(arm.defaults["lr"] in arm.space["lr"] for arm in study.arms.values())
