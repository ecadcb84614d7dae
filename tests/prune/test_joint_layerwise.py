from __future__ import annotations

import copy
import itertools
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset

from tests.prune.zoo import ZOO, make
from weightroom.metrics import copy_model
from weightroom.prune import (
    PruningPlan,
    RDPlan,
    RDPruner,
    UniformMagnitudePruner,
    allocate_dp,
    allocation,
    output_distortion,
    prune_gradually,
    successive_sparsities,
)
from weightroom.prune.base import prunable

# ---- the dynamic programme


def cost_of(curves, sizes, grid, amounts) -> tuple[float, int]:
    index = np.rint(np.asarray(amounts) * grid).astype(int)
    return float(curves[np.arange(len(sizes)), index].sum()), int(sum(i * n // grid for i, n in zip(index, sizes, strict=True)))


def cheapest(curves, sizes, sparsity, grid, prev=None) -> float:
    """The least cost of every combination of the grid."""
    cost, removed = np.zeros(1), np.zeros(1)
    for place, (curve, n) in enumerate(zip(curves, sizes, strict=True)):
        i = np.arange(0 if prev is None else round(prev[place] * grid), grid + 1)
        cost, removed = np.add.outer(cost, curve[i]).ravel(), np.add.outer(removed, i * n // grid).ravel()
    return cost[removed >= sparsity * sum(sizes)].min()


@st.composite
def problems(draw, layers=4, grid=5):
    layers, grid = draw(st.integers(1, layers)), draw(st.integers(1, grid))
    sizes = draw(st.lists(st.integers(1, 60), min_size=layers, max_size=layers))
    values = st.integers(0, 3).map(float) if draw(st.booleans()) else st.floats(0, 10)
    curves = np.array(draw(st.lists(st.lists(values, min_size=grid + 1, max_size=grid + 1), min_size=layers, max_size=layers)))
    if draw(st.booleans()):
        curves = np.sort(curves, 1)
    return curves, sizes, draw(st.floats(0.01, 0.99)), grid


@settings(max_examples=200, deadline=None)
@given(problem=problems(), data=st.data())
def test_no_combination_is_cheaper(problem, data):
    curves, sizes, sparsity, grid = problem
    prev = None
    if data.draw(st.booleans()):
        prev = [data.draw(st.integers(0, grid)) / grid for _ in sizes]
    amounts = allocate_dp(curves, sizes, sparsity, grid, prev)
    cost, removed = cost_of(curves, sizes, grid, amounts)
    assert removed >= sparsity * sum(sizes)
    assert prev is None or (amounts >= prev).all()
    if prev is not None and cost_of(curves, sizes, grid, prev)[1] >= sparsity * sum(sizes):
        assert amounts.tolist() == prev
    else:
        assert cost == pytest.approx(cheapest(curves, sizes, sparsity, grid, prev), rel=1e-12, abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(problem=problems(layers=6, grid=12))
def test_rising_curves_overshoot_by_less_than_a_step_of_a_layer(problem):
    curves, sizes, sparsity, grid = problem
    _, removed = cost_of(curves, sizes, grid, allocate_dp(np.sort(curves, 1), sizes, sparsity, grid))
    assert sparsity * sum(sizes) <= removed < sparsity * sum(sizes) + -(-max(sizes) // grid) + 1


def by_table(curves, sizes, sparsity, grid) -> float:
    """The least cost by the textbook's table T_l(b) with a column per weight, the counts beyond the target in the last one."""
    needed = int(np.ceil(sparsity * sum(sizes)))
    table = np.append(0.0, np.full(needed, np.inf))
    for curve, n in zip(curves, sizes, strict=True):
        row = np.full_like(table, np.inf)
        for i, d in enumerate(curve):
            more = min(i * n // grid, needed)
            np.minimum(row[more:], table[: needed + 1 - more] + d, out=row[more:])
            row[-1] = min(row[-1], table[needed - more :].min() + d)
        table = row
    return float(table[-1])


def curves_of(shape, sizes, rng) -> np.ndarray:
    layers, a = len(sizes), np.arange(101) / 100
    scale, bend = np.exp(rng.normal(0, 2, (layers, 1))), rng.uniform(2, 6, (layers, 1))
    return {
        "convex": scale * a**bend,
        "rough": scale * a**bend * np.exp(rng.normal(0, 0.3, (layers, 101))),
        "s-shaped": scale / (1 + np.exp(-8 * bend * (a - rng.uniform(0.5, 0.95, (layers, 1))))),
        "linear": sizes[:, None] / sizes.sum() * a,
    }[shape]


every_shape = pytest.mark.parametrize("shape", ["convex", "rough", "s-shaped", "linear"])


@every_shape
@pytest.mark.parametrize("layers", [1, 7])
def test_it_is_exact_with_few_layers(shape, layers):
    rng = np.random.default_rng(layers)
    sizes = rng.integers(500, 5000, layers)
    curves = curves_of(shape, sizes, rng)
    for sparsity in (0.3, 0.9):
        cost, removed = cost_of(curves, sizes, 100, allocate_dp(curves, sizes, sparsity, 100))
        assert removed >= sparsity * sizes.sum()
        assert cost == pytest.approx(by_table(curves, sizes, sparsity, 100), rel=1e-12)


@every_shape
def test_it_is_within_the_bound_at_scale(shape):
    rng = np.random.default_rng(54)
    sizes = rng.integers(1000, 2_400_000, 54)
    curves = curves_of(shape, sizes, rng)
    for sparsity in (0.3,) if shape == "linear" else (0.3, 0.9):
        amounts = allocate_dp(curves, sizes, sparsity, 100)
        cost, removed = cost_of(curves, sizes, 100, amounts)
        assert removed >= sparsity * sizes.sum()
        # No answer is below the Lagrangian bound at any price, and on a fine grid the best is close to it.
        prices = np.exp(np.linspace(-30, 5, 400)) / sizes.mean()
        counts = allocation.removed_counts(sizes, 100)
        bound = max((curves - p * counts).min(1).sum() + p * sparsity * sizes.sum() for p in prices)
        assert bound - 1e-9 <= cost <= 1.15 * bound


def test_many_layers_of_many_sizes_against_a_table_over_every_count():
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 400, 12)
    for sparsity, curves in (
        (0.4, rng.random((12, 21))),
        (0.7, np.sort(rng.random((12, 21)), 1)),
        (0.8, np.arange(21) ** 3 * rng.random((12, 1))),
    ):
        cost, _ = cost_of(curves, sizes, 20, allocate_dp(curves, sizes, sparsity, 20))
        assert cost == pytest.approx(by_table(curves, sizes, sparsity, 20), rel=1e-12)


@given(problem=problems(layers=5, grid=8), factor=st.sampled_from([1e-6, 0.3, 7.0, 1e5]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_scaling_changes_nothing_and_permuting_permutes(problem, factor, data):
    _, sizes, sparsity, grid = problem
    curves = np.random.default_rng(len(sizes) + grid).random((len(sizes), grid + 1))
    amounts = allocate_dp(curves, sizes, sparsity, grid)
    assert (allocate_dp(curves * factor, sizes, sparsity, grid) == amounts).all()
    order = data.draw(st.permutations(range(len(sizes))))
    assert (allocate_dp(curves[order], [sizes[i] for i in order], sparsity, grid) == amounts[order]).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.004, 0.29, 0.291, 0.5, 0.999])
def test_one_layer_takes_the_smallest_amount_that_will_do(sparsity):
    amounts = allocate_dp(np.arange(101.0)[None], [1000], sparsity, 100)
    assert amounts.tolist() == [np.ceil(round(sparsity * 1000) / 10) / 100]


def test_an_amount_is_not_rounded_down_by_its_binary_fraction():
    assert allocate_dp(np.arange(101.0)[None], [100], 0.29, 100).tolist() == [0.29]  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize("sparsity", [0.2, 0.55, 0.8])
def test_equal_layers_with_convex_curves_get_equal_amounts_up_to_a_step(sparsity):
    amounts = allocate_dp(np.tile((np.arange(51) / 50) ** 2, (6, 1)), [500] * 6, sparsity, 50)
    assert np.ptp(amounts) <= 0.02 + 1e-12


def test_the_dearer_layer_gives_less():
    amounts = allocate_dp([np.arange(11) ** 2 * 1.0, np.arange(11) ** 2 * 9.0], [100, 100], 0.4, 10)
    assert amounts.tolist() == [0.7, 0.1]


def test_sparsity_zero_and_amounts_that_suffice_already():
    flat = np.zeros((2, 11))
    assert allocate_dp(flat, [30, 40], 0.0, 10).tolist() == [0, 0]
    assert allocate_dp(flat, [30, 40], 0.5, 10, [0.37, 0.8]).tolist() == [0.37, 0.8]


def test_an_amount_off_the_grid_is_kept_where_no_more_is_needed_from_its_layer():
    curves = np.array([np.arange(11) * 100.0, np.arange(11) * 1.0])
    assert allocate_dp(curves, [100, 100], 0.4, 10, [0.25, 0.25]).tolist() == [0.25, 0.6]


def test_a_grid_of_ones_own():
    grid = [0.0, 0.5, 0.9, 0.97, 0.99]
    curves = np.array([[0, 1, 2, 3, 9.0], [0, 5, 6, 7, 8.0]])
    assert allocate_dp(curves, [1000, 1000], 0.95, grid).tolist() == [0.97, 0.97]


def test_the_limit_of_a_layer_and_what_can_be_reached_within_it():
    curves = np.array([np.zeros(11), np.arange(11) * 1.0])
    assert allocate_dp(curves, [100, 100], 0.5, 10).tolist() == [1.0, 0.0]
    assert allocate_dp(curves, [100, 100], 0.5, 10, max_layer_sparsity=0.9).tolist() == [0.9, 0.1]
    assert allocate_dp(curves, [100, 100], 0.9, 10, [0.0, 1.0], max_layer_sparsity=0.9).tolist() == [0.8, 1.0]
    with pytest.raises(ValueError, match=r"a sparsity of 0\.95 cannot be reached.* is 0\.9$"):
        allocate_dp(curves, [100, 100], 0.95, 10, max_layer_sparsity=0.9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\)"),
        ({"curves": np.zeros((2, 10))}, r"curves must be of shape \(2, 11\)"),
        ({"curves": np.full((2, 11), np.nan)}, "NaN or infinity"),
        ({"sizes": [0, 4]}, "sizes must be a sequence of integers >= 1"),
        ({"sizes": []}, "sizes must be"),
        ({"grid": 0}, "grid must be an integer >= 1"),
        ({"grid": [0.5, 0.2]}, "grid must be"),
        ({"grid": [0.1, 0.2]}, "rising from 0"),
        ({"prev": [0.1]}, "prev must be 2 amounts"),
        ({"prev": [0.1, 1.2]}, "prev must be 2 amounts"),
        ({"max_layer_sparsity": 0.0}, "max_layer_sparsity must be > 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changed, message):
    given_ = {"curves": np.zeros((2, 11)), "sizes": [3, 4], "sparsity": 0.5, "grid": 10} | changed
    with pytest.raises(ValueError, match=message):
        allocate_dp(**given_)


# ---- the curves


def by_hand(model: nn.Module, x: Tensor, grid: int, *, worst: bool = False) -> np.ndarray:
    """The curves with one plain pass of a fresh copy for each layer and amount."""
    model = copy.deepcopy(model).eval()
    rows = []
    with torch.no_grad():
        f = model(x).double()
        for place in range(len(prunable(model))):
            row = []
            for i in range(grid + 1):
                other = copy.deepcopy(model)
                weight = prunable(other)[place].tensor
                smallest = weight.abs().flatten().argsort(stable=True)[: i * weight.numel() // grid]
                flat = weight.detach().flatten().clone()
                flat[smallest] = 0
                weight.copy_(flat.view(weight.shape))
                each = (f - other(x).double()).square().flatten(1).mean(1)
                row.append(float(each.max() if worst else each.mean()))
            rows.append(row)
    return np.array(rows)


class InPlace(nn.Module):
    """Modules whose output is changed after they returned it, a module used twice, and one whose result comes as a dict."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor | None]:
            return {"a": self.inner(x), "b": x, "c": None}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.act, self.split = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 4),
            nn.ReLU(True),
            InPlace.Split(),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h += x
        h = self.act(h)
        parts = self.split(h)
        h = self.b(parts["a"] + parts["b"])
        h *= 2
        return self.c(self.act(h) + self.b(h))


class Reversing(nn.Module):
    """A list, a dict and what is nested in them, changed by the caller after a module has returned them."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> list[Tensor]:
            h = self.a(x)
            return [h, self.b(h)]

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Reversing.Pair()

        def forward(self, x: Tensor) -> tuple[OrderedDict[str, list[Tensor]]]:
            return (OrderedDict(parts=self.pair(x)),)

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.named = Reversing.Pair(), Reversing.Named()
        self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        f = self.pair(x)
        f.reverse()
        (named,) = self.named(torch.tanh(f[0] + 2 * f[1]))
        named["parts"].append(x)
        named.move_to_end("parts")
        named["last"] = named.pop("parts")
        return self.d(torch.tanh(self.c(x) + 2 * f[0] + named["last"].pop(0) - named["last"][-1]))


class Borrowed(nn.Module):
    """A weight that is used before its module is called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.borrow = [self.last]

    def forward(self, x: Tensor) -> Tensor:
        wrapped = self.second(self.first(x) @ self.borrow[0].weight.T @ self.borrow[0].weight)
        return self.last(wrapped)


class Thief(nn.Module):
    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = [owner]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.owner[0].weight.T @ self.owner[0].weight


def stolen() -> nn.Module:
    owner = nn.Linear(6, 4)
    return nn.Sequential(Thief(owner), nn.ReLU(), owner)


@pytest.mark.parametrize("worst", [False, True])
@pytest.mark.parametrize("name", [*ZOO, "in place", "reversing", "borrowed", "stolen"])
def test_curves_are_those_of_plain_passes(name, worst):
    if name in ZOO:
        model, x, _ = make(name)
    else:
        torch.manual_seed(0)
        model, x = (
            {"in place": InPlace, "reversing": Reversing, "borrowed": Borrowed, "stolen": stolen}[name](),
            torch.randn(8, 6),
        )
    grid = 4
    model, x = model.double(), x.double()  # the smallest distortions are below the rounding of float32 outputs
    batches = list(x.split(3))
    plan = RDPruner(0.5, grid=grid, distortion="worst" if worst else "mean").fit(model, batches)
    expected = by_hand(model, x, grid, worst=worst)
    assert plan.curves.shape == (len(plan.masks), grid + 1)
    assert plan.grid.tolist() == [0, 0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(plan.curves, expected, rtol=1e-9, atol=1e-15)
    assert (plan.curves[:, 0] == 0).all()


def test_the_layers_before_the_one_measured_are_not_run_again(monkeypatch):
    model, x, _ = make("residual")
    calls = 0
    forward = nn.Conv2d.forward

    def counting(self, *args):
        nonlocal calls
        calls += 1
        return forward(self, *args)

    monkeypatch.setattr(nn.Conv2d, "forward", counting)
    RDPruner(0.5, grid=30).fit(model, [x])
    assert 0 < calls < 0.62 * 6 * 6 * 30  # 5 convolutions of a pass, 6 layers: a plain loop makes 900 calls and more


def test_the_linear_layer_of_white_inputs():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 5, bias=False), torch.eye(8)
    plan = RDPruner(0.5, grid=20).fit(layer, [x])
    ordered = layer.weight.detach().double().square().flatten().sort().values.cumsum(0)
    expected = [float(ordered[i * 40 // 20 - 1]) / 8 / 5 if i else 0.0 for i in range(21)]  # mean of x' dW' dW x / C
    np.testing.assert_allclose(plan.curves[0], expected, rtol=1e-6)
    assert (np.diff(plan.curves[0]) > 0).all()


def test_the_worst_input_is_no_better_than_the_mean_one():
    model, x, _ = make("cnn")
    mean = RDPruner(0.5, grid=10).fit(model, [x]).curves
    worst = RDPruner(0.5, grid=10, distortion="worst").fit(model, [x]).curves
    assert (worst >= mean).all()
    assert (worst > mean).any()


def test_logits_are_measured_and_not_their_softmax():
    model, x, _ = make("mlp")
    plain = RDPruner(0.5, grid=5).fit(model, [x]).curves
    soft = RDPruner(0.5, grid=5, forward_fn=lambda m, z: m(z).softmax(1)).fit(model, [x]).curves
    assert (plain[:, 1:] > soft[:, 1:]).all()


# ---- the plan


def test_a_plan_says_what_was_measured():
    model, x, _ = make("cnn")
    plan = RDPruner(0.6, grid=40).fit(model, [x])
    assert isinstance(plan, RDPlan)
    assert list(plan.amounts) == list(plan.masks) == ["0.weight", "3.weight", "6.weight", "8.weight"]
    assert plan.amounts["6.weight"] == plan.layers()["6.weight"].sparsity
    by_curve = 0.0
    for (name, layer), curve in zip(plan.layers().items(), plan.curves, strict=True):
        by_curve += np.interp(layer.removed, [i * layer.size // 40 for i in range(41)], curve)
        weight = model.get_parameter(name).detach().abs()
        if layer.removed and layer.kept:
            assert weight[~plan.masks[name]].max() <= weight[plan.masks[name]].min()
    assert plan.predicted_distortion == pytest.approx(by_curve)


@pytest.mark.parametrize("distortion", ["mean", "worst"])
def test_measured_distortion(distortion):
    model, x, y = make("residual")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = RDPruner(0.6, grid=10, distortion=distortion).fit(model, [x])
    measured = plan.measured_distortion(model, [(x[:5], y[:5]), (x[5:], y[5:])])
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    dense, pruned = copy.deepcopy(model).eval(), plan.apply(copy.deepcopy(model)).eval()
    with torch.no_grad():
        each = (dense(x) - pruned(x)).double().square().mean(1)
    assert measured == pytest.approx(float(each.mean() if distortion == "mean" else each.max()), rel=1e-5)
    assert plan.measured_distortion(model, x) == pytest.approx(measured)
    assert plan.measured_distortion(plan.apply(copy.deepcopy(model)), x) == 0
    other = UniformMagnitudePruner(0.6).fit(model)
    assert output_distortion(model, other, x) > 0


def test_small_changes_add_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    x = torch.randn(200, 20, dtype=torch.float64)
    plan = RDPruner(0.15).fit(model, [x])
    assert plan.measured_distortion(model, x) == pytest.approx(plan.predicted_distortion, rel=0.25)


def test_it_moves_the_output_less_than_uniform_amounts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x = torch.randn(200, 20)
    plan, uniform = RDPruner(0.4).fit(model, [x]), UniformMagnitudePruner(0.4).fit(model)
    assert plan.sparsity() == uniform.sparsity()
    assert plan.measured_distortion(model, x) < output_distortion(model, uniform, x)


def test_what_the_grid_removes_too_much_is_given_back_where_it_costs_most():
    from weightroom.prune.joint_layerwise import _give_back

    D, counts = np.array([[0.0, 1.0, 2.0], [0.0, 5.0, 9.0]]), np.array([[0, 50, 100], [0, 50, 100]])
    gone = np.zeros(2, dtype=np.int64)
    assert _give_back(D, counts, gone, np.array([100, 50]), 120).tolist() == [100, 20]
    assert _give_back(D, counts, gone, np.array([100, 100]), 90).tolist() == [90, 0]
    assert _give_back(D, counts, np.array([0, 40]), np.array([100, 50]), 120).tolist() == [80, 40]


# ---- rounds


def test_amounts_never_fall_and_masks_nest_over_rounds():
    torch.manual_seed(0)
    model, x, y = make("cnn")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner, plans = RDPruner(0.0, grid=25), []

    def train(model: nn.Module) -> None:
        plans.append(pruner.at(sparsity).fit(model, [x]))
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    for sparsity in successive_sparsities(1 - 0.8**6, 6):
        plan = prune_gradually(model, pruner, [sparsity], train, data=[x])
        assert plan.layers() == plans[-1].layers()  # nothing more goes at the same sparsity
    for one, two in itertools.pairwise(plans):
        assert all(b >= a for a, b in zip(one.amounts.values(), two.amounts.values(), strict=True))
        assert all(not (two.masks[k] & ~mask).any() for k, mask in one.masks.items())


def test_a_masked_network_is_measured_as_it_is():
    model, x, _ = make("mlp")
    torch.manual_seed(3)
    torch_prune.random_unstructured(model[2], "weight", amount=0.5)
    plan = RDPruner(0.5, grid=10).fit(model, [x])
    assert (plan.curves[1, :6] == 0).all()
    assert (plan.curves[1, 6:] > 0).all()
    bare = copy_model(model)
    torch_prune.remove(bare[2], "weight")
    np.testing.assert_allclose(plan.curves, by_hand(bare, x, 10), rtol=1e-4, atol=1e-12)
    assert plan.amounts["2.weight"] >= 0.5


def test_a_layer_that_is_beyond_the_limit_already_stays():
    model, x, _ = make("mlp")
    torch_prune.l1_unstructured(model[0], "weight", amount=71)
    plan = RDPruner(0.8, max_layer_sparsity=0.9).fit(model, [x])
    assert plan.layers()["0.weight"].removed == 71
    assert max(plan.amounts["2.weight"], plan.amounts["4.weight"]) <= 0.9


def test_no_layer_is_killed_unless_allowed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 4))
    x = torch.randn(40, 6)
    assert max(RDPruner(0.97).fit(model, [x]).amounts.values()) <= 0.99
    assert max(RDPruner(0.97, max_layer_sparsity=1.0).fit(model, [x]).amounts.values()) == 1.0
    with pytest.raises(ValueError, match=r"a sparsity of 0\.995.* cannot be reached.* is 0\.99$"):
        RDPruner(0.995).fit(model, [x])


# ---- what is measured on


def test_the_inputs_may_be_given_in_many_ways():
    model, x, y = make("mlp")
    first = RDPruner(0.5, grid=10).fit(model, [(x, y)])
    ways = [
        RDPruner(0.5, grid=10).fit(model, x),
        RDPruner(0.5, grid=10, calibration=x).fit(model),
        RDPruner(0.5, grid=10, calibration=x).fit(model, [torch.randn(9, 6)]),
        RDPruner(0.5, grid=10, calibration=DataLoader(TensorDataset(x, y), 3)).fit(model),
        RDPruner(0.5, grid=10, calibration=[{"input": x}]).fit(model),
        RDPruner(0.5, grid=10, n_calibration=8).fit(model, [(torch.cat([x, x + 1]), y)]),
        RDPruner(0.5, grid=10, n_calibration=8).fit(model, [(x[:5], y), (torch.cat([x[5:], x]), y), (x, y)]),
        RDPruner(0.5, grid=10, n_calibration=None).fit(model, [([x], y)]),
    ]
    for plan in ways:
        np.testing.assert_allclose(plan.curves, first.curves, rtol=1e-4)


def test_noise_of_the_shape_of_the_inputs():
    model, x, y = make("cnn")
    random_state = torch.get_rng_state()
    plan = RDPruner(0.5, grid=10, calibration="noise", n_calibration=300).fit(model, example_inputs=x[:1])
    assert torch.equal(torch.get_rng_state(), random_state)
    z = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given_ = RDPruner(0.5, grid=10, calibration=z, n_calibration=None).fit(model)
    assert plan.curves.shape == given_.curves.shape
    np.testing.assert_allclose(plan.curves, given_.curves, rtol=0.2)
    from_data = RDPruner(0.5, grid=10, calibration="noise", n_calibration=300).fit(model, [(x, y)])
    assert (from_data.curves == plan.curves).all()
    other = RDPruner(0.5, grid=10, calibration="noise", n_calibration=300, seed=1).fit(model, example_inputs=x)
    assert (other.curves[:, 1:] != plan.curves[:, 1:]).any()


def test_a_shuffling_loader_leaves_the_random_state_alone_and_gives_the_same_plan():
    model, x, y = make("mlp")
    loader = DataLoader(TensorDataset(x, y), 3, shuffle=True)
    state = torch.get_rng_state()
    first = RDPruner(0.5, grid=10, n_calibration=4).fit(model, loader)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert (RDPruner(0.5, grid=10, n_calibration=4).fit(model, loader).curves == first.curves).all()


def test_models_that_return_more_than_a_tensor_need_a_function():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), x

    torch.manual_seed(0)
    model, x = Two(), torch.randn(8, 6)
    with pytest.raises(TypeError, match=r"must be a tensor, got tuple: give forward_fn"):
        RDPruner(0.5).fit(model, [x])
    plan = RDPruner(0.5, forward_fn=lambda m, z: m(z)[0]).fit(model, [x])
    assert plan.measured_distortion(model, x) == pytest.approx(plan.predicted_distortion, rel=1e-5)


def test_missing_inputs_are_asked_for():
    model, x, _ = make("mlp")
    with pytest.raises(TypeError, match=r"needs inputs to measure on: give data, or calibration="):
        RDPruner(0.5).fit(model)
    with pytest.raises(TypeError, match="needs example_inputs"):
        RDPruner(0.5, calibration="noise").fit(model)
    with pytest.raises(ValueError, match="no inputs to measure on"):
        RDPruner(0.5).fit(model, [])
    with pytest.raises(ValueError, match=r"floating point, got torch\.int64"):
        RDPruner(0.5, calibration="noise").fit(model, example_inputs=x.long())
    with pytest.raises(TypeError, match="needs example_inputs"):
        RDPruner(0.5, calibration="noise").fit(model, [])
    with pytest.raises(ValueError, match="no inputs"):
        output_distortion(model, PruningPlan({}), [x[:0]])
    samples = TensorDataset(x)
    for measure in (
        lambda: RDPruner(0.5, calibration=samples).fit(model),
        lambda: output_distortion(model, PruningPlan({}), samples),
    ):
        with pytest.raises(TypeError, match="a TensorDataset gives samples"):
            measure()


def test_outputs_that_are_not_finite_are_named():
    model, x, _ = make("mlp")
    with pytest.raises(ValueError, match="output on the calibration inputs is NaN or infinite"):
        RDPruner(0.5).fit(model, [torch.full_like(x, torch.nan)])

    class Divide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x / self.a.weight.abs().sum().floor())

    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"without \d+% of 'a\.weight' the model's output is NaN or infinite"):
        RDPruner(0.5).fit(Divide(), [x])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sparsity": 1.2}, r"sparsity must be in \[0, 1\), got 1\.2"),
        ({"grid": 0}, "grid must be"),
        ({"grid": [0.0, 1.5]}, "grid must be"),
        ({"distortion": "median"}, "unknown distortion 'median'"),
        ({"calibration": "nois"}, "calibration must be a tensor"),
        ({"n_calibration": 0}, "n_calibration must be an integer >= 1 or None, got 0"),
        ({"max_layer_sparsity": 1.5}, "max_layer_sparsity must be"),
        ({"granularity": "channel"}, "granularity must be 'weight'"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RDPruner(**{"sparsity": 0.5} | kwargs)
    with pytest.raises(ValueError, match="unknown distortion"):
        output_distortion(nn.Linear(2, 2), PruningPlan({}), torch.ones(1, 2), distortion="median")
