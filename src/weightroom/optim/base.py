"""What the optimizers share: checks of gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["check_dense"]


def check_dense(grads: Iterable[Tensor], optimizer: str) -> None:
    """Checks that no gradient is sparse.

    Args:
        grads: gradients of the parameters to be stepped.
        optimizer: its name, for the message.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    if any(g.layout != torch.strided for g in grads):
        raise RuntimeError(f"{optimizer} does not support sparse gradients: make the layer with sparse=False")
