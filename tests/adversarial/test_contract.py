"""What every public adversarial objective keeps to; a new one gets a row in ``MEMBERS``."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from weightroom import adversarial, train
from weightroom.adversarial import AdversarialObjective

MEMBERS: dict[str, Callable[..., AdversarialObjective]] = {
    "DONE": adversarial.DONE,
    "DONE, implicit": lambda **kw: adversarial.DONE(hypergradient="implicit", **kw),
    "PGDAT": adversarial.PGDAT,
    "SmoothAdversarialCompSum": adversarial.SmoothAdversarialCompSum,
    "SmoothAdversarialCompSum, tau=1.5": lambda **kw: adversarial.SmoothAdversarialCompSum(1.5, 0.5, 0.5, **kw),
    "TRADES": adversarial.TRADES,
}
EPS = 0.1

members = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MEMBERS.items()])
norms = pytest.mark.parametrize("norm", ["linf", "l2"])
attack_modes = pytest.mark.parametrize("attack_mode", ["eval", "train"])


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(48, 5)
        ).to(dtype)


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(8, 2, 3, 4, generator=generator, dtype=dtype).round(decimals=1), torch.randint(5, (8,), generator=generator)


def seeded(seed: int, call: Callable[[], Tensor]) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return call()


def test_every_public_objective_has_a_row():
    public = {
        name
        for name in adversarial.__all__
        if isinstance(getattr(adversarial, name), type) and issubclass(getattr(adversarial, name), AdversarialObjective)
    }
    assert public - {"AdversarialObjective"} == {name.partition(",")[0] for name in MEMBERS}


@members
@norms
@pytest.mark.parametrize(
    "bounds", [(0.0, 1.0), None, (torch.zeros(2, 1, 1), torch.ones(2, 3, 4))], ids=["unit", "none", "tensors"]
)
def test_attack_stays_in_the_ball_and_the_bounds(make, norm, bounds):
    if norm == "l2" and make is MEMBERS["DONE, implicit"]:
        pytest.skip("its barrier is that of the largest norm")
    model, (x, y) = net(), batch()
    moved = seeded(1, lambda: make(eps=EPS, norm=norm, bounds=bounds).attack(model, x, y))
    assert moved.shape == x.shape
    assert moved.dtype == x.dtype
    assert not moved.requires_grad
    change = moved - x
    size = change.abs().amax((1, 2, 3)) if norm == "linf" else change.flatten(1).norm(dim=1)
    assert (size <= EPS * (1 + 1e-5)).all()
    assert (size > 0.05 * EPS).all()
    if bounds is None:
        assert moved.min() < 0
        assert moved.max() > 1
    else:
        assert moved.min() >= 0
        assert moved.max() <= 1


@members
def test_without_room_the_attack_stays_where_it_is(make):
    model, (x, y) = net().eval(), batch()
    objective = make(eps=0.0)
    assert torch.equal(objective.attack(model, x, y), x)
    assert objective(model, x, y).isfinite()


@members
@attack_modes
def test_attack_leaves_the_model_alone(make, attack_mode):
    model, (x, y) = net().train(), batch()
    model[1].eval()
    model[5].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    x.requires_grad_()
    before = copy.deepcopy(model)
    before[5].weight.grad = torch.ones_like(model[5].weight)
    with torch.no_grad():
        seeded(1, lambda: make(eps=EPS, attack_mode=attack_mode).attack(model, x, y))
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert x.grad is None
    for (name, ours), theirs in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.requires_grad == theirs.requires_grad, name
        assert (ours.grad is None) if theirs.grad is None else torch.equal(ours.grad, theirs.grad), name
    for (name, ours), theirs in zip(model.named_buffers(), before.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


@members
@attack_modes
def test_model_is_in_the_mode_of_the_attack(make, attack_mode):
    model, (x, y) = net().train(attack_mode == "eval"), batch()
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(module.training))
    seeded(1, lambda: make(eps=EPS, steps=3, attack_mode=attack_mode).attack(model, x, y))
    assert len(seen) >= 3
    assert set(seen) == {attack_mode == "train"}


@members
def test_mode_is_restored_where_the_model_fails(make):
    model, (x, y) = net().train(), batch()
    with pytest.raises(RuntimeError):
        make(eps=EPS).attack(model, x[:, :1], y)
    assert all(module.training for module in model.modules())


@members
@attack_modes
def test_batch_norm_counts_only_the_passes_of_the_loss(make, attack_mode):
    counts = []
    for steps in (1, 6):
        model, (x, y) = net().train(), batch()
        make(eps=EPS, steps=steps, attack_mode=attack_mode)(model, x, y)
        counts.append(int(model[1].num_batches_tracked))
    assert counts[0] == counts[1]
    assert 1 <= counts[0] <= 2


@members
@norms
def test_same_seed_same_loss(make, norm):
    model, (x, y) = net().train(), batch()
    if norm == "l2" and make is MEMBERS["DONE, implicit"]:
        pytest.skip("its barrier is that of the largest norm")

    def loss(seed: int) -> Tensor:
        return seeded(seed, lambda: make(eps=EPS, norm=norm)(copy.deepcopy(model), x, y))

    assert torch.equal(loss(3), loss(3))
    assert not torch.equal(loss(3), loss(4))


@members
@norms
def test_gradients_reach_every_parameter(make, norm):
    if norm == "l2" and make is MEMBERS["DONE, implicit"]:
        pytest.skip("its barrier is that of the largest norm")
    model, (x, y) = net().train(), batch()
    loss = make(eps=EPS, norm=norm)(model, x, y)
    assert loss.shape == ()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name != "0.bias":  # batch norm takes it out again
            assert parameter.grad.any(), name


@members
def test_double_precision_stays_double(make):
    model, (x, y) = net(dtype=torch.float64), batch(dtype=torch.float64)
    objective = make(eps=EPS)
    assert objective.attack(model, x, y).dtype == torch.float64
    assert objective(model, x, y).dtype == torch.float64


@members
def test_autocast_leaves_inputs_and_gradients_as_they_are(make):
    model, (x, y) = net().train(), batch()
    objective = make(eps=EPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, moved = objective(model, x, y), objective.attack(model, x, y)
    assert moved.dtype == torch.float32
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@members
def test_a_stronger_attack_raises_the_loss(make):
    model, (x, y) = net().eval(), batch()
    small, large = (seeded(0, lambda eps=eps: make(eps=eps)(model, x, y)) for eps in (0.01, 0.3))
    assert large > small


@members
def test_survives_copying_and_saving(make):
    model, (x, y) = net().eval(), batch()
    objective = make(eps=EPS, bounds=(torch.zeros(3, 4), torch.ones(1)), steps=2, step_size=0.03)
    fresh = make(eps=EPS, bounds=(torch.zeros(3, 4), torch.ones(1)), steps=2, step_size=0.03)
    fresh.load_state_dict(objective.state_dict())
    twins = [objective, copy.deepcopy(objective), pickle.loads(pickle.dumps(objective)), fresh]
    values = [seeded(0, lambda twin=twin: twin(model, x, y)) for twin in twins]
    assert all(torch.equal(value, values[0]) for value in values)
    assert len({repr(twin) for twin in twins}) == 1


@members
def test_repr_tells_what_it_is(make):
    text = repr(make(eps=0.25, steps=7))
    assert text.startswith(type(make(eps=0.25)).__name__ + "(")
    for said in ("eps=0.25", "norm='linf'", "steps=7", "step_size=None", "bounds=(0.0, 1.0)", "attack_mode='eval'"):
        assert said in text
    assert all(f"{name}=" in text for name in type(make(eps=0.25)).shown)


@members
def test_trains_in_the_common_loop(make):
    x, y = batch()
    weights = []
    for _ in range(2):
        model, objective = net(), make(eps=EPS, steps=2)
        done = train.fit(
            model, TensorDataset(x, y), step=lambda model, batch, objective=objective: objective(model, *batch),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.05), epochs=3, batch_size=4, seed=5,
        )  # fmt: skip
        assert done.steps == 6
        assert model.training
        weights.append(model[5].weight.detach().clone())
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], net()[5].weight)


@members
def test_wrong_arguments_are_named(make):
    for name, wrong in (
        ("eps", -0.1), ("eps", math.nan), ("eps", math.inf), ("steps", 0), ("steps", 1.5), ("step_size", 0.0), ("step_size", -1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} must be"):
            make(**{"eps": EPS, name: wrong})
    with pytest.raises(TypeError, match="eps must be a real number"):
        make(eps="large")
    with pytest.raises(ValueError, match=r"unknown norm 'l1'.*accepted: l2, linf"):
        make(eps=EPS, norm="l1")
    with pytest.raises(ValueError, match=r"unknown attack_mode 'test'.*accepted: eval, train"):
        make(eps=EPS, attack_mode="test")
    for wrong in ((1.0, 0.0), (0.0, math.nan), (torch.tensor([0.0, 2.0]), 1.0), (0.0,), 1.0):
        with pytest.raises(ValueError, match="bounds must be"):
            make(eps=EPS, bounds=wrong)


class Anything(nn.Module):
    """Takes integers too."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5].float()


@members
def test_wrong_inputs_are_named(make):
    model, (x, y) = net(), batch()
    for outside in (x + 0.5, x - 0.5):
        with pytest.raises(ValueError, match="x must lie within bounds"):
            make(eps=EPS)(model, outside, y)
    with pytest.raises(TypeError, match=r"x must be a floating tensor, got torch.int64"):
        make(eps=EPS)(Anything(), x.long(), y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@members
def test_runs_on_the_gpu(make):
    model, (x, y) = net().cuda().train(), (t.cuda() for t in batch())
    objective = make(eps=EPS, bounds=(torch.zeros(3, 4), torch.ones(2, 1, 1))).cuda()
    moved = objective.attack(model, x, y)
    assert moved.device == x.device
    assert ((moved - x).abs() <= EPS * (1 + 1e-5)).all()
    objective(model, x, y).backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.autocast("cuda", dtype=torch.float16):
        assert objective(model, x, y).isfinite()


@members
@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.full((8,), 5), ValueError, r"y must lie in \[0, 5\)"),
        (torch.full((8,), -1), ValueError, r"y must lie in \[0, 5\)"),
        (torch.zeros(7, dtype=torch.long), ValueError, r"y must have shape \(8,\)"),
        (torch.zeros(8), TypeError, "y must hold classes"),
    ],
    ids=["too large", "negative", "too few", "floating"],
)
def test_labels_that_do_not_fit_are_named(make, y, error, message):
    x, _ = batch()
    with pytest.raises(error, match=message):
        make(eps=EPS)(net(), x, y)
