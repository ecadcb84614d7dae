"""What the diagnostics share: copies of models that carry masks, and batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from weightroom.errors import UsageError
from weightroom.metrics import copy_model

__all__ = ["batches", "masks_of", "plain_copy"]


def plain_copy(model: nn.Module) -> nn.Module:
    """Returns a copy in eval mode that needs no gradients, with the masks of ``torch.nn.utils.prune`` made permanent."""
    copy = copy_model(model)
    for module in copy.modules():
        for name in _masked(module):
            torch_prune.remove(module, name)
    return copy.eval().requires_grad_(False)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Name of each masked parameter ("conv.weight") -> which entries stay, bool."""
    return {
        f"{path}.{name}" if path else name: getattr(module, f"{name}_mask") != 0
        for path, module in model.named_modules()
        for name in _masked(module)
    }


def batches(loader: Iterable[Any], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """The batches of one pass, on ``device``; the random state that a shuffling loader draws its order from is then as before.

    Raises:
        UsageError: there is none, or one is no sequence of tensors.
    """
    empty = True
    with torch.random.fork_rng(devices=[]):
        for batch in loader:
            if not isinstance(batch, list | tuple) or not all(isinstance(part, Tensor) for part in batch):
                raise UsageError(f"loader must give batches (inputs, targets) of tensors, got {type(batch).__name__}")
            empty = False
            yield tuple(part.to(device) for part in batch)
    if empty:
        raise UsageError("loader gave no batch: it must hold some, and give them anew at each pass (a generator does so once)")


def _masked(module: nn.Module) -> list[str]:
    names = [name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig")]
    return [name for name in names if f"{name}_mask" in module._buffers]
