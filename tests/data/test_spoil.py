import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from weightroom import data
from weightroom.errors import TaskError, UsageError


def labelled(n=3000, classes=10):
    return TensorDataset(torch.arange(n).float()[:, None], torch.arange(n) % classes)


class Slow(Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, i):
        return torch.tensor([float(i)]), i % 3


def test_gather_is_indexing():
    indices = torch.tensor([3, 1, 7])
    for source in (labelled(), Subset(labelled(), range(20)), Slow()):
        x, y = data.gather(source, indices)
        assert x.flatten().tolist() == [3, 1, 7]
        assert y.tolist() == [source[i][1] for i in (3, 1, 7)]


def test_split_is_a_partition_and_repeatable():
    parts = data.split(labelled(101), (0.6, 0.1, 0.3), seed=4)
    assert [len(p) for p in parts] == [61, 10, 30]
    values = torch.cat([p[:][0] for p in parts]).flatten()
    assert sorted(values.tolist()) == list(range(101))
    assert torch.equal(data.split(labelled(101), (0.6, 0.1, 0.3), seed=4)[1][:][0], parts[1][:][0])


def test_no_part_is_empty():
    assert [len(p) for p in data.split(labelled(3), (0.98, 0.01, 0.01))] == [1, 1, 1]
    with pytest.raises(UsageError, match="2 samples cannot be split into 3 parts"):
        data.split(labelled(2), (0.4, 0.3, 0.3))
    with pytest.raises(UsageError, match="sum to 1"):
        data.split(labelled(20), (0.4, 0.3))


def test_uniform_noise_hits_at_the_rate_and_may_draw_the_true_class():
    noisy = data.noisy_labels(labelled(), 0.5, seed=1)
    changed = (data.targets(noisy) != data.targets(labelled())).float().mean()
    assert changed == pytest.approx(0.45, abs=0.03)
    assert noisy[3][0] == 3


def test_next_noise_takes_the_next_class():
    noisy = data.targets(data.noisy_labels(labelled(), 0.4, kind="next"))
    clean = data.targets(labelled())
    moved = noisy != clean
    assert moved.float().mean() == pytest.approx(0.4, abs=0.03)
    assert torch.equal(noisy[moved], (clean[moved] + 1) % 10)


def test_imbalance_is_exponential():
    counts = torch.bincount(data.targets(data.imbalance(labelled(), 100.0)), minlength=10)
    assert counts[0] == 300
    assert counts[9] == 3
    assert (counts.diff() < 0).all()


def test_take():
    some = data.take(labelled(), 7, seed=2)
    assert len(some) == 7
    with pytest.raises(UsageError, match="between 1 and the 3000"):
        data.take(labelled(), 4000)


def test_difficulties_need_labels():
    with pytest.raises(TaskError, match="one integer label per sample"):
        data.noisy_labels(TensorDataset(torch.ones(4, 1), torch.ones(4, 1)), 0.1)
    assert data.targets(Slow()).tolist() == [i % 3 for i in range(30)]
    with pytest.raises(UsageError, match=r"label_noise must be in \[0, 1\], got 1.5"):
        data.noisy_labels(labelled(), 1.5)
    with pytest.raises(UsageError, match="imbalance must be >= 1"):
        data.imbalance(labelled(), 0.5)
