"""Merging: several models of one architecture, trained from different seeds, become one.

A method is ``make(trained, **hyper)``, where ``trained`` is a ``Trained``. It returns the models' states, with their hidden units
brought into one order: these are averaged, and the loss is followed on the straight lines between them. Or it returns an
``nn.Module``, which is measured as it is.

Hyper-parameters of every method, which ``make`` does not see: ``models`` is how many are trained (3), and ``reset`` whether the
statistics of batch norm are re-estimated on training data (True): after merging, and at every point of a line.

The models are trained by the task's recipe, once for all arms. ``barrier`` is how far the training loss rises above the straight
line between the losses of two models, averaged over all pairs; the curve ``loss`` is the mean loss of all pairs on the way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from weightroom import data, train
from weightroom.compare.base import Family, Method, Options, measure, train_by_recipe
from weightroom.errors import UsageError
from weightroom.study import Arm, Task, Trial
from weightroom.weights import PermutationSpec, loss_path, reestimate_batchnorm
from weightroom.weights.weight_matching import mean_state

__all__ = ["FAMILY", "Ensemble", "Trained"]

MODELS, POINTS = 3, 11
#: Training samples, at the most, on which the loss on a line is taken and statistics are re-estimated.
SAMPLES = 5000


@dataclass
class Trained:
    """What a method of merging is given.

    Args:
        task: what the models were trained on.
        trial: whose models they are; gives the seed of what is random in a method, the scale and the device.
        states: the models' state dicts, on the trial's device.
    """

    task: Task
    trial: Trial
    states: list[dict[str, Tensor]]

    def model(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Returns a new model with that state, in eval mode."""
        model = self.task.model(seed=self.trial.seed).to(self.trial.device)
        model.load_state_dict(state)
        return model.eval()

    @cached_property
    def spec(self) -> PermutationSpec:
        """Which axes of the states move together."""
        return _spec(self.task)

    @cached_property
    def sample(self) -> Dataset:
        """Up to 5,000 training samples, the same for every arm."""
        samples: Any = self.task.train
        return data.take(samples, min(SAMPLES, len(samples)), seed=0)

    def batches(self, batch_size: int = 256) -> train.Batches:
        """Returns the batches of ``sample``, in its order."""
        return train.Batches(self.sample, batch_size, shuffle=False)


class Ensemble(nn.Module):
    """The mean of what several models say: of probabilities, as their logarithm, where the targets are class labels.

    Args:
        models: each maps inputs to outputs (N, K, ...).
        labels: whether the outputs are logits of K classes.
    """

    def __init__(self, models: list[nn.Module], labels: bool) -> None:
        super().__init__()
        self.models, self.labels = nn.ModuleList(models), labels

    def forward(self, x: Tensor) -> Tensor:
        """Inputs -> mean outputs (N, K, ...)."""
        outputs = torch.stack([model(x) for model in self.models])
        if not self.labels:
            return outputs.mean(0)
        return F.log_softmax(outputs, dim=2).logsumexp(0) - math.log(len(self.models))


def _average(trained: Trained) -> list[dict[str, Tensor]]:
    return trained.states


def _first(trained: Trained) -> nn.Module:
    return trained.model(trained.states[0])


def _best(trained: Trained) -> nn.Module:
    task = trained.task
    sign = 1 if task.directions[task.metric] == "max" else -1
    models = [trained.model(state) for state in trained.states]
    return max(models, key=lambda model: sign * task.evaluate(model, "val")[task.metric])


def _ensemble(trained: Trained) -> nn.Module:
    return Ensemble([trained.model(state) for state in trained.states], _labels(trained.task))


BASELINES = {
    "average": Method(_average),
    "first model": Method(_first, {"models": 1}),
    "best model": Method(_best),
    "ensemble": Method(_ensemble),
}


def _arm(task: Task, method: Method, epochs: int | None) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        hyper = dict(trial.params)
        count, reset = hyper.pop("models", MODELS), hyper.pop("reset", True)
        trained = Trained(task, trial, [_train(task, trial, i, epochs) for i in range(count)])
        trial.spend(trainings=count)
        made = method.make(trained, **hyper)
        if isinstance(made, nn.Module):
            return measure(task, trial, made)
        merged = trained.model(mean_state(made))
        if reset:
            reestimate_batchnorm(merged, trained.batches())
        return {**measure(task, trial, merged), **_lines(trained, made, reset)}

    return Arm(run, method.defaults, method.space, method.cites)


def _train(task: Task, trial: Trial, number: int, epochs: int | None) -> dict[str, Tensor]:
    """The state of a model whose initial weights and batches are decided by the trial's seed and its number."""
    seed = trial.seed + 100_003 * number
    model = task.model(seed=seed).to(trial.device)

    def make() -> dict[str, Tensor]:
        train_by_recipe(task, Trial(seed, trial.scale, device=trial.device), model, epochs=epochs, log=False)
        return model.state_dict()

    given = {"task": task, "seed": seed, "scale": trial.scale.value, "device": trial.device, "epochs": epochs}
    return {key: value.to(trial.device) for key, value in trial.cached("model", make, **given).items()}


def _lines(trained: Trained, states: list[dict[str, Tensor]], reset: bool) -> dict[str, float]:
    """The barrier, averaged over all pairs of states."""
    if len(states) < 2:
        return {}
    again = trained.batches() if reset else None
    barriers, curves, grid = [], [], list[float]()
    for a, b in itertools.combinations(states, 2):
        grid, losses = loss_path(trained.model(a), a, b, trained.batches(), trained.task.loss, POINTS, reset=again)
        barriers.append(max(loss - (losses[0] + t * (losses[-1] - losses[0])) for t, loss in zip(grid, losses, strict=True)))
        curves.append(losses)
    for t, values in zip(grid, zip(*curves, strict=True), strict=True):
        trained.trial.log(t, loss=sum(values) / len(values))
    return {"barrier": sum(barriers) / len(barriers)}


def _labels(task: Task) -> bool:
    return not torch.as_tensor(task.train[0][1]).is_floating_point()


def _spec(task: Task) -> PermutationSpec:
    samples: Any = task.train
    return PermutationSpec.trace(task.model(), torch.stack([torch.as_tensor(samples[i][0]) for i in range(2)]))


def arms(task: Task, methods: Mapping[str, Method], options: Options) -> tuple[dict[str, Arm], dict[str, Any]]:
    """Returns an arm per method, under one setting."""
    try:
        _spec(task)
    except NotImplementedError as error:
        raise UsageError(
            f"the family 'merge' cannot say which hidden units of task {task.name!r} may be exchanged: {error}"
        ) from None
    return {name: _arm(task, method, options.epochs) for name, method in methods.items()}, {"": None}


FAMILY = Family(
    "merge", "models trained from different seeds, merged into one; bring a perceptron, a plain or a residual network", BASELINES,
    "average", arms, costs=("trainings", "parameters", "flops", "latency"), metrics={"barrier": "min"},
)  # fmt: skip
