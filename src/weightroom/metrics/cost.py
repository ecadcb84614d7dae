"""What a model costs: parameters, multiply-accumulates, latency."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from weightroom.metrics.evaluate import device_of

__all__ = ["latency", "macs", "nonzero_parameters"]


def nonzero_parameters(model: nn.Module) -> int:
    """Parameters that are not zero, shared ones counted once; under a pruning mask only what the mask keeps."""
    masks = {name.removesuffix("_mask"): buffer for name, buffer in model.named_buffers() if name.endswith("_mask")}
    total = 0
    for name, parameter in model.named_parameters():
        mask = masks.get(name.removesuffix("_orig")) if name.endswith("_orig") else None
        total += int(torch.count_nonzero(parameter if mask is None else parameter * mask))
    return total


@torch.no_grad()
def macs(model: nn.Module, example_inputs: Tensor) -> int:
    """Multiply-accumulates of one forward pass (matrix products and convolutions), half of torch's FLOP count.

    Zeros count like any other number: this is what dense hardware does.
    """
    training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    with counter:
        model(example_inputs)
    model.train(training)
    return counter.get_total_flops() // 2


@torch.no_grad()
def latency(model: nn.Module, example_inputs: Tensor, *, repeats: int = 20) -> float:
    """Median seconds of a forward pass in eval mode, after three to warm up."""
    training = model.training
    model.eval()
    device = device_of(model)
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        model(example_inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    model.train(training)
    return statistics.median(times[3:])
