"""How training steps: ``torch.optim.Optimizer`` subclasses."""

from weightroom.optim.lion_k import LionK, lionk_objective

__all__ = ["LionK", "lionk_objective"]
