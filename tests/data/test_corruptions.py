"""Corruptions of images and tables: what each does, units, seeds."""

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.utils.data import Subset, TensorDataset

from weightroom.data import corrupt, corrupted, corruptions
from weightroom.errors import UsageError

KINDS = [("image", k) for k in ("noise", "blur", "contrast", "brightness", "fog")] + [("table", k) for k in ("noise", "dropout")]


def inputs(what, n=50):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 2, 8, 6, generator=g) if what == "image" else torch.randn(n, 5, generator=g)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("what, kind", KINDS)
def test_seeded_and_pure(what, kind):
    x = inputs(what)
    before, state = x.clone(), torch.get_rng_state()
    y = corrupt(x, kind, generator=gen())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert not torch.equal(y, x)
    assert torch.equal(y, corrupt(x, kind, generator=gen()))
    assert corrupt(x.double(), kind, generator=gen()).dtype == torch.float64
    random = kind in ("noise", "dropout")
    assert torch.equal(y, corrupt(x, kind, generator=gen(1))) != random


@pytest.mark.parametrize("what, kind", KINDS)
def test_units(what, kind):
    x = inputs(what).double()
    offset, scale = (-3.0, 2.0) if what == "image" else (torch.arange(5.0), torch.arange(1.0, 6.0))
    y = corrupt(x, kind, generator=gen())
    torch.testing.assert_close(corrupt(x * scale + offset, kind, generator=gen(), offset=offset, scale=scale), y * scale + offset)


def test_images():
    x = inputs("image").double()
    noise = corrupt(torch.full((200, 1, 8, 8), 0.5), "noise", generator=gen())
    assert (noise.min(), noise.max()) == (0, 1)
    assert (noise == 1).double().mean() == pytest.approx(0.1587, abs=0.01)  # 0.5 is one standard deviation away
    contrast = corrupt(x, "contrast")
    torch.testing.assert_close(contrast.mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(contrast.std((2, 3)), 0.2 * x.std((2, 3)))
    assert torch.equal(corrupt(x, "brightness"), (x + 0.5).clamp(max=1))
    fog = corrupt(x, "fog")
    torch.testing.assert_close(fog[:, :, 0], 0.4 * x[:, :, 0])
    torch.testing.assert_close(fog[:, :, -1], 0.4 * x[:, :, -1] + 0.6)
    blur = gaussian_filter(x.numpy(), (0, 0, 1, 1), mode="nearest", radius=3)
    torch.testing.assert_close(corrupt(x, "blur"), torch.from_numpy(blur), rtol=1e-5, atol=1e-6)


def test_tables():
    x = inputs("table", 4000)
    added = corrupt(x, "noise", generator=gen()) - x
    assert added.std() == pytest.approx(1, abs=0.02)
    dropped = corrupt(x, "dropout", generator=gen())
    gone = dropped == 0
    assert gone.double().mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(dropped[~gone], x[~gone])


def test_data_sets():
    x, y = inputs("image", 1500), torch.arange(1500)
    data = TensorDataset(x, y)
    whole = corrupted(data, "noise", seed=3)
    assert torch.equal(whole.tensors[1], y)
    assert torch.equal(whole.tensors[0], corrupted(data, "noise", seed=3).tensors[0])
    assert not torch.equal(whole.tensors[0][:400], whole.tensors[0][1024:1424])
    assert not torch.equal(whole.tensors[0], corrupted(data, "noise", seed=4).tensors[0])
    part = corrupted(Subset(data, [5, 7]), "brightness")
    assert torch.equal(part.tensors[0], corrupt(x[[5, 7]], "brightness"))
    listed = corrupted([(x[0], 1), (x[1], 2)], "contrast")
    assert listed.tensors[1].tolist() == [1, 2]


def test_errors():
    assert corruptions(inputs("image")) == ("noise", "blur", "contrast", "brightness", "fog")
    assert corruptions(inputs("table")) == ("noise", "dropout")
    with pytest.raises(UsageError, match="unknown corruption 'fog'"):
        corrupt(inputs("table"), "fog")
    for bad in (torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(UsageError, match=r"corruptions need images .* got torch\."):
            corruptions(bad)
