"""What the distances of this room share: transport on the line, random directions, checks that never stall a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["require", "sample_directions", "transport_cost_1d"]


def require(value: Tensor, ok: Tensor, message: Callable[[], str]) -> Tensor:
    """Returns ``value`` if ``ok`` (a 0-dim bool tensor).

    On the CPU a broken requirement raises ValueError. On any other device the answer is not known before the device has
    caught up, and waiting for it in every training step would cost more than the step: there ``value`` becomes NaN instead.
    """
    if ok.device.type == "cpu":
        if not ok:
            raise ValueError(message())
        return value
    return torch.where(ok, value, torch.nan)


def sample_directions(
    n: int,
    d: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Returns ``n`` independent directions, uniform on the unit sphere of :math:`\mathbb R^d`, of shape (n, d).

    They are drawn on the generator's device, so that a CPU generator gives the same directions whatever ``device`` is.
    """
    home = device if generator is None else generator.device
    return F.normalize(torch.randn(n, d, generator=generator, dtype=dtype, device=home), dim=1).to(device)


def transport_cost_1d(
    x: Tensor, y: Tensor, p: float = 2.0, x_weight: Tensor | None = None, y_weight: Tensor | None = None
) -> Tensor:
    r""":math:`W_p^p(\mu, \nu) = \int_0^1 |F^{-1}(u) - G^{-1}(u)|^p du` of measures on the line, exactly, for p >= 1.

    Args:
        x: atoms of :math:`\mu` along the last dimension, (..., n); y: those of :math:`\nu`, (..., m). The leading
            dimensions broadcast; ``n`` and ``m`` may differ.
        p: order.
        x_weight: weights >= 0 of the atoms, broadcastable to ``x``; they are divided by their sum. Equal when None.
            The same for ``y_weight`` and ``y``. The cost is differentiable in atoms and weights.

    Returns:
        The costs, (...).
    """
    n, m = x.shape[-1], y.shape[-1]
    (x, by_x), (y, by_y) = x.sort(-1), y.sort(-1)
    if x_weight is None and y_weight is None:
        if n == m:
            return _power(x - y, p).mean(-1)
        # F and G jump at k/n and l/m: in units of 1/(nm) the merged grid is exact, and the same for every pair.
        i, j, du = _merge(torch.arange(1, n + 1, device=x.device) * m, torch.arange(1, m + 1, device=x.device) * n)
        return (_power(x[..., i] - y[..., j], p) * du).sum(-1) / (n * m)
    lead = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    F_, G = _levels(x_weight, by_x, x.dtype), _levels(y_weight, by_y, y.dtype)
    i, j, du = _merge(F_.expand(*lead, n), G.expand(*lead, m))
    return (_power(x.expand(*lead, n).gather(-1, i) - y.expand(*lead, m).gather(-1, j), p) * du).sum(-1)


def _levels(weight: Tensor | None, order: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of the distribution function at the sorted atoms; the last is exactly 1."""
    n = order.shape[-1]
    if weight is None:
        return torch.arange(1, n + 1, dtype=dtype, device=order.device) / n
    levels = weight.to(dtype).expand(order.shape).gather(-1, order).cumsum(-1)
    return levels / levels[..., -1:]


def _merge(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges two rising grids; on the k-th interval, of length du_k, the quantile functions sit at atoms i_k and j_k."""
    n, m = a.shape[-1], b.shape[-1]
    u, order = torch.cat([a, b], -1).sort(dim=-1, stable=True)  # a stable sort profits from the two sorted runs
    of_a = order < n
    behind = of_a.cumsum(-1)
    i = (behind - of_a.long()).clamp_max(n - 1)  # levels of a below u_k; ties bound intervals of length 0
    j = (torch.arange(n + m, device=u.device) - behind + of_a.long()).clamp_max(m - 1)
    return i, j, torch.diff(u, dim=-1, prepend=torch.zeros_like(u[..., :1]))


def _power(difference: Tensor, p: float) -> Tensor:
    if p == 2:
        return difference.square()
    return difference.abs() if p == 1 else difference.abs().pow(p)
