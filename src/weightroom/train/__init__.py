"""Training: the one loop, and the statistics of batch norm."""

from weightroom.train.batchnorm import gathering_statistics, reestimate_batchnorm
from weightroom.train.fit import Batches, DivergedError, Fit, fabric_for, fit

__all__ = ["Batches", "DivergedError", "Fit", "fabric_for", "fit", "gathering_statistics", "reestimate_batchnorm"]
