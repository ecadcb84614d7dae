"""Asking a model about a data set, and whether a model, its data, loss and metrics fit together."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import Dataset

from weightroom.data import gather, in_memory
from weightroom.errors import TaskError, UsageError
from weightroom.metrics.basic import CLASSIFICATION

__all__ = ["check_device", "check_fit", "copy_model", "device_of", "evaluating", "predict"]

#: Samples whose labels are looked at where reading them all would take long.
SAMPLED = 2000


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model without any."""
    tensor: Tensor | None = next(iter(model.parameters()), None)
    if tensor is None:
        tensor = next(iter(model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def copy_model(model: nn.Module) -> nn.Module:
    """Returns a deep copy without gradients; unlike ``copy.deepcopy`` it can copy masked modules after a training step."""
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    copy = deepcopy(model, memo)
    copy.zero_grad(set_to_none=True)
    return copy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; then every module's mode, and the masked weights that a pass recomputes, are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    values = [(m, hook._tensor_name, getattr(m, hook._tensor_name)) for m in model.modules() for hook in _mask_hooks(m)]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, attribute, value in values:
            setattr(module, attribute, value)


def _mask_hooks(module: nn.Module) -> list[torch_prune.BasePruningMethod]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, torch_prune.BasePruningMethod)]


def check_device(name: str) -> str:
    """Returns the torch device name for "cpu", "cuda", "cuda:1", "mps" or "auto" (the best there is).

    Raises:
        UsageError: the device is not there.
    """
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] + ["mps"] * torch.backends.mps.is_available()
    if name == "auto":
        return "cuda" if torch.cuda.device_count() else there[-1]
    if name not in (*there, *["cuda"] * bool(torch.cuda.device_count())):
        raise UsageError(f"device {name!r} is not there: this machine has {', '.join(there)}")
    return name


@torch.no_grad()
def predict(model: nn.Module, dataset: Dataset, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Returns the model's outputs and the targets for a whole data set, in its order, on the model's device.

    The model is put in eval mode for the call; every module's mode is then as it was.
    """
    device = device_of(model)
    outputs, targets = [], []
    with evaluating(model):
        for indices in torch.arange(len(cast(Sized, dataset))).split(batch_size):
            inputs, target, *_ = gather(dataset, indices)
            outputs.append(model(inputs.to(device)))
            targets.append(target.to(device))
    return torch.cat(outputs), torch.cat(targets)


def check_fit(
    model: nn.Module,
    splits: Mapping[str, Dataset],
    loss: Callable[[Tensor, Tensor], Tensor],
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any]],
    *,
    batch_size: int = 8,
    device: str = "cpu",
) -> None:
    """Runs a batch of each split through model, loss and metrics.

    Args:
        model: in eval mode for the call.
        splits: name -> data set; the first is the training data.
        loss: of the training.
        metrics: name -> function of outputs and targets.
        batch_size: samples to try.
        device: where to compute.

    Raises:
        TaskError: says which of them does not fit, with the shapes that were seen.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise TaskError("the model has no parameters to train")
    for name, dataset in splits.items():
        _check_split(model, name, dataset, loss, metrics, batch_size, device)


def _check_split(
    model: nn.Module, name: str, dataset: Dataset, loss: Callable[[Tensor, Tensor], Tensor],
    metrics: Mapping[str, Callable[[Tensor, Tensor], Any]], batch_size: int, device: str,
) -> None:  # fmt: skip
    count = min(batch_size, len(cast(Sized, dataset)))
    sample = _try(f"the data set cannot be read: {name}[0]", lambda: cast(Any, dataset)[0])
    if not isinstance(sample, tuple | list) or len(sample) < 2:
        raise TaskError(f"a sample of {name} must be a pair (input, target), got {type(sample).__name__}")
    fields = _try(f"the samples of {name} cannot be stacked", lambda: gather(dataset, torch.arange(count)))
    for part, field in zip(("input", "target"), fields, strict=False):
        if not isinstance(field, Tensor):
            raise TaskError(
                f"the {part} of a sample of {name} must be a tensor, an array or a number, got {type(sample[part == 'target']).__name__}"
            )
    model.to(device)
    inputs, target = fields[0].to(device), fields[1].to(device)
    training = model.training
    model.eval()
    with torch.no_grad():
        outputs = _try(f"the model cannot take an input of shape {tuple(inputs.shape)} and {inputs.dtype}", lambda: model(inputs))
    model.train(training)
    if not isinstance(outputs, Tensor):
        raise TaskError(f"the model must return one tensor, got {type(outputs).__name__}")
    seen = f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(target.shape)}, {target.dtype}"
    if outputs.shape[0] != count:
        raise TaskError(f"the model's output has the wrong shape: for {count} samples it has {outputs.shape[0]} rows; {seen}")
    if _is_labels(target) and isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and outputs.ndim == target.ndim + 1:
        _check_labels(name, dataset, outputs.shape[1], loss.ignore_index)
    if target.is_floating_point() and (odd := [m for m, f in metrics.items() if f in CLASSIFICATION]):
        raise TaskError(
            f"metric {odd[0]!r} needs class labels, but the targets are {target.dtype}: say metrics=['mse'], for instance"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using a target size")  # torch would broadcast, and train towards nonsense
        value = _try(f"the loss does not fit the model's output: {seen}", lambda: loss(outputs, target))
    if not isinstance(value, Tensor) or value.ndim != 0:
        raise TaskError(f"the loss must return a scalar tensor, got {getattr(value, 'shape', type(value).__name__)}")
    if not math.isfinite(float(value)):
        raise TaskError(f"the loss of the untrained model is {float(value)}; {seen}")
    for metric_name, metric in metrics.items():
        _try(
            f"metric {metric_name!r} does not fit the model's output: {seen}", functools.partial(_number, metric, outputs, target)
        )


def _number(metric: Callable[[Tensor, Tensor], Any], outputs: Tensor, target: Tensor) -> float:
    return float(metric(outputs, target))


def _check_labels(name: str, dataset: Dataset, classes: int, ignore: int) -> None:
    n = len(cast(Sized, dataset))
    looked_at = torch.arange(n) if in_memory(dataset) else torch.linspace(0, n - 1, min(n, SAMPLED)).long()
    labels = torch.cat([gather(dataset, i)[1].flatten() for i in looked_at.split(1024)])
    labels = labels[labels != ignore]
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        raise TaskError(
            f"labels out of range: {name} has labels from {int(labels.min())} to {int(labels.max())}, "
            f"but the model has {classes} outputs, so they must lie in 0..{classes - 1}"
        )


def _is_labels(target: Tensor) -> bool:
    return not target.is_floating_point() and not target.is_complex()


def _try(what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(
            f"{what} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
        ) from error
