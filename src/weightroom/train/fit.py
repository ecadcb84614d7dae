"""The one training loop, on Lightning Fabric. It knows no task, no study and no method."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from weightroom.data import gather
from weightroom.errors import UsageError, WeightroomError
from weightroom.metrics import check_device

__all__ = ["Batches", "DivergedError", "Fit", "fabric_for", "fit"]

Step = Callable[[nn.Module, Any], Tensor]
Schedule = Callable[[Optimizer, int], LRScheduler]


class DivergedError(WeightroomError):
    """The loss of a training became NaN or infinite."""


@dataclass
class Fit:
    """What a training did.

    Args:
        steps: optimizer steps taken.
        seconds: wall-clock seconds.
        losses: mean training loss of each epoch, the last of which may be cut short by ``steps``.
        forwards: forward passes of the model, those of an attack or of a line search too.
        backwards: backward passes that went through its outputs.
    """

    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    forwards: int = 0
    backwards: int = 0


class Batches:
    """Seeded mini-batches of an indexable data set, gathered without a Python loop where the data set is in memory.

    The order depends on ``seed`` and the epoch alone, so two trainings with one seed see the same batches.

    Args:
        dataset: has ``len()`` and indexing.
        batch_size: samples per batch; the last batch of an epoch may be smaller.
        seed: decides the order.
        shuffle: a new order each epoch.
        with_index: append the samples' data-set indices (int64) to each batch.
        rank: takes every ``world_size``-th batch, from this one on.
        world_size: number of processes that share the batches.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, *, seed: int = 0, shuffle: bool = True, with_index: bool = False, rank: int = 0, world_size: int = 1
    ) -> None:  # fmt: skip
        self.dataset, self.batch_size, self.shuffle, self.with_index = dataset, batch_size, shuffle, with_index
        self.rank, self.world_size = rank, world_size
        self.n_samples = len(cast(Sized, dataset))
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Batches per epoch and process."""
        return math.ceil(math.ceil(self.n_samples / self.batch_size) / self.world_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """One epoch; each process gets equally many batches, the first ones again where they do not divide."""
        order = torch.randperm(self.n_samples, generator=self.generator) if self.shuffle else torch.arange(self.n_samples)
        batches = order.split(self.batch_size)
        for i in range(self.rank, len(self) * self.world_size, self.world_size):
            indices = batches[i % len(batches)]
            fields = gather(self.dataset, indices)
            yield (*fields, indices) if self.with_index else tuple(fields)


def fabric_for(device: str = "auto", precision: str | None = None) -> Fabric:
    """Returns a single-device Fabric for a torch device name.

    Raises:
        UsageError: the device is not there.
    """
    kind, _, index = check_device(device).partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        devices: Any = [int(index)] if index else 1
        return Fabric(accelerator=kind, devices=devices, precision=cast(Any, precision))


def fit(
    model: nn.Module,
    data: Dataset | DataLoader | Iterable[Any],
    *,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Optimizer | Callable[[Iterable[Tensor]], Optimizer],
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    step: Step | None = None,
    after_step: Callable[[int], None] | None = None,
    after_epoch: Callable[[int, float], None] | None = None,
    schedule: Schedule | Literal["constant", "cosine"] = "constant",
    clip_norm: float | None = None,
    seed: int = 0,
    shuffle: bool = True,
    device: str | None = None,
    precision: str | None = None,
    fabric: Fabric | None = None,
    progress: bool = False,
) -> Fit:
    """Trains ``model`` in place.

    Args:
        model: any module; it is trained where it is, or moved to ``device``, and left in training mode.
        data: an indexable data set of (input, target) samples, or a ``DataLoader`` or other iterable of batches.
        loss: ``loss(outputs, targets)``, or ``loss(outputs, targets, index)`` with the samples' data-set indices where the
            loss has ``needs_index = True``; its parameters and buffers follow the model's device. Not used with ``step``.
        optimizer: an optimizer over the parameters to train, or a function that makes one from ``model``'s trainable
            parameters. One with ``needs_closure = True`` (and L-BFGS) gets the closure that it needs. One with
            ``needs_oracle = True`` gets ``step(forward, oracle)``: a function that returns the batch's outputs, and one that
            returns the loss at given outputs, summed over the batch (a ``loss`` is taken to be a mean over samples unless its
            ``reduction`` is "sum"). As the outputs must not change between evaluations, the model then stays in the mode it is in.
        epochs: passes over the data; give this or ``steps``.
        steps: optimizer steps.
        batch_size: samples per step, where ``data`` is a data set.
        step: ``step(model, batch) -> loss`` for a method that changes the step; the batch is a tuple of tensors on the device.
        after_step: called with the number of steps taken, after each (to re-apply a mask, say).
        after_epoch: called with the epoch's number (from 0) and mean loss.
        schedule: of the learning rate over the whole run: "constant", "cosine" (to zero), or
            ``schedule(optimizer, total_steps) -> LRScheduler``; stepped after each optimizer step.
        clip_norm: clips the norm of all gradients together.
        seed: decides the order of the samples and the random numbers of the run (dropout); the global state is restored after.
        shuffle: a new order each epoch.
        device: "cpu", "cuda", "cuda:1", "mps", "auto"; the model's own device when None.
        precision: as Fabric names it ("32-true", "bf16-mixed", ...).
        fabric: a launched Fabric of your own (several devices, FSDP); then ``device`` and ``precision`` are its matter.
        progress: show a progress bar on stderr.

    Returns:
        What the training did.

    Raises:
        DivergedError: the loss became NaN or infinite (noticed at once on the CPU, within 50 steps elsewhere).
        UsageError: neither or both of ``epochs`` and ``steps``, neither ``loss`` nor ``step``, no data, no such device.
    """
    if (epochs is None) == (steps is None):
        raise UsageError(f"give either epochs or steps, got epochs={epochs}, steps={steps}")
    length = epochs if steps is None else steps
    if length is None or length < 0:
        raise UsageError(f"{'epochs' if steps is None else 'steps'} must be >= 0, got {length}")
    if loss is None and step is None:
        raise UsageError("give a loss, or a step(model, batch) -> loss")
    if fabric is None:
        fabric = fabric_for(str(next(model.parameters(), torch.empty(0)).device) if device is None else device, precision)
    if not isinstance(optimizer, Optimizer):
        optimizer = optimizer(p for p in model.parameters() if p.requires_grad)
    if isinstance(loss, nn.Module):
        loss.to(fabric.device)
    batches = _batches(data, batch_size, seed, shuffle, bool(getattr(loss, "needs_index", False)) and step is None, fabric)
    per_epoch = len(cast(Sized, batches)) if hasattr(batches, "__len__") else None
    if per_epoch == 0:
        raise UsageError("data has no samples")
    if steps is None:
        if per_epoch is None:
            raise UsageError("data has no len(): give steps instead of epochs")
        total = cast(int, epochs) * per_epoch
    else:
        total = steps
    scheduler = _scheduler(schedule, optimizer, total)
    with _quiet():
        wrapped, fabric_optimizer = fabric.setup(model, optimizer)
    take_step = step if step is not None else _plain_step(cast(Callable[..., Tensor], loss))
    needs_closure = bool(getattr(optimizer, "needs_closure", isinstance(optimizer, torch.optim.LBFGS)))
    needs_oracle = bool(getattr(optimizer, "needs_oracle", False))
    mixed = precision is not None and "mixed" in str(precision)
    if needs_oracle and (loss is None or step is not None or clip_norm is not None or mixed or fabric.world_size > 1):
        raise UsageError(f"{type(optimizer).__name__} needs a loss, without step, clip_norm or mixed precision, on one device")
    check_every = 1 if fabric.device.type == "cpu" else 50
    done, start = Fit(), time.perf_counter()

    def backward() -> Tensor:
        fabric_optimizer.zero_grad()
        value = take_step(wrapped, batch)
        done.forwards += step is None
        if value.requires_grad:
            fabric.backward(value)
            done.backwards += step is None
        if clip_norm is not None:
            fabric.clip_gradients(wrapped, fabric_optimizer, max_norm=clip_norm, error_if_nonfinite=False)
        return value

    def forward() -> Tensor:
        return wrapped(batch[0])

    def count(module: nn.Module, inputs: Any, outputs: Any) -> None:
        done.forwards += 1
        followed = [out for out in _tensors(outputs) if out.requires_grad]
        if followed:
            torch.autograd.graph.register_multi_grad_hook(followed, count_backward, mode="any")

    def count_backward(gradient: Tensor) -> None:
        done.backwards += 1

    def oracle(outputs: Tensor) -> Tensor:
        index = batch[-1:] if getattr(loss, "needs_index", False) else ()
        value = cast(Callable[..., Tensor], loss)(outputs, batch[1], *index)
        return value if getattr(loss, "reduction", "mean") == "sum" else value * len(outputs)

    def check(seen: int) -> float:
        mean = float(running) / seen
        if not math.isfinite(mean):
            raise DivergedError(
                f"the training loss became {float(value.detach()):g} at step {done.steps} of {total}"
                if check_every == 1
                else f"the training loss became NaN or infinite within the {check_every} steps before step {done.steps} of {total}"
            )
        return mean

    if not needs_oracle:
        model.train()
    counting = model.register_forward_hook(count) if needs_oracle or step is not None else None
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _bar(total, progress) as advance, _removing(counting):
        torch.manual_seed(seed)
        epoch = 0
        while done.steps < total:
            running, seen = torch.zeros((), device=fabric.device), 0
            for batch in batches:
                batch = fabric.to_device(tuple(batch) if isinstance(batch, list) else batch)
                if needs_oracle:
                    value = cast(Any, optimizer).step(forward, oracle)
                elif needs_closure:
                    value = fabric_optimizer.step(closure=backward)
                else:
                    value = backward()
                    fabric_optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                done.steps += 1
                seen += 1
                running += value.detach()
                if done.steps % check_every == 0:
                    check(seen)
                if after_step is not None:
                    after_step(done.steps)
                advance(1)
                if done.steps >= total:
                    break
            if seen == 0:
                raise UsageError("data gave no batch")
            done.losses.append(check(seen))
            if after_epoch is not None:
                after_epoch(epoch, done.losses[-1])
            epoch += 1
    done.seconds = time.perf_counter() - start
    return done


def _plain_step(loss: Callable[..., Tensor]) -> Step:
    if getattr(loss, "needs_index", False):

        def indexed(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
            inputs, targets, *_, index = batch
            return loss(model(inputs), targets, index)

        return indexed

    def plain(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, targets, *_ = batch
        return loss(model(inputs), targets)

    return plain


def _batches(data: Any, batch_size: int, seed: int, shuffle: bool, with_index: bool, fabric: Fabric) -> Iterable[Any]:
    if isinstance(data, DataLoader):
        return fabric.setup_dataloaders(data, move_to_device=False) if fabric.world_size > 1 else data
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        if batch_size < 1:
            raise UsageError(f"batch_size must be >= 1, got {batch_size}")
        return Batches(
            data, batch_size, seed=seed, shuffle=shuffle, with_index=with_index, rank=fabric.global_rank, world_size=fabric.world_size
        )  # fmt: skip
    if with_index:
        raise UsageError("a loss that needs the samples' indices needs an indexable data set, not an iterable of batches")
    return data


def _scheduler(schedule: Schedule | str, optimizer: Optimizer, total: int) -> LRScheduler | None:
    if callable(schedule):
        return schedule(optimizer, total)
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, total))
    if schedule != "constant":
        raise UsageError(
            f"schedule must be 'constant', 'cosine' or a function (optimizer, total_steps) -> scheduler, got {schedule!r}"
        )
    return None


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, tuple | list):
        for part in outputs:
            yield from _tensors(part)


@contextlib.contextmanager
def _removing(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(
        *Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("training", total=total)
        yield lambda n: bar.advance(task, n)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning_fabric")
        yield
