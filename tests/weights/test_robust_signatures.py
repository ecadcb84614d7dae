"""Robust weight signatures: extraction, arithmetic, storage, patching and taking off, batch norm."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from weightroom.weights import RobustWeightSignature, apply_, patch, reestimate_batchnorm, remove_


def convnet(classes=3, width=4):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes),
    )  # fmt: skip


def normed(classes=3):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(5, classes),
    )  # fmt: skip


def moved(model, seed, size=0.1):
    """A copy whose floating-point tensors have gone somewhere else; variances stay positive."""
    other, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            if tensor.is_floating_point():
                step = size * torch.randn(tensor.shape, generator=g, dtype=torch.float64).to(tensor.dtype)
                tensor.add_(step.abs() if "var" in name else step)
    return other


def three(make=convnet, seed=0):
    torch.manual_seed(seed)
    pre = make()
    return pre, moved(pre, 10 * seed + 1), moved(pre, 10 * seed + 2)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        torch.equal(now[k].view(torch.uint8), before[k].view(torch.uint8)) if now[k].ndim else torch.equal(now[k], before[k])
        for k in before
    )


def close(a, b):
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    assert a
    assert a.keys() <= b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6)


FIRST_TWO = ["0.weight", "0.bias", "2.weight", "2.bias"]


# Extraction


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_signature_is_the_part_of_d_c_at_right_angles_to_d_std(dtype):
    pre, standard, robust = (m.to(dtype).state_dict() for m in three())
    signature = RobustWeightSignature.extract(pre, standard, robust, layers=2)
    assert list(signature) == FIRST_TWO
    for name, rws in signature.items():
        assert rws.dtype == torch.promote_types(dtype, torch.float32)
        d_std, d_c = ((t[name].double() - pre[name].double()).flatten() for t in (standard, robust))
        r = rws.double().flatten()
        assert abs(r @ d_std) <= 1e-6 * r.norm() * d_std.norm()
        torch.testing.assert_close(r, d_c - (d_c @ d_std) / (d_std @ d_std) * d_std, rtol=1e-5, atol=1e-7)


def test_each_tensor_is_projected_alone():
    pre, standard, robust = (m.state_dict() for m in three())
    signature = RobustWeightSignature.extract(pre, standard, robust, layers=2)
    whole = lambda t: torch.cat([(t[n] - pre[n]).flatten() for n in FIRST_TWO])  # noqa: E731
    d_c, d_std = whole(robust), whole(standard)
    together = d_c - (d_c @ d_std) / (d_std @ d_std) * d_std
    assert (torch.cat([signature[n].flatten() for n in FIRST_TWO]) - together).norm() > 0.01 * together.norm()


def test_a_large_tensor_nearly_along_the_task_direction():
    torch.manual_seed(0)
    u, e = torch.randn(100_000), torch.randn(100_000)
    pre, standard, robust = (nn.ParameterDict({"a": t}) for t in (torch.zeros(100_000), u, u + 1e-3 * e))
    r = RobustWeightSignature.extract(pre, standard, robust, ["a"])["a"].double()
    assert abs(r @ u.double()) <= 1e-6 * r.norm() * u.double().norm()
    torch.testing.assert_close(r.float(), 1e-3 * (e - (e @ u) / (u @ u) * u), rtol=1e-3, atol=1e-6)


def test_without_corruption_there_is_nothing_to_add():
    pre, standard, _ = three()
    signature = RobustWeightSignature.extract(pre, standard, standard, layers=3)
    assert all(not t.any() for t in signature.values())


@given(st.floats(-3, 3), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_moving_the_robust_model_along_the_task_direction_changes_nothing(s, seed):
    pre, standard, robust = (m.double().state_dict() for m in three(seed=seed))
    further = {n: robust[n] + s * (standard[n] - pre[n]) for n in robust}
    a, b = (RobustWeightSignature.extract(pre, standard, r, layers=3) for r in (robust, further))
    close(a, b)


def test_without_projection_it_is_d_c_itself():
    pre, standard, robust = (m.state_dict() for m in three())
    signature = RobustWeightSignature.extract(pre, standard, robust, 2, False)
    assert all(torch.equal(signature[n], robust[n] - pre[n]) for n in FIRST_TWO)


def test_a_frozen_tensor_keeps_all_of_d_c():
    pre, standard, robust = (m.state_dict() for m in three())
    standard["0.bias"] = pre["0.bias"].clone()
    signature = RobustWeightSignature.extract(pre, standard, robust, layers=1)
    assert torch.equal(signature["0.bias"], robust["0.bias"] - pre["0.bias"])
    assert not torch.equal(signature["0.weight"], robust["0.weight"] - pre["0.weight"])


def test_it_is_not_robust_minus_clean():
    pre, standard, robust = three()
    signature = RobustWeightSignature.extract(pre, standard, robust, layers=1)
    assert not torch.allclose(signature["0.weight"], robust[0].weight - standard[0].weight, atol=1e-3)


def test_which_layers():
    pre, standard, robust = three()
    names = lambda layers: list(RobustWeightSignature.extract(pre, standard, robust, layers))  # noqa: E731
    assert names(4)[-2:] == ["8.weight", "8.bias"]
    assert names(["2", "0.bias"]) == ["0.bias", "2.weight", "2.bias"]
    assert names("4") == ["4.weight", "4.bias"]
    assert names(lambda name: name.endswith("weight")) == ["0.weight", "2.weight", "4.weight", "8.weight"]
    alone = nn.Linear(2, 2)
    assert list(RobustWeightSignature.extract(alone, alone, alone, 1)) == ["weight", "bias"]


@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.weight_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_layers_whose_weight_is_computed_are_not_skipped(compute):
    models = three()
    for model in models:
        compute(model[2])
    with pytest.raises(ValueError, match="weight of module '2' is computed"):
        RobustWeightSignature.extract(*models, layers=2)
    assert list(RobustWeightSignature.extract(*models, layers=["0"])) == FIRST_TWO[:2]
    assert RobustWeightSignature.extract(*models, layers=lambda name: name == "2.bias").keys() == {"2.bias"}


def test_a_model_that_is_one_masked_layer():
    models = [nn.utils.prune.l1_unstructured(nn.Linear(3, 4), "weight", 0.5) for _ in range(3)]
    with pytest.raises(ValueError, match="weight of the model itself is computed"):
        RobustWeightSignature.extract(*models, layers=1)


def test_batch_norm_is_never_projected_but_kept_apart():
    pre, standard, robust = three(normed)
    for layers in (2, lambda name: True, ["0", "1", "3", "4"]):
        signature = RobustWeightSignature.extract(pre, standard, robust, layers)
        assert {"0.weight", "0.bias", "3.weight"} <= set(signature)
        assert not {n for n in signature if n.split(".")[0] in "14"}
        assert set(signature.batchnorm) == {f"{i}.{n}" for i in "14" for n in ("weight", "bias", "running_mean", "running_var")}
        assert torch.equal(signature.batchnorm["4.running_var"], robust[4].running_var)


def test_the_start_may_have_another_head():
    pre, standard, robust = three()
    pre[8] = nn.Linear(5, 10)
    signature = RobustWeightSignature.extract(pre, standard, robust, layers=3)
    assert len(signature) == 6
    with pytest.raises(ValueError, match=r"'8.weight' has shape \(10, 5\) in pre and \(3, 5\) in standard"):
        RobustWeightSignature.extract(pre, standard, robust, layers=4)
    state = pre.state_dict()
    del state["8.weight"], state["8.bias"]
    assert RobustWeightSignature.extract(state, standard, robust, layers=3) == signature


def test_what_does_not_fit_together_is_named():
    pre, standard, robust = (m.state_dict() for m in three())
    extract = RobustWeightSignature.extract
    for at, label in enumerate(("pre", "standard", "robust")):
        weights = [dict(pre), dict(standard), dict(robust)]
        del weights[at]["2.weight"]
        with pytest.raises(ValueError, match=f"{label} has no tensor '2.weight'"):
            extract(*weights, layers=["0", "2"])
    wrong = {**robust, "8.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"'8.bias' has shape \(3,\) in standard and \(7,\) in robust"):
        extract(pre, standard, wrong, layers=1)
    for k in (0, 5, 100):
        with pytest.raises(ValueError, match=f"layers must be between 1 and 4, .*got {k}"):
            extract(pre, standard, robust, layers=k)
    with pytest.raises(ValueError, match="unknown layer '7'"):
        extract(pre, standard, robust, layers=["7"])
    with pytest.raises(ValueError, match="chose no tensor"):
        extract(pre, standard, robust, layers=lambda name: False)
    for bad in (True, 2.0, None):
        with pytest.raises(TypeError, match="layers must be"):
            extract(pre, standard, robust, layers=bad)
    with pytest.raises(ValueError, match=r"'0.bias' holds values that are not finite"):
        extract(pre, standard, {**robust, "0.bias": torch.full((4,), math.nan)}, layers=1)


def test_a_state_dict_out_of_order_is_refused(tmp_path):
    models = three()
    for i, model in enumerate(models):
        save_file(model.state_dict(), tmp_path / f"{i}.safetensors")
    states = [load_file(tmp_path / f"{i}.safetensors") for i in range(3)]
    with pytest.raises(ValueError, match="alphabetical order"):
        RobustWeightSignature.extract(*states, layers=1)


def test_nothing_given_is_changed():
    models = three(normed)
    before = [bits(m) for m in models]
    signature = RobustWeightSignature.extract(*models, layers=2)
    with torch.no_grad():
        models[2][1].running_mean.add_(1)
    assert torch.equal(signature.batchnorm["1.running_mean"], before[2]["1.running_mean"])
    models[2][1].running_mean.copy_(before[2]["1.running_mean"])
    assert all(same(m, b) for m, b in zip(models, before, strict=True))
    assert not any(t.requires_grad for t in signature.values())


# Patching


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_patch_adds_and_leaving_gives_every_bit_back(dtype):
    pre, standard, robust = (m.to(dtype) for m in three())
    signature = RobustWeightSignature.extract(pre, standard, robust, layers=2)
    standard[2].bias.requires_grad_(False)
    with torch.no_grad():
        standard[0].bias[0] = -0.0
    before = bits(standard)
    with patch(standard, signature, 0.7) as model:
        assert model is standard
        for name in before:
            wide = before[name].to(torch.promote_types(dtype, torch.float32))
            expected = (wide + 0.7 * signature[name]).to(dtype) if name in signature else before[name]
            assert torch.equal(model.state_dict()[name], expected)
        assert not same(standard, before)
        assert not model[2].bias.requires_grad
        assert model[2].weight.requires_grad
    assert same(standard, before)
    assert not [a for a in vars(standard) if "patch" in a]


def test_strength_zero_leaves_every_bit():
    pre, standard, robust = three(normed)
    signature = RobustWeightSignature.extract(pre, standard, robust, layers=2)
    with torch.no_grad():
        standard[0].bias[:] = -0.0  # -0.0 + 0.0 would be another number
    before = bits(standard)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_(standard, signature, 0.0)
        assert same(standard, before)
        remove_(standard, signature)
    assert same(standard, before)


def test_strength_zero_takes_no_part_beside_another():
    standard, (r1, r2, _) = signatures()
    with torch.no_grad():
        standard[0].bias[:] = -0.0
    only = RobustWeightSignature({n: t for n, t in r2.items() if n.startswith("2")}, architecture=r2.architecture)
    apply_(standard, only, 0.5)
    alone = bits(standard)
    remove_(standard)
    assert same(apply_(standard, [r1, only], [0.0, 0.5]), alone)


def test_the_patch_goes_off_when_the_block_fails():
    pre, standard, robust = three()
    before = bits(standard)
    with pytest.raises(KeyError), patch(standard, RobustWeightSignature.extract(pre, standard, robust, 1)):
        raise KeyError
    assert same(standard, before)


def signatures(n=3, make=convnet, layers=2):
    pre, standard, robust = three(make)
    robusts = [robust, *(moved(pre, seed) for seed in range(50, 50 + n - 1))]
    found = [RobustWeightSignature.extract(pre, standard, r, layers, corruption=f"c{i}") for i, r in enumerate(robusts)]
    return standard, found


def test_several_are_added_each_with_its_share():
    standard, (r1, r2, _) = signatures()
    clean = bits(standard)
    for strengths, (a1, a2) in ((None, (0.5, 0.5)), (0.6, (0.3, 0.3)), ([0.2, 0.9], (0.2, 0.9))):
        apply_(standard, [r1, r2], strengths)
        close(standard, {n: t + a1 * r1[n] + a2 * r2[n] if n in r1 else t for n, t in clean.items()})
        assert same(remove_(standard), clean)


def test_one_after_the_other_is_the_sum_in_any_order():
    standard, (r1, r2, _) = signatures()
    clean = bits(standard)
    apply_(apply_(standard, r1), r2)
    one_by_one = bits(standard)
    remove_(standard)
    close(apply_(standard, r1 + r2), one_by_one)
    remove_(standard)
    close(apply_(apply_(standard, r2), r1), one_by_one)
    assert same(remove_(standard), clean)


def test_signatures_of_different_layers_commute_exactly():
    pre, standard, robust = three()
    r1, r2 = (RobustWeightSignature.extract(pre, standard, robust, [layer]) for layer in ("0", "2"))
    apply_(standard, [r1, r2], [1.0, 0.4])
    one = bits(standard)
    remove_(standard)
    apply_(standard, [r2, r1], [0.4, 1.0])
    assert same(standard, one)
    assert set(r1 + r2) == set(FIRST_TWO)


def test_removal_in_any_order_is_as_if_it_had_never_been_there():
    standard, (r1, r2, r3) = signatures()
    clean = bits(standard)
    apply_(apply_(standard, r1), r3, 0.5)
    without_r2 = bits(standard)
    remove_(standard)
    apply_(apply_(apply_(standard, r1), r2), r3, 0.5)
    assert same(remove_(standard, r2), without_r2)
    assert same(remove_(standard, [r3, r1]), clean)


def test_the_latest_application_goes_or_the_one_at_that_strength():
    standard, (r1, r2, _) = signatures()
    apply_(standard, r1, 0.25)
    quarter = bits(standard)
    apply_(standard, r1, 0.5)
    both = bits(standard)
    apply_(standard, r2)
    assert same(remove_(standard, r2), both)
    assert same(remove_(standard, r1), quarter)
    apply_(standard, r1, 0.5)
    remove_(standard, r1, 0.25)
    with pytest.raises(RuntimeError, match=r"RobustWeightSignature\('c0', .* is not applied to the model at strength 0.25"):
        remove_(standard, r1, 0.25)
    remove_(standard, r1, 0.5)


def test_an_equal_signature_read_from_disk_takes_it_off(tmp_path):
    standard, (r1, _, _) = signatures()
    clean = bits(standard)
    apply_(standard, r1)
    r1.save(tmp_path / "r1.safetensors")
    assert same(remove_(standard, RobustWeightSignature.load(tmp_path / "r1.safetensors")), clean)


def test_what_is_not_on_the_model_cannot_be_removed():
    standard, (r1, r2, _) = signatures()
    with pytest.raises(RuntimeError, match="not patched"):
        remove_(standard)
    with pytest.raises(RuntimeError, match="not patched"):
        remove_(standard, r1)
    apply_(standard, r1)
    before = bits(standard)
    for wrong in (r2, [r1, r2], [r1, r1], r1.scaled(2)):
        with pytest.raises(RuntimeError, match="is not applied"):
            remove_(standard, wrong)
    assert same(standard, before)
    other = copy.deepcopy(standard)
    assert same(remove_(other, r1), bits(remove_(standard, r1)))


def test_training_under_a_patch_stays_when_it_goes():
    standard, (r1, r2, _) = signatures()
    clean = bits(standard)
    apply_(standard, r1)
    with torch.no_grad():
        standard[0].weight.add_(0.125)
        standard[8].weight.add_(0.5)
    apply_(standard, r2)
    remove_(standard)
    clean["0.weight"] += 0.125
    clean["8.weight"] += 0.5
    close(standard, clean)


def test_tied_parameters_get_the_patch_once():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    pre, robust = moved(model, 1), moved(model, 2)
    signature = RobustWeightSignature.extract(pre, model, robust, layers=2)
    before = bits(model)
    with patch(model, signature):
        close({"w": layer.weight.detach()}, {"w": before["0.weight"] + signature["0.weight"]})
    assert same(model, before)


def test_strengths_beyond_one_warn_and_act():
    standard, (r1, r2, _) = signatures()
    clean = bits(standard)
    for strength in (1.5, -1.0):
        with pytest.warns(UserWarning, match=r"meant to lie in \[0, 1\]"):
            apply_(standard, r1, strength)
        close(standard, {n: t + strength * r1[n] if n in r1 else t for n, t in clean.items()})
        remove_(standard)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="strengths must be"):
            apply_(standard, r1, bad)
    with pytest.raises(ValueError, match="one for each of the 2 signatures, got 3"):
        apply_(standard, [r1, r2], [1, 1, 1])
    with pytest.raises(ValueError, match="signatures is empty"):
        apply_(standard, [])
    with pytest.raises(TypeError, match="signatures must be RobustWeightSignature, got dict"):
        apply_(standard, [{}])
    assert same(standard, clean)


def test_transfer_to_another_head_but_to_no_other_architecture():
    _, (r1, r2, _) = signatures()
    apply_(convnet(classes=7), r1)
    deeper = convnet()
    deeper.append(nn.Linear(3, 3))
    other = convnet()
    other[4] = nn.Conv2d(6, 9, 3)
    other[8] = nn.Linear(9, 3)
    for model in (deeper, other):
        before = bits(model)
        with pytest.raises(ValueError, match="another architecture: its hash is"):
            apply_(model, r1)
        assert same(model, before)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(4, 1, 3, 3\) in the signature and \(8, 1, 3, 3\) in the model"):
        apply_(convnet(width=8), r1)
    with pytest.raises(ValueError, match=r"the model has no tensor '2.weight'"):
        apply_(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ReLU()), r1)
    free = RobustWeightSignature({"0.bias": torch.ones(4)})
    apply_(other, free)
    remove_(other, free)
    pre, standard, robust = three(lambda: convnet(width=5))
    with pytest.raises(ValueError, match="different architectures"):
        r2 + RobustWeightSignature.extract(pre, standard, robust, 1)


def test_a_signature_of_one_data_set_is_added_to_the_model_of_another():
    pre, standard, robust = three()
    signature = RobustWeightSignature.extract(pre, standard, robust, layers=2)
    new = moved(convnet(classes=6), 9)
    before = bits(new)
    apply_(new, signature)
    close(new, {n: t + signature[n] if n in signature else t for n, t in before.items()})


# Arithmetic and storage


def test_scaling_and_adding():
    _, (r1, r2, r3) = signatures()
    close(r1.scaled(0.5), {n: 0.5 * t for n, t in r1.items()})
    close(r1 + r2, {n: r1[n] + r2[n] for n in r1})
    assert (r1 + r2).corruption == "c0 + c1"
    assert (r1 + r2 + r3).models == 3
    assert r1.norms == {n: pytest.approx(float(t.norm())) for n, t in r1.items()}
    assert r1 == r1.scaled(1.0) != r1.scaled(2.0)
    with pytest.raises(TypeError):
        r1 + 1
    with pytest.raises(ValueError, match="a must be"):
        r1.scaled(math.inf)
    with pytest.raises(ValueError, match=r"'a' has shape \(2,\) in one signature and \(3,\) in the other"):
        RobustWeightSignature({"a": torch.ones(2)}) + RobustWeightSignature({"a": torch.ones(3)})
    with pytest.raises(TypeError, match=r"'a' must be a floating-point tensor, got torch.int64"):
        RobustWeightSignature({"a": torch.arange(3)})
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="'a' holds values that are not finite"):
            RobustWeightSignature({"a": torch.tensor([1.0, bad])})


VALUES = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30)


@given(VALUES, st.integers(2, 300))
@settings(max_examples=60, deadline=None)
def test_linear_levels_are_within_half_a_step_and_keep_the_extremes(values, levels):
    x = torch.tensor(values)
    y = RobustWeightSignature({"x": x}).quantize(levels)["x"]
    bound = (x.max() - x.min()) / (2 * (levels - 1))
    assert ((x - y).abs() <= bound * (1 + 1e-6) + 1e-5).all()
    assert y.min() == x.min()
    assert y.max() == x.max()
    assert len(y.unique()) <= levels


@given(VALUES, st.integers(4, 300), st.sampled_from(["log", "tanh"]))
@settings(max_examples=60, deadline=None)
def test_other_scales(values, levels, mode):
    x = torch.tensor(values)
    y = RobustWeightSignature({"x": x}).quantize(levels, mode)["x"]
    assert y.isfinite().all()
    assert len(y.unique()) <= levels + 1
    if mode == "tanh":
        f, n = torch.tanh, levels
        assert (y.min(), y.max()) == (x.min(), x.max())
    else:
        assert torch.equal(y.sign(), x.sign())
        x, y, f, n = x[x != 0].abs(), y[y != 0].abs(), torch.log2, levels // 2
        assert not len(x) or (y.min(), y.max()) == (x.min(), x.max())
    if len(x):
        there, back = f(x.double()), f(y.double())
        assert ((there - back).abs() <= (there.max() - there.min()) / (2 * (n - 1)) + 1e-5).all()


def test_examples_of_each_scale():
    x = torch.tensor([-4.0, -1.1, 0.0, 1.0, 3.9, 4.0])
    signature = RobustWeightSignature({"x": x})
    assert signature.quantize(3)["x"].tolist() == [-4, 0, 0, 0, 4, 4]
    assert signature.quantize(6, "log")["x"].tolist() == [-4, -1, 0, 1, 4, 4]
    assert signature.quantize(3, "tanh")["x"].tolist() == pytest.approx([-4, -4, 0, 4, 4, 4], abs=1e-6)
    for mode in ("linear", "log", "tanh"):
        same_everywhere = RobustWeightSignature({"x": torch.full((5,), -0.3), "z": torch.zeros(4)}).quantize(8, mode)
        assert torch.equal(same_everywhere["x"], torch.full((5,), -0.3))
        assert torch.equal(same_everywhere["z"], torch.zeros(4))
    for x in (torch.tensor([19.0, 19.6, 20.0]), torch.tensor([18.9, 19.0])):
        y = RobustWeightSignature({"x": x}).quantize(5, "tanh")["x"]
        torch.testing.assert_close(y, x, rtol=0, atol=0.13)
    far = RobustWeightSignature({"x": torch.tensor([-30.0, 0.0, 25.0, 30.0])}).quantize(16, "tanh")["x"]
    assert far.tolist()[::3] == [-30.0, 30.0]
    assert far.isfinite().all()


@pytest.mark.parametrize("levels", [2**24, 2**32])
def test_very_many_levels_are_almost_the_identity(levels):
    _, (r1, _, _) = signatures()
    close(r1.quantize(levels), r1)


def test_bytes():
    torch.manual_seed(0)
    signature = RobustWeightSignature({"conv": torch.randn(32, 16, 3, 3), "bias": torch.randn(32)})
    full = 4 * (32 * 16 * 9 + 32)
    assert signature.nbytes == full
    small = signature.quantize(16)
    assert small.nbytes == full / 8 + 2 * 8
    assert small.nbytes < full / 7
    assert signature.quantize(17).nbytes == math.ceil(4608 * 5 / 8) + 20 + 2 * 8
    assert small.norms["bias"] == pytest.approx(signature.norms["bias"], rel=0.1)
    for bad in (1, 2**32 + 1):
        with pytest.raises(ValueError, match="levels must be"):
            signature.quantize(bad)
    with pytest.raises(ValueError, match="levels must be >= 4"):
        signature.quantize(3, "log")
    with pytest.raises(TypeError, match="levels must be an integer"):
        signature.quantize(16.0)
    with pytest.raises(ValueError, match="unknown mode 'cubic'"):
        signature.quantize(16, "cubic")


def test_batch_norm_tensors_count_as_bytes():
    _, (r1, _, _) = signatures(make=normed)
    assert r1.nbytes == 4 * (4 * 9 + 4 + 5 * 4 * 9) + 4 * 4 * (4 + 5)


@pytest.mark.parametrize("mode", [None, "linear", "log", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_saved_and_loaded_is_bit_identical(tmp_path, mode, dtype):
    torch.manual_seed(0)
    signature = RobustWeightSignature(
        {"b": torch.randn(3, 5).to(dtype), "a": torch.randn(7).to(dtype)}, corruption="fog", architecture="abc",
        batchnorm={"n.weight": torch.rand(3)}, models=2,
    )  # fmt: skip
    signature = signature if mode is None else signature.quantize(11, mode)
    signature.save(tmp_path / "s.safetensors")
    loaded = RobustWeightSignature.load(tmp_path / "s.safetensors")
    assert loaded == signature
    assert list(loaded) == ["b", "a"]
    assert all(loaded[n].dtype == dtype for n in loaded)
    assert (loaded.corruption, loaded.architecture, loaded.models, loaded.nbytes) == ("fog", "abc", 2, signature.nbytes)


def test_what_is_no_signature_is_said(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        RobustWeightSignature.load(path)
    path.write_text("nothing of the kind")
    with pytest.raises(ValueError, match="is not a signature"):
        RobustWeightSignature.load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is not a signature that can be read: None"):
        RobustWeightSignature.load(path)


# Batch norm


def batches(n=3, size=8, seed=0, shift=0.5):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 1, 7, 7, generator=g) + shift, torch.zeros(size)) for _ in range(n)]


def test_reestimation_is_the_mean_over_samples():
    torch.manual_seed(0)
    ours = normed().eval()
    theirs = copy.deepcopy(ours)
    ours[1].momentum = 0.3
    state = torch.get_rng_state()
    reestimate_batchnorm(ours, batches())
    assert torch.equal(torch.get_rng_state(), state)
    theirs[7].p = 0.0
    torch.optim.swa_utils.update_bn(batches(), theirs)  # equal batches: each has the same weight there too
    assert not ours.training
    assert ours[1].momentum == 0.3
    assert ours[1].num_batches_tracked == 0
    for i in (1, 4):
        torch.testing.assert_close(ours[i].running_mean, theirs[i].running_mean)
        torch.testing.assert_close(ours[i].running_var, theirs[i].running_var)
    uneven = [x[:k] for (x, _), k in zip(batches(), (2, 5, 8), strict=True)]
    reestimate_batchnorm(ours, uneven)
    maps = [ours[0](x) for x in uneven]
    torch.testing.assert_close(ours[1].running_mean, torch.cat(maps).mean((0, 2, 3)))
    weighted = sum(len(m) * m.var((0, 2, 3)) for m in maps) / 15
    torch.testing.assert_close(ours[1].running_var, weighted)


def test_reestimation_where_there_is_nothing_to_do():
    model = convnet()
    before = bits(model)
    assert same(reestimate_batchnorm(model, []), before)
    model, before = (m := normed()), bits(m)
    with pytest.raises(ValueError, match="loader gave no batch"):
        reestimate_batchnorm(model, iter(()))
    assert same(model, before)
    assert model.training


def test_a_patch_brings_the_robust_batch_norm_and_new_statistics():
    standard, (r1, r2) = signatures(2, normed)
    clean, loader = bits(standard), batches()
    apply_(standard, [r1, r2], loader=loader)
    for i in (1, 4):
        for name in ("weight", "bias"):
            key = f"{i}.{name}"
            torch.testing.assert_close(standard.state_dict()[key], (r1.batchnorm[key] + r2.batchnorm[key]) / 2)
    whole = bits(standard)
    again = reestimate_batchnorm(copy.deepcopy(standard), loader)
    assert same(again, whole)
    assert same(remove_(standard), clean)
    apply_(standard, r1, 0.25, loader=loader)
    half = copy.deepcopy(standard)
    reestimate_batchnorm(half, loader)
    key = "1.running_var"
    blended = 0.75 * r1.batchnorm[key] + 0.25 * half.state_dict()[key]
    torch.testing.assert_close(standard.state_dict()[key], blended)
    close((r1 + r2).batchnorm, {k: (r1.batchnorm[k] + r2.batchnorm[k]) / 2 for k in r1.batchnorm})
    three_of = (r1 + r2 + r2).batchnorm[key]
    torch.testing.assert_close(three_of, (r1.batchnorm[key] + 2 * r2.batchnorm[key]) / 3)


def test_without_a_loader_the_statistics_are_stale_and_it_warns():
    standard, (r1, r2) = signatures(2, normed)
    clean = bits(standard)
    with pytest.warns(UserWarning, match="running statistics of batch norm do not fit") as seen:
        apply_(standard, r1)
    assert seen[0].filename == __file__
    assert torch.equal(standard[1].running_mean, r1.batchnorm["1.running_mean"])
    with pytest.warns(UserWarning, match="running statistics"):
        apply_(standard, r2)
    with pytest.warns(UserWarning, match="running statistics"):
        remove_(standard, r1)
    assert torch.equal(standard[1].running_mean, r2.batchnorm["1.running_mean"])
    remove_(standard, r2)
    assert same(standard, clean)


def test_patches_within_patches_on_batch_norm():
    standard, (r1, r2) = signatures(2, normed)
    clean = bits(standard)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with patch(standard, r1, loader=batches()):
            outer = bits(standard)
            with patch(standard, r2, 0.5, loader=batches(shift=2.0)):
                assert not same(standard, outer)
            assert same(standard, outer)
    assert same(standard, clean)


def test_a_loader_that_fails_leaves_no_patch():
    standard, (r1, _) = signatures(2, normed)
    clean = bits(standard)
    with pytest.raises(RuntimeError):
        apply_(standard, r1, loader=[torch.zeros(4, 3, 7, 7)])
    assert same(standard, clean)
    with pytest.raises(RuntimeError, match="not patched"):
        remove_(standard)


def test_a_signature_by_hand_leaves_statistics_to_come_back():
    standard, _ = signatures(2, normed)
    clean = bits(standard)
    with patch(standard, RobustWeightSignature({"0.bias": torch.ones(4)}), loader=batches()):
        assert not torch.equal(standard[1].running_mean, clean["1.running_mean"])
        assert torch.equal(standard[1].weight, clean["1.weight"])
    assert same(standard, clean)


def test_transfer_takes_batch_norm_along():
    _, (r1, _) = signatures(2, normed)
    new = normed(classes=9)
    apply_(new, r1, loader=batches())
    assert torch.equal(new[4].weight, r1.batchnorm["4.weight"])
