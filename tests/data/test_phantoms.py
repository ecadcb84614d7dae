"""Phantoms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightroom.data.phantoms import vessels
from weightroom.errors import UsageError
from weightroom.metrics.segmentation import components


def test_shapes_and_types():
    images, labels = vessels(2, size=20)
    for volumes in (images, labels):
        assert volumes.shape == (2, 1, 20, 20, 20)
        assert volumes.dtype == torch.float32
    assert labels.unique().tolist() == [0, 1]
    assert vessels(0)[0].shape == (0, 1, 32, 32, 32)


def test_a_volume_is_decided_by_seed_and_index_alone():
    images, labels = vessels(4, size=16, seed=3)
    torch.manual_seed(11)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    again, again_labels = vessels(2, size=16, seed=3)
    assert torch.equal(again, images[:2])
    assert torch.equal(again_labels, labels[:2])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(vessels(1, size=16, seed=4)[0], images[:1])


@given(seed=st.integers(0, 10_000), radius=st.sampled_from([0.0, 0.6, 1.0, 1.6]))
@settings(max_examples=25, deadline=None)
def test_a_straight_tube_is_one_piece_however_thin(seed, radius):
    assert components(vessels(1, size=16, seed=seed, tubes=1, radii=(radius,), bend=0)[1]).item() == 1


def test_brightness_without_noise_is_amplitude_or_its_share_in_a_drop_out():
    clean, labels = vessels(3, tubes=1, amplitude=(0.8, 0.8), noise=0, blur=0)
    values = clean[labels > 0]
    assert torch.allclose(values.unique(), torch.tensor([0.8 * 0.35, 0.8]))
    assert not clean[labels == 0].any()
    whole, _ = vessels(3, tubes=1, amplitude=(0.8, 0.8), noise=0, blur=0, dropouts=0)
    assert whole[labels > 0].unique().tolist() == [pytest.approx(0.8)]


def test_a_drop_out_is_as_long_as_said():
    # A straight line of radius 0: its dim voxels are rounded points at most 8 apart, fewer where the volume ends.
    lengths = []
    for seed in range(20):
        clean, _ = vessels(1, size=64, seed=seed, tubes=1, radii=(0.0,), amplitude=(1, 1), noise=0, blur=0, bend=0, dropouts=1)
        dim = (clean[0, 0] > 0) & (clean[0, 0] < 1)
        where = dim.nonzero().float()
        lengths.append(float((where.amax(0) - where.amin(0)).norm()))
        assert lengths[-1] <= 8 + 3**0.5
    assert np.median(lengths) > 6


def test_thickness_amplitude_and_noise_do_what_they_say():
    volumes = {r: vessels(4, radii=(r,))[1].sum().item() for r in (0.6, 1.0, 1.6)}
    assert volumes[0.6] < volumes[1.0] < volumes[1.6]
    noisy, labels = vessels(4)
    assert noisy[labels == 0].std().item() == pytest.approx(0.35, rel=0.1)
    clean, _ = vessels(4, noise=0, blur=0)
    assert clean[labels > 0].min() >= 0.5 * 0.35
    assert clean.max() <= 1
    torch.testing.assert_close(vessels(4, blur=0)[0] - clean, noisy - vessels(4, noise=0)[0])


def test_more_tubes_are_more_foreground_and_none_is_none():
    few, many = (vessels(3, tubes=t)[1].sum() for t in (1, 8))
    assert few < many
    assert not vessels(1, tubes=0)[1].any()


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"n": -1}, "n must"),
        ({"size": 0}, "size"),
        ({"seed": -1}, "seed"),
        ({"tubes": -1}, "tubes"),
        ({"dropouts": -1}, "dropouts"),
        ({"dropout_length": -1}, "dropout_length"),
        ({"bend": float("inf")}, "bend"),
        ({"blur": -1}, "blur"),
        ({"noise": -1}, "noise"),
        ({"radii": ()}, "radii"),
        ({"radii": (-1,)}, "radii"),
        ({"amplitude": (1, 0.5)}, "amplitude"),
    ],
)
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(UsageError, match=name):
        vessels(**{"n": 1, **arguments})
