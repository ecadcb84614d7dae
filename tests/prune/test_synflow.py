from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from tests.prune.zoo import make
from weightroom.metrics import copy_model
from weightroom.prune import PruningPlan, SynFlowPruner
from weightroom.prune.base import prunable
from weightroom.prune.synflow import _Flow


def flow(model: nn.Module, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    """Scores of the whole model, and R."""
    tensors = prunable(model)
    linear = _Flow(model, tensors, inputs)
    scores = linear.scores([torch.ones_like(site.tensor, dtype=torch.bool) for site in tensors])
    with torch.no_grad():
        return scores, linear.model(linear.inputs).sum()


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))


def test_value_is_the_product_of_absolute_weights():
    model = perceptron()
    product = torch.ones(5, dtype=torch.float64)
    for layer in (0, 2, 4):
        product = model[layer].weight.detach().double().abs() @ product
    assert flow(model, torch.randn(4, 5))[1] == pytest.approx(float(product.sum()), rel=1e-12)


def test_score_of_a_weight_is_the_sum_over_the_paths_through_it():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    model[2].weight.data = torch.tensor([[-5.0, 0.5]])
    (first, last), R = flow(model, torch.zeros(1, 2))
    assert first.tolist() == [[5.0, 10.0], [1.5, 2.0]]
    assert last.tolist() == [[15.0, 3.5]]
    assert R == 18.5


@pytest.mark.parametrize("name", ["mlp", "cnn", "mobile"])
def test_flow_is_conserved_by_every_layer(name):
    model, x, _ = make(name)
    scores, R = flow(model, x)
    assert all(bool((score >= 0).all()) for score in scores)
    assert all(float(score.sum()) == pytest.approx(float(R), rel=1e-10) for score in scores)


def test_neither_data_nor_signs_nor_biases_nor_norms_play_a_part():
    model, x, _ = make("residual")
    other = copy_model(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if p.ndim > 1:
                p.mul_(torch.randn_like(p).sign())
            else:
                p.copy_(torch.randn_like(p) + ("weight" in name))
        other.bn.running_mean.fill_(3.0)
        other.bn.running_var.fill_(0.1)
    first = SynFlowPruner(0.8).fit(model, example_inputs=x)
    second = SynFlowPruner(0.8).fit(other, [(torch.full_like(x, -7.0), None)])
    assert all(torch.equal(second.masks[k], mask) for k, mask in first.masks.items())


def test_rounds_follow_the_geometric_schedule_and_score_anew():
    model, x, _ = make("cnn")
    tensors = prunable(model)
    linear = _Flow(model, tensors, x)
    masks = [torch.ones_like(site.tensor, dtype=torch.bool) for site in tensors]
    total = sum(mask.numel() for mask in masks)
    for r in range(1, 6):  # by hand: five rounds to 10 %
        scores = linear.scores(masks)
        pool = torch.cat([s.masked_fill(~m, -1).flatten() for s, m in zip(scores, masks, strict=True)])
        tau = pool.sort().values[round((1 - 0.1 ** (r / 5)) * total) - 1]
        masks = [(s > tau) & m for s, m in zip(scores, masks, strict=True)]
    plan = SynFlowPruner(0.9, rounds=5).fit(model, example_inputs=x)
    assert all(torch.equal(mask, plan.masks[site.name]) for site, mask in zip(tensors, masks, strict=True))
    once = SynFlowPruner(0.9, rounds=1).fit(model, example_inputs=x)
    assert any((once.masks[k] != mask).any() for k, mask in plan.masks.items())


def test_many_rounds_keep_every_layer_where_one_collapses():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)
    )
    kept = lambda rounds: [  # noqa: E731
        layer.kept for layer in SynFlowPruner(0.999, rounds=rounds).fit(model, example_inputs=torch.zeros(1, 8)).layers().values()
    ]
    assert min(kept(1)) == 0
    assert min(kept(100)) > 0


def test_a_deep_network_overflows_neither_float32_nor_in_half_precision():
    torch.manual_seed(0)
    layers = [layer for _ in range(40) for layer in (nn.Linear(32, 32, bias=False), nn.ReLU())]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    _, R = flow(model, torch.zeros(1, 32))
    assert R > 3.4e38  # beyond float32
    for dtype in (torch.float32, torch.float16):
        plan = SynFlowPruner(0.9).fit(model.to(dtype), example_inputs=torch.zeros(1, 32, dtype=dtype))
        assert min(layer.kept for layer in plan.layers().values()) > 0
    with torch.no_grad():
        for p in model.float().parameters():
            p.fill_(3e38)
    with pytest.raises(ValueError, match=r"the synaptic flow through '0\.weight' holds NaN or infinity"):
        SynFlowPruner(0.5).fit(model, example_inputs=torch.zeros(1, 32))


def test_masks_already_in_force_carry_no_flow():
    model = perceptron()
    mask = torch.ones(7, 5)
    mask[0] = 0
    torch_prune.custom_from_mask(model[0], "weight", mask)
    scores, _ = flow(model, torch.zeros(1, 5))
    assert not scores[0][0].any()
    assert not scores[1][:, 0].any()


def test_inputs_of_several_tensors_and_indices():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 6)
            self.inner = nn.Linear(6, 8)
            self.head = nn.Linear(8 + 3, 2)

        def forward(self, tokens: Tensor, extra: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(torch.cat([torch.relu(self.inner(self.table(tokens).mean(1))), extra], 1))}

    torch.manual_seed(0)
    model, inputs = Two(), {"tokens": torch.tensor([[1, 2], [3, 4]]), "extra": torch.randn(2, 3)}
    a = SynFlowPruner(0.5).fit(model, example_inputs=inputs)
    b = SynFlowPruner(0.5).fit(model, example_inputs=(inputs["tokens"], inputs["extra"]))
    assert a.sparsity() == pytest.approx(0.5, abs=0.01)
    assert all(torch.equal(b.masks[k], mask) for k, mask in a.masks.items())


def test_queries_and_keys_have_next_to_no_flow():
    pytest.importorskip("transformers")
    model, x, _ = make("vit")
    plan: PruningPlan = SynFlowPruner(0.6).fit(model, example_inputs=x)
    kept = {name: layer.kept / layer.size for name, layer in plan.layers().items()}
    assert (
        max(v for k, v in kept.items() if "q_proj" in k or "k_proj" in k) < 0.1 < min(v for k, v in kept.items() if "v_proj" in k)
    )


def test_fewer_weights_than_layers_leave_no_flow_and_are_exact_all_the_same():
    model, x, _ = make("mlp")
    plan = SynFlowPruner(1 - 1 / 264).fit(model, example_inputs=x)
    assert sum(layer.kept for layer in plan.layers().values()) == 1


def test_errors():
    model, x, _ = make("mlp")
    with pytest.raises(TypeError, match="give example_inputs, or data"):
        SynFlowPruner(0.5).fit(model)
    with pytest.raises(TypeError, match="give example_inputs, or data"):
        SynFlowPruner(0.5).fit(model, [])
    for rounds in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="rounds must be an integer >= 1"):
            SynFlowPruner(0.5, rounds=rounds)
    with torch.no_grad():
        model[2].weight.zero_()
    with pytest.raises(ValueError, match="no synaptic flow"):
        SynFlowPruner(0.5).fit(model, example_inputs=x)
