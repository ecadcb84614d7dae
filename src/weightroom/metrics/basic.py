"""Metrics of classifiers and regressors; each takes everything that a model says about a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weightroom.errors import TaskError, unknown

__all__ = ["accuracy", "balanced_accuracy", "mae", "minimised", "mse", "nll", "r2", "resolve", "top5"]


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose largest logit is the target's; logits (N, K, ...), targets (N, ...)."""
    return (outputs.argmax(1) == targets).double().mean()


def top5(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose target is among the five largest logits; logits (N, K), targets (N,)."""
    return (outputs.topk(min(5, outputs.shape[1])).indices == targets[:, None]).any(1).double().mean()


def balanced_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the classes present of the share found; logits (N, K), targets (N,)."""
    hit = (outputs.argmax(1) == targets).double()
    classes, inverse, counts = torch.unique(targets, return_inverse=True, return_counts=True)
    return (torch.zeros(len(classes), dtype=torch.float64, device=hit.device).index_add_(0, inverse, hit) / counts).mean()


def nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets; logits (N, K, ...), targets (N, ...). Lower is better."""
    return F.cross_entropy(outputs.double(), targets)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error; outputs and targets of one shape. Lower is better."""
    return (_like(outputs, targets).double() - targets).square().mean()


def mae(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error; outputs and targets of one shape. Lower is better."""
    return (_like(outputs, targets).double() - targets).abs().mean()


def r2(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of the targets' variance that is explained; 1 is perfect, 0 is their mean."""
    rest = (_like(outputs, targets).double() - targets).square().sum()
    return 1 - rest / (targets.double() - targets.double().mean()).square().sum()


_NAMED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    f.__name__: f for f in (accuracy, top5, balanced_accuracy, nll, mse, mae, r2)
}
_LOWER = (nll, mse, mae)
#: Metrics that compare logits with class labels.
CLASSIFICATION = (accuracy, top5, balanced_accuracy, nll)


def minimised(metric: Callable[..., Any]) -> bool:
    """Whether a metric of this module is better when lower."""
    return metric in _LOWER


def resolve(
    metrics: Mapping[str, Callable[..., Any]] | Iterable[str | Callable[..., Any]] | str,
) -> dict[str, Callable[..., Any]]:
    """Returns name -> function for names of this module, functions, or a mapping; the order is kept.

    Raises:
        UsageError: an unknown name.
        TaskError: none at all, or something that cannot be called.
    """
    if isinstance(metrics, Mapping):
        named = dict(metrics)
    else:
        named = {}
        for metric in [metrics] if isinstance(metrics, str) else metrics:
            if isinstance(metric, str):
                if metric not in _NAMED:
                    raise unknown("metric", metric, _NAMED)
                named[metric] = _NAMED[metric]
            else:
                named[getattr(metric, "__name__", str(metric))] = metric
    if not named:
        raise TaskError("a task needs at least one metric")
    for name, metric in named.items():
        if not callable(metric):
            raise TaskError(f"metric {name!r} must be callable as metric(outputs, targets), got {type(metric).__name__}")
    return named


def _like(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.shape == targets.shape:
        return outputs
    if outputs.numel() == targets.numel():
        return outputs.reshape(targets.shape)
    raise ValueError(f"outputs of shape {tuple(outputs.shape)} do not match targets of shape {tuple(targets.shape)}")
