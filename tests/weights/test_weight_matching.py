"""Weight matching: permutations leave the function alone, are found where they were planted, and what is measured is right."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from tests.prune import zoo
from weightroom.nets.small import MLP, ConvNet, ResNet
from weightroom.prune import GlobalMagnitudePruner
from weightroom.weights import (
    PermutationSpec,
    alignment_score,
    apply_permutation,
    interpolate,
    l2_reduction,
    loss_barrier,
    loss_path,
    match_many,
    merge_many,
    reestimate_batchnorm,
    ste_matching,
    taylor_barrier,
    weight_matching,
)
from weightroom.weights.weight_matching import _polar


class Single(nn.Module):
    """A residual connection around one layer: its weight has one permutation on both axes."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(torch.tanh(h + self.inner(h)))


class Odd(nn.Module):
    """Everything else that the tracer follows."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(1, 6, 2, stride=2)
        self.group = nn.GroupNorm(1, 6)
        self.prelu = nn.PReLU(6)
        self.conv = nn.Conv2d(6, 4, 3, bias=False)
        self.inst = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.layer = nn.LayerNorm((4, 14, 14))
        self.gate = nn.Linear(4, 4)
        self.flat = nn.BatchNorm1d(4 * 49)
        self.hidden = nn.Linear(4 * 49, 5)
        self.norm = nn.LayerNorm(5)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(5, 3)
        self.register_buffer("mean", torch.rand(1, 1, 1))

    def forward(self, x):
        x = self.prelu(self.group(self.up((x - self.mean) / 2)))
        x = self.layer(self.inst(F.relu(self.conv(x), inplace=True)))
        x = x * torch.sigmoid(self.gate(x.mean(dim=(-1, -2)))).view(x.size(0), 4, 1, 1)
        x = F.max_pool2d(x, 2).flatten(1)
        return F.log_softmax(self.out(self.drop(self.norm(self.hidden(self.flat(x)).relu()))), dim=1)


class Tokens(nn.Module):
    """Units along the last axis of sequences."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.embed(x)
        h = h + self.down(nn.functional.gelu(self.up(self.norm(h))))
        return self.head(h.mean(1)) + h.sum()


def vgg():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 4, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 4),
    )  # fmt: skip


def data(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=g)
    return [(x[i : i + 15], (x[i : i + 15, 0] * x[i : i + 15, 1] > 0).long()) for i in range(0, n, 15)]


IMAGE = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NETS = {
    "mlp": (lambda: MLP((64, 9, 7, 4)), IMAGE, 2),
    "cnn": (zoo.cnn, IMAGE, 3),
    "vgg": (vgg, IMAGE, 3),
    "conv net": (lambda: ConvNet(1, 4, channels=(4, 5, 6, 7), hidden=8), IMAGE, 5),
    "resnet": (lambda: ResNet(1, 4, blocks=(2, 1, 1), width=4), IMAGE, 7),
    "residual": (zoo.Residual, IMAGE, 3),
    "single": (Single, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), 1),
    "odd": (Odd, IMAGE, 3),
    "tokens": (Tokens, torch.arange(10).reshape(2, 5) % 7, 2),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.Tanh(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(15, 3)), torch.randn(2, 2, 8), 1),
}  # fmt: skip


def make(name, seed=0):
    """A model whose norms have been somewhere, its spec and its input."""
    factory, x, _ = NETS[name]
    torch.manual_seed(seed)
    model = factory()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and value.ndim in (1, 3):
                value.add_(torch.rand(value.shape, generator=g))
    return model.eval(), PermutationSpec.trace(model, x), x


def shuffled(spec, state, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(n, generator=g) for name, n in spec.sizes(state).items()}


def inverse(perm):
    return {name: p.argsort() for name, p in perm.items()}


def noise(state, seed=0, size=1.0):
    g = torch.Generator().manual_seed(seed)
    return {k: v + size * torch.randn(v.shape, generator=g).to(v) if v.is_floating_point() else v for k, v in state.items()}


def agreement(spec, a, b):
    return sum(
        (a[k].double() * b[k].double()).sum() for k in spec.axes_to_perm if not k.endswith(("running_mean", "running_var"))
    )


# ---- the spec


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_permutation_leaves_the_function_and_changes_the_weights(name, seed):
    model, spec, x = make(name)
    assert len(spec.perm_to_axes) == NETS[name][2]
    state = model.state_dict()
    permuted = apply_permutation(spec, shuffled(spec, state, seed), state)
    other = copy.deepcopy(model)
    other.load_state_dict(permuted)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=2e-6)
    for key in spec.axes_to_perm:
        assert permuted[key].ndim == 0 or not torch.equal(permuted[key], state[key]), key
    for module in (*model.modules(), *other.modules()):
        module.training = not isinstance(module, nn.Dropout)
    trained, expected = other(x), model(x)
    assert any(isinstance(module, _NormBase) for module in model.modules()) == (not torch.equal(expected, model.eval()(x)))
    torch.testing.assert_close(trained, expected, atol=2e-5, rtol=0)


def test_every_tensor_of_a_perceptron_and_a_residual_network_is_in_the_spec():
    for name in ("mlp", "resnet", "vgg"):
        model, spec, _ = make(name)
        hidden = [key for key in model.state_dict() if "num_batches" not in key]
        assert set(hidden) - set(spec.axes_to_perm) == {hidden[-1]}, name  # the bias of the outputs


def test_traced_spec_of_a_perceptron_is_the_one_made_by_hand():
    model, spec, _ = make("mlp")
    by_hand = PermutationSpec(axes_to_perm={
        "1.weight": ("P_1", None), "1.bias": ("P_1",), "3.weight": ("P_3", "P_1"), "3.bias": ("P_3",), "5.weight": (None, "P_3"),
    })  # fmt: skip
    assert {k: set(v) for k, v in spec.perm_to_axes.items()} == {k: set(v) for k, v in by_hand.perm_to_axes.items()}
    assert PermutationSpec(by_hand.perm_to_axes) == by_hand
    assert by_hand.axes_to_perm["5.weight"] == (None, "P_3")
    assert by_hand.sizes(model.state_dict()) == {"P_1": 9, "P_3": 7}


def test_flattening_by_hand_moves_blocks_of_columns():
    spec = PermutationSpec(
        axes_to_perm={"0.weight": ("P",), "0.bias": ("P",), "5.weight": (None, None)} | {"6.weight": (None, "Q")} | {}
    )
    assert spec.axes_to_perm.keys() == {"0.weight", "0.bias", "6.weight"}
    state = {"conv": torch.arange(3.0).reshape(3, 1, 1, 1), "fc": torch.arange(6.0)[None], "norm": torch.arange(6.0)}
    spec = PermutationSpec(axes_to_perm={"conv": ("P", None, None, None), "fc": (None, "P"), "norm": ("P",)})
    moved = apply_permutation(spec, {"P": [2, 0, 1]}, state)
    assert moved["conv"].flatten().tolist() == [2, 0, 1]
    assert moved["fc"][0].tolist() == moved["norm"].tolist() == [4, 5, 0, 1, 2, 3]


def test_tracing_leaves_the_model_and_the_random_state():
    torch.manual_seed(0)

    class Noisy(nn.Module):
        def forward(self, x):
            return F.dropout(x)

    model, x = nn.Sequential(nn.ReLU(inplace=True), *vgg(), Noisy()).train(), IMAGE.clone()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    spec = PermutationSpec.trace(model, (x,))
    assert len(spec.perm_to_axes) == 3
    assert model.training
    assert torch.equal(x, IMAGE)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_tied_layers_share_their_permutation():
    model, x, _ = zoo.make("tied")
    assert PermutationSpec.trace(model, x).perm_to_axes == {}  # the shared weight reads the inputs, so nothing is free

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.alias = self.inner

        def forward(self, x):
            return self.last(torch.tanh(self.alias(torch.tanh(self.inner(torch.tanh(self.first(x)))))))

    model, x = Twice(), torch.randn(3, 4)
    spec = PermutationSpec.trace(model, x)
    assert len(spec.perm_to_axes) == 1
    assert {"inner.weight", "alias.weight"} <= set(spec.axes_to_perm)
    other = copy.deepcopy(model)
    other.load_state_dict(apply_permutation(spec, shuffled(spec, model.state_dict(), 3), model.state_dict()))
    torch.testing.assert_close(other(x), model(x))


class Branch(nn.Module):
    """A forward pass that depends on the kind of its input, which torch.fx replaces by a proxy."""

    def __init__(self, other):
        super().__init__()
        self.a, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(other, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return self.c(h) if isinstance(h, torch.Tensor) else self.d(h)


class Padded(nn.Module):
    """Empty channels around the hidden ones, as in the shortcuts of the first residual networks."""

    def __init__(self, last):
        super().__init__()
        self.a, self.c = nn.Conv2d(1, 4, 3), last

    def forward(self, x):
        h = F.pad(self.a(x), (1, 1, 0, 0, 2, 2))
        return self.c(h if isinstance(self.c, nn.Conv2d) else h.mean((2, 3)))


def masked():
    """A pruned model whose masked weights, after a forward pass with gradients, are no leaves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    GlobalMagnitudePruner(0.5).fit(model).apply(model)
    model(data()[0][0]).sum().backward()
    return model


class Call(nn.Module):
    def __init__(self, function, *layers):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize(
    "model, x, message",
    [
        (zoo.mobile(), IMAGE, "module '3' .*grouped"),
        (nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 5)), torch.randn(2, 5, 6), "module '1' .LSTM"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 2)), IMAGE, "module '1' .GroupNorm"),
        (nn.Sequential(nn.Linear(8, 6), nn.GLU(), nn.Linear(3, 2)), torch.randn(2, 8), "module '1' .GLU"),
        (nn.Sequential(nn.Linear(8, 6), nn.MaxPool1d(2), nn.Linear(3, 2)), torch.randn(2, 8), "module '1' .MaxPool1d"),
        (nn.Sequential(nn.Linear(8, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 2)), torch.randn(2, 8), "module '1'"),
        (Call(lambda h: torch.cat([h, h], 0)), torch.randn(2, 4), "function 'cat'"),
        (Call(lambda h: h.view(-1, 3, 2).flatten(1)), torch.randn(2, 4), "reshaping"),
        (Call(lambda h: h + h[:, :1]), torch.randn(2, 4), "function 'getitem'"),
        (Call(lambda h: h if h.sum() > 0 else -h), torch.randn(2, 4), "cannot be traced"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) and nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 4), "computed from"),
        (masked(), torch.randn(2, 8), "module '0' .*computed from"),
        (Branch(6), torch.randn(2, 4), "Branch .* branch .*describe the model by"),
        (Branch(5), torch.randn(2, 4), "Branch cannot be traced .*describe the model by"),
        (Padded(nn.Linear(8, 3)), IMAGE, "function 'pad' across"),
        (Padded(nn.Conv2d(8, 3, 3)), IMAGE, "function 'pad' across"),
        (nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(1), nn.Linear(64, 5)), IMAGE[0], "module '0' .*batch"),
        (nn.Sequential(nn.Conv1d(1, 6, 3), nn.MaxPool2d(3, 1, 1), nn.Flatten(), nn.Linear(36, 5)), IMAGE[:, 0, :1], "not all .*describe"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_named(model, x, message):
    with pytest.raises(NotImplementedError, match=message):
        PermutationSpec.trace(model, x)


def test_units_that_become_more_are_refused():
    model = Call(lambda h: F.interpolate(h.unsqueeze(2), scale_factor=2).flatten(1))
    model.last = nn.Linear(12, 3)
    with pytest.raises(NotImplementedError, match=r"not all .*'last.weight' has length 12.*describe the model by"):
        PermutationSpec.trace(model, torch.randn(2, 4))


def test_a_single_unit_is_spread_over_many():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gate, self.out = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 1, 1), nn.Linear(6, 2)

        def forward(self, x):
            h = self.a(x)
            return self.out((h * torch.sigmoid(self.gate(h))).mean((2, 3))) + self.gate(h).amax((2, 3))

    model = Gated()
    spec = PermutationSpec.trace(model, IMAGE)
    assert spec.sizes(model.state_dict()) == {"P_a": 6, "P_gate": 1}


def test_what_is_zero_at_first_hides_no_mistake():
    model = nn.Sequential(nn.Conv1d(1, 6, 3), nn.MaxPool2d(3, 1, 1), nn.Flatten(), nn.Linear(36, 5))
    nn.init.zeros_(model[3].weight)
    with pytest.raises(NotImplementedError, match="not all"):
        PermutationSpec.trace(model, IMAGE[:, 0, :1])


def test_a_model_that_cannot_take_the_example_says_so_itself():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        PermutationSpec.trace(MLP((9, 5, 2)), torch.randn(2, 8))
    assert not isinstance(caught.value, NotImplementedError)


def test_units_that_meet_something_fixed_are_not_permuted():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.scale = nn.Parameter(torch.rand(6))

        def forward(self, x):
            return self.c(self.scale * torch.relu(self.b(x + self.a(x))))

    assert PermutationSpec.trace(Fixed(), torch.randn(2, 6)).perm_to_axes == {}


def test_what_does_not_fit_is_said():
    model, spec, _ = make("mlp")
    state = model.state_dict()
    perm = shuffled(spec, state)
    for wrong, message in (
        (perm | {"P_1": torch.zeros(9, dtype=torch.long)}, "'P_1' must hold each of 0..8 once"),
        (perm | {"P_1": torch.arange(8)}, "'P_1' must hold each of 0..8 once"),
        (perm | {"P_1": torch.arange(9.0)}, "'P_1' must hold each of 0..8 once"),
        ({"P_1": perm["P_1"]}, "'P_3' is missing"),
        (perm | {"P_9": perm["P_1"]}, "'P_9' is not in the spec"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_permutation(spec, wrong, state)
    with pytest.raises(ValueError, match="must hold each"):
        weight_matching(spec, state, state, init=perm | {"P_1": torch.zeros(9, dtype=torch.long)})
    for axes, message in (
        ({"1.weight": ("P", "P")}, "axis 1 of '1.weight' has length 64, but permutation 'P' has 9 units"),
        ({"1.bias": ("P",), "3.bias": ("P",)}, "axis 0 of '1.bias' has length 9, but permutation 'P' has 7 units"),
        ({"5.weight": ("P",), "x": ("P",)}, "'x', which the state does not have"),
        ({"1.bias": (None, "P")}, "axis 1 of '1.bias'"),
    ):
        with pytest.raises(ValueError, match=message):
            weight_matching(PermutationSpec(axes_to_perm=axes), state, state)
    twice = PermutationSpec(
        axes_to_perm={"w": ("P", None), "v": ("P",)}
    )  # a multiple, but no convolution whose channels it flattens
    with pytest.raises(ValueError, match="axis 0 of 'v' has length 8"):
        twice.sizes({"w": torch.zeros(4, 2), "v": torch.zeros(8)})
    for arguments in ({}, {"perm_to_axes": {}, "axes_to_perm": {}}):
        with pytest.raises(ValueError, match="either perm_to_axes or axes_to_perm"):
            PermutationSpec(**arguments)
    for arguments in ({"perm_to_axes": {"a": ("P", None)}}, {"axes_to_perm": {"P": [("a", 0)]}}, {"axes_to_perm": {"a": "P"}}):
        with pytest.raises(ValueError, match="must map"):
            PermutationSpec(**arguments)


def test_states_that_differ_are_refused_everywhere():
    model, spec, _ = make("mlp")
    state = model.state_dict()
    less, other = {k: v for k, v in state.items() if k != "3.bias"}, state | {"3.weight": torch.zeros(7, 8)}
    for call in (
        lambda b: weight_matching(spec, state, b),
        lambda b: interpolate(state, b, 0.5),
        lambda b: alignment_score(spec, state, b),
        lambda b: merge_many(spec, [state, b]),
        lambda b: l2_reduction(spec, state, b, shuffled(spec, state)),
        lambda b: loss_barrier(model, state, b, [], F.cross_entropy),
        lambda b: taylor_barrier(model, state, b, [], F.cross_entropy),
        lambda b: ste_matching(spec, model, state, b, [], F.cross_entropy, 1),
    ):
        with pytest.raises(ValueError, match=r"the second has no '3.bias'"):
            call(less)
        with pytest.raises(ValueError, match=r"'3.weight' has shapes \(7, 9\) and \(7, 8\)"):
            call(other)
    with pytest.raises(ValueError, match=r"the first has no '3.bias'"):
        weight_matching(spec, less, state)


# ---- weight matching


@pytest.mark.parametrize("name", [n for n in NETS if n != "single"])
def test_a_planted_permutation_is_found(name):
    model, spec, _ = make(name)
    a = model.state_dict()
    planted = shuffled(spec, a, 7)
    b = noise(apply_permutation(spec, planted, a), 1, 1e-3)
    perm = weight_matching(spec, a, b)
    assert all(torch.equal(perm[name], p) for name, p in inverse(planted).items())
    assert all(p.dtype == torch.int64 for p in perm.values())
    found = apply_permutation(spec, perm, b)
    assert all((found[key].double() - a[key].double()).abs().max() < 0.01 for key in a)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(2, 6))
def test_one_hidden_layer_is_solved_exactly_in_one_sweep(seed, n):
    torch.manual_seed(seed)
    nets = [nn.Sequential(nn.Linear(3, n), nn.ReLU(), nn.Linear(n, 2)) for _ in range(2)]
    a, b = (net.state_dict() for net in nets)
    spec = PermutationSpec.trace(nets[0], torch.randn(1, 3))
    perm = weight_matching(spec, a, b, max_sweeps=1)
    values = [agreement(spec, a, apply_permutation(spec, {"P_0": list(p)}, b)) for p in itertools.permutations(range(n))]
    assert agreement(spec, a, apply_permutation(spec, perm, b)) == pytest.approx(float(max(values)), abs=1e-9)


@pytest.mark.parametrize("name", NETS)
def test_the_objective_rises_from_sweep_to_sweep_to_a_fixed_point(name):
    (model, spec, _), (other, _, _) = make(name), make(name, 1)
    a, b = model.state_dict(), other.state_dict()
    steps = [weight_matching(spec, a, b, max_sweeps=k, seed=3) for k in range(12)]
    values = [float(agreement(spec, a, apply_permutation(spec, perm, b))) for perm in steps]
    assert all(y >= x for x, y in itertools.pairwise(values))
    assert values[-1] > values[0]
    assert all(torch.equal(p, torch.arange(len(p))) for p in steps[0].values())
    again = weight_matching(spec, a, b, init=steps[-1], seed=9)
    assert all(torch.equal(again[k], p) for k, p in steps[-1].items())
    assert l2_reduction(spec, a, b, steps[-1]) > 0


def test_a_permutation_of_both_axes_of_a_weight_is_taken_only_where_it_helps():
    spec = PermutationSpec(axes_to_perm={"w": ("P", "P")})
    moved = 0
    for seed in range(30):
        torch.manual_seed(seed)
        a, b = ({"w": torch.randn(5, 5, dtype=torch.float64)} for _ in range(2))
        perms = [weight_matching(spec, a, b, max_sweeps=k) for k in range(4)]
        values = [float(agreement(spec, a, apply_permutation(spec, perm, b))) for perm in perms]
        assert values == sorted(values)
        moved += values[-1] > values[0]
    assert moved > 10


def test_the_order_of_visits_depends_on_the_seed_alone():
    (model, spec, _), (other, _, _) = make("resnet"), make("resnet", 1)
    a, b = model.state_dict(), other.state_dict()
    first = weight_matching(spec, a, b, seed=1)
    torch.rand(1)
    rng = torch.get_rng_state()
    second = weight_matching(spec, a, b, seed=1)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(first[k], second[k]) for k in first)
    several = {tuple(torch.cat(list(weight_matching(spec, a, b, seed=s).values())).tolist()) for s in range(6)}
    assert len(several) > 1


def test_running_statistics_follow_their_units_but_do_not_choose_them():
    model, spec, _ = make("resnet")
    a = model.state_dict()
    b = {k: 100 * torch.rand_like(v) if k.endswith(("running_mean", "running_var")) else v.clone() for k, v in a.items()}
    assert all(torch.equal(p, torch.arange(len(p))) for p in weight_matching(spec, a, b).values())
    perm = shuffled(spec, a)
    name = spec.axes_to_perm["stem.1.weight"][0]
    assert torch.equal(apply_permutation(spec, perm, a)["stem.1.running_var"], a["stem.1.running_var"][perm[name]])
    assert l2_reduction(spec, a, b, perm) == 0  # a and b are the same but for the statistics
    only = PermutationSpec(axes_to_perm={"stem.1.running_mean": ("P",)})
    assert weight_matching(only, a, b)["P"].tolist() == [0, 1, 2, 3]


def test_weights_of_any_precision_and_not_finite_ones():
    model, spec, _ = make("mlp")
    a = model.state_dict()
    planted = shuffled(spec, a, 2)
    b = apply_permutation(spec, planted, a)
    half = weight_matching(spec, {k: v.bfloat16() for k, v in a.items()}, {k: v.bfloat16() for k, v in b.items()})
    assert all(torch.equal(half[k], p) for k, p in inverse(planted).items())
    with pytest.raises(ValueError, match="permutation 'P_3' moves are not finite"):
        weight_matching(spec, a, b | {"5.weight": torch.full((4, 7), torch.nan)})
    with pytest.raises(ValueError, match="max_sweeps"):
        weight_matching(spec, a, b, max_sweeps=-1)


def test_nothing_that_is_passed_in_changes():
    (model, spec, _), (other, _, _) = make("vgg"), make("vgg", 1)
    a, b = model.state_dict(), other.state_dict()
    copies = [copy.deepcopy(a), copy.deepcopy(b)]
    init = shuffled(spec, a)
    kept = copy.deepcopy(init)
    weight_matching(spec, a, b, init=init)
    moved = apply_permutation(spec, init, b)
    match_many(spec, [a, b])
    for value in [
        *moved.values(),
        *interpolate(a, b, 0.0).values(),
        *interpolate(a, b, 1.0).values(),
        *merge_many(spec, [a]).values(),
    ]:
        value.zero_()
    for state, before in zip((a, b, init), (*copies, kept), strict=True):
        assert all(torch.equal(state[k], before[k]) for k in state)


# ---- the theorem and the score


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 8), columns=st.integers(1, 8))
def test_the_distance_is_a_sum_over_singular_vectors(seed, rows, columns):
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(rows, columns, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = torch.randperm(rows, generator=g), torch.randperm(columns, generator=g)
    spec = PermutationSpec(axes_to_perm={"w": ("P", "Q")})
    moved = apply_permutation(spec, {"P": p, "Q": q}, {"w": B})["w"]
    (Ua, sa, Va), (Ub, sb, Vb) = (torch.linalg.svd(W, full_matrices=False) for W in (A, B))
    double = (sa[:, None] * sb * (Ua.T @ Ub[p]) * (Va @ Vb[:, q].T)).sum()
    assert (A - moved).square().sum().item() == pytest.approx(float(A.square().sum() + B.square().sum() - 2 * double), abs=1e-8)
    torch.testing.assert_close(torch.linalg.svdvals(moved), sb, rtol=0, atol=1e-8)


def brute_score(spec, a, b, gamma):
    total = count = 0.0
    for key in spec.axes_to_perm:
        if a[key].ndim < 2:
            continue
        (Ua, sa, Va), (Ub, sb, Vb) = (torch.linalg.svd(s[key].double().flatten(1), full_matrices=False) for s in (a, b))
        keep = [[i for i in range(len(s)) if s[i] >= gamma * s[0]] for s in (sa, sb)]
        total += sum(float((Ua[:, i] @ Ub[:, j]) * (Va[i] @ Vb[j])) for i in keep[0] for j in keep[1])
        count += math.sqrt(len(keep[0]) * len(keep[1]))
    return total / count


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_the_score_is_the_double_sum(name, gamma):
    (model, spec, _), (other, _, _) = make(name), make(name, 1)
    a, b = model.state_dict(), other.state_dict()
    score = alignment_score(spec, a, b, gamma)
    assert score == pytest.approx(brute_score(spec, a, b, gamma), abs=1e-6)
    assert abs(score) < 0.5
    assert alignment_score(spec, a, a, gamma) == pytest.approx(1, abs=1e-6)
    assert alignment_score(spec, a, {k: -v for k, v in a.items()}, gamma) == pytest.approx(-1, abs=1e-6)
    perm = shuffled(spec, a, 5)
    both = (apply_permutation(spec, perm, s) for s in (a, b))
    assert alignment_score(spec, *both, gamma) == pytest.approx(score, abs=1e-6)
    aligned = apply_permutation(spec, weight_matching(spec, a, b), b)
    if gamma < 0.5:
        assert alignment_score(spec, a, aligned, gamma) > score


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("dtype, within", [(torch.float16, 0.01), (torch.bfloat16, 0.05), (torch.float64, 1e-6)])
def test_the_score_of_other_precisions(dtype, within, gamma):
    torch.manual_seed(0)
    a = {"w": torch.randn(600, 100), "v": torch.randn(2, 600)}
    spec = PermutationSpec(axes_to_perm={"w": ("P", None), "v": (None, "P")})
    b = {key: w + 0.5 * torch.randn_like(w) for key, w in a.items()}
    half_a, half_b = ({key: w.to(dtype) for key, w in state.items()} for state in (a, b))
    assert alignment_score(spec, half_a, half_a, gamma) == pytest.approx(1, abs=1e-6)
    assert alignment_score(spec, half_a, half_b, gamma) == pytest.approx(alignment_score(spec, a, b, gamma), abs=within)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_singular_vectors_above_the_rounding_are_kept(dtype):
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 50, dtype=torch.float64)).Q for n in (600, 50))
    w = ((U * torch.logspace(0, -2, 50)) @ V.T).to(dtype)
    assert _polar(w, 0.0)[1] == 50
    assert _polar(w, 0.5)[1] == 8  # 10^(-2 i / 49) >= 1/2 for i = 0 to 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_makes_no_singular_vectors(dtype):
    torch.manual_seed(0)
    low = {"w": (torch.randn(60, 3, dtype=torch.float64) @ torch.randn(3, 50, dtype=torch.float64)).to(dtype)}
    exact = {"w": low["w"].double() + 1e-7 * torch.randn(60, 50, dtype=torch.float64)}
    assert _polar(low["w"], 0.0)[1] == 3
    assert _polar(exact["w"], 0.0)[1] == 50


def test_dead_units_have_no_singular_vectors():
    spec = PermutationSpec(axes_to_perm={"w": ("P", None)})
    w = torch.randn(5, 4)
    w[1:4] = 0
    assert alignment_score(spec, {"w": w}, {"w": w}) == pytest.approx(1)
    turned = torch.cat([w[:1], w[4:], w[1:4]])
    spec = PermutationSpec(axes_to_perm={"w": ("P", None)})
    for perm in itertools.permutations(range(5)):
        pair = ({"w": state[list(perm)]} for state in (w, turned))
        assert alignment_score(spec, *pair) == pytest.approx(alignment_score(spec, {"w": w}, {"w": turned}), abs=1e-6)
    zero = {"w": torch.zeros(5, 4)}
    assert alignment_score(spec, zero, zero) == 0
    for gamma in (-0.1, 1.1):
        with pytest.raises(ValueError, match="gamma"):
            alignment_score(spec, zero, zero, gamma)


def test_the_reduction_of_the_distance():
    spec = PermutationSpec(axes_to_perm={"w": ("P", None)})
    a, b = {"w": torch.tensor([[1.0], [0.0]])}, {"w": torch.tensor([[0.0], [2.0]])}
    assert l2_reduction(spec, a, b, {"P": [1, 0]}) == pytest.approx(1 - 1 / math.sqrt(5))
    assert l2_reduction(spec, a, b, {"P": [0, 1]}) == 0
    assert l2_reduction(spec, a, a, {"P": [1, 0]}) == 0


# ---- the line between two models


def pair(seed=0):
    torch.manual_seed(seed)
    nets = [nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 2)) for _ in range(2)]
    for net in nets:
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(40):
            for x, y in data():
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
    return nets[0], PermutationSpec.trace(nets[0], data()[0][0]), nets[0].state_dict(), nets[1].state_dict()


def test_interpolation():
    a, b = ({"w": torch.randn(3, dtype=torch.float64), "h": torch.randn(2).half(), "n": torch.tensor(k)} for k in (3, 8))
    for t, end in ((0.0, a), (1.0, b)):
        assert all(torch.equal(v, end[k]) for k, v in interpolate(a, b, t).items())
    quarter = interpolate(a, b, 0.25)
    torch.testing.assert_close(quarter["w"], 0.75 * a["w"] + 0.25 * b["w"])
    assert quarter["h"].dtype == torch.float16
    assert quarter["n"] == 3
    assert interpolate(a, b, 0.75)["n"] == 8
    with pytest.warns(UserWarning, match="outside"):
        torch.testing.assert_close(interpolate(a, b, 1.5)["w"], 1.5 * b["w"] - 0.5 * a["w"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interpolate(a, b, 1.0)
    for t in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="t must be"):
            interpolate(a, b, t)


def test_an_end_is_an_exact_copy_whatever_the_other_end_holds():
    a = {"w": torch.tensor([1.0, -2.0, 3.0]), "n": torch.tensor(1)}
    b = {"w": torch.tensor([torch.inf, torch.nan, -torch.inf]), "n": torch.tensor(2)}
    for t, one, other, end in ((0, a, b, a), (1, a, b, b), (0, b, a, b), (1, b, a, a)):
        found = interpolate(one, other, t)
        for key in end:
            torch.testing.assert_close(found[key], end[key], rtol=0, atol=0, equal_nan=True)
            assert found[key].data_ptr() != end[key].data_ptr()


def test_the_barrier_of_a_known_loss():
    """L(w) = w^4 - 2 w^2 has wells at +-1 and a bump of height 1 between them; its expansion at a well has curvature 8."""

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.w.expand(len(x))

    def loss(out, y):
        return (out**4 - 2 * out**2).mean()

    model, batches = Point(), [(torch.zeros(3), torch.zeros(3)), (torch.zeros(1), torch.zeros(1))]
    a, b = ({"w": torch.tensor(v)} for v in (-1.0, 1.0))
    assert loss_barrier(model, a, b, batches, loss) == pytest.approx(1.0)
    assert taylor_barrier(model, a, b, batches, loss) == pytest.approx((8 + 8) * 4 / 16)
    c = {"w": torch.tensor(2.0)}  # slope 24 and curvature 44 there, mu = 3, L(c) = 8
    assert taylor_barrier(model, a, c, batches, loss) == pytest.approx(-3 * 24 / 4 + (8 + 44) * 9 / 16)
    grid, losses = loss_path(model, a, c, batches, loss, points=4)
    assert grid == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert losses == pytest.approx([-1, 0, -1, 8], abs=1e-5)
    assert loss_barrier(model, a, c, batches, loss, points=4) == pytest.approx(0.0)
    assert loss_barrier(model, a, c, batches, loss, points=2) == 0


def test_the_barrier_of_networks():
    model, spec, a, b = pair()
    batches = data()
    assert loss_barrier(model, a, a, batches, F.cross_entropy) == 0
    naive = loss_barrier(model, a, b, batches, F.cross_entropy)
    assert loss_barrier(model, b, a, batches, F.cross_entropy) == pytest.approx(naive, abs=1e-6)
    matched = apply_permutation(spec, weight_matching(spec, a, b), b)
    assert loss_barrier(model, a, matched, batches, F.cross_entropy) < naive / 2
    _, losses = loss_path(model, a, b, batches, F.cross_entropy, points=3)
    model.load_state_dict(interpolate(a, b, 0.5))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert losses[1] == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-6)  # batches of unequal size
    for arguments, message in (((batches, F.cross_entropy, 1), "points must be >= 2"), (([], F.cross_entropy), "no batch")):
        with pytest.raises(ValueError, match=message):
            loss_barrier(model, a, b, *arguments)


def test_measuring_leaves_model_mode_and_random_state():
    model, spec, x = make("vgg")
    other = make("vgg", 1)[0].state_dict()
    state, batches = copy.deepcopy(model.state_dict()), [(x, torch.arange(5) % 4)]
    model.train().requires_grad_(False)
    rng = torch.get_rng_state()
    loss_barrier(model, state, other, batches, F.cross_entropy, reset=batches)
    taylor_barrier(model, state, other, batches, F.cross_entropy)
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    model.eval()
    loss_barrier(model, state, other, batches, F.cross_entropy)
    ste_matching(spec, model.train(), state, other, batches, F.cross_entropy, 2)
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_masked_models_are_measured_and_searched_after_a_step():
    model, other = masked(), masked()
    with torch.no_grad():
        other[0].weight_orig.mul_(torch.rand(6, 1))
    a, b = (copy.deepcopy(m.state_dict()) for m in (model, other))
    spec = PermutationSpec(axes_to_perm={
        "0.weight_orig": ("P", None), "0.weight_mask": ("P", None), "0.bias": ("P",), "2.weight_orig": (None, "P"), "2.weight_mask": (None, "P"),
    })  # fmt: skip
    batches = data()
    _, losses = loss_path(model, a, b, batches, F.cross_entropy, points=3)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert losses[-1] == pytest.approx(F.cross_entropy(other(x), y).item(), abs=1e-6)
    assert math.isfinite(loss_barrier(model, a, b, batches, F.cross_entropy))
    assert math.isfinite(taylor_barrier(model, a, b, batches, F.cross_entropy))
    assert ste_matching(spec, model, a, b, batches, F.cross_entropy, 2).keys() == {"P"}
    assert all(torch.equal(v, a[k]) for k, v in model.state_dict().items())


def test_statistics_are_estimated_again_at_every_point():
    model, _, x = make("vgg")
    a, b = copy.deepcopy(model.state_dict()), make("vgg", 1)[0].state_dict()
    batches = [(x, torch.arange(5) % 4)]
    model.load_state_dict(interpolate(a, b, 0.5))
    x, y = batches[0]
    plain = F.cross_entropy(model(x), y).item()
    expected = F.cross_entropy(reestimate_batchnorm(model, [x])(x), y).item()
    assert abs(plain - expected) > 0.05
    for reset, middle in ((batches, expected), (None, plain)):
        _, losses = loss_path(model, a, b, batches, F.cross_entropy, points=3, reset=reset)
        assert losses[1] == pytest.approx(middle, abs=1e-5)
    assert loss_barrier(model, a, a, batches, F.cross_entropy, reset=[(x[:3], 0), (x[3:], 0)]) == 0


# ---- straight through


def test_without_epochs_it_is_weight_matching_of_the_start():
    model, spec, a, b = pair()
    for init, expected in (("b", weight_matching(spec, b, b)), ("a", weight_matching(spec, a, b, seed=4))):
        perm = ste_matching(spec, model, a, b, data(), F.cross_entropy, 0, init=init, seed=4)
        assert all(torch.equal(perm[k], p) for k, p in expected.items())
    perm = ste_matching(spec, model, a, b, data(), F.cross_entropy, 0)
    assert all(torch.equal(p, torch.arange(len(p))) for p in perm.values())


def test_the_best_permutation_of_all_steps_is_returned():
    model, spec, a, b = pair()
    x, y = (torch.cat(parts) for parts in zip(*data(), strict=True))
    adam = lambda params: torch.optim.Adam(params, 0.1)  # noqa: E731
    seen = []

    def loss(out, target):
        value = F.cross_entropy(out, target)
        if value.requires_grad:
            seen.append(value.item())
        return value

    for select in (None, data()):
        seen.clear()
        perm = ste_matching(spec, model, a, b, [(x, y)], loss, 30, optimizer=adam, select=select)
        _, losses = loss_path(model, a, apply_permutation(spec, perm, b), [(x, y)], F.cross_entropy, points=3)
        assert len(seen) == 30
        assert losses[1] == pytest.approx(min(seen), abs=1e-5)
        assert min(seen) < seen[0]
        assert min(seen) < seen[-1]  # the last step is not the best


def test_one_step_is_the_straight_through_gradient():
    """After one SGD step X = X0 - lr grad, with the gradient of the loss at (a + pi(b)) / 2 with respect to b, that is half of it."""
    model, spec, a, b = pair()
    batch = data()[0]
    middle = copy.deepcopy(model)
    middle.load_state_dict(interpolate(a, b, 0.5))
    F.cross_entropy(middle(batch[0]), batch[1]).backward()
    caught = []

    class Catch(torch.optim.SGD):
        def step(self, closure=None):
            caught.extend(p.grad.clone() for group in self.param_groups for p in group["params"])
            return super().step(closure)

    ste_matching(spec, model, a, b, [batch], F.cross_entropy, 1, optimizer=lambda params: Catch(params, lr=0.1))
    for found, p in zip(caught, middle.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad / 2)


def test_straight_through_repeats_and_takes_lr_and_momentum():
    model, spec, a, b = pair()
    run = lambda **how: ste_matching(spec, model, a, b, data(), F.cross_entropy, 10, **{"lr": 1.0, **how})  # noqa: E731
    first = run(seed=1)
    torch.rand(1)
    rng = torch.get_rng_state()
    assert all(torch.equal(run(seed=1)[k], p) for k, p in first.items())
    assert torch.equal(rng, torch.get_rng_state())
    assert any(not torch.equal(p, torch.arange(len(p))) for p in first.values())
    assert all(torch.equal(p, torch.arange(len(p))) for p in run(lr=1e-6).values())
    assert any(not torch.equal(run(momentum=0.0)[k], p) for k, p in first.items())
    for arguments, message in (({"init": "c"}, "unknown init 'c'"), ({"epochs": -1}, "epochs")):
        with pytest.raises(ValueError, match=message):
            ste_matching(spec, model, a, b, data(), F.cross_entropy, **{"epochs": 1, **arguments})


def test_the_search_says_what_its_training_has_spent():
    model, spec, a, b = pair()
    batches, spent = data(), []
    search = lambda epochs, **how: ste_matching(  # noqa: E731
        spec, model, a, b, batches, F.cross_entropy, epochs, on_fit=spent.append, **how
    )
    perm = search(4)
    assert all(torch.equal(p, ste_matching(spec, model, a, b, batches, F.cross_entropy, 4)[k]) for k, p in perm.items())
    assert (spent[0].steps, spent[0].forwards, spent[0].backwards, len(spent[0].losses)) == (12, 12, 12, 4)
    assert spent[0].seconds > 0
    search(4, select=batches[:2], lr=1e-9)
    assert (spent[1].steps, spent[1].forwards, spent[1].backwards) == (12, 14, 12)  # the permutation stays, so one pass chooses
    search(0)
    assert (spent[2].steps, spent[2].forwards, spent[2].losses) == (0, 0, [])


# ---- many models


def test_planted_permutations_of_many_models_are_undone():
    model, spec, _ = make("vgg")
    a = model.state_dict()
    states = [noise(apply_permutation(spec, shuffled(spec, a, s), a), s, 1e-3) for s in range(4)]
    for anchor in (None, 0, 2):
        matched = match_many(spec, states, anchor=anchor)
        for state in matched:
            assert all((state[k].double() - matched[0][k].double()).abs().max() < 0.02 for k in a)
        if anchor is not None:
            assert all(torch.equal(matched[anchor][k], states[anchor][k]) for k in a)
        merged = merge_many(spec, states, anchor=anchor)
        torch.testing.assert_close(merged["0.weight"], torch.stack([s["0.weight"] for s in matched]).mean(0))
        assert merged["1.num_batches_tracked"] == states[0]["1.num_batches_tracked"]


def test_matching_to_the_mean_brings_models_together():
    spec = make("resnet")[1]
    states = [make("resnet", s)[0].state_dict() for s in range(3)]
    spread = lambda group: sum(  # noqa: E731
        float((x[k] - y[k]).square().sum())
        for x, y in itertools.combinations(group, 2)
        for k in spec.axes_to_perm
        if "running" not in k
    )
    matched = match_many(spec, states)
    assert spread(matched) < spread(states)
    assert spread(match_many(spec, matched, seed=1)) <= spread(matched) * (1 + 1e-9)
    assert spread(match_many(spec, states, max_rounds=0)) == pytest.approx(spread(states))
    one = merge_many(spec, states[:1])
    assert all(torch.equal(one[k], v) for k, v in states[0].items())
    for arguments, message in ((([],), "at least one"), ((states, 3), "anchor must be in 0..2, got 3")):
        with pytest.raises(ValueError, match=message):
            match_many(spec, *arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    (model, spec, _), (other, _, _) = make("vgg"), make("vgg", 1)
    a, b = ({k: v.cuda() for k, v in m.state_dict().items()} for m in (model, other))
    perm = weight_matching(spec, a, b)
    on_cpu = weight_matching(spec, model.state_dict(), other.state_dict())
    assert all(torch.equal(perm[k], p) for k, p in on_cpu.items())
    assert apply_permutation(spec, perm, b)["0.weight"].is_cuda
