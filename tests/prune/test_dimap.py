"""DIMAP: the importance, the modules, and what goes from each."""

from __future__ import annotations

import copy
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from tests.prune.zoo import make
from weightroom.prune import DIMAPPruner, GlobalMagnitudePruner, LAMPPruner, distortion_importance, successive_sparsities

quick = settings(max_examples=40, deadline=None)


class Attention(nn.Module):
    """Window attention, in parameters: a table and a small network of relative positions beside qkv and proj."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})


class Merging(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)


class Swin(nn.Module):
    """A Swin's parameters, as timm names them."""

    def __init__(self, width: int = 7, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 2, 2), "norm": nn.LayerNorm(width)})
        self.layers = nn.ModuleList(
            nn.ModuleDict({"blocks": nn.ModuleList(Block(w) for _ in range(2)), "downsample": Merging(w)})
            for w in (width, 2 * width)
        )
        self.norm = nn.LayerNorm(4 * width)
        self.head = nn.ModuleDict({"fc": nn.Linear(4 * width, 5)})


def module_of(name: str) -> str | None:
    """The modules of ``Swin``, told another way."""
    for word, module in ((".qkv.", "qkv"), ("attn.proj.", "proj"), (".fc1.", "mlp"), (".fc2.", "mlp")):
        if word in name and name.endswith("weight"):
            return module
    return None


def by_module(plan, module=module_of) -> dict[str, tuple[int, int]]:
    """Module -> (removed, size)."""
    found = defaultdict(lambda: [0, 0])
    for name, layer in plan.layers().items():
        found[module(name)][0] += layer.removed
        found[module(name)][1] += layer.size
    return {name: (removed, size) for name, (removed, size) in found.items()}


def same(a, b) -> bool:
    return list(a.masks) == list(b.masks) and all(torch.equal(a.masks[k], m) for k, m in b.masks.items())


# --- the importance ------------------------------------------------------------------------------------------------------


def published(weight: Tensor) -> Tensor:
    """Eq. (10) word for word, in exact arithmetic as far as floats go."""
    flat = weight.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), -i))
    out, squares = [0.0] * len(flat), []
    for i in order:
        squares.append(flat[i] ** 2)
        out[i] = flat[i] ** 2 / math.fsum(squares) if flat[i] else 0.0
    return torch.tensor(out, dtype=torch.float64).view(weight.shape)


def test_importance_by_hand():
    imp = distortion_importance(torch.tensor([[2.0, -4.0], [0.0, 1.0]]))
    assert imp.dtype == torch.float64
    torch.testing.assert_close(imp, torch.tensor([[4 / 20, 1.0], [0.0, 1 / 21]], dtype=torch.float64))


@quick
@given(
    array=hnp.arrays(
        np.float32, hnp.array_shapes(max_dims=4, max_side=5), elements=st.floats(-100, 100, width=32, allow_subnormal=False)
    )
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_importance_is_the_published_one(dtype, array):
    weight = torch.from_numpy(array).to(dtype)
    before = weight.clone()
    imp = distortion_importance(weight)
    assert torch.equal(weight, before)
    torch.testing.assert_close(imp, published(weight), rtol=1e-12, atol=1e-300)
    if weight.any():
        assert imp.max() == 1
        assert (imp[weight.abs() > 1e-30] > 0).all()


@quick
@given(
    seed=st.integers(0, 999), shape=hnp.array_shapes(max_dims=3, max_side=8), scale=st.floats(1e-6, 1e6), negative=st.booleans()
)
def test_importance_does_not_know_scale_signs_or_order(seed, shape, scale, negative):
    torch.manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64)
    imp = distortion_importance(weight)
    torch.testing.assert_close(distortion_importance((-scale if negative else scale) * weight), imp, rtol=1e-9, atol=0)
    flips = torch.randint(2, shape) * 2 - 1
    assert torch.equal(distortion_importance(flips * weight), imp)
    shuffle = torch.randperm(weight.numel())
    assert torch.equal(distortion_importance(weight.flatten()[shuffle]), imp.flatten()[shuffle])
    assert torch.equal(imp.flatten().argsort(), weight.abs().flatten().argsort())


@quick
@given(seed=st.integers(0, 999), n=st.integers(1, 60))
def test_importances_telescope(seed, n):
    torch.manual_seed(seed)
    weight = torch.randn(n, dtype=torch.float64)
    imp = distortion_importance(weight).sort(descending=True).values
    share = float(weight.abs().max() ** 2 / weight.square().sum())
    assert float((1 - imp[1:]).prod()) == pytest.approx(share, rel=1e-9)


def test_equal_magnitudes_go_in_flat_order_and_zero_layers_score_zero():
    for dtype in (torch.float32, torch.float64):
        imp = distortion_importance(torch.tensor([1.0, -1.0, 0.0, 1.0, -0.0], dtype=dtype))
        torch.testing.assert_close(imp, torch.tensor([1 / 3, 1 / 2, 0, 1, 0], dtype=torch.float64))
    assert not distortion_importance(torch.zeros(3, 2)).any()


def test_a_million_tiny_weights_keep_their_order():
    # In float32 the sum of the squares swallows what one more of them adds, and scores of neighbours come out equal or swapped.
    weight = torch.linspace(1e-3, 1.0, 1_000_000)[torch.randperm(1_000_000, generator=torch.Generator().manual_seed(0))]
    imp = distortion_importance(weight)
    ordered = imp[weight.argsort(stable=True)]
    assert (ordered.diff() >= 0).all()
    assert torch.equal(imp, distortion_importance(weight.double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_importance_of_half_precision(dtype):
    weight = torch.randn(20, 20).to(dtype)
    assert torch.equal(distortion_importance(weight), distortion_importance(weight.float()))


def test_importance_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        distortion_importance(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="at least one weight"):
        distortion_importance(torch.empty(0, 3))


@quick
@given(seed=st.integers(0, 999), layer=st.integers(0, 2), share=st.floats(0, 0.9))
def test_the_norm_bound_holds_on_a_relu_network(seed, layer, share):
    torch.manual_seed(seed)
    model = nn.Sequential(*(m for d in ((6, 8), (8, 8), (8, 3)) for m in (nn.Linear(*d, bias=False), nn.ReLU()))).double()
    x = nn.functional.normalize(torch.randn(50, 6, dtype=torch.float64)) * torch.rand(50, 1, dtype=torch.float64)
    before, norms = model(x), [m.weight.norm() for m in model[::2]]
    weight = model[2 * layer].weight.detach().clone()
    LAMPPruner(share, targets=(f"{2 * layer}.weight",)).fit(model).apply(model)
    error = (model[2 * layer].weight - weight).norm() / weight.norm()
    assert ((model(x) - before).norm(dim=1) <= error * math.prod(norms) + 1e-12).all()


# --- the modules ---------------------------------------------------------------------------------------------------------


def test_modules_of_a_swin():
    groups = DIMAPPruner(0.5).groups(Swin())
    assert list(groups) == ["qkv", "proj", "mlp"]
    assert sum(len(names) for names in groups.values()) == 16
    assert all(module_of(name) == module for module, names in groups.items() for name in names)
    expected = {name for name, _ in Swin().named_parameters() if module_of(name)}
    assert {name for names in groups.values() for name in names} == expected


@quick
@given(seed=st.integers(0, 99), r=st.floats(0, 0.99))
def test_every_module_loses_exactly_its_share_and_nothing_else_is_touched(seed, r):
    model = Swin(seed=seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = DIMAPPruner(r).fit(model)
    assert by_module(plan) == {name: (round(r * n), n) for name, (_, n) in by_module(plan).items()}
    assert set(by_module(plan)) == {"qkv", "proj", "mlp"}
    plan.apply(model)
    for name, value in model.state_dict().items():
        if not name.endswith("_mask"):
            assert torch.equal(value, before[name.removesuffix("_orig")])
    masked = {name.removesuffix("_mask") for name, _ in model.named_buffers() if name.endswith("_mask")}
    assert all(module_of(name) for name in masked)


def test_each_module_has_one_threshold_over_all_its_layers():
    model = Swin()
    plan = DIMAPPruner(0.6).fit(model)
    for module in ("qkv", "proj", "mlp"):
        kept, gone = [], []
        for name, mask in plan.masks.items():
            if module_of(name) == module:
                imp = published(model.get_parameter(name))
                kept.append(imp[mask])
                gone.append(imp[~mask])
        assert torch.cat(kept).min() > torch.cat(gone).max()
    shares = {layer.sparsity for name, layer in plan.layers().items() if module_of(name) == "mlp"}
    assert len(shares) > 1  # not the same share of every layer
    for name, mask in plan.masks.items():  # within a layer the largest stay
        w = model.get_parameter(name).abs()
        assert w[mask].min() > w[~mask].max()


def test_scaling_layers_changes_nothing_for_dimap_and_much_for_magnitude():
    model = Swin()
    plan, magnitude = DIMAPPruner(0.7).fit(model), GlobalMagnitudePruner(0.7).fit(model)
    with torch.no_grad():
        for i, name in enumerate(plan.masks):
            model.get_parameter(name).mul_(-(2.0 ** (i - 8)))  # powers of two: nothing is rounded
    assert same(DIMAPPruner(0.7).fit(model), plan)
    assert not same(GlobalMagnitudePruner(0.7).fit(model), magnitude)


def test_a_single_module_is_lamp_on_the_same_layers():
    model = Swin()
    names = tuple(n for layers in DIMAPPruner(0.5).groups(model).values() for n in layers)
    one = DIMAPPruner(0.55, single_module=True)
    assert same(one.fit(model), LAMPPruner(0.55, targets=names).fit(model))
    assert not same(one.fit(model), DIMAPPruner(0.55).fit(model))
    assert list(one.groups(model)) == ["model"]


def test_shares_by_module():
    model = Swin()
    plan = DIMAPPruner({"qkv": 0.3, "mlp": 0.8}).fit(model)
    counts = by_module(plan)
    assert counts["qkv"][0] == round(0.3 * counts["qkv"][1])
    assert counts["mlp"][0] == round(0.8 * counts["mlp"][1])
    assert counts["proj"][0] == 0
    with pytest.raises(ValueError, match="unknown module in sparsity 'mlps': did you mean 'mlp'"):
        DIMAPPruner({"mlps": 0.3}).fit(model)


def test_how_queries_keys_and_values_are_stored_does_not_matter():
    fused, apart = Swin(), Swin()
    for block in (b for layer in apart.layers for b in layer["blocks"]):
        rows = block.attn.qkv.weight.detach().chunk(3)
        for word, weight in zip("qkv", rows, strict=True):
            layer = nn.Linear(*reversed(weight.shape))
            layer.weight = nn.Parameter(weight.clone())
            setattr(block.attn, f"{word}_proj", layer)
        del block.attn.qkv
    one, other = DIMAPPruner(0.6).fit(fused), DIMAPPruner(0.6).fit(apart)
    rough = DIMAPPruner(0.6, fuse_qkv=False).fit(apart)
    differ = 0
    pools = [DIMAPPruner(0.6, single_module=True, fuse_qkv=fuse).fit(apart) for fuse in (True, False)]
    lamp = LAMPPruner(0.6, targets=tuple(pools[0].masks)).fit(apart)
    assert [same(pool, lamp) for pool in pools] == [False, True]
    for name, mask in one.masks.items():
        if ".qkv." in name:
            parts = [name.replace(".qkv.", f".{word}_proj.") for word in "qkv"]
            assert torch.equal(mask, torch.cat([other.masks[part] for part in parts]))
            differ += int((mask != torch.cat([rough.masks[part] for part in parts])).sum())
        else:
            assert torch.equal(mask, other.masks[name])
    assert differ > 0


def test_raw_parameters_of_attention_count():
    attention, _, _ = make("attention")
    assert DIMAPPruner(0.5).groups(attention) == {
        "qkv": ["encoder.self_attn.in_proj_weight"],
        "proj": ["encoder.self_attn.out_proj.weight"],
        "mlp": ["encoder.linear1.weight", "encoder.linear2.weight"],
    }
    assert DIMAPPruner(0.5).groups(nn.MultiheadAttention(4, 2, kdim=3, vdim=3)) == {
        "qkv": ["q_proj_weight", "k_proj_weight", "v_proj_weight"],
        "proj": ["out_proj.weight"],
    }
    plan = DIMAPPruner(0.5).fit(attention)
    assert by_module(plan, lambda name: "mlp" if ".linear" in name else name.split(".")[2][:2]) == {
        "in": (96, 192), "ou": (32, 64), "mlp": (128, 256),
    }  # fmt: skip


def leaves(*names: str) -> nn.Module:
    """A model that has linear layers of these names."""
    model = nn.Module()
    for name in names:
        *path, last = name.split(".")
        inner = model
        for part in path:
            if not hasattr(inner, part):
                inner.add_module(part, nn.Module())
            inner = getattr(inner, part)
        inner.add_module(last, nn.Linear(3, 3))
    return model


@pytest.mark.parametrize(
    ("names", "outside"),
    [
        # torchvision's Swin (v2 has the network of positions), torchvision's ViT, older and newer transformers, layers side by side
        ("f.1.0.attn.qkv f.1.0.attn.proj f.1.0.mlp.0 f.1.0.mlp.3 f.1.0.attn.cpb_mlp.0", "f.0.0 f.2.reduction head"),
        ("e.l0.self_attention.qkv e.l0.self_attention.out_proj e.l0.mlp.linear_1 e.l0.mlp.linear_2", "conv_proj heads.head"),
        (
            "e.0.attention.self.query e.0.attention.self.key e.0.attention.output.dense e.0.intermediate.dense e.0.output.dense",
            "pooler.dense classifier",
        ),
        (
            "e.0.attention.attention.key e.0.attention.attention.value e.0.attention.output.dense e.0.intermediate.dense e.0.output.dense",
            "embeddings.projection",
        ),
        ("e.0.attention.q_proj e.0.attention.v_proj e.0.attention.o_proj e.0.mlp.fc1 e.0.mlp.fc2", "downsample.reduction"),
        ("b.0.qkv b.0.proj b.0.fc1 b.0.fc2", "embed.proj head.fc1 head.fc2"),
        ("qkv proj fc1 fc2", "head patch_embed.proj"),
        ("b.0.attn.to_q b.0.attn.to_kv b.0.attn.to_out.0 b.0.mlp.0 b.0.mlp.2", "to_logits"),
        ("b.0.attn.qkv b.0.attn.out_proj b.0.mlp.linear1 b.0.mlp.linear2", "neck.conv"),
    ],
)
def test_names_that_are_known(names, outside):
    names, outside = names.split(), outside.split()
    groups = DIMAPPruner(0.5).groups(leaves(*names, *outside))
    known = [n for n in names if "cpb" not in n]
    assert groups["qkv"] == [f"{n}.weight" for n in known[: len(known) - 3]]
    assert groups["proj"] == [f"{known[-3]}.weight"]
    assert groups["mlp"] == [f"{n}.weight" for n in known[-2:]]


def test_what_a_layer_in_a_block_is_for_is_not_guessed():
    model = leaves("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.0.adapter", "gate")
    with pytest.raises(ValueError, match=r"cannot tell what 'blocks.0.adapter.weight' is for.*pass modules="):
        DIMAPPruner(0.5).fit(model)
    for spare in (("adapter",), ("blocks.*.adapter",), ("blocks.0.adapter.weight",)):
        assert set(DIMAPPruner(0.5, aux=spare).groups(model)) == {"qkv", "proj", "mlp"}
    assert set(DIMAPPruner(0.5, ignore=("*.adapter",)).groups(model)) == {"qkv", "proj", "mlp"}
    plan = DIMAPPruner(0.5, modules={"*.attn": "attention", "*.adapter": None, "blocks": "rest"})
    assert plan.groups(model) == {
        "attention": ["blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"],
        "rest": ["blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"],
    }


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "lstm"])
def test_models_without_attention_are_refused_until_modules_are_given(name):
    model, _, _ = make(name)
    with pytest.raises(ValueError, match="no attention or MLP layers found; pass modules="):
        DIMAPPruner(0.5).fit(model)
    assert same(DIMAPPruner(0.5, modules={"*": "all"}).fit(model), LAMPPruner(0.5).fit(model))
    assert DIMAPPruner(0.5, modules={"*": "all"}).groups(model)["all"] == list(LAMPPruner(0.5).fit(model).masks)


def test_fully_connected_heads_of_a_cnn_are_no_mlp_of_a_transformer():
    with pytest.raises(ValueError, match="no attention or MLP layers found"):
        DIMAPPruner(0.5).fit(nn.ModuleDict({"conv": nn.Conv2d(1, 3, 3), "fc1": nn.Linear(3, 3), "fc2": nn.Linear(3, 3)}))


@pytest.mark.parametrize("names", [("net.in_proj", "net.out_proj"), ("critic.value", "critic.proj"), ("stem.proj",)])
def test_names_that_attention_shares_with_others_are_not_enough(names):
    with pytest.raises(ValueError, match="no attention or MLP layers found"):
        DIMAPPruner(0.5).fit(leaves(*names))


def test_modules_by_function():
    model, _, _ = make("cnn")
    pruner = DIMAPPruner(0.4, modules=lambda name: "conv" if name in ("0.weight", "3.weight") else "linear")
    assert pruner.groups(model) == {"conv": ["0.weight", "3.weight"], "linear": ["6.weight", "8.weight"]}
    assert by_module(pruner.fit(model), pruner.modules) == {"conv": (round(0.4 * 486), 486), "linear": (528, 1320)}


def test_transformers_and_monai():
    transformers = pytest.importorskip("transformers")
    sizes = {(96, 6): 25_878_528, (96, 18): 47_112_192, (128, 18): 83_755_008}
    for (width, depth), size in sizes.items():
        config = transformers.SwinConfig(
            embed_dim=width, depths=[2, 2, depth, 2], num_heads=[width // 32 * 2**i for i in range(4)]
        )
        with torch.device("meta"):
            model = transformers.SwinForImageClassification(config)
        groups = DIMAPPruner(0.5).groups(model)
        counts = {name: sum(model.get_parameter(p).numel() for p in layers) for name, layers in groups.items()}
        assert sum(counts.values()) == size
        assert counts["qkv"] == 3 * counts["proj"] == size // 4
    vit, x, _ = make("vit")
    plan = DIMAPPruner(0.5).fit(vit, example_inputs=x)
    assert len(plan.masks) == 12
    assert by_module(plan, lambda n: "mlp" if ".fc" in n else "proj" if ".o_proj" in n else "qkv") == {
        "qkv": (768, 1536), "proj": (256, 512), "mlp": (768, 1536),
    }  # fmt: skip
    assert 0 < plan.macs() < GlobalMagnitudePruner(0.0).fit(vit, example_inputs=x).macs()


def test_monai_swin():
    pytest.importorskip("monai")
    from monai.networks.nets.swin_unetr import SwinTransformer

    model = SwinTransformer(1, 12, (4, 4), (2, 2), (2, 2), (2, 2), spatial_dims=2)
    groups = DIMAPPruner(0.5).groups(model)
    assert {name: len(layers) for name, layers in groups.items()} == {"qkv": 4, "proj": 4, "mlp": 8}
    assert not any("downsample" in n or "patch_embed" in n for layers in groups.values() for n in layers)


# --- masks in force, schedules, arguments --------------------------------------------------------------------------------


def test_pruning_in_rounds_nests_and_ends_at_the_share_of_every_module():
    model = Swin()
    last = None
    for r in successive_sparsities(0.8, 4):
        plan = DIMAPPruner(r).fit(model)
        assert last is None or all(not (mask & ~last.masks[n]).any() for n, mask in plan.masks.items())
        last = plan.apply(model) and plan
    assert by_module(last) == {n: (round(0.8 * size), size) for n, (_, size) in by_module(last).items()}


def test_a_schedule_of_unequal_shares_keeps_their_proportion():
    model = Swin()
    assert DIMAPPruner({"qkv": 0.0, "mlp": 0.0}).at(0.4).ratios == {"qkv": 0.4, "mlp": 0.4}
    gradual = DIMAPPruner({"qkv": 0.3, "mlp": 0.6}, schedule=("linear", 0, 4, 2)).gradual(model)
    for step in (2, 4):
        gradual(step)
        counts = by_module(gradual.plan)
        for module, share in (("qkv", 0.3), ("proj", 0.0), ("mlp", 0.6)):
            assert counts[module][0] == pytest.approx(share * step / 4 * counts[module][1], abs=1)


def test_only_what_is_alive_weighs():
    model = Swin()
    DIMAPPruner(0.5).fit(model).apply(model)
    masks = {n.removesuffix("_mask"): m.bool() for n, m in model.named_buffers() if n.endswith("_mask")}
    plan = DIMAPPruner(0.8).fit(model)
    clean = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(f"{name}_orig")[~mask] = 1e6
            clean.get_parameter(f"{name}_orig")[~mask] = 0
    assert same(DIMAPPruner(0.8).fit(model), plan)
    assert same(DIMAPPruner(0.8).fit(clean), plan)


def test_what_masks_have_removed_before_does_not_change_how_much_goes():
    model = nn.Sequential(nn.Linear(5, 1), nn.Linear(5, 1))
    pruner = DIMAPPruner(0.5, modules={"0": "a", "1": "b"})
    assert pruner.fit(model).sparsity() == 0.4  # two of five from each
    torch_prune.l1_unstructured(model[0], "weight", amount=3)
    assert pruner.fit(model).sparsity() == 0.4


def test_a_module_that_has_lost_more_than_its_share_keeps_it_and_the_others_make_up():
    model = Swin()
    for block in (b for layer in model.layers for b in layer["blocks"]):
        torch_prune.random_unstructured(block.attn.proj, "weight", amount=0.9)
    gone = {n.removesuffix("_mask"): ~m.bool() for n, m in model.named_buffers() if n.endswith("_mask")}
    plan = DIMAPPruner(0.5).fit(model)
    counts = by_module(plan)
    assert sum(removed for removed, _ in counts.values()) == round(0.5 * sum(size for _, size in counts.values()))
    assert counts["proj"][0] == sum(int(m.sum()) for m in gone.values())
    assert counts["qkv"][0] / counts["qkv"][1] == pytest.approx(counts["mlp"][0] / counts["mlp"][1], abs=2e-3)
    assert all(not (plan.masks[n] & mask).any() for n, mask in gone.items())
    with pytest.raises(ValueError, match=r"sparsity 0.05 asks for .* are already pruned"):
        DIMAPPruner(0.05).fit(model)
    unequal = by_module(DIMAPPruner({"qkv": 0.2, "proj": 0.2, "mlp": 0.6}).fit(model))
    kept = {name: 1 - removed / size for name, (removed, size) in unequal.items()}
    assert kept["qkv"] / kept["mlp"] == pytest.approx(0.8 / 0.4, abs=0.01)
    gradual = DIMAPPruner(0.5, schedule=("cubic", 0, 4, 2)).gradual(model)  # starts where the model is
    gradual(4)
    assert same(gradual.plan, plan)


@pytest.mark.parametrize("bad", [1.0, -0.1, float("nan")])
def test_shares_out_of_range(bad):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got"):
        DIMAPPruner(bad)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got .* for 'mlp'"):
        DIMAPPruner({"qkv": 0.5, "mlp": bad})


def test_arguments_that_do_not_fit():
    for sparsity, more in (({}, {}), ({"qkv": 0.5}, {"single_module": True})):
        with pytest.raises(ValueError, match="sparsity must be a number with single_module, and no empty dict"):
            DIMAPPruner(sparsity, **more)
    with pytest.raises(ValueError, match="unknown modules 'automatic'"):
        DIMAPPruner(0.5, modules="automatic")
    with pytest.raises(TypeError, match="modules must be 'auto', a dict or a function, got int"):
        DIMAPPruner(0.5, modules=3)
    with pytest.raises(TypeError, match="aux must be a sequence"):
        DIMAPPruner(0.5, aux="head")
    model = Swin()
    with pytest.raises(TypeError, match="name of a module or None, got 3 for"):
        DIMAPPruner(0.5, modules=lambda name: 3).fit(model)
    with pytest.raises(ValueError, match="unknown layer in modules 'haed': did you mean 'head"):
        DIMAPPruner(0.5, modules={"haed": "all"}).fit(model)
    with pytest.raises(ValueError, match="modules matches none of the"):
        DIMAPPruner(0.5, modules={"norm": "all"}).fit(model)
    with pytest.raises(ValueError, match="granularity"):
        DIMAPPruner(0.5, granularity="channel")
