"""Activate-while-Pruning: which step takes what, on any host, and what that does to ReLU units."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.prune.zoo import make
from weightroom.diagnostics import dead_neuron_rate
from weightroom.prune import (
    ActivateWhilePruning,
    DIMAPPruner,
    ERKPruner,
    GlobalMagnitudePruner,
    LAMPPruner,
    MFACPruner,
    PruningPlan,
    RandomPruner,
    RDPruner,
    SNIPPruner,
    UniformMagnitudePruner,
    successive_sparsities,
)
from weightroom.prune import selective_activation as module

HOSTS = {
    host.__name__: host
    for host in (GlobalMagnitudePruner, LAMPPruner, ERKPruner, UniformMagnitudePruner, RandomPruner, SNIPPruner)
} | {"DIMAPPruner": partial(DIMAPPruner, modules={"*": "all"}), "RDPruner": partial(RDPruner, grid=10)}
every_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int = 3, decay: float = 0.0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def cycled(ap: ActivateWhilePruning, name: str = "mlp"):
    """A model at the end of its first cycle, its data, and the weights at its start."""
    model, x, y = make(name)
    start = ap.snapshot(model)
    train(model, x, y)
    return model, [(x, y)], start


def fit(ap, model, data):
    return ap.fit(model, data, loss_fn=nn.functional.cross_entropy)


def size(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1)


def taken(plan, step: str) -> int:
    return sum(int(mask.sum()) for mask in plan.log[step].values())


@every_host
def test_rate_zero_is_the_host_bit_for_bit(host):
    ap = ActivateWhilePruning(host(0.4), 0.0)
    model, data, _ = cycled(ap)
    plan, alone = fit(ap, model, data), fit(host(0.4), model, data)
    assert all(torch.equal(plan.masks[k], mask) for k, mask in alone.masks.items())
    assert taken(plan, "ap") == 0
    assert taken(plan, "host") == round(0.4 * size(model))
    assert all(torch.equal(plan.masks[k], mask) for k, mask in fit(ActivateWhilePruning(host(0.4), 0), model, data).masks.items())


@every_host
@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "mobile", "tied"])
def test_both_steps_together_remove_what_the_host_alone_would(host, name):
    ap = ActivateWhilePruning(host(0.4), 0.04)
    model, data, start = cycled(ap, name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    plan = fit(ap, model, data)
    N = size(model)
    assert plan.sparsity() == round(0.4 * N) / N
    assert (taken(plan, "host"), taken(plan, "ap")) == (round(0.4 * N) - round(0.04 * N), round(0.04 * N))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # The host's part is its own plan; AP's part is negative, was alive, and has moved least of what could be taken.
    own = fit(host((round(0.4 * N) - round(0.04 * N)) / N), model, data).masks
    weights = dict(model.named_parameters())
    left, went = [], []
    for k, mask in plan.log["ap"].items():
        assert torch.equal(plan.log["host"][k], ~own[k])
        assert torch.equal(plan.masks[k], own[k] & ~mask)
        assert (weights[k][mask] < 0).all()
        assert not (mask & ~own[k]).any()
        if mask.any():
            went.append((weights[k] - start[k]).abs()[mask])
            left.append((weights[k] - start[k]).abs()[plan.masks[k] & (weights[k] < 0)])
    assert torch.cat(went).max() <= torch.cat(left).min()


@pytest.mark.parametrize("ratios", [0.41, {"a": 0.9, "b": 0.1}, {"a": 0.31, "b": 0.62, "c": 0.5}])
@pytest.mark.parametrize("rate", [0.001, 0.02, 0.1])
def test_a_host_with_shares_by_module_keeps_its_budget(ratios, rate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    host = DIMAPPruner(ratios, modules={"0": "a", "2": "b", "4": "b", "*": "c"})
    N, alone = size(model), host.fit(model)
    removed = sum(layer.removed for layer in alone.layers().values())
    ap = ActivateWhilePruning(host, rate)
    ap.snapshot(model)
    plan = ap.fit(model)
    assert sum(layer.removed for layer in plan.layers().values()) == removed
    assert taken(plan, "host") + taken(plan, "ap") == removed
    assert abs(taken(plan, "ap") - round(rate * N)) <= 1.5  # half a weight for each module
    scaled = host.at(host.sparsity * (removed - round(rate * N)) / removed).fit(model)
    assert all(torch.equal(mask, ~scaled.masks[k]) for k, mask in plan.log["host"].items())


def test_a_host_with_shares_by_module_removes_what_ap_does_not_find():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 5))
    host = DIMAPPruner({"a": 0.62, "b": 0.53, "c": 0.23}, modules={"0": "a", "2": "b", "*": "c"})
    ap = ActivateWhilePruning(host, 0.4)
    ap.snapshot(model)
    with pytest.warns(UserWarning, match="AP finds fewer"):
        plan = ap.fit(model)
    assert plan.log["ap"]["4.weight"].sum() > round(0.23 * 35)  # more than its module's share
    assert plan.sparsity() == host.fit(model).sparsity()


def test_cycles_of_a_host_with_shares_by_module_remove_what_it_does():
    model, x, y = make("mlp")
    host = DIMAPPruner({"a": 0.8, "b": 0.2}, modules={"0": "a", "*": "b"})
    steps = [0.3, 0.6, 0.8]
    plan = ActivateWhilePruning(host, 0.08).iterate(copy.deepcopy(model), steps, lambda net: train(net, x, y))
    before, after = (sum(layer.removed for layer in host.at(s).fit(model).layers().values()) for s in steps[1:])
    assert plan.sparsity() * size(model) == pytest.approx(after)
    assert taken(plan, "ap") == pytest.approx(0.1 * (after - before), abs=1.5)


def test_a_host_that_does_not_remove_its_part_is_refused():
    class Stubborn(GlobalMagnitudePruner):
        def _select(self, tensors, scores, removed):
            return super()._select(tensors, scores, 200)

    ap = ActivateWhilePruning(Stubborn(0.4), 0.04)
    model, data, _ = cycled(ap)
    with pytest.raises(ValueError, match=r"Stubborn\(sparsity=0\.4\) removed 200 weights where 95 were its part"):
        fit(ap, model, data)


@pytest.mark.filterwarnings("ignore:AP finds fewer")
@pytest.mark.parametrize(
    ("name", "skipped"),
    [("mlp", {"0"}), ("cnn", {"0"}), ("mobile", {"0"}), ("residual", {"stem"}), ("tied", {"encode", "decode"})],
)
def test_layers_that_no_relu_feeds_are_skipped(name, skipped):
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.4), 0.2)
    model, data, _ = cycled(ap, name)
    log = fit(ap, model, data).log["ap"]
    touched = {k.removesuffix(".weight") for k, mask in log.items() if mask.any()}
    assert touched == {k.removesuffix(".weight") for k in log} - skipped
    everywhere = ActivateWhilePruning(GlobalMagnitudePruner(0.4), 0.2, skip_first=False)
    everywhere.snapshot(make(name)[0])
    assert all(mask.any() for mask in fit(everywhere, model, data).log["ap"].values())


def test_what_a_relu_feeds_is_followed_through_the_graph():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.names = (
                "first",
                "after",
                "linear",
                "summed",
                "shifted",
                "pooled",
                "shaped",
                "joined",
                "mixed",
                "twice",
                "negated",
            )
            for name in self.names:
                self.add_module(name, nn.Linear(8 if name != "joined" else 16, 8))
            self.conv = nn.Conv1d(1, 1, 3, padding=1)
            self.seen: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            self.seen = h
            a = self.after(h)
            out = [
                a,
                self.linear(a),
                self.summed(h + a.sigmoid()),
                self.shifted(h + -1.0),
                self.negated(torch.add(h, 1, alpha=-1)),
            ]
            out += [
                self.pooled(nn.functional.max_pool1d(h, 1)),
                self.shaped(h.view(x.size(0), -1)),
                self.joined(torch.cat([h, a.relu()], 1)),
            ]
            out += [self.mixed(torch.cat([h, a], 1)[:, 4:12]), self.twice(h), self.twice(a), self.conv(h[:, None]).flatten(1)]
            return sum(out)

    model = Net()
    fed = module._fed_in_graph(model)
    assert model.seen is None
    names = {name for name in (*model.names, "conv") if fed[model.get_submodule(name)]}
    assert names == {"after", "summed", "pooled", "shaped", "joined", "conv"}
    observed = module._fed_in_pass(model, torch.randn(50, 8))
    assert {name for name in (*model.names, "conv") if observed[model.get_submodule(name)]} == names


def test_what_is_changed_in_place_after_a_relu_is_followed():
    def shifted(s, x):
        h = torch.relu(s.a(x))
        h.sub_(1.0)
        return s.b(h)

    def negated(s, x):
        h = torch.relu(s.a(x))
        torch.neg_(h)
        return s.b(h)

    def through_a_view(s, x):
        h = torch.relu(s.a(x))
        s.drop(h.view(-1)).narrow(0, 0, 2).add_(-1.0)
        return s.b(h)

    def twice_over(s, x):
        h = torch.relu(s.a(x))
        h.add_(1.0).mul_(-1.0)
        return s.b(h)

    def harmless(s, x):
        h = torch.relu(s.a(x))
        h.add_(1.0)
        z = s.drop(h)
        s.c(z).sub_(1.0)  # nothing of h
        return s.b(h)

    class Net(nn.Module):
        def __init__(self, way) -> None:
            super().__init__()
            self.a, self.b, self.c, self.drop, self.way = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4), nn.Dropout(), way

        def forward(self, x: Tensor) -> Tensor:
            return self.way(self, x)

    for way in (shifted, negated, through_a_view, twice_over, harmless):
        model = Net(way)
        assert module._fed_in_graph(model)[model.b] == module._fed_in_pass(model, torch.randn(9, 6))[model.b] == (way is harmless)


def test_layers_inside_what_is_traced_as_one_are_looked_at_in_a_pass():
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 64, batch_first=True))
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.4), 0.02)
    ap.snapshot(model)
    with pytest.raises(
        ValueError, match=r"torch.fx cannot trace this model, or not into all its parts.*give example_inputs or data"
    ):
        ap.fit(model)
    log = ap.fit(model, example_inputs=torch.randn(3, 5, 8)).log["ap"]
    assert [k for k, mask in log.items() if mask.any()] == ["1.linear2.weight"]

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.a, self.b = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(self.attention(x, x, x)[0])))

    model = Attending()
    ap.snapshot(model)
    log = ap.fit(model).log["ap"]  # attention calls none of its layers: there is nothing to look into
    assert [k for k, mask in log.items() if mask.any()] == ["b.weight"]


def test_a_model_that_draws_leaves_the_random_state_as_it_was():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x)) + torch.rand(16))))

    model, ap = Noisy(), ActivateWhilePruning(GlobalMagnitudePruner(0.4), 0.02)
    ap.snapshot(model)
    state = torch.get_rng_state()
    ap.fit(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_models_that_cannot_be_traced_are_looked_at_in_a_pass():
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 0 if x.sum() > 0 else x  # no graph
            return super().forward(x)

    _, x, y = make("mlp")
    x = x.abs()  # non-negative inputs do not make the first layer one that a ReLU feeds
    model = Branching(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.4), 0.2)
    ap.snapshot(model)
    train(model, x, y)
    with pytest.raises(ValueError, match=r"torch.fx cannot trace this model.*give example_inputs or data"):
        ap.fit(model)
    with pytest.raises(ValueError, match="cannot trace"):
        ap.fit(model, iter([(x, y)]))  # would be used up
    with pytest.raises(TypeError, match="a TensorDataset gives samples"):
        ap.fit(model, TensorDataset(x, y))
    state = torch.get_rng_state()
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    plans = [
        ap.fit(model, [(x, y)]),
        ap.fit(model, x),
        ap.fit(model, example_inputs=x),
        ap.fit(model, iter([(x, y)]), x),
        ap.fit(model, loader),
    ]
    assert torch.equal(torch.get_rng_state(), state)
    for plan in plans:
        assert [bool(mask.any()) for mask in plan.log["ap"].values()] == [False, True, True]
        assert all(torch.equal(mask, plans[0].masks[k]) for k, mask in plan.masks.items())


def test_attention_and_recurrent_weights_are_left_to_the_host():
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.4), 0.02)
    model, data, _ = cycled(ap, "attention")
    plan = fit(ap, model, data)
    assert {k for k, mask in plan.log["ap"].items() if mask.any()} == {"encoder.linear2.weight"}
    assert plan.sparsity() == round(0.4 * size(model)) / size(model)


@pytest.mark.parametrize("name", ["lstm", "vit"])
def test_a_model_without_relu_is_warned_about_once(name):
    if name == "vit":
        pytest.importorskip("transformers")
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.4), 0.04)
    model, data, _ = cycled(ap, name)
    fewer = pytest.warns(UserWarning, match="AP finds fewer") if name == "lstm" else contextlib.nullcontext()
    with pytest.warns(UserWarning, match="no layer is fed by a ReLU"), fewer:
        plan = fit(ap, model, data)
    touched = {k for k, mask in plan.log["ap"].items() if mask.any()}
    assert next(iter(plan.log["ap"])) not in touched
    assert touched == {"head.weight"} if name == "lstm" else len(touched) > 1  # recurrent weights do not count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(ap, model, data)


def test_fewer_candidates_than_asked_for():
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.6), 0.5)
    model, data, _ = cycled(ap)
    N = size(model)
    host = GlobalMagnitudePruner((round(0.6 * N) - round(0.5 * N)) / N).fit(model).masks
    candidates = sum(int((host[k] & (p < 0)).sum()) for k, p in model.named_parameters() if k in ("2.weight", "4.weight"))
    with pytest.warns(UserWarning, match="AP finds fewer negative weights than its rate asks for and takes them all"):
        plan = fit(ap, model, data)
    assert taken(plan, "ap") == candidates < round(0.5 * N)
    assert plan.sparsity() == round(0.6 * N) / N
    assert not any(a.logical_and(b).any() for a, b in zip(plan.log["ap"].values(), plan.log["host"].values(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(ap, model, data)


def test_an_iterator_of_batches_lasts_for_both_times_that_the_host_is_fitted():
    ap = ActivateWhilePruning(SNIPPruner(0.6, batches=2), 0.5)
    model, (batch,), _ = cycled(ap)
    other = (batch[0] + 1, batch[1])
    with pytest.warns(UserWarning, match="AP finds fewer"):
        plan = fit(ap, model, [batch, other])
    for stream in (iter([batch, other]), itertools.chain([batch, other], itertools.repeat((batch[0] - 1, batch[1])))):
        streamed = fit(ap, model, stream)
        assert all(torch.equal(streamed.masks[k], mask) for k, mask in plan.masks.items())
    assert taken(plan, "ap") < round(0.5 * size(model))


def test_the_comparisons_take_positive_or_random_weights():
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.4), 0.04, sign="positive")
    model, data, start = cycled(ap)
    weights = dict(model.named_parameters())
    positive = fit(ap, model, data)
    assert all((weights[k][mask] > 0).all() for k, mask in positive.log["ap"].items())
    random = [
        ActivateWhilePruning(GlobalMagnitudePruner(0.4), 0.04, criterion="random", seed=seed).fit(model, data, w_start=start)
        for seed in (0, 0, 1)
    ]
    assert all((weights[k][mask] < 0).all() for plan in random for k, mask in plan.log["ap"].items())
    assert {taken(plan, "ap") for plan in random} == {round(0.04 * size(model))}
    same = [all(torch.equal(random[0].masks[k], plan.masks[k]) for k in plan.masks) for plan in random]
    assert same == [True, True, False]


def test_a_unit_that_is_silent_throughout_does_not_move_and_goes_first():
    model, x, y = make("mlp")
    with torch.no_grad():
        model[2].bias[3] = -1e6
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.1), 0.02)
    start = ap.snapshot(model)
    train(model, x, y)
    moved = (model[2].weight - start["2.weight"]).abs()
    assert not moved[3].any()
    assert moved[:3].any()
    log = ap.fit(model).log["ap"]
    assert sum(int(mask.sum()) for mask in log.values()) == 5
    assert not any((dict(model.named_parameters())[k] - start[k])[mask].any() for k, mask in log.items())
    train(model, x, y, decay=1e-2)
    assert (model[2].weight[3] != start["2.weight"][3]).all()  # decay moves every weight


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_without_a_negative_weight_no_unit_fed_by_a_relu_is_silent_more_often(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3))
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.3), 0.1, criterion="random")
    start = ap.snapshot(model)
    x = torch.randn(20, 5)
    plan = ap.fit(model, w_start=start)
    after = copy.deepcopy(model)
    PruningPlan({"2.weight": ~plan.log["ap"]["2.weight"]}).apply(after)
    below, above = model[:3](x), after[:3](x)
    assert (above >= below - 1e-6).all()
    before_rate, after_rate = (dead_neuron_rate(m[:4], x).per_layer["3"].total for m in (model, after))
    assert after_rate <= before_rate


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    quota=st.integers(1, 400),
    sample=st.sampled_from([1, 50, 2**17]),
    chunk=st.sampled_from([7, 2**16]),
)
def test_the_selection_is_that_of_a_sort(seed, quota, sample, chunk):
    rng = torch.Generator().manual_seed(seed)
    sizes = [37, 300, 1]
    ends = [torch.randn(n, generator=rng) for n in sizes]
    starts = [(w + 0.1 * torch.randn(len(w), generator=rng)).mul(8).round() / 8 for w in ends]
    ends = [w.mul(8).round() / 8 for w in ends]  # many ties
    keeps = [torch.rand(n, generator=rng) < 0.7 for n in sizes]
    old = module._SAMPLE, module._CHUNK
    module._SAMPLE, module._CHUNK = sample, chunk
    try:
        arrays = [module._Layer(*(t.numpy() for t in (w, w, s, k)), -1) for w, s, k in zip(ends, starts, keeps, strict=True)]
        tensors = [module._Layer(w, w, s, k, -1) for w, s, k in zip(ends, starts, keeps, strict=True)]
        got, other = module._first(arrays, quota), module._first(tensors, quota)
    finally:
        module._SAMPLE, module._CHUNK = old
    entries = [
        (float((w[i] - s[i]).abs()), layer, i)
        for layer, (w, s, k) in enumerate(zip(ends, starts, keeps, strict=True))
        for i in range(len(w))
        if k[i] and w[i] < 0
    ]
    expected = sorted((layer, i) for _, layer, i in sorted(entries)[:quota])
    for found in (got, other):
        assert [(layer, int(i)) for layer, index in enumerate(found) for i in index] == expected


def test_a_sample_that_misleads_changes_nothing(monkeypatch):
    monkeypatch.setattr(module, "_SAMPLE", 1000)
    start = -torch.ones(40_000)
    end = start - 0.25
    end[::40] = -1.0  # what the sample looks at has not moved, all else has
    layer = module._Layer(*(t.numpy() for t in (end, end, start, torch.ones(40_000, dtype=torch.bool))), -1)
    still = torch.arange(0, 40_000, 40)
    (index,) = module._first([layer], 2000)
    assert len(index) == 2000
    assert torch.isin(still, index).all()
    assert torch.equal(index[~torch.isin(index, still)], torch.tensor([i for i in range(1100) if i % 40])[:1000])


def test_a_later_cycle_goes_on_from_the_masks_and_needs_its_own_snapshot():
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.2), 0.02)
    model, data, _ = cycled(ap)
    first = fit(ap, model, data)
    first.apply(model)
    with pytest.raises(RuntimeError, match=r"call snapshot\(\) at the start of the cycle: the model has been pruned since"):
        fit(ap.at(0.36), model, data)
    ap.snapshot(model)
    train(model, *data[0])
    second = fit(ap.at(0.36), model, data)
    N = size(model)
    assert second.sparsity() == round(0.36 * N) / N
    assert taken(second, "ap") == round(0.02 * N)
    assert taken(second, "host") == round(0.36 * N) - round(0.2 * N) - round(0.02 * N)
    assert not any((second.masks[k] & ~mask).any() for k, mask in first.masks.items())
    with pytest.raises(ValueError, match=r"rate 0.02 asks AP to remove 5 of 264 weights.* only 2 go: lower the rate"):
        fit(ap.at(0.21), model, data)
    assert taken(fit(ap.at(0.21, rate=0.005), model, data), "ap") == 1
    with pytest.raises(ValueError, match="are already pruned"):
        fit(ap.at(0.1), model, data)


def test_the_start_can_be_given():
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.2), 0.02)
    model, data, start = cycled(ap)
    noted = fit(ap, model, data)
    fresh = ActivateWhilePruning(GlobalMagnitudePruner(0.2), 0.02)
    for w_start in (start, make("mlp")[0].state_dict()):
        given_ = fresh.fit(model, w_start=w_start)
        assert all(torch.equal(noted.masks[k], mask) for k, mask in given_.masks.items())
    masked = make("mlp")[0]
    nn.utils.prune.identity(masked[2], "weight")
    assert all(torch.equal(noted.masks[k], mask) for k, mask in fresh.fit(model, w_start=masked.state_dict()).masks.items())
    with pytest.raises(RuntimeError, match=r"call snapshot\(\) at the start of the cycle"):
        fresh.fit(model)
    with pytest.raises(
        ValueError, match=r"does not fit the model: '2.weight' has shape \(3, 3\) there and has shape \(12, 12\) here"
    ):
        fresh.fit(model, w_start={**start, "2.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"'0\.weight' is missing there"):
        fresh.fit(model, w_start={})
    with pytest.raises(TypeError, match=r"data must be batches.*got a mapping: weights at the start go by keyword, w_start="):
        fresh.fit(model, start)
    fresh.snapshot(nn.Sequential(nn.Linear(6, 13)))
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \(13, 6\) there and has shape \(12, 6\) here"):
        fresh.fit(model)


def test_a_host_that_corrects_weights():
    ap = ActivateWhilePruning(MFACPruner(0.6, window=4, recomputations=2), 0.5)
    model, data, _ = cycled(ap)
    with pytest.warns(UserWarning, match="AP finds fewer"):
        plan = fit(ap, model, data)
    assert plan.deltas
    assert plan.sparsity() == round(0.6 * size(model)) / size(model)
    plan.apply(model)


def test_iterating_trains_prunes_and_rewinds():
    model, x, y = make("residual")
    beginning = {k: v.clone() for k, v in model.state_dict().items()}
    seen, sparsities = [], successive_sparsities(1 - 0.8**4, 4)

    def train_(net: nn.Module) -> None:
        seen.append(torch.cat([m.weight.detach().flatten() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]))
        train(net, x, y, steps=2)

    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.2), 0.02)
    plan = ap.iterate(model, sparsities, train_)
    N = sum(mask.numel() for mask in plan.masks.values())
    counts = [round(s * N) for s in sparsities]
    assert plan.sparsity() == counts[-1] / N
    assert [int((w == 0).sum()) for w in seen] == [0, *counts[:-1]]
    assert all(((late != 0) <= (early != 0)).all() for early, late in itertools.pairwise(seen))
    # The part of AP is a tenth of what each cycle removes, as in the first.
    assert taken(plan, "ap") == round(0.1 * (counts[-1] - counts[-2]))
    # Rewound: every surviving weight, norm and statistic is what it was at the beginning.
    for w in seen[1:]:
        assert torch.equal(w[w != 0], seen[0][w != 0])
    after = {k.removesuffix("_orig"): v for k, v in model.state_dict().items() if not k.endswith("_mask")}
    assert all(torch.equal(v, beginning[k]) for k, v in after.items())
    assert all(torch.equal(beginning[k] * mask, model.get_submodule(k[:-7]).weight) for k, mask in plan.masks.items())


def test_iterating_without_rewinding_goes_on_from_the_trained_weights():
    model, x, y = make("mlp")
    start, seen = model[2].weight.detach().clone(), []

    def train_(net: nn.Module) -> None:
        seen.append(net[2].weight.detach().clone())
        train(net, x, y, steps=2)

    plan = ActivateWhilePruning(GlobalMagnitudePruner(0.2), 0.02).iterate(model, [0.2, 0.4], train_, rewind=False)
    kept = seen[1] != 0
    assert not torch.equal(seen[1][kept], start[kept])
    assert plan.sparsity() == round(0.4 * 264) / 264


@pytest.mark.parametrize(("when", "active"), [("every", [1, 1, 1]), ("last", [0, 0, 1]), ([0, 2], [1, 0, 1]), ((), [0, 0, 0])])
def test_the_cycles_of_ap(when, active, monkeypatch):
    plans = []
    whole = ActivateWhilePruning.fit
    monkeypatch.setattr(ActivateWhilePruning, "fit", lambda *args, **kwargs: plans.append(whole(*args, **kwargs)) or plans[-1])
    model, x, y = make("mlp")
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.2), 0.02, when=when)
    for _ in range(2):
        plans.clear()
        fresh = copy.deepcopy(model)
        ap.iterate(fresh, [0.2, 0.36, 0.5], lambda net: train(net, x, y, steps=1))
        assert [taken(plan, "ap") > 0 for plan in plans] == [bool(a) for a in active]
        assert [plan.sparsity() for plan in plans] == [round(s * size(model)) / size(model) for s in (0.2, 0.36, 0.5)]


def test_rate_zero_iterated_is_magnitude_pruning_with_rewinding():
    model, x, y = make("mlp")
    by_hand, host = copy.deepcopy(model), GlobalMagnitudePruner(0.0)
    first = {k: v.clone() for k, v in model.state_dict().items()}
    for sparsity in (0.3, 0.5):
        train(by_hand, x, y)
        plan = host.at(sparsity).fit(by_hand)
        plan.apply(by_hand)
        with torch.no_grad():
            for k, p in by_hand.named_parameters():
                p.copy_(first[k.removesuffix("_orig")])
    got = ActivateWhilePruning(host, 0.0).iterate(model, [0.3, 0.5], lambda net: train(net, x, y))
    assert all(torch.equal(plan.masks[k], mask) for k, mask in got.masks.items())


def test_plans_and_pruners_survive_saving_and_pickling(tmp_path):
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.4), 0.04)
    model, data, _ = cycled(ap)
    plan = fit(pickle.loads(pickle.dumps(ap)), model, data)
    plan.save(tmp_path / "plan.safetensors")
    loaded = PruningPlan.load(tmp_path / "plan.safetensors")
    assert all(torch.equal(loaded.masks[k], mask) for k, mask in plan.masks.items())
    again = pickle.loads(pickle.dumps(plan))
    assert all(torch.equal(again.log["ap"][k], mask) for k, mask in plan.log["ap"].items())
    assert plan.apply(model) is model
    assert plan.macs(data[0][0]) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = make("mlp")[0].to(dtype)
    ap = ActivateWhilePruning(GlobalMagnitudePruner(0.4), 0.04)
    ap.snapshot(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    plan = ap.fit(model)
    assert taken(plan, "ap") == round(0.04 * size(model))


def test_channels_last_weights():
    plans = []
    for format in (torch.contiguous_format, torch.channels_last):
        model = make("cnn")[0].to(memory_format=format)
        ap = ActivateWhilePruning(GlobalMagnitudePruner(0.4), 0.04)
        ap.snapshot(model)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        plans.append(ap.fit(model))
    assert all(torch.equal(plans[1].masks[k], mask) for k, mask in plans[0].masks.items())


def test_errors():
    host = GlobalMagnitudePruner(0.2)
    with pytest.raises(TypeError, match=r"base must be a plan pruner.*got float"):
        ActivateWhilePruning(0.2)
    for rate in (0.21, -0.01, float("nan")):
        with pytest.raises(ValueError, match=r"rate must be >= 0 and <= 0.2"):
            ActivateWhilePruning(host, rate)
    with pytest.raises(ValueError, match=r"rate must be >= 0 and <= 0.01"):
        ActivateWhilePruning(host, 0.02).at(0.01)
    with pytest.raises(ValueError, match="unknown criterion 'gradient'"):
        ActivateWhilePruning(host, criterion="gradient")
    with pytest.raises(ValueError, match="unknown sign 'both'"):
        ActivateWhilePruning(host, sign="both")
    with pytest.raises(ValueError, match="unknown when 'first'"):
        ActivateWhilePruning(host, when="first")
    with pytest.raises(ValueError, match="when must be"):
        ActivateWhilePruning(host, when=[-1])
    with pytest.raises(ValueError, match="sparsities must not be empty"):
        ActivateWhilePruning(host).iterate(make("mlp")[0], [], lambda m: None)
    assert repr(ActivateWhilePruning(host)) == "ActivateWhilePruning(GlobalMagnitudePruner(sparsity=0.2), rate=0.02)"
    assert ActivateWhilePruning(host, 0.2).sparsity == 0.2
