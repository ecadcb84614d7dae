"""What every public loss keeps to, whatever it computes.

A new loss gets a row in ``CLASSIFICATION`` (logits and class indices, called like ``nn.CrossEntropyLoss``) or in ``SEGMENTATION``
(probabilities and masks of one shape).
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weightroom import losses

N, K = 6, 5
INDEXED = 8  # samples in the data set of a loss that asks for their indices

CLASSIFICATION: dict[str, Callable[..., nn.Module]] = {
    "ALDRKLLoss": lambda **kw: losses.ALDRKLLoss(INDEXED, **kw).eval(),
    "ALDRKLLoss, training": lambda **kw: losses.ALDRKLLoss(INDEXED, **kw),
    "ALDRKLLoss, training, as the code": lambda **kw: losses.ALDRKLLoss(
        INDEXED, normalize="abs-mean", margin_in_weights=True, **kw
    ),
    "CompSumLoss": losses.CompSumLoss,
    "CompSumLoss, tau=0": lambda **kw: losses.CompSumLoss(0.0, **kw),
    "CompSumLoss, tau=0.5, rho=0.5": lambda **kw: losses.CompSumLoss(0.5, 0.5, **kw),
    "CompSumLoss, tau=1.5": lambda **kw: losses.CompSumLoss(1.5, **kw),
    "CompSumLoss, tau=2.5": lambda **kw: losses.CompSumLoss(2.5, **kw),
    "CrammerSingerLoss": losses.CrammerSingerLoss,
    "FocalLoss": losses.FocalLoss,
    "GCELoss": losses.GCELoss,
    "JSLoss": losses.JSLoss,
    "LDRKLLoss": losses.LDRKLLoss,
    "LDRKLLoss, abs-mean": lambda **kw: losses.LDRKLLoss(normalize="abs-mean", **kw),
    "LDRKLLoss, raw": lambda **kw: losses.LDRKLLoss(normalize=None, **kw),
    "LDRKLLoss, raw, lam=101": lambda **kw: losses.LDRKLLoss(101.0, normalize=None, **kw),
    "LDRKLLoss, lam=0": lambda **kw: losses.LDRKLLoss(0.0, **kw),
    "LDRKLLoss, lam=1000": lambda **kw: losses.LDRKLLoss(1000.0, **kw),
    "LDRKLLoss, lam=inf": lambda **kw: losses.LDRKLLoss(float("inf"), **kw),
    "MAELoss": losses.MAELoss,
    "NCEAGCELoss": losses.NCEAGCELoss,
    "NCEAULLoss": losses.NCEAULLoss,
    "NCERCELoss": losses.NCERCELoss,
    "RLLLoss": losses.RLLLoss,
    "SCELoss": losses.SCELoss,
    "WestonWatkinsLoss": losses.WestonWatkinsLoss,
}

SEGMENTATION: dict[str, Callable[..., nn.Module]] = {
    "FocalTverskyLoss": lambda **kw: losses.FocalTverskyLoss(per_sample=True, **kw),
    "MIPLoss": losses.MIPLoss,
    "SPOCKMIPLoss": lambda **kw: losses.SPOCKMIPLoss(per_sample=True, **kw),
}

#: Losses of another kind -> why neither table fits; their own tests hold them to what they promise.
OTHERS: dict[str, str] = {
    "KLDROReduction": "reduces losses of samples, not logits",
    "NormalizedLogisticLoss": "one logit per sample, two classes, and a gradient that belongs to the batch: no reduction",
}

classification = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in CLASSIFICATION.items()])
segmentation = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in SEGMENTATION.items()])
differentiable = (
    pytest.mark.parametrize(  # with respect to everything, so not where lambda_i follows the logits without a gradient
        "make", [pytest.param(make, id=name) for name, make in CLASSIFICATION.items() if "training" not in name]
    )
)


def test_every_public_loss_has_a_row():
    public = {
        name
        for name in losses.__all__
        if isinstance(getattr(losses, name), type) and issubclass(getattr(losses, name), nn.Module)
    }
    assert public == {name.partition(",")[0] for name in (*CLASSIFICATION, *SEGMENTATION, *OTHERS)}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits (N, K, *shape) and labels (N, *shape) in which every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(N, K, *shape, generator=generator, dtype=torch.float64)
    labels = torch.randperm(N * max(1, torch.Size(shape).numel()), generator=generator).reshape(N, *shape) % K
    return logits.to(dtype), labels


def call(loss: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    if getattr(loss, "needs_index", False) and loss.training:
        n = labels.shape[0] if labels.ndim else None
        return loss(logits, labels, torch.arange(n, device=labels.device) if n is not None else torch.tensor(0))
    return loss(logits, labels)


def gradient(loss: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    call(loss, leaf, labels).sum().backward()
    return leaf.grad


# ---- logits and class indices ----


@classification
def test_reductions_agree(make):
    logits, labels = draw()
    each = call(make(reduction="none"), logits, labels)
    assert each.shape == labels.shape
    torch.testing.assert_close(call(make(reduction="sum"), logits, labels), each.sum())
    torch.testing.assert_close(call(make(), logits, labels), each.mean())


@classification
def test_weight_is_that_of_cross_entropy(make):
    logits, labels = draw(3)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0])
    each = call(make(reduction="none"), logits, labels)
    torch.testing.assert_close(call(make(reduction="none", weight=weight), logits, labels), each * weight[labels])
    torch.testing.assert_close(call(make(reduction="sum", weight=weight), logits, labels), (each * weight[labels]).sum())
    torch.testing.assert_close(call(make(weight=weight), logits, labels), (each * weight[labels]).sum() / weight[labels].sum())


@classification
@pytest.mark.parametrize("ignore", [-100, 2, 7])
def test_what_is_ignored_counts_nowhere(make, ignore):
    logits, labels = draw()
    labels = torch.where(labels == 2, ignore, labels)
    kept = labels != ignore
    assert 0 < kept.sum() < N
    each = call(make(reduction="none", ignore_index=ignore), logits, labels)
    assert (each[~kept] == 0).all()
    weight = torch.arange(1.0, K + 1)
    for options in ({}, {"weight": weight}):
        whole, part = make(ignore_index=ignore, **options), make(ignore_index=ignore, **options)
        torch.testing.assert_close(call(whole, logits, labels), call(part, logits[kept], labels[kept]))
    slope = gradient(make(ignore_index=ignore), logits, labels)
    assert (slope[~kept] == 0).all()
    assert (slope[kept] != 0).any()


@classification
def test_mean_of_nothing_is_that_of_cross_entropy(make):
    logits, labels = draw()
    assert call(make(), logits, torch.full_like(labels, -100)).isnan()
    assert call(make(), logits[:0], labels[:0]).isnan()
    assert call(make(reduction="sum"), logits[:0], labels[:0]) == 0
    assert call(make(reduction="none"), logits[:0], labels[:0]).shape == (0,)


@differentiable
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3)], ids=str)
def test_positions_are_samples(make, shape):
    logits, labels = draw(*shape)
    rows = logits.movedim(1, -1).reshape(-1, K)
    loss = make(reduction="none")
    torch.testing.assert_close(call(loss, logits, labels), call(loss, rows, labels.flatten()).reshape(labels.shape))
    torch.testing.assert_close(call(make(), logits, labels), call(make(), rows, labels.flatten()))
    slopes = gradient(make(), rows, labels.flatten()).reshape(N, *shape, K).movedim(-1, 1)
    torch.testing.assert_close(gradient(make(), logits, labels), slopes)
    strided = rows.reshape(N, *shape, K).movedim(-1, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(gradient(make(), strided, labels), slopes)


@classification
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3)], ids=str)
def test_volumes_have_finite_gradients(make, shape):
    logits, labels = draw(*shape)
    assert call(make(reduction="none"), logits, labels).shape == labels.shape
    assert gradient(make(), logits, labels).isfinite().all()


@classification
def test_one_sample_needs_no_batch(make):
    logits, labels = draw()
    for reduction, shape in (("none", ()), ("mean", ())):
        one = call(make(reduction=reduction), logits[0], labels[0])
        assert one.shape == shape
        torch.testing.assert_close(one, call(make(), logits[:1], labels[:1]))


@differentiable
@pytest.mark.parametrize(
    "options", [{}, {"weight": torch.arange(1.0, K + 1), "ignore_index": 2, "reduction": "none"}], ids=["plain", "all"]
)
def test_gradients_are_right(make, options):
    logits, labels = draw(2)
    loss = make(**options)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), leaf)
    assert torch.autograd.gradgradcheck(lambda x: loss(x, labels), leaf)


@classification
def test_gradient_can_be_taken_twice(make):
    logits, labels = draw()
    leaf = logits.requires_grad_()
    value = call(make(), leaf, labels)
    first = torch.autograd.grad(value, leaf, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(value, leaf, retain_graph=True)[0], first)
    (penalised,) = torch.autograd.grad(value, leaf, create_graph=True)
    torch.testing.assert_close(penalised, first)


@classification
def test_input_is_left_alone(make):
    logits, labels = draw()
    before = logits.clone(), labels.clone()
    gradient(make(ignore_index=0), logits, labels)
    call(make(), logits, labels)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


@classification
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_logits_stay_finite(make, dtype):
    signs = torch.tensor([[1, -1, -1, -1, -1], [-1, 1, 1, 1, 1], [1] * K, [-1] * K, [0] * K, [1, 0, 0, 0, -1]], dtype=dtype)
    labels = torch.tensor([0, 0, 1, 1, 2, 4])
    for size in (0.0, 1.0, 100.0, 1e4):
        logits = size * signs
        assert call(make(reduction="none"), logits, labels).isfinite().all()
        assert gradient(make(reduction="none"), logits, labels).isfinite().all()


@classification
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(make, dtype):
    logits, labels = draw(dtype=dtype)
    value = call(make(), logits, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, call(make(), logits.float(), labels), rtol=0, atol=0)
    slope = gradient(make(), logits, labels)
    assert slope.dtype == dtype
    torch.testing.assert_close(slope, gradient(make(), logits.float(), labels).to(dtype))
    assert call(make(), (100 * logits), labels).isfinite()


@classification
def test_autocast_changes_nothing(make):
    logits, labels = draw(dtype=torch.float32)
    wanted, slope = call(make(), logits, labels), gradient(make(), logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(call(make(), logits, labels), wanted)
        torch.testing.assert_close(gradient(make(), logits, labels), slope)
    half = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = call(make(), half, labels)
    torch.testing.assert_close(value, call(make(), half.float(), labels))


@classification
def test_survives_copying_and_saving(make):
    logits, labels = draw(dtype=torch.float32)
    loss = make(weight=torch.arange(1.0, K + 1), ignore_index=3, reduction="sum")
    call(loss, logits, labels)
    fresh = make(weight=torch.ones(K), ignore_index=3, reduction="sum")
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    twins = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), fresh]
    wanted = call(loss, logits, labels)
    for twin in twins:
        assert repr(twin) == repr(loss)
        torch.testing.assert_close(call(twin, logits, labels), wanted, rtol=0, atol=0)


@classification
def test_repr_tells_what_it_is(make):
    loss = make(reduction="sum", ignore_index=7)
    text = repr(loss)
    assert text.startswith(type(loss).__name__ + "(")
    assert all(f"{name}={getattr(loss, name)!r}" in text for name in loss.shown)
    assert "reduction='sum'" in text
    assert "ignore_index=7" in text


@classification
def test_runs_without_data_on_the_meta_device(make):
    logits, labels = (t.to("meta") for t in draw(2, dtype=torch.float32))
    loss = make(reduction="none", weight=torch.ones(K)).to("meta")
    assert call(loss, logits, labels).shape == labels.shape
    assert gradient(loss, logits, labels).shape == logits.shape


@differentiable
def test_gradients_of_single_samples_with_torch_func(make):
    logits, labels = draw()
    loss = make()
    each = torch.func.vmap(torch.func.grad(lambda x, y: loss(x[None], y[None])))(logits, labels)
    torch.testing.assert_close(each, gradient(make(reduction="none"), logits, labels))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(order=st.permutations(range(K)), seed=st.integers(0, 2**16))
def test_names_of_classes_do_not_matter(order, seed):
    logits, labels = draw(seed=seed)
    place = torch.tensor(order)
    renamed = place.argsort()[labels]
    for name, make in CLASSIFICATION.items():
        torch.testing.assert_close(call(make(), logits[:, place], renamed), call(make(), logits, labels), msg=name)


@classification
def test_wrong_arguments_are_named(make):
    logits, labels = draw()
    if not getattr(make(), "takes_probabilities", False):
        with pytest.raises(TypeError, match=r"target must hold class indices \(int64\), got torch.float64"):
            call(make(), logits, F.one_hot(labels, K).double())
    with pytest.raises(TypeError, match="target must hold class indices"):
        call(make(), logits, labels.int())
    with pytest.raises(TypeError, match=r"target must hold class indices .* got list"):
        make().eval()(logits, labels.tolist())
    with pytest.raises(TypeError, match="input must be a floating tensor"):
        call(make(), labels, labels)
    with pytest.raises(ValueError, match=r"target must have the shape .* got \(6, 5\) for an input of \(6, 5\)"):
        call(make(), logits, labels[:, None].expand(N, K))
    with pytest.raises(ValueError, match="target must have the shape"):
        call(make(), logits, labels[:-1])
    with pytest.raises(ValueError, match="target must have the shape"):
        call(make(), logits[0], labels)
    with pytest.raises(ValueError, match="input must have shape"):
        call(make(), logits[0, 0], labels[0])
    for wrong in (K, -1):
        with pytest.raises(ValueError, match=rf"target must lie in \[0, {K}\), got values from"):
            call(make(), logits, torch.full_like(labels, wrong))
    with pytest.raises(ValueError, match=r"at least 2 classes .* got 1"):
        call(make(), logits[:, :1], torch.zeros_like(labels))
    with pytest.raises(ValueError, match=r"weight must have shape \(5,\)"):
        call(make(weight=torch.ones(K + 1)), logits, labels)
    with pytest.raises(ValueError, match=r"weight must be a tensor of shape \(K,\), got list"):
        make(weight=[1.0] * K)
    with pytest.raises(ValueError, match=r"weight must be a tensor of shape \(K,\)"):
        make(weight=torch.ones(K, 1))
    with pytest.raises(ValueError, match="unknown reduction 'average'"):
        make(reduction="average")


# ---- probabilities and masks ----


def masks(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pred = torch.rand(3, 1, 4, 5, 6, generator=generator, dtype=torch.float64)
    return pred.to(dtype), (torch.rand(pred.shape, generator=generator) < 0.3).to(dtype)


@segmentation
def test_reductions_of_masks_agree(make):
    pred, target = masks()
    each = make(reduction="none")(pred, target)
    assert each.shape == pred.shape[:1]
    torch.testing.assert_close(make(reduction="sum")(pred, target), each.sum())
    torch.testing.assert_close(make(reduction="mean")(pred, target), each.mean())


@segmentation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_masks_are_finite(make, dtype):
    pred, target = masks(dtype)
    for given_pred in (pred, target, 1 - target, torch.zeros_like(pred), torch.ones_like(pred)):
        leaf = given_pred.detach().clone().requires_grad_()
        value = make()(leaf, target)
        value.backward()
        assert value.isfinite()
        assert leaf.grad.isfinite().all()
        assert leaf.grad.dtype == dtype


@segmentation
def test_losses_of_masks_survive_copying_and_saving(make):
    pred, target = masks()
    loss, fresh = make(reduction="sum"), make(reduction="sum")
    fresh.load_state_dict(loss.state_dict())
    wanted = loss(pred, target)
    assert repr(loss).startswith(type(loss).__name__ + "(")
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), fresh):
        assert repr(twin) == repr(loss)
        torch.testing.assert_close(twin(pred, target), wanted, rtol=0, atol=0)
