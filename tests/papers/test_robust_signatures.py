"""The study of robust weight signatures returns what it declares; its models and patches are as described."""

from __future__ import annotations

import pytest
import torch

from weightroom.papers import robust_signatures
from weightroom.study import Arm, Scale, Trial

STUDY = robust_signatures.study(Scale.SMOKE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def world(folder):
    return robust_signatures._World(Trial(seed=0, scale=Scale.SMOKE, shared=folder))


def run(name, folder, seed=0):
    arm = STUDY.arms[name]
    assert isinstance(arm, Arm)
    result = arm.run(Trial(seed=seed, scale=Scale.SMOKE, params=arm.defaults, shared=folder))
    assert set(result) <= set(STUDY.metrics)
    assert {"accuracy", "clean_accuracy", "fog_accuracy"} <= set(result)
    assert all(isinstance(v, float) for v in result.values())
    return result


@pytest.mark.parametrize("name", STUDY.arms)
def test_arms_return_what_is_declared(name, folder):
    result = run(name, folder)
    assert result == run(name, folder)
    for metric, owner in (("consistency", "signature"), ("compression", "signature, 16 levels"), ("change_first", "robust")):
        assert (metric in result) == (name == owner)
    if name == "signature, 16 levels":
        assert result["compression"] > 13


def test_the_seed_decides(folder):
    assert run("clean", folder) != run("clean", folder, seed=1)


def test_models_of_a_half_share_start_and_head_but_not_the_rest(world):
    fresh = [world._fresh(half, 5).state_dict() for half in (0, 1)]
    start = world.start.state_dict()
    for half in (0, 1):
        assert all(torch.equal(fresh[half][n], start[n]) for n in start if n.startswith("features"))
        assert fresh[half]["head.weight"].shape == (5, 32)
        assert torch.equal(fresh[half]["head.weight"], world._fresh(half, 6).state_dict()["head.weight"])
    assert not torch.equal(fresh[0]["head.weight"], fresh[1]["head.weight"])
    assert not torch.equal(world.clean[0].features[0].weight, world.robust[0]["fog"].features[0].weight)


def test_halves_of_the_classes(world):
    sizes = [len(world.half("train", half)) for half in (0, 1, None)]
    assert sizes[0] + sizes[1] == sizes[2] == 200
    for half in (0, 1):
        labels = world.half("test", half).tensors[1]
        assert set(labels.tolist()) == set(range(5))


def test_patches(world):
    kept = [f"features.{i}.{kind}" for i in (0, 2, 5) for kind in ("weight", "bias")]
    assert list(world.signature(0, "fog")) == kept
    clean, robust = world.clean[0].state_dict(), world.robust[0]["fog"].state_dict()
    copied = robust_signatures._copied(world, 0, "fog").state_dict()
    for name, tensor in copied.items():
        torch.testing.assert_close(tensor, robust[name] if name in kept else clean[name], rtol=1e-5, atol=1e-7)
    before = {name: t.clone() for name, t in clean.items()}
    ours = robust_signatures._transferred(world, 0, "fog").state_dict()
    torch.testing.assert_close(ours["features.0.bias"], clean["features.0.bias"] + world.signature(1, "fog")["features.0.bias"])
    assert all(torch.equal(before[n], t) for n, t in world.clean[0].state_dict().items())


def test_a_dead_training_is_redone(monkeypatch, folder):
    trial = Trial(seed=3, scale=Scale.SMOKE)
    seeds = []
    fit = robust_signatures._Setup.fit

    def count(self, model, dataset, seed, *rest):
        seeds.append(seed)
        fit(self, model, dataset, seed, *rest)
        if len(seeds) == 1:
            for p in model.parameters():
                p.data.zero_()

    monkeypatch.setattr(robust_signatures._Setup, "fit", count)
    monkeypatch.setattr(robust_signatures, "accuracy", lambda outputs, targets: float(outputs.abs().sum() > 0))
    setup = robust_signatures._setup(Scale.SMOKE)
    monkeypatch.setattr(robust_signatures, "_setup", lambda scale: robust_signatures._Setup(**{**vars(setup), "alive": 0.4}))
    world = robust_signatures._World.__new__(robust_signatures._World)
    world.trial, world.setup, world.images = trial, robust_signatures._setup(trial.scale), robust_signatures._images(trial.scale)
    model = world._trained("start", None, None)
    assert seeds == [3, 10_003]
    assert model.head.weight.abs().sum() > 0
    monkeypatch.setattr(robust_signatures, "accuracy", lambda outputs, targets: 0.2)
    with pytest.raises(RuntimeError, match="did not learn"):
        world._trained("start", None, None)


def test_full_scale_is_vgg16():
    setup = robust_signatures._setup(Scale.FULL)
    net = robust_signatures._Net(setup, 10)
    assert sum(p.numel() for p in net.features.parameters()) == 14_714_688
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_what_the_family_gets():
    for method in robust_signatures.PAPER.methods.values():
        assert {"share", "strength"} <= set(method.defaults)
    assert "2302.12480" in robust_signatures.PAPER.bibtex
