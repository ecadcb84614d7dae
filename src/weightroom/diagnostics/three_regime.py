r"""Three regimes of pruning: should the dense network be trained longer or shorter before it is pruned?

The noise of the dense training is a temperature: high after few epochs, with small batches or with a large radius of SAM. The
density left by pruning is a load. Retrain the pruned network twice from the same start, with other batches, and ask two questions:
is the straight line between the two free of barriers, and do they compute the same function?

::

    regime  connected  similar  what to do before pruning
    I       no         -        raise the temperature: train less
    II-A    yes        no       lower the temperature: train longer
    II-B    yes        yes      nothing

So the best temperature is high at low density and low at high density, with a sharp switch between.

Reach for it to choose the length (batch size, radius) of a training that will be pruned, to choose among dense networks by a cheap
retraining of each, or as a report card of a pruning study. It prunes nothing itself.

Known not to work: the thresholds are ours, the paper draws its borders by eye, so read the numbers too. The deep barriers of the
paper (half the training error) need networks and schedules of its size; a perceptron without batch norm shows none at all, and with
none the answer is always regime II. Where both retrainings fail to fit the data there is no barrier to see either.

Zhou, Yang, Chang, Mahoney, "A Three-regime Model of Network Pruning", ICML 2023, arXiv 2305.18383, figures 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import prune as torch_prune

from weightroom.diagnostics.base import batches, plain_copy
from weightroom.diagnostics.connectivity import _values, linear_mode_connectivity
from weightroom.diagnostics.similarity import output_cka
from weightroom.errors import UsageError, check_range
from weightroom.metrics import copy_model, device_of

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["Regime", "RegimeReport", "ThreeRegimeResult", "ThreeRegimeStudy", "classify_regime", "measure_regime"]

Train = Callable[[nn.Module, Any, int], Any]

_ADVICE = {
    "I": "raise the temperature: train the dense network for fewer epochs, with smaller batches or a larger radius of SAM",
    "II-A": "lower the temperature: train the dense network longer, with larger batches or a smaller radius of SAM",
    "II-B": "keep the temperature: the retrainings agree, and a higher one would only train the dense network less well",
}


class Regime(StrEnum):
    """One of the three regimes; equal to its name, "I", "II-A" or "II-B"."""

    I = "I"  # noqa: E741
    IIA = "II-A"
    IIB = "II-B"

    @property
    def advice(self) -> str:
        """What to do about the dense training."""
        return _ADVICE[self.value]

    @property
    def direction(self) -> Literal[-1, 0, 1]:
        """Which way to change the temperature: 1 up, -1 down, 0 not at all."""
        return 1 if self is Regime.I else -1 if self is Regime.IIA else 0


def classify_regime(lmc: float, cka: float, *, lmc_tol: float = 0.05, cka_tol: float = 0.98) -> Regime:
    """Returns the regime of a linear mode connectivity and a similarity of outputs.

    Connected means ``lmc >= -lmc_tol``, similar ``cka >= cka_tol``, both with equality; a NaN is neither. Not connected is regime I
    whatever the similarity; connected is II-B if similar, else II-A.

    Args:
        lmc: as ``linear_mode_connectivity`` has it: negative where there is a barrier.
        cka: as ``output_cka`` has it.
        lmc_tol: the barrier that is no barrier yet, >= 0, in the unit of ``lmc``.
        cka_tol: the least similarity of networks that compute the same.

    Raises:
        ValueError: ``lmc_tol`` < 0.
    """
    check_range("lmc_tol", lmc_tol, low=0.0)
    if not lmc >= -lmc_tol:
        return Regime.I
    return Regime.IIB if cka >= cka_tol else Regime.IIA


@dataclass(frozen=True)
class RegimeReport:
    """What retrainings of one pruned network (or several) say about it.

    Args:
        lmcs: the linear mode connectivity of each pair of retrainings.
        ckas: the similarity of the softmax outputs of each pair.
        train_errors: training error of each pair, the mean of both.
        lmc_tol: see ``classify_regime``; the tolerance is at least this.
        cka_tol: see ``classify_regime``.
    """

    lmcs: tuple[float, ...]
    ckas: tuple[float, ...]
    train_errors: tuple[float, ...]
    lmc_tol: float = 0.05
    cka_tol: float = 0.98

    @property
    def lmc(self) -> float:
        """Mean over pairs."""
        return float(np.mean(self.lmcs))

    @property
    def cka(self) -> float:
        """Mean over pairs."""
        return float(np.mean(self.ckas))

    @property
    def train_error(self) -> float:
        """Mean over pairs."""
        return float(np.mean(self.train_errors))

    @property
    def tolerance(self) -> float:
        """The barrier that counts as none: ``lmc_tol``, or two standard errors over pairs where these are more."""
        n = len(self.lmcs)
        return max(self.lmc_tol, 2 * float(np.std(self.lmcs, ddof=1)) / math.sqrt(n) if n > 1 else 0.0)

    @property
    def regime(self) -> Regime:
        """The regime of the means."""
        return classify_regime(self.lmc, self.cka, lmc_tol=self.tolerance, cka_tol=self.cka_tol)

    def __str__(self) -> str:
        return (
            f"regime {self.regime} (LMC {self.lmc:.4f} against -{self.tolerance:.4f}, CKA {self.cka:.4f} against {self.cka_tol:g}, "
            f"training error {self.train_error:.4f}, {len(self.lmcs)} pairs): {self.regime.advice}"
        )


def measure_regime(
    models: Sequence[nn.Module], loader: Iterable[Any], *, lmc_tol: float = 0.05, cka_tol: float = 0.98, points: int = 11
) -> RegimeReport:
    """Measures the regime of a pruned network from retrainings of it, all pairs.

    Args:
        models: two retrainings or more, with one mask; left as they were.
        loader: batches (inputs, targets) of the training data, the same at each pass.
        lmc_tol: see ``classify_regime``.
        cka_tol: see ``classify_regime``.
        points: see ``linear_mode_connectivity``.

    Raises:
        ValueError: there are fewer than two models, or as from ``linear_mode_connectivity``.
    """
    if len(models) < 2:
        raise UsageError(f"models must hold two retrainings at least, got {len(models)}")
    pairs = list(combinations(models, 2))
    lines = [linear_mode_connectivity(a, b, loader, points=points) for a, b in pairs]
    return RegimeReport(
        tuple(line.lmc for line in lines),
        tuple(output_cka(a, b, loader) for a, b in pairs),
        tuple(float(line.values[0] + line.values[-1]) / 2 for line in lines),
        lmc_tol,
        cka_tol,
    )


@dataclass(frozen=True, eq=False)
class ThreeRegimeResult:
    """The grid of a ``ThreeRegimeStudy``.

    Args:
        table: one row per seed, temperature and density: ``seed``, ``temperature``, ``density``, ``lmc``, ``cka``, ``train_error``,
            ``test_error`` (mean over retrainings) and ``regime``.
        temperatures: in the order of the grid's rows.
        densities: in the order of its columns.
        reports: (temperature, density) -> what the pairs of all seeds say together.
    """

    table: pd.DataFrame
    temperatures: tuple[Any, ...]
    densities: tuple[float, ...]
    reports: dict[tuple[Any, float], RegimeReport]

    @property
    def heatmaps(self) -> dict[str, np.ndarray]:
        """ "test_error", "lmc" and "cka": means over seeds, of shape (temperatures, densities)."""
        shape = (-1, len(self.temperatures), len(self.densities))
        return {name: self.table[name].to_numpy().reshape(shape).mean(0) for name in ("test_error", "lmc", "cka")}

    @property
    def regimes(self) -> np.ndarray:
        """The regime of each cell, names, of shape (temperatures, densities)."""
        return np.array([[str(self.reports[t, d].regime) for d in self.densities] for t in self.temperatures])

    def report(self, temperature: Any, density: float) -> RegimeReport:
        """What the retrainings at this temperature and density say; ``str()`` of it is the advice with its numbers."""
        return self.reports[temperature, density]

    def figure(self) -> go.Figure:
        """The three heat maps, the regimes written into them."""
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        titles = {"test_error": "Test error", "lmc": "Linear mode connectivity", "cka": "CKA"}
        figure = make_subplots(rows=1, cols=3, subplot_titles=list(titles.values()), shared_yaxes=True)
        columns, rows = ([str(v) for v in values] for values in (self.densities, self.temperatures))
        for i, name in enumerate(titles):
            cells = go.Heatmap(
                z=self.heatmaps[name], x=columns, y=rows, text=self.regimes, texttemplate="%{text}", colorscale="Blues",
                reversescale=name != "test_error", showscale=False, hovertemplate="%{x}, %{y}: %{z:.4f}<extra></extra>",
            )  # fmt: skip
            figure.add_trace(cells, row=1, col=i + 1)
            figure.update_xaxes(title_text="density", type="category", row=1, col=i + 1)
        figure.update_yaxes(type="category")
        figure.update_yaxes(title_text="temperature", row=1, col=1)
        return figure


class ThreeRegimeStudy:
    """The sweep over temperature and load: train, prune once, retrain with several seeds, measure.

    Every retraining starts from the weights that pruning left, and all those of one dense network share their mask.

    Args:
        make_model: ``make_model(seed) -> nn.Module``, untrained.
        train_fn: ``train_fn(model, temperature, seed)`` trains in place, with the masks that the model carries: a dense network at
            one of ``temperatures``, or, where ``temperature`` is None, a pruned one, always in the same way.
        densities: shares of the prunable weights that stay, in (0, 1].
        temperatures: what ``train_fn`` understands: numbers of epochs, batch sizes, radii of SAM.
        seeds: of the dense networks.
        pruner: ``pruner(sparsity)`` returns a plan pruner: ``fit(model, data=..., example_inputs=..., loss_fn=...) -> plan`` with
            ``plan.apply(model)``. None is the paper's: of every convolution (of every linear layer in a network without any) the
            same share, by magnitude, one weight of each at least.
        dense_fn: ``dense_fn(model, temperatures, seed)`` trains once and returns, or yields, one network for each of the
            temperatures in turn, to stop one training early at several of them; None trains each anew.
        retrainings: per dense network and density, >= 2; the paper has 3.
        lmc_tol: see ``classify_regime``.
        cka_tol: see ``classify_regime``.

    Raises:
        ValueError: an argument is out of its range, or empty.

    Example::

        def train_fn(model, temperature, seed):
            epochs = 16 if temperature is None else temperature
            train.fit(model, data, loss=loss, optimizer=sgd, epochs=epochs, seed=seed)
        result = ThreeRegimeStudy(make_model, train_fn, (0.05, 0.5), (2, 16), seeds=range(3)).run(train_loader, test_loader)
        print(result.report(16, 0.05))
    """

    def __init__(
        self,
        make_model: Callable[[int], nn.Module],
        train_fn: Train,
        densities: Sequence[float],
        temperatures: Sequence[Hashable],
        seeds: Sequence[int] = (0, 1, 2),
        *,
        pruner: Callable[[float], Any] | None = None,
        dense_fn: Callable[[nn.Module, Sequence[Any], int], Iterable[nn.Module]] | None = None,
        retrainings: int = 2,
        lmc_tol: float = 0.05,
        cka_tol: float = 0.98,
    ) -> None:
        for name, values in (("densities", densities), ("temperatures", temperatures), ("seeds", seeds)):
            if not len(values) or len(set(values)) != len(values):
                raise UsageError(f"{name} must be different values, one at least, got {tuple(values)}")
        for density in densities:
            check_range("density", density, low=0.0, high=1.0, open_low=True)
        if retrainings < 2:
            raise UsageError(f"retrainings must be >= 2, got {retrainings}")
        self.make_model, self.train_fn, self.pruner, self.dense_fn = make_model, train_fn, pruner, dense_fn
        self.densities, self.temperatures, self.seeds = tuple(densities), tuple(temperatures), tuple(seeds)
        self.retrainings, self.lmc_tol, self.cka_tol = retrainings, lmc_tol, cka_tol

    def run(self, train_loader: Iterable[Any], test_loader: Iterable[Any]) -> ThreeRegimeResult:
        """Runs the grid: ``seeds * temperatures * (1 + densities * retrainings)`` trainings.

        Args:
            train_loader: batches (inputs, targets) of the training data, without augmentation and in one order; to measure
                connectivity and similarity, and for a pruner that looks at data.
            test_loader: batches of the test data.

        Raises:
            ValueError: a retrained network diverged; there is nothing to prune, or a network is already sparser than asked for.
        """
        import pandas as pd

        rows, pooled = [], dict[tuple[Any, float], list[RegimeReport]]()
        for seed in self.seeds:
            for temperature, dense in zip(self.temperatures, self._dense(seed), strict=True):
                for density in self.densities:
                    report, error = self._cell(dense, density, seed, train_loader, test_loader)
                    pooled.setdefault((temperature, density), []).append(report)
                    rows.append({
                        "seed": seed, "temperature": temperature, "density": density, "lmc": report.lmc, "cka": report.cka,
                        "train_error": report.train_error, "test_error": error, "regime": str(report.regime),
                    })  # fmt: skip
        reports = {key: _pool(found) for key, found in pooled.items()}
        return ThreeRegimeResult(pd.DataFrame(rows), self.temperatures, self.densities, reports)

    def _dense(self, seed: int) -> Iterable[nn.Module]:
        if self.dense_fn is not None:
            yield from self.dense_fn(self.make_model(seed), self.temperatures, seed)
            return
        for temperature in self.temperatures:
            model = self.make_model(seed)
            self.train_fn(model, temperature, seed)
            yield model

    def _cell(
        self, dense: nn.Module, density: float, seed: int, train_loader: Iterable[Any], test_loader: Iterable[Any]
    ) -> tuple[RegimeReport, float]:
        pruned = copy_model(dense)
        if self.pruner is None:
            prune_uniformly(pruned, density)
        else:
            inputs, *_ = next(iter(batches(train_loader, device_of(pruned))))
            plan = self.pruner(1 - density).fit(
                pruned, data=train_loader, example_inputs=inputs[:1], loss_fn=nn.functional.cross_entropy
            )
            plan.apply(pruned)
        retrained = []
        for r in range(self.retrainings):
            retrained.append(copy_model(pruned))
            self.train_fn(retrained[-1], None, retraining_seed(seed, r))
        report = measure_regime(retrained, train_loader, lmc_tol=self.lmc_tol, cka_tol=self.cka_tol)
        return report, float(np.mean([_error(model, test_loader) for model in retrained]))


def _pool(reports: Sequence[RegimeReport]) -> RegimeReport:
    lmcs, ckas, errors = (
        tuple(chain.from_iterable(values))
        for values in ([r.lmcs for r in reports], [r.ckas for r in reports], [r.train_errors for r in reports])
    )
    return replace(reports[0], lmcs=lmcs, ckas=ckas, train_errors=errors)


def retraining_seed(seed: int, retraining: int) -> int:
    """The seed of a retraining: the same at every temperature and density, another than any dense training's below 1000."""
    return 1000 * (retraining + 1) + seed


def prune_uniformly(model: nn.Module, density: float) -> None:
    """Masks the smallest weights of every convolution, or of every linear layer where there is no convolution, in place.

    ``density`` is the share that stays of all weights of a layer, one at least; what is already masked is among what goes.
    """
    modules = list(model.modules())
    kind = _ConvNd if any(isinstance(m, _ConvNd) for m in modules) else nn.Linear
    layers: list[Any] = [m for m in modules if isinstance(m, kind)]
    if not layers:
        raise UsageError("the model has neither convolutions nor linear layers: give a pruner")
    for layer in layers:
        n = layer.weight.numel()
        kept = max(1, round(density * n))
        living = int(torch.count_nonzero(layer.weight_mask)) if hasattr(layer, "weight_mask") else n
        if living < kept:
            raise UsageError(
                f"density {density:g} is {kept} of the {n} weights of a layer, but masks leave only {living} of them"
            )
        torch_prune.l1_unstructured(layer, "weight", amount=living - kept)


@torch.no_grad()
def _error(model: nn.Module, loader: Iterable[Any]) -> float:
    errors, _ = _values([plain_copy(model)], loader, device_of(model), "error")
    return float(errors[0])
