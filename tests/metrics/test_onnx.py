from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from weightroom.metrics import onnx
from weightroom.nets.small import ConvNet

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.manual_seed(0)
    model = ConvNet(1, 4, channels=(4, 8)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    before = copy.deepcopy(model.state_dict())
    path = onnx.to_onnx(model, torch.rand(1, 1, 8, 8), tmp_path_factory.mktemp("onnx") / "model.onnx")
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return model.eval(), path


def test_it_computes_the_same_for_any_batch_size_with_the_statistics_of_eval_mode(written):
    model, path = written
    for n in (1, 2, 7):
        x = torch.rand(n, 1, 8, 8)
        torch.testing.assert_close(onnx.onnx_outputs(path, x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_latency(written):
    assert 0 < onnx.onnx_latency(written[1], torch.rand(1, 1, 8, 8), repeats=3) < 1


def test_a_file_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    true = onnx.onnx_outputs
    monkeypatch.setattr(onnx, "onnx_outputs", lambda path, inputs: true(path, inputs) + 1e-2)
    with pytest.raises(onnx.OnnxMismatchError, match="differs from the model by"):
        onnx.to_onnx(nn.Linear(3, 2), torch.rand(4, 3), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
