r"""Weight compander: train v, compute with w = a arctan(v / b); weights stay small and leave zero faster.

.. math:: w = \psi(v) = a \arctan(v / b), \qquad |w| < a \pi / 2, \qquad \psi'(v) = \frac{a / b}{1 + (v / b)^2}

A step in v moves w by :math:`-\eta\, \psi'(v)^2\, \partial L / \partial w` to first order: near zero the learning rate is
multiplied by :math:`(a / b)^2` (expansion), beyond :math:`|v| = b \sqrt{a / b - 1}` it is damped (compression). Optimizer, weight
decay and initialisation act on v; decay of v is a decay of :math:`b \tan(w / a)`, which grows without limit towards the bound.

Reach for it when training data are few or labels are wrong, and a bound on every single weight is welcome: a = b with
``preserve=True`` compresses only. It costs one function per weight and forward pass while training, nothing after ``fold``,
and goes with weight decay, dropout and batch norm.

Known not to work: a > b also starts the network a / b times larger and steps (a / b)^2 times further, so compare it with plain
training that does the same before you call a gain regularisation. Learning a and b at the full rate, or with weight decay on
them, breaks training (``compand_param_groups`` does neither). Weights preserved close to the bound lie far out in v and never
move again. Average the weights w, not v, in EMA or SWA: fold a copy first. Biases and norm layers are left alone.

Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", IJCNN 2023, arXiv 2306.16993.
The paper has the arctan with a and b, fixed or learned. The start that preserves a trained network, the layers that are left
alone, the slower rate for a and b and the other functions (``fn``) are ours, as are the default values.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightroom.errors import UsageError, check_range, unknown

__all__ = ["WeightCompander", "compand", "compand_param_groups", "fold"]

Model = TypeVar("Model", bound=nn.Module)
Name = Literal["arctan", "tanh", "softsign", "mulaw"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

#: The inverse clips at this share of the bound: w / a = 1.5 for the arctan, where v / b = 14.
REACH = 1.5 / (math.pi / 2)


class Compander(NamedTuple):
    """An odd, increasing psi(v; a, b), its inverse, and the bound of \\|psi\\| / a."""

    psi: Callable[[Tensor, Tensor, Tensor], Tensor]
    inverse: Callable[[Tensor, Tensor, Tensor], Tensor]
    bound: float


def _sign(x: Tensor) -> Tensor:
    """The sign, with sign(0) = 1: x sign(x) is \\|x\\| with slope 1 at zero, so that a weight of exactly 0 can leave it."""
    return torch.ones_like(x).copysign(x.detach())


COMPANDERS = {
    "arctan": Compander(
        lambda v, a, b: a * torch.atan(v / b),
        lambda w, a, b: b * torch.tan(w / a),
        math.pi / 2,
    ),
    "tanh": Compander(
        lambda v, a, b: a * torch.tanh(v / b),
        lambda w, a, b: b * torch.atanh(w / a),
        1.0,
    ),
    "softsign": Compander(
        lambda v, a, b: a * F.softsign(v / b),  # (v / b) / (1 + |v| / b)
        lambda w, a, b: b * (w / a) / (1 - (w / a).abs()),
        1.0,
    ),
    "mulaw": Compander(
        lambda v, a, b: a * _sign(v) * torch.log1p(_sign(v) * v / b) / torch.log1p(1 / b),
        lambda w, a, b: b * _sign(w) * torch.expm1(_sign(w) * w * torch.log1p(1 / b) / a),
        math.inf,
    ),
}


class WeightCompander(nn.Module):
    r"""The map v -> w, for ``torch.nn.utils.parametrize``; ``compand`` puts one on every layer of a model.

    ``state_dict`` holds ``log_a`` and ``log_b``; they are parameters if ``learnable``, else buffers.

    Args:
        a: scale > 0 of w; \|w\| < a pi / 2.
        b: scale > 0 of v; a / b is the slope at zero.
        learnable: train log a and log b with the weights.
        fn: "arctan" (the paper's), "tanh" (a tanh(v / b)), "softsign" (a (v / b) / (1 + \|v\| / b)), or "mulaw"
            (a sign(v) log(1 + \|v\| / b) / log(1 + 1 / b)), which only expands and has no bound.
        preserve: what registration on a parameter makes of its values. False: they become v, as in the paper, so the weights
            change to psi of what they were. True: v is the inverse of them, so the weights stay what they are.

    Attributes:
        clipped: how many weights the last ``right_inverse`` had to clip.

    Raises:
        ValueError: a or b is not > 0, or ``fn`` is unknown.

    Example::

        parametrize.register_parametrization(layer, "weight", WeightCompander(0.2, 0.1))
    """

    log_a: Tensor
    log_b: Tensor

    def __init__(
        self, a: float = 0.2, b: float = 0.1, learnable: bool = False, fn: Name = "arctan", preserve: bool = False
    ) -> None:
        super().__init__()
        if fn not in COMPANDERS:
            raise unknown("fn", fn, COMPANDERS)
        self.fn, self.learnable, self.preserve = fn, learnable, preserve
        self.clipped = 0
        for name, value in (("a", a), ("b", b)):
            check_range(name, value, low=0.0, open_low=True, open_high=True)
            log = torch.tensor(math.log(value), dtype=torch.float64, device="cpu")
            if learnable:
                self.register_parameter(f"log_{name}", nn.Parameter(log))
            else:
                self.register_buffer(f"log_{name}", log)

    @property
    def a(self) -> Tensor:
        """The scale of w, a scalar tensor."""
        return self.log_a.exp()

    @property
    def b(self) -> Tensor:
        """The scale of v, a scalar tensor."""
        return self.log_b.exp()

    def forward(self, v: Tensor) -> Tensor:
        """Returns w = psi(v): any shape, the dtype of ``v``."""
        return COMPANDERS[self.fn].psi(v, self.a, self.b)

    @torch.no_grad()
    def right_inverse(self, w: Tensor) -> Tensor:
        """Returns v with psi(v) = w; w is clipped at 95.5 percent of the bound first (v / b = 14 for the arctan).

        A call with an ``nn.Parameter`` is its registration: a and b move to its device and precision, and with
        ``preserve=False`` it is returned as it is. Any other tensor, as in ``layer.weight = tensor``, is inverted.

        Warns:
            UserWarning: says how many weights were clipped.
        """
        if isinstance(w, nn.Parameter):
            self.to(w.device, torch.promote_types(w.dtype, torch.float32))
            if not self.preserve:
                return w
        compander, limit = COMPANDERS[self.fn], REACH * COMPANDERS[self.fn].bound * self.a
        self.clipped = 0 if w.is_meta else int((w.abs() > limit).sum())
        if self.clipped:
            warnings.warn(
                f"{self.clipped} of {w.numel()} weights lie beyond {float(limit):.3g} and were clipped to it: with a larger a "
                "none are",
                stacklevel=2,
            )
        return compander.inverse(w.clamp(-limit, limit), self.a, self.b).to(w.dtype)

    @torch.no_grad()
    def extra_repr(self) -> str:
        """The arguments, with a and b as they are now."""
        values = "" if self.log_a.is_meta else f"a={float(self.a):.4g}, b={float(self.b):.4g}, "
        return f"{values}learnable={self.learnable}, fn={self.fn!r}, preserve={self.preserve}"


def compand(
    model: Model,
    a: float = 0.2,
    b: float = 0.1,
    learnable: bool = False,
    fn: Name = "arctan",
    preserve: bool = False,
    modules: Iterable[type[nn.Module]] = LAYERS,
    skip: Iterable[str] = ("lm_head",),
    shared: bool = False,
) -> Model:
    """Puts a ``WeightCompander`` on the ``weight`` of every matching layer, in place.

    A tied weight gets one, and stays tied: every module that owns the parameter, an embedding say, computes with the same
    w. Parameters keep their identity (an optimizer made before goes on with v) and ``requires_grad``; they are called
    ``parametrizations.weight.original`` in ``state_dict``. A failing call leaves the model as it was.

    Args:
        model: changed in place.
        a: see ``WeightCompander``, as are ``b``, ``learnable``, ``fn`` and ``preserve``. For training from scratch the paper
            takes ``preserve=False``; for a trained network give ``preserve=True``.
        b: scale of v.
        learnable: train a and b; hand ``compand_param_groups`` to the optimizer.
        fn: the function.
        preserve: start from the weights as they are.
        modules: classes whose ``weight`` is companded; by default linear layers and convolutions, transposed ones too.
        skip: names of layers to leave alone, themselves and what they hold: "lm_head" or "decoder.out" matches where it is a
            run of whole components of a layer's name. A tied weight with an owner that is skipped is left alone.
        shared: one pair (a, b) for the whole model instead of one for each weight; makes a difference if ``learnable``.

    Returns:
        ``model``.

    Raises:
        ValueError: no layer matches, or a wrong argument.
        RuntimeError: a weight is companded already, is parametrised otherwise, is not a parameter (pruned, say), or is of a
            lazy layer that no batch has gone through.

    Warns:
        UserWarning: with ``preserve=True``, for each weight tensor that had to be clipped (see ``right_inverse``).

    Example::

        model = compand(resnet18(), a=0.2, b=0.1)
        optimizer = torch.optim.SGD(compand_param_groups(model, lr=0.1, wd=5e-4), momentum=0.9)
        ...
        fold(model)
    """
    make = lambda: WeightCompander(a, b, learnable, fn, preserve)  # noqa: E731
    one, (modules, skip) = make(), (tuple(modules), tuple(skip))
    owners: defaultdict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    targets: dict[nn.Parameter, None] = {}
    left_alone: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        skipped = any(f".{s}." in f".{name}." for s in skip)
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter].append((module, attribute))
                if skipped:
                    left_alone.add(parameter)
        if isinstance(module, modules) and not skipped:
            targets[_weight(module, name)] = None
    chosen = [parameter for parameter in targets if parameter not in left_alone]
    if not chosen:
        seen = sorted({type(module).__name__ for module in model.modules()})
        wanted = ", ".join(cls.__name__ for cls in modules)
        raise UsageError(f"no layer to compand: looked for {wanted} (skip={skip}), the model has {', '.join(seen)}")
    for parameter in chosen:
        (module, attribute), *others = owners[parameter]
        parametrize.register_parametrization(module, attribute, one if shared else make())
        _chains(module).train(module.training)
        for other, its in others:
            parametrize.register_parametrization(other, its, nn.Identity())
            _chains(other)[its] = _chains(module)[attribute]
    return model


def compand_param_groups(model: nn.Module, lr: float, wd: float = 0.0, factor: float = 0.1) -> list[dict[str, Any]]:
    """Returns parameter groups for any torch optimizer: the trainable parameters, and apart from them log a and log b.

    Args:
        model: companded or not.
        lr: learning rate > 0 of the parameters.
        wd: weight decay >= 0 of the parameters; log a and log b have none.
        factor: > 0; log a and log b learn at ``factor * lr``.

    Raises:
        ValueError: a number is out of its range.
    """
    check_range("lr", lr, low=0.0, open_low=True)
    check_range("wd", wd, low=0.0)
    check_range("factor", factor, low=0.0, open_low=True)
    logs = {p for module in model.modules() if isinstance(module, WeightCompander) for p in module.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in trainable if p not in logs], "lr": lr, "weight_decay": wd}]
    if learnt := [p for p in trainable if p in logs]:
        groups.append({"params": learnt, "lr": factor * lr, "weight_decay": 0.0})
    return groups


def fold(model: Model) -> Model:
    """Turns every companded weight into an ordinary parameter that holds w, in place: the same outputs, no cost.

    Parameters keep their identity and tied weights stay tied. Whatever else parametrises a companded weight is folded as
    well. The state of an optimizer belongs to v, so make a new one to train on.

    Returns:
        ``model``.

    Raises:
        ValueError: nothing is companded.
    """
    done: set[nn.Module] = set()
    for module in list(model.modules()):
        for attribute, chain in list(_chains(module).items()) if parametrize.is_parametrized(module) else ():
            if any(isinstance(link, WeightCompander) for link in chain.children()):
                cls = type(module)  # which deep copies share, and torch takes the property off it
                module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=chain not in done)
                done.add(chain)
    if not done:
        raise UsageError(f"no WeightCompander in {type(model).__name__}: compand it first")
    return model


def _weight(module: nn.Module, name: str) -> nn.Parameter:
    weight = module._parameters.get("weight")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise RuntimeError(f"the weight of layer {name!r} has no shape yet: run a batch through the model first")
    if weight is not None:
        return weight
    chain = _chains(module)["weight"].children() if parametrize.is_parametrized(module, "weight") else ()
    kinds = [type(link).__name__ for link in chain]
    if WeightCompander.__name__ in kinds:
        raise RuntimeError(f"the weight of layer {name!r} is companded already: fold the model first")
    how = f"is parametrised by {', '.join(kinds)}" if kinds else "is not a parameter (is it pruned?)"
    raise RuntimeError(f"the weight of layer {name!r} {how}: make it an ordinary parameter, or name the layer in skip")


def _chains(module: nn.Module) -> Any:
    return module.parametrizations
