"""Built-in segmentation tasks: a 3-D vessel phantom, and real retinal vessels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from weightroom import data
from weightroom.data.phantoms import vessels as phantom
from weightroom.losses import FocalTverskyLoss
from weightroom.metrics import segmentation
from weightroom.nets import UNet
from weightroom.study import Recipe, Task

__all__ = ["retina", "vessels"]


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """Mean Dice of the samples at probability 0.5."""
    return segmentation.dice(logits > 0, target).mean()


def cl_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Mean Dice of the centre lines at probability 0.5."""
    return segmentation.cl_dice(logits > 0, target).mean()


def precision(logits: Tensor, target: Tensor) -> Tensor:
    """Mean share of the voxels found that are right."""
    return segmentation.precision(logits > 0, target).mean()


def recall(logits: Tensor, target: Tensor) -> Tensor:
    """Mean share of the right voxels that are found."""
    return segmentation.recall(logits > 0, target).mean()


def fragments(logits: Tensor, target: Tensor) -> Tensor:
    """Mean number of connected components too many or too few. Lower is better."""
    return segmentation.component_difference(logits > 0, target).mean()


def vessels(*, epochs: int = 15) -> Task:
    """Curved tubes that fade in places, 3-D (a seeded phantom): 64 patches of 8 volumes to train, 4 volumes to validate, 12 to test.

    The loss is soft Dice; the network a small 3-D U-Net.

    Args:
        epochs: of the recipe (Adam 5e-3, batches of 8).
    """
    images, labels = phantom(24, size=32, seed=0)
    corners = torch.randint(0, 9, (64, 3), generator=torch.Generator().manual_seed(0))
    cut = lambda v: torch.stack([v[i % 8, :, a : a + 24, b : b + 24, c : c + 24] for i, (a, b, c) in enumerate(corners.tolist())])  # noqa: E731
    train = TensorDataset(cut(images), cut(labels))
    val, test = (TensorDataset(images[part], labels[part]) for part in (slice(8, 12), slice(12, 24)))
    measured = (dice, cl_dice, precision, recall, fragments)
    return _task("vessels", lambda: UNet(3, 1, 1), (train, val, test), measured, Recipe(lr=5e-3, epochs=epochs, batch_size=8))


def retina(*, epochs: int = 10, patch: int = 96, folder: Path | None = None) -> Task:
    """Vessels in photographs of children's eyes (CHASE_DB1, CC BY 4.0, under ``WEIGHTROOM_DATA``), in patches.

    Children 1 to 4 to train (40 random patches an eye), 5 to validate, 6 and 7 to test (every patch of a grid inside the eye).

    Args:
        epochs: of the recipe (Adam 3e-3, batches of 16).
        patch: side of a patch in pixels.
        folder: read the images from here instead.
    """
    eyes = data.chase_db1(folder=folder)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for children, random in (("1234", True), ("5", False), ("67", False)):
        chosen = [eye for name, eye in eyes.items() if name.strip("0")[0] in children]
        cut = [_random(eye, patch, 40, generator) if random else _grid(eye, patch) for eye in chosen]
        parts.append(TensorDataset(*(torch.cat(fields) for fields in zip(*cut, strict=True))))
    train, val, test = parts
    measured = (dice, cl_dice, precision, recall)
    return _task(
        "retina",
        lambda: UNet(2, 3, 1, channels=(8, 16, 32)),
        (train, val, test),
        measured,
        Recipe(lr=3e-3, epochs=epochs, batch_size=16),
    )


def _task(
    name: str, model: Callable[[], UNet], parts: tuple[TensorDataset, TensorDataset, TensorDataset], measured: tuple[Callable, ...], recipe: Recipe
) -> Task:  # fmt: skip
    train, val, test = parts
    lower = ("fragments",) if fragments in measured else ()
    loss = FocalTverskyLoss(alpha=0.5, gamma=1.0, sigmoid=True)
    return Task(
        name, model=model, train=train, val=val, test=test, loss=loss, metrics=measured, lower_is_better=lower, recipe=recipe
    )


def _random(eye: tuple[Tensor, Tensor], size: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    image, mask = eye
    chosen: list[tuple[Tensor, Tensor]] = []
    while len(chosen) < count:
        top, left = (int(torch.randint(0, n - size + 1, (), generator=generator)) for n in image.shape[1:])
        window = (slice(None), slice(top, top + size), slice(left, left + size))
        if _inside(image[window]):
            chosen.append((image[window], mask[window]))
    return torch.stack([x for x, _ in chosen]), torch.stack([y for _, y in chosen])


def _grid(eye: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    image, mask = (x.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(0, 1) for x in eye)
    kept = torch.tensor([_inside(window) for window in image])
    return image[kept], mask[kept]


def _inside(window: Tensor) -> bool:
    """Whether a window lies inside the round field of view: outside it the photograph is black."""
    return bool((window.amax(0) > 0.06).float().mean() > 0.95)
