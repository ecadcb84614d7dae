"""Attacks, and training objectives that need the model."""

from weightroom.adversarial.base import AdversarialObjective, pgd
from weightroom.adversarial.done import DONE
from weightroom.adversarial.smooth_comp_sum import SmoothAdversarialCompSum
from weightroom.adversarial.trades import PGDAT, TRADES

__all__ = ["DONE", "PGDAT", "TRADES", "AdversarialObjective", "SmoothAdversarialCompSum", "pgd"]
