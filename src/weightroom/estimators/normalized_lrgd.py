r"""Normalized LR+GD: a separating hyperplane by logistic regression with very large steps, and its perceptron limits.

For linearly separable data of two classes gradient descent on the logistic loss (LR+GD) separates at any step size; divided by
it, the iterates tend to those of a batch perceptron as it grows. Dividing each step by the mean "wrongness" of the rows as well
lowers the bound on the iterations from :math:`n R^2 / \mu^2` to :math:`R^2 / \mu^2` (R the longest row, mu the margin).

Reach for it to fit a linear separator, a linear probe say, on separable data with few rows of one class and many of the other,
and to study gradient descent beyond the edge of stability.

Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes", AAAI 2025,
arXiv 2412.08424: the limit is Theorem 3.2, the bounds are Theorems 3.3 to 6.1.

Known not to work, or to differ:

- It finds *a* separator. With large steps it is not the one of largest margin, the loss may be high, and the scores mean nothing
  as probabilities, so there is no ``predict_proba``.
- Data that no hyperplane separates are never finished with: ``fit`` stops at ``max_iter`` with a warning.
- On balanced data it is not reliably faster than LR+GD (the paper says so).
- Features are not rescaled: their scale decides R, mu and with them the number of iterations. The intercept is the weight of a
  feature that is always 1 and counts in R; the paper has none.
- The paper writes that the normalisation tends to :math:`|S_t|`; it tends to :math:`n / |S_t|`. The steps are as in the paper.
"""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from weightroom.errors import UsageError, check_range, unknown

__all__ = ["NormalizedLogisticGD"]

Floats = NDArray[np.float64]
Limit = Literal["none", "batch", "online"]


def step_weights(m: Floats, least: float, normalize: bool, limit: Limit, tol: float = 0.0, first: bool = False) -> Floats:
    r"""Returns the p of a step :math:`\theta \leftarrow \theta + \gamma \sum_i p_i z_i`, shape (n,), given the margins.

    Args:
        m: margins :math:`m_i = z_i^\top \theta`, shape (n,).
        least: the least of them.
        normalize: divide by the mean of the :math:`s_i`, or by the size of :math:`S_t`.
        limit: as of ``NormalizedLogisticGD``.
        tol: :math:`S_t` are the rows with margins up to it; for the limits there must be one.
        first: whether theta is still the 0 it started from.
    """
    n = len(m)
    if limit == "none":
        common = max(least, 0.0) if normalize else 0.0  # a factor e^common of all s: no 0/0 however large the margins are
        s = np.exp(m - common) if common else np.exp(m)
        s += np.exp(-common) if common else 1.0
        np.reciprocal(s, out=s)  #                        s_i = sigma(-m_i) = 1 / (1 + e^m_i)
        s /= s.sum() if normalize else n  #               normalised: the softmax of log sigma(-m)
        return s
    wrong = ~(m > tol)
    if limit == "batch":
        return wrong / (wrong.sum() if normalize else 2 * n if first else n)  # sigma(0) = 1/2 at theta = 0
    p = np.zeros(n)
    p[np.argmax(wrong)] = 1.0  # one row of S_t, the first
    return p


class NormalizedLogisticGD(ClassifierMixin, BaseEstimator):
    r"""Linear classifier of two classes that stops at the first hyperplane that separates them.

    With :math:`z_i = y_i a_i`, :math:`y_i = \pm 1`, :math:`s_i = \sigma(-z_i^\top\theta)` and :math:`S_t` the rows with
    :math:`z_i^\top\theta \le 0`, all from :math:`\theta_0 = 0` with the whole data in every step:

    .. math::
        \text{Normalized LR+GD:} \quad \theta \leftarrow \theta + \gamma \sum_i \frac{s_i}{\sum_j s_j} z_i, \qquad
        \text{LR+GD:} \quad \theta \leftarrow \theta + \frac{\gamma}{n} \sum_i s_i z_i.

    ========  =========  =======================================================================================
    limit     normalize  method
    ========  =========  =======================================================================================
    "none"    True       Normalized LR+GD
    "none"    False      LR+GD
    "batch"   True       Normalized Batch Perceptron: the mean of z over S_t is added
    "batch"   False      Batch Perceptron: the sum of z over S_t, divided by n, is added; half of it in the first step
    "online"  either     Perceptron: the first row of S_t is added
    ========  =========  =======================================================================================

    For more than two classes: ``OneVsRestClassifier(NormalizedLogisticGD())``.

    Args:
        gamma: step size > 0; the paper's results are nearly flat from 1 to 100. Without effect on the limits, which are those of
            :math:`\theta / \gamma`.
        normalize: see the table.
        limit: see the table.
        fit_intercept: learn the weight of a feature that is always 1.
        max_iter: most iterations, >= 1.
        tol_margin: :math:`\ge 0`; a row is on the right side when its margin :math:`z_i^\top\theta` (not divided by the norm of
            theta) is larger. The limits take steps for all other rows. 0 is the paper's.
        record: keep ``history_``.
        warm_start: start from the last fit's solution; such a fit has no halved first step.

    Attributes:
        coef_: weights, shape (1, d).
        intercept_: shape (1,); 0 without ``fit_intercept``.
        classes_: the two labels; scores > 0 mean the second.
        n_iter_: steps taken: the least t at which :math:`\theta_t` separates, or ``max_iter``.
        separated_: whether all margins are larger than ``tol_margin``.
        history_: dict of arrays (n_iter\_ + 1,): ``loss`` (mean logistic loss at theta_t), ``misclassified`` (rows) and
            ``min_margin``; with ``record`` alone.
        n_features_in_: d.

    Raises:
        ValueError: by ``fit``: an argument is out of its range or unknown, X is not finite, y has not two kinds of labels, or a
            warm start meets other features or labels than before.
        TypeError: by ``fit``: an argument is no number.

    Warns:
        ConvergenceWarning: by ``fit``: not separated within ``max_iter``.

    Computes in float64, on one signed copy of X, which may be a CSR matrix. An iteration costs two products with it.

    Example::

        probe = NormalizedLogisticGD(gamma=10.0).fit(features, labels)
        probe.separated_, probe.n_iter_, probe.predict(more_features)
    """

    coef_: Floats
    intercept_: Floats
    classes_: NDArray[Any]
    n_iter_: int
    separated_: bool
    history_: dict[str, NDArray[Any]]

    def __init__(
        self,
        gamma: float = 10.0,
        normalize: bool = True,
        limit: Limit = "none",
        fit_intercept: bool = True,
        max_iter: int = 10000,
        tol_margin: float = 0.0,
        record: bool = False,
        warm_start: bool = False,
    ) -> None:
        self.gamma = gamma
        self.normalize = normalize
        self.limit = limit
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol_margin = tol_margin
        self.record = record
        self.warm_start = warm_start

    def fit(self, X: ArrayLike, y: ArrayLike) -> NormalizedLogisticGD:
        """Steps until every row is on its side.

        Args:
            X: features, shape (n, d), dense or CSR, finite.
            y: labels of two kinds, shape (n,).

        Returns:
            Itself.
        """
        self._check()
        rows, labels = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
        classes, signs = _two_classes(labels)
        d = rows.shape[1]
        theta, cold = self._start(d, classes)
        Z = _signed(rows, signs, self.fit_intercept)
        gamma, tol = float(self.gamma) if self.limit == "none" else 1.0, self.tol_margin
        seen: list[tuple[float, ...]] = []
        with np.errstate(over="ignore", under="ignore"):  # of e^m, where s is 0 to any precision
            for t in range(self.max_iter + 1):
                m = Z @ theta
                least = m.min()
                separated = bool(least > tol)
                if self.record:
                    seen.append((np.logaddexp(0.0, -m).mean(), np.sum(~(m > tol)), least))
                if separated or t == self.max_iter:
                    break
                p = step_weights(m, least, self.normalize, self.limit, tol, first=cold and t == 0)
                theta += gamma * (Z.T @ p)  # theta <- theta + gamma sum_i p_i z_i
        self.classes_, self.n_iter_, self.separated_ = classes, t, separated
        self.coef_, self.intercept_ = theta[None, :d].copy(), theta[d:].copy() if self.fit_intercept else np.zeros(1)
        self.__dict__.pop("history_", None)
        if self.record:
            self.history_ = dict(
                zip(("loss", "misclassified", "min_margin"), map(np.array, zip(*seen, strict=True)), strict=True)
            )
        if not separated:
            warnings.warn(
                f"not separated after max_iter={self.max_iter} iterations: {np.sum(~(m > tol))} of {len(m)} rows are "
                "still misclassified; raise max_iter, or look whether a hyperplane can separate these classes at all",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def decision_function(self, X: ArrayLike) -> Floats:
        """Returns the scores :math:`a^\\top\\theta`, shape (n,), > 0 for the second class; no measure of certainty."""
        check_is_fitted(self)
        rows: Any = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False)
        return rows @ self.coef_[0] + self.intercept_[0]

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Returns the label of each row, shape (n,)."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int)]

    def _check(self) -> None:
        check_range("gamma", self.gamma, low=0.0, open_low=True, open_high=True)
        check_range("tol_margin", self.tol_margin, low=0.0, open_high=True)
        check_range("max_iter", self.max_iter, low=1)
        if not isinstance(self.max_iter, Integral):
            raise UsageError(f"max_iter must be an integer >= 1, got {self.max_iter}")
        if self.limit not in get_args(Limit):
            raise unknown("limit", self.limit, get_args(Limit))

    def _start(self, d: int, classes: NDArray[Any]) -> tuple[Floats, bool]:
        """Theta, and whether it is the 0 of a cold start."""
        if not (self.warm_start and hasattr(self, "coef_")):
            return np.zeros(d + bool(self.fit_intercept)), True
        if self.coef_.shape[1] != d or not np.array_equal(self.classes_, classes):
            raise UsageError(
                f"warm_start needs the features and labels of the last fit, {self.coef_.shape[1]} and {self.classes_.tolist()}, "
                f"got {d} and {classes.tolist()}"
            )
        return np.append(self.coef_[0], self.intercept_ if self.fit_intercept else []), False

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.sparse = True
        return tags


def _two_classes(y: NDArray[Any]) -> tuple[NDArray[Any], Floats]:
    """The two labels, and -1 or 1 for each row."""
    check_classification_targets(y)
    classes, which = np.unique(y, return_inverse=True)
    if len(classes) > 2:
        raise UsageError(
            f"Only binary classification is supported. The type of the target is multiclass: y has {len(classes)} classes; "
            "use OneVsRestClassifier(NormalizedLogisticGD())"
        )
    if len(classes) < 2:
        raise UsageError(f"y must have labels of two kinds, got one class, {classes.tolist()[0]!r}")
    return classes, np.where(which == 1, 1.0, -1.0)


def _signed(X: Any, signs: Floats, intercept: bool) -> Any:
    """The rows z_i = y_i a_i, each with its 1 for the intercept; dense ones by columns, as products with Z and its transpose like."""
    n, d = X.shape
    if sparse.issparse(X):
        parts: list[Any] = [X, np.ones((n, 1))] if intercept else [X]
        return sparse.csr_array(sparse.hstack(parts)).multiply(signs[:, None]).tocsr()
    Z = np.empty((n, d + bool(intercept)), order="F")
    np.multiply(X, signs[:, None], out=Z[:, :d])
    Z[:, d:] = signs[:, None]
    return Z
