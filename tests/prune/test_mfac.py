from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

from tests.prune.zoo import make
from weightroom.curvature import EmpiricalFisherInverse
from weightroom.prune import GlobalMagnitudePruner, MFACPruner, PruningPlan, RandomPruner

cross_entropy = nn.functional.cross_entropy


def trained(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A perceptron trained a little in float64, and twelve batches."""
    torch.manual_seed(seed)
    x = torch.randn(96, 6, dtype=torch.float64)
    y = (x @ torch.randn(6, 4, dtype=torch.float64)).argmax(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model, list(zip(x.split(8), y.split(8), strict=True))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([m.weight.detach().reshape(-1) for m in model if isinstance(m, nn.Linear)])


def gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    tensors = [m.weight for m in model if isinstance(m, nn.Linear)]
    return torch.stack(
        [torch.cat([g.reshape(-1) for g in torch.autograd.grad(cross_entropy(model(x), y), tensors)]) for x, y in batches]
    )


@pytest.mark.parametrize("block_size", [None, -1, 1, 7, 200])
@pytest.mark.parametrize("rounds", [1, 3])
def test_it_is_the_algorithm_written_out_with_dense_matrices(block_size, rounds):
    model, batches = trained()
    pruner = MFACPruner(0.75, window=5, damping=1e-3, block_size=block_size, recomputations=rounds)
    plan = pruner.fit(model, batches, loss_fn=cross_entropy)

    other, _ = trained()
    d, stream = 120, itertools.cycle(batches)
    w, alive = weights(other), torch.arange(d)
    for r in range(1, rounds + 1):
        G = gradients(other, [next(stream) for _ in range(5)])[:, alive]
        block = torch.arange(len(alive)) // (len(alive) if block_size in (None, -1) else block_size)
        F = (1e-3 * torch.eye(len(alive), dtype=torch.float64) + G.T @ G / 5) * (block[:, None] == block)
        inverse = torch.linalg.inv(F)
        rho = w[alive] ** 2 / (2 * inverse.diagonal())
        n = len(alive) - round(d * 0.25 ** (r / rounds))
        Q = rho.argsort()[:n]
        t = torch.zeros_like(rho)
        t[Q] = -w[alive][Q] / inverse.diagonal()[Q]
        w[alive] += inverse @ t
        w[alive[Q]] = 0
        alive = alive[torch.isin(torch.arange(len(alive)), Q, invert=True)]
        with torch.no_grad():
            for layer, part in zip((other[0], other[2]), w.split([72, 48]), strict=True):
                layer.weight.copy_(part.view_as(layer.weight))

    plan.apply(model)
    torch.testing.assert_close(weights(model), w, rtol=1e-9, atol=1e-12)
    assert int((weights(model) == 0).sum()) == 90


def test_blocks_of_one_and_one_round_leave_the_others_bit_for_bit():
    model, batches = trained()
    before = weights(model).clone()
    plan = MFACPruner(0.5, window=6, block_size=1, recomputations=1).fit(model, batches, loss_fn=cross_entropy)
    plan.apply(model)
    keep = torch.cat([mask.reshape(-1) for mask in plan.masks.values()])
    assert torch.equal(weights(model)[keep], before[keep])
    assert not weights(model)[~keep].any()
    corrected = MFACPruner(0.5, window=6, block_size=None, recomputations=1).fit(trained()[0], batches, loss_fn=cross_entropy)
    assert any((corrected.deltas[k][corrected.masks[k]] != 0).any() for k in corrected.deltas)


def test_pruned_entries_are_exactly_zero_under_the_mask_and_beneath_it():
    model, batches = trained()
    MFACPruner(0.8, window=6, recomputations=4).fit(model, batches, loss_fn=cross_entropy).apply(model)
    for layer in (model[0], model[2]):
        assert torch.equal(layer.weight_mask == 0, layer.weight == 0)
        assert not layer.weight_orig[layer.weight_mask == 0].any()


def test_it_loses_less_than_magnitude():
    model, batches = trained()
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    losses = []
    for pruner in (MFACPruner(0.7, window=12, block_size=None, recomputations=8), GlobalMagnitudePruner(0.7)):
        pruned = pruner.fit(model, batches, loss_fn=cross_entropy).apply(trained()[0])
        losses.append(float(cross_entropy(pruned(x), y).detach()))
    assert losses[0] < 0.8 * losses[1]


def test_gradients_are_taken_in_eval_mode_and_the_mode_stays():
    model, x, y = make("residual")
    model = nn.Sequential(nn.Dropout(0.5), model)
    with torch.no_grad():
        model[1].bn.running_mean.fill_(2.0)
    pruner = MFACPruner(0.6, window=3, recomputations=2)
    training = pruner.fit(model.train(), [(x, y)], loss_fn=cross_entropy)
    assert model[0].training
    evaluated = pruner.fit(model.eval(), [(x, y)], loss_fn=cross_entropy)
    assert all(torch.equal(training.masks[k], mask) for k, mask in evaluated.masks.items())
    assert (model[1].bn.running_mean == 2).all()


def test_entries_pruned_before_take_no_part():
    model, batches = trained()
    RandomPruner(0.4).fit(model).apply(model)
    gone = {f"{i}.weight": model[i].weight_mask == 0 for i in (0, 2)}
    for i in (0, 2):
        model[i].weight_orig.data[gone[f"{i}.weight"]] = 1e6
    plan = MFACPruner(0.7, window=5, recomputations=3).fit(model, batches, loss_fn=cross_entropy)
    other, _ = trained()
    RandomPruner(0.4).fit(other).apply(other)
    same = MFACPruner(0.7, window=5, recomputations=3).fit(other, batches, loss_fn=cross_entropy)
    assert not any((plan.masks[k] & mask).any() for k, mask in gone.items())
    assert not any(plan.deltas[k][mask].any() for k, mask in gone.items())
    assert all(torch.equal(same.masks[k], mask) for k, mask in plan.masks.items())
    assert sum(int((~mask).sum()) for mask in plan.masks.values()) == 84


def test_the_density_falls_geometrically_and_ends_at_the_exact_count():
    pruner = MFACPruner(0.9, recomputations=4)
    assert list(pruner._rounds(1000, 1000, 900)) == [round(1000 * 0.1 ** (r / 4)) for r in (1, 2, 3, 4)]
    assert list(pruner._rounds(1000, 400, 900)) == [1000 - round(1000 * (1 - 0.4 * 0.25 ** (r / 4))) for r in (1, 2, 3, 4)]
    assert list(pruner._rounds(1000, 100, 900)) == []
    assert list(MFACPruner(0.5, recomputations=16)._rounds(6, 6, 3)) == [5, 4, 3]


@pytest.mark.parametrize("as_what", [list, iter, tuple])
def test_data_with_fewer_batches_than_needed_is_gone_through_again(as_what):
    model, batches = trained()
    read = MFACPruner(0.5, window=5, recomputations=2).fit(model, as_what(batches[:3]), loss_fn=cross_entropy)
    many = (batches[:3] * 4)[:10]
    whole = MFACPruner(0.5, window=5, recomputations=2).fit(model, many, loss_fn=cross_entropy)
    assert all(torch.equal(whole.masks[k], mask) for k, mask in read.masks.items())
    assert all(torch.equal(whole.deltas[k], delta) for k, delta in read.deltas.items())


def test_no_more_batches_are_read_than_needed():
    model, batches = trained()
    seen = []

    def stream():
        for batch in batches:
            seen.append(batch)
            yield batch

    MFACPruner(0.5, window=5, recomputations=2).fit(model, stream(), loss_fn=cross_entropy)
    assert len(seen) == 10


def test_a_shuffling_loader_is_decided_by_the_seed():
    model, batches = trained()
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)

    def deltas(seed: int) -> Tensor:
        torch.rand(5)
        plan = MFACPruner(0.6, window=5, recomputations=2, seed=seed).fit(model, loader, loss_fn=cross_entropy)
        return torch.cat([delta.reshape(-1) for delta in plan.deltas.values()])

    assert torch.equal(deltas(1), deltas(1))
    assert not torch.equal(deltas(1), deltas(2))


def test_plans_follow_one_another():
    model, batches = trained()
    for sparsity in (0.5, 0.8):
        plan = MFACPruner(sparsity, window=5, recomputations=2).fit(model, batches, loss_fn=cross_entropy)
        plan.apply(model)
        assert plan.sparsity() == sparsity
    with pytest.raises(ValueError, match=r"96 of 120 are already pruned \(sparsity 0\.8\)"):
        MFACPruner(0.5).fit(model, batches, loss_fn=cross_entropy)


def test_prune_works_in_place_under_torchs_names():
    model, batches = trained()
    other, _ = trained()
    pruner = MFACPruner(0.1, window=5, recomputations=2)
    plan = pruner.prune(model, 0.5, cross_entropy, batches)
    assert isinstance(plan, PruningPlan)
    assert plan.sparsity() == 0.5
    assert torch_prune.is_pruned(model)
    assert {k for k in model.state_dict() if "weight" in k} == {f"{i}.weight_{s}" for i in (0, 2) for s in ("orig", "mask")}
    pruner.at(0.5).fit(other, batches, loss_fn=cross_entropy).apply(other)
    assert torch.equal(weights(model), weights(other))
    assert pruner.sparsity == 0.1
    assert pruner.targets is MFACPruner(0.1).targets


@pytest.mark.parametrize("by", ["name", "parameter"])
def test_prune_takes_the_parameters_it_is_told(by):
    model, batches = trained()
    chosen = ["2.weight", "0.bias"] if by == "name" else [model[2].weight, model[0].bias]
    plan = MFACPruner(0.1, window=5, recomputations=2).prune(model, 0.5, cross_entropy, batches, parameters=chosen)
    assert list(plan.masks) == ["0.bias", "2.weight"]
    assert plan.sparsity() == 0.5
    with pytest.raises(ValueError, match="not a parameter of the model"):
        MFACPruner(0.1).prune(model, 0.9, cross_entropy, batches, parameters=[nn.Parameter(torch.ones(2))])


def test_gradients_in_half_precision_fit_the_fisher_in_float64():
    model, batches = trained()
    half, batches = model.half(), [(x.half(), y) for x, y in batches]
    plan = MFACPruner(0.5, window=5, recomputations=2).fit(half, batches, loss_fn=cross_entropy)
    assert {delta.dtype for delta in plan.deltas.values()} == {torch.float16}
    assert all(torch.isfinite(delta).all() for delta in plan.deltas.values())


def test_without_any_gradient_it_is_magnitude():
    model, batches = trained()
    flat = lambda out, y: 0 * out.sum()  # noqa: E731
    plan = MFACPruner(0.5, window=2, recomputations=1).fit(model, batches, loss_fn=flat)
    magnitude = GlobalMagnitudePruner(0.5).fit(model)
    assert all(torch.equal(plan.masks[k], mask) for k, mask in magnitude.masks.items())


def test_it_uses_the_inverse_that_can_be_used_alone():
    model, batches = trained()
    inverse = EmpiricalFisherInverse(gradients(model, batches[:4]), 1e-3)
    rho = weights(model) ** 2 / (2 * inverse.diag())
    plan = MFACPruner(0.3, window=4, damping=1e-3, block_size=None, recomputations=1).fit(model, batches, loss_fn=cross_entropy)
    keep = torch.cat([mask.reshape(-1) for mask in plan.masks.values()])
    assert rho[~keep].max() < rho[keep].min()


def test_what_is_missing_or_wrong_is_named():
    model, batches = trained()
    x, y = batches[0]
    with pytest.raises(TypeError, match=r"MFACPruner\.fit needs data and loss_fn: batches"):
        MFACPruner(0.5).fit(model)
    with pytest.raises(TypeError, match="needs loss_fn: batches"):
        MFACPruner(0.5).fit(model, batches)
    with pytest.raises(TypeError, match=r"data must give batches \(inputs, targets\), got Tensor"):
        MFACPruner(0.5).fit(model, x, loss_fn=cross_entropy)
    for empty in ([], iter([])):
        with pytest.raises(ValueError, match="data holds no batch"):
            MFACPruner(0.5).fit(model, empty, loss_fn=cross_entropy)
    with pytest.raises(ValueError, match="loss of batch 1 is nan"):
        MFACPruner(0.5).fit(model, [(x, y), (x * float("nan"), y)], loss_fn=cross_entropy)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"window": 2.5}, "window must be an integer >= 1, got 2.5"),
        ({"recomputations": 0}, "recomputations must be an integer >= 1, got 0"),
        ({"damping": 0.0}, "damping must be > 0"),
        ({"block_size": 0}, "block_size must be an integer >= 1, or None or -1"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        MFACPruner(0.5, **arguments)
