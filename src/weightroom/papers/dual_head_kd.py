"""Dual-head knowledge distillation (Yang, Zong, Huang, Feng, An, KDD 2025)."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weightroom import tasks, train
from weightroom.compare.base import Method
from weightroom.distill import BinaryKLLoss, BinaryKLNormLoss, DHKDObjective, DualHead, KDObjective, SoftmaxKDLoss
from weightroom.nets.small import ResNet
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Recipe, Scale, Study, Task, Trial

__all__ = ["PAPER", "study"]

_LR = (1e-4, 1e-1, "log")
_ALPHAS = [0.03, 0.1, 0.3, 1.0, 3.0]
_HINTON = """@inproceedings{hinton2014distilling,
  title = {Distilling the Knowledge in a Neural Network},
  author = {Geoffrey Hinton and Oriol Vinyals and Jeff Dean},
  year = {2014},
  booktitle = {NeurIPS Deep Learning Workshop}
}"""


class _DualHeadKD(DHKDObjective):
    """Gives the student its second head before training, and takes it away after."""

    def __init__(self, teacher: nn.Module, aux: Any = "linear", **hyper: Any) -> None:
        super().__init__(teacher, **hyper)
        self.aux = aux

    def prepare(self, model: nn.Module) -> DualHead:
        return DualHead(model, head=None, aux=self.aux)

    def finish(self, model: DualHead) -> nn.Module:
        return model.export()


def _method(aux: str, align: bool = False) -> Method:
    make = partial(_DualHeadKD, aux=aux, align=align)
    return Method(make, {"alpha": 1.0, "T": 2.0}, {"lr": _LR, "alpha": _ALPHAS, "T": [1.0, 2.0, 4.0]})


PAPER = Paper(
    key="dual-head-kd",
    number=70,
    family="distill",
    parts=(DHKDObjective, DualHead, BinaryKLLoss, BinaryKLNormLoss),
    title="Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
    authors="Penghui Yang, Chen-Chen Zong, Sheng-Jun Huang, Lei Feng, Bo An",
    year=2025,
    venue="KDD",
    arxiv="2411.08937",
    code="penghui-yang/DHKD",
    summary="Gives the student a second head for a loss on the teacher's logits, so that it does not disturb the head that classifies.",
    claim="A loss on logits, class by class, makes a student worse when it joins cross entropy on one linear classifier, even worse "
    "than either loss alone; on an auxiliary head, dropped after training, it makes the student better than other ways to distil.",
    limits="On Gaussian clusters with small perceptrons, the only place where it was run here, the two losses do not conflict: the "
    "cosine of their gradients is about +0.5 on the one head and on the backbone, late in training too. What hurts one head "
    "is that the logit-level loss, summed over classes, outweighs cross entropy: at weight 1 two heads were three points "
    "above one, but one head with a tenth of the weight was as good as two, and with the weight of every arm tuned (0.03 on "
    "one head, 0.3 on two) the difference was 0.4 points, and neither was above plain distillation. A weight found for 100 "
    "classes is not one for 1000. Gradient alignment over all parameters, as in the authors' code, leaves some conflict in "
    "the backbone and enlarges the head's own gradient; scope='shared' does neither. The authors' code clamps sigmoids at "
    "1e-8 and loses the gradient of large differences; the part does not.",
    methods={
        "dual head": _method("linear"),
        "dual head, nonlinear": _method("nonlinear"),
        "dual head, aligned": _method("linear", align=True),
    },
)

Make = Callable[..., Any]
_CLASSES, _NOISE = 40, 0.05


def _ce(teacher: nn.Module) -> KDObjective:
    return KDObjective(teacher, SoftmaxKDLoss(), kd=0.0)


def _kd(teacher: nn.Module, kd: float) -> KDObjective:
    return KDObjective(teacher, SoftmaxKDLoss(T=4.0), ce=1 - kd, kd=kd)


def _alone(teacher: nn.Module, alpha: float) -> KDObjective:
    return KDObjective(teacher, BinaryKLNormLoss(T=2.0), ce=0.0, kd=alpha)


def _single(teacher: nn.Module, alpha: float, loss: Callable[[], nn.Module] = BinaryKLNormLoss) -> KDObjective:
    return KDObjective(teacher, loss(), ce=1.0, kd=alpha)


def _dual(teacher: nn.Module, alpha: float, plain: bool = False, **how: Any) -> _DualHeadKD:
    return _DualHeadKD(teacher, alpha=alpha, loss=BinaryKLLoss() if plain else None, **how)


def _perceptron(*widths: int) -> nn.Module:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())]
    return nn.Sequential(OrderedDict(body=nn.Sequential(*layers), fc=nn.Linear(widths[-1], _CLASSES)))


def _clusters(seed: int) -> Task:
    """Two Gaussian clusters for each of 40 classes, in 20 dimensions, seen through tanh of 64 projections."""
    rng = np.random.default_rng(seed)
    M = 1.15 * rng.standard_normal((2 * _CLASSES, 20))
    W = rng.standard_normal((20, 64)) / np.sqrt(20)
    c = rng.integers(2 * _CLASSES, size=4000)
    z = M[c] + rng.standard_normal((4000, 20))
    x, y = torch.from_numpy(np.tanh(z @ W)).float(), torch.from_numpy(c % _CLASSES)
    parts = (TensorDataset(x[i:j], y[i:j]) for i, j in ((0, 1500), (1500, 2500), (2500, 4000)))
    names = ("train", "val", "test")
    return Task(
        "80 Gaussian clusters",
        model=partial(_perceptron, 64, 16, 16),
        teacher=partial(_perceptron, 64, 256, 256, 256),
        recipe=Recipe("sgd", lr=0.05, weight_decay=5e-4, epochs=30, batch_size=64, schedule="cosine"),
        **dict(zip(names, parts, strict=True)),
    )


def _photographs() -> Task:
    """CIFAR-10 with the networks and the recipe that the authors use on CIFAR-100, but a cosine schedule."""
    recipe = Recipe("sgd", lr=0.05, weight_decay=5e-4, epochs=240, batch_size=64, schedule="cosine")
    networks = {"model": partial(ResNet, blocks=(1, 1, 1), width=64), "teacher": partial(ResNet, blocks=(5, 5, 5), width=64)}
    return tasks.cifar10().with_(name="cifar10, ResNet-8x4", recipe=recipe, **networks)


def _fit(
    task: Task, trial: Trial, model: nn.Module, epochs: int, loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> train.Fit:
    """Trains by the task's recipe; the inputs of the clusters are jittered, alike in every arm."""
    generator, jitter = torch.Generator().manual_seed(trial.seed), trial.scale is not Scale.FULL

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        noise = torch.randn(x.shape, generator=generator).to(x) if jitter else 0
        return loss(model, x + _NOISE * noise, y)

    return train.fit(
        model,
        task.train,
        step=step,
        optimizer=task.recipe.make,
        epochs=epochs,
        batch_size=task.recipe.batch_size,
        schedule=task.recipe.schedule,
        seed=trial.seed,
        device=trial.device,
    )


def _teacher(task: Task, trial: Trial) -> nn.Module:
    model = task.teacher(seed=trial.seed).to(trial.device)

    def make() -> dict[str, Tensor]:
        _fit(task, trial, model, trial.scale.pick(2, 40, 240), lambda model, x, y: F.cross_entropy(model(x), y))
        return model.state_dict()

    model.load_state_dict(trial.cached("teacher", make, seed=trial.seed, scale=trial.scale.value, device=trial.device))
    return model.eval().requires_grad_(False)


def _cosines(objective: Any, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Cosine of the gradients of the two losses over the backbone, and over the head if both act on it."""
    probe = copy.deepcopy(model)
    heads = [layer for layer in probe.modules() if isinstance(layer, nn.Linear)][-1:]
    if isinstance(probe, DualHead):
        heads = [probe.aux, probe.student.get_submodule(probe.head)]  # type: ignore[list-item]
    of_heads = {id(p) for head in heads for p in head.parameters()}
    params = list(probe.parameters())
    terms = objective.terms(probe, x, y)
    if not all(term.requires_grad for term in terms):
        return {}
    g1, g2 = (torch.autograd.grad(term, params, retain_graph=True, allow_unused=True) for term in terms)
    result = {}
    for name, inside in (("cosine_head", True), ("cosine_backbone", False)):
        pairs = [
            (a.flatten(), b.flatten())
            for p, a, b in zip(params, g1, g2, strict=True)
            if a is not None and b is not None and (id(p) in of_heads) == inside
        ]
        if pairs:
            a, b = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            result[name] = float(F.cosine_similarity(a, b, dim=0))
    return result


def _run(trial: Trial, *, make: Make) -> dict[str, float]:
    task = _photographs() if trial.scale is Scale.FULL else _clusters(trial.seed)
    objective = make(_teacher(task, trial), **trial.params)
    student = task.model(seed=trial.seed).to(trial.device)
    if hasattr(objective, "prepare"):
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            student = objective.prepare(student)
    epochs = trial.scale.pick(2, task.recipe.epochs, task.recipe.epochs)
    late = epochs * -(-len(task.train) // task.recipe.batch_size) * 2 // 3
    steps, seen = count(), []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if (t := next(steps)) >= late and t % 10 == 0:
            with torch.random.fork_rng():  # the second head's dropout draws
                seen.append(_cosines(objective, student, x, y))
        return objective(model, x, y)

    done = _fit(task, trial, student, epochs, loss)
    trial.spend(train_seconds=done.seconds, steps=done.steps)
    if hasattr(objective, "finish"):
        student = objective.finish(student)
    angles = {name: float(np.mean([cosines[name] for cosines in seen])) for name in seen[0]}
    return {
        "accuracy": task.evaluate(student, trial.split)["accuracy"],
        "teacher_accuracy": task.evaluate(objective.teacher, trial.split)["accuracy"],
        **angles,
    }


def study(scale: Scale) -> Study:
    """40 classes that a small student finds hard: what a logit-level loss does to its head, and what a second head changes.

    Every arm that has a weight chooses it among five on the validation part, beside the common setting. The cosines are those of
    the two losses' gradients on mini-batches, averaged over the last third of the training; ``cosine_head`` exists where both
    losses act on one head.
    """

    def arm(make: Make, alpha: float = 1.0, tunes: bool = True, **how: Any) -> Arm:
        return Arm(partial(_run, make=partial(make, **how)), {"alpha": alpha}, {"alpha": _ALPHAS} if tunes else {}, (PAPER,))

    arms: Mapping[str, Arm] = {
        "ce": Arm(partial(_run, make=_ce)),
        "kd": Arm(partial(_run, make=_kd), {"kd": 0.9}, {"kd": [0.1, 0.3, 0.5, 0.7, 0.9]}, (_HINTON,)),
        "logit loss alone": arm(_alone),
        "one head, plain": arm(_single, loss=BinaryKLLoss),
        "one head": arm(_single),
        "one head, weight 0.1": arm(_single, alpha=0.1, tunes=False),
        "dual head": arm(_dual),
        "dual head, nonlinear": arm(_dual, aux="nonlinear"),
        "dual head, plain": arm(_dual, plain=True),
        "dual head, aligned": arm(_dual, align=True),
        "dual head, aligned where shared": arm(_dual, align=True, scope="shared"),
    }

    def above(name: str, other: str, by: float = 0.0, tuned: bool = False) -> Expect:
        return Expect(name, tuned=tuned).better_than(other, by=by)

    return Study(
        name="dual-head-kd: one head or two",
        paper=PAPER,
        scale=scale,
        metric="accuracy",
        metrics={"teacher_accuracy": "max", "cosine_head": "max", "cosine_backbone": "max"},
        baseline="ce",
        arms=arms,
        expect=[
            Claim("Two heads are two points above one head with the same losses", above("dual head", "one head", 0.02)),
            Claim("So they are with a nonlinear second head", above("dual head, nonlinear", "one head", 0.02)),
            Claim("One head with both losses is worse than with cross entropy alone", Expect("one head").worse_than("ce")),
            Claim("It is worse with the plain logit loss too", Expect("one head, plain").worse_than("ce")),
            Claim(
                "One head with both losses is worse than with the logit loss alone",
                Expect("one head").worse_than("logit loss alone"),
            ),
            Claim("Two heads are above cross entropy alone", above("dual head", "ce")),
            Claim("Two heads are above plain distillation", above("dual head", "kd")),
            Claim("Two heads are above one head with a tenth of the weight", above("dual head", "one head, weight 0.1")),
            Claim("Aligned gradients are better than the plain sum", above("dual head, aligned", "dual head")),
            Claim("The normalised logit loss is better than the plain one", above("dual head", "dual head, plain")),
            Claim(
                "On one head the two gradients oppose each other late in training",
                Expect("one head", "cosine_head").within(high=0.0),
            ),
            Claim(
                "On the backbone they are at right angles, within 0.1", Expect("one head", "cosine_backbone").within(-0.1, 0.1)
            ),
            Claim("With weights tuned, two heads are above one", above("dual head", "one head", tuned=True)),
            Claim("With weights tuned, they are above cross entropy alone", above("dual head", "ce", tuned=True)),
            Claim("With weights tuned, they are above plain distillation", above("dual head", "kd", tuned=True)),
        ],
        seeds=scale.pick(range(1), range(100, 112), range(3)),
        tune=scale.pick(1, 5, 5),
        notes={
            "seeds": "0 to 3 served to plan the study; others decide",
            "data": "two Gaussian clusters for each of 40 classes in 20 dimensions, through tanh of 64 random projections; 1500 rows to "
            "train, 1000 to validate, 1500 to test, others for every seed; the paper's own are CIFAR-100 and ImageNet",
            "networks": "teacher 64-256-256-256-40 (40 epochs), students 64-16-16-40 (30 epochs), batch norm and ReLU",
            "training": "SGD 0.05 with momentum 0.9, weight decay 5e-4, cosine to zero, batches of 64, input noise 0.05; teacher and "
            "student see the same noise",
        },
    )
