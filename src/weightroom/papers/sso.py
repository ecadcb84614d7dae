"""SSO: target-based surrogates for stochastic optimisation (Lavington et al., ICML 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from weightroom.compare.base import Method
from weightroom.nets.small import MLP
from weightroom.optim import SSO
from weightroom.papers.base import Paper
from weightroom.study import Arm, Claim, Expect, Scale, Study, Task, Trial

__all__ = ["PAPER", "study"]


def _sso(params: Any, **hyper: Any) -> Optimizer:
    return SSO(params, **hyper)


def _unfit(task: Task) -> str | None:
    noisy = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in task.model().modules())
    return "its surrogate needs outputs without noise, and the model has dropout" if noisy else None


PAPER = Paper(
    key="sso",
    number=21,
    family="optimizer",
    parts=(SSO,),
    title="Target-based Surrogates for Stochastic Optimization",
    authors="Jonathan Wilder Lavington, Sharan Vaswani, Reza Babanezhad, Mark Schmidt, Nicolas Le Roux",
    year=2023,
    venue="ICML",
    arxiv="2302.02607",
    code="WilderLavington/Target-Based-Surrogates-For-Stochastic-Optimization",
    summary="Takes many steps of the parameters for one gradient of an expensive loss, on a surrogate in the model's outputs.",
    claim="With eta = 1/L the surrogate bounds the loss from above, so that any inner descent lowers it; and the more inner steps, "
    "the lower the loss per gradient of it, below SGD, line-search SGD, Adam and AdaGrad.",
    limits="For oracles that cost ten or more passes of the model: its inner steps are not free, and with a cheap oracle they are "
    "better spent on Adam. Where the model is well conditioned more inner steps do not help, as the step in the outputs, "
    "1/L, is then what is short. With 100 inner steps it beat tuned Adam per gradient on the logistic tasks and on "
    "mini-batches of digits, and drew on least squares. On smooth full-batch problems L-BFGS on the loss itself goes "
    "further per gradient. Needs outputs without noise: dropout is refused, and the running statistics of BatchNorm move "
    "with each inner step. In the optimizer family eta is 2, which is 1/L for softmax cross entropy alone. The authors' "
    "code scales the surrogate so that its step size is twice eta (here as in the paper), and where a line search fails it "
    "keeps the last trial (here it goes back). The paper's own data (libsvm's mushrooms, ijcnn, rcv1; MuJoCo) are not at "
    "hand.",
    methods={
        "sso": Method(
            _sso, {"eta": 2.0, "inner_steps": 10}, {"eta": (0.1, 20.0, "log"), "inner_steps": [1, 10, 30]}, unfit=_unfit
        )
    },
)

#: Prices of a call of the oracle in steps of the parameters.
KAPPAS = (1, 10, 100, 1000)

Take = Callable[[Tensor, Tensor], tuple[int, int, int]]


@dataclass(frozen=True)
class _Problem:
    """What is minimised.

    Args:
        model: of the parameters, at their start.
        x: inputs, one row per sample.
        y: targets.
        loss: of outputs and targets, summed.
        L: smoothness of one sample's loss in its outputs.
        batch: rows per step.
        calls: gradients of the loss that an arm may ask for.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    L: float
    batch: int
    calls: int

    @property
    def growth(self) -> float:
        """Of an inner step: two per epoch."""
        return 2 ** (self.batch / len(self.x))

    def mean(self) -> float:
        """The training loss, over all rows."""
        with torch.no_grad():
            return float(self.loss(self.model(self.x), self.y)) / len(self.x)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows in an order that the seed decides, epoch after epoch."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            if self.batch == len(self.x):
                yield self.x, self.y
            else:
                for rows in torch.randperm(len(self.x), generator=generator).split(self.batch):
                    yield self.x[rows], self.y[rows]


# ---- the arms: a step of each, and what it cost (gradients of the loss, values of it, steps of the parameters)


def _plain(make: Callable[..., Optimizer], p: _Problem, hyper: Mapping[str, float]) -> Take:
    optimizer = make(p.model.parameters(), **hyper)

    def take(x: Tensor, y: Tensor) -> tuple[int, int, int]:
        optimizer.zero_grad()
        (p.loss(p.model(x), y) / len(x)).backward()
        optimizer.step()
        return 1, 0, 1

    return take


def _gd_by_l(p: _Problem, hyper: Mapping[str, float]) -> Take:
    """Gradient descent with one over the smoothness of the loss in the parameters of a linear model."""
    rows = torch.cat([p.x, torch.ones_like(p.x[:, :1])], 1)
    return _plain(torch.optim.SGD, p, {"lr": len(rows) / (p.L * float(torch.linalg.matrix_norm(rows, 2)) ** 2)})


def _sls(p: _Problem, hyper: Mapping[str, float]) -> Take:
    """SGD with an Armijo line search on the loss of the batch (Vaswani et al. 2019), set as in the authors' code: c = 1/2."""
    params, a = list(p.model.parameters()), 1.0

    def take(x: Tensor, y: Tensor) -> tuple[int, int, int]:
        nonlocal a
        before = p.loss(p.model(x), y) / len(x)
        grads = torch.autograd.grad(before, params)
        squared = float(sum(g.square().sum() for g in grads))
        start = [w.detach().clone() for w in params]
        a *= p.growth
        with torch.no_grad():
            for trial in range(1, 101):
                for w, s, g in zip(params, start, grads, strict=True):
                    torch.sub(s, g, alpha=a, out=w)
                if float(p.loss(p.model(x), y)) / len(x) <= float(before) - 0.5 * a * squared:
                    return 1, trial, 1
                a *= 0.9
            for w, s in zip(params, start, strict=True):
                w.copy_(s)
        return 1, 100, 1

    return take


def _lbfgs(p: _Problem, hyper: Mapping[str, float]) -> Take:
    """L-BFGS on the loss; its line search asks for a gradient with each value."""
    optimizer, asked = torch.optim.LBFGS(p.model.parameters(), max_iter=1, max_eval=25, line_search_fn="strong_wolfe"), [0]

    def take(x: Tensor, y: Tensor) -> tuple[int, int, int]:
        def closure() -> Tensor:
            asked[0] += 1
            optimizer.zero_grad()
            loss = p.loss(p.model(x), y) / len(x)
            loss.backward()
            return loss

        before = asked[0]
        optimizer.step(closure)
        return asked[0] - before, 0, asked[0] - before

    return take


def _surrogate(p: _Problem, hyper: Mapping[str, float], **options: Any) -> Take:
    """SSO, with eta in units of 1/L."""
    optimizer = SSO(
        p.model.parameters(), eta=hyper.get("eta_times_L", 1.0) / p.L, expand=p.growth, total_steps=p.calls, **options
    )
    work = "inner_steps" if optimizer.inner == "armijo" else "forward_evals"

    def take(x: Tensor, y: Tensor) -> tuple[int, int, int]:
        before = dict(optimizer.counters)
        optimizer.step(lambda: p.model(x), lambda z: p.loss(z, y))
        return tuple(int(optimizer.counters[name] - before[name]) for name in ("oracle_calls", "loss_evals", work))  # type: ignore[return-value]

    return take


_inner_lbfgs = partial(
    torch.optim.LBFGS, max_iter=50, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe", history_size=20
)


def _run(
    trial: Trial, *, problem: Callable[[Trial], _Problem], make: Callable[[_Problem, Mapping[str, float]], Take]
) -> dict[str, float]:
    """Trains until the calls are spent, and reads off the loss within each budget."""
    p = problem(trial)
    take, batches = make(p, trial.params), p.batches(trial.seed)
    gradients = values = steps = 0
    reached, losses = {"loss": p.mean(), **{f"loss_kappa_{k}": p.mean() for k in KAPPAS}}, [p.mean()]
    while gradients < p.calls:
        asked, tried, done = take(*next(batches))
        gradients, values, steps = gradients + asked, values + tried, steps + done
        losses.append(p.mean())
        trial.log(gradients, loss=losses[-1])
        trial.log(100 * (gradients + values) + steps, loss_over_cost_at_kappa_100=losses[-1])
        if gradients <= p.calls:
            reached["loss"] = losses[-1]
        for k in KAPPAS:
            if k * (gradients + values) + steps <= (k + 1) * p.calls:
                reached[f"loss_kappa_{k}"] = losses[-1]
    trial.spend(oracle_calls=gradients + values, steps=steps)
    return {**reached, "rise": max(b - a for a, b in pairwise(losses))}


_METRICS = {**{f"loss_kappa_{k}": "min" for k in KAPPAS}, "rise": "min"}


def _arms(problem: Callable[[Trial], _Problem]) -> dict[str, Arm]:
    """What both studies compare; "sso M" takes M inner steps with eta = 1/L, or as tuned."""

    def arm(make: Callable[[_Problem, Mapping[str, float]], Take], *cites: Any, **space: list[float]) -> Arm:
        common = {"lr": 0.1, "eta_times_L": 1.0}
        return Arm(partial(_run, problem=problem, make=make), {name: common[name] for name in space}, space, cites)

    return {
        "gd": arm(partial(_plain, torch.optim.SGD), lr=[0.1, 1.0, 10.0, 100.0]),
        "adam": arm(partial(_plain, torch.optim.Adam), lr=[0.01, 0.1, 1.0]),
        "sls": arm(_sls),
        **{f"sso {m}": arm(partial(_surrogate, inner_steps=m), PAPER, eta_times_L=[0.25, 1.0, 4.0, 16.0]) for m in (1, 10, 100)},
    }


def _untuned(problem: Callable[[Trial], _Problem], **options: Any) -> Arm:
    return Arm(partial(_run, problem=problem, make=partial(_surrogate, **options)), cites=(PAPER,))


# ---- linear models, full batch


def _table(trial: Trial) -> _Problem:
    """Four fifths of a table's rows, drawn by the seed, standardised, with columns scaled down to a hundredth; weights at 0."""
    from sklearn.datasets import load_breast_cancer, load_diabetes

    name, spread = trial.setting
    x, y = (torch.as_tensor(part) for part in (load_diabetes if name == "diabetes" else load_breast_cancer)(return_X_y=True))
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(trial.seed))[: round(0.8 * len(x))]
    x, y = x[rows].double(), y[rows].double()[:, None]
    x = (x - x.mean(0)) / x.std(0, correction=0) * torch.logspace(0, -spread, x.shape[1], dtype=torch.float64)
    model = nn.utils.skip_init(nn.Linear, x.shape[1], 1, dtype=torch.float64)
    for w in model.parameters():
        nn.init.zeros_(w)
    calls = trial.scale.pick(3, 50, 200)
    if name == "diabetes":
        return _Problem(
            model, x, (y - y.mean()) / y.std(correction=0), lambda z, y: (z - y).square().sum() / 2, 1.0, len(x), calls
        )
    return _Problem(model, x, y, partial(F.binary_cross_entropy_with_logits, reduction="sum"), 0.25, len(x), calls)


_A, _B, _C = "logistic, ill-conditioned", "least squares, ill-conditioned", "logistic"


def _full_batch(scale: Scale) -> Study:
    arms = {
        **_arms(_table),
        "gd, 1/L": Arm(partial(_run, problem=_table, make=_gd_by_l)),
        "lbfgs": Arm(partial(_run, problem=_table, make=_lbfgs)),
        **{f"sso {m}, line search": _untuned(_table, inner_steps=m, eta_rule="linesearch") for m in (1, 10, 100)},
        "sso, L-BFGS inside": _untuned(_table, inner_steps=1, inner=_inner_lbfgs),
    }

    def below(name: str, other: str, on: str, metric: str = "loss", tuned: bool = False) -> Expect:
        return Expect(name, metric, on=on, tuned=tuned).better_than(other)

    expect = [
        *(
            Claim(f"{on}: with eta = 1/L and {m} inner steps no step raises the loss", Expect(f"sso {m}", "rise", on=on).always(high=1e-9))
            for on in (_A, _B, _C)
            for m in (1, 10, 100)
        ),
        *(
            Claim(f"{on}: {more} inner steps reach a lower loss per gradient than {fewer}", below(f"sso {more}", f"sso {fewer}", on))
            for on in (_A, _B, _C)
            for fewer, more in ((1, 10), (10, 100))
        ),
        Claim(f"{_A}: so they do with a line search", below("sso 100, line search", "sso 10, line search", _A)),
        Claim(f"{_A}: a line search for eta beats 1/L", below("sso 100, line search", "sso 100", _A)),
        *(
            Claim(f"{on}: 100 inner steps beat {other} per gradient", below("sso 100", name, on))
            for on in (_A, _B, _C)
            for name, other in (("gd, 1/L", "gradient descent with one over L"), ("sls", "gradient descent with a line search"))
        ),
        *(
            Claim(f"{on}: 100 inner steps beat {other} per gradient, each tuned", below("sso 100", name, on, tuned=True))
            for on in (_A, _B, _C)
            for name, other in (("gd", "gradient descent"), ("adam", "Adam"))
        ),
        Claim(f"{_A}: 100 inner steps beat L-BFGS on the loss per gradient", below("sso 100", "lbfgs", _A)),
        Claim(f"{_A}: where a gradient costs 1000 steps, 100 inner steps beat one", below("sso 100", "sso 1", _A, "loss_kappa_1000")),
        Claim(f"{_A}: where it costs 100 steps they do too", below("sso 100", "sso 1", _A, "loss_kappa_100")),
        Claim(
            f"{_A}: where it costs one step they are worse",
            Expect("sso 100", "loss_kappa_1", on=_A).worse_than("sso 1"),
        ),
    ]  # fmt: skip
    return Study(
        name="sso: linear models, full batch",
        paper=PAPER,
        scale=scale,
        arms=arms,
        metric="loss",
        direction="min",
        metrics=_METRICS,
        baseline="gd",
        settings={_A: ("breast_cancer", 2.0), _B: ("diabetes", 2.0), _C: ("breast_cancer", 0.0)},
        expect=expect,
        seeds=scale.pick(range(1), range(100, 110), range(100, 110)),
        tune=scale.pick(1, 4, 4),
        notes={
            "seeds": "a seed draws four fifths of the rows; all else is deterministic, so intervals are about which rows there are",
            "loss": "training loss per row after 50 gradients of it (of least squares, half the square)",
            "loss_kappa": "training loss when kappa times the oracle's calls plus the steps of the parameters reaches what 50 steps of "
            "gradient descent cost; a value of the loss in a line search is a call like a gradient",
            "rates": "0.1 in common, tuned over 0.1, 1, 10, 100 for gradient descent and 0.01, 0.1, 1 for Adam; eta = 1/L in common, "
            "tuned over a quarter, 1, 4 and 16 times that",
        },
    )


# ---- a network, mini-batches


def _digits(trial: Trial) -> _Problem:
    """All 1,797 digits, and a 64-32-10 network, batches of 128; weights and order by the seed."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        model = MLP((64, 32, 10))
    x, y = torch.from_numpy(images / 16).float(), torch.from_numpy(labels).long()
    return _Problem(model, x, y, partial(F.cross_entropy, reduction="sum"), 0.5, 128, trial.scale.pick(5, 150, 1000))


def _mini_batch(scale: Scale) -> Study:
    rules = ("sqrt", "exp", "linesearch", "adagrad")
    arms = {**_arms(_digits), **{f"sso 10, {rule}": _untuned(_digits, inner_steps=10, eta_rule=rule) for rule in rules}}

    def below(name: str, other: str, tuned: bool = False) -> Expect:
        return Expect(name, tuned=tuned).better_than(other)

    return Study(
        name="sso: a network, mini-batches",
        paper=PAPER,
        scale=scale,
        arms=arms,
        metric="loss",
        direction="min",
        metrics=_METRICS,
        baseline="gd",
        expect=[
            Claim("10 inner steps reach a lower loss per gradient than one", below("sso 10", "sso 1")),
            Claim("100 reach a lower one than 10", below("sso 100", "sso 10")),
            Claim("10 inner steps beat SGD with a line search per gradient", below("sso 10", "sls")),
            Claim("10 inner steps beat SGD per gradient, each tuned", below("sso 10", "gd", tuned=True)),
            Claim("10 inner steps beat Adam per gradient, each tuned", below("sso 10", "adam", tuned=True)),
            Claim("100 inner steps beat Adam per gradient, each tuned", below("sso 100", "adam", tuned=True)),
        ],
        seeds=scale.pick(range(1), range(100, 110), range(100, 110)),
        tune=scale.pick(1, 4, 4),
        notes={
            "seeds": "a seed decides the initial weights and the order of the rows",
            "training": "1,797 digits, 64-32-10 perceptron, 150 batches of 128; the loss is over all of them",
            "rates": "as with full batches; AdaGrad's eta too starts from 1/L",
        },
    )


def study(scale: Scale) -> list[Study]:
    """Linear models with full batches, and a network with mini-batches, at equally many gradients of the loss."""
    return [_full_batch(scale), _mini_batch(scale)]
