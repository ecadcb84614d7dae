import pytest
import torch
from sklearn import metrics as sk
from torch import nn
from torch.nn.utils.prune import custom_from_mask

from weightroom import metrics
from weightroom.errors import TaskError, UsageError


def classified(n=40, k=7):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, k, generator=g), torch.randint(k - 1, (n,), generator=g)


def test_classification_agrees_with_scikit_learn():
    logits, y = classified()
    p = logits.double().softmax(1)
    assert metrics.accuracy(logits, y) == pytest.approx(sk.accuracy_score(y, logits.argmax(1)))
    assert metrics.balanced_accuracy(logits, y) == pytest.approx(
        sk.recall_score(y, logits.argmax(1), labels=y.unique(), average="macro")
    )
    assert metrics.nll(logits, y) == pytest.approx(sk.log_loss(y, p, labels=range(7)))
    assert metrics.top5(logits, y) == pytest.approx(sk.top_k_accuracy_score(y, p, k=5, labels=range(7)))


def test_regression_agrees_with_scikit_learn():
    g = torch.Generator().manual_seed(0)
    out, y = torch.randn(30, 1, generator=g), torch.randn(30, generator=g)
    flat = out.flatten().double()
    assert metrics.mse(out, y) == pytest.approx(sk.mean_squared_error(y, flat))
    assert metrics.mae(out, y) == pytest.approx(sk.mean_absolute_error(y, flat))
    assert metrics.r2(out, y) == pytest.approx(sk.r2_score(y, flat))
    with pytest.raises(ValueError, match="do not match"):
        metrics.mse(out, y[:5])


def test_resolve():
    own = lambda o, t: 1.0  # noqa: E731
    assert list(metrics.resolve(["nll", "accuracy"])) == ["nll", "accuracy"]
    assert metrics.resolve("mse") == {"mse": metrics.mse}
    assert metrics.resolve({"mine": own}) == {"mine": own}
    assert metrics.minimised(metrics.mse)
    assert not metrics.minimised(own)
    with pytest.raises(UsageError, match="did you mean 'accuracy'"):
        metrics.resolve(["acuracy"])
    with pytest.raises(TaskError, match="at least one metric"):
        metrics.resolve([])
    with pytest.raises(TaskError, match="must be callable"):
        metrics.resolve({"mine": 3})


def test_costs():
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Dropout(), nn.Linear(4, 2))
    assert metrics.macs(model, torch.ones(1, 8)) == 8 * 4 + 4 * 2
    assert metrics.latency(model, torch.ones(1, 8), repeats=3) > 0
    assert model.training
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[0] = 0.0
        model[2].weight.fill_(1.0)
        model[2].bias.fill_(1.0)
    assert metrics.nonzero_parameters(model) == 32 - 8 + 8 + 2
    custom_from_mask(model[2], "weight", torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]))
    assert metrics.nonzero_parameters(model) == 24 + 5 + 2


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 3, bias=False)
    nn.init.ones_(layer.weight)
    assert metrics.nonzero_parameters(nn.Sequential(layer, layer)) == 9


def test_predict_keeps_modes_and_order():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    model[1].eval()
    x = torch.arange(10.0)[:, None]
    outputs, targets = metrics.predict(model, torch.utils.data.TensorDataset(x, x), batch_size=3)
    assert torch.equal(targets, x)
    assert outputs.shape == (10, 1)
    assert model[0].training
    assert not model[1].training
