"""Training: the one loop."""

from weightroom.train.fit import Batches, DivergedError, Fit, fabric_for, fit

__all__ = ["Batches", "DivergedError", "Fit", "fabric_for", "fit"]
