"""Small models of every kind that pruners meet, each with an input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Convolution, batch norm and two residual blocks, one with a projection."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 1, stride=2)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn(self.stem(x)))
        h = torch.relu(h + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(h))))))
        h = torch.relu(self.down(h) + self.bn3(self.conv3(h)))
        return self.head(h.mean((2, 3)))


class Recurrent(nn.Module):
    """A bidirectional LSTM and a linear head."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 10, batch_first=True, bidirectional=True)
        self.head = nn.Linear(20, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """torch's own encoder layer: attention whose weight is a raw parameter and whose output layer is never called."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Tied(nn.Module):
    """An autoencoder whose two layers share one weight."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 6)
        self.decode = nn.Linear(6, 6)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.decode(torch.relu(self.encode(x)))))


class Shuffled(nn.Module):
    """Two convolutions with a channel shuffle between them, as in ShuffleNet."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv1(x))
        n, channels, *size = h.shape
        h = h.view(n, 2, channels // 2, *size).transpose(1, 2).reshape(n, channels, *size)
        return self.head(torch.relu(self.conv2(h)).mean((2, 3)))


class InputAdded(nn.Module):
    """A residual block around the input itself, which no layer makes."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6, bias=False)
        self.hidden = nn.Linear(6, 10)
        self.head = nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(torch.relu(x + self.body(x)))))


class Transformer(nn.Module):
    """A small vision transformer of the transformers library."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
            num_channels=1, num_labels=classes,
        )  # fmt: skip
        self.vit = ViTForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(pixel_values=x).logits


class HierarchicalTransformer(nn.Module):
    """A small Swin of the transformers library: two stages, shifted windows, a merging of patches between them."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        from transformers import SwinConfig, SwinForImageClassification

        config = SwinConfig(
            image_size=8, patch_size=1, num_channels=1, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, mlp_ratio=2.0,
            num_labels=classes,
        )  # fmt: skip
        self.swin = SwinForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.swin(pixel_values=x).logits


def vgg() -> nn.Module:
    """As Simonyan and Zisserman's VGG-16 with batch norm: stages of convolutions, pooled after each, three linear layers."""
    layers: list[nn.Module] = []
    channels = 1
    for stage, width in ((2, 6), (2, 8), (3, 10)):
        for _ in range(stage):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(10, 12), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(12, 12), nn.ReLU(inplace=True), nn.Linear(12, 4)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 10), nn.ReLU(), nn.Linear(10, 4),
    )  # fmt: skip


def mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 1, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


IMAGE, VECTOR, SEQUENCE = (1, 8, 8), (6,), (5, 6)
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, VECTOR),
    "cnn": (cnn, IMAGE),
    "residual": (Residual, IMAGE),
    "mobile": (mobile, IMAGE),
    "vgg": (vgg, IMAGE),
    "lstm": (Recurrent, SEQUENCE),
    "attention": (Attention, (5, 8)),
    "tied": (Tied, VECTOR),
    "shuffle": (Shuffled, IMAGE),
    "input added": (InputAdded, VECTOR),
    "vit": (Transformer, IMAGE),
    "swin": (HierarchicalTransformer, IMAGE),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, eight inputs and their labels; skips the test where the library that has the model is missing."""
    if name in ("vit", "swin"):
        pytest.importorskip("transformers")
    torch.manual_seed(seed)
    factory, shape = ZOO[name]
    return factory(), torch.randn(8, *shape), torch.randint(4, (8,))
