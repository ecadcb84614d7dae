"""Metrics and costs: what a model is worth on a data set, and what it needs."""

from weightroom.metrics.basic import accuracy, balanced_accuracy, mae, minimised, mse, nll, r2, resolve, top5
from weightroom.metrics.cost import latency, macs, nonzero_parameters
from weightroom.metrics.evaluate import check_device, check_fit, copy_model, device_of, evaluating, predict
from weightroom.metrics.robust import robust_correct, tail_robust_accuracy

__all__ = [
    "accuracy",
    "balanced_accuracy",
    "check_device",
    "check_fit",
    "copy_model",
    "device_of",
    "evaluating",
    "latency",
    "macs",
    "mae",
    "minimised",
    "mse",
    "nll",
    "nonzero_parameters",
    "predict",
    "r2",
    "resolve",
    "robust_correct",
    "tail_robust_accuracy",
    "top5",
]
