"""Distillation: who teaches, what is measured, and what the family asks of a task."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import weightroom as wr
from weightroom.compare import distill
from weightroom.errors import UsageError


def net(width, classes=3):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, classes))


def toy(**more):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(90, 4, generator=g)
    data = TensorDataset(x, x[:, :3].argmax(1))
    return wr.Task("toy", **{"model": lambda: net(4), "train": data, "test": data, "recipe": {"epochs": 3, "lr": 1e-2}, **more})


def test_the_comparison_runs_every_arm(tmp_path):
    task = toy(teacher=lambda: net(32))
    results = wr.compare("distill", task, seeds=1, store=tmp_path, workers=1)
    assert results.failed == 0
    frame = results.frame
    assert {"no teacher", *distill.BASELINES} <= set(frame.arm)
    assert frame["teacher_accuracy"].nunique() == 1  # one teacher for all arms of a seed
    assert frame["agreement"].between(0, 1).all()


def test_a_trained_teacher_is_used_as_it_is(tmp_path):
    torch.manual_seed(0)
    constant = net(2)
    with torch.no_grad():
        constant[2].weight.zero_()
        constant[2].bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
    task = toy(teacher=constant)
    results = wr.compare("distill", task, arms=["Hinton KD"], seeds=1, store=tmp_path, workers=1)
    taught = results.frame[results.frame.arm == "Hinton KD"].iloc[0]
    share = (task.test.tensors[1] == 1).double().mean()
    assert taught["teacher_accuracy"] == pytest.approx(float(share))
    assert torch.equal(constant[2].bias, torch.tensor([0.0, 50.0, 0.0]))


class Extra(nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student, self.extra = student, nn.Linear(4, 3)

    def forward(self, x):
        return self.student(x) + self.extra(x)


class Prepared:
    """An objective with a part of its own, which is not measured."""

    def prepare(self, model):
        return Extra(model)

    def __call__(self, model, x, y):
        return nn.functional.cross_entropy(model(x), y)

    def finish(self, model):
        return model.student


def test_objectives_may_prepare_and_finish_the_student_and_methods_may_train_themselves(tmp_path):
    def alone(task, trial, train):
        model = task.model(seed=trial.seed)
        train(model, loss=task.loss)
        train(model, loss=task.loss)
        return model

    mine = {"prepared": wr.Method(lambda teacher: Prepared()), "alone": distill.DistillMethod(alone, whole=True)}
    results = wr.compare("distill", toy, methods=mine, arms=["prepared", "alone"], seeds=1, store=tmp_path, workers=1)
    assert results.failed == 0
    frame = results.frame.set_index("arm")
    assert frame.loc["prepared", "parameters"] == frame.loc["no teacher", "parameters"]
    assert frame.loc["alone", "trainings"] == 2
    assert frame.loc["alone", "steps"] == 2 * frame.loc["no teacher", "steps"]


def test_what_it_cannot_compare_is_said(tmp_path):
    table = TensorDataset(torch.randn(8, 4), torch.randn(8, 2))
    with pytest.raises(UsageError, match="needs one class label per sample"):
        wr.compare(
            "distill", toy(model=lambda: net(4, 2), train=table, test=table, loss=nn.MSELoss(), metrics=["mse"]), store=tmp_path
        )
    with pytest.raises(UsageError, match=r"same classes: their outputs have shapes \(2, 5\) and \(2, 3\)"):
        wr.compare("distill", toy(teacher=lambda: net(8, 5)), store=tmp_path)
