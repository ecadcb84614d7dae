"""Products with Fisher matrices and their inverses."""

from weightroom.curvature.fisher import EmpiricalFisherInverse

__all__ = ["EmpiricalFisherInverse"]
