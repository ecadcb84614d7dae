"""Learngene by stage-wise weight sharing (Xia, Zhu, Yang, Geng, IJCAI 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from weightroom import tasks, train
from weightroom.nets.small import MLP, ResNet
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Recipe, Scale, Study, Task, Trial
from weightroom.weights import StageSharedEncoder, build_descendant, default_source, learn_learngene, learngene_expand

__all__ = ["PAPER", "study"]

PAPER = Paper(
    key="learngene-sws",
    number=32,
    family="adapt",
    parts=(StageSharedEncoder, learngene_expand, default_source, learn_learngene, build_descendant),
    title="Exploring Learngene via Stage-wise Weight Sharing for Initializing Variable-sized Models",
    authors="Shi-Yu Xia, Wenxuan Zhu, Xu Yang, Xin Geng",
    year=2024,
    venue="IJCAI",
    arxiv="2404.16897",
    code="eddiexia98/SWS",
    summary="Trains a few transformer layers that work when they are repeated, and starts models of many depths from copies of them.",
    claim="Layers that are shared within the stages of a distilled auxiliary network carry over to descendants of other depths: after "
    "an epoch of tuning they are above training from scratch, at a fraction of the training and storage that a model for each size costs.",
    limits="It saves where several depths are wanted: for one, training the auxiliary network costs as much as training that "
    "model. The saving against pre-training and fine-tuning is one of storage and training; nothing here says that accuracy "
    "is above it. Run here on 8 x 8 digits alone, with vision transformers of width 32; ImageNet was not. There a "
    "descendant tuned for one epoch is 70 points above one trained from scratch for all, and the order of the stages is "
    "what does it (45 to 67 points); at depth 4, where each stage gives one layer, it is 5 points below the first layers of "
    "an unshared network, at depth 6 level with them. In the authors' code a descendant averages tokens before the final "
    "norm while the auxiliary network does so after it, and its norms have another eps, so that even a copy of the whole "
    "schedule is not the same function; their distillation loss is divided by batch times classes; their list for 12 layers "
    "gives the first stages more layers although the auxiliary network gives the middle one more. The part keeps the "
    "function, divides by the batch, and follows the list. It joins no comparison: what it makes is a model of another "
    "depth, not an adapter.",
)


@dataclass(frozen=True)
class _Setup:
    """Networks, and the rates and lengths of the three trainings."""

    image: int = 8
    patch: int = 2
    channels: int = 1
    width: int = 32
    heads: int = 4
    hidden: int = 64
    repeats: tuple[int, ...] = (2, 2, 2, 2)
    order: tuple[int, ...] = (2, 0, 3, 1)
    aux_epochs: int = 25
    aux_lr: float = 2e-3
    warmup: float = 20 / 425
    epochs: int = 5
    scratch_lr: float = 2e-3
    lr: float = 5e-4
    batch_size: int = 64
    depths: tuple[int, int] = (4, 6)


_SMALL = _Setup()
_SMOKE = _Setup(aux_epochs=1, warmup=0.5, epochs=2)
_FULL = _Setup(
    image=32, patch=4, channels=3, width=192, heads=3, hidden=768, repeats=(3, 3, 4, 3, 3), order=(2, 0, 4, 3, 1), aux_epochs=150,
    aux_lr=5e-4, warmup=1 / 30, epochs=10, scratch_lr=5e-4, lr=5e-5, batch_size=128, depths=(6, 12),
)  # fmt: skip


class _ViT(nn.Module):
    """Patches, learned positions, pre-norm layers, final norm, mean over tokens, linear head: images to logits of ten classes."""

    def __init__(self, setup: _Setup, repeats: tuple[int, ...]) -> None:
        super().__init__()
        block = partial(
            nn.TransformerEncoderLayer, setup.width, setup.heads, setup.hidden, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.embed = nn.Conv2d(setup.channels, setup.width, setup.patch, setup.patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (setup.image // setup.patch) ** 2, setup.width))
        self.encoder = StageSharedEncoder(block, repeats)
        self.norm = nn.LayerNorm(setup.width)
        self.head = nn.Linear(setup.width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.encoder(x)).mean(1))

    def no_weight_decay(self) -> set[str]:
        return {"position"}


def _setup(scale: Scale) -> _Setup:
    return scale.pick(_SMOKE, _SMALL, _FULL)


def _task(scale: Scale) -> Task:
    if scale is Scale.FULL:
        task, teacher = tasks.cifar10(), partial(ResNet, blocks=(3, 3, 3), width=64)
        return task.with_(teacher=teacher, recipe=Recipe("sgd", lr=0.1, weight_decay=5e-4, epochs=60, schedule="cosine"))
    task = tasks.digits().spoil(samples=scale.pick(200, None, None))
    return task.with_(teacher=lambda: MLP((64, 256, 10)), recipe=Recipe(epochs=scale.pick(2, 30, 30)))


_SPENT = "spent/"


def _with_cost(model: nn.Module, done: train.Fit) -> dict[str, Tensor]:
    costs = {"train_seconds": done.seconds, "steps": done.steps, "forwards": done.forwards, "backwards": done.backwards}
    return {**model.state_dict(), **{_SPENT + cost: torch.tensor(float(value)) for cost, value in costs.items()}}


def _take(model: nn.Module, found: dict[str, Tensor], trial: Trial) -> None:
    """Loads what ``_with_cost`` has kept; its training counts for every trial that builds on it, whichever has run it."""
    model.load_state_dict({name: tensor for name, tensor in found.items() if not name.startswith(_SPENT)})
    model.to(trial.device)
    costs = {name.removeprefix(_SPENT): float(value) for name, value in found.items() if name.startswith(_SPENT)}
    trial.spend(trainings=1, **costs)


def _teacher(task: Task, trial: Trial) -> nn.Module:
    assert task.teacher is not None
    model, recipe = task.teacher(seed=trial.seed).to(trial.device), task.recipe

    def make() -> dict[str, Tensor]:
        done = train.fit(
            model, task.train, loss=task.loss, optimizer=recipe.make, epochs=recipe.epochs, batch_size=recipe.batch_size,
            schedule=recipe.schedule, seed=trial.seed, device=trial.device,
        )  # fmt: skip
        return _with_cost(model, done)

    found = trial.cached("learngene-teacher", make, seed=trial.seed, scale=trial.scale.value, device=trial.device)
    _take(model, found, trial)
    return model


def _fresh(trial: Trial, repeats: tuple[int, ...]) -> _ViT:
    """The same embedding, norm and head for every depth: the layers have random numbers of their own."""
    setup = _setup(trial.scale)
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        rest = _ViT(setup, (1,))
        torch.manual_seed(trial.seed + 10_000)
        model = _ViT(setup, repeats)
    _inherit_rest(model, rest)
    return model.to(trial.device)


def _inherit_rest(model: _ViT, other: _ViT) -> None:
    kept = {name: tensor for name, tensor in other.state_dict().items() if not name.startswith("encoder")}
    model.load_state_dict(kept, strict=False)


def _distilled(trial: Trial, repeats: tuple[int, ...]) -> _ViT:
    """A network of that schedule after distillation: shared in stages where a repeat is above 1."""
    setup, task, model = _setup(trial.scale), _task(trial.scale), _fresh(trial, repeats)
    teacher = _teacher(task, trial)

    def make() -> dict[str, Tensor]:
        done = learn_learngene(
            model, teacher, task.train, setup.aux_epochs, lr=setup.aux_lr, warmup=setup.warmup, batch_size=setup.batch_size,
            seed=trial.seed, device=trial.device,
        )  # fmt: skip
        done.forwards += done.steps  # the teacher's
        return _with_cost(model, done)

    given: dict[str, Any] = {"seed": trial.seed, "scale": trial.scale.value, "device": trial.device, "repeats": list(repeats)}
    _take(model, trial.cached("learngene-distilled", make, **given), trial)
    return model


Start = Callable[[Trial, int], "tuple[nn.Module, nn.Module | None]"]


def _scratch(trial: Trial, depth: int) -> tuple[nn.Module, None]:
    return _fresh(trial, (1,) * depth), None


def _rest_only(trial: Trial, depth: int) -> tuple[nn.Module, None]:
    model = _fresh(trial, (1,) * depth)
    _inherit_rest(model, _distilled(trial, _setup(trial.scale).repeats))
    return model, None


def _sws(trial: Trial, depth: int) -> tuple[nn.Module, nn.Module]:
    aux = _distilled(trial, _setup(trial.scale).repeats)
    return build_descendant(aux, depth), aux.encoder


def _permuted(trial: Trial, depth: int) -> tuple[nn.Module, None]:
    """The values of every tensor of the inherited layers, each layer's in an order of its own."""
    model, _ = _sws(trial, depth)
    generator = torch.Generator().manual_seed(trial.seed)
    for p in model.encoder.parameters():  # type: ignore[union-attr]
        p.data = p.data.flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view_as(p)
    return model, None


def _shuffled(trial: Trial, depth: int) -> tuple[nn.Module, nn.Module]:
    setup = _setup(trial.scale)
    aux = _distilled(trial, setup.repeats)
    aux.encoder.blocks = nn.ModuleList(aux.encoder.blocks[stage] for stage in setup.order)
    return build_descendant(aux, depth), aux.encoder


def _first_layers(trial: Trial, depth: int) -> tuple[nn.Module, nn.Module]:
    pretrained = _distilled(trial, (1,) * sum(_setup(trial.scale).repeats))
    return build_descendant(pretrained, depth, source=range(depth)), pretrained.encoder


def _repeated(trial: Trial, depth: int) -> tuple[nn.Module, nn.Module]:
    pretrained = _distilled(trial, (1,) * len(_setup(trial.scale).repeats))
    return build_descendant(pretrained, depth), pretrained.encoder


def _run(trial: Trial, *, start: Start, last: bool = False, total: bool = False) -> dict[str, float]:
    """Tunes for ``epochs`` (``total``: as many as auxiliary network and tuning take); "accuracy" is that after the first (or last)."""
    setup, task = _setup(trial.scale), _task(trial.scale)
    model, stored = start(trial, setup.depths[trial.setting])
    epochs = setup.epochs + setup.aux_epochs * total
    seen = {-1: task.evaluate(model, trial.split)["accuracy"]}

    def look(epoch: int, loss: float) -> None:
        if epoch in (0, epochs - 1):
            seen[epoch] = task.evaluate(model, trial.split)["accuracy"]

    done = train.fit(
        model, task.train, loss=task.loss, optimizer=partial(AdamW, lr=trial.params["lr"], weight_decay=0.05), epochs=epochs,
        batch_size=setup.batch_size, schedule="cosine", after_epoch=look, seed=trial.seed, device=trial.device,
    )  # fmt: skip
    trial.spend(
        train_seconds=done.seconds, steps=done.steps, forwards=done.forwards, backwards=done.backwards, trainings=1,
        parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    result = {"accuracy": seen[epochs - 1 if last else 0], "accuracy_start": seen[-1], "accuracy_end": seen[epochs - 1]}
    if stored is not None:
        each = sum(p.numel() for p in _ViT(setup, (1,)).encoder.parameters())
        result["stored"] = sum(p.numel() for p in stored.parameters()) / (each * sum(setup.repeats))
    return result


def study(scale: Scale) -> Study:
    """Digits by a vision transformer of width 32: what descendants of two depths inherit from a distilled, shared one.

    The accuracy is that after one epoch of tuning; of arms that say so, after all of it. Every arm of a given seed is tuned on the
    same batches, and the fresh ones start from the same embedding, norm and head. The cost of an arm is that of its tuning, of the
    network that it inherits from and of the teacher of that.
    """
    setup = _setup(scale)
    rates = [setup.scratch_lr * factor for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2)]
    tune = scale.pick(0, 5, 5)
    shallow, deep = (f"depth {depth}" for depth in setup.depths)

    def arm(start: Start, lr: float = setup.scratch_lr, tunes: bool = True, **how: Any) -> Arm:
        return Arm(partial(_run, start=start, **how), {"lr": lr}, {"lr": rates} if tunes else {}, (PAPER,))

    def on_both(says: str, make: Callable[[str], Expect]) -> list[Claim]:
        return [Claim(f"{says} ({where})", make(where)) for where in (shallow, deep)]

    five, total = "scratch, to the end", "scratch, whole budget"
    tuned = [
        *on_both(
            "With the rate of each tuned, after one epoch it is above scratch after all of them",
            lambda on: Expect("sws", on=on, tuned=True).better_than(five),
        ),
        *on_both(
            "With the rate of each tuned, it is above the layers in a shuffled order",
            lambda on: Expect("sws", on=on, tuned=True).better_than("stages shuffled"),
        ),
        *on_both(
            "With the rate of each tuned, it is within four points of the first layers of an unshared network",
            lambda on: Expect("sws", on=on, tuned=True).not_worse_than("first layers, unshared", by=0.04),
        ),
    ]
    return Study(
        name="learngene-sws: descendants of two depths",
        paper=PAPER,
        scale=scale,
        metric="accuracy",
        metrics={"accuracy_start": "max", "accuracy_end": "max", "stored": "min"},
        baseline="scratch",
        settings={shallow: 0, deep: 1},
        arms={
            "scratch": arm(_scratch),
            five: arm(_scratch, last=True),
            total: arm(_scratch, tunes=False, last=True, total=True),
            "rest only": arm(_rest_only),
            "layers permuted": arm(_permuted),
            "stages shuffled": arm(_shuffled, setup.lr),
            "first layers, unshared": arm(_first_layers, setup.lr),
            "repeated, unshared": arm(_repeated, setup.lr),
            "sws": arm(_sws, setup.lr),
            "sws, rate of scratch": arm(_sws, tunes=False),
        },
        expect=[
            *on_both(
                "After one epoch it is 25 points above training from scratch after all of them",
                lambda on: Expect("sws", on=on).better_than(five, by=0.25),
            ),
            *on_both(
                "The order of the stages matters: 30 points above the same layers in a shuffled one",
                lambda on: Expect("sws", on=on).better_than("stages shuffled", by=0.3),
            ),
            *on_both(
                "After one epoch it is within four points of the first layers of an unshared network",
                lambda on: Expect("sws", on=on).not_worse_than("first layers, unshared", by=0.04),
            ),
            *on_both(
                "After all epochs too",
                lambda on: Expect("sws", "accuracy_end", on=on).not_worse_than("first layers, unshared", by=0.04),
            ),
            Claim("It stores half of the unshared network's layers or less", Expect("sws", "stored", on=deep).always(high=0.5)),
            *on_both(
                "It is not the embedding and the head: above fresh layers between the inherited ones",
                lambda on: Expect("sws", on=on).better_than("rest only"),
            ),
            *on_both(
                "It is not the size of the weights: above the same values in another order",
                lambda on: Expect("sws", on=on).better_than("layers permuted"),
            ),
            Claim(
                "Layers learned to be repeated: before any tuning above those of an unshared network, repeated alike",
                Expect("sws", "accuracy_start", on=deep).better_than("repeated, unshared"),
            ),
            Claim(
                "So it is after one epoch of tuning", Expect("sws", on=deep).better_than("repeated, unshared")
            ),
            *on_both(
                "Tuning at the rate of training from scratch is worse than at a quarter of it",
                lambda on: Expect("sws, rate of scratch", on=on).worse_than("sws"),
            ),
            *on_both(
                "After all epochs it is within four points of scratch with the epochs of auxiliary network and tuning together",
                lambda on: Expect("sws", "accuracy_end", on=on).not_worse_than(total, by=0.04),
            ),
            *(tuned if tune else []),
        ],
        seeds=scale.pick(range(1), range(100, 108), range(3)),
        tune=tune,
        notes={
            "seeds": "0 served to plan the study; others decide",
            "data": "8 x 8 digits, 1,078 to train; the paper's is ImageNet-1K, with a LeViT-384 as teacher",
            "networks": "vision transformers of width 32, 4 heads, 16 tokens of 2 x 2 pixels, mean over tokens; the auxiliary network "
            "has 8 layers in stages of 2, 2, 2, 2; the teacher is a perceptron 64-256-10",
            "training": "distillation: AdamW 2e-3, 20 warm-up steps, cosine, 25 epochs; tuning: AdamW 5e-4 (fresh layers 2e-3), weight "
            "decay 0.05, cosine over 5 epochs; tuned rates: 2.5e-4 to 4e-3, five of them",
        },
    )  # fmt: skip
