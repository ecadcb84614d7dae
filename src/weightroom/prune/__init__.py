"""Fewer weights: plan pruners and the ``PruningPlan`` they return."""

from weightroom.prune.base import GradualPruning, PlanPruner, prune_gradually, sparsity_at, successive_sparsities
from weightroom.prune.global_magnitude import (
    ERKPruner,
    GlobalMagnitudePruner,
    LAMPPruner,
    RandomPruner,
    UniformMagnitudePruner,
    global_keep_counts,
    minimum_threshold_sparsities,
)
from weightroom.prune.grasp import GraSPPruner
from weightroom.prune.mfac import MFACPruner
from weightroom.prune.plan import LayerSparsity, PruningPlan
from weightroom.prune.snip import SNIPPruner

__all__ = [
    "ERKPruner",
    "GlobalMagnitudePruner",
    "GraSPPruner",
    "GradualPruning",
    "LAMPPruner",
    "LayerSparsity",
    "MFACPruner",
    "PlanPruner",
    "PruningPlan",
    "RandomPruner",
    "SNIPPruner",
    "UniformMagnitudePruner",
    "global_keep_counts",
    "minimum_threshold_sparsities",
    "prune_gradually",
    "sparsity_at",
    "successive_sparsities",
]
