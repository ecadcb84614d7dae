"""Adapting, reparametrising, matching and merging the weights of a model."""

from weightroom.train import reestimate_batchnorm
from weightroom.weights.bone import BoneConfig, BoneLinear, adapter_state_dict, bone, load_adapter, merge_, unmerge_
from weightroom.weights.learngene import (
    StageSharedEncoder,
    build_descendant,
    default_source,
    learn_learngene,
    learngene_expand,
)
from weightroom.weights.permutation import PermutationSpec, apply_permutation
from weightroom.weights.robust_signatures import RobustWeightSignature, apply_, patch, remove_
from weightroom.weights.weight_compander import WeightCompander, compand, compand_param_groups, fold
from weightroom.weights.weight_matching import (
    alignment_score,
    interpolate,
    l2_reduction,
    loss_barrier,
    loss_path,
    match_many,
    merge_many,
    ste_matching,
    taylor_barrier,
    weight_matching,
)

__all__ = [
    "BoneConfig",
    "BoneLinear",
    "PermutationSpec",
    "RobustWeightSignature",
    "StageSharedEncoder",
    "WeightCompander",
    "adapter_state_dict",
    "alignment_score",
    "apply_",
    "apply_permutation",
    "bone",
    "build_descendant",
    "compand",
    "compand_param_groups",
    "default_source",
    "fold",
    "interpolate",
    "l2_reduction",
    "learn_learngene",
    "learngene_expand",
    "load_adapter",
    "loss_barrier",
    "loss_path",
    "match_many",
    "merge_",
    "merge_many",
    "patch",
    "reestimate_batchnorm",
    "remove_",
    "ste_matching",
    "taylor_barrier",
    "unmerge_",
    "weight_matching",
]
