"""What a trained network looks like inside."""

from weightroom.diagnostics.connectivity import LMCResult, linear_mode_connectivity
from weightroom.diagnostics.dead_neurons import DeadNeuronReport, LayerDeadNeurons, dead_neuron_rate
from weightroom.diagnostics.similarity import linear_cka, output_cka
from weightroom.diagnostics.three_regime import (
    Regime,
    RegimeReport,
    ThreeRegimeResult,
    ThreeRegimeStudy,
    classify_regime,
    measure_regime,
)

__all__ = [
    "DeadNeuronReport",
    "LMCResult",
    "LayerDeadNeurons",
    "Regime",
    "RegimeReport",
    "ThreeRegimeResult",
    "ThreeRegimeStudy",
    "classify_regime",
    "dead_neuron_rate",
    "linear_cka",
    "linear_mode_connectivity",
    "measure_regime",
    "output_cka",
]
