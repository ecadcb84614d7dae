"""Fewer weights: plan pruners and the ``PruningPlan`` they return; train-time pruners that wrap a model and derive a smaller one."""

from weightroom.prune.allocation import allocate_dp
from weightroom.prune.base import GradualPruning, PlanPruner, prune_gradually, sparsity_at, successive_sparsities
from weightroom.prune.consensus_gates import ConsensusGatePruner, GateReport, PolarizationLoss
from weightroom.prune.dimap import DIMAPPruner, distortion_importance
from weightroom.prune.ftwt import DynamicConvBlock, DynamicMaskPruner, DynamicModel, MaskPredictor, MaskReport, mass_targets
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
from weightroom.prune.joint_layerwise import RDPlan, RDPruner, output_distortion
from weightroom.prune.mfac import MFACPruner
from weightroom.prune.plan import LayerSparsity, PruningPlan
from weightroom.prune.precropping import PreCrop, layerwise_density, shuffle_masks
from weightroom.prune.selective_activation import ActivateWhilePruning, ActivationPlan
from weightroom.prune.snip import SNIPPruner
from weightroom.prune.synflow import SynFlowPruner
from weightroom.prune.widths import WidthPlan
from weightroom.prune.wrapped import TrainTimePruner, WrappedModel

__all__ = [
    "ActivateWhilePruning",
    "ActivationPlan",
    "ConsensusGatePruner",
    "DIMAPPruner",
    "DynamicConvBlock",
    "DynamicMaskPruner",
    "DynamicModel",
    "ERKPruner",
    "GateReport",
    "GlobalMagnitudePruner",
    "GraSPPruner",
    "GradualPruning",
    "LAMPPruner",
    "LayerSparsity",
    "MFACPruner",
    "MaskPredictor",
    "MaskReport",
    "PlanPruner",
    "PolarizationLoss",
    "PreCrop",
    "PruningPlan",
    "RDPlan",
    "RDPruner",
    "RandomPruner",
    "SNIPPruner",
    "SynFlowPruner",
    "TrainTimePruner",
    "UniformMagnitudePruner",
    "WidthPlan",
    "WrappedModel",
    "allocate_dp",
    "distortion_importance",
    "global_keep_counts",
    "layerwise_density",
    "mass_targets",
    "minimum_threshold_sparsities",
    "output_distortion",
    "prune_gradually",
    "shuffle_masks",
    "sparsity_at",
    "successive_sparsities",
]
