"""The study of Bone returns what it declares, its arms share start and budget, and its null arm is what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from weightroom.nets.small import MLP
from weightroom.papers import bone as paper
from weightroom.study import Arm, Scale, Trial
from weightroom.weights import BoneLinear

STUDY = paper.study(Scale.SMOKE)
NEEDS_PEFT = ("lora", "pissa")


def run(name: str, seed: int = 0, lr: float = 1e-3) -> dict[str, float]:
    arm = STUDY.arms[name]
    assert isinstance(arm, Arm)
    return dict(arm.run(Trial(seed=seed, scale=Scale.SMOKE, params={"lr": lr})))


@pytest.mark.parametrize("name", STUDY.arms)
def test_arms(name: str) -> None:
    if name in NEEDS_PEFT:
        pytest.importorskip("peft")
    result = run(name)
    assert result.keys() == STUDY.metrics.keys()
    assert all(isinstance(value, float) for value in result.values())
    assert result["trainable"] == (13_130 if name == "full fine-tuning" else 1536)
    assert 0 <= result["accuracy"] <= 1


def test_arms_are_deterministic_and_depend_on_seed_and_rate() -> None:
    assert run("bone") == run("bone")
    assert run("bone")["loss"] != run("bone", seed=1)["loss"]
    assert run("bone")["loss"] != run("bone", lr=3e-2)["loss"]


def test_arms_start_from_one_model_and_see_the_same_batches() -> None:
    losses = {name: run(name, lr=0.0)["loss"] for name in STUDY.arms if name not in NEEDS_PEFT}
    assert max(losses.values()) - min(losses.values()) < 1e-5


def test_the_tuned_grid_is_tried_whole() -> None:
    small = paper.study(Scale.SMALL)
    assert all(arm.space == {"lr": [1e-3, 3e-3, 1e-2, 3e-2]} for arm in small.arms.values() if isinstance(arm, Arm))
    assert small.tune == 4


def test_the_null_arm_is_the_guided_form_without_plus_b() -> None:
    torch.manual_seed(0)
    net = MLP((16, 8, 16, 4))
    bones = paper._guided(net, r=4)
    inner = [m for m in bones.modules() if isinstance(m, BoneLinear)]
    blocks = [torch.randn_like(m.bone["default"]) for m in inner]
    with torch.no_grad():
        for m, B in zip(inner, blocks, strict=True):
            m.bone["default"].copy_(B)
    expected = [
        m.weight - B.view(m.out_features, 4).repeat(1, m.in_features // 4).view_as(m.weight)
        for m, B in zip(inner, blocks, strict=True)
    ]
    ablated = paper._ablated(net, r=4)
    trained = [p for p in ablated.parameters() if p.requires_grad]
    assert len(trained) == len(blocks) == 2
    with torch.no_grad():
        for p, B in zip(trained, blocks, strict=True):
            p.copy_(B)
    layers = [m for m in ablated.modules() if isinstance(m, nn.Linear)]
    for layer, W in zip(layers, expected, strict=False):
        torch.testing.assert_close(layer.weight, W)


@pytest.mark.parametrize("name", paper.PAPER.methods)
def test_methods_adapt_what_the_rank_fits_but_never_the_last_layer(name: str) -> None:
    method = paper.PAPER.methods[name]
    hyper = {key: value for key, value in method.defaults.items() if key != "lr"}
    model = method.make(MLP((20, 16, 24, 8)), **hyper)
    adapted = [m.base_layer.in_features for m in model.modules() if isinstance(m, BoneLinear)]
    assert adapted == ([16] if name == "bone" else [20, 16])
    assert isinstance(model[-1], nn.Linear)
    with pytest.raises(ValueError, match="r=8 fits no linear layer"):
        method.make(MLP((4, 8)), **hyper)


def test_card() -> None:
    assert paper.PAPER.names() == ["weightroom.weights.BoneConfig", "weightroom.weights.BoneLinear", "weightroom.weights.bone"]
    assert "2409.15371" in paper.PAPER.bibtex
