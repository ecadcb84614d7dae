"""Adapters: a trained model, new data, few parameters to move.

A method is ``make(model, **hyper) -> nn.Module``, whose parameters with ``requires_grad`` are those that are trained. A
hyper-parameter ``lr`` is the learning rate.

Where the task's model is a module that the user has trained (``Task(model=module)``), it is adapted to the task as it is.
Where the task makes fresh models, one is first trained on the task and then adapted to the same task with its inputs turned:
images by 90 degrees, tables by reversing the features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from weightroom.compare.base import Family, Method, Options, measure, train_by_recipe
from weightroom.errors import MissingExtraError, UsageError
from weightroom.study import Arm, Task, Trial

__all__ = ["FAMILY", "Turned"]

_LR = [1e-3, 3e-3, 1e-2, 3e-2]


def _full(model: nn.Module) -> nn.Module:
    return model


def _head(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    _linears(model)[-1][1].requires_grad_(True)
    return model


def _lora(model: nn.Module, *, r: int, init: Any = True) -> nn.Module:
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "adapt", "the LoRA arm") from None
    names = [name for name, _ in _linears(model)][:-1]
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=names, init_lora_weights=init)
    return peft.get_peft_model(model, config)


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


_LORA = """@inproceedings{hu2022lora,
  title = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author = {Edward J. Hu and Yelong Shen and Phillip Wallis and Zeyuan Allen-Zhu and Yuanzhi Li and Shean Wang and Lu Wang and Weizhu Chen},
  year = {2022},
  booktitle = {ICLR}
}"""
_PISSA = """@inproceedings{meng2024pissa,
  title = {{PiSSA}: Principal Singular Values and Singular Vectors Adaptation of Large Language Models},
  author = {Fanxu Meng and Zhaohui Wang and Muhan Zhang},
  year = {2024},
  booktitle = {NeurIPS}
}"""

BASELINES = {
    "lora": Method(_lora, {"r": 4, "lr": 3e-3}, {"lr": _LR}, (_LORA,)),
    "pissa": Method(lambda model, r: _lora(model, r=r, init="pissa"), {"r": 4, "lr": 3e-3}, {"lr": _LR}, (_PISSA,)),
    "head only": Method(_head, {"lr": 3e-3}, {"lr": _LR}),
    "full fine-tuning": Method(_full, {"lr": 3e-3}, {"lr": _LR}),
}


class Turned(Dataset):
    """A data set whose images are turned by 90 degrees, or whose features are reversed."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of samples."""
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        """The sample, its input turned."""
        x, *rest = self.dataset[index]
        x = torch.as_tensor(x)
        return (torch.rot90(x, 1, (-2, -1)) if x.ndim >= 3 else x.flip(-1)), *rest


def _arm(task: Task, method: Method, epochs: int | None) -> Arm:
    def run(trial: Trial) -> dict[str, float]:
        model, target = _start(task, trial)
        hyper = dict(trial.params)
        lr = hyper.pop("lr")
        adapted = method.make(model, **hyper)
        moved = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        train_by_recipe(target, trial, adapted, lr=lr, epochs=epochs)
        return {**measure(target, trial, adapted), "trainable": moved}

    return Arm(run, method.defaults, method.space, method.cites)


def _start(task: Task, trial: Trial) -> tuple[nn.Module, Task]:
    model = task.model(seed=trial.seed)
    if isinstance(task.model.source, nn.Module):
        return model, task

    def pretrained() -> dict[str, Tensor]:
        fresh = copy.deepcopy(model)
        train_by_recipe(task, Trial(trial.seed, trial.scale, device=trial.device), fresh, log=False)
        return fresh.state_dict()

    model.load_state_dict(
        trial.cached("pretrained", pretrained, task=task, seed=trial.seed, scale=trial.scale.value, device=trial.device)
    )
    turned = {split: Turned(getattr(task, split)) for split in ("train", "val", "test")}
    return model, task.with_(**turned, name=f"{task.name}, turned")


def arms(task: Task, methods: Mapping[str, Method], options: Options) -> tuple[dict[str, Arm], dict[str, Any]]:
    """Returns an arm per method, under one setting."""
    if len(_linears(task.model())) < 2:
        raise UsageError(
            "adapters need a model with at least two linear layers, the last of which is the head; this one has fewer"
        )
    return {name: _arm(task, method, options.epochs) for name, method in methods.items()}, {"": None}


FAMILY = Family(
    "adapt", "adapters of a trained model; bring a trained module as the task's model, and the new data", BASELINES, "lora", arms,
    costs=("train_seconds", "peak_memory", "latency"), metrics={"trainable": "min"},
)  # fmt: skip
