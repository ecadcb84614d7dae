from __future__ import annotations

import pickle
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils.flop_counter import FlopCounterMode

from tests.prune.zoo import make
from weightroom.nets import UNet
from weightroom.nets.small import MLP, ConvNet, ResNet
from weightroom.prune import PreCrop, RandomPruner, SynFlowPruner, WidthPlan, layerwise_density, shuffle_masks
from weightroom.prune import precropping as part
from weightroom.prune.base import prunable
from weightroom.prune.synflow import _Flow
from weightroom.prune.widths import Layout, _chain, _channels, _traced, layout_of, uses_of

CHANNELS = (1, 16, 32, 32, 64)


def plain() -> nn.Sequential:
    """Four convolutions of 16, 32, 32 and 64 channels and a classifier: 33,040 weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(CHANNELS)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), *[nn.MaxPool2d(2)] * (i in (1, 2))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Branches(nn.Module):
    """A gated depthwise block, a convolution in groups, a group norm and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(1, 12, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.squeeze = nn.Conv2d(12, 6, 1)
        self.excite = nn.Conv2d(6, 12, 1)
        self.project = nn.Conv2d(12, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(3, 12)
        self.head = nn.Linear(8 + 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.depthwise(self.expand(x)))
        h = h * torch.sigmoid(self.excite(torch.relu(self.squeeze(h.mean((2, 3), keepdim=True)))))
        h = self.project(h)
        return self.head(torch.cat([h, self.norm(self.grouped(h))], 1).mean((2, 3)))


class Decoder(nn.Module):
    """Transposed convolution, instance norm, layer norm over channels and a PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.layer_norm = nn.LayerNorm(6)
        self.act = nn.PReLU(6)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(torch.relu(self.norm(self.down(x))))
        return self.out(self.act(self.layer_norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


class Configured(nn.Module):
    """A model that declares its widths; torch-pruning cannot follow what it does."""

    def __init__(self, first: int = 12, second: int = 20, classes: int = 5) -> None:
        super().__init__()
        self.width_config = {"first": first, "second": second}
        self.classes = classes
        self.a, self.b, self.c = nn.Linear(6, first), nn.Linear(first, second), nn.Linear(first + second, classes)

    def with_widths(self, config: dict[str, int]) -> Configured:
        return Configured(**config, classes=self.classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.c(torch.cat([h, torch.relu(self.b(torch.from_numpy(h.detach().numpy())))], 1))


IMAGE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
MODELS = {
    "plain": (plain, IMAGE),
    "convnet": (lambda: ConvNet(1, 10), IMAGE),
    "mlp": (lambda: MLP((64, 32, 48, 10)), IMAGE),
    "flatten": (lambda: make("cnn")[0], IMAGE),
    "mobile": (lambda: make("mobile")[0], IMAGE),
    "residual": (lambda: make("residual")[0], IMAGE),
    "resnet": (lambda: ResNet(1, 10, (2, 2)), IMAGE),
    "branches": (Branches, IMAGE),
    "decoder": (Decoder, IMAGE),
    "unet": (lambda: UNet(2, 1, 2), torch.zeros(1, 1, 16, 16)),
    "configured": (Configured, torch.zeros(2, 6)),
}
TRACED = {"residual", "resnet", "branches", "decoder", "unet"}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> tuple[nn.Module, Tensor]:
    if name in TRACED:
        pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    factory, x = MODELS[name]
    return factory(), x


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, x: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(x)
    model.train()
    return counter.get_total_flops()


def weights(model: nn.Module) -> np.ndarray:
    return np.array([site.tensor.numel() for site in prunable(model)], dtype=float)


def array(densities: dict[str, float]) -> np.ndarray:
    return np.array(list(densities.values()))


# --- densities


def perceptron(sizes: list[int]) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(size, 1, bias=False) for size in sizes])


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_water_filling_spends_the_budget_and_levels_the_layers(sizes, share):
    a = np.array(sizes, dtype=float)
    p = array(layerwise_density(perceptron(sizes), params=share))
    assert a @ p == pytest.approx(share * a.sum(), rel=1e-9)
    assert ((p > 0) & (p <= 1)).all()
    kept = (a * p)[p < 1 - 1e-12]
    assert np.allclose(kept, kept[:1], rtol=1e-9)
    assert (a[p >= 1] <= kept.max(initial=a.max()) * (1 + 1e-9)).all()
    more = array(layerwise_density(perceptron(sizes), params=min(1.0, 1.3 * share)))
    assert (more >= p - 1e-12).all()


def test_a_budget_of_all_weights_or_more_keeps_them_all():
    model = plain()
    for params in (1.0, 33_040, 50_000):
        assert set(layerwise_density(model, params=params).values()) == {1.0}


def test_the_closed_form_gives_the_densities_of_a_hundred_rounds():
    model = plain()
    synexp = layerwise_density(model, params=0.2)
    assert list(synexp) == [site.name for site in prunable(model)]
    assert array(synexp) == pytest.approx([1, 0.4213, 0.2106, 0.1053, 1], abs=1e-4)
    synflow = layerwise_density(model, IMAGE, params=0.2, method="synflow")
    assert array(synflow) == pytest.approx(array(synexp), abs=0.13)
    assert array(synflow)[1:4] == pytest.approx(array(synexp)[1:4], abs=0.02)
    assert weights(model) @ array(synflow) == pytest.approx(6608)


@given(st.integers(0, 10_000), st.floats(0.03, 0.9), st.floats(0.03, 0.9))
@settings(max_examples=25, deadline=None)
def test_two_budgets_hold_one_is_tight_and_no_solver_does_better(seed, params, flops_share):
    random = np.random.default_rng(seed)
    a, f = random.uniform(1, 100, 5), random.uniform(1, 100, 5)
    budgets = [params * a.sum(), flops_share * f.sum()]
    p = part._fill([a, f], budgets, None, 1.0)
    spent = np.array([a @ p / budgets[0], f @ p / budgets[1]])
    assert (spent <= 1 + 1e-9).all()
    assert spent.max() == pytest.approx(1, rel=1e-9)
    constraints = [
        {"type": "ineq", "fun": lambda x, c=c, b=b: 1 - c @ x / b, "jac": lambda x, c=c, b=b: -c / b}
        for c, b in zip((a, f), budgets, strict=True)
    ]
    solver = minimize(
        lambda x: -np.log(x).sum(), np.full(5, 0.02), jac=lambda x: -1 / x, bounds=[(1e-6, 1)] * 5, constraints=constraints,
        method="SLSQP", options={"ftol": 1e-15, "maxiter": 1000},
    )  # fmt: skip
    assert np.log(p).sum() >= -solver.fun - 1e-6
    if solver.success:
        assert p == pytest.approx(solver.x, abs=1e-3)
        assert np.log(p).sum() == pytest.approx(-solver.fun, abs=1e-6)


@given(st.integers(0, 10_000), st.floats(0.03, 1), st.floats(0.03, 1))
@settings(max_examples=25, deadline=None)
def test_two_budgets_where_layers_may_grow(seed, params, flops_share):
    random = np.random.default_rng(seed)
    a, f = random.uniform(1, 1e6, 5), random.uniform(1, 1e9, 5)
    p = part._fill([a, f], [params * a.sum(), flops_share * f.sum()], None, np.inf)
    spent = np.array([a @ p / (params * a.sum()), f @ p / (flops_share * f.sum())])
    assert spent.max() == pytest.approx(1, rel=1e-9)
    multipliers, *_ = np.linalg.lstsq(np.stack([a, f], 1) * p[:, None], np.ones(5))  # 1 / p = lambda a + mu f
    assert np.stack([a, f], 1) @ multipliers == pytest.approx(1 / p, rel=1e-6)
    assert (multipliers * [a.sum(), f.sum()] >= -1e-6).all()


def test_two_budgets_on_a_network():
    model, a = plain(), weights(plain())
    f = a * np.array([64, 64, 16, 4, 1]) * 2
    p = array(layerwise_density(model, IMAGE[:1], params=0.2, flops=0.2))
    assert a @ p == pytest.approx(0.2 * a.sum(), rel=1e-9)
    assert f @ p == pytest.approx(0.2 * f.sum(), rel=1e-9)
    slack = array(layerwise_density(model, IMAGE[:1], params=0.2, flops=0.9))
    assert slack == pytest.approx(array(layerwise_density(model, params=0.2)))
    only = array(layerwise_density(model, IMAGE[:1], flops=0.2))
    assert f @ only == pytest.approx(0.2 * f.sum(), rel=1e-9)
    assert array(layerwise_density(model, IMAGE[:1], flops=int(0.2 * f.sum()))) == pytest.approx(only, rel=1e-4)


@pytest.mark.parametrize("budgets", [{"params": 0.3}, {"flops": 0.3}, {"params": 0.3, "flops": 0.2}])
@pytest.mark.parametrize("method", ["erk", "uniform", "synflow", "snip"])
def test_other_densities_meet_the_budgets(method, budgets):
    model, x, y = make("cnn")
    a = weights(model)
    f = 2 * a * np.array([64, 16, 1, 1]) * len(x)
    p = array(
        layerwise_density(model, x, method=method, data=[(x, y)], loss_fn=nn.functional.cross_entropy, **budgets)  # type: ignore[arg-type]
    )
    spent = [(c @ p) / (budgets[k] * c.sum()) for k, c in (("params", a), ("flops", f)) if k in budgets]
    assert max(spent) <= 1 + 1e-9
    assert max(spent) > 0.97
    if method == "uniform":
        assert np.ptp(p) == 0
    if method == "erk":
        cut = p < 1
        ratio = p * a / np.array([6 + 1 + 6, 8 + 6 + 6, 10 + 128, 4 + 10])
        assert np.ptp(ratio[cut]) < 1e-9


def test_widening_gives_every_layer_the_same_number_of_weights():
    model = plain()
    p = array(layerwise_density(model, params=1.0, widen=True))
    assert weights(model) * p == pytest.approx(np.full(5, 33_040 / 5))
    assert p.max() > 1


def test_layers_that_the_input_does_not_reach_stay_whole():
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    for widen in (False, True):
        p = layerwise_density(Spare(), torch.zeros(1, 6), flops=0.5, widen=widen)
        assert p == {"used.weight": pytest.approx(0.5), "unused.weight": 1.0}


# --- SynExp


def test_mean_flow_is_the_product_formula_and_aligned_masks_keep_more():
    generator = torch.Generator().manual_seed(0)
    n, p, runs = (6, 8, 7, 4), (0.5, 0.3, 0.6), 10_000
    value, aligned = torch.ones(runs, n[0], 1), torch.ones(runs, n[0], 1)
    ratios = (1.0, 0.5, 0.6, 1.0)
    alive = [
        torch.rand(runs, width, generator=generator).argsort(1) < round(r * width) for width, r in zip(n, ratios, strict=True)
    ]
    for layer in range(3):
        theta = torch.rand(runs, n[layer + 1], n[layer], generator=generator)  # mean 1/2
        value = (theta * (torch.rand(theta.shape, generator=generator) < p[layer])) @ value
        aligned = (theta * alive[layer + 1][:, :, None] * alive[layer][:, None, :]) @ aligned
    formula = np.prod(n) * np.prod(p) * 0.5**3
    assert float(value.sum((1, 2)).mean()) == pytest.approx(formula, rel=0.02)
    widths = [round(r * width) for width, r in zip(n, ratios, strict=True)]
    assert float(aligned.sum((1, 2)).mean()) == pytest.approx(np.prod(widths) * 0.5**3, rel=0.02)
    same_densities = np.prod([a * b / (c * d) for (a, b), (c, d) in zip(pairwise(widths), pairwise(n), strict=True)])
    assert np.prod(widths) > 1.2 * np.prod(n) * same_densities


def test_the_mean_over_masks_of_what_synflow_computes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 4))
    tensors, p = prunable(model), (0.5, 0.3, 0.6)
    dense = _Flow(model, tensors, torch.zeros(1, 6))
    whole = float(dense.model(dense.inputs).detach().sum())
    values = []
    for _ in range(400):
        masks = [torch.rand(site.tensor.shape) < q for site, q in zip(tensors, p, strict=True)]
        values.append(float(_Flow(model, tensors, torch.zeros(1, 6)).scores(masks)[0].sum()))  # conservation: R
    assert np.mean(values) == pytest.approx(whole * np.prod(p), rel=5 * np.std(values) / 20 / (whole * np.prod(p)))
    assert np.std(values) / 20 < 0.05 * whole * np.prod(p)


# --- widths


@every_model
@pytest.mark.parametrize(
    "how",
    [
        {"params": 0.5},
        {"params": 0.5, "rule": "gp"},
        {"flops": 0.6},
        {"params": 0.6, "flops": 0.6, "rule": "gp"},
        {"params": 0.4, "tied": True},
        {"params": 0.5, "method": "uniform"},
        {"params": 0.9, "widen": True},
        {"params": 0.9, "flops": 0.9, "widen": True, "rule": "gp"},
    ],
    ids=str,
)
def test_the_network_meets_the_budget_and_no_channel_more_would(name, how):
    model, x = build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    plan = PreCrop(**how).fit(model, x)
    small = plan.build(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert plan.parameters == size(small)
    if name != "configured":  # its products are counted by a fake tensor that numpy cannot read
        assert plan.flops == flops(small, x)
    assert small(x).shape == model(x).shape
    limits = {"all": how["params"] * size(model)} if "params" in how else {}
    limits |= {"flops": how["flops"] * 2 * 1.0 * _macs(model, x)} if "flops" in how else {}
    layout = layout_of(model, x, True)
    w = _variables(layout, plan)
    for kind, limit in limits.items():
        assert layout.cost(kind, w) <= limit + 1e-6
    tied = bool((w != layout.sizes)[layout.added].any())  # by itself only where the budget cannot be met otherwise
    inner = np.where(~layout.held & ~layout.added, layout.step, layout.sizes)
    assert tied <= (how.get("tied", False) or any(layout.cost(kind, inner) > limit for kind, limit in limits.items()))
    free = ~layout.held & ~(layout.added & (not tied))
    assert (w[~free] == layout.sizes[~free]).all()
    for v in np.flatnonzero(free):
        more = w.copy()
        more[v] += layout.step[v]
        if how.get("widen") or more[v] <= layout.sizes[v]:
            assert any(layout.cost(kind, more) > limit for kind, limit in limits.items())


def _macs(model: nn.Module, x: Tensor) -> int:
    return sum(m.weight.numel() * uses for m, uses in uses_of(model, x).items())


def _variables(layout: Layout, plan: WidthPlan) -> np.ndarray:
    """The widths that a plan's layers show."""
    given = np.array([plan.widths[name] for name in layout.names], dtype=float)
    return np.array(
        [np.max(np.where(layout.Out[:, v] > 0, given / np.maximum(layout.Out[:, v], 1), 0)) for v in range(len(layout.sizes))]
    )


def test_square_root_widths_of_a_chain_by_hand():
    plan = PreCrop(0.2).fit(plain())
    p = array(plan.densities)
    assert p == pytest.approx(array(layerwise_density(plain(), params=0.2)))
    widths = np.array([plan.widths[name] for name in ("0", "3", "7", "11")])
    wanted = np.sqrt(p[:4]) * np.array(CHANNELS[1:])
    scale = widths / wanted
    assert scale.max() - scale.min() < 0.1  # one factor, up to a channel
    assert plan.widths == {"0": 14, "1": 14, "3": 18, "4": 18, "7": 12, "8": 12, "11": 18, "12": 18, "16": 10}
    small = plan.build(plain(), seed=0)
    assert [(m.in_channels, m.out_channels) for m in small if isinstance(m, nn.Conv2d)] == [(1, 14), (14, 18), (18, 12), (12, 18)]
    assert small[1].num_features == len(small[1].running_mean) == 14
    assert (small[-1].in_features, small[-1].out_features) == (18, 10)


def test_uniform_densities_give_the_same_share_of_every_width():
    plan = PreCrop(0.2, method="uniform").fit(plain())
    shares = np.array([plan.widths[name] / width for name, width in zip(("0", "3", "7", "11"), CHANNELS[1:], strict=True)])
    assert shares == pytest.approx(np.full(4, 0.44), abs=0.03)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05])
@pytest.mark.parametrize("count", ["all", "weights"])
def test_the_geometric_programme_satisfies_its_conditions_of_optimality(share, count):
    layout = layout_of(plain(), None, False)
    budgets = part._Budgets(layout, share, None, count)
    free = ~layout.held
    low, high = np.where(free, 1.0, layout.sizes), layout.sizes
    w = part._geometric_programme(layout, budgets, free, low, high)
    assert layout.cost(count, w) == pytest.approx(budgets.limits[count], rel=1e-6)
    price = (layout.slope(count, w) * w)[free]  # d cost / d log r: equal where no bound holds
    inside = (w[free] > low[free] * 1.001) & (w[free] < high[free] * 0.999)
    assert inside.any()
    assert price[inside] == pytest.approx(np.full(inside.sum(), price[inside][0]), rel=1e-3)
    at_most = w[free] >= high[free] * 0.999
    assert (price[at_most] <= price[inside][0] * 1.001).all()
    root = layout.sizes * part._square_root_rule(layout, layerwise_density(plain(), params=share), free)
    low_scale, high_scale = 0.0, 4.0
    for _ in range(60):
        middle = (low_scale + high_scale) / 2
        scaled = np.where(free, np.clip(middle * root, low, high), layout.sizes)
        low_scale, high_scale = (middle, high_scale) if budgets.met(scaled) else (low_scale, middle)
    assert np.log(w[free]).sum() >= np.log(np.clip(low_scale * root, low, high)[free]).sum()


def test_derivative_of_the_count():
    model, x = build("plain")
    layout = layout_of(model, x, True)
    w = layout.sizes * 0.7
    for kind in ("all", "weights", "flops"):
        numeric = [(layout.cost(kind, w + 1e-4 * e) - layout.cost(kind, w - 1e-4 * e)) / 2e-4 for e in np.eye(len(w))]
        assert layout.slope(kind, w) == pytest.approx(numeric, rel=1e-6)


def test_blocks_keep_the_width_of_what_is_added():
    model, x = build("resnet")
    plan = PreCrop(0.5, tied=False).fit(model, x)
    widths = plan.widths
    assert [widths[n] for n in ("stem.0", "stages.0.conv2", "stages.1.conv2")] == [16, 16, 16]
    assert [widths[n] for n in ("stages.2.conv2", "stages.2.shortcut.0", "stages.3.conv2")] == [32, 32, 32]
    inner = {n: widths[n] for n in widths if n.endswith("conv1")}
    layout = layout_of(model, x, False)
    ratio = part._square_root_rule(layout, plan.densities, ~layout.held & ~layout.added)
    for name, width in inner.items():
        block = [plan.densities[f"{name}.weight"], plan.densities[f"{name[:-1]}2.weight"]]
        v = int(np.flatnonzero(layout.Out[layout.names.index(name)])[0])
        assert ratio[v] == pytest.approx(np.mean(block))
        assert width <= layout.sizes[v]
    tied = PreCrop(0.5, tied=True).fit(model, x).widths
    assert tied["stem.0"] == tied["stages.0.conv2"] == tied["stages.1.conv2"] < 16
    assert tied["stages.2.conv2"] == tied["stages.2.shortcut.0"] == tied["stages.3.conv2"] < 32


def test_auto_ties_only_where_the_budget_cannot_be_met_inside_the_blocks():
    model, x = build("resnet")
    auto = lambda share: PreCrop(share).fit(model, x).widths  # noqa: E731
    assert auto(0.5) == PreCrop(0.5, tied=False).fit(model, x).widths
    assert auto(0.02) == PreCrop(0.02, tied=True).fit(model, x).widths
    with pytest.raises(ValueError, match="cannot be met"):
        PreCrop(0.02, tied=False).fit(model, x)


def test_depthwise_follows_its_input_and_groups_stay_whole():
    model, x = build("branches")
    plan = PreCrop(0.4).fit(model, x)
    w = plan.widths
    assert w["expand"] == w["depthwise"] == w["excite"]
    assert w["project"] % 2 == 0
    assert w["grouped"] % 6 == 0
    small = plan.build(model, seed=0)
    assert small.depthwise.groups == small.depthwise.in_channels == w["expand"]
    assert small.grouped.groups == 2
    assert small.head.in_features == w["project"] + w["grouped"]


def test_activations_with_one_slope_and_norms_over_several_axes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.PReLU(), nn.Conv2d(8, 8, 3), nn.LayerNorm((8, 4, 4)), nn.Flatten(), nn.Linear(128, 3)
    )
    widths = PreCrop(0.8).fit(model, IMAGE).widths
    assert widths["0"] < 8
    assert widths["2"] == 8
    if pytest.importorskip("torch_pruning"):
        traced = _traced(model, IMAGE)
        assert traced[0].given == {"0": 1.0}
        assert not traced[0].held


def test_round_to():
    plan = PreCrop(0.3, round_to=8).fit(plain())
    assert all(plan.widths[name] % 8 == 0 for name in ("0", "3", "7", "11"))
    assert size(plan.build(plain())) == plan.parameters <= 0.3 * size(plain())
    small = PreCrop(0.5, round_to=24).fit(plain())  # a layer of 16 channels has no multiple of 24
    assert small.widths["0"] <= 16
    assert small.widths["3"] in (24, 32)


def test_weights_alone_can_be_counted():
    model = plain()
    plan = PreCrop(0.08, count="weights").fit(model)
    kept = weights(plan.build(model)).sum()
    assert kept <= 0.08 * 33_040 < kept + 9 * (16 + 32)
    assert kept >= weights(PreCrop(0.08).fit(model).build(model)).sum()
    whole = PreCrop(2643, count="weights").fit(model)
    assert whole.widths == plan.widths


def test_chains_and_traces_agree():
    pytest.importorskip("torch_pruning")
    for name in ("plain", "convnet", "mlp", "flatten", "mobile"):
        model, x = build(name)
        chain, traced = _chain(model), _traced(model, x)
        assert chain is not None
        assert [(w.size, w.given, w.taken, w.held) for w in chain] == [(w.size, w.given, w.taken, w.held) for w in traced]


def test_a_declared_configuration_is_followed():
    model = Configured()
    x = torch.zeros(2, 6)
    layout = layout_of(model, x, False)
    assert layout.In[layout.names.index("c")].tolist() == [1, 1]
    plan = PreCrop(0.5).fit(model, x)
    small = plan.build(model, seed=0)
    assert small.width_config == {"first": plan.widths["a"], "second": plan.widths["b"]}
    assert size(small) == plan.parameters <= 0.5 * size(model)


def test_a_fresh_draw_that_the_seed_decides():
    model, x = build("plain")
    plan = pickle.loads(pickle.dumps(PreCrop(0.3).fit(model, x)))
    a, b, c = (plan.build(model, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["0.weight"], c["0.weight"])
    torch.manual_seed(3)
    d = plan.build(model).state_dict()
    assert all(torch.equal(a[k], d[k]) for k in a)
    bound = 1 / np.sqrt(9 * plan.widths["0"])
    assert a["3.weight"].abs().max() <= bound  # drawn for the small network's fan-in
    assert a["3.weight"].std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert float(a["1.running_var"].sum()) == plan.widths["1"]
    for training in (True, False):
        assert plan.build(model.train(training)).training == training
    model[0].requires_grad_(False)
    assert not plan.build(model)[0].weight.requires_grad


def test_a_trained_model_is_warned_about_and_ignored():
    fresh = PreCrop(0.3).fit(plain(), IMAGE)
    for spoil in ("gradient", "affine", "spread"):
        model = plain()
        if spoil == "gradient":
            model.eval()(IMAGE).sum().backward()
        elif spoil == "affine":
            model[1].weight.data[0] = 2.0
        else:
            model[-1].weight.data *= 5
        with pytest.warns(UserWarning, match="trained weights"):
            assert PreCrop(0.3).fit(model, IMAGE).widths == fresh.widths
    bare = MLP((64, 32, 48, 10))
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter *= 5
    with pytest.warns(UserWarning, match="trained weights"):
        PreCrop(0.3).fit(bare)


@every_model
def test_an_untrained_model_is_not_warned_about(name):
    for draw in (
        lambda w: None,
        nn.init.kaiming_normal_,
        nn.init.orthogonal_,
        nn.init.zeros_,
        lambda w: nn.init.trunc_normal_(w, std=0.02),
    ):
        model, x = build(name)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                draw(module.weight)
        state = torch.get_rng_state()
        with torch.no_grad():
            model.train()(x)  # running statistics show no training
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            PreCrop(0.9).fit(model, x)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_model_whose_code_fixes_a_width_is_refused_when_built():
    class Fixed(nn.Sequential):
        pass

    model = Fixed(nn.Linear(6, 8), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 3))
    plan = PreCrop(0.5).fit(model, torch.zeros(1, 6))
    with pytest.raises(ValueError, match="its code fixes a width"):
        plan.build(model)

    class Reversing(Fixed):
        def forward(self, x):
            return self[1](self[0](x)[:, list(range(7, -1, -1))])

    model = Reversing(nn.Linear(6, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="its code fixes a width"):
        PreCrop(0.5).fit(model, torch.zeros(1, 6)).build(model)


def test_attention_and_raw_parameters_keep_their_widths():
    pytest.importorskip("torch_pruning")
    pytest.importorskip("transformers")
    model, x, _ = make("vit")
    plan = PreCrop(0.8).fit(model, x)
    changed = {n for n, m in model.named_modules() if n in plan.widths and _channels(m)[1] != plan.widths[n]}
    assert changed
    assert all(n.endswith("fc1") for n in changed)
    model, x, _ = make("attention")
    small = PreCrop(0.9).fit(model, x).build(model, seed=0)
    assert small.encoder.linear1.out_features < 16
    assert small(x).shape == (8, 4)


def test_shared_weights_keep_their_widths():
    pytest.importorskip("torch_pruning")
    model, x, _ = make("tied")
    with pytest.raises(ValueError, match="the fewest channels need 76"):
        PreCrop(0.5).fit(model, x)


def test_errors():
    model, x = plain(), IMAGE
    for make_plan in (lambda **kw: layerwise_density(model, x, **kw), lambda **kw: PreCrop(**kw)):
        with pytest.raises(ValueError, match="give a budget"):
            make_plan()
        for bad in (0, -3, 0.0, 1.5, float("nan")):
            with pytest.raises(ValueError, match="params must be a share"):
                make_plan(params=bad)
        with pytest.raises(TypeError, match="flops must be a share"):
            make_plan(flops="half")
        with pytest.raises(TypeError, match="params must be a share"):
            make_plan(params=True)
        with pytest.raises(ValueError, match="unknown method 'synexpp'"):
            make_plan(params=0.5, method="synexpp")
    with pytest.raises(TypeError, match="flops needs example_input"):
        layerwise_density(model, flops=0.5)
    with pytest.raises(TypeError, match="flops needs example_input"):
        PreCrop(flops=0.5).fit(model)
    with pytest.raises(TypeError, match="example_input"):
        layerwise_density(model, params=0.5, method="synflow")
    with pytest.raises(TypeError, match=r"SNIPPruner\.fit needs data"):
        layerwise_density(model, x, params=0.5, method="snip")
    with pytest.raises(ValueError, match="widen needs method"):
        layerwise_density(model, x, params=0.5, method="synflow", widen=True)
    with pytest.raises(ValueError, match="cannot be counted"):
        layerwise_density(make("lstm")[0], make("lstm")[1], flops=0.5)
    for argument, bad in (("rule", "cube"), ("count", "bytes"), ("round_to", 0), ("round_to", 1.5), ("tied", "yes")):
        with pytest.raises(ValueError, match=argument):
            PreCrop(0.5, **{argument: bad})
    with pytest.raises(TypeError, match="needs example_input"):
        PreCrop(0.5).fit(make("residual")[0])
    fewest = 9 * 4 + 2 * 4 + 10 + 10  # one channel each
    with pytest.raises(ValueError, match=f"the fewest channels need {fewest}"):
        PreCrop(fewest - 1).fit(model)
    assert set(PreCrop(fewest).fit(model).widths.values()) == {1, 10}
    with pytest.raises(ValueError, match=r"FLOPs cannot be met: the fewest channels need \d+"):
        PreCrop(flops=10).fit(model, x)
    plan = PreCrop(0.5).fit(model)
    with pytest.raises(ValueError, match="'0' should take 1 channels and give 16"):
        plan.build(ConvNet(1, 10))
    torch_prune.random_unstructured(model[0], "weight", amount=0.3)
    with pytest.raises(ValueError, match=r"carries a mask on '0\.weight'"):
        PreCrop(0.5).fit(model)


def test_without_torch_pruning_chains_still_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    model, x = build("plain")
    assert PreCrop(0.5).fit(model, x).build(model, seed=0)(x).shape == (2, 10)
    assert PreCrop(0.5).fit(Configured(), torch.zeros(1, 6)).parameters > 0
    with pytest.raises(ImportError, match=r"weightroom\[prune\]"):
        PreCrop(0.5).fit(make("residual")[0], x)


# --- shuffling


def test_shuffled_masks_keep_the_counts_and_nothing_else():
    model = plain()
    plan = SynFlowPruner(0.8, rounds=10).fit(model, example_inputs=IMAGE)
    state = torch.get_rng_state()
    a, b, c = (shuffle_masks(plan, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, mask in plan.masks.items():
        assert a.masks[name].shape == mask.shape
        assert int(a.masks[name].sum()) == int(mask.sum())
        assert torch.equal(a.masks[name], b.masks[name])
    assert not torch.equal(a.masks["3.weight"], c.masks["3.weight"])
    kept = plan.masks["3.weight"]
    both = float((a.masks["3.weight"] & kept).sum()) / float(kept.sum())
    assert both == pytest.approx(float(kept.float().mean()), abs=0.05)  # by chance
    assert a.macs(IMAGE, model=model) == plan.macs(IMAGE, model=model)


def test_plans_of_channels_or_corrections_are_not_shuffled():
    model = plain()
    plan = RandomPruner(0.5).fit(model)
    with pytest.raises(ValueError, match="channels"):
        shuffle_masks(type(plan).from_channels(model, {"0": [1]}), 0)
    with pytest.raises(ValueError, match="deltas"):
        shuffle_masks(type(plan)(plan.masks, deltas={"0.weight": torch.zeros(16, 1, 3, 3)}), 0)
