r"""Stage-wise weight sharing (SWS): train a few transformer layers once, start models of many depths from them.

The *learngene* is a handful of layers. It is learned inside an auxiliary network whose layers are grouped in stages; every layer of
a stage is the same weights, so a layer learns to work when it is repeated at its place. A descendant of any depth repeats it more or
fewer times, as copies of its own that are then tuned as usual:

.. math:: \text{Aux}: \; x \mapsto b_S^{n_S} \circ \dots \circ b_1^{n_1}(x), \qquad
    \text{descendant}: \; x \mapsto b'_L \circ \dots \circ b'_1(x), \quad b'_l = \text{copy of } b_{s(l)}, \; s \text{ non-decreasing}

    aux = ViT(encoder=StageSharedEncoder(lambda: Block(384), repeats=(3, 3, 4, 3, 3)))
    learn_learngene(aux, teacher, loader, epochs=150)          # distillation: no labels needed
    small, large = build_descendant(aux, 6), build_descendant(aux, 12)

Reach for it when one architecture is needed in several depths (one for each device) and training each is too dear: S layers are
stored, and a descendant starts close to a trained network. It works with any residual block whose input and output shapes agree.

Known not to work, or to differ:

- For a single depth it saves nothing: a step of the auxiliary network costs as much as one of an unshared network of its depth.
- Tuning descendants at the rate that suits training from scratch destroys what they inherit; take a tenth of it.
- All of a block is shared, layer norms included; sharing attention alone is another method (MiniViT). Repeats of 1 are an ordinary
  network, whose layers never learned to be repeated; S = 1 shares one layer over the whole depth (ALBERT).
- In the authors' code a descendant is not the auxiliary network's function even where it repeats its schedule: it averages the tokens
  before the final norm instead of after, and its norms have eps 1e-6 instead of 1e-5. Here it is, to the last bit.
- The authors divide the distillation loss by batch times classes; here it is the mean over the batch. At alpha = 1 AdamW hardly
  notices; between 0 and 1 their alpha gives the teacher a weight that is smaller by the number of classes.
- The authors drop each branch of a block on its own (``drop_path``); here the whole block is dropped, since its inside is not known.

Xia, Zhu, Yang, Geng, "Exploring Learngene via Stage-wise Weight Sharing for Initializing Variable-sized Models", IJCAI 2024,
arXiv 2404.16897.
"""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset

from weightroom import metrics, train
from weightroom.distill import KDObjective, SoftmaxKDLoss
from weightroom.errors import UsageError, check_range

__all__ = ["StageSharedEncoder", "build_descendant", "default_source", "learn_learngene", "learngene_expand"]

_POSITION_STD = 0.02  # of tables of positions and tokens, as in ViT


class StageSharedEncoder(nn.Module):
    """Blocks in stages; all layers of a stage are the same block, every tensor of it.

    It is also a sequence of its layers in the order of the forward pass (``len(encoder)`` is the depth, ``encoder[i]`` the block of
    layer i), so that it can stand for the list of layers of a model that loops over them.

    Args:
        block_factory: called once for each stage, without arguments; returns a new module whose output has its input's shape.
        repeats: times >= 1 that each stage's block is applied.
        drop_path: probability in [0, 1) that the last layer is skipped for a sample while training; it rises linearly with the
            position from 0 at the first layer, whatever block is there. Used by ``forward`` alone.

    Attributes:
        blocks: the S blocks, the learngene (``nn.ModuleList``).
        repeats: as given (tuple).
        schedule: the stage of each layer, (0, 0, 0, 1, ...): the ``source`` of a descendant that computes the same.

    Raises:
        ValueError: ``repeats`` is empty or has an entry < 1, ``drop_path`` is out of range, two blocks are the same or share a
            parameter, or a block's output (of ``forward``) has not its input's shape.
        TypeError: ``repeats`` holds something else than integers, or ``block_factory`` does not return a module.

    Warns:
        UserWarning: a block that is repeated has a batch norm: its running statistics mix those of different positions.
    """

    def __init__(
        self, block_factory: Callable[[], nn.Module], repeats: Sequence[int] = (3, 3, 4, 3, 3), *, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        check_range("drop_path", drop_path, low=0.0, high=1.0, open_high=True)
        self.repeats = tuple(_integer("each of repeats", n, low=1) for n in repeats)
        if not self.repeats:
            raise UsageError("repeats must have an entry >= 1 for each stage, got none")
        self.drop_path = float(drop_path)
        self.blocks = nn.ModuleList(_checked(block_factory(), f"blocks[{s}]") for s in range(len(self.repeats)))
        _check_distinct(self.blocks)
        mixed = [
            s for s, (block, n) in enumerate(zip(self.blocks, self.repeats, strict=True)) if n > 1 and _has_batch_norm(block)
        ]
        if mixed:
            warnings.warn(
                f"the shared blocks of stages {mixed} have batch norms, whose statistics mix those of different positions: "
                "layer or group norm has none",
                stacklevel=2,
            )

    @property
    def schedule(self) -> tuple[int, ...]:
        """The stage of each layer."""
        return tuple(stage for stage, n in enumerate(self.repeats) for _ in range(n))

    def __len__(self) -> int:
        return sum(self.repeats)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self.blocks[stage] for stage in self.schedule)

    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Applies each block as often as its stage says; further arguments (a mask) go to every layer.

        Args:
            x: any shape and dtype that the blocks take; the first dimension is the batch.
            *args: for every layer.
            **kwargs: for every layer.

        Returns:
            A tensor of the shape of ``x``.
        """
        last = max(1, len(self) - 1)
        for layer, (stage, block) in enumerate(zip(self.schedule, self, strict=True)):
            out = block(x, *args, **kwargs)
            if out.shape != x.shape:
                raise UsageError(
                    f"a block's output must have its input's shape, so that it can be repeated; that of stage {stage} turns "
                    f"{tuple(x.shape)} into {tuple(out.shape)}"
                )
            rate = self.drop_path * layer / last  # of the position, not of the block
            x = _skip(x, out, rate) if self.training and rate else out
        return x

    def extra_repr(self) -> str:
        """Repeats and rate."""
        return f"repeats={self.repeats}, drop_path={self.drop_path}"


def default_source(stages: int, depth: int) -> list[int]:
    """Returns which stage's block each layer of a descendant is a copy of: non-decreasing, evenly spread, surplus to the first stages.

    ``default_source(5, 12)`` is the authors' 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4.

    Args:
        stages: S >= 1, blocks of the learngene.
        depth: L >= 1, layers of the descendant.

    Raises:
        ValueError: an argument is < 1.
        TypeError: an argument is no integer.

    Warns:
        UserWarning: L < S, so that some stages are left out: the kept ones are evenly spaced, first and last among them.
    """
    stages, depth = _integer("stages", stages, low=1), _integer("depth", depth, low=1)
    if depth < stages:
        kept = [round(i * (stages - 1) / max(1, depth - 1)) for i in range(depth)]
        warnings.warn(f"{depth} layers cannot hold all {stages} stages: kept are {kept}", stacklevel=2)
        return kept
    each, surplus = divmod(depth, stages)
    return [stage for stage in range(stages) for _ in range(each + (stage < surplus))]


def learngene_expand(
    blocks: Iterable[nn.Module], depth: int, source: Sequence[int] | None = None, *, allow_unordered: bool = False
) -> nn.ModuleList:
    """Returns the layers of a descendant: ``depth`` deep copies of blocks, which share no tensor with one another or with ``blocks``.

    A ``layer_idx`` that a layer or a part of it has (transformers) becomes its position.

    Args:
        blocks: the learngene, one module for each stage, in order.
        depth: L >= 1.
        source: the stage of each layer, non-decreasing; ``default_source`` when None.
        allow_unordered: only warn where ``source`` decreases.

    Raises:
        ValueError: ``depth`` < 1, no blocks, ``source`` has another length than ``depth``, an entry that is no stage, or decreases.
        TypeError: an entry of ``blocks`` is no module, or one of ``source`` no integer.

    Warns:
        UserWarning: ``source`` decreases and ``allow_unordered``, or fewer layers than stages (see ``default_source``).
    """
    stages = [_checked(block, f"blocks[{s}]") for s, block in enumerate(blocks)]
    chosen = _source(len(stages), depth, source, allow_unordered)
    return _copies([metrics.copy_model(stage) for stage in stages], chosen, {})


def build_descendant(
    aux: nn.Module,
    depth: int,
    source: Sequence[int] | None = None,
    copy_rest: bool = True,
    *,
    blocks_attr: str | None = None,
    allow_unordered: bool = False,
) -> nn.Module:
    """Returns a model like ``aux`` with ``depth`` layers of its own, started from its blocks; ``aux`` is left as it was.

    The layers stand where those of ``aux`` stood: a ``StageSharedEncoder`` is followed by one that repeats nothing, an ``nn.Sequential``
    or ``nn.ModuleList`` by one of the same kind. ``config.num_hidden_layers`` and ``config.layer_types`` (transformers) follow.

    For another task than that of ``aux``, replace the head of what is returned.

    Args:
        aux: has a ``StageSharedEncoder`` somewhere, or its blocks (one for each stage) in a list at ``blocks_attr``.
        depth: L >= 1.
        source: the stage of each layer, non-decreasing; ``default_source`` when None.
        copy_rest: take all that is not a block (embeddings, final norm, head) from ``aux``. False: make it anew with the modules'
            ``reset_parameters``, from torch's global random state; tables of positions or tokens that no module resets become normal
            with standard deviation 0.02.
        blocks_attr: dotted name of the blocks' container ("vit.layers"); when None, the only ``StageSharedEncoder``, else
            "blocks".
        allow_unordered: only warn where ``source`` decreases.

    Raises:
        ValueError: no container there or an empty one, more than one ``StageSharedEncoder`` without ``blocks_attr``, or as in
            ``learngene_expand``.
        TypeError: the container is no ``StageSharedEncoder``, ``nn.Sequential`` or ``nn.ModuleList``.
        RuntimeError: ``copy_rest`` is False and a vector outside the blocks belongs to a module without ``reset_parameters``.

    Example::

        vit.blocks = StageSharedEncoder(lambda: Block(dim=384, num_heads=6))     # a model of timm
        build_descendant(vit, 12, source=[0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4])
    """
    aux = metrics.copy_model(aux)  # so that what is masked can be copied further
    old = _container(aux, blocks_attr)
    stages = old.blocks if isinstance(old, StageSharedEncoder) else old
    chosen = _source(len(stages), depth, source, allow_unordered)
    configs: dict[int, Any] = {}  # one copy for rest and layers, as deepcopy's memo
    for module in aux.modules():
        if not isinstance(config := getattr(module, "config", None), nn.Module):
            copy.deepcopy(config, configs)
    layers = _copies([_checked(block, f"blocks[{s}]") for s, block in enumerate(stages)], chosen, configs)
    new: nn.Module = layers
    if isinstance(old, StageSharedEncoder):
        own = iter(layers)
        new = StageSharedEncoder(lambda: next(own), (1,) * len(layers), drop_path=old.drop_path).train(old.training)
    elif isinstance(old, nn.Sequential):
        new = nn.Sequential(*layers)
    new.training = old.training
    descendant = copy.deepcopy(aux, {**configs, id(old): new})
    for config in {id(c): c for m in descendant.modules() if (c := getattr(m, "config", None)) is not None}.values():
        if getattr(config, "layer_types", None) and len(config.layer_types) == len(old):
            config.layer_types = [config.layer_types[i] for i in _places(old, chosen)]
        if getattr(config, "num_hidden_layers", None) == len(old):
            config.num_hidden_layers = len(layers)
    if not copy_rest:
        _renew(descendant, new)
    return descendant


def learn_learngene(
    aux: nn.Module,
    teacher: nn.Module,
    loader: DataLoader | Dataset | Iterable[Any],
    epochs: int,
    alpha: float = 1.0,
    tau: float = 1.0,
    *,
    lr: float = 5e-4,
    weight_decay: float = 0.05,
    warmup: float = 1 / 30,
    batch_size: int = 512,
    seed: int = 0,
    device: str | None = None,
) -> train.Fit:
    r"""Trains the auxiliary network by distillation, in place (it is left in training mode).

    .. math:: L = (1 - \alpha)\, \mathrm{CE}(y, p_s) + \alpha\, \tau^2 \frac1N \sum_n
        \mathrm{KL}\big(\mathrm{softmax}(z_t / \tau) \,\|\, \mathrm{softmax}(z_s / \tau)\big)

    with AdamW; vectors (biases, norms) and what ``aux.no_weight_decay()`` names are not decayed, as in DeiT.

    Args:
        aux: maps inputs to logits (N, K); its blocks in a ``StageSharedEncoder``.
        teacher: maps inputs to logits (N, K), on the device that trains; asked in eval mode without gradients, and left as it was.
        loader: batches (inputs, class indices), in a ``DataLoader`` or a list, or a data set of such pairs. At ``alpha = 1`` the
            labels are not looked at and may be missing.
        epochs: passes over the data; the paper takes 150 (width 384) and 100 (width 768) of ImageNet.
        alpha: weight in [0, 1] of the teacher; at 0 the teacher is not asked.
        tau: temperature > 0.
        lr: > 0, highest learning rate; it falls to zero as a cosine.
        weight_decay: >= 0.
        warmup: share in [0, 1) of the steps in which the rate rises linearly; the paper takes 5 of 150 epochs.
        batch_size: samples per step, where ``loader`` is a data set.
        seed: decides batches and dropout.
        device: a torch device name; where ``aux`` is when None.

    Returns:
        What the training did, with the mean loss of each epoch.

    Raises:
        ValueError: a number is out of its range, the logits differ in shape, or ``loader`` has no length.
        TypeError: ``teacher`` is no module, or labels are missing with ``alpha`` < 1.
        DivergedError: the loss became NaN or infinite.
    """
    _integer("epochs", epochs, low=1)
    check_range("alpha", alpha, low=0.0, high=1.0)
    check_range("lr", lr, low=0.0, open_low=True)
    check_range("weight_decay", weight_decay, low=0.0)
    check_range("warmup", warmup, low=0.0, high=1.0, open_high=True)
    check_range("tau", tau, low=0.0, open_low=True)
    objective = KDObjective(teacher, SoftmaxKDLoss(T=tau), ce=1 - alpha, kd=alpha)

    def step(model: nn.Module, batch: Any) -> Tensor:
        x, *labels = [batch] if isinstance(batch, Tensor) else batch
        if alpha < 1 and not labels:
            raise TypeError(f"loader must give (inputs, labels) with alpha = {alpha:g}: only at alpha = 1 are labels not needed")
        return objective(model, x, labels[0] if labels else x)

    def schedule(optimizer: Optimizer, total: int) -> LRScheduler:
        rising = warmup * total

        def factor(t: int) -> float:
            return min(1.0, (t + 1) / rising) if t < rising else (1 + math.cos(math.pi * (t - rising) / (total - rising))) / 2

        return LambdaLR(optimizer, factor)

    if isinstance(loader, list | tuple):
        loader = DataLoader(cast(Any, loader), batch_size=None)  # batches as they are, not samples
    return train.fit(
        aux, loader, step=step, optimizer=AdamW(_groups(aux, weight_decay), lr=lr), schedule=schedule, epochs=epochs,
        batch_size=batch_size, seed=seed, device=device,
    )  # fmt: skip


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    spared = set(cast(Any, model).no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = {name for name, p in named if p.ndim <= 1 or name in spared}
    return [
        {"params": [p for name, p in named if name not in plain], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
    ]


def _skip(x: Tensor, out: Tensor, rate: float) -> Tensor:
    """Stochastic depth: the block's change of x, per sample either gone or enlarged so that its mean stays."""
    keep = torch.empty(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - rate)
    return x + keep / (1 - rate) * (out - x)


def _source(stages: int, depth: int, source: Sequence[int] | None, allow_unordered: bool) -> list[int]:
    if not stages:
        raise UsageError("blocks must have at least one module, got none")
    depth = _integer("depth", depth, low=1)
    if source is None:
        return default_source(stages, depth)
    chosen = [_integer("each entry of source", s) for s in source]
    if len(chosen) != depth:
        raise UsageError(f"source must have one entry for each of the {depth} layers, got {len(chosen)}")
    if wrong := [s for s in chosen if not 0 <= s < stages]:
        raise UsageError(f"source must name stages 0 to {stages - 1}, got {wrong[0]}")
    if chosen != sorted(chosen):
        if not allow_unordered:
            raise UsageError(
                f"source must keep the order of the stages, got {chosen} (allow_unordered=True takes it all the same)"
            )
        warnings.warn(f"source {chosen} breaks the order of the stages, for which their blocks were trained", stacklevel=3)
    return chosen


def _container(aux: nn.Module, blocks_attr: str | None) -> Any:
    if blocks_attr is None:
        encoders = [name for name, module in aux.named_modules() if isinstance(module, StageSharedEncoder)]
        if len(encoders) > 1:
            raise UsageError(f"aux has {len(encoders)} StageSharedEncoders: say blocks_attr, one of {', '.join(encoders)}")
        blocks_attr = encoders[0] if encoders else "blocks"
    try:
        found = operator.attrgetter(blocks_attr)(aux) if blocks_attr else aux
    except AttributeError:
        raise UsageError(f"{type(aux).__name__} has no {blocks_attr!r}: say where its blocks are with blocks_attr") from None
    if not isinstance(found, StageSharedEncoder | nn.Sequential | nn.ModuleList):
        raise TypeError(
            f"{blocks_attr!r} must be a StageSharedEncoder, nn.Sequential or nn.ModuleList of blocks, got {type(found).__name__}"
        )
    return found


def _copies(stages: Sequence[nn.Module], source: Sequence[int], memo: Mapping[int, Any]) -> nn.ModuleList:
    copies = nn.ModuleList(copy.deepcopy(stages[s], dict(memo)) for s in source)
    for layer, block in enumerate(copies):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                cast(Any, module).layer_idx = layer
    return copies


def _places(old: Any, chosen: Sequence[int]) -> list[int]:
    """The first layer of each chosen stage."""
    return [old.schedule.index(s) for s in chosen] if isinstance(old, StageSharedEncoder) else list(chosen)


def _renew(model: nn.Module, blocks: nn.Module) -> None:
    """Makes everything outside ``blocks`` anew, children before their parent."""
    kept, state = {id(module) for module in blocks.modules()}, copy.deepcopy(blocks.state_dict())
    for name, module in reversed([pair for pair in model.named_modules() if id(pair[1]) not in kept]):
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(reset):
            reset()
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                where = f"{name}.{own}" if name else own
                raise RuntimeError(
                    f"copy_rest=False cannot renew {where!r}: give {type(module).__name__} a reset_parameters method"
                )
            nn.init.trunc_normal_(parameter, std=_POSITION_STD)
    blocks.load_state_dict(state)  # where a parent's reset reaches into them


def _checked(block: Any, name: str) -> nn.Module:
    if not isinstance(block, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, got {type(block).__name__}")
    for kind in ("features", "channels"):
        width, out = getattr(block, f"in_{kind}", None), getattr(block, f"out_{kind}", None)
        if width is not None and out is not None and width != out:
            raise UsageError(f"{name} must have outputs as wide as its inputs, so that it can be repeated, got {width} and {out}")
    return block


def _check_distinct(blocks: Iterable[nn.Module]) -> None:
    owners: dict[int, int] = {}
    for s, block in enumerate(blocks):
        for name, own in [("", block), *block.named_parameters()]:
            if (other := owners.setdefault(id(own), s)) != s:
                how = f"shares {name!r} with" if name else "is"
                raise UsageError(f"block_factory must make a new block at each call, but blocks[{s}] {how} blocks[{other}]")


def _has_batch_norm(block: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in block.modules())


def _integer(name: str, value: Any, low: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if low is not None and number < low:
        raise UsageError(f"{name} must be >= {low}, got {number}")
    return number
