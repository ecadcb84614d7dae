"""Patches: one clean model per seed, inputs that have become corrupted; each arm says what it takes to be accurate on them.

A method is ``make(origin, **hyper) -> (nn.Module, bytes)`` with an ``Origin``: the model that the recipe trained on clean data
(``pre``), and two that go on from it with one seed, ``clean`` on clean data and ``robust`` on data corrupted anew in every batch.
``clean`` may be changed. The bytes are what would have to be stored or sent beside the clean model.

The settings are the corruptions of ``weightroom.data.corruptions``, in the units of the task's training data: the range of images,
the mean and standard deviation of each feature of a table. Where the task's model is a module that the user has trained, it is
``pre``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightroom import metrics
from weightroom.compare.base import Family, Method, Options, measure, train_by_recipe
from weightroom.data import corrupt, corrupted, corruptions, gather
from weightroom.errors import UsageError
from weightroom.study import Arm, Task, Trial
from weightroom.train import Batches
from weightroom.weights import RobustWeightSignature, apply_, reestimate_batchnorm

__all__ = ["FAMILY", "Origin", "random_like"]

#: Share of the recipe's epochs for which the clean and the robust model go on.
FINE_TUNE = 0.4

Units = dict[str, Any]
Patched = tuple[nn.Module, int]


class Origin:
    """What a patch can be made from, in one trial.

    Args:
        task: model, data and recipe.
        trial: seed, device and the corruption (its setting).
        epochs: instead of the recipe's.
        units: offset and scale of the inputs, see ``weightroom.data.corrupt``.

    Attributes:
        seed: the trial's.
    """

    def __init__(self, task: Task, trial: Trial, epochs: int | None, units: Units) -> None:
        self._task, self._trial, self._epochs, self._units = task, trial, epochs, units
        self.seed = trial.seed

    @cached_property
    def pre(self) -> nn.Module:
        """The model that both others start from."""
        model = self._task.model(seed=self.seed).to(self._trial.device)
        if not isinstance(self._task.model.source, nn.Module):
            self._fill(model, "start", None, self._task.recipe.epochs if self._epochs is None else self._epochs)
        return model

    @cached_property
    def clean(self) -> nn.Module:
        """The model without any patch."""
        model = copy.deepcopy(self.pre)
        self._fill(model, "clean", None, self._further)
        return model

    @cached_property
    def robust(self) -> nn.Module:
        """The model that has seen corrupted data; what its training has cost is counted when it is asked for."""
        model = copy.deepcopy(self.pre)
        spent = self._fill(model, "robust", self._trial.setting, self._further)
        self._trial.spend(**spent, trainings=1.0)
        return model

    @property
    def batches(self) -> Batches:
        """Corrupted training data on the trial's device, as often as a method asks."""
        return _CorruptedBatches(self._task, self._trial, self._units)

    def signature(self, share: float, project: bool = True) -> RobustWeightSignature:
        """The signature of the first layers: a share of the convolution and linear layers without the last, rounded up."""
        return RobustWeightSignature.extract(self.pre, self.clean, self.robust, self.layers(share), project)

    def layers(self, share: float) -> int:
        """How many layers a share of them is."""
        if not 0 < share <= 1:
            raise UsageError(f"share must be in (0, 1], got {share:g}: it is the share of layers that the patch changes")
        return math.ceil(share * (_layers(self.pre) - 1))

    @property
    def _further(self) -> int:
        return max(1, round(FINE_TUNE * (self._task.recipe.epochs if self._epochs is None else self._epochs)))

    def _fill(self, model: nn.Module, name: str, kind: str | None, epochs: int) -> dict[str, float]:
        task, trial, units = self._task, self._trial, self._units

        def make() -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(3 * trial.seed)

            def step(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
                x = batch[0] if kind is None else corrupt(batch[0], kind, generator=generator, **units)
                return task.loss(model(x), batch[1])

            alone = Trial(trial.seed, trial.scale, device=trial.device)
            train_by_recipe(task, alone, model, step=step, epochs=epochs, log=False)
            return {**model.state_dict(), **{f"spent/{cost}": torch.tensor(v) for cost, v in alone.spent.items()}}

        given = {"task": task, "seed": trial.seed, "scale": trial.scale.value, "device": trial.device, "epochs": epochs}
        found = trial.cached(name, make, **given, total=self._epochs, kind=kind, units=units)
        model.load_state_dict({key: found[key] for key in model.state_dict()})
        return {key.removeprefix("spent/"): float(value) for key, value in found.items() if key.startswith("spent/")}


class _CorruptedBatches(Batches):
    def __init__(self, task: Task, trial: Trial, units: Units) -> None:
        super().__init__(task.train, task.recipe.batch_size, seed=trial.seed)
        self.trial, self.units = trial, units

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(3 * self.trial.seed)
        for x, *rest in super().__iter__():
            x = corrupt(x.to(self.trial.device), self.trial.setting, generator=generator, **self.units)
            yield x, *(field.to(self.trial.device) for field in rest)


def _none(origin: Origin) -> Patched:
    return origin.clean, 0


def _retrained(origin: Origin) -> Patched:
    return origin.robust, _bytes(origin.robust.state_dict())


def _batchnorm(origin: Origin) -> Patched:
    model = reestimate_batchnorm(origin.clean, origin.batches)
    statistics = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[2] in ("running_mean", "running_var")}
    return model, _bytes(statistics)


def _copied(origin: Origin, share: float) -> Patched:
    difference = RobustWeightSignature.extract(origin.clean, origin.clean, origin.robust, origin.layers(share), project=False)
    return apply_(origin.clean, difference, loader=origin.batches), difference.nbytes


def _random(origin: Origin, share: float) -> Patched:
    found = random_like(origin.signature(share), origin.seed)
    return apply_(origin.clean, found, loader=origin.batches), found.nbytes


def _mean(origin: Origin) -> Patched:
    model, robust = origin.clean, origin.robust.state_dict()
    mean = {name: (t + robust[name]) / 2 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    model.load_state_dict(mean)
    return reestimate_batchnorm(model, origin.batches), _bytes(mean)


BASELINES = {
    "none": Method(_none),
    "retrained on corrupted data": Method(_retrained),
    "batch norm re-estimated": Method(_batchnorm),
    "first layers of the retrained": Method(_copied, {"share": 0.5}, {"share": [0.25, 0.5, 0.75, 1.0]}),
    "random patch of equal norm": Method(_random, {"share": 0.5}),
    "mean of clean and retrained": Method(_mean),
}


def random_like(signature: RobustWeightSignature, seed: int) -> RobustWeightSignature:
    """Returns a patch of normal random tensors, each as long as the signature's."""
    generator = torch.Generator().manual_seed(seed)
    tensors, norms = {}, signature.norms
    for name, tensor in signature.items():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensors[name] = (drawn * (norms[name] / drawn.norm())).to(tensor)
    words = {key: getattr(signature, key) for key in ("architecture", "batchnorm", "models")}
    return RobustWeightSignature(tensors, corruption="random", **words)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _layers(model: nn.Module) -> int:
    return sum(name.rpartition(".")[2] == "weight" and t.ndim >= 2 for name, t in model.state_dict().items())


def _arm(task: Task, method: Method, epochs: int | None, units: Units) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        model, nbytes = method.make(Origin(task, trial, epochs, units), **trial.params)
        shifted = task.with_(
            **{
                s: corrupted(getattr(task, s), trial.setting, seed=3 * trial.seed + i, **units)
                for i, s in ((1, "val"), (2, "test"))
            }
        )
        outputs, targets = metrics.predict(model, getattr(task, trial.split))
        clean = float(metrics.accuracy(outputs, targets))
        return {**measure(shifted, trial, model), "clean_accuracy": clean, "patch_bytes": float(nbytes)}

    return Arm(run, method.defaults, method.space, method.cites)


def arms(task: Task, methods: Mapping[str, Method], options: Options) -> tuple[dict[str, Arm], dict[str, Any]]:
    """Returns an arm per method, under a setting per corruption; re-estimating batch norm only where there is some."""
    x, y, *_ = gather(task.train, torch.arange(1))
    if y.is_floating_point() or y.ndim != 1:
        raise UsageError(
            f"the family 'patch' needs one class label per sample; those of task {task.name!r} have shape {tuple(y.shape)}"
        )
    kinds = corruptions(x)
    model = task.model()
    if _layers(model) < 2:
        raise UsageError("the family 'patch' needs a model with at least two convolution or linear layers; this one has fewer")
    normed = any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules())
    units = _units(task)
    made = {
        name: _arm(task, method, options.epochs, units)
        for name, method in methods.items()
        if normed or method.make is not _batchnorm
    }
    return made, {kind: kind for kind in kinds}


def _units(task: Task) -> Units:
    dataset: Any = task.train
    x = torch.cat([gather(task.train, indices)[0] for indices in torch.arange(len(dataset)).split(1024)])
    if x.ndim == 4:
        low, high = float(x.min()), float(x.max())
        return {"offset": low, "scale": max(high - low, 1e-12)}
    return {"offset": x.mean(0), "scale": x.std(0).clamp_min(1e-12)}


FAMILY = Family(
    "patch", "making a clean model robust against corrupted inputs; bring a classifier of images or tables", BASELINES, "none", arms,
    costs=("train_seconds", "forwards", "trainings", "peak_memory"), metrics={"clean_accuracy": "max", "patch_bytes": "min"},
)  # fmt: skip
