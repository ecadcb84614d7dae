"""The running statistics of batch norm, estimated anew: needed wherever weights change without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightroom.errors import UsageError
from weightroom.metrics import device_of

__all__ = ["gathering_statistics", "reestimate_batchnorm"]

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def reestimate_batchnorm(model: Model, loader: Iterable[Any]) -> Model:
    """Sets the running statistics of every batch norm to their mean over ``loader``, each sample counted once; returns the model.

    Only the batch-norm layers are in training mode for the pass; then every module's mode, momentum and count of batches is as
    it was. So are the statistics where the pass fails. A model without running statistics is left alone.

    Args:
        model: changed in place.
        loader: batches: the inputs, or tuples that begin with them; moved to the model's device. Inputs are a tensor (N, ...) or a
            dict of keywords; within such a tuple also a tuple of arguments. N >= 2 where a batch norm sees one value per sample
            and channel.

    Raises:
        ValueError: ``loader`` gives no batch.
        TypeError: a batch has no tensor.
    """
    if not _layers(model):
        return model
    device = device_of(model)
    seen = False
    with gathering_statistics(model) as count:
        for batch in loader:
            inputs = _moved(batch[0] if isinstance(batch, list | tuple) else batch, device)
            first = next(_tensors(inputs), None)
            if first is None:
                raise TypeError(f"loader must give tensors, got a batch of {type(batch).__name__} without any")
            count(len(first))
            if isinstance(inputs, dict):
                model(**inputs)
            else:
                model(*inputs if isinstance(inputs, list) else (inputs,))
            seen = True
    if not seen:
        raise UsageError("loader gave no batch")
    return model


@contextmanager
def gathering_statistics(*models: nn.Module) -> Iterator[Callable[[int], None]]:
    """For the block the models evaluate, except that their batch norms use each batch's statistics and gather them.

    Gives a function to be called with the size of each batch before it is passed; from its first call on, the running statistics
    are the mean over the batches seen, by size. At the end every module's mode, momentum and count of batches is as it was, and
    after an exception so are the statistics.
    """
    layers = [layer for model in models for layer in _layers(model)]
    modes = [(module, module.training) for model in models for module in model.modules()]
    kept = [(m, m.momentum, {name: buffer.clone() for name, buffer in m.named_buffers(recurse=False)}) for m in layers]
    seen = 0

    def count(samples: int) -> None:
        nonlocal seen
        for layer in layers:
            if seen == 0:
                layer.reset_running_stats()
            layer.momentum = samples / (seen + samples)  # the running mean is that of all samples so far
        seen += samples

    try:
        for model in models:
            model.eval()
        for layer in layers:
            layer.train()
        yield count
    except BaseException:
        for layer, _, buffers in kept:
            for name, buffer in buffers.items():
                layer.get_buffer(name).copy_(buffer)
        raise
    finally:
        for layer, momentum, buffers in kept:
            layer.momentum = momentum
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(buffers["num_batches_tracked"])
        for module, training in modes:
            module.training = training


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


def _moved(inputs: Any, device: torch.device) -> Any:
    """With the tensors among them on the device; a mapping as a dict, a sequence as a list."""
    if isinstance(inputs, Mapping):
        return {name: _moved(value, device) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return [_moved(value, device) for value in inputs]
    return inputs.to(device) if isinstance(inputs, Tensor) else inputs


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, dict | list):
        for value in inputs.values() if isinstance(inputs, dict) else inputs:
            yield from _tensors(value)
