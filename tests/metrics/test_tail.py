from __future__ import annotations

import pytest
import torch

from weightroom.metrics import tail_robust_accuracy


def test_the_worst_classes_count_alike():
    # Class 0: 1 of 4 right, class 1: 1 of 2, class 2: 3 of 3, class 7: 0 of 1.
    y = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 7])
    correct = torch.tensor([1, 0, 0, 0, 1, 0, 1, 1, 1, 0]).bool()
    assert tail_robust_accuracy(correct, y, 0.25) == 0.0
    assert tail_robust_accuracy(correct, y, 0.3) == pytest.approx(0.125)  # ceil(1.2) = 2 classes
    assert tail_robust_accuracy(correct, y, 0.75) == pytest.approx(0.25)
    assert tail_robust_accuracy(correct.long(), y, 1.0) == pytest.approx(1.75 / 4)
    shuffle = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert tail_robust_accuracy(correct[shuffle], y[shuffle], 0.3) == pytest.approx(0.125)


def test_cross_fitting_removes_the_pessimism_of_choosing():
    # Twenty classes, all of true accuracy 0.7: the three worst of a sample look worse than that; cross-fitted they do not.
    y = torch.arange(20).repeat_interleave(20)
    plain, fitted = [], []
    for seed in range(200):
        correct = torch.rand(len(y), generator=torch.Generator().manual_seed(seed)) < 0.7
        plain.append(tail_robust_accuracy(correct, y, 0.15))
        fitted.append(tail_robust_accuracy(correct, y, 0.15, cross_fitted=True, seed=seed))
    assert sum(plain) / 200 < 0.6
    assert abs(sum(fitted) / 200 - 0.7) < 0.02


def test_cross_fitting_finds_classes_that_are_worse():
    y = torch.arange(10).repeat_interleave(40)
    correct = torch.ones(400, dtype=torch.bool)
    for k, right in ((2, 4), (5, 8), (9, 12)):
        correct[y == k] = torch.arange(40) % 40 < right
    assert tail_robust_accuracy(correct, y, 0.3, cross_fitted=True) == pytest.approx(0.2)
    assert tail_robust_accuracy(correct, y, 0.3, cross_fitted=True) == tail_robust_accuracy(correct, y, 0.3, cross_fitted=True)


def test_a_class_of_one_sample_takes_no_part_in_cross_fitting():
    y = torch.tensor([0, 1, 1, 2, 2])
    correct = torch.tensor([0, 1, 1, 1, 1]).bool()
    assert tail_robust_accuracy(correct, y, 0.3) == 0.0
    assert tail_robust_accuracy(correct, y, 0.3, cross_fitted=True) == 1.0


def test_what_is_wrong_is_named():
    y = torch.tensor([0, 1])
    for correct, labels in ((torch.ones(3), y), (torch.ones(2, 1), y), (torch.ones(0), torch.ones(0))):
        with pytest.raises(ValueError, match="correct and y must both have shape"):
            tail_robust_accuracy(correct, labels)
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="fraction must be"):
            tail_robust_accuracy(torch.ones(2), y, fraction)
    with pytest.raises(ValueError, match="at least two samples"):
        tail_robust_accuracy(torch.ones(2), y, cross_fitted=True)


def test_shares_are_rounded_up_but_not_for_the_last_bit():
    y = torch.arange(100).repeat_interleave(2)
    correct = (y >= 7).numpy()  # 0.07 * 100 is 7.000000000000001
    assert tail_robust_accuracy(correct, y.numpy(), 0.07) == 0.0
