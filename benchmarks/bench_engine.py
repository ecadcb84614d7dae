"""The frame itself: engine overhead per trial, listing a large store, ``train.fit``, and what importing costs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.base import Race, race
from weightroom.nets.small import ConvNet
from weightroom.study import Store, Study, Trial
from weightroom.train import Batches, fit


def trivial(trial: Trial) -> dict[str, float]:
    return {"m": float(trial.seed)}


def races() -> Iterator[Race]:
    yield _overhead()
    yield _listing()
    yield _fit()
    yield _import()


def _overhead() -> Race:
    """Against a budget of 20 ms a trial."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        Study("overhead", {"a": trivial}, metric="m", seeds=1000).run(folder, workers=2, progress=False)
        return Race(
            "engine, 1000 trivial trials on 2 workers, per trial",
            "a budget of 20 ms",
            (time.perf_counter() - start) / 1000,
            0.02,
            1.0,
        )


def _listing() -> Race:
    """Against a budget of one second."""
    with tempfile.TemporaryDirectory() as folder, Store(folder) as store:
        rows = [
            (f"{i:032x}", "s", f"arm {i % 20}", "", i, "test", "small", '{"lr": 0.1}', "{}", "done", '{"accuracy": 0.9, "nll": 0.3}',
             '{"seconds": 1.0, "parameters": 1000.0}', float(i))
            for i in range(100_000)
        ]  # fmt: skip
        with store._transaction():
            store.db.executemany(
                "INSERT INTO trials (fingerprint, study, arm, setting, seed, split, scale, params, versions, status, metrics, costs, finished)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert len(store.frame()) == 100_000
            times.append(time.perf_counter() - start)
        return Race("store, listing 100,000 trials", "a budget of 1 s", statistics.median(times), 1.0, 1.0)


def _fit() -> Race:
    data = TensorDataset(torch.randn(512, 3, 32, 32), torch.randint(10, (512,)))
    loss = nn.CrossEntropyLoss()
    model = ConvNet(3, 10, channels=(16, 32, 32, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def bare() -> None:
        model.train()
        for x, y in Batches(data, 64, seed=0):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()

    def ours() -> None:
        fit(model, data, loss=loss, optimizer=optimizer, epochs=1, batch_size=64)

    return race("train.fit, an epoch of a small CNN", ours, "a bare PyTorch loop", bare, target=1.05, rounds=15)


def _import() -> Race:
    """Against torch's import and 0.3 s."""

    def seconds(statement: str) -> float:
        code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
        runs = [
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.home())
            for _ in range(7)
        ]
        return statistics.median(float(run.stdout) for run in runs)

    return Race("import weightroom", "torch's import + 0.3 s", seconds("import weightroom"), seconds("import torch") + 0.3, 1.0)
