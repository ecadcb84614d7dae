from __future__ import annotations

import builtins
import copy
import gc
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from tests.prune.zoo import ZOO, make
from weightroom import metrics, train
from weightroom.errors import MissingExtraError
from weightroom.metrics import copy_model
from weightroom.prune import (
    GlobalMagnitudePruner,
    LAMPPruner,
    PruningPlan,
    RandomPruner,
    prune_gradually,
    sparsity_at,
    successive_sparsities,
)
from weightroom.prune.base import Schedule


def keep_all(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1}


def rows_masked(model: nn.Module, rows: dict[str, list[int]], **more) -> PruningPlan:
    """A weight plan that removes all weights of some output channels."""
    masks = keep_all(model)
    for name, index in rows.items():
        masks[f"{name}.weight"][index] = False
    return PruningPlan(masks, model=model, **more)


# --- what a plan holds ---------------------------------------------------------------------------------------------------


def test_sparsity_and_layers_are_exact():
    plan = PruningPlan({"a": torch.tensor([True, False, False]), "b": torch.ones(2, 2, dtype=torch.bool)})
    assert plan.sparsity() == 2 / 7
    layers = plan.layers()
    assert list(layers) == ["a", "b"]
    assert (layers["a"].shape, layers["a"].size, layers["a"].kept, layers["a"].removed) == ((3,), 3, 1, 2)
    assert layers["a"].sparsity == 2 / 3
    assert PruningPlan({}).sparsity() == 0
    assert repr(plan) == "PruningPlan(2 tensors, sparsity 0.2857)"


def test_plans_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"mask of 'a' must be of dtype bool, got torch\.float32"):
        PruningPlan({"a": torch.ones(2)})
    mask = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"correction of 'a' needs the shape \(2,\)"):
        PruningPlan({"a": mask}, deltas={"a": torch.ones(3)})
    with pytest.raises(ValueError, match="correction of 'b' needs a mask"):
        PruningPlan({"a": mask}, deltas={"b": torch.ones(3)})


def test_channels_bring_the_masks_of_weight_and_bias():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 4, 3),
            "up": nn.ConvTranspose2d(4, 3, 2),
            "norm": nn.BatchNorm2d(3),
            "plain": nn.Linear(2, 2, bias=False),
        }
    )
    plan = PruningPlan.from_channels(model, {"conv": [3, 0, 3], "up": [1], "norm": torch.tensor([1]), "plain": []})
    assert plan.channels["conv"].tolist() == [0, 3]
    assert list(plan.masks) == ["conv.weight", "conv.bias", "up.weight", "up.bias", "norm.weight", "norm.bias", "plain.weight"]
    assert plan.masks["conv.weight"].flatten(1).any(1).tolist() == plan.masks["conv.bias"].tolist() == [False, True, True, False]
    assert (
        plan.masks["up.weight"].movedim(1, 0).flatten(1).any(1).tolist() == plan.masks["up.bias"].tolist() == [True, False, True]
    )
    assert plan.masks["norm.bias"].tolist() == [True, False, True]
    assert plan.masks["plain.weight"].all()
    with pytest.raises(ValueError, match=r"channels of 'conv' must lie in 0..3, got \[4\]"):
        PruningPlan.from_channels(model, {"conv": [4]})
    with pytest.raises(ValueError, match=r"channels of 'conv' must lie in 0..3, got \[-1\]"):
        PruningPlan.from_channels(model, {"conv": [-1]})
    with pytest.raises(ValueError, match="unknown module 'cnov': did you mean 'conv'"):
        PruningPlan.from_channels(model, {"cnov": [0]})
    with pytest.raises(ValueError, match=r"'0' \(ReLU\) has no weight"):
        PruningPlan.from_channels(nn.Sequential(nn.ReLU()), {"0": [0]})
    with pytest.raises(ValueError, match="transposed convolution with 2 groups"):
        PruningPlan.from_channels(nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2)), {"0": [0]})


# --- counting products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "mobile", "tied"])
def test_dense_macs_agree_with_torchs_own_counter(name):
    model, x, _ = make(name)
    plan = GlobalMagnitudePruner(0.0).fit(model)
    assert plan.macs(x) == metrics.macs(model, x)


def test_macs_of_layers_by_hand():
    x = torch.randn(2, 4, 5, 5)
    conv = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Conv2d(6, 3, 1))
    masks = keep_all(conv)
    masks["0.weight"][:2] = False
    assert PruningPlan(masks).macs(x, model=conv) == (4 * 2 * 9 + 18) * 2 * 9
    up = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2))
    masks = keep_all(up)
    masks["0.weight"][0] = False
    assert PruningPlan(masks).macs(x, model=up) == 3 * 6 * 4 * 2 * 25
    model, x, _ = make("lstm")
    model.train()
    assert GlobalMagnitudePruner(0.0).fit(model).macs(x) == 8 * 5 * 2 * (40 * 6 + 40 * 10) + 8 * 80
    assert model.training
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 6), torch.randn(1, 6)])
    assert GlobalMagnitudePruner(0.0).fit(model.lstm).macs((packed,)) == 4 * 2 * (40 * 6 + 40 * 10)


def test_macs_of_attention_count_queries_and_keys_apart():
    class Cross(nn.Module):
        def __init__(self, **more):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **more)

        def forward(self, q, kv):
            return self.attention(q, key=kv, value=kv)[0]

    model = Cross()
    q, kv = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    plan = GlobalMagnitudePruner(0.0).fit(model, example_inputs={"q": q, "kv": kv})
    assert plan.macs() == 2 * (16 * 3 + 2 * 16 * 5 + 16 * 3)
    plan.masks["attention.in_proj_weight"][4:8] = False  # the keys' share
    assert plan.macs() == 2 * (16 * 3 + 16 * 5 + 16 * 3)
    apart = Cross(kdim=6, vdim=6)
    kv = torch.randn(2, 5, 6)
    assert GlobalMagnitudePruner(0.0).fit(apart).macs((q, kv)) == 2 * (16 * 3 + 2 * 24 * 5 + 16 * 3)


def test_macs_count_masks_in_force_and_layers_outside_the_plan():
    model, x, _ = make("mlp")
    plan = GlobalMagnitudePruner(0.5, ignore=("4",)).fit(model)
    assert plan.macs(x) == 8 * (108 + 48)
    plan.apply(model)
    assert GlobalMagnitudePruner(0.75, ignore=("4",)).fit(model).macs(x) == 8 * (54 + 48)
    assert PruningPlan({}).macs(x, model=model) == 8 * (108 + 48)


def test_macs_need_a_model_and_an_input(tmp_path):
    model, x, _ = make("mlp")
    plan = GlobalMagnitudePruner(0.5).fit(model)
    with pytest.raises(ValueError, match="give example_inputs"):
        plan.macs()
    plan.save(tmp_path / "p")
    with pytest.raises(ValueError, match="macs needs model="):
        PruningPlan.load(tmp_path / "p").macs(x)
    assert PruningPlan.load(tmp_path / "p").macs(x, model=model) == plan.macs(x)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="macs needs model="):
        plan.macs(x)
    odd = nn.Sequential(Quadratic())
    with pytest.raises(ValueError, match=r"products of '0.weight' \(Quadratic\) cannot be counted"):
        GlobalMagnitudePruner(0.5, targets=(Quadratic,)).fit(odd).macs(torch.ones(1, 2))


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,oij,bj->bo", x, self.weight, x)


# --- putting plans together ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(first=st.floats(0, 0.45), second=st.floats(0.5, 0.99), seed=st.integers(0, 99))
def test_a_merged_plan_does_what_its_parts_do_in_turn(first, second, seed):
    model, x, _ = make("mlp", seed)
    a, b = RandomPruner(first, seed=seed).fit(model), RandomPruner(second, seed=seed + 1).fit(model)
    b.deltas = {"0.weight": torch.randn(12, 6)}
    in_turn, at_once = copy.deepcopy(model), copy.deepcopy(model)
    b.apply(a.apply(in_turn))
    a.merge(b).apply(at_once)
    assert torch.equal(in_turn(x), at_once(x))
    assert a.merge(b).sparsity() == b.merge(a).sparsity() >= max(a.sparsity(), b.sparsity())


def test_merging_joins_channels_and_adds_corrections():
    mask = torch.ones(3, dtype=torch.bool)
    a = PruningPlan({"a": mask}, channels={"m": [0, 1]}, deltas={"a": torch.ones(3)})
    b = PruningPlan({"a": mask, "b": mask}, channels={"m": [1, 2], "n": [0]}, deltas={"a": torch.ones(3), "b": torch.ones(3)})
    both = a.merge(b)
    assert {k: v.tolist() for k, v in both.channels.items()} == {"m": [0, 1, 2], "n": [0]}
    assert both.deltas["a"].tolist() == [2.0] * 3
    assert list(both.masks) == ["a", "b"]
    with pytest.raises(ValueError, match=r"'a' has shape \(3,\) in one and \(2,\) in the other"):
        a.merge(PruningPlan({"a": mask[:2]}))


def test_corrections_are_added_once_before_the_mask():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 2.0]])
    plan = PruningPlan({"0.weight": torch.tensor([[True, False]])}, deltas={"0.weight": torch.tensor([[0.5, 0.5]])})
    plan.apply(plan.apply(model))
    assert model[0].weight.tolist() == [[1.5, 0.0]]


# --- files ---------------------------------------------------------------------------------------------------------------


def test_everything_but_the_example_survives_saving(tmp_path):
    model, x, _ = make("cnn")
    plan = PruningPlan.from_channels(model, {"0": [1, 5], "3": [0]}, example_inputs=x)
    plan = plan.merge(GlobalMagnitudePruner(0.3).fit(model))
    plan.deltas = {"0.weight": torch.randn(6, 1, 3, 3).transpose(2, 3), "8.weight": torch.randn(4, 10, dtype=torch.bfloat16)}
    plan.save(tmp_path / "plan")
    loaded = PruningPlan.load(tmp_path / "plan")
    for part in ("masks", "channels", "deltas"):
        ours, theirs = getattr(plan, part), getattr(loaded, part)
        assert set(ours) == set(theirs)
        assert all(torch.equal(theirs[k], v) for k, v in ours.items())
        assert all(theirs[k].dtype == v.dtype for k, v in ours.items())
    assert list(loaded.masks) == list(plan.masks)
    assert loaded.example_inputs is None
    assert (tmp_path / "plan").stat().st_size < 3000
    PruningPlan({}).save(tmp_path / "empty")
    assert PruningPlan.load(tmp_path / "empty").masks == {}


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 5), max_size=4), seed=st.integers(0, 99))
def test_masks_of_any_shape_survive_saving(shape, seed, tmp_path_factory):
    torch.manual_seed(seed)
    path = tmp_path_factory.mktemp("plans") / "plan"
    mask = torch.rand(shape) < 0.5
    PruningPlan({"w": mask}).save(path)
    assert torch.equal(PruningPlan.load(path).masks["w"], mask)


def test_a_file_that_was_changed_is_refused(tmp_path):
    model, *_ = make("mlp")
    path = tmp_path / "plan"
    GlobalMagnitudePruner(0.5).fit(model).save(path)
    good = path.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])

    def write(header: dict, data: bytes) -> None:
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    write(header, good[8 + length :])
    PruningPlan.load(path)
    for i in (0, len(good) - 8 - length - 1):
        data = bytearray(good[8 + length :])
        data[i] ^= 1
        write(header, bytes(data))
        with pytest.raises(ValueError, match="was changed after it was written"):
            PruningPlan.load(path)
    for key, value, message in (
        ("shapes", header["__metadata__"]["shapes"].replace("[12, 6]", "[6, 12]"), "was changed"),
        ("sha256", "0" * 64, "was changed"),
        ("version", "2", "version '2'"),
        ("format", "another", "not a pruning plan: its metadata say 'another'"),
    ):
        write({**header, "__metadata__": {**header["__metadata__"], key: value}}, good[8 + length :])
        with pytest.raises(ValueError, match=message):
            PruningPlan.load(path)
    write({k: v for k, v in header.items() if k != "__metadata__"}, good[8 + length :])
    with pytest.raises(ValueError, match="not a pruning plan"):
        PruningPlan.load(path)
    for junk in (b"", b"hello", good[:-3]):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="is not a pruning plan"):
            PruningPlan.load(path)
    with pytest.raises(FileNotFoundError):
        PruningPlan.load(tmp_path / "nowhere")


# --- masks in force ------------------------------------------------------------------------------------------------------


def test_a_plan_that_does_not_fit_names_the_first_tensor_that_differs():
    model, *_ = make("mlp")
    plan = GlobalMagnitudePruner(0.5).fit(model)
    other = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 13), nn.ReLU(), nn.Linear(13, 4))
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"'2.weight' has shape \(13, 12\) in the model and \(12, 12\) in the plan"):
        plan.apply(other)
    with pytest.raises(ValueError, match=r"the model has no tensor '2.weight'"):
        plan.apply(other[:2])
    with pytest.raises(ValueError, match="the model has no module 'x'"):
        PruningPlan({}, channels={"x": [0]}).apply(other)
    with pytest.raises(ValueError, match="mode must be 'mask', 'shrink' or 'rebuild', got 'cut'"):
        plan.apply(model, "cut")
    assert list(other.state_dict()) == list(state)  # nothing was half done
    assert all(torch.equal(other.state_dict()[k], v) for k, v in state.items())


def test_masks_follow_torchs_conventions_in_place():
    model, x, _ = make("mlp")
    weight = model[0].weight
    before = weight.detach().clone()
    plan = RandomPruner(0.5, ignore=("4",)).fit(model)
    assert plan.apply(model) is model
    assert model[0].weight_orig is weight
    assert torch.equal(weight, before)
    assert torch.equal(model[0].weight_mask, plan.masks["0.weight"].float())
    assert torch.equal(model[0].weight, before * plan.masks["0.weight"])
    assert torch_prune.is_pruned(model)
    assert isinstance(model[4].weight, nn.Parameter)
    out = model(x)
    for i in (0, 2):
        torch_prune.remove(model[i], "weight")
    assert torch.equal(model(x), out)
    assert not torch_prune.is_pruned(model)


def test_a_mask_in_force_is_never_widened():
    model, *_ = make("mlp")
    first = RandomPruner(0.5, seed=0).fit(model)
    second = RandomPruner(0.5, seed=1).fit(model)
    second.apply(first.apply(model))
    assert torch.equal(model[2].weight_mask.bool(), first.masks["2.weight"] & second.masks["2.weight"])
    assert sum(isinstance(h, torch_prune.BasePruningMethod) for h in model[2]._forward_pre_hooks.values()) == 1


def test_attention_sees_its_masked_output_layer_after_every_step():
    model, x, y = make("attention")
    RandomPruner(0.5).fit(model).apply(model)
    RandomPruner(0.6).fit(model).apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    out = model(x)
    attention = model.encoder.self_attn
    assert len(attention._forward_pre_hooks) == 2
    assert torch.equal(attention.out_proj.weight, attention.out_proj.weight_orig * attention.out_proj.weight_mask)
    for module, attribute in ((attention, "in_proj_weight"), (attention.out_proj, "weight"), (model.encoder.linear1, "weight")):
        torch_prune.remove(module, attribute)
    torch.testing.assert_close(model(x), out)


@pytest.mark.parametrize("name", ZOO)
def test_masked_models_can_be_copied_after_a_training_step(name):
    model, x, y = make(name)
    RandomPruner(0.5).fit(model).apply(model)
    copy.deepcopy(model)  # right after masking torch's own way works too
    nn.functional.cross_entropy(model(x), y).backward()
    twin = copy_model(model)
    model.eval()
    twin.eval()
    assert torch.equal(twin(x), model(x))
    assert all(p.grad is None for p in twin.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert model(x).any()
    assert not twin(x).any()


def test_fit_on_a_masked_model_after_a_step_leaves_its_weights_alone():
    model, x, y = make("mlp")
    RandomPruner(0.5).fit(model).apply(model)
    out = model(x)
    weight = model[0].weight
    plan = GlobalMagnitudePruner(0.8).fit(model, example_inputs=x)
    plan.macs()
    assert model[0].weight is weight
    nn.functional.cross_entropy(out, y).backward()  # the graph is still whole


# --- channels that go ----------------------------------------------------------------------------------------------------

tp = pytest.importorskip("torch_pruning")


def same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-5, atol=1e-6))


def unchanged(small: nn.Module, plan: PruningPlan, model: nn.Module, x: Tensor) -> bool:
    """Whether the small model does what the masked one does, on ``x`` and on inputs that nobody has seen."""
    masked = plan.apply(copy.deepcopy(model))
    return all(same(small(z), masked(z)) for z in (x, torch.zeros_like(x), torch.randn_like(x), 30 * torch.randn_like(x)))


def test_dead_neurons_go_and_the_output_stays():
    model, x, _ = make("mlp")
    with torch.no_grad():
        model[0].bias[[1, 4]] = torch.tensor([0.0, -0.3])  # relu makes the second one zero, too
        model[0].bias[7] = 0.3  # a constant, but not zero
    plan = rows_masked(model, {"0": [1, 4, 7]}, example_inputs=x)
    state = copy.deepcopy(model.state_dict())
    small = plan.apply(model, mode="shrink")
    assert small[0].weight.shape == (10, 6)
    assert small[2].weight.shape == (12, 10)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert unchanged(small, plan, model, x)
    assert not torch_prune.is_pruned(small)
    assert all(p.grad is None and p.requires_grad for p in small.parameters())


def test_death_spreads_and_at_least_one_channel_is_left():
    model, x, _ = make("mlp")
    with torch.no_grad():
        model[0].bias.zero_()
        model[2].bias.zero_()
    masks = keep_all(model)
    masks["0.weight"][:4] = False
    masks["2.weight"][0, 4:] = False  # lives on the four that die
    small = PruningPlan(masks).apply(model, "shrink", example_inputs=x)
    assert [m.weight.shape for m in small if hasattr(m, "weight")] == [(8, 6), (11, 8), (4, 11)]
    assert unchanged(small, PruningPlan(masks), model, x)
    masks["0.weight"][:] = False
    empty = PruningPlan(masks).apply(model, "shrink", example_inputs=x)
    assert [m.weight.shape for m in empty if hasattr(m, "weight")] == [(1, 6), (1, 1), (4, 1)]
    assert same(empty(x), model[4].bias.expand(8, 4))


def test_a_constant_behind_a_norm_is_not_dead_unless_it_is_zero():
    model, x, _ = make("cnn")
    model = nn.Sequential(model[0], nn.BatchNorm2d(6), *model[1:])
    model.eval()
    with torch.no_grad():
        model[0].bias.zero_()
        model[1].running_mean.normal_()
        model[1].bias[:3] = torch.tensor([-5.0, 5.0, 0.0])
        model[1].running_mean[2] = 0.0
    plan = rows_masked(model, {"0": [0, 1, 2]})
    small = plan.apply(model, "shrink", example_inputs=x)
    assert small[0].out_channels == small[1].num_features == 4  # the norm of channel 1 makes it 5
    assert torch.equal(small[1].running_mean, model[1].running_mean[[1, 3, 4, 5]])
    assert unchanged(small, plan, model, x)
    assert not small.training


def test_added_channels_go_only_together():
    model, x, _ = make("residual")
    model.eval()
    with torch.no_grad():
        model.down.bias.zero_()
        model.conv3.bias.zero_()
    plan = rows_masked(model, {"down": [0, 1], "conv3": [1, 2], "conv1": [5]}, example_inputs=x)
    small = plan.apply(model, "shrink")
    assert (small.conv1.out_channels, small.bn1.num_features, small.conv2.in_channels, small.conv2.out_channels) == (7, 7, 7, 8)
    assert (small.down.out_channels, small.conv3.out_channels, small.head.in_features) == (11, 11, 11)
    assert unchanged(small, plan, model, x)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["mlp", "cnn", "residual", "mobile", "vgg", "attention", "tied", "shuffle", "input added"]),
    sparsity=st.floats(0.5, 0.99),
    seed=st.integers(0, 99),
    zero=st.booleans(),
    example=st.sampled_from([torch.zeros_like, torch.ones_like, torch.randn_like]),
)
def test_shrinking_never_changes_the_output(name, sparsity, seed, zero, example):
    model, x, _ = make(name, seed)
    if zero:
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.data.zero_()
    model.eval()
    plan = RandomPruner(sparsity, seed=seed).fit(model)
    small = plan.apply(model, "shrink", example_inputs=example(x))
    assert unchanged(small, plan, model, x)
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_shrinking_never_changes_the_output_of_a_transformer(name):
    model, x, _ = make(name)
    model.eval()
    hidden = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith("fc1")]
    plan = RandomPruner(0.4).fit(model)
    with torch.no_grad():
        for n in hidden:
            plan.masks[f"{n}.weight"][:3] = False
            model.get_submodule(n).bias[:3] = torch.tensor([0.0, 0.0, 0.5])  # two zeros and a constant
    small = plan.apply(model, "shrink", example_inputs=torch.zeros_like(x))
    assert [small.get_submodule(n).out_features for n in hidden] == [model.get_submodule(n).out_features - 2 for n in hidden]
    assert unchanged(small, plan, model, x)


class Glued(nn.Module):
    """A convolution and one that reads it, with something between the two."""

    def __init__(self, glue, norm: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c, self.norm, self.glue = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 4, 3), norm, glue

    def forward(self, x):
        h = self.a(x)
        return self.c(torch.relu(self.glue(h if self.norm is None else self.norm(h))))


class ChannelNorm(nn.Module):
    """A norm over channels that is not torch's own."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight[:, None, None] * x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)


def shuffled(h: Tensor) -> Tensor:
    n, _, *size = h.shape
    return h.view(n, 2, -1, *size).transpose(1, 2).reshape(n, -1, *size)


REORDER = {
    "shuffle": shuffled,
    "flip": lambda h: h.flip(1),
    "roll": lambda h: h.roll(1, 1),
    "index": lambda h: h[:, [5, 4, 3, 2, 1, 0]],
    "chunk": lambda h: torch.cat(h.chunk(2, 1)[::-1], 1),
    "slice": lambda h: torch.cat([h[:, 3:], h[:, :3]], 1),
}
MIX = {"mean": lambda h: h - h.mean(1, keepdim=True), "softmax": lambda h: h.softmax(1)}


@pytest.mark.parametrize("example", [torch.zeros, torch.ones, torch.randn])
@pytest.mark.parametrize("name", [*REORDER, *MIX])
def test_channels_that_are_reordered_or_mixed_stay(name, example):
    model = Glued({**REORDER, **MIX}[name]).eval()
    model.c.bias.data.zero_()
    inputs = example(2, 3, 8, 8)
    for norm in (None, nn.GroupNorm(1, 6), nn.BatchNorm2d(6), ChannelNorm(6)):
        model.norm = norm
        for channels in ([0, 2], [0, 1]):
            with pytest.raises(ValueError, match=r"cannot be cut out|does not run without the channels of 'a'"):
                PruningPlan.from_channels(model, {"a": channels}).apply(model, "shrink", example_inputs=inputs)
        plan = rows_masked(model, {"a": [0, 2]})
        small = plan.apply(model, "shrink", example_inputs=inputs)
        assert small.a.out_channels == 6
        assert unchanged(small, plan, model, torch.randn(2, 3, 8, 8))


def test_a_norm_whose_channels_are_reordered_keeps_them_all():
    class Flipped(Glued):
        def forward(self, x):
            return self.c(self.norm(self.a(x).flip(1)).flip(1))  # right for the reader, not for the norm

    model = Flipped(None, nn.GroupNorm(1, 6)).eval()
    with pytest.raises(ValueError, match="the model reorders them or mixes them"):
        PruningPlan.from_channels(model, {"a": [0, 2]}).apply(model, "shrink", example_inputs=torch.zeros(2, 3, 8, 8))


class LastNorm(nn.LayerNorm):
    """A layer norm over the channels of images, as in ConvNeXt."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("norm", [LastNorm([6]), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True), ChannelNorm(6)])
def test_norms_run_over_the_channels_that_are_left(norm):
    model = Glued(lambda h: h, norm).eval()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x, stay = torch.randn(2, 3, 8, 8), [1, 3, 4, 5]
    for example in (x, torch.zeros_like(x)):
        small = PruningPlan.from_channels(model, {"a": [0, 2]}).apply(model, "shrink", example_inputs=example)
        assert torch.equal(small.norm.weight, norm.weight[stay])
        assert torch.equal(small.c.weight, model.c.weight[:, stay])
        assert small(x).shape == model(x).shape


def test_what_is_zero_on_the_example_alone_is_not_dead():
    model, x, _ = make("input added")
    with torch.no_grad():
        model.hidden.bias.zero_()
        model.head.bias.zero_()
    masks = keep_all(model)
    masks["body.weight"][0] = False
    masks["hidden.weight"][4, 1:] = False  # reads nothing but the first channel, which is the input's
    plan = PruningPlan(masks)
    for example in (torch.zeros_like(x), -torch.ones_like(x)):
        small = plan.apply(model, "shrink", example_inputs=example)
        assert small.hidden.out_features == 10
        assert unchanged(small, plan, model, x)


def test_what_passes_a_threshold_only_far_out_is_not_dead():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.relu(x.sum(1, keepdim=True) + self.body(x) - 20.0))

    torch.manual_seed(0)
    model, x = Late(), torch.randn(8, 6)
    plan = rows_masked(model, {"body": [0, 1]}, example_inputs=x)
    assert unchanged(plan.apply(model, "shrink"), plan, model, x)


def test_checks_need_no_telling_example():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 6, padding_idx=0)
            self.a, self.c = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

        def forward(self, tokens):
            return self.c(self.a(self.words(tokens)).flip(-1))

    plan = PruningPlan({}, channels={"a": [0, 1]})
    with pytest.raises(ValueError, match="the model reorders them or mixes them"):
        plan.apply(Words(), "shrink", example_inputs=torch.zeros(2, 5, dtype=torch.int64))  # all padding: zeros everywhere


def test_channels_that_reach_an_output_unseen_stay_unless_they_are_zero():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            h = self.body(x)
            return self.head(h), h.detach().square().sum(1)  # which the graph does not see

    model, x = Energy(), torch.randn(3, 6)
    with pytest.raises(ValueError, match="the model reorders them or mixes them"):
        PruningPlan({}, channels={"body": [0]}).apply(model, "shrink", example_inputs=x)
    small = PruningPlan.from_channels(model, {"body": [0]}).apply(model, "shrink", example_inputs=x)
    assert small.body.out_features == 4
    masked = PruningPlan.from_channels(model, {"body": [0]}).apply(copy.deepcopy(model))
    assert all(same(a, b) for a, b in zip(small(x), masked(x), strict=True))


def test_what_a_layer_has_read_is_seen_before_it_changes_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(5, 2)

        def forward(self, x):
            h = self.body(x)
            return self.one(h) + self.two(h.relu_())

    model, x = InPlace(), torch.randn(3, 6)
    model.body.bias.data[:2] = torch.tensor([0.0, -0.3])
    plan = rows_masked(model, {"body": [0, 1]}, example_inputs=x)
    small = plan.apply(model, "shrink")
    assert small.body.out_features == 4
    assert unchanged(small, plan, model, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_checked_as_strictly(dtype):
    for glue in [*REORDER.values(), *MIX.values()]:
        model, x = Glued(glue).eval().to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype)
        with pytest.raises(ValueError, match=r"cannot be cut out|does not run"):
            PruningPlan.from_channels(model, {"a": [0, 2]}).apply(model, "shrink", example_inputs=x)
    model = Glued(lambda h: h).eval().to(dtype)
    assert rows_masked(model, {"a": [0, 2]}).apply(model, "shrink", example_inputs=x).a.out_channels == 4


def test_models_that_refuse_random_numbers():
    class Picky(nn.Module):
        def __init__(self, what):
            super().__init__()
            self.what, self.body, self.head = what, nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            out = self.head(torch.sigmoid(self.body(x)) - 0.5)
            assert bool((x >= 0).all() if self.what == "input" else (out.abs() < 50).all())
            return out

    x = torch.rand(3, 6)
    for what, width in (("input", 4), ("layers", 5)):  # example and random layers will do; without the latter nothing is shown
        torch.manual_seed(0)
        model = Picky(what)
        model.body.bias.data[0] = 0.0
        assert rows_masked(model, {"body": [0]}).apply(model, "shrink", example_inputs=x).body.out_features == width
    with pytest.raises(ValueError, match="cannot be cut out"):
        PruningPlan.from_channels(model, {"body": [0]}).apply(model, "shrink", example_inputs=x)


def test_checks_leave_the_random_state_alone():
    model, x, _ = make("residual")
    plan = rows_masked(model, {"conv1": [0]}, example_inputs=x)
    state = torch.get_rng_state()
    plan.apply(model, "shrink")
    assert torch.equal(torch.get_rng_state(), state)


def test_channels_named_are_cut_whatever_they_compute():
    model, x, _ = make("residual")
    model.eval()
    plan = PruningPlan.from_channels(
        model, {"conv1": [0, 3], "bn1": [0, 3], "down": [2], "conv3": [2], "bn3": [2]}, example_inputs=x
    )
    small = plan.apply(model, "shrink")
    assert (small.conv1.out_channels, small.conv2.in_channels, small.conv3.out_channels, small.head.in_features) == (6, 6, 11, 11)
    assert unchanged(small, plan, model, x)  # all that makes them is masked, norms included
    live = PruningPlan.from_channels(model, {"conv1": [0, 3]}).apply(model, "shrink", example_inputs=x)
    assert live.conv1.out_channels == 6
    stay = [1, 2, 4, 5, 6, 7]
    assert torch.equal(live.conv1.weight, model.conv1.weight[stay])
    assert torch.equal(live.conv2.weight, model.conv2.weight[:, stay])
    assert torch.equal(live.bn1.running_var, model.bn1.running_var[stay])


def test_channels_in_a_concatenation_keep_their_places():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 4, 1)
            self.norm, self.out = nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1)

        def forward(self, x):
            return self.out(self.norm(torch.cat([self.a(x), self.b(x)], 1)))

    torch.manual_seed(0)
    model = Branches().eval()
    x = torch.randn(2, 1, 4, 4)
    plan = PruningPlan.from_channels(model, {"norm": [1, 3, 6], "a": [1]})
    small = plan.apply(model, "shrink", example_inputs=x)
    assert (small.a.out_channels, small.b.out_channels, small.norm.num_features) == (2, 2, 4)
    assert torch.equal(small.out.weight, model.out.weight[:, [0, 2, 4, 5]])
    assert torch.equal(small.b.weight, model.b.weight[[1, 2]])
    assert small(x).shape == (2, 2, 4, 4)


def test_depthwise_channels_follow_their_input():
    model, x, _ = make("mobile")
    model = nn.Sequential(*model[:6], nn.Conv2d(8, 12, 1), *model[7:]).eval()
    plan = rows_masked(model, {"0": [2, 3]}, example_inputs=x)
    small = plan.apply(model, "shrink")
    assert (small[0].out_channels, small[3].groups, small[3].out_channels, small[6].in_channels) == (6, 6, 6, 6)
    assert unchanged(small, plan, model, x)


def test_channels_that_cannot_go_are_named_with_the_reason():
    cases = [
        ("mlp", {"4": [0]}, "channels of '4' cannot be cut out: they are outputs of the model"),
        ("mlp", {"0": list(range(12))}, "a layer would be left without any"),
        ("mobile", {"6": [0]}, "'6' is a convolution in 2 groups"),
        ("mobile", {"0": [0]}, "'6' is a convolution in 2 groups"),
        ("tied", {"encode": [0]}, "'encode' shares a parameter|'decode' shares a parameter"),
    ]
    for name, channels, message in cases:
        model, x, _ = make(name)
        with pytest.raises(ValueError, match=message):
            PruningPlan.from_channels(model, channels).apply(model, "shrink", example_inputs=x)
    model, x, _ = make("vit")
    with pytest.raises(ValueError, match="does not run without the channels of"):  # heads of equal width are wired into a view
        PruningPlan.from_channels(model, {"vit.vit.layers.0.attention.q_proj": [0]}).apply(model, "shrink", example_inputs=x)


def test_features_that_are_returned_as_well_stay():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            features = self.body(x)
            return {"logits": self.head(features), "features": features}

    model, x = Features(), torch.randn(3, 6)
    model.body.bias.data.zero_()
    small = rows_masked(model, {"body": [0]}).apply(model, "shrink", example_inputs=x)
    assert small.body.out_features == 5
    with pytest.raises(ValueError, match="they are outputs of the model"):
        PruningPlan.from_channels(model, {"body": [0]}).apply(model, "shrink", example_inputs=x)


def test_shrinking_says_what_it_lacks(monkeypatch):
    model, x, _ = make("mlp")
    plan = GlobalMagnitudePruner(0.5).fit(model)
    for mode in ("shrink", "rebuild"):
        with pytest.raises(ValueError, match="give example_inputs"):
            plan.apply(model, mode)
    recurrent, sequence, _ = make("lstm")
    with pytest.raises(RuntimeError, match="torch-pruning cannot trace this model"):
        GlobalMagnitudePruner(0.5).fit(recurrent).apply(recurrent, "shrink", example_inputs=sequence)
    original = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a, **k: _missing(name) if name == "torch_pruning" else original(name, *a, **k)
    )
    with pytest.raises(MissingExtraError, match=r"needs torch-pruning: pip install 'weightroom\[prune\]'"):
        plan.apply(model, "shrink", example_inputs=x)


def _missing(name: str) -> None:
    raise ModuleNotFoundError(name)


def test_shrinking_a_masked_model_makes_its_masks_permanent_and_keeps_flags():
    model, x, y = make("residual")
    plan = LAMPPruner(0.6).fit(model)
    plan.apply(model)
    nn.functional.cross_entropy(model(x), y).backward()
    model.stem.requires_grad_(False)
    model.bn.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    small = PruningPlan({}).apply(model, "shrink", example_inputs=x)
    assert {n: m.training for n, m in small.named_modules()} == modes
    assert {n for n, p in small.named_parameters() if not p.requires_grad} == {"stem.weight"}
    assert torch.equal(small.conv1.weight, model.conv1.weight_orig * model.conv1.weight_mask)
    model.eval()
    small.eval()
    assert same(small(x), model(x))


def test_rebuilding_draws_every_weight_anew():
    model, x, _ = make("residual")
    with torch.no_grad():
        model.bn.running_mean.fill_(3.0)
    plan = PruningPlan.from_channels(model, {"conv1": [0, 1, 2, 3]}, example_inputs=x)
    torch.manual_seed(5)
    first = plan.apply(model, "rebuild")
    torch.manual_seed(5)
    second = plan.apply(model, "rebuild")
    other = plan.apply(model, "rebuild")
    assert first.conv1.weight.shape == (4, 8, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert not torch.equal(first.conv2.weight, other.conv2.weight)
    assert not torch.equal(first.stem.weight, model.stem.weight)
    assert not first.bn.running_mean.any()
    assert abs(float(first.conv2.weight.detach().std()) - (1 / 36 / 3) ** 0.5) < 0.02  # torch's bound is 1 / sqrt(fan in)
    assert first(x).shape == (8, 4)


def test_rebuilding_refuses_parameters_that_nothing_resets():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.fc = nn.Parameter(torch.ones(4)), nn.Linear(6, 4)

        def forward(self, x):
            return self.scale * self.fc(x)

    model, x = Scaled(), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"needs reset_parameters\(\) on 'the model' \(Scaled\)"):
        GlobalMagnitudePruner(0.5).fit(model, example_inputs=x).apply(model, "rebuild")
    attention, x, _ = make("attention")
    rebuilt = GlobalMagnitudePruner(0.5).fit(attention, example_inputs=x).apply(attention, "rebuild")
    assert not rebuilt.encoder.self_attn.out_proj.bias.any()
    assert not torch.equal(rebuilt.encoder.self_attn.in_proj_weight, attention.encoder.self_attn.in_proj_weight)


# --- schedules -----------------------------------------------------------------------------------------------------------


def test_schedules_start_and_end_where_they_should():
    for kind in ("cubic", "geometric", "linear"):
        assert sparsity_at(kind, 0.0, 0.9, 0.2) == pytest.approx(0.2)
        assert sparsity_at(kind, 1.0, 0.9, 0.2) == 0.9
        values = [sparsity_at(kind, i / 20, 0.9, 0.2) for i in range(21)]
        assert values == sorted(values)
    assert sparsity_at("cubic", 0.5, 0.8) == pytest.approx(0.8 * 7 / 8)
    assert (sparsity_at("cubic", 1.0, 0.9) - sparsity_at("cubic", 1 - 1e-4, 0.9)) / 1e-4 < 1e-6  # flat at the end
    assert successive_sparsities(1 - 0.8**16, 16) == pytest.approx([1 - 0.8**t for t in range(1, 17)])
    assert successive_sparsities(0.9, 3, kind="linear", start=0.3) == pytest.approx([0.5, 0.7, 0.9])
    with pytest.raises(ValueError, match="kind must be"):
        sparsity_at("spline", 0.5, 0.9)
    with pytest.raises(ValueError, match="rounds must be >= 1"):
        successive_sparsities(0.9, 0)
    for final, start in ((1.0, 0.0), (0.5, 0.6), (0.5, -0.1)):
        with pytest.raises(ValueError, match="0 <= start <= final < 1"):
            successive_sparsities(final, 3, start=start)


def test_a_schedule_is_due_at_its_steps():
    schedule = Schedule.of(("cubic", 10, 25, 10))
    assert [t for t in range(60) if schedule.due(t)] == [10, 20, 25]
    assert [schedule.at(t, 0.8, 0.1) for t in (0, 10, 25, 99)] == [pytest.approx(0.1)] * 2 + [0.8] * 2
    assert [t for t in range(9) if Schedule.of("oneshot").due(t)] == [0]


def test_gradual_pruning_inside_the_training_loop():
    model, x, y = make("mlp")
    pruner = GlobalMagnitudePruner(0.8, schedule=("cubic", 2, 10, 4))
    gradual = pruner.gradual(model)
    assert gradual.plan is None
    seen = {}

    def after(step: int) -> None:
        gradual(step)
        seen[step] = sum(int((m.weight_mask == 0).sum()) for m in model if hasattr(m, "weight_mask"))

    data = torch.utils.data.TensorDataset(x, y)
    train.fit(
        model, data, loss=nn.CrossEntropyLoss(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        steps=14, batch_size=8, after_step=after, device="cpu",
    )  # fmt: skip
    half = round(0.8 * 7 / 8 * 264)
    assert [seen[t] for t in (1, 2, 5, 6, 9, 10, 14)] == [0, 0, 0, half, half, 211, 211]
    model(x)
    assert sum(int((m.weight == 0).sum()) for m in model if hasattr(m, "weight")) == 211


def test_gradual_pruning_starts_from_what_is_gone():
    model, *_ = make("mlp")
    RandomPruner(0.5).fit(model).apply(model)
    gradual = RandomPruner(0.9, schedule=("linear", 0, 4, 2)).gradual(model)
    assert gradual.start == 0.5
    gradual(2)
    assert gradual.plan.sparsity() == round(0.7 * 264) / 264
    with pytest.raises(ValueError, match="already pruned"):
        RandomPruner(0.3, schedule=("linear", 0, 4, 2)).gradual(model)
    fresh, *_ = make("mlp")
    assert RandomPruner(0.5).gradual(fresh).plan.sparsity() == 0.5  # one shot: at once
    with pytest.raises(ValueError, match="must not be empty"):
        prune_gradually(fresh, RandomPruner(0.5), [], lambda m: None)
    with pytest.raises(ValueError, match="already pruned"):
        prune_gradually(fresh, RandomPruner(0.5), [0.7, 0.6], lambda m: None)


def test_importing_the_room_does_not_import_torch_pruning():
    import subprocess
    import sys

    code = "import sys, weightroom.prune; assert 'torch_pruning' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
