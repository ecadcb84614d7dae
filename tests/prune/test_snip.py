from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.prune.zoo import make
from weightroom.prune import GlobalMagnitudePruner, PruningPlan, RandomPruner, SNIPPruner

cross_entropy = nn.functional.cross_entropy


def test_score_is_weight_times_gradient():
    # y = w . x, L = y: dL/dw = x, so the scores are |w x| = (2, 3, 4, 1).
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([[2.0, -1.0, 0.5, 1.0]])
    data = [(torch.tensor([[1.0, 3.0, -8.0, 1.0]]), torch.zeros(1))]
    loss = lambda out, y: out.sum()  # noqa: E731
    order = [SNIPPruner(k / 4).fit(model, data, loss_fn=loss).masks["0.weight"].int().tolist()[0] for k in range(4)]
    assert order == [[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0]]


def test_score_equals_the_derivative_by_a_multiplier():
    model, x, y = make("cnn")
    c = {n: torch.ones_like(p, requires_grad=True) for n, p in model.named_parameters()}
    out = torch.func.functional_call(model, {n: p.detach() * c[n] for n, p in model.named_parameters()}, x)
    grads = dict(zip(c, torch.autograd.grad(cross_entropy(out, y), list(c.values())), strict=True))
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    pool = torch.cat([grads[n].abs().flatten() for n in names])
    tau = pool.sort().values[round(0.9 * len(pool)) - 1]
    plan = SNIPPruner(0.9).fit(model, [(x, y)], loss_fn=cross_entropy)
    wrong = sum(int((plan.masks[n] != (grads[n].abs() > tau)).sum()) for n in names)
    assert wrong <= 2  # a rounding apart at the threshold


def test_batches_are_averaged_by_size_and_only_as_many_as_asked_for_are_read():
    model, x, y = make("mlp")
    whole = SNIPPruner(0.6).fit(model, [(x, y)], loss_fn=cross_entropy)
    parts = [(x[:1], y[:1]), (x[1:3], y[1:3]), (x[3:], y[3:])]
    split = SNIPPruner(0.6, batches=None).fit(model, parts, loss_fn=cross_entropy)
    assert sum(int((whole.masks[k] != m).sum()) for k, m in split.masks.items()) <= 2

    read = []

    def stream():
        for part in parts:
            read.append(part)
            yield part

    first = SNIPPruner(0.6).fit(model, stream(), loss_fn=cross_entropy)
    assert len(read) == 1
    assert any((first.masks[k] != m).any() for k, m in whole.masks.items())
    SNIPPruner(0.6, batches=2).fit(model, stream(), loss_fn=cross_entropy)
    assert len(read) == 3


def test_shuffling_loaders_and_dropout_are_decided_by_the_seed_alone():
    model, x, y = make("mlp")
    model = nn.Sequential(*model[:2], nn.Dropout(0.5), *model[2:])
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)

    def fit(seed: int) -> PruningPlan:
        torch.rand(7)
        return SNIPPruner(0.6, seed=seed).fit(model, loader, loss_fn=cross_entropy)

    def same(a: PruningPlan, b: PruningPlan) -> bool:
        return all(torch.equal(b.masks[k], m) for k, m in a.masks.items())

    assert same(fit(3), fit(3))
    assert not all(same(fit(3), fit(s)) for s in range(4, 8))


def test_the_models_mode_decides_which_statistics_a_norm_uses():
    model, x, y = make("residual")
    with torch.no_grad():
        model.bn.running_mean.fill_(2.0)
    trained = SNIPPruner(0.8).fit(model, [(x, y)], loss_fn=cross_entropy)
    model.eval()
    evaluated = SNIPPruner(0.8).fit(model, [(x, y)], loss_fn=cross_entropy)
    assert any((trained.masks[k] != m).any() for k, m in evaluated.masks.items())
    assert (model.bn.running_mean == 2).all()
    assert model.bn.num_batches_tracked == 0


def test_masked_weights_bring_nothing():
    model, x, y = make("mlp")
    RandomPruner(0.5).fit(model).apply(model)
    alive = {f"{i}.weight": model[i].weight_mask.bool() for i in (0, 2, 4)}
    for i in (0, 2, 4):
        model[i].weight_orig.data[~alive[f"{i}.weight"]] = 1e3
    plan = SNIPPruner(0.7).fit(model, [(x, y)], loss_fn=cross_entropy)
    assert not any((m & ~alive[k]).any() for k, m in plan.masks.items())


def test_a_weight_that_takes_no_part_goes_first():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    plan = SNIPPruner(0.5).fit(Spare(), [(x, y)], loss_fn=cross_entropy)
    assert plan.masks["used.weight"].all()
    assert not plan.masks["spare.weight"].any()


def test_models_with_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, left, right):
            return self.a(left) + self.b(right)

    torch.manual_seed(0)
    model, left, right, y = Two(), torch.randn(4, 3), torch.randn(4, 3), torch.randint(2, (4,))
    one = SNIPPruner(0.5).fit(model, [((left, right), y)], loss_fn=cross_entropy)
    other = SNIPPruner(0.5).fit(model, [({"left": left, "right": right}, y)], loss_fn=cross_entropy)
    assert all(torch.equal(other.masks[k], m) for k, m in one.masks.items())


def test_what_is_missing_or_wrong_is_named():
    model, x, y = make("mlp")
    with pytest.raises(TypeError, match=r"SNIPPruner\.fit needs data and loss_fn: batches"):
        SNIPPruner(0.5).fit(model)
    with pytest.raises(TypeError, match=r"needs loss_fn: batches"):
        SNIPPruner(0.5).fit(model, [(x, y)])
    with pytest.raises(TypeError, match=r"data must give batches \(inputs, targets\), got Tensor"):
        SNIPPruner(0.5).fit(model, x, loss_fn=cross_entropy)
    with pytest.raises(ValueError, match="data holds no batch"):
        SNIPPruner(0.5).fit(model, [], loss_fn=cross_entropy)
    with pytest.raises(ValueError, match="loss of batch 1 is nan"):
        SNIPPruner(0.5, batches=2).fit(model, [(x, y), (x * float("nan"), y)], loss_fn=cross_entropy)
    with pytest.raises(ValueError, match="no gradient in any prunable weight"):
        SNIPPruner(0.5).fit(model, [(x, y)], loss_fn=lambda out, t: 0 * out.sum())
    with pytest.raises(ValueError, match="batches must be >= 1 or None, got 0"):
        SNIPPruner(0.5, batches=0)


def test_it_is_not_magnitude():
    model, x, y = make("cnn")
    snip = SNIPPruner(0.5).fit(model, [(x, y)], loss_fn=cross_entropy)
    magnitude = GlobalMagnitudePruner(0.5).fit(model)
    assert any((snip.masks[k] != m).any() for k, m in magnitude.masks.items())
