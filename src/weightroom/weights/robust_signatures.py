r"""Robust weight signatures: robustness against a corruption as a small patch that is added to a clean model and taken off again.

Reach for it when one model is shipped and its users want robustness that they can switch on, scale, combine and take back, or to
study arithmetic on weights. Three sets of weights have one start: :math:`\theta_{pre}`, the same fine-tuned on clean data
(:math:`\theta_{std}`), and fine-tuned on corrupted data with the same labels, head and seed (:math:`\theta_c`). For each tensor
of the first few layers, flattened,

.. math:: d_{std} = \theta_{std} - \theta_{pre}, \quad d_c = \theta_c - \theta_{pre}, \quad
          RWS_c = d_c - \frac{\langle d_c, d_{std} \rangle}{\langle d_{std}, d_{std} \rangle} d_{std}, \qquad
          \theta = \theta_{std} + \sum_c \alpha_c RWS_c .

Not known to work: the projection. In our study, copying the robust model's first layers as they are did as well or better at the
same size, and the clean accuracy falls with either. A signature is not "robust minus clean", :math:`d_c - d_{std}`, which is that copy.

Cai, Zhang, Wang, "Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?", ICML 2023, arXiv 2302.12480,
eq. (1) and (2). The authors' code multiplies by the strength twice where there are several signatures, so that n equal parts count
1/n^2 each; here it is once. It also takes the convolutions of downsampling branches from the robust models, at every depth; here
they are layers like others. Like it, a patch gives a batch-norm network the robust models' batch-norm tensors at every depth.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightroom.errors import UsageError, check_range, unknown
from weightroom.train import reestimate_batchnorm
from weightroom.weights import signature_files
from weightroom.weights.signature_files import Codes, Mode

__all__ = ["RobustWeightSignature", "apply_", "patch", "remove_"]

Weights = Mapping[str, Tensor] | nn.Module
Layers = int | Sequence[str] | Callable[[str], bool]
Model = TypeVar("Model", bound=nn.Module)

#: Entries that are summed in float64 at once, so that they fit in the cache.
_BLOCK = 2**15
#: Attribute of a patched model that remembers what to take off.
_RECORD = "_weight_patches"


def signature_of(pre: Tensor, standard: Tensor, robust: Tensor, project: bool = True) -> Tensor:
    """Eq. (1) for one tensor: d_c without its part along d_std, by two dot products; d_c itself where d_std is zero."""
    device, dtype = standard.device, torch.promote_types(standard.dtype, torch.float32)
    wide = torch.float32 if device.type == "mps" else torch.float64
    start, clean, corrupted = (tensor.detach().to(device, dtype).flatten() for tensor in (pre, standard, robust))
    d_c = corrupted - start
    if project:
        blocks = list(zip(start.split(_BLOCK), clean.split(_BLOCK), d_c.split(_BLOCK), strict=True))
        uu, uv = torch.zeros((), dtype=wide, device=device), torch.zeros((), dtype=wide, device=device)
        for a, b, v in blocks:
            u = (b - a).to(wide)
            uu, uv = uu + torch.dot(u, u), uv + torch.dot(u, v.to(wide))
        along = uv / uu.clamp_min(torch.finfo(wide).tiny)
        for a, b, v in blocks:
            v.copy_(v.to(wide) - along * (b - a).to(wide))
    return d_c.view(standard.shape)


class RobustWeightSignature(Mapping):
    """A patch: parameter name -> what to add to that parameter.

    Args:
        tensors: the additions, of any shape, finite.
        corruption: what the patch is robust against.
        architecture: hash of the names and shapes of the tensors that a model must have, the shapes of its last layer (the head)
            left out, since it differs between data sets; None fits every model that has the patch's tensors.
        batchnorm: name -> tensor of the robust model's batch-norm layers, affine and statistics; their mean where there were
            several models.
        models: number of robust models in it.

    Raises:
        ValueError: a tensor holds NaN or an infinity.
        TypeError: a tensor is not a floating-point tensor.

    A signature compares equal to one with the same content. Quantised tensors are decoded when they are read.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        corruption: str = "",
        architecture: str | None = None,
        batchnorm: Mapping[str, Tensor] | None = None,
        models: int = 1,
    ) -> None:
        self._tensors: dict[str, Tensor | Codes] = {}
        self.corruption, self.architecture, self.models = corruption, architecture, models
        self.batchnorm = {name: t.detach().clone() for name, t in (batchnorm or {}).items()}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(
                    f"{name!r} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}"
                )
            if tensor.numel() and not torch.stack(torch.aminmax(tensor.detach())).isfinite().all():
                raise UsageError(f"{name!r} holds values that are not finite: it cannot be part of a signature")
            self._tensors[name] = tensor.detach()

    @classmethod
    def extract(
        cls, pre: Weights, standard: Weights, robust: Weights, layers: Layers = 7, project: bool = True, *, corruption: str = ""
    ) -> RobustWeightSignature:
        """Returns the signature of a corruption from three sets of weights of one architecture.

        Args:
            pre: the common start, a module or its state dict, like the next two. Only the tensors of the chosen layers are needed:
                its head may be another one.
            standard: ``pre`` fine-tuned on clean data.
            robust: ``pre`` fine-tuned on corrupted data, with the labels, the initial head and the seed of ``standard``.
            layers: which layers the patch changes. A number k >= 1 takes weight and bias of the first k convolution and linear
                layers, in the order of ``named_modules``, which is that of the state dict: a layer is a module whose ``weight``
                has two dimensions or more. A list names modules (with all that is in them, such as a residual block) or tensors;
                a function says for each tensor's name whether it belongs. Batch-norm tensors never do, they are kept apart.
            project: take out the part along the task direction; False gives d_c itself.
            corruption: a name for what ``robust`` is robust against.

        Raises:
            ValueError: a tensor is missing or has different shapes (it is named), there are fewer than ``layers`` layers, no
                such layer, the signature would not be finite, or nobody knows which layers come first: the state dict is in
                alphabetical order (as safetensors reads it), or a weight is masked or parametrised.
            TypeError: ``layers`` is neither a number, nor a list of names, nor a function.
        """
        states = {name: _state(weights) for name, weights in (("pre", pre), ("standard", standard), ("robust", robust))}
        before, clean, corrupted = states.values()
        if _alphabetical(list(clean)):
            raise UsageError(
                "standard is a state dict in alphabetical order, as read from a safetensors file, which does not say which layers "
                "come first: load it into the model, and give the model"
            )
        for name in dict.fromkeys([*clean, *corrupted]):
            _check_same(name, {key: states[key] for key in ("standard", "robust")})
        norms = _batchnorm_names(clean)
        names = _choose(clean, layers, norms)
        for name in names:
            _check_same(name, states)
        return cls(
            {name: signature_of(before[name], clean[name], corrupted[name], project) for name in names},
            corruption=corruption,
            architecture=_architecture(clean),
            batchnorm={name: corrupted[name] for name in norms},
        )

    def scaled(self, a: float) -> RobustWeightSignature:
        """Returns ``a`` times the signature, in floating point; the batch-norm tensors are as they were."""
        check_range("a", a, low=-math.inf, high=math.inf, open_low=True, open_high=True)
        return self._with({name: a * tensor for name, tensor in self.items()})

    def __add__(self, other: object) -> RobustWeightSignature:
        """Returns the sum, over the keys of either; batch-norm tensors are averaged over the robust models of both.

        Raises:
            ValueError: the two are of different architectures, or disagree on the shape of a tensor, which is named.
        """
        if not isinstance(other, RobustWeightSignature):
            return NotImplemented
        if None not in (self.architecture, other.architecture) and self.architecture != other.architecture:
            raise UsageError(f"signatures of different architectures cannot be added: {self.architecture}, {other.architecture}")
        total = dict(self.items())
        for name, tensor in other.items():
            if name in total:
                _check_shapes(name, total[name].shape, tensor.shape, "one signature", "the other")
                tensor = total[name] + tensor.to(total[name].device)
            total[name] = tensor
        return RobustWeightSignature(
            total,
            corruption=" + ".join(filter(None, (self.corruption, other.corruption))),
            architecture=self.architecture or other.architecture,
            batchnorm=_mean_batchnorm([self, other]),
            models=self.models + other.models,
        )

    def quantize(self, levels: int = 16, mode: Mode = "linear") -> RobustWeightSignature:
        """Returns the signature with every tensor as integers of as few bits as ``levels`` values need, plus two numbers.

        Args:
            levels: how many values a tensor may have (not bits), from 2 (4 for "log") to 2^32.
            mode: "linear" spreads them evenly from the least to the greatest entry, so that no entry moves by more than
                (max - min) / (2 (levels - 1)); "tanh" spreads them evenly in tanh(x); "log" keeps the sign and spreads half
                of them evenly in log2 |x|, and keeps zeros. The extreme values stay exactly as they are.

        Raises:
            ValueError: ``levels`` or ``mode`` is out of range.
            TypeError: ``levels`` is not an integer.
        """
        if mode not in signature_files.SCALES:
            raise unknown("mode", mode, signature_files.SCALES)
        if not isinstance(levels, int):
            raise TypeError(f"levels must be an integer, got {levels!r}")
        check_range("levels", levels, low=4 if mode == "log" else 2, high=2**32)
        return self._with({name: Codes.encode(tensor, levels, mode) for name, tensor in self.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are stored, batch-norm tensors included."""
        return sum(t.nbytes for t in [*self._tensors.values(), *self.batchnorm.values()])

    @property
    def norms(self) -> dict[str, float]:
        """Parameter name -> Euclidean norm of its addition."""
        return {name: float(tensor.double().norm()) for name, tensor in self.items()}

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file; quantised tensors stay quantised."""
        words = {"corruption": self.corruption, "architecture": self.architecture, "models": self.models}
        signature_files.write(path, self._tensors, self.batchnorm, words)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RobustWeightSignature:
        """Reads what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a signature, or of another version.
        """
        tensors, batchnorm, words = signature_files.read(path)
        return cls({}, batchnorm=batchnorm, **words)._with(tensors)

    def _with(self, tensors: Mapping[str, Tensor | Codes]) -> RobustWeightSignature:
        words = {key: getattr(self, key) for key in ("corruption", "architecture", "batchnorm", "models")}
        new = RobustWeightSignature({n: t for n, t in tensors.items() if isinstance(t, Tensor)}, **words)
        new._tensors = dict(tensors)
        return new

    def __getitem__(self, name: str) -> Tensor:
        stored = self._tensors[name]
        return stored.decode() if isinstance(stored, Codes) else stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RobustWeightSignature):
            return NotImplemented
        return (self.architecture, self.models) == (other.architecture, other.models) and all(
            mine.keys() == theirs.keys() and all(torch.equal(mine[n].cpu(), theirs[n].cpu()) for n in mine)
            for mine, theirs in ((self, other), (self.batchnorm, other.batchnorm))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        named = f"{self.corruption!r}, " if self.corruption else ""
        return f"RobustWeightSignature({named}{len(self)} tensors, {self.nbytes} bytes)"


@dataclass
class _Record:
    """What is on a model: the tensors as they were, and every signature with its strength, in the order of application."""

    clean: dict[str, Tensor] = field(default_factory=dict)
    clean_batchnorm: dict[str, Tensor] = field(default_factory=dict)
    active: list[tuple[RobustWeightSignature, float]] = field(default_factory=list)

    def patched(self, name: str, like: Tensor) -> Tensor:
        """Eq. (2): theta_std + sum_c alpha_c RWS_c, summed in float32 at least and rounded once."""
        value = self.clean[name].to(like.device)
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        for signature, strength in self.active:
            if strength != 0 and name in signature:
                addition = signature[name].to(wide)
                wide = wide + (addition if strength == 1 else strength * addition)
        return wide.to(like.dtype)

    def keep_changes(self, tensors: Mapping[str, Tensor]) -> None:
        """Counts what happened to the tensors since they were patched (training, say) as a change of the clean ones."""
        for name, clean in self.clean.items():
            expected = self.patched(name, tensors[name])
            if not torch.equal(tensors[name], expected):
                self.clean[name] = clean.to(expected.device) + (tensors[name] - expected).to(clean.dtype)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts every tensor in the state that the active signatures ask for."""
        for name in self.clean:
            tensors[name].copy_(self.patched(name, tensors[name]))
        mean = _mean_batchnorm([signature for signature, strength in self.active if strength != 0])
        for name, clean in self.clean_batchnorm.items():
            tensors[name].copy_(mean.get(name, clean))


@torch.no_grad()
def apply_(
    model: Model,
    signatures: RobustWeightSignature | Sequence[RobustWeightSignature],
    strengths: float | Sequence[float] | None = None,
    *,
    loader: Iterable[Any] | None = None,
) -> Model:
    """Adds signatures to a model's weights, in place; returns the model.

    The touched tensors are kept beside, so that ``remove_`` gives them back bit for bit, in any order of removal. A network with
    batch norm gets the mean of the robust models' batch-norm tensors whatever the strength (unless it is 0), and then running
    statistics re-estimated on ``loader``; where the strengths sum to alpha < 1, the statistics are (1 - alpha) those of the
    robust models plus alpha the re-estimated ones.

    Args:
        model: a clean model, or one that is patched already.
        signatures: one or several.
        strengths: a number alpha in [0, 1] is shared out, alpha / n for each of n signatures; None is 1. A sequence gives each
            its own. Other finite values are legal, and warn.
        loader: batches of corrupted training data (tensors, or tuples that begin with the inputs).

    Raises:
        ValueError: a tensor is missing in the model or has another shape (it is named), the model is of another architecture, a
            strength is not finite, or there are not as many as signatures. The model is left as it was then.

    Warns:
        UserWarning: a strength is outside [0, 1], or the model has batch norm and there is no ``loader``.
    """
    given = _signatures(signatures)
    alphas = _strengths(strengths, len(given))
    if any(not 0 <= alpha <= 1 for alpha in alphas):
        warnings.warn(f"strengths are meant to lie in [0, 1], got {alphas}", UserWarning, stacklevel=3)
    tensors = _tensors_of(model)
    for signature in given:
        _check_fit(signature, model, tensors)
    record: _Record = getattr(model, _RECORD, None) or _Record()
    record.keep_changes(tensors)
    for signature in given:
        for names, kept in ((signature, record.clean), (signature.batchnorm, record.clean_batchnorm)):
            kept |= {name: tensors[name].detach().clone() for name in names if name not in kept}
    for name, tensor in _statistics(model).items():
        record.clean_batchnorm.setdefault(name, tensor.clone())
    record.active += zip(given, alphas, strict=True)
    setattr(model, _RECORD, record)
    if any(alphas):
        record.write(tensors)
        try:
            _refresh_statistics(model, record, loader)
        except BaseException:  # a batch that the model cannot take, say
            _take_off(model, given, alphas)
            raise
    return model


@torch.no_grad()
def remove_(
    model: Model,
    signatures: RobustWeightSignature | Sequence[RobustWeightSignature] | None = None,
    strengths: float | Sequence[float] | None = None,
    *,
    loader: Iterable[Any] | None = None,
) -> Model:
    """Takes signatures off a model again, in place; returns the model.

    The tensors are as if what is removed had never been applied, bit for bit. If they were changed in between (trained, say), the
    change stays and the signature is subtracted. When nothing is left on the model, its batch-norm tensors are those it had
    before the first patch; otherwise they are set anew as ``apply_`` does.

    Args:
        model: a patched model.
        signatures: what to take off, the latest application of each; everything when None.
        strengths: as given to ``apply_``, where a signature was applied at several; whatever they were when None.
        loader: as for ``apply_``, where other signatures stay on a network with batch norm.

    Raises:
        RuntimeError: a signature is not on the model; the model is left as it was then.
    """
    given = None if signatures is None else _signatures(signatures)
    alphas = None if strengths is None or given is None else _strengths(strengths, len(given))
    record = _take_off(model, given, alphas)
    if any(alpha for _, alpha in record.active):
        _refresh_statistics(model, record, loader)
    return model


@contextmanager
def patch(
    model: Model,
    signatures: RobustWeightSignature | Sequence[RobustWeightSignature],
    strengths: float | Sequence[float] | None = None,
    *,
    loader: Iterable[Any] | None = None,
) -> Iterator[Model]:
    """Signatures on a model for the length of a ``with`` block; arguments, errors and warnings are those of ``apply_``.

    On leaving, the signatures are removed and the batch-norm tensors are those from before the block.
    """
    given = _signatures(signatures)
    alphas = _strengths(strengths, len(given))
    before = {name: t.detach().clone() for name, t in _batchnorm_tensors(model).items()}
    apply_(model, given, alphas, loader=loader)
    try:
        yield model
    finally:
        with torch.no_grad():
            _take_off(model, given, alphas)
            for name, tensor in _batchnorm_tensors(model).items():
                tensor.copy_(before[name])


def _take_off(model: nn.Module, given: list[RobustWeightSignature] | None, alphas: list[float] | None) -> _Record:
    """Removes the latest application of each, everything when None; returns what is left."""
    record: _Record | None = getattr(model, _RECORD, None)
    if record is None:
        raise RuntimeError("the model is not patched: there is nothing to remove")
    left = [] if given is None else list(record.active)
    wanted: Sequence[float | None] = alphas or [None] * len(given or [])
    for signature, alpha in zip(given or [], wanted, strict=True):
        at = [i for i, (on, a) in enumerate(left) if alpha in (None, a) and (on is signature or on == signature)]
        if not at:
            raise RuntimeError(f"{signature} is not applied to the model{'' if alpha is None else f' at strength {alpha:g}'}")
        del left[at[-1]]
    tensors = _tensors_of(model)
    record.keep_changes(tensors)
    record.active = left
    record.write(tensors)
    if not left:
        delattr(model, _RECORD)
    return record


def _refresh_statistics(model: nn.Module, record: _Record, loader: Iterable[Any] | None) -> None:
    statistics = _statistics(model)
    if not statistics:
        return
    if loader is None:
        warnings.warn(
            "the running statistics of batch norm do not fit the patched weights: give loader=, or call reestimate_batchnorm",
            UserWarning,
            stacklevel=4,
        )
        return
    alpha = max(0.0, sum(strength for _, strength in record.active))
    robust = {name: tensor.clone() for name, tensor in statistics.items()}
    reestimate_batchnorm(model, loader)
    if alpha < 1:
        for name, tensor in statistics.items():
            tensor.copy_((1 - alpha) * robust[name] + alpha * tensor)


def _state(weights: Weights) -> Mapping[str, Tensor]:
    return weights.state_dict() if isinstance(weights, nn.Module) else weights


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _batchnorm_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = _tensors_of(model)
    return {name: tensors[name] for name in _batchnorm_names(tensors)}


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of the batch-norm layers."""
    return {
        f"{path}.{name}".removeprefix("."): buffer
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


def _batchnorm_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Floating-point tensors of the modules that keep running statistics."""
    owners = {_owner(name) for name in tensors if name.rpartition(".")[2] == "running_mean"}
    return [name for name, tensor in tensors.items() if _owner(name) in owners and tensor.is_floating_point()]


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _alphabetical(names: list[str]) -> bool:
    """Whether names are sorted although torch, which puts a weight before its bias, would not have them so."""
    both = [_owner(name) for name in names if name.rpartition(".")[2] == "bias" and f"{name[:-4]}weight" in set(names)]
    return bool(both) and names == sorted(names)


def _weighted(tensors: Mapping[str, Tensor]) -> list[str]:
    """Modules whose weight has two dimensions or more: convolution and linear layers."""
    return [_owner(n) for n, t in tensors.items() if n.rpartition(".")[2] == "weight" and t.ndim >= 2]


def _check_plain(tensors: Mapping[str, Tensor]) -> None:
    for name in tensors:
        owner, _, own = name.rpartition(".")
        path = f".{owner}".removesuffix(".parametrizations.weight")
        if own in ("weight_orig", "weight_g") or path != f".{owner}":
            where = f"module {path[1:]!r}" if path[1:] else "the model itself"
            raise UsageError(
                f"the weight of {where} is computed from other tensors (a mask, a parametrisation), so that layers cannot be counted: "
                "make it plain first (torch.nn.utils.prune.remove, parametrize.remove_parametrizations), or name the layers"
            )


def _choose(tensors: Mapping[str, Tensor], layers: Layers, norms: Sequence[str]) -> list[str]:
    able = [name for name, tensor in tensors.items() if tensor.is_floating_point() and name not in set(norms)]
    if isinstance(layers, bool) or not (isinstance(layers, int) or callable(layers) or isinstance(layers, Sequence)):
        raise TypeError(f"layers must be a number, a list of names or a function of a name, got {layers!r}")
    if isinstance(layers, int):
        _check_plain(tensors)
        found = _weighted(tensors)
        if not 1 <= layers <= len(found):
            raise UsageError(
                f"layers must be between 1 and {len(found)}, the convolution and linear layers there are, got {layers}"
            )
        chosen = [name for name in able if _owner(name) in found[:layers] and name.rpartition(".")[2] in ("weight", "bias")]
    elif callable(layers):
        chosen = [name for name in able if layers(name)]
    else:
        wanted = [layers] if isinstance(layers, str) else list(layers)
        for layer in wanted:
            if not any(_inside(name, layer) for name in tensors):
                raise unknown("layer", layer, dict.fromkeys(_owner(name) for name in tensors))
        chosen = [name for name in able if any(_inside(name, layer) for layer in wanted)]
    if not chosen:
        raise UsageError(f"layers chose no tensor that a signature can hold: {layers!r}")
    return chosen


def _inside(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.") or not layer


def _architecture(tensors: Mapping[str, Tensor]) -> str:
    """Hash of all names, and of all shapes but those of the last layer, which differ with the number of classes."""
    head = _weighted(tensors)[-1:]
    lines = sorted(f"{name} {'' if _owner(name) in head else tuple(t.shape)}" for name, t in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _mean_batchnorm(signatures: Sequence[RobustWeightSignature]) -> dict[str, Tensor]:
    """Mean over the robust models of all signatures, of each batch-norm tensor."""
    mean: dict[str, Tensor] = {}
    for name in dict.fromkeys(n for s in signatures for n in s.batchnorm):
        parts = [(s.batchnorm[name], s.models) for s in signatures if name in s.batchnorm]
        total = sum(count for _, count in parts)
        mean[name] = (
            parts[0][0] if len(parts) == 1 else sum((t.to(parts[0][0]) * (n / total) for t, n in parts), start=torch.zeros(()))
        )
    return mean


def _signatures(given: RobustWeightSignature | Sequence[RobustWeightSignature]) -> list[RobustWeightSignature]:
    found = [given] if isinstance(given, RobustWeightSignature) else list(given)
    for signature in found:
        if not isinstance(signature, RobustWeightSignature):
            raise TypeError(f"signatures must be RobustWeightSignature, got {type(signature).__name__}")
    if not found:
        raise UsageError("signatures is empty: give at least one")
    return found


def _strengths(given: float | Sequence[float] | None, count: int) -> list[float]:
    if given is None or isinstance(given, int | float):
        found = [float(1.0 if given is None else given) / count] * count
    else:
        found = [float(a) for a in given]
    if len(found) != count:
        raise UsageError(f"strengths must be one number, or one for each of the {count} signatures, got {len(found)}")
    for alpha in found:
        check_range("strengths", alpha, open_low=True, open_high=True)
    return found


def _check_fit(signature: RobustWeightSignature, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in [*signature._tensors.items(), *signature.batchnorm.items()]:
        if name not in tensors:
            raise UsageError(f"the signature does not fit the model: the model has no tensor {name!r}")
        _check_shapes(name, tensor.shape, tensors[name].shape, "the signature", "the model")
    if signature.architecture is not None and (here := _architecture(model.state_dict())) != signature.architecture:
        raise UsageError(
            f"the signature was made for another architecture: its hash is {signature.architecture}, the model's is {here} "
            f"(names of all tensors, and shapes of all but the last layer's)"
        )


def _check_same(name: str, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    for key, state in states.items():
        if name not in state:
            raise UsageError(f"the weights do not fit together: {key} has no tensor {name!r}")
    first, *others = states
    for other in others:
        _check_shapes(name, states[first][name].shape, states[other][name].shape, first, other)


def _check_shapes(name: str, a: Sequence[int], b: Sequence[int], first: str, second: str) -> None:
    if tuple(a) != tuple(b):
        raise UsageError(f"{name!r} has shape {tuple(a)} in {first} and {tuple(b)} in {second}")
