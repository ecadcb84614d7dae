"""Bone against PEFT's MiSS layers: a step of a four-layer MLP of width 1024, batch 64, with LoRA of equal size beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from peft import LoraConfig, MissConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.base import Race, race
from weightroom.weights import BoneConfig, bone

WIDTH, BATCH = 1024, 64
TARGETS = ["0", "2", "4", "6"]
#: Our variant -> PEFT's ``init_weights``.
VARIANTS: dict[str, bool | str] = {"guided": "bat", "shared": True}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in TARGETS for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


def with_peft(config: PeftConfig) -> nn.Module:
    return get_peft_model(mlp(), config).base_model.model  # type: ignore[arg-type]


def step(model: nn.Module) -> Callable[[], Tensor]:
    """One forward and backward pass of a model whose adapter is no longer at zero."""
    torch.manual_seed(1)
    adapters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in adapters:
            p.normal_(std=0.01)
    x = torch.randn(BATCH, WIDTH)

    def call() -> Tensor:
        loss = model(x).square().mean()
        torch.autograd.grad(loss, adapters)
        return loss

    return call


def peak(call: Callable[[], object]) -> float:
    """The most megabytes that a call holds beyond what was there before it."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    results = prof.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in results if e.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in changes)) / 1e6


def races() -> Iterator[Race]:
    for r in (64, 16):
        lora = step(with_peft(LoraConfig(r=r // 2, lora_alpha=r // 2, target_modules=TARGETS)))
        for variant, init in VARIANTS.items():
            ours = step(bone(mlp(), BoneConfig(r=r, variant=variant)))  # type: ignore[arg-type]
            peer = step(with_peft(MissConfig(r=r, init_weights=init, target_modules=TARGETS)))
            torch.testing.assert_close(ours(), peer())
            yield race(
                f"Bone {variant} r {r}", ours, f"PEFT MiSS init_weights={init}", peer, target=1.0 if r == 64 else None, rounds=21
            )
            yield race(f"Bone {variant} r {r}, LoRA of equal size", ours, f"PEFT LoRA r {r // 2}", lora)
            if variant == "guided":
                yield Race(
                    f"Bone guided r {r}, peak memory", f"PEFT MiSS init_weights={init}", peak(ours), peak(peer), 1.0, unit="MB"
                )
