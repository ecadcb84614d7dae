"""Distillation: one teacher per seed, a student per arm; all students have the same architecture, data and batches.

A method is ``make(teacher, **hyper) -> objective`` with ``objective(model, x, y) -> scalar``; the teacher is a frozen module in
eval mode. An objective may have two attributes: ``prepare(model) -> nn.Module``, called before the student is trained, and
``finish(model) -> nn.Module``, which gives back what is measured. A method that trains several models is a ``DistillMethod`` with
``whole=True``: ``make(task, trial, train, **hyper) -> nn.Module``. A hyper-parameter ``lr`` is the learning rate of the recipe's
optimizer.

The teacher is the task's: a trained module as it is, or one that the recipe trains; where the task has none, it is a model of the
student's own architecture, trained with the seed after the student's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightroom import metrics
from weightroom.compare.base import Family, Method, Options, measure, train_by_recipe
from weightroom.distill import BinaryKLLoss, BinaryKLNormLoss, DKDLoss, KDObjective, SoftmaxKDLoss
from weightroom.errors import UsageError
from weightroom.study import Arm, Task, Trial

__all__ = ["FAMILY", "DistillMethod"]

_LR = (1e-4, 1e-1, "log")


@dataclass(frozen=True)
class DistillMethod(Method):
    """A method of distillation.

    Args:
        whole: ``make`` trains the student itself: ``make(task, trial, train, **hyper) -> nn.Module``, where
            ``train(model, *, loss=None, step=None, data=None)`` trains a model by the task's recipe and counts what it costs.
    """

    whole: bool = False


def _none(teacher: nn.Module) -> Callable[..., Tensor]:
    return lambda model, x, y: F.cross_entropy(model(x), y)


def _bib(key: str, title: str, authors: str, year: int, venue: str) -> tuple[str]:
    return (
        f"@inproceedings{{{key},\n  title = {{{title}}},\n  author = {{{authors}}},\n  year = {{{year}}},\n  booktitle = {{{venue}}}\n}}",
    )


_WEIGHT = [0.03, 0.1, 0.3, 1.0, 3.0]
BASELINES = {
    "no teacher": Method(_none, space={"lr": _LR}),
    "Hinton KD": Method(
        lambda teacher, T, kd: KDObjective(teacher, SoftmaxKDLoss(T=T), ce=1 - kd, kd=kd), {"T": 4.0, "kd": 0.9},
        {"lr": _LR, "T": [1.0, 2.0, 4.0, 8.0], "kd": [0.3, 0.5, 0.7, 0.9]}, _bib(
            "hinton2014distilling", "Distilling the Knowledge in a Neural Network",
            "Geoffrey Hinton and Oriol Vinyals and Jeff Dean", 2014, "NeurIPS Deep Learning Workshop")),
    "DKD": Method(
        lambda teacher, T, beta: KDObjective(teacher, DKDLoss(T=T, beta=beta), ce=1.0, kd=1.0), {"T": 4.0, "beta": 8.0},
        {"lr": _LR, "T": [1.0, 2.0, 4.0], "beta": [1.0, 2.0, 4.0, 8.0]}, _bib(
            "zhao2022decoupled", "Decoupled Knowledge Distillation",
            "Borui Zhao and Quan Cui and Renjie Song and Yiyu Qiu and Jiajun Liang", 2022, "CVPR")),
    "logit standardisation": Method(
        lambda teacher, T, kd: KDObjective(teacher, SoftmaxKDLoss(T=T, standardize=True), ce=0.1, kd=kd), {"T": 2.0, "kd": 9.0},
        {"lr": _LR, "kd": [0.9, 3.0, 9.0]}, _bib(
            "sun2024logit", "Logit Standardization in Knowledge Distillation",
            "Shangquan Sun and Wenqi Ren and Jingzhi Li and Rui Wang and Xiaochun Cao", 2024, "CVPR")),
    "BinaryKL alone": Method(
        lambda teacher, T: KDObjective(teacher, BinaryKLNormLoss(T=T), ce=0.0, kd=1.0), {"T": 2.0}, {"lr": _LR, "T": [1.0, 2.0, 4.0]}),
    "CE + BinaryKL, one head": Method(
        lambda teacher, T, alpha: KDObjective(teacher, BinaryKLLoss(T=T), ce=1.0, kd=alpha), {"T": 2.0, "alpha": 1.0},
        {"lr": _LR, "alpha": _WEIGHT}),
    "CE + BinaryKL-Norm, one head": Method(
        lambda teacher, T, alpha: KDObjective(teacher, BinaryKLNormLoss(T=T), ce=1.0, kd=alpha), {"T": 2.0, "alpha": 1.0},
        {"lr": _LR, "alpha": _WEIGHT}),
}  # fmt: skip


def _arm(task: Task, method: Method, epochs: int | None) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        hyper = dict(trial.params)
        lr = hyper.pop("lr", None)
        teacher = _teacher(task, trial, epochs)

        def train(model: nn.Module, **what: Any) -> None:
            train_by_recipe(task, trial, model, lr=lr, epochs=epochs, **what)
            trial.spend(trainings=1.0)

        if getattr(method, "whole", False):
            student = method.make(task, trial, train, **hyper)
        else:
            objective = method.make(teacher, **hyper)
            with torch.random.fork_rng():
                torch.manual_seed(trial.seed)
                student = getattr(objective, "prepare", _same)(task.model(seed=trial.seed).to(trial.device))
            asked = teacher.register_forward_hook(lambda *_: trial.spend(forwards=1.0))
            train(student, step=lambda model, batch: objective(model, *batch[:2]))
            asked.remove()
            student = getattr(objective, "finish", _same)(student)
        return {**measure(task, trial, student), **_beside(teacher, student, task, trial)}

    return Arm(run, {"lr": task.recipe.lr, **method.defaults}, method.space, method.cites)


def _same(model: nn.Module) -> nn.Module:
    return model


def _beside(teacher: nn.Module, student: nn.Module, task: Task, trial: Trial) -> dict[str, float]:
    dataset = getattr(task, trial.split)
    theirs, targets = metrics.predict(teacher, dataset)
    ours, _ = metrics.predict(student, dataset)
    theirs, ours = theirs.argmax(1), ours.argmax(1)
    return {"agreement": float((ours == theirs).double().mean()), "teacher_accuracy": float((theirs == targets).double().mean())}


def _teacher(task: Task, trial: Trial, epochs: int | None) -> nn.Module:
    factory = task.model if task.teacher is None else task.teacher
    model = factory(seed=trial.seed + 1).to(trial.device)
    if task.teacher is None or not isinstance(factory.source, nn.Module):

        def make() -> dict[str, Tensor]:
            alone = Trial(trial.seed, trial.scale, device=trial.device)
            train_by_recipe(task, alone, model, epochs=epochs, log=False)
            return model.state_dict()

        given = {"task": task, "seed": trial.seed, "scale": trial.scale.value, "device": trial.device, "epochs": epochs}
        model.load_state_dict(trial.cached("teacher", make, **given))
    return model.eval().requires_grad_(False)


def arms(task: Task, methods: Mapping[str, Method], options: Options) -> tuple[dict[str, Arm], dict[str, Any]]:
    """Returns an arm per method, under one setting."""
    target = torch.as_tensor(task.train[0][1])
    if target.is_floating_point() or target.ndim:
        raise UsageError(f"the family 'distill' needs one class label per sample; those of task {task.name!r} are {target.dtype}")
    if task.teacher is not None:
        _check_teacher(task, task.teacher())
    return {name: _arm(task, method, options.epochs) for name, method in methods.items()}, {"": None}


@torch.no_grad()
def _check_teacher(task: Task, teacher: nn.Module) -> None:
    x = torch.stack([torch.as_tensor(task.train[i][0]) for i in range(min(2, len(task.train)))])
    theirs, ours = (model.eval()(x.to(metrics.device_of(model))) for model in (teacher, task.model()))
    if theirs.shape != ours.shape:
        raise UsageError(
            f"teacher and student must have the same classes: their outputs have shapes {tuple(theirs.shape)} and {tuple(ours.shape)}"
        )


FAMILY = Family(
    "distill", "students of one teacher; bring a classifier, and a teacher as the task's teacher=", BASELINES, "no teacher", arms,
    costs=("train_seconds", "forwards", "trainings", "peak_memory"), metrics={"agreement": "max", "teacher_accuracy": "max"},
)  # fmt: skip
