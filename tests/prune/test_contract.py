"""What every plan pruner of the room owes its user, whatever it ranks by."""

from __future__ import annotations

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

import weightroom.prune as room
from tests.prune.zoo import ZOO, make
from weightroom.prune import PlanPruner, PruningPlan, prune_gradually, successive_sparsities
from weightroom.prune.base import seeded

#: What makes pruners quick that would be slow here as they come.
QUICK = {"MFACPruner": {"window": 4, "recomputations": 2}, "RDPruner": {"grid": 20}}
#: What makes pruners count all weights, as the tests here do, that by themselves leave some dense or refuse some networks.
WHOLE = {"DIMAPPruner": {"modules": {"*": "all"}}}
#: Pruners whose kept sets need not nest, and why.
NOT_NESTED = {
    "MFACPruner": "each round corrects the weights and ranks them anew, and rounds depend on the target",
    "RDPruner": "amounts are optimised anew for each sparsity",
}


def quick(pruner: type[PlanPruner]) -> partial[PlanPruner]:
    made = partial(pruner, **QUICK.get(pruner.__name__, {}), **WHOLE.get(pruner.__name__, {}))
    made.__name__ = pruner.__name__
    return made


PRUNERS = [
    quick(part)
    for name in room.__all__
    if isinstance(part := getattr(room, name), type) and issubclass(part, PlanPruner) and part is not PlanPruner
]
every_pruner = pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.__name__)
every_model = pytest.mark.parametrize("name", ZOO)
#: Those that read the data that ``fit`` is given.
READERS = [pruner for pruner in PRUNERS if pruner.__name__ in ("GraSPPruner", "MFACPruner", "RDPruner", "SNIPPruner")]
every_reader = pytest.mark.parametrize("pruner", READERS, ids=lambda p: p.__name__)


def fit(pruner: PlanPruner, model: nn.Module, x: Tensor, y: Tensor) -> PruningPlan:
    return pruner.fit(model, data=[(x, y)], example_inputs=x, loss_fn=nn.functional.cross_entropy)


def counts(plan: PruningPlan) -> tuple[int, int]:
    layers = plan.layers().values()
    return sum(layer.removed for layer in layers), sum(layer.size for layer in layers)


def weights(model: nn.Module) -> int:
    """Prunable weights, counted another way than the room does: what has two axes or more and is no bias, token or position."""
    return sum(
        p.numel() for n, p in model.named_parameters() if p.ndim > 1 and not any(w in n for w in ("bias", "token", "position"))
    )


def test_the_room_has_plan_pruners_to_test():
    assert len(PRUNERS) >= 6


@every_pruner
@every_model
def test_fit_removes_exactly_the_share_asked_for_and_leaves_the_model_alone(pruner, name):
    model, x, y = make(name)
    nn.functional.cross_entropy(model(x), y).backward()
    model.train()
    next(iter(model.children())).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    tensors = dict(model.named_parameters())
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    random_state = torch.get_rng_state()

    plan = fit(pruner(0.7), model, x, y)

    assert counts(plan) == (round(0.7 * weights(model)), weights(model))
    assert plan.sparsity() == counts(plan)[0] / counts(plan)[1]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p is tensors[k] for k, p in model.named_parameters())
    assert all(torch.equal(p.grad, grads[k]) if k in grads else p.grad is None for k, p in model.named_parameters())
    assert [m.training for m in model.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()] == hooks
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.requires_grad for p in model.parameters())


@every_pruner
@every_model
def test_masks_hold_zeros_through_training_with_momentum_and_weight_decay(pruner, name):
    model, x, y = make(name)
    plan = fit(pruner(0.7), model, x, y)
    plan.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    model(x)
    modules = dict(model.named_modules())
    for tensor, mask in plan.masks.items():
        path, _, attribute = tensor.rpartition(".")
        weight = getattr(modules[path], attribute)
        assert not weight[~mask].any()
        if not mask.all():
            assert torch.equal(weight, (modules[path]._parameters[f"{attribute}_orig"] * mask))
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, start[n])]
    assert any("weight" in n for n in moved)
    assert any("bias" in n for n in moved)


@every_pruner
@every_model
def test_plans_survive_saving_and_applying_twice(pruner, name, tmp_path):
    model, x, y = make(name)
    model.eval()
    plan = fit(pruner(0.6), model, x, y)
    plan.save(tmp_path / "plan.safetensors")
    loaded = PruningPlan.load(tmp_path / "plan.safetensors")
    assert list(loaded.masks) == list(plan.masks)
    assert all(torch.equal(loaded.masks[k], mask) for k, mask in plan.masks.items())
    once, twice = copy.deepcopy(model), copy.deepcopy(model)
    plan.apply(once)
    loaded.apply(loaded.apply(twice))
    assert torch.equal(once(x), twice(x))
    assert list(once.state_dict()) == list(twice.state_dict())
    again = plan.merge(loaded)
    assert all(torch.equal(again.masks[k], mask) for k, mask in plan.masks.items())


@every_pruner
def test_kept_sets_nest(pruner):
    if pruner.__name__ in NOT_NESTED:
        pytest.skip(NOT_NESTED[pruner.__name__])
    model, x, y = make("residual")
    last = None
    for sparsity in (0.0, 0.13, 0.5, 0.5005, 0.77, 0.9, 0.99):
        masks = fit(pruner(sparsity), model, x, y).masks
        if last is not None:
            assert all(not (mask & ~last[k]).any() for k, mask in masks.items())
        last = masks


@every_pruner
def test_the_same_arguments_give_the_same_plan(pruner):
    model, x, y = make("residual")
    first = fit(pruner(0.5), model, x, y)
    torch.rand(3)
    second = fit(pruner(0.5), copy.deepcopy(model), x, y)
    assert all(torch.equal(second.masks[k], mask) for k, mask in first.masks.items())


@every_pruner
def test_sparsity_zero_changes_nothing(pruner):
    model, x, y = make("cnn")
    before = model(x)
    plan = fit(pruner(0.0), model, x, y)
    assert plan.sparsity() == 0
    assert torch.equal(plan.apply(model)(x), before)
    assert not any("mask" in k for k in model.state_dict())


@every_pruner
@pytest.mark.parametrize("sparsity", [1.0, 1.2, -0.1, float("nan"), float("inf")])
def test_sparsity_outside_its_range_is_refused(pruner, sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got"):
        pruner(sparsity)


@every_reader
def test_samples_are_not_taken_for_batches(pruner):
    model, x, y = make("mlp")
    data = TensorDataset(x, y)
    with pytest.raises(TypeError, match="data must give batches, and a TensorDataset gives samples: put it in a DataLoader"):
        pruner(0.5).fit(model, data, loss_fn=nn.functional.cross_entropy)
    plan, loaded = (pruner(0.5).fit(model, d, loss_fn=nn.functional.cross_entropy) for d in ([(x, y)], DataLoader(data, 8)))
    assert all(torch.equal(loaded.masks[k], mask) for k, mask in plan.masks.items())


@every_reader
def test_batches_that_hold_nothing_are_left_out(pruner):
    model, x, y = make("mlp")
    empty = (x[:0], y[:0])
    plan = fit(pruner(0.5), model, x, y)
    other = pruner(0.5).fit(model, [empty, (x, y), empty], loss_fn=nn.functional.cross_entropy)
    assert all(torch.equal(other.masks[k], mask) for k, mask in plan.masks.items())
    for data in ([], [empty], iter([empty])):
        with pytest.raises(ValueError, match="data holds no"):
            pruner(0.5).fit(model, data, loss_fn=nn.functional.cross_entropy)


@every_reader
def test_a_model_on_the_cpu_leaves_the_random_states_of_gpus_alone(pruner, monkeypatch):
    model, x, y = make("mlp")
    seeds = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    fit(pruner(0.5), model, x, y)
    assert not seeds


def test_the_random_states_of_gpus_in_use_are_seeded_and_put_back(monkeypatch):
    states = [torch.tensor([11]), torch.tensor([12])]

    def seed_all(seed: int) -> None:
        states[:] = [torch.tensor([seed])] * 2

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.__setitem__(device, state))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    before = torch.get_rng_state()
    with seeded(7):
        assert [int(state) for state in states] == [7, 7]
        inside = torch.rand(3)
    assert [int(state) for state in states] == [11, 12]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(7)))


@every_pruner
def test_a_model_that_carries_masks_goes_on_from_them(pruner):
    model, x, y = make("cnn")
    torch.manual_seed(1)
    for module in (model[0], model[6]):
        torch_prune.random_unstructured(module, "weight", amount=0.3)
    gone = {0: model[0].weight_mask.bool(), 6: model[6].weight_mask.bool()}
    plan = fit(pruner(0.5), model, x, y)
    removed, total = counts(plan)
    assert removed == round(0.5 * total)
    for i, mask in gone.items():
        assert not (plan.masks[f"{i}.weight"] & ~mask).any()
    present = sum(int((~mask).sum()) for mask in gone.values())
    exact = fit(pruner(present / total), model, x, y)
    assert all(torch.equal(exact.masks[f"{i}.weight"], mask) for i, mask in gone.items())
    with pytest.raises(ValueError, match=rf"{present} of {total} are already pruned"):
        fit(pruner(0.01), model, x, y)


@every_pruner
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_cannot_be_ranked_are_named(pruner, value):
    model, x, y = make("mlp")
    with torch.no_grad():
        model[2].weight[3, 4] = value
    with pytest.raises(ValueError, match=r"'2\.weight' holds NaN or infinity"):
        fit(pruner(0.5), model, x, y)


@every_pruner
def test_a_model_without_prunable_layers_is_refused(pruner):
    model = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())
    with pytest.raises(ValueError, match="no weight to prune: looked for Linear"):
        fit(pruner(0.5), model, torch.randn(8, 6), torch.zeros(8, dtype=torch.long))


@every_pruner
def test_a_shared_weight_counts_once_and_is_masked_everywhere(pruner):
    model, x, y = make("tied")
    plan = fit(pruner(0.5), model, x, y)
    assert list(plan.masks) == ["encode.weight", "head.weight"]
    plan.apply(model)
    model(x)
    assert model.encode.weight_orig is model.decode.weight_orig
    assert torch.equal(model.encode.weight, model.decode.weight)
    assert torch.equal(model.decode.weight == 0, ~plan.masks["encode.weight"])


@every_pruner
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(pruner, dtype):
    model, x, y = make("mlp")
    model, x = model.to(dtype), x.to(dtype)
    plan = fit(pruner(0.5), model, x, y)
    removed, total = counts(plan)
    assert removed == round(0.5 * total)
    plan.apply(model)
    assert model(x).dtype == dtype
    assert model[0].weight.dtype == model[0].weight_mask.dtype == dtype


@every_pruner
def test_pruners_and_plans_can_be_pickled(pruner):
    model, x, y = make("mlp")
    first = pickle.loads(pickle.dumps(pruner(0.5)))
    plan = fit(first, model, x, y)
    again = pickle.loads(pickle.dumps(plan))
    assert all(torch.equal(again.masks[k], mask) for k, mask in plan.masks.items())
    masked = pickle.loads(pickle.dumps(plan.apply(model)))
    assert torch.equal(masked(x), model(x))


@every_pruner
def test_layers_that_are_ignored_stay_dense(pruner):
    model, x, y = make("mlp")
    plan = pruner(0.5, ignore=("0", -1)).fit(model, data=[(x, y)], loss_fn=nn.functional.cross_entropy)
    assert list(plan.masks) == ["2.weight"]
    assert counts(plan) == (72, 144)


@every_pruner
def test_channels_last_weights_are_pruned_like_any_others(pruner):
    model, x, y = make("cnn")
    plan = fit(pruner(0.6), model, x, y)
    other = fit(pruner(0.6), copy.deepcopy(model).to(memory_format=torch.channels_last), x, y)
    agree = sum(int((other.masks[k] == mask).sum()) for k, mask in plan.masks.items())
    assert counts(other) == counts(plan)
    assert agree >= counts(plan)[1] - (8 if pruner.__name__ in ("MFACPruner", "SNIPPruner") else 0)  # gradients round otherwise


@every_pruner
def test_frozen_weights_can_be_pruned_and_stay_frozen(pruner):
    model, x, y = make("mlp")
    model.requires_grad_(False)
    plan = fit(pruner(0.5), model, x, y)
    assert counts(plan)[0] == round(0.5 * counts(plan)[1])
    plan.apply(model)
    assert not any(p.requires_grad for p in model.parameters())


@every_pruner
def test_fit_works_under_no_grad(pruner):
    model, x, y = make("mlp")
    with torch.no_grad():
        plan = fit(pruner(0.5), model, x, y)
    assert counts(plan)[0] == round(0.5 * counts(plan)[1])


@every_pruner
def test_pruning_in_rounds_reaches_the_target_and_never_revives(pruner):
    model, x, y = make("cnn")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen: list[Tensor] = []

    def train(model: nn.Module) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        model(x)
        seen.append(torch.cat([m.weight.flatten() != 0 for m in model if hasattr(m, "weight")]))

    plan = prune_gradually(
        model, pruner(0.0), successive_sparsities(0.8, 4), train, data=[(x, y)], loss_fn=nn.functional.cross_entropy
    )
    removed, total = counts(plan)
    assert removed == round(0.8 * total)
    assert int(seen[-1].sum()) <= total - removed
    assert all(not (late & ~early).any() for early, late in itertools.pairwise(seen))
    assert [round(1 - int(s.sum()) / total, 2) for s in seen] == [0.33, 0.55, 0.7, 0.8]
