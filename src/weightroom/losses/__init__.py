"""What training minimises: ``nn.Module`` losses called like ``nn.CrossEntropyLoss``."""

from weightroom.losses import noisy
from weightroom.losses.comp_sum import CompSumLoss, best_conditional_risk, comp_sum_loss, h_consistency_bound
from weightroom.losses.kl_dro import KLDROReduction
from weightroom.losses.ldr import ALDRKLLoss, LDRKLLoss, aldr_kl, ldr_kl
from weightroom.losses.mip import FocalTverskyLoss, MIPLoss, SPOCKMIPLoss, focal_tversky_loss, maximum_intensity_projections
from weightroom.losses.noisy import (
    CrammerSingerLoss,
    FocalLoss,
    GCELoss,
    JSLoss,
    MAELoss,
    NCEAGCELoss,
    NCEAULLoss,
    NCERCELoss,
    RLLLoss,
    SCELoss,
    WestonWatkinsLoss,
)
from weightroom.losses.normalized_logistic import NormalizedLogisticLoss, normalized_logistic_loss

__all__ = [
    "ALDRKLLoss",
    "CompSumLoss",
    "CrammerSingerLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "GCELoss",
    "JSLoss",
    "KLDROReduction",
    "LDRKLLoss",
    "MAELoss",
    "MIPLoss",
    "NCEAGCELoss",
    "NCEAULLoss",
    "NCERCELoss",
    "NormalizedLogisticLoss",
    "RLLLoss",
    "SCELoss",
    "SPOCKMIPLoss",
    "WestonWatkinsLoss",
    "aldr_kl",
    "best_conditional_risk",
    "comp_sum_loss",
    "focal_tversky_loss",
    "h_consistency_bound",
    "ldr_kl",
    "maximum_intensity_projections",
    "noisy",
    "normalized_logistic_loss",
]
