"""Steps of Lion-K and the size of its state against AdamW's, on the tensors of a transformer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.base import Race, race
from weightroom.optim import LionK


def transformer(d: int, layers: int, vocabulary: int) -> list[Tensor]:
    """Weights with gradients: embeddings, attention and MLP matrices, biases and norms."""
    block = [(3 * d, d), (3 * d,), (d, d), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,), (d,), (d,), (d,), (d,)]
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in [(vocabulary, d), (512, d), *block * layers, (d,), (d,)]:
        p = (0.02 * torch.randn(shape, generator=generator)).requires_grad_()
        p.grad = torch.randn(shape, generator=generator)
        params.append(p)
    return params


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors an optimizer keeps."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def races() -> Iterator[Race]:
    for size, shape, target in (("10 M", (320, 6, 8000), 1.0), ("25 M", (512, 6, 12000), 0.9)):
        ours = LionK(transformer(*shape), lr=1e-4, weight_decay=1.0)
        peers = {name: AdamW(transformer(*shape), **{name: True}) for name in ("foreach", "fused")}
        for name, peer in peers.items():
            goal = target if name == "foreach" else None
            yield race(f"lion-k step, {size} weights", ours.step, f"AdamW({name}=True)", peer.step, target=goal)
        foreach = peers["foreach"]
        yield Race(f"lion-k state, {size} weights", "AdamW", state_bytes(ours), state_bytes(foreach), 0.51, unit="B")
    for kappa, args in {"trunc": {"e": 1e-3}, "l2": None, "linf": None}.items():
        other = LionK(transformer(320, 6, 8000), lr=1e-4, weight_decay=1.0, kappa=kappa, kappa_args=args)
        peer = AdamW(transformer(320, 6, 8000), foreach=True)
        yield race(f"lion-k step ({kappa}), 10 M weights", other.step, "AdamW(foreach=True)", peer.step)
