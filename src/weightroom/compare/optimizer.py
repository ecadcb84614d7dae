"""Optimizers: the same model, data, loss and batches; each arm steps in its own way.

A method is ``make(params, **hyper) -> torch.optim.Optimizer``; an ``OptimizerMethod`` may be handed the model instead, to
reparametrise it in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from weightroom.compare.base import Family, Method, Options, measure, train_by_recipe
from weightroom.study import Arm, Task, Trial

__all__ = ["FAMILY", "OptimizerMethod"]

_LR = (1e-4, 1e-1, "log")


@dataclass(frozen=True)
class OptimizerMethod(Method):
    """An optimizer that changes the model too.

    Args:
        of: what ``make`` gets first: the trainable parameters, or the model, which it may change in place.
        finish: called with the trained model before it is measured, to change it back.
    """

    of: Literal["params", "model"] = "params"
    finish: Callable[[nn.Module], Any] | None = None


def _sgd(params: Any, **hyper: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, momentum=0.9, **hyper)


BASELINES = {
    "adamw": Method(torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.01}, {"lr": _LR}),
    "adam": Method(torch.optim.Adam, {"lr": 1e-3}, {"lr": _LR}),
    "sgd": Method(_sgd, {"lr": 0.05}, {"lr": (1e-3, 1.0, "log")}),
    "rmsprop": Method(torch.optim.RMSprop, {"lr": 1e-3}, {"lr": _LR}),
}


def _arm(task: Task, method: Method, epochs: int | None) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        model = task.model(seed=trial.seed)
        of_model = getattr(method, "of", "params") == "model"
        make = lambda params: method.make(model if of_model else list(params), **trial.params)  # noqa: E731
        train_by_recipe(task, trial, model, optimizer=make, epochs=epochs)
        if (finish := getattr(method, "finish", None)) is not None:
            finish(model)
        return measure(task, trial, model)

    return Arm(run, method.defaults, method.space, method.cites)


def arms(task: Task, methods: Mapping[str, Method], options: Options) -> tuple[dict[str, Arm], dict[str, Any]]:
    """Returns an arm per method, under one setting."""
    return {name: _arm(task, method, options.epochs) for name, method in methods.items()}, {"": None}


FAMILY = Family(
    "optimizer", "optimizers on the same model, data and batches; bring a model, data and a loss", BASELINES, "adamw", arms,
    costs=("train_seconds", "steps", "peak_memory"),
)  # fmt: skip
