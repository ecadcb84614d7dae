"""Students that learn from teachers."""

from weightroom.distill.base import KDObjective
from weightroom.distill.dual_head import DHKDObjective, DualHead, DualOutput
from weightroom.distill.losses import BinaryKLLoss, BinaryKLNormLoss, DKDLoss, SoftmaxKDLoss
from weightroom.distill.self_distillation import SelfDistiller, softmax_mse, sum_of_norms
from weightroom.lazy import attach

__all__ = [
    "BinaryKLLoss",
    "BinaryKLNormLoss",
    "DHKDObjective",
    "DKDLoss",
    "DualHead",
    "DualOutput",
    "KDObjective",
    "SelfDistiller",
    "SoftmaxKDLoss",
    "optimal_alpha",
    "softmax_mse",
    "sum_of_norms",
]

__getattr__, __dir__ = attach(__name__, {"optimal_alpha": "weightroom.kernels.self_distillation"})
