"""What train-time pruners share: a model wrapped in gates, trained with one more loss, from which a smaller model is derived."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from weightroom.prune.plan import Inputs, PruningPlan

__all__ = ["TrainTimePruner", "WrappedModel"]


class WrappedModel(nn.Module, ABC):
    """A model with gates; it takes and returns what the model does.

    A training step is ``loss_fn(wrapped(inputs), targets) + wrapped.aux_loss()``.
    """

    @abstractmethod
    def aux_loss(self) -> Tensor:
        """The term that the last forward pass adds to the loss, a scalar with its weights multiplied in; 0 in eval mode."""

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: the model's own parameters first, then the gates'."""

    @abstractmethod
    def report(self, loader: Iterable[Any]) -> Any:
        """What the gates do on the data of ``loader`` (batches whose first entry is the input), in eval mode."""

    def advance(self, progress: float) -> None:
        """Says how much of the training has passed, in [0, 1], for terms that change over it; a method without any ignores it."""


class TrainTimePruner(ABC):
    """A pruner that learns during training what to remove."""

    @abstractmethod
    def wrap(self, model: nn.Module, example_inputs: Inputs) -> WrappedModel:
        """Returns the model with gates. The model given stays as it was: the wrapped one has copies of its weights."""

    @abstractmethod
    def derive(self, wrapped: WrappedModel, loader: Iterable[Any]) -> tuple[nn.Module, PruningPlan]:
        """Returns the plain, smaller model that the gates have settled on, and the plan that leads to it from the model wrapped."""
