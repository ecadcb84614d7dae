from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from tests.prune.zoo import make
from weightroom.prune import (
    ERKPruner,
    GlobalMagnitudePruner,
    LAMPPruner,
    RandomPruner,
    UniformMagnitudePruner,
    global_keep_counts,
    minimum_threshold_sparsities,
)
from weightroom.prune.base import apportion, remove_smallest
from weightroom.prune.global_magnitude import lamp_scores

quick = settings(max_examples=60, deadline=None)
layers = st.lists(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=st.integers(-3, 3).map(float)),
    min_size=1,
    max_size=5,
)
share = st.floats(0, 0.999)


def linears(*weights: Tensor) -> nn.Module:
    model = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0]) for w in weights)
    with torch.no_grad():
        for layer, weight in zip(model, weights, strict=True):
            layer.weight.copy_(weight)
    return model


def kept(plan) -> list[int]:
    return [layer.kept for layer in plan.layers().values()]


# --- the ranking ---------------------------------------------------------------------------------------------------------


@quick
@given(arrays=layers, sparsity=share)
def test_exactly_the_smallest_go_with_ties_by_layer_then_index(arrays, sparsity):
    scores = [torch.from_numpy(array).abs() for array in arrays]
    total = sum(s.numel() for s in scores)
    removed = round(sparsity * total)
    masks = remove_smallest(scores, [None] * len(scores), removed)
    pool = torch.cat([s.flatten() for s in scores])
    order = torch.argsort(pool, stable=True)
    expected = torch.ones(total, dtype=torch.bool)
    expected[order[:removed]] = False
    assert torch.equal(torch.cat([m.flatten() for m in masks]), expected)
    assert [m.shape for m in masks] == [s.shape for s in scores]


@quick
@given(arrays=layers, sparsity=share, seed=st.integers(0, 99))
def test_what_is_gone_goes_first(arrays, sparsity, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.from_numpy(array).abs() for array in arrays]
    alive = [torch.rand(s.shape, generator=generator) < 0.7 for s in scores]
    total, gone = sum(s.numel() for s in scores), sum(int((~a).sum()) for a in alive)
    removed = max(gone, round(sparsity * total))
    masks = remove_smallest(scores, alive, removed)
    assert sum(int((~m).sum()) for m in masks) == removed
    assert not any((m & ~a).any() for m, a in zip(masks, alive, strict=True))


def test_mixed_dtypes_are_ranked_without_rounding():
    fine = torch.tensor([1.0 + 1e-12, 1.0 - 1e-12], dtype=torch.float64)
    masks = remove_smallest([torch.tensor([1.0, 2.0]), fine], [None, None], 2)
    assert [m.tolist() for m in masks] == [[False, True], [True, False]]


@quick
@given(seed=st.integers(0, 999), sparsity=st.floats(0.05, 0.95))
def test_matches_torch_where_there_are_no_ties(seed, sparsity):
    torch.manual_seed(seed)
    model = linears(torch.randn(7, 5), torch.randn(3, 9), torch.randn(11, 2))
    theirs = copy.deepcopy(model)
    torch_prune.global_unstructured([(m, "weight") for m in theirs], torch_prune.L1Unstructured, amount=sparsity)
    GlobalMagnitudePruner(sparsity).fit(model).apply(model)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(model, theirs, strict=True))


def test_one_common_factor_changes_nothing_but_a_factor_on_one_layer_empties_it():
    model, *_ = make("mlp")
    plan = GlobalMagnitudePruner(0.5).fit(model)
    scaled = copy.deepcopy(model)
    for p in scaled.parameters():
        p.data.mul_(3.7)
    assert all(torch.equal(GlobalMagnitudePruner(0.5).fit(scaled).masks[k], m) for k, m in plan.masks.items())
    model[2].weight.data.mul_(1e-3)
    assert kept(GlobalMagnitudePruner(144 / 264).fit(model)) == [72, 0, 48]


def test_keep_counts_of_lists_and_mappings():
    weights = [torch.tensor([[3.0, -1.0], [0.5, 2.0]]), torch.tensor([0.1, 9.0, 0.2], dtype=torch.float16)]
    assert global_keep_counts(weights, 4 / 7) == [2, 1]
    assert global_keep_counts({"a": weights[0], "b": weights[1]}, 0.0) == {"a": 4, "b": 3}
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1"):
        global_keep_counts(weights, 1)
    with pytest.raises(ValueError, match=r"weights\[1\] holds NaN"):
        global_keep_counts([weights[0], torch.tensor([float("nan")])], 0.5)
    with pytest.raises(ValueError, match="at least one weight"):
        global_keep_counts([], 0.5)


def test_true_zeros_go_first():
    model = linears(torch.tensor([[0.0, 1.0, 0.0, 2.0]]), torch.tensor([[0.1, 0.0, 0.2, 0.3]]))
    assert [m.int().tolist() for m in GlobalMagnitudePruner(3 / 8).fit(model).masks.values()] == [[[0, 1, 0, 1]], [[1, 0, 1, 1]]]


# --- the minimum threshold -----------------------------------------------------------------------------------------------


def published_loop(n: np.ndarray, s: np.ndarray, target: float, floor: int, rounds: int = 20_000) -> np.ndarray:
    """Rescale, clip, repeat: what the authors' script does, for as long as it is told to."""
    s = np.where(n < floor, 0.0, s)
    for _ in range(rounds):
        s = s * target / ((n * s).sum() / n.sum())
        low = ((1 - s) * n < floor) & (n > floor)
        s = np.where(low, 1 - floor / n, s)
        if not low.any():
            break
    return s


@quick
@given(
    sizes=st.lists(st.integers(20, 5000), min_size=2, max_size=8),
    seed=st.integers(0, 999),
    target=st.floats(0.3, 0.95),
    floor=st.integers(1, 15),
)
def test_threshold_is_the_fixed_point_of_the_published_loop(sizes, seed, target, floor):
    n = np.array(sizes, dtype=float)
    s0 = np.random.default_rng(seed).uniform(0.1, 1.0, len(n))
    s0 = s0 * target / ((n * s0).sum() / n.sum())
    assume(s0.max() <= 1)
    assume(np.maximum(n - floor, 0).sum() > 1.02 * target * n.sum())  # nearer to the limit the loop needs for ever
    s, c = minimum_threshold_sparsities(sizes, s0, target, floor)
    assert (n * s).sum() == pytest.approx(target * n.sum(), rel=1e-12)
    assert ((1 - s) * n >= floor - 1e-6).all()
    np.testing.assert_allclose(s, np.minimum(c * s0, 1 - floor / n), atol=1e-12)
    np.testing.assert_allclose(s, published_loop(n, s0, target, floor), atol=1e-5)


def test_threshold_zero_is_the_ranking_itself():
    s0 = np.array([0.9, 0.5, 1.0])
    s, c = minimum_threshold_sparsities([10, 100, 7], s0, float((np.array([10, 100, 7]) * s0).sum() / 117), 0)
    np.testing.assert_allclose(s, s0, atol=1e-12)
    assert c == pytest.approx(1)


def test_layers_no_larger_than_the_floor_stay_dense():
    s, _ = minimum_threshold_sparsities([8, 5, 100], [0.9, 0.9, 0.9], 0.5, 8)
    assert s[0] == s[1] == 0
    assert 100 * s[2] == pytest.approx(56.5)


def test_layers_that_were_whole_give_only_what_the_others_cannot():
    # The first layer holds all that the ranking removes and must keep 2: no factor on (1, 0, 0) removes 10 of 30.
    s, c = minimum_threshold_sparsities([10, 10, 10], [1.0, 0.0, 0.0], 1 / 3, 2)
    np.testing.assert_allclose(s, [0.8, 0.1, 0.1])
    assert c == float("inf")


def test_threshold_errors():
    with pytest.raises(
        ValueError, match=r"keeping at least 8 weights in each of 3 layers needs 24 weights, but sparsity 0.95 leaves 17"
    ):
        minimum_threshold_sparsities([100, 140, 100], [0.95] * 3, 0.95, 8)
    model = linears(torch.randn(10, 10), torch.randn(14, 10), torch.randn(10, 10))
    with pytest.raises(
        ValueError, match=r"keeping at least 8 weights in each of 3 layers needs 24 weights, but sparsity 0.95 leaves 17"
    ):
        GlobalMagnitudePruner(0.95, min_weights=8).fit(model)
    for arguments, message in (
        (([1, 2], [0.5], 0.5, 1), "one length"),
        (([], [], 0.5, 1), "one length"),
        (([4], [1.5], 0.5, 1), r"sparsities in \[0, 1\]"),
        (([0], [0.5], 0.5, 1), "sizes must be >= 1"),
        (([4], [0.5], 1.0, 1), "target must be in"),
        (([4], [0.5], 0.5, -1), "floor must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            minimum_threshold_sparsities(*arguments)
    for keywords, message in (
        ({"min_weights": 3, "min_fraction": 0.1}, "not both"),
        ({"min_weights": -1}, "min_weights must be"),
        ({"min_weights": 1.5}, "min_weights must be"),
        ({"min_fraction": 1.0}, r"min_fraction must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            GlobalMagnitudePruner(0.5, **keywords)


@quick
@given(
    seed=st.integers(0, 999),
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    sparsity=share,
    floor=st.integers(0, 12),
    scale=st.floats(-6, 0),
    masked=st.booleans(),
)
def test_every_layer_keeps_its_minimum_and_the_total_is_exact(seed, shapes, sparsity, floor, scale, masked):
    torch.manual_seed(seed)
    model = linears(*(torch.randn(shape) for shape in shapes))
    model[0].weight.data.mul_(10**scale)
    if masked:
        torch_prune.random_unstructured(model[0], "weight", amount=0.5)
    alive = [int(m.weight_mask.sum()) if hasattr(m, "weight_mask") else m.weight.numel() for m in model]
    sizes = [m.weight.numel() for m in model]
    removed = round(sparsity * sum(sizes))
    assume(removed >= sum(sizes) - sum(alive))
    if sum(min(floor, a) for a in alive) > sum(sizes) - removed:
        with pytest.raises(ValueError, match="keeping at least"):
            GlobalMagnitudePruner(sparsity, min_weights=floor).fit(model)
        return
    plan = GlobalMagnitudePruner(sparsity, min_weights=floor).fit(model)
    assert sum(sizes) - sum(kept(plan)) == removed
    assert all(k >= min(floor, a) for k, a in zip(kept(plan), alive, strict=True))
    if floor == 0:
        plain = GlobalMagnitudePruner(sparsity).fit(model)
        assert all(torch.equal(plain.masks[k], m) for k, m in plan.masks.items())
    for layer, mask in zip(model, plan.masks.values(), strict=True):  # within a layer the largest stay
        w = layer.weight.abs()
        if (~mask).any() and mask.any():
            assert w[mask].min() >= w[~mask].max()


def test_fraction_is_of_the_network_and_not_of_the_layer():
    model = linears(1e-3 * torch.randn(20, 20), torch.randn(40, 40))
    plan = GlobalMagnitudePruner(0.9, min_fraction=0.05).fit(model)
    assert kept(plan) == [100, 100]


# --- the companions ------------------------------------------------------------------------------------------------------


@quick
@given(
    quotas=st.lists(st.floats(0.5, 1e4), min_size=1, max_size=8),
    caps=st.lists(st.integers(0, 60), min_size=8, max_size=8),
    part=st.floats(0, 1),
)
def test_apportionment_meets_total_and_caps_and_never_falls_as_the_total_grows(quotas, caps, part):
    caps = caps[: len(quotas)]
    assume(sum(caps))
    total = round(part * sum(caps))
    counts = apportion(quotas, caps, total)
    assert sum(counts) == total
    assert all(0 <= k <= cap for k, cap in zip(counts, caps, strict=True))
    if total < sum(caps):
        more = apportion(quotas, caps, total + 1)
        assert all(b >= a for a, b in zip(counts, more, strict=True))


def test_apportionment_is_the_method_of_webster():
    # The textbook way: seats go one by one to the highest q / (k + 1/2).
    quotas, caps = [53.0, 24.0, 23.0, 7.5], [40, 9, 30, 30]
    for total in range(sum(caps)):
        counts = [0] * 4
        for _ in range(total):
            best = max(
                (q / (k + 0.5) if k < cap else -1.0, -i) for i, (q, k, cap) in enumerate(zip(quotas, counts, caps, strict=True))
            )
            counts[-best[1]] += 1
        assert apportion(quotas, caps, total) == counts


def test_uniform_removes_the_same_share_everywhere():
    model = linears(1e-3 * torch.randn(10, 10), torch.randn(20, 20), torch.randn(5, 10))
    assert kept(UniformMagnitudePruner(0.9).fit(model)) == [10, 40, 5]
    assert kept(UniformMagnitudePruner(0.975).fit(model)) == [3, 10, 1]  # 2.5, 10, 1.25 of 14


def test_erk_keeps_weights_in_proportion_to_the_sum_of_dimensions():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(32, 100))
    got = kept(ERKPruner(0.8).fit(model))
    total = 3 * 16 * 9 + 16 * 32 * 9 + 3200
    sums = np.array([16 + 3 + 6, 32 + 16 + 6, 132])
    scale = round(0.2 * total) / sums.sum()
    assert sum(got) == round(0.2 * total)
    np.testing.assert_allclose(got, scale * sums, atol=1)
    small = nn.Sequential(nn.Linear(2, 2), nn.Linear(50, 50))
    assert kept(ERKPruner(0.9).fit(small)) == [4, round(0.1 * 2504) - 4]


def test_lamp_score_by_hand():
    score = lamp_scores(torch.tensor([[3.0, -1.0], [0.0, 2.0]]))
    assert score.tolist() == [[pytest.approx(1.0), pytest.approx(1 / 14)], [0.0, pytest.approx(4 / 13)]]


@quick
@given(
    array=hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=st.floats(-100, 100, width=32)),
    factor=st.floats(1e-3, 1e3),
)
def test_lamp_scores_ignore_scale_and_sign_and_follow_magnitude(array, factor):
    weight = torch.from_numpy(array).double()
    score = lamp_scores(weight)
    assert score.shape == weight.shape
    assert score.min() >= 0
    assert score.max() <= 1
    torch.testing.assert_close(lamp_scores(-factor * weight), score, rtol=1e-9, atol=1e-300)
    if weight.any():
        assert score.max() == 1
        w, s = weight.abs().flatten(), score.flatten()
        bigger = w.square()[:, None] > w.square()[None, :]
        assert (s[:, None] > s[None, :])[bigger].all()
        order = w.argsort(stable=True)
        tail = s[order][w[order] > 1e-3 * w.max()]
        first = w[order][w[order] > 1e-3 * w.max()]
        assert float((1 - tail[:-1]).prod()) == pytest.approx(float(w.max() ** 2 / first.square().sum()), rel=1e-6)  # telescopes


def test_lamp_is_blind_to_layer_scale_and_empties_no_layer_before_its_time():
    torch.manual_seed(0)
    model = linears(torch.randn(10, 10), torch.randn(20, 10), torch.randn(4, 20))
    plan = LAMPPruner(0.95).fit(model)
    model[0].weight.data.mul_(1e-3)
    model[2].weight.data.mul_(40)
    assert all(torch.equal(LAMPPruner(0.95).fit(model).masks[k], m) for k, m in plan.masks.items())
    assert kept(LAMPPruner(377 / 380).fit(model)) == [1, 1, 1]


def test_lamp_ranks_only_what_is_alive():
    torch.manual_seed(0)
    model = linears(torch.randn(10, 10), torch.randn(20, 10))
    LAMPPruner(0.5).fit(model).apply(model)
    direct = [model[0].weight_mask.bool(), model[1].weight_mask.bool()]
    for layer, mask in zip(model, direct, strict=True):
        with torch.no_grad():
            layer.weight_orig[~mask] = 1e6  # what a mask hides must not weigh on those that are left
    again = LAMPPruner(0.8).fit(model)
    clean = LAMPPruner(0.8).fit(linears(*(layer.weight_orig.detach() * mask for layer, mask in zip(model, direct, strict=True))))
    assert all(torch.equal(a, b) for a, b in zip(again.masks.values(), clean.masks.values(), strict=True))


def test_random_is_uniform_over_weights_and_decided_by_its_seed():
    model = linears(torch.randn(30, 30), 1e-6 * torch.randn(30, 30))
    plan = RandomPruner(0.5, seed=1).fit(model)
    assert all(torch.equal(RandomPruner(0.5, seed=1).fit(model).masks[k], m) for k, m in plan.masks.items())
    assert not torch.equal(RandomPruner(0.5, seed=2).fit(model).masks["0.weight"], plan.masks["0.weight"])
    counts = np.array([kept(RandomPruner(0.5, seed=s).fit(model)) for s in range(50)])
    assert abs(counts[:, 0].mean() - 450) < 4 * 15 / np.sqrt(50)  # hypergeometric, s.d. 10.6
    assert (counts.sum(1) == 900).all()
    where = sum(RandomPruner(0.5, seed=s).fit(model).masks["0.weight"].double() for s in range(200)) / 200
    assert abs(where - 0.5).max() < 0.2


# --- what counts ---------------------------------------------------------------------------------------------------------


def test_biases_and_norms_are_pruned_when_they_are_asked_for():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    assert list(GlobalMagnitudePruner(0.5).fit(model).masks) == ["0.weight", "2.weight"]
    assert list(GlobalMagnitudePruner(0.5, targets=(nn.Linear, nn.LayerNorm)).fit(model).masks) == [
        "0.weight",
        "1.weight",
        "2.weight",
    ]
    assert list(GlobalMagnitudePruner(0.5, targets=(nn.Linear, "*.bias")).fit(model).masks) == [
        "0.weight", "0.bias", "1.bias", "2.weight", "2.bias",
    ]  # fmt: skip
    plan = GlobalMagnitudePruner(0.9, targets=("*.bias",)).fit(model)
    plan.apply(model)
    assert int((model[0].bias == 0).sum() + (model[1].bias == 0).sum() + (model[2].bias == 0).sum()) == 9


def test_every_weight_of_recurrent_and_attention_layers_counts():
    lstm = nn.Sequential(nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2))
    names = list(GlobalMagnitudePruner(0.5).fit(lstm).masks)
    assert len(names) == 12
    assert "0.weight_hr_l1_reverse" in names
    attention = nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True))
    assert list(GlobalMagnitudePruner(0.5).fit(attention).masks) == [
        "0.q_proj_weight", "0.k_proj_weight", "0.v_proj_weight", "0.out_proj.weight",
    ]  # fmt: skip


def test_ignore_takes_modules_patterns_parameters_and_positions():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)), "head": nn.Linear(3, 2)})
    names = lambda *ignore: list(GlobalMagnitudePruner(0.5, ignore=ignore).fit(model).masks)  # noqa: E731
    assert names("body") == ["head.weight"]
    assert names("body.0") == ["body.1.weight", "head.weight"]
    assert names("body.*.weight") == ["head.weight"]
    assert names("head.weight", 0) == ["body.1.weight"]
    assert names(0, -1) == ["body.1.weight"]
    assert names("head.bias") == ["body.0.weight", "body.1.weight", "head.weight"]
    with pytest.raises(ValueError, match=r"ignore 'haed': did you mean 'head"):
        names("haed")
    with pytest.raises(ValueError, match="no position 3 among 3"):
        names(3)
    with pytest.raises(ValueError, match="no weight to prune"):
        names("*")
    with pytest.raises(TypeError, match="ignore must be a sequence of names and positions"):
        names(nn.Linear)
    with pytest.raises(TypeError, match="ignore must be a sequence"):
        GlobalMagnitudePruner(0.5, ignore="head").fit(model)
    with pytest.raises(TypeError, match="targets must be a sequence of module types and names"):
        GlobalMagnitudePruner(0.5, targets=(3,)).fit(model)


def test_a_shared_weight_stays_dense_if_one_of_its_names_is_ignored():
    model, *_ = make("tied")
    assert list(GlobalMagnitudePruner(0.5, ignore=("decode",)).fit(model).masks) == ["head.weight"]


def test_weights_that_are_no_plain_parameters_are_refused():
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"'0.weight' is computed from other tensors"):
        GlobalMagnitudePruner(0.5).fit(normed)
    assert list(GlobalMagnitudePruner(0.5, ignore=("0",)).fit(normed).masks) == ["1.weight"]
    with pytest.warns(FutureWarning):
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"'0.weight' is computed from other tensors"):
        GlobalMagnitudePruner(0.5).fit(old)
    with pytest.raises(ValueError, match=r"'0.weight' is not initialised"):
        GlobalMagnitudePruner(0.5).fit(nn.Sequential(nn.LazyLinear(3)))
    integer = nn.Sequential(nn.Linear(2, 2))
    integer[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"dtype torch.int8"):
        GlobalMagnitudePruner(0.5).fit(integer)


def test_complex_weights_are_ranked_by_modulus():
    model = nn.Sequential(nn.Linear(2, 1, dtype=torch.complex64))
    model[0].weight.data = torch.tensor([[3 + 4j, 4.5 + 0j]])
    assert GlobalMagnitudePruner(0.5).fit(model).masks["0.weight"].tolist() == [[True, False]]


def test_granularity_and_schedule_are_checked():
    with pytest.raises(ValueError, match="granularity must be 'weight', got 'channel'"):
        GlobalMagnitudePruner(0.5, granularity="channel")
    for schedule in (
        "cubic",
        ("cubic", 5, 5, 1),
        ("cubic", -1, 5, 1),
        ("cubic", 0, 5, 0),
        ("spline", 0, 5, 1),
        ("cubic", 0.0, 5, 1),
    ):
        with pytest.raises(ValueError, match="schedule"):
            GlobalMagnitudePruner(0.5, schedule=schedule)
