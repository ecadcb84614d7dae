"""The plain U-Net."""

from __future__ import annotations

import pickle

import pytest
import torch

from weightroom.nets import UNet


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("size", [8, 9, 11])
def test_logits_have_the_size_of_the_input_whether_or_not_it_divides(dims, size):
    net = UNet(dims, 2, 3)
    assert net(torch.randn(2, 2, *[size] * dims)).shape == (2, 3, *[size] * dims)


def test_deep_supervision_halves_the_size_from_output_to_output_and_only_while_training():
    net = UNet(2, 1, 1, channels=(4, 6, 8, 10, 12), deep_supervision=True)
    x = torch.randn(2, 1, 32, 32)
    assert [tuple(o.shape) for o in net(x)] == [(2, 1, 32, 32), (2, 1, 16, 16), (2, 1, 8, 8)]
    assert net.eval()(x).shape == (2, 1, 32, 32)


def test_a_three_level_net_has_two_supervised_outputs():
    assert [o.shape[-1] for o in UNet(3, 1, 1, deep_supervision=True)(torch.randn(1, 1, 8, 8, 8))] == [8, 4]


def test_every_parameter_gets_a_gradient_and_coarse_heads_reach_only_what_is_below_them():
    net = UNet(2, 1, 1, channels=(3, 4, 5, 6), deep_supervision=True)
    outputs = net(torch.randn(2, 1, 16, 16))
    sum(o.square().sum() for o in outputs).backward(retain_graph=True)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in net.named_parameters() if n.endswith("weight"))
    net.zero_grad()
    outputs[2].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in net.decoder[0].parameters())


def test_the_skip_connection_is_used():
    # With the way through the coarse level cut, the finest features still reach the output.
    torch.manual_seed(0)
    net = UNet(2, 1, 1, channels=(3, 4)).eval()
    torch.nn.init.zeros_(net.up[0][0].weight)
    a, b = torch.randn(2, 1, 1, 8, 8)
    assert not torch.equal(net(a), net(b))


def test_parameter_count_of_the_small_net():
    # Convolutions 9 i o without bias, batch norm 2 o, head o + 1: worked out for (2, 4) in two dimensions.
    encoder = 9 * (1 * 2 + 2 * 2 + 2 * 4 + 4 * 4) + 2 * (2 + 2 + 4 + 4)
    decoder = 9 * (4 * 2 + 4 * 2 + 2 * 2) + 2 * (2 + 2 + 2)
    assert sum(p.numel() for p in UNet(2, 1, 1, channels=(2, 4)).parameters()) == encoder + decoder + 3


def test_pickle_round_trip():
    net = UNet(2, 1, 1).eval()
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"spatial_dims": 4}, "spatial_dims"),
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": 0}, "out_channels"),
        ({"channels": (4, 0)}, "channels"),
        ({"channels": (4,)}, "channels"),
    ],
)
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        UNet(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 1, **arguments})


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 8, 8), (1, 1, 8, 3)])
def test_wrong_inputs_are_refused(shape):
    with pytest.raises(ValueError, match="got"):
        UNet(2, 1, 1)(torch.zeros(shape))
