r"""Bone, block affine adapters: fine-tune a frozen linear layer with out * r parameters.

Reach for it where you would reach for LoRA and want a start without special initialisation: the adapter is zero at first, its
gradient is not, and it can be merged into the weight, so that it costs nothing afterwards. The name covers two methods, and
they are kept apart here:

``variant="guided"`` (arXiv 2409.15371 v2 and v3, "weight guide"; called Bat later and in PEFT). The weight :math:`W` is cut into
:math:`r \times r` blocks; all blocks of one row share a trainable :math:`B_i`, which acts from the right:

.. math:: W'_{ij} = W_{ij} + W_{ij} B_i + B_i, \qquad\text{that is}\quad W'_{ij} + I = (W_{ij} + I)(I + B_i)

``variant="shared"`` (v4 and later; "MiSS" in PEFT). The input is cut into shards :math:`x_j` of length :math:`r`, and all of them
share a trainable :math:`D`; the weight plays no part, and the rank of the update is at most :math:`r`:

.. math:: y = x W^T + b + \Big(\sum_j x_j\Big) D

Not known to work: the paper reports its gain over LoRA and PiSSA at one learning rate for all; in our study it went away when
each could choose its own. Guided steps cost more than LoRA's, since W' is a new matrix each time. Convolutions are refused.

Kang, "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models", arXiv 2409.15371.
The author's code (JL-er/Bone) runs one B per row of blocks, which it calls "Bone-col", as do the later versions and this module;
one B per column of blocks stands there commented out.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from os import PathLike
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BoneConfig", "BoneLinear", "adapter_state_dict", "bone", "load_adapter", "merge_", "unmerge_"]

Variant = Literal["guided", "shared"]
Model = TypeVar("Model", bound=nn.Module)

_PEFT_PREFIX = "base_model.model."
_KEY = re.compile(r"(?:(?P<layer>.+)\.)?(?:bone|miss_block|bone_block)(?:\.(?P<adapter>[^.]+))?")


def guided_weight(W: Tensor, B: Tensor) -> Tensor:
    """W'_ij = W_ij + W_ij B_i + B_i: W is (out, in), B is (out / r, r, r)."""
    (out, n_in), r = W.shape, B.shape[-1]
    rows = W.reshape(out // r, r * (n_in // r), r)  # row block i: all its blocks on top of each other, without a copy
    return torch.baddbmm(rows, rows, B).view(out // r, r, n_in // r, r).add(B.unsqueeze(2)).view(out, n_in)


def guided_inverse(W_: Tensor, B: Tensor, inverse: Tensor) -> Tensor:
    """W_ij = (W'_ij - B_i)(I + B_i)^-1, given the inverses (out / r, r, r)."""
    (out, n_in), r = W_.shape, B.shape[-1]
    rows = (W_.reshape(out // r, r, n_in // r, r) - B.unsqueeze(2)).view(out // r, r * (n_in // r), r)
    return torch.bmm(rows, inverse).view(out, n_in)


def guided_few(x: Tensor, W: Tensor, B: Tensor) -> Tensor:
    """x W'^T without W': y_i = sum_j (x_j + x_j B_i^T) W_ij^T + (sum_j x_j) B_i^T; x is (N, in). Cheaper than W' when N < r."""
    (n, n_in), (a, r, _) = x.shape, B.shape
    shards = x.reshape(1, n * (n_in // r), r).expand(a, -1, -1)
    u = torch.baddbmm(shards, shards, B.transpose(1, 2)).view(a, n, n_in)
    y = torch.bmm(u, W.reshape(a, r, n_in).transpose(1, 2)).transpose(0, 1).reshape(n, a * r)
    return torch.addmm(y, x.unflatten(1, (-1, r)).sum(1), B.reshape(a * r, r).t())


def shared_forward(x: Tensor, W: Tensor, bias: Tensor | None, adapters: Sequence[tuple[Tensor, float]]) -> Tensor:
    """x W^T + b + (sum_j x_j) D for every (D, dropout); x is (N, in), its last shard is padded with zeros."""
    sums = []
    for D, p in adapters:
        r, rest = D.shape[0], x.shape[1] % D.shape[0]
        shards = (F.pad(x, (0, r - rest)) if rest else x).unflatten(1, (-1, r))
        x = x if rest else shards.flatten(1)  # the same numbers: both gradients then meet in one shape and add up without a copy
        sums.append(F.dropout(shards, p, p > 0).sum(1))
    y = F.linear(x, W, bias)
    for (D, _), total in zip(adapters, sums, strict=True):
        y = torch.addmm(y, total.to(y.dtype), D.to(y.dtype))
    return y


def shared_delta(D: Tensor, n_in: int) -> Tensor:
    """Delta W[:, j r + k] = D[k, :] for every shard j: (r, out) to (out, in)."""
    return D.t().repeat(1, -(-n_in // D.shape[0]))[:, :n_in]


@dataclass(frozen=True)
class BoneConfig:
    """What to adapt, and how.

    Args:
        r: side of the blocks, >= 1. "guided" needs that it divides ``in_features`` and ``out_features`` of every target, "shared"
            that it is at most ``in_features``.
        variant: "guided" (the update uses the frozen weight) or "shared" (it does not); see the module.
        target_modules: which layers. A list of names matches a module that has such a name or ends with ``"." + name``; a string
            is a regular expression for the whole name (both as in PEFT). None, or "all-linear", takes every ``nn.Linear``; of a
            transformers model, every one but the output head.
        exclude_modules: layers to leave out, written in the same way.
        dropout: probability in [0, 1) of zeroing an input of the adapter while training; "shared" only.
        alpha: there is no scaling factor; giving one warns and has no effect.

    Raises:
        ValueError: a number is out of range, the variant is unknown, or "guided" is asked for dropout.
        TypeError: ``r`` is not an integer, or a target is not a string.
    """

    r: int = 64
    variant: Variant = "guided"
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    dropout: float = 0.0
    alpha: InitVar[float | None] = None

    def __post_init__(self, alpha: float | None) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool):
            raise TypeError(f"r must be an integer >= 1, got {self.r!r}")
        if self.r < 1:
            raise ValueError(f"r must be >= 1, got {self.r}")
        if self.variant not in ("guided", "shared"):
            raise ValueError(f"variant must be 'guided' or 'shared', got {self.variant!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.dropout and self.variant == "guided":
            raise ValueError(f"dropout={self.dropout} needs variant='shared': 'guided' has no input of its own")
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if names is None or isinstance(names, str):
                continue
            if not all(isinstance(n, str) for n in names):
                raise TypeError(f"{name} must be a string or a list of strings, got {names!r}")
            object.__setattr__(self, name, tuple(names))
        if alpha is not None:
            warnings.warn(f"Bone has no scaling factor: alpha={alpha} has no effect", UserWarning, stacklevel=3)


class BoneLinear(nn.Module):
    """A frozen ``nn.Linear`` with Bone adapters.

    Several adapters may be active at once: guided ones change the weight one after the other, in the order in which they were
    added; shared ones add up. One layer holds adapters of one variant.

    Args:
        base_layer: the layer to adapt. It is kept, not copied, and its parameters are frozen.
        r: as in ``BoneConfig``, like the next two.
        variant: "guided" or "shared".
        dropout: input dropout of the adapter, "shared" only.
        adapter: name of the first adapter.

    Attributes:
        base_layer: the frozen layer.
        bone: adapter name -> trainable B (out / r, r, r) or D (r, out), in the weight's dtype or float32, the wider of the two.
        active: names of the adapters in use, all of them at first; assign names to choose others.
        merged: names of the adapters that are merged into the weight of ``base_layer``.

    Raises:
        ValueError: ``r`` does not fit the layer, or an argument is out of range.
        TypeError: ``base_layer`` is not an ``nn.Linear`` with an ordinary floating-point weight.

    ``forward`` maps (..., in_features) to (..., out_features). A module that takes the weight instead of calling the layer, as
    ``nn.MultiheadAttention`` does with ``out_proj``, gets the adapted weight, but no dropout. Hooks of ``base_layer`` do not run
    while adapters act, because it is not called then.
    """

    def __init__(
        self, base_layer: nn.Linear, r: int = 64, variant: Variant = "guided", dropout: float = 0.0, *, adapter: str = "default"
    ) -> None:
        super().__init__()
        config = BoneConfig(r, variant, dropout=dropout)
        _check_layer("base_layer", base_layer, config)
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.variant: Variant = variant
        self.bone = nn.ParameterDict()
        self.dropout: dict[str, float] = {}
        self.merged: tuple[str, ...] = ()
        self._active: tuple[str, ...] = ()
        self.add(adapter, r, dropout)

    def add(self, adapter: str, r: int, dropout: float = 0.0) -> None:
        """Adds another adapter of the layer's variant, at zero and active.

        Raises:
            ValueError: the name is taken or cannot be one, or ``r`` does not fit the layer.
            RuntimeError: adapters are merged.
        """
        self._check_add("this layer", adapter, BoneConfig(r, self.variant, dropout=dropout))
        frozen, shape = self.base_layer.weight, _shape(self.variant, r, self.out_features)
        dtype = torch.promote_types(frozen.dtype, torch.float32)
        self.bone[adapter] = nn.Parameter(torch.zeros(shape, dtype=dtype, device=frozen.device))
        self.dropout[adapter] = dropout
        self._active = (*self._active, adapter)

    def _check_add(self, name: str, adapter: str, config: BoneConfig) -> None:
        if not adapter or "." in adapter or hasattr(nn.ParameterDict, adapter):
            raise ValueError(f"adapter must be a name without dots that nn.ParameterDict does not use itself, got {adapter!r}")
        if adapter in self.bone:
            raise ValueError(f"{name} already has an adapter {adapter!r}: give the new one another name (adapter=...)")
        if config.variant != self.variant:
            raise ValueError(f"{name} has {self.variant} adapters: a {config.variant} one cannot be added to them")
        if self.merged:
            raise RuntimeError(f"{name} has merged adapters {list(self.merged)}: unmerge_ the model before adding another")
        _check_layer(name, self.base_layer, config)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters in use, in the order in which they act."""
        return self._active

    @active.setter
    def active(self, names: Sequence[str]) -> None:
        names = (names,) if isinstance(names, str) else tuple(names)
        if unknown := [n for n in names if n not in self.bone]:
            raise ValueError(f"active names no adapter of this layer: {unknown}; it has {list(self.bone)}")
        if self.merged and set(names) != set(self.merged):
            raise RuntimeError(f"adapters {list(self.merged)} are merged: unmerge_ the model before choosing others")
        self._active = tuple(n for n in self.bone if n in names)

    @property
    def weight(self) -> Tensor:
        """W', the weight that the layer multiplies by, whether merged or not; differentiable in the active adapters."""
        W = self.base_layer.weight
        return W if self.merged else self._adapted(W)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias

    def _adapted(self, W: Tensor) -> Tensor:
        for name in self.active:
            block = self.bone[name].to(W.dtype)
            W = guided_weight(W, block) if self.variant == "guided" else W + shared_delta(block, self.in_features)
        return W

    def forward(self, x: Tensor) -> Tensor:
        """Returns y of shape (..., out_features)."""
        if self.merged or not self.active:
            return self.base_layer(x)
        W, bias, rows = self.base_layer.weight, self.base_layer.bias, x.reshape(-1, x.shape[-1])
        if self.variant == "shared":
            y = shared_forward(rows, W, bias, [(self.bone[n], self.dropout[n] if self.training else 0.0) for n in self.active])
        elif len(self.active) == 1 and len(rows) < self.bone[self.active[0]].shape[-1]:
            y = guided_few(rows, W, self.bone[self.active[0]].to(W.dtype))
            y = y if bias is None else y + bias.to(y.dtype)
        else:
            y = F.linear(rows, self._adapted(W), bias)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def _merge(self) -> None:
        W = self.base_layer.weight
        wide = self._adapted(W.to(torch.promote_types(W.dtype, torch.float32)))
        self.base_layer.weight = nn.Parameter(wide.to(W.dtype), requires_grad=False)
        self.merged = self.active

    def _unmerge(self, inverses: Mapping[str, Tensor]) -> None:
        W = self.base_layer.weight
        wide = W.to(torch.promote_types(W.dtype, torch.float32))
        for name in reversed(self.merged):
            block = self.bone[name].detach().to(wide.dtype)
            if self.variant == "guided":
                wide = guided_inverse(wide, block, inverses[name].to(wide.dtype))
            else:
                wide = wide - shared_delta(block, self.in_features)
        self.base_layer.weight = nn.Parameter(wide.to(W.dtype), requires_grad=False)
        self.merged = ()

    def _inverse(self, adapter: str, layer: str) -> Tensor:
        """(I + B_i)^-1 for every i, in float32 at least."""
        B = self.bone[adapter].detach()
        A = B.to(torch.promote_types(B.dtype, torch.float32)) + torch.eye(B.shape[-1], device=B.device)
        inverse, info = torch.linalg.inv_ex(A)
        condition = torch.linalg.matrix_norm(A, 1) * torch.linalg.matrix_norm(inverse, 1)
        regular = (info == 0) & (condition * torch.finfo(A.dtype).eps < 1)
        if not regular.all():
            rows = (~regular).nonzero().flatten().tolist()
            raise RuntimeError(
                f"adapter {adapter!r} of layer {layer!r} cannot be unmerged: I + B_i is singular for i in {rows[:8]}"
            )
        return inverse

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        ranks = {name: _rank(self.variant, block) for name, block in self.bone.items()}
        return f"{self.variant}, r={ranks}, active={list(self.active)}, merged={list(self.merged)}"


def bone(model: nn.Module, config: BoneConfig, *, adapter: str = "default") -> nn.Module:
    """Returns a copy of a model in which the targets are ``BoneLinear`` and only the adapters are trainable.

    ``model`` is left as it was. The copy's frozen parameters share their memory with it, so that a large model is not held twice:
    whoever goes on to train ``model`` in place changes both, and should pass ``copy.deepcopy(model)``. Nothing here ever
    writes into that memory, merging included. Buffers, and adapters of an earlier call, are copied.

    Args:
        model: any module; one that ``bone`` returned gets a further adapter.
        config: what to adapt, and how.
        adapter: name of the adapter, for models with several.

    Raises:
        ValueError: no module matches, ``r`` does not fit a target, the adapter exists, or a target has the other variant.
        TypeError: a target is not an ``nn.Linear`` with an ordinary floating-point weight.
        RuntimeError: adapters of the model are merged.

    Example::

        model = bone(pretrained, BoneConfig(r=8, target_modules=["q_proj", "v_proj"]))
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        ...
        safetensors.torch.save_file(adapter_state_dict(model), "adapter.safetensors")
        merge_(model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(config, BoneConfig):
        raise TypeError(f"config must be a BoneConfig, got {type(config).__name__}")
    names = _targets(model, config)
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, BoneLinear):
            layer._check_add(f"layer {name!r}", adapter, config)
        else:
            _check_layer(f"layer {name!r}", layer, config)
    model = _share_frozen(model)
    made: dict[int, BoneLinear] = {}  # a layer that has two places in the model gets one adapter
    for name in names:
        layer = model.get_submodule(name)
        if id(layer) in made:
            new = made[id(layer)]
        elif isinstance(layer, BoneLinear):
            layer.add(adapter, config.r, config.dropout)
            new = layer
        else:
            new = BoneLinear(layer, config.r, config.variant, config.dropout, adapter=adapter).train(layer.training)  # type: ignore[arg-type]
        made[id(layer)] = made[id(new)] = new
        if not name:
            return new
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    return model


def merge_(model: Model) -> Model:
    """Writes the active adapters into the weights, in place, so that they cost nothing any more; returns the model.

    The sums are taken in float32 at least and rounded once to the weight's dtype. A merged model does not train its adapters, and
    its ``state_dict`` holds the merged weights: load it into a merged model only. A merged weight is no longer tied to another
    layer's. Merging what is merged warns and does nothing.

    Raises:
        ValueError: the model has no ``BoneLinear``.
        RuntimeError: an adapter holds a value that is not finite; nothing has been merged then.
    """
    layers = _layers(model)
    for name, layer in layers.items():
        for adapter in layer.active:
            if not layer.bone[adapter].isfinite().all():
                raise RuntimeError(f"adapter {adapter!r} of layer {name!r} holds values that are not finite: nothing was merged")
    todo = [layer for layer in layers.values() if not layer.merged]
    if not todo:
        warnings.warn("the adapters are already merged: nothing to do", UserWarning, stacklevel=2)
    for layer in todo:
        layer._merge()
    return model


def unmerge_(model: Model) -> Model:
    """Takes merged adapters out of the weights again, in place; returns the model.

    The weights come back up to rounding: of the dtype, times the condition number of I + B_i for "guided". Unmerging what is
    not merged warns and does nothing.

    Raises:
        ValueError: the model has no ``BoneLinear``.
        RuntimeError: some I + B_i is singular, so that the weight is lost; nothing has been unmerged then.
    """
    merged = {name: layer for name, layer in _layers(model).items() if layer.merged}
    if not merged:
        warnings.warn("no adapters are merged: nothing to do", UserWarning, stacklevel=2)
    guided = {name: layer for name, layer in merged.items() if layer.variant == "guided"}
    inverses = {
        name: {a: layer._inverse(a, name) for a in layer.merged} for name, layer in guided.items()
    }  # or fail before any change
    for name, layer in merged.items():
        layer._unmerge(inverses.get(name, {}))
    return model


def adapter_state_dict(model: nn.Module, *, adapter: str = "default", peft: bool = False) -> dict[str, Tensor]:
    """Returns the tensors of one adapter, detached, sharing memory with the model.

    Args:
        model: a model from ``bone``.
        adapter: which adapter; its name is not part of the keys.
        peft: write PEFT's keys, ``base_model.model.<layer>.miss_block``, as in its ``adapter_model.safetensors`` ("guided" is
            ``MissConfig(init_weights="bat")``, "shared" is ``MissConfig(init_weights=True)``; the tensors are the same).
            Otherwise ``<layer>.bone``, which is what the author's first code wrote.

    Raises:
        ValueError: the model has no ``BoneLinear``, or no adapter of that name.
    """
    layers = _layers(model)
    prefix, suffix = (_PEFT_PREFIX, "miss_block") if peft else ("", "bone")
    state = {
        f"{prefix}{name}.{suffix}" if name else f"{prefix}{suffix}": layer.bone[adapter].detach()
        for name, layer in layers.items()
        if adapter in layer.bone
    }
    if not state:
        names = sorted({name for layer in layers.values() for name in layer.bone})
        raise ValueError(f"the model has no adapter {adapter!r}: it has {names}")
    return state


def load_adapter(model: Model, source: Mapping[str, Tensor] | str | PathLike[str], *, adapter: str = "default") -> Model:
    """Loads the tensors of one adapter into a model from ``bone``, in place; returns the model.

    Args:
        model: a model from ``bone``; an adapter of a name that it does not have yet is added.
        source: what ``adapter_state_dict`` returned, or a safetensors file of it. PEFT's keys are understood too: ``miss_block``,
            and ``bone_block`` of PEFT before 0.19, with or without ``base_model.model.`` and the adapter's name.
        adapter: name under which to load.

    Raises:
        ValueError: a key, a layer or a shape does not fit; nothing has been loaded then.
        RuntimeError: adapters of the model are merged.
    """
    layers = _layers(model)
    if not isinstance(source, Mapping):
        from safetensors.torch import load_file

        source = load_file(source)
    blocks: dict[str, Tensor] = {}
    for key, block in source.items():
        match = _KEY.fullmatch(key.removeprefix(_PEFT_PREFIX))
        if match is None:
            raise ValueError(f"key {key!r} is not of an adapter: '<layer>.bone' or '{_PEFT_PREFIX}<layer>.miss_block' is")
        if (name := match["layer"] or "") not in layers:
            raise ValueError(f"key {key!r} names no adapted layer of the model: it has {', '.join(map(repr, layers))}")
        if name in blocks:
            raise ValueError(f"key {key!r} is a second adapter for layer {name!r}: load one at a time")
        layer = layers[name]
        if layer.merged:
            raise RuntimeError(f"layer {name!r} has merged adapters {list(layer.merged)}: unmerge_ the model before loading")
        r = _rank(layer.variant, block)
        wanted = _shape(layer.variant, r, layer.out_features)
        if adapter in layer.bone:
            wanted = tuple(layer.bone[adapter].shape)
        elif block.shape == wanted:
            layer._check_add(f"layer {name!r}", adapter, BoneConfig(r, layer.variant))
        if block.shape != wanted:
            given = tuple(block.shape)
            raise ValueError(f"key {key!r} has shape {given}: the {layer.variant} adapter of layer {name!r} needs {wanted}")
        blocks[name] = block
    expected = [name for name, layer in layers.items() if adapter in layer.bone] or list(layers)[: not blocks]
    if missing := [name for name in expected if name not in blocks]:
        raise ValueError(f"no tensor of adapter {adapter!r} for layer(s) {', '.join(map(repr, missing[:8]))}")
    for name, block in blocks.items():
        layer = layers[name]
        if adapter not in layer.bone:
            layer.add(adapter, _rank(layer.variant, block))
        with torch.no_grad():
            layer.bone[adapter].copy_(block)
    return model


def _shape(variant: Variant, r: int, out: int) -> tuple[int, ...]:
    """Of B or of D."""
    return (out // r, r, r) if variant == "guided" else (r, out)


def _rank(variant: Variant, block: Tensor) -> int:
    """r of a B or D; of any other tensor a number >= 1 to which its shape does not fit."""
    return max(1, (block.shape[-1:] if variant == "guided" else block.shape[:1]).numel())


def _check_layer(name: str, layer: nn.Module, config: BoneConfig) -> None:
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise TypeError(f"{name} is a {type(layer).__name__}: Bone adapts nn.Linear only")
    r, n_in, n_out = config.r, layer.in_features, layer.out_features
    W = layer._parameters.get("weight")
    if W is None or nn.parameter.is_lazy(W) or not W.is_floating_point() or W.shape != (n_out, n_in):
        raise TypeError(f"{name} has no ordinary weight (it is parametrized, masked, lazy or packed): make it plain first")
    if config.variant == "guided" and (n_in % r or n_out % r):
        raise ValueError(f"r={r} must divide in_features={n_in} and out_features={n_out} of {name}")
    if config.variant == "shared" and r > n_in:
        raise ValueError(f"r={r} must be at most in_features={n_in} of {name}")


def _targets(model: nn.Module, config: BoneConfig) -> list[str]:
    """Names of the modules to adapt, in the model's order; a module with two names counts under both."""
    inner = {id(m) for layer in model.modules() if isinstance(layer, BoneLinear) for m in layer.modules() if m is not layer}
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if id(m) not in inner}
    linear = [name for name, m in modules.items() if isinstance(m, (nn.Linear, BoneLinear))]
    if config.target_modules is None or config.target_modules == "all-linear":
        output = getattr(model, "get_output_embeddings", None)  # of transformers
        head = output() if callable(output) else None
        chosen = [name for name in linear if modules[name] is not head]
    else:
        chosen = [name for name in modules if _matches(name, config.target_modules)]
    if config.exclude_modules is not None:
        chosen = [name for name in chosen if not _matches(name, config.exclude_modules)]
    if not chosen:
        raise ValueError(
            f"target_modules={config.target_modules!r} and exclude_modules={config.exclude_modules!r} leave no module to adapt; "
            f"linear layers found: {', '.join(map(repr, linear)) or 'none'}"
        )
    return chosen


def _matches(name: str, wanted: str | Sequence[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == w or name.endswith(f".{w}") for w in wanted)


def _share_frozen(model: nn.Module) -> nn.Module:
    """A copy whose parameters, adapters excepted, are frozen and share their memory with the model's."""
    adapters = {id(p) for layer in model.modules() if isinstance(layer, BoneLinear) for p in layer.bone.values()}
    frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters() if id(p) not in adapters}
    return copy.deepcopy(model, frozen)


def _layers(model: nn.Module) -> dict[str, BoneLinear]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BoneLinear)}
    if not layers:
        raise ValueError("the model has no BoneLinear: take the copy that bone(model, BoneConfig(...)) returns")
    return layers
