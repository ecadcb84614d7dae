"""The dead-neuron rate on networks whose silent units are known, however their ReLUs are written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.prune.zoo import make
from weightroom.diagnostics import dead_neuron_rate
from weightroom.metrics import copy_model


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer(weight: list[list[float]], bias: float = 0.0) -> nn.Linear:
    made = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
        made.bias.fill_(bias)
    return made


class Functional(nn.Module):
    """One ReLU in every way of writing it, all of the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.block = nn.Sequential(nn.Identity(), Named())

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.act(x), self.act(x.clone())
        rest = [
            F.relu(x),
            torch.relu(x),
            x.relu(),
            x.clone().relu_(),
            F.relu(x.clone(), inplace=True),
            torch.relu_(x.clone()),
            self.block(x),
        ]
        return sum(rest, first + second)


class Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


def test_rates_by_hand():
    # Units x1, -x1, x2 - 1 on inputs (1, 0), (2, 0), (-1, 3): silent on (no, no, yes), (yes, yes, no), (yes, yes, no).
    model = nn.Sequential(layer([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], -0.0), nn.ReLU())
    with torch.no_grad():
        model[0].bias[2] = -1.0
    report = dead_neuron_rate(model, torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 3.0]]))
    assert (report.static, report.total) == (0.0, 5 / 9)
    only_first = dead_neuron_rate(model, torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    assert (only_first.static, only_first.dynamic) == (2 / 3, 0.0)
    assert report.per_layer["1"].units == 3
    assert list(report.per_layer) == ["1"]


def test_positive_weights_and_inputs_leave_nothing_silent():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU())
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.abs() + 0.01)
    report = dead_neuron_rate(model, torch.rand(20, 5))
    assert (report.static, report.dynamic, report.total) == (0.0, 0.0, 0.0)


def test_a_huge_negative_bias_is_static_death():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU())
    nn.init.constant_(model[0].bias, -1e6)
    report = dead_neuron_rate(model, torch.randn(20, 5))
    assert (report.static, report.dynamic, report.total) == (1.0, 0.0, 1.0)


def test_layers_are_pooled_by_their_units():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2), nn.ReLU())
    nn.init.constant_(model[0].bias, -1e6)
    nn.init.constant_(model[2].bias, 1e6)
    report = dead_neuron_rate(model, torch.randn(4, 5))
    assert report.static == 0.75
    assert [entry.static for entry in report.per_layer.values()] == [1.0, 0.0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), batch=st.integers(1, 7), unit=st.sampled_from(["element", "channel"]))
def test_properties_on_random_networks(seed, n, batch, unit):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(n + 5, 1, 5, 5)
    whole = dead_neuron_rate(model, x[:n], unit=unit)
    assert whole == dead_neuron_rate(model, x[:n].split(batch), unit=unit)
    assert whole.total == whole.static + whole.dynamic
    assert 0 <= whole.static <= whole.total <= 1
    assert whole.dynamic >= 0
    assert dead_neuron_rate(model, x, unit=unit).static <= whole.static
    hidden = torch.relu(model[:2](x[:n]))
    zero = (hidden == 0) if unit == "element" else (hidden == 0).all(3).all(2)
    assert whole.per_layer["1"].total == pytest.approx(float(zero.float().mean()))
    assert whole.per_layer["1"].static == pytest.approx(float(zero.all(0).float().mean()))


def test_every_way_of_writing_a_relu_counts_once():
    x = torch.randn(6, 4)
    report = dead_neuron_rate(Functional(), x)
    assert list(report.per_layer) == ["act", "act#2", *["relu", "relu#2", "relu#3", "relu#4", "relu#5", "relu#6"], "block.1.relu"]
    assert {entry.total for entry in report.per_layer.values()} == {float((x <= 0).double().mean())}


def test_relu6_counts_unless_the_layers_say_otherwise():
    class Six(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu6(self.act(x) - 1) + F.relu(x)

    x = torch.randn(5, 3)
    assert list(dead_neuron_rate(Six(), x).per_layer) == ["act", "relu6", "relu"]
    assert list(dead_neuron_rate(Six(), x, layers=(nn.ReLU,)).per_layer) == ["relu"]
    assert list(dead_neuron_rate(Six(), x, layers=(nn.ReLU6,)).per_layer) == ["act", "relu6"]


def test_the_fast_path_of_a_transformer_layer_does_not_hide_its_relu():
    model, x, _ = make("attention")
    report = dead_neuron_rate(model, x)
    assert list(report.per_layer) == ["encoder.relu"]
    assert report.per_layer["encoder.relu"].units == 5 * 16
    assert dead_neuron_rate(model, x, unit="channel", channel_dim=-1).per_layer["encoder.relu"].units == 16


def test_all_layers_counts_whatever_is_zero():
    model = nn.Sequential(layer([[0.0, 0.0], [1.0, 1.0]]), nn.GELU())
    report = dead_neuron_rate(model, torch.rand(3, 2) + 1, all_layers=True)
    assert list(report.per_layer) == ["0", "1"]
    assert report.static == 0.5
    mixed = dead_neuron_rate(Functional(), torch.randn(3, 2), all_layers=True)
    assert set(mixed.per_layer) == {
        "act",
        "act#2",
        "block.0",
        "block.1",
        "relu",
        "relu#2",
        "relu#3",
        "relu#4",
        "relu#5",
        "relu#6",
    }


def test_a_module_of_a_counted_type_counts_once_whatever_is_inside():
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + F.relu(x)

    assert list(dead_neuron_rate(nn.Sequential(Wrapped()), torch.randn(3, 2), layers=(Wrapped, nn.ReLU)).per_layer) == ["0"]


def test_the_model_and_the_random_state_are_left_alone():
    model, x, y = make("residual")
    model.train()
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    report = dead_neuron_rate(model, loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # Batch norms used their running statistics, not those of the batch.
    model.eval()
    seen = torch.relu(model.bn(model.stem(x)))
    assert report.per_layer["relu"].total == pytest.approx(float((seen == 0).float().mean()))


def test_all_kinds_of_data_give_the_same():
    model, x, y = make("cnn")
    expected = dead_neuron_rate(model, x)
    for data in (
        TensorDataset(x, y),
        TensorDataset(x),
        DataLoader(TensorDataset(x, y), 3),
        [(x, y)],
        [x[:3], x[3:]],
        iter([(x,)]),
    ):
        assert dead_neuron_rate(model, data) == expected


def test_masked_models_can_be_measured():
    model, x, _ = make("mlp")
    nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    with torch.no_grad():
        model[0].weight_orig.neg_()  # a pass computes the masked weight anew
    plain = copy_model(model)
    nn.utils.prune.remove(plain[0], "weight")
    model(x)
    weight = model[0].weight
    assert dead_neuron_rate(model, x) == dead_neuron_rate(plain, x)
    assert model[0].weight is weight
    assert model[0].weight.abs().sum().requires_grad


def test_a_network_that_diverged_is_neither_silent_nor_alive():
    model, x, _ = make("mlp")
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    for unit in ("element", "channel"):
        with pytest.raises(ValueError, match="the output of '1' holds NaN"):
            dead_neuron_rate(model, x, unit=unit)
    assert dead_neuron_rate(nn.ReLU(), torch.tensor([[1.0], [float("inf")], [-1.0]])).total == 1 / 3


def test_channels_of_maps_of_several_sizes():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    data = [torch.randn(2, 1, 5, 5), torch.randn(2, 1, 8, 8)]
    with pytest.raises(ValueError, match="use unit='channel'"):
        dead_neuron_rate(model, data)
    assert dead_neuron_rate(model, data, unit="channel").per_layer["1"].units == 3


def test_errors():
    model, x, _ = make("mlp")
    with pytest.raises(ValueError, match="unknown unit 'row'"):
        dead_neuron_rate(model, x, unit="row")
    for empty in ([], x[:0], [x[:0]]):
        with pytest.raises(ValueError, match="data holds no inputs"):
            dead_neuron_rate(model, empty)
    with pytest.raises(TypeError, match="tensors"):
        dead_neuron_rate(model, [{"x": x}])
    with pytest.raises(ValueError, match=r"no layer of type ReLU, ReLU6 was called.*GELU"):
        dead_neuron_rate(nn.Sequential(nn.Linear(6, 2), nn.GELU()), x)
    with pytest.raises(ValueError, match=r"'1' has shape \(48,\): its first axis must be the 8 inputs"):
        dead_neuron_rate(nn.Sequential(nn.Flatten(0), nn.ReLU()), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("hide", [lambda part, x: torch.jit.script(part), torch.jit.trace])
def test_scripted_and_traced_parts_are_refused(hide):
    x = torch.randn(4, 5)
    hidden = hide(nn.Sequential(nn.Linear(5, 5), nn.ReLU()), x)
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), hidden).train()
    with pytest.raises(ValueError, match="'2' is scripted or traced"):
        dead_neuron_rate(model, x)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model[:2].modules())
    with pytest.raises(ValueError, match="'the model' is scripted"):
        dead_neuron_rate(hidden, x)


def test_hooks_are_gone_after_an_error():
    model, x, _ = make("mlp")
    model.train()
    with pytest.raises(RuntimeError):
        dead_neuron_rate(model, x[:, :3])
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert dead_neuron_rate(model, x).total > 0
