"""Inner steps of SSO against as many forward and backward passes, and SSO against L-BFGS at equally many gradients of the loss.

The target is for the paper's mini-batch setting, where an inner step grows by 2^(|B|/n) and its first trial mostly does. With
``expand=2``, the default and the paper's full batch, nearly every first trial fails and each step takes two forward passes; that
race is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.base import Race, race
from weightroom.optim import SSO

Problem = tuple[nn.Module, Callable[[], Tensor], Callable[[Tensor], Tensor]]


def problem(kind: str) -> Problem:
    """A model, its outputs on a batch, and their loss, summed."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "perceptron":
            model: nn.Module = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        else:
            model = nn.Linear(1000, 10)
    x = torch.randn(512, next(model.parameters()).shape[1], generator=g)
    y = torch.randint(10, (512,), generator=g)
    return model, lambda: model(x), lambda z: F.cross_entropy(z, y, reduction="sum")


def passes(m: int, kind: str) -> Callable[[], None]:
    """m steps of SGD."""
    model, forward, oracle = problem(kind)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)

    def call() -> None:
        for _ in range(m):
            sgd.zero_grad()
            z = forward()
            (oracle(z) / len(z)).backward()
            sgd.step()

    return call


def steps(m: int, kind: str, expand: float) -> Callable[[], Tensor | None]:
    """One step of SSO."""
    model, forward, oracle = problem(kind)
    optimizer = SSO(model.parameters(), smoothness="ce", inner_steps=m, expand=expand, grad_tol=0.0)
    return lambda: optimizer.step(forward, oracle)


def loss_after(gradients: int, ours: bool) -> float:
    """The loss per sample of the linear model after so many gradients of it."""
    model, forward, oracle = problem("linear")
    if ours:
        sso = SSO(model.parameters(), smoothness="ce", inner_steps=100)
        for _ in range(gradients):
            sso.step(forward, oracle)
    else:
        lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=gradients, max_eval=gradients, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            lbfgs.zero_grad()
            z = forward()
            loss = oracle(z) / len(z)
            loss.backward()
            return loss

        lbfgs.step(closure)
    z = forward()
    return float(oracle(z).detach()) / len(z)


def races() -> Iterator[Race]:
    for kind in ("perceptron", "linear"):
        for m, expand, target in ((10, 2 ** (512 / 50_000), 1.3), (100, 2 ** (512 / 50_000), 1.3), (10, 2.0, None)):
            name = f"sso, {m} inner steps, {kind}, expand {expand:.3g}"
            yield race(
                name, steps(m, kind, expand), f"{m} steps of SGD", passes(m, kind), target=target, rounds=11 if m == 10 else 3
            )
    yield Race(
        "sso, loss after 20 gradients, linear", "LBFGS", loss_after(20, ours=True), loss_after(20, ours=False), None, "nats"
    )
