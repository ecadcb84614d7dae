from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightroom.losses import ALDRKLLoss, CrammerSingerLoss, LDRKLLoss, aldr_kl, ldr_kl

NORMALIZATIONS = ["softplus-mean", "abs-mean", None]
normalizations = pytest.mark.parametrize("normalize", NORMALIZATIONS)


def draw(n: int = 16, k: int = 7, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, k, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(k, (n,), generator=generator)


def normalised(f: Tensor, normalize: str | None) -> Tensor:
    if normalize is None:
        return f
    s = F.softplus(f) if normalize == "softplus-mean" else f
    return s / s.abs().mean(1, keepdim=True)


def q_of(g: Tensor, y: Tensor, margin: float) -> Tensor:
    other = 1 - F.one_hot(y, g.shape[1]).to(g.dtype)
    return margin * other + g - g.gather(1, y[:, None])


def by_definition(f: Tensor, y: Tensor, lam: float | Tensor, margin: float, normalize: str | None) -> Tensor:
    q = q_of(normalised(f, normalize), y, margin)
    return lam * torch.log(torch.exp(q / (lam if isinstance(lam, float) else lam[:, None])).mean(1))


def gradient(loss: Tensor, f: Tensor) -> Tensor:
    return torch.autograd.grad(loss, f)[0]


# ---- LDR-KL ----


@normalizations
@pytest.mark.parametrize("lam", [0.5, 1.0, 10.0, 100.0, 1000.0])
def test_value_and_gradient_are_those_of_the_definition(lam, normalize):
    f, y = draw()
    f.requires_grad_()
    ours, theirs = ldr_kl(f, y, lam, 0.3, normalize, reduction="none"), by_definition(f, y, lam, 0.3, normalize)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours.sum(), f), gradient(theirs.sum(), f))


@normalizations
def test_second_derivatives_are_those_of_the_definition(normalize):
    f, y = draw(4, 3)
    f.requires_grad_()
    penalties = []
    for loss in (ldr_kl(f, y, 2.0, 0.3, normalize), by_definition(f, y, 2.0, 0.3, normalize).mean()):
        (slope,) = torch.autograd.grad(loss, f, create_graph=True)
        penalties.append(gradient(slope.square().sum(), f))
    torch.testing.assert_close(*penalties)


def test_is_the_worst_case_over_label_weights():
    # max_p sum_k p_k q_k - lam KL(p || uniform) is attained at softmax(q / lam), and no other weights do better.
    f, y = draw()
    q, lam = q_of(f, y, 0.1), 2.0

    def price(p: Tensor) -> Tensor:
        return (p * q).sum(1) - lam * (p * torch.log(p * q.shape[1])).sum(1)

    psi = ldr_kl(f, y, lam, 0.1, None, reduction="none")
    torch.testing.assert_close(psi, price((q / lam).softmax(1)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.rand(q.shape, generator=generator, dtype=q.dtype).log().neg()  # exponential: uniform on the simplex
        assert (price(other / other.sum(1, keepdim=True)) <= psi + 1e-12).all()


def test_lambda_one_is_cross_entropy():
    f, y = draw(dtype=torch.float32)
    f.requires_grad_()
    ours, theirs = ldr_kl(f, y, 1.0, 0.0, None), F.cross_entropy(f, y) - math.log(7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient(ours, f), gradient(theirs, f), rtol=0, atol=1e-6)


@normalizations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_limits_of_lambda(normalize, dtype):
    f, y = draw(dtype=dtype)
    q = q_of(normalised(f, normalize), y, 0.1)
    exact = 1e-5 if dtype == torch.float32 else 1e-12
    none = {"reduction": "none", "margin": 0.1, "normalize": normalize}
    torch.testing.assert_close(ldr_kl(f, y, 0.0, **none), q.amax(1), rtol=exact, atol=exact)
    torch.testing.assert_close(ldr_kl(f, y, math.inf, **none), q.mean(1), rtol=exact, atol=exact)
    assert (ldr_kl(f, y, 1e-3, **none) - q.amax(1)).abs().max() <= 1e-3 * math.log(7) + exact
    torch.testing.assert_close(ldr_kl(f, y, 1e6, **none), q.mean(1), rtol=0, atol=1e-4)
    for lam in (1e-300, 1e-40, 1e-16):
        torch.testing.assert_close(ldr_kl(f, y, lam, **none), q.amax(1), rtol=exact, atol=exact)
    for lam in (1e29, 1e31, 1e300):
        torch.testing.assert_close(ldr_kl(f, y, lam, **none), q.mean(1), rtol=exact, atol=exact)


def test_lambda_zero_without_normalization_is_crammer_singer():
    f, y = draw()
    torch.testing.assert_close(LDRKLLoss(0.0, 1.0, None)(f, y), CrammerSingerLoss(1.0)(f, y))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lams=st.lists(st.one_of(st.sampled_from([0.0, math.inf, 100.0, 101.0]), st.floats(1e-3, 1e4)), min_size=2, max_size=5),
    seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 10.0]), normalize=st.sampled_from(NORMALIZATIONS),
)  # fmt: skip
def test_decreases_in_lambda_between_maximum_and_mean(lams, seed, scale, normalize):
    f, y = draw(4, 5, seed, scale)
    q = q_of(normalised(f, normalize), y, 0.1)
    values = torch.stack([ldr_kl(f, y, lam, 0.1, normalize, reduction="none") for lam in sorted(lams)])
    assert (values.diff(dim=0) <= 1e-9).all()
    assert (values <= q.amax(1) + 1e-9).all()
    assert (values >= q.mean(1) - 1e-9).all()


@normalizations
def test_only_lambda_infinity_is_symmetric(normalize):
    f, _ = draw()
    n, k = f.shape
    over_labels = {
        lam: sum(ldr_kl(f, torch.full((n,), y), lam, 0.2, normalize, reduction="none") for y in range(k))
        for lam in (1.0, math.inf)
    }
    torch.testing.assert_close(over_labels[math.inf], torch.full((n,), 0.2 * (k - 1), dtype=f.dtype))
    assert over_labels[1.0].std() > 1e-2


@pytest.mark.parametrize("lam", [0.01, 1.0, 10.0, 99.0, 101.0])
def test_gradient_is_softmax_minus_label(lam):
    f, y = draw()
    f.requires_grad_()
    q = q_of(f, y, 0.1)
    wanted = (q / lam).softmax(1) - F.one_hot(y, 7)
    torch.testing.assert_close(gradient(ldr_kl(f, y, lam, 0.1, None, reduction="sum"), f), wanted)


def test_raw_loss_does_not_see_a_shift_and_abs_mean_no_scale():
    f, y = draw()
    for lam in (0.0, 1.0, 10.0, math.inf):
        torch.testing.assert_close(ldr_kl(f + 5.0, y, lam, 0.1, None), ldr_kl(f, y, lam, 0.1, None))
        for scale in (1e-3, 7.0, 1e3):
            torch.testing.assert_close(ldr_kl(scale * f, y, lam, 0.1, "abs-mean"), ldr_kl(f, y, lam, 0.1, "abs-mean"))


@normalizations
def test_normalization_keeps_the_largest_logit(normalize):
    f, _ = draw(64)
    best = torch.stack([ldr_kl(f, torch.full((64,), y), 10.0, 0.1, normalize, reduction="none") for y in range(7)]).argmin(0)
    assert torch.equal(best, f.argmax(1))


def test_zero_rows_of_abs_mean_are_finite_and_point_to_the_label():
    f, y = torch.zeros(3, 5, requires_grad=True), torch.tensor([0, 1, 4])
    value = ldr_kl(f, y, 10.0, 0.1, "abs-mean", reduction="sum")
    slope = gradient(value, f)
    assert value.isfinite()
    assert slope.isfinite().all()
    assert torch.equal(slope.argmin(1), y)


def test_float32_keeps_its_digits():
    f, y = draw(64, 1000, dtype=torch.float32)
    for lam in (0.1, 1.0, 10.0, 100.0, 1e3, 1e5):
        for normalize in NORMALIZATIONS:
            ours, exact = (ldr_kl(x, y, lam, 0.1, normalize, reduction="none") for x in (f, f.double()))
            torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=5e-5)


def test_plain_form_keeps_its_digits():
    # What torch.func sees is the form that can be differentiated again: here a sure one of many classes.
    f, y = torch.zeros(1, 5000), torch.tensor([3])
    f[0, 3] = 20.0
    value = torch.func.vmap(lambda x, t: ldr_kl(x[None], t[None], 1.0, 0.0, None))(f, y)
    torch.testing.assert_close(
        value.double(), F.cross_entropy(f.double(), y, reduction="none") - math.log(5000), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-6, 1.0])
def test_gradient_near_zero_logits_is_that_of_the_plain_form(scale):
    f, y = draw(8, 4)
    f = (scale * f).requires_grad_()
    value = ldr_kl(f, y, 10.0, 0.1, "abs-mean")
    (plain,) = torch.autograd.grad(value, f, create_graph=True)
    torch.testing.assert_close(gradient(value, f), plain)


def test_defaults():
    loss = LDRKLLoss()
    assert (loss.lam, loss.margin, loss.normalize, loss.reduction) == (10.0, 0.1, "softplus-mean", "mean")
    f, y = draw()
    torch.testing.assert_close(loss(f, y), ldr_kl(f, y))


def test_options_of_the_functional_form():
    f, y = draw()
    weight = torch.arange(1.0, 8.0)
    ours = ldr_kl(f, y, 3, 0, None, weight=weight, ignore_index=2, reduction="sum")
    torch.testing.assert_close(ours, LDRKLLoss(3, 0, None, "sum", weight, 2)(f, y))


# ---- ALDR-KL ----


def reference_step(f, y, lam, lam0, alpha, margin, normalize, margin_in_weights=False):
    """The four steps, written out."""
    k = f.shape[1]
    g = normalised(f, normalize)
    p = ((q_of(g, y, margin) if margin_in_weights else g) / lam[:, None]).softmax(1)
    p = (p + 1e-5) / (p + 1e-5).sum(1, keepdim=True)
    new = (lam0 - lam0 * (p * torch.log(k * p)).sum(1) / (alpha * math.log(k))).detach()
    psi = new * torch.log(torch.exp(q_of(g, y, margin) / new[:, None]).mean(1))
    return psi - alpha * math.log(k) / lam0 / 2 * (new - lam0) ** 2, new


@normalizations
@pytest.mark.parametrize("margin_in_weights", [False, True])
@pytest.mark.parametrize("lam0", [0.5, 10.0, 200.0])
def test_visits_are_those_of_the_algorithm(normalize, margin_in_weights, lam0):
    loss = ALDRKLLoss(40, lam0, 1.5, 0.3, normalize, margin_in_weights, reduction="none")
    table = loss.lam.double()
    generator = torch.Generator().manual_seed(0)
    for visit in range(4):
        f, y = draw(seed=visit)
        f.requires_grad_()
        index = torch.randperm(40, generator=generator)[:16]
        wanted, new = reference_step(f, y, table[index], lam0, 1.5, 0.3, normalize, margin_in_weights)
        table[index] = new
        ours = loss(f, y, index)
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient(ours.sum(), f), gradient(wanted.sum(), f), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(loss.lam.double(), table, rtol=1e-6, atol=0)
    assert (table != lam0).sum() > 16  # several batches have left their mark


def test_old_lambda_gives_the_weights_and_the_new_one_the_loss():
    f, y = draw(2, 4)
    lam = torch.tensor([0.5, 3.0], dtype=torch.float64)
    loss, new = aldr_kl(f, y, lam, 4.0, 2.0, 0.1, None, reduction="none")
    wanted, new_wanted = reference_step(f, y, lam, 4.0, 2.0, 0.1, None)
    torch.testing.assert_close(new, new_wanted)
    torch.testing.assert_close(loss, wanted)
    assert not new.requires_grad
    assert torch.equal(lam, torch.tensor([0.5, 3.0], dtype=torch.float64))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), alpha=st.floats(1.01, 10), lam0=st.floats(0.01, 50), scale=st.sampled_from([0.01, 1.0, 1e3]))
def test_lambda_stays_in_its_range(seed, alpha, lam0, scale):
    f, y = draw(8, 5, seed, scale)
    lam = torch.full((8,), lam0, dtype=f.dtype)
    for _ in range(3):
        _, lam = aldr_kl(f, y, lam, lam0, alpha, normalize=None)
        assert (lam >= lam0 * (1 - 1 / alpha) - 1e-9).all()
        assert (lam <= lam0 + 1e-9).all()


def test_sure_predictions_move_lambda_to_its_least_and_uniform_ones_not_at_all():
    y = torch.tensor([0, 1])
    f = torch.tensor([[1e4, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    loss = ALDRKLLoss(2, 10.0, 2.0, normalize=None)
    loss(f, y, torch.tensor([0, 1]))
    torch.testing.assert_close(loss.lam, torch.tensor([5.0, 10.0]), rtol=1e-3, atol=0)
    assert loss.lam[1] == 10.0


def test_no_rounding_takes_lambda_beyond_its_start():
    for k in range(2, 200):
        _, lam = aldr_kl(torch.full((1, k), 0.3), torch.tensor([0]), torch.tensor([1.0]), 1.0, 1.01)
        assert lam.item() <= 1.0


def test_many_visits_reach_a_fixed_point():
    f, y = draw(8, 5)
    loss = ALDRKLLoss(8, 2.0, 1.5, normalize=None)
    index = torch.arange(8)
    for _ in range(200):
        loss(f, y, index)
    settled = loss.lam.clone()
    loss(f, y, index)
    torch.testing.assert_close(loss.lam, settled, rtol=1e-6, atol=0)
    p = (f / settled[:, None]).softmax(1)
    kl = (p * torch.log(5 * p)).sum(1)
    torch.testing.assert_close(settled.double(), 2.0 * (1 - kl / (1.5 * math.log(5))), rtol=1e-3, atol=0)


def test_only_the_visited_samples_change_and_shuffling_does_not_matter():
    f, y = draw()
    ordered, shuffled = ALDRKLLoss(20, normalize="abs-mean"), ALDRKLLoss(20, normalize="abs-mean")
    index, order = torch.arange(4, 20), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ordered(f, y, index), shuffled(f[order], y[order], index[order]))
    torch.testing.assert_close(ordered.lam, shuffled.lam)
    assert (ordered.lam[:4] == 10.0).all()
    assert (ordered.lam[4:] < 10.0).all()


def test_the_last_of_two_equal_indices_is_kept():
    f, y = draw(3)
    loss = ALDRKLLoss(2, normalize=None)
    loss(f, y, torch.tensor([0, 1, 0]))
    alone = ALDRKLLoss(2, normalize=None)
    alone(f[1:], y[1:], torch.tensor([1, 0]))
    torch.testing.assert_close(loss.lam, alone.lam)


def test_eval_mode_is_ldr_kl_and_writes_nothing():
    f, y = draw()
    loss = ALDRKLLoss(16, 3.0, normalize="abs-mean")
    loss(f, y, torch.arange(16))
    before = loss.lam.clone()
    loss.eval()
    for index in (None, torch.arange(16)):
        torch.testing.assert_close(loss(f, y, index), LDRKLLoss(3.0, normalize="abs-mean")(f, y))
    assert torch.equal(loss.lam, before)


def test_table_is_saved_and_goes_on_from_there():
    f, y = draw()
    loss, twin = ALDRKLLoss(16, 1.0), ALDRKLLoss(16, 1.0)
    loss(f, y, torch.arange(16))
    assert set(loss.state_dict()) == {"lam"}
    twin.load_state_dict(loss.state_dict())
    torch.testing.assert_close(twin(f, y, torch.arange(16)), copy.deepcopy(loss)(f, y, torch.arange(16)), rtol=0, atol=0)


def test_positions_of_a_sample_share_a_lambda():
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(3, 4, 2, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (3, 2, 5), generator=generator)
    y[0, 0, :2] = -100
    y[2] = -100
    loss, lam = aldr_kl(f, y, torch.tensor([1.0, 2.0, 3.0]), 4.0, 2.0, normalize=None, reduction="none")
    for i in range(2):
        rows, labels = f[i].reshape(4, -1).T, y[i].flatten()
        kept = labels != -100
        _, each = aldr_kl(rows[kept], labels[kept], torch.full((int(kept.sum()),), i + 1.0), 4.0, 2.0, normalize=None)
        torch.testing.assert_close(lam[i], each.mean())
        psi = ldr_kl(rows[kept], labels[kept], float(lam[i]), 0.1, None, reduction="none")
        torch.testing.assert_close(loss[i].flatten()[kept], psi - math.log(4) / 4 * (lam[i] - 4.0) ** 2)
    assert lam[2] == 3.0  # nothing of it was seen
    assert (loss[y == -100] == 0).all()


# ---- arguments ----


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LDRKLLoss(-0.1), ValueError, "lam must be >= 0"),
        (lambda: LDRKLLoss(math.nan), ValueError, "lam must be"),
        (lambda: LDRKLLoss("10"), TypeError, "lam must be a real number, got str"),
        (lambda: LDRKLLoss(True), TypeError, "lam must be a real number, got bool"),
        (lambda: LDRKLLoss(margin=-1), ValueError, "margin must be >= 0"),
        (lambda: LDRKLLoss(margin=math.inf), ValueError, "margin must be"),
        (lambda: LDRKLLoss(normalize="softplus"), ValueError, "unknown normalize 'softplus': did you mean 'softplus-mean'"),
        (lambda: ALDRKLLoss(0), ValueError, "n_samples must be >= 1"),
        (lambda: ALDRKLLoss(2.5), ValueError, "n_samples must be an integer, got 2.5"),
        (lambda: ALDRKLLoss("3"), TypeError, "n_samples must be a real number"),
        (lambda: ALDRKLLoss(4, lam0=0.0), ValueError, "lam0 must be > 0"),
        (lambda: ALDRKLLoss(4, lam0=math.inf), ValueError, "lam0 must be > 0 and < inf"),
        (lambda: ALDRKLLoss(4, alpha=1.0), ValueError, "alpha must be > 1"),
        (lambda: ALDRKLLoss(4, margin=-0.1), ValueError, "margin must be >= 0"),
        (lambda: ALDRKLLoss(4, normalize="mean"), ValueError, "unknown normalize 'mean'"),
        (lambda: ldr_kl(*draw(), lam=-1.0), ValueError, "lam must be >= 0"),
        (lambda: aldr_kl(*draw(), torch.ones(16), alpha=0.5), ValueError, "alpha must be > 1"),
        (lambda: aldr_kl(*draw(), torch.ones(15)), ValueError, r"lam must have shape \(16,\), one for each sample, got \(15,\)"),
    ],
)
def test_hyper_parameters_out_of_range_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_index_is_checked():
    f, y = draw()
    loss, good = ALDRKLLoss(20), torch.arange(16)
    with pytest.raises(ValueError, match="index is missing"):
        loss(f, y)
    with pytest.raises(TypeError, match=r"index must be an int64 tensor, got torch.float32"):
        loss(f, y, good.float())
    with pytest.raises(TypeError, match="index must be an int64 tensor, got list"):
        loss(f, y, good.tolist())
    with pytest.raises(ValueError, match=r"index must have shape \(16,\), one for each sample, got \(15,\)"):
        loss(f, y, good[:-1])
    for wrong in (good + 5, good - 1):
        with pytest.raises(ValueError, match=r"index must lie in \[0, 20\)"):
            loss(f, y, wrong)
    assert (loss.lam == 10.0).all()
    assert ALDRKLLoss.needs_index


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_zeros_have_a_finite_gradient_in_every_precision(dtype):
    for loss in (LDRKLLoss(normalize="abs-mean"), ALDRKLLoss(2, normalize="abs-mean")):
        logits = torch.zeros(2, 5, dtype=dtype, requires_grad=True)
        index = (torch.arange(2),) if isinstance(loss, ALDRKLLoss) else ()
        loss(logits, torch.tensor([0, 1]), *index).backward()
        assert logits.grad.isfinite().all()
        assert logits.grad.abs().max() > 0
