from __future__ import annotations

import pytest
import torch
from torch import nn

from weightroom.adversarial import DONE
from weightroom.papers import doubly_robust_at as paper
from weightroom.study import Scale, Trial


def test_methods_join_their_families():
    made = paper.PAPER.methods["DONE"].make(0.2, (-1.0, 2.0), r=0.7)
    assert isinstance(made, DONE)
    assert (made.eps, made.bounds, made.reduction.r) == (0.2, (-1.0, 2.0), 0.7)
    loss = paper.PAPER.also["loss"]["kl-dro"].make(None, r=1e6)
    logits, y = torch.randn(4, 3, 5), torch.randint(3, (4, 5))
    torch.testing.assert_close(loss(logits, y), nn.functional.cross_entropy(logits, y))


def test_the_data_are_split_and_thinned_as_said():
    kept, test = paper._split(3, 1.0)
    thin, same = paper._split(3, 10.0)
    assert (len(kept), len(test)) == (900, 897)
    assert torch.equal(test.tensors[0], same.tensors[0])
    before, after = (torch.bincount(part.tensors[1], minlength=10).double() for part in (kept, thin))
    torch.testing.assert_close(after / before, 10.0 ** (-torch.arange(10).double() / 9), atol=0.02, rtol=0)


def test_rivals_weigh_as_said():
    kept, _ = paper._split(0, 10.0)
    y = kept.tensors[1]
    weights = paper._by_class(kept).weigh(torch.zeros(len(y), 10), y)
    shares = torch.stack([weights[y == k].sum() for k in range(10)])
    torch.testing.assert_close(shares, torch.full((10,), len(y) / 10))
    logits = torch.tensor([[9.0, 0.0], [0.0, 0.0], [0.0, 9.0]])
    w = paper._by_margin(kept).weigh(logits, torch.zeros(3, dtype=torch.long))
    assert w[0] < w[1] < w[2]
    assert float(w.mean()) == pytest.approx(1.0)
    torch.manual_seed(0)
    logits, y = torch.randn(8, 10), torch.arange(8)
    w = paper._shuffled(kept).weigh(logits, y)
    theirs = 8 * torch.softmax(nn.functional.cross_entropy(logits, y, reduction="none"), 0)
    torch.testing.assert_close(w.sort().values, theirs.sort().values)
    assert not torch.allclose(w, theirs)


@pytest.mark.parametrize("arm", [*paper._ARMS, paper._LIMITED])
def test_a_trial_runs(arm):
    study = paper.study(Scale.SMOKE)[arm == paper._LIMITED]
    found = study.arms[arm].run(Trial(0, Scale.SMOKE, setting=10.0))
    assert set(found) == set(study.metrics)
    assert found["robust"] <= found["clean"]
    assert found["tail"] <= found["robust"]
