r"""Linear CKA: how alike two networks see the same samples, whatever rotation, scale and shift lie between.

.. math:: \mathrm{CKA}(X, Y) = \frac{\|A^\top B\|_F^2}{\|A^\top A\|_F\, \|B^\top B\|_F},
          \qquad A, B = X, Y \text{ with the mean of each feature taken off}

1: the same up to an orthogonal map, a scale and a shift; 0: no feature of one correlates with any of the other.

Reach for it to ask whether two trainings compute the same function (on the softmax outputs), or where two networks differ (on their
layers). Known to mislead: with fewer samples than features even independent data are similar, by about 1 for n << p; take
``debiased=True``. A few large directions (or outliers) decide it. It says nothing about accuracy.

Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited", ICML 2019, arXiv 1905.00414, eq. (3); the
unbiased estimate of HSIC is that of Song et al., JMLR 13 (2012).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weightroom.diagnostics.base import batches, plain_copy
from weightroom.errors import UsageError, unknown
from weightroom.metrics import device_of

__all__ = ["linear_cka", "output_cka"]

#: Entries of a chunk of rows: what is computed of the samples is never larger than a few of these.
CHUNK = 2**24


@torch.no_grad()
def linear_cka(X: Tensor, Y: Tensor, *, debiased: bool = False) -> float:
    """Returns the linear CKA of two representations of the same samples.

    Computed from features or from samples, whichever are fewer, in float64 (float32 on MPS, which has no more) and in chunks of
    samples: beside X and Y it holds matrices of features x features, or chunks of those of samples x samples.

    Args:
        X: shape (n_samples, ...), the rest being the features; of any real dtype.
        Y: shape (n_samples, ...); the features may be others, and other in number.
        debiased: with the unbiased estimates of HSIC, about 0 for independent data; may be below 0. Needs 4 samples.

    Returns:
        The CKA; in [0, 1] unless debiased. NaN, with a warning, where it is not defined: X or Y holds NaN or inf, is the same for
        all samples, or an unbiased estimate of its own variance is not positive.

    Raises:
        ValueError: X and Y have different numbers of samples, or too few.
    """
    if X.ndim < 1 or Y.ndim < 1 or len(X) != len(Y):
        raise UsageError(f"X and Y must hold the same samples, got shapes {tuple(X.shape)} and {tuple(Y.shape)}")
    least = 4 if debiased else 1
    if len(X) < least:
        raise UsageError(f"CKA needs at least {least} samples{' when debiased' * debiased}, got {len(X)}")
    a, b = (_Centred(Z.detach().flatten(1) if Z.ndim > 1 else Z.detach()[:, None]) for Z in (X, Y))
    for name, z in (("X", a), ("Y", b)):
        if not z.finite:
            warnings.warn(f"CKA is not defined: {name} holds values that are not finite", stacklevel=3)
            return math.nan
        if z.constant:
            warnings.warn(f"CKA is not defined: {name} is the same for all samples", stacklevel=3)
            return math.nan
    cross, own_a, own_b = _hsic(a, b, debiased)
    if own_a <= 0 or own_b <= 0:
        warnings.warn("CKA is not defined: the unbiased estimate of a variance is not positive; take more samples", stacklevel=3)
        return math.nan
    value = cross / math.sqrt(own_a * own_b)
    return value if debiased else min(value, 1.0)


@torch.no_grad()
def output_cka(model_a: nn.Module, model_b: nn.Module, loader: Iterable[Any], *, on: str = "softmax") -> float:
    """Returns the linear CKA of what two networks make of the same inputs.

    Both are left as they were and run in eval mode on the same batches, so that shuffling does not matter.

    Args:
        model_a: one network.
        model_b: the other, of any architecture; run on the device of ``model_a``.
        loader: batches (inputs, ...). The outputs of all of them are kept; a few thousand samples do (the paper takes 6464 of the
            training data, without augmentation).
        on: "softmax" (over dimension 1) or "logits" of the outputs, or the name of a module that both networks run once per pass,
            as ``named_modules`` has it: its output, with all but the samples flattened.

    Returns:
        The CKA; NaN, with a warning, where the outputs of a network are the same for all samples, or not finite.

    Raises:
        ValueError: ``on`` is neither of these, the module does not run exactly once or gives no tensor, or ``loader`` is empty.
    """
    device = device_of(model_a)
    readers = [_Reader(model, on, device) for model in (model_a, model_b)]
    for x, *_ in batches(loader, device):
        for reader in readers:
            reader(x)
    return linear_cka(*(torch.cat(reader.found) for reader in readers))


class _Reader:
    """Runs a copy of a model and keeps what is asked for."""

    def __init__(self, model: nn.Module, on: str, device: torch.device) -> None:
        self.model, self.on, self.found = plain_copy(model).to(device), on, list[Tensor]()
        self.seen: list[Any] = []
        if on not in ("softmax", "logits"):
            modules = {name: module for name, module in self.model.named_modules() if name}
            if on not in modules:
                raise unknown("module in on=", on, ["softmax", "logits", *modules])
            modules[on].register_forward_hook(lambda module, args, output: self.seen.append(output))

    def __call__(self, x: Tensor) -> None:
        outputs = self.model(x)
        if self.on in ("softmax", "logits"):
            self.found.append(outputs.softmax(1) if self.on == "softmax" else outputs)
            return
        if len(self.seen) != 1 or not isinstance(self.seen[0], Tensor):
            got = f"ran {len(self.seen)} times" if len(self.seen) != 1 else f"gives {type(self.seen[0]).__name__}"
            raise UsageError(f"on={self.on!r} must run once per pass and give a tensor; it {got}")
        self.found.append(self.seen.pop())


class _Centred:
    """Samples x features with the mean of each feature taken off, scaled to about 1 in size."""

    def __init__(self, z: Tensor) -> None:
        self.z = z.to(torch.promote_types(z.dtype, torch.float32))
        self.n, self.p = z.shape
        self.dtype = torch.float32 if z.device.type == "mps" else torch.float64
        scale = self.z.abs().amax() if z.numel() else self.z.new_ones(())
        self.finite = bool(scale.isfinite())
        self.scale = scale.to(self.dtype).clamp_min(torch.finfo(self.dtype).tiny)
        slices = _slices(self.n, self.p)
        self.mean = torch.stack([self.z[i].to(self.dtype).sum(0) for i in slices]).sum(0) / self.n
        self.squares = torch.cat([self.rows(i).square().sum(1) for i in slices])
        varies, size = float(self.squares.sum()), self.n * float((self.mean / self.scale).square().sum())
        #: What varies by less than rounding does not vary.
        self.constant = math.sqrt(varies) <= 4 * torch.finfo(self.z.dtype).eps * math.sqrt(varies + size)

    def rows(self, i: slice) -> Tensor:
        return (self.z[i].to(self.dtype) - self.mean) / self.scale


def _slices(n: int, width: int) -> list[slice]:
    rows = max(1, CHUNK // max(1, width))
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _hsic(a: _Centred, b: _Centred, debiased: bool) -> tuple[float, ...]:
    """<K, L>, <K, K> and <L, L> of the Gram matrices K = A A^T and L = B B^T, or their unbiased counterparts; up to a factor."""
    n, parts = a.n, _slices(a.n, max(a.p, b.p))
    if max(a.p, b.p) <= n:  # <K, L> = |A^T B|^2
        products = [a.mean.new_zeros(u.p, v.p) for u, v in ((a, b), (a, a), (b, b))]
        for i in parts:
            x, y = a.rows(i), b.rows(i)
            for product, u, v in zip(products, (x, x, y), (y, x, y), strict=True):
                product.addmm_(u.T, v)
        values = [float(torch.linalg.vector_norm(product)) ** 2 for product in products]
    else:
        values = [0.0, 0.0, 0.0]
        for at, first in enumerate(parts):
            x, y = a.rows(first), b.rows(first)
            for second in parts[at:]:
                u, v = (x, y) if second == first else (a.rows(second), b.rows(second))
                K, L = x @ u.T, y @ v.T
                twice = 1 if second == first else 2  # the Gram matrices are symmetric
                for k, (g, h) in enumerate(((K, L), (K, K), (L, L))):
                    values[k] += twice * float(torch.dot(g.flatten(), h.flatten()))
    if debiased:
        r, s = a.squares, b.squares  # the diagonals of K and L, which the unbiased estimate leaves out
        for k, (g, h) in enumerate(((r, s), (r, r), (s, s))):
            values[k] += float(g.sum()) * float(h.sum()) / ((n - 1) * (n - 2)) - n / (n - 2) * float(g @ h)
    return tuple(values)
