"""Bone: block affine adapters (Kang, arXiv 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import AdamW
from torch.utils.data import Dataset, TensorDataset

from weightroom import tasks, train
from weightroom.compare.adapt import BASELINES
from weightroom.compare.base import Method
from weightroom.errors import UsageError
from weightroom.nets.small import MLP
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Scale, Study, Task, Trial
from weightroom.weights import BoneConfig, BoneLinear, bone

__all__ = ["PAPER", "study"]

_LR = [1e-3, 3e-3, 1e-2, 3e-2]


def _adapt(model: nn.Module, *, r: int, variant: Any) -> nn.Module:
    """Adapts every linear layer but the last that ``r`` fits, as the LoRA arm does (which needs no fit)."""
    inner = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][:-1]
    fits = [n for n, m in inner if r <= m.in_features and (variant == "shared" or m.in_features % r == m.out_features % r == 0)]
    if not fits:
        sizes = ", ".join(f"{name} ({m.in_features} to {m.out_features})" for name, m in inner) or "there is none"
        raise UsageError(f"r={r} fits no linear layer but the last for the {variant} variant: {sizes}; choose another r")
    return bone(model, BoneConfig(r, variant, target_modules=fits))


def _guided(model: nn.Module, *, r: int) -> nn.Module:
    return _adapt(model, r=r, variant="guided")


def _shared(model: nn.Module, *, r: int) -> nn.Module:
    return _adapt(model, r=r, variant="shared")


PAPER = Paper(
    key="bone",
    number=20,
    family="adapt",
    parts=(BoneConfig, BoneLinear, bone),
    title="Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models",
    authors="Jiale Kang",
    year=2024,
    venue="arXiv",
    arxiv="2409.15371",
    code="JL-er/Bone",
    summary="Fine-tunes frozen linear layers through small blocks that act on the blocks of the weight, zero at the start.",
    claim="Guided by the original weights, Bone converges faster than LoRA and PiSSA at equal parameters and ends at a better "
    "model: LLaMA2-7B on MetaMathQA reaches 49.36 on GSM8K, PiSSA 43.52.",
    limits="The paper trains every method at one learning rate. In our study (a perceptron, not a language model) the loss then "
    "falls faster than with LoRA or PiSSA, as claimed, though PiSSA is more accurate even there. When each arm may choose "
    "its rate, PiSSA, LoRA, the shared form and even the guided form without its + B are more accurate, and PiSSA's loss is "
    "lower as well. We think that both have one reason: + B moves all blocks of a row by the same amount. That makes a long "
    "step at a small rate (without it the loss falls as slowly as LoRA's), and a coarse one that limits the adapter later. "
    "The best rate of LoRA was the largest of the grid, so it may be better still. The name stands for two methods: the "
    "guided one of v2 and v3, the default here, and the shared one of v4 and later (MiSS). Convolutions and a scaling "
    "factor are not part of either.",
    methods={
        "bone": Method(_guided, {"r": 8, "lr": 3e-3}, {"lr": _LR}),
        "bone, shared": Method(_shared, {"r": 8, "lr": 3e-3}, {"lr": _LR}),
    },
)


class _WithoutB(nn.Module):
    """W'_ij = W_ij + W_ij B_i: the guided form without its last term."""

    def __init__(self, out: int, r: int) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.zeros(out // r, r, r))

    def forward(self, W: Tensor) -> Tensor:
        rows = W.view(len(self.B), -1, self.B.shape[-1])
        return torch.baddbmm(rows, rows, self.B).view_as(W)


def _ablated(model: nn.Module, *, r: int) -> nn.Module:
    model.requires_grad_(False)
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)][:-1]:
        register_parametrization(layer, "weight", _WithoutB(layer.out_features, r).to(layer.weight.device))
    return model


def _rotated(dataset: Dataset) -> Dataset:
    images, labels = dataset[:]
    return TensorDataset(torch.rot90(images, 1, (-2, -1)), labels)


def _pretrained(task: Task, trial: Trial) -> nn.Module:
    """The perceptron trained on upright digits; the same for every arm of a seed."""
    epochs = trial.scale.pick(4, 40, 40)

    def make() -> dict[str, Tensor]:
        model = task.model(seed=trial.seed)
        train.fit(
            model, task.train, loss=task.loss, optimizer=lambda p: torch.optim.Adam(p, 1e-3), epochs=epochs, seed=trial.seed
        )
        return model.state_dict()

    model = task.model(seed=trial.seed)
    model.load_state_dict(trial.cached("bone-pretrained", make, task=task, seed=trial.seed, epochs=epochs))
    return model.to(trial.device)


def _arm(task: Task, steps: int, make: Callable[..., nn.Module], lrs: list[float], **hyper: int) -> Arm:
    turned = task.with_(**{split: _rotated(getattr(task, split)) for split in ("train", "val", "test")})

    def run(trial: Trial) -> dict[str, float]:
        model = _pretrained(task, trial)
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = make(model, **hyper)
        losses: list[Tensor] = []

        def step(model: nn.Module, batch: Any) -> Tensor:
            loss = turned.loss(model(batch[0]), batch[1])
            losses.append(loss.detach())
            return loss

        done = train.fit(
            model,
            turned.train,
            step=step,
            optimizer=lambda params: AdamW(params, trial.params["lr"], weight_decay=0),
            steps=steps,
            batch_size=64,
            schedule="cosine",
            seed=trial.seed,
            device=trial.device,
        )
        trial.spend(train_seconds=done.seconds, steps=done.steps)
        curve = torch.stack(losses).double().cpu()
        for i, chunk in enumerate(curve.split(10)):
            trial.log(10 * i + len(chunk), loss=float(chunk.mean()))
        return {
            "accuracy": turned.evaluate(model, trial.split)["accuracy"],
            "loss": float(curve.mean()),
            "trainable": float(sum(p.numel() for p in model.parameters() if p.requires_grad)),
        }

    return Arm(run, {"lr": lrs[0]}, {"lr": lrs})


def study(scale: Scale) -> Study:
    """A perceptron trained on digits is adapted to the same digits turned by 90 degrees, by 1,536 parameters in three layers."""
    task = tasks.digits().with_(model=lambda: MLP((64, 64, 64, 64, 10)))
    steps, lrs = scale.pick(20, 200, 200), scale.pick(_LR[::3], _LR, _LR)
    arms = {
        "lora": _arm(task, steps, BASELINES["lora"].make, lrs, r=4),
        "pissa": _arm(task, steps, BASELINES["pissa"].make, lrs, r=4),
        "bone": _arm(task, steps, _guided, lrs, r=8),
        "bone, shared": _arm(task, steps, _shared, lrs, r=8),
        "bone, W B only": _arm(task, steps, _ablated, lrs, r=8),
        "full fine-tuning": _arm(task, steps, BASELINES["full fine-tuning"].make, lrs),
    }
    one_rate, chosen = (
        "at one small learning rate for all, its training loss is lower than",
        "when each arm chooses its learning rate,",
    )
    expect = [
        Claim(f"{one_rate} LoRA's", Expect("bone", "loss").better_than("lora")),
        Claim(f"{one_rate} PiSSA's", Expect("bone", "loss").better_than("pissa")),
        Claim(f"{one_rate} that of the form without + B", Expect("bone", "loss").better_than("bone, W B only")),
        Claim(f"{chosen} it is more accurate than LoRA", Expect("bone", tuned=True).better_than("lora")),
        Claim(f"{chosen} it is more accurate than PiSSA", Expect("bone", tuned=True).better_than("pissa")),
        Claim(
            f"{chosen} it is more accurate than the form without + B", Expect("bone", tuned=True).better_than("bone, W B only")
        ),
        Claim(f"{chosen} it is more accurate than the form without W", Expect("bone", tuned=True).better_than("bone, shared")),
        Claim(f"{chosen} its training loss is lower than PiSSA's", Expect("bone", "loss", tuned=True).better_than("pissa")),
    ]
    return Study(
        name="bone: digits turned by 90 degrees",
        arms=arms,
        metric="accuracy",
        metrics={"loss": "min", "trainable": "min"},
        baseline="lora",
        expect=expect,
        seeds=scale.pick(1, 5, 20),
        max_seeds=scale.pick(1, 15, 60),
        tune=len(lrs),
        scale=scale,
        paper=PAPER,
        notes={
            "setting": f"perceptron 64-64-64-64-10, head frozen, {steps} AdamW steps of 64, no decay, cosine to zero",
            "loss": "mean training loss over the run; the common setting is a learning rate of 0.001",
        },
    )
