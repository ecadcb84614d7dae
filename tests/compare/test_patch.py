"""Patches: which models the arms start from, what is measured, and what the family asks of a task."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import weightroom as wr
from weightroom.compare import patch
from weightroom.compare.base import Options
from weightroom.data import corrupt
from weightroom.errors import UsageError
from weightroom.papers import robust_signatures
from weightroom.study import Trial

IMAGES = {"noise", "blur", "contrast", "brightness", "fog"}


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )  # fmt: skip


def table(n=120, **more):
    x = 5 + 2 * torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x[:, :3].argmax(1))
    return wr.Task(
        "table", **{"model": mlp, "train": data, "test": data, "recipe": {"epochs": 5, "lr": 1e-2, "batch_size": 30}, **more}
    )


def images(n=60, model=convnet):
    x = torch.rand(n, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, torch.arange(n) % 3)
    return wr.Task("images", model=model, train=data, test=data, recipe={"epochs": 2, "lr": 1e-2, "batch_size": 30})


def trial(kind="noise", seed=0, folder=None):
    return Trial(seed=seed, scale=wr.Scale.SMALL, setting=kind, shared=folder)


def origin(task, kind="noise", folder=None, **how):
    made = trial(kind, folder=folder)
    return patch.Origin(task, made, None, patch._units(task)), made


def states(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def test_the_comparison_runs_every_arm_under_every_corruption(tmp_path):
    results = wr.compare("patch", images(), seeds=1, store=tmp_path, workers=1)
    assert results.failed == 0
    frame = results.frame
    assert {*patch.BASELINES, *robust_signatures.PAPER.methods} <= set(frame.arm)
    assert set(frame.setting) == IMAGES
    row = frame[frame.setting == "fog"].set_index("arm")
    model = convnet()
    assert row.loc["none", "patch_bytes"] == 0
    assert row.loc["retrained on corrupted data", "patch_bytes"] == sum(t.nbytes for t in model.state_dict().values())
    assert row.loc["batch norm re-estimated", "patch_bytes"] == 2 * 4 * 4
    signature = 4 * (4 * 9 + 4) + 4 * 4 * 4  # the first convolution, and a batch norm
    for name in ("robust weight signature", "random patch of equal norm", "first layers of the retrained"):
        assert row.loc[name, "patch_bytes"] == signature
    assert row.loc["robust weight signature, 16 levels", "patch_bytes"] < signature
    assert (frame.clean_accuracy.between(0, 1)).all()
    assert row.loc["none", "trainings"] != row.loc["retrained on corrupted data", "trainings"] == 1
    none = frame[frame.arm == "none"]
    assert none.clean_accuracy.nunique() == 1


def test_no_arm_for_batch_norm_where_there_is_none():
    made, settings = patch.arms(table(), patch.BASELINES, Options())
    assert "batch norm re-estimated" not in made
    assert set(made) == set(patch.BASELINES) - {"batch norm re-estimated"}
    assert settings == {"noise": "noise", "dropout": "dropout"}


def test_clean_and_robust_go_on_from_one_start(tmp_path):
    task = table()
    first, spent = origin(task, folder=tmp_path)
    assert not spent.spent
    start, clean = states(first.pre), states(first.clean)
    assert not spent.spent
    robust = states(first.robust)
    assert spent.spent["trainings"] == 1
    assert spent.spent["steps"] == 2 * 4  # 0.4 of five epochs
    assert not any(torch.equal(a[n], b[n]) for a, b in ((start, clean), (start, robust), (clean, robust)) for n in start)
    second, again = origin(task, "dropout", folder=tmp_path)
    assert all(torch.equal(clean[n], t) for n, t in second.clean.state_dict().items())
    assert not torch.equal(second.robust.state_dict()["0.weight"], robust["0.weight"])
    third, again = origin(task, folder=tmp_path)
    assert all(torch.equal(robust[n], t) for n, t in third.robust.state_dict().items())
    assert again.spent == spent.spent  # what was made once is still paid by each arm that needs it


def test_a_trained_module_is_the_start():
    model = mlp()
    before = states(model)
    made, _ = origin(table(model=model))
    assert all(torch.equal(before[n], t) for n, t in made.pre.state_dict().items())
    _ = made.robust
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_units_follow_the_training_data():
    task = table()
    units = patch._units(task)
    torch.testing.assert_close(units["offset"], task.train[:][0].mean(0))
    dropped = corrupt(task.train[:][0], "dropout", **units, generator=torch.Generator().manual_seed(0))
    assert (dropped - units["offset"]).abs().min() < 1e-5
    scaled = TensorDataset(200 * torch.rand(60, 1, 7, 7) - 100, torch.arange(60) % 3)
    units = patch._units(images().with_(train=scaled))
    assert units["offset"] == pytest.approx(-100, abs=1)
    assert units["scale"] == pytest.approx(200, abs=2)


def test_batches_are_the_corrupted_training_data_and_repeat():
    task = images()
    made, _ = origin(task, "brightness")
    once, twice = ([x for x, _ in made.batches] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    expected = corrupt(task.train[:][0], "brightness", **patch._units(task))
    assert torch.cat(once).sum() == pytest.approx(float(expected.sum()), rel=1e-5)
    noisy, _ = origin(task, "noise")
    assert torch.equal(next(iter(noisy.batches))[0], next(iter(noisy.batches))[0])


def test_null_arms():
    made, _ = origin(table())
    clean, robust, signature = copy.deepcopy(made.clean), made.robust, made.signature(0.5)
    assert list(signature) == ["0.weight", "0.bias"]
    copied, _ = patch._copied(copy.copy(made), 0.5)
    torch.testing.assert_close(copied[0].weight, robust[0].weight)
    assert torch.equal(copied[2].weight, clean[2].weight)
    random = patch.random_like(signature, 0)
    assert random.norms == pytest.approx(signature.norms)
    assert not torch.allclose(random["0.weight"], signature["0.weight"], atol=1e-3)
    assert random == patch.random_like(signature, 0) != patch.random_like(signature, 1)
    made, _ = origin(table())
    mean, _ = patch._mean(made)
    torch.testing.assert_close(mean[4].weight, (clean[4].weight + robust[4].weight) / 2)


def test_metrics_are_those_on_corrupted_data():
    task = table(200)
    arms, _ = patch.arms(task, patch.BASELINES, Options())
    found = arms["none"].run(trial("dropout"))
    assert found["clean_accuracy"] > found["accuracy"] + 0.05
    assert found == arms["none"].run(trial("dropout"))
    model = origin(task, "dropout")[0].clean
    assert found["clean_accuracy"] == task.evaluate(model)["accuracy"]
    validation = trial("dropout")
    validation.split = "val"
    assert arms["none"].run(validation)["clean_accuracy"] == task.evaluate(model, "val")["accuracy"]


def test_what_it_cannot_compare_is_said(tmp_path):
    real = TensorDataset(torch.randn(8, 4), torch.randn(8, 1))
    with pytest.raises(UsageError, match="needs one class label per sample"):
        wr.compare(
            "patch",
            table(model=lambda: nn.Linear(4, 1), train=real, test=real, loss=nn.MSELoss(), metrics=["mse"]),
            store=tmp_path,
        )
    with pytest.raises(UsageError, match="at least two convolution or linear layers"):
        wr.compare("patch", table(model=lambda: nn.Linear(4, 3)), store=tmp_path)
    rows = TensorDataset(torch.randn(30, 4, 4), torch.arange(30) % 3)
    with pytest.raises(UsageError, match="corruptions need images"):
        flat = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, 3))
        wr.compare("patch", table(model=flat, train=rows, test=rows), store=tmp_path)
    with pytest.raises(UsageError, match=r"share must be in \(0, 1\], got 0"):
        origin(table())[0].signature(0.0)
