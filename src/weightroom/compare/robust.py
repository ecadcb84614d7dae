"""Adversarial training: the same model, data and batches; each arm defends itself, all are attacked by a library's attacks.

A method is ``make(eps, bounds, **hyper) -> objective`` with ``objective(model, x, y) -> scalar``, an ``AdversarialObjective`` as a
rule. ``eps`` is the size of the perturbation in the largest norm, in the unit of the inputs, and ``bounds`` the range of the
inputs, that of the task's data. A hyper-parameter ``lr`` is the learning rate of the recipe's optimizer.

The attacks are Foolbox's, so that no objective is judged by the attack it was trained with: projected gradient descent on the
cross-entropy (20 steps) and the fast minimum-norm attack on the margin (50 steps).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from weightroom.adversarial import PGDAT, TRADES
from weightroom.compare.base import Family, Method, Options, measure, train_by_recipe
from weightroom.data import gather
from weightroom.errors import MissingExtraError, UsageError
from weightroom.study import Arm, Task, Trial

__all__ = ["FAMILY", "attacked"]

_LR = {"lr": (1e-4, 1e-1, "log")}
#: Size of the perturbation where none is asked for, as a share of the range of the inputs.
SHARE = 0.1


def _clean(eps: float, bounds: tuple[float, float]) -> Any:
    return lambda model, x, y: F.cross_entropy(model(x), y)


_PGD = """@inproceedings{madry2018towards,
  title = {Towards Deep Learning Models Resistant to Adversarial Attacks},
  author = {Aleksander Madry and Aleksandar Makelov and Ludwig Schmidt and Dimitris Tsipras and Adrian Vladu},
  year = {2018},
  booktitle = {ICLR}
}"""
_TRADES = """@inproceedings{zhang2019theoretically,
  title = {Theoretically Principled Trade-off between Robustness and Accuracy},
  author = {Hongyang Zhang and Yaodong Yu and Jiantao Jiao and Eric P. Xing and Laurent El Ghaoui and Michael I. Jordan},
  year = {2019},
  booktitle = {ICML}
}"""

BASELINES = {
    "clean": Method(_clean, space=_LR),
    "PGD-AT": Method(lambda eps, bounds: PGDAT(eps=eps, bounds=bounds), space=_LR, cites=(_PGD,)),
    "TRADES": Method(
        lambda eps, bounds, beta: TRADES(beta=beta, eps=eps, bounds=bounds), {"beta": 6.0}, {**_LR, "beta": [1.0, 2.0, 6.0]}, (_TRADES,)
    ),
}  # fmt: skip


def attacked(model: nn.Module, dataset: Dataset, eps: float, bounds: tuple[float, float], seed: int = 0) -> dict[str, float]:
    """Returns the accuracy of a classifier under Foolbox's attacks.

    Args:
        model: maps inputs (N, ...) within ``bounds`` to logits (N, K); it is attacked as a copy in eval mode.
        dataset: pairs of input and label.
        eps: size of the perturbation in the largest norm.
        bounds: least and greatest value of an input.
        seed: of the attacks' random starts.

    Returns:
        "pgd20_accuracy" and "fmn_accuracy", the shares of samples that each attack leaves right, and "worst_class_accuracy", the
        first of a label's samples alone, for the label where it is least.
    """
    attacks = _attacks()
    model = copy.deepcopy(model).eval().requires_grad_(False)
    device = next(iter([*model.parameters(), *model.buffers()])).device
    samples: Any = dataset
    right: dict[str, list[Tensor]] = {name: [] for name in attacks}
    labels = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for indices in torch.arange(len(samples)).split(256):
            x, y, *_ = (field.to(device) for field in gather(dataset, indices))
            labels.append(y)
            for name, attack in attacks.items():
                right[name].append(_survives(model, attack, x, y, eps, bounds))
    y = torch.cat(labels)
    pgd, fmn = (torch.cat(right[name]).double() for name in attacks)
    classes = y.unique()
    per_class = torch.stack([pgd[y == k].mean() for k in classes])
    return {
        "pgd20_accuracy": float(pgd.mean()),
        "fmn_accuracy": float(fmn.mean()),
        "worst_class_accuracy": float(per_class.min()),
    }


def _attacks() -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from foolbox import attacks
    except ImportError:
        raise MissingExtraError("foolbox", "robust", "the family 'robust'") from None
    return {
        "pgd20": attacks.LinfProjectedGradientDescentAttack(steps=20, rel_stepsize=0.125),
        "fmn": attacks.LInfFMNAttack(steps=50),
    }


def _survives(model: nn.Module, attack: Any, x: Tensor, y: Tensor, eps: float, bounds: tuple[float, float]) -> Tensor:
    from foolbox import PyTorchModel

    with torch.no_grad():
        right = model(x).argmax(1) == y
    if eps > 0 and right.any():  # FMN gives up on a batch in which a sample is wrong from the start
        foolish = PyTorchModel(model, bounds=bounds, device=x.device)
        _, _, fooled = attack(foolish, x[right], y[right], epsilons=eps)
        right[right.clone()] = ~fooled
    return right


def _arm(task: Task, method: Method, epochs: int | None, bounds: tuple[float, float]) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        eps = float(trial.setting)
        model = task.model(seed=trial.seed)
        hyper = dict(trial.params)
        lr = hyper.pop("lr", None)
        objective = method.make(eps, bounds, **hyper)
        if isinstance(objective, nn.Module):
            objective.to(trial.device)
        train_by_recipe(task, trial, model, step=lambda model, batch: objective(model, *batch[:2]), lr=lr, epochs=epochs)
        return {**measure(task, trial, model), **attacked(model, getattr(task, trial.split), eps, bounds, seed=trial.seed)}

    return Arm(run, {"lr": task.recipe.lr, **method.defaults}, method.space, method.cites)


def arms(task: Task, methods: Mapping[str, Method], options: Options) -> tuple[dict[str, Arm], dict[str, Any]]:
    """Returns an arm per method, under a setting per size of perturbation."""
    x, y, *_ = gather(task.train, torch.arange(1))
    if y.is_floating_point() or y.ndim != 1:
        raise UsageError(
            f"the family 'robust' needs one class label per sample; those of task {task.name!r} have shape {tuple(y.shape)}"
        )
    if not x.is_floating_point():
        raise UsageError(f"the family 'robust' needs inputs that can be perturbed; those of task {task.name!r} are {x.dtype}")
    _attacks()
    bounds = _range(task)
    sizes = tuple(options.eps) or (float(f"{SHARE * (bounds[1] - bounds[0]):.3g}"),)
    for eps in sizes:
        if not 0 <= eps < math.inf:
            raise UsageError(f"eps must be finite and >= 0, got {eps:g}")
    if len(set(sizes)) != len(sizes):
        raise UsageError(f"every eps may be given once, got {', '.join(f'{e:g}' for e in sizes)}")
    return {name: _arm(task, method, options.epochs, bounds) for name, method in methods.items()}, {f"{e:g}": e for e in sizes}


def _range(task: Task) -> tuple[float, float]:
    """Least and greatest input of all splits."""
    low, high = math.inf, -math.inf
    splits: list[Any] = [task.train, task.val, task.test]
    for dataset in splits:
        for indices in torch.arange(len(dataset)).split(1024):
            x = gather(dataset, indices)[0]
            low, high = min(low, float(x.min())), max(high, float(x.max()))
    return low, high


FAMILY = Family(
    "robust", "adversarial training, judged by Foolbox's attacks; bring a classifier and inputs in their natural range",
    BASELINES, "PGD-AT", arms, costs=("train_seconds", "forwards", "backwards", "peak_memory"),
    metrics={"pgd20_accuracy": "max", "fmn_accuracy": "max", "worst_class_accuracy": "max"}, metric="pgd20_accuracy",
)  # fmt: skip
