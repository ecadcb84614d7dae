"""Stage-wise weight sharing: one block per stage, descendants that are the auxiliary network's function, and its distillation."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from weightroom.distill import SoftmaxKDLoss
from weightroom.prune import GlobalMagnitudePruner
from weightroom.weights import StageSharedEncoder, build_descendant, default_source, learn_learngene, learngene_expand


def block(width=8):
    return nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)


class Net(nn.Module):
    """A ViT without the patches: tokens (N, 4, 3) to logits."""

    def __init__(self, layers, width=8):
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, 4, width))
        self.layers = layers
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x) + self.position
        if isinstance(self.layers, nn.ModuleList):
            for layer in self.layers:
                x = layer(x)
        else:
            x = self.layers(x)
        return self.head(self.norm(x).mean(1))


@pytest.fixture
def aux():
    torch.manual_seed(0)
    return Net(StageSharedEncoder(block, (2, 1, 3)))


X = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 4, 0])


def count(module):
    return sum(p.numel() for p in module.parameters())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# The encoder ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [(1, 1, 1), (3, 4, 3), (9, 1, 2)])
def test_parameters_do_not_depend_on_repeats(repeats):
    encoder = StageSharedEncoder(block, repeats)
    assert count(encoder) == 3 * count(block())
    assert len(encoder) == sum(repeats)
    assert encoder.repeats == repeats
    assert [list(encoder.blocks).index(layer) for layer in encoder] == list(encoder.schedule)


def test_default_is_the_papers_schedule():
    encoder = StageSharedEncoder(lambda: nn.Linear(2, 2))
    assert encoder.schedule == (0,) * 3 + (1,) * 3 + (2,) * 4 + (3,) * 3 + (4,) * 3
    assert encoder[-1] is encoder.blocks[4]
    assert encoder[6:9] == [encoder.blocks[2]] * 3


def test_state_dict_has_no_duplicates(aux):
    state = aux.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    assert sum(t.numel() for t in state.values()) == count(aux)


def test_forward_and_gradient_are_those_of_the_unrolled_copy(aux):
    unrolled = Net(learngene_expand(aux.layers.blocks, 6, aux.layers.schedule))
    for part in ("embed", "norm", "head"):
        unrolled.get_submodule(part).load_state_dict(aux.get_submodule(part).state_dict())
    unrolled.position.data.copy_(aux.position)
    loss, twin = F.cross_entropy(aux(X), Y), F.cross_entropy(unrolled(X), Y)
    assert torch.equal(loss, twin)
    loss.backward()
    twin.backward()
    for stage, shared in enumerate(aux.layers.blocks):
        uses = [dict(unrolled.layers[i].named_parameters()) for i, s in enumerate(aux.layers.schedule) if s == stage]
        for name, p in shared.named_parameters():
            torch.testing.assert_close(p.grad, sum(use[name].grad for use in uses), rtol=1e-4, atol=1e-7)


def test_further_arguments_reach_every_layer():
    class Shift(nn.Module):
        def forward(self, x, by, *, times):
            return x + by * times

    assert torch.equal(StageSharedEncoder(Shift, (2, 1))(torch.zeros(1, 1), 2.0, times=3), torch.full((1, 1), 18.0))


class Times(nn.Module):
    """Doubles its input, so that a skipped block is seen in the output."""

    def __init__(self, by=2.0):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x):
        return self.by * x


def test_drop_path_follows_the_position():
    encoder = StageSharedEncoder(Times, (2, 1), drop_path=0.5)
    x = torch.ones(4000, 1, 1)
    torch.manual_seed(0)
    out = encoder(x).detach().flatten()
    # Layer 0 always doubles; layer 1 has rate 1/4: x or x + x / (3/4); layer 2 has rate 1/2: x or x + 2 x.
    expected = torch.tensor([2.0, 6.0, 14 / 3, 14.0])
    near = (out[:, None] - expected).abs() < 1e-4
    assert bool(near.any(1).all())
    torch.testing.assert_close(near.float().mean(0), torch.tensor([1 / 8, 1 / 8, 3 / 8, 3 / 8]), atol=0.03, rtol=0)
    assert float(out.mean()) == pytest.approx(8, abs=0.3)  # the mean is that of the full network
    assert torch.equal(encoder.eval()(x), 8 * x)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: StageSharedEncoder(block, ()), "repeats"),
        (lambda: StageSharedEncoder(block, (2, 0)), "repeats"),
        (lambda: StageSharedEncoder(block, drop_path=1.0), "drop_path"),
        (lambda: StageSharedEncoder(lambda: nn.Linear(3, 4)), "as wide as its inputs, .*3 and 4"),
        (lambda: StageSharedEncoder(lambda: nn.Conv2d(3, 4, 1)), "3 and 4"),
        (lambda: StageSharedEncoder(lambda: nn.Sequential(nn.Linear(3, 4)), (1,))(torch.rand(2, 3)), r"stage 0 .*\(2, 3\) into \(2, 4\)"),
    ],
)  # fmt: skip
def test_encoder_says_what_is_wrong(make, what):
    with pytest.raises(ValueError, match=what):
        make()


def test_encoder_wants_modules_and_integers():
    with pytest.raises(TypeError, match="repeats must be an integer"):
        StageSharedEncoder(block, (1.5,))
    with pytest.raises(TypeError, match=r"nn.Module"):
        StageSharedEncoder(lambda: torch.relu, (2,))


def test_a_factory_that_gives_the_same_twice_is_refused():
    def with_table(table):
        layer = nn.Linear(4, 4)
        layer.table = table
        return layer

    one, table, buffer = nn.Linear(4, 4), nn.Parameter(torch.zeros(4)), torch.zeros(4)
    for factory, what in (
        (lambda: one, r"blocks\[1\] is blocks\[0\]"),
        (iter([nn.Linear(4, 4), one, one]).__next__, r"blocks\[2\] is blocks\[1\]"),
        (nn.Identity().requires_grad_, r"blocks\[1\] is blocks\[0\]"),
        (lambda: with_table(table), r"blocks\[1\] shares 'table' with blocks\[0\]"),
        (lambda: nn.Sequential(nn.Linear(4, 4), one), r"blocks\[1\] shares '1.weight' with blocks\[0\]"),
    ):
        with pytest.raises(ValueError, match=f"block_factory must make a new block .*{what}"):
            StageSharedEncoder(factory, (2, 1, 1))

    def within():
        block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        block[1].weight = block[0].weight
        block.register_buffer("same", buffer)
        return block

    assert len(StageSharedEncoder(within, (2, 1))) == 3  # shared inside a block, and constants


def test_shared_batch_norm_is_warned_of():
    with pytest.warns(UserWarning, match=r"stages \[1\] have batch norms"):
        StageSharedEncoder(lambda: nn.Sequential(nn.BatchNorm1d(3)), (1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StageSharedEncoder(lambda: nn.BatchNorm1d(3), (1, 1))
        StageSharedEncoder(block, (2, 2))


# Which stage goes where ------------------------------------------------------------------------------------------------------------


def test_default_source_of_the_paper():
    assert default_source(5, 12) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [default_source(5, 16).count(s) for s in range(5)] == [4, 3, 3, 3, 3]
    assert default_source(1, 3) == [0, 0, 0]


@given(stages=st.integers(1, 12), depth=st.integers(1, 40))
@settings(deadline=None)
def test_default_source(stages, depth):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = default_source(stages, depth)
    assert len(source) == depth
    assert source == sorted(source)
    assert len(caught) == (depth < stages)
    counts = [source.count(s) for s in range(stages)]
    if depth >= stages:
        assert min(counts) == depth // stages
        assert max(counts) <= depth // stages + 1
        assert counts == sorted(counts, reverse=True)
    else:
        assert max(counts) == 1
        assert source[0] == 0
        assert depth == 1 or source[-1] == stages - 1


def test_few_layers_are_spread():
    with pytest.warns(UserWarning, match="3 layers cannot hold all 5 stages"):
        assert default_source(5, 3) == [0, 2, 4]
    with pytest.warns(UserWarning, match="cannot hold"):
        assert default_source(5, 1) == [0]


@pytest.mark.parametrize(("stages", "depth"), [(0, 3), (3, 0), (3, -1)])
def test_default_source_wants_positive_numbers(stages, depth):
    with pytest.raises(ValueError, match="must be >= 1"):
        default_source(stages, depth)
    with pytest.raises(TypeError, match="depth must be an integer"):
        default_source(3, 2.5)


# Expansion -------------------------------------------------------------------------------------------------------------------------


def test_copies_are_equal_and_independent(aux):
    blocks = aux.layers.blocks
    before = copy.deepcopy(blocks)
    layers = learngene_expand(blocks, 5)
    assert isinstance(layers, nn.ModuleList)
    assert [next(s for s in range(3) if same(layer, blocks[s])) for layer in layers] == [0, 0, 1, 1, 2]
    assert len({p.data_ptr() for p in layers.parameters()}) == len(list(layers.parameters()))
    optimizer = torch.optim.SGD(layers[0].parameters(), lr=1.0)
    layers[0](torch.randn(2, 4, 8)).square().sum().backward()
    optimizer.step()
    assert not same(layers[0], layers[1])
    assert same(layers[1], blocks[0])
    assert all(same(a, b) for a, b in zip(before, blocks, strict=True))


def test_masked_blocks_are_copied_after_a_step(aux):
    GlobalMagnitudePruner(0.5).fit(aux).apply(aux)
    aux(X).sum().backward()
    layers = learngene_expand(aux.layers.blocks, 4)
    assert all(torch.equal(layers[0].linear1.weight_mask, layer.linear1.weight_mask) for layer in (aux.layers[0], layers[1]))
    descendant = build_descendant(aux, 6, source=aux.layers.schedule)
    torch.testing.assert_close(descendant(X), aux(X), rtol=0, atol=0)
    shared = {id(t) for t in aux.state_dict(keep_vars=True).values()}
    assert not shared & {id(t) for t in descendant.state_dict(keep_vars=True).values()}
    assert all(p.grad is not None for p in aux.parameters())


@pytest.mark.parametrize("call", [learngene_expand, build_descendant])
def test_expansion_says_what_is_wrong(call, aux):
    given = aux.layers.blocks if call is learngene_expand else aux
    for depth, source, what in (
        (0, None, "depth must be >= 1"),
        (3, [0, 1], "each of the 3 layers, got 2"),
        (2, [0, 3], "stages 0 to 2, got 3"),
        (2, [-1, 0], "got -1"),
        (3, [0, 2, 1], "order of the stages"),
    ):
        with pytest.raises(ValueError, match=what):
            call(given, depth, source)
    with pytest.raises(TypeError, match="each entry of source must be an integer"):
        call(given, 2, [0, 1.0])
    with pytest.warns(UserWarning, match="breaks the order") as caught:
        call(given, 3, [0, 2, 1], allow_unordered=True)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="cannot hold") as caught:
        call(given, 2)
    assert len(caught) == 1


def test_expand_wants_modules_of_one_width():
    with pytest.raises(ValueError, match="at least one"):
        learngene_expand([], 3)
    with pytest.raises(TypeError, match=r"blocks\[1\] must be an nn.Module, got int"):
        learngene_expand([nn.Identity(), 3], 3)
    with pytest.raises(ValueError, match="as wide"):
        learngene_expand([nn.Linear(2, 3)], 3)


@pytest.mark.parametrize("training", [True, False])
def test_descendant_with_the_schedule_of_aux_is_aux(aux, training):
    aux.train(training)
    state = copy.deepcopy(aux.state_dict())
    descendant = build_descendant(aux, len(aux.layers), source=aux.layers.schedule)
    with torch.no_grad():
        assert torch.equal(descendant(X), aux(X))
    assert {m.training for m in descendant.modules()} == {training}
    assert descendant.layers.repeats == (1,) * 6
    assert count(descendant.layers) == 6 * count(block())
    assert not {p.data_ptr() for p in descendant.parameters()} & {p.data_ptr() for p in aux.parameters()}
    assert all(torch.equal(t, state[name]) for name, t in aux.state_dict().items())
    assert aux.layers.repeats == (2, 1, 3)


def test_descendants_of_other_depths(aux):
    for depth in (3, 4, 9):
        descendant = build_descendant(aux, depth)
        assert [next(s for s in range(3) if same(layer, aux.layers.blocks[s])) for layer in descendant.layers] == default_source(
            3, depth
        )
        assert same(descendant.head, aux.head)
        assert torch.equal(descendant.position, aux.position)
        assert descendant(X).shape == (6, 5)


def test_drop_path_goes_on_with_the_descendant():
    aux = Net(StageSharedEncoder(block, (2, 2), drop_path=0.3))
    assert build_descendant(aux, 3).layers.drop_path == 0.3


@pytest.mark.parametrize("kind", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
def test_blocks_in_a_list(kind):
    net = Net(kind([block(), block()]))
    descendant = build_descendant(net, 5, blocks_attr="layers")
    assert type(descendant.layers) is type(net.layers)
    assert not {m.training for m in build_descendant(net.eval(), 5, blocks_attr="layers").modules()} - {False}
    assert [same(layer, net.layers[0]) for layer in descendant.layers] == [True] * 3 + [False] * 2
    assert descendant(X).shape == (6, 5)
    net.blocks = net.layers
    del net.layers
    assert len(build_descendant(net, 4).blocks) == 4


def test_an_encoder_alone_and_one_inside(aux):
    encoder = build_descendant(aux.layers, 7)
    assert isinstance(encoder, StageSharedEncoder)
    assert len(encoder.blocks) == 7
    outer = nn.ModuleDict({"vit": aux})
    assert len(build_descendant(outer, 7, blocks_attr="vit.layers")["vit"].layers) == 7
    assert len(build_descendant(outer, 7)["vit"].layers) == 7
    outer["other"] = StageSharedEncoder(block, (1,))
    with pytest.raises(ValueError, match=r"2 StageSharedEncoders: say blocks_attr, one of vit.layers, other"):
        build_descendant(outer, 7)


def test_descendant_says_where_it_looked(aux):
    with pytest.raises(ValueError, match="Linear has no 'blocks'"):
        build_descendant(nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match=r"Net has no 'nowhere.else'"):
        build_descendant(aux, 3, blocks_attr="nowhere.else")
    with pytest.raises(TypeError, match=r"'head' must be a StageSharedEncoder.*got Linear"):
        build_descendant(aux, 3, blocks_attr="head")
    with pytest.raises(ValueError, match="at least one"):
        build_descendant(Net(nn.ModuleList()), 3, blocks_attr="layers")


def test_rest_made_anew(aux):
    torch.manual_seed(5)
    aux.norm.weight.data.fill_(3.0)
    descendant = build_descendant(aux, 4, copy_rest=False)
    assert not same(descendant.head, aux.head)
    assert not torch.equal(descendant.position, aux.position)
    assert float(descendant.position.detach().std()) < 0.05
    assert bool((descendant.norm.weight == 1).all())
    assert same(descendant.layers[0], aux.layers.blocks[0])
    assert bool((aux.norm.weight == 3).all())


def test_a_reset_of_the_whole_model_spares_the_blocks():
    class Mine(Net):
        def reset_parameters(self):
            for p in self.parameters():
                p.data.fill_(7.0)

    mine = Mine(StageSharedEncoder(block, (2, 2)))
    descendant = build_descendant(mine, 4, copy_rest=False)
    assert bool((descendant.position == 7).all())
    assert same(descendant.layers[3], mine.layers.blocks[1])


def test_a_vector_that_nothing_resets_is_an_error(aux):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

    aux.norm = Scale()
    with pytest.raises(RuntimeError, match=r"'norm.scale': give Scale a reset_parameters"):
        build_descendant(aux, 4, copy_rest=False)


@pytest.mark.parametrize("shared", [True, False])
def test_transformers_vit(shared):
    transformers = pytest.importorskip("transformers")
    size = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
    }
    config = transformers.ViTConfig(**size, num_hidden_layers=2, num_labels=3)
    model = transformers.ViTForImageClassification(config).eval()
    x = torch.randn(2, 1, 8, 8)
    if shared:
        own = iter(list(model.vit.layers))
        model.vit.layers = StageSharedEncoder(lambda: next(own), (2, 1)).eval()
        config.num_hidden_layers = 3
    descendant = build_descendant(model, 5, blocks_attr="vit.layers")
    assert descendant.config.num_hidden_layers == 5
    assert model.config.num_hidden_layers == 2 + shared
    assert descendant(x).logits.shape == (2, 3)
    source = model.vit.layers.schedule if shared else [0, 1]
    with torch.no_grad():
        twin = build_descendant(model, 2 + shared, source, blocks_attr="vit.layers")
        assert torch.equal(twin(x).logits, model(x).logits)


@pytest.mark.parametrize("shared", [True, False])
def test_kinds_of_layers_follow(shared):
    net = Net(StageSharedEncoder(block, (2, 1)) if shared else nn.ModuleList([block(), block()]))
    kinds = ["a", "a", "b"] if shared else ["a", "b"]
    net.config = SimpleNamespace(num_hidden_layers=len(kinds), layer_types=kinds, other=SimpleNamespace(num_hidden_layers=9))
    descendant = build_descendant(net, 5, blocks_attr="layers")
    assert descendant.config.layer_types == ["a", "a", "a", "b", "b"]
    assert descendant.config.num_hidden_layers == 5
    assert descendant.config.other.num_hidden_layers == 9
    assert net.config.layer_types == kinds
    assert net.config.num_hidden_layers == len(kinds)


def test_transformers_decoder():
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    config = transformers.Qwen2Config(**size, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    model = transformers.Qwen2ForCausalLM(config).eval()
    descendant = build_descendant(model, 4, blocks_attr="model.layers")
    assert [layer.self_attn.layer_idx for layer in descendant.model.layers] == [0, 1, 2, 3]
    assert all(layer.self_attn.config is descendant.config for layer in descendant.model.layers)
    assert descendant.config is not model.config
    tokens = torch.arange(6)[None]
    assert not torch.equal(descendant(tokens).logits, model(tokens).logits)  # all four layers are used
    cached = descendant.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    plain = descendant.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, plain)


# Learning the learngene -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher():
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Dropout(0.5)).train()


def losses(aux, teacher, y=Y, **how):
    """The loss of the first step."""
    return learn_learngene(copy.deepcopy(aux), teacher, [(X, y)], 1, **how).losses[0]


def test_loss_is_the_papers(aux, teacher):
    with torch.no_grad():
        s = aux(X)
        t = teacher.eval()(X)
    teacher.train()
    kd = 4.0 * (t.div(2).softmax(1) * (t.div(2).log_softmax(1) - s.div(2).log_softmax(1))).sum(1).mean()
    ce = F.cross_entropy(s, Y)
    assert losses(aux, teacher, alpha=1.0, tau=2.0) == pytest.approx(float(kd), rel=1e-5)
    assert losses(aux, teacher, alpha=0.0) == pytest.approx(float(ce), rel=1e-5)
    assert losses(aux, teacher, alpha=0.3, tau=2.0) == pytest.approx(float(0.7 * ce + 0.3 * kd), rel=1e-5)
    assert losses(aux, teacher) == pytest.approx(float(SoftmaxKDLoss(T=1.0)(s, t)), rel=1e-5)


def test_labels_are_not_looked_at_with_the_teacher_alone(aux, teacher):
    assert losses(aux, teacher) == losses(aux, teacher, y=Y.flip(0))
    assert losses(aux, teacher, alpha=0.5) != losses(aux, teacher, y=Y.flip(0), alpha=0.5)
    unlabelled = learn_learngene(copy.deepcopy(aux), teacher, DataLoader(X, batch_size=6), 1)
    assert unlabelled.losses[0] == pytest.approx(losses(aux, teacher), rel=1e-5)
    assert learn_learngene(copy.deepcopy(aux), teacher, [(X,)], 1).losses[0] == losses(aux, teacher)
    with pytest.raises(TypeError, match=r"alpha = 0.5"):
        learn_learngene(aux, teacher, [(X,)], 1, alpha=0.5)


def test_a_student_that_is_its_teacher_has_no_loss(aux):
    assert losses(aux, copy.deepcopy(aux)) == pytest.approx(0.0, abs=1e-6)


def test_training_lowers_the_loss_and_leaves_the_teacher(aux, teacher):
    before = copy.deepcopy(teacher)
    start = torch.random.get_rng_state()
    done = learn_learngene(aux, teacher, TensorDataset(X, Y), 60, lr=1e-2, batch_size=6)
    assert done.steps == 60
    assert done.losses[-1] < 0.2 * done.losses[0]
    assert same(before, teacher)
    assert teacher.training
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert torch.equal(start, torch.random.get_rng_state())


def test_the_seed_decides(aux, teacher):
    runs = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(aux)
        learn_learngene(model, teacher, TensorDataset(X, Y), 2, batch_size=2, seed=seed)
        runs.append(model)
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def rates(warmup, steps, monkeypatch):
    seen = []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr("weightroom.weights.learngene.AdamW", Watched)
    model = Net(StageSharedEncoder(block, (1,)))
    learn_learngene(model, copy.deepcopy(model), [(X, Y)], steps, lr=1.0, warmup=warmup)
    return torch.tensor(seen)


def test_rate_rises_and_falls(monkeypatch):
    cosine = (1 + torch.cos(torch.pi * torch.arange(8) / 8)) / 2
    torch.testing.assert_close(rates(0.2, 10, monkeypatch), torch.cat([torch.tensor([0.5, 1.0]), cosine]))
    torch.testing.assert_close(rates(0.0, 8, monkeypatch), cosine)


def test_vectors_are_not_decayed(monkeypatch):
    made = []

    class Watched(torch.optim.AdamW):
        def __init__(self, groups, lr):
            made.extend(groups)
            super().__init__(groups, lr=lr)

    monkeypatch.setattr("weightroom.weights.learngene.AdamW", Watched)
    model = Net(StageSharedEncoder(block, (2, 2)))
    model.no_weight_decay = lambda: {"position"}
    model.embed.requires_grad_(False)
    learn_learngene(model, copy.deepcopy(model), [(X, Y)], 1, weight_decay=0.1)
    decayed, plain = made
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"])
    assert any(p is model.position for p in plain["params"])
    assert sum(p.numel() for g in made for p in g["params"]) == count(model) - count(model.embed)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": 1.1}, "alpha"),
        ({"tau": 0.0}, "tau"),
        ({"lr": 0.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"warmup": 1.0}, "warmup"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_learning_says_what_is_wrong(aux, teacher, how, what):
    with pytest.raises(ValueError, match=f"{what} must be"):
        learn_learngene(aux, teacher, [(X, Y)], **{"epochs": 1, **how})


def test_learning_wants_a_teacher_of_the_same_classes(aux):
    with pytest.raises(TypeError, match=r"teacher must be an nn.Module"):
        learn_learngene(aux, lambda x: x, [(X, Y)], 1)
    with pytest.raises(ValueError, match="K = 5, the teacher K = 3"):
        learn_learngene(aux, nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), [(X, Y)], 1)


def test_from_learning_to_a_descendant(aux, teacher):
    learn_learngene(aux, teacher, TensorDataset(X, Y), 60, lr=1e-2, batch_size=6)
    descendant = build_descendant(aux, 5).eval()
    kd = SoftmaxKDLoss(T=1.0)
    with torch.no_grad():
        t = teacher.eval()(X)
        torch.manual_seed(0)
        assert kd(descendant(X), t) < kd(Net(StageSharedEncoder(block, (1,) * 5))(X), t)
