"""Architectures, with MONAI's constructor words: ``spatial_dims``, ``in_channels``, ``out_channels``."""

from weightroom.nets.unet import UNet

__all__ = ["UNet"]
