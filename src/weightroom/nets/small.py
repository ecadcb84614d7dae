"""Small classifiers that the built-in tasks train in seconds: a perceptron, a plain CNN, a residual network for small images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MLP", "ConvNet", "ResNet"]


class MLP(nn.Sequential):
    """Multi-layer perceptron on flattened inputs.

    Args:
        sizes: widths from input to output, e.g. ``(64, 128, 10)``.
        activation: class of the activation between layers.
    """

    def __init__(self, sizes: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for i, (a, b) in enumerate(pairwise(sizes)):
            layers += [activation()] * (i > 0) + [nn.Linear(a, b)]
        super().__init__(*layers)


class ConvNet(nn.Sequential):
    """Plain 2-D CNN: 3 x 3 convolutions with batch norm and ReLU, a max-pool after every second, global mean, one hidden layer.

    Args:
        in_channels: channels of the image.
        out_channels: classes.
        channels: of the convolutions.
        hidden: width of the hidden layer.
    """

    def __init__(self, in_channels: int, out_channels: int, channels: Sequence[int] = (8, 16, 32, 32), hidden: int = 64) -> None:
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip((in_channels, *channels), channels, strict=False)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            if i % 2 == 1:
                layers.append(nn.MaxPool2d(2))
        head = [
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels[-1], hidden),
            nn.ReLU(),
            nn.Linear(hidden, out_channels),
        ]
        super().__init__(*layers, *head)


class ResNet(nn.Module):
    """Residual network for small images (He et al. 2016, section 4.2, with projection shortcuts).

    Args:
        in_channels: channels of the image.
        out_channels: classes.
        blocks: residual blocks in each of the stages; 3 stages of 3 blocks are ResNet-20.
        width: channels of the first stage; each later one doubles them and halves the image.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 10, blocks: Sequence[int] = (1, 1, 1), width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages, channels = [], width
        for stage, count in enumerate(blocks):
            for i in range(count):
                out = width * 2**stage
                stages.append(_Block(channels, out, stride=2 if stage and i == 0 else 1))
                channels = out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))
