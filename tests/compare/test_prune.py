"""The pruning comparison: its operating points, what it times, what it exports."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

import weightroom as wr
from weightroom.compare import prune
from weightroom.errors import UsageError


def net():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def toy(**more):
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x[:, :3].argmax(1))
    return wr.Task("toy", **{"model": net, "train": data, "test": data, "recipe": {"epochs": 2, "lr": 1e-2}, **more})


def test_the_usual_operating_points_are_those_of_shrinkbench():
    _, settings = prune.arms(toy(), {}, prune.Options())
    assert [1 / (1 - sparsity) for sparsity in settings.values()] == [2, 4, 8, 16, 32]


def test_every_arm_runs_and_latency_is_measured_for_one_sample_and_a_batch(tmp_path):
    results = wr.compare("prune", toy, sparsity=0.5, seeds=1, scale="smoke", store=tmp_path, workers=1)
    assert results.failed == 0
    assert {"GraSP", "SNIP", "LAMP", "ERK", "dense"} <= set(results.frame.arm)
    assert (results.frame[["latency", "latency_1"]] > 0).all(axis=None)
    assert "onnx_latency" not in results.frame


def test_the_best_model_of_each_point_is_exported_and_computes_what_was_measured(tmp_path):
    onnx = pytest.importorskip("weightroom.metrics.onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    results = wr.compare(
        "prune", toy, arms=["global magnitude", "random"], sparsity=(0.5, 0.75), seeds=2, store=tmp_path / "runs", workers=1, export=tmp_path / "out"
    )  # fmt: skip
    assert results.failed == 0
    assert (results.frame[["onnx_latency", "onnx_latency_1"]] > 0).all(axis=None)
    x, y = toy().test.tensors
    for setting in ("0.5", "0.75"):
        folder = tmp_path / "out" / f"sparsity-{setting}"
        told = json.loads((folder / "model.json").read_text())
        rows = results.frame[(results.frame.setting == setting) & (results.frame.arm != "dense")]
        best = rows.groupby("arm").accuracy.mean().idxmax()
        assert told["arm"] == best
        assert told["accuracy"] == pytest.approx(rows[rows.arm == best].accuracy.max())
        model = net()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        assert float((model(x).argmax(1) == y).double().mean()) == pytest.approx(told["accuracy"])
        torch.testing.assert_close(onnx.onnx_outputs(folder / "model.onnx", x), model(x).detach(), rtol=1e-3, atol=1e-5)
        weights = torch.cat([model[i].weight.flatten() for i in (0, 2)])
        assert float((weights == 0).double().mean()) == pytest.approx(float(setting), abs=0.01)


def test_export_belongs_to_pruning(tmp_path):
    for option in ({"export": tmp_path / "out"}, {"onnx": True}):
        with pytest.raises(UsageError, match="belongs to the family 'prune', not to 'loss'"):
            wr.compare("loss", toy, store=tmp_path, **option)
