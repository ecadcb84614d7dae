"""What every public loss of the room keeps, whatever its method.

A new loss needs an entry in ``CASES``. A case makes the loss with a generator that decides everything random in it, and says
how to evaluate it in a rotated frame, for losses whose directions must turn with the points; ``exact`` are options that switch
off what changes the gradient on purpose.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from weightroom import transport
from weightroom.transport.base import sample_directions


@dataclass(frozen=True)
class Case:
    make: Callable[..., nn.Module]
    framed: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    exact: dict[str, object] = field(default_factory=dict)

    def loss(self, seed: int = 0, **options: object) -> nn.Module:
        return self.make(generator=torch.Generator().manual_seed(seed), **options)


def _sliced(loss: nn.Module, x: Tensor, y: Tensor, frame: Tensor) -> Tensor:
    loss.pilot = 0  # its directions cannot be given
    theta = sample_directions(7, x.shape[-1], generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    return loss(x @ frame.mT, y @ frame.mT, projections=theta @ frame.mT)


CASES = {
    f"SlicedWassersteinLoss-{cv}-{coefficient}": Case(
        partial(transport.SlicedWassersteinLoss, control_variate=cv, coefficient=coefficient, **more),
        _sliced,
        exact={"detach_coefficient": False},
    )
    for cv, coefficient, more in (
        (None, "paper", {}),
        ("lower", "paper", {}),
        ("lower", "regression", {"p": 1.5}),
        ("upper", "paper", {"pilot": 4}),
        ("upper", "regression", {"detach_coefficient": True}),
    )
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def points(*shape: int, seed: int = 0, shift: float = 0.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).add(shift).to(dtype)


def test_every_public_loss_has_a_case():
    losses = {name for name in transport.__all__ if isinstance(getattr(transport, name), type)}
    assert losses == {name.partition("-")[0] for name in CASES}
    assert all(issubclass(getattr(transport, name), nn.Module) for name in losses)


@cases
@pytest.mark.parametrize("m", [8, 5])
def test_a_batch_is_the_single_sets(case: Case, m: int):
    x, y = points(3, 8, 4), points(3, m, 4, seed=1, shift=1.0)
    single = torch.stack([case.loss()(x[b], y[b]) for b in range(3)])
    assert single.shape == (3,)
    assert single[0] != single[1]
    torch.testing.assert_close(case.loss(reduction="none")(x, y), single)
    torch.testing.assert_close(case.loss(reduction="mean")(x, y), single.mean())
    torch.testing.assert_close(case.loss(reduction="sum")(x, y), single.sum())
    shared = torch.stack([case.loss()(x[b], y[0]) for b in range(3)])
    torch.testing.assert_close(case.loss(reduction="none")(x, y[0]), shared)


@cases
@pytest.mark.parametrize("shape", [((1, 1), (1, 1)), ((5, 1), (3, 1)), ((1, 3), (6, 3)), ((2, 1, 2), (2, 4, 2))])
def test_small_shapes_give_a_finite_scalar(case: Case, shape: tuple[tuple[int, ...], tuple[int, ...]]):
    x = points(*shape[0]).requires_grad_()
    value = case.loss()(x, points(*shape[1], seed=1, shift=1.0))
    value.backward()
    assert value.shape == ()
    assert value.isfinite()
    assert x.grad.isfinite().all()


@cases
@pytest.mark.parametrize("m", [6, 4])
def test_the_gradient_is_that_of_the_value(case: Case, m: int):
    x, y = points(6, 3).requires_grad_(), points(m, 3, seed=1, shift=2.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: case.loss(**case.exact)(x, y), (x, y))


@cases
def test_invariant_to_the_order_of_the_points_and_to_where_they_are(case: Case):
    x, y = points(9, 3), points(7, 3, seed=1, shift=1.0)
    value = case.loss()(x, y)
    torch.testing.assert_close(case.loss()(x.flip(0), y), value)
    torch.testing.assert_close(case.loss()(x, y.roll(3, 0)), value)
    torch.testing.assert_close(case.loss()(x + 5.0, y + 5.0), value)
    assert not torch.isclose(case.loss()(x + 5.0, y), value)


@cases
def test_invariant_to_a_common_rotation(case: Case):
    x, y = points(9, 3), points(7, 3, seed=1, shift=1.0)
    frame = torch.linalg.qr(points(3, 3, seed=2)).Q
    torch.testing.assert_close(case.framed(case.loss(), x, y, frame), case.framed(case.loss(), x, y, torch.eye(3).double()))


@cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_points_are_computed_in_single(case: Case, dtype: torch.dtype):
    x, y = points(9, 3, dtype=dtype).requires_grad_(), points(9, 3, seed=1, shift=1.0, dtype=dtype)
    value = case.loss()(x, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, case.loss()(x.float(), y.float()))
    value.backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


@cases
def test_autocast_does_not_reach_inside(case: Case):
    x, y = points(9, 3, dtype=torch.float32), points(9, 3, seed=1, shift=1.0, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.loss()(x, y), case.loss()(x, y))
        inside = case.loss()(x, y)
    assert torch.equal(inside, case.loss()(x, y))


@cases
def test_the_generator_decides(case: Case):
    x, y = points(9, 3), points(9, 3, seed=1, shift=1.0)
    loss = case.loss(seed=3)
    first, second = loss(x, y), loss(x, y)
    torch.manual_seed(17)
    again = case.loss(seed=3)
    assert torch.equal(again(x, y), first)
    assert torch.equal(again(x, y), second)
    assert first != second
    assert case.loss(seed=4)(x, y) != first


@cases
@pytest.mark.parametrize("clone", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_copies_go_on_where_the_original_is(case: Case, clone: Callable[[nn.Module], nn.Module]):
    x, y = points(9, 3), points(9, 3, seed=1, shift=1.0)
    loss = case.loss()
    loss(x, y)
    twin = clone(loss)
    assert repr(twin) == repr(loss)
    assert torch.equal(twin(x, y), loss(x, y))


@cases
def test_inputs_are_left_alone(case: Case):
    x, y = points(9, 3), points(9, 3, seed=1)
    kept = x.clone(), y.clone()
    case.loss()(x, y)
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])


@cases
def test_a_step_never_asks_the_device(case: Case):
    # A meta tensor holds no values: any branch on one, any .item(), raises.
    x, y = torch.empty(4, 9, 3, device="meta", requires_grad=True), torch.empty(4, 7, 3, device="meta")
    loss = case.make()
    value = loss(x, y)
    value.backward()
    assert value.shape == ()
    assert value.device.type == "meta"
    assert x.grad.shape == x.shape


@cases
@pytest.mark.parametrize(
    "x, y, message",
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), "dimension d, got 3 and 2"),
        (torch.zeros(2, 4, 3), torch.zeros(3, 4, 3), "batch size, got 2 and 3"),
        (torch.zeros(0, 3), torch.zeros(4, 3), "x must not be empty"),
        (torch.zeros(4, 3), torch.zeros(2, 0, 3), "y must not be empty"),
        (torch.zeros(4, 0), torch.zeros(4, 0), "x must not be empty"),
        (torch.zeros(4), torch.zeros(4, 3), r"x must have shape \(n, d\) or \(B, n, d\), got \(4,\)"),
        (torch.zeros(4, 3), torch.zeros(1, 1, 4, 3), "y must have shape"),
        (torch.full((4, 3), torch.nan), torch.zeros(4, 3), "x must be finite"),
        (torch.zeros(4, 3), torch.full((4, 3), -torch.inf), "y must be finite"),
    ],
)
def test_sets_that_cannot_be_compared(case: Case, x: Tensor, y: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        case.loss()(x, y)


@cases
def test_sets_that_are_no_floating_point_tensors(case: Case):
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch\.int64"):
        case.loss()(torch.zeros(4, 3).long(), torch.zeros(4, 3))
    with pytest.raises(TypeError, match="y must be a floating-point tensor, got list"):
        case.loss()(torch.zeros(4, 3), [[0.0, 0.0, 0.0]])


@cases
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu_and_never_waits(case: Case):
    x, y = points(2, 9, 3), points(2, 7, 3, seed=1, shift=1.0)
    expected = case.loss()(x, y)
    x, y, loss = x.cuda(), y.cuda(), case.loss()
    loss.generator = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(case.loss()(x, y).cpu(), expected)
    assert case.loss()(x * torch.nan, y).isnan()
