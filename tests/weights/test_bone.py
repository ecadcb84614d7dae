"""Bone: what is its own; ``test_contract.py`` holds what every adapter keeps to."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from weightroom.weights import BoneConfig, BoneLinear, adapter_state_dict, bone, load_adapter, merge_, unmerge_
from weightroom.weights.bone import guided_weight

EXACT = {"rtol": 0, "atol": 1e-12}
VARIANTS = pytest.mark.parametrize("variant", ["guided", "shared"])


def assembled(W: Tensor, block: Tensor) -> Tensor:
    """W' block by block, or shard by shard, from the paper's formulas."""
    out, n_in = W.shape
    new = W.clone()
    if block.ndim == 3:
        r = block.shape[-1]
        for i in range(out // r):
            for j in range(n_in // r):
                W_ij = W[i * r : (i + 1) * r, j * r : (j + 1) * r]
                new[i * r : (i + 1) * r, j * r : (j + 1) * r] = W_ij + W_ij @ block[i] + block[i]
    else:
        for column in range(n_in):
            new[:, column] += block[column % block.shape[0]]
    return new


def layer(n_in: int, out: int, r: int, variant: str, *, bias: bool = True, seed: int = 0, **more) -> BoneLinear:
    """An adapted layer in float64 whose adapter is not at zero."""
    torch.manual_seed(seed)
    made = BoneLinear(nn.Linear(n_in, out, bias=bias, dtype=torch.float64), r, variant, **more)
    with torch.no_grad():
        made.bone["default"].normal_(std=0.3)
    return made


def x_of(*shape: int, requires_grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_(requires_grad)


# The formulas


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), r=st.integers(1, 6), n=st.integers(0, 9), bias=st.booleans())
def test_guided_is_the_dense_layer_with_the_assembled_weight(rows: int, columns: int, r: int, n: int, bias: bool) -> None:
    made, x = layer(columns * r, rows * r, r, "guided", bias=bias), x_of(n, columns * r)
    dense = assembled(made.base_layer.weight, made.bone["default"])
    torch.testing.assert_close(made(x), F.linear(x, dense, made.bias), **EXACT)
    torch.testing.assert_close(made.weight, dense, **EXACT)


@settings(max_examples=40, deadline=None)
@given(n_in=st.integers(1, 13), out=st.integers(1, 7), r=st.integers(1, 13), n=st.integers(0, 5), bias=st.booleans())
def test_shared_is_the_dense_layer_with_the_assembled_weight(n_in: int, out: int, r: int, n: int, bias: bool) -> None:
    made, x = layer(n_in, out, min(r, n_in), "shared", bias=bias), x_of(n, n_in)
    dense = assembled(made.base_layer.weight, made.bone["default"])
    torch.testing.assert_close(made(x), F.linear(x, dense, made.bias), **EXACT)
    torch.testing.assert_close(made.weight, dense, **EXACT)


@VARIANTS
@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 3, 12), (2, 0, 12), (2, 1, 3, 12)], ids=str)
def test_any_number_of_leading_dimensions(variant: str, shape: tuple[int, ...]) -> None:
    made, x = layer(12, 8, 4, variant), x_of(*shape)
    torch.testing.assert_close(made(x), F.linear(x, assembled(made.base_layer.weight, made.bone["default"]), made.bias), **EXACT)


@VARIANTS
def test_input_that_is_not_contiguous(variant: str) -> None:
    made, x = layer(12, 8, 4, variant), x_of(12, 3).t()
    torch.testing.assert_close(made(x), made(x.contiguous()), **EXACT)


@VARIANTS
@pytest.mark.parametrize("n", [2, 9], ids=["few rows", "many rows"])
@pytest.mark.parametrize("width", [6, 8, 24])
def test_input_of_the_wrong_width_is_refused(variant: str, n: int, width: int) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        layer(12, 8, 4, variant)(x_of(n, width))


@VARIANTS
@pytest.mark.parametrize("n", [2, 9], ids=["few rows", "many rows"])
def test_gradients(variant: str, n: int) -> None:
    made = layer(12, 8, 4, variant)
    block = made.bone["default"].detach().clone().requires_grad_()

    def call(x: Tensor, block: Tensor) -> Tensor:
        return torch.func.functional_call(made, {"bone.default": block}, (x,)).sin()

    assert torch.autograd.gradcheck(call, (x_of(n, 12, requires_grad=True), block))
    assert torch.autograd.gradgradcheck(call, (x_of(n, 12, requires_grad=True), block))


def test_both_ways_to_compute_the_guided_layer_agree() -> None:
    made, x = layer(24, 16, 8, "guided"), x_of(12, 24, requires_grad=True)  # 12 rows build W', 4 and 4 and 4 do not
    whole, parts = made(x), torch.cat([made(part) for part in x.split(4)])
    torch.testing.assert_close(parts, whole, **EXACT)
    inputs = (x, made.bone["default"])
    for a, b in zip(torch.autograd.grad(parts.sin().sum(), inputs), torch.autograd.grad(whole.sin().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def test_few_rows_do_not_build_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    module = sys.modules["weightroom.weights.bone"]  # the room's name "bone" is the function
    monkeypatch.setattr(module, "guided_weight", lambda W, B: built.append(1) or guided_weight(W, B))
    made = layer(24, 16, 8, "guided")
    made(x_of(7, 24))
    assert not built
    made(x_of(8, 24))
    assert built


@VARIANTS
@pytest.mark.parametrize("n", [2, 9], ids=["few rows", "many rows"])
def test_autocast_gives_what_a_linear_layer_gives(variant: str, n: int) -> None:
    made, x = layer(12, 8, 4, variant).float(), torch.randn(n, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == made.base_layer(x).dtype == torch.bfloat16


@VARIANTS
@pytest.mark.parametrize("n_in, out", [(24, 16), (64, 128), (48, 48)])
def test_parameter_count_is_out_times_r(variant: str, n_in: int, out: int) -> None:
    model = bone(nn.Linear(n_in, out), BoneConfig(r=8, variant=variant))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == out * 8


@VARIANTS
def test_start_is_the_base_layer_bit_for_bit(variant: str) -> None:
    base, x = nn.Linear(96, 64), torch.randn(40, 96)
    assert torch.equal(bone(base, BoneConfig(r=16, variant=variant))(x), base(x))


def test_guided_gradient_at_the_start_is_guided_by_the_weight() -> None:
    made, x = layer(20, 8, 4, "guided"), x_of(9, 20)
    with torch.no_grad():
        made.bone["default"].zero_()
    y = made(x)
    g_y = torch.autograd.grad(y.sin().sum(), y, retain_graph=True)[0]
    G, W = (g_y.t() @ x).view(2, 4, 5, 4), made.base_layer.weight.view(2, 4, 5, 4)
    eye = torch.eye(4, dtype=torch.float64)
    expected = torch.stack(
        [sum((W[i, :, j] + eye).t() @ G[i, :, j] for j in range(5)) for i in range(2)]
    )  # sum_j (W_ij + I)^T G_ij
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), made.bone["default"])[0], expected, **EXACT)


def test_block_acts_on_its_rows_only() -> None:
    made, x = layer(12, 20, 4, "guided"), x_of(9, 12)
    before = made(x)
    (gradient,) = torch.autograd.grad(before[:, 8:12].sin().sum(), made.bone["default"])
    assert gradient[2].abs().min() > 0
    assert gradient[[0, 1, 3, 4]].abs().max() == 0
    with torch.no_grad():
        made.bone["default"][2] += 1
    changed = (made(x) != before).any(0)
    assert changed[8:12].all()
    assert not changed[:8].any()
    assert not changed[12:].any()


def test_affine_identity() -> None:
    made = layer(12, 20, 4, "guided")
    eye = torch.eye(4, dtype=torch.float64)
    blocks = lambda W: W.view(5, 4, 3, 4).transpose(1, 2)  # noqa: E731
    expected = (blocks(made.base_layer.weight) + eye) @ (eye + made.bone["default"].unsqueeze(1)) - eye
    torch.testing.assert_close(blocks(made.weight), expected, **EXACT)


def test_one_block() -> None:
    made = layer(6, 6, 6, "guided")
    W, B = made.base_layer.weight, made.bone["default"][0]
    torch.testing.assert_close(made.weight, W @ (torch.eye(6, dtype=torch.float64) + B) + B, **EXACT)


@pytest.mark.parametrize("n_in", [24, 22])
def test_shared_update_has_rank_r_and_is_the_same_for_every_shard(n_in: int) -> None:
    made = layer(n_in, 16, 6, "shared")
    delta = made.weight - made.base_layer.weight
    assert torch.linalg.matrix_rank(delta) == 6
    for start in range(6, n_in, 6):
        width = min(6, n_in - start)
        torch.testing.assert_close(delta[:, start : start + width], delta[:, :width], **EXACT)


def test_shared_dropout_zeroes_inputs_of_the_adapter_while_training() -> None:
    made, x = layer(12, 8, 5, "shared", dropout=0.4), x_of(50, 12)
    W, D = made.base_layer.weight, made.bone["default"]
    torch.manual_seed(3)
    kept = F.dropout(F.pad(x, (0, 3)), 0.4)
    torch.manual_seed(3)
    y = made.train()(x)
    torch.testing.assert_close(y, F.linear(x, W, made.bias) + kept.view(50, 3, 5).sum(1) @ D, **EXACT)
    torch.testing.assert_close(made.eval()(x), F.linear(x, assembled(W, D), made.bias), **EXACT)


# Merging


def test_singular_block_cannot_be_unmerged_and_nothing_changes() -> None:
    torch.manual_seed(0)
    model = bone(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12)), BoneConfig(r=4)).double()
    with torch.no_grad():
        model[0].bone["default"].normal_(std=0.1)
        model[1].bone["default"][1:] = -torch.eye(4)
    merge_(model)
    blocks = model[1].weight.view(3, 4, 2, 4).transpose(1, 2)
    torch.testing.assert_close(blocks[1:], -torch.eye(4, dtype=torch.float64).expand(2, 2, 4, 4), **EXACT)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"adapter 'default' of layer '1' cannot be unmerged: I \+ B_i is singular for i in \[1, 2\]"
    ):
        unmerge_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].merged == model[1].merged == ("default",)


@pytest.mark.parametrize("tiny", [0.0, 2**-24], ids=["singular", "nearly"])
def test_a_block_that_mixes_its_columns_into_one_cannot_be_unmerged(tiny: float) -> None:
    model = bone(nn.Linear(2, 2), BoneConfig(r=2))
    with torch.no_grad():
        model.bone["default"][0] = torch.tensor([[tiny, 1.0], [1.0, tiny]])  # I + B = [[1, 1], [1, 1]] but for tiny
    with pytest.raises(RuntimeError, match="singular"):
        unmerge_(merge_(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@VARIANTS
def test_half_precision_is_merged_in_float32_and_rounded_once(variant: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = bone(nn.Linear(48, 32).to(dtype), BoneConfig(r=8, variant=variant))
    with torch.no_grad():
        model.bone["default"].normal_(std=0.05)
    expected = assembled(model.base_layer.weight.float(), model.bone["default"]).to(dtype)
    ulps = (merge_(model).base_layer.weight.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert ulps.max() <= 1  # a sum may fall on the other side of a tie, no more
    assert (ulps > 0).float().mean() < 0.01


def test_merging_leaves_a_tied_weight_alone() -> None:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False))
    model[1].weight = model[0].weight
    adapted = bone(model, BoneConfig(r=4))
    assert adapted[1].base_layer.weight is adapted[0].weight
    with torch.no_grad():
        adapted[1].bone["default"].normal_()
    expected = adapted(torch.arange(16))
    torch.testing.assert_close(merge_(adapted)(torch.arange(16)), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(adapted[0].weight, model[0].weight)


def test_modules_that_take_the_weight_see_the_adapted_one() -> None:
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True).double()
    model, x = bone(plain, BoneConfig(r=8)), x_of(2, 5, 32)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    trained = model.train()(x)
    trained.sin().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)  # out_proj of the attention among them
    assert (trained - plain(x)).abs().max() > 1e-2
    with torch.no_grad():  # torch's fused path
        torch.testing.assert_close(model.eval()(x), trained, **EXACT)
        torch.testing.assert_close(merge_(model)(x), trained, **EXACT)


# Several adapters


def test_guided_adapters_act_one_after_the_other() -> None:
    made, x = layer(12, 8, 4, "guided"), x_of(3, 12)
    made.add("second", 2)
    with torch.no_grad():
        made.bone["second"].normal_(std=0.3)
    W, first, second = made.base_layer.weight, made.bone["default"], made.bone["second"]
    torch.testing.assert_close(made(x), F.linear(x, assembled(assembled(W, first), second), made.bias), **EXACT)
    assert (assembled(assembled(W, first), second) - assembled(assembled(W, second), first)).abs().max() > 0.01
    before = W.clone()
    torch.testing.assert_close(unmerge_(merge_(made)).base_layer.weight, before, **EXACT)


def test_two_guided_adapters_of_one_rank_compose() -> None:
    made = layer(12, 8, 4, "guided")
    made.add("second", 4)
    with torch.no_grad():
        made.bone["second"].normal_(std=0.3)
    first, second = made.bone["default"], made.bone["second"]
    torch.testing.assert_close(made.weight, assembled(made.base_layer.weight, first + second + first @ second), **EXACT)


def test_shared_adapters_add_up() -> None:
    made, x = layer(12, 8, 4, "shared"), x_of(3, 12)
    made.add("second", 5)
    with torch.no_grad():
        made.bone["second"].normal_()
    W = made.base_layer.weight
    delta = sum(assembled(W, block) - W for block in made.bone.values())
    torch.testing.assert_close(made(x), F.linear(x, W + delta, made.bias), **EXACT)


@VARIANTS
def test_choosing_the_active_adapters(variant: str) -> None:
    made, x = layer(12, 8, 4, variant), x_of(3, 12)
    made.add("second", 2)
    with torch.no_grad():
        made.bone["second"].normal_()
    assert made.active == ("default", "second")
    both = made(x)
    made.active = ["second", "default"]
    assert made.active == ("default", "second")
    torch.testing.assert_close(made(x), both, **EXACT)
    made.active = "second"
    torch.testing.assert_close(made(x), F.linear(x, assembled(made.base_layer.weight, made.bone["second"]), made.bias), **EXACT)
    made(x).sum().backward()
    assert made.bone["default"].grad is None
    merge_(made)
    assert made.merged == ("second",)
    with pytest.raises(RuntimeError, match=r"\['second'\] are merged"):
        made.active = ["default"]
    unmerge_(made)
    made.active = ()
    assert torch.equal(made(x), made.base_layer(x))
    with pytest.raises(ValueError, match=r"no adapter of this layer: \['third'\]; it has \['default', 'second'\]"):
        made.active = ["third"]


def test_variants_do_not_mix_in_one_layer() -> None:
    model = bone(nn.Sequential(nn.Linear(8, 8)), BoneConfig(r=4))
    with pytest.raises(ValueError, match="layer '0' has guided adapters: a shared one cannot be added"):
        bone(model, BoneConfig(r=4, variant="shared"), adapter="other")


def test_a_second_adapter_may_have_other_targets() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = bone(bone(model, BoneConfig(r=4, target_modules=["0"])), BoneConfig(r=2), adapter="wide")
    assert [list(m.bone) for m in model] == [["default", "wide"], ["wide"]]
    assert adapter_state_dict(model).keys() == {"0.bone"}
    assert adapter_state_dict(model, adapter="wide").keys() == {"0.bone", "1.bone"}


@pytest.mark.parametrize("name", ["", "a.b", "keys", "values"])
def test_names_that_an_adapter_cannot_have(name: str) -> None:
    with pytest.raises(ValueError, match=f"adapter must be a name .*got {name!r}"):
        bone(nn.Linear(8, 8), BoneConfig(r=4), adapter=name)


# The configuration and its targets


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"r": 0}, ValueError, "r must be >= 1, got 0"),
        ({"r": -3}, ValueError, "r must be >= 1, got -3"),
        ({"r": 4.0}, TypeError, "r must be an integer >= 1, got 4.0"),
        ({"r": True}, TypeError, "r must be an integer"),
        ({"variant": "bat"}, ValueError, "variant must be 'guided' or 'shared', got 'bat'"),
        ({"variant": "shared", "dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"variant": "shared", "dropout": -0.1}, ValueError, "dropout must be in"),
        ({"dropout": 0.1}, ValueError, "dropout=0.1 needs variant='shared'"),
        ({"target_modules": [1]}, TypeError, "target_modules must be a string or a list of strings"),
        ({"exclude_modules": ["a", None]}, TypeError, "exclude_modules must be"),
    ],
    ids=str,
)
def test_configurations_that_are_wrong(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BoneConfig(**arguments)


def test_asking_for_alpha_warns() -> None:
    with pytest.warns(UserWarning, match="no scaling factor: alpha=16 has no effect") as caught:
        BoneConfig(r=8, alpha=16)
    assert caught[0].filename == __file__


def test_configurations_are_values() -> None:
    assert BoneConfig(target_modules=["q", "v"]) == BoneConfig(64, "guided", ("q", "v"), None, 0.0)
    assert len({BoneConfig(target_modules=["q"]), BoneConfig(target_modules=["q"])}) == 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.fc = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x))


EVERY = ["blocks.0.q_proj", "blocks.0.k_proj", "blocks.1.q_proj", "blocks.1.k_proj", "fc"]


@pytest.mark.parametrize(
    "target, exclude, expected",
    [
        (None, None, EVERY),
        ("all-linear", None, EVERY),
        (["q_proj"], None, [EVERY[0], EVERY[2]]),
        (("q_proj", "fc"), None, [EVERY[0], EVERY[2], "fc"]),
        (["blocks.1.k_proj"], None, [EVERY[3]]),
        (["1.k_proj", "nothing"], None, [EVERY[3]]),
        (r"blocks\.0\..*_proj", None, EVERY[:2]),
        (None, ["fc"], EVERY[:4]),
        (None, r"blocks\..*", ["fc"]),
        (["q_proj", "k_proj"], ["0.q_proj"], EVERY[1:4]),
    ],
    ids=str,
)
def test_targets(target, exclude, expected: list[str]) -> None:
    net = Network()
    model = bone(net, BoneConfig(r=4, target_modules=target, exclude_modules=exclude))
    assert [name for name, m in model.named_modules() if isinstance(m, BoneLinear)] == expected
    assert not any(isinstance(m, BoneLinear) for m in net.modules())
    assert torch.equal(model(torch.ones(9, 8)), net(torch.ones(9, 8)))


@pytest.mark.parametrize("target", [["proj"], "q_proj", "fc.*x", []], ids=str)
def test_targets_that_match_nothing_list_the_linear_layers(target) -> None:
    with pytest.raises(ValueError, match=f"no module to adapt; linear layers found: {re.escape(', '.join(map(repr, EVERY)))}$"):
        bone(Network(), BoneConfig(r=4, target_modules=target))


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(ValueError, match="linear layers found: none"):
        bone(nn.Sequential(nn.Conv2d(3, 4, 3)), BoneConfig())


@pytest.mark.parametrize("target, kind", [(["conv"], "Conv1d"), (["blocks"], "Sequential"), (r"blocks\.1.*", "Block")], ids=str)
def test_targets_that_are_not_linear(target, kind: str) -> None:
    with pytest.raises(TypeError, match=f"is a {kind}: Bone adapts nn.Linear only"):
        bone(Network(), BoneConfig(r=4, target_modules=target))


def test_rank_that_does_not_fit_names_the_layer() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 10)

    with pytest.raises(ValueError, match=r"^r=7 must divide in_features=64 and out_features=10 of layer 'fc'$"):
        bone(Small(), BoneConfig(r=7))
    for r in (5, 32):  # divides one of the two
        with pytest.raises(ValueError, match=f"^r={r} must divide in_features=64 and out_features=10 of layer 'fc'$"):
            bone(Small(), BoneConfig(r=r))
    with pytest.raises(ValueError, match=r"^r=65 must be at most in_features=64 of layer 'fc'$"):
        bone(Small(), BoneConfig(r=65, variant="shared"))
    assert bone(Small(), BoneConfig(r=64, variant="shared")).fc.bone["default"].shape == (64, 10)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "odd, message",
    [
        (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "has no ordinary weight"),
        (lambda: prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5), "has no ordinary weight"),
        (lambda: nn.LazyLinear(8), "has no ordinary weight"),
        (lambda: Scaled(8, 8), "is a Scaled: Bone adapts nn.Linear only"),
    ],
    ids=["parametrized", "pruned", "lazy", "own forward"],
)
def test_layers_whose_weight_is_not_their_own(odd, message: str) -> None:
    with pytest.raises(TypeError, match=f"layer '0' {message}"):
        bone(nn.Sequential(odd()), BoneConfig(r=4))
    with pytest.raises(TypeError, match=f"base_layer {message}"):
        BoneLinear(odd(), 4)


def test_output_head_of_a_transformers_model_is_left_out_unless_named() -> None:
    class Language(Network):
        def get_output_embeddings(self) -> nn.Module:
            return self.fc

    assert [n for n, m in bone(Language(), BoneConfig(r=4)).named_modules() if isinstance(m, BoneLinear)] == EVERY[:4]
    assert isinstance(bone(Language(), BoneConfig(r=4, target_modules=["fc"])).fc, BoneLinear)


def test_a_linear_layer_is_a_model() -> None:
    model = bone(nn.Linear(8, 12), BoneConfig(r=4))
    assert isinstance(model, BoneLinear)
    assert adapter_state_dict(model).keys() == {"bone"}
    assert adapter_state_dict(model, peft=True).keys() == {"base_model.model.bone".replace("bone", "miss_block")}
    model = bone(model, BoneConfig(r=2), adapter="more")
    assert model.active == ("default", "more")
    load_adapter(model, {"bone": torch.ones(3, 4, 4)})
    assert model.bone["default"].min() == 1


def test_a_layer_in_two_places_gets_one_adapter() -> None:
    shared = nn.Linear(8, 8)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    model = bone(net, BoneConfig(r=4))
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], BoneLinear)
    assert len(adapter_state_dict(model)) == 1
    assert bone(model, BoneConfig(r=4), adapter="more")["b"][0].active == ("default", "more")


def test_wrong_kinds_of_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        bone(lambda x: x, BoneConfig())
    with pytest.raises(TypeError, match="config must be a BoneConfig, got dict"):
        bone(nn.Linear(8, 8), {"r": 4})


def test_a_layer_wraps_and_freezes_what_it_is_given() -> None:
    base = nn.Linear(8, 12)
    made = BoneLinear(base, 4)
    assert made.base_layer is base
    assert not any(p.requires_grad for p in base.parameters())
    assert made.bias is base.bias
    with pytest.raises(ValueError, match="r=64 must divide in_features=8 and out_features=12 of base_layer"):
        BoneLinear(nn.Linear(8, 12))
    assert "guided, r={'default': 4}, active=['default'], merged=[]" in repr(made)


@VARIANTS
def test_frozen_parameters_share_memory_with_the_model_and_buffers_do_not(variant: str) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model = bone(net, BoneConfig(r=4, variant=variant))
    assert model[0].base_layer.weight.data_ptr() == net[0].weight.data_ptr()
    assert model[1].weight.data_ptr() == net[1].weight.data_ptr()
    model(torch.randn(9, 8))
    assert model[1].num_batches_tracked == 1
    assert net[1].num_batches_tracked == 0


# PEFT


@pytest.mark.parametrize("key", ["miss_block", "bone_block", "miss_block.default", "bone.other"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_keys_of_peft_are_understood(prefix: str, key: str) -> None:
    model = bone(Network(), BoneConfig(r=4, target_modules=["fc"]))
    load_adapter(model, {f"{prefix}fc.{key}": torch.full((3, 4, 4), 0.5)})
    assert model.fc.bone["default"].unique().tolist() == [0.5]


def test_a_layer_may_be_called_bone() -> None:
    net = nn.Sequential()
    net.bone = nn.Sequential(nn.Linear(8, 8))
    net.bone.bone = nn.Linear(8, 8)
    model, fresh = (bone(net, BoneConfig(r=4)) for _ in range(2))
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.fill_(i + 1)
    load_adapter(fresh, adapter_state_dict(model))
    assert [p.mean().item() for p in fresh.parameters() if p.requires_grad] == [1, 2]


def test_one_adapter_is_loaded_at_a_time() -> None:
    model = bone(nn.Sequential(nn.Linear(8, 8)), BoneConfig(r=4))
    state = {"0.bone.a": torch.zeros(2, 4, 4), "0.bone.b": torch.zeros(2, 4, 4)}
    with pytest.raises(ValueError, match="second adapter for layer '0'"):
        load_adapter(model, state)


@pytest.mark.parametrize(
    "variant, shape", [("guided", (8, 8)), ("guided", ()), ("guided", (2, 4)), ("shared", (2, 4, 4)), ("shared", (0,))], ids=str
)
@pytest.mark.parametrize("name", ["default", "new"])
def test_tensors_of_the_other_variant_or_another_shape_are_refused(variant, shape, name: str) -> None:
    model = bone(nn.Sequential(nn.Linear(8, 8)), BoneConfig(r=2, variant=variant))
    given = re.escape(str(tuple(shape)))
    with pytest.raises(ValueError, match=rf"key '0.bone' has shape {given}: the {variant} adapter of layer '0' needs"):
        load_adapter(model, {"0.bone": torch.zeros(shape)}, adapter=name)
    assert list(model[0].bone) == ["default"]


PEFT_CASES = pytest.mark.parametrize(
    "variant, init, r", [("guided", "bat", 8), ("shared", True, 8), ("shared", True, 7)], ids=["guided", "shared", "shared, r=7"]
)


def with_peft(net: nn.Module, init, r: int, **more):
    peft = pytest.importorskip("peft")
    config = peft.MissConfig(r=r, init_weights=init, target_modules=["0", "2"], **more)
    return peft.get_peft_model(copy.deepcopy(net), config)


def pair(variant: str, init, r: int):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 16, bias=False)).double()
    ours, theirs = bone(net, BoneConfig(r=r, variant=variant)), with_peft(net, init, r)
    return net, ours, theirs, {key: 0.1 * torch.randn_like(value) for key, value in adapter_state_dict(ours, peft=True).items()}


@PEFT_CASES
@pytest.mark.parametrize("n", [3, 20])
def test_agrees_with_peft(variant: str, init, r: int, n: int) -> None:
    peft = pytest.importorskip("peft")
    net, ours, theirs, state = pair(variant, init, r)
    load_adapter(ours, state)
    assert not peft.set_peft_model_state_dict(theirs, state).unexpected_keys
    x = [x_of(n, 48, requires_grad=True) for _ in range(2)]
    y = [ours(x[0]), theirs(x[1])]
    tight = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(*y, **tight)
    for value in y:
        value.sin().sum().backward()
    torch.testing.assert_close(x[0].grad, x[1].grad, **tight)
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (ours, theirs)]
    assert len(gradients[0]) == len(gradients[1]) == 2
    for a, b in zip(*(g.values() for g in gradients), strict=True):
        torch.testing.assert_close(a, b, **tight)
    merge_(ours)
    theirs.merge_adapter()
    for i in (0, 2):
        torch.testing.assert_close(ours[i].weight, theirs.base_model.model[i].base_layer.weight, **tight)
    before = [net[i].weight for i in (0, 2)]
    unmerge_(ours)
    for i, weight in zip((0, 2), before, strict=True):  # PEFT inverts in float32 whatever the dtype: it is 4e-8 off here
        torch.testing.assert_close(ours[i].base_layer.weight, weight, **tight)


@PEFT_CASES
def test_states_travel_to_peft_and_back(variant: str, init, r: int, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    net, ours, theirs, state = pair(variant, init, r)
    load_adapter(ours, state)
    assert peft.get_peft_model_state_dict(theirs).keys() == adapter_state_dict(ours, peft=True).keys()
    peft.set_peft_model_state_dict(theirs, adapter_state_dict(ours, peft=True))
    theirs.save_pretrained(tmp_path)
    fresh = bone(net, BoneConfig(r=r, variant=variant))
    load_adapter(fresh, tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(adapter_state_dict(fresh), adapter_state_dict(ours), rtol=0, atol=0)


@pytest.mark.parametrize("variant, init", [("guided", "bat"), ("shared", True)])
def test_several_adapters_agree_with_peft(variant: str, init) -> None:
    peft = pytest.importorskip("peft")
    _, ours, theirs, state = pair(variant, init, 8)
    ours = bone(ours, BoneConfig(r=4, variant=variant), adapter="second")
    theirs.add_adapter("second", peft.MissConfig(r=4, init_weights=init, target_modules=["0", "2"]))
    second = {key: 0.1 * torch.randn_like(value) for key, value in adapter_state_dict(ours, adapter="second", peft=True).items()}
    for name, values in (("default", state), ("second", second)):
        load_adapter(ours, values, adapter=name)
        peft.set_peft_model_state_dict(theirs, values, adapter_name=name)
    theirs.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(ours(x_of(20, 48)), theirs(x_of(20, 48)), rtol=0, atol=1e-10)
