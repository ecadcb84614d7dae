"""DONE: doubly robust instance-reweighted adversarial training (Sow, Lin, Wang, Liang, ICLR 2024)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weightroom import data, train
from weightroom.adversarial import DONE, PGDAT, AdversarialObjective
from weightroom.compare.base import Method
from weightroom.losses import KLDROReduction
from weightroom.metrics import device_of, robust_correct, tail_robust_accuracy
from weightroom.nets.small import MLP
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Scale, Study, Task, Trial

__all__ = ["PAPER", "study"]

_LR = (1e-4, 1e-1, "log")


class _KLDROCrossEntropy(nn.Module):
    """Cross entropy, reduced by the worst case over the weights of the samples."""

    def __init__(self, r: float) -> None:
        super().__init__()
        self.reduction = KLDROReduction(r)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.reduction(F.cross_entropy(logits, target, reduction="none").flatten())


def _kl_dro(task: Task, r: float) -> nn.Module:
    return _KLDROCrossEntropy(r)


def _done(eps: float, bounds: tuple[float, float], r: float) -> DONE:
    return DONE(r, eps=eps, bounds=bounds)


PAPER = Paper(
    key="doubly-robust-at",
    number=43,
    family="robust",
    parts=(DONE, KLDROReduction, tail_robust_accuracy),
    title="Doubly Robust Instance-Reweighted Adversarial Training",
    authors="Daouda Sow, Sen Lin, Zhangyang Wang, Yingbin Liang",
    year=2024,
    venue="ICLR",
    arxiv="2308.00311",
    summary="Adversarial training that weighs the examples as the worst reweighting of the data would, for the robustness of weak classes.",
    claim="On four image data sets and imbalanced versions of them it is more robust on average than other reweightings, and more so "
    "on the weakest classes.",
    limits="Without a limit on the weights training can break: a single hard example gets ninety times the weight of a mean, the "
    "step it causes raises all losses, and the running mean then takes a hundred batches to come down, in which nothing is "
    "learnt. With r = 1 or less that happened to half of the runs on balanced digits or more; with weights of at most 20 "
    "one of ten ended at 77 percent and none collapsed; it happened to none with r = 3 or with weights of the batch alone "
    "(ema=1). On imbalanced digits, where it did not happen, the weakest classes gained nine points of robustness over "
    "PGD-AT, but weights by class frequency gained twenty-four, weights by the margin fourteen, and weights of the batch "
    "more than the running mean; the implicit gradient cost accuracy. It does matter which examples get the weights: "
    "shuffled ones harm. No code was released. What the names DONE-GD and DONE-ADAM of the paper's tables stand for could "
    "not be settled; the attack here takes sign steps, as PGD does.",
    methods={"DONE": Method(_done, {"r": 1.0}, {"lr": _LR, "r": [0.5, 1.0, 3.0]})},
    also={"loss": {"kl-dro": Method(_kl_dro, {"r": 1.0}, {"lr": _LR, "r": [0.5, 1.0, 3.0]})}},
)

_EPS, _STEPS, _FRACTION = 0.1, 7, 0.3
_BALANCED, _IMBALANCED = "balanced", "imbalanced 10:1"
_SETTINGS = {_BALANCED: 1.0, _IMBALANCED: 10.0}


def _split(seed: int, ratio: float) -> tuple[TensorDataset, TensorDataset]:
    """Digits: 900 to train, of which class k keeps a share of ratio ** (-k / 9), and 897 to test; the split depends on the seed."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    whole = TensorDataset(torch.from_numpy(images / 16).float(), torch.from_numpy(labels).long())
    kept, test = (TensorDataset(*part[:]) for part in data.split(whole, (900 / 1797, 897 / 1797), seed=seed))
    if ratio != 1:
        kept = TensorDataset(*data.imbalance(kept, ratio, seed=seed)[:])
    return kept, test


class _Weighted(AdversarialObjective):
    """Cross entropy at PGD's inputs, weighed by ``weigh(logits, y) -> (N,)``, of mean about one."""

    def __init__(self, weigh: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(eps=_EPS, steps=_STEPS)
        self.weigh, self.inner = weigh, PGDAT(eps=_EPS, steps=_STEPS)

    def forward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(self.inner.attack(model, x, y))
        return (self.weigh(logits.detach(), y) * F.cross_entropy(logits, y, reduction="none")).mean()


def _by_class(kept: TensorDataset) -> _Weighted:
    counts = torch.bincount(kept.tensors[1], minlength=10).float()
    weights = len(kept) / (10 * counts)
    return _Weighted(lambda logits, y: weights.to(y.device)[y])


def _by_margin(kept: TensorDataset) -> _Weighted:
    """As MAIL (Wang et al. 2021): the sigmoid of minus ten times the probability's margin, normalised in the batch."""

    def weigh(logits: Tensor, y: Tensor) -> Tensor:
        p = logits.softmax(1)
        right = p.gather(1, y[:, None])[:, 0]
        wrong = p.scatter(1, y[:, None], -1.0).amax(1)
        w = torch.sigmoid(-10 * (right - wrong))
        return w / w.mean()

    return _Weighted(weigh)


def _shuffled(kept: TensorDataset) -> _Weighted:
    """DONE's weights (r = 1), handed to the wrong examples of the batch."""
    reduction = KLDROReduction(1.0)  # follows its losses to their device

    def weigh(logits: Tensor, y: Tensor) -> Tensor:
        reduction(F.cross_entropy(logits, y, reduction="none"))
        w = len(y) * reduction.weights()
        return w[torch.randperm(len(y)).to(w.device)]

    return _Weighted(weigh)


def _of(**given: Any) -> Callable[[TensorDataset], AdversarialObjective]:
    return lambda kept: DONE(eps=_EPS, steps=_STEPS, **given)


_ARMS: dict[str, Callable[[TensorDataset], AdversarialObjective]] = {
    "PGD-AT": lambda kept: PGDAT(eps=_EPS, steps=_STEPS),
    "PGD-AT, class weights": _by_class,
    "DONE": _of(r=1.0),
    "DONE, r = 0.5": _of(r=0.5),
    "DONE, r = 3": _of(r=3.0),
    "DONE, weights of the batch": _of(r=1.0, ema=1.0),
    "DONE, implicit": _of(r=1.0, hypergradient="implicit"),
    "DONE, weights shuffled": _shuffled,
    "weights by the margin": _by_margin,
}


def _run(trial: Trial, *, make: Callable[[TensorDataset], AdversarialObjective]) -> dict[str, float]:
    kept, test = _split(trial.seed, trial.setting)
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        model = MLP((64, 128, 128, 10))
    objective = make(kept).to(trial.device)
    done = train.fit(
        model, kept, step=lambda model, batch: objective(model, *batch), optimizer=partial(
            torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
        epochs=trial.scale.pick(1, 30, 30), batch_size=64, schedule="cosine", seed=trial.seed, device=trial.device,
    )  # fmt: skip
    trial.spend(train_seconds=done.seconds, steps=done.steps, forwards=done.forwards, backwards=done.backwards, trainings=1.0)
    x, y = (field.to(device_of(model)) for field in test.tensors)
    right = robust_correct(model, x, y, _EPS, steps=trial.scale.pick(2, 30, 30), seed=trial.seed)
    with torch.no_grad():
        clean = (model.eval()(x).argmax(1) == y).double().mean()
    return {
        "tail": tail_robust_accuracy(right, y, _FRACTION),
        "tail_cross_fitted": tail_robust_accuracy(right, y, _FRACTION, cross_fitted=True),
        "robust": float(right.double().mean()),
        "clean": float(clean),
    }


_LIMITED = "DONE, weights at most 20"


def study(scale: Scale) -> list[Study]:
    """The study of the claim, and one of the limit on the weights that it showed to be needed."""
    return [_claim(scale), _limit(scale)]


def _limit(scale: Scale) -> Study:
    """Weights of at most 20 times the mean's, on starts of their own: the limit was thought of after the other study."""
    arms = {"PGD-AT": _ARMS["PGD-AT"], _LIMITED: _of(r=1.0, max_weight=20.0)}
    return Study(
        name="doubly-robust-at: a limit on the weights",
        arms={name: Arm(partial(_run, make=make)) for name, make in arms.items()},
        metric="tail",
        metrics={"tail_cross_fitted": "max", "robust": "max", "clean": "max"},
        settings=_SETTINGS,
        expect=[
            Claim(
                "On balanced data, with weights of at most 20, no training breaks",
                Expect(_LIMITED, "clean", _BALANCED).always(low=0.9),
            ),
            Claim(
                "On imbalanced data, with that limit, the weakest classes are more robust than with PGD-AT",
                Expect(_LIMITED, on=_IMBALANCED).better_than("PGD-AT"),
            ),
        ],
        seeds=scale.pick(range(1), range(200, 210), range(200, 210)),
        scale=scale,
        paper=PAPER,
    )


def _claim(scale: Scale) -> Study:
    """Digits, balanced and with a rarest class a tenth of the most frequent; attacks of 0.1 in the largest norm.

    Tail is the robust accuracy of the three worst classes of ten. They are chosen on the test set, as in the paper, and for
    "tail_cross_fitted" on one half of it and measured on the other.
    """
    better = lambda other, metric="tail", on=_IMBALANCED, arm="DONE": Expect(arm, metric, on).better_than(other)  # noqa: E731
    claims = [
        Claim("On imbalanced data the weakest classes are more robust than with PGD-AT", better("PGD-AT")),
        Claim("They are so, too, when chosen on other data than they are measured on", better("PGD-AT", "tail_cross_fitted")),
        Claim("On imbalanced data it is more robust on average than PGD-AT", better("PGD-AT", "robust")),
        Claim("On balanced data the weakest classes are more robust than with PGD-AT", better("PGD-AT", on=_BALANCED)),
        Claim("On balanced data it is more robust on average", better("PGD-AT", "robust", _BALANCED)),
        Claim(
            "On balanced data its clean accuracy is within a point of PGD-AT's",
            Expect("DONE", "clean", _BALANCED).equal_to("PGD-AT", within=0.01),
        ),
        Claim("On imbalanced data it beats weights by the margin on the weakest classes", better("weights by the margin")),
        Claim("On imbalanced data it beats weights by class frequency on the weakest classes", better("PGD-AT, class weights")),
        Claim("On imbalanced data it matters which examples get the weights", better("DONE, weights shuffled")),
        Claim("On imbalanced data the running mean beats the weights of a batch", better("DONE, weights of the batch")),
        Claim("The implicit gradient adds to the first order", better("DONE", arm="DONE, implicit")),
    ]
    return Study(
        name="doubly-robust-at: digits",
        arms={name: Arm(partial(_run, make=make)) for name, make in _ARMS.items()},
        metric="tail",
        metrics={"tail_cross_fitted": "max", "robust": "max", "clean": "max"},
        baseline="PGD-AT",
        settings=_SETTINGS,
        expect=claims,
        seeds=scale.pick(range(1), range(100, 110), range(100, 110)),
        scale=scale,
        paper=PAPER,
        notes={"attack": f"worst of PGD on the cross entropy and on the margin, 2 restarts each, eps {_EPS:g}"},
    )
