"""Focal Tversky, maximum-intensity projections, and their sum."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightroom.losses import FocalTverskyLoss, MIPLoss, SPOCKMIPLoss, focal_tversky_loss, maximum_intensity_projections

AXES = ["x", "y", "z", "multi", (0,), (0, 2)]
seeds = st.integers(0, 2**31)


def pair(seed=0, shape=(2, 1, 4, 5, 6), dtype=torch.float64, density=0.3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=dtype), (torch.rand(shape, generator=generator) < density).to(dtype)


def published(P, Y, alpha=0.7, gamma=0.75, smooth=1.0):
    tp, fn, fp = (P * Y).sum(), (Y * (1 - P)).sum(), ((1 - Y) * P).sum()
    return (1 - (tp + smooth) / (tp + alpha * fn + (1 - alpha) * fp + smooth)).abs() ** gamma


def every_loss():
    return [FocalTverskyLoss(), *(MIPLoss(axes=a) for a in AXES), *(SPOCKMIPLoss(axes=a, activation="none") for a in AXES)]


# Focal Tversky


@given(seed=seeds, alpha=st.floats(0, 1), gamma=st.floats(0.2, 3), smooth=st.floats(0.01, 5))
@settings(max_examples=30, deadline=None)
def test_the_published_formula_over_the_whole_batch(seed, alpha, gamma, smooth):
    P, Y = pair(seed)
    torch.testing.assert_close(FocalTverskyLoss(alpha, gamma, smooth)(P, Y), published(P, Y, alpha, gamma, smooth))


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_gamma_one_alpha_half_without_smoothing_is_one_minus_dice(seed):
    P, Y = pair(seed, density=0.5)
    dice = 2 * (P * Y).sum() / (P + Y).sum()
    torch.testing.assert_close(FocalTverskyLoss(alpha=0.5, gamma=1.0, smooth=0.0)(P, Y), 1 - dice)


def test_alpha_is_the_weight_of_what_is_missed():
    Y = torch.zeros(1, 1, 8, dtype=torch.float64)
    Y[..., :4] = 1
    missing, extra = Y.clone(), Y.clone()
    missing[..., 0], extra[..., 4] = 0, 1
    recall_first = FocalTverskyLoss(alpha=0.9)
    assert recall_first(missing, Y) > recall_first(extra, Y)
    # one voxel missed of four: TI = (3 + 1) / (3 + 0.9 + 1)
    torch.testing.assert_close(recall_first(missing, Y), torch.tensor((1 - 4 / 4.9) ** 0.75, dtype=torch.float64))


def test_soft_labels_and_other_dtypes_of_labels():
    P, Y = pair()
    assert FocalTverskyLoss()(P, Y * 0.5).isfinite()
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        torch.testing.assert_close(SPOCKMIPLoss(activation="none")(P, Y.to(dtype)), SPOCKMIPLoss(activation="none")(P, Y))


def test_per_sample_is_the_mean_of_the_samples_and_differs_from_the_pooled_batch():
    P, Y = pair(shape=(3, 1, 4, 4, 4))
    Y[0] = 0
    own = torch.stack([published(p, y) for p, y in zip(P, Y, strict=True)])
    torch.testing.assert_close(FocalTverskyLoss(per_sample=True)(P, Y), own.mean())
    torch.testing.assert_close(FocalTverskyLoss(reduction="none")(P, Y), own)
    torch.testing.assert_close(FocalTverskyLoss(reduction="sum")(P, Y), own.sum())
    assert abs(FocalTverskyLoss()(P, Y) - own.mean()) > 1e-3


def test_channels_are_averaged():
    P, Y = pair(shape=(2, 3, 4, 5))
    apart = torch.stack([published(P[:, c], Y[:, c]) for c in range(3)]).mean()
    torch.testing.assert_close(FocalTverskyLoss()(P, Y), apart)


def test_sigmoid_takes_logits():
    P, Y = pair()
    torch.testing.assert_close(FocalTverskyLoss(sigmoid=True)(P.logit(), Y), FocalTverskyLoss()(P, Y))


def test_the_functional_form_is_the_module():
    P, Y = pair()
    arguments = {"alpha": 0.3, "gamma": 1.5, "smooth": 0.2, "per_sample": True, "reduction": "sum"}
    assert focal_tversky_loss(P, Y, **arguments) == FocalTverskyLoss(**arguments)(P, Y)


def test_soft_labels_get_gradients_too():
    P, Y = pair(shape=(2, 1, 2, 3))
    soft = (0.2 + 0.6 * Y + 0.05 * P.flip(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, y: FocalTverskyLoss()(p, y), (P.requires_grad_(), soft))


# Perfect and empty


@given(seed=seeds, axes=st.sampled_from(AXES), voxel=st.floats(0, 2), mip=st.floats(0, 2))
@settings(max_examples=30, deadline=None)
def test_a_perfect_prediction_costs_exactly_nothing(seed, axes, voxel, mip):
    _, Y = pair(seed, dtype=torch.float32)
    assert SPOCKMIPLoss(voxel, mip, axes, activation="none")(Y, Y) == 0
    assert MIPLoss(axes=axes)(Y, Y) == 0


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_nothing_predicted_where_there_is_nothing_costs_nothing(smooth):
    Z = torch.zeros(2, 1, 4, 4, 4)
    assert SPOCKMIPLoss(activation="none", smooth=smooth)(Z, Z) == 0


@pytest.mark.parametrize("target", ["label", "empty", "full"])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_gradients_are_finite_at_a_perfect_prediction(target, smooth):
    _, Y = pair(dtype=torch.float32)
    Y = {"label": Y, "empty": torch.zeros_like(Y), "full": torch.ones_like(Y)}[target]
    P = Y.clone().requires_grad_()
    SPOCKMIPLoss(activation="none", smooth=smooth)(P, Y).backward()
    assert P.grad.isfinite().all()
    logits = ((Y - 0.5) * 400).requires_grad_()
    SPOCKMIPLoss(smooth=smooth)(logits, Y).backward()
    assert logits.grad.isfinite().all()


def test_the_straight_line_near_zero_meets_the_power():
    Y = torch.ones(1, 1, 1000, dtype=torch.float64)
    values = [FocalTverskyLoss(alpha=1.0, smooth=0.0)(Y * (1 - rest), Y).item() for rest in (0.5e-7, 0.9999999e-7, 1.0000001e-7)]
    assert values[0] == pytest.approx(0.5 * 1e-7**0.75, rel=1e-4)
    assert values[1] == pytest.approx(values[2], rel=1e-4)
    assert values[2] == pytest.approx(1e-7**0.75, rel=1e-4)


# Projections


@given(seed=seeds, axis=st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_the_order_of_voxels_along_the_projected_axis_does_not_matter(seed, axis):
    P, Y = pair(seed)
    loss = MIPLoss(axes=(axis,))
    shuffle = torch.randperm(P.shape[axis + 2], generator=torch.Generator().manual_seed(seed))
    value = loss(P, Y)
    assert loss(P.index_select(axis + 2, shuffle), Y) == value
    assert loss(P, Y.index_select(axis + 2, shuffle)) == value


def test_the_order_of_voxels_along_another_axis_does_matter():
    P, Y = pair(density=0.1)
    assert MIPLoss(axes="y")(P.flip(2), Y) != MIPLoss(axes="y")(P, Y)


def test_foreground_behind_foreground_does_not_count():
    P, Y = pair()
    behind = Y.clone()
    behind[..., -1] = torch.maximum(behind[..., -1], Y[..., 0])
    assert not torch.equal(behind, Y)
    assert MIPLoss(axes="z")(P, behind) == MIPLoss(axes="z")(P, Y)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_multi_is_the_sum_of_the_axes_and_mean_a_third_of_it(seed):
    P, Y = pair(seed)
    apart = sum(MIPLoss(axes=a)(P, Y) for a in "xyz")
    torch.testing.assert_close(MIPLoss(axes="multi")(P, Y), apart)
    torch.testing.assert_close(MIPLoss(axes=(2, 0, 1))(P, Y), apart)
    torch.testing.assert_close(MIPLoss(axes="multi", axis_reduction="mean")(P, Y), apart / 3)


def test_names_are_the_spatial_dimensions_in_order_and_samples_are_averaged():
    P, Y = pair()
    for name, dim in zip("xyz", (1, 2, 3), strict=True):
        expected = torch.stack([published(p.amax(dim), y.amax(dim)) for p, y in zip(P, Y, strict=True)])
        torch.testing.assert_close(MIPLoss(axes=name)(P, Y), expected.mean())
        torch.testing.assert_close(MIPLoss(axes=name, reduction="none")(P, Y), expected)


@given(seed=seeds, axis=st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_flipping_both_leaves_every_loss(seed, axis):
    P, Y = pair(seed)
    for loss in every_loss():
        torch.testing.assert_close(loss(P.flip(axis + 2), Y.flip(axis + 2)), loss(P, Y))


def test_swapping_two_axes_swaps_their_losses():
    P, Y = pair(shape=(2, 1, 5, 5, 5))
    swapped = P.transpose(2, 4), Y.transpose(2, 4)
    torch.testing.assert_close(MIPLoss(axes="x")(*swapped), MIPLoss(axes="z")(P, Y))
    torch.testing.assert_close(MIPLoss(axes="y")(*swapped), MIPLoss(axes="y")(P, Y))
    torch.testing.assert_close(MIPLoss(axes="multi")(*swapped), MIPLoss(axes="multi")(P, Y))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_gradient_reaches_one_voxel_of_a_ray(axis):
    P, Y = pair()
    P.requires_grad_()
    MIPLoss(axes=(axis,))(P, Y).backward()
    hit = P.grad != 0
    assert (hit.sum(axis + 2) <= 1).all()
    assert (hit.sum(axis + 2) == 1).any()
    assert (P[hit] == P.amax(axis + 2, keepdim=True).expand_as(P)[hit]).all()


def test_ties_share_the_gradient_as_torch_amax_does():
    P = torch.tensor([[0.5, 0.5, 0.2], [0.5, 0.1, 0.9]], dtype=torch.float64)[None, None].requires_grad_()
    weights = [torch.tensor([[[1.0, 3.0, 5.0]]], dtype=torch.float64), torch.tensor([[[7.0, 11.0]]], dtype=torch.float64)]

    def gradient(projections):
        return torch.autograd.grad(sum((w * p).sum() for w, p in zip(weights, projections, strict=True)), P)[0]

    ours = gradient(maximum_intensity_projections(P))
    assert torch.equal(ours, gradient([P.amax(2), P.amax(3)]))
    assert ours[0, 0, 0, 0] == 1 / 2 + 7 / 2


def test_derivatives_match_finite_differences_twice():
    P, Y = pair(shape=(2, 2, 3, 2, 3))
    loss = SPOCKMIPLoss(activation="none", per_sample=True)
    assert torch.autograd.gradcheck(lambda p: loss(p, Y), P.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda p: loss(p, Y), P)


def test_a_plane_is_projected_to_lines():
    P, Y = pair(shape=(2, 1, 5, 6))
    lines = torch.stack([published(p.amax(d), y.amax(d)) for d in (1, 2) for p, y in zip(P, Y, strict=True)])
    torch.testing.assert_close(MIPLoss(axes="multi")(P, Y), lines.sum() / 2)


def test_other_projections_can_be_the_target():
    P, Y = pair(shape=(2, 1, 4, 5, 6))
    _, volume = pair(1, shape=(2, 1, 8, 5, 6))
    volume[:, :, 2:6] = Y
    own = maximum_intensity_projections(Y)
    torch.testing.assert_close(MIPLoss(axes="multi")(P, Y, mip_target=own), MIPLoss(axes="multi")(P, Y))
    wider = [maximum_intensity_projections(volume, "x")[0], own[1], own[2]]
    expected = MIPLoss(axes="multi")(P, Y) - MIPLoss(axes="x")(P, Y) + MIPLoss(axes="x")(P, Y, mip_target=wider[0])
    assert MIPLoss(axes="x")(P, Y, mip_target=wider[0]) != MIPLoss(axes="x")(P, Y)
    torch.testing.assert_close(MIPLoss(axes="multi")(P, Y, mip_target=wider), expected)
    torch.testing.assert_close(
        SPOCKMIPLoss(activation="none")(P, Y, mip_target=wider), 0.7 * FocalTverskyLoss()(P, Y) + 0.3 * expected
    )


@pytest.mark.parametrize("axes, shapes", [("multi", [(5, 6), (4, 6), (4, 5)]), ("y", [(4, 6)]), ((2, 0), [(4, 5), (5, 6)])])
def test_projections_come_in_the_order_asked_for(axes, shapes):
    P, _ = pair(shape=(2, 3, 4, 5, 6))
    assert [tuple(p.shape) for p in maximum_intensity_projections(P, axes)] == [(2, 3, *s) for s in shapes]


# Other base losses


def test_a_base_loss_of_torch():
    P, Y = pair()
    by_sample = torch.stack([nn.functional.binary_cross_entropy(p.amax(1), y.amax(1)) for p, y in zip(P, Y, strict=True)])
    torch.testing.assert_close(MIPLoss(nn.BCELoss(), axes="x")(P, Y), by_sample.mean())
    torch.testing.assert_close(MIPLoss(nn.BCELoss(reduction="none"), axes="x", reduction="none")(P, Y), by_sample)
    with pytest.raises(ValueError, match="reduction='none'"):
        MIPLoss(nn.BCELoss(), axes="x", reduction="sum")(P, Y)


def test_a_base_that_takes_logits_projects_logits():
    P, Y = pair()
    torch.testing.assert_close(MIPLoss(FocalTverskyLoss(sigmoid=True), axes="multi")(P.logit(), Y), MIPLoss(axes="multi")(P, Y))


def test_a_focal_tversky_base_is_always_by_sample():
    P, Y = pair()
    base = FocalTverskyLoss(alpha=0.4, per_sample=False, reduction="sum")
    torch.testing.assert_close(MIPLoss(base)(P, Y), MIPLoss(FocalTverskyLoss(alpha=0.4, per_sample=True))(P, Y))


# The sum, and deep supervision


@pytest.mark.parametrize("axes", ["z", "multi"])
def test_the_total_is_the_weighted_sum(axes):
    P, Y = pair()
    expected = 0.7 * FocalTverskyLoss()(P, Y) + 0.3 * MIPLoss(axes=axes)(P, Y)
    torch.testing.assert_close(SPOCKMIPLoss(axes=axes)(P.logit(), Y), expected)
    torch.testing.assert_close(SPOCKMIPLoss(axes=axes)([P.logit()], Y), expected)
    own = 0.7 * FocalTverskyLoss(per_sample=True)(P, Y) + 0.3 * MIPLoss(axes=axes)(P, Y)
    torch.testing.assert_close(SPOCKMIPLoss(axes=axes, per_sample=True)(P.logit(), Y), own)


def test_hyper_parameters_reach_both_terms():
    P, Y = pair()
    base = FocalTverskyLoss(0.2, 1.3, 0.5)
    loss = SPOCKMIPLoss(0.4, 2.0, "y", activation="none", alpha=0.2, gamma=1.3, smooth=0.5)
    torch.testing.assert_close(loss(P, Y), 0.4 * base(P, Y) + 2 * MIPLoss(base, "y")(P, Y))


def test_a_mean_over_axes_reaches_the_total():
    P, Y = pair()
    loss = SPOCKMIPLoss(0.0, 1.0, activation="none", axis_reduction="mean")
    torch.testing.assert_close(loss(P, Y), MIPLoss(axes="multi", axis_reduction="mean")(P, Y))


def test_deep_supervision_upsamples_logits_to_the_nearest_and_weighs_the_scales():
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(2, 1, s, s, s, generator=generator, dtype=torch.float64) for s in (9, 4, 2)]
    _, Y = pair(shape=(2, 1, 9, 9, 9))
    one = SPOCKMIPLoss()
    full = [nn.functional.interpolate(o, size=(9, 9, 9), mode="nearest") for o in outputs]
    expected = sum(s * one(o, Y) for s, o in zip((1, 0.66, 0.34), full, strict=True))
    torch.testing.assert_close(one(outputs, Y), expected)
    torch.testing.assert_close(one(tuple(outputs[:2]), Y), one(full[0], Y) + 0.66 * one(full[1], Y))
    torch.testing.assert_close(SPOCKMIPLoss(scales=(2,))(outputs[0], Y), 2 * one(outputs[0], Y))


def test_it_trains_a_network():
    torch.manual_seed(0)
    x, Y = torch.randn(4, 1, 8, 8, 8), torch.zeros(4, 1, 8, 8, 8)
    Y[:, :, 3:5, 3:5] = 1
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 1, 1))
    optimizer, loss = torch.optim.Adam(net.parameters(), 0.1), SPOCKMIPLoss()
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        value = loss(net(x + 2 * Y), Y)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


# What every loss does


@pytest.mark.parametrize("make", [FocalTverskyLoss, MIPLoss, lambda **k: SPOCKMIPLoss(activation="none", **k)])
def test_reductions_agree(make):
    P, Y = pair()
    each = make(reduction="none")(P, Y)
    assert each.shape == (2,)
    torch.testing.assert_close(make(reduction="sum")(P, Y), each.sum())
    if make is not MIPLoss:
        torch.testing.assert_close(make(per_sample=True)(P, Y), each.mean())
    else:
        torch.testing.assert_close(make()(P, Y), each.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_in_thirty_two_out(dtype):
    P, Y = pair(shape=(2, 1, 24, 24, 24), dtype=torch.float32)
    P = P.to(dtype)
    for loss in [*every_loss(), FocalTverskyLoss(sigmoid=True), SPOCKMIPLoss()]:
        p = P.clone().requires_grad_()
        value = loss(p, Y.to(dtype))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(P.float(), Y))
        value.backward()
        assert p.grad.dtype == dtype
        assert p.grad.isfinite().all()


def test_layouts_of_memory_do_not_matter():
    P, Y = pair(shape=(2, 3, 4, 4, 4))
    last = [t.to(memory_format=torch.channels_last_3d) for t in (P, Y)]
    for loss in every_loss():
        torch.testing.assert_close(loss(*last), loss(P, Y))
        a, b = (torch.autograd.grad(loss(p, Y), p)[0] for p in (P.clone().requires_grad_(), last[0].clone().requires_grad_()))
        torch.testing.assert_close(a, b)


def test_copies_are_equal_and_the_arguments_are_shown():
    P, Y = pair()
    for loss in every_loss():
        assert pickle.loads(pickle.dumps(loss))(P, Y) == copy.deepcopy(loss)(P, Y) == loss(P, Y)
        assert not list(loss.parameters())
    assert "alpha=0.7" in repr(FocalTverskyLoss())
    assert "axes='z'" in repr(MIPLoss(axes="z"))
    assert "voxel_weight=0.7" in repr(SPOCKMIPLoss())


def test_the_inputs_are_left_alone():
    P, Y = pair()
    before = P.clone(), Y.clone()
    P.requires_grad_()
    SPOCKMIPLoss(activation="none")(P, Y).backward()
    assert torch.equal(P, before[0])
    assert torch.equal(Y, before[1])


# Errors


@pytest.mark.parametrize("loss", every_loss(), ids=lambda loss: repr(loss).splitlines()[0])
def test_wrong_inputs_are_refused(loss):
    P, Y = pair(dtype=torch.float32)
    with pytest.raises(ValueError, match="same shape"):
        loss(P, Y[:, :, :-1])
    with pytest.raises(TypeError, match="floating point"):
        loss(Y.long(), Y)
    for wrong in (Y * 2, Y - 0.1, torch.full_like(Y, float("nan"))):
        with pytest.raises(ValueError, match=r"target must have values in \[0, 1\]"):
            loss(P, wrong)
    with pytest.raises(ValueError, match="target must have values"):
        loss(P, Y.to(torch.uint8) * 255)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": 1.1}, "alpha"),
        ({"gamma": 0.0}, "gamma"),
        ({"smooth": -1.0}, "smooth"),
        ({"reduction": "median"}, "reduction"),
    ],
)
def test_wrong_arguments_are_named(arguments, name):
    for make in (FocalTverskyLoss, SPOCKMIPLoss, lambda **k: focal_tversky_loss(*pair(), **k)):
        with pytest.raises(ValueError, match=name):
            make(**arguments)


@pytest.mark.parametrize("axes", ["w", "", (), (0, 0), (-1,), ("x",)])
def test_axes_that_do_not_exist(axes):
    for make in (MIPLoss, SPOCKMIPLoss):
        with pytest.raises(ValueError, match="axes"):
            make(axes=axes)


def test_axes_outside_the_input():
    P, Y = pair(shape=(2, 1, 4, 4))
    for loss in (MIPLoss(axes="z"), MIPLoss(axes=(2,)), SPOCKMIPLoss(axes=(0, 3), activation="none")):
        with pytest.raises(ValueError, match="outside the 2 spatial dimensions"):
            loss(P, Y)
    with pytest.raises(ValueError, match="outside the 0 spatial dimensions"):
        MIPLoss(axes="multi")(*pair(shape=(2, 3)))
    with pytest.raises(ValueError, match=r"\(B, C, \*\)"):
        FocalTverskyLoss()(*pair(shape=(2,)))


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"voxel_weight": -1}, "voxel_weight"),
        ({"mip_weight": -1}, "mip_weight"),
        ({"scales": (1, -1)}, r"scales\[1\]"),
        ({"scales": ()}, "scales"),
        ({"activation": "relu"}, "activation"),
        ({"axis_reduction": "max"}, "axis_reduction"),
        ({"mip_weight": float("nan")}, "mip_weight"),
    ],
)
def test_wrong_arguments_of_the_sum(arguments, name):
    with pytest.raises(ValueError, match=name):
        SPOCKMIPLoss(**arguments)


def test_wrong_lists_of_outputs():
    P, Y = pair()
    loss = SPOCKMIPLoss()
    with pytest.raises(ValueError, match="1 to 3 outputs"):
        loss([P] * 4, Y)
    with pytest.raises(ValueError, match="1 to 3 outputs"):
        loss([], Y)
    for wrong in ("logits", [P, Y.long()[..., ::2]], [P, None]):
        with pytest.raises(TypeError, match="list or tuple of such tensors"):
            loss(wrong, Y)
    with pytest.raises(ValueError, match="same shape"):
        loss([P[:, :, ::2], P], Y)  # the finest must have the target's size
    with pytest.raises(ValueError, match="same shape"):
        loss([P, P.repeat(1, 2, 1, 1, 1)], Y)


def test_wrong_projections_to_compare_with():
    P, Y = pair()
    own = maximum_intensity_projections(Y)
    with pytest.raises(ValueError, match="one tensor for each of the 3 axes"):
        MIPLoss(axes="multi")(P, Y, mip_target=own[:2])
    with pytest.raises(ValueError, match="axis 0 must have shape"):
        MIPLoss(axes="multi")(P, Y, mip_target=own[::-1])
    with pytest.raises(ValueError, match="mip_target must have values"):
        MIPLoss(axes="x")(P, Y, mip_target=own[0] * 3)


def test_one_axis_is_the_default_and_it_is_z():
    P, Y = pair()
    torch.testing.assert_close(MIPLoss()(P, Y), MIPLoss(axes="z")(P, Y))
    assert not torch.allclose(MIPLoss()(P, Y), MIPLoss(axes="multi")(P, Y))


def test_logits_are_not_taken_for_probabilities():
    _, Y = pair()
    logits = 20 - 40 * Y
    for loss in (FocalTverskyLoss(), MIPLoss(), SPOCKMIPLoss(activation="none")):
        with pytest.raises(ValueError, match=r"pred must hold probabilities in \[0, 1\], got values from -20 to 20.*sigmoid"):
            loss(logits, Y)
    assert SPOCKMIPLoss()(logits, Y) > 0.5
    assert MIPLoss(FocalTverskyLoss(sigmoid=True))(logits, Y) > 0


def test_an_empty_batch_is_said():
    P, Y = pair()
    for loss in (FocalTverskyLoss(), MIPLoss(), SPOCKMIPLoss()):
        with pytest.raises(ValueError, match="without a dimension of size 0"):
            loss(P[:0], Y[:0])
