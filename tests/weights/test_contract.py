"""What every adapter of the room keeps to. A new adapter is a line in ``ADAPTERS``."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from weightroom import weights
from weightroom.weights import BoneConfig


@dataclass(frozen=True)
class Adapter:
    """``wrap(model, adapter=name)`` returns an adapted copy; the other four are the room's functions for its kind."""

    wrap: Callable[..., nn.Module]
    merge_: Callable[[nn.Module], nn.Module] = weights.merge_
    unmerge_: Callable[[nn.Module], nn.Module] = weights.unmerge_
    state: Callable[..., dict[str, Tensor]] = weights.adapter_state_dict
    load: Callable[..., nn.Module] = weights.load_adapter


ADAPTERS = {
    "bone guided": Adapter(partial(weights.bone, config=BoneConfig(r=8))),
    "bone shared": Adapter(partial(weights.bone, config=BoneConfig(r=8, variant="shared"))),
    "bone shared, r does not divide": Adapter(partial(weights.bone, config=BoneConfig(r=7, variant="shared"))),
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.backends.mps.is_available() else [])]


class Net(nn.Module):
    """Two adaptable layers of different shapes, one without bias, and things that are not adapted: a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.norm = nn.BatchNorm1d(40)
        self.second = nn.Linear(40, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


@pytest.fixture(params=ADAPTERS.values(), ids=ADAPTERS.keys())
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return request.param


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def inputs(rows: int = 12, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def disturb(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Moves every trainable parameter away from where it started."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator).to(p))
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(12 if step % 2 else 5)).sin().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("rows", [1, 5, 12], ids="{} rows".format)
def test_output_at_initialisation_is_that_of_the_base_model(adapter: Adapter, net: nn.Module, rows: int) -> None:
    model = adapter.wrap(net).eval()
    torch.testing.assert_close(model(inputs(rows)), net.eval()(inputs(rows)), rtol=0, atol=1e-6)


def test_only_adapter_parameters_are_trainable(adapter: Adapter, net: nn.Module) -> None:
    model = adapter.wrap(net)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    storages = {value.data_ptr() for value in adapter.state(model).values()}
    assert {p.data_ptr() for p in model.parameters() if p.requires_grad} == storages
    assert len(trainable) == len(storages) == 2


def test_every_adapter_parameter_gets_a_gradient_at_the_first_step(adapter: Adapter, net: nn.Module) -> None:
    model = adapter.wrap(net)
    model(inputs()).sin().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_the_model_that_was_passed_in_is_not_changed(adapter: Adapter, net: nn.Module) -> None:
    before, flags = snapshot(net), [p.requires_grad for p in net.parameters()]
    model = adapter.wrap(net)
    train(model)
    adapter.merge_(model)
    assert same(snapshot(net), before)
    assert [p.requires_grad for p in net.parameters()] == flags == [True] * 5
    assert all(p.grad is None for p in net.parameters())


def test_frozen_base_is_bitwise_unchanged_by_training(adapter: Adapter, net: nn.Module) -> None:
    model = adapter.wrap(net)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = model(inputs()).detach()
    train(model)
    assert same({name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}, frozen)
    assert (model(inputs()) - start).abs().max() > 1e-3


def test_mode_of_the_model_is_kept(adapter: Adapter, net: nn.Module) -> None:
    assert all(m.training for m in adapter.wrap(net).modules())
    assert not any(m.training for m in adapter.wrap(net.eval()).modules())


def test_merge_keeps_the_output_and_unmerge_gives_the_weights_back(adapter: Adapter, net: nn.Module) -> None:
    model = disturb(adapter.wrap(net)).eval()
    expected, before = model(inputs()), snapshot(model)
    assert adapter.merge_(model) is model
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-5, atol=1e-6)
    changed = [name for name, value in snapshot(model).items() if not torch.equal(value, before[name])]
    assert len(changed) == 2
    assert adapter.unmerge_(model) is model
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(inputs()), expected, rtol=1e-5, atol=1e-6)


def test_merged_model_does_not_train_its_adapters(adapter: Adapter, net: nn.Module) -> None:
    model = adapter.merge_(disturb(adapter.wrap(net)))
    assert not model(inputs()).requires_grad


def test_merging_twice_warns_and_does_nothing(adapter: Adapter, net: nn.Module) -> None:
    model = adapter.merge_(disturb(adapter.wrap(net)))
    before = snapshot(model)
    with pytest.warns(UserWarning, match="already merged"):
        adapter.merge_(model)
    assert same(snapshot(model), before)
    adapter.unmerge_(model)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="no adapters are merged"):
        adapter.unmerge_(model)
    assert same(snapshot(model), before)


def test_adapter_state_makes_a_fresh_copy_equal(adapter: Adapter, net: nn.Module, tmp_path) -> None:
    model = disturb(adapter.wrap(net)).eval()
    state = adapter.state(model)
    assert not any(value.requires_grad for value in state.values())
    fresh = adapter.wrap(net).eval()
    assert adapter.load(fresh, state) is fresh
    assert same(snapshot(fresh), snapshot(model))
    assert torch.equal(fresh(inputs()), model(inputs()))
    path = tmp_path / "adapter.safetensors"
    safetensors.torch.save_file(state, path)
    for source in (path, str(path)):
        assert same(snapshot(adapter.load(adapter.wrap(net).eval(), source)), snapshot(model))


def test_loaded_values_are_copies(adapter: Adapter, net: nn.Module) -> None:
    model, fresh = disturb(adapter.wrap(net)), adapter.wrap(net)
    adapter.load(fresh, adapter.state(model))
    before = snapshot(model)
    disturb(fresh)
    assert same(snapshot(model), before)
    assert all(
        p.requires_grad for p in fresh.parameters() if p.data_ptr() in {v.data_ptr() for v in adapter.state(fresh).values()}
    )


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(adapter: Adapter, net: nn.Module, clone, merged: bool) -> None:
    model = disturb(adapter.wrap(net)).eval()
    if merged:
        adapter.merge_(model)
    other = clone(model)
    assert torch.equal(other(inputs()), model(inputs()))
    before = snapshot(model)
    if merged:
        adapter.unmerge_(other)
    train(other)
    assert same(snapshot(model), before)


def test_whole_state_dict_round_trip(adapter: Adapter, net: nn.Module) -> None:
    model, fresh = disturb(adapter.wrap(net)).eval(), adapter.wrap(Net()).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(inputs()), model(inputs()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [5, 12])
def test_other_precisions(adapter: Adapter, net: nn.Module, dtype: torch.dtype, rows: int) -> None:
    model = disturb(adapter.wrap(net.to(dtype)), 0.02).eval()
    assert all(v.dtype == torch.promote_types(dtype, torch.float32) for v in adapter.state(model).values())
    y = model(inputs(rows, dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    exact = copy.deepcopy(model).double()(inputs(rows, dtype).double())
    tolerance = 30 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)
    before = snapshot(model)
    adapter.merge_(model)
    torch.testing.assert_close(model(inputs(rows, dtype)).double(), exact, rtol=0, atol=tolerance)
    adapter.unmerge_(model)
    assert all(value.dtype == before[name].dtype for name, value in model.state_dict().items())
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_casting_an_adapted_model(adapter: Adapter, net: nn.Module) -> None:
    model = disturb(adapter.wrap(net)).eval()
    torch.testing.assert_close(
        copy.deepcopy(model).double()(inputs(dtype=torch.float64)).float(), model(inputs()), rtol=1e-5, atol=1e-6
    )
    half = copy.deepcopy(model).bfloat16()
    half(inputs(dtype=torch.bfloat16)).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in half.parameters() if p.requires_grad)


@pytest.mark.parametrize("rows", [5, 12])
def test_autocast(adapter: Adapter, net: nn.Module, rows: int) -> None:
    model = disturb(adapter.wrap(net)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(inputs(rows))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), model(inputs(rows)), rtol=0, atol=0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_are_made_and_stay_where_the_weights_are(adapter: Adapter, net: nn.Module, device: str) -> None:
    model = disturb(adapter.wrap(net.to(device))).eval()
    assert {p.device.type for p in model.parameters()} == {device}
    expected = model(inputs(device=device))
    torch.testing.assert_close(adapter.merge_(model)(inputs(device=device)), expected, rtol=1e-4, atol=1e-5)
    adapter.unmerge_(model).cpu()
    torch.testing.assert_close(model(inputs()), expected.cpu(), rtol=1e-4, atol=1e-5)


def test_meta_device_needs_no_data(adapter: Adapter, net: nn.Module) -> None:
    model = adapter.wrap(net.to("meta"))
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(5, 24, device="meta")).shape == (5, 16)


def test_a_second_adapter_needs_a_name_of_its_own(adapter: Adapter, net: nn.Module) -> None:
    model = disturb(adapter.wrap(net))
    with pytest.raises(ValueError, match=r"layer 'first' already has an adapter 'default'.*adapter="):
        adapter.wrap(model)


def test_two_adapters(adapter: Adapter, net: nn.Module) -> None:
    one = disturb(adapter.wrap(net)).eval()
    two = adapter.wrap(one, adapter="second")
    torch.testing.assert_close(two(inputs()), one(inputs()), rtol=0, atol=1e-6)
    before = snapshot(one)
    assert len([p for p in two.parameters() if p.requires_grad]) == 4
    disturb(two)
    assert same(snapshot(one), before)
    assert adapter.state(two, adapter="second").keys() == adapter.state(two).keys()
    assert not same(adapter.state(two, adapter="second"), adapter.state(two))
    two.eval()
    expected, before = two(inputs()), snapshot(two)
    torch.testing.assert_close(adapter.merge_(two)(inputs()), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="unmerge_"):
        adapter.wrap(two, adapter="third")
    with pytest.raises(RuntimeError, match="unmerge_"):
        adapter.load(two, adapter.state(two))
    torch.testing.assert_close(snapshot(adapter.unmerge_(two)), before, rtol=0, atol=1e-6)
    loaded = adapter.load(
        adapter.load(adapter.wrap(net).eval(), adapter.state(two)), adapter.state(two, adapter="second"), adapter="second"
    )
    torch.testing.assert_close(loaded(inputs()), expected, rtol=1e-5, atol=1e-6)


def test_a_model_without_adapters_is_refused(adapter: Adapter, net: nn.Module) -> None:
    for call in (adapter.merge_, adapter.unmerge_, adapter.state, lambda m: adapter.load(m, {})):
        with pytest.raises(ValueError, match="no BoneLinear"):
            call(net)


def test_unknown_adapter_is_named_with_those_there_are(adapter: Adapter, net: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no adapter 'other': it has \['default'\]"):
        adapter.state(adapter.wrap(net), adapter="other")


def test_states_that_do_not_fit_change_nothing(adapter: Adapter, net: nn.Module) -> None:
    model = disturb(adapter.wrap(net))
    state, before = adapter.state(adapter.wrap(net)), snapshot(model)
    key, value = next(reversed(state.items()))
    wrong = {
        "no tensor .* for layer": {k: v for k, v in state.items() if k != key},
        "names no adapted layer": {**state, key.replace("second", "third"): value},
        "is not of an adapter": {**state, "second.weight": value},
        "has shape": {**state, key: value[..., :-1]},
        "no tensor": {},
    }
    for message, source in wrong.items():
        with pytest.raises(ValueError, match=message):
            adapter.load(model, source)
    assert same(snapshot(model), before)


def test_not_finite_adapters_are_not_merged(adapter: Adapter, net: nn.Module) -> None:
    model = disturb(adapter.wrap(net))
    with torch.no_grad():
        next(p for p in model.second.parameters() if p.requires_grad).view(-1)[3] = torch.nan
    before = [p.clone() for p in model.parameters() if not p.requires_grad]
    with pytest.raises(RuntimeError, match=r"layer 'second' .*not finite"):
        adapter.merge_(model)
    assert all(map(torch.equal, [p for p in model.parameters() if not p.requires_grad], before))
