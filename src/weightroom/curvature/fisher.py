r"""The inverse of an empirical Fisher matrix, as products: a d x d matrix that is never formed.

From m gradients, the rows of G (m x d), and a damping :math:`\lambda` > 0:

.. math:: F = \lambda I + \tfrac1m G^\top G \qquad (\text{or its diagonal blocks}).

Reach for it wherever :math:`F^{-1} v` is needed and d is beyond a dense solve: influence functions, natural gradients, optimal
brain surgeon pruning (``weightroom.prune.MFACPruner``), Laplace approximations.

Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS 2021, arXiv
2107.03356, section 3.1. The paper applies the Woodbury identity once per gradient; here it is applied to all of them at once,
which is the same matrix at the same cost, in operations on matrices instead of vectors and in float64.

Known not to work: m gradients span at most m directions. In all others F is :math:`\lambda I`, so that :math:`F^{-1} v` there is
:math:`v/\lambda` and the damping decides the result. Gradients of mini-batches near a minimum are mostly noise: F then is no
Hessian.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from weightroom.errors import UsageError, check_range

__all__ = ["EmpiricalFisherInverse"]

#: Numbers of float64 that are worked on at once where there are several blocks.
PIECE = 2**22


class EmpiricalFisherInverse:
    r"""Products with :math:`F^{-1}`, its diagonal and its entries.

    With :math:`A = m \lambda I + G G^\top = L L^\top` and :math:`Y = L^{-1} G` (m x d) Woodbury's identity reads

    .. math:: F^{-1} = \tfrac1\lambda (I - Y^\top Y).

    Blocks no wider than m are inverted as they are, :math:`F/\lambda = R R^\top`, :math:`Z = R^{-1}`:
    :math:`F^{-1} = \tfrac1\lambda Z^\top Z`. Set-up costs :math:`O(d m \min(m, B))`, a product :math:`O(d \min(m, B))`; both
    take :math:`8 d \min(m, B)` bytes for blocks of B. A gradient may be that of the mean loss of a mini-batch, as in the paper,
    or of one example.

    Args:
        grads: the gradients, (m, d), real and of floating point; not changed, not kept.
        damping: :math:`\lambda` > 0.
        block_size: B, columns per block; F is then block diagonal, the last block the remainder. None (or -1) is one block.

    The divisor is the number of rows, zero rows included. All algebra is float64 whatever comes in; results have the dtype of
    what was given, float32 at least.

    Raises:
        UsageError: (a ``ValueError``) an argument is out of its range; ``grads`` is no matrix, complex, sparse or not finite; or
            the damping is lost in the rounding beside gradients that large.

    Example::

        inverse = EmpiricalFisherInverse(torch.stack(gradients), damping=1e-4)
        influence = -inverse.mul(test_gradient) @ train_gradients.T
    """

    @torch.no_grad()
    def __init__(self, grads: Tensor, damping: float = 1e-5, block_size: int | None = None) -> None:
        check_range("damping", damping, low=0.0, open_low=True, open_high=True)
        check_block_size(block_size)
        if grads.layout != torch.strided or not grads.is_floating_point():
            raise UsageError(f"grads must be a dense tensor of real floating point, got {grads.dtype}, {grads.layout}")
        if grads.ndim != 2 or 0 in grads.shape:
            raise UsageError(f"grads must have the shape (m, d) with m, d >= 1, got {tuple(grads.shape)}")
        m, d = grads.shape
        self.damping = float(damping)
        self.shape = (m, d)
        self.block_size = d if block_size is None or block_size == -1 else min(block_size, d)
        self.dtype = torch.promote_types(grads.dtype, torch.float32)
        self._columns = list(_columns(m, d, self.block_size))
        self._factors = [
            _factor(grads[:, a:b].detach().unflatten(1, (n, -1)).movedim(0, 1).to(torch.float64), self.damping)
            for a, b, n in self._columns
        ]

    @torch.no_grad()
    def mul(self, x: Tensor) -> Tensor:
        r"""Returns :math:`F^{-1} x` for a vector (d,), or for each row of a matrix (k, d).

        Raises:
            UsageError: (a ``ValueError``) x has another shape, or is complex.
        """
        m, d = self.shape
        if x.ndim not in (1, 2) or x.shape[-1] != d:
            raise UsageError(f"x must have the shape ({d},) or (k, {d}) to go with grads of shape {(m, d)}, got {tuple(x.shape)}")
        if x.is_complex():
            raise UsageError(f"x must be real, got {x.dtype}")
        rows = x.detach().reshape(-1, d).to(torch.float64)
        result = torch.empty_like(rows)
        for (a, b, n), W in zip(self._columns, self._factors, strict=True):
            v = rows[:, a:b].unflatten(1, (n, -1)).movedim(1, 0)  # (n, k, B)
            Pv = (v @ W.mT) @ W
            result[:, a:b] = (Pv if _direct(W) else v - Pv).movedim(0, 1).flatten(1)
        return result.reshape(x.shape).to(torch.promote_types(x.dtype, torch.float32)) / self.damping

    @torch.no_grad()
    def diag(self) -> Tensor:
        r"""Returns :math:`[F^{-1}]_{kk}`, (d,), all > 0 (values that rounding made 0 or less are raised, with a warning)."""
        squares = [torch.linalg.vector_norm(W, dim=1).square() for W in self._factors]
        diagonal = torch.cat([(s if _direct(W) else 1 - s).flatten() for s, W in zip(squares, self._factors, strict=True)])
        least = torch.finfo(torch.float64).eps
        if bool((diagonal < least).any()):
            warnings.warn("the diagonal of the inverse Fisher is lost in rounding in places: raise the damping", stacklevel=2)
        return (diagonal.clamp_min(least) / self.damping).to(self.dtype)

    @torch.no_grad()
    def entry(self, i: int, j: int) -> Tensor:
        r"""Returns :math:`[F^{-1}]_{ij}`, a scalar; 0 where i and j lie in different blocks.

        Raises:
            IndexError: i or j is not in -d .. d - 1.
        """
        d, B = self.shape[1], self.block_size
        for name, index in (("i", i), ("j", j)):
            if not -d <= index < d:
                raise IndexError(f"{name} must be in {-d}..{d - 1}, got {index}")
        i, j = i % d, j % d
        value = torch.zeros((), dtype=torch.float64, device=self._factors[0].device)
        if i // B == j // B:
            for (a, b, _), W in zip(self._columns, self._factors, strict=True):
                if a <= i < b:
                    block = W[(i - a) // B]
                    dot = block[:, (i - a) % B] @ block[:, (j - a) % B]
                    value = dot if _direct(W) else float(i == j) - dot
        return (value / self.damping).to(self.dtype)


def check_block_size(block_size: int | None) -> None:
    """Checks that blocks have a width: an integer >= 1, or None or -1 for a single one."""
    if block_size is not None and (not isinstance(block_size, int) or (block_size < 1 and block_size != -1)):
        raise UsageError(f"block_size must be an integer >= 1, or None or -1 for one block, got {block_size!r}")


def _columns(m: int, d: int, B: int) -> Iterator[tuple[int, int, int]]:
    """Columns that are worked on together, and into how many equal blocks they fall."""
    whole, step = d - d % B, max(1, PIECE // (B * max(m, B))) * B
    for a in range(0, whole, step):
        b = min(a + step, whole)
        yield a, b, (b - a) // B
    if whole < d:
        yield whole, d, 1


def _direct(W: Tensor) -> bool:
    """Whether W is the Z of a block no wider than m, not the Y of a wider one."""
    return W.shape[1] == W.shape[2]


def _factor(G: Tensor, damping: float) -> Tensor:
    """Y or Z of n blocks of gradients at once: (n, m, B) to (n, min(m, B), B)."""
    _, m, B = G.shape
    if m >= B:
        S = (G.mT @ G).div_(m * damping)
        S.diagonal(dim1=1, dim2=2).add_(1.0)  #            F / lambda
    else:
        S = G @ G.mT
        S.diagonal(dim1=1, dim2=2).add_(m * damping)  #    A = m lambda I + G G^T
    if not bool(torch.isfinite(S).all()):
        raise UsageError("grads holds NaN or infinity, or numbers whose squares overflow")
    L, info = torch.linalg.cholesky_ex(S)
    if bool(info.any()):
        raise UsageError(f"damping {damping:g} is lost in the rounding beside gradients this large: raise it")
    inverse = torch.linalg.solve_triangular(L, torch.eye(len(L[0]), dtype=L.dtype, device=L.device).expand_as(L), upper=False)
    return inverse if m >= B else inverse @ G
