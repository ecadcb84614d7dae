"""Adversarial training: what the family measures, and what it asks of a task."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import weightroom as wr
from weightroom.compare import robust
from weightroom.errors import UsageError

pytest.importorskip("foolbox")


class Line(nn.Module):
    """Two classes: the sign of the first feature minus a half."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        margin = self.scale * torch.tanh(x[:, 0] - 0.5)
        return torch.stack([-margin, margin], 1)


def points(first):
    return torch.stack([torch.as_tensor(first), torch.full((len(first),), 0.5)], 1)


def test_a_sample_survives_as_far_as_its_margin():
    x, y = points([0.55, 0.7, 0.95, 0.1, 0.3, 0.9]), torch.tensor([1, 1, 1, 0, 0, 0])  # the last one is wrong from the start
    model = Line().train()
    before = model.scale.clone()
    for eps, right, worst in ((0.0, 5 / 6, 2 / 3), (0.1, 4 / 6, 2 / 3), (0.25, 2 / 6, 1 / 3), (0.45, 0.0, 0.0)):
        found = robust.attacked(model, TensorDataset(x, y), eps, (0.0, 1.0))
        assert found["pgd20_accuracy"] == pytest.approx(right)
        assert found["fmn_accuracy"] == pytest.approx(right)
        assert found["worst_class_accuracy"] == pytest.approx(worst)
    assert model.training
    assert model.scale.grad is None
    assert torch.equal(model.scale, before)


def test_the_range_of_the_inputs_bounds_the_attack():
    x = torch.tensor([[0.9, 0.9], [1.0, 0.9]])  # the decision is at 0.5: 0.45 would be enough, but for the lower bound
    found = robust.attacked(Line(), TensorDataset(x, torch.tensor([1, 1])), 0.45, (0.8, 1.0))
    assert found["pgd20_accuracy"] == 1.0


def test_the_attack_repeats_and_leaves_the_random_state():
    torch.manual_seed(3)
    model = nn.Linear(2, 2)
    data = TensorDataset(torch.rand(40, 2), torch.randint(2, (40,)))
    state = torch.get_rng_state()
    first = robust.attacked(model, data, 0.05, (0.0, 1.0), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == robust.attacked(model, data, 0.05, (0.0, 1.0), seed=1)


def toy(**more):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(80, 4, generator=g)
    data = TensorDataset(x, (x[:, 0] > x[:, 1]).long())
    make = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))  # noqa: E731
    return wr.Task("toy", **{"model": make, "train": data, "test": data, "recipe": {"epochs": 2, "lr": 1e-2}, **more})


def test_the_comparison_runs_every_arm_and_decides_by_the_attack(tmp_path):
    results = wr.compare("robust", toy, eps=(0.05, 0.1), seeds=1, store=tmp_path, workers=1)
    assert results.failed == 0
    assert results.study.metric == "pgd20_accuracy"
    table = results.frame
    assert {"clean", "PGD-AT", "TRADES"} <= set(table.arm)
    assert (table["pgd20_accuracy"] <= table["accuracy"] + 1e-9).all()
    assert (table["worst_class_accuracy"] <= table["pgd20_accuracy"] + 1e-9).all()
    steps = table[table.arm == "PGD-AT"]["steps"]
    assert (steps > 0).all()


def test_what_it_cannot_compare_is_said(tmp_path):
    table = TensorDataset(torch.randn(8, 4), torch.randn(8, 2))
    for task, options, message in (
        (toy, {"eps": (-0.1,)}, "eps must be finite and >= 0"),
        (toy, {"eps": (0.1, 0.1)}, "every eps may be given once"),
        (toy(train=table, test=table, loss=nn.MSELoss(), metrics=["mse"]), {}, "needs one class label per sample"),
    ):
        with pytest.raises(UsageError, match=message):
            wr.compare("robust", task, store=tmp_path, **options)
    with pytest.raises(UsageError, match="eps belongs to the family 'robust'"):
        wr.compare("loss", toy, eps=0.1, store=tmp_path)


def test_the_usual_size_is_a_tenth_of_the_range():
    data = TensorDataset(torch.rand(50, 4) * 4 - 2, torch.arange(50) % 2)
    _, settings = robust.arms(toy(train=data), {}, robust.Options())
    (size,) = settings.values()
    assert 0.35 < size < 0.4
