"""Adapting, reparametrising, matching and merging the weights of a model."""

from weightroom.weights.bone import BoneConfig, BoneLinear, adapter_state_dict, bone, load_adapter, merge_, unmerge_
from weightroom.weights.weight_compander import WeightCompander, compand, compand_param_groups, fold

__all__ = [
    "BoneConfig",
    "BoneLinear",
    "WeightCompander",
    "adapter_state_dict",
    "bone",
    "compand",
    "compand_param_groups",
    "fold",
    "load_adapter",
    "merge_",
    "unmerge_",
]
