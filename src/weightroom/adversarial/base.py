r"""What adversarial objectives share: the calling convention, and projected gradient ascent on a function of the input.

An objective is a training loss that needs the model, because it searches for inputs on which the model does badly::

    objective = TRADES(beta=6.0, eps=8 / 255)
    train.fit(model, data, step=lambda model, batch: objective(model, *batch), optimizer=..., epochs=...)

The attacks here serve training. To say how robust a trained model is, take attacks that it was not trained with, such as those
of ``weightroom.metrics.robust_correct``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from weightroom.errors import UsageError, check_range, unknown
from weightroom.losses.base import check_index

__all__ = ["AdversarialObjective", "AttackMode", "Bounds", "Keep", "Norm", "Start", "attacking", "classify", "pgd"]

Norm = Literal["linf", "l2"]
AttackMode = Literal["eval", "train"]
Start = Literal["gaussian", "uniform"]
Keep = Literal["last", "best"]
Bounds = tuple[float | Tensor, float | Tensor] | None

_NOISE = 0.001  # standard deviation of the start "gaussian", as in TRADES


class AdversarialObjective(nn.Module):
    """Base of training objectives that attack the model they train.

    A subclass sets its own hyper-parameters, names them in ``shown``, and defines ``target`` and ``forward``; ``start`` and
    ``keep`` say how its attack starts and ends (see ``pgd``).

    Args:
        eps: size of a perturbation, >= 0, in the unit of the inputs.
        norm: "linf" (largest change of an input's entries) or "l2" (Euclidean length over all of them).
        steps: of the attack, >= 1.
        step_size: length of a step in the norm, > 0; ``eps / 4`` when None.
        bounds: least and greatest value of an input, numbers or tensors that broadcast to ``x``; None for no bounds.
        attack_mode: mode of the model during the attack; the mode and the buffers are then as they were.

    ``forward(model, x, y) -> scalar`` is the loss of a batch, with the model in the mode it is found in, and
    ``attack(model, x, y)`` the inputs that it found, without a gradient. The attack touches no parameter's ``.grad``, and draws
    its start from torch's global generator, as dropout does.

    Shapes:
        x: (N, ...), floating, within ``bounds``.
        y: (N,), int64, the class of each input; ``model(x)`` gives logits (N, K).

    Raises:
        TypeError: ``x`` is not a floating tensor, or a hyper-parameter is no number.
        ValueError: a hyper-parameter is out of range, ``bounds`` are reversed, ``y`` has another shape, or (seen on the CPU) ``x``
            lies outside ``bounds`` or ``y`` outside the classes.
    """

    #: Hyper-parameters that ``repr`` shows.
    shown: ClassVar[tuple[str, ...]] = ()
    start: ClassVar[Start] = "gaussian"
    keep: ClassVar[Keep] = "last"

    def __init__(
        self,
        *,
        eps: float,
        norm: Norm = "linf",
        steps: int = 10,
        step_size: float | None = None,
        bounds: Bounds = (0.0, 1.0),
        attack_mode: AttackMode = "eval",
    ) -> None:
        super().__init__()
        _check(eps, norm, steps, step_size, bounds)
        if attack_mode not in get_args(AttackMode):
            raise unknown("attack_mode", attack_mode, get_args(AttackMode))
        self.eps, self.norm, self.steps, self.step_size, self.bounds = float(eps), norm, int(steps), step_size, bounds
        self.attack_mode: AttackMode = attack_mode

    def forward(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of a batch."""
        raise NotImplementedError

    def target(self, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns what the attack maximises: a function of perturbed inputs (N, ...) with a value for each, (N,)."""
        raise NotImplementedError

    def attack(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Returns perturbed inputs, within ``eps`` of ``x`` and within ``bounds``, without a gradient."""
        _check_labels(x, y)
        with attacking(model, self.attack_mode), torch.enable_grad():
            return pgd(
                self.target(model, x, y), x, eps=self.eps, norm=self.norm, steps=self.steps, step_size=self.step_size,
                bounds=self.bounds, start=self.start, keep=self.keep,
            )  # fmt: skip

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        names = (*self.shown, "eps", "norm", "steps", "step_size", "bounds", "attack_mode")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _check_labels(x: Tensor, y: Tensor) -> None:
    if y.is_floating_point() or y.dtype == torch.bool:
        raise TypeError(f"y must hold classes, int64, got {y.dtype}")
    if y.shape != x.shape[:1]:
        raise UsageError(f"y must have shape ({len(x)},), a class for each input, got {tuple(y.shape)}")


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Returns the logits (N, K) after a look at whether ``y`` holds classes of theirs (on the CPU alone).

    Raises:
        ValueError: a class is not in 0 .. K - 1, or the outputs are no logits.
    """
    logits = model(x)
    if logits.ndim != 2:
        raise UsageError(f"the model must give logits (N, K), got {tuple(logits.shape)}")
    check_index("y", y, logits.shape[1])
    return logits


@contextmanager
def attacking(model: nn.Module, mode: AttackMode) -> Iterator[None]:
    """Puts ``model`` in a mode; afterwards every module's mode is as it was, and in "train" mode so is every buffer."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if mode == "train" else []
    model.train(mode == "train")
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def pgd(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    steps: int = 10,
    step_size: float | None = None,
    bounds: Bounds = (0.0, 1.0),
    start: Start = "gaussian",
    keep: Keep = "last",
) -> Tensor:
    """Projected gradient ascent: looks in the ball around each input for the point at which ``objective`` is greatest.

    Args:
        objective: function of perturbed inputs (N, ...) with a value for each, (N,). It is only ever called with inputs inside
            the ball and the bounds.
        x: inputs (N, ...), floating.
        eps: radius of the ball, >= 0.
        norm: "linf": the steps follow the sign of the gradient; "l2": the gradient of each input, normalised.
        steps: >= 1, each one gradient of the objective.
        step_size: length of a step in the norm, > 0; ``eps / 4`` when None.
        bounds: least and greatest value of an input, numbers or tensors that broadcast to ``x``; None for no bounds.
        start: "gaussian" adds noise of standard deviation 0.001 (of no use where the objective has its least value, and so no
            gradient, at ``x`` itself, would be no noise); "uniform" starts anywhere in the ball. Both draw from torch's global
            generator.
        keep: "last" returns where the steps end; "best" the place with the greatest value among the start and all steps, for
            each input, at the price of one more evaluation.

    Returns:
        Perturbed inputs like ``x``, without a gradient; in half precision they may leave the ball by a rounding. With ``eps`` = 0 that is ``x``.

    Raises:
        TypeError: ``x`` is not a floating tensor, or an argument is no number.
        ValueError: an argument is out of range, ``x`` lies outside ``bounds`` (checked on the CPU), or ``objective`` does not
            return one value for each input.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    _check(eps, norm, steps, step_size, bounds)
    if start not in get_args(Start):
        raise unknown("start", start, get_args(Start))
    if keep not in get_args(Keep):
        raise unknown("keep", keep, get_args(Keep))
    x = x.detach()
    low, high = _box(bounds, x)
    step = eps / 4 if step_size is None else step_size

    def evaluate(moved: Tensor) -> Tensor:
        value = objective(moved)
        if value.shape != x.shape[:1]:
            raise UsageError(f"objective must return one value per input, shape ({len(x)},), got {tuple(value.shape)}")
        return value

    moved = _project(x + _noise(x, eps, norm, start), x, eps, norm, low, high)
    best, best_value = moved, x.new_full(x.shape[:1], -math.inf)
    for _ in range(steps):
        moved.requires_grad_()
        with torch.enable_grad():
            value = evaluate(moved)
            (gradient,) = torch.autograd.grad(value.sum(), moved)
        moved = moved.detach()
        if keep == "best":
            best, best_value = _better(moved, value.detach(), best, best_value)
        moved = _project(moved + step * _direction(gradient, norm), x, eps, norm, low, high)
    if keep == "last":
        return moved
    with torch.no_grad():
        return _better(moved, evaluate(moved), best, best_value)[0]


def _better(moved: Tensor, value: Tensor, best: Tensor, best_value: Tensor) -> tuple[Tensor, Tensor]:
    better = value > best_value
    return torch.where(_per_input(better, moved), moved, best), torch.where(better, value.to(best_value.dtype), best_value)


def _noise(x: Tensor, eps: float, norm: Norm, start: Start) -> Tensor:
    if start == "gaussian":
        return _NOISE * torch.randn_like(x)
    if norm == "linf":
        return eps * (2 * torch.rand_like(x) - 1)
    volume = torch.rand(len(x), dtype=x.dtype, device=x.device)
    radius = volume ** (1 / max(1, x[:1].numel()))  # uniform in the volume of the ball
    return eps * _per_input(radius, x) * _direction(torch.randn_like(x), norm)


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    return gradient.sign() if norm == "linf" else gradient / _length(gradient)


def _project(moved: Tensor, x: Tensor, eps: float, norm: Norm, low: Any, high: Any) -> Tensor:
    """Back into the ball, then into the box; the box has ``x`` in it, so that the second leaves nobody outside the ball."""
    if norm == "linf":
        moved = torch.clamp(moved, x - eps, x + eps)
    else:
        change = moved - x
        moved = x + change * (eps / _length(change)).clamp_max(1.0)
    return moved if low is None else moved.clamp(min=low).clamp(max=high)


def _length(change: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(change.flatten(1), dim=1)
    return _per_input(length.clamp_min(torch.finfo(change.dtype).tiny), change)


def _per_input(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (x.ndim - 1))


def _box(bounds: Bounds, x: Tensor) -> tuple[Any, Any]:
    if bounds is None:
        return None, None
    low, high = (b.to(x) if isinstance(b, Tensor) else b for b in bounds)
    for bound in (low, high):
        if isinstance(bound, Tensor) and not _fits(bound.shape, x.shape):
            raise UsageError(f"bounds must broadcast to x of shape {tuple(x.shape)}, got a tensor of shape {tuple(bound.shape)}")
    if x.device.type == "cpu" and bool(((x < low) | (x > high)).any()):
        raise UsageError("x must lie within bounds: give those of your inputs (bounds=None for none)")
    return low, high


def _fits(shape: torch.Size, into: torch.Size) -> bool:
    return len(shape) <= len(into) and all(a in (1, b) for a, b in zip(shape[::-1], into[::-1], strict=False))


def _check(eps: float, norm: str, steps: int, step_size: float | None, bounds: Bounds) -> None:
    check_range("eps", eps, low=0.0, high=math.inf, open_high=True)
    if norm not in get_args(Norm):
        raise unknown("norm", norm, get_args(Norm))
    check_range("steps", steps, low=1, high=math.inf, open_high=True)
    if steps != int(steps):
        raise UsageError(f"steps must be an integer, got {steps}")
    if step_size is not None:
        check_range("step_size", step_size, low=0.0, high=math.inf, open_low=True, open_high=True)
    if bounds is None:
        return
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise UsageError(f"bounds must be a pair (least, greatest) or None, got {bounds!r}")
    low, high = (torch.as_tensor(b) for b in bounds)
    if low.device.type == "cpu" and high.device.type == "cpu" and not bool((low <= high).all()):
        raise UsageError(f"bounds must be (least, greatest), got {bounds!r}")
