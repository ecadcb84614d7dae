r"""Self-distilled kernel ridge regression: fit, then fit again to a mixture of the labels and one's own predictions, and so on.

With K the kernel matrix, :math:`k_x` the kernel between x and the training points, :math:`M = (K + \lambda I)^{-1}` and
:math:`y^{(0)} = y`, step :math:`\tau = 1, 2, \dots` is

.. math:: f_\tau(x) = k_x^\top M \big(\alpha_\tau y + (1-\alpha_\tau)\, y^{(\tau-1)}\big), \qquad y^{(\tau)} = f_\tau(X),

the minimiser of :math:`\frac{\alpha}{2}|f-y|^2 + \frac{1-\alpha}{2}|f-y^{(\tau-1)}|^2 + \frac{\lambda}{2}\|f\|_K^2`. Step 1 is the
ordinary fit, whatever :math:`\alpha_1`. In the eigenbasis of K a step only shrinks (``distillation_shrinkage``), small
eigenvalues more than large ones, and for a constant :math:`\alpha` the steps converge at the linear rate
:math:`\max_i (1-\alpha)\, d_i/(d_i+\lambda)` to ridge regression with the penalty :math:`\lambda/\alpha`; for :math:`\alpha = 0` to 0.
The validation error is quadratic in :math:`\alpha_\tau`, so that its minimiser has a formula (``optimal_alpha``).

Reach for it when a ridge fit is under-regularised and to see in closed form what self-distillation does to a model. It is no
better than ridge with a well-chosen :math:`\lambda`: distillation tunes the penalty again, always upwards.

Borup and Andersen, "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation",
NeurIPS 2021, arXiv 2102.13088. Numbers agree with the authors' notebook, where :math:`\lambda` is not multiplied by n either.

Known not to work, or to differ:

- Where :math:`\lambda` is large enough already, every further step smooths too much; :math:`\alpha = 0` collapses to the zero function.
- With ``alpha="validate"`` the raw optimum leaves [0, 1] where one step cannot shrink enough (below 0) or every step shrinks too
  much (above 1). It is clipped unless you say otherwise.
- The sparsification at :math:`\alpha = 0` (the ratio of a smaller to a larger eigenvalue's factor falls at every step) does not hold
  for every :math:`\alpha`: the ratio may rise again by a little before it settles.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigvalsh
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.metrics.pairwise import kernel_metrics, pairwise_kernels
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from weightroom.errors import UsageError, check_range, unknown

__all__ = ["SelfDistilledKernelRidge", "distillation_shrinkage", "optimal_alpha"]

Floats = NDArray[np.float64]

LIMIT = "limit"
_DTYPES = (np.float64, np.float32)


@overload
def optimal_alpha(p_label: Tensor, p_distill: Tensor, y_val: Tensor, clip: bool = True) -> Tensor: ...
@overload
def optimal_alpha(p_label: ArrayLike, p_distill: ArrayLike, y_val: ArrayLike, clip: bool = True) -> float: ...
def optimal_alpha(p_label: Any, p_distill: Any, y_val: Any, clip: bool = True) -> Tensor | float:
    r"""The weight of the labels that minimises a student's squared error on validation data.

    Predictions of a kernel ridge are affine in :math:`\alpha`, :math:`p_\alpha = \alpha p_1 + (1-\alpha) p_0`, so that

    .. math:: \alpha^* = \langle p_1 - p_0,\ y_v - p_0 \rangle \,/\, |p_1 - p_0|^2 .

    For networks it is an estimate, and with another loss than the squared error a heuristic.

    Args:
        p_label: :math:`p_1`, validation predictions of the fit to the labels; any shape, the same for all three.
        p_distill: :math:`p_0`, those of the fit to the previous predictions alone.
        y_val: :math:`y_v`, the validation targets.
        clip: move the result to the nearest value in [0, 1].

    Returns:
        A float for arrays; for tensors a 0-dim tensor on their device, in the dtype of ``p_label``.

    Raises:
        TypeError: tensors and arrays are mixed.
        ValueError: the shapes differ, or there is no validation sample.

    Warns:
        UserWarning: both predictions are the same, so that every weight is as good; the result is 1.
    """
    given = (p_label, p_distill, y_val)
    tensors = sum(isinstance(x, Tensor) for x in given)
    if tensors not in (0, 3):
        raise TypeError("p_label, p_distill and y_val must be three tensors or three arrays, got a mixture")
    half = tensors and p_label.dtype in (torch.float16, torch.bfloat16)
    p1, p0, y = (x.float() for x in given) if half else given if tensors else (np.asarray(x, dtype=np.float64) for x in given)
    if not tuple(p1.shape) == tuple(p0.shape) == tuple(y.shape):
        shapes = tuple(p1.shape), tuple(p0.shape), tuple(y.shape)
        raise UsageError("p_label, p_distill and y_val must have the same shape, got {}, {} and {}".format(*shapes))
    if not math.prod(p1.shape):
        raise UsageError("the validation data are empty: alpha needs at least one value in y_val")
    d = p1 - p0
    square = (d * d).sum()
    if square == 0:
        warnings.warn("p_label equals p_distill: every alpha gives the same predictions, 1 is returned", stacklevel=2)
        return torch.ones_like(square).to(p_label.dtype) if tensors else 1.0
    alpha = (d * (y - p0)).sum() / square
    alpha = alpha.clip(0, 1) if clip else alpha
    return alpha.to(p_label.dtype) if tensors else float(alpha)


def distillation_shrinkage(
    eigvals: ArrayLike, lam: float, alpha: float | Sequence[float], steps: int | float | Literal["limit"]
) -> Floats:
    r"""The factors by which each step scales the labels' coordinates in the eigenbasis of the kernel matrix.

    With :math:`K = V \mathrm{diag}(d) V^\top`, :math:`y^{(\tau)} = V \mathrm{diag}(b_\tau) V^\top y`, where

    .. math:: b_0 = 1, \qquad b_\tau = \tfrac{d}{d+\lambda} \big(\alpha_\tau + (1-\alpha_\tau)\, b_{\tau-1}\big),
        \qquad b_\infty = \frac{\alpha d}{\alpha d + \lambda} .

    Args:
        eigvals: d >= 0, shape (n,).
        lam: :math:`\lambda` > 0.
        alpha: one number, or one for each step, of which the first has no effect.
        steps: how many, or ``math.inf`` or "limit" for :math:`b_\infty` (with one ``alpha`` in [0, 1]).

    Returns:
        :math:`b_1, b_2, \dots`, shape (steps, n), or (1, n) for the limit.

    Raises:
        ValueError: an argument is out of its range.
    """
    d = np.asarray(eigvals, dtype=np.float64)
    check_range("lam", lam, low=0.0, high=math.inf, open_low=True, open_high=True)
    count = _check_steps(steps)
    alphas = _check_alpha(alpha, count, allow_outside=True)
    if count == math.inf:
        return (alphas[0] * d / (alphas[0] * d + lam))[None]
    b, a, rows = np.ones_like(d), d / (d + lam), []
    for alpha_tau in alphas:
        b = a * (alpha_tau + (1 - alpha_tau) * b)
        rows.append(b)
    return np.stack(rows)


class SelfDistilledKernelRidge(MultiOutputMixin, RegressorMixin, BaseEstimator):
    r"""Kernel ridge regression that is fitted again to its own predictions, with a weight on the labels.

    All steps come from one Cholesky factorisation; computed in float64. Not to be confused: ``lam`` is the penalty
    :math:`\lambda` (which ``sklearn.kernel_ridge.KernelRidge`` calls alpha), ``alpha`` the weight of the labels.

    Args:
        kernel: a name that ``sklearn.metrics.pairwise.pairwise_kernels`` knows, "precomputed", or a function of two samples.
        gamma: of the kernels that have one; the kernel's own default when None (rbf: 1 / n_features).
        lam: :math:`\lambda` > 0, not multiplied by the number of samples.
        alpha: :math:`\alpha` in [0, 1] for every step; one for each step in a sequence of length ``steps`` (the first has no
            effect); or "validate": at each step the one that minimises the validation error.
        steps: number of fits >= 1, the ordinary first one included. ``math.inf`` or "limit" gives the limit of infinitely many,
            ridge regression with the penalty ``lam / alpha``, for a single ``alpha`` in [0, 1].
        validation_fraction: share in (0, 1) of the samples that ``alpha="validate"`` holds out, where ``fit`` is given no
            validation data. The weights are found with the others; then all samples are fitted with these weights.
        clip_alpha: with "validate", move each weight to [0, 1]; ``raw_alphas_`` says what it was.
        allow_outside: accept an ``alpha`` outside [0, 1], for a finite number of steps.
        degree: of the polynomial kernel.
        coef0: of the polynomial and sigmoid kernels.
        kernel_params: further arguments of a kernel that is a function.
        random_state: which samples are held out.

    Attributes:
        dual_coefs_: array (steps, n) or (steps, n, n_outputs) of :math:`c_\tau`, :math:`f_\tau(x) = k_x^\top c_\tau`; one row
            for the limit.
        alphas_: array (steps,) of the weights; where they were chosen the first, which has no effect, is 1.
        raw_alphas_: the same before clipping.
        eigvals_: eigenvalues of K, ascending; computed when first asked for.
        X_fit_: the training samples, or the precomputed kernel matrix.

    Raises:
        TypeError: by ``fit``: a number was expected, or a sequence.
        ValueError: by ``fit``: an argument is out of range or unknown, the validation data are empty, or :math:`K + \lambda I` is not
            positive definite.

    Example::

        model = SelfDistilledKernelRidge(gamma=80, lam=0.2, alpha="validate", steps=4).fit(X, y)
        model.predict(X_new), model.predict(X_new, step=1), model.alphas_
    """

    def __init__(
        self,
        kernel: str | Callable[..., float] = "rbf",
        gamma: float | None = None,
        lam: float = 1.0,
        alpha: float | Sequence[float] | Literal["validate"] = 0.35,
        steps: int | float | Literal["limit"] = 3,
        validation_fraction: float = 0.2,
        clip_alpha: bool = True,
        allow_outside: bool = False,
        *,
        degree: float = 3,
        coef0: float = 1,
        kernel_params: dict[str, Any] | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        self.lam = lam
        self.alpha = alpha
        self.steps = steps
        self.validation_fraction = validation_fraction
        self.clip_alpha = clip_alpha
        self.allow_outside = allow_outside
        self.degree = degree
        self.coef0 = coef0
        self.kernel_params = kernel_params
        self.random_state = random_state

    def fit(
        self, X: ArrayLike, y: ArrayLike, X_val: ArrayLike | None = None, y_val: ArrayLike | None = None
    ) -> SelfDistilledKernelRidge:
        """Fits every step.

        Args:
            X: samples (n, n_features), sparse or not; the kernel matrix (n, n) for ``kernel="precomputed"``.
            y: targets (n,) or (n, n_outputs).
            X_val: samples to choose the weights on, (m, n_features) or (m, n) for ``kernel="precomputed"``; they are not
                fitted. Read only with ``alpha="validate"``.
            y_val: their targets.

        Returns:
            The estimator itself.
        """
        check_range("lam", self.lam, low=0.0, high=math.inf, open_low=True, open_high=True)
        if not callable(self.kernel) and self.kernel not in (names := [*kernel_metrics(), "precomputed"]):
            raise unknown("kernel", str(self.kernel), names)
        if (X_val is None) != (y_val is None):
            raise UsageError("give X_val and y_val together or neither")
        steps = _check_steps(self.steps)
        given = None if isinstance(self.alpha, str) else _check_alpha(self.alpha, steps, allow_outside=self.allow_outside)
        if given is None and self.alpha != "validate":
            raise unknown("alpha", str(self.alpha), ["validate", "a number in [0, 1]", "a sequence of such numbers"])
        if given is None and steps == math.inf:
            raise UsageError("steps='limit' needs one alpha in [0, 1], got alpha='validate'")
        samples, labels = validate_data(self, X, y, accept_sparse="csr", dtype=_DTYPES, multi_output=True, y_numeric=True)
        labels = labels.astype(np.float64, copy=False)
        alphas, raw = self._validate(samples, labels, X_val, y_val) if given is None else (given, given)
        if steps == math.inf:
            duals = self._limit(samples, labels, alphas[0])
        else:
            duals = self._distill(samples, labels, lambda tau, *_: alphas[tau - 1])
        self.__dict__.pop("eigvals_", None)
        self._is_limit = steps == math.inf
        self.X_fit_ = samples
        self.dual_coefs_: Floats = np.stack(duals)
        self.alphas_, self.raw_alphas_ = np.array(alphas), np.array(raw)
        return self

    def predict(self, X: ArrayLike, step: int | float | Literal["limit"] | None = None) -> Floats:
        """Returns the predictions of a step.

        Args:
            X: samples (m, n_features); the kernel between them and the training samples, (m, n), where it is precomputed.
            step: 1 for the ordinary fit, ...; the last when None.

        Returns:
            Array (m,) or (m, n_outputs).

        Raises:
            ValueError: there is no such step.
        """
        check_is_fitted(self)
        row = self._row(step)
        samples = validate_data(self, X, accept_sparse="csr", dtype=_DTYPES, reset=False)
        return self._kernel(samples, self.X_fit_) @ self.dual_coefs_[row]

    @cached_property
    def eigvals_(self) -> Floats:
        """Eigenvalues of the kernel matrix of the training samples, ascending, (n,)."""
        check_is_fitted(self)
        return np.asarray(eigvalsh(self._kernel(self.X_fit_), check_finite=False), dtype=np.float64)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.pairwise = self.kernel == "precomputed"
        return tags

    def _distill(self, X: Any, y: Floats, choose: Callable[[int, Floats, Floats], float]) -> list[Floats]:
        """c_1, c_2, ..., where ``choose(tau, M y, M y^(tau-1))`` gives alpha of step tau >= 2."""
        lam = self.lam
        M = self._factor(self._kernel(X))
        label = cho_solve(M, y, check_finite=False)
        duals, fitted = [label], y - lam * label  # y^(1) = K M y = y - lambda M y
        for tau in range(2, int(self.steps) + 1):
            distilled = cho_solve(M, fitted, check_finite=False)
            alpha = choose(tau, label, distilled)
            dual = alpha * label + (1 - alpha) * distilled  # c = M t with t = alpha y + (1 - alpha) y^(tau-1)
            fitted = alpha * y + (1 - alpha) * fitted - lam * dual  # y^(tau) = K M t = t - lambda c
            duals.append(dual)
        return duals

    def _validate(self, X: Any, y: Floats, X_val: Any, y_val: Any) -> tuple[list[float], list[float]]:
        """The weight of each step that is best on the validation data, and the same before clipping."""
        if X_val is None:
            part, rest = self._split(len(y))
            X, X_val, y, y_val = self._at(X, part, part), self._at(X, rest, part), y[part], y[rest]
        else:
            y_val = check_array(y_val, ensure_2d=False, dtype=np.float64, ensure_min_samples=0)
            if len(y_val) == 0:
                raise UsageError("the validation data are empty: alpha='validate' needs at least one sample")
            X_val = validate_data(self, X_val, accept_sparse="csr", dtype=_DTYPES, reset=False)
        K_val = self._kernel(X_val, X)
        alphas, raw = [1.0], [1.0]

        def choose(tau: int, label: Floats, distilled: Floats) -> float:
            raw.append(optimal_alpha(K_val @ label, K_val @ distilled, y_val, clip=False))
            alphas.append(min(max(raw[-1], 0.0), 1.0) if self.clip_alpha else raw[-1])
            return alphas[-1]

        self._distill(X, y, choose)
        return alphas, raw

    def _limit(self, X: Any, y: Floats, alpha: float) -> list[Floats]:
        """c = (K + lambda/alpha I)^-1 y, and 0 for alpha = 0."""
        return [alpha * cho_solve(self._factor(alpha * self._kernel(X)), y, check_finite=False)]

    def _factor(self, K: Floats) -> tuple[Floats, bool]:
        A = K.copy() if self.kernel == "precomputed" else K
        A.flat[:: len(A) + 1] += self.lam
        try:
            return cho_factor(A.T, overwrite_a=True, check_finite=False)
        except LinAlgError as error:
            raise UsageError(
                f"K + lam I is not positive definite ({error}): take a positive semi-definite kernel, or a larger lam than {self.lam:g}"
            ) from None

    def _kernel(self, X: Any, Y: Any = None) -> Floats:
        if callable(self.kernel):
            params = self.kernel_params or {}
        else:
            params = {"filter_params": True, "gamma": self.gamma, "degree": self.degree, "coef0": self.coef0}
        return np.asarray(pairwise_kernels(X, Y, metric=self.kernel, **params), dtype=np.float64)

    def _at(self, X: Any, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> Any:
        return X[np.ix_(rows, columns)] if self.kernel == "precomputed" else X[rows]

    def _split(self, n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        share = self.validation_fraction
        check_range("validation_fraction", share, low=0.0, high=1.0, open_low=True, open_high=True)
        held = round(share * n)
        if not 0 < held < n:
            empty = "validation data are" if held == 0 else "training data are"
            raise UsageError(f"the {empty} empty: validation_fraction={share:g} holds out {held} of n_samples={n}")
        order = check_random_state(self.random_state).permutation(n)
        return order[held:], order[:held]

    def _row(self, step: Any) -> int:
        if step is None:
            return -1
        given, last = _check_steps(step, "step"), len(self.dual_coefs_)
        if self._is_limit != (given == math.inf) or (given > last and not self._is_limit):
            accepted = f"{LIMIT!r}" if self._is_limit else f"in 1, ..., {last}"
            raise UsageError(f"step must be None or {accepted} for this fit, got {step!r}")
        return -1 if self._is_limit else int(given) - 1


def _check_steps(steps: Any, name: str = "steps") -> float:
    if steps == LIMIT or (isinstance(steps, float) and steps == math.inf):
        return math.inf
    if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1:
        raise UsageError(f"{name} must be an integer >= 1, math.inf or {LIMIT!r}, got {steps!r}")
    return int(steps)


def _check_alpha(alpha: Any, steps: float, *, allow_outside: bool) -> list[float]:
    """One alpha for each step; a single one for the limit."""
    if isinstance(alpha, Real):
        alphas = [alpha] * (1 if steps == math.inf else int(steps))
    elif steps == math.inf:
        raise UsageError(f"steps='limit' needs one alpha in [0, 1], got {alpha!r}")
    elif not isinstance(alpha, Sequence | np.ndarray) or isinstance(alpha, str):
        raise TypeError(f"alpha must be a number or a sequence of numbers, got {type(alpha).__name__}")
    elif len(alpha) != steps:
        raise UsageError(f"alpha must have one value for each of the {steps} steps, got {len(alpha)}")
    else:
        alphas = list(alpha)
    free = allow_outside and steps != math.inf
    for value in alphas:
        if free:
            check_range("alpha", value, low=-math.inf, high=math.inf, open_low=True, open_high=True)
        else:
            check_range("alpha", value, low=0.0, high=1.0)
    return [float(value) for value in alphas]
