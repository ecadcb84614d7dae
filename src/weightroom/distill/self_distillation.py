r"""Self-distillation: train a model, train its twin on a mixture of the labels and the model's own predictions, and so on.

Step 1 is trained on the labels y. At step :math:`\tau > 1` a fresh copy is trained on :math:`\alpha_\tau y + (1-\alpha_\tau) p_{\tau-1}`,
where :math:`p_{\tau-1}` is what the previous copy predicts for the training samples. As the squared error is affine in its
targets, this is the gradient of :math:`\alpha\,\mathrm{MSE}(p, y) + (1-\alpha)\,\mathrm{MSE}(p, p_{\tau-1})`, for one loss.

The weight may be yours, the best of a grid by validation error, or estimated: were predictions affine in :math:`\alpha`, as they are in
kernel ridge regression, its optimum would follow from the predictions at 0 and at 1 (``optimal_alpha``). The first model is that
at 1; so a step costs two trainings, one at 0 and one at the estimate, where a grid costs one for each of its values.

Reach for it when training labels are noisy, some clean ones are at hand for validation, and the model may be trained several times.

Borup and Andersen, "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation",
NeurIPS 2021, arXiv 2102.13088. The kernel version, where all of this is exact: ``weightroom.kernels.SelfDistilledKernelRidge``.

Known not to work, or to differ:

- :math:`\alpha = 0` regularises more at every step, without end.
- The estimate is one only for the squared error; with cross entropy or few validation samples it is a guess. See ``raw_alphas_``: a
  value far outside [0, 1] says that it does not apply.
- The authors' script asks the teacher about each augmented batch and selects checkpoints by test accuracy. Here the predictions
  are computed once, on the samples as given, and selection is on the validation data alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weightroom import kernels, metrics
from weightroom.distill.base import check_logits
from weightroom.errors import UsageError, check_range, unknown

__all__ = ["SelfDistiller", "softmax_mse", "sum_of_norms"]

Output = Literal["softmax", "identity"]


def softmax_mse(logits: Tensor, target: Tensor, teacher_logits: Tensor | None = None, alpha: float = 0.5) -> Tensor:
    r"""Mean squared error of the softmax, towards the target or a mixture of target and teacher.

    .. math:: \mathrm{MSE}\big(\mathrm{softmax}(z),\ \alpha\, y + (1-\alpha)\, \mathrm{softmax}(z_t)\big)

    has the gradient of :math:`\alpha\,\mathrm{MSE}(\mathrm{softmax}(z), y) + (1-\alpha)\,\mathrm{MSE}(\mathrm{softmax}(z), \mathrm{softmax}(z_t))`
    and is less by :math:`\alpha(1-\alpha)\,\mathrm{MSE}(y, \mathrm{softmax}(z_t))`, which does not depend on z. As ``softmax_mse(logits, target)``
    it is a loss for ``train.fit``.

    Args:
        logits: (N, K), floating; half precision is computed in float32.
        target: classes (N,), integers, or probabilities (N, K).
        teacher_logits: (N, K); gets no gradient. None for the target alone.
        alpha: weight of the target, in [0, 1]; without effect when there is no teacher.

    Returns:
        A scalar: the mean over samples and classes.

    Raises:
        TypeError: logits are not floating.
        ValueError: shapes do not fit, or ``alpha`` is out of range.
    """
    check_range("alpha", alpha, low=0.0, high=1.0)
    z = check_logits("logits", logits)
    y = F.one_hot(target.long(), z.shape[1]) if target.ndim == 1 else target
    if y.shape != z.shape:
        raise UsageError(f"target must have shape {(len(z),)} or {tuple(z.shape)}, as the logits, got {tuple(target.shape)}")
    y = y.to(z.dtype)
    if teacher_logits is not None:
        if teacher_logits.shape != z.shape:
            raise UsageError(f"teacher_logits must have shape {tuple(z.shape)}, as the logits, got {tuple(teacher_logits.shape)}")
        y = alpha * y + (1 - alpha) * teacher_logits.detach().to(z.dtype).softmax(1)
    return F.mse_loss(z.softmax(1), y)


def sum_of_norms(parameters: Iterable[Tensor]) -> Tensor:
    r"""Sum of the Euclidean norms (not of their squares) of the tensors that require gradients.

    The authors' regulariser is ``1e-4 * sum_of_norms(model.parameters())``, added to the loss. It pulls each tensor with constant
    force; a tensor that is zero gets no gradient.

    Args:
        parameters: floating tensors on one device.

    Returns:
        A scalar; 0 when there are none.
    """
    trained = [p for p in parameters if p.requires_grad]
    return torch.stack(list(torch._foreach_norm(trained))).sum() if trained else torch.zeros(())


class SelfDistiller:
    """Trains copies of a model one after the other, each on the labels and the one before.

    It knows no model and no training loop: ``make_model`` and ``fit_fn`` are yours.

    Args:
        make_model: returns a fresh model at each call; where it is to be reproducible, seed it.
        fit_fn: ``fit_fn(model, X, targets) -> model`` trains by the squared error on soft targets: probabilities (n, K) where
            ``output="softmax"``. For a network, ``train.fit(model, TensorDataset(X, targets), loss=softmax_mse, ...)`` does.
        alpha: weight of the labels in [0, 1]; "estimate"; or a sequence to choose from by validation error, at each step.
        steps: number of models >= 1, the first, which sees the labels alone, included.
        output: what becomes of a model's outputs: "softmax" of logits, for classes, or "identity".
        clip_alpha: move an estimate to [0, 1]; ``raw_alphas_`` says what it was.
        allow_outside: accept an ``alpha`` outside [0, 1].
        batch_size: samples per forward pass when a network is asked for its predictions.

    A model is an ``nn.Module``, asked in eval mode and without gradients (``X`` is then a tensor), or anything with a
    ``predict(X)`` that returns an array.

    Attributes:
        models_: the trained models of the ``steps``, the first teacher first; the trials of a grid or estimate are not kept.
        alphas_: a weight for each model; the first, which has no effect, is 1 unless ``alpha`` is one number.
        raw_alphas_: the same before clipping.
        n_trainings_: how many trainings all this took.

    Raises:
        TypeError: an argument is not of its kind; by ``fit``, ``fit_fn`` returned no model.
        ValueError: an argument is out of range; by ``fit``, the validation data are missing or empty, or labels and outputs do not fit.

    Example::

        def fit_fn(model, X, targets):
            train.fit(model, TensorDataset(X, targets), loss=softmax_mse, optimizer=torch.optim.Adam, epochs=60)
            return model

        distiller = SelfDistiller(make_model, fit_fn, alpha="estimate").fit(X, y, X_val, y_val)
        distiller.predict(X_test).argmax(1), distiller.alphas_, distiller.n_trainings_
    """

    models_: list[Any]
    alphas_: list[float]
    raw_alphas_: list[float]
    n_trainings_: int

    def __init__(
        self,
        make_model: Callable[[], Any],
        fit_fn: Callable[[Any, Any, Any], Any],
        alpha: float | Literal["estimate"] | Sequence[float] = 0.5,
        steps: int = 2,
        output: Output = "softmax",
        *,
        clip_alpha: bool = True,
        allow_outside: bool = False,
        batch_size: int = 1024,
    ) -> None:
        for name, function in (("make_model", make_model), ("fit_fn", fit_fn)):
            if not callable(function):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        for name, count in (("steps", steps), ("batch_size", batch_size)):
            if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
                raise UsageError(f"{name} must be an integer >= 1, got {count!r}")
        if output not in get_args(Output):
            raise unknown("output", str(output), get_args(Output))
        self.make_model, self.fit_fn = make_model, fit_fn
        self.alpha = _check_alpha(alpha, allow_outside)
        self.steps, self.output, self.batch_size = steps, output, batch_size
        self.clip_alpha, self.allow_outside = clip_alpha, allow_outside

    def fit(self, X: Any, y: Any, X_val: Any = None, y_val: Any = None) -> SelfDistiller:
        """Trains all models.

        Args:
            X: the training inputs, as ``fit_fn`` takes them.
            y: targets, a tensor for networks, else an array: classes 0, ..., K - 1 (n,) or probabilities (n, K) for
                ``output="softmax"``, where classes that neither ``y`` nor ``y_val`` has need probabilities; values of any shape
                for "identity".
            X_val: validation inputs; needed to estimate or choose ``alpha``, else not used.
            y_val: their targets.

        Returns:
            The object itself.
        """
        if (X_val is None) != (y_val is None):
            raise UsageError("give X_val and y_val together or neither")
        given = self.alpha if isinstance(self.alpha, float) else None
        if given is None and self.steps > 1 and y_val is None:
            raise UsageError(f"alpha={self.alpha!r} needs validation data: give X_val and y_val")
        for kind, inputs, values in (("training", X, y), ("validation", X_val, y_val)):
            if values is not None and len(values) == 0:
                raise UsageError(f"the {kind} data are empty: they need at least one sample")
            if values is not None and _len(inputs) != len(values):
                raise UsageError(f"the {kind} data have {_len(inputs)} inputs but {len(values)} targets")
        labels, held = self._targets(y, y_val)
        if held is not None and tuple(held.shape[1:]) != tuple(labels.shape[1:]):
            raise UsageError(f"y and y_val must be alike, got shapes {tuple(labels.shape)} and {tuple(held.shape)}")
        self.n_trainings_ = 0
        self.models_ = [self._train(X, labels)]
        self.alphas_ = [1.0 if given is None else given]
        self.raw_alphas_ = list(self.alphas_)
        for _ in range(1, self.steps):
            previous = self._predict(self.models_[-1], X)
            if tuple(previous.shape) != tuple(labels.shape):
                raise UsageError(
                    f"the model's outputs must have the shape of the targets, {tuple(labels.shape)}, got {tuple(previous.shape)}"
                )
            self._step(X, labels, previous, X_val, held)
        return self

    def predict(self, X: Any) -> Any:
        """Returns what the last model predicts: after the softmax where ``output`` says so.

        Raises:
            RuntimeError: ``fit`` was not called.
        """
        if not hasattr(self, "models_"):
            raise RuntimeError("this SelfDistiller is not fitted yet: call fit first")
        return self._predict(self.models_[-1], X)

    def _step(self, X: Any, labels: Any, previous: Any, X_val: Any, held: Any) -> None:
        def student(alpha: float) -> Any:
            return self._train(X, alpha * labels + (1 - alpha) * previous)

        if isinstance(self.alpha, float):
            alpha = raw = self.alpha
            model = student(alpha)
        elif self.alpha == "estimate":
            p_label, p_distill = self._predict(self.models_[0], X_val), self._predict(student(0.0), X_val)
            raw = float(kernels.optimal_alpha(p_label, p_distill, held, clip=False))
            alpha = min(max(raw, 0.0), 1.0) if self.clip_alpha else raw
            model = student(alpha)
        else:
            students = [student(value) for value in self.alpha]
            errors = [float(((self._predict(candidate, X_val) - held) ** 2).mean()) for candidate in students]
            best = int(np.argmin(errors))
            alpha = raw = float(self.alpha[best])
            model = students[best]
        self.models_.append(model)
        self.alphas_.append(alpha)
        self.raw_alphas_.append(raw)

    def _train(self, X: Any, targets: Any) -> Any:
        model = self.fit_fn(self.make_model(), X, targets)
        self.n_trainings_ += 1
        if not isinstance(model, nn.Module) and not hasattr(model, "predict"):
            raise TypeError(f"fit_fn must return the trained model, got {type(model).__name__}")
        return model

    def _predict(self, model: Any, X: Any) -> Any:
        if isinstance(model, nn.Module):
            outputs, _ = metrics.predict(model, TensorDataset(X, torch.zeros(len(X))), batch_size=self.batch_size)
            outputs = outputs.to(X.device)
            return outputs.softmax(1) if self.output == "softmax" else outputs
        logits = np.asarray(model.predict(X))
        return softmax(logits, axis=1) if self.output == "softmax" else logits

    def _targets(self, y: Any, y_val: Any) -> tuple[Any, Any]:
        """Labels as the models' outputs should be: floating, one-hot where they are classes."""
        given = {name: x if isinstance(x, Tensor) else np.asarray(x) for name, x in (("y", y), ("y_val", y_val)) if x is not None}
        if self.output == "softmax":
            n_classes = max(_n_classes(name, x) for name, x in given.items())
            given = {name: _one_hot(x, n_classes) if x.ndim == 1 else x for name, x in given.items()}
        given = {name: x if _floating(x) else _as_float(x) for name, x in given.items()}
        return given["y"], given.get("y_val")


def _n_classes(name: str, x: Any) -> int:
    if x.ndim == 2:
        return x.shape[1]
    if x.ndim != 1 or _floating(x) or int(x.min()) < 0:
        raise UsageError(
            f"{name} must hold classes 0, ..., K - 1 as integers (n,), or probabilities (n, K), for output='softmax'"
        )
    return int(x.max()) + 1


def _len(x: Any) -> int:
    return x.shape[0] if hasattr(x, "shape") else len(x)


def _floating(x: Any) -> bool:
    return x.is_floating_point() if isinstance(x, Tensor) else x.dtype.kind == "f"


def _as_float(x: Any) -> Any:
    return x.to(torch.get_default_dtype()) if isinstance(x, Tensor) else x.astype(np.float64)


def _one_hot(x: Any, n_classes: int) -> Any:
    return F.one_hot(x.long(), n_classes) if isinstance(x, Tensor) else np.eye(n_classes)[x]


def _check_alpha(alpha: Any, allow_outside: bool) -> float | Literal["estimate"] | tuple[float, ...]:
    bounds: dict[str, Any] = {"low": 0.0, "high": 1.0}
    if allow_outside:
        bounds = {"low": -math.inf, "high": math.inf, "open_low": True, "open_high": True}
    if isinstance(alpha, str):
        if alpha == "estimate":
            return "estimate"
        raise unknown("alpha", alpha, ["estimate", "a number in [0, 1]", "a sequence of such numbers"])
    if isinstance(alpha, Real):
        check_range("alpha", alpha, **bounds)
        return float(alpha)
    if not isinstance(alpha, Sequence | np.ndarray):
        raise TypeError(f"alpha must be a number, 'estimate' or a sequence of numbers, got {type(alpha).__name__}")
    if len(alpha) == 0:
        raise UsageError("alpha must have at least one value to choose from, got an empty sequence")
    for value in alpha:
        check_range("alpha", value, **bounds)
    return tuple(float(value) for value in alpha)
