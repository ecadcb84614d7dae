"""M-FAC: matrix-free second-order pruning and optimisation (Frantar, Kurtic, Alistarh, NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR
from torch.utils.data import TensorDataset

from weightroom import curvature, optim, prune, tasks, train
from weightroom.compare.base import Method
from weightroom.compare.prune import PruneMethod
from weightroom.metrics import nonzero_parameters, predict
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Recipe, Scale, Study, Task, Trial

__all__ = ["PAPER", "study"]

PAPER = Paper(
    key="mfac",
    number=65,
    family="prune",
    parts=(prune.MFACPruner, optim.MFAC, curvature.EmpiricalFisherInverse),
    title="M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
    authors="Elias Frantar, Eldar Kurtic, Dan Alistarh",
    year=2021,
    venue="NeurIPS",
    arxiv="2107.03356",
    code="IST-DASLab/M-FAC",
    summary="Multiplies by the inverse of an empirical Fisher matrix without forming it: a pruner that corrects the weights it "
    "keeps, and an optimizer preconditioned by the last m gradients.",
    claim="Pruned with the full inverse Fisher, in a few rounds, a network keeps far more accuracy right after the cut than by "
    "magnitude or a diagonal Fisher; as an optimizer it beats SGD and Adam on a number of tasks without tuning.",
    limits="As a pruner it wants several rounds: one cut to a high sparsity is no better than LAMP, which needs no data. On digits "
    "the optimizer trains stably with its defaults (93 percent in ten epochs; ten times the learning rate diverges) and is "
    "ahead of Adam at the usual rate of 1e-3, which is low for Adam; with tuned rates Adam is ahead, and a window of one "
    "gradient is no worse; the paper's gains are on fine-tuned language models, out of reach here. Its step grows with the "
    "window (the first is g/(lambda + |g|^2/m)), and where gradients vanish it overshoots: decay the learning rate. Memory "
    "is m times that of the weights. The authors' code leaves the last row of the pruner's window zero, refuses closures, "
    "fails on parameters without gradients and truncates counts; the parts do none of that. The paper's recursions are "
    "replaced by one Cholesky factorisation in float64, with the same results.",
    methods={"M-FAC": PruneMethod(prune.MFACPruner, {}, {"damping": (1e-7, 1e-2, "log")})},
    also={"optimizer": {"m-fac": Method(optim.MFAC, {"lr": 1e-3}, {"lr": (1e-4, 1e-1, "log")})}},
)


def _task(scale: Scale, seed: int) -> Task:
    """Digits, split anew for each seed: 60 percent to train, 10 to validate, 30 to test, stratified; CIFAR-10 at full scale."""
    if scale is Scale.FULL:
        recipe = Recipe("sgd", lr=0.1, weight_decay=1e-4, epochs=164, batch_size=128)
        return tasks.cifar10((3, 3, 3)).with_(name="cifar10, ResNet-20", recipe=recipe)
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float().reshape(-1, 1, 8, 8), torch.from_numpy(labels)
    rest, test = train_test_split(range(len(y)), test_size=0.3, stratify=labels, random_state=seed)
    fit, val = train_test_split(rest, test_size=1 / 7, stratify=labels[rest], random_state=seed)
    parts = {name: TensorDataset(x[index], y[index]) for name, index in (("train", fit), ("val", val), ("test", test))}
    return tasks.digits(hidden=(64, 64), epochs=40).with_(**parts)


def _drops(optimizer: Optimizer, total: int) -> LRScheduler:
    """A tenth at half of the training and at three quarters: epochs 82 and 123 of 164."""
    return MultiStepLR(optimizer, [total // 2, 3 * total // 4])


# ---- pruning

Make = Callable[[float, Trial], prune.PlanPruner | None]

#: Gradients per round, batch per gradient, block (None: one), rounds.
_WINDOW, _BATCH, _BLOCK, _ROUNDS = (16, 128, 64), (16, 16, 32), (None, None, 128), (4, 8, 16)
_NO_CORRECTION = "M-FAC, no correction"


def _mfac(rounds: bool = True, diagonal: bool = False, block: int | None = None) -> Make:
    def make(sparsity: float, trial: Trial) -> prune.PlanPruner:
        pick = trial.scale.pick
        size = 1 if diagonal else block or pick(*_BLOCK)
        return prune.MFACPruner(
            sparsity, window=pick(*_WINDOW), block_size=size, recomputations=pick(*_ROUNDS) if rounds else 1, seed=trial.seed
        )

    return make


_PRUNERS: dict[str, Make] = {
    "dense": lambda sparsity, trial: None,
    "global magnitude": lambda sparsity, trial: prune.GlobalMagnitudePruner(sparsity),
    "LAMP": lambda sparsity, trial: prune.LAMPPruner(sparsity),
    "ERK": lambda sparsity, trial: prune.ERKPruner(sparsity),
    "uniform": lambda sparsity, trial: prune.UniformMagnitudePruner(sparsity),
    "random": lambda sparsity, trial: prune.RandomPruner(sparsity, seed=trial.seed),
    "diagonal, one round": _mfac(rounds=False, diagonal=True),
    "diagonal": _mfac(diagonal=True),
    "M-FAC, one round": _mfac(rounds=False),
    "M-FAC": _mfac(),
    "M-FAC, blocks of 128": _mfac(block=128),
    _NO_CORRECTION: _mfac(),
}


def _dense(trial: Trial, task: Task) -> nn.Module:
    """The trained network of the trial's seed."""
    model = task.model(seed=trial.seed).to(trial.device)

    def make() -> dict[str, Tensor]:
        recipe, full = task.recipe, trial.scale is Scale.FULL
        train.fit(
            model,
            task.train,
            loss=task.loss,
            optimizer=recipe.make,
            epochs=trial.scale.pick(5, recipe.epochs, recipe.epochs),
            batch_size=recipe.batch_size,
            schedule=_drops if full else "constant",
            seed=trial.seed,
        )
        return model.state_dict()

    model.load_state_dict(trial.cached("dense", make, task=task, seed=trial.seed, scale=trial.scale.value, device=trial.device))
    return model


def _without_correction(pruner: prune.MFACPruner, model: nn.Module, data: Any, loss: Callable[..., Tensor]) -> prune.PruningPlan:
    """M-FAC round by round, each plan stripped of its corrections."""
    for sparsity in prune.successive_sparsities(pruner.sparsity, pruner.recomputations):
        one = prune.MFACPruner(sparsity, pruner.window, pruner.damping, pruner.block_size, recomputations=1, seed=pruner.seed)
        plan = one.fit(model, data, loss_fn=loss)
        plan.deltas.clear()
        plan.apply(model)
    return plan


def _pruning_arm(name: str, make: Make) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        task = _task(trial.scale, trial.seed)
        model = _dense(trial, task)
        pruner = make(trial.setting, trial)
        result = {}
        if pruner is not None:
            batches = train.Batches(task.train, trial.scale.pick(*_BATCH), seed=trial.seed)
            data = [tuple(field.to(trial.device) for field in batch) for batch in batches]
            if name == _NO_CORRECTION and isinstance(pruner, prune.MFACPruner):
                plan = _without_correction(pruner, model, data, task.loss)
            else:
                plan = pruner.fit(model, data, loss_fn=task.loss)
                plan.apply(model)
            result["sparsity"] = plan.sparsity()
        if isinstance(pruner, prune.MFACPruner):
            trial.spend(backwards=pruner.window * pruner.recomputations)
        trial.spend(parameters=nonzero_parameters(model))
        return {"accuracy": task.evaluate(model, trial.split)["accuracy"], **result}

    return Arm(run, cites=(PAPER,) if "M-FAC" in name else ())


def _pruning(scale: Scale) -> Study:
    points = scale.pick((0.9,), (0.8, 0.9, 0.95), (0.5, 0.75, 0.875))
    settings = {f"{sparsity:g}": sparsity for sparsity in points}
    mild, high = ("0.75", "0.875") if scale is Scale.FULL else ("0.8", "0.9")

    def beats(other: str, on: str, by: float = 0.0) -> Claim:
        more = f" by more than {100 * by:g} points" if by else ""
        return Claim(f"at sparsity {on} it beats {other}{more}", Expect("M-FAC", on=on).better_than(other, by=by))

    claims = [
        beats("global magnitude", high, by=0.3),
        beats("global magnitude", mild, by=0.07),
        *(beats(other, on) for on in (high, mild) for other in ("diagonal", "LAMP", "ERK", "uniform")),
        Claim(
            f"rounds matter: one cut to {high} is worse by more than 20 points",
            Expect("M-FAC, one round", on=high).worse_than("M-FAC", by=0.2),
        ),
        Claim(
            f"the correction matters: without it M-FAC is worse by more than 10 points at {high}",
            Expect(_NO_CORRECTION, on=high).worse_than("M-FAC", by=0.1),
        ),
        Claim(
            f"blocks of 128 do as well as one block within two points at {high}",
            Expect("M-FAC, blocks of 128", on=high).not_worse_than("M-FAC", by=0.02),
        ),
        Claim(
            f"at {mild} pruning costs less than two points without fine-tuning",
            Expect("M-FAC", on=mild).not_worse_than("dense", by=0.02),
        ),
    ]
    epochs = scale.pick(5, 40, 164)
    return Study(
        name="mfac: pruning without fine-tuning",
        arms={name: _pruning_arm(name, make) for name, make in _PRUNERS.items()},
        metric="accuracy",
        metrics={"sparsity": "max"},
        baseline="global magnitude",
        settings=settings,
        expect=[claim for claim in claims if claim.expect.on in settings],
        seeds=scale.pick(range(1), range(100, 105), range(100, 103)),
        max_seeds=scale.pick(1, 10, 3),
        scale=scale,
        paper=PAPER,
        notes={
            "data": "digits, a stratified split of 60/10/30 for each seed, perceptron 64-64-64-10"
            if scale is not Scale.FULL
            else "CIFAR-10, ResNet-20",
            "training": f"{epochs} epochs, then pruned; accuracy right after, without fine-tuning",
            "M-FAC": f"{scale.pick(*_ROUNDS)} rounds of {scale.pick(*_WINDOW)} gradients of {scale.pick(*_BATCH)} samples, damping "
            f"1e-5, {'one block' if scale.pick(*_BLOCK) is None else 'blocks of 128'}",
            "diagonal": "the same with blocks of one weight: a diagonal Fisher, no correction",
        },
    )


# ---- the optimizer


def _sgd(params: Any, **hyper: Any) -> Optimizer:
    return torch.optim.SGD(params, momentum=0.9, **hyper)


_EARLY = 3


def _optimizer_arm(
    scale: Scale, make: Callable[..., Optimizer], lr: float, grid: list[float], cites: tuple[Any, ...] = ()
) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        task = _task(trial.scale, trial.seed)
        model = task.model(seed=trial.seed).to(trial.device)
        epochs = trial.scale.pick(2, 10, 164)
        early = min(_EARLY, epochs)
        result: dict[str, float] = {}

        def after(epoch: int, running: float) -> None:
            trial.log(epoch, loss=running)
            if epoch + 1 == early:
                with torch.no_grad():
                    outputs, targets = predict(model, task.train)
                    result["train_loss"] = float(task.loss(outputs, targets))

        done = train.fit(
            model,
            task.train,
            loss=task.loss,
            optimizer=lambda params: make(params, **trial.params),
            epochs=epochs,
            batch_size=task.recipe.batch_size,
            schedule=_drops if trial.scale is Scale.FULL else "constant",
            after_epoch=after,
            seed=trial.seed,
        )
        trial.spend(train_seconds=done.seconds, steps=done.steps)
        return {**result, "accuracy": task.evaluate(model, trial.split)["accuracy"]}

    return Arm(run, {"lr": lr}, {"lr": grid}, cites)


def _optimizer(scale: Scale) -> Study:
    decay = scale.pick(0.0, 0.0, 3e-3)

    def mfac(window: int) -> Callable[..., Optimizer]:
        return lambda params, **hyper: optim.MFAC(params, window=window, weight_decay=decay, **hyper)

    arms = {
        "sgd": _optimizer_arm(scale, _sgd, 0.05, [0.01, 0.03, 0.1, 0.3, 1.0]),
        "adam": _optimizer_arm(scale, torch.optim.Adam, 1e-3, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]),
        "m-fac": _optimizer_arm(scale, mfac(scale.pick(16, 128, 512)), 1e-3, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2], (PAPER,)),
        "m-fac, window 1": _optimizer_arm(scale, mfac(1), 1e-2, [1e-2, 3e-2, 0.1, 0.3, 1.0], (PAPER,)),
    }
    claims = []
    for tuned in (False, True):
        how = "with tuned learning rates" if tuned else "with usual learning rates"
        claims += [
            Claim(f"M-FAC trains to over 93 % {how}", Expect("m-fac", "accuracy", tuned=tuned).within(0.93, 1.0)),
            *(
                Claim(
                    f"after {_EARLY} epochs its training loss is below that of {other}, {how}",
                    Expect("m-fac", tuned=tuned).better_than(other),
                )
                for other in ("adam", "sgd")
            ),
        ]
    claims.append(
        Claim(
            "the window matters: with a single gradient, its learning rate tuned, the training loss is higher",
            Expect("m-fac, window 1", tuned=True).worse_than("m-fac"),
        )
    )
    return Study(
        name="mfac: the optimizer",
        arms=arms,
        metric="train_loss",
        direction="min",
        metrics={"accuracy": "max"},
        baseline="adam",
        expect=claims,
        seeds=scale.pick(range(1), range(100, 105), range(100, 103)),
        max_seeds=scale.pick(1, 10, 3),
        tune=scale.pick(2, 5, 5),
        scale=scale,
        paper=PAPER,
        notes={
            "training": f"{scale.pick(2, 10, 164)} epochs; train_loss is that of the whole training set after {_EARLY} epochs",
            "m-fac": f"window {scale.pick(16, 128, 512)}, damping 1e-5; the window of 1 is a normalised gradient",
        },
    )


def study(scale: Scale) -> list[Study]:
    """Two studies: pruning a trained network without fine-tuning, and the optimizer."""
    return [_pruning(scale), _optimizer(scale)]
