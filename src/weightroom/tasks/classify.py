"""Built-in classification and regression tasks, from data inside scikit-learn or under ``WEIGHTROOM_DATA``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weightroom import data
from weightroom.nets.small import MLP, ConvNet, ResNet
from weightroom.study import Recipe, Task

__all__ = ["breast_cancer", "cifar10", "diabetes", "digits", "mnist", "wine"]

Net = Literal["mlp", "cnn"]


def digits(net: Net = "mlp", hidden: Sequence[int] = (128, 128), *, epochs: int = 20) -> Task:
    """Handwritten digits, 8 x 8 (UCI optical digits, CC BY 4.0, in scikit-learn): 1,078 to train, 179 to validate, 540 to test.

    Its teacher is a wider network of the same kind.

    Args:
        net: a perceptron (of ``hidden`` widths) or a small CNN.
        hidden: widths of the perceptron's hidden layers.
        epochs: of the recipe (Adam 1e-3, batches of 64).
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images / 16).float().reshape(-1, 1, 8, 8)
    model = (lambda: ConvNet(1, 10)) if net == "cnn" else (lambda: MLP((64, *hidden, 10)))
    teacher: Any = (lambda: ConvNet(1, 10, channels=(64, 128))) if net == "cnn" else (lambda: MLP((64, 512, 512, 10)))
    name = "digits" if net == "mlp" else "digits, CNN"
    return _task(name, model, x, labels, ("accuracy", "nll"), Recipe(epochs=epochs), teacher=teacher)


def wine(hidden: Sequence[int] = (32, 32)) -> Task:
    """Wines by cultivar (UCI, CC BY 4.0, in scikit-learn): 178 x 13, 3 classes."""
    from sklearn.datasets import load_wine

    table, labels = load_wine(return_X_y=True)
    return _task(
        "wine", lambda: MLP((13, *hidden, 3)), _float(table), labels, ("accuracy", "nll"), Recipe(epochs=40, batch_size=16)
    )


def breast_cancer(hidden: Sequence[int] = (32, 32)) -> Task:
    """Breast tumours, benign or malignant (UCI, CC BY 4.0, in scikit-learn): 569 x 30."""
    from sklearn.datasets import load_breast_cancer

    table, labels = load_breast_cancer(return_X_y=True)
    metrics = ("accuracy", "balanced_accuracy", "nll")
    return _task("breast-cancer", lambda: MLP((30, *hidden, 2)), _float(table), labels, metrics, Recipe(epochs=30, batch_size=32))


def diabetes(hidden: Sequence[int] = (32, 32)) -> Task:
    """Progression of diabetes after a year (Efron et al. 2004, in scikit-learn): 442 x 10; the target has unit variance here."""
    from sklearn.datasets import load_diabetes

    table, target = load_diabetes(return_X_y=True)
    target = (target - target.mean()) / target.std()
    return _task(
        "diabetes", lambda: MLP((10, *hidden, 1)), _float(table), target[:, None].astype(np.float32), ("mse", "mae", "r2"),
        Recipe(epochs=30, batch_size=32), loss=nn.MSELoss(),
    )  # fmt: skip


def mnist(net: Net = "cnn", *, epochs: int = 5, download: bool = False, folder: Path | None = None) -> Task:
    """Handwritten digits, 28 x 28 (see ``weightroom.data.mnist`` for where they come from)."""
    model = (lambda: ConvNet(1, 10)) if net == "cnn" else (lambda: MLP((784, 256, 128, 10)))
    return _split("mnist", model, data.mnist(download=download, folder=folder), epochs)


def cifar10(blocks: Sequence[int] = (1, 1, 1), *, epochs: int = 10, download: bool = False, folder: Path | None = None) -> Task:
    """Small photographs of ten kinds of things (see ``weightroom.data.cifar10``), with a small ResNet."""
    train, train_labels, test, test_labels = data.cifar10(download=download, folder=folder)
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    arrays = ((train - mean) / std, train_labels, (test - mean) / std, test_labels)
    return _split("cifar10", lambda: ResNet(blocks=blocks), arrays, epochs, batch_size=128, schedule="cosine")


def _task(name: str, model: Any, x: Tensor, labels: Any, metrics: tuple[str, ...], recipe: Recipe, **more: Any) -> Task:
    """Splits 60 / 10 / 30 (fixed, the same for everybody) and scales tables by what the training part says."""
    y = torch.as_tensor(np.asarray(labels))
    train, val, test = data.split(TensorDataset(x, y), (0.6, 0.1, 0.3), seed=0)
    if x.ndim == 2:
        reference = train[:][0]
        mean, std = reference.mean(0), reference.std(0).clamp_min(1e-6)
        train, val, test = (TensorDataset((part[:][0] - mean) / std, part[:][1]) for part in (train, val, test))
    return Task(name, model=model, train=train, val=val, test=test, metrics=metrics, recipe=recipe, **more)


def _split(name: str, model: Any, arrays: tuple[Tensor, Tensor, Tensor, Tensor], epochs: int, **recipe: Any) -> Task:
    x, y, test_x, test_y = arrays
    train, val = data.split(TensorDataset(x, y), (0.9, 0.1), seed=0)
    test = TensorDataset(test_x, test_y)
    return Task(
        name, model=model, train=train, val=val, test=test, metrics=("accuracy", "nll"), recipe=Recipe(epochs=epochs, **recipe)
    )


def _float(table: np.ndarray) -> Tensor:
    return torch.from_numpy(table).float()
