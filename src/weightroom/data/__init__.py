"""Data: splits, honest difficulties, readers and phantoms."""

from weightroom.data.corruptions import corrupt, corrupted, corruptions
from weightroom.data.readers import chase_db1, cifar10, data_root, mnist
from weightroom.data.spoil import gather, imbalance, in_memory, noisy_labels, split, take, targets

__all__ = [
    "chase_db1",
    "cifar10",
    "corrupt",
    "corrupted",
    "corruptions",
    "data_root",
    "gather",
    "imbalance",
    "in_memory",
    "mnist",
    "noisy_labels",
    "split",
    "take",
    "targets",
]
