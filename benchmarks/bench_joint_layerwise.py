"""The dynamic programme against tables over every count, and the curves against a pass of the whole network for every amount."""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.base import Race, measure, race
from weightroom.nets.small import MLP, ResNet
from weightroom.prune import LAMPPruner, RDPruner, allocate_dp
from weightroom.prune.base import prunable

Array = NDArray[np.float64]


def resnet50() -> list[int]:
    """Weights of the 54 layers, 25.5 million in all."""
    sizes, channels = [3 * 64 * 49], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += [channels * width, width * width * 9, width * 4 * width]
            sizes += [channels * width * 4] if block == 0 else []
            channels = width * 4
    return [*sizes, 2048 * 1000]


def curves(layers: int, grid: int, *, rough: bool = False) -> Array:
    """What curves look like: flat at first, then steep, by orders of magnitude different between layers; rough where measured."""
    rng, a = np.random.default_rng(0), np.arange(grid + 1) / grid
    D = np.exp(rng.normal(0, 2, (layers, 1))) * a ** rng.uniform(2, 6, (layers, 1))
    return D * np.exp(rng.normal(0, 0.1, D.shape)) if rough else D


def released_loop(D: Array, sizes: list[int], sparsity: float, grid: int, chunk: int = 4096) -> list[int]:
    """The recursion over every count of surviving weights, as the authors' code runs it: float32, smallest layer first, in chunks
    of counts with all amounts at once. Corrected where that code is off by one."""
    order = np.argsort(sizes, kind="stable")
    survive = int((1 - sparsity) * sum(sizes)) + 1
    T = torch.full((len(sizes), survive), torch.inf)
    back = torch.zeros((len(sizes), survive), dtype=torch.long)
    before = torch.full((survive,), 0.0)
    for row, layer in enumerate(order):
        stays = torch.tensor([sizes[layer] - i * sizes[layer] // grid for i in range(grid + 1)])
        d = torch.tensor(D[layer], dtype=torch.float32)
        for start in range(0, survive, chunk):
            counts = torch.arange(start, min(survive, start + chunk))[:, None] - stays
            cost = torch.where(counts >= 0, d + before[counts.clamp_min(0)], torch.inf)
            back[row, start : start + chunk] = cost.argmin(1)
            T[row, start : start + chunk] = cost.min(1).values
        before = T[row]
    picks, left = [0] * len(sizes), survive - 1
    for row in reversed(range(len(sizes))):
        layer = int(order[row])
        picks[layer] = int(back[row, left])
        left -= sizes[layer] - picks[layer] * sizes[layer] // grid
    return picks


def table(D: Array, sizes: list[int], sparsity: float, grid: int) -> float:
    """The least cost, by a row over every count of removed weights, an amount at a time."""
    needed = int(np.ceil(sparsity * sum(sizes)))
    T = np.full(needed + 1, np.inf)
    T[0] = 0
    for d, n in zip(D, sizes, strict=True):
        row = np.full_like(T, np.inf)
        for i in range(grid + 1):
            k = min(i * n // grid, needed)
            np.minimum(row[k:], T[: needed + 1 - k] + d[i], out=row[k:])
            row[-1] = min(row[-1], T[needed - k :].min() + d[i])
        T = row
    return float(T[-1])


def cost(D: Array, picks: NDArray[np.int64] | list[int]) -> float:
    return float(D[np.arange(len(D)), picks].sum())


def peak_bytes(call: Callable[[], object]) -> int:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def plain_curves(model: nn.Module, x: Tensor, grid: int) -> Array:
    """One pass of the network for every layer and amount, with the smallest weights found anew each time."""
    model = copy.deepcopy(model).eval()
    places = prunable(model)
    D = np.zeros((len(places), grid + 1))
    with torch.no_grad():
        f = model(x)
        for row, place in enumerate(places):
            weight, original = place.tensor, place.tensor.detach().clone()
            for i in range(grid + 1):
                if k := i * weight.numel() // grid:
                    smallest = original.abs().flatten().topk(k, largest=False, sorted=False).indices
                    weight.copy_(original.flatten().index_fill(0, smallest, 0).view(weight.shape))
                D[row, i] = (f - model(x)).square().mean()
            weight.copy_(original)
    return D


def races() -> Iterator[Race]:
    sizes, P, S = resnet50(), 100, 0.58
    part = 256  # both tables cost time in proportion to the number of weights: hours and minutes for all of them
    small = [n // part for n in sizes]
    for rough in (False, True):
        D, name = (
            curves(len(sizes), P, rough=rough),
            f"joint-layerwise programme, ResNet-50, {'rough' if rough else 'smooth'} curves",
        )
        ours = partial(allocate_dp, D, sizes, S, P)
        seconds = min(measure(ours) for _ in range(5))
        for peer, call in (("the released loop", released_loop), ("a table of all counts", table)):
            once = measure(partial(call, D, small, S, P), 0)
            yield Race(name, f"{peer} ({part} times what 1/{part} takes)", seconds, part * once, 1 / 50)
        found = cost(D, np.rint(allocate_dp(D, small, S, P) * P).astype(int))
        yield Race(
            f"{name}, 1/{part}", "the released loop", found, cost(D, released_loop(D, small, S, P)), 1.001, unit="distortion"
        )
        yield Race(f"{name}, 1/{part}", "a table of all counts", found, table(D, small, S, P), 1 + 1e-9, unit="distortion")
        kept = int((1 - S) * sum(sizes))
        yield Race(name, "tables of the released code", peak_bytes(ours), len(sizes) * kept * 12, 1 / 50, unit="B")
    # How the cost grows: the ratio is 2 to the power of the exponent.
    one = (curves(54, P, rough=True), sizes, P)
    for what, (D, n, grid) in (
        ("layers", (curves(108, P, rough=True), sizes * 2, P)),
        ("grid", (curves(54, 2 * P, rough=True), sizes, 2 * P)),
        ("weights", (one[0], [2 * k for k in sizes], P)),
    ):
        twice, once = partial(allocate_dp, D, n, S, grid), partial(allocate_dp, *one[:2], S, P)
        yield race(f"joint-layerwise programme, twice the {what}", twice, "once", once, rounds=5)
        yield Race(f"joint-layerwise programme, twice the {what}", "once", peak_bytes(twice), peak_bytes(once), None, unit="B")
    torch.manual_seed(0)
    for name, model, x, grid in (
        ("ResNet of 10 layers, 16 images", ResNet(), torch.randn(16, 3, 32, 32), 10),
        ("ResNet-20, 8 images", ResNet(blocks=(3, 3, 3)), torch.randn(8, 3, 32, 32), 10),
        ("perceptron, 256 rows", MLP((64, 256, 256, 128, 10)), torch.randn(256, 64), 100),
    ):
        fit = partial(RDPruner(0.5, grid=grid).fit, model, [x])
        plain = partial(plain_curves, model, x, grid)
        assert np.allclose(fit().curves, plain(), rtol=1e-3, atol=1e-9)
        yield race(f"joint-layerwise fit, {name}", fit, "a whole pass for every amount", plain, target=0.6, rounds=2)
    model = MLP((64, 256, 256, 128, 10))
    fit = partial(RDPruner(0.5).fit, model, [torch.randn(256, 64)])
    yield race("joint-layerwise fit, perceptron, 256 rows", fit, "LAMPPruner", partial(LAMPPruner(0.5).fit, model), rounds=3)
