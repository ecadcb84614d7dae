"""What every loss and every objective of a teacher and a student keeps to. A new one gets a row."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from weightroom import distill
from weightroom.distill.base import DistillationLoss, TeacherObjective

N, D, K = 6, 8, 5

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "BinaryKLLoss": distill.BinaryKLLoss,
    "BinaryKLNormLoss": distill.BinaryKLNormLoss,
    "DKDLoss": distill.DKDLoss,
    "SoftmaxKDLoss": distill.SoftmaxKDLoss,
    "SoftmaxKDLoss, standardized": lambda **kw: distill.SoftmaxKDLoss(standardize=True, **kw),
}


class Student(nn.Module):
    def __init__(self, width: int, n_classes: int = K) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, width), nn.BatchNorm1d(width), nn.ReLU())
        self.fc = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


def _kd(loss: str) -> Callable[[nn.Module], nn.Module]:
    return lambda teacher: distill.KDObjective(teacher, LOSSES[loss](), ce=0.5, kd=2.0)


OBJECTIVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    **{f"KDObjective, {loss}": _kd(loss) for loss in LOSSES},
    "KDObjective, teacher alone": lambda teacher: distill.KDObjective(teacher, distill.SoftmaxKDLoss(), ce=0.0),
    "DHKDObjective": distill.DHKDObjective,
    "DHKDObjective, aligned": lambda teacher: distill.DHKDObjective(teacher, align=True),
    "DHKDObjective, aligned where shared": lambda teacher: distill.DHKDObjective(teacher, align=True, scope="shared"),
}

losses = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in LOSSES.items()])
objectives = pytest.mark.parametrize("name", OBJECTIVES)


def test_every_public_loss_and_objective_has_a_row():
    public = {name for name in distill.__all__ if isinstance(getattr(distill, name), type)}
    of = lambda base: {name for name in public if issubclass(getattr(distill, name), base)}  # noqa: E731
    assert of(DistillationLoss) == {name.partition(",")[0] for name in LOSSES}
    assert of(TeacherObjective) == {name.partition(",")[0] for name in OBJECTIVES}


def draw(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(N, K, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.arange(N) % K


def call(loss: nn.Module, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return loss(student, teacher, labels) if loss.needs_target else loss(student, teacher)


def slope(loss: nn.Module, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    leaf = student.detach().clone().requires_grad_()
    return torch.autograd.grad(call(loss, leaf, teacher, labels).sum(), leaf)[0]


# ---- losses of logits ----


@losses
def test_reductions_agree(make):
    s, t, y = draw()
    each = call(make(reduction="none"), s, t, y)
    assert each.shape == (N,)
    assert (each >= 0).all()
    torch.testing.assert_close(call(make(), s, t, y), each.mean())
    torch.testing.assert_close(call(make(reduction="sum"), s, t, y), each.sum())
    torch.testing.assert_close(call(make(reduction="none"), s[2:3], t[2:3], y[2:3]), each[2:3])


@losses
def test_is_least_at_the_teacher(make):
    _, t, y = draw()
    assert call(make(), t, t, y).abs() < 1e-12
    assert slope(make(), t, t, y).abs().max() < 1e-12


@losses
def test_gradients_are_right(make):
    s, t, y = draw()
    leaf = s.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: call(make(), s, t, y), leaf)
    assert torch.autograd.gradgradcheck(lambda s: call(make(), s, t, y), leaf)


@losses
def test_no_gradient_reaches_the_teachers_logits(make):
    s, t, y = draw()
    s, t = s.requires_grad_(), t.requires_grad_()
    before = s.detach().clone(), t.detach().clone()
    call(make(), s, t, y).backward()
    assert t.grad is None
    assert s.grad is not None
    assert torch.equal(s, before[0])
    assert torch.equal(t, before[1])


@losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(make, dtype):
    s, t, y = draw(dtype)
    value = call(make(), s, t, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, call(make(), s.float(), t.float(), y))
    assert slope(make(), s, t, y).dtype == dtype


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_is_the_students(make, dtype):
    s, t, y = draw()
    assert call(make(), s.to(dtype), t, y).dtype == dtype
    assert call(make(), s.to(dtype), t.half(), y).dtype == dtype


@losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_huge_logits_stay_finite_under_autocast(make, dtype):
    signs = torch.tensor([[1, -1, -1, -1, -1], [-1, 1, 1, 1, 1], [1] * K, [-1] * K, [0] * K, [1, 0, 0, 0, -1]])
    _, _, y = draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for size in (1.0, 100.0, 1e4):
            s = (size * signs).to(dtype)
            for t in (s, -s, s.flip(0), torch.zeros_like(s)):
                assert call(make(reduction="none"), s, t, y).isfinite().all()
                assert slope(make(), s, t, y).isfinite().all()


@losses
def test_survives_copying_and_saving(make):
    s, t, y = draw()
    loss = make(T=3.0, reduction="sum")
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(twin) == repr(loss)
        assert torch.equal(call(twin, s, t, y), call(loss, s, t, y))
    assert "T=3.0" in repr(loss)
    assert "reduction='sum'" in repr(loss)


@losses
def test_runs_without_data_on_the_meta_device(make):
    s, t, y = (tensor.to("meta") for tensor in draw(torch.float32))
    assert call(make(reduction="none"), s, t, y).shape == (N,)


@losses
def test_wrong_arguments_are_named(make):
    s, t, y = draw()
    with pytest.raises(ValueError, match=r"the student has K = 5, the teacher K = 4"):
        call(make(), s, t[:, :4], y)
    with pytest.raises(ValueError, match=r"the student has N = 6, the teacher N = 1"):
        call(make(), s, t[:1], y)
    with pytest.raises(ValueError, match=r"student must have shape \(N, K\), got \(5,\)"):
        call(make(), s[0], t, y)
    with pytest.raises(ValueError, match=r"teacher must have shape \(N, K\), got \(6, 5, 1\)"):
        call(make(), s, t[..., None], y)
    with pytest.raises(TypeError, match=r"student must be a floating tensor of logits, got torch.int64"):
        call(make(), s.long(), t, y)
    with pytest.raises(TypeError, match="teacher must be a floating tensor of logits, got list"):
        call(make(), s, t.tolist(), y)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="T must be > 0"):
            make(T=wrong)
    with pytest.raises(TypeError, match="T must be a real number, got str"):
        make(T="2")
    with pytest.raises(ValueError, match=r"unknown reduction 'mean': .*accepted: batchmean, none, sum"):
        make(reduction="mean")


# ---- objectives of models ----


def play(name: str, dtype: torch.dtype = torch.float64, n_classes: int = K):
    """An objective, a student that suits it, and a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher, student = Student(16, n_classes).to(dtype), Student(4).to(dtype)
        x, y = torch.randn(N, D, dtype=dtype), torch.arange(N) % K
        if name.startswith("DHKD"):
            student = distill.DualHead(student)
    return OBJECTIVES[name](teacher), student, x, y


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


@objectives
@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_is_left_untouched(name, training):
    objective, student, x, y = play(name)
    teacher = objective.teacher.train(training)
    teacher.fc.requires_grad_(False)
    teacher.body[1].eval()
    modes = [module.training for module in teacher.modules()]
    state = copy.deepcopy(teacher.state_dict())
    seen = []
    hook = teacher.register_forward_pre_hook(lambda module, _: seen.append((module.body.training, torch.is_grad_enabled())))
    objective(student, x, y).backward()
    hook.remove()
    assert seen == [(False, False)]
    assert all(torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), state.values(), strict=True))
    assert [module.training for module in teacher.modules()] == modes
    assert [p.requires_grad for p in teacher.parameters()] == [True] * 4 + [False] * 2
    assert gradients(teacher) == [None] * 6
    assert all(g is not None for g in gradients(student))


@objectives
def test_modes_come_back_when_the_teacher_fails(name):
    objective, student, x, y = play(name)

    def fail(*_):
        raise KeyboardInterrupt

    objective.teacher.body.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        objective(student, x, y)
    assert all(module.training for module in objective.teacher.modules())


@objectives
def test_loss_is_the_sum_of_its_terms(name):
    objective, student, x, y = play(name)
    loss = objective(student, x, y)
    assert loss.shape == ()
    labels, teacher = objective.terms(student, x, y)
    torch.testing.assert_close(loss, labels + teacher)
    assert teacher > 0


@objectives
def test_is_the_same_twice(name):
    runs = []
    for _ in range(2):
        objective, student, x, y = play(name, torch.float32)
        state = torch.get_rng_state()
        loss = objective(student, x, y)
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        runs.append((loss.detach(), gradients(student)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@objectives
def test_objectives_survive_copying_and_saving(name):
    objective, student, x, y = play(name)
    wanted = objective(student, x, y)
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert repr(twin) == repr(objective)
        assert torch.equal(twin(student, x, y), wanted)


@objectives
def test_models_that_differ_in_classes_are_named(name):
    objective, student, x, y = play(name, n_classes=7)
    with pytest.raises(ValueError, match=r"the student has K = 5, the teacher K = 7"):
        objective(student, x, y)
    assert all(module.training for module in objective.teacher.modules())


@objectives
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_autocast_stays_finite(name, size):
    objective, student, x, y = play(name, torch.float32)
    with torch.no_grad():
        for model in (student, objective.teacher):
            for head in (m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == K):
                head.weight.mul_(size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(student, x, y)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(student))


@objectives
def test_evaluates_without_gradients(name):
    objective, student, x, y = play(name)
    wanted = objective(student, x, y)
    with torch.no_grad():
        loss = objective(student, x, y)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, wanted)


@objectives
def test_a_teacher_is_a_module(name):
    with pytest.raises(TypeError, match=r"teacher must be an nn.Module, got function"):
        OBJECTIVES[name](lambda x: x)


# ---- distillation on one head ----


def test_weights_are_those_of_the_two_losses():
    objective, student, x, y = play("KDObjective, SoftmaxKDLoss")
    labels, teacher = objective.terms(student, x, y)
    logits = student(x)
    torch.testing.assert_close(labels, 0.5 * nn.functional.cross_entropy(logits, y))
    torch.testing.assert_close(teacher, 2.0 * distill.SoftmaxKDLoss()(logits, objective.teacher.eval()(x)))


def test_without_ce_the_labels_are_not_looked_at_and_without_kd_the_teacher_is_not_asked():
    _, student, x, y = play("KDObjective, SoftmaxKDLoss")

    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the teacher was asked")

    alone = distill.KDObjective(Student(16).double(), distill.BinaryKLLoss(), ce=0.0)
    assert alone(student, x, None).isfinite()
    plain = distill.KDObjective(Silent(), distill.BinaryKLLoss(), kd=0.0)
    torch.testing.assert_close(plain(student, x, y), nn.functional.cross_entropy(student(x), y))
    shares = torch.full((N, K), 1 / K, dtype=torch.float64)
    torch.testing.assert_close(plain(student, x, shares), nn.functional.cross_entropy(student(x), shares))


def test_any_function_of_two_logits_will_do():
    _, student, x, y = play("KDObjective, SoftmaxKDLoss")
    objective = distill.KDObjective(Student(16).double(), nn.functional.mse_loss, ce=0.0)
    torch.testing.assert_close(objective(student, x, y), nn.functional.mse_loss(student(x), objective.ask(x)))


def test_wrong_arguments_of_kd_are_named():
    teacher, loss = Student(16), distill.SoftmaxKDLoss()
    with pytest.raises(ValueError, match="ce must be >= 0"):
        distill.KDObjective(teacher, loss, ce=-0.1)
    with pytest.raises(ValueError, match="kd must be >= 0"):
        distill.KDObjective(teacher, loss, kd=-0.1)
    with pytest.raises(TypeError, match="kd must be a real number"):
        distill.KDObjective(teacher, loss, kd="1")
    with pytest.raises(TypeError, match="loss must be callable as"):
        distill.KDObjective(teacher, None)
    objective = distill.KDObjective(teacher.double(), loss)
    _, dual, x, y = play("DHKDObjective")
    with pytest.raises(TypeError, match="the model's output must be a floating tensor of logits, got DualOutput"):
        objective(dual, x, y)
