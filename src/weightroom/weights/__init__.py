"""Adapting, reparametrising, matching and merging the weights of a model."""

from weightroom.weights.bone import BoneConfig, BoneLinear, adapter_state_dict, bone, load_adapter, merge_, unmerge_

__all__ = ["BoneConfig", "BoneLinear", "adapter_state_dict", "bone", "load_adapter", "merge_", "unmerge_"]
