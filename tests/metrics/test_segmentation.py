"""Metrics of segmentations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightroom.metrics.segmentation import cl_dice, component_difference, components, dice, mip_dice, precision, recall, skeleton

OVERLAPS = [dice, precision, recall, mip_dice, cl_dice]
METRICS = [*OVERLAPS, component_difference]


def masks(seed=0, shape=(2, 3, 5, 6, 7), density=0.3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, *shape, generator=generator) < density


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_dice_precision_and_recall_as_sets(seed):
    P, Y = masks(seed)
    for b in range(2):
        for c in range(3):
            p, y = ({tuple(v) for v in m[b, c].nonzero().tolist()} for m in (P, Y))
            assert dice(P, Y)[b, c].item() == pytest.approx(2 * len(p & y) / (len(p) + len(y)))
            assert precision(P, Y)[b, c].item() == pytest.approx(len(p & y) / len(p))
            assert recall(P, Y)[b, c].item() == pytest.approx(len(p & y) / len(y))


def test_projections_are_compared_axis_by_axis():
    P, Y = masks(shape=(2, 1, 5, 6, 7), density=0.1)
    apart = torch.stack([dice(P.any(axis), Y.any(axis)) for axis in (2, 3, 4)])
    torch.testing.assert_close(mip_dice(P, Y), apart.mean(0))
    torch.testing.assert_close(mip_dice(P, Y, axes=(2, 0)), apart[[0, 2]].mean(0))


def test_a_gap_hidden_behind_a_voxel_does_not_count_in_a_projection():
    Y = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    Y[0, 0, 1, 1, :] = True
    P = Y.clone()
    P[0, 0, 1, 1, 2] = False
    assert mip_dice(P, Y, axes=(2,)) == 1
    assert mip_dice(P, Y, axes=(0,)).item() == pytest.approx(2 * 3 / 7)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_one_value_for_each_sample_and_channel(metric):
    P, Y = masks()
    value = metric(P, Y)
    assert value.shape == (2, 3)
    assert value.dtype == torch.float64
    alone = torch.tensor([[metric(P[b : b + 1, c : c + 1], Y[b : b + 1, c : c + 1]).item() for c in range(3)] for b in range(2)])
    torch.testing.assert_close(value, alone.double())


@pytest.mark.parametrize("metric", METRICS)
def test_agreement_is_perfect(metric):
    _, Y = masks()
    assert (metric(Y, Y) == (0 if metric is component_difference else 1)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_numbers_serve_as_masks(metric):
    P, Y = masks()
    for dtype in (torch.float32, torch.uint8, torch.int64):
        assert torch.equal(metric(P.to(dtype), Y.to(dtype)), metric(P, Y))


# Empty masks

EMPTY, SOME = torch.zeros(1, 1, 3, 3, 3, dtype=torch.bool), torch.zeros(1, 1, 3, 3, 3, dtype=torch.bool)
SOME[..., 1] = True


@pytest.mark.parametrize("metric", OVERLAPS)
@pytest.mark.parametrize("empty", [0.0, 0.25, 1.0])
def test_two_empty_masks_get_the_value_asked_for(metric, empty):
    assert metric(EMPTY, EMPTY, empty=empty).item() == empty
    assert metric(EMPTY, EMPTY).item() == 1
    assert metric(EMPTY, EMPTY, empty=math.nan).isnan()


@pytest.mark.parametrize("metric, pred, target", [(precision, SOME, EMPTY), (recall, EMPTY, SOME)])
def test_one_empty_mask_is_defined_where_the_denominator_is_not_empty(metric, pred, target):
    assert metric(pred, target, empty=math.nan).item() == 0
    assert metric(target, pred, empty=0.5).item() == 0.5


@pytest.mark.parametrize("metric", [dice, mip_dice, cl_dice])
def test_symmetric_overlaps_are_zero_where_one_mask_is_empty(metric):
    assert metric(SOME, EMPTY, empty=math.nan).item() == 0
    assert metric(EMPTY, SOME, empty=math.nan).item() == 0


# Centre lines


def test_cl_dice_of_a_thick_tube_forgives_its_width_but_not_a_gap():
    Y = torch.zeros(1, 1, 9, 9, 16)
    Y[0, 0, 3:6, 3:6] = 1
    thin, gap = torch.zeros_like(Y), Y.clone()
    thin[0, 0, 4, 4] = 1
    gap[..., 6:10] = 0
    assert cl_dice(thin, Y).item() == 1
    assert dice(thin, Y).item() == pytest.approx(2 / 10)
    assert cl_dice(gap, Y).item() < 0.95
    # All of the gapped tube lies inside: only the share of Y's centre line is lost.
    line = skeleton(Y)
    sens = (line & (gap > 0)).sum().item() / line.sum().item()
    assert cl_dice(gap, Y).item() == pytest.approx(2 * sens / (1 + sens))


def test_the_skeleton_of_a_bar_is_its_middle():
    bar = torch.zeros(1, 1, 7, 12)
    bar[0, 0, 2:5, :] = 1
    assert torch.equal(skeleton(bar)[0, 0].nonzero().unique(dim=0), torch.tensor([[3, j] for j in range(12)]))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_skeleton_of_a_plate_three_thick_is_its_middle(axis):
    plate = torch.zeros(1, 1, 7, 7, 7).movedim(axis + 2, -1)
    plate[..., 2:5] = 1
    middle = torch.zeros_like(plate, dtype=torch.bool)
    middle[..., 3] = True
    assert torch.equal(skeleton(plate.movedim(-1, axis + 2)), middle.movedim(-1, axis + 2))


@given(seed=st.integers(0, 2**31), density=st.floats(0.05, 0.95), flat=st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_skeleton_lies_inside_and_is_empty_only_where_the_mask_is(seed, density, flat):
    mask, _ = masks(seed, (2, 2, 6, 6) if flat else (2, 2, 5, 5, 5), density)
    mask[0, 0] = True  # nothing to erode
    line = skeleton(mask)
    assert not (line & ~mask).any()
    assert torch.equal(line.flatten(2).any(-1), mask.flatten(2).any(-1))
    assert torch.equal(line[0, 0], mask[0, 0])


# Components


def test_diagonal_neighbours_touch():
    eye = torch.eye(4)[None, None]
    assert components(eye).item() == 1
    space = torch.zeros(1, 1, 4, 4, 4)
    space[0, 0, range(4), range(4), range(4)] = 1
    assert components(space).item() == 1


def test_components_are_counted_and_compared_either_way():
    one, three = torch.zeros(2, 1, 1, 7, 7)
    one[..., 1, :] = 1
    three[..., ::3, :] = 1
    assert components(torch.cat((one, three))).tolist() == [[1], [3]]
    assert component_difference(one, three).item() == 2
    assert component_difference(three, one).item() == 2
    assert component_difference(three, three.flip(-1)).item() == 0
    assert components(torch.zeros(1, 1, 3, 3)).item() == 0


# Errors


@pytest.mark.parametrize("metric", METRICS)
def test_wrong_masks_are_refused(metric):
    P, Y = masks()
    with pytest.raises(ValueError, match="same shape"):
        metric(P, Y[:1])
    with pytest.raises(ValueError, match="threshold it first"):
        metric(P.float() * 0.7, Y)
    with pytest.raises(ValueError, match="target must be a mask"):
        metric(P, Y.long() * 2)
    with pytest.raises(ValueError, match=r"\(B, C, \*spatial\)"):
        metric(P[0, 0, 0], Y[0, 0, 0]) if metric not in (mip_dice,) else dice(P[0, 0, 0, 0], Y[0, 0, 0, 0])


def test_wrong_policies_and_axes():
    P, Y = masks()
    for metric in OVERLAPS:
        with pytest.raises(ValueError, match="empty must be"):
            metric(P, Y, empty=2.0)
    for axes in ((3,), (-1,), ()):
        with pytest.raises(ValueError, match="axes"):
            mip_dice(P, Y, axes=axes)
    with pytest.raises(ValueError, match="axes"):
        mip_dice(P[0], Y[0, :, :, :, :1].expand_as(P[0]), axes=(2,))
    with pytest.raises(ValueError, match="2 or 3 spatial dimensions"):
        skeleton(P[..., 0, 0])
