"""Dual heads: who gets which gradient, what is left of them, and how two gradients are aligned."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weightroom import train
from weightroom.distill import BinaryKLLoss, BinaryKLNormLoss, DHKDObjective, DualHead, DualOutput
from weightroom.distill.dual_head import _aligned

N, D, W, K = 12, 8, 6, 5


class Student(nn.Module):
    def __init__(self, width: int = W) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, width), nn.BatchNorm1d(width), nn.ReLU())
        self.fc = nn.Linear(width, K)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * self.fc(self.body(x))


class Squeeze(nn.Module):
    """Its classifier is a 1x1 convolution, before the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, W, 3), nn.BatchNorm2d(W), nn.ReLU())
        self.classifier = nn.Sequential(nn.Conv2d(W, K, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x)).mean((2, 3))


def seeded(make, seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator, dtype=torch.float64), torch.arange(N) % K


def play(aux="linear", seed: int = 0, **options) -> tuple[DHKDObjective, DualHead]:
    def make():
        teacher = Student(16).double().requires_grad_(True)
        with torch.no_grad():
            teacher.fc.weight.mul_(6)
        return DHKDObjective(teacher, **options), DualHead(Student().double(), aux=aux)

    return seeded(make, seed)


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def both_gradients(objective: DHKDObjective, model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Tensor | None]]:
    names, params = zip(*model.named_parameters(), strict=True)
    return [
        dict(zip(names, torch.autograd.grad(term, params, retain_graph=True, allow_unused=True), strict=True))
        for term in objective.terms(model, x, y)
    ]


def inner(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> float:
    return float(sum((a[k] * b[k]).sum() for k in a if a[k] is not None and b[k] is not None))


# ---- the module ----


def test_training_gives_both_heads_and_evaluation_the_students_alone():
    x, _ = batch()
    model = seeded(lambda: DualHead(Student().double()))
    output = model(x)
    assert isinstance(output, DualOutput)
    assert output.logits.shape == output.aux_logits.shape == (N, K)
    features = model.student.body(x)
    torch.testing.assert_close(output.logits, model.student.fc(features))
    torch.testing.assert_close(output.aux_logits, model.aux(features))
    model.eval()
    assert isinstance(model(x), Tensor)
    assert torch.equal(model(x), model.export()(x))


def test_export_is_the_student_and_nothing_of_the_second_head_stays():
    student = Student()
    state, model = copy.deepcopy(student.state_dict()), DualHead(student)
    model(torch.randn(N, D))
    plain = model.export()
    assert plain is student
    assert plain.state_dict().keys() == state.keys()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in plain.modules())
    assert torch.equal(plain.fc.weight, state["fc.weight"])


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_the_students(training):
    student = Student().train(training)
    student.body[1].eval()
    model = DualHead(student, aux="nonlinear")
    assert model.training == model.aux.training == student.training == training
    assert not student.body[1].training


def test_keyword_arguments_reach_the_student():
    x, _ = batch()
    model = seeded(lambda: DualHead(Student().double()))
    torch.testing.assert_close(model(x, scale=2.0).logits, 2 * model(x).logits)
    torch.testing.assert_close(model(x, scale=2.0).aux_logits, model(x).aux_logits)


def test_head_may_be_a_convolution_of_size_one():
    x = torch.randn(4, 3, 6, 6)
    model = DualHead(Squeeze(), head="classifier.0")
    assert model(x).aux_logits.shape == (4, K)
    model.aux.load_state_dict({k: v.flatten(1) if v.ndim > 1 else v for k, v in model.student.classifier[0].state_dict().items()})
    output = model(x)
    torch.testing.assert_close(output.aux_logits, output.logits)  # the mean of a linear map is the map of the mean
    assert DualHead(Squeeze(), head="classifier.0", aux="nonlinear")(x).aux_logits.shape == (4, K)


def test_a_linear_head_on_tokens_has_an_auxiliary_head_on_tokens():
    tokens = torch.randn(2, W, W)  # as many tokens as features: nothing may be mixed up
    model = DualHead(nn.Linear(W, K), head=None)
    torch.testing.assert_close(model(tokens).aux_logits, model.aux(tokens))


def test_auxiliary_heads():
    linear = DualHead(Student()).aux
    assert (linear.in_features, linear.out_features) == (W, K)
    kinds = [type(layer) for layer in DualHead(Student(), aux="nonlinear").aux]
    assert kinds == [nn.Linear, nn.Dropout, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    nonlinear = DualHead(Student(), aux="nonlinear", hidden=11).aux
    assert (nonlinear[0].out_features, nonlinear[1].p, nonlinear[4].out_features) == (11, 0.1, K)
    assert DualHead(Student(), aux="nonlinear").aux[0].out_features == 200
    own = nn.Linear(W, K, bias=False)
    assert DualHead(Student(), aux=own).aux is own
    assert DualHead(Student().double(), aux="nonlinear").aux[0].weight.dtype == torch.float64
    assert DualHead(Student().to("meta")).aux.weight.is_meta


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("aux", ["linear", "nonlinear"])
def test_survives_copying_and_saving(aux, training):
    x, _ = batch()
    model = seeded(lambda: DualHead(Student().double(), aux=aux)).train(training)
    model(x)
    fresh = seeded(lambda: DualHead(Student().double(), aux=aux), seed=1).train(training)
    fresh.load_state_dict(model.state_dict())
    assert {name.partition(".")[0] for name in model.state_dict()} == {"student", "aux"}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        if training and aux == "nonlinear":
            twin.aux[1].eval(), model.aux[1].eval()  # no dropout
        copied, wanted = twin(x), model(x)
        for a, b in zip(copied, wanted, strict=True) if training else [(copied, wanted)]:
            assert torch.equal(a, b)
        assert twin.student is not model.student


def test_head_none_is_the_last_linear_layer():
    net = nn.Sequential(nn.Linear(D, W), nn.ReLU(), nn.Linear(W, K))
    assert DualHead(net, head=None).head == "2"
    alone = DualHead(nn.Linear(D, K), head=None)
    assert alone.head == ""
    x, _ = batch()
    torch.testing.assert_close(alone(x.float()).aux_logits, alone.aux(x.float()))


def test_head_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"head 'head' is no submodule of Student; its linear layers: 'body.0', 'fc'"):
        DualHead(Student(), head="head")
    with pytest.raises(ValueError, match=r"head 'body.1' must be a Linear or a 1x1 convolution, got BatchNorm1d; .* 'fc'"):
        DualHead(Student(), head="body.1")
    with pytest.raises(ValueError, match=r"head 'body.0' must be .* got Conv2d; its linear layers: none"):
        DualHead(Squeeze(), head="body.0")
    with pytest.raises(ValueError, match="has no linear layer: say which 1x1 convolution"):
        DualHead(Squeeze(), head=None)
    with pytest.raises(ValueError, match=r"unknown aux 'mlp': .*accepted: linear, nonlinear"):
        DualHead(Student(), aux="mlp")
    with pytest.raises(ValueError, match="hidden must be >= 1"):
        DualHead(Student(), aux="nonlinear", hidden=0)
    with pytest.raises(TypeError, match=r"student must be an nn.Module, got function"):
        DualHead(lambda x: x)


def test_head_must_run_once():
    class Skips(Student):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    class Twice(Student):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(-x)

    for student, times in ((Skips(), 0), (Twice(), 2)):
        model = DualHead(student)
        with pytest.raises(ValueError, match=f"head 'fc' must run once in a forward pass, it ran {times} times"):
            model(torch.randn(N, D))
        assert not student.fc._forward_pre_hooks
        model.eval()(torch.randn(N, D))


def test_the_hook_goes_when_the_student_fails():
    model = DualHead(Student())
    with pytest.raises(RuntimeError):
        model(torch.randn(N, D + 1))
    assert not model.student.fc._forward_pre_hooks


# ---- the objective ----


@pytest.mark.parametrize("aux", ["linear", "nonlinear"])
def test_loss_is_its_definition(aux):
    x, y = batch()
    objective, model = play(aux, alpha=0.3, gamma=0.7, T=3.0)
    if aux == "nonlinear":
        model.aux[1].eval()
    output, wanted_by = model(x), objective.teacher.eval()(x)
    wanted = 0.7 * F.cross_entropy(output.logits, y) + 0.3 * BinaryKLNormLoss(3.0)(output.aux_logits, wanted_by)
    torch.testing.assert_close(objective(model, x, y), wanted)


def test_defaults():
    objective = DHKDObjective(Student())
    assert (objective.alpha, objective.gamma, objective.loss.T, objective.align, objective.scope) == (1.0, 1.0, 2.0, False, "all")
    assert isinstance(objective.loss, BinaryKLNormLoss)
    assert isinstance(DHKDObjective(Student(), loss=BinaryKLLoss()).loss, BinaryKLLoss)


def test_each_head_gets_its_own_loss_and_the_backbone_both():
    x, y = batch()
    objective, model = play(alpha=0.3, gamma=0.7)
    objective(model, x, y).backward()
    output, t = model(x), objective.ask(x)
    ce, kd = 0.7 * F.cross_entropy(output.logits, y), 0.3 * BinaryKLNormLoss()(output.aux_logits, t)
    torch.testing.assert_close(
        model.student.fc.weight.grad, torch.autograd.grad(ce, model.student.fc.weight, retain_graph=True)[0]
    )
    torch.testing.assert_close(model.aux.weight.grad, torch.autograd.grad(kd, model.aux.weight, retain_graph=True)[0])
    assert torch.autograd.grad(ce, model.aux.weight, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(kd, model.student.fc.weight, retain_graph=True, allow_unused=True) == (None,)
    first = model.student.body[0].weight
    torch.testing.assert_close(first.grad, torch.autograd.grad(ce + kd, first)[0])


def test_backward_fills_gradients_and_adds_to_them():
    x, y = batch()
    for align in (False, True):
        objective, model = play(align=align)
        loss = objective.backward(model, x, y)
        assert not loss.requires_grad
        first = grads(model)
        assert torch.equal(loss, objective(model, x, y))
        objective.backward(model, x, y)
        for name, gradient in grads(model).items():
            torch.testing.assert_close(gradient, 2 * first[name])


def test_auxiliary_loss_can_be_stopped():
    x, y = batch()
    objective, model = play(early_stop_epoch=3)
    plain = F.cross_entropy(model(x).logits, y)
    assert objective(model, x, y) > plain
    objective.set_epoch(2)
    assert objective(model, x, y) > plain
    objective.set_epoch(3)
    objective.teacher.forward = None  # it is not asked any more
    for align in (False, True):
        objective.align = align
        model.zero_grad()
        loss = objective.backward(model, x, y)
        torch.testing.assert_close(loss, plain.detach())
        assert model.aux.weight.grad is None
        assert model.student.fc.weight.grad is not None
    nothing = DHKDObjective(objective.teacher, alpha=0.0)
    torch.testing.assert_close(nothing(model, x, y), plain)


def test_model_without_a_second_head_is_told_so():
    x, y = batch()
    objective, model = play()
    for wrong in (model.export(), model.eval()):
        with pytest.raises(ValueError, match=r"must return a DualOutput, got torch.float64: wrap the student in DualHead"):
            objective(wrong, x, y)


def test_wrong_arguments_are_named():
    teacher = Student()
    for name in ("alpha", "gamma"):
        with pytest.raises(ValueError, match=f"{name} must be >= 0"):
            DHKDObjective(teacher, **{name: -0.1})
        with pytest.raises(TypeError, match=f"{name} must be a real number"):
            DHKDObjective(teacher, **{name: "1"})
    for T in (0.0, -2.0):
        with pytest.raises(ValueError, match="T must be > 0"):
            DHKDObjective(teacher, T=T)
    with pytest.raises(ValueError, match=r"unknown scope 'backbone': .*accepted: all, shared"):
        DHKDObjective(teacher, scope="backbone")
    with pytest.raises(ValueError, match="early_stop_epoch must be >= 0"):
        DHKDObjective(teacher, early_stop_epoch=-1)


# ---- aligned gradients ----


def aligned_by_definition(g1: dict, g2: dict, scope: str) -> dict[str, Tensor | None]:
    zero = lambda g, other: torch.zeros_like(other) if g is None else g  # noqa: E731
    keys = [k for k in g1 if g1[k] is not None and g2[k] is not None] if scope == "shared" else [
        k for k in g1 if g1[k] is not None or g2[k] is not None
    ]  # fmt: skip
    flat1 = torch.cat([zero(g1[k], g2[k]).flatten() for k in keys])
    flat2 = torch.cat([zero(g2[k], g1[k]).flatten() for k in keys])
    dot = flat1 @ flat2
    factor = dot / (flat1 @ flat1) if dot < 0 else 0.0
    total = {}
    for k in g1:
        if g1[k] is None and g2[k] is None:
            total[k] = None
            continue
        a, b = zero(g1[k], g2[k]), zero(g2[k], g1[k])
        total[k] = a + (b - factor * a if k in keys else b)
    return total


def conflict(objective: DHKDObjective, model: DualHead, want: bool) -> tuple[Tensor, Tensor]:
    """A batch whose gradients conflict, or do not."""
    for seed in range(200):
        x, _ = batch(seed)
        y = torch.randint(K, (N,), generator=torch.Generator().manual_seed(seed))
        if (inner(*both_gradients(objective, model, x, y)) < 0) == want:
            return x, y
    raise AssertionError("no such batch")


@pytest.mark.parametrize("scope", ["all", "shared"])
@pytest.mark.parametrize("conflicts", [True, False])
def test_alignment_is_its_definition(scope, conflicts):
    objective, model = play(align=True, scope=scope, alpha=0.3)
    x, y = conflict(objective, model, conflicts)
    g1, g2 = both_gradients(objective, model, x, y)
    value = objective.backward(model, x, y)
    torch.testing.assert_close(value, sum(objective.terms(model, x, y)).detach())
    total = grads(model)
    for name, wanted in aligned_by_definition(g1, g2, scope).items():
        torch.testing.assert_close(total[name], wanted)
    new_g2 = {k: total[k] if g1[k] is None else total[k] - g1[k] for k in total}
    if not conflicts:
        for k in total:
            torch.testing.assert_close(total[k], sum(g for g in (g1[k], g2[k]) if g is not None))
    elif scope == "all":
        assert abs(inner(new_g2, g1)) < 1e-12 * max(1.0, inner(g1, g1))
    else:
        both = {k: g for k, g in g1.items() if g2[k] is not None}
        assert abs(inner(both, new_g2)) < 1e-12 * max(1.0, inner(both, both))


def test_alignment_over_all_parameters_enlarges_the_heads_gradient_and_over_the_shared_ones_does_not():
    objective, model = play(align=True)
    x, y = conflict(objective, model, True)
    g1, g2 = both_gradients(objective, model, x, y)
    factor = 1 - inner(g1, g2) / inner(g1, g1)
    assert factor > 1
    for scope, wanted in (("all", factor), ("shared", 1.0)):
        objective.scope = scope
        model.zero_grad()
        objective.backward(model, x, y)
        torch.testing.assert_close(model.student.fc.weight.grad, wanted * g1["student.fc.weight"])
        torch.testing.assert_close(model.aux.weight.grad, g2["aux.weight"])


def test_nothing_shared_nothing_zero_nothing_missing():
    a, b = torch.ones(2), torch.full((2,), -3.0)
    assert [g.tolist() if g is not None else None for g in _aligned([a, None, None], [None, b, None], "all")] == [
        [1.0, 1.0], [-3.0, -3.0], None,
    ]  # fmt: skip
    assert torch.equal(_aligned([torch.zeros(2)], [b], "all")[0], b)
    assert torch.equal(_aligned([a], [b], "all")[0], a)  # all of b opposes a


@settings(max_examples=30, deadline=None, derandomize=True)
@given(scale=st.floats(1e-3, 1e3))
def test_scaling_the_loss_scales_the_aligned_gradients(scale):
    objective, model = play(align=True)
    x, y = conflict(objective, model, True)
    objective.backward(model, x, y)
    once = grads(model)
    model.zero_grad()
    (scale * objective(model, x, y)).backward()
    for name, gradient in grads(model).items():
        torch.testing.assert_close(gradient, scale * once[name])


def test_frozen_parts_stay_frozen():
    objective, model = play(align=True)
    model.student.body.requires_grad_(False)
    x, y = batch()
    objective.backward(model, x, y)
    assert [name for name, g in grads(model).items() if g is not None] == [
        "student.fc.weight", "student.fc.bias", "aux.weight", "aux.bias",
    ]  # fmt: skip


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_training_loop_takes_aligned_gradients(precision):
    x, y = batch()
    data = TensorDataset(x.float(), y)

    def run(step_of, **more) -> tuple[dict[str, Tensor], train.Fit]:
        objective, model = play(align=True)
        objective, model = objective.float(), model.float()
        done = train.fit(
            model, data, step=step_of(objective), optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
            epochs=5, batch_size=4, **more,
        )  # fmt: skip
        return model.state_dict(), done

    state, done = run(lambda objective: lambda model, batch: objective(model, *batch), precision=precision)
    assert done.losses[-1] < done.losses[0]
    if precision == "32-true":
        again, _ = run(lambda objective: lambda model, batch: objective.backward(model, *batch))
        assert all(torch.equal(state[k], again[k]) for k in state)
