from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.kernel_ridge import KernelRidge
from torch import nn
from torch.utils.data import TensorDataset

from weightroom import kernels, train
from weightroom.distill import SelfDistiller, optimal_alpha, softmax_mse, sum_of_norms
from weightroom.kernels import SelfDistilledKernelRidge

GAMMA, LAM = 20, 0.1


def noisy_sine(n, seed):
    rng = np.random.default_rng(seed)
    X = rng.random((n, 1))
    return X, np.sin(2 * np.pi * X[:, 0]) + 0.5 * rng.standard_normal(n)


def ridge():
    return KernelRidge(kernel="rbf", gamma=GAMMA, alpha=LAM)


def fit_ridge(model, X, targets):
    return model.fit(X, targets)


DATA, HELD = noisy_sine(30, 0), noisy_sine(20, 1)
GRID = np.linspace(0, 1, 50)[:, None]


# ---- where predictions are affine in alpha, it is the closed form


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_with_kernel_ridge_it_is_the_closed_form(steps):
    ours = SelfDistiller(ridge, fit_ridge, alpha=0.35, steps=steps, output="identity").fit(*DATA)
    exact = SelfDistilledKernelRidge(gamma=GAMMA, lam=LAM, alpha=0.35, steps=steps).fit(*DATA)
    assert len(ours.models_) == ours.n_trainings_ == steps
    assert ours.alphas_ == ours.raw_alphas_ == list(exact.alphas_)
    for step, model in enumerate(ours.models_, 1):
        np.testing.assert_allclose(model.predict(GRID), exact.predict(GRID, step), rtol=0, atol=1e-10)
    np.testing.assert_array_equal(ours.predict(GRID), ours.models_[-1].predict(GRID))


@pytest.mark.parametrize("clip", [True, False])
def test_with_kernel_ridge_the_estimate_is_the_optimum(clip):
    ours = SelfDistiller(ridge, fit_ridge, alpha="estimate", steps=3, output="identity", clip_alpha=clip).fit(*DATA, *HELD)
    exact = SelfDistilledKernelRidge(gamma=GAMMA, lam=LAM, alpha="validate", steps=3, clip_alpha=clip).fit(*DATA, *HELD)
    np.testing.assert_allclose(ours.raw_alphas_, exact.raw_alphas_, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.alphas_, exact.alphas_, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.predict(GRID), exact.predict(GRID), rtol=0, atol=1e-9)
    assert ours.n_trainings_ == 1 + 2 * 2
    assert len(ours.models_) == 3
    if clip:
        assert ours.raw_alphas_[1] != ours.alphas_[1]  # so that the two arms of this test differ


def test_a_grid_takes_the_value_with_the_least_validation_error():
    grid = [0.0, 0.25, 0.5, 0.75, 1.0]
    ours = SelfDistiller(ridge, fit_ridge, alpha=grid, steps=3, output="identity").fit(*DATA, *HELD)
    assert ours.n_trainings_ == 1 + 2 * 5
    best = [1.0]
    for _ in range(2):

        def error(alpha, best=tuple(best)):
            alphas = [*best, alpha]
            model = SelfDistilledKernelRidge(gamma=GAMMA, lam=LAM, alpha=alphas, steps=len(alphas)).fit(*DATA)
            return ((model.predict(HELD[0]) - HELD[1]) ** 2).mean()

        best.append(min(grid, key=error))
    assert ours.alphas_ == ours.raw_alphas_ == best
    as_array = SelfDistiller(ridge, fit_ridge, alpha=np.array(grid), steps=3, output="identity").fit(*DATA, *HELD)
    assert as_array.alphas_ == best


def test_alpha_outside_on_request():
    with pytest.raises(ValueError, match="alpha must be >= 0 and <= 1"):
        SelfDistiller(ridge, fit_ridge, alpha=-0.5)
    ours = SelfDistiller(ridge, fit_ridge, alpha=-0.5, output="identity", allow_outside=True).fit(*DATA)
    exact = SelfDistilledKernelRidge(gamma=GAMMA, lam=LAM, alpha=-0.5, steps=2, allow_outside=True).fit(*DATA)
    np.testing.assert_allclose(ours.predict(GRID), exact.predict(GRID), rtol=0, atol=1e-9)


# ---- networks


def blobs(n, seed, classes=3):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    return torch.randn(n, 4, generator=generator) + 2 * F.one_hot(y, 4), y


def maker():
    numbers = itertools.count()

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(next(numbers))
            return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))

    return make


def fit_network(model, X, targets):
    train.fit(
        model, TensorDataset(X, targets), loss=softmax_mse, optimizer=lambda p: torch.optim.Adam(p, 1e-2), epochs=3, batch_size=16
    )  # fmt: skip
    return model


@pytest.mark.parametrize("alpha, trainings", [(0.3, 2), ("estimate", 3), ([0.0, 1.0], 3)])
def test_networks(alpha, trainings):
    X, y = blobs(60, 0)
    X_val, y_val = blobs(30, 1)
    seen = []

    def fit_fn(model, X, targets):
        seen.append(targets)
        return fit_network(model, X, targets)

    before, state = (X.clone(), y.clone()), torch.random.get_rng_state()
    ours = SelfDistiller(maker(), fit_fn, alpha=alpha).fit(X, y, X_val, y_val)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(X, before[0])
    assert torch.equal(y, before[1])
    assert ours.n_trainings_ == len(seen) == trainings
    assert torch.equal(seen[0], F.one_hot(y, 3).float())
    teacher = ours.models_[0]
    assert teacher.training  # asked in eval mode, and left as fit_fn left it
    assert all(p.requires_grad for p in teacher.parameters())
    teacher.eval()
    with torch.no_grad():
        soft = teacher(X).softmax(1)
    weights = {"estimate": [0.0, ours.alphas_[1]], "0.3": [0.3]}.get(str(alpha), alpha)
    for targets, weight in zip(seen[1:], weights, strict=True):
        torch.testing.assert_close(targets, weight * F.one_hot(y, 3) + (1 - weight) * soft)
        assert not targets.requires_grad
    assert len({id(m) for m in ours.models_}) == 2
    p = ours.predict(X_val)
    torch.testing.assert_close(p.sum(1), torch.ones(30))
    again = SelfDistiller(maker(), fit_network, alpha=alpha).fit(X, y, X_val, y_val)
    assert torch.equal(again.predict(X_val), p)
    assert again.alphas_ == ours.alphas_


def test_the_estimate_is_the_formula_on_the_networks_outputs():
    X, y = blobs(60, 0)
    X_val, y_val = blobs(30, 1)
    ours = SelfDistiller(maker(), fit_network, alpha="estimate", clip_alpha=False).fit(X, y, X_val, y_val)
    make = maker()
    first = fit_network(make(), X, F.one_hot(y, 3).float()).eval()
    distilled = fit_network(make(), X, first(X).softmax(1).detach()).eval()
    with torch.no_grad():
        expected = optimal_alpha(first(X_val).softmax(1), distilled(X_val).softmax(1), F.one_hot(y_val, 3).float(), clip=False)
    assert ours.raw_alphas_[1] == pytest.approx(float(expected), rel=1e-4)
    assert ours.alphas_ == ours.raw_alphas_


def test_batches_of_predictions_change_nothing():
    X, y = blobs(50, 0)
    one = SelfDistiller(maker(), fit_network, alpha=0.3).fit(X, y)
    small = SelfDistiller(maker(), fit_network, alpha=0.3, batch_size=7).fit(X, y)
    torch.testing.assert_close(one.predict(X), small.predict(X), rtol=0, atol=5e-3)  # training amplifies rounding


def test_classes_may_be_missing_in_training_and_probabilities_are_taken():
    X, y = blobs(60, 0)
    X_val, y_val = blobs(30, 1)
    few = y < 2
    ours = SelfDistiller(maker(), fit_network, alpha="estimate").fit(X[few], y[few], X_val, y_val)
    assert ours.predict(X_val).shape == (30, 3)
    soft = SelfDistiller(maker(), fit_network, alpha=0.3).fit(X, F.one_hot(y, 3).float())
    assert torch.equal(soft.predict(X), SelfDistiller(maker(), fit_network, alpha=0.3).fit(X, y).predict(X))
    with pytest.raises(ValueError, match=r"outputs must have the shape of the targets, \(3, 2\), got \(3, 3\)"):
        SelfDistiller(maker(), lambda model, X, t: model, alpha=0.3).fit(X[:3], torch.tensor([0, 1, 1]))


def test_models_that_are_no_networks_may_have_logits():
    class Logits:
        def predict(self, X):
            return np.stack([X, -X], 1)

    ours = SelfDistiller(Logits, lambda model, X, t: model, alpha=0.3).fit(np.arange(4.0), np.array([0, 1, 0, 1]))
    np.testing.assert_allclose(ours.predict(np.array([1.0])), torch.tensor([[1.0, -1.0]]).softmax(1), rtol=1e-6)


# ---- the loss


def test_softmax_mse_has_the_gradient_of_the_two_terms():
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (8,), generator=generator)
    z.requires_grad_()
    t.requires_grad_()
    one_hot = F.one_hot(y, 5).double()
    for alpha in (0.0, 0.3, 1.0):
        ours = softmax_mse(z, y, t, alpha)
        theirs = alpha * F.mse_loss(z.softmax(1), one_hot) + (1 - alpha) * F.mse_loss(z.softmax(1), t.detach().softmax(1))
        a, b = torch.autograd.grad(ours, z)[0], torch.autograd.grad(theirs, z)[0]
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        constant = alpha * (1 - alpha) * F.mse_loss(one_hot, t.detach().softmax(1))
        torch.testing.assert_close(ours + constant, theirs, rtol=1e-12, atol=0)
        torch.testing.assert_close(softmax_mse(z, one_hot, t, alpha), ours)
    assert torch.autograd.grad(softmax_mse(z, y, t, 0.5), t, allow_unused=True)[0] is None
    torch.testing.assert_close(softmax_mse(z, y), F.mse_loss(z.softmax(1), one_hot))
    assert softmax_mse(z.half(), y, t.half()).dtype == torch.float32


@pytest.mark.parametrize(
    "args, error, match",
    [
        ((torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), None, 1.5), ValueError, "alpha must be >= 0 and <= 1"),
        ((torch.zeros(4, 3), torch.zeros(4, 2)), ValueError, r"target must have shape \(4,\) or \(4, 3\)"),
        ((torch.zeros(4, 3), torch.zeros(5, dtype=torch.long)), ValueError, "target must have shape"),
        ((torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(4, 2)), ValueError, r"teacher_logits must have shape \(4, 3\)"),
        ((torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, 3)), TypeError, "logits must be a floating tensor"),
    ],
)
def test_softmax_mse_refuses(args, error, match):
    with pytest.raises(error, match=match):
        softmax_mse(*args)


def test_sum_of_norms_is_not_squared_and_leaves_zeros_alone():
    a, b = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.zeros(2, 2))
    frozen = nn.Parameter(torch.ones(7), requires_grad=False)
    value = sum_of_norms(iter([a, b, frozen]))
    assert value.item() == 5.0
    value.backward()
    torch.testing.assert_close(a.grad, torch.tensor([0.6, 0.8]))
    assert torch.equal(b.grad, torch.zeros(2, 2))
    assert sum_of_norms([frozen]).item() == 0.0


# ---- what is refused


@pytest.mark.parametrize(
    "args, error, match",
    [
        ({"make_model": 3}, TypeError, "make_model must be callable"),
        ({"fit_fn": None}, TypeError, "fit_fn must be callable"),
        ({"steps": 0}, ValueError, "steps must be an integer >= 1"),
        ({"steps": 1.5}, ValueError, "steps must be an integer >= 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1"),
        ({"output": "sigmoid"}, ValueError, "unknown output 'sigmoid'"),
        ({"alpha": "estimat"}, ValueError, "unknown alpha 'estimat': did you mean 'estimate'"),
        ({"alpha": 1.5}, ValueError, "alpha must be >= 0 and <= 1"),
        ({"alpha": [0.5, -1.0]}, ValueError, "alpha must be >= 0 and <= 1"),
        ({"alpha": []}, ValueError, "at least one value"),
        ({"alpha": None}, TypeError, "alpha must be a number, 'estimate' or a sequence"),
        ({"alpha": float("inf"), "allow_outside": True}, ValueError, "alpha must be"),
    ],
)
def test_arguments_that_are_refused(args, error, match):
    with pytest.raises(error, match=match):
        SelfDistiller(**{"make_model": ridge, "fit_fn": fit_ridge, **args})


@pytest.mark.parametrize(
    "alpha, data, match",
    [
        ("estimate", (*DATA,), "needs validation data"),
        ([0.0, 1.0], (*DATA,), "needs validation data"),
        ("estimate", (*DATA, HELD[0], None), "X_val and y_val together"),
        ("estimate", (*DATA, HELD[0][:0], HELD[1][:0]), "validation data are empty"),
        (0.5, (DATA[0][:0], DATA[1][:0]), "training data are empty"),
        ("estimate", (*DATA, HELD[0][:3], HELD[1][:2]), "validation data have 3 inputs but 2 targets"),
        (0.5, (DATA[0], DATA[1][:2]), "training data have 30 inputs but 2 targets"),
        ([0.0, 1.0], (*DATA, HELD[0], HELD[1][:, None]), r"must be alike, got shapes \(30,\) and \(20, 1\)"),
    ],
)
def test_data_that_are_refused(alpha, data, match):
    with pytest.raises(ValueError, match=match):
        SelfDistiller(ridge, fit_ridge, alpha=alpha, output="identity").fit(*data)


@pytest.mark.parametrize("y", [torch.rand(60), torch.full((60,), -1), torch.zeros(60, 3, 2)])
def test_labels_that_are_no_classes_are_refused(y):
    with pytest.raises(ValueError, match="y must hold classes"):
        SelfDistiller(maker(), fit_network).fit(blobs(60, 0)[0], y)


def test_a_fit_function_that_returns_nothing_is_refused():
    with pytest.raises(TypeError, match="fit_fn must return the trained model, got NoneType"):
        SelfDistiller(maker(), lambda model, X, targets: None).fit(*blobs(10, 0))
    with pytest.raises(RuntimeError, match="not fitted"):
        SelfDistiller(maker(), fit_network).predict(torch.zeros(1, 4))


def test_there_is_one_optimal_alpha():
    assert optimal_alpha is kernels.optimal_alpha
