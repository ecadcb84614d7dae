"""Splitting and spoiling data sets: honest difficulties whose ground truth stays known."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from weightroom.errors import TaskError, UsageError

__all__ = ["gather", "imbalance", "in_memory", "noisy_labels", "split", "take", "targets"]


def gather(dataset: Dataset, indices: Tensor) -> list[Tensor]:
    """Returns the samples at ``indices`` stacked, one tensor per field; a single indexing operation for a ``TensorDataset``."""
    if isinstance(dataset, TensorDataset):
        return [tensor[indices] for tensor in dataset.tensors]
    if isinstance(dataset, Subset):
        return gather(dataset.dataset, torch.as_tensor(dataset.indices)[indices])
    if isinstance(dataset, Relabelled):
        inputs, *_ = gather(dataset.dataset, indices)
        return [inputs, dataset.labels[indices]]
    return list(torch.utils.data.default_collate([dataset[i] for i in indices.tolist()]))


def in_memory(dataset: Dataset) -> bool:
    """Whether reading every sample costs nothing worth mentioning."""
    return isinstance(dataset, TensorDataset) or (isinstance(dataset, Subset | Relabelled) and in_memory(dataset.dataset))


class Relabelled(Dataset):
    """A data set with other labels."""

    def __init__(self, dataset: Dataset, labels: Tensor) -> None:
        self.dataset, self.labels = dataset, labels

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        """The input of sample ``index`` and its new label."""
        return self.dataset[index][0], self.labels[index]


def split(dataset: Dataset, shares: Sequence[float], *, seed: int = 0) -> list[Dataset]:
    """Splits a data set at random into disjoint parts, none of them empty.

    Args:
        dataset: has ``len()`` and indexing.
        shares: a share > 0 for each part; their sum is 1.
        seed: decides which sample goes where.

    Raises:
        UsageError: the shares do not sum to 1, or there are fewer samples than parts.
    """
    n = _len(dataset)
    if min(shares) <= 0 or not math.isclose(sum(shares), 1.0):
        raise UsageError(f"shares must be > 0 and sum to 1, got {tuple(shares)}")
    if n < len(shares):
        raise UsageError(f"{n} samples cannot be split into {len(shares)} parts")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    ends = [max(i + 1, round(n * sum(shares[: i + 1]))) for i in range(len(shares))]
    ends = [min(end, n - (len(shares) - 1 - i)) for i, end in enumerate(ends)]
    return [_part(dataset, order[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def take(dataset: Dataset, samples: int, *, seed: int = 0) -> Dataset:
    """Returns ``samples`` samples chosen at random.

    Raises:
        UsageError: there are not so many, or fewer than one is asked for.
    """
    n = _len(dataset)
    if not 1 <= samples <= n:
        raise UsageError(f"samples must be between 1 and the {n} there are, got {samples}")
    return _part(dataset, torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:samples].sort().values)


def targets(dataset: Dataset) -> Tensor:
    """Returns all integer labels of a classification data set, shape (n_samples,), int64.

    Raises:
        TaskError: the targets are not one integer per sample.
    """
    if isinstance(dataset, TensorDataset):
        labels = dataset.tensors[1]
    elif isinstance(dataset, Relabelled):
        labels = dataset.labels
    elif isinstance(dataset, Subset):
        labels = targets(dataset.dataset)[torch.as_tensor(dataset.indices)]
    else:
        labels = torch.as_tensor([int(dataset[i][1]) for i in range(_len(dataset))])
    if labels.ndim != 1 or labels.is_floating_point():
        raise TaskError(
            f"label noise and imbalance need one integer label per sample, got {labels.dtype} targets of shape {tuple(labels.shape)}"
        )
    return labels.long()


def noisy_labels(dataset: Dataset, rate: float, *, kind: Literal["uniform", "next"] = "uniform", seed: int = 0) -> Dataset:
    """Replaces each label with probability ``rate``.

    Args:
        dataset: a classification data set.
        rate: in [0, 1].
        kind: "uniform" draws from all K classes, the true one included; "next" takes (k + 1) mod K.
        seed: decides which labels change, and to what.
    """
    if not 0 <= rate <= 1:
        raise UsageError(f"label_noise must be in [0, 1], got {rate:g}")
    if kind not in ("uniform", "next"):
        raise UsageError(f"noise must be 'uniform' or 'next', got {kind!r}")
    labels = targets(dataset)
    classes = int(labels.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    hit = torch.rand(len(labels), generator=generator) < rate
    other = torch.randint(classes, (len(labels),), generator=generator) if kind == "uniform" else (labels + 1) % classes
    return Relabelled(dataset, torch.where(hit, other, labels))


def imbalance(dataset: Dataset, ratio: float, *, seed: int = 0) -> Dataset:
    """Thins classes out exponentially: class k of K keeps a share of ``ratio ** (-k / (K - 1))``, at least one sample."""
    if not ratio >= 1:
        raise UsageError(f"imbalance must be >= 1, got {ratio:g}")
    labels = targets(dataset)
    generator = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    kept = []
    for k in range(classes):
        members = (labels == k).nonzero().flatten()
        if len(members):
            count = max(1, round(len(members) * ratio ** (-k / max(1, classes - 1))))
            kept.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return _part(dataset, torch.cat(kept).sort().values)


def _part(dataset: Dataset, indices: Tensor) -> Dataset:
    if isinstance(dataset, TensorDataset):
        return TensorDataset(*(tensor[indices] for tensor in dataset.tensors))
    return Subset(dataset, indices.tolist())


def _len(dataset: Dataset) -> int:
    return len(cast(Sized, dataset))
