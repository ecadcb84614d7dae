"""The artefact of pruning: what a plan removes from a model, and how it is put into effect.

A ``PruningPlan`` knows nothing of how it was found. It holds a mask per tensor (True: kept), and optionally the output
channels that go as a whole and corrections of the weights that stay (optimal brain surgeon, M-FAC). It is applied in one of
three ways: "mask" keeps every shape and holds the removed weights at zero, under the names of ``torch.nn.utils.prune``;
"shrink" returns a smaller dense model without the channels that are gone; "rebuild" returns that smaller model with fresh
weights, for training from scratch.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.rnn import PackedSequence

from weightroom.errors import unknown
from weightroom.metrics import copy_model, evaluating
from weightroom.metrics.evaluate import _mask_hooks

__all__ = ["Inputs", "LayerSparsity", "PruningPlan", "Site", "call", "evaluating", "like", "sites"]

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]

_FORMAT = "weightroom.PruningPlan"
_VERSION = "1"


@dataclass(frozen=True)
class Site:
    """A parameter of a model and every place that uses it.

    Args:
        name: its first name, "conv.weight"; never "conv.weight_orig".
        tensor: the parameter itself (``weight_orig`` where a mask is in force).
        mask: which entries a mask already in force keeps, bool; None where there is none.
        places: (module's name, module, attribute) of every use; more than one where the parameter is shared.
    """

    name: str
    tensor: nn.Parameter
    mask: Tensor | None
    places: tuple[tuple[str, nn.Module, str], ...]

    @property
    def names(self) -> list[str]:
        """Every name of the parameter."""
        return [_join(module, attribute) for module, _, attribute in self.places]


@dataclass(frozen=True)
class LayerSparsity:
    """What a plan leaves of one tensor."""

    shape: tuple[int, ...]
    size: int
    kept: int

    @property
    def removed(self) -> int:
        """Entries that go."""
        return self.size - self.kept

    @property
    def sparsity(self) -> float:
        """Share of the entries that goes."""
        return self.removed / self.size


class PruningPlan:
    """What to remove from a model.

    Args:
        masks: parameter name -> bool tensor of the parameter's shape, True where the weight stays. A shared parameter has
            one entry, under its first name.
        channels: module name -> indices of the output channels that "shrink" cuts out, whatever they compute; see
            ``from_channels`` for the masks that go with them.
        deltas: parameter name -> correction of the parameter's shape, added to the weights before they are masked.
        model: the model that the plan was made for; only a weak reference is kept, for ``macs``.
        example_inputs: what the model takes (a tensor, a tuple of arguments or a dict of keywords); ``macs``, "shrink" and
            "rebuild" fall back on it. Not saved.

    Raises:
        ValueError: a mask is not of dtype bool, or a correction has no mask or not its shape.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        *,
        channels: Mapping[str, Sequence[int] | Tensor] | None = None,
        deltas: Mapping[str, Tensor] | None = None,
        model: nn.Module | None = None,
        example_inputs: Inputs | None = None,
    ) -> None:
        self.masks = dict(masks)
        self.channels = {
            name: torch.as_tensor(index, dtype=torch.int64).cpu().unique() for name, index in (channels or {}).items()
        }
        self.deltas = dict(deltas or {})
        self.example_inputs = example_inputs
        self._model = None if model is None else weakref.ref(model)
        for name, mask in self.masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"the mask of {name!r} must be of dtype bool, got {mask.dtype}")
        for name, delta in self.deltas.items():
            if name not in self.masks or delta.shape != self.masks[name].shape:
                shape = f"the shape {tuple(self.masks[name].shape)}" if name in self.masks else "a mask"
                raise ValueError(f"the correction of {name!r} needs {shape}, its own shape is {tuple(delta.shape)}")

    @classmethod
    def from_channels(
        cls, model: nn.Module, channels: Mapping[str, Sequence[int] | Tensor], *, example_inputs: Inputs | None = None
    ) -> PruningPlan:
        """Returns the plan that removes whole output channels.

        The masks cover weight and bias of the named modules, so that under "mask" each such channel is zero at that module's
        output. Where a norm follows, name it too if its output is to be zero.

        Args:
            model: the model.
            channels: name of a linear, convolution or norm layer -> indices of its output channels to remove.
            example_inputs: kept for ``macs``, "shrink" and "rebuild".

        Raises:
            ValueError: there is no such module, it has no weight, or an index is out of range.
        """
        known = sites(model)
        modules = dict(model.named_modules())
        masks: dict[str, Tensor] = {}
        for name, index in channels.items():
            if name not in modules:
                raise unknown("module", name, [n for n in modules if n])
            module = modules[name]
            axis = 1 if isinstance(module, _ConvTransposeNd) else 0
            found = [
                (attribute, site) for attribute in ("weight", "bias") if (site := known.get(_join(name, attribute))) is not None
            ]
            if not found or found[0][0] != "weight":
                raise ValueError(f"{name!r} ({type(module).__name__}) has no weight whose channels could go")
            if axis and cast(_ConvNd, module).groups > 1:
                raise ValueError(
                    f"channels of {name!r}: a transposed convolution with {cast(_ConvNd, module).groups} groups is not supported"
                )
            width = found[0][1].tensor.shape[axis]
            where = torch.as_tensor(index, dtype=torch.int64)
            if len(where) and (int(where.min()) < 0 or int(where.max()) >= width):
                raise ValueError(f"channels of {name!r} must lie in 0..{width - 1}, got {sorted(where.tolist())}")
            for attribute, site in found:
                mask = torch.ones(site.tensor.shape, dtype=torch.bool, device=site.tensor.device)
                mask.index_fill_(axis if attribute == "weight" else 0, where.to(mask.device), False)
                masks[site.name] = mask
        return cls(masks, channels=channels, model=model, example_inputs=example_inputs)

    def sparsity(self) -> float:
        """Share of all entries covered by the plan that it removes, in [0, 1)."""
        size = sum(mask.numel() for mask in self.masks.values())
        return sum(layer.removed for layer in self.layers().values()) / size if size else 0.0

    def layers(self) -> dict[str, LayerSparsity]:
        """What stays of each tensor, in the model's order."""
        return {name: LayerSparsity(tuple(m.shape), m.numel(), int(torch.count_nonzero(m))) for name, m in self.masks.items()}

    def macs(self, example_inputs: Inputs | None = None, *, model: nn.Module | None = None) -> int:
        """Multiply-accumulates of one forward pass once zeros are skipped.

        Counts every weight of a linear, convolution, recurrent or attention layer that neither the plan nor a mask already in
        force removes, times how often it is used; layers outside the plan count in full. Products of activations with
        activations (attention scores) and the inputs of channels that vanish upstream are not counted: for the latter,
        ``apply(model, "shrink")`` and count again.

        Args:
            example_inputs: what the model takes; the plan's own when None.
            model: the model; the one the plan was made for when None.

        Raises:
            ValueError: there is no model or no example input, the plan does not fit the model, or it prunes a layer of a
                type whose products cannot be counted.
        """
        model = self._model() if model is None and self._model is not None else model
        if model is None:
            raise ValueError(
                "macs needs model=: the model that the plan was made for is gone, or the plan was loaded from a file"
            )
        found = self._fit(model)
        kept = {name: site.mask for name, site in sites(model).items() if site.mask is not None}
        for name, site in found.items():
            mask = self.masks[name].to(site.tensor.device)
            kept[site.name] = mask if site.mask is None else mask & site.mask
        return _count_macs(model, self._inputs(example_inputs), kept, {site.name for site in found.values()})

    def merge(self, other: PruningPlan) -> PruningPlan:
        """Returns the plan that has the effect of this one followed by ``other``: what either removes goes, corrections add up.

        Raises:
            ValueError: the two disagree on the shape of a tensor; the first such tensor is named.
        """
        masks = dict(self.masks)
        for name, mask in other.masks.items():
            if name in masks and masks[name].shape != mask.shape:
                here, there = tuple(masks[name].shape), tuple(mask.shape)
                raise ValueError(f"the plans do not fit together: {name!r} has shape {here} in one and {there} in the other")
            masks[name] = masks[name] & mask.to(masks[name].device) if name in masks else mask
        channels = dict(self.channels)
        for name, index in other.channels.items():
            channels[name] = torch.cat([channels[name], index]) if name in channels else index
        deltas = dict(self.deltas)
        for name, delta in other.deltas.items():
            deltas[name] = deltas[name] + delta.to(deltas[name].device) if name in deltas else delta
        inputs = other.example_inputs if self.example_inputs is None else self.example_inputs
        return PruningPlan(
            masks, channels=channels, deltas=deltas, model=self._model() if self._model else None, example_inputs=inputs
        )

    def apply(
        self, model: nn.Module, mode: Literal["mask", "shrink", "rebuild"] = "mask", *, example_inputs: Inputs | None = None
    ) -> nn.Module:
        """Puts the plan into effect.

        "mask" works in place, as ``torch.nn.utils.prune`` does, and returns the model: the parameter becomes ``weight_orig``
        (the same object, so an optimizer keeps its state), the buffer ``weight_mask`` holds the mask, and ``weight`` is their
        product, computed anew before each forward pass. Removed weights are therefore exactly zero whatever momentum and
        weight decay do. A tensor of which nothing goes gets no mask; a mask already in force is never widened; applying a
        plan twice is applying it once (corrections are added only where something that the plan removes is still there).
        ``torch.nn.utils.prune.remove(module, "weight")`` makes a mask permanent.

        "shrink" (needs torch-pruning) leaves ``model`` alone and returns a plain, smaller copy with the masks made permanent,
        without (a) the plan's ``channels``, whatever they compute, and (b) every channel whose weights are all masked and
        whose output is exactly zero where it is used, after norm and activation, on ``example_inputs`` and on random inputs of
        the same shapes if the model takes such. Removing (b) changes no output but by rounding. Channels of the model's outputs
        stay, and at least one channel of every layer; so do those that the code reorders (flip, channel shuffle) or mixes with
        others by anything but layers (a softmax or a mean over channels): under (a) that is an error. A norm over channels is a
        layer: after (a) it runs over those that are left.

        "rebuild" is "shrink" followed by every module's own ``reset_parameters``: the architecture of the plan with fresh
        weights under torch's global random state, for training from scratch. None of the old weights survives.

        Args:
            model: the model that the plan was made for, or one with the same tensors.
            mode: see above.
            example_inputs: what the model takes, to trace it under "shrink" and "rebuild"; the plan's own when None.

        Raises:
            ValueError: the plan does not fit the model (the first tensor that differs is named), the mode is unknown, there
                is no example input, or a channel cannot be cut out.
            RuntimeError: torch-pruning cannot trace the model: a bidirectional LSTM, say, or concatenations that it cannot number
                (MONAI's ``UNet`` and ``BasicUNet``, as of torch-pruning 1.6.1).
            MissingExtraError: torch-pruning is not installed.
        """
        if mode not in ("mask", "shrink", "rebuild"):
            raise ValueError(f"mode must be 'mask', 'shrink' or 'rebuild', got {mode!r}")
        self._fit(model)
        if mode == "mask":
            self._mask(model)
            return model
        from weightroom.prune.shrink import reset, shrink

        masked = copy_model(model)
        self._mask(masked)
        small = shrink(masked, self.channels, self._inputs(example_inputs))
        if mode == "rebuild":
            reset(small)
        return small

    def save(self, path: str | Path) -> None:
        """Writes the plan as a safetensors file; masks take one bit per weight."""
        tensors: dict[str, Tensor] = {}
        for name, mask in self.masks.items():
            tensors[f"mask/{name}"] = torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))
        tensors |= {f"channels/{name}": index for name, index in self.channels.items()}
        tensors |= {f"delta/{name}": delta.detach().cpu().contiguous() for name, delta in self.deltas.items()}
        shapes = json.dumps({name: list(mask.shape) for name, mask in self.masks.items()})
        metadata = {"format": _FORMAT, "version": _VERSION, "shapes": shapes, "sha256": _digest(tensors, shapes)}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> PruningPlan:
        """Reads a plan that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a plan, is of another version, or was changed after it was written.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a pruning plan: {error}") from None
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a pruning plan: its metadata say {metadata.get('format')!r}, not {_FORMAT!r}")
        if metadata.get("version") != _VERSION:
            raise ValueError(
                f"{path} is a pruning plan of version {metadata.get('version')!r}; this weightroom reads version {_VERSION!r}"
            )
        shapes = metadata.get("shapes", "")
        if metadata.get("sha256") != _digest(tensors, shapes):
            raise ValueError(f"{path} was changed after it was written: its SHA-256 does not match its content")
        masks = {}
        for name, shape in json.loads(shapes).items():
            bits = np.unpackbits(tensors[f"mask/{name}"].numpy(), count=int(np.prod(shape, dtype=np.int64)))
            masks[name] = torch.from_numpy(bits.astype(bool).reshape(shape)).to(device)
        part = lambda kind: {k.removeprefix(kind): t for k, t in tensors.items() if k.startswith(kind)}  # noqa: E731
        return cls(masks, channels=part("channels/"), deltas={name: delta.to(device) for name, delta in part("delta/").items()})

    def __repr__(self) -> str:
        extra = "".join(f", {len(part)} {name}" for name, part in (("channels", self.channels), ("deltas", self.deltas)) if part)
        return f"PruningPlan({len(self.masks)} tensors, sparsity {self.sparsity():.4f}{extra})"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}

    def _inputs(self, given: Inputs | None) -> Inputs:
        inputs = self.example_inputs if given is None else given
        if inputs is None:
            raise ValueError("give example_inputs (a batch that the model takes): neither the call nor fit() was given any")
        return inputs

    def _fit(self, model: nn.Module) -> dict[str, Site]:
        """Returns the place of every tensor of the plan, or names the first that the model does not have like that."""
        found = _by_name(model)
        for name, mask in self.masks.items():
            if name not in found:
                raise ValueError(f"the plan does not fit the model: the model has no tensor {name!r}")
            here, there = tuple(found[name].tensor.shape), tuple(mask.shape)
            if here != there:
                raise ValueError(
                    f"the plan does not fit the model: {name!r} has shape {here} in the model and {there} in the plan"
                )
        modules = dict(model.named_modules())
        for name in self.channels:
            if name not in modules:
                raise ValueError(f"the plan does not fit the model: the model has no module {name!r}")
        return {name: found[name] for name in self.masks}

    @torch.no_grad()
    def _mask(self, model: nn.Module) -> None:
        work = []
        for name, site in self._fit(model).items():
            mask = self.masks[name].to(site.tensor.device)
            work.append((name, site, mask if site.mask is None else mask & site.mask))
        # Corrections are no projection as masks are: a plan all of whose removals are in force has been applied before.
        if any(
            torch.count_nonzero(mask) < (mask.numel() if site.mask is None else torch.count_nonzero(site.mask))
            for _, site, mask in work
        ):
            for name, site, _ in work:
                if name in self.deltas:
                    site.tensor.add_(self.deltas[name].to(site.tensor))
        for _, site, mask in work:
            if site.mask is None and bool(mask.all()):
                continue
            for _, module, attribute in site.places:
                if f"{attribute}_mask" in module._buffers:
                    buffer = getattr(module, f"{attribute}_mask")
                    buffer.copy_(mask)
                    setattr(module, attribute, buffer.to(site.tensor.dtype) * site.tensor)
                else:
                    torch_prune.custom_from_mask(module, attribute, mask)
        _refresh_unvisited(model)


def sites(model: nn.Module) -> dict[str, Site]:
    """Every parameter of the model by its first name, in the order of its modules; shared ones once."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    tensors: dict[int, nn.Parameter] = {}
    masks: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            mask = module._buffers.get(f"{attribute.removesuffix('_orig')}_mask") if attribute.endswith("_orig") else None
            if mask is not None:
                masks.setdefault(id(parameter), mask != 0)
                attribute = attribute.removesuffix("_orig")
            tensors[id(parameter)] = parameter
            places.setdefault(id(parameter), []).append((path, module, attribute))
    return {
        (name := _join(uses[0][0], uses[0][2])): Site(name, tensors[key], masks.get(key), tuple(uses))
        for key, uses in places.items()
    }


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs, tensors among them on ``device``."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device) for name, value in inputs.items()}
    return [to_device(value, device) for value in inputs] if isinstance(inputs, list | tuple) else inputs


def like(inputs: Any, tensor: Tensor) -> Any:
    """The inputs on the device of a tensor, those of floating point in its dtype."""
    if isinstance(inputs, Tensor):
        return inputs.to(tensor.device, tensor.dtype if inputs.is_floating_point() else None)
    if isinstance(inputs, Mapping):
        return {name: like(value, tensor) for name, value in inputs.items()}
    return [like(value, tensor) for value in inputs] if isinstance(inputs, list | tuple) else inputs


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Calls the model on a tensor, a sequence of arguments or a mapping of keywords."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _refresh_output_projection(attention: nn.Module, inputs: Any) -> None:
    """Forward pre-hook: recomputes the masked weights of a layer that is used without being called."""
    projection = cast(nn.MultiheadAttention, attention).out_proj
    for hook in _mask_hooks(projection):
        hook(projection, None)


def _refresh_unvisited(model: nn.Module) -> None:
    """``nn.MultiheadAttention`` reads ``out_proj.weight`` and never calls ``out_proj``, so that its mask hook would not run."""
    for module in model.modules():
        masked = isinstance(module, nn.MultiheadAttention) and bool(_mask_hooks(module.out_proj))
        if masked and _refresh_output_projection not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_refresh_output_projection)


def _by_name(model: nn.Module) -> dict[str, Site]:
    return {name: site for site in sites(model).values() for name in site.names}


def _join(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute


def _digest(tensors: Mapping[str, Tensor], shapes: str) -> str:
    digest = hashlib.sha256(shapes.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _count_macs(model: nn.Module, inputs: Inputs, kept: Mapping[str, Tensor], planned: set[str]) -> int:
    """Sum over weights of (entries kept) x (times used) in one forward pass."""
    names = {(id(module), attribute): site.name for site in sites(model).values() for _, module, attribute in site.places}
    total = 0
    seen: set[str] = set()

    def add(module: nn.Module, attribute: str, uses: Sequence[int]) -> None:
        # One number of uses, or one for each of equally high blocks of rows.
        nonlocal total
        name = names.get((id(module), attribute))
        if name is None:
            return
        seen.add(name)
        if name in kept:
            blocks = [int(torch.count_nonzero(block)) for block in kept[name].chunk(len(uses))]
        else:
            blocks = [getattr(module, attribute).numel() // len(uses)] * len(uses)
        total += sum(block * times for block, times in zip(blocks, uses, strict=True))

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [*args, *kwargs.values()]
        if isinstance(module, nn.Linear):
            add(module, "weight", [output.numel() // module.out_features])
        elif isinstance(module, _ConvTransposeNd):
            add(module, "weight", [given[0].numel() // module.in_channels])
        elif isinstance(module, _ConvNd):
            add(module, "weight", [output.numel() // module.out_channels])
        elif isinstance(module, nn.RNNBase):
            rows = given[0].data if isinstance(given[0], PackedSequence) else given[0]
            for attribute in module._flat_weights_names:
                if attribute.startswith("weight"):
                    add(module, attribute, [rows.numel() // module.input_size])
        elif isinstance(module, nn.MultiheadAttention):
            query, key, value = (
                kwargs.get(word, args[i] if i < len(args) else None) for i, word in enumerate(("query", "key", "value"))
            )
            rows = [
                cast(Tensor, x).numel() // width
                for x, width in ((query, module.embed_dim), (key, module.kdim), (value, module.vdim))
            ]
            add(module, "in_proj_weight", rows)
            for attribute, uses in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), rows, strict=True):
                add(module, attribute, [uses])
            add(module.out_proj, "weight", [rows[0]])

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in model.modules()]
    try:
        with evaluating(model), torch.no_grad():
            call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    countable = (nn.Linear, _ConvNd, nn.RNNBase, nn.MultiheadAttention)
    for site in sites(model).values():
        if (
            site.name in planned - seen
            and len(site.tensor.shape) > 1
            and not any(isinstance(m, (*countable, nn.Embedding)) for _, m, _ in site.places)
        ):
            raise ValueError(f"the products of {site.name!r} ({type(site.places[0][1]).__name__}) cannot be counted")
    return total
