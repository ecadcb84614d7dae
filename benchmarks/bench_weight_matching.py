"""Weight matching against the loop of Git Re-Basin, written down in NumPy and SciPy: every permutation visited in every sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from benchmarks.base import Race, race
from weightroom.nets.small import MLP, ResNet
from weightroom.weights import PermutationSpec, weight_matching

State = dict[str, torch.Tensor]


def reference(spec: PermutationSpec, state_a: State, state_b: State, max_iter: int = 100, seed: int = 0) -> dict[str, np.ndarray]:
    """The authors' search, with our order of visits."""
    a, b = ({key: value.numpy() for key, value in state.items()} for state in (state_a, state_b))
    sizes = spec.sizes(state_a)
    perm = {name: np.arange(n) for name, n in sizes.items()}
    g = torch.Generator().manual_seed(seed)
    names = list(perm)
    for _ in range(max_iter):
        progress = False
        for i in torch.randperm(len(names), generator=g).tolist():
            name = names[i]
            n = sizes[name]
            A = np.zeros((n, n))
            for key, axis in spec.perm_to_axes[name]:
                if key.endswith(("running_mean", "running_var")):
                    continue
                w = b[key]
                for other, p in enumerate(spec.axes_to_perm[key]):
                    if p is not None and other != axis:
                        w = np.take(w, perm[p], axis=other)
                A += np.moveaxis(a[key], axis, 0).reshape(n, -1) @ np.moveaxis(w, axis, 0).reshape(n, -1).T
            _, best = linear_sum_assignment(A, maximize=True)
            old, new = np.vdot(A, np.eye(n)[perm[name]]), np.vdot(A, np.eye(n)[best])
            progress = progress or new > old + 1e-12
            perm[name] = best
        if not progress:
            break
    return perm


def pair(make: Callable[[], torch.nn.Module], x: torch.Tensor) -> tuple[PermutationSpec, State, State]:
    """Two networks that took a few steps towards the same random labels."""
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        y = torch.arange(len(x)) % 10
        for _ in range(10):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        states.append({key: value.detach().clone() for key, value in model.state_dict().items()})
    return PermutationSpec.trace(model, x), states[0], states[1]


def races() -> Iterator[Race]:
    g = torch.Generator().manual_seed(0)
    nets: dict[str, tuple[Callable[[], torch.nn.Module], torch.Tensor]] = {
        "perceptron 3 x 512": (lambda: MLP((784, 512, 512, 512, 10)), torch.rand(64, 784, generator=g)),
        "ResNet-20, width 32": (lambda: ResNet(blocks=(3, 3, 3), width=32), torch.rand(8, 3, 32, 32, generator=g)),
    }
    for name, (make, x) in nets.items():
        spec, a, b = pair(make, x)
        ours, theirs = weight_matching(spec, a, b), reference(spec, a, b)
        same = np.mean([np.mean(ours[p].numpy() == theirs[p]) for p in theirs])
        if same < 0.99:
            raise AssertionError(f"{name}: {same:.0%} of the units are matched alike")
        yield race(
            f"weight matching, {name}",
            lambda spec=spec, a=a, b=b: weight_matching(spec, a, b),  # type: ignore[misc]
            "Git Re-Basin's loop",
            lambda spec=spec, a=a, b=b: reference(spec, a, b),  # type: ignore[misc]
            target=1.1,
            rounds=5,
        )
