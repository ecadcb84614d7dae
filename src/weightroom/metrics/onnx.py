"""ONNX: writing a model, seeing that it computes the same, and timing it in ONNX Runtime on the CPU."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightroom.errors import MissingExtraError, WeightroomError

__all__ = ["OnnxMismatchError", "onnx_latency", "onnx_outputs", "onnx_runtime", "to_onnx"]

_OPTIMIZED = 99  # the enumeration's value for all of ONNX Runtime's graph optimisations


class OnnxMismatchError(WeightroomError):
    """An exported model does not compute what its original does."""


def to_onnx(model: nn.Module, example_inputs: Tensor, path: str | Path, *, tolerance: float = 1e-4) -> Path:
    """Writes a model, in eval mode, as ONNX with a free batch size, and checks the file against the model.

    Args:
        model: maps a tensor to a tensor; left as it is.
        example_inputs: a batch (N, ...).
        path: the file to write; nothing is left there when the check fails.
        tolerance: the most that an output may differ, relative to the largest output.

    Returns:
        The path.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        OnnxMismatchError: the outputs differ.
    """
    onnx_runtime()
    twin = copy.deepcopy(model).cpu().eval()
    inputs = example_inputs.detach().cpu()
    inputs = torch.cat([inputs, inputs]) if len(inputs) == 1 else inputs  # a batch of one would be taken for a constant
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _silent("torch.onnx"):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            twin, (inputs,), str(path), input_names=["input"], output_names=["output"], dynamo=True, verbose=False,
            external_data=False, dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    with torch.no_grad():
        expected = twin(inputs)
    found = onnx_outputs(path, inputs)
    worst, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not worst <= tolerance * max(scale, 1e-12):
        Path(path).unlink()
        raise OnnxMismatchError(f"{path} differs from the model by {worst:.3g}, at outputs of up to {scale:.3g}")
    return Path(path)


def onnx_outputs(path: str | Path, inputs: Tensor) -> Tensor:
    """Returns what ONNX Runtime computes from ``inputs``."""
    return torch.from_numpy(_session(path).run(None, {"input": inputs.detach().cpu().numpy()})[0])


def onnx_latency(path: str | Path, inputs: Tensor, *, repeats: int = 20) -> float:
    """Median seconds of a forward pass in ONNX Runtime, after three to warm up, with as many threads as torch uses."""
    session, feed, times = _session(path), {"input": inputs.detach().cpu().numpy()}, []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def _session(path: str | Path) -> Any:
    runtime = onnx_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = runtime.GraphOptimizationLevel(_OPTIMIZED)
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_runtime() -> Any:
    """Returns the module ``onnxruntime``.

    Raises:
        MissingExtraError: it, onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(str(error.name), "onnx", "ONNX export") from None
    return onnxruntime


@contextlib.contextmanager
def _silent(name: str) -> Any:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
