from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.prune.zoo import make
from weightroom.prune import GraSPPruner, SNIPPruner

cross_entropy = nn.functional.cross_entropy


def test_what_raises_the_gradient_when_it_goes_is_removed_first():
    # L = (a x^2 + b y^2) / 2 at (x, y): g = (a x, b y), H g = (a^2 x, b^2 y), scores (a^2 x^2, b^2 y^2); with a cross term c x z
    # of the wrong sign a score is negative, and that weight goes first.
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0, 0.5]])
    H = torch.tensor([[2.0, 0.0, -3.0], [0.0, 1.0, 0.0], [-3.0, 0.0, 1.0]])
    loss = lambda out, y: 0.5 * model_weight(out) @ H @ model_weight(out)  # noqa: E731
    scores = model.weight.data[0] * (H @ (H @ model.weight.data[0]))

    def model_weight(out):
        return out[:, 0]  # inputs are the unit vectors, so the outputs are the weights

    order = scores.argsort()
    data = [(torch.eye(3), torch.zeros(3))]
    kept = [GraSPPruner(k / 3, temperature=1.0).fit(model, data, loss_fn=loss).masks["weight"][0] for k in (1, 2)]
    assert not kept[0][order[0]]
    assert kept[0].sum() == 2
    assert kept[1][order[2]]
    assert kept[1].sum() == 1
    assert scores.min() < 0


def test_the_score_is_the_change_of_the_gradients_norm():
    model, x, y = make("mlp")
    model = model.double()
    x = x.double()
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    tensors = dict(model.named_parameters())

    def flow(weights):
        out = torch.func.functional_call(model, {**{n: p.detach() for n, p in tensors.items()}, **weights}, x)
        grads = torch.autograd.grad(cross_entropy(out / 200, y), list(weights.values()), create_graph=True)
        return sum(g.square().sum() for g in grads)

    weights = {n: tensors[n].detach().clone().requires_grad_() for n in names}
    slope = torch.autograd.grad(flow(weights), list(weights.values()))
    expected = {n: 0.5 * tensors[n].detach() * s for n, s in zip(names, slope, strict=True)}  # -change / 2 when it goes
    pool = torch.cat([e.flatten() for e in expected.values()])
    tau = pool.sort().values[round(0.6 * len(pool)) - 1]
    plan = GraSPPruner(0.6).fit(model, [(x, y)], loss_fn=cross_entropy)
    assert sum(int((plan.masks[n] != (expected[n] > tau)).sum()) for n in names) <= 2


def test_batches_are_one_mean_and_dropout_is_the_same_in_both_passes():
    model, x, y = make("mlp")
    whole = GraSPPruner(0.6).fit(model, [(x, y)], loss_fn=cross_entropy)
    parts = GraSPPruner(0.6, batches=None).fit(model, [(x[:3], y[:3]), (x[3:], y[3:])], loss_fn=cross_entropy)
    assert sum(int((whole.masks[k] != m).sum()) for k, m in parts.masks.items()) <= 2
    dropped = nn.Sequential(*model[:2], nn.Dropout(0.5), *model[2:])
    first, again = (GraSPPruner(0.6, seed=3).fit(dropped, [(x, y)], loss_fn=cross_entropy) for _ in range(2))
    assert all(torch.equal(again.masks[k], m) for k, m in first.masks.items())


def test_it_is_not_snip():
    model, x, y = make("cnn")
    ours, theirs = (pruner(0.5).fit(model, [(x, y)], loss_fn=cross_entropy) for pruner in (GraSPPruner, SNIPPruner))
    assert any((ours.masks[k] != m).any() for k, m in theirs.masks.items())


def test_what_is_missing_or_wrong_is_named():
    model, x, y = make("mlp")
    with pytest.raises(TypeError, match=r"GraSPPruner\.fit needs data and loss_fn"):
        GraSPPruner(0.5).fit(model)
    with pytest.raises(TypeError, match=r"data must give batches \(inputs, targets\), got Tensor"):
        GraSPPruner(0.5).fit(model, x, loss_fn=cross_entropy)
    with pytest.raises(ValueError, match="data holds no batch"):
        GraSPPruner(0.5).fit(model, [], loss_fn=cross_entropy)
    with pytest.raises(ValueError, match="the loss is nan"):
        GraSPPruner(0.5).fit(model, [(x * float("nan"), y)], loss_fn=cross_entropy)
    with pytest.raises(ValueError, match="no curvature"):
        GraSPPruner(0.5).fit(model, [(x, y)], loss_fn=lambda out, t: 0 * out.sum())
    with pytest.raises(ValueError, match="batches must be >= 1 or None"):
        GraSPPruner(0.5, batches=0)
    with pytest.raises(ValueError, match="temperature must be"):
        GraSPPruner(0.5, temperature=0.0)
