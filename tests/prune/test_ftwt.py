from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.utils.flop_counter import FlopCounterMode

from tests.prune.zoo import make
from weightroom.nets.small import ConvNet, ResNet
from weightroom.prune import DynamicConvBlock, DynamicMaskPruner, DynamicModel, GlobalMagnitudePruner, MaskPredictor, mass_targets
from weightroom.prune.ftwt import _by_ratio

POSTER = torch.tensor([[5.5, 7.9, 0.3, 8.6, 2.2, 3.1, 0.9]])


class Mobile(nn.Module):
    """Depthwise, grouped and strided convolutions, activations in place, a linear bottleneck and a residual sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.point = nn.Sequential(nn.Conv2d(8, 12, 1, groups=2), nn.BatchNorm2d(12))
        self.wide = nn.Sequential(nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=3, padding_mode="reflect"), nn.SiLU())
        self.back = nn.Conv2d(12, 12, 3, padding="same")
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.point(self.deep(self.stem(x)))
        out = self.back(self.wide(h))
        out += h
        return self.head(F.relu(out, inplace=True).mean((2, 3)))


def plain_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip


MODELS = {
    "plain": (plain_cnn, (1, 8, 8)),
    "convnet": (lambda: ConvNet(1, 4, (6, 8, 8)), (1, 8, 8)),
    "resnet": (lambda: ResNet(2, 4, (1, 2), 6), (2, 8, 8)),
    "mobile": (Mobile, (1, 8, 8)),
    "zoo residual": (lambda: make("residual")[0], (1, 8, 8)),
}
every_model = pytest.mark.parametrize("name", MODELS)
both_residuals = pytest.mark.parametrize("residual", ["before", "after"])


def build(name: str, **how) -> tuple[nn.Module, DynamicModel, Tensor]:
    torch.manual_seed(0)
    factory, shape = MODELS[name]
    model, x = factory(), torch.randn(6, *shape)
    model(x)  # batch norms with statistics of their own
    return model, DynamicMaskPruner(**how).wrap(model, x[:2]), x


def force(block: DynamicConvBlock, kept: Tensor) -> None:
    with torch.no_grad():
        block.gate.linear.weight.zero_()
        block.gate.linear.bias.copy_(torch.where(kept, torch.inf, -torch.inf))


def spread(model: DynamicModel) -> None:
    """Gates that choose about half of the channels, others for every sample."""
    for block in model.blocks.values():
        nn.init.normal_(block.gate.linear.weight, std=20.0)


# ---- targets


def test_the_posters_example_keeps_four_channels():
    assert mass_targets(POSTER, 0.95).tolist() == [[1, 1, 0, 1, 0, 1, 0]]  # 8.6 + 7.9 + 5.5 + 3.1 is 88 %, with 2.2 it is 96 %


def test_the_mass_is_of_the_maxima_over_space():
    out = torch.zeros(1, 3, 2, 2)
    out[0, 0, 0, 1], out[0, 1], out[0, 2, 1, 1] = -6.0, 1.0, 3.0  # maxima 6, 1, 3, whatever their sign and the sum over space
    assert mass_targets(out, 0.9).tolist() == [[1, 0, 1]]
    assert mass_targets(out, 0.89).tolist() == [[1, 0, 0]]


def test_the_cumulative_sum_may_exceed_r_by_the_rounding_only():
    heat = torch.tensor([[0.5, 0.3, 0.2]])
    assert mass_targets(heat, 0.8).sum() == 2
    assert mass_targets(heat, 0.8 - 5e-6).sum() == 2
    assert mass_targets(heat, 0.8 - 1e-4).sum() == 1


maps = st.integers(0, 2**31 - 1).map(lambda seed: torch.rand(4, 9, 3, 2, generator=torch.Generator().manual_seed(seed)) - 0.3)


@settings(max_examples=25, deadline=None)
@given(out=maps, power=st.integers(-10, 10), r=st.floats(0.05, 1.0))
def test_targets_do_not_depend_on_the_scale(out, power, r):
    assert torch.equal(mass_targets(out * 2.0**power, r), mass_targets(out, r))


@settings(max_examples=25, deadline=None)
@given(out=maps, rs=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6))
def test_more_mass_keeps_no_fewer_channels(out, rs):
    counts = [mass_targets(out, r) for r in (*sorted(rs), 1.0)]
    assert all((a <= b).all() for a, b in pairwise(counts))


@settings(max_examples=25, deadline=None)
@given(out=maps, seed=st.integers(0, 1000), r=st.floats(0.05, 1.0))
def test_targets_permute_with_the_channels(out, seed, r):
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(mass_targets(out[:, order], r), mass_targets(out, r)[:, order])


def test_the_whole_mass_is_exactly_the_maps_that_fire():
    out = torch.randn(5, 8, 3, 3).relu()
    out[:, ::3] = 0
    assert torch.equal(mass_targets(out, 1.0), (out.amax((2, 3)) > 0).float())


def test_a_negative_share_keeps_all_and_a_dominant_map_is_kept():
    assert mass_targets(torch.zeros(2, 3, 2, 2), -1.0).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert mass_targets(torch.tensor([[0.1, 9.0, 0.2]]), 0.5).tolist() == [[0, 1, 0]]
    for r in (0.5, 1.0):
        assert mass_targets(torch.zeros(1, 3), r).sum() == 1


def test_targets_of_a_ratio_drop_the_floor_of_it_and_what_is_silent():
    heat = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0], [0.0, 1.0, 0.0, 0.0, 2.0]])
    assert _by_ratio(heat, 0.5).tolist() == [[1, 0, 0, 1, 1], [0, 1, 0, 0, 1]]
    assert _by_ratio(heat, 0.0).tolist() == [[1, 1, 1, 1, 1], [0, 1, 0, 0, 1]]
    assert _by_ratio(heat, 0.99).tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert _by_ratio(heat, 0.33).sum() == 4 + 2  # 0.33 * 5 is 1.65
    assert _by_ratio(torch.arange(100.0)[None] + 1, 0.29).sum() == 71  # 0.29 * 100 is 28.999999999999996


def test_targets_have_a_dtype_to_count_in_and_no_graph():
    out = torch.randn(2, 3, 2, 2, requires_grad=True)
    assert mass_targets(out.bfloat16(), 0.5).dtype == torch.float32
    assert not mass_targets(out, 0.5).requires_grad


@pytest.mark.parametrize("r", [0.0, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(r):
    with pytest.raises(ValueError, match="r must be"):
        mass_targets(POSTER, r)


def test_outputs_need_channels():
    with pytest.raises(ValueError, match=r"\(B, C"):
        mass_targets(torch.ones(3), 0.5)


# ---- gates


def test_a_gate_is_a_linear_map_of_the_softmax_of_the_pooled_input():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4, 4)
    for pool, pooled in (("max", x.amax((2, 3))), ("avg", x.mean((2, 3)))):
        gate = MaskPredictor(5, 7, pool=pool)
        torch.testing.assert_close(gate(x), pooled.softmax(1) @ gate.linear.weight.T + gate.linear.bias)
        gate.softmax = False
        torch.testing.assert_close(gate(x), pooled @ gate.linear.weight.T + gate.linear.bias)


@pytest.mark.parametrize(("embedding", "size"), [(None, 1), (80, 4), (50, 3), (1, 1)])
def test_an_embedding_pools_to_a_grid(embedding, size):
    gate = MaskPredictor(5, 7, embedding=embedding)
    assert gate.linear.in_features == 5 * size**2
    assert gate(torch.randn(2, 5, 9, 9)).shape == (2, 7)


def test_a_mask_needs_more_than_one_half():
    block = DynamicConvBlock(nn.Conv2d(1, 2, 1))
    with torch.no_grad():
        block.gate.linear.weight.zero_()
        block.gate.linear.bias.copy_(torch.tensor([0.0, 1e-3]))
    block(torch.ones(1, 1, 2, 2))
    assert block.last.mask.tolist() == [[0, 1]]


# ---- the wrapped model


@every_model
@both_residuals
@pytest.mark.parametrize("training", [True, False])
def test_with_all_gates_on_it_is_the_model(name, residual, training):
    model, wrapped, x = build(name, residual=residual)
    for block in wrapped.blocks.values():
        force(block, torch.ones(block.conv.out_channels, dtype=torch.bool))
    model.train(training), wrapped.train(training)
    torch.testing.assert_close(wrapped(x), model(x))
    ours = wrapped.plain().state_dict()
    assert all(torch.allclose(ours[key].double(), value.double()) for key, value in model.state_dict().items())


@pytest.mark.parametrize("execute", ["mask", "gather"])
def test_with_one_channel_off_it_is_the_model_with_that_channel_zeroed(execute):
    model, wrapped, x = build("convnet", execute=execute)
    for name, block in wrapped.blocks.items():
        force(block, torch.arange(block.conv.out_channels) != (3 if name == "3" else -1))
    model[5].register_forward_hook(lambda module, args, out: out * (torch.arange(8) != 3)[:, None, None])
    torch.testing.assert_close(wrapped.eval()(x), model.eval()(x))


def test_what_is_gated_and_whose_masks_the_inputs_carry():
    def sources(wrapped: DynamicModel) -> dict[str, str | None]:
        names = {id(block): name for name, block in wrapped.blocks.items()}
        return {name: names[id(block._source[0])] if block._source else None for name, block in wrapped.blocks.items()}

    assert sources(build("convnet")[1]) == {"0": None, "3": "0", "7": "3"}
    assert sources(build("mobile")[1]) == {
        "stem.0": None, "deep.0": "stem.0", "point.0": "deep.0", "wide.0": "point.0", "back": "wide.0",
    }  # fmt: skip
    before = sources(build("resnet")[1])
    assert before["stages.0.conv1"] == "stem.0"
    assert before["stages.1.conv1"] is None  # a skip connection has filled it again
    assert before["stages.1.conv2"] == "stages.1.conv1"
    assert not any("shortcut" in name for name in before)
    after = sources(build("resnet", residual="after")[1])
    assert after["stages.1.conv1"] == "stages.0.conv2"


def test_masks_in_force_are_the_predicted_ones_in_evaluation_too():
    _, wrapped, x = build("convnet")
    spread(wrapped)
    for training in (True, False):
        seen: dict[nn.Module, Tensor] = {}
        hooks = [b.register_forward_hook(lambda m, a, out, seen=seen: seen.update({m: out})) for b in wrapped.blocks.values()]
        wrapped.train(training)(x)
        for block in wrapped.blocks.values():
            assert torch.equal(block.last.mask, (block.last.logits.sigmoid() > 0.5).float())
            assert 0 < block.last.mask.mean() < 1
            assert not seen[block].mul(1 - block.last.mask[:, :, None, None]).any()
        [hook.remove() for hook in hooks]


def test_targets_come_from_the_output_before_the_mask_also_of_activations_in_place():
    model, wrapped, x = build("plain")
    for block in wrapped.blocks.values():
        force(block, torch.zeros(block.conv.out_channels, dtype=torch.bool))
    wrapped(x)
    first = next(iter(wrapped.blocks.values()))
    torch.testing.assert_close(first.heat, model[0](x).relu().amax((2, 3)))
    assert first.targets().sum() > 6


def test_batch_norm_sees_all_filters():
    _, wrapped, x = build("convnet")
    block = next(iter(wrapped.blocks.values()))
    force(block, torch.zeros(6, dtype=torch.bool))
    block.bn.reset_running_stats()
    wrapped.train()(x)
    torch.testing.assert_close(block.bn.running_mean, 0.1 * block.conv(x).mean((0, 2, 3)))


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_which_gradients_there_are(mode):
    _, wrapped, x = build("resnet", mode=mode)
    gates = wrapped.param_groups()[1]["params"]
    model = wrapped.param_groups()[0]["params"]
    wrapped(x)
    grads = torch.autograd.grad(wrapped.aux_loss(), model, allow_unused=True)
    assert any(g is not None and g.any() for g in grads) == (mode == "joint")
    wrapped(x)
    assert all(g.any() for g in torch.autograd.grad(wrapped.aux_loss(), gates))
    grads = torch.autograd.grad(wrapped(x).square().sum(), gates, allow_unused=True)
    assert all(g is None for g in grads)


def test_the_loss_sums_over_channels_and_averages_over_samples_and_layers():
    _, wrapped, x = build("plain", loss_weight=0.5)
    wrapped(x)
    total = 0.0
    for block in wrapped.blocks.values():
        p, g = block.last.logits.double(), block.targets().double()
        total += -(g * p.sigmoid().log() + (1 - g) * (1 - p.sigmoid()).log()).sum(1).mean()
    assert wrapped.aux_loss().item() == pytest.approx(0.5 * total.item() / 2, rel=1e-5)


def test_a_batch_said_twice_has_the_same_loss():
    _, wrapped, x = build("convnet")
    spread(wrapped)
    for block in wrapped.blocks.values():
        block.bn.eval()
    wrapped(x)
    once = wrapped.aux_loss()
    wrapped(torch.cat([x, x]))
    torch.testing.assert_close(wrapped.aux_loss(), once)


def test_the_mask_loss_teaches_the_gates():
    _, wrapped, x = build("convnet", mass=0.8)
    optimizer = torch.optim.SGD(wrapped.param_groups(lr=0.0, mask_lr=0.5), lr=0.0, momentum=0.9)
    wrapped(x)
    before, accuracy = wrapped.aux_loss().item(), wrapped.mask_accuracy().item()
    for _ in range(150):
        wrapped(x)
        optimizer.zero_grad()
        wrapped.aux_loss().backward()
        optimizer.step()
    wrapped(x)
    assert wrapped.aux_loss().item() < 0.8 * before
    assert wrapped.mask_accuracy() > accuracy + 0.1


def test_the_accuracy_counts_channels():
    _, wrapped, x = build("plain")
    wrapped(x)
    expected = [(b.last.mask == b.targets()).double().mean() for b in wrapped.blocks.values()]
    assert wrapped.mask_accuracy() == sum(expected) / 2
    wrapped.eval()(x)
    assert 0 <= wrapped.mask_accuracy() <= 1


def test_the_mask_loss_is_zero_in_evaluation_and_unknown_before_a_pass():
    _, wrapped, x = build("plain")
    for call in (wrapped.aux_loss, wrapped.mask_accuracy, wrapped.macs):
        with pytest.raises(RuntimeError, match="no forward pass"):
            call()
    wrapped.eval()(x)
    assert wrapped.aux_loss() == 0
    assert wrapped.aux_loss().shape == ()


@pytest.mark.parametrize("execute", ["mask", "gather"])
def test_the_mask_loss_needs_a_pass_in_training_mode(execute):
    _, wrapped, x = build("plain", execute=execute)
    wrapped.eval()(x)
    wrapped.train()
    with pytest.raises(RuntimeError, match="training mode"):
        wrapped.aux_loss()
    wrapped(x)
    assert wrapped.aux_loss() > 0


@pytest.mark.parametrize(
    ("optimizer", "how"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {}), (torch.optim.AdamW, {})],
    ids=["SGD", "Adam", "AdamW"],
)
@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_after_the_cooldown_gates_are_frozen_bit_for_bit(mode, optimizer, how):
    _, wrapped, x = build("convnet", cooldown=0.5, mode=mode)
    optimizer = optimizer(wrapped.parameters(), lr=0.1, weight_decay=0.1, **how)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        (wrapped(x).square().sum() + wrapped.aux_loss()).backward()
        optimizer.step()

    gates = lambda: [p.detach().clone() for p in wrapped.param_groups()[1]["params"]]  # noqa: E731
    first = gates()
    step()
    wrapped.advance(0.49)
    step()
    moved = gates()
    assert all(not torch.equal(a, b) for a, b in zip(first, moved, strict=True))
    wrapped.advance(0.5)
    weights = wrapped.param_groups()[0]["params"][0].detach().clone()
    step()
    assert wrapped.aux_loss() == 0
    assert all(torch.equal(a, b) for a, b in zip(moved, gates(), strict=True))
    assert all(p.grad is None for p in wrapped.param_groups()[1]["params"])
    assert not torch.equal(weights, wrapped.param_groups()[0]["params"][0])
    wrapped.advance(0.0)  # another training
    step()
    assert all(not torch.equal(a, b) for a, b in zip(moved, gates(), strict=True))


def test_the_cooldown_leaves_gates_frozen_by_hand_alone():
    _, wrapped, _ = build("convnet", cooldown=0.5)
    gates = wrapped.param_groups()[1]["params"]
    gates[0].requires_grad_(False)
    for progress, trained in ((0.2, True), (0.4, True), (0.6, False), (0.8, False), (0.0, True), (0.7, False), (0.1, True)):
        wrapped.advance(progress)
        assert [p.requires_grad for p in gates] == [False] + [trained] * (len(gates) - 1)


def test_without_a_time_before_the_cooldown_gates_are_frozen_from_the_start():
    _, wrapped, x = build("convnet", cooldown=0.0)
    assert not any(p.requires_grad for p in wrapped.param_groups()[1]["params"])
    wrapped(x)
    assert wrapped.aux_loss() == 0
    assert all(p.requires_grad for p in build("convnet", cooldown=0.1)[1].parameters())


def test_parameter_groups():
    model, wrapped, _ = build("resnet")
    own, gates = wrapped.param_groups()
    assert not {"lr", "weight_decay"} & set(own)
    assert "lr" not in gates
    assert gates["weight_decay"] == 0
    assert len(own["params"]) == len(list(model.parameters()))
    assert {id(p) for group in (own, gates) for p in group["params"]} == {id(p) for p in wrapped.parameters()}
    own, gates = wrapped.param_groups(0.01, 0.1)
    assert (own["lr"], gates["lr"]) == (0.01, 0.1)


# ---- multiply-accumulates


def convolution_macs(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution] // 2


@every_model
@both_residuals
def test_all_on_it_costs_what_the_model_does(name, residual):
    model, wrapped, x = build(name, residual=residual)
    with wrapped.opened():
        wrapped(x)
    dense = convolution_macs(model, x[:1])
    assert wrapped.macs().tolist() == [dense] * 6
    assert wrapped.macs("dense").tolist() == [dense] * 6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1])
    assert wrapped.macs(others=True)[0] == counter.get_total_flops() // 2
    gates = sum(block.gate.linear.weight.numel() for block in wrapped.blocks.values())
    assert wrapped.macs(gates=True)[0] == dense + gates


def test_costs_add_up_over_layers_and_count_what_is_on():
    _, wrapped, x = build("convnet")
    spread(wrapped)
    wrapped.eval()(x)
    blocks = list(wrapped.blocks.values())
    assert torch.equal(wrapped.macs(), sum(block.macs() for block in blocks))
    on = [block.last.mask.sum(1).double() for block in blocks]
    assert torch.equal(wrapped.macs(), 64 * 9 * on[0] + 64 * 9 * on[0] * on[1] + 16 * 9 * on[1] * on[2])
    assert torch.equal(wrapped.macs("reference"), wrapped.macs())
    assert len(set(wrapped.macs().tolist())) > 1


def test_a_skip_connection_fills_the_channels_again():
    _, wrapped, x = build("resnet")
    spread(wrapped)
    wrapped.eval()(x)
    block, before = wrapped.blocks["stages.1.conv1"], wrapped.blocks["stages.0.conv2"]
    assert torch.equal(block.macs(), 16 * 9 * 6 * block.last.mask.sum(1).double())
    assert torch.equal(block.macs("reference"), 16 * 9 * before.last.mask.sum(1).double() * block.last.mask.sum(1).double())
    assert (wrapped.macs() > wrapped.macs("reference")).all()


def test_groups_count_their_own_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2), nn.ReLU()
    )
    x = torch.randn(1, 1, 4, 4)
    wrapped = DynamicMaskPruner().wrap(model, x)
    for block, kept in zip(wrapped.blocks.values(), ([1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0, 0, 1]), strict=True):
        force(block, torch.tensor(kept) == 1)
    wrapped.eval()(x)
    first, depthwise, grouped = wrapped.blocks.values()
    assert first.macs() == 16 * 2
    assert depthwise.macs() == 4 * 9 * 1  # channel 0 alone is on at both ends
    assert depthwise.macs("reference") == 0  # 2 // 4
    assert grouped.macs() == 4 * (3 * 1 + 1 * 2)
    assert grouped.macs("reference") == 4 * 4 * (3 // 2)
    with pytest.raises(ValueError, match="count"):
        wrapped.macs("all")


# ---- skipping filters


@every_model
@both_residuals
def test_skipping_filters_changes_nothing(name, residual):
    _, wrapped, x = build(name, residual=residual)
    spread(wrapped)
    wrapped.eval()
    expected, macs = wrapped(x), wrapped.macs()
    wrapped.execute = "gather"
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(wrapped.macs(), macs)
    for i in range(6):
        torch.testing.assert_close(wrapped(x[i : i + 1]), expected[i : i + 1], rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="gather"):
        wrapped.mask_accuracy()
    assert wrapped.report([x]).mask_accuracy is None
    wrapped.train()(x)
    assert wrapped.aux_loss() > 0


@pytest.mark.parametrize("layers", ["all", "norms"])
def test_skipping_filters_of_masked_layers(layers):
    torch.manual_seed(0)
    model, x = ConvNet(1, 4, (6, 8, 8)), torch.randn(6, 1, 8, 8)
    if layers == "all":
        GlobalMagnitudePruner(0.5).fit(model).apply(model)
    else:
        for norm in (model[1], model[4], model[8]):
            torch_prune.random_unstructured(norm, "weight", 0.5)
    wrapped = DynamicMaskPruner().wrap(model, x)
    spread(wrapped)
    with torch.no_grad():
        for parameter in wrapped.param_groups()[0]["params"]:  # as an optimizer's step does
            parameter.mul_(1.5)
    wrapped.eval()
    wrapped.execute = "gather"
    skipped = wrapped(x)
    wrapped.execute = "mask"
    torch.testing.assert_close(skipped, wrapped(x), rtol=1e-5, atol=1e-5)


def test_hooks_of_layers_run_where_filters_are_skipped():
    _, wrapped, x = build("convnet", execute="gather")
    block = wrapped.eval().blocks["0"]
    for layer in (block.conv, block.bn):
        handle, seen = layer.register_forward_hook(lambda module, args, out: seen.append(out.shape[1])), []  # noqa: B023
        wrapped(x)
        assert seen == [6]
        handle.remove()


@pytest.mark.parametrize("name", ["convnet", "resnet", "mobile"])
@pytest.mark.parametrize("share", ["half", "none"])
def test_skipping_filters_under_autocast(name, share):
    _, wrapped, x = build(name, residual="after")
    spread(wrapped)
    if share == "none":
        for block in wrapped.blocks.values():
            force(block, torch.zeros(block.conv.out_channels, dtype=torch.bool))
    wrapped.eval()
    with torch.autocast("cpu", torch.bfloat16):
        wrapped.execute = "gather"
        skipped, one = wrapped(x), wrapped(x[:1])
        wrapped.execute = "mask"
        expected = wrapped(x)
        block = next(iter(wrapped.blocks.values()))
        for block.execute in ("gather", "mask"):
            assert block(x).dtype == torch.bfloat16
    assert skipped.dtype == expected.dtype
    torch.testing.assert_close(skipped, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(one, expected[:1], rtol=0.05, atol=0.05)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), groups=st.sampled_from([1, 2, 4]), multiplier=st.integers(1, 2), stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, (2, 1), "valid"]), mode=st.sampled_from(["zeros", "circular"]), bias=st.booleans(),
    norm=st.sampled_from([None, "affine", "plain", "no statistics"]), batch=st.integers(1, 3), share=st.sampled_from([0.0, 0.3, 0.7]),
)  # fmt: skip
def test_skipping_filters_of_any_convolution(seed, groups, multiplier, stride, padding, mode, bias, norm, batch, share):
    torch.manual_seed(seed)
    conv = nn.Conv2d(
        4, 4 * multiplier, 3, stride, padding, groups=groups, bias=bias, padding_mode="zeros" if padding == "valid" else mode
    )
    bn = norm and nn.BatchNorm2d(4 * multiplier, affine=norm == "affine", track_running_stats=norm != "no statistics")
    block, source = DynamicConvBlock(conv, bn, nn.ReLU(inplace=True)), DynamicConvBlock(nn.Conv2d(2, 4, 1))
    x = torch.randn(batch, 2, 7, 6)
    if bn:
        block(torch.randn(8, 4, 7, 6))
    block._source = (source,)
    for gate in (block.gate, source.gate):
        nn.init.normal_(gate.linear.bias, torch.distributions.Normal(0, 1).icdf(torch.tensor(share + 1e-9)).item())
        nn.init.normal_(gate.linear.weight, std=3.0 if share else 0.0)
    block.eval(), source.eval()
    expected = block(source(x))
    block.execute = "gather"
    torch.testing.assert_close(block(source(x)), expected, rtol=1e-5, atol=1e-5)


# ---- finding blocks


def test_some_blocks_by_name():
    model, wrapped, x = build("convnet", blocks=["3"])
    assert list(wrapped.blocks) == ["3"]
    with wrapped.opened():
        wrapped(x)
    assert wrapped.macs()[0] == convolution_macs(model, x[:1])
    wrapped.eval()(x)
    assert (wrapped.macs()[0] - 64 * 9 * 6 - 16 * 9 * 64) % (64 * 9 * 6) == 0
    with pytest.raises(ValueError, match=r"'head'.*gated: 0, 3, 7"):
        build("convnet", blocks=["head"])


class Branching(nn.Module):
    """What torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.GELU())
        self.last = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(self.body(x))
        return h if h.sum() > 0 else h * 2


def test_a_model_that_cannot_be_traced_needs_a_list():
    torch.manual_seed(0)
    model, x = Branching(), torch.randn(3, 1, 6, 6)
    with pytest.raises(ValueError, match=r"cannot trace.*triples"):
        DynamicMaskPruner().wrap(model, x)
    wrapped = DynamicMaskPruner(blocks=[("body.0", "body.1", "body.2"), ("last", None, None)]).wrap(model, x)
    assert list(wrapped.blocks) == ["body.0", "last"]
    assert len(list(wrapped.param_groups()[0]["params"])) == len(list(model.parameters()))
    with wrapped.opened():
        torch.testing.assert_close(wrapped.eval()(x), model.eval()(x))
    assert wrapped.macs()[0] == convolution_macs(model, x[:1])
    assert isinstance(wrapped.plain().body[1], nn.BatchNorm2d)
    assert wrapped.plain().state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([("body.1", None, None)], "'body.1' must be a Conv2d of the model, it is BatchNorm2d"),
        ([("body.0", "body.2", None)], "'body.2' must be a BatchNorm2d"),
        ([("body.0", "norm", None)], "'norm' .* it is nothing"),
        ([("body.0", "body.1")], "a triple"),
        (["body.0", ("last", None, None)], "not both"),
    ],
)
def test_a_list_that_does_not_fit(blocks, message):
    with pytest.raises(ValueError, match=message):
        DynamicMaskPruner(blocks=blocks).wrap(Branching(), torch.randn(2, 1, 6, 6))


def test_an_activation_used_elsewhere_is_noticed():
    class Shared(Branching):
        def forward(self, x: Tensor) -> Tensor:
            h = self.last(self.body(x))
            return self.body[2](h) if h.sum() > -1e9 else h

    with pytest.raises(ValueError, match="also used elsewhere"):
        DynamicMaskPruner(blocks=[("body.0", "body.1", "body.2")]).wrap(Shared(), torch.randn(2, 1, 6, 6))


def test_an_operation_in_place_on_the_input_of_a_block_is_named():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 1
            out = self.conv(h)
            h.add_(1.0)
            return out.relu() + h

    with pytest.raises(ValueError, match="in place"):
        DynamicMaskPruner().wrap(InPlace(), torch.randn(2, 1, 6, 6))


def test_a_forward_that_changes_with_the_mode_is_refused():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.conv(x).relu(), 0.5, self.training)

    with pytest.raises(ValueError, match="training"):
        DynamicMaskPruner().wrap(Dropping(), torch.randn(2, 1, 6, 6))


def test_a_model_without_blocks_says_what_was_seen():
    for model, x, seen in (
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.randn(2, 4), r"1 \(Linear\)"),
        (nn.Sequential(nn.Conv2d(1, 3, 1), nn.Softmax(1)), torch.randn(2, 1, 3, 3), r"0 \(Conv2d followed by 1\)"),
    ):
        with pytest.raises(ValueError, match=f"no block to gate.*{seen}"):
            DynamicMaskPruner().wrap(model, x)


def test_logits_and_shared_convolutions_are_not_gated():
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), conv, nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(3, 2, 1))
    assert list(DynamicMaskPruner().wrap(model, torch.randn(1, 1, 4, 4)).blocks) == ["0"]


class Tied(nn.Module):
    """Two convolutions, or two norms, with one weight."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
        self.second, self.norm2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.third, self.norm3 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        if norms:
            self.norm3.weight = self.norm2.weight
        else:
            self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.first(x)))
        h = F.relu(self.norm2(self.second(h)))
        return self.head(F.relu(self.norm3(self.third(h))).mean((2, 3)))


@pytest.mark.parametrize("norms", [False, True])
def test_layers_with_one_weight_are_not_gated(norms):
    torch.manual_seed(0)
    model, x = Tied(norms), torch.randn(4, 1, 8, 8)
    wrapped = DynamicMaskPruner().wrap(model, x)
    assert list(wrapped.blocks) == ["first"]
    with wrapped.opened():
        torch.testing.assert_close(wrapped(x), model(x))
    assert set(wrapped.static_plan(0.0, [x]).masks) == {"first.weight", "first.bias", "norm1.weight", "norm1.bias"}
    with pytest.raises(ValueError, match=r"'third'.*third \(shares its weights with another layer\)"):
        DynamicMaskPruner(blocks=["third"]).wrap(model, x)
    with pytest.raises(ValueError, match=r"'third'.*shares its weights"):
        DynamicMaskPruner(blocks=[("third", "norm3", None)]).wrap(model, x)


# ---- what the gates do


def test_the_estimate_is_the_cost_of_the_targets():
    model, wrapped, x = build("plain", mass=0.7)
    estimate = wrapped.estimate_reduction([x[:4], (x[4:],)])
    h = [model.eval()[:2](x), model[:6](x)]
    on = [mass_targets(part, 0.7).double().sum(1) for part in h]
    expected = (64 * 9 * on[0] + 16 * 9 * on[0] * on[1]).sum() / (6 * (64 * 9 * 6 + 16 * 9 * 48))
    assert estimate == pytest.approx(1 - expected.item())
    assert wrapped.training
    assert not any(block.open for block in wrapped.blocks.values())


def test_the_report_counts_every_sample_once():
    _, wrapped, x = build("convnet")
    spread(wrapped)
    report = wrapped.report([(x[:5], None), (x[5:], None)])
    wrapped.eval()(x)
    for name, block in wrapped.blocks.items():
        torch.testing.assert_close(report.frequency[name], block.last.mask.mean(0).double())
    assert report.macs == pytest.approx(wrapped.macs().mean().item())
    assert report.macs_cut == pytest.approx(1 - (wrapped.macs().mean() / wrapped.macs("dense").mean()).item())
    assert report.mask_accuracy == pytest.approx(wrapped.mask_accuracy().item())
    with pytest.raises(ValueError, match="no batch"):
        wrapped.report([])


def test_a_static_plan_removes_what_is_almost_never_chosen():
    _, wrapped, x = build("convnet")
    with pytest.raises(RuntimeError, match="report"):
        wrapped.static_plan(0.1)
    spread(wrapped)
    report = wrapped.report([x])
    plan = wrapped.static_plan(0.5)
    for name, norm in (("0", "1"), ("3", "4"), ("7", "8")):
        kept = report.frequency[name] > 0.5
        kept[report.frequency[name].argmax()] = True
        assert torch.equal(plan.masks[f"{name}.weight"].flatten(1).all(1), kept)
        assert torch.equal(plan.masks[f"{norm}.bias"], kept)
    assert torch.equal(wrapped.static_plan(0.5, [x[:3]]).masks["0.weight"], wrapped.static_plan(0.5).masks["0.weight"])
    for block in wrapped.blocks.values():
        force(block, torch.zeros(block.conv.out_channels, dtype=torch.bool))
    assert all(mask.any() for mask in wrapped.static_plan(0.5, [x]).masks.values())
    with pytest.raises(ValueError, match="threshold"):
        wrapped.static_plan(1.0)


@pytest.mark.parametrize("name", ["convnet", "resnet"])
def test_the_derived_network_is_plain_and_without_the_channels_never_chosen(name):
    pytest.importorskip("torch_pruning")
    _, wrapped, x = build(name)
    for block in wrapped.blocks.values():
        force(block, torch.arange(block.conv.out_channels) % 2 == 0)
    small, plan = DynamicMaskPruner().derive(wrapped, [x])
    assert not any(isinstance(module, DynamicConvBlock | MaskPredictor) for module in small.modules())
    torch.testing.assert_close(small.eval()(x), wrapped.eval()(x))  # here all samples choose alike
    assert 0.4 < plan.sparsity() < 0.6
    if name == "convnet":
        assert [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)] == [3, 4, 4]
        assert wrapped.macs()[0] == convolution_macs(small, x[:1])
    with pytest.raises(TypeError, match="DynamicModel"):
        DynamicMaskPruner().derive(small, [x])


def test_a_channel_chosen_once_stays_in_the_derived_network():
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    x = torch.rand(200, 1, 8, 8)
    wrapped = DynamicMaskPruner(softmax=False).wrap(plain_cnn(), x[:2])
    x[0] += 9.0
    for block in wrapped.blocks.values():
        force(block, torch.ones(block.conv.out_channels, dtype=torch.bool))
    with torch.no_grad():
        linear = wrapped.blocks["0"].gate.linear
        linear.bias[:2] = torch.tensor([-5.0, -torch.inf])  # the first channel for bright samples alone, the second for none
        linear.weight[0] = 1.0
    small, plan = DynamicMaskPruner().derive(wrapped, [x])
    assert wrapped.report([x]).frequency["0"].tolist() == [0.005, 0, 1, 1, 1, 1]
    assert plan.masks["0.bias"].tolist() == [True, False, True, True, True, True]
    assert small[0].out_channels == 5


@pytest.mark.parametrize("blocks", ["auto", [("stem.0", "stem.1", "stem.2")]])
def test_the_derived_network_has_the_dtype_that_the_model_has_now(blocks):
    pytest.importorskip("torch_pruning")
    _, wrapped, x = build("mobile", blocks=blocks)
    for block in wrapped.blocks.values():
        force(block, torch.arange(block.conv.out_channels) % 4 < 3)
    wrapped.double()
    small, plan = DynamicMaskPruner().derive(wrapped, [x.double()])
    assert plan.example_inputs.dtype == torch.float64
    assert next(small.parameters()).dtype == torch.float64
    torch.testing.assert_close(small.eval()(x.double()), wrapped.eval()(x.double()))


class Scaled(nn.Module):
    """Buffers of containers, one of them assigned anew in every pass where ``counting``."""

    def __init__(self, counting: bool) -> None:
        super().__init__()
        self.counting = counting
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
        self.register_buffer("scale", torch.ones(()))
        self.body.register_buffer("shift", torch.zeros(3, 1, 1))
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.counting:
            self.passes = self.passes + 1
        return self.body(x) * self.scale + self.body.shift


@pytest.mark.parametrize("counting", [False, True])
def test_the_plain_model_has_the_buffers_as_they_are_now(counting):
    torch.manual_seed(0)
    x = torch.randn(3, 1, 6, 6)
    blocks = [("body.0", "body.1", "body.2")] if counting else "auto"
    wrapped = DynamicMaskPruner(blocks=blocks).wrap(Scaled(counting), x)
    wrapped.double()
    state = wrapped.state_dict()
    wrapped.load_state_dict({k: v + 2 if k.endswith(("scale", "shift")) else v for k, v in state.items()})
    x = x.double()
    with wrapped.opened():
        expected = wrapped.eval()(x)
    plain = wrapped.plain()
    assert (plain.scale.item(), plain.scale.dtype) == (3.0, torch.float64)
    assert plain.body.shift.flatten().tolist() == [2.0] * 3
    if counting:
        assert plain.passes == wrapped.network.passes > 0
    torch.testing.assert_close(plain(x), expected)
    plain.scale.zero_()
    assert wrapped.network.scale == 3.0


# ---- manners


def test_the_model_and_the_random_state_are_left_alone():
    model, _, x = build("resnet")
    model.stem.eval()
    next(model.parameters()).requires_grad_(False)
    model(x).sum().backward()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    wrapped = DynamicMaskPruner().wrap(model, x)
    wrapped(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True))
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(grads, (p.grad for p in model.parameters()), strict=True)
    )
    assert not wrapped.blocks["stem.0"].bn.training
    assert [wrapped.blocks[name].gate.training for name in ("stem.0", "stages.0.conv1")] == [False, True]
    assert wrapped.blocks["stages.0.conv1"].bn.training
    assert not wrapped.blocks["stem.0"].conv.weight.requires_grad


def test_gates_are_decided_by_the_seed():
    gate = lambda seed: build("plain", seed=seed)[1].blocks["0"].gate.linear.weight  # noqa: E731
    assert torch.equal(gate(1), gate(1))
    assert not torch.equal(gate(1), gate(2))


def test_gates_have_the_models_dtype():
    model, x = plain_cnn().double(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    wrapped = DynamicMaskPruner().wrap(model, x)
    (wrapped(x).sum() + wrapped.aux_loss()).backward()
    assert all(p.dtype == torch.float64 for p in wrapped.parameters())


def test_copies_and_state_dicts_after_a_step():
    _, wrapped, x = build("mobile")
    spread(wrapped)
    (wrapped(x).sum() + wrapped.aux_loss()).backward()
    twin = copy.deepcopy(wrapped)
    torch.testing.assert_close(twin.eval()(x), wrapped.eval()(x))
    assert torch.equal(twin.macs(), wrapped.macs())
    assert twin.blocks["deep.0"]._source[0] is twin.blocks["stem.0"]
    assert twin._plain[0].stem[0] is twin.blocks["stem.0"].conv
    file = io.BytesIO()
    torch.save(wrapped.state_dict(), file)
    file.seek(0)
    _, other, _ = build("mobile", seed=5)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other.eval()(x), wrapped(x))


@every_model
def test_the_model_can_be_pickled_and_saved(name):
    _, wrapped, x = build(name, execute="gather")
    spread(wrapped)
    wrapped(x)
    wrapped.eval()
    file = io.BytesIO()
    torch.save(wrapped, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(wrapped)), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin(x), wrapped(x))
        assert torch.equal(twin.macs(), wrapped.macs())
        shared = {id(p) for p in twin.parameters()}
        assert all(id(p) in shared for p in twin._plain[0].parameters())


def test_a_model_is_wrapped_once():
    _, wrapped, x = build("plain")
    for model in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(ValueError, match="already wrapped"):
            DynamicMaskPruner().wrap(model, x)


@pytest.mark.parametrize(
    "how",
    [
        {"mass": 0.0}, {"mass": 1.1}, {"mass": -0.1}, {"mass": 1.0, "target": "ratio"}, {"mode": "both"}, {"target": "top"},
        {"pool": "norm"}, {"embedding": 0}, {"loss_weight": -1.0}, {"cooldown": 1.5}, {"residual": "within"}, {"execute": "skip"},
        {"blocks": "all"},
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_named(how):
    with pytest.raises(ValueError, match=next(iter(how))):
        DynamicMaskPruner(**how)


def test_other_arguments_out_of_range_are_named():
    with pytest.raises(ValueError, match="pool"):
        MaskPredictor(2, 2, pool="norm")
    with pytest.raises(ValueError, match="mode"):
        DynamicConvBlock(nn.Conv2d(1, 1, 1), mode="both")
    _, wrapped, _ = build("plain")
    with pytest.raises(ValueError, match="execute"):
        wrapped.execute = "skip"
    for progress in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="progress"):
            wrapped.advance(progress)
