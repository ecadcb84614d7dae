"""Pruning: one trained model per seed, each arm removes the same share of its weights, all are fine-tuned alike.

A method is ``make(sparsity, **hyper) -> pruner``. A plan pruner has ``fit(model, data=, example_inputs=, loss_fn=) -> plan``;
``plan.apply(model, mode=...)`` returns the pruned model, which is then trained. A train-time pruner is a ``TrainTimePruner``: the
wrapped model is trained, and the model derived from it is what counts; of one whose masks depend on the sample (``dynamic``) it is
the wrapped model itself. The method's ``start`` says what is pruned: the trained model (then fine-tuned), or the model at
initialisation (then trained in full).
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from weightroom import metrics, prune
from weightroom.compare.base import Family, Method, Options, measure, sample_inputs, train_by_recipe
from weightroom.errors import UsageError
from weightroom.metrics.onnx import onnx_latency, onnx_runtime, to_onnx
from weightroom.study import Arm, Results, Task, Trial
from weightroom.train import Batches

__all__ = ["FAMILY", "PruneMethod"]

#: Share of the recipe's epochs that fine-tuning takes.
FINE_TUNE = 0.4
#: An exported model has at most this much less sparsity than asked for.
TOLERANCE = 0.02
#: Compression 2x, 4x, 8x, 16x and 32x, the operating points of ShrinkBench (Blalock et al. 2020, arXiv 2003.03033).
SPARSITY = (0.5, 0.75, 0.875, 0.9375, 0.96875)


@dataclass(frozen=True)
class PruneMethod(Method):
    """A pruning method.

    Args:
        start: what it prunes: the trained weights or the initial ones.
        seeded: ``make`` also takes ``seed``, the trial's.
        mode: how its plan is applied: "mask", or "rebuild" for a smaller network with fresh weights.
    """

    start: Literal["trained", "initial"] = "trained"
    seeded: bool = False
    mode: Literal["mask", "rebuild"] = "mask"


def _bib(key: str, title: str, authors: str, year: int, venue: str) -> tuple[str]:
    return (
        f"@inproceedings{{{key},\n  title = {{{title}}},\n  author = {{{authors}}},\n  year = {{{year}}},\n  booktitle = {{{venue}}}\n}}",
    )


BASELINES = {
    "dense": PruneMethod(lambda sparsity: None),
    "global magnitude": PruneMethod(prune.GlobalMagnitudePruner, cites=_bib(
        "han2015learning", "Learning both Weights and Connections for Efficient Neural Networks",
        "Song Han and Jeff Pool and John Tran and William J. Dally", 2015, "NeurIPS")),
    "LAMP": PruneMethod(prune.LAMPPruner, cites=_bib(
        "lee2021layer", "Layer-adaptive Sparsity for the Magnitude-based Pruning",
        "Jaeho Lee and Sejun Park and Sangwoo Mo and Sungsoo Ahn and Jinwoo Shin", 2021, "ICLR")),
    "ERK": PruneMethod(prune.ERKPruner, cites=_bib(
        "evci2020rigging", "Rigging the Lottery: Making All Tickets Winners",
        "Utku Evci and Trevor Gale and Jacob Menick and Pablo Samuel Castro and Erich Elsen", 2020, "ICML")),
    "uniform": PruneMethod(prune.UniformMagnitudePruner),
    "SNIP": PruneMethod(prune.SNIPPruner, start="initial", seeded=True, cites=_bib(
        "lee2019snip", "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
        "Namhoon Lee and Thalaiyasingam Ajanthan and Philip H. S. Torr", 2019, "ICLR")),
    "GraSP": PruneMethod(prune.GraSPPruner, start="initial", seeded=True, cites=_bib(
        "wang2020picking", "Picking Winning Tickets Before Training by Preserving Gradient Flow",
        "Chaoqi Wang and Guodong Zhang and Roger Grosse", 2020, "ICLR")),
    "random": PruneMethod(prune.RandomPruner, seeded=True),
    "random, retrained": PruneMethod(prune.RandomPruner, start="initial", seeded=True),
}  # fmt: skip


def _arm(task: Task, method: Method, options: Options) -> Arm:
    start = getattr(method, "start", "trained")

    def run(trial: Trial) -> dict[str, float]:
        model = task.model(seed=trial.seed).to(trial.device)
        if start == "trained":
            model.load_state_dict(_trained(task, trial, model, options.epochs))
        seed = {"seed": trial.seed} if getattr(method, "seeded", False) else {}
        pruner = method.make(trial.setting, **seed, **trial.params)
        train: dict[str, Any] = {"epochs": _epochs(task, options.epochs, start)}
        found, macs = {"sparsity": 0.0}, None
        if isinstance(pruner, prune.TrainTimePruner):
            wrapped = pruner.wrap(model, sample_inputs(task)[:1].to(trial.device))
            train_by_recipe(
                task, trial, wrapped, **train, passed=wrapped.advance,
                step=lambda net, batch: task.loss(net(batch[0]), batch[1]) + wrapped.aux_loss(),
                optimizer=lambda _: task.recipe.make(wrapped.param_groups()),
            )  # fmt: skip
            model = wrapped
            if getattr(pruner, "dynamic", False):
                macs = _macs_spent(task, trial.split, wrapped)
            else:
                model, plan = pruner.derive(wrapped, _Batches(task, trial))
                found["sparsity"] = plan.sparsity()
        else:
            if pruner is not None:
                batches = _Batches(task, trial)
                plan = pruner.fit(model, data=batches, example_inputs=next(iter(batches))[0][:1], loss_fn=task.loss)
                model = plan.apply(model, mode=getattr(method, "mode", "mask"))
                found["sparsity"] = plan.sparsity()
            train_by_recipe(task, trial, model, **train)
        trial.spend(trainings=1.0)
        found |= measure(task, trial, model, macs=macs)
        _deploy(task, trial, model, options)
        return found

    return Arm(run, method.defaults, method.space, method.cites)


@torch.no_grad()
def _macs_spent(task: Task, split: str, model: Any) -> float:
    """Multiply-accumulates that a dynamic model really spends on a sample, the mean over a few hundred of the split."""
    dataset: Any = getattr(task, split)
    inputs = torch.stack([torch.as_tensor(dataset[i][0]) for i in range(min(512, len(dataset)))])
    model.eval()(inputs.to(metrics.device_of(model)))
    return float(model.macs(gates=True, others=True).double().mean())


def _deploy(task: Task, trial: Trial, model: nn.Module, options: Options) -> None:
    """Times the model as it would be used, its masks made permanent; leaves it in the trial's folder where that was asked for."""
    plain = copy.deepcopy(model).eval()
    for module in plain.modules():
        for name in [name.removesuffix("_orig") for name, _ in module.named_parameters(recurse=False) if name.endswith("_orig")]:
            torch_prune.remove(module, name)
    inputs = sample_inputs(task)
    trial.spend(latency_1=metrics.latency(plain, inputs[:1].to(trial.device)))
    if not (options.onnx or options.export):
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = trial.folder if options.export else Path(scratch)
        path = to_onnx(plain, inputs, folder / "model.onnx")
        trial.spend(onnx_latency=onnx_latency(path, inputs), onnx_latency_1=onnx_latency(path, inputs[:1]))
    if options.export:
        save_model(plain, str(trial.folder / "model.safetensors"))


def export(results: Results, folder: Path) -> list[Path]:
    """Copies the best model of each operating point: of the arm with the best mean, the seed that did best.

    The dense network and models that have not reached the operating point (but for ``TOLERANCE``) are left aside.

    Args:
        results: of a comparison whose trials have left their models.
        folder: gets a folder for each operating point with ``model.safetensors`` (the state dict), ``model.onnx`` and
            ``model.json`` (which trial it is, what it was measured to be).

    Returns:
        The folders written.
    """
    study, frame = results.study, results.frame
    done = frame[(frame.status == "done") & (frame.variant == ("tuned" if results.tuned else "common")) & (frame.arm != "dense")]
    sign = results.direction(study.metric)
    written = []
    for setting in study.settings:
        rows = done[(done.setting == setting) & (done.sparsity >= study.settings[setting] - TOLERANCE)]
        if rows.empty:
            continue
        best = (sign * rows.groupby("arm")[study.metric].mean()).idxmax()
        rows = rows[rows.arm == best]
        trial = rows.loc[(sign * rows[study.metric]).idxmax()]
        target = folder / f"sparsity-{setting}"
        target.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "model.onnx"):
            shutil.copyfile(results.folder / "trials" / trial.fingerprint / name, target / name)
        (target / "model.json").write_text(trial.dropna().to_json(indent=1) + "\n")
        written.append(target)
    return written


class _Batches:
    """The training data on the trial's device, as often as a pruner asks."""

    def __init__(self, task: Task, trial: Trial) -> None:
        self.task, self.trial = task, trial

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in Batches(self.task.train, self.task.recipe.batch_size, seed=self.trial.seed):
            yield tuple(x.to(self.trial.device) for x in batch)


def _trained(task: Task, trial: Trial, model: nn.Module, epochs: int | None) -> dict[str, Tensor]:
    if isinstance(task.model.source, nn.Module):
        return model.state_dict()

    def make() -> dict[str, Tensor]:
        dense = copy.deepcopy(model)
        train_by_recipe(task, Trial(trial.seed, trial.scale, device=trial.device), dense, epochs=epochs, log=False)
        return dense.state_dict()

    return trial.cached("dense", make, task=task, seed=trial.seed, scale=trial.scale.value, device=trial.device, epochs=epochs)


def _epochs(task: Task, epochs: int | None, start: str) -> int:
    full = task.recipe.epochs if epochs is None else epochs
    tuning = max(1, round(FINE_TUNE * full))
    return tuning if start == "trained" else full + tuning


def arms(task: Task, methods: Mapping[str, Method], options: Options) -> tuple[dict[str, Arm], dict[str, Any]]:
    """Returns an arm per method, under a setting per sparsity."""
    points = tuple(options.sparsity) or SPARSITY
    for sparsity in points:
        if not 0 <= sparsity < 1:
            raise UsageError(f"sparsity must be in [0, 1), got {sparsity:g}: it is the share of weights that is removed")
    if len(set(points)) != len(points):
        raise UsageError(f"every sparsity may be given once, got {', '.join(f'{s:g}' for s in points)}")
    if options.onnx or options.export:
        onnx_runtime()
    how = replace(options, sparsity=())  # a trial does not depend on the points beside its own
    return {name: _arm(task, method, how) for name, method in methods.items()}, {f"{s:g}": float(s) for s in points}


FAMILY = Family(
    "prune", "pruning methods on one trained model per seed; bring a model and data", BASELINES, "dense", arms,
    costs=("train_seconds", "parameters", "flops", "latency", "latency_1", "onnx_latency", "onnx_latency_1", "peak_memory"),
    metrics={"sparsity": "max"}, export=export,
)  # fmt: skip
