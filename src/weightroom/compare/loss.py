"""Losses: the same model, data, optimizer and batches; each arm minimises its own loss.

A method is ``make(task, **hyper) -> loss``, called as ``loss(outputs, targets)``, or with the samples' data-set indices too where
it says ``needs_index = True``. A hyper-parameter ``lr`` is the learning rate of the recipe's optimizer, not the loss's: losses of
different scale need different ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from weightroom.compare.base import Family, Method, Options, measure, train_by_recipe
from weightroom.errors import UsageError
from weightroom.losses import FocalLoss
from weightroom.study import Arm, Task, Trial

__all__ = ["FAMILY"]

_LR = {"lr": (1e-4, 1e-1, "log")}
_FOCAL = """@inproceedings{lin2017focal,
  title = {Focal Loss for Dense Object Detection},
  author = {Tsung-Yi Lin and Priya Goyal and Ross Girshick and Kaiming He and Piotr Dollar},
  year = {2017},
  booktitle = {ICCV}
}"""
_SMOOTHING = """@inproceedings{szegedy2016rethinking,
  title = {Rethinking the Inception Architecture for Computer Vision},
  author = {Christian Szegedy and Vincent Vanhoucke and Sergey Ioffe and Jonathon Shlens and Zbigniew Wojna},
  year = {2016},
  booktitle = {CVPR}
}"""

BASELINES = {
    "task's own": Method(lambda task: task.loss, space=_LR),
    "cross-entropy": Method(lambda task: nn.CrossEntropyLoss(), space=_LR),
    "label smoothing": Method(
        lambda task, smoothing: nn.CrossEntropyLoss(label_smoothing=smoothing), {"smoothing": 0.1}, _LR, (_SMOOTHING,)
    ),
    "focal": Method(lambda task, gamma: FocalLoss(gamma=gamma), {"gamma": 2.0}, _LR, (_FOCAL,)),
}


def _arm(task: Task, method: Method, epochs: int | None) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        model = task.model(seed=trial.seed)
        hyper = dict(trial.params)
        lr = hyper.pop("lr", None)
        train_by_recipe(task, trial, model, loss=method.make(task, **hyper), lr=lr, epochs=epochs)
        return measure(task, trial, model)

    return Arm(run, {"lr": task.recipe.lr, **method.defaults}, method.space, method.cites)


def arms(task: Task, methods: Mapping[str, Method], options: Options) -> tuple[dict[str, Arm], dict[str, Any]]:
    """Returns an arm per method, under one setting; the task's own loss only where it is not cross-entropy."""
    target = torch.as_tensor(task.train[0][1])
    if target.is_floating_point():
        raise UsageError(f"the losses of this family need class labels, but the targets of task {task.name!r} are {target.dtype}")
    plain = isinstance(task.loss, nn.CrossEntropyLoss)
    kept = {name: method for name, method in methods.items() if name != ("task's own" if plain else "cross-entropy")}
    return {name: _arm(task, method, options.epochs) for name, method in kept.items()}, {"": None}


FAMILY = Family(
    "loss", "losses on the same model, data and batches; bring a classifier and labelled data", BASELINES, "cross-entropy", arms,
    costs=("train_seconds", "peak_memory"),
)  # fmt: skip
