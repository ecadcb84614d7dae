"""Gates that agree: the loss, the straight-through gradient, what is found in a model, and what is derived from it."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.prune.zoo import Residual, make
from weightroom import train
from weightroom.nets.small import ResNet
from weightroom.prune import ConsensusGatePruner, PolarizationLoss, PruningPlan, TrainTimePruner, WrappedModel
from weightroom.prune.consensus_gates import GateReport, _Opened, _StraightThrough


class Block(nn.Module):
    """x + outer(relu(inner(norm(x))))."""

    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(self.norm(x))))


class Basic(nn.Module):
    """As torchvision has it: one activation, in place, for both uses."""

    def __init__(self, width: int = 6, *, stride: int = 1, bottleneck: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3, self.bn3 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.bottleneck = bottleneck
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(width, width, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            out = self.bn3(self.conv3(self.relu(out)))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Inline(nn.Module):
    """Two blocks written into one forward, with an activation in place that both share and that the output passes."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv[1](self.act(self.conv[0](x)))
        x = self.conv[3](self.act(self.conv[2](x))) + x
        return self.head(self.act(x).mean((2, 3)))


class Untraceable(Basic):
    """Looks at its data."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.detach().abs().max()) < 1e6 else x


def images(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


MLP = lambda: nn.Sequential(nn.Linear(6, 8), Block(), Block(), Block(), nn.Linear(8, 4))  # noqa: E731
MODELS = {
    "mlp": (MLP, (5, 6)),
    "tokens": (MLP, (5, 7, 6)),
    "basic": (lambda: images(Basic(), Basic(stride=2), Basic()), (5, 1, 8, 8)),
    "bottleneck": (lambda: images(Basic(bottleneck=True), Basic(bottleneck=True)), (5, 1, 8, 8)),
    "resnet": (lambda: ResNet(1, 4, blocks=(2, 2), width=4), (5, 1, 8, 8)),
    "inlined": (Residual, (5, 1, 8, 8)),
    "shared activation": (Inline, (5, 6, 4, 4)),
}
every_model = pytest.mark.parametrize("name", MODELS)
every_unit = pytest.mark.parametrize("unit", ["block", "channel"])


def model_of(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    factory, shape = MODELS[name]
    model, x = factory(), torch.randn(shape)
    if x.ndim == 4:  # statistics of its own, so that batch norm is no identity
        model.train()(x)
    return model.eval(), x


def force(wrapped: nn.Module, opened: Tensor) -> None:
    """Sets every gate to a constant."""
    with torch.no_grad():
        for gate, part in zip(wrapped.gates, opened.float().split([g.units for g in wrapped.gates]), strict=True):
            gate.net[2].weight.zero_()
            gate.net[2].bias.copy_(part)


def open_for(gate: nn.Module, pooled: Tensor, count: int) -> None:
    """Makes a gate open for ``count`` of the inputs given."""
    with torch.no_grad():
        gate.net[2].weight.fill_(1.0), gate.net[2].bias.fill_(0.0)
        z = gate.net(pooled).flatten().sort().values
        assert z.unique().numel() == len(z)
        gate.net[2].bias.fill_(0.5 - float(z[len(z) - count - 1 : len(z) - count + 1].mean()))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# The loss.


def test_polarisation_is_the_variance_of_binary_gates():
    unanimous, split = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    assert PolarizationLoss()(unanimous) == 0
    assert PolarizationLoss()(split) == 0.25
    gates = (torch.rand(9, 5) > 0.4).double()
    torch.testing.assert_close(PolarizationLoss("none")(gates), gates.var(0, correction=0))
    torch.testing.assert_close(PolarizationLoss("sum")(gates), 5 * PolarizationLoss()(gates))
    # Half of the gates open and all unanimous is a consensus: the mean over gates comes after g (1 - g).
    assert PolarizationLoss()(torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 3)) == 0


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_polarisation_gradient_order_and_bounds(b, g, seed):
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(b, g, generator=generator, dtype=torch.float64, requires_grad=True)
    loss = PolarizationLoss()(gates)
    loss.backward()
    torch.testing.assert_close(gates.grad, ((1 - 2 * gates.detach().mean(0)) / (b * g)).expand(b, g))
    torch.testing.assert_close(PolarizationLoss()(gates[torch.randperm(b, generator=generator)]), loss)
    assert 0 <= loss <= 0.25


def test_polarisation_refuses():
    with pytest.raises(ValueError, match=r"\(batch, gates\), got \(4,\)"):
        PolarizationLoss()(torch.rand(4))
    with pytest.raises(ValueError, match="reduction"):
        PolarizationLoss("avg")


def test_straight_through():
    z = torch.tensor([-1.0, 0.0, 0.3, 0.5, 0.500001, 0.9, 1.0, 2.0], requires_grad=True)
    g = _StraightThrough.apply(z)
    assert g.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    g.backward(torch.arange(1.0, 9.0))
    assert z.grad.tolist() == [0, 0, 3, 4, 5, 6, 0, 0]


@pytest.mark.parametrize(("x", "gates"), [((3, 4), (3,)), ((3, 4, 2, 2), (3,)), ((3, 4), (3, 4)), ((3, 4, 2, 2), (3, 4))])
def test_the_gated_product_has_the_gradient_of_a_product(x, gates):
    inputs = torch.randn(x, dtype=torch.float64, requires_grad=True), torch.rand(gates, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Opened.apply, inputs)
    assert torch.autograd.gradgradcheck(_Opened.apply, inputs)


# What is wrapped.


@every_model
@every_unit
def test_open_gates_change_nothing_bit_for_bit(name, unit):
    model, x = model_of(name)
    model, x = model.double(), x.double()
    wrapped = ConsensusGatePruner(1.0, unit=unit, lambda_pol=0.0).wrap(model, x)
    assert isinstance(wrapped, WrappedModel)
    assert all(bool((wrapped(x), gate.value.min())[1] == 1) for gate in wrapped.gates)  # as they start
    force(wrapped, torch.ones(len(wrapped.units)))
    assert torch.equal(wrapped(x), model(x))
    assert wrapped(x).dtype == torch.float64
    wrapped.train()(x)
    assert wrapped.aux_loss().item() == pytest.approx(0, abs=1e-24)  # L_size at t = 1


@every_unit
def test_wrap_leaves_everything_as_it_was(unit):
    model, x = model_of("basic")
    model.train()
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    wrapped = ConsensusGatePruner(unit=unit).wrap(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes == [m.training for m in wrapped.model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    wrapped.train()(x).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    twice = [ConsensusGatePruner(unit=unit).wrap(model, x).gates.state_dict() for _ in range(2)]
    assert all(torch.equal(value, twice[1][name]) for name, value in twice[0].items())


class Stochastic(Block):
    """Left out at random while training."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and torch.rand(()).item() < 0.5 else super().forward(x)


class Noisy(nn.Module):
    """Draws whenever it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * torch.rand(())


@every_unit
def test_blocks_are_found_in_eval_mode_and_nothing_is_drawn(unit):
    torch.manual_seed(0)
    model, x = nn.Sequential(Noisy(), *(Stochastic() for _ in range(8)), nn.Linear(8, 2)).train(), torch.randn(4, 8)
    state = torch.get_rng_state()
    wrapped = ConsensusGatePruner(unit=unit).wrap(model, x)
    assert len(wrapped.gates) == 8
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in wrapped.modules())
    with torch.random.fork_rng():
        _, first = nn.Linear(16, wrapped.gates[0].units), nn.Linear(8, 16)  # drawn from that state
    assert torch.equal(wrapped.gates[0].net[0].weight, first.weight)


def test_the_batch_norms_of_the_copy_keep_their_statistics():
    model, x = model_of("basic")
    wrapped = ConsensusGatePruner().wrap(model.train(), x + 3)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), wrapped.model.buffers(), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_models(training):
    model, x = model_of("mlp")
    wrapped = ConsensusGatePruner().wrap(model.train(training), x)
    assert all(module.training == training for module in wrapped.modules())


def test_a_model_with_gates_is_refused():
    model, x = model_of("mlp")
    wrapped = ConsensusGatePruner().wrap(model, x)
    for gated in (wrapped, wrapped.model, nn.Sequential(wrapped)):
        with pytest.raises(ValueError, match="already wrapped"):
            ConsensusGatePruner().wrap(gated, x)


@pytest.mark.parametrize(
    ("name", "blocks", "channels"),
    [("mlp", 3, 36), ("basic", 2, 12), ("bottleneck", 2, 24), ("resnet", 3, 16), ("inlined", 1, 8), ("shared activation", 2, 12)],
)
def test_which_gates_there_are(name, blocks, channels):
    model, x = model_of(name)
    wrapped = ConsensusGatePruner().wrap(model, x)
    assert len(wrapped.units) == blocks
    assert len(ConsensusGatePruner(unit="channel").wrap(model, x).units) == channels
    if name == "basic":
        assert wrapped.units == ("1", "3")  # "2" has a projection


def test_gates_scale_branches_and_inner_channels_sample_by_sample():
    model, x = model_of("mlp")
    block, hidden = model[1], model[0](x)
    wrapped = ConsensusGatePruner(blocks=["1"]).wrap(model, x)
    g = torch.tensor([[1.0], [0.0], [1.0], [0.0], [0.0]])
    with torch.no_grad():  # a hidden unit that says which sample it is
        gate = wrapped.gates[0]
        gate.net[0].weight.zero_()
        pinv = torch.linalg.pinv(torch.cat([hidden, torch.ones(5, 1)], 1)) @ g
        gate.net[0].weight[0], gate.net[0].bias[0] = pinv[:-1, 0], pinv[-1, 0]
        gate.net[2].weight.zero_()
        gate.net[2].weight[0, 0], gate.net[2].bias[0] = 1.0, 0.0
    expected = hidden + g * (block(hidden) - hidden)
    torch.testing.assert_close(wrapped(x), model[2:](expected))
    assert torch.equal(gate.value, g)

    wrapped = ConsensusGatePruner(unit="channel", blocks=["1"]).wrap(model, x)
    channels = torch.arange(12) % 3 != 0
    force(wrapped, channels)
    expected = hidden + block.outer(channels.float() * torch.relu(block.inner(block.norm(hidden))))
    torch.testing.assert_close(wrapped(x), model[2:](expected))


def test_gates_see_the_pooled_input_of_their_block():
    for name, dims in (("basic", (2, 3)), ("tokens", (1,))):
        model, x = model_of(name)
        wrapped = ConsensusGatePruner().wrap(model, x)
        seen = []
        wrapped.gates[0].net.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        wrapped(x)
        torch.testing.assert_close(seen[0], model[0](x).mean(dims))


def test_where_no_gates_can_be():
    x = torch.randn(4, 6)
    for model in (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), nn.Linear(6, 2)):
        with pytest.raises(ValueError, match="no residual blocks that can be gated"):
            ConsensusGatePruner().wrap(model, x)
    normed = nn.Sequential(Block(6))
    normed[0].inner, normed[0].norm = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12)), nn.Identity()
    assert len(ConsensusGatePruner().wrap(normed, x).units) == 1
    with pytest.raises(ValueError, match="no channels inside a residual block"):
        ConsensusGatePruner(unit="channel").wrap(normed, x)
    twice = Block(6)
    with pytest.raises(ValueError, match="can be gated"):
        ConsensusGatePruner().wrap(nn.Sequential(twice, twice), x)
    tied = Block(6, 6)
    tied.outer.weight = tied.inner.weight
    with pytest.raises(ValueError, match="no channels"):
        ConsensusGatePruner(unit="channel").wrap(nn.Sequential(tied), x)


def test_a_broadcast_branch_and_one_of_several_steps_are_no_blocks():
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.conv = nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(self.pool(x))

    class Returned(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            inner = self.inner(self.norm(x))
            return x + self.outer(torch.relu(inner)), inner

    with pytest.raises(ValueError, match="can be gated"):
        ConsensusGatePruner().wrap(Broadcast(), torch.randn(2, 1, 4, 4))
    with pytest.raises(ValueError, match="can be gated"):
        ConsensusGatePruner().wrap(Returned(), torch.randn(2, 8))


def test_optional_arguments_are_left_out():
    class Masked(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = x if mask is None else x * mask
            return super().forward(x)

    model, x = nn.Sequential(nn.Linear(6, 8), Masked()), torch.randn(4, 6)
    wrapped = ConsensusGatePruner().wrap(model, x)
    force(wrapped, torch.zeros(1))
    small, _ = ConsensusGatePruner().derive(wrapped, [x])
    torch.testing.assert_close(small(x), model[0](x))


def test_named_blocks():
    model, x = model_of("basic")
    assert ConsensusGatePruner(blocks=["3"]).wrap(model, x).units == ("3",)
    nested, z = nn.Sequential(MLP(), nn.ReLU()), torch.randn(3, 6)
    assert ConsensusGatePruner(blocks=["0"]).wrap(nested, z).units == ("0.1", "0.2", "0.3")
    with pytest.raises(ValueError, match="'7'"):
        ConsensusGatePruner(blocks=["7"]).wrap(model, x)
    with pytest.raises(ValueError, match=r"'2' .* is no residual block"):
        ConsensusGatePruner(blocks=["2"]).wrap(model, x)


@every_unit
def test_a_block_that_cannot_be_traced_is_known_by_its_names(unit):
    torch.manual_seed(0)
    model, x = images(Untraceable(), Basic(), Untraceable()).eval(), torch.randn(4, 1, 8, 8)
    assert {u.partition(".")[0] for u in ConsensusGatePruner(unit=unit).wrap(model, x).units} == {"2"}
    pruner = ConsensusGatePruner(unit=unit, blocks=["1", "3"])
    wrapped = pruner.wrap(model, x)
    opened = torch.zeros(len(wrapped.units))
    opened[len(opened) // 2 :] = 1
    force(wrapped, opened)
    small, plan = pruner.derive(wrapped.eval(), [x])
    reference = train.reestimate_batchnorm(plan.apply(copy.deepcopy(model)), [x])
    torch.testing.assert_close(small(x), reference(x))
    assert size(small) < size(model)
    with pytest.raises(ValueError, match="is no residual block"):
        ConsensusGatePruner(blocks=["1"]).wrap(images(Untraceable(stride=2)), x)


# What the regulariser says.


def test_aux_loss_is_the_formula():
    model, x = model_of("basic")
    pruner = ConsensusGatePruner(0.4, unit="block", cost="params", lambda_pol=2.0, lambda_size=5.0, gate="gumbel")
    wrapped = pruner.wrap(model, x).train()
    wrapped(x)
    gates = torch.cat([gate.value for gate in wrapped.gates], 1)
    assert set(gates.flatten().tolist()) <= {0.0, 1.0}
    gbar, c = gates.mean(0), torch.tensor([1.0, 1.0]) / 2
    pol, target = (gbar * (1 - gbar)).mean(), (c @ gbar - 0.4) ** 2
    torch.testing.assert_close(wrapped.aux_loss(), 2 * pol + 5 * target)
    wrapped.advance(0.15)
    torch.testing.assert_close(wrapped.aux_loss(), 0.5 * 2 * pol + 5 * target)
    wrapped.advance(0.0)
    torch.testing.assert_close(wrapped.aux_loss(), 5 * target)
    wrapped.advance(0.31)
    torch.testing.assert_close(wrapped.aux_loss(), 2 * pol + 5 * target)
    plain = ConsensusGatePruner(0.4, size="mean", lambda_pol=0.0, lambda_size=3.0).wrap(model, x).train()
    force(plain, torch.tensor([1, 0]))
    plain(x)
    torch.testing.assert_close(plain.aux_loss(), torch.tensor(1.5))


def test_both_terms_reach_the_gates():
    model, x = model_of("mlp")
    for how in ({"lambda_pol": 2.0, "lambda_size": 0.0}, {"lambda_pol": 0.0, "lambda_size": 5.0}):
        wrapped = ConsensusGatePruner(0.3, **how).wrap(model, x).train()
        wrapped(x)
        wrapped.aux_loss().backward()
        assert all(gate.net[2].bias.grad.abs().min() > 0 for gate in wrapped.gates)
    wrapped = ConsensusGatePruner().wrap(model, x)
    wrapped(x).square().sum().backward()  # so does the task's
    assert all(gate.net[2].bias.grad.abs().min() > 0 for gate in wrapped.gates)


def test_aux_loss_at_its_edges():
    model, x = model_of("mlp")
    wrapped = ConsensusGatePruner().wrap(model, x)
    with pytest.raises(RuntimeError, match="forward pass"):
        wrapped.train().aux_loss()
    wrapped.eval()(x)
    assert wrapped.aux_loss() == 0
    wrapped.train()(x[:1])
    assert wrapped.aux_loss() == 0
    wrapped(x)
    assert wrapped.aux_loss().item() == pytest.approx(5 * 0.25)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="progress"):
            wrapped.advance(wrong)


def test_a_report_is_no_forward_pass_for_aux_loss():
    model, x = model_of("mlp")
    wrapped = ConsensusGatePruner().wrap(model, x).train()
    wrapped(x)
    wrapped.report([x])
    with pytest.raises(RuntimeError, match="forward pass"):
        wrapped.aux_loss()
    wrapped.eval()(x)
    with pytest.raises(RuntimeError, match="forward pass"):
        wrapped.train().aux_loss()
    wrapped(x)
    assert wrapped.aux_loss().requires_grad


def test_costs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pool = nn.Conv2d(1, 6, 3, padding=1), nn.AvgPool2d(2)
            self.one, self.two = Basic(), Basic(bottleneck=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.pool(self.one(self.stem(x))))

    torch.manual_seed(0)
    model, x = Two(), torch.randn(2, 1, 8, 8)
    conv, point, norm = 6 * 6 * 9, 6 * 6, 12
    for cost, one, two in (
        ("macs", 2 * conv * 64, (2 * conv + point) * 16),
        ("params", 2 * (conv + norm), 2 * (conv + norm) + point + norm),
        ("count", 1, 1),
    ):
        wrapped = ConsensusGatePruner(cost=cost).wrap(model, x)
        torch.testing.assert_close(wrapped.share, torch.tensor([one, two]) / (one + two))
        # Twice the batch is twice the cost of all.
        torch.testing.assert_close(ConsensusGatePruner(cost=cost).wrap(model, torch.cat([x, x])).share, wrapped.share)
        wrapped = ConsensusGatePruner(one / (one + two), cost=cost, lambda_pol=0.0).wrap(model, x).train()
        force(wrapped, torch.tensor([1, 0]))
        wrapped(x)
        assert wrapped.aux_loss().item() == pytest.approx(0, abs=1e-12)
    channels = ConsensusGatePruner(unit="channel", cost="params").wrap(model, x).share
    assert len(channels) == 18
    torch.testing.assert_close(channels[:12] / channels[0], torch.ones(12))
    torch.testing.assert_close(channels[12] / channels[0], torch.tensor((conv + norm + point) / (2 * conv + norm)))


def test_parameter_groups():
    model, x = model_of("mlp")
    wrapped = ConsensusGatePruner().wrap(model, x)
    ours, gates = wrapped.param_groups()
    assert len(ours["params"]) == len(list(model.parameters()))
    assert gates["weight_decay"] == 0
    assert {id(p) for group in (ours, gates) for p in group["params"]} == {id(p) for p in wrapped.parameters()}
    torch.optim.AdamW(wrapped.param_groups())


def test_gate_kinds():
    model, x = model_of("mlp")
    static = ConsensusGatePruner(gate="static").wrap(model, x).train()
    static(x)
    assert all(gate.value.shape == (5, 1) and gate.value.unique().numel() == 1 for gate in static.gates)
    assert sum(p.numel() for p in static.gates.parameters()) == 3
    static.aux_loss().backward()
    assert all(gate.logits.grad.abs() > 0 for gate in static.gates)

    torch.manual_seed(0)
    gumbel = ConsensusGatePruner(gate="gumbel").wrap(model, x).train()
    with torch.no_grad():
        z = gumbel.gates[0].net[2].bias.fill_(0.4)
    wide = x.repeat(2000, 1)
    gumbel(wide)
    assert gumbel.gates[0].value.mean().item() == pytest.approx(torch.sigmoid(z).item(), abs=0.015)
    assert set(gumbel.gates[0].value.flatten().tolist()) == {0.0, 1.0}
    gumbel.aux_loss().backward()
    assert gumbel.gates[0].net[2].bias.grad.abs() > 0
    gumbel.eval()(wide)
    assert gumbel.gates[0].value.min() == 1  # no noise
    with torch.no_grad():
        z.fill_(-0.1)
    gumbel(wide)
    assert gumbel.gates[0].value.max() == 0


# What is reported and derived.


def test_report():
    model, x = model_of("mlp")
    wrapped = ConsensusGatePruner(cost="count").wrap(model, x).train()
    force(wrapped, torch.tensor([1, 0, 1]))
    gate = wrapped.gates[0].net
    with torch.no_grad():
        gate[2].weight.fill_(1.0), gate[2].bias.fill_(0.0)
        z = gate(model[0](x)).flatten()
        gate[2].bias.fill_(0.5 - float(z.sort().values[1:3].mean()))  # three of five are open
    opened = 0.6
    loader = [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(3))]
    report = wrapped.gate_report(loader)
    assert isinstance(report, GateReport)
    torch.testing.assert_close(report.gbar, torch.tensor([opened, 0, 1], dtype=torch.float64))
    assert report.undecided == pytest.approx(1 / 3)
    assert (report.kept, report.cost) == pytest.approx((2 / 3, 2 / 3))
    assert report.units == ("1", "2", "3")
    assert wrapped.training
    assert wrapped.model[1].training
    assert torch.equal(wrapped.report([x]).gbar, report.gbar)
    with pytest.raises(ValueError, match="no batch"):
        wrapped.report([])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_in_half_precision(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), Block(), Block(), nn.Linear(8, 4)), torch.randn(5000, 6)
    pruner = ConsensusGatePruner(unit="channel", cost="params")
    wrapped = pruner.wrap(model, x[:2])
    share = wrapped.share
    wrapped = wrapped.to(dtype)
    assert torch.equal(wrapped.share, share)  # in full precision
    report = wrapped.report(x.to(dtype).split(500))
    assert report.gbar.tolist() == [1.0] * 24
    assert (report.kept, report.cost) == pytest.approx((1.0, 1.0))
    small, plan = pruner.derive(wrapped, x.to(dtype).split(500))
    assert size(small) == size(model)
    assert plan.sparsity() == 0
    assert wrapped.double().share.dtype == torch.float64
    assert wrapped.share.sum().item() == pytest.approx(1, abs=1e-15)
    assert wrapped.to("meta").share.is_meta
    assert wrapped.to_empty(device="cpu").share.sum().item() == pytest.approx(1)


def test_where_a_gate_is_decided_and_where_it_is_open():
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Block(6) for _ in range(8)), nn.Linear(6, 2)).double(), torch.randn(100, 6).double()
    pruner = ConsensusGatePruner()
    wrapped = pruner.wrap(model, x)
    for count, undecided in ((1, 0), (2, 0), (3, 1), (10, 1), (90, 1), (97, 1), (98, 0), (99, 0)):
        force(wrapped, torch.ones(8))
        open_for(wrapped.gates[0], x, count)
        report = wrapped.report([x])
        assert report.gbar[0] == pytest.approx(count / 100)
        assert report.undecided == undecided / 8
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            pruner.derive(wrapped, [x])
        assert len(told) == undecided  # one gate of eight is enough
    for count, kept in ((50, 7), (51, 8)):  # open for exactly half of the samples: closed
        open_for(wrapped.gates[0], x, count)
        assert wrapped.report([x]).kept == kept / 8
        with pytest.warns(UserWarning, match="12% of the gates are undecided"):
            small, _ = pruner.derive(wrapped, [x])
        assert sum(isinstance(layer, Block) for layer in small) == kept


@every_model
@every_unit
@pytest.mark.parametrize("seed", range(2))
def test_the_derived_model_is_the_frozen_one(name, unit, seed):
    model, x = model_of(name, seed)
    pruner = ConsensusGatePruner(unit=unit)
    wrapped = pruner.wrap(model.double(), x := x.double())
    opened = torch.rand(len(wrapped.units), generator=torch.Generator().manual_seed(seed)) > 0.4
    opened[0] = False
    force(wrapped, opened)
    small, plan = pruner.derive(wrapped, [x])
    # Batch norms are estimated anew: the same for the gated model, whose plain layers are the same.
    frozen = train.reestimate_batchnorm(copy.deepcopy(wrapped), [x])
    fresh = torch.randn_like(x)
    expected = frozen(fresh.clone())
    torch.testing.assert_close(
        small(fresh.clone()), expected, rtol=0, atol=1e-6
    )  # clones: an activation in place would spoil both
    assert size(small) < size(model)
    assert type(small) is type(model)
    assert not any(type(m).__name__ == "_Gate" for m in small.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    assert "gate" not in " ".join(small.state_dict())
    masked = train.reestimate_batchnorm(plan.apply(copy.deepcopy(model)), [x])
    torch.testing.assert_close(masked(fresh.clone()), expected, rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(wrapped.model.state_dict().values(), model.state_dict().values(), strict=True))
    assert torch.equal(pickle.loads(pickle.dumps(small))(fresh.clone()), small(fresh.clone()))
    assert PruningPlan(plan.masks).sparsity() == plan.sparsity() > 0


def test_the_constant_that_goes_with_a_block_is_told():
    model, x = model_of("mlp")
    pruner = ConsensusGatePruner(unit="channel")
    wrapped = pruner.wrap(model, x)
    opened = torch.ones(36)
    opened[12:24] = 0
    force(wrapped, opened)
    with pytest.warns(UserWarning, match=f"1 blocks go, .* constant of up to {model[2].outer.bias.abs().max().item():.3g} "):
        small, _ = pruner.derive(wrapped, [x])
    with torch.no_grad():
        constant = wrapped.model[2].outer.bias.clone()
        expected = wrapped(x)
        hidden = small[1](small[0](x))
        torch.testing.assert_close(small[4](small[3](hidden + constant)), expected)
        wrapped.model[2].outer.bias.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small, _ = pruner.derive(wrapped, [x])
    torch.testing.assert_close(small(x), wrapped(x))


def test_the_constant_is_that_behind_all_closed_channels():
    model, x = model_of("bottleneck")
    pruner = ConsensusGatePruner(unit="channel", blocks=["1"])
    wrapped = pruner.wrap(model, x)
    force(wrapped, torch.tensor([0, 0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 1]))  # the second of two layers is open in part
    seen = []
    handle = wrapped.model[1].bn3.register_forward_hook(lambda module, args, output: seen.append(output.abs().max().item()))
    wrapped(x)
    handle.remove()
    with pytest.warns(UserWarning, match=f"constant of up to {seen[0]:.3g} "):
        pruner.derive(wrapped, [x])


class Preactivated(nn.Module):
    """x + conv(relu(x)), where the activation is in place, so that the sum reads relu(x)."""

    def __init__(self, how: str, width: int = 4, after: bool = True) -> None:
        super().__init__()
        self.how, self.relu = how, nn.ReLU(inplace=True)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.seq = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1))
        self.after = nn.Tanh() if after else None

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "layer":
            out = self.conv2(self.conv1(self.relu(x))) + x
        elif self.how == "sequence":
            out = x + self.seq(x)
        elif self.how == "function":
            out = self.conv2(self.conv1(F.relu_(x))) + x
        elif self.how == "argument":
            out = self.conv2(self.conv1(F.relu(x, inplace=True))) + x
        else:
            out = self.conv2(self.conv1(F.relu(x, True))) + x
        return out if self.after is None else self.after(out)


@pytest.mark.parametrize("inlined", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("how", ["layer", "sequence", "function", "argument", "position"])
@every_unit
def test_an_activation_in_place_at_the_start_of_a_branch_stays(how, after, unit, inlined):
    class Inlined(Preactivated):  # no block that stands alone
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.1) * 2

    torch.manual_seed(0)
    block = (Inlined if inlined else Preactivated)(how, after=after)
    model, x = nn.Sequential(nn.Conv2d(1, 4, 1), block, nn.Flatten(), nn.Linear(36, 2)).eval(), torch.randn(5, 1, 3, 3)
    if unit == "channel":
        nn.init.zeros_(block.conv2.bias), nn.init.zeros_(block.seq[2].bias)
    pruner = ConsensusGatePruner(unit=unit)
    wrapped = pruner.wrap(model, x)
    torch.testing.assert_close(wrapped(x), model(x))
    force(wrapped, torch.zeros(len(wrapped.units)))
    small, plan = pruner.derive(wrapped, [x])
    torch.testing.assert_close(small(x), wrapped(x))
    torch.testing.assert_close(plan.apply(copy.deepcopy(model))(x), wrapped(x))
    assert size(small) < size(model)
    assert not any(module.training for module in small.modules() if isinstance(module, nn.ReLU | nn.Tanh))


@pytest.mark.parametrize("gate", ["ste", "gumbel", "static"])
def test_gates_learn_where_an_activation_in_place_changes_what_they_see(gate):
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.linear = nn.ReLU(inplace=True), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.relu(x)) + x

    torch.manual_seed(0)
    wrapped = ConsensusGatePruner(gate=gate).wrap(nn.Sequential(nn.Linear(6, 6), Flat()), x := torch.randn(5, 6)).train()
    (wrapped(x).square().mean() + wrapped.aux_loss()).backward()
    assert all(p.grad is not None for p in wrapped.parameters())


@every_unit
def test_all_gates_closed_leaves_stem_and_head(unit):
    model, x = model_of("mlp")
    pruner = ConsensusGatePruner(unit=unit)
    wrapped = pruner.wrap(model, x)
    force(wrapped, torch.zeros(len(wrapped.units)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if unit == "channel" else "error")  # biases go with their channels
        small, plan = pruner.derive(wrapped, [x])
    assert torch.equal(small(x), model[4](model[0](x)))
    assert [type(m) for m in small] == [nn.Linear, *[nn.Identity] * 3, nn.Linear]
    assert size(small) == size(model[0]) + size(model[4])
    assert not plan.channels
    assert all(bool(mask.any()) == name.startswith(("0.", "4.")) for name, mask in plan.masks.items())
    assert plan.macs(x[:1], model=model) == 6 * 8 + 8 * 4


def test_what_follows_the_sum_stays():
    for name, after in (("basic", nn.ReLU), ("resnet", nn.ReLU)):
        model, x = model_of(name)
        wrapped = ConsensusGatePruner().wrap(model, x)
        force(wrapped, torch.zeros(len(wrapped.units)))
        small, _ = ConsensusGatePruner().derive(wrapped, [x])
        assert isinstance(small.get_submodule(wrapped.units[-1]), after)


def test_the_plan_of_channels_cuts_the_original():
    model, x = model_of("basic")
    pruner = ConsensusGatePruner(unit="channel")
    wrapped = pruner.wrap(model, x)
    opened = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0])
    force(wrapped, opened)
    small, plan = pruner.derive(wrapped, [x])
    assert {name: index.tolist() for name, index in plan.channels.items()} == {"1.conv1": [1, 4], "3.conv1": [3, 4, 5]}
    assert small[1].conv1.out_channels == small[1].bn1.num_features == small[1].conv2.in_channels == 4
    shrunk = plan.apply(model, "shrink", example_inputs=x)
    assert size(shrunk) == size(small)
    removed = sum(layer.removed for layer in plan.layers().values())
    assert removed == size(model) - size(small)
    assert torch.equal(small[1].conv1.weight, model[1].conv1.weight[[0, 2, 3, 5]])


def test_undecided_gates_are_told_of_and_decided_by_all_data():
    model, x = model_of("mlp")
    pruner = ConsensusGatePruner()
    wrapped = pruner.wrap(model, x)
    gate = wrapped.gates[0].net
    with torch.no_grad():
        gate[2].weight.fill_(1.0), gate[2].bias.fill_(0.0)
        z = gate(model[0](x)).flatten()
        gate[2].bias.fill_(0.5 - float(z.sort().values[1:3].mean()))  # three of five are open
    order = z.argsort()
    with pytest.warns(UserWarning, match="33% of the gates are undecided"):
        small, _ = pruner.derive(wrapped, [x[order[:1]], x[order[1:]]])
    assert isinstance(small[1], Block)
    force(wrapped, torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.derive(wrapped, [x])
    with pytest.raises(TypeError, match="what wrap"):
        pruner.derive(nn.Linear(2, 2), [x])


def test_batch_norm_is_estimated_anew():
    model, x = model_of("basic")
    pruner = ConsensusGatePruner()
    wrapped = pruner.wrap(model, x)
    force(wrapped, torch.tensor([0, 1]))
    shifted = x + 3
    small, _ = pruner.derive(wrapped, [shifted])
    # Without block "1" the next batch norm sees something else than in training.
    torch.testing.assert_close(small[2].bn1.running_mean, model[2].conv1(torch.relu(model[0](shifted))).mean((0, 2, 3)))
    assert not torch.allclose(small[2].bn1.running_mean, model[2].bn1.running_mean)
    assert not torch.allclose(small[3].bn2.running_var, model[3].bn2.running_var)


@pytest.mark.parametrize(("gate", "unit"), [("ste", "block"), ("ste", "channel"), ("gumbel", "channel"), ("static", "block")])
def test_training_reaches_a_consensus(gate, unit):
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    data, steps = torch.utils.data.TensorDataset(x, y), 240
    pruner: TrainTimePruner = ConsensusGatePruner(0.5, unit=unit, cost="count", gate=gate)
    wrapped = pruner.wrap(nn.Sequential(nn.Linear(6, 8), Block(), Block(), Block(), Block(), nn.Linear(8, 4)), x[:1])
    train.fit(
        wrapped, data, optimizer=torch.optim.Adam(wrapped.param_groups(), lr=0.01), steps=steps, batch_size=32,
        step=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]) + wrapped.aux_loss(),
        after_step=lambda n: wrapped.advance(n / steps),
    )  # fmt: skip
    dynamic = (wrapped.eval()(x).argmax(1) == y).float().mean()
    report = wrapped.report([x])
    assert report.undecided <= 0.1
    assert 0.2 <= report.kept <= 0.8
    small, _ = pruner.derive(wrapped, [x])
    accuracy = (small.eval()(x).argmax(1) == y).float().mean()
    assert accuracy > 0.85
    assert abs(accuracy - dynamic) < 0.05


def test_copies_pickles_and_state():
    model, x = model_of("mlp")
    wrapped = ConsensusGatePruner(unit="channel").wrap(model, x).train()
    wrapped(x)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(wrapped)))
    assert torch.equal(twin(x), wrapped(x))
    force(twin, torch.zeros(36))  # its hooks are its own gates
    assert not torch.equal(twin(x), wrapped(x))
    twin.load_state_dict(wrapped.state_dict())
    assert torch.equal(twin(x), wrapped(x))


def test_other_inputs_than_one_tensor():
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(6)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.block(a + b)

    a, b = torch.randn(3, 6), torch.randn(3, 6)
    model, pruner = Summed(), ConsensusGatePruner(unit="channel")
    for inputs in ((a, b), {"a": a, "b": b}):
        wrapped = pruner.wrap(model, inputs)
        force(wrapped, torch.arange(12) % 2)
        small, _ = pruner.derive(wrapped, [(inputs, None)])
        torch.testing.assert_close(small(a, b), wrapped(a, b))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.block, self.head = nn.BatchNorm1d(6), Block(6), nn.Linear(6, 2)

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return self.head(self.block(self.norm(a if b is None else a + b)))


def test_other_inputs_in_front_of_a_batch_norm():
    torch.manual_seed(0)
    a, b = torch.randn(8, 6), torch.randn(8, 6)
    model, pruner = Normed(), ConsensusGatePruner(unit="channel")
    for inputs in ((a, b), {"a": a, "b": b}):
        wrapped = pruner.wrap(model, inputs)
        force(wrapped, torch.arange(12) % 2)
        small, _ = pruner.derive(wrapped, [(inputs, None)])
        torch.testing.assert_close(small.norm.running_mean, (a + b).mean(0))


def test_a_loader_that_can_be_read_once():
    model, x = Normed(), torch.randn(8, 6)
    pruner = ConsensusGatePruner()
    with pytest.raises(ValueError, match="loader must be re-iterable"):
        pruner.derive(pruner.wrap(model, x), iter([x]))
    with pytest.raises(ValueError, match="loader gave no batch"):
        pruner.derive(pruner.wrap(model, x), [])
    model.norm = nn.Identity()
    small, _ = pruner.derive(pruner.wrap(model, x), iter([x]))  # once is enough
    torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize("inputs", [lambda x, i: (x, i), lambda x, i: {"x": x, "i": i}])
def test_example_inputs_follow_the_model(inputs):
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.table, self.block, self.head = nn.Linear(6, 6), nn.Embedding(4, 6), Block(6), nn.Linear(6, 2)

        def forward(self, x: Tensor, i: Tensor) -> Tensor:
            return self.head(self.block(self.stem(x) + self.table(i)))

    torch.manual_seed(0)
    model, pruner = Indexed(), ConsensusGatePruner(unit="channel")
    x, i = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    wrapped = pruner.wrap(model, inputs(x, i)).double()
    force(wrapped, torch.arange(12) % 2)
    small, plan = pruner.derive(wrapped, [(inputs(x.double(), i), None)])
    torch.testing.assert_close(small(x.double(), i), wrapped(x.double(), i))
    assert small.block.inner.out_features == 6
    assert plan.macs() == 5 * (6 * 6 + 2 * 6 * 6 + 6 * 2)
    assert x.dtype == torch.float32


@pytest.mark.parametrize(
    "how",
    [
        {"keep": 0.0}, {"keep": 1.1}, {"keep": -0.5}, {"unit": "layer"}, {"cost": "flops"}, {"gate": "soft"}, {"size": "max"},
        {"lambda_pol": -1.0}, {"lambda_size": -1.0}, {"pol_warmup": 1.5}, {"hidden": 0}, {"hidden": 2.5}, {"blocks": "stages"}, {"blocks": []},
    ],
)  # fmt: skip
def test_arguments(how):
    with pytest.raises(ValueError, match=next(iter(how))):
        ConsensusGatePruner(**how)


def test_no_cost_to_count():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale(x)

    model, x = nn.Sequential(Scaled(), nn.Linear(6, 2)), torch.randn(3, 6)
    with pytest.raises(ValueError, match="give cost='count'"):
        ConsensusGatePruner().wrap(model, x)
    assert ConsensusGatePruner(cost="count").wrap(model, x).units == ("0",)


@pytest.mark.parametrize("name", ["mlp", "cnn", "vgg", "lstm", "tied", "mobile"])
def test_networks_without_residual_blocks_say_so(name):
    model, x, _ = make(name)
    with pytest.raises(ValueError, match="can be gated"):
        ConsensusGatePruner().wrap(model, x)


@pytest.mark.parametrize(("net", "units", "channels"), [("SegResNet", 4, None), ("resnet10", 1, 64), ("UNet", 2, None)])
def test_monai(net, units, channels):
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    model = {
        "SegResNet": lambda: nets.SegResNet(2, 8, 1, 2, blocks_down=(1, 2), blocks_up=(1,)),
        "resnet10": lambda: nets.resnet10(spatial_dims=2, n_input_channels=1, num_classes=3),
        "UNet": lambda: nets.UNet(2, 1, 2, channels=(4, 4, 8), strides=(1, 2), num_res_units=2),
    }[net]()
    x = torch.randn(2, 1, 16, 16)
    wrapped = ConsensusGatePruner().wrap(model.eval(), x)
    assert len(wrapped.units) == units  # the long skips of a U-net are no blocks
    force(wrapped, torch.arange(units) % 2)
    small, plan = ConsensusGatePruner().derive(wrapped, [x])
    torch.testing.assert_close(small(x), train.reestimate_batchnorm(wrapped, [x])(x), rtol=1e-4, atol=1e-5)
    assert size(model) - size(small) == sum(layer.removed for layer in plan.layers().values()) > 0
    if channels is None:
        with pytest.raises(ValueError, match="no channels"):
            ConsensusGatePruner(unit="channel").wrap(model, x)
    else:
        assert len(ConsensusGatePruner(unit="channel").wrap(model, x).units) == channels


def test_monai_unet_block():
    blocks = pytest.importorskip("monai.networks.blocks")
    torch.manual_seed(0)
    model, x = nn.Sequential(*(blocks.UnetResBlock(3, 4, 4, 3, 1, "batch") for _ in range(2))).eval(), torch.randn(2, 4, 6, 6, 6)
    pruner = ConsensusGatePruner(unit="channel")
    wrapped = pruner.wrap(model, x)
    force(wrapped, torch.tensor([1, 0, 1, 0, 0, 0, 0, 0]))
    small, _ = pruner.derive(wrapped, [x])
    assert isinstance(small[1], nn.LeakyReLU)
    assert small[0].conv1.conv.out_channels == 2
    torch.testing.assert_close(small(x), train.reestimate_batchnorm(wrapped, [x])(x))


class Skipping(nn.Module):
    """Leaves out its second block where it is told to, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        return x if self.skip else self.blocks[1](x)


def test_gates_of_skipped_blocks_take_no_part():
    torch.manual_seed(0)
    pruner = ConsensusGatePruner(keep=0.5, lambda_pol=0.0, lambda_size=1.0, cost="count")
    wrapped = pruner.wrap(Skipping(), torch.zeros(2, 8))
    x = torch.randn(4, 8)
    for skip in (False, True, True):
        wrapped.model.skip = skip
        wrapped(x)
        loss = wrapped.aux_loss()
        assert loss.item() == 0.25  # all gates that ran are open, and half should be
        loss.backward()
