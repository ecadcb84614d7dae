r"""Data-independent module-aware pruning (DIMAP): LAMP scores, one threshold for each function that a transformer's layers have.

A weight is worth its share of the squared norm of the weights not smaller than itself in its layer, the score of LAMP. The layers
of the whole network are grouped by what they do - queries, keys and values; output projections of attention; MLPs - and the same
share of each group goes, the least scores first. Everything else stays dense: patch embedding, patch merging, norms, tables and
networks of relative positions, head. Reach for it with a Swin or another vision transformer that is to be cut without data, in
one shot; the paper removes 15 to 55 % and then fine-tunes with AdamW for 30 epochs, half of them warm-up, at a fiftieth of the
learning rate that the network was trained with.

He, Zhou, "Data-independent Module-aware Pruning for Hierarchical Vision Transformers", ICLR 2024, arXiv 2404.13648, eq. (10),
section 4.4 and appendix B. There is no published code. The paper does not say how the budget is shared between the groups; the
same share of each is what its parameter counts fit.

Why the score: by the norm bound below, what matters of a pruned layer is its relative error, as the other factor is common to all.
It holds for networks of layers and 1-Lipschitz activations that keep 0, which a transformer is not.

.. math:: \|f(x) - \tilde f(x)\| \le \frac{\|W_l - \tilde W_l\|_F}{\|W_l\|_F} \prod_j \|W_j\|_F \qquad (\|x\| \le 1)

Known not to work: groups against one pool (``single_module=True``, LAMP on the same layers): the paper reports a few tenths of a
point after fine-tuning, and nothing says that a group deserves its equal share; without fine-tuning one pool was better on a
small Swin. Zeros speed nothing up on dense hardware.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from weightroom.errors import UsageError, unknown
from weightroom.prune.base import (
    PRUNABLE,
    PlanPruner,
    ScheduleSpec,
    _matches,
    _sizes,
    alive_magnitudes,
    apportion,
    check_finite,
    lamp_scores,
    prunable,
    remove_smallest,
)
from weightroom.prune.plan import Site, sites

__all__ = ["DIMAPPruner", "distortion_importance"]

Modules = Literal["auto"] | Mapping[str, str | None] | Callable[[str], str | None]

#: Parts of names that say: never pruned.
AUX = (
    "patch_embed*",
    "embeddings",
    "downsample",
    "reduction",
    "norm*",
    "head",
    "heads",
    "classifier",
    "pooler",
    "*position*",
    "cpb_mlp",
)

_FUSED = {"qkv", "to_qkv", "in_proj_weight", "query_key_value"}
_SPLIT = {"q", "k", "v", "kv", "to_q", "to_k", "to_v", "to_kv", "query", "key", "value"} | {
    f"{which}_proj{suffix}" for which in "qkv" for suffix in ("", "_weight")
}
_PROJ = ("proj", "out_proj", "o_proj", "to_out", "to_out.0", "output.dense")
_MLP = re.compile(r"(.+\.)?(fc1|fc2|linear_?1|linear_?2|(gate|up|down)_proj|mlp\.\d+|(intermediate|output)\.dense)")


class DIMAPPruner(PlanPruner):
    r"""Removes the same share of every module - QKV, projections, MLPs - by each weight's share of its layer.

    With the weights of a layer in falling order of magnitude, :math:`|w_{p_1}| \ge |w_{p_2}| \ge \dots`,

    .. math:: \mathrm{Imp}(w_{p_j}) = w_{p_j}^2 \Big/ \sum_{i \le j} w_{p_i}^2

    and of each module, all its layers together, the :math:`\mathrm{round}(r\, n)` weights of least importance go, ties by layer,
    then by flat index. So the total is exact for each module; it may differ from :math:`\mathrm{round}(S N)` by a weight.

    Args:
        sparsity: r, in [0, 1): the share that goes of every module; or a dict, module -> share, in which a module that is not
            named keeps all. With a dict, ``sparsity`` of the pruner is the largest, and schedules scale all in proportion.
        modules: what belongs to which module. "auto" reads it off names, structure and types: the layers of
            ``nn.MultiheadAttention`` and those called qkv, q_proj, query, to_q, ... make "qkv"; proj, out_proj, o_proj, ... beside
            them make "proj"; fc1 and fc2, linear1 and linear2, mlp.0 and mlp.3, ... make "mlp". Outside the blocks that hold these
            all stays dense; inside, a layer that is none of them is refused. A dict maps names or patterns of layers
            ("blocks.*.attn.qkv") or parameters to names of modules, of your choice, or to None for dense; the first that matches
            decides, and what none matches stays dense. A function does the same for the name of a parameter.
        aux: for "auto": layers that stay dense whatever they are called; patterns of full names ("stages.3.*") or of their parts
            between dots ("head").
        single_module: all layers in one pool, with one threshold: ``LAMPPruner`` on the same layers, with ``fuse_qkv=False`` also
            where queries, keys and values are stored apart.
        fuse_qkv: queries, keys and values of one attention count as one layer where they are stored apart, so that the result does
            not depend on how they are stored.
        targets: see ``PlanPruner``; "auto" knows the weights of the usual types only.
        ignore: see ``PlanPruner``; positions are among all ``targets``, those outside the modules included.
        granularity: see ``PlanPruner``.
        schedule: see ``PlanPruner``.

    Where masks in force have removed more of a module than its share, it keeps them and the others give less, so that the total
    is as asked for.

    Raises:
        TypeError: ``modules`` gives something that is neither a name nor None.
        ValueError: an argument is out of its range or unknown; from ``fit`` also where no attention or MLP layer is found, a layer
            in a block cannot be told, or ``sparsity`` or ``modules`` names what there is not.

    Example::

        pruner = DIMAPPruner(0.5)
        pruner.groups(model)                                # {"qkv": [...], "proj": [...], "mlp": [...]}: look first
        pruner.fit(model).apply(model)                      # fine-tune as usual: the zeros stay zero
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float],
        *,
        modules: Modules = "auto",
        aux: Sequence[str] = AUX,
        single_module: bool = False,
        fuse_qkv: bool = True,
        targets: Sequence[type[nn.Module] | str] = PRUNABLE,
        ignore: Sequence[str | int] = (),
        granularity: Literal["weight"] = "weight",
        schedule: ScheduleSpec = "oneshot",
    ) -> None:
        self.ratios: dict[str, float] | None = None
        if isinstance(sparsity, Mapping):
            if single_module or not sparsity:
                raise UsageError(f"sparsity must be a number with single_module, and no empty dict; got {dict(sparsity)}")
            for name, ratio in sparsity.items():
                if not 0 <= ratio < 1:
                    raise UsageError(f"sparsity must be in [0, 1), got {ratio} for {name!r}")
            self.ratios = {name: float(ratio) for name, ratio in sparsity.items()}
            sparsity = max(sparsity.values())
        super().__init__(sparsity, targets=targets, ignore=ignore, granularity=granularity, schedule=schedule)
        if isinstance(modules, str):
            if modules != "auto":
                raise unknown("modules", modules, ("auto", "a dict name -> module", "a function name -> module"))
        elif not isinstance(modules, Mapping) and not callable(modules):
            raise TypeError(f"modules must be 'auto', a dict or a function, got {type(modules).__name__}")
        if isinstance(aux, str):
            raise TypeError(f"aux must be a sequence of patterns, got {aux!r}")
        self.modules, self.aux, self.single_module, self.fuse_qkv = modules, tuple(aux), single_module, fuse_qkv

    def groups(self, model: nn.Module) -> dict[str, list[str]]:
        """What is pruned: module -> names of its parameters; with ``single_module`` all under "model".

        Raises:
            ValueError: as ``fit``.
        """
        tensors = self._tensors(model)
        return {name: [tensors[i].name for i in members] for name, members in self._members(tensors).items()}

    def at(self, sparsity: float) -> DIMAPPruner:
        """Returns the same pruner with another target; of a dict, all shares change in proportion."""
        other = cast(DIMAPPruner, super().at(sparsity))
        if self.ratios is not None:
            most = self.sparsity
            other.ratios = {name: ratio * (sparsity / most) if most else sparsity for name, ratio in self.ratios.items()}
        return other

    def _tensors(self, model: nn.Module) -> list[Site]:
        found = prunable(model, self.targets, self.ignore)
        if isinstance(self.modules, Mapping):
            names = {name for site in sites(model).values() for name in site.names} | {name for name, _ in model.named_modules()}
            for pattern in self.modules:
                if not _matches(names, pattern):
                    raise unknown("layer in modules", pattern, names - {""})
        assigned = self._assign(found)
        tensors = [site for site, module in zip(found, assigned, strict=True) if module is not None]
        if not tensors:
            raise UsageError(
                "no attention or MLP layers found; pass modules="
                if self.modules == "auto"
                else f"modules matches none of the {len(found)} weights that could be pruned ({found[0].name!r}, ...)"
            )
        return tensors

    def _scores(
        self, model: nn.Module, tensors: Sequence[Site], data: Iterable[Any] | None, loss_fn: Callable[..., Tensor] | None
    ) -> list[Tensor]:
        scores: list[Tensor] = [torch.empty(0)] * len(tensors)
        for layer in self._layers(tensors):
            magnitudes = [alive_magnitudes(tensors[i]) for i in layer]
            joined = lamp_scores(torch.cat([m.flatten().to(magnitudes[0].device) for m in magnitudes]))
            for i, part in zip(layer, joined.split([m.numel() for m in magnitudes]), strict=True):
                scores[i] = part.view(tensors[i].tensor.shape).to(tensors[i].tensor.device)
        return scores

    def _select(self, tensors: Sequence[Site], scores: list[Tensor], removed: int) -> list[Tensor]:
        masks = list(scores)
        for members, count in zip(self._members(tensors).values(), self._counts(tensors), strict=True):
            kept = remove_smallest([scores[i] for i in members], [tensors[i].mask for i in members], count)
            for i, mask in zip(members, kept, strict=True):
                masks[i] = mask
        return masks

    def _count(self, tensors: Sequence[Site]) -> int:
        return sum(self._counts(tensors))

    def _counts(self, tensors: Sequence[Site]) -> list[int]:
        """How many weights go from each module."""
        members = self._members(tensors)
        if self.ratios is not None and (strange := set(self.ratios) - set(members)):
            raise unknown("module in sparsity", min(strange), members)
        ratios = [self.sparsity if self.ratios is None else self.ratios.get(name, 0.0) for name in members]
        sizes, gone = zip(*(_sizes([tensors[i] for i in layers]) for layers in members.values()), strict=True)
        counts = [round(r * n) for r, n in zip(ratios, sizes, strict=True)]
        if all(count >= g for count, g in zip(counts, gone, strict=True)):
            return counts
        total, removed = sum(sizes), sum(counts)
        if removed < sum(gone):
            raise UsageError(
                f"sparsity {self.sparsity if self.ratios is None else self.ratios} asks for {removed} removed weights, "
                f"but {sum(gone)} of {total} are already pruned (sparsity {sum(gone) / total:g})"
            )
        alive = [n - g for n, g in zip(sizes, gone, strict=True)]
        kept = apportion([(1 - r) * n for r, n in zip(ratios, sizes, strict=True)], alive, total - removed)
        return [n - k for n, k in zip(sizes, kept, strict=True)]

    def _members(self, tensors: Sequence[Site]) -> dict[str, list[int]]:
        """Module -> positions of its tensors."""
        members: dict[str, list[int]] = {}
        for i, module in enumerate(self._assign(tensors)):
            members.setdefault("model" if self.single_module else str(module), []).append(i)
        return members

    def _layers(self, tensors: Sequence[Site]) -> Iterator[list[int]]:
        """Positions of the tensors that make one layer of eq. (10)."""
        layers: dict[tuple[str, ...], list[int]] = {}
        for i, (site, module) in enumerate(zip(tensors, self._assign(tensors), strict=True)):
            parent, leaf = _split(site.name)
            joins = self.fuse_qkv and leaf in _SPLIT
            layers.setdefault((str(module), parent) if joins else (site.name,), []).append(i)
        yield from layers.values()

    def _assign(self, tensors: Sequence[Site]) -> list[str | None]:
        """The module of each tensor; None: it stays dense."""
        if self.modules == "auto":
            return _recognise(tensors, self.aux)
        chosen = [self._chosen(site) for site in tensors]
        for site, module in zip(tensors, chosen, strict=True):
            if module is not None and not isinstance(module, str):
                raise TypeError(f"modules must give the name of a module or None, got {module!r} for {site.name!r}")
        return chosen

    def _chosen(self, site: Site) -> str | None:
        if not isinstance(self.modules, Mapping):
            return self.modules(site.name)  # type: ignore[operator]
        return next((module for pattern, module in self.modules.items() if _matches(site.names, pattern)), None)


def distortion_importance(weight: Tensor) -> Tensor:
    r"""Eq. (10): each weight's share of the squares of the weights not smaller than itself, :math:`w_{p_j}^2 / \sum_{i \le j} w_{p_i}^2`.

    The largest weight has importance 1, zeros have 0. Scale, signs and order of the weights do not matter; among equal magnitudes
    the earlier in flat order counts as the smaller. These are the scores of ``LAMPPruner`` as well.

    Args:
        weight: the weights of one layer, of any shape.

    Returns:
        The importances in [0, 1], float64, of the same shape.

    Raises:
        ValueError: a weight is NaN or infinite, or there is none.
    """
    if not weight.numel():
        raise UsageError("weight must hold at least one weight")
    check_finite("weight", weight.detach())
    return lamp_scores(weight)


def _recognise(tensors: Sequence[Site], aux: Sequence[str]) -> list[str | None]:
    """ "qkv", "proj", "mlp" or None, by the names of layers and what stands beside them."""
    spared = [any(_is_aux(name, pattern) for name in site.names for pattern in aux) for site in tensors]
    layers = [_split(site.name) for site, spare in zip(tensors, spared, strict=True) if not spare]
    apart = Counter(parent for parent, leaf in layers if leaf in _SPLIT)
    qkv = {(parent, leaf) for parent, leaf in layers if leaf in _FUSED or (leaf in _SPLIT and apart[parent] > 1)}
    attentions = {root for parent, _ in qkv for root in _roots(parent)}
    found: list[str | None] = []
    for site, spare in zip(tensors, spared, strict=True):
        parent, leaf = _split(site.name)
        name = _join(parent, leaf)
        if spare:
            found.append(None)
        elif (parent, leaf) in qkv:
            found.append("qkv")
        elif any(name == _join(root, proj) for root in attentions for proj in _PROJ):
            found.append("proj")
        elif _MLP.fullmatch(name) and (parent or any("." not in root for root in attentions)):
            found.append("mlp")
        else:
            found.append(None)
    mlps = {_split(site.name)[0] for site, module in zip(tensors, found, strict=True) if module == "mlp"}
    blocks = {_around(root, mlps) for root in attentions} | mlps
    lost = [
        site.name
        for site, module, spare in zip(tensors, found, spared, strict=True)
        if module is None and not spare and any(_within(site.name, block) for block in blocks)
    ]
    if lost:
        raise UsageError(
            f"cannot tell what {', '.join(map(repr, lost[:8]))}{', ...' if len(lost) > 8 else ''} is for, inside a block of "
            "attention and MLP: pass modules= (name -> 'qkv', 'proj', 'mlp' or None), or name it in aux="
        )
    return found


def _split(name: str) -> tuple[str, str]:
    """Parent and name of a layer: ("a.attn", "qkv") of "a.attn.qkv.weight"."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    return parent, leaf


def _join(parent: str, leaf: str) -> str:
    return f"{parent}.{leaf}" if parent else leaf


def _roots(parent: str) -> list[str]:
    """Where the projection of an attention may hang whose QKV hang at ``parent``: there, or around "self"."""
    outer, _, last = parent.rpartition(".")
    return [parent, outer] if last == "self" or outer.rpartition(".")[2] == last == "attention" else [parent]


def _around(root: str, mlps: Iterable[str]) -> str:
    """The block of an attention: the smallest module around it that holds an MLP, the attention itself where there is none."""
    block = root
    while not any(_within(mlp, block) for mlp in mlps):
        if not block:
            return root
        block = block.rpartition(".")[0]
    return block


def _within(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


def _is_aux(name: str, pattern: str) -> bool:
    return _matches([name], pattern) or any(fnmatchcase(part, pattern) for part in name.split("."))
