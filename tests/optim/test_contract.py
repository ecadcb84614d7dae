"""What every optimizer of the room must do, whatever its method; a method's own test holds only what is its own."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from weightroom import optim


@dataclass(frozen=True)
class Case:
    """How the common test makes and drives one optimizer.

    Args:
        kwargs: constructor arguments.
        drive: "plain": ``step()`` after ``backward()``; "closure": ``step(closure)`` with one that computes gradients and returns
            the loss; "oracle": ``step(forward, oracle)``, with the loss itself as the model's one output; "margins":
            ``step(closure)`` with one that returns margins and computes no gradients; the one margin is minus the loss.
        lr: the constructor's name for what a param group calls "lr".
        without: test -> why it makes no sense here.
    """

    kwargs: dict[str, Any] = field(default_factory=dict)
    drive: Literal["plain", "closure", "oracle", "margins"] = "plain"
    lr: str = "lr"
    without: Mapping[str, str] = field(default_factory=dict)


#: Of SSO: one surrogate, one number.
ONE_ETA = {"test_groups_have_their_own_learning_rate": "eta belongs to the outputs, which all groups make together"}


#: Optimizers that need something, and further variants: a name that starts with the class's name.
CASES: dict[str, Case] = {
    "LionK": Case({"lr": 1e-2}),
    "LionK decayed": Case({"lr": 1e-2, "weight_decay": 0.5}),
    "LionK l2 of the group": Case({"lr": 3e-2, "kappa": "l2", "scope": "group", "weight_decay": 0.1}),
    "MFAC": Case({"lr": 1e-2, "window": 8, "damping": 1e-2}),
    "MFAC with momentum and decay": Case({"lr": 1e-2, "window": 8, "damping": 1e-2, "momentum": 0.5, "weight_decay": 1e-3}),
    "NormalizedLRGD": Case({"lr": 0.3}, "margins"),
    "NormalizedLRGD unnormalised": Case({"lr": 0.3, "normalize": False}, "margins"),
    "NormalizedLRGD batch perceptron": Case({"lr": 0.3, "normalize": False, "limit": "batch"}, "margins"),
    "NormalizedLRGD perceptron": Case({"lr": 0.3, "limit": "online"}, "margins"),
    "SAM": Case({"lr": 0.1, "momentum": 0.9}, "closure"),
    "SAM adaptive around AdamW": Case({"base": torch.optim.AdamW, "lr": 1e-2, "rho": 0.5, "adaptive": True}, "closure"),
    "SSO": Case({"eta": 0.5}, "oracle", "eta", ONE_ETA),
    "SSO linesearch": Case({"eta": 0.5, "eta_rule": "linesearch"}, "oracle", "eta", ONE_ETA),
    "SSO by SGD": Case({"eta": 5.0, "inner": partial(torch.optim.SGD, lr=0.03)}, "oracle", "eta", ONE_ETA),
}
CLASSES = {n: c for n in optim.__all__ if inspect.isclass(c := getattr(optim, n)) and issubclass(c, Optimizer)}
NAMES = sorted({*CASES, *(n for n in CLASSES if not any(case.split()[0] == n for case in CASES))})

pytestmark = pytest.mark.parametrize("name", NAMES)


def case_of(name: str) -> Case:
    return CASES.get(name, Case())


@pytest.fixture(autouse=True)
def skip_what_makes_no_sense(request, name):
    if reason := case_of(name).without.get(request.function.__name__):
        pytest.skip(reason)


def make(name: str, params: Any, **more: Any) -> Optimizer:
    if "lr" in more:
        more[case_of(name).lr] = more.pop("lr")
    return CLASSES[name.split()[0]](params, **{**case_of(name).kwargs, **more})


def takes(name: str, argument: str) -> bool:
    return argument in inspect.signature(CLASSES[name.split()[0]]).parameters


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batch(i: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(100 + i)
    return torch.randn(16, 5, generator=g, dtype=torch.float64).to(dtype), torch.randint(3, (16,), generator=g)


def take(name: str, optimizer: Optimizer, loss: Callable[[], Tensor]) -> Any:
    """One step, driven as the optimizer needs it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        if value.requires_grad:
            value.backward()
        return value

    match case_of(name).drive:
        case "plain":
            closure()
            return optimizer.step()
        case "closure":
            return optimizer.step(closure)
        case "oracle":
            return optimizer.step(lambda: loss().reshape(1, 1), lambda z: z.sum())
        case "margins":
            return optimizer.step(lambda: -loss().reshape(1))


def train(name: str, model: nn.Module, optimizer: Optimizer, steps: range, after: Callable[[], None] = lambda: None) -> None:
    torch.manual_seed(7)
    for i in steps:
        x, y = batch(i, next(model.parameters()).dtype)
        take(name, optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
        after()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def start(name: str, **more: Any) -> tuple[nn.Module, Optimizer]:
    model = net()
    return model, make(name, model.parameters(), **more)


def test_the_public_api_is_covered(name):
    assert name.split()[0] in CLASSES


def test_a_step_moves_every_parameter_and_returns_what_the_closure_did(name):
    model, optimizer = start(name)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch(0)
    returned = take(name, optimizer, lambda: F.cross_entropy(model(x), y))
    assert all((p != q).any() for p, q in zip(model.parameters(), before, strict=True))
    assert (returned is not None) == (case_of(name).drive != "plain")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_gives_what_the_cpu_gives(name):
    model, optimizer = start(name)
    twin = copy.deepcopy(model).cuda()
    its = make(name, twin.parameters())
    for i in range(3):
        x, y = batch(i)
        take(name, optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
        take(name, its, lambda x=x, y=y: F.cross_entropy(twin(x.cuda()), y.cuda()))
    torch.testing.assert_close(weights(twin).cpu(), weights(model), rtol=1e-6, atol=1e-9)


def test_groups_have_their_own_learning_rate(name):
    model = net()
    first, second = model[0], model[2]
    optimizer = make(name, [{"params": first.parameters(), "lr": 1e-2}, {"params": second.parameters(), "lr": 1e-7}])
    before = [p.detach().clone() for p in (first.weight, second.weight)]
    train(name, model, optimizer, range(3))
    assert (first.weight - before[0]).abs().max() > 1e3 * (second.weight - before[1]).abs().max() > 0
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_added_group_is_trained(name):
    model = net()
    optimizer = make(name, model[0].parameters())
    train(name, model, optimizer, range(2))
    before = model[2].weight.detach().clone()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(name, model, optimizer, range(2, 4))
    assert (model[2].weight != before).any()
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [model[0].weight]})
    with pytest.raises(TypeError, match="dict"):
        optimizer.add_param_group([model[0].weight])


@pytest.mark.parametrize("through", ["memory", "file"])
def test_state_dict_continues_bitwise(name, through):
    straight, optimizer = start(name)
    train(name, straight, optimizer, range(3))
    resumed = copy.deepcopy(straight)
    state = copy.deepcopy(optimizer.state_dict())
    if through == "file":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    fresh = make(name, resumed.parameters())
    fresh.load_state_dict(state)
    train(name, straight, optimizer, range(3, 8))
    train(name, resumed, fresh, range(3, 8))
    assert torch.equal(weights(straight), weights(resumed))


def test_state_dict_carries_hyperparameters(name):
    optimizer = make(name, net().parameters(), lr=3e-3)
    fresh = make(name, net().parameters(), lr=1e-3)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == 3e-3


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_alike(name, how):
    model, optimizer = start(name)
    train(name, model, optimizer, range(3))
    pair = (model, optimizer)
    twin, its = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train(name, model, optimizer, range(3, 6))
    train(name, twin, its, range(3, 6))
    assert torch.equal(weights(model), weights(twin))


def test_same_seed_same_weights(name):
    runs = []
    for _ in range(2):
        model, optimizer = start(name)
        train(name, model, optimizer, range(5))
        runs.append(weights(model))
    assert torch.equal(*runs)


def test_scheduler_changes_the_step(name):
    model, optimizer = start(name, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(name, model, optimizer, range(3), after=scheduler.step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 8)
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(model)
    train(name, model, optimizer, range(3, 5))
    assert torch.equal(weights(model), before)


def test_onecycle_and_warmup_from_zero_run(name):
    model, optimizer = start(name)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, 1.0, 3), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)],
        milestones=[3],
    )
    train(name, model, optimizer, range(7), after=scheduler.step)
    assert torch.isfinite(weights(model)).all()


def test_closure_runs_with_gradients_and_its_loss_is_returned(name):
    model, optimizer = start(name)
    x, y = batch(0)
    calls = []

    def loss() -> Tensor:
        value = F.cross_entropy(model(x), y)
        calls.append(value.item())
        return value

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    returned = optimizer.step(closure) if case_of(name).drive == "plain" else take(name, optimizer, loss)
    assert len(calls) >= 1
    if case_of(name).drive != "margins":
        assert float(torch.as_tensor(returned).detach()) == calls[0]


def test_frozen_and_unused_parameters_stay(name):
    model = net()
    model[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = make(name, [*model.parameters(), unused])
    frozen = model[0].weight.clone()
    train(name, model, optimizer, range(3))
    assert torch.equal(model[0].weight, frozen)
    assert torch.equal(unused, torch.ones_like(unused))


def test_a_group_without_any_gradient_is_left_alone(name):
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = make(name, [p])
    take(name, optimizer, lambda: torch.tensor(0.0))
    assert torch.equal(p, torch.ones_like(p))


def test_scalar_and_empty_parameters(name):
    scalar, empty = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0, 3))
    optimizer = make(name, [scalar, empty])
    take(name, optimizer, lambda: scalar.square() + empty.sum())
    assert scalar.item() < 2.0


def test_noncontiguous_parameters_are_stepped_alike(name):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, turned = nn.Parameter(x.clone()), nn.Parameter(x.t().contiguous().t())
    assert not turned.is_contiguous()
    for p in (plain, turned):
        optimizer = make(name, [p])
        torch.manual_seed(0)
        for _ in range(3):
            take(name, optimizer, lambda p=p: (p - 1).square().sum())
    torch.testing.assert_close(plain, turned)


def test_sparse_gradients_are_refused_by_name(name):
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = make(name, table.parameters())
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match=name.split()[0]):
        take(name, optimizer, lambda: table(torch.tensor([1, 2])).sum())
    assert torch.equal(table.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.complex128])
def test_dtype_is_supported_or_refused_by_name(name, dtype):
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    try:
        optimizer = make(name, [p])
        for _ in range(5):
            take(name, optimizer, lambda: (p * p.conj()).real.sum())
    except (TypeError, ValueError, RuntimeError) as error:
        assert name.split()[0] in str(error)  # noqa: PT017
        assert dtype != torch.float32
        return
    assert p.dtype == dtype
    assert torch.isfinite(torch.view_as_real(p) if p.is_complex() else p).all()
    assert (p.abs() < 1).all()


def test_foreach_changes_nothing(name):
    if not takes(name, "foreach"):
        pytest.skip("has no foreach")
    results = []
    for foreach in (True, False, None):
        model, optimizer = start(name, foreach=foreach)
        train(name, model, optimizer, range(10))
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-12)


def test_maximize_is_minimising_the_negative(name):
    if not takes(name, "maximize"):
        pytest.skip("has no maximize")
    up, down = net(), net()
    for model, sign in ((up, 1.0), (down, -1.0)):
        optimizer = make(name, model.parameters(), maximize=sign > 0)
        for i in range(5):
            x, y = batch(i)
            take(name, optimizer, lambda model=model, sign=sign, x=x, y=y: sign * F.cross_entropy(model(x), y))
    torch.testing.assert_close(weights(up), weights(down), rtol=1e-9, atol=1e-12)


def test_gradients_are_not_changed(name):
    if case_of(name).drive != "plain":
        pytest.skip("makes its own gradients")
    model, optimizer = start(name)
    x, y = batch(0)
    for _ in range(2):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_zero_grad_forgets_or_zeroes(name):
    model, optimizer = start(name)
    train(name, model, optimizer, range(1))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_step_leaves_no_graph(name):
    model, optimizer = start(name)
    train(name, model, optimizer, range(2))
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert not any(t.requires_grad for t in tensors)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_no_parameters_is_an_error(name):
    with pytest.raises(ValueError, match="empty parameter list"):
        make(name, [])


def test_a_tensor_instead_of_a_list_is_an_error(name):
    with pytest.raises(TypeError):
        make(name, nn.Parameter(torch.ones(2)))


def test_hooks_run(name):
    model, optimizer = start(name)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(name, model, optimizer, range(1))
    assert seen == ["before", "after"]


def test_repr_names_the_class(name):
    assert name.split()[0] in repr(start(name)[1])


def test_converges_on_a_convex_quadratic(name):
    g = torch.Generator().manual_seed(0)
    A = torch.randn(12, 4, generator=g, dtype=torch.float64)
    b = A @ torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    x = nn.Parameter(torch.tensor([0.9, -0.8, 0.7, 0.6], dtype=torch.float64))
    optimizer = make(name, [x])
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 400)
    loss = lambda: (A @ x - b).square().mean() / 2  # noqa: E731
    first = loss().item()
    for _ in range(400):
        take(name, optimizer, loss)
        scheduler.step()
    assert loss().item() < 0.05 * first


def test_comes_to_the_minimiser_of_a_ridge_logistic_problem(name):
    g = torch.Generator().manual_seed(0)
    A = torch.randn(40, 4, generator=g, dtype=torch.float64)
    y = (A @ torch.tensor([1.0, -0.7, 0.5, 0.2], dtype=torch.float64) > 0.3 * torch.randn(40, generator=g)).double()
    loss = lambda x: F.binary_cross_entropy_with_logits(A @ x, y) + 0.05 * x.square().sum()  # noqa: E731
    best = torch.zeros(4, dtype=torch.float64)
    for _ in range(20):  # Newton
        s = torch.sigmoid(A @ best)
        gradient = A.T @ (s - y) / 40 + 0.1 * best
        best -= torch.linalg.solve(A.T @ (A * (s * (1 - s))[:, None]) / 40 + 0.1 * torch.eye(4), gradient)
    assert gradient.norm() < 1e-12
    x = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = make(name, [x])
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 400)
    for _ in range(400):
        take(name, optimizer, lambda: loss(x))
        scheduler.step()
    assert (x - best).norm() < 0.05 * best.norm()


@pytest.mark.filterwarnings("ignore:.*GradScaler.*")
def test_grad_scaler_scales_and_skips(name):
    if case_of(name).drive != "plain":
        pytest.skip("GradScaler takes no functions")
    plain, scaled = net(), net()
    plain_optimizer, optimizer = make(name, plain.parameters()), make(name, scaled.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(3):
        x, y = batch(i)
        take(name, plain_optimizer, lambda x=x, y=y: F.cross_entropy(plain(x), y))
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(scaled(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(weights(plain), weights(scaled), rtol=1e-9, atol=1e-12)
    before = weights(scaled)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(scaled(x), y) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weights(scaled), before)
    assert scaler.get_scale() == 2.0**9
