"""How training steps: ``torch.optim.Optimizer`` subclasses."""

from weightroom.optim.lion_k import LionK, lionk_objective
from weightroom.optim.lv_hba import BilevelProblem, LVHBAResult, ValueFunction, lv_hba, resolve_lower, value_function
from weightroom.optim.mfac import MFAC
from weightroom.optim.normalized_lrgd import NormalizedLRGD
from weightroom.optim.projections import project_affine, project_box, project_halfspaces, project_none, svm_margin_projection
from weightroom.optim.sam import SAM
from weightroom.optim.sso import SSO

__all__ = [
    "MFAC",
    "SAM",
    "SSO",
    "BilevelProblem",
    "LVHBAResult",
    "LionK",
    "NormalizedLRGD",
    "ValueFunction",
    "lionk_objective",
    "lv_hba",
    "project_affine",
    "project_box",
    "project_halfspaces",
    "project_none",
    "resolve_lower",
    "svm_margin_projection",
    "value_function",
]
