"""What the families share: the method that joins a comparison, and training by a task's recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from weightroom import metrics, train
from weightroom.study import Results, Task, Trial

__all__ = ["Family", "Method", "Options", "measure", "sample_inputs", "train_by_recipe"]


@dataclass(frozen=True)
class Method:
    """A way to make one method with given hyper-parameters; what ``make`` takes and returns is its family's matter.

    Args:
        make: the family's function, see ``weightroom.compare.<family>``.
        defaults: hyper-parameters of the common setting, passed to ``make`` by name.
        space: hyper-parameter -> choices for ``--tune`` (see ``weightroom.study.Arm``).
        cites: BibTeX of what a library brings; a paper of our own is cited by itself.
        unfit: says of a task why the method cannot be used on it; None, or nothing said, where it can. An unfit method is left
            out of a comparison.
    """

    make: Callable[..., Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Any] = field(default_factory=dict)
    cites: tuple[Any, ...] = ()
    unfit: Callable[[Task], str | None] | None = None


@dataclass(frozen=True)
class Options:
    """What the user of a comparison may choose beside the task.

    Args:
        sparsity: operating points of "prune".
        eps: sizes of the perturbation of "robust".
        epochs: instead of the recipe's.
        onnx: measure latency in ONNX Runtime too.
        export: leave the model of each trial in its folder, as ``model.safetensors`` and ``model.onnx``.
    """

    sparsity: Sequence[float] = ()
    eps: Sequence[float] = ()
    epochs: int | None = None
    onnx: bool = False
    export: bool = False


@dataclass(frozen=True)
class Family:
    """A kind of comparison.

    Args:
        name: on the command line.
        summary: one sentence: what is compared, and what the user brings.
        baselines: arms that come from libraries, or that are part of any such comparison.
        baseline: the arm that the others are compared with.
        arms: ``(task, methods, options) -> (arms, settings)``.
        costs: the costs worth showing in the terminal's table.
        metrics: metrics beyond the task's own -> direction.
        metric: the one of them that decides; the task's first when None.
        export: ``(results, folder) -> folders written``: copies the best models of a comparison that was run with
            ``Options(export=True)``; None where there is nothing to export.
    """

    name: str
    summary: str
    baselines: Mapping[str, Method]
    baseline: str
    arms: Callable[[Task, Mapping[str, Method], Options], tuple[Mapping[str, Any], Mapping[str, Any]]]
    costs: tuple[str, ...] = ("train_seconds", "parameters", "latency", "peak_memory")
    metrics: Mapping[str, Any] = field(default_factory=dict)
    metric: str | None = None
    export: Callable[[Results, Path], list[Path]] | None = None


def train_by_recipe(
    task: Task,
    trial: Trial,
    model: nn.Module,
    *,
    optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
    loss: Callable[..., Tensor] | None = None,
    step: Callable[[nn.Module, Any], Tensor] | None = None,
    data: Dataset | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    passed: Callable[[float], None] | None = None,
    log: bool = True,
) -> train.Fit:
    """Trains ``model`` on a task as its recipe says, except for what is given; counts the cost and logs the loss to the trial.

    Args:
        task: gives data, loss and recipe.
        trial: gives seed, device and scale ("smoke" trains two epochs at the most).
        model: trained in place.
        optimizer: makes another optimizer than the recipe's.
        loss: another loss than the task's.
        step: ``step(model, batch) -> loss`` instead of a loss of outputs and targets.
        data: another data set than the task's training data.
        epochs: another number than the recipe's.
        lr: another learning rate than the recipe's.
        passed: called after each step with the share of the training that has passed.
        log: record the curve of the training loss.
    """
    recipe = task.recipe
    epochs = recipe.epochs if epochs is None else epochs
    chosen = recipe if lr is None else type(recipe)(**{**vars(recipe), "lr": lr})
    data = task.train if data is None else data
    epochs = trial.scale.pick(min(2, epochs), epochs, epochs)
    total = epochs * math.ceil(len(cast(Sized, data)) / recipe.batch_size)
    done = train.fit(
        model, data, loss=task.loss if loss is None else loss, step=step, optimizer=chosen.make if optimizer is None else optimizer,
        epochs=epochs, batch_size=recipe.batch_size, schedule=recipe.schedule, seed=trial.seed, device=trial.device,
        after_step=lambda steps: None if passed is None else passed(steps / total),
        after_epoch=(lambda epoch, value: trial.log(epoch, loss=value)) if log else None,
    )  # fmt: skip
    trial.spend(train_seconds=done.seconds, steps=done.steps, forwards=done.forwards, backwards=done.backwards)
    return done


def measure(task: Task, trial: Trial, model: nn.Module, *, macs: float | None = None) -> dict[str, float]:
    """Returns the task's metrics on the trial's split; counts parameters, FLOPs and latency (a batch of 64) as costs.

    Args:
        task: gives data and metrics.
        trial: gives the split.
        model: measured.
        macs: multiply-accumulates of a sample, of a model that cannot be counted by its shapes.
    """
    inputs = sample_inputs(task).to(metrics.device_of(model))
    macs = metrics.macs(model, inputs[:1]) if macs is None else macs
    trial.spend(parameters=metrics.nonzero_parameters(model), flops=2 * macs, latency=metrics.latency(model, inputs))
    return task.evaluate(model, trial.split)


def sample_inputs(task: Task) -> Tensor:
    """Up to 64 test inputs, to time a model with."""
    dataset: Any = task.test
    return torch.stack([torch.as_tensor(dataset[i][0]) for i in range(min(64, len(dataset)))])
