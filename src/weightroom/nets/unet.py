"""A plain U-Net in one, two or three dimensions, of any depth, with or without deep supervision.

Reach for it as the common network of a comparison: small enough to train on a CPU, and with wider ``channels`` the network that
vessel papers train. For residual units, attention or anisotropic strides take MONAI's networks (same constructor words).

Ronneberger et al., "U-Net", MICCAI 2015, arXiv 1505.04597. The heads at coarser levels follow UNet-MSS (Zhao et al., "MSS U-Net",
Informatics in Medicine Unlocked 19, 2020), with a 1x1 convolution each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UNet"]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


class UNet(nn.Module):
    """U-Net: convolutions of width 3 with batch norm and leaky ReLU, two per level; max pooling; nearest-neighbour upsampling.

    Args:
        spatial_dims: 1, 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the logits.
        channels: width of each level, the finest first; at least two.
        deep_supervision: in training mode also return the logits of up to two coarser decoder levels.

    Shape:
        - input: (B, in_channels, \\*spatial); every size at least ``2 ** (len(channels) - 1)``, not necessarily a multiple of it.
        - output: (B, out_channels, \\*spatial). With ``deep_supervision`` in training mode a list of such logits, the finest
          first, each following one at half the size.

    Raises:
        ValueError: an argument is out of its range, or an input is too small or has another number of dimensions or channels.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (6, 12, 24),
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), *(("channels", c) for c in channels)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if len(channels) < 2:
            raise ValueError(f"channels must have at least two levels, got {tuple(channels)}")
        self.spatial_dims, self.in_channels, self.deep_supervision = spatial_dims, in_channels, deep_supervision
        finer, coarser = channels[:-1], channels[1:]
        self.encoder = nn.ModuleList(self._block(i, o) for i, o in zip((in_channels, *finer), channels, strict=True))
        self.up = nn.ModuleList(self._unit(i, o) for i, o in zip(coarser, finer, strict=True))
        self.decoder = nn.ModuleList(self._block(2 * o, o) for o in finer)
        self.heads = nn.ModuleList(_CONV[spatial_dims - 1](c, out_channels, 1) for c in finer[: 3 if deep_supervision else 1])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Returns logits, see the class."""
        self._check(x)
        pool = _POOL[self.spatial_dims - 1]
        skips: list[Tensor] = []
        for block in self.encoder:
            x = block(pool(x, 2) if skips else x)
            skips.append(x)
        logits: list[Tensor] = []
        for level in reversed(range(len(self.decoder))):
            skip = skips[level]
            x = self.up[level](F.interpolate(x, size=skip.shape[2:], mode="nearest"))
            x = self.decoder[level](torch.cat((skip, x), dim=1))
            if level == 0 or (self.training and level < len(self.heads)):
                logits.insert(0, self.heads[level](x))
        return logits if self.deep_supervision and self.training else logits[0]

    def _unit(self, in_channels: int, out_channels: int) -> nn.Sequential:
        conv = _CONV[self.spatial_dims - 1](in_channels, out_channels, 3, padding=1, bias=False)  # the norm has the bias
        return nn.Sequential(conv, _NORM[self.spatial_dims - 1](out_channels), nn.LeakyReLU(inplace=True))

    def _block(self, in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(self._unit(in_channels, out_channels), self._unit(out_channels, out_channels))

    def _check(self, x: Tensor) -> None:
        if x.ndim != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            wanted = f"(B, {self.in_channels}, *) with {self.spatial_dims} spatial dimensions"
            raise ValueError(f"the input must have shape {wanted}, got {tuple(x.shape)}")
        least = 2 ** (len(self.encoder) - 1)
        if min(x.shape[2:]) < least:
            raise ValueError(f"{len(self.encoder)} levels need every spatial size to be >= {least}, got {tuple(x.shape[2:])}")
