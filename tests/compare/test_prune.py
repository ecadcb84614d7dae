"""The pruning comparison: its operating points, what it times, what it exports."""

import json
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

import weightroom as wr
from weightroom.compare import prune
from weightroom.errors import UsageError
from weightroom.prune import PruningPlan, TrainTimePruner, WrappedModel
from weightroom.study import Scale, Trial


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
    # what has not reached the operating point is no candidate
    best = json.loads((tmp_path / "out" / "sparsity-0.5" / "model.json").read_text())["arm"]
    results.frame.loc[results.frame.arm == best, "sparsity"] = 0.4
    prune.export(results, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "sparsity-0.5" / "model.json").read_text())["arm"] != best


def test_export_belongs_to_pruning(tmp_path):
    for option in ({"export": tmp_path / "out"}, {"onnx": True}):
        with pytest.raises(UsageError, match="belongs to the family 'prune', not to 'loss'"):
            wr.compare("loss", toy, store=tmp_path, **option)


def test_crops_are_built_anew_and_reach_the_density_of_the_masks(tmp_path):
    results = wr.compare("prune", toy, arms=["PreCrop", "PreCrop, gp"], sparsity=0.5, seeds=1, store=tmp_path, workers=1)
    assert results.failed == 0
    crops = results.frame[results.frame.arm != "dense"]
    # a hidden channel of this network has 9 of the 144 weights: 8 of 16 channels are exactly half
    assert crops.sparsity.tolist() == [0.5, 0.5]
    assert crops.parameters.tolist() == [8 * 9 + 8 + 3] * 2


class Half(WrappedModel):
    """Switches off the upper half of the hidden layer once half of the training has passed."""

    def __init__(self, model):
        super().__init__()
        self.model, self.gate, self.seen = model, nn.Parameter(torch.ones(())), []

    def forward(self, x):
        hidden = self.model[1](self.model[0](x))
        if self.seen and self.seen[-1] > 0.5:
            hidden = hidden * (torch.arange(16) < 8)
        self.rows = len(x)
        return self.model[2](hidden)

    def aux_loss(self):
        return self.gate**2

    def param_groups(self):
        return [{"params": self.model.parameters()}, {"params": [self.gate], "lr": 0.1}]

    def advance(self, progress):
        self.seen.append(progress)

    def report(self, loader):
        raise NotImplementedError

    def macs(self, *, gates, others):
        assert gates
        assert others
        return torch.full((self.rows,), 72)


class Halving(TrainTimePruner):
    made: ClassVar[list[Half]] = []

    def __init__(self, dynamic):
        self.dynamic = dynamic

    def wrap(self, model, example_inputs):
        assert example_inputs.shape == (1, 6)
        self.made.append(Half(model))
        return self.made[-1]

    def derive(self, wrapped, loader):
        assert sum(len(batch[0]) for batch in loader) == len(toy(val=toy().test).train)
        plan = PruningPlan({"0.weight": (torch.arange(16) < 8)[:, None].expand(16, 6)})
        return plan.apply(wrapped.model), plan


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_train_time_pruner_is_trained_in_its_gates_and_then_measured(tmp_path, dynamic):
    Halving.made.clear()
    task = toy(val=toy().test, recipe={"epochs": 5, "lr": 1e-2})
    arms, settings = prune.arms(task, {"halving": prune.PruneMethod(lambda sparsity: Halving(dynamic))}, prune.Options())
    trial = Trial(0, Scale.SMALL, setting=settings["0.5"], folder=tmp_path)
    found = arms["halving"].run(trial)
    (wrapped,) = Halving.made
    assert wrapped.seen == [0.25, 0.5, 0.75, 1.0]  # fine-tuning takes two fifths of five epochs, of two batches each
    assert 0 < wrapped.gate.item() < 1  # trained by the auxiliary loss
    assert found["sparsity"] == (0.0 if dynamic else 0.5)
    assert trial.spent["flops"] == 2 * (72 if dynamic else 144)
    assert found["accuracy"] > 0.4
