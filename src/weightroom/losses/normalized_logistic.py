r"""Normalized logistic loss: the logistic loss whose gradient is divided by the mean wrongness of the batch.

Its value is the mean logistic loss, for reporting. Its gradient is not that of the value, but the direction in which Normalized
LR+GD steps: a convex combination of the samples' own directions, weighted by how wrong each is. So steps do not shrink as the
loss does, and a few samples that are still wrong get the whole step however many are right.

Reach for it to separate two classes by full-batch gradient descent with a large learning rate, above all where one class is rare.

Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes", AAAI 2025,
arXiv 2412.08424, the definition of Normalized LR+GD in section 6. Its theory is for linear models, separable data, the full batch
and plain gradient descent; minibatches, networks and other optimizers are an extension outside the paper.

Known not to work: with label noise, or on data that cannot be separated, the gradient never fades and all of it goes to the
samples that are wrong, the mislabelled ones. Optimizers that rescale gradients themselves (Adam) undo most of it. What needs the
value to be what the gradient descends, such as a line search or L-BFGS, does not go with it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightroom.errors import UsageError
from weightroom.losses.base import eager, seen

__all__ = ["NormalizedLogisticLoss", "normalized_logistic_loss"]


class _Normalized(torch.autograd.Function):
    """Mean softplus(-m) of margins m forwards, -p backwards; backwards again, the derivatives of that field."""

    generate_vmap_rule = True

    @staticmethod
    def forward(m: Tensor) -> Tensor:
        return F.softplus(-m).mean()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (m,) = ctx.saved_tensors
        return -grads[0] * F.logsigmoid(-m).softmax(0)  # p_i = s_i / sum_j s_j, s = sigma(-m): no 0/0 at large margins


def normalized_logistic_loss(input: Tensor, target: Tensor) -> Tensor:
    """Functional form of :class:`NormalizedLogisticLoss`."""
    if not isinstance(input, Tensor) or not input.is_floating_point():
        raise TypeError(f"input must be a floating tensor of logits, got {seen(input)}")
    if not isinstance(target, Tensor) or target.is_complex():
        raise TypeError(f"target must be a tensor of labels, got {seen(target)}")
    if input.ndim not in (1, 2) or input.shape[1:] not in ((), (1,)):
        raise UsageError(f"input must have shape (n,) or (n, 1), one logit per sample, got {tuple(input.shape)}")
    if target.shape not in (input.shape, input.shape[:1]):
        raise UsageError(f"target must have the shape of input or (n,), got {tuple(target.shape)} for {tuple(input.shape)}")
    _check_labels(target)
    z = input.reshape(-1)
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    return _Normalized.apply(torch.where(target.reshape(-1) > 0, z, -z))


class NormalizedLogisticLoss(nn.Module):
    r"""Logistic loss of two classes with a normalised gradient.

    With :math:`y_i = \pm 1`, margins :math:`m_i = y_i z_i` and :math:`s_i = \sigma(-m_i)`:

    .. math:: \text{value} = \frac1n \sum_i \log(1 + e^{-m_i}), \qquad
        \text{gradient with respect to } z_i = -y_i p_i, \quad p_i = \frac{s_i}{\sum_j s_j}.

    The gradient is that of the value divided by the mean of the :math:`s_i`; the weights p sum to 1, and stay finite however
    large the margins. It is a vector field and not the gradient of the value; second derivatives are those of the field. There is
    no ``reduction``: a sample has no gradient of its own.

    Shapes:
        input: (n,) or (n, 1), logits; half precision is computed, and returned, in float32.
        target: of input's shape, or (n,); of any dtype, with values in {0, 1} or {-1, 1} (checked on the CPU).
        output: scalar.

    Raises:
        TypeError: ``input`` is not floating, or ``target`` no real tensor.
        ValueError: shapes do not fit, or a target is something else.

    Example::

        loss = NormalizedLogisticLoss()(model(x), y)
        loss.backward()
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the mean logistic loss, with the normalised gradient behind it."""
        return normalized_logistic_loss(input, target)


def _check_labels(target: Tensor) -> None:
    if target.device.type == "cpu" and target.numel() and eager():
        one = target == 1
        if not (one | (target == 0)).all() and not (one | (target == -1)).all():
            values = ", ".join(f"{v:g}" for v in target.unique().tolist()[:5])
            raise UsageError(f"target must have values in {{0, 1}} or {{-1, 1}}, got {values}")
