"""A task: the model, the data, the loss and the metrics that every arm of a comparison is given."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from weightroom import data, metrics
from weightroom.errors import TaskError, UsageError, unknown

__all__ = ["ModelFactory", "Recipe", "Task"]

Metric = Callable[[Tensor, Tensor], "Tensor | float"]


@dataclass(frozen=True)
class Recipe:
    """How the baseline trains on a task; a comparison changes only what its family compares.

    Args:
        optimizer: "adam", "adamw" or "sgd".
        lr: learning rate.
        weight_decay: weight decay of the optimizer.
        momentum: momentum of SGD.
        epochs: passes over the training data.
        batch_size: samples per step.
        schedule: "cosine" (to zero over the run) or "constant".
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    epochs: int = 20
    batch_size: int = 64
    schedule: Literal["cosine", "constant"] = "constant"

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "adamw", "sgd"):
            raise unknown("optimizer", str(self.optimizer), ("adam", "adamw", "sgd"))
        if self.schedule not in ("cosine", "constant"):
            raise unknown("schedule", str(self.schedule), ("cosine", "constant"))
        for name, low in (("lr", 0.0), ("epochs", 0), ("batch_size", 0)):
            if not getattr(self, name) > low:
                raise UsageError(f"recipe: {name} must be > {low}, got {getattr(self, name)}")

    def make(self, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Returns the recipe's optimizer over ``params``."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer]
        return cls(params, lr=self.lr, weight_decay=self.weight_decay)


class ModelFactory:
    """Makes a fresh model whose initial weights depend on the seed alone.

    Args:
        source: an ``nn.Module`` class or a function that returns a module (called with no argument under a seeded
            generator), or a module, of which every call returns a copy: its weights are then the same for every seed.
    """

    def __init__(self, source: Callable[[], nn.Module] | nn.Module) -> None:
        if not isinstance(source, nn.Module) and not callable(source):
            raise TaskError(f"model must be an nn.Module or a function that returns one, got {type(source).__name__}")
        self.source = source

    def __call__(self, seed: int = 0) -> nn.Module:
        """Returns a new model for ``seed``; the global random state is left as it was."""
        if isinstance(self.source, nn.Module):
            return copy.deepcopy(self.source)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                model = self.source()
            except Exception as error:
                hint = "; where the class needs arguments, say model=lambda: Net(...)" if isinstance(self.source, type) else ""
                raise TaskError(f"model() failed ({type(error).__name__}: {error}){hint}") from error
        if not isinstance(model, nn.Module):
            raise TaskError(f"model() must return an nn.Module, got {type(model).__name__}")
        return model


@dataclass(frozen=True)
class Task:
    """What the user brings: a model, data, a loss and metrics. Frozen; ``spoil`` and ``with_`` return new tasks.

    Args:
        name: a short name for tables and reports.
        model: an ``nn.Module`` class, a function that returns a module, or a module (see ``ModelFactory``).
        train: data set of (input, target) pairs to train on.
        test: data set that decides; nothing is ever chosen on it.
        val: data set for tuning and early choices; a fifth of ``train`` is held out for it when None.
        loss: ``loss(outputs, targets) -> scalar``.
        metrics: names of functions in ``weightroom.metrics``, functions, or a mapping of name -> function; each is called
            once as ``metric(outputs, targets)`` on everything the model says about a split. The first one decides. None is
            "mse" where the targets are floating point, else "accuracy".
        lower_is_better: names of the metrics to minimise; known for the names in ``weightroom.metrics``.
        recipe: how the baseline trains, a ``Recipe`` or a dict of its arguments.
        teacher: for distillation, given as ``model`` is: a trained module, or what makes one that the recipe then trains. None
            is a second model of the student's architecture.

    Raises:
        TaskError: a data set is empty, or a part is not of the kind named above.
        UsageError: a metric is unknown.

    Example::

        def task():
            x, y = torch.randn(500, 8), torch.randint(3, (500,))
            return wr.Task("mine", model=lambda: nn.Linear(8, 3),
                           train=TensorDataset(x[:400], y[:400]), test=TensorDataset(x[400:], y[400:]))
    """

    name: str
    model: ModelFactory
    train: Dataset
    test: Dataset
    val: Dataset | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = field(default_factory=nn.CrossEntropyLoss)
    metrics: Mapping[str, Metric] | None = None
    lower_is_better: tuple[str, ...] = ()
    recipe: Recipe = field(default_factory=Recipe)
    teacher: ModelFactory | None = None

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        if not isinstance(self.model, ModelFactory):
            put("model", ModelFactory(self.model))
        if self.teacher is not None and not isinstance(self.teacher, ModelFactory):
            put("teacher", ModelFactory(self.teacher))
        for split in ("train", "test", "val"):
            dataset = getattr(self, split)
            if dataset is None and split == "val":
                continue
            if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
                raise TaskError(f"{split} must be a data set with len() and indexing, got {type(dataset).__name__}")
            if len(dataset) == 0:
                raise TaskError(f"{split} is an empty data set: a task needs at least one sample in it")
        if self.val is None:
            if len(cast(Any, self.train)) < 2:
                raise TaskError("train must have at least 2 samples to hold some out for validation, or give val")
            kept, held = data.split(self.train, (0.8, 0.2), seed=0)
            put("train", kept)
            put("val", held)
        if not callable(self.loss):
            raise TaskError(f"loss must be callable as loss(outputs, targets), got {type(self.loss).__name__}")
        put("metrics", metrics.resolve(_usual_metric(self.train) if self.metrics is None else self.metrics))
        named = (self.lower_is_better,) if isinstance(self.lower_is_better, str) else self.lower_is_better
        lower = {*named, *(name for name, fn in self._metrics.items() if metrics.minimised(fn))}
        if wrong := lower - set(self._metrics):
            raise unknown("metric in lower_is_better", min(wrong), self._metrics)
        put("lower_is_better", tuple(sorted(lower)))
        if isinstance(self.recipe, Mapping):
            accepted = set(inspect.signature(Recipe).parameters)
            if wrong := set(self.recipe) - accepted:
                raise unknown("recipe argument", min(wrong), accepted)
            put("recipe", Recipe(**self.recipe))

    @property
    def metric(self) -> str:
        """The metric that decides: the first."""
        return next(iter(self._metrics))

    @property
    def directions(self) -> dict[str, Literal["max", "min"]]:
        """Metric -> "max" or "min"."""
        return {name: "min" if name in self.lower_is_better else "max" for name in self._metrics}

    def with_(self, **changes: Any) -> Task:
        """Returns a copy with some arguments replaced."""
        return replace(self, **changes)

    def evaluate(
        self, model: nn.Module, split: Literal["train", "val", "test"] = "test", batch_size: int = 256
    ) -> dict[str, float]:
        """Returns every metric of the model on a split; the model's mode is left as it was."""
        outputs, targets = metrics.predict(model, getattr(self, split), batch_size=batch_size)
        return {name: float(metric(outputs, targets)) for name, metric in self._metrics.items()}

    def spoil(
        self,
        *,
        label_noise: float = 0.0,
        noise: Literal["uniform", "next"] = "uniform",
        imbalance: float = 1.0,
        samples: int | None = None,
        seed: int = 0,
    ) -> Task:
        """Returns a harder task: the training and validation data are spoilt, the test data never.

        Args:
            label_noise: probability in [0, 1] that a label of ``train`` or ``val`` is replaced.
            noise: "uniform" draws the new label from all classes (it may be the true one); "next" takes class k + 1 mod K.
            imbalance: >= 1; class k of K keeps a share of ``imbalance ** (-k / (K - 1))`` of its training samples.
            samples: keep only so many training samples, chosen at random.
            seed: of the choices above.
        """
        new = self
        if samples is not None:
            new = new.with_(train=data.take(new.train, samples, seed=seed), name=f"{new.name}, {samples} samples")
        if imbalance != 1.0:
            new = new.with_(train=data.imbalance(new.train, imbalance, seed=seed), name=f"{new.name}, imbalance {imbalance:g}")
        if label_noise:
            spoilt = {
                s: data.noisy_labels(getattr(new, s), label_noise, kind=noise, seed=seed + i)
                for i, s in enumerate(("train", "val"))
            }
            new = new.with_(**spoilt, name=f"{new.name}, {noise} label noise {label_noise:g}")
        return new

    def check(self, device: str = "cpu") -> None:
        """Runs one batch through model, loss and metrics, so that a task that does not fit together says so before any trial.

        Raises:
            TaskError: says which two things do not fit and what was seen.
        """
        splits = {"train": self.train, "val": cast(Dataset, self.val), "test": self.test}
        metrics.check_fit(
            self.model(), splits, self.loss, self._metrics, batch_size=min(8, self.recipe.batch_size), device=device
        )

    @property
    def _metrics(self) -> Mapping[str, Metric]:
        return cast(Mapping[str, Metric], self.metrics)


def _usual_metric(dataset: Dataset) -> str:
    sample = dataset[0]
    target = sample[1] if isinstance(sample, tuple | list) and len(sample) > 1 else 0
    return "mse" if isinstance(target, float) or (isinstance(target, Tensor) and target.is_floating_point()) else "accuracy"
