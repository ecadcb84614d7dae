"""Quantised tensors, and the files that hold them: how a robust weight signature is stored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weightroom.errors import UsageError

__all__ = ["SCALES", "Codes", "Mode", "read", "write"]

Mode = Literal["linear", "log", "tanh"]

_FORMAT, _VERSION = "weightroom.RobustWeightSignature", "1"

#: In which scale the values of a quantised tensor are evenly spread, and the way back.
SCALES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "linear": (np.positive, np.positive),
    "log": (np.log2, np.exp2),
    "tanh": (np.tanh, np.arctanh),
}


@dataclass(frozen=True)
class Codes:
    """A tensor as integers: code q of n stands for the value that lies q / (n - 1) of the way from ``low`` to ``high``.

    In the scale "log" the codes are those of |x|, plus n for a negative x; 2 n is zero.
    """

    packed: Tensor
    bits: int
    low: Tensor
    high: Tensor
    levels: int
    mode: Mode
    shape: tuple[int, ...]

    @classmethod
    def encode(cls, x: Tensor, levels: int, mode: Mode) -> Codes:
        """Returns the nearest codes of a tensor; see ``RobustWeightSignature.quantize``."""
        values = x.detach().cpu().double().flatten().numpy()
        n, size, kept = levels, values, values
        if mode == "log":
            n, size = levels // 2, np.abs(values)
            kept = size[size > 0]
        low, high = (kept.min(), kept.max()) if len(kept) else (0.0, 0.0)
        there, _ = _scale(mode, low, high)
        with np.errstate(divide="ignore"):
            share = (there(size) - there(low)) / (there(high) - there(low)) if high > low else np.zeros_like(size)
        codes = np.rint(np.clip(share, 0, 1) * (n - 1)).astype(np.int64)
        if mode == "log":
            codes = np.where(values == 0, 2 * n, codes + n * (values < 0))
        bits = max(1, int(codes.max(initial=0)).bit_length())
        ends = [torch.tensor(end, dtype=x.dtype) for end in (low, high)]
        return cls(_pack(codes, bits), bits, ends[0], ends[1], levels, mode, tuple(x.shape))

    def decode(self) -> Tensor:
        """Returns the tensor that the codes stand for, on the CPU."""
        codes = _unpack(self.packed, self.bits, math.prod(self.shape))
        low, high = float(self.low), float(self.high)
        n, zero, negative = self.levels, np.zeros(len(codes), bool), np.zeros(len(codes), bool)
        if self.mode == "log":
            n = self.levels // 2
            zero, negative, codes = codes == 2 * n, codes // n == 1, codes % n
        there, back = _scale(self.mode, low, high)
        start, end = there(low), there(high)
        with np.errstate(divide="ignore"):
            values = np.clip(back(np.clip(codes / (n - 1) * (end - start) + start, start, end)), low, high)
        values = np.where(codes == 0, low, np.where(codes == n - 1, high, values))
        values = np.where(zero, 0.0, np.where(negative, -values, values))
        return torch.from_numpy(values).to(self.low.dtype).view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the two extremes."""
        return self.packed.nbytes + self.low.nbytes + self.high.nbytes


def _scale(mode: Mode, low: float, high: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """The scale and the way back; linear where the extremes cannot be told apart in it (tanh 19 = tanh 20 = 1)."""
    there, back = SCALES[mode]
    return (there, back) if low < high and there(low) < there(high) else SCALES["linear"]


def _pack(codes: NDArray[np.int64], bits: int) -> Tensor:
    return torch.from_numpy(np.packbits(np.stack([(codes >> i & 1).astype(np.uint8) for i in range(bits)], 1)))


def _unpack(packed: Tensor, bits: int, count: int) -> NDArray[np.int64]:
    flags = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    codes = np.zeros(count, np.int64)
    for i in range(bits):
        codes |= flags[:, i].astype(np.int64) << i
    return codes


def write(
    path: str | PathLike[str], tensors: Mapping[str, Tensor | Codes], batchnorm: Mapping[str, Tensor], words: Mapping[str, Any]
) -> None:
    """Writes tensors, batch-norm tensors and what ``json`` can hold to a safetensors file."""
    parts, codes = {f"batchnorm/{name}": t for name, t in batchnorm.items()}, {}
    for name, stored in tensors.items():
        if isinstance(stored, Codes):
            codes[name] = {key: getattr(stored, key) for key in ("bits", "levels", "mode", "shape")}
            parts |= {f"{key}/{name}": getattr(stored, key) for key in ("packed", "low", "high")}
        else:
            parts[f"tensor/{name}"] = stored
    about = {**words, "names": list(tensors), "codes": codes}
    metadata = {"format": _FORMAT, "version": _VERSION, "about": json.dumps(about)}
    save_file({name: t.cpu().contiguous().clone() for name, t in parts.items()}, path, metadata=metadata)


def read(path: str | PathLike[str]) -> tuple[dict[str, Tensor | Codes], dict[str, Tensor], dict[str, Any]]:
    """Returns what ``write`` was given; see ``RobustWeightSignature.load`` for the errors."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{path} is not a signature: {error}") from None
    if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
        found = f"{metadata.get('format')!r}, version {metadata.get('version')!r}"
        raise UsageError(f"{path} is not a signature that can be read: {found}, not {_FORMAT!r}, version {_VERSION!r}")
    words = json.loads(metadata["about"])
    names, codes = words.pop("names"), words.pop("codes")

    def stored(name: str) -> Tensor | Codes:
        if name not in codes:
            return parts[f"tensor/{name}"]
        how = {**codes[name], "shape": tuple(codes[name]["shape"])}
        return Codes(**{key: parts[f"{key}/{name}"] for key in ("packed", "low", "high")}, **how)

    batchnorm = {name.removeprefix("batchnorm/"): t for name, t in parts.items() if name.startswith("batchnorm/")}
    return {name: stored(name) for name in names}, batchnorm, words
