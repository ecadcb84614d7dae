from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from weightroom.metrics import robust_correct


class Linear(nn.Module):
    """Two classes; the margin of class 1 is w.x - b."""

    def __init__(self, w: Tensor, b: float) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), b
        self.drop = nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        z = self.drop(x).flatten(1) @ self.w - self.b
        return torch.stack([-z / 2, z / 2], 1)


def problem(n: int = 300) -> tuple[Linear, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(n, 2, 3, generator=generator)
    w = torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0, -1.5])
    model = Linear(w, float(x.flatten(1).mean(0) @ w))
    y = (torch.rand(n, generator=generator) < 0.9).long()
    y = torch.where(model.eval()(x).argmax(1) == 1, y, 1 - y)
    margin = (2 * y - 1) * (x.flatten(1) @ w - model.b)
    return model.train(), x, y, margin.detach()


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
@pytest.mark.parametrize("eps", [0.0, 0.02, 0.06])
def test_a_linear_model_is_robust_where_its_margin_says_so(norm, dual, eps):
    model, x, y, margin = problem()
    room = margin - eps * model.w.detach().norm(dual)
    sure = room.abs() > 0.01
    correct = robust_correct(model, x, y, eps, norm=norm, bounds=None, batch_size=128)
    assert correct.dtype == torch.bool
    assert correct.shape == y.shape
    assert torch.equal(correct[sure], room[sure] > 0)
    assert 0.2 < correct.float().mean() < 0.95
    assert sure.float().mean() > 0.7


def test_bounds_take_places_from_the_attack():
    model, x, y, margin = problem()
    free = robust_correct(model, x, y, 0.1)
    bound = robust_correct(model, x, y, 0.1, bounds=(x - 0.02, x + 0.02))
    assert (bound | ~free).all()
    assert torch.equal(bound, robust_correct(model, x, y, 0.02, bounds=None))
    assert (~bound[margin < 0]).all()


def test_model_and_random_state_are_left_alone():
    model, x, y, _ = problem(40)
    state = torch.random.get_rng_state()
    first = robust_correct(model, x, y, 0.05, seed=3)
    assert model.training
    assert model.drop.training
    assert model.w.grad is None
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(robust_correct(model, x, y, 0.05, seed=3), first)
    with pytest.raises(RuntimeError):
        robust_correct(model, x[:, :1], y, 0.05)
    assert model.training


class Masked(nn.Module):
    """Cross entropy has no gradient here (the logits are so far apart that it is 0 in float32); the margin has."""

    def forward(self, x: Tensor) -> Tensor:
        z = 1e4 * (x.flatten(1).sum(1) - 0.5)
        return torch.stack([-z, z], 1)


def test_the_margin_attack_finds_what_cross_entropy_hides():
    x = torch.full((6, 1), 0.52)
    assert not robust_correct(Masked(), x, torch.ones(6, dtype=torch.int64), 0.1, step_size=0.005, restarts=1).any()


def test_a_wrong_step_on_the_way_counts():
    # Wrong only in a thin slab that steps of this size cross: the last place is right again.
    class Slab(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = x.flatten(1).sum(1)
            inside = ((z > 0.55) & (z < 0.57)).float()
            return torch.stack([z, 10.0 - 20 * inside + 0 * z], 1)

    x, y = torch.full((5, 1), 0.5), torch.ones(5, dtype=torch.int64)
    assert not robust_correct(Slab(), x, y, 0.1, step_size=0.01, steps=40).any()


def test_further_attacks_see_what_is_left_and_count():
    model, x, y, _ = problem(60)
    kept = robust_correct(model, x, y, 0.05)
    seen = []

    def fools_the_first(given: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        seen.append(inputs)
        assert not given.training
        assert len(inputs) == len(labels)
        return inputs

    assert torch.equal(robust_correct(model, x, y, 0.05, attacks=[fools_the_first]), kept)
    assert torch.equal(torch.cat(seen), x[kept])

    def corner(given: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        sign = (1 - 2 * labels.float()).reshape(-1, 1, 1) * given.w.detach().reshape(2, 3).sign()
        return inputs + 0.05 * sign

    weak = {"steps": 1, "restarts": 1, "step_size": 1e-9}
    assert (robust_correct(model, x, y, 0.05, attacks=[corner], **weak) <= robust_correct(model, x, y, 0.05, **weak)).all()
    assert robust_correct(model, x, y, 0.05, attacks=[corner], **weak).sum() <= kept.sum()
    for norm, eps in (("linf", 0.04), ("l2", 0.05)):
        with pytest.raises(ValueError, match=r"attacks\[0\] must stay within eps"):
            robust_correct(model, x, y, eps, norm=norm, attacks=[corner])
    with pytest.raises(ValueError, match=r"attacks\[1\] must stay within eps = 0.05 and bounds"):
        robust_correct(model, x, y, 0.05, bounds=(x.amin(), x.amax()), attacks=[fools_the_first, corner])


def test_wrong_arguments_are_named():
    model, x, y, _ = problem(10)
    for wrong, name in (
        ({"eps": -1.0}, "eps"), ({"eps": math.nan}, "eps"), ({"steps": 0}, "steps"), ({"restarts": 0}, "restarts"),
        ({"step_size": 0.0}, "step_size"), ({"batch_size": 0}, "batch_size"), ({"bounds": (1.0, 0.0)}, "bounds"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} must be"):
            robust_correct(model, x, y, **{"eps": 0.1, **wrong})
    with pytest.raises(ValueError, match="unknown norm 'l1'"):
        robust_correct(model, x, y, 0.1, norm="l1")
    with pytest.raises(ValueError, match="x must lie within bounds"):
        robust_correct(model, x + 1, y, 0.1)
    with pytest.raises(ValueError, match=r"y must have shape \(10,\)"):
        robust_correct(model, x, y[:5], 0.1)
    with pytest.raises(TypeError, match="x must be a floating tensor"):
        robust_correct(model, x.long(), y, 0.1)


def test_no_inputs_give_no_answers():
    model, x, y, _ = problem(10)
    assert robust_correct(model, x[:0], y[:0], 0.1).shape == (0,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_runs_on_the_gpu():
    model, x, y, margin = problem()
    sure = (margin - 0.05 * model.w.detach().norm(1)).abs() > 0.01
    there = robust_correct(model.cuda(), x.cuda(), y.cuda(), 0.05)
    assert there.device.type == "cuda"
    assert torch.equal(there.cpu()[sure], robust_correct(model.cpu(), x, y, 0.05)[sure])


def test_a_network_that_says_nan_is_right_about_nothing():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    assert not robust_correct(model, torch.rand(6, 3), torch.zeros(6, dtype=torch.long), 0.1, steps=2).any()
