"""Gram matrices and what is closed form in them."""

from weightroom.lazy import attach

__all__ = ["SelfDistilledKernelRidge", "distillation_shrinkage", "optimal_alpha"]

_HOME = dict.fromkeys(__all__, "self_distillation")
__getattr__, __dir__ = attach(__name__, {name: f"{__name__}.{home}" for name, home in _HOME.items()})
