r"""SSO: many steps of the parameters for one gradient of the loss.

Where the gradient of the loss with respect to the model's outputs is dear (a simulator, an expert, an adversary) and the model
is cheap, SSO asks for it once per step and builds of it a quadratic surrogate in the space of the outputs, which takes any
number of steps of the parameters without asking again:

.. math::
    q_t(\theta) = \frac1{|B|} \sum_{i \in B} \Big[ \ell_i(z_i) + \langle G_i, f_i(\theta) - z_i \rangle
    + \frac1{2\eta_t} \|f_i(\theta) - z_i\|^2 \Big], \qquad z = f(\theta_t),\ G_i = \nabla \ell_i(z_i).

If every :math:`\ell_i` is L-smooth and :math:`\eta_t \le 1/L`, then :math:`q_t` bounds the loss of the batch from above and
touches it at :math:`\theta_t`: whatever lowers it lowers the loss. One inner gradient step is a step of SGD; the exact minimiser
is a step of SGD on the outputs, projected on what the model can say, and does not see how the parameters are conditioned.

Reach for it when one gradient from the oracle costs as much as ten or more passes of the model, or when a cheap model is badly
conditioned and the loss is not. Count cost on both axes: :math:`\text{oracle calls} \cdot \kappa + \text{inner steps}`.

Known not to work: with a cheap oracle the same passes are better spent on Adam. A constant eta on mini-batches hovers in a
neighbourhood (``eta_rule="sqrt"`` and "exp" shrink it). The outputs must be a function of the parameters alone: dropout is
refused; BatchNorm in training mode passes, as a batch's outputs are the same each time, but its running statistics move with
every evaluation, here ten and more times per step, so freeze it (``eval()``). The line search gives up below a step of 1e-6:
scale the inputs. In half precision it gives up where weights stop moving. The bound is false where the loss is not smooth.

Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, "Target-based Surrogates for Stochastic Optimization", ICML 2023, arXiv
2302.02607: the surrogate over the sampled rows and its bound, SSO, and its step sizes in the outputs (constant, decreasing,
line search, AdaGrad). The authors' code minimises the mean of :math:`s \langle G, f \rangle + \|f - z\|^2`, so that its step size
s is twice eta; it grows the inner step by expand^(1/batches) where this grows it by ``expand``; and where a line search gives up
it keeps the last trial, where this goes back. Its variants with another divergence (mirror, Newton) are not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from weightroom.errors import UsageError, check_range, unknown
from weightroom.optim.base import check_dense

__all__ = ["SSO"]

Forward = Callable[[], Tensor]
Oracle = Callable[[Tensor], "Tensor | tuple[Tensor | None, Tensor]"]
Factory = Callable[[list[Tensor]], Optimizer]

#: Smoothness in one sample's outputs z: log(1 + exp(-yz)); softmax cross entropy; (z - y)^2.
_SMOOTHNESS = {"bce": 0.25, "ce": 0.5, "mse": 2.0}
#: eta_t / eta at the step t = 1, 2, ... of T; the other rules look at the loss or at its gradients.
_RULES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda t, T: 1.0,
    "sqrt": lambda t, T: t**-0.5,
    "exp": lambda t, T: (1 / T) ** (t / T),
}
_COUNTERS = ("oracle_calls", "loss_evals", "inner_steps", "forward_evals", "backtracks")

TRIALS = 100  # of a line search
LEAST_STEP = 1e-6  # below which the inner one gives up
MOST_SHRINK = 0.1  # of a step from one trial to the next
C_OUTPUTS = 0.5  # of the line search for eta: for a quadratic loss it accepts eta <= 1/L
ETA_RANGE = (1e-4, 1e4)  # of what that finds


class _NonFiniteError(UsageError, RuntimeError):
    """The oracle returned NaN or infinity."""


class SSO(Optimizer):
    r"""Builds a surrogate of one gradient in the outputs and takes several steps of the parameters on it.

    ``step`` takes two functions instead of a closure::

        optimizer = SSO(model.parameters(), smoothness="ce")
        for x, y in batches:
            optimizer.step(lambda: model(x), lambda z: F.cross_entropy(z, y, reduction="sum"))

    The line search of an inner step tries :math:`a`, then ``backtrack`` as much, until
    :math:`q(\theta - a \nabla q) \le q(\theta) - c\, a \|\nabla q\|^2`. Where a trial fails, q is taken for a parabola through what is
    known of it, and trials that would fail too are left out (down to a tenth of the step); with a model that is linear in its
    parameters this accepts what trying each would accept. After 100 trials, or below a step of 1e-6, the parameters stay.

    What plays the learning rate's part is eta: it is ``param_groups[i]["lr"]``, so learning-rate schedulers work on it. As there is
    one surrogate, all groups must agree on it. At 0 nothing moves.

    Args:
        params: parameters or groups, as for any torch optimizer.
        eta: step size :math:`\eta` > 0 in the outputs; give this or ``smoothness``.
        smoothness: L of one sample's loss in its outputs; then eta = 1/L: "bce" (binary cross entropy with logits, 1/4), "ce"
            (softmax cross entropy, 1/2), "mse" (:math:`(z - y)^2`, 2), or a number > 0.
        inner_steps: m >= 1, steps on each surrogate.
        inner: "armijo" (gradient descent with a line search), or a function that makes a torch optimizer of a list of
            parameters: a new one for each surrogate, m steps of it (which may be long: one of L-BFGS is up to 20 iterations).
        eta_rule: eta at the t-th step: "constant"; "sqrt", :math:`\eta/\sqrt t`; "exp", :math:`\eta (1/T)^{t/T}`; "linesearch",
            from ``expand`` times the last one shrunk until :math:`\ell(z - \eta_t G) \le \ell(z) - \eta_t \|G\|^2 / 2`; or
            "adagrad", :math:`\eta / \sqrt{\sum_{s \le t} \|G_s\|_F^2}`. "linesearch" evaluates the loss, without its gradient, at
            other outputs; "lr" then scales what it finds by as much as a scheduler has changed it.
        c: share of the decrease that the gradient promises which an inner trial must bring, in (0, 1).
        backtrack: factor on a step (inner, or eta) whose trial failed, in (0, 1).
        expand: factor >= 1 on the last accepted step (inner, or eta) for the next first trial. On mini-batches the paper's code
            takes 2^(|B|/n), of batch and data set: nearer to 1, fewer trials fail.
        init_step: first trial on each surrogate, > 0.
        grad_tol: "armijo" is done with a surrogate whose gradient's norm is at most this.
        total_steps: T >= 1, for ``eta_rule="exp"``.

    Attributes:
        counters: since the start ``oracle_calls`` (one per step), ``loss_evals`` (of "linesearch"), ``inner_steps``,
            ``forward_evals`` (of the model; each step takes one beyond its inner steps to see that the outputs repeat, and a made
            optimizer another to know its decrease), ``backtracks`` (failed trials of either line search) and
            ``surrogate_decrease`` (of :math:`q_t`, summed over steps). ``state_dict`` carries them.

    Raises:
        UsageError: (a ``ValueError``) neither or both of ``eta`` and ``smoothness``, an argument out of its range or unknown, or
            groups that differ in "lr".
        TypeError: an argument is not of the kind named above.
    """

    #: ``train.fit`` calls ``step(forward, oracle)``.
    needs_oracle: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        eta: float | None = None,
        smoothness: float | Literal["bce", "ce", "mse"] | None = None,
        inner_steps: int = 10,
        inner: Literal["armijo"] | Factory = "armijo",
        eta_rule: Literal["constant", "sqrt", "exp", "linesearch", "adagrad"] = "constant",
        c: float = 0.1,
        backtrack: float = 0.9,
        expand: float = 2.0,
        init_step: float = 10.0,
        grad_tol: float = 1e-6,
        total_steps: int | None = None,
    ) -> None:
        if eta is None:
            eta = 1 / _smoothness(smoothness)
        elif smoothness is not None:
            raise UsageError(f"give eta or smoothness, not both: got eta={eta}, smoothness={smoothness!r}")
        check_range("eta", eta, low=0.0, open_low=True, open_high=True)
        _check_count("inner_steps", inner_steps)
        if isinstance(inner, str) and inner != "armijo":
            raise unknown("inner", inner, ("armijo", "a function that makes an optimizer"))
        if not isinstance(inner, str) and not callable(inner):
            raise TypeError(f"inner must be 'armijo' or a function params -> optimizer, got {type(inner).__name__}")
        if eta_rule not in (rules := (*_RULES, "linesearch", "adagrad")):
            raise unknown("eta_rule", eta_rule, rules)
        if total_steps is not None:
            _check_count("total_steps", total_steps)
        elif eta_rule == "exp":
            raise UsageError("eta_rule='exp' needs total_steps, the number of steps of the whole training")
        check_range("c", c, low=0.0, high=1.0, open_low=True, open_high=True)
        check_range("backtrack", backtrack, low=0.0, high=1.0, open_low=True, open_high=True)
        check_range("expand", expand, low=1.0, open_high=True)
        check_range("init_step", init_step, low=0.0, open_low=True, open_high=True)
        check_range("grad_tol", grad_tol, low=0.0, open_high=True)
        self.inner_steps, self.inner, self.eta_rule, self.total_steps = inner_steps, inner, eta_rule, total_steps
        self.c, self.backtrack, self.expand, self.init_step, self.grad_tol = c, backtrack, expand, init_step, grad_tol
        self.counters: dict[str, int | float] = {**dict.fromkeys(_COUNTERS, 0), "surrogate_decrease": 0.0}
        #: t; the eta that "linesearch" found last, and the "lr" it began with; the sum of |G|^2 of "adagrad".
        self._rule: dict[str, float] = {"t": 0, "found": eta, "base": eta, "squared": 0.0}
        super().__init__(params, {"lr": float(eta)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters; its "lr", if it gives one, must be that of the others.

        Raises:
            UsageError: it is not.
        """
        if isinstance(param_group, dict) and self.param_groups:
            lr = self.param_groups[0]["lr"]
            param_group.setdefault("lr", lr)
            _check_one_eta([lr, param_group["lr"]])
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer, with ``counters`` and where the rule for eta stands."""
        return {**super().state_dict(), "counters": dict(self.counters), "rule": dict(self._rule)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any torch optimizer; arguments other than eta stay as they were given to this one."""
        super().load_state_dict(state_dict)
        self.counters, self._rule = dict(state_dict["counters"]), dict(state_dict["rule"])

    def __getstate__(self) -> dict[str, Any]:
        own = ("inner_steps", "inner", "eta_rule", "total_steps", "c", "backtrack", "expand", "init_step", "grad_tol")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in (*own, "counters", "_rule")}}

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, forward: Forward | None = None, oracle: Oracle | None = None, *, closure: object = None
    ) -> Tensor | None:
        """Asks the oracle once and takes ``inner_steps`` steps on the surrogate.

        Args:
            forward: returns the outputs z of the batch, floating point of shape (n, ...), one row per sample. Called often; the
                outputs must depend on nothing but the parameters.
            oracle: called with z, cut off from the model's graph, it returns either the loss, summed over the samples or one per
                sample, of which the gradient is taken here by autograd; or a pair of that loss (or None) and its gradient G of
                the shape of z, row i being the gradient of sample i's loss, not divided by n. z requires gradients: an oracle
                that leaves torch takes ``z.detach()``.

        Returns:
            The loss at the start of the step, averaged over the samples; None where the oracle gives none.

        Raises:
            TypeError: ``oracle`` is missing (a closure does not do), or something returned is not of the kind named above.
            UsageError: (a ``ValueError``) G has another shape than z, groups differ in "lr", or "linesearch" gets no loss.
            RuntimeError: two evaluations of ``forward`` differ (dropout?), G is not finite (also a ``ValueError``), or a gradient
                is sparse.
        """
        if forward is None or oracle is None or closure is not None:
            raise TypeError(
                "SSO.step needs two functions, step(forward, oracle): forward() returns the model's outputs z, oracle(z) their loss, "
                "summed over the samples (or a pair of loss and gradient). One closure would have to ask the oracle anew for each "
                "inner step."
            )
        _check_one_eta([group["lr"] for group in self.param_groups])
        f = self._outputs(forward)
        z = f.detach().clone()
        loss, G = self._ask(oracle, z)
        q = _Surrogate(forward, f, z, G, self._eta(oracle, z, loss, G), self.counters)
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if q.eta > 0 and params and f.requires_grad:
            if isinstance(self.inner, str):
                self._armijo(q, params)
            else:
                self._made(q, params, self.inner)
        return None if loss is None else loss / q.n

    def _outputs(self, forward: Forward) -> Tensor:
        """f(theta_t), with its graph."""
        with torch.enable_grad():
            f = forward()
        if not isinstance(f, Tensor) or not f.is_floating_point():
            kind = f.dtype if isinstance(f, Tensor) else type(f).__name__
            raise TypeError(f"forward must return a floating-point tensor, got {kind}")
        if not f.numel():
            raise UsageError(f"forward must return the outputs of at least one sample, got the shape {tuple(f.shape)}")
        again = forward()
        self.counters["forward_evals"] += 2
        if again.shape != f.shape or (again - f).abs().amax() > 8 * torch.finfo(f.dtype).eps * f.abs().amax():
            raise RuntimeError(
                "surrogate requires deterministic forward: two evaluations at the same parameters differ (dropout or other noise in "
                "the model? put it in eval mode)"
            )
        return f

    def _ask(self, oracle: Oracle, z: Tensor) -> tuple[Tensor | None, Tensor]:
        """The sum of the losses at z, and G."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            answer = oracle(z)
            self.counters["oracle_calls"] += 1
            if isinstance(answer, Tensor):
                loss: Tensor | None = answer.sum()
                G = torch.autograd.grad(cast(Tensor, loss), z)[0]
            elif isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Tensor):
                loss, G = (None if answer[0] is None else torch.as_tensor(answer[0]).sum()), answer[1].detach()
            else:
                raise TypeError(f"oracle must return a loss tensor, or a pair (loss or None, G), got {type(answer).__name__}")
        if G.shape != z.shape:
            raise UsageError(f"the oracle's G must have the shape of the outputs, {tuple(z.shape)}, got {tuple(G.shape)}")
        if not G.isfinite().all():
            raise _NonFiniteError("the oracle's G is not finite")
        return None if loss is None else loss.detach(), G

    def _eta(self, oracle: Oracle, z: Tensor, loss: Tensor | None, G: Tensor) -> float:
        """eta_t; 0 where there is nothing to descend."""
        lr, rule = float(self.param_groups[0]["lr"]), self._rule
        rule["t"] += 1
        if self.eta_rule in _RULES:
            return lr * _RULES[self.eta_rule](int(rule["t"]), self.total_steps or 1)
        squared = float(G.to(_wide(G)).square().sum())
        if self.eta_rule == "adagrad":
            rule["squared"] += squared
            return lr / math.sqrt(rule["squared"]) if rule["squared"] else 0.0
        if loss is None:
            raise UsageError("eta_rule='linesearch' needs an oracle that gives the loss, got None")
        eta, before = self.expand * rule["found"], float(loss)
        for _ in range(TRIALS):
            with torch.enable_grad():
                answer = oracle((z - eta * G).requires_grad_())
            self.counters["loss_evals"] += 1
            after = float(torch.as_tensor(answer[0] if isinstance(answer, tuple) else answer).detach().sum())
            if after <= before - C_OUTPUTS * eta * squared:  # l(z - eta G) <= l(z) - c eta |G|^2
                break
            self.counters["backtracks"] += 1
            eta *= self.backtrack
        rule["found"] = min(max(eta, ETA_RANGE[0]), ETA_RANGE[1])
        return rule["found"] * lr / rule["base"]

    def _armijo(self, q: _Surrogate, params: list[Tensor]) -> None:
        """Gradient descent on q, each step as long as its line search allows."""
        value, a = 0.0, self.init_step
        for _ in range(self.inner_steps):
            moving, grads = q.gradient(params)
            found = self._line_search(q, moving, grads, value, a) if moving else None
            if found is None:
                break
            value, a = found[0], found[1] * self.expand
            self.counters["inner_steps"] += 1
        self.counters["surrogate_decrease"] -= value

    def _line_search(
        self, q: _Surrogate, params: list[Tensor], grads: list[Tensor], value: float, a: float
    ) -> tuple[float, float] | None:
        """Moves to the first trial that lowers q enough and returns its value and step; None, back at the start, if none does."""
        start, ended = torch._foreach_add(params, 0), False
        norms = torch._foreach_norm([g.to(_wide(g)) for g in grads])
        squared = torch.stack([norm.to(q.G) for norm in norms]).square().sum()
        try:
            for _ in range(TRIALS):
                torch._foreach_add_(params, grads, alpha=-a)
                after, g2 = torch.stack([q.move(), squared]).tolist()
                if not math.isfinite(g2):
                    raise RuntimeError("the gradient of SSO's surrogate is not finite: look at the model at these parameters")
                done = g2 <= self.grad_tol**2
                ended = after <= value - self.c * a * g2 and not done  # q(theta - a grad) <= q(theta) - c a |grad|^2
                if ended:
                    return after, a
                torch._foreach_copy_(params, start)
                if done:
                    break
                self.counters["backtracks"] += 1
                a *= _shrink(after - value, a * g2, self.c, self.backtrack)
                if a < LEAST_STEP:
                    break
        finally:
            if not ended:
                torch._foreach_copy_(params, start)
        return None

    def _made(self, q: _Surrogate, params: list[Tensor], make: Factory) -> None:
        """Steps of the user's optimizer on q; the parameters' own ``grad`` is put back."""
        optimizer = make(params)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"inner must return a torch optimizer, got {type(optimizer).__name__}")

        def closure() -> Tensor:
            value = q.move()
            for p in params:
                p.grad = None
            for p, grad in zip(*q.gradient(params), strict=True):
                p.grad = grad
            return value

        kept = [p.grad for p in params]
        try:
            for _ in range(self.inner_steps):
                optimizer.step(cast(Any, closure))
                self.counters["inner_steps"] += 1
        finally:
            for p, grad in zip(params, kept, strict=True):
                p.grad = grad
        self.counters["surrogate_decrease"] -= float(q.move())


class _Surrogate:
    """q_t, up to the loss at z; it holds the model's last evaluation and that one's graph."""

    def __init__(self, forward: Forward, f: Tensor, z: Tensor, G: Tensor, eta: float, counters: dict[str, int | float]) -> None:
        self.forward, self.f, self.eta, self.counters = forward, f, eta, counters
        self.z, self.G = z.to(_wide(z)), G.to(_wide(z))
        self.n = z.shape[0] if z.ndim else 1
        self.d = torch.zeros_like(self.z)

    def move(self) -> Tensor:
        """Evaluates the model and returns (1/n) sum_i [ <G_i, d_i> + |d_i|^2 / (2 eta) ], d = f(theta) - z."""
        with torch.enable_grad():
            self.f = self.forward()
        self.counters["forward_evals"] += 1
        self.d = self.f.detach().to(self.z) - self.z
        return (torch.add(self.G, self.d, alpha=1 / (2 * self.eta)) * self.d).sum() / self.n

    def gradient(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that the last evaluation depends on, and grad q = (1/n) sum_i J_i^T (G_i + d_i / eta) of each."""
        slope = torch.add(self.G, self.d, alpha=1 / self.eta) / self.n
        grads = torch.autograd.grad(self.f, params, slope.to(self.f), allow_unused=True)
        pairs = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
        check_dense((g for _, g in pairs), "SSO")
        return [p for p, _ in pairs], [g for _, g in pairs]


def _shrink(rise: float, promised: float, c: float, backtrack: float) -> float:
    """The power of ``backtrack`` after which the parabola through q, its slope and the failed trial says "enough decrease".

    Along the ray q(s) = q - s promised + s^2 (rise + promised), s being the share of the step; enough is c s promised.
    """
    share = (1 - c) * promised / (rise + promised) if math.isfinite(rise) else 0.0
    return backtrack ** max(1, math.ceil(math.log(max(share, MOST_SHRINK)) / math.log(backtrack)))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _smoothness(smoothness: float | str | None) -> float:
    if smoothness is None:
        raise UsageError("give eta or smoothness, got neither")
    if isinstance(smoothness, str):
        if smoothness not in _SMOOTHNESS:
            raise unknown("smoothness", smoothness, (*_SMOOTHNESS, "a number > 0"))
        return _SMOOTHNESS[smoothness]
    check_range("smoothness", smoothness, low=0.0, open_low=True, open_high=True)
    return smoothness


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    check_range(name, int(value), low=1)


def _check_one_eta(etas: list[float]) -> None:
    if len(set(etas)) > 1:
        raise UsageError(f"all groups must have one 'lr' (it is eta, of the one surrogate), got {etas}")
