"""Connectivity, similarity and the regimes they make."""

from __future__ import annotations

import copy
import math
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

from weightroom import train
from weightroom.diagnostics import (
    ThreeRegimeStudy,
    classify_regime,
    linear_cka,
    linear_mode_connectivity,
    measure_regime,
    output_cka,
    similarity,
)
from weightroom.diagnostics.base import masks_of, plain_copy
from weightroom.diagnostics.connectivity import _between, _result
from weightroom.diagnostics.three_regime import _error, prune_uniformly, retraining_seed
from weightroom.metrics import copy_model

N = 90


def images():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (N,), generator=g)
    return torch.randn(N, 1, 6, 6, generator=g) + y[:, None, None, None] * torch.linspace(-1, 1, 6), y


def loader(batch_size=32, shuffle=False):
    return DataLoader(TensorDataset(*images()), batch_size=batch_size, shuffle=shuffle)


def net(seed=0, norm=True):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


def fit(model, seed=0, epochs=6):
    train.fit(
        model, TensorDataset(*images()), loss=F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        epochs=epochs, batch_size=30, seed=seed,
    )  # fmt: skip
    return model


def masked(model, seed=0, amount=0.5):
    torch.manual_seed(seed)
    for module in model:
        if isinstance(module, nn.Conv2d | nn.Linear):
            torch_prune.random_unstructured(module, "weight", amount)
    return model


def error(model):
    x, y = images()
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return float((model(x).argmax(1) != y).double().mean())


@pytest.fixture(scope="module")
def pair():
    return fit(net(0), seed=0), fit(net(1), seed=1)


# ---- connectivity


@pytest.mark.parametrize("bn", ["recompute", "keep"])
@pytest.mark.parametrize("metric", ["error", "loss"])
def test_a_model_is_connected_to_itself(pair, bn, metric):
    found = linear_mode_connectivity(pair[0], pair[0], loader(), bn=bn, metric=metric)
    assert found.lmc == 0
    assert found.barrier == 0
    assert (found.values == found.values[0]).all()


@pytest.mark.parametrize("bn", ["recompute", "keep"])
@pytest.mark.parametrize("points", [2, 6, 11])
def test_symmetric_in_its_arguments(pair, bn, points):
    a, b = pair
    there = linear_mode_connectivity(a, b, loader(), bn=bn, points=points, metric="loss")
    back = linear_mode_connectivity(b, a, loader(), bn=bn, points=points, metric="loss")
    assert len(there.ts) == points
    np.testing.assert_array_equal(there.values, back.values[::-1])
    assert there.lmc == back.lmc
    assert there.barrier == pytest.approx(back.barrier, abs=1e-12)


@given(values=st.lists(st.integers(0, 20), min_size=2, max_size=12))
def test_lmc_is_mid_minus_the_value_at_the_farthest_point(values):
    e = np.array(values) / 20
    found, mid = _result(e), (e[0] + e[-1]) / 2
    distances = np.abs(mid - e)
    assert abs(found.lmc) == pytest.approx(distances.max())
    assert any(found.lmc == pytest.approx(mid - v) for v in e)
    assert _result(e[::-1]).lmc == pytest.approx(found.lmc)
    if mid + distances.max() == pytest.approx(e.max()):
        assert found.lmc <= 0  # of two points equally far the barrier counts
    line = [e[0] + t * (e[-1] - e[0]) for t in found.ts]
    assert found.barrier == pytest.approx(max(v - at for v, at in zip(e, line, strict=True)), abs=1e-12)
    assert found.barrier >= 0


def test_the_ends_are_the_models_themselves(pair):
    a, b = pair
    kept = linear_mode_connectivity(a, b, loader(), bn="keep")
    assert kept.values[0] == error(a)
    assert kept.values[-1] == error(b)
    again = linear_mode_connectivity(a, b, loader())
    for model, value in ((a, again.values[0]), (b, again.values[-1])):
        fresh = copy.deepcopy(model).eval()
        fresh[1].reset_running_stats()
        fresh[1].train()
        seen = 0
        with torch.no_grad():
            for x, _ in loader():
                seen += len(x)
                fresh[1].momentum = len(x) / seen
                fresh(x)
        assert value == error(fresh)


def test_the_middle_is_the_mean_of_both():
    a, b = fit(net(0, norm=False)), fit(net(1, norm=False))
    middle = copy.deepcopy(a)
    with torch.no_grad():
        for p, q, m in zip(a.parameters(), b.parameters(), middle.parameters(), strict=True):
            m.copy_((p + q) / 2)
    assert linear_mode_connectivity(a, b, loader(), points=3).values[1] == error(middle)
    x, y = images()
    quarter = copy.deepcopy(a).eval()
    with torch.no_grad():
        for p, q, m in zip(a.parameters(), b.parameters(), quarter.parameters(), strict=True):
            m.copy_(0.75 * p + 0.25 * q)
        loss = float(F.cross_entropy(quarter(x), y))
    assert linear_mode_connectivity(a, b, loader(), points=5, metric="loss").values[1] == pytest.approx(loss, abs=1e-6)


def test_statistics_of_one_batch_are_those_of_the_data():
    # one batch: recomputing is what a network in training mode sees, whatever the statistics were
    a = fit(net(0))
    broken = copy.deepcopy(a)
    broken[1].running_mean.fill_(100.0)
    found = linear_mode_connectivity(a, broken, loader(batch_size=N))
    assert found.lmc == 0
    assert linear_mode_connectivity(a, broken, loader(batch_size=N), bn="keep").barrier > 0.1


def permuted(model):
    """The same function with the channels of the convolution in another order."""
    other, order = copy.deepcopy(model), torch.roll(torch.arange(8), 3)
    with torch.no_grad():
        for p in (other[0].weight, other[0].bias, *([] if isinstance(other[1], nn.Identity) else other[1].state_dict().values())):
            if p.ndim:
                p.copy_(p[order])
        head = other[6].weight.view(3, 8, 4)
        head.copy_(head[:, order])
    return other


@pytest.mark.parametrize("norm", [True, False])
def test_permuted_copies_are_the_same_function_behind_a_barrier(norm):
    a = fit(net(0, norm=norm), epochs=15)
    b = permuted(a)
    assert output_cka(a, b, loader()) == pytest.approx(1, abs=1e-5)
    found = linear_mode_connectivity(a, b, loader(), metric="loss")
    assert found.values[0] == pytest.approx(found.values[-1], abs=1e-5)
    assert found.lmc < -0.05
    assert linear_mode_connectivity(a, b, loader()).lmc < 0


def test_sparse_interpolation_keeps_zeros(pair):
    pruned = masked(fit(net(0)))
    a, b = fit(copy_model(pruned), seed=3), fit(copy_model(pruned), seed=4)
    x, y = plain_copy(a), plain_copy(b)
    for k in range(11):
        state = _between(x, y, k, 10).state_dict()
        for name, mask in masks_of(a).items():
            assert not state[name][~mask].any()
            assert state[name][mask].all()
    found = linear_mode_connectivity(a, b, loader(), bn="keep")
    assert list(found.values) == [error(_between(x, y, k, 10)) for k in range(11)]


def test_different_masks_are_refused_unless_asked_for():
    a, b = masked(net(0), seed=0), masked(net(0), seed=1)
    with pytest.raises(ValueError, match=r"mask of '0\.weight'"):
        linear_mode_connectivity(a, b, loader())
    assert len(linear_mode_connectivity(a, b, loader(), allow_different_masks=True).values) == 11
    permanent = plain_copy(a)
    assert linear_mode_connectivity(a, permanent, loader()).lmc == 0
    assert linear_mode_connectivity(permanent, a, loader()).lmc == 0
    for first, second in ((a, net(0)), (net(0), a)):
        with pytest.raises(ValueError, match="mask"):
            linear_mode_connectivity(first, second, loader())


def test_different_architectures_are_refused():
    with pytest.raises(ValueError, match=r"no '1\.weight'"):
        linear_mode_connectivity(net(), net(norm=False), loader())
    wide = net()
    wide[6] = nn.Linear(32, 4)
    with pytest.raises(ValueError, match=r"'6\.weight' has shapes \(3, 32\) and \(4, 32\)"):
        linear_mode_connectivity(net(), wide, loader())


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"points": 1}, "points"), ({"points": 2.5}, "points"), ({"metric": "acc"}, "metric"), ({"bn": "no"}, "bn")],
)
def test_wrong_arguments_of_connectivity(wrong, match):
    with pytest.raises(ValueError, match=match):
        linear_mode_connectivity(net(), net(), loader(), **wrong)


def test_loaders_that_run_dry():
    with pytest.raises(ValueError, match="no batch"):
        linear_mode_connectivity(net(), net(), [])
    with pytest.raises(ValueError, match="anew at each pass"):
        linear_mode_connectivity(net(), net(), iter(list(loader())))
    with pytest.raises(ValueError, match="tensors"):
        linear_mode_connectivity(net(), net(), [{"x": 1}])


def test_one_score_is_no_classifier():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 1))
    with pytest.raises(ValueError, match="K >= 2"):
        linear_mode_connectivity(model, model, loader())


def test_shuffling_is_the_same_for_all_points(pair):
    torch.manual_seed(5)
    found = linear_mode_connectivity(pair[0], pair[0], loader(shuffle=True), metric="loss")
    assert (found.values == found.values[0]).all()


def test_dense_predictions_count_every_pixel():
    torch.manual_seed(0)
    model = nn.Conv2d(1, 3, 1)
    x, y = torch.randn(4, 1, 5, 5), torch.randint(3, (4, 5, 5))
    found = linear_mode_connectivity(model, model, [(x, y)])
    assert found.values[0] == pytest.approx(float((model(x).argmax(1) != y).double().mean()))


class Reading(nn.Module):
    """A convolution whose features are read in one of several ways; keeps whether they had their channels last."""

    layouts: ClassVar[list[bool]] = []

    def __init__(self, read, features):
        super().__init__()
        self.conv, self.head, self.read = nn.Conv2d(1, 8, 3), nn.Linear(features, 3), read

    def forward(self, x):
        h = self.conv(x)
        self.layouts.append(not h.is_contiguous())
        return F.log_softmax(self.head(self.read(h)), dim=1)


@pytest.mark.parametrize(
    ("read", "features", "last"),
    [
        (lambda h: h.flatten(1), 128, True),
        (lambda h: h.view(len(h), -1), 128, False),  # fails with channels last
        (lambda h: h.view(len(h) * 8, 1, 4, 4).reshape(-1, 128), 128, False),  # the same, but not for one sample
        (lambda h: F.adaptive_avg_pool2d(h, 1).squeeze(), 8, True),  # fails for one sample
    ],
)
def test_features_have_their_channels_last_where_the_network_can_read_them(read, features, last):
    torch.manual_seed(0)
    a, b = fit(Reading(read, features)), fit(Reading(read, features))
    Reading.layouts.clear()
    found = linear_mode_connectivity(a, b, loader())
    assert set(Reading.layouts[-11:]) == {last}
    assert (found.values[0], found.values[-1]) == (error(a), error(b))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, tie=True):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(36, 36), nn.Linear(36, 36), nn.Linear(36, 3)
        if tie:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))


def test_a_weight_that_layers_share_is_moved_once():
    torch.manual_seed(0)
    a, b = Tied(), Tied()
    for k in range(5):
        net = _between(a, b, k, 4)
        assert net.first.weight is net.second.weight
        torch.testing.assert_close(net.first.weight, (1 - k / 4) * a.first.weight + k / 4 * b.first.weight)
    x, y = images()
    middle = copy.deepcopy(a)
    with torch.no_grad():
        for p, q in zip(middle.parameters(), b.parameters(), strict=True):
            p.copy_((p + q) / 2)
        loss = float(F.cross_entropy(middle(x), y))
    found = linear_mode_connectivity(a, b, loader(), points=3, metric="loss")
    assert found.values[1] == pytest.approx(loss, abs=1e-6)
    with pytest.raises(ValueError, match=r"'second\.weight' is shared with 'first\.weight' in the first"):
        linear_mode_connectivity(a, Tied(tie=False), loader())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("metric", ["error", "loss"])
def test_a_network_that_diverged_is_named(pair, metric, value):
    a, broken = pair[0], copy.deepcopy(pair[0])
    nn.init.constant_(broken[6].bias, value)
    with pytest.raises(ValueError, match="outputs of the first model are not finite"):
        linear_mode_connectivity(broken, a, loader(), metric=metric)
    with pytest.raises(ValueError, match="outputs of the second model are not finite"):
        linear_mode_connectivity(a, broken, loader(), metric=metric)
    with pytest.raises(ValueError, match="not finite"):
        measure_regime([a, broken], loader())


class Gap(nn.Module):
    """Scores (x, -x), except that they are NaN for weights around 0."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x):
        return torch.stack([x, -x], 1) + torch.where(self.w.abs() < 0.5, math.nan, 0.0)


def test_what_is_not_finite_between_the_ends_is_missed():
    batch = [(torch.tensor([1.0, 2.0, -1.0, 3.0]), torch.zeros(4, dtype=torch.long))]
    found = linear_mode_connectivity(Gap(-1.0), Gap(1.0), batch, points=3)
    assert list(found.values) == [0.25, 1.0, 0.25]
    assert (found.lmc, found.barrier) == (-0.75, 0.75)
    found = linear_mode_connectivity(Gap(-1.0), Gap(1.0), batch, points=3, metric="loss")
    assert found.values[1] == math.inf
    assert np.isfinite(found.values[[0, 2]]).all()
    assert (found.lmc, found.barrier) == (-math.inf, math.inf)


def test_a_class_may_be_excluded_by_minus_infinity(pair):
    class Excluding(nn.Sequential):
        def forward(self, x):
            return super().forward(x).index_fill(1, torch.tensor([2]), -math.inf)

    x, y = images()
    a, b = (Excluding(*copy.deepcopy(m)) for m in pair)
    kept = TensorDataset(x[y < 2], y[y < 2])
    assert np.isfinite(linear_mode_connectivity(a, b, DataLoader(kept, 32), metric="loss").values).all()
    assert (linear_mode_connectivity(a, b, loader()).values < 1).all()
    with pytest.raises(ValueError, match="first model are not finite"):  # the loss of a target that is excluded
        linear_mode_connectivity(a, b, loader(), metric="loss")


def test_ignored_targets_are_left_out():
    torch.manual_seed(0)
    model = nn.Conv2d(1, 3, 1)
    x, y = torch.randn(4, 1, 5, 5), torch.randint(3, (4, 5, 5))
    y[:, :2] = -100
    y[3] = -100
    x[3] = math.nan  # what is said of it does not count either
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    loss = linear_mode_connectivity(model, model, batches, metric="loss").values
    assert loss[0] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)
    missed = (model(x).argmax(1) != y)[y != -100]
    assert linear_mode_connectivity(model, model, batches).values[0] == pytest.approx(float(missed.double().mean()))
    with pytest.raises(ValueError, match="all are -100"):
        linear_mode_connectivity(model, model, [(x, torch.full_like(y, -100))])


def test_models_are_left_alone():
    a = fit(masked(net(0)))
    b = fit(copy_model(a), seed=2)
    a.train()
    b.eval()
    state = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    grads = [[None if p.grad is None else p.grad.clone() for p in m.parameters()] for m in (a, b)]
    random = torch.random.get_rng_state()
    linear_mode_connectivity(a, b, loader())
    output_cka(a, b, loader())
    output_cka(a, b, loader(), on="0")
    measure_regime([a, b], loader())
    assert torch.equal(random, torch.random.get_rng_state())
    assert (a.training, b.training) == (True, False)
    assert all(p.requires_grad for m in (a, b) for p in m.parameters())
    for m, before, its in zip((a, b), state, grads, strict=True):
        assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
        assert not any(m[0]._forward_hooks)
        for p, g in zip(m.parameters(), its, strict=True):
            assert (p.grad is None and g is None) or torch.equal(p.grad, g)
    assert a[0].weight.requires_grad  # the masked weight is still the product that training made


# ---- similarity


def gram_cka(X, Y, debiased):
    """From the definition: HSIC of the Gram matrices."""
    K, L = X @ X.T, Y @ Y.T
    n = len(K)
    if not debiased:
        H = torch.eye(n, dtype=K.dtype) - 1 / n
        hsic = lambda A, B: torch.trace(A @ H @ B @ H)  # noqa: E731
    else:

        def hsic(A, B):  # Song et al. 2012, eq. (5)
            A, B = A - A.diag().diag(), B - B.diag().diag()
            return torch.trace(A @ B) + A.sum() * B.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (A @ B).sum()

    return float(hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt())


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(("n", "p", "q"), [(40, 5, 3), (12, 50, 40), (20, 60, 4), (6, 2, 90)])
@pytest.mark.parametrize("chunk", [2**24, 64])
def test_cka_from_features_is_cka_from_samples(monkeypatch, debiased, n, p, q, chunk):
    monkeypatch.setattr(similarity, "CHUNK", chunk)
    torch.manual_seed(0)
    X = torch.randn(n, p, dtype=torch.float64)
    Y = torch.randn(n, q, dtype=torch.float64) + X[:, :1] + 3
    assert linear_cka(X, Y, debiased=debiased) == pytest.approx(gram_cka(X, Y, debiased), abs=1e-10)
    assert linear_cka(X, Y, debiased=debiased) == pytest.approx(linear_cka(Y, X, debiased=debiased), abs=1e-12)


@given(seed=st.integers(0, 1000), p=st.integers(1, 30), scale=st.floats(1e-12, 1e12), shift=st.floats(-10, 10))
@settings(max_examples=40, deadline=None)
def test_cka_of_a_rotated_scaled_and_shifted_copy_is_one(seed, p, scale, shift):
    torch.manual_seed(seed)
    X = torch.randn(20, p, dtype=torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(p, p, dtype=torch.float64))
    assert linear_cka(X, scale * (X @ Q + shift)) == pytest.approx(1, abs=1e-9)
    assert linear_cka(X, scale * (X @ Q + shift), debiased=True) == pytest.approx(1, abs=1e-6)
    Z = torch.randn(20, 4, dtype=torch.float64)
    value = linear_cka(X, Z)
    assert 0 <= value <= 1
    assert linear_cka(scale * (X @ Q + shift), Z) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_cka_in_low_precision(dtype, scale):
    torch.manual_seed(0)
    X, Y = (torch.randn(64, 8) * scale).to(dtype), torch.randn(64, 8).to(dtype)
    assert linear_cka(X, Y) == pytest.approx(gram_cka(X.double() / scale, Y.double(), False), abs=1e-5)


def test_cka_neither_over_nor_underflows():
    torch.manual_seed(0)
    X = torch.randn(30, 5)
    assert linear_cka(X, X * 1e-25) == pytest.approx(1, abs=1e-5)
    assert linear_cka(X * 1e25, X) == pytest.approx(1, abs=1e-5)


def test_debiased_cka_of_independent_data_is_about_zero():
    plain, debiased = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        X, Y = torch.randn(30, 20), torch.randn(30, 25)
        plain.append(linear_cka(X, Y))
        debiased.append(linear_cka(X, Y, debiased=True))
    assert np.mean(plain) > 0.3
    assert abs(np.mean(debiased)) < 0.02
    assert min(debiased) < 0


def test_cka_flattens_features():
    torch.manual_seed(0)
    X, Y = torch.randn(10, 2, 3, 4), torch.randn(10)
    assert linear_cka(X, Y) == pytest.approx(linear_cka(X.flatten(1), Y[:, None]))


@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("debiased", [False, True])
def test_cka_of_many_samples_far_from_zero(offset, debiased):
    torch.manual_seed(0)
    X = torch.randn(200_000, 3) + offset
    Y = (X - offset) @ torch.randn(3, 4) + torch.randn(200_000, 4)
    a, b = (Z.double() - Z.double().mean(0) for Z in (X, Y))
    expected = float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))
    assert linear_cka(X, Y, debiased=debiased) == pytest.approx(expected, abs=1e-4 if debiased else 1e-10)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("debiased", [False, True])
def test_cka_of_what_is_not_finite_is_not_defined(value, debiased):
    torch.manual_seed(0)
    X, Y = torch.randn(20, 3), torch.randn(20, 2)
    Y[4, 1] = value
    with pytest.warns(UserWarning, match="Y holds values that are not finite"):
        assert math.isnan(linear_cka(X, Y, debiased=debiased))
    with pytest.warns(UserWarning, match="X holds values that are not finite"):
        assert math.isnan(linear_cka(Y, X, debiased=debiased))


#: The same but for the last bit of float32.
ROUNDED = torch.tensor([0.1, 0.1 + 2**-27]).repeat(25)[:, None].expand(50, 3)


@pytest.mark.parametrize("constant", [torch.full((50, 3), 0.1), torch.zeros(50, 3), torch.eye(3)[0].expand(50, 3), ROUNDED])
@pytest.mark.parametrize("debiased", [False, True])
def test_constant_outputs_are_not_similar_to_anything(constant, debiased):
    X = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="Y is the same for all samples"):
        assert math.isnan(linear_cka(X, constant, debiased=debiased))
    with pytest.warns(UserWarning, match="X is the same"):
        assert math.isnan(linear_cka(constant, X, debiased=debiased))


def test_small_variation_is_not_constant():
    X = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert linear_cka(X, 1e-9 * X + 1) == pytest.approx(1, abs=1e-6)


def test_errors_of_cka():
    with pytest.raises(ValueError, match="same samples"):
        linear_cka(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="4 samples"):
        linear_cka(torch.ones(3, 2), torch.ones(3, 2), debiased=True)
    with pytest.raises(ValueError, match="1 samples"):
        linear_cka(torch.ones(0, 2), torch.ones(0, 2))


def test_output_cka_is_that_of_all_outputs(pair):
    a, b = pair
    x, _ = images()
    with torch.no_grad():
        outputs = [copy.deepcopy(m).eval()(x) for m in pair]
        features = [copy.deepcopy(m).eval()[:3](x) for m in pair]
    for on, expected in (("logits", outputs), ("softmax", [o.softmax(1) for o in outputs]), ("2", features)):
        assert output_cka(a, b, loader(shuffle=on == "logits"), on=on) == pytest.approx(linear_cka(*expected), abs=1e-5)
    assert output_cka(a, a, loader()) == pytest.approx(1)
    assert output_cka(a, b, loader()) < 0.999


def test_errors_of_output_cka(pair):
    with pytest.raises(ValueError, match=r"module in on=.*accepted: .*softmax"):
        output_cka(*pair, loader(), on="7")
    twice = nn.Sequential(nn.Flatten(), nn.Linear(36, 36))
    twice.append(twice[1])
    with pytest.raises(ValueError, match="ran 2 times"):
        output_cka(twice, twice, loader(), on="1")
    with pytest.raises(ValueError, match="no batch"):
        output_cka(*pair, [])


def test_a_collapsed_network_has_no_similarity(pair):
    dead = copy.deepcopy(pair[0])
    nn.init.zeros_(dead[6].weight)
    with pytest.warns(UserWarning, match="same for all samples"):
        assert math.isnan(output_cka(pair[0], dead, loader()))


# ---- regimes


def test_the_regimes():
    assert classify_regime(-0.5, 0.9) == "I"
    assert classify_regime(-0.5, 1.0) == "I"
    assert classify_regime(-0.01, 0.9) == "II-A"
    assert classify_regime(0.0, 0.99) == "II-B"
    assert classify_regime(0.3, 0.99) == "II-B"
    assert classify_regime(-0.05, 0.98) == "II-B"  # ties count as connected and as similar
    assert classify_regime(-0.1, 0.9, lmc_tol=0.1, cka_tol=0.9) == "II-B"
    assert "raise" in classify_regime(-0.5, 0.9).advice
    assert "lower" in classify_regime(0.0, 0.9).advice
    assert "keep" in classify_regime(0.0, 1.0).advice
    assert [classify_regime(*at).direction for at in ((-0.5, 0.9), (0.0, 0.9), (0.0, 1.0))] == [1, -1, 0]
    assert f"{classify_regime(0.0, 0.5)}" == "II-A"
    with pytest.raises(ValueError, match="lmc_tol"):
        classify_regime(0.0, 1.0, lmc_tol=-0.1)


FLOAT = st.floats(allow_nan=True, allow_infinity=True)


@given(lmc=FLOAT, cka=FLOAT, more_lmc=FLOAT, more_cka=FLOAT)
def test_regimes_are_total_and_monotone(lmc, cka, more_lmc, more_cka):
    order = ["I", "II-A", "II-B"]
    here = order.index(classify_regime(lmc, cka))
    if more_lmc >= lmc and more_cka >= cka:
        assert order.index(classify_regime(more_lmc, more_cka)) >= here
    assert classify_regime(math.nan, cka) == "I"
    assert classify_regime(0.0, math.nan) == "II-A"


def test_the_report_of_retrainings(pair):
    a, b = pair
    c = fit(net(2), seed=2)
    report = measure_regime([a, b, c], loader())
    pairs = [(a, b), (a, c), (b, c)]
    lines = [linear_mode_connectivity(*p, loader()) for p in pairs]
    assert report.lmcs == tuple(line.lmc for line in lines)
    assert report.ckas == tuple(output_cka(*p, loader()) for p in pairs)
    assert report.lmc == pytest.approx(np.mean(report.lmcs))
    assert report.train_errors[0] == pytest.approx((lines[0].values[0] + lines[0].values[-1]) / 2)
    assert report.tolerance == max(0.05, 2 * np.std(report.lmcs, ddof=1) / math.sqrt(3))
    assert report.regime == classify_regime(report.lmc, report.cka, lmc_tol=report.tolerance)
    assert report.regime.advice in str(report)
    assert measure_regime([a, a], loader()).regime == "II-B"
    with pytest.raises(ValueError, match="two retrainings"):
        measure_regime([a], loader())


def study(calls, **more):
    def train_fn(model, temperature, seed):
        calls.append((temperature, seed, {n: m.clone() for n, m in masks_of(model).items()}))
        fit(model, seed=seed, epochs=temperature or 1)

    return ThreeRegimeStudy(net, train_fn, (0.2, 0.6), (1, 3), (0, 1), **more)


def test_the_study_runs_the_grid():
    calls = []
    result = study(calls).run(loader(), loader())
    assert [c[:2] for c in calls[:5]] == [(1, 0)] + [(None, retraining_seed(0, r)) for r in (0, 1)] * 2
    assert len(calls) == 2 * 2 * (1 + 2 * 2)
    assert list(result.table["seed"]) == [0] * 4 + [1] * 4
    for _, seed, masks in calls:
        if seed >= 1000:
            assert masks["0.weight"].sum() in (round(0.2 * 72), round(0.6 * 72))
            assert set(masks) == {"0.weight"}  # convolutions alone
    first, second = (c[2]["0.weight"] for c in calls[1:3])
    assert torch.equal(first, second)
    maps = result.heatmaps
    assert set(maps) == {"test_error", "lmc", "cka"}
    row = result.table[(result.table.temperature == 3) & (result.table.density == 0.2)]
    assert len(row) == 2
    for name, values in maps.items():
        assert values.shape == (2, 2)
        assert values[1, 0] == pytest.approx(row[name].mean())
    report = result.report(3, 0.2)
    assert len(report.lmcs) == 2  # one pair of each seed
    assert report.lmc == pytest.approx(maps["lmc"][1, 0])
    assert result.regimes[1, 0] == report.regime
    assert len(result.figure().data) == 3
    assert result.table["test_error"].between(0, 1).all()


def test_the_study_stops_one_training_early_and_takes_any_pruner():
    from weightroom.prune import RandomPruner

    stopped = []

    def dense_fn(model, temperatures, seed):
        for epochs in temperatures:
            stopped.append((epochs, seed))
            yield fit(model, seed=seed, epochs=epochs)

    calls = []
    result = study(calls, dense_fn=dense_fn, retrainings=3, pruner=lambda sparsity: RandomPruner(sparsity)).run(
        loader(), loader()
    )
    assert stopped == [(1, 0), (3, 0), (1, 1), (3, 1)]
    assert all(temperature is None for temperature, *_ in calls)
    assert set(calls[0][2]) == {"0.weight", "6.weight"}
    assert sum(int(m.sum()) for m in calls[0][2].values()) == round(0.2 * (72 + 96))
    assert len(result.report(1, 0.6).lmcs) == 2 * 3


def test_the_test_error_counts_what_is_not_finite_and_leaves_out_what_is_ignored(pair):
    x, y = images()
    assert _error(pair[0], loader()) == error(pair[0])
    diverged = copy.deepcopy(pair[0])
    nn.init.constant_(diverged[6].bias, math.nan)
    assert _error(diverged, loader()) == 1
    assert _error(pair[0], [(torch.cat([x, x]), torch.cat([y, torch.full_like(y, -100)]))]) == error(pair[0])


def test_uniform_pruning_keeps_the_largest_of_every_layer():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    prune_uniformly(model, 0.25)
    for layer in (model[0], model[2]):
        kept = layer.weight_mask.bool()
        assert kept.sum() == 0.25 * kept.numel()
        assert layer.weight_orig[kept].abs().min() >= layer.weight_orig[~kept].abs().max()
    with pytest.raises(ValueError, match="give a pruner"):
        prune_uniformly(nn.ReLU(), 0.5)


def test_uniform_pruning_leaves_every_layer_a_weight():
    model = nn.Conv2d(1, 2, 3)
    largest = model.weight.detach().abs().argmax()
    prune_uniformly(model, 0.02)
    assert model.weight_mask.flatten().nonzero().flatten().tolist() == [largest]


@pytest.mark.parametrize(("before", "density"), [(0.9, 0.8), (0.5, 0.4), (0.5, 0.5), (0.5, 0.001)])
def test_uniform_pruning_counts_what_is_masked_already(before, density):
    model = nn.Linear(10, 10)
    torch_prune.random_unstructured(model, "weight", 1 - before)
    first = model.weight_mask.bool()
    prune_uniformly(model, density)
    kept = model.weight_mask.bool()
    assert kept.sum() == max(1, round(100 * density))
    assert not (kept & ~first).any()
    if kept.sum() < first.sum():
        assert model.weight_orig[kept].abs().min() >= model.weight_orig[first & ~kept].abs().max()


def test_uniform_pruning_does_not_bring_weights_back():
    model = nn.Linear(10, 10)
    prune_uniformly(model, 0.5)
    with pytest.raises(ValueError, match=r"density 0\.6 is 60 of the 100 weights of a layer, but masks leave only 50"):
        prune_uniformly(model, 0.6)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"densities": (0.0, 0.5)}, "density"),
        ({"densities": (0.5, 1.5)}, "density"),
        ({"densities": ()}, "densities"),
        ({"temperatures": (1, 1)}, "temperatures"),
        ({"seeds": ()}, "seeds"),
        ({"retrainings": 1}, "retrainings"),
    ],
)
def test_errors_of_the_study(wrong, match):
    with pytest.raises(ValueError, match=match):
        ThreeRegimeStudy(
            **{"make_model": net, "train_fn": fit, "densities": (0.5,), "temperatures": (1,), "seeds": (0,), **wrong}
        )
