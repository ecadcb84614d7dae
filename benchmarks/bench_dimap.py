"""DIMAP on the matrices of a Swin-T (25.9 M weights) and on one large layer, against LAMP as it is usually written, in float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.base import Race, measure, race
from weightroom.prune import DIMAPPruner, distortion_importance

SPARSITY = 0.55


def swin_t() -> nn.Module:
    torch.manual_seed(0)
    blocks = []
    for width, depth in ((96, 2), (192, 2), (384, 6), (768, 2)):
        for _ in range(depth):
            linear = lambda a, b: nn.Linear(a, b, bias=False)  # noqa: E731
            blocks.append(
                nn.ModuleDict(
                    {
                        "attn": nn.ModuleDict({"qkv": linear(width, 3 * width), "proj": linear(width, width)}),
                        "mlp": nn.ModuleDict({"fc1": linear(width, 4 * width), "fc2": linear(4 * width, width)}),
                    }
                )
            )
    return nn.ModuleList(blocks)


def usual_scores(weight: Tensor) -> Tensor:
    squares, order = weight.detach().square().flatten().sort(descending=True)
    scores = torch.empty_like(squares)
    scores[order] = squares / squares.cumsum(0)
    return scores.view(weight.shape)


def usual_masks(modules: list[list[Tensor]]) -> list[Tensor]:
    masks = []
    for weights in modules:
        scores = [usual_scores(weight) for weight in weights]
        pool = torch.cat([score.flatten() for score in scores])
        threshold = pool.kthvalue(round(SPARSITY * len(pool))).values
        masks += [score > threshold for score in scores]
    return masks


def races() -> Iterator[Race]:
    model = swin_t()
    pruner = DIMAPPruner(SPARSITY)
    modules = [[model.get_parameter(name) for name in names] for names in pruner.groups(model).values()]
    name = f"dimap scores and masks, {sum(w.numel() for ws in modules for w in ws) / 1e6:.1f} M weights"
    fit = lambda: pruner.fit(model)  # noqa: E731
    yield race(name, fit, "sort and cumsum in float32", lambda: usual_masks(modules), target=1.0, rounds=3)
    yield Race(name, "a second", min(measure(fit) for _ in range(3)), 1.0, None)
    weight = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    yield race(
        "dimap scores, one layer of 10 M weights",
        lambda: distortion_importance(weight),
        "sort and cumsum in float32",
        lambda: usual_scores(weight),
        target=1.0,
        rounds=3,
    )
