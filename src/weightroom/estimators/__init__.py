"""Tabular and health models in scikit-learn's and lifelines' conventions."""

from weightroom.lazy import attach

__all__ = ["DPKaplanMeier", "NormalizedLogisticGD", "audit_epsilon"]

_HOME = {"DPKaplanMeier": "dp_kaplan_meier", "NormalizedLogisticGD": "normalized_lrgd", "audit_epsilon": "dp_kaplan_meier"}
__getattr__, __dir__ = attach(__name__, {name: f"{__name__}.{home}" for name, home in _HOME.items()})
