"""Weight compander (Cakaj, Mehnert, Yang, IJCNN 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from weightroom import data, train
from weightroom.compare.optimizer import OptimizerMethod
from weightroom.nets.small import MLP
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Scale, Study, Task, Trial
from weightroom.weights import WeightCompander, compand, compand_param_groups, fold

__all__ = ["PAPER", "study"]


def _method(model: nn.Module, lr: float, a: float, b: float, learnable: bool = False) -> Optimizer:
    return torch.optim.SGD(compand_param_groups(compand(model, a, b, learnable), lr), momentum=0.9)


_LR = (1e-3, 1.0, "log")
_SCALES = [0.1, 0.2, 0.5]

PAPER = Paper(
    key="weight-compander",
    number=11,
    family="optimizer",
    parts=(WeightCompander, compand, compand_param_groups, fold),
    title="Weight Compander: A Simple Weight Reparameterization for Regularization",
    authors="Rinor Cakaj, Jens Mehnert, Bin Yang",
    year=2023,
    venue="IJCNN",
    arxiv="2306.16993",
    summary="Trains v and computes with w = a arctan(v / b): each weight is bounded and pushed away from zero.",
    claim="Restricting the size of each weight while forcing it away from zero improves generalisation, in addition to standard "
    "regularisation; the two hyper-parameters can be learned.",
    limits="Of the paper only the abstract and the introduction were at hand: the arctan itself is taken from other knowledge of "
    "it, defaults and the treatment of layers are ours, and no number of the paper is quoted or checked. With a > b the "
    "network starts a / b times larger and steps (a / b)^2 times further near zero: hold any gain against plain training "
    "that does the same. On digits with clean labels that null arm was as good as the compander, both 0.8 points above "
    "tuned plain training. With 30 percent wrong labels the tight bound a = b = 0.1 brought two points over tuned weight "
    "decay (not certainly one) and no more than dropout; a / b = 2 cost five points and more. That the bound is soft helps: "
    "weights clipped at it were 1.7 points worse.",
    methods={
        "weight compander": OptimizerMethod(
            _method, {"lr": 0.05, "a": 0.2, "b": 0.1}, {"lr": _LR, "a": _SCALES, "b": _SCALES}, of="model", finish=fold
        ),
        "weight compander, learnt": OptimizerMethod(
            partial(_method, learnable=True), {"lr": 0.05, "a": 1.0, "b": 1.0}, {"lr": _LR}, of="model", finish=fold
        ),
    },
)

_BOUND = math.pi / 2
_BINS = 40


def _task(seed: int, noise: float) -> Task:
    """Digits, 150 to train and 200 to validate, both with wrong labels, and 1447 to test; split and noise depend on the seed."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    whole = TensorDataset(torch.from_numpy(images / 16).float(), torch.from_numpy(labels).long())
    n = len(whole)
    kept, val, test = data.split(whole, (150 / n, 200 / n, 1447 / n), seed=seed)
    task = Task("digits", model=lambda: MLP((64, 256, 256, 10)), train=kept, val=val, test=test)
    return task.spoil(label_noise=noise, seed=2 * seed)


def _matrices(model: nn.Module) -> list[Tensor]:
    return [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]


def _with_dropout(model: nn.Sequential, p: float) -> nn.Sequential:
    pairs = ((layer, nn.Dropout(p)) if isinstance(layer, nn.ReLU) else (layer,) for layer in model)
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


def _run(
    trial: Trial,
    *,
    rate: float = 1.0,
    start: float = 1.0,
    dropout: float = 0.0,
    clip: float = math.inf,
    compander: Mapping[str, Any] | None = None,
    factor: float = 0.1,
) -> dict[str, float]:
    """Trains with the rate and the first weights multiplied, with dropout, with weights clipped after each step, or companded."""
    task = _task(trial.seed, trial.setting)
    model: Any = task.model(seed=trial.seed)
    with torch.no_grad():
        torch._foreach_mul_(_matrices(model), start)
    if dropout:
        model = _with_dropout(model, dropout)
    if compander is not None:
        compand(model, **compander)

    def clip_weights(_: int) -> None:
        with torch.no_grad():
            for weight in _matrices(model):
                weight.clamp_(-clip, clip)

    lr, wd = rate * trial.params["lr"], trial.params["weight_decay"]
    done = train.fit(
        model,
        task.train,
        loss=task.loss,
        optimizer=torch.optim.SGD(compand_param_groups(model, lr, wd, factor), momentum=0.9),
        epochs=trial.scale.pick(2, 60, 60),
        batch_size=32,
        schedule="cosine",
        after_step=clip_weights if clip < math.inf else None,
        seed=trial.seed,
        device=trial.device,
    )
    trial.spend(train_seconds=done.seconds, steps=done.steps)
    slopes = [float(m.a.detach() / m.b.detach()) for m in model.modules() if isinstance(m, WeightCompander) and m.learnable]
    if compander is not None:
        fold(model)
    sizes = torch.cat([weight.detach().abs().flatten() for weight in _matrices(model)]).cpu()
    for i, count in enumerate(torch.histc(sizes, _BINS, 0.0, 0.4).tolist()):
        trial.log(0.4 * (i + 0.5) / _BINS, **{"share of weights, by |w|": count / len(sizes)})
    result = {
        "accuracy": task.evaluate(model, trial.split)["accuracy"],
        "near_zero": float((sizes < 0.01).float().mean()),
        "max_weight": float(sizes.max()),
    }
    if slopes:
        result["slope"] = sum(slopes) / len(slopes)
    return result


def study(scale: Scale) -> Study:
    """Digits with few samples, clean and with wrong labels: what does the compander add to plain training that is tuned?

    ``near_zero`` is the share of weights with \\|w\\| < 0.01, ``max_weight`` the largest \\|w\\|, ``slope`` the mean of a / b over
    the layers where it is learnt.
    """

    def arm(weight_decay: float = 5e-4, decays: tuple[float, ...] = (), **how: Any) -> Arm:
        space = {"lr": [0.1, 0.03], **({"weight_decay": list(decays)} if decays else {})}
        cites = (PAPER,) if "compander" in how else ()
        return Arm(partial(_run, **how), {"lr": 0.03, "weight_decay": weight_decay}, space, cites)

    def wc(a: float, b: float, **more: Any) -> dict[str, Any]:
        return {"compander": {"a": a, "b": b, **more}}

    def on(name: str, tuned: bool = True, setting: str = "label noise 0.3", metric: str | None = None) -> Expect:
        return Expect(name, metric, on=setting, tuned=tuned)

    tight, loose = "wc 0.1, 0.1, preserved", "wc 0.2, 0.1"
    return Study(
        name="weight-compander: digits with few samples",
        paper=PAPER,
        scale=scale,
        metric="accuracy",
        metrics={"near_zero": "min", "max_weight": "min", "slope": "max"},
        baseline="plain",
        settings={"clean": 0.0, "label noise 0.3": 0.3},
        arms={
            "plain": arm(decays=(5e-4, 5e-3, 2e-2)),
            "plain, weight decay 5e-3": arm(5e-3),
            "plain, weight decay 2e-2": arm(2e-2),
            "plain, 4 x rate": arm(rate=4.0),
            "plain, 2 x start": arm(start=2.0),
            "plain, 4 x rate, 2 x start": arm(rate=4.0, start=2.0),
            "plain, 1/3 x rate": arm(rate=1 / 3),
            "plain, dropout 0.3": arm(dropout=0.3),
            "plain, clipped": arm(clip=0.1 * _BOUND),
            loose: arm(**wc(0.2, 0.1)),
            tight: arm(**wc(0.1, 0.1, preserve=True)),
            "wc 0.2, 0.2, preserved": arm(**wc(0.2, 0.2, preserve=True)),
            "wc 1, 1": arm(**wc(1.0, 1.0)),
            "wc learnt": arm(**wc(1.0, 1.0, learnable=True)),
            "wc learnt at full rate": arm(factor=1.0, **wc(1.0, 1.0, learnable=True)),
        },
        expect=[
            Claim("Clean: WC(.2, .1) is above tuned plain training", on(loose, setting="clean").better_than("plain")),
            Claim("Clean: WC(.2, .1) is within a point of it", on(loose, setting="clean").equal_to("plain", within=0.01)),
            Claim(
                "Clean: WC(.2, .1) is above plain training that starts and steps as it does",
                on(loose, setting="clean").better_than("plain, 4 x rate, 2 x start"),
            ),
            Claim(
                "Clean: WC(.2, .1) leaves fewer weights near zero", on(loose, False, "clean", "near_zero").better_than("plain")
            ),
            Claim(
                "Clean: it leaves fewer of them than a larger start does",
                on(loose, False, "clean", "near_zero").better_than("plain, 2 x start"),
            ),
            Claim("Clean: WC(.2, .1) has a smaller largest weight", on(loose, False, "clean", "max_weight").better_than("plain")),
            Claim(
                "Wrong labels: WC(.1, .1) is a point above plain training with the same rate and decay",
                on(tight, False).better_than("plain", by=0.01),
            ),
            Claim("Wrong labels: WC(.1, .1) is a point above tuned weight decay", on(tight).better_than("plain", by=0.01)),
            Claim("Wrong labels: WC(.1, .1) is above a three times lower rate", on(tight).better_than("plain, 1/3 x rate")),
            Claim("Wrong labels: WC(.1, .1) is above dropout", on(tight).better_than("plain, dropout 0.3")),
            Claim("Wrong labels: WC(.1, .1) is above weights clipped at its bound", on(tight).better_than("plain, clipped")),
            Claim("Wrong labels: the expanding WC(.2, .1) is below plain training", on(loose, False).worse_than("plain")),
            Claim("Wrong labels: it is so too when both are tuned", on(loose).worse_than("plain")),
            Claim("No weight of WC(.1, .1) is beyond a pi / 2", on(tight, False, metric="max_weight").always(high=0.1 * _BOUND)),
            Claim(
                "Clean: learnt from a = b = 1, a / b rises above 1.2", on("wc learnt", False, "clean", "slope").within(low=1.2)
            ),
            Claim(
                "Clean: learning a and b at the full rate breaks training",
                on("wc learnt at full rate", False, "clean").worse_than("wc learnt", by=0.1),
            ),
        ],
        seeds=scale.pick(range(1), range(100, 120), range(100, 150)),
        tune=scale.pick(1, 6, 6),
        notes={
            "data": "digits of scikit-learn: 150 to train, 200 to validate, 1447 to test; the paper's own are CIFAR and ImageNet",
            "training": "64-256-256-10 perceptron, SGD with momentum 0.9, batches of 32, 60 epochs, cosine to zero; weight decay "
            "5e-4 but where it is named or tuned",
            "noise": "each label of the training and validation part is replaced with that probability by any class",
            "null arms": "4 x rate is (a / b)^2, 2 x start is a / b: what WC(.2, .1) does near zero without bounding anything; "
            "1/3 x rate: the tight bound also slows every weight down; clipped: weights are projected onto the bound of WC(.1, .1) after each step",
        },
    )
