"""Robust weight signatures (Cai, Zhang, Wang, ICML 2023)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import TensorDataset

from weightroom import data, tasks, train
from weightroom.compare.base import Method
from weightroom.compare.patch import Origin, Patched, random_like
from weightroom.metrics import accuracy, predict
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Scale, Study, Trial
from weightroom.weights import RobustWeightSignature, apply_

__all__ = ["PAPER", "study"]

Signature = RobustWeightSignature


def _signature(origin: Origin, share: float, strength: float, levels: int | None = None) -> Patched:
    found = origin.signature(share)
    found = found if levels is None else found.quantize(levels)
    return apply_(origin.clean, found, strength, loader=origin.batches), found.nbytes


_SPACE: dict[str, Any] = {"share": [0.25, 0.5, 0.75, 1.0], "strength": [0.25, 0.5, 0.75, 1.0]}

PAPER = Paper(
    key="robust-signatures",
    number=62,
    family="patch",
    parts=(RobustWeightSignature, apply_),
    title="Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?",
    authors="Ruisi Cai, Zhenyu Zhang, Zhangyang Wang",
    year=2023,
    venue="ICML",
    arxiv="2302.12480",
    code="VITA-Group/Robust_Weight_Signatures",
    summary="Makes the difference between a robust and a clean model a small patch that can be added, scaled, combined and taken off.",
    claim="Weights of models trained on clean and on corrupted data differ mostly in the first layers; that difference, without its "
    "part along the clean training, makes a clean model robust when it is added, of another data set too; signatures are alike "
    "across data sets and tell corruptions apart, can be scaled and summed, and take up to 13 times less room than a full copy.",
    limits="It needs what it replaces, a model that was trained on the corruption, from the same start as the clean one. Copying that "
    "model's first layers takes the same room and is the arm to beat; the clean accuracy falls with either. The start was trained "
    "on the same digits here, not on ImageNet, and the two data sets are halves of one. Where there are n signatures, the authors' "
    "code multiplies by the strength before and after the projection, 1/n^2 for equal parts; the part does so once. In networks "
    "with batch norm the code replaces all batch-norm tensors, and the convolutions of downsampling branches at every depth, by "
    "the robust models'; the part does the former and treats those convolutions as the layers they are.",
    methods={
        "robust weight signature": Method(_signature, {"share": 0.5, "strength": 1.0}, _SPACE),
        "robust weight signature, 16 levels": Method(_signature, {"share": 0.5, "strength": 1.0, "levels": 16}, _SPACE),
    },
)

_KINDS = ("noise", "contrast", "brightness", "fog")


class _Net(nn.Module):
    """3 x 3 convolutions with bias and ReLU, a max-pool after some of them, global mean, a linear head."""

    def __init__(self, setup: _Setup, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(setup.widths)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), *[nn.MaxPool2d(2)] * (i + 1 in setup.pools)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(setup.widths[-1], classes)
        self.mean, self.std = setup.units
        if setup.large:
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features((x - self.mean) / self.std).mean((2, 3)))


@dataclass(frozen=True)
class _Setup:
    """A network and how it is trained; ``keep`` of its convolutions are patched."""

    widths: tuple[int, ...]
    pools: tuple[int, ...]
    keep: int
    units: tuple[float, float]
    start_epochs: int
    epochs: int
    alive: float
    large: bool = False

    def fit(self, model: nn.Module, dataset: TensorDataset, seed: int, device: str, start: bool, kind: str | None) -> None:
        """Cross entropy; with a corruption, every batch is corrupted anew."""
        generator = torch.Generator().manual_seed(3 * seed)

        def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            x = batch[0] if kind is None else data.corrupt(batch[0], kind, generator=generator)
            return F.cross_entropy(model(x), batch[1])

        optimizer: Any = partial(Adam, lr=3e-3)
        schedule: Any = "constant" if start else "cosine"
        if self.large:
            optimizer = partial(SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
            schedule = lambda o, total: MultiStepLR(o, [total * 2 // 5, total * 4 // 5])  # noqa: E731
        train.fit(
            model, dataset, step=step, optimizer=optimizer, schedule=schedule, epochs=self.start_epochs if start else self.epochs,
            batch_size=128 if self.large else 64, seed=seed, device=device,
        )  # fmt: skip


_DIGITS: dict[str, Any] = {"widths": (1, 16, 16, 32, 32, 32), "pools": (2, 4), "keep": 3, "units": (0.3, 0.37)}
_VGG16: dict[str, Any] = {
    "widths": (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
    "pools": (2, 4, 7, 10, 13),
    "keep": 7,
    "units": (0.47, 0.25),
    "large": True,
}


def _setup(scale: Scale) -> _Setup:
    if scale is Scale.FULL:
        return _Setup(**_VGG16, start_epochs=50, epochs=50, alive=0.4)
    return _Setup(**_DIGITS, start_epochs=scale.pick(1, 30, 30), epochs=scale.pick(1, 12, 12), alive=scale.pick(0.0, 0.4, 0.4))


def _images(scale: Scale) -> dict[str, TensorDataset]:
    """Ten classes, values in [0, 1]."""
    if scale is Scale.FULL:
        x, y, test_x, test_y = data.cifar10()
        kept, held = data.split(TensorDataset(x, y), (0.9, 0.1), seed=0)
        return {"train": kept, "val": held, "test": TensorDataset(test_x, test_y)}  # type: ignore[dict-item]
    task = tasks.digits()
    parts: dict[str, Any] = {split: getattr(task, split) for split in ("train", "val", "test")}
    return {split: TensorDataset(*part[: 200 if scale is Scale.SMOKE else None]) for split, part in parts.items()}


class _World:
    """All models of one seed: the start, and for each half of the classes a clean model and a robust one per corruption."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.setup, self.images = trial, _setup(trial.scale), _images(trial.scale)
        start = self._trained("start", None, None)
        self.start = start
        self.clean = [self._trained("clean", half, None) for half in (0, 1)]
        self.robust = [{kind: self._trained("robust", half, kind) for kind in _KINDS} for half in (0, 1)]

    def half(self, split: str, half: int | None) -> TensorDataset:
        """Classes 0 to 4 or 5 to 9, counted from 0; all of them without a half."""
        x, y = self.images[split].tensors
        inside = torch.ones_like(y, dtype=torch.bool) if half is None else y // 5 == half
        return TensorDataset(x[inside], y[inside] - 5 * (half or 0))

    def signature(self, half: int, kind: str, project: bool = True) -> Signature:
        robust = self.robust[half][kind]
        return Signature.extract(self.start, self.clean[half], robust, self.setup.keep, project, corruption=kind)

    def _trained(self, name: str, half: int | None, kind: str | None) -> nn.Module:
        """A training that is dead, at the accuracy of a constant or so, is redone with other batches (the start: other weights)."""
        trial, setup, dataset = self.trial, self.setup, self.half("train", half)

        def make() -> dict[str, Tensor]:
            for attempt in range(5):
                seed = trial.seed + 10_000 * attempt
                model = self._fresh(half, seed).to(trial.device)
                setup.fit(model, dataset, seed, trial.device, half is None, kind)
                seen = dataset if kind is None else data.corrupted(dataset, kind, seed=seed)
                if float(accuracy(*predict(model, seen))) >= setup.alive:
                    return model.state_dict()
            raise RuntimeError(f"five trainings of the {name} model (half {half}, {kind}) did not learn")

        model = self._fresh(half, trial.seed)
        given = {"seed": trial.seed, "scale": trial.scale.value, "device": trial.device, "half": half, "kind": kind}
        model.load_state_dict(trial.cached(f"signatures-{name}", make, **given))
        return model.to(trial.device)

    def _fresh(self, half: int | None, seed: int) -> nn.Module:
        """The network before training: with a half, the start under a new head, the same for all models of the half."""
        with torch.random.fork_rng():
            torch.manual_seed(seed if half is None else self.trial.seed + 1000 * (half + 1))
            model = _Net(self.setup, 10 if half is None else 5)
        if half is not None:
            model.features.load_state_dict(self.start.features.state_dict())  # type: ignore[union-attr]
        return model


Make = Callable[[_World, int, str], "nn.Module"]


def _patched(world: _World, half: int, signature: Signature, strength: float = 1.0) -> nn.Module:
    return apply_(copy.deepcopy(world.clean[half]), signature, strength)


def _clean(world: _World, half: int, kind: str) -> nn.Module:
    return world.clean[half]


def _robust(world: _World, half: int, kind: str) -> nn.Module:
    return world.robust[half][kind]


def _own(world: _World, half: int, kind: str, strength: float = 1.0, project: bool = True) -> nn.Module:
    return _patched(world, half, world.signature(half, kind, project), strength)


def _levels(world: _World, half: int, kind: str) -> nn.Module:
    return _patched(world, half, world.signature(half, kind).quantize(16))


def _transferred(world: _World, half: int, kind: str) -> nn.Module:
    return _patched(world, half, world.signature(1 - half, kind))


def _other(world: _World, half: int, kind: str) -> nn.Module:
    return _patched(world, half, world.signature(half, _KINDS[(_KINDS.index(kind) + 1) % len(_KINDS)]))


def _together(world: _World, half: int, kind: str) -> nn.Module:
    return apply_(copy.deepcopy(world.clean[half]), [world.signature(half, k) for k in _KINDS])


def _random(world: _World, half: int, kind: str) -> nn.Module:
    return _patched(world, half, random_like(world.signature(half, kind), world.trial.seed))


def _copied(world: _World, half: int, kind: str) -> nn.Module:
    clean = world.clean[half]
    return _patched(world, half, Signature.extract(clean, clean, world.robust[half][kind], world.setup.keep, project=False))


def _mean(world: _World, half: int, kind: str) -> nn.Module:
    model, robust = copy.deepcopy(world.clean[half]), world.robust[half][kind].state_dict()
    model.load_state_dict({name: (t + robust[name]) / 2 for name, t in model.state_dict().items()})
    return model


def _consistency(world: _World) -> dict[str, float]:
    """How much more alike the signatures of one corruption are, over the two halves, than those of two corruptions."""
    a, b = (torch.stack([_flat(world.signature(half, kind)) for kind in _KINDS]) for half in (0, 1))
    cosines = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    n, same = len(_KINDS), float(cosines.trace())
    return {"cosine_same": same / n, "consistency": same / n - (float(cosines.sum()) - same) / (n * n - n)}


def _flat(signature: Signature) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in signature.values()])


def _size(world: _World) -> dict[str, float]:
    full = sum(tensor.nbytes for tensor in world.clean[0].state_dict().values())
    return {"compression": full / world.signature(0, _KINDS[0]).quantize(16).nbytes}


def _depth(world: _World) -> dict[str, float]:
    """Relative difference of the robust from the clean weights, in the first and in the last convolution."""
    changes = []
    for half in (0, 1):
        for kind in _KINDS:
            pairs = zip(world.clean[half].modules(), world.robust[half][kind].modules(), strict=True)
            both = [
                (a.weight.detach(), b.weight.detach()) for a, b in pairs if isinstance(a, nn.Conv2d) and isinstance(b, nn.Conv2d)
            ]
            changes.append([float((b - a).norm() / a.norm()) for a, b in (both[0], both[-1])])
    first, last = torch.tensor(changes).mean(0).tolist()
    return {"change_first": first, "change_last": last, "change_first_minus_last": first - last}


def _run(trial: Trial, *, make: Make, also: Callable[[_World], Mapping[str, float]] | None = None) -> dict[str, float]:
    world = _World(trial)
    corrupted: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    clean = []
    for half in (0, 1):
        dataset = world.half(trial.split, half)
        for kind in _KINDS:
            model = make(world, half, kind)
            shifted = data.corrupted(dataset, kind, seed=3 * trial.seed + (1 if trial.split == "val" else 2))
            corrupted[kind].append(float(accuracy(*predict(model, shifted))))
            clean.append(float(accuracy(*predict(model, dataset))))
    kinds = {f"{kind}_accuracy": sum(values) / len(values) for kind, values in corrupted.items()}
    own = {} if also is None else also(world)
    return {"accuracy": sum(kinds.values()) / len(kinds), "clean_accuracy": sum(clean) / len(clean), **kinds, **own}


def study(scale: Scale) -> Study:
    """Digits 0 to 4 and 5 to 9 as two data sets, four corruptions: what a patch of the first three of five convolutions does.

    One start, trained on all ten digits; ten models per seed go on from it, one clean and four robust ones for each half, with one
    head. The accuracy is that on corrupted test images, over the four corruptions and the two halves.
    """

    def arm(make: Make, **how: Any) -> Arm:
        return Arm(partial(_run, make=make, **how), cites=(PAPER,))

    def above(name: str, other: str, by: float = 0.0, metric: str | None = None) -> Expect:
        return Expect(name, metric).better_than(other, by=by)

    return Study(
        name="robust-signatures: a patch for the first layers",
        paper=PAPER,
        scale=scale,
        metric="accuracy",
        metrics={
            "clean_accuracy": "max", **{f"{kind}_accuracy": "max" for kind in _KINDS}, "cosine_same": "max", "consistency": "max",
            "compression": "max", "change_first": "max", "change_last": "max", "change_first_minus_last": "max",
        },
        baseline="clean",
        arms={
            "clean": arm(_clean),
            "robust": arm(_robust, also=_depth),
            "signature": arm(_own, also=_consistency),
            "signature, half strength": arm(partial(_own, strength=0.5)),
            "signature, 16 levels": arm(_levels, also=_size),
            "signature, transferred": arm(_transferred),
            "signatures of all four": arm(_together),
            "signature of another corruption": arm(_other),
            "difference without projection": arm(partial(_own, project=False)),
            "random, equal norm": arm(_random),
            "first layers copied": arm(_copied),
            "mean of clean and robust": arm(_mean),
        },
        expect=[
            Claim("A signature makes the clean model ten points more accurate", above("signature", "clean", 0.1)),
            Claim("It does so against a random patch of equal norm", above("signature", "random, equal norm", 0.1)),
            Claim(
                "One from the other half of the classes is eight points above a random patch",
                above("signature, transferred", "random, equal norm", 0.08),
            ),
            Claim("It is specific: better than the signature of another corruption", above("signature", "signature of another corruption")),
            Claim("Signatures of one corruption are more alike over the halves than those of two", Expect("signature", "consistency").within(0)),
            Claim("Half the strength is better than none", above("signature, half strength", "clean")),
            Claim("The full strength is better than half of it", above("signature", "signature, half strength")),
            Claim(
                "Half the strength costs less clean accuracy than the full one",
                above("signature, half strength", "signature", metric="clean_accuracy"),
            ),
            Claim("Four signatures at once, a quarter each, are better than none", above("signatures of all four", "clean")),
            Claim("Sixteen levels do as well, within two points", Expect("signature, 16 levels").equal_to("signature", within=0.02)),
            Claim("With sixteen levels it is 13 times smaller than a full copy", Expect("signature, 16 levels", "compression").always(13)),
            Claim("The projection helps: better than the difference without it", above("signature", "difference without projection")),
            Claim("It is better than copying the robust model's first layers", above("signature", "first layers copied")),
            Claim("It is better than the mean of the clean and the robust model", above("signature", "mean of clean and robust")),
            Claim(
                "Robust weights differ from clean ones more in the first convolution than in the last",
                Expect("robust", "change_first_minus_last").within(0),
            ),
        ],
        seeds=scale.pick(range(1), range(100, 108), range(3)),
        notes={
            "seeds": "0 served to plan the study; others decide",
            "data": "8 x 8 digits in [0, 1]: 1,078 to train, 540 to test, in two halves by class; the paper's are CIFAR-10, CIFAR-100 "
            "and Tiny-ImageNet",
            "corruptions": "noise 0.5, contrast 0.2, brightness + 0.5, fog 0.6, anew in every batch of training",
            "training": "five convolutions, 26,000 weights; start: Adam 3e-3 for 30 epochs; clean and robust models: 12 more, cosine",
        },
    )  # fmt: skip
