"""A task of your own: run `weightroom compare prune --task examples/mine.py --sparsity 0.8,0.9,0.95`."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import TensorDataset

import weightroom as wr


def task() -> wr.Task:
    table, labels = load_breast_cancer(return_X_y=True)
    x = torch.from_numpy((table - table.mean(0)) / table.std(0)).float()
    y = torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:400], order[400:]
    return wr.Task(
        "tumours",
        model=lambda: nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)),
        train=TensorDataset(x[train], y[train]),
        test=TensorDataset(x[test], y[test]),
        loss=nn.CrossEntropyLoss(),
        metrics=("accuracy", "nll"),
        recipe=wr.Recipe(optimizer="adam", lr=1e-3, epochs=20, batch_size=32),
    )
