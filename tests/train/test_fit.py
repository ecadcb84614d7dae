import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from weightroom.errors import UsageError
from weightroom.train import Batches, DivergedError, fit


def data(n=50):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g)
    return TensorDataset(x, x @ torch.tensor([[1.0], [2.0], [-1.0], [0.5]]))


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))


def sgd(params):
    return torch.optim.SGD(params, lr=0.05)


def test_it_is_the_plain_loop():
    ours, theirs = model(), model()
    done = fit(ours, data(), loss=nn.MSELoss(), optimizer=sgd, epochs=3, batch_size=16, seed=5)
    theirs.train()
    optimizer = sgd(theirs.parameters())
    batches = Batches(data(), 16, seed=5)
    torch.manual_seed(5)
    for _ in range(3):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.mse_loss(theirs(x), y).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (done.steps, done.forwards, done.backwards, len(done.losses)) == (12, 12, 12, 3)
    assert done.losses[-1] < done.losses[0]


def test_the_same_seed_gives_the_same_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    runs = []
    for seed in (1, 1, 2):
        m = model()
        torch.set_rng_state(before)
        fit(m, data(), loss=nn.MSELoss(), optimizer=sgd, steps=5, batch_size=16, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(m[0].weight)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_steps_go_over_epochs_and_stop_exactly():
    seen = []
    done = fit(model(), data(), loss=nn.MSELoss(), optimizer=sgd, steps=7, batch_size=16, after_step=seen.append)
    assert seen == list(range(1, 8))
    assert (done.steps, len(done.losses)) == (7, 2)


def test_a_method_may_take_its_own_step():
    calls = []

    def step(m, batch):
        x, y = batch
        calls.append(len(x))
        return (m(x) - y).abs().mean() + 1e-3 * sum(p.square().sum() for p in m.parameters())

    done = fit(model(), data(), step=step, optimizer=sgd, epochs=1, batch_size=32)
    assert calls == [32, 18]
    assert done.backwards == 2


def test_a_loss_that_needs_indices_gets_those_of_the_data_set():
    class Loss(nn.Module):
        needs_index = True

        def forward(self, outputs, targets, index):
            assert torch.equal(data().tensors[1][index], targets)
            return (outputs - targets).square().mean()

    fit(model(), data(), loss=Loss(), optimizer=sgd, epochs=1)


def test_closures():
    m = model()
    m[2].p = 0.0
    before = nn.functional.mse_loss(m(data().tensors[0]), data().tensors[1]).item()
    done = fit(m, data(), loss=nn.MSELoss(), optimizer=lambda p: torch.optim.LBFGS(p, max_iter=4), steps=5, batch_size=50)
    assert done.losses[-1] < before / 10
    assert done.forwards > 5


class Oracle(torch.optim.SGD):
    """Asks for the gradient at the outputs once, then steps twice along it."""

    needs_oracle = True

    def step(self, forward, oracle):
        z = forward().detach().requires_grad_()
        loss = oracle(z)
        (gradient,) = torch.autograd.grad(loss, z)
        for _ in range(2):
            self.zero_grad()
            (forward() * gradient).sum().backward()
            super().step()
        return loss.detach() / len(z)


def test_an_optimizer_that_asks_for_outputs_and_an_oracle():
    m, n = model(), len(data())
    m[2].p = 0.0
    with torch.no_grad():
        before = nn.functional.mse_loss(m(data().tensors[0]), data().tensors[1])
    done = fit(m, data(), loss=nn.MSELoss(), optimizer=lambda p: Oracle(p, lr=0.05 / n), steps=5, batch_size=n)
    assert done.losses[-1] < float(before) / 2
    assert (done.steps, done.forwards, done.backwards) == (5, 15, 10)
    with pytest.raises(UsageError, match="Oracle needs a loss, without step, clip_norm or mixed"):
        fit(model(), data(), loss=nn.MSELoss(), optimizer=lambda p: Oracle(p, lr=0.1), steps=1, clip_norm=1.0)


def test_an_oracle_leaves_the_mode_and_a_summed_loss_alone():
    m = model().eval()
    fit(m, data(), loss=nn.MSELoss(), optimizer=lambda p: Oracle(p, lr=1e-3), steps=2)
    assert not m.training
    seen = []

    class Sum(Oracle):
        def step(self, forward, oracle):
            z = forward()
            seen.append((oracle(z), z))
            return super().step(forward, oracle)

    for reduction in ("sum", "mean"):
        loss = nn.L1Loss(reduction=reduction)
        fit(
            model().eval(),
            TensorDataset(data().tensors[0], data().tensors[1]),
            loss=loss,
            optimizer=lambda p: Sum(p, lr=0.0),
            steps=1,
        )
    (summed, _), (mean, _) = seen
    torch.testing.assert_close(summed, mean)


def test_every_pass_of_a_custom_step_is_counted():
    def attacked(m, batch):
        x = batch[0].clone().requires_grad_()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(m(x).sum(), x)
            x = (x + 0.1 * gradient.sign()).detach().requires_grad_()
        with torch.no_grad():
            m(x)
        return nn.functional.mse_loss(m(x.detach()), batch[1])

    m = model()
    done = fit(m, data(), step=attacked, optimizer=sgd, steps=4)
    assert (done.steps, done.forwards, done.backwards) == (4, 20, 16)
    assert not m._forward_hooks


def test_schedules():
    rates = []
    opt = sgd(m.parameters()) if (m := model()) else None
    fit(
        m,
        data(),
        loss=nn.MSELoss(),
        optimizer=opt,
        steps=10,
        schedule="cosine",
        after_step=lambda i: rates.append(opt.param_groups[0]["lr"]),
    )
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert rates == sorted(rates, reverse=True)
    opt = sgd(m.parameters())
    fit(
        m,
        data(),
        loss=nn.MSELoss(),
        optimizer=opt,
        steps=4,
        schedule=lambda o, total: torch.optim.lr_scheduler.StepLR(o, total // 2),
    )
    assert opt.param_groups[0]["lr"] == pytest.approx(0.05 * 0.01)


def test_clipping():
    m = nn.Linear(4, 1)
    start = m.weight.detach().clone()
    fit(
        m,
        data(),
        loss=lambda o, t: 1e6 * (o - t).square().mean(),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        steps=1,
        clip_norm=0.1,
    )
    assert (m.weight - start).norm() <= 0.1 + 1e-5


def test_it_stops_at_a_nan_with_a_reason():
    def loss(outputs, targets):
        return outputs.sum() * (math.nan if len(targets) < 16 else 1.0)

    with pytest.raises(DivergedError, match="the training loss became nan at step 4 of 12"):
        fit(model(), data(), loss=loss, optimizer=sgd, epochs=3, batch_size=16)


def test_frozen_parameters_are_not_handed_to_the_optimizer():
    m = model()
    m[0].requires_grad_(False)
    start = m[0].weight.clone()
    fit(m, data(), loss=nn.MSELoss(), optimizer=lambda p: torch.optim.AdamW(p, weight_decay=0.5), epochs=1)
    assert torch.equal(m[0].weight, start)


def test_loaders_iterables_and_other_data_sets():
    class Squares(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return torch.full((4,), float(i)), torch.tensor([float(i)])

    for source in (Squares(), DataLoader(Squares(), batch_size=4), [(torch.ones(3, 4), torch.ones(3, 1))]):
        assert fit(model(), source, loss=nn.MSELoss(), optimizer=sgd, epochs=1, batch_size=4).steps == (
            1 if isinstance(source, list) else 3
        )
    endless = ((torch.ones(3, 4), torch.ones(3, 1)) for _ in range(100))
    assert fit(model(), endless, loss=nn.MSELoss(), optimizer=sgd, steps=5).steps == 5


def test_the_batches_of_several_processes_are_disjoint_and_equally_many():
    ranks = [list(Batches(data(), 8, seed=3, with_index=True, rank=r, world_size=3)) for r in range(3)]
    assert [len(r) for r in ranks] == [3, 3, 3]
    indices = torch.cat([batch[-1] for r in ranks for batch in r])
    assert set(indices.tolist()) == set(range(50))
    alone = torch.cat([batch[-1] for batch in Batches(data(), 8, seed=3, with_index=True)])
    assert sorted(alone.tolist()) == list(range(50))


def test_progress_goes_to_stderr(capsys):
    fit(model(), data(), loss=nn.MSELoss(), optimizer=sgd, epochs=1, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "training" in err


def test_mixed_precision_on_the_cpu():
    done = fit(model(), data(), loss=nn.MSELoss(), optimizer=sgd, epochs=1, precision="bf16-mixed")
    assert math.isfinite(done.losses[0])


def test_the_model_is_left_as_a_plain_module(tmp_path):
    m = model()
    fit(m, data(), loss=nn.MSELoss(), optimizer=sgd, epochs=1)
    torch.save(m.state_dict(), tmp_path / "m.pt")
    assert m.training
    assert list(m.state_dict()) == list(model().state_dict())
    assert type(m).__name__ == "Sequential"
    assert not m._forward_hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": None}, "give either epochs or steps, got epochs=None, steps=None"),
        ({"steps": 3}, "give either epochs or steps, got epochs=1, steps=3"),
        ({"epochs": -1}, "epochs must be >= 0"),
        ({"loss": None}, "give a loss, or a step"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"schedule": "linear"}, "schedule must be 'constant', 'cosine'"),
        ({"device": "tpu"}, "device 'tpu' is not there: this machine has cpu"),
        ({"data": TensorDataset(torch.ones(0, 4), torch.ones(0, 1))}, "data has no samples"),
        ({"data": iter(())}, "give steps instead of epochs"),
    ],
)
def test_misuse_is_said(change, message):
    arguments = {"data": data(), "loss": nn.MSELoss(), "optimizer": sgd, "epochs": 1, **change}
    with pytest.raises(UsageError, match=message):
        fit(model(), arguments.pop("data"), **arguments)


def test_zero_epochs_change_nothing():
    m = model()
    start = m[0].weight.clone()
    assert fit(m, data(), loss=nn.MSELoss(), optimizer=sgd, epochs=0).steps == 0
    assert torch.equal(m[0].weight, start)
