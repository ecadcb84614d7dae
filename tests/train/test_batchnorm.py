"""Statistics of batch norm: where their estimation fails, they are as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from weightroom.train import gathering_statistics, reestimate_batchnorm


def batches(n=3, features=4):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(5, features, generator=g) + 3 for _ in range(n)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 2))
    for batch in batches():
        model(batch - 2)
    model[1].eval()
    return model


def situation(model):
    return [(m.training, getattr(m, "momentum", None)) for m in model.modules()], copy.deepcopy(model.state_dict())


def same(model, before):
    kept, state = before
    now, tensors = situation(model)
    return now == kept and all(torch.equal(state[key], tensor) for key, tensor in tensors.items())


def failing(after):
    yield from batches(after)
    raise OSError("the disk is gone")


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_loader_that_fails_leaves_the_statistics(model, after):
    before = situation(model)
    with pytest.raises(OSError, match="disk is gone"):
        reestimate_batchnorm(model, failing(after))
    assert same(model, before)


def test_a_batch_that_the_model_cannot_take_leaves_the_statistics(model):
    before = situation(model)
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(model, [*batches(2), *batches(1, features=3)])
    assert same(model, before)
    with pytest.raises(ValueError, match="no batch"):
        reestimate_batchnorm(model, iter(()))
    assert same(model, before)


def test_a_block_that_is_interrupted_leaves_all_its_models(model):
    other = copy.deepcopy(model)
    before, others = situation(model), situation(other)
    with pytest.raises(KeyboardInterrupt), gathering_statistics(model, other) as count:
        count(5)
        model(batches()[0])
        other(batches()[1])
        raise KeyboardInterrupt
    assert same(model, before)
    assert same(other, others)


def test_what_succeeds_changes_the_statistics_alone(model):
    before = situation(model)
    assert reestimate_batchnorm(model, batches()) is model
    after = situation(model)
    assert after[0] == before[0]
    changed = {key for key, tensor in after[1].items() if not torch.equal(tensor, before[1][key])}
    assert changed == {f"{layer}.running_{name}" for layer in (1, 3) for name in ("mean", "var")}


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, a, b=0.0, scale=1.0):
        return self.norm(scale * (a + b))


@pytest.mark.parametrize(
    "batch",
    [
        lambda a, b: ((a, b), None),
        lambda a, b: ([a, b, 1.0], None),
        lambda a, b: ({"a": a, "b": b}, None),
        lambda a, b: {"scale": 1.0, "b": b, "a": a},
        lambda a, b: (a + b, None),
        lambda a, b: a + b,
    ],
    ids=["tuple", "list", "dict", "dict alone", "tensor", "tensor alone"],
)
def test_inputs_are_a_tensor_or_arguments_or_keywords(batch):
    a, b = torch.randn(7, 4), torch.randn(7, 4)
    model = Summed()
    # Of different sizes: each sample counts once.
    assert reestimate_batchnorm(model, [batch(a[part], b[part]) for part in (slice(0, 2), slice(2, 7))]) is model
    torch.testing.assert_close(model.norm.running_mean, (a + b).mean(0))


def test_a_batch_without_a_tensor(model):
    before = situation(model)
    with pytest.raises(TypeError, match="a batch of str without any"):
        reestimate_batchnorm(model, ["images"])
    assert same(model, before)
