"""Optimal transport distances between point sets."""

from weightroom.transport.cv_sw import SlicedWassersteinLoss, sliced_wasserstein

__all__ = ["SlicedWassersteinLoss", "sliced_wasserstein"]
