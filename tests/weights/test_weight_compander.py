"""What is the weight compander's own: the function, its two starts, ties, and what training through it does."""

from __future__ import annotations

import copy
import io
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from weightroom.weights import WeightCompander, compand, compand_param_groups, fold

FUNCTIONS = ["arctan", "tanh", "softsign", "mulaw"]
BOUNDS = {"arctan": math.pi / 2, "tanh": 1.0, "softsign": 1.0, "mulaw": math.inf}
SLOPES = {**dict.fromkeys(FUNCTIONS, lambda a, b: a / b), "mulaw": lambda a, b: a / b / math.log(1 + 1 / b)}
FORMULAS = {
    "arctan": lambda v, a, b: a * math.atan(v / b),
    "tanh": lambda v, a, b: a * math.tanh(v / b),
    "softsign": lambda v, a, b: a * (v / b) / (1 + abs(v) / b),
    "mulaw": lambda v, a, b: a * math.copysign(math.log1p(abs(v) / b) / math.log(1 + 1 / b), v),
}
scales = st.floats(0.01, 10.0)
values = st.floats(-5.0, 5.0)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def v_of(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original


def train(model: nn.Module, steps: int = 3, **groups: float) -> nn.Module:
    optimizer = torch.optim.SGD(compand_param_groups(model, 0.05, **groups), momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.arange(6) % 3).backward()
        optimizer.step()
    return model


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, and a layer between them."""

    def __init__(self, head: str = "out") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.between = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.head = head
        setattr(self, head, nn.Linear(5, 7, bias=False))
        getattr(self, head).weight = self.embedding.weight
        with torch.no_grad():
            self.embedding.weight.mul_(0.05)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.head)(self.between(self.embedding(x)))


# ---- the function


@pytest.mark.parametrize("fn", FUNCTIONS)
@given(v=values, a=scales, b=scales)
def test_function_is_the_formula_odd_and_bounded(fn, v, a, b):
    psi = WeightCompander(a, b, fn=fn)
    x = torch.tensor([v, -v], dtype=torch.float64)
    w = psi(x)
    assert w[0].item() == pytest.approx(FORMULAS[fn](v, a, b), rel=1e-12, abs=1e-300)
    assert w[1] == -w[0]
    assert w.abs().max() <= a * BOUNDS[fn] * (1 + 1e-15)


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_function_increases(fn):
    w = WeightCompander(fn=fn)(torch.linspace(-1, 1, 1001, dtype=torch.float64))
    assert (w.diff() > 0).all()


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("fn", FUNCTIONS)
@given(a=scales, b=scales)
def test_slope_at_zero(fn, learnable, a, b):
    v = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(WeightCompander(a, b, learnable, fn)(v).sum(), v)
    assert slope.item() == pytest.approx(SLOPES[fn](a, b), rel=1e-12)


def test_arctan_approaches_a_half_pi():
    w = WeightCompander(0.2, 0.1)(torch.tensor([1e9, -1e9], dtype=torch.float64))
    torch.testing.assert_close(w, torch.tensor([0.1, -0.1], dtype=torch.float64) * math.pi)


@pytest.mark.parametrize("fn", FUNCTIONS)
@given(share=st.floats(-1.0, 1.0), a=scales, b=scales)
def test_right_inverse_inverts(fn, share, a, b):
    reach = {"arctan": 14.0, "tanh": 1.8, "softsign": 21.0, "mulaw": 100.0}[fn]
    v = torch.tensor([share * reach * b], dtype=torch.float64)
    psi = WeightCompander(a, b, fn=fn)
    torch.testing.assert_close(psi.right_inverse(psi(v)), v, rtol=1e-9, atol=1e-12)
    assert psi.clipped == 0


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_gradients_of_v_and_of_log_a_and_log_b(fn):
    psi = WeightCompander(0.3, 0.2, learnable=True, fn=fn)
    v = torch.tensor([-0.7, -0.1, 0.05, 0.4], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(psi, v)
    w = psi(v)
    for_v, for_a, for_b = torch.autograd.grad((g * w).sum(), (v, psi.log_a, psi.log_b))
    torch.testing.assert_close(for_a, (g * w).sum())
    if fn != "mulaw":  # there b is in the denominator too
        torch.testing.assert_close(for_b, -(v * for_v).sum())  # for_v = g psi'(v)
    if fn == "arctan":
        torch.testing.assert_close(for_v, g * 1.5 / (1 + (v / 0.2) ** 2))
    elif fn == "mulaw":
        again = lambda log_b: torch.func.functional_call(psi, {"log_b": log_b}, (v.detach(),))  # noqa: E731
        assert torch.autograd.gradcheck(again, psi.log_b.detach().clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_dtype_of_v_is_kept(fn, dtype):
    layer = nn.Linear(8, 4).to(dtype)
    w = layer.weight.detach().double().clone()
    compand(layer, fn=fn, learnable=True)
    expected = torch.tensor([FORMULAS[fn](x, 0.2, 0.1) for x in w.flatten().tolist()], dtype=torch.float64).view_as(w)
    assert layer.weight.dtype == v_of(layer).dtype == dtype
    assert layer.parametrizations.weight[0].log_a.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(layer.weight.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)
    layer.weight = layer.weight.detach() / 2
    assert v_of(layer).dtype == dtype


# ---- the two starts, and assignment


@pytest.mark.parametrize("by_hand", [False, True])
def test_plain_start_keeps_v_then_assignment_inverts(by_hand):
    layer = nn.Linear(6, 4)
    w = layer.weight.detach().clone()
    if by_hand:
        parametrize.register_parametrization(layer, "weight", WeightCompander(0.2, 0.1))
    else:
        compand(layer)
    torch.testing.assert_close(v_of(layer).detach(), w, rtol=0, atol=0)
    torch.testing.assert_close(layer.weight, 0.2 * torch.atan(w / 0.1))
    for new in (torch.full((4, 6), 0.25), torch.full((4, 6), -0.1)):
        layer.weight = new
        torch.testing.assert_close(layer.weight.detach(), new)


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_preserve_leaves_the_outputs(fn):
    model = train(net(), 2).eval()
    expected = model(images())
    assert compand(model, 0.5, 0.3, fn=fn, preserve=True) is model
    assert not torch.allclose(v_of(model[4]), model[4].weight)
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fn", FUNCTIONS[:3])
def test_clipped_weights_are_counted(fn):
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.fill_(0.01)
        layer.weight[0, :2] = torch.tensor([7.0, -7.0])
    with pytest.warns(UserWarning, match=r"^2 of 12 weights lie beyond"):
        compand(layer, fn=fn, preserve=True)
    reach = 0.2 * BOUNDS[fn] * 1.5 / (math.pi / 2)
    torch.testing.assert_close(layer.weight[0].detach(), torch.tensor([reach, -reach, 0.01, 0.01]))
    assert layer.parametrizations.weight[0].clipped == 2
    with pytest.warns(UserWarning, match=r"^12 of 12"):
        layer.weight = torch.ones(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.weight = torch.zeros(3, 4)
    assert layer.parametrizations.weight[0].clipped == 0
    assert (v_of(layer) == 0).all()


def test_arctan_clips_where_v_is_14_b():
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    with pytest.warns(UserWarning, match="1 of 1"):
        compand(layer, preserve=True)
    assert v_of(layer).item() == pytest.approx(0.1 * math.tan(1.5), rel=1e-5)


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_weights_of_exactly_zero_can_leave(fn):
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    compand(layer, fn=fn)
    layer(torch.ones(1, 3)).sum().backward()
    assert (v_of(layer).grad > 0).all()


# ---- training through it


def test_where_psi_is_the_identity_training_is_that_of_the_plain_model():
    plain, ours = train(net(), 10, wd=1e-3), train(compand(net(), 1e3, 1e3), 10, wd=1e-3)
    for name, p in fold(ours).state_dict().items():
        torch.testing.assert_close(p, plain.state_dict()[name], rtol=1e-5, atol=1e-7)


def test_a_step_moves_w_by_psi_slope_squared():
    layer = compand(nn.Linear(5, 4).double())
    w, v = layer.weight.detach().clone(), v_of(layer).detach().clone()
    slope = 2 / (1 + (v / 0.1) ** 2)
    x = torch.randn(3, 5, dtype=torch.float64)
    errors = []
    for lr in (1e-4, 1e-5):
        with torch.no_grad():
            v_of(layer).copy_(v)
        layer.zero_grad()
        layer(x).square().sum().backward()
        g = 2 * (x @ w.T + layer.bias.detach()).T @ x
        with torch.no_grad():
            v_of(layer).sub_(lr * v_of(layer).grad)
        errors.append((layer.weight.detach() - w + lr * slope**2 * g).abs().max())
    assert errors[1] < 0.02 * errors[0] < 1e-4  # second order: a tenth of the step, a hundredth of the error


def test_near_zero_weights_move_faster_and_large_ones_slower():
    for v, factor in ((1e-4, 4.0), (0.1 * math.sqrt(2 - 1), 1.0), (0.5, (2 / 26) ** 2)):
        layer = nn.Linear(1, 1, bias=False).double()
        with torch.no_grad():
            layer.weight.fill_(v)
        compand(layer)
        before = layer.weight.item()
        layer(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
        with torch.no_grad():
            v_of(layer).sub_(1e-8 * v_of(layer).grad)
        assert (before - layer.weight.item()) / 1e-8 == pytest.approx(factor, rel=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_learning_a_and_b(shared):
    model = compand(net(), 1.0, 1.0, learnable=True, shared=shared)
    logs = [(m.log_a, m.log_b) for m in model.modules() if isinstance(m, WeightCompander)]
    assert len(logs) == (1 if shared else 3)
    for i in (0, 4, 6):  # every layer has the plain start
        torch.testing.assert_close(v_of(model[i]), net()[i].weight, rtol=0, atol=0)
    train(model)
    assert all(a.item() != 0 and b.item() != 0 for a, b in logs)
    assert all(
        math.isclose(m.a.item(), math.exp(m.log_a.item()), rel_tol=1e-6)
        for m in model.modules()
        if isinstance(m, WeightCompander)
    )


def test_not_learnable_means_constants():
    model = compand(net())
    assert not any("log" in name for name, _ in model.named_parameters())
    train(model)
    assert all(m.log_a.item() == pytest.approx(math.log(0.2)) for m in model.modules() if isinstance(m, WeightCompander))


def test_param_groups():
    model = compand(net(), learnable=True)
    model[1].weight.requires_grad_(False)
    weights, logs = compand_param_groups(model, 0.3, 5e-4)
    assert (weights["lr"], weights["weight_decay"]) == (0.3, 5e-4)
    assert (logs["lr"], logs["weight_decay"]) == (pytest.approx(0.03), 0.0)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert {names[id(p)].rpartition(".")[2] for p in logs["params"]} == {"log_a", "log_b"}
    assert len(logs["params"]) == 6
    assert {id(p) for g in (weights, logs) for p in g["params"]} == set(names)
    assert compand_param_groups(model, 0.3, 5e-4, factor=0.5)[1]["lr"] == 0.15
    (only,) = compand_param_groups(compand(net()), 0.3)
    assert len(only["params"]) == 8
    assert only["weight_decay"] == 0.0


# ---- the model


def test_which_layers_are_companded():
    model = nn.ModuleDict(
        {
            "line": nn.Linear(2, 2), "one": nn.Conv1d(1, 1, 1), "two": nn.Conv2d(1, 1, 1), "three": nn.Conv3d(1, 1, 1),
            "up": nn.ConvTranspose1d(1, 1, 1), "up2": nn.ConvTranspose2d(1, 1, 1), "up3": nn.ConvTranspose3d(1, 1, 1),
            "norm": nn.BatchNorm2d(2), "layer": nn.LayerNorm(2), "table": nn.Embedding(2, 2), "lm_head": nn.Linear(2, 2),
        }
    )  # fmt: skip
    compand(model)
    got = {name for name, module in model.items() if parametrize.is_parametrized(module)}
    assert got == {"line", "one", "two", "three", "up", "up2", "up3"}
    assert all(not parametrize.is_parametrized(module, "bias") for module in model.values())


@pytest.mark.parametrize(
    "skip, left", [((), {"0", "4", "6"}), (("4",), {"0", "6"}), (("6", "0"), {"4"}), (("body",), set()), (("ody.4", "8"), {"0", "4", "6"})]
)  # fmt: skip
def test_skip(skip, left):
    model = nn.ModuleDict({"body": net(), "end": nn.Linear(1, 1)})
    compand(model, skip=skip)
    assert {n for n, m in model["body"].named_children() if parametrize.is_parametrized(m)} == left
    assert parametrize.is_parametrized(model["end"])


def test_modules_chooses_the_classes():
    model = compand(net(), modules=[nn.Conv2d])
    assert [parametrize.is_parametrized(m) for m in model] == [True] + 6 * [False]
    compand(model, modules=(nn.Linear,))
    assert [parametrize.is_parametrized(m) for m in model] == [True, False, False, False, True, False, True]


@pytest.mark.parametrize("preserve", [False, True])
def test_optimizers_made_before_go_on_and_frozen_weights_stay_frozen(preserve):
    model = net()
    model[6].weight.requires_grad_(False)
    flags = [p.requires_grad for p in (model[0].weight, model[4].weight, model[6].weight)]
    before = {id(p) for p in model.parameters()}
    compand(model, 0.5, 0.3, preserve=preserve)
    assert {id(p) for p in model.parameters()} == before
    assert [v_of(model[i]).requires_grad for i in (0, 4, 6)] == flags
    fold(model)
    assert {id(p) for p in model.parameters()} == before
    assert [model[i].weight.requires_grad for i in (0, 4, 6)] == flags


def test_mode_and_global_random_state_are_kept():
    model = net().eval()
    state = torch.get_rng_state()
    assert not any(m.training for m in compand(model).modules())
    assert not any(m.training for m in fold(model).modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_fold_leaves_the_outputs_and_ordinary_layers(fn, learnable):
    model = train(compand(net(), fn=fn, learnable=learnable)).eval()
    expected = model(images())
    assert fold(model) is model
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=1e-7)
    assert model.state_dict().keys() == net().state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]
    torch.save(model, io.BytesIO())
    compand(model, preserve=True)


def test_fold_takes_other_parametrisations_along():
    layer = parametrizations.weight_norm(nn.Linear(4, 3))
    parametrize.register_parametrization(layer, "weight", WeightCompander())
    expected = layer(torch.ones(1, 4))
    torch.testing.assert_close(fold(layer)(torch.ones(1, 4)), expected)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("learnable", [False, True])
def test_state_dict_holds_v_and_the_scales(learnable, tmp_path):
    model = train(compand(net(), 0.3, 0.2, learnable)).eval()
    state = model.state_dict()
    assert torch.equal(state["4.parametrizations.weight.original"], v_of(model[4]))
    assert {k.rpartition(".")[2] for k in state if "weight.0" in k} == {"log_a", "log_b"}
    torch.save(state, tmp_path / "state.pt")
    other = compand(net(1), learnable=learnable).eval()  # other scales: those of the state win
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(images()), model(images()))


def test_copies_are_equal_and_independent():
    model = train(compand(net(), learnable=True)).eval()
    expected = model(images())
    other = copy.deepcopy(model)
    assert torch.equal(other(images()), expected)
    fold(train(other))
    assert torch.equal(model.eval()(images()), expected)


def test_order_of_parameters_is_the_same_in_every_process():
    names = [
        [name for name, _ in m.named_parameters()] for m in (compand(net(), learnable=True), compand(net(1), learnable=True))
    ]
    assert names[0] == names[1] == [name for name, _ in copy.deepcopy(compand(net(), learnable=True)).named_parameters()]


def test_autocast():
    model = compand(net()).eval()
    expected = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images())
        assert model[4].weight.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.02)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        pytest.skip(f"torch.compile has no backend {backend}")
    model = compand(net(), learnable=True)
    grads = []
    for call in (model, torch.compile(model, backend=backend, fullgraph=True)):
        model.zero_grad()
        call(images()).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_meta_device():
    model = compand(net().to("meta"), preserve=True)
    assert model(images().to("meta")).shape == (6, 3)
    assert "meta" not in repr(model[4].parametrizations.weight[0])
    model.load_state_dict(compand(net(), 0.3, 0.3).state_dict(), assign=True)
    assert torch.equal(model(images()), compand(net(), 0.3, 0.3)(images()))


# ---- ties


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("preserve", [False, True])
def test_a_tied_weight_is_companded_once_and_stays_tied(preserve, learnable):
    model, tokens = Tied(), torch.arange(7)
    w, expected = model.embedding.weight.detach().clone(), model(tokens)
    compand(model, 0.4, 0.3, learnable, preserve=preserve)
    assert len([p for p in model.parameters() if p.shape == (7, 5)]) == 1
    assert sum(isinstance(m, WeightCompander) for m in model.modules()) == 2
    assert torch.equal(model.embedding.weight, model.out.weight)
    if preserve:
        torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-6)
    else:
        torch.testing.assert_close(model.out.weight, 0.4 * torch.atan(w / 0.3))
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(compand_param_groups(model, 0.1))
    F.cross_entropy(model(tokens), tokens).backward()
    optimizer.step()
    assert torch.equal(model.embedding.weight, model.out.weight)
    assert not torch.equal(model.embedding.weight, other.embedding.weight)
    assert other.embedding.parametrizations.weight is other.out.parametrizations.weight
    other.load_state_dict(model.state_dict())
    outputs = model(tokens)
    assert torch.equal(other(tokens), outputs)
    model.out.weight = 2 * model.out.weight.detach()
    assert torch.equal(model.embedding.weight, model.out.weight)
    fold(other)
    assert other.out.weight is other.embedding.weight
    assert isinstance(other.out.weight, nn.Parameter)
    torch.testing.assert_close(other(tokens), outputs, rtol=0, atol=1e-7)


def test_gradient_of_a_tied_weight_comes_from_both_ends():
    model, tokens = compand(Tied()), torch.arange(3)
    v = v_of(model.out)
    w = (0.2 * torch.atan(v / 0.1)).detach().requires_grad_()
    F.linear(model.between(F.embedding(tokens, w)), w).square().sum().backward()
    model(tokens).square().sum().backward()
    torch.testing.assert_close(v.grad, w.grad * 2 / (1 + (v.detach() / 0.1) ** 2))


def test_a_tied_weight_with_a_skipped_owner_is_left_alone():
    model = Tied("lm_head")
    compand(model, modules=(nn.Embedding, nn.Linear))
    assert model.lm_head.weight is model.embedding.weight
    assert isinstance(model.lm_head.weight, nn.Parameter)
    assert parametrize.is_parametrized(model.between)
    compand(model, modules=(nn.Embedding,), skip=())
    assert parametrize.is_parametrized(model.lm_head)
    assert torch.equal(model.lm_head.weight, model.embedding.weight)


def test_three_layers_may_share_one_weight():
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    model[1].weight = model[2].weight = model[0].weight
    expected = compand(model, 1.0, preserve=True)(torch.ones(1, 3))
    fold(model)
    assert model[0].weight is model[1].weight is model[2].weight
    torch.testing.assert_close(model(torch.ones(1, 3)), expected)


# ---- errors


@pytest.mark.parametrize("make", [WeightCompander, partial(compand, nn.Linear(2, 2))], ids=["module", "compand"])
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("value", [0.0, -0.1, math.inf, math.nan])
def test_scales_must_be_positive(make, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be > 0"):
        make(**{name: value})


def test_unknown_function_is_refused():
    with pytest.raises(ValueError, match=r"unknown fn 'atan': did you mean 'arctan'.*accepted: arctan, mulaw, softsign, tanh"):
        WeightCompander(fn="atan")


@pytest.mark.parametrize("arguments", [{"lr": 0.0}, {"lr": 0.1, "wd": -1.0}, {"lr": 0.1, "factor": 0.0}], ids=str)
def test_rates_out_of_range(arguments):
    with pytest.raises(ValueError, match=f"^{list(arguments)[-1]} must be"):
        compand_param_groups(net(), **arguments)


def test_nothing_to_compand_says_what_there_is():
    with pytest.raises(ValueError, match=r"looked for Linear, .*BatchNorm1d, ReLU, Sequential"):
        compand(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))
    with pytest.raises(ValueError, match=r"skip=\('0',\)"):
        compand(nn.Sequential(nn.Linear(2, 2)), skip=["0"])


def test_nothing_to_fold():
    with pytest.raises(ValueError, match="no WeightCompander in Sequential"):
        fold(net())


@pytest.mark.parametrize(
    "spoil, message",
    [
        (compand, "is companded already: fold the model first"),
        (parametrizations.weight_norm, "is parametrised by _WeightNorm"),
        (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "is not a parameter"),
    ],
)
def test_weights_that_are_no_parameters_are_refused_and_nothing_is_changed(spoil, message):
    model = net()
    spoil(model[6])
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(RuntimeError, match=f"layer '6' {message}"):
        compand(model)
    assert [name for name, _ in model.named_parameters()] == before
    compand(model, skip=["6"])


def test_lazy_layers_need_a_batch_first():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(RuntimeError, match="layer '1' has no shape yet"):
        compand(model)
    model(torch.ones(1, 2))
    compand(model)


def test_what_a_compander_says_of_itself():
    assert repr(WeightCompander()) == "WeightCompander(a=0.2, b=0.1, learnable=False, fn='arctan', preserve=False)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repr(WeightCompander(1, 0.5, True, "tanh", True)) == (
            "WeightCompander(a=1, b=0.5, learnable=True, fn='tanh', preserve=True)"
        )
