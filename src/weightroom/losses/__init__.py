"""What training minimises: ``nn.Module`` losses called like ``nn.CrossEntropyLoss``."""

from weightroom.losses import noisy
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

__all__ = [
    "ALDRKLLoss",
    "CrammerSingerLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "GCELoss",
    "JSLoss",
    "LDRKLLoss",
    "MAELoss",
    "MIPLoss",
    "NCEAGCELoss",
    "NCEAULLoss",
    "NCERCELoss",
    "RLLLoss",
    "SCELoss",
    "SPOCKMIPLoss",
    "WestonWatkinsLoss",
    "aldr_kl",
    "focal_tversky_loss",
    "ldr_kl",
    "maximum_intensity_projections",
    "noisy",
]
